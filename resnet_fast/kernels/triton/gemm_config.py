"""Configs of the convolutions as matrix products: the shape of a product, and its config as a pure function.

In the manner of DeepGEMM: enumerate the tiles that fit the chip, predict the time of each from a few rates, take the
least. Nothing is timed and nothing is remembered, so every machine gives the same answer. The prediction only ranks
the tiles of one problem; a measured table overrules it problem by problem.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from math import ceil
from typing import TYPE_CHECKING

from ...roofline.chips import BY_CAPABILITY, Chip

if TYPE_CHECKING:
    from .tail_config import Tail

# Up to here a block of 16 channels would be half padding: taps and channels are walked as one axis.
FLAT_CHANNELS = 8
# Estimates of the same kind as Chip's rates.
TRIP_NS = 20.0  # barrier and addresses of one trip
FILL_NS = 1000.0  # the first operands' way from DRAM
_LAUNCH_NS = 2500.0  # one more launch in a graph
KIB = 1024
_MOST_REGISTERS = 255  # of a thread; above it the compiler spills

# The chips that have rates to rank tiles, by compute capability.
CHIPS = {capability: chip for capability, chip in BY_CAPABILITY.items() if chip.mma is not None}
# The interpreter runs one block after the other in Python, at a cost for each operation and not for each element:
# few, large blocks.
INTERPRETER = replace(CHIPS[8, 0], sms=1, mma=1e6, fma=1e6, l2=1e6, ceilings=None)


def chip(capability: tuple[int, int] | None) -> Chip:
    """The chip of a compute capability from 8.0 on, the nearest older one if unlisted; None is the interpreter."""
    if capability is None:
        return INTERPRETER
    return CHIPS[max(listed for listed in CHIPS if listed <= capability)]


# ---------------------------------------------------------------- description and config


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
    """Block sizes over pixels, filters and channels; blocks that share a tile's K range; warps; pipeline stages."""

    block_m: int
    block_n: int
    block_k: int
    split_k: int
    num_warps: int
    num_stages: int

    def shared(self, itemsize: int) -> int:
        """Bytes of shared memory that the operand pipeline takes."""
        return (self.block_m + self.block_n) * self.block_k * itemsize * self.num_stages


def gemm_config(g: Gemm) -> GemmConfig:
    """The config a kernel runs with when no table says otherwise."""
    return gemm_configs(g)[0]


@lru_cache(maxsize=4096)
def gemm_configs(g: Gemm) -> tuple[GemmConfig, ...]:
    """Every config that fits the chip, best predicted first; ties go to the larger, then the squarer tile."""
    on = chip(g.capability)
    fitting = [
        c
        for c in _tiles(g)
        if c.shared(g.itemsize) <= on.shared and registers(g, c) <= _MOST_REGISTERS
    ]

    def rank(c: GemmConfig) -> tuple:
        area = c.block_m * c.block_n
        off_square = abs(c.block_m - c.block_n)
        return predicted_ns(g, c), -area, off_square, -c.block_k, c.split_k

    return tuple(sorted(fitting, key=rank))


def _tiles(g: Gemm) -> Iterator[GemmConfig]:
    half = g.itemsize == 2
    rows = useful_sizes(_row_sizes(g), g.m)
    columns = useful_sizes((16, 32, 64, 128, 256) if half else (16, 32, 64), g.n)
    depths = (32, 64) if half else (16, 32)
    large = 64 * 128 if half else 32 * 64  # accumulators that four warps hold without spilling
    for block_m, block_n, block_k in product(rows, columns, depths):
        num_warps = 8 if block_m * block_n > large else 4
        trips = steps(g, block_n, block_k)
        for split_k in (1, 2, 4, 8, 16):
            if split_k > 1 and trips < 4 * split_k:
                continue  # a block with fewer than four trips never fills its pipeline
            num_stages = max(2, min(4, ceil(trips / split_k)))
            yield GemmConfig(block_m, block_n, block_k, split_k, num_warps, num_stages)


def _row_sizes(g: Gemm) -> tuple[int, ...]:
    """Sizes of a tile over pixels: the rows of the instruction that multiplies."""
    if uses_tensor_memory(g):
        return (64, 128)  # tcgen05's
    if g.itemsize != 2:
        return (16, 32, 64)  # float32 runs on the FMA units, where a large tile only spills
    if g.capability is not None and g.capability[0] == 9:
        return (64, 128, 256)  # wgmma's tile has 64 rows
    return (16, 32, 64, 128, 256)


# ---------------------------------------------------------------- what a config costs


def predicted_ns(g: Gemm, c: GemmConfig) -> float:
    """Predicted nanoseconds: trips × (max(matrix units, L2 → SM) + barrier) on the fullest SM, plus the pipeline's
    fill for each wave and the stores.

    What all tiles share (DRAM, the launch) is left out.
    """
    on = chip(g.capability)
    blocks = ceil(g.m / c.block_m) * ceil(g.n / c.block_n) * c.split_k
    per_sm = ceil(blocks / on.sms)
    waves = ceil(per_sm / _resident_blocks(g, c, on))

    rate = on.mma if g.itemsize == 2 else on.fma
    operands = (c.block_m + c.block_n) * c.block_k * g.itemsize
    trip = max(2 * c.block_m * c.block_n * c.block_k / rate, operands / on.l2) + TRIP_NS
    trips = ceil(steps(g, c.block_n, c.block_k) / c.split_k)

    stored = 4 if c.split_k > 1 else g.itemsize * (1 + g.residual)
    out = c.block_m * c.block_n * stored / on.l2
    total = per_sm * (trips * trip + out) + waves * FILL_NS
    # the second launch, and the partial sums there and back at half of L2's rate: some go to DRAM
    if c.split_k > 1:
        total += _LAUNCH_NS + 2 * 4 * g.m * g.n * c.split_k / (
            on.l2 / 2 * min(on.sms, max(1, g.m * g.n // 1024))
        )
    return total


def steps(g: Gemm, block_n: int, block_k: int) -> int:
    """Trips of the K loop over one whole tile."""
    if g.flat:
        return ceil(g.taps * g.channels / block_k)
    return g.taps * ceil(span(g, block_n) / block_k)


def span(g: Gemm, block_n: int) -> int:
    """Input channels that a tile of ``block_n`` filters can need: all, or those of every group that it may touch."""
    per_group, filters = g.channels // g.groups, g.n // g.groups
    if filters % block_n == 0:
        return per_group
    touched = block_n // filters if block_n % filters == 0 else (block_n - 2) // filters + 2
    return min(touched, g.groups) * per_group


def registers(g: Gemm, c: GemmConfig) -> int:
    """Roughly the registers of a thread, fitted to what ptxas reported for sm_80 to sm_120: above 255 it spills."""
    threads = 32 * c.num_warps
    accumulators = c.block_m * c.block_n // threads
    total = 64 + accumulators
    total += accumulators // 2 * g.residual  # the residual's values beside them
    # out of it a thread gets whole rows, and the affine as many again
    total += accumulators * uses_tensor_memory(g)
    if g.taps > 1:
        # Address and coordinates of each row it loads, or of each product where taps and channels are one axis.
        products = c.block_m * c.block_k // threads
        total += 4 * (products if g.flat else products * g.itemsize // 16)
    if g.groups > 1:
        # Two more sets of accumulators, and an address and mask for each weight.
        total += 2 * accumulators + 8 * c.block_k * c.block_n // threads
    return total


def uses_tensor_memory(g: Gemm | Tail) -> bool:
    """Whether the products accumulate in tensor memory: 16-bit on data-centre Blackwell."""
    return g.itemsize == 2 and g.capability is not None and g.capability[0] in (10, 11)


def _resident_blocks(g: Gemm, c: GemmConfig, on: Chip) -> int:
    """Blocks that fit one SM at a time, by shared memory and registers."""
    by_shared = on.shared_sm // (c.shared(g.itemsize) + KIB)
    by_registers = on.registers // (registers(g, c) * 32 * c.num_warps)
    return max(1, min(by_shared, by_registers, 8))


# ---------------------------------------------------------------- block sizes


def useful_sizes(sizes: tuple[int, ...], extent: int) -> list[int]:
    """The sizes up to the first that covers the extent: a larger one would only be emptier."""
    covering = [size for size in sizes if size >= extent]
    return [size for size in sizes if not covering or size <= covering[0]]


def power_of_two(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()
