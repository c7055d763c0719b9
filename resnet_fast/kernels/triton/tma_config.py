"""Configs of the kernels on tensor descriptors: problem → tile, as a pure function, in the manner of ``gemm_config``.

A tile is a box of pixels, images × rows × columns of the result, times filters. Boxes are what TMA can load for a tap;
the best is one that divides the result, so images make up what rows and columns lack: 56² in 2·8·8, 14² in 32·2·2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from math import ceil, prod

from ...roofline.chips import Chip
from .gemm_config import FILL_NS, KIB, TRIP_NS, Gemm, chip, power_of_two, useful_sizes

# Estimates as in ``gemm_config``.
_LATENCY_NS = 1000.0  # a dependent load from memory
_SHARED_RATE = 225.0  # bytes per ns and SM out of shared memory
MOST_RESIDENT = 256  # channels of a filter that stay in shared memory
_DEPTHS = (16, 32, 64)  # channels that a trip takes


@dataclass(frozen=True)
class Window:
    """The result's images, rows and columns, and which share of the taps falls inside the image at single pixels."""

    images: int
    rows: int = 1
    columns: int = 1
    inside: float = 1.0


@dataclass(frozen=True)
class TileConfig:
    """Box of pixels (images, rows, columns), filters and channels of a tile; warps, stages, blocks an SM.

    ``resident``: the filters stay in shared memory for all tiles of a block.
    """

    box: tuple[int, int, int]
    filters: int
    channels: int
    resident: bool
    num_warps: int
    num_stages: int
    blocks: int = 1

    @property
    def pixels(self) -> int:
        return prod(self.box)

    @property
    def threads(self) -> int:
        return 32 * self.num_warps

    @property
    def skips(self) -> bool:
        """Whether taps outside the image are left out: in boxes of one row and column they are so for every pixel."""
        return self.box[1:] == (1, 1)

    def options(self) -> dict:
        """Compile options; where several blocks are to share an SM, registers are capped so that they can."""
        cap = {"maxnreg": 65536 // (self.blocks * self.threads) // 8 * 8} if self.blocks > 1 else {}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **cap}


def config(
    g: Gemm, window: Window, resident: bool = False, depths: tuple[int, ...] = _DEPTHS
) -> TileConfig:
    """The tile a kernel runs with when no table says otherwise."""
    return configs(g, window, resident, depths)[0]


@lru_cache(maxsize=4096)
def configs(
    g: Gemm, window: Window, resident: bool = False, depths: tuple[int, ...] = _DEPTHS
) -> tuple[TileConfig, ...]:
    """Every tile that fits the chip, best predicted first; ties go to the larger tile, then to more blocks an SM.

    ``resident`` says that the kernel has a form with filters that stay in shared memory; ``depths`` are the channels
    that a trip may take.
    """
    on = chip(g.capability)
    fitting = []
    for tile in _tiles(g, window, resident, depths):
        blocks = _blocks_per_sm(g, tile, on)
        if blocks >= 1 and shared(g, tile) + KIB <= on.shared and registers(g, tile) <= 255:
            fitting.append(replace(tile, blocks=blocks))

    def rank(c: TileConfig) -> tuple:
        area = c.pixels * c.filters
        ns = predicted_ns(g, window, c)
        return ns, -area, -c.blocks, -c.channels, -c.box[1], -c.num_stages

    return tuple(sorted(fitting, key=rank))


def _tiles(
    g: Gemm, window: Window, resident: bool, depths: tuple[int, ...]
) -> Iterator[TileConfig]:
    half = g.itemsize == 2
    largest = _largest_side(g)
    pixel_sizes = [size for size in (32, 64, 128, 256) if size <= largest]
    filter_sizes = useful_sizes(tuple(size for size in (64, 128, 256) if size <= largest), g.n)
    for pixels, filters in product(pixel_sizes, filter_sizes):
        box = _box(pixels, window)
        num_warps = 8 if pixels * filters > (64 * 128 if half else 32 * 64) else 4
        for channels in depths:
            # Only the kernel with a resident form reads past the last channel, where it finds zeros.
            remainder = not resident and g.channels % channels
            too_deep = not half and channels > 32
            if remainder or too_deep:
                continue
            for num_stages in (2, 3, 4, 5):
                yield TileConfig(box, filters, channels, False, num_warps, num_stages)
        if half and resident and g.channels <= MOST_RESIDENT:
            channels = max(16, power_of_two(g.channels))
            for num_stages in (2, 3, 4):
                yield TileConfig(box, filters, channels, True, num_warps, num_stages)


def _largest_side(g: Gemm) -> int:
    """The most pixels or filters of a tile: wgmma has 256 columns, float32 runs on the FMA units."""
    if g.itemsize != 2:
        return 64
    return 256 if g.capability is not None and g.capability[0] == 9 else 128


def _blocks_per_sm(g: Gemm, c: TileConfig, on: Chip) -> int:
    by_shared = on.shared_sm // (shared(g, c) + 2 * KIB)
    by_registers = on.registers // (registers(g, c) * c.threads)
    return min(by_shared, by_registers, 4)


@lru_cache(maxsize=4096)
def _box(pixels: int, window: Window) -> tuple[int, int, int]:
    """The box of so many pixels that covers the result with the least work.

    Among equals it is the one with whole rows in it, which are neighbours in memory.
    """
    sides = [1 << i for i in range(9)]
    ranked = []
    for rows, columns in product(sides, sides):
        if rows * columns <= pixels and rows < 2 * window.rows and columns < 2 * window.columns:
            box = pixels // (rows * columns), rows, columns
            ranked.append((_boxes(window, box), abs(rows - columns), -columns, box))
    return min(ranked)[-1]


def _boxes(window: Window, box: tuple[int, int, int]) -> int:
    """How many boxes cover the result."""
    sizes = window.images, window.rows, window.columns
    return prod(ceil(size / side) for size, side in zip(sizes, box, strict=True))


# ---------------------------------------------------------------- what a tile costs


def tiles(g: Gemm, window: Window, c: TileConfig) -> tuple[int, int]:
    """How many tiles there are along pixels and filters."""
    return _boxes(window, c.box), ceil(g.n / c.filters)


def grid(g: Gemm, window: Window, c: TileConfig) -> tuple[int, int]:
    """Blocks: as many as run at once, or one for each tile if these are fewer; resident filters share them out."""
    pixels, filters = tiles(g, window, c)
    slots = chip(g.capability).sms * c.blocks
    if c.resident:
        return min(pixels, max(1, slots // filters)), filters
    return min(pixels * filters, slots), 1


def predicted_ns(g: Gemm, window: Window, c: TileConfig) -> float:
    """Predicted nanoseconds: tiles on the fullest SM × (trips × (the slowest of matrix units, L2 → SM and shared memory
    + barrier) + stores + exposed latency) + the first operands' way.

    DRAM, which all tiles share, is left out.
    """
    on = chip(g.capability)
    pixels, filters = tiles(g, window, c)
    blocks = prod(grid(g, window, c))
    fullest = ceil(pixels * filters / blocks) * ceil(blocks / on.sms)

    trips: float = 1 if c.resident else g.taps * ceil(g.channels / c.channels)
    if c.skips:
        trips *= window.inside

    rate = on.mma if g.itemsize == 2 else on.fma
    loaded = (c.pixels + c.filters * (not c.resident)) * c.channels * g.itemsize
    # Each 64 filters read all pixels from shared memory.
    fed = (64 + c.pixels) * ceil(c.filters / 64) * c.channels * g.itemsize
    trip = max(
        2 * c.pixels * max(64, c.filters) * c.channels / rate, loaded / on.l2, fed / _SHARED_RATE
    )
    out = c.pixels * c.filters * g.itemsize * (1 + g.residual) / on.l2

    # No other tile hides the pipeline's fill where taps are skipped, nor the residual where filters are not resident.
    exposed = _LATENCY_NS * (c.skips and g.taps > 1) + _LATENCY_NS * (g.residual and not c.resident)
    return fullest * (trips * (trip + TRIP_NS) + out + exposed / c.blocks) + FILL_NS


def shared(g: Gemm, c: TileConfig) -> int:
    """Bytes of shared memory: the operands in flight, the residual's tile and the result's on its way out.

    With resident filters the residual is in flight too.
    """
    tile = c.pixels * c.filters
    if c.resident:
        elements = (c.filters + c.num_stages * c.pixels) * c.channels + tile * (
            1 + (c.num_stages - 1) * g.residual
        )
    else:
        elements = c.num_stages * (c.pixels + c.filters) * c.channels + tile * (1 + g.residual)
    return elements * g.itemsize


def registers(g: Gemm, c: TileConfig) -> int:
    """Roughly the registers that a thread can be held to without a spill, fitted to what ptxas reported."""
    accumulators = c.pixels * c.filters // c.threads
    if g.itemsize == 4:  # the FMA units hold whole tiles of operands in registers
        return 128 + 4 * accumulators
    if g.capability is not None and g.capability[0] != 9:  # operands come by registers
        return 64 + accumulators * (2 + g.residual)
    return 32 + accumulators + accumulators // 2 * g.residual
