"""Problem → tile of the kernels on tensor descriptors, as a pure function; the manner and the chips of ``gemm_config``.

A tile is a box of pixels, images × rows × columns of the result, times filters. Boxes are what TMA can load for a tap;
the best is one that divides the result, so images make up what rows and columns lack: 56² in 2·8·8, 14² in 32·2·2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, prod

from . import gemm_config
from .gemm_config import Gemm, chip

# Estimates as in ``gemm_config``: what a dependent load from memory takes; bytes per ns and SM out of shared memory.
_LATENCY_NS, _SHARED_RATE = 1000.0, 225.0
MOST_RESIDENT = 256  # channels of a filter that stay in shared memory


@dataclass(frozen=True)
class Window:
    """The result's images, rows and columns, and which share of the taps falls inside the image at single pixels."""

    images: int
    rows: int = 1
    columns: int = 1
    inside: float = 1.0


@dataclass(frozen=True)
class TileConfig:
    """Box of pixels (images, rows, columns), filters and channels of a tile; whether its filters stay in shared memory
    for all tiles of a block; warps, stages, blocks an SM.
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


def shared(g: Gemm, c: TileConfig) -> int:
    """Bytes of shared memory: the operands under way, the residual's tile (with resident filters it is under way too)
    and the result's on its way out.
    """
    tile = c.pixels * c.filters
    if c.resident:
        elements = (c.filters + c.num_stages * c.pixels) * c.channels + tile * (1 + (c.num_stages - 1) * g.residual)
    else:
        elements = c.num_stages * (c.pixels + c.filters) * c.channels + tile * (1 + g.residual)
    return elements * g.itemsize


def registers(g: Gemm, c: TileConfig) -> int:
    """Roughly the registers that a thread can be held to without a spill, fitted to what ptxas reported: accumulators and
    half as many for a residual; more where operands come by registers, most for float32, whose FMA units hold whole tiles.
    """
    own = c.pixels * c.filters // c.threads
    if g.itemsize == 4:
        return 128 + 4 * own
    if g.capability is not None and g.capability[0] != 9:
        return 64 + own * (2 + g.residual)
    return 32 + own + own // 2 * g.residual


def tiles(g: Gemm, window: Window, c: TileConfig) -> tuple[int, int]:
    """How many tiles there are along pixels and filters."""
    sizes = window.images, window.rows, window.columns
    return prod(ceil(size / box) for size, box in zip(sizes, c.box, strict=True)), ceil(g.n / c.filters)


def grid(g: Gemm, window: Window, c: TileConfig) -> tuple[int, int]:
    """Blocks: as many as run at once, or one for each tile if these are fewer; resident filters share them out."""
    pixels, filters = tiles(g, window, c)
    slots = chip(g.capability).sms * c.blocks
    if c.resident:
        return min(pixels, max(1, slots // filters)), filters
    return min(pixels * filters, slots), 1


def predicted_ns(g: Gemm, window: Window, c: TileConfig) -> float:
    """Predicted nanoseconds: tiles on the fullest SM × (trips × (max(matrix units, L2 → SM, shared memory) + barrier) +
    stores + what no other block hides: the pipeline's fill where taps are skipped, the residual where filters are not resident).

    DRAM, which all tiles share, is left out.
    """
    on = chip(g.capability)
    pixels, filters = tiles(g, window, c)
    blocks = prod(grid(g, window, c))
    fullest = ceil(pixels * filters / blocks) * ceil(blocks / on.sms)
    rate = on.mma if g.itemsize == 2 else on.fma
    trips = 1 if c.resident else g.taps * ceil(g.channels / c.channels)
    if c.skips:
        trips *= window.inside
    loaded = (c.pixels + c.filters * (not c.resident)) * c.channels * g.itemsize
    # Each 64 filters read all pixels from shared memory.
    fed = (64 + c.pixels) * ceil(c.filters / 64) * c.channels * g.itemsize
    trip = max(2 * c.pixels * max(64, c.filters) * c.channels / rate, loaded / on.l2, fed / _SHARED_RATE)
    out = c.pixels * c.filters * g.itemsize * (1 + g.residual) / on.l2
    exposed = _LATENCY_NS * (c.skips and g.taps > 1) + _LATENCY_NS * (g.residual and not c.resident)
    return fullest * (trips * (trip + gemm_config.TRIP_NS) + out + exposed / c.blocks) + gemm_config.FILL_NS


@lru_cache(maxsize=4096)
def configs(
    g: Gemm, window: Window, resident: bool = False, depths: tuple[int, ...] = (16, 32, 64)
) -> tuple[TileConfig, ...]:
    """Every tile that fits the chip, best predicted first; ties go to the larger tile, then to more blocks an SM.

    ``resident`` says that the kernel has a form whose filters stay in shared memory; ``depths`` are the channels that a trip may take.
    """
    on = chip(g.capability)
    fitting = []
    for c in _candidates(g, window, resident, depths):
        blocks = min(on.shared_sm // (shared(g, c) + 2 * gemm_config.KIB), 65536 // (registers(g, c) * c.threads), 4)
        if blocks >= 1 and shared(g, c) + gemm_config.KIB <= on.shared and registers(g, c) <= 255:
            fitting.append(TileConfig(*_fields(c), blocks))

    def rank(c: TileConfig) -> tuple:
        return predicted_ns(g, window, c), -c.pixels * c.filters, -c.blocks, -c.channels, -c.box[1], -c.num_stages

    return tuple(sorted(fitting, key=rank))


def config(g: Gemm, window: Window, resident: bool = False, depths: tuple[int, ...] = (16, 32, 64)) -> TileConfig:
    """The tile a kernel runs with when no table says otherwise."""
    return configs(g, window, resident, depths)[0]


def _fields(c: TileConfig) -> tuple:
    return c.box, c.filters, c.channels, c.resident, c.num_warps, c.num_stages


def _candidates(g: Gemm, window: Window, resident: bool, depths: tuple[int, ...]) -> Iterator[TileConfig]:
    half = g.itemsize == 2
    largest = 256 if half and g.capability is not None and g.capability[0] == 9 else 128 if half else 64
    for pixels in (size for size in (32, 64, 128, 256) if size <= largest):
        box = _box(pixels, window)
        for filters in gemm_config.useful_sizes(tuple(size for size in (64, 128, 256) if size <= largest), g.n):
            num_warps = 8 if pixels * filters > (64 * 128 if half else 32 * 64) else 4
            for channels in depths:
                # Only the kernel with a resident form reads past the last channel, where it finds zeros.
                if not resident and g.channels % channels or not half and channels > 32:
                    continue
                for num_stages in (2, 3, 4, 5):
                    yield TileConfig(box, filters, channels, False, num_warps, num_stages)
            if half and resident and g.channels <= MOST_RESIDENT:
                channels = max(16, gemm_config.power_of_two(g.channels))
                for num_stages in (2, 3, 4):
                    yield TileConfig(box, filters, channels, True, num_warps, num_stages)


@lru_cache(maxsize=4096)
def _box(pixels: int, window: Window) -> tuple[int, int, int]:
    """The box of so many pixels that covers the result with the least work; among equals the one with whole rows in it,
    whose pixels are neighbours in memory.
    """
    found = []
    for rows, columns in ((1 << i, 1 << j) for i in range(9) for j in range(9)):
        if rows * columns <= pixels and rows < 2 * window.rows and columns < 2 * window.columns:
            box = pixels // (rows * columns), rows, columns
            count = prod(
                ceil(size / b) for size, b in zip((window.images, window.rows, window.columns), box, strict=True)
            )
            found.append((count, abs(rows - columns), -columns, box))
    return min(found)[-1]
