"""Would a whole bottleneck in one kernel pay? A model of it beside the tail (conv2 → conv3 → add → the next conv1), for ResNets on Hopper.

Both do the same products for each block without projection. The tail reads and writes what is between blocks twice, narrow and wide; the
whole block once, wide, but takes conv1 again for the halo of its tile and needs both narrow results in shared memory. A tile is a box of
images × rows × columns; its time on one SM the larger of its products (in whole 64 rows, as wgmma takes them) and of what comes and goes
through L2, the weights with every tile unless they stay in shared memory; a block's, the fullest SM's or DRAM's.

Predicted for ResNet-50's blocks without projection, 256 images at 224², bf16, an H200 (µs a block, tail → whole): layer1 239 → 221 (191 if
L2, whose rate is guessed, cost nothing), layer2 167 → 199, layer3 224 → 236, layer4 384 → 760: beyond layer1 the weights that come with
every tile of both forms bind, and the whole block's tiles are smaller, for two narrow results want shared memory. It would pay in layer1
alone, for two blocks 37 µs of the 3,202 that the network's floor with tails is, where the tails themselves save 879 of 4,081. There conv1's
result would have to be an operand at nine shifts inside shared memory, which Triton cannot address. So there is none.
``python benchmarks/whole_blocks.py`` prints the model's table: run it anew once a GPU has said how fast its L2 is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import ceil

from resnet_fast.console import table
from resnet_fast.layers import layers
from resnet_fast.roofline import ceilings

# Of one SM of Hopper, as ``kernels.triton.gemm_config`` has them: how many there are, bytes of shared memory for a block, FLOP and bytes a ns.
SMS, SHARED, MMA, L2 = 132, 227 * 1024, 5980.0, 49.0
_ROWS, _STAGES, _DEPTH = 64, 2, 64  # of a matrix instruction; operands under way, and their channels
_ITEM = 2


@dataclass(frozen=True)
class Bottleneck:
    """A block without projection: images, size of the map, its wide and narrow channels."""

    images: int
    size: int
    wide: int
    narrow: int

    @property
    def weights(self) -> int:
        """Bytes of the filters of a whole block, and of a tail: two 1×1 and the 3×3."""
        return _ITEM * self.narrow * (2 * self.wide + 9 * self.narrow)


@dataclass(frozen=True)
class Predicted:
    """Seconds of a block by its best tile, the tile, whether weights stay, and what bounds it: "memory", "compute" or "L2"."""

    seconds: float
    box: tuple[int, int, int]
    resident: bool
    bound: str


def blocks(model: str, batch: int, size: int = 224) -> dict[str, tuple[Bottleneck, int]]:
    """Stage → its blocks without projection, alike, and how many there are."""
    found: dict[str, tuple[Bottleneck, int]] = {}
    problems = {layer.name: layer.problem for layer in layers(model, batch, size)}
    for name, problem in problems.items():
        block, _, conv = name.rpartition(".")
        if conv == "conv1" and block and f"{block}.downsample.0" not in problems and f"{block}.conv3" in problems:
            narrow, wide, *_ = problem.weight
            one = Bottleneck(batch, problem.x[2], wide, narrow)
            stage = block.split(".")[0]
            found[stage] = one, found.get(stage, (one, 0))[1] + 1
    return found


def predict(b: Bottleneck, whole: bool) -> Predicted | None:
    """The best of all tiles and of weights that stay or come with each; None if none fits shared memory."""
    return min(_candidates(b, whole), key=lambda p: p.seconds, default=None)


def _candidates(b: Bottleneck, whole: bool) -> Iterator[Predicted]:
    pixels = b.images * b.size**2
    between = 2 * b.wide if whole else 2 * (b.wide + b.narrow)
    memory = (_ITEM * pixels * between + b.weights) / ceilings("h200").copy
    sizes = sorted({b.size, *(s for s in (4, 7, 8, 14, 16, 28) if s < b.size)})
    for images, rows, columns, resident in product((1, 2, 4, 8), sizes, sizes, (False, True)):
        tile, halo = images * rows * columns, images * min(rows + 2, b.size) * min(columns + 2, b.size)
        if tile > 256 or _shared(b, whole, tile, halo, resident) > SHARED:
            continue
        tiles = ceil(b.images / images) * ceil(b.size / rows) * ceil(b.size / columns)
        compute = _products(b, whole, tile, halo) / MMA
        moved = _ITEM * (halo * (b.wide if whole else b.narrow) + tile * (2 * b.wide + (0 if whole else b.narrow)))
        l2 = (moved + (0 if resident else b.weights)) / L2
        on_chip = ceil(tiles / SMS) * max(compute, l2) * 1e-9
        bound = "memory" if memory >= on_chip else "compute" if compute >= l2 else "L2"
        yield Predicted(max(memory, on_chip), (images, rows, columns), resident, bound)


def _products(b: Bottleneck, whole: bool, tile: int, halo: int) -> int:
    """FLOP of a tile; the whole block's first convolution covers the halo."""

    def rows(count: int) -> int:
        return _ROWS * ceil(count / _ROWS)

    first = rows(halo if whole else tile)
    return 2 * b.narrow * (first * b.wide + rows(tile) * (9 * b.narrow + b.wide))


def _shared(b: Bottleneck, whole: bool, tile: int, halo: int, resident: bool) -> int:
    """Bytes: what the 3×3 reads with its halo, its result, weights or a share of them under way, and in the whole block x."""
    narrow = (halo + tile) * b.narrow
    under_way = _STAGES * _DEPTH * ((halo if whole else 0) + (0 if resident else b.narrow))
    return _ITEM * (narrow + under_way) + (b.weights if resident else 0)


if __name__ == "__main__":
    print("predicted for ResNet-50's blocks without projection, 256 images at 224², bf16, an H200:\n")
    print(
        table(
            ("stage", "blocks", "tail µs", "bound by", "whole µs", "bound by"),
            [
                (
                    stage,
                    n,
                    *(
                        cell
                        for p in (predict(b, False), predict(b, True))
                        for cell in (f"{p.seconds * 1e6:.0f}", p.bound)
                    ),
                )
                for stage, (b, n) in blocks("resnet50", 256).items()
            ],
            right=(1, 2, 4),
        )
    )
