"""Would a whole bottleneck in one kernel pay? A model of it beside the tail, for ResNets on Hopper.

The tail is conv2 → conv3 → add → the next conv1. Both kernels do the same multiplications for each block without
projection. The tail reads and writes the tensors between blocks twice, one narrow and one wide. The whole block does it
once, wide, but computes conv1 again for the halo of its tile and needs both narrow results in shared memory.

A tile is a box of images × rows × columns. Its time on one SM is the larger of its multiplications (in whole 64 rows,
as wgmma takes them) and its traffic through L2, the weights with every tile unless they stay in shared memory. A
block's time is the larger of the fullest SM's and DRAM's.

Predicted for ResNet-50's blocks without projection, 256 images at 224², bf16, an H200 (µs a block, tail → whole):
layer1 239 → 221 (191 if L2, whose rate is guessed, cost nothing), layer2 167 → 199, layer3 224 → 236, layer4 384 → 760.
Beyond layer1 the weights that come with every tile of both forms bind, and the whole block's tiles are smaller, as two
narrow results need shared memory. It would pay in layer1 alone, for two blocks: 37 µs of the 3,202 of the network's
floor with tails, where the tails themselves save 879 of 4,081. There conv1's result would have to be an operand at
nine shifts inside shared memory, which Triton cannot address. So there is no such kernel.

``python -m tools.whole_blocks`` prints the model's table. Run it again once a GPU has shown how fast its L2 is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import ceil

from resnet_fast.models.problems import conv_layers
from resnet_fast.roofline.chips import CHIPS, ceilings
from resnet_fast.util.text import table

_H200 = CHIPS["h200"]
SMS, SHARED = _H200.sms, _H200.shared
MMA, L2 = _H200.mma, _H200.l2  # FLOP and bytes a nanosecond of one SM
# of a matrix instruction; operands in flight, and their channels
_ROWS, _STAGES, _DEPTH = 64, 2, 64
_ITEM = 2  # bytes of an element


@dataclass(frozen=True)
class Bottleneck:
    """A block without projection: images, size of the map, its wide and narrow channels."""

    images: int
    size: int
    wide: int
    narrow: int

    @property
    def weights(self) -> int:
        """Bytes of the filters, of a whole block as of a tail: two 1×1 and the 3×3."""
        pointwise = 2 * self.wide
        spatial = 9 * self.narrow
        return _ITEM * self.narrow * (pointwise + spatial)


@dataclass(frozen=True)
class Predicted:
    """A block's seconds by one tile, whether its weights stay in shared memory, and what bounds it."""

    seconds: float
    box: tuple[int, int, int]
    resident: bool
    bound: str  # "memory", "compute" or "L2"


def blocks(model: str, batch: int, size: int = 224) -> dict[str, tuple[Bottleneck, int]]:
    """Return each stage's block without projection, and how many there are. They are all alike."""
    found: dict[str, tuple[Bottleneck, int]] = {}
    problems = {layer.name: layer.problem for layer in conv_layers(model, batch, size)}
    for name, problem in problems.items():
        block, _, conv = name.rpartition(".")
        if conv != "conv1" or not block:
            continue
        if f"{block}.downsample.0" in problems or f"{block}.conv3" not in problems:
            continue
        narrow, wide, *_ = problem.weight
        one = Bottleneck(batch, problem.x[2], wide, narrow)
        stage = block.split(".")[0]
        _, count = found.get(stage, (one, 0))
        found[stage] = one, count + 1
    return found


def predict(b: Bottleneck, whole: bool) -> Predicted | None:
    """Return the best of all tiles, with weights that stay or come with each; None if none fits shared memory."""
    return min(_candidates(b, whole), key=lambda p: p.seconds, default=None)


def _candidates(b: Bottleneck, whole: bool) -> Iterator[Predicted]:
    """Yield the prediction for every tile that fits shared memory."""
    smaller = [size for size in (4, 7, 8, 14, 16, 28) if size < b.size]
    sizes = [*smaller, b.size]
    for box in product((1, 2, 4, 8), sizes, sizes):
        for resident in (False, True):
            predicted = _predict_tile(b, whole, box, resident)
            if predicted is not None:
                yield predicted


def _predict_tile(
    b: Bottleneck, whole: bool, box: tuple[int, int, int], resident: bool
) -> Predicted | None:
    """Return the prediction for one tile, or None if it does not fit."""
    images, rows, columns = box
    tile = images * rows * columns
    halo = images * min(rows + 2, b.size) * min(columns + 2, b.size)
    if tile > 256 or _shared(b, whole, tile, halo, resident) > SHARED:
        return None
    compute = _products(b, whole, tile, halo) / MMA
    l2 = _l2_bytes(b, whole, tile, halo, resident) / L2
    tiles = ceil(b.images / images) * ceil(b.size / rows) * ceil(b.size / columns)
    tiles_of_fullest_sm = ceil(tiles / SMS)
    on_chip = tiles_of_fullest_sm * max(compute, l2) * 1e-9
    memory = _memory_seconds(b, whole)
    if memory >= on_chip:
        return Predicted(memory, box, resident, "memory")
    bound = "compute" if compute >= l2 else "L2"
    return Predicted(on_chip, box, resident, bound)


def _memory_seconds(b: Bottleneck, whole: bool) -> float:
    """Return the seconds that DRAM needs for the tensors between blocks and the weights."""
    pixels = b.images * b.size**2
    channels = 2 * b.wide if whole else 2 * (b.wide + b.narrow)
    moved = _ITEM * pixels * channels + b.weights
    return moved / ceilings("h200").copy


def _l2_bytes(
    b: Bottleneck,
    whole: bool,
    tile: int,
    halo: int,
    resident: bool,
) -> int:
    """Return the bytes of a tile that pass through L2."""
    read = halo * (b.wide if whole else b.narrow)
    residual_and_output = tile * 2 * b.wide
    next_input = 0 if whole else tile * b.narrow
    weights = 0 if resident else b.weights
    return _ITEM * (read + residual_and_output + next_input) + weights


def _products(
    b: Bottleneck,
    whole: bool,
    tile: int,
    halo: int,
) -> int:
    """Return the FLOP of a tile; the whole block's first convolution covers the halo."""

    def rows(count: int) -> int:
        return _ROWS * ceil(count / _ROWS)

    first = rows(halo if whole else tile) * b.wide
    rest = rows(tile) * (9 * b.narrow + b.wide)
    return 2 * b.narrow * (first + rest)


def _shared(
    b: Bottleneck,
    whole: bool,
    tile: int,
    halo: int,
    resident: bool,
) -> int:
    """Return the bytes of shared memory.

    The input of the 3×3 with its halo, its result, the weights or those in flight, and in the whole block x.
    """
    narrow = (halo + tile) * b.narrow
    rows_in_flight = halo if whole else 0
    if not resident:
        rows_in_flight += b.narrow
    in_flight = _STAGES * _DEPTH * rows_in_flight
    weights = b.weights if resident else 0
    return _ITEM * (narrow + in_flight) + weights


def main() -> None:
    """Print the table for ResNet-50."""
    print(
        "predicted for ResNet-50's blocks without projection, 256 images at 224², bf16, an H200:\n"
    )
    head = ("stage", "blocks", "tail µs", "bound by", "whole µs", "bound by")
    rows = []
    for stage, (block, count) in blocks("resnet50", 256).items():
        row = [stage, count]
        for whole in (False, True):
            predicted = predict(block, whole)
            row += [f"{predicted.seconds * 1e6:.0f}", predicted.bound]
        rows.append(tuple(row))
    print(table(head, rows, right=(1, 2, 4)))


if __name__ == "__main__":
    main()
