"""Problem → config, as a pure function: nothing is timed, nothing is remembered, the same answer on every machine.

In the manner of DeepGEMM: enumerate the tiles that fit the chip, predict each one's time from a few rates, take the
least. The prediction only has to rank tiles of one problem; a measured table overrules it problem by problem.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import ceil

# Up to here a block of 16 channels would be half padding: taps and channels are walked as one axis.
FLAT_CHANNELS = 8
# Estimates of the same kind as Chip's: a trip's barrier and addresses, the first operands' way from DRAM, one more
# launch in a graph.
_TRIP_NS, _FILL_NS, _LAUNCH_NS = 20.0, 1000.0, 2500.0


@dataclass(frozen=True)
class Chip:
    """Rates that rank tiles: data sheets, but for the H200's matrix rate (790 TFLOP/s, measured) and L2 (guessed)."""

    sms: int
    shared: int  # bytes of shared memory one block may use
    shared_sm: int  # bytes one SM has
    mma: float  # 16-bit matrix FLOP per ns and SM, float32 accumulation
    fma: float  # float32 FLOP per ns and SM
    l2: float  # bytes per ns and SM out of L2


_KIB = 1024
CHIPS = {
    (8, 0): Chip(108, 163 * _KIB, 164 * _KIB, 2890, 180, 40),  # A100
    (8, 6): Chip(84, 99 * _KIB, 100 * _KIB, 900, 420, 30),  # A40, RTX 3090
    (8, 9): Chip(142, 99 * _KIB, 100 * _KIB, 2550, 640, 40),  # L40S
    (9, 0): Chip(132, 227 * _KIB, 228 * _KIB, 5980, 500, 49),  # H100, H200
    (10, 0): Chip(148, 227 * _KIB, 228 * _KIB, 15200, 540, 65),  # B200
    (12, 0): Chip(188, 99 * _KIB, 100 * _KIB, 2600, 660, 40),  # RTX PRO 6000
}
# The interpreter runs one block after the other in Python, at a cost for each operation and not for each element:
# few, large blocks.
INTERPRETER = Chip(1, 163 * _KIB, 164 * _KIB, 1e6, 1e6, 1e6)


def chip(capability: tuple[int, int] | None) -> Chip:
    """The chip of a compute capability from 8.0 on, the nearest older one if unlisted; None is the interpreter."""
    return CHIPS[max(c for c in CHIPS if c <= capability)] if capability else INTERPRETER


# ---------------------------------------------------------------- convolutions as matrix products


@dataclass(frozen=True)
class Gemm:
    """A convolution as a matrix product: m pixels × n filters, taps × channels long; ``flat`` joins those two axes."""

    m: int
    n: int
    channels: int
    taps: int = 1
    groups: int = 1
    itemsize: int = 2
    residual: bool = False
    capability: tuple[int, int] | None = None

    @property
    def flat(self) -> bool:
        return self.taps > 1 and self.groups == 1 and self.channels <= FLAT_CHANNELS

    @property
    def k(self) -> int:
        """Products that each result needs."""
        return self.taps * self.channels // self.groups


@dataclass(frozen=True)
class GemmConfig:
    """Block sizes over pixels, filters and channels; how many blocks share a tile's K range; warps; pipeline stages."""

    block_m: int
    block_n: int
    block_k: int
    split_k: int
    num_warps: int
    num_stages: int

    def shared(self, itemsize: int) -> int:
        """Bytes of shared memory that the operand pipeline takes."""
        return (self.block_m + self.block_n) * self.block_k * itemsize * self.num_stages


def span(g: Gemm, block_n: int) -> int:
    """Input channels that a tile of ``block_n`` filters can need: all, or those of every group that it may touch."""
    per_group, filters = g.channels // g.groups, g.n // g.groups
    if filters % block_n == 0:
        return per_group
    touched = block_n // filters if block_n % filters == 0 else (block_n - 2) // filters + 2
    return min(touched, g.groups) * per_group


def steps(g: Gemm, block_n: int, block_k: int) -> int:
    """Trips of the K loop over one whole tile."""
    if g.flat:
        return ceil(g.taps * g.channels / block_k)
    return g.taps * ceil(span(g, block_n) / block_k)


def predicted_ns(g: Gemm, c: GemmConfig) -> float:
    """Predicted nanoseconds: trips × (max(matrix units, L2 → SM) + barrier) on the fullest SM, plus the pipeline's
    fill for each wave and the stores.

    What all tiles share (DRAM, the launch) is left out.
    """
    on = chip(g.capability)
    blocks = ceil(g.m / c.block_m) * ceil(g.n / c.block_n) * c.split_k
    per_sm = ceil(blocks / on.sms)
    rate = on.mma if g.itemsize == 2 else on.fma
    operands = (c.block_m + c.block_n) * c.block_k * g.itemsize
    trip = max(2 * c.block_m * c.block_n * c.block_k / rate, operands / on.l2) + _TRIP_NS
    trips = ceil(steps(g, c.block_n, c.block_k) / c.split_k)
    waves = ceil(per_sm / _resident(g, c, on))
    out = c.block_m * c.block_n * (4 if c.split_k > 1 else g.itemsize * (1 + g.residual)) / on.l2
    total = per_sm * (trips * trip + out) + waves * _FILL_NS
    if c.split_k > 1:  # the second launch, and the partial sums there and back at half of L2's rate: some go to DRAM
        total += _LAUNCH_NS + 2 * 4 * g.m * g.n * c.split_k / (on.l2 / 2 * min(on.sms, max(1, g.m * g.n // 1024)))
    return total


def registers(g: Gemm, c: GemmConfig) -> int:
    """Roughly the registers of a thread, fitted to what ptxas reported for sm_80 to sm_120: above 255 it spills.

    Accumulators; the residual's values beside them; address and coordinates of each row it loads under a filter, or of each
    product where taps and channels are one axis; out of tensor memory a thread gets whole rows and the affine takes as many
    again; with groups two more sets of accumulators and an address and mask for each weight.
    """
    threads = 32 * c.num_warps
    own, products = c.block_m * c.block_n // threads, c.block_m * c.block_k // threads
    total = 64 + own + own // 2 * g.residual + own * _tensor_memory(g)
    if g.taps > 1:
        total += 4 * (products if g.flat else products * g.itemsize // 16)
    if g.groups > 1:
        total += 2 * own + 8 * c.block_k * c.block_n // threads
    return total


def _tensor_memory(g: Gemm) -> bool:
    """Whether the products accumulate in tensor memory: 16-bit on data-centre Blackwell."""
    return g.itemsize == 2 and g.capability is not None and g.capability[0] in (10, 11)


def _resident(g: Gemm, c: GemmConfig, on: Chip) -> int:
    """Blocks that fit one SM at a time, by shared memory and registers."""
    return max(1, min(on.shared_sm // (c.shared(g.itemsize) + _KIB), 65536 // (registers(g, c) * 32 * c.num_warps), 8))


@lru_cache(maxsize=4096)
def gemm_configs(g: Gemm) -> tuple[GemmConfig, ...]:
    """Every config that fits the chip, best predicted first; ties go to the larger, then the squarer tile."""
    on = chip(g.capability)
    fitting = [c for c in _tiles(g) if c.shared(g.itemsize) <= on.shared and registers(g, c) <= 255]

    def rank(c: GemmConfig) -> tuple:
        return predicted_ns(g, c), -c.block_m * c.block_n, abs(c.block_m - c.block_n), -c.block_k, c.split_k

    return tuple(sorted(fitting, key=rank))


def gemm_config(g: Gemm) -> GemmConfig:
    """The config a kernel runs with when no table says otherwise."""
    return gemm_configs(g)[0]


def _tiles(g: Gemm) -> Iterator[GemmConfig]:
    half = g.itemsize == 2
    # wgmma's tile has 64 rows, tcgen05's 64 or 128; float32 runs on the FMA units, where a large tile only spills.
    if _tensor_memory(g):
        rows = (64, 128)
    elif half:
        rows = (64, 128, 256) if g.capability is not None and g.capability[0] == 9 else (16, 32, 64, 128, 256)
    else:
        rows = (16, 32, 64)
    columns = (16, 32, 64, 128, 256) if half else (16, 32, 64)
    depths = (32, 64) if half else (16, 32)
    for block_m, block_n, block_k in product(_useful(rows, g.m), _useful(columns, g.n), depths):
        num_warps = 8 if block_m * block_n > (64 * 128 if half else 32 * 64) else 4
        trips = steps(g, block_n, block_k)
        for split_k in (1, 2, 4, 8, 16):
            if split_k > 1 and trips < 4 * split_k:
                continue  # a block with fewer than four trips never fills its pipeline
            num_stages = max(2, min(4, ceil(trips / split_k)))
            yield GemmConfig(block_m, block_n, block_k, split_k, num_warps, num_stages)


def _useful(sizes: tuple[int, ...], extent: int) -> list[int]:
    """The sizes up to the first that covers the extent: a larger one would only be emptier."""
    covering = [s for s in sizes if s >= extent]
    return [s for s in sizes if not covering or s <= covering[0]]


# ---------------------------------------------------------------- pointwise and reduction passes over rows of channels


@dataclass(frozen=True)
class RowsConfig:
    """Tile over pixels × channels; a reducing block walks ``trips`` of them, ``partials`` blocks share channels."""

    block_m: int
    block_c: int
    trips: int
    partials: int
    num_warps: int = 8


@lru_cache(maxsize=4096)
def rows_config(m: int, channels: int, itemsize: int, capability: tuple[int, int] | None) -> RowsConfig:
    """Tiles of 8 KiB whose rows are one 128-byte line where the channels suffice; about four reducing blocks on each
    SM, each with two or three tiles in flight (4.3 TB/s for 0.8 µs is 26 KiB an SM on an H200).
    """
    on = chip(capability)
    block_c = min(128 // itemsize, _power_of_two(channels))
    block_m = max(16, min(8 * _KIB // (block_c * itemsize), 256, _power_of_two(m)))
    tiles = ceil(m / block_m)
    wanted = ceil(4 * on.sms / ceil(channels / block_c))
    trips = ceil(tiles / wanted)
    return RowsConfig(block_m, block_c, trips, ceil(tiles / trips))


@dataclass(frozen=True)
class MergeConfig:
    """Tile over partials × channels that one trip of a merge holds in registers, and the trips."""

    rows: int
    block_c: int
    trips: int
    num_warps: int = 4


@lru_cache(maxsize=4096)
def merge_config(partials: int, channels: int) -> MergeConfig:
    """Few channels to a block, for there are few blocks: what counts is the number of dependent trips."""
    rows = min(256, max(16, _power_of_two(partials)))
    return MergeConfig(rows, min(16, _power_of_two(channels)), ceil(partials / rows))


def _power_of_two(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()
