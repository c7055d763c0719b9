"""Problem → config of ``conv_tail``, as a pure function; the manner and the chips of ``gemm_config``.

A block keeps all middle channels of its pixels, and a sum for all channels of the next convolution, in registers while
it walks the wide result between them: pixels a block, and what is left for the wide result's blocks, are what there is
to choose.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import ceil

from ...dispatch import Problem
from . import gemm_config
from .gemm_config import chip

MIDDLES = (16, 32, 64, 128)  # channels that are one block of a matrix instruction, and fit


@dataclass(frozen=True)
class Tail:
    """The shapes of a tail: m pixels; channels of the input, the middle, the wide result, the next convolution's result,
    and of the residual where it is projected, else 0.
    """

    m: int
    channels: int
    middle: int
    wide: int
    next: int
    projected: int = 0
    itemsize: int = 2
    capability: tuple[int, int] | None = None

    @property
    def columns(self) -> int:
        """Channels of weights that each channel of the wide result brings with it."""
        return self.middle + padded(self.next) + (padded(self.projected) if self.projected else 0)


@dataclass(frozen=True)
class TailConfig:
    """Block sizes over pixels, channels of the wide result and of the input; warps, pipeline stages, blocks an SM."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    blocks: int = 1

    def options(self) -> dict:
        """Compile options; where several blocks are to share an SM, registers are capped so that they can."""
        cap = {"maxnreg": 65536 // (self.blocks * 32 * self.num_warps) // 8 * 8} if self.blocks > 1 else {}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **cap}


def tail(problem: Problem) -> Tail:
    """The tail that a ``conv_tail`` problem is."""
    n, c, h, w = problem.x
    (wide, middle, *_), projection, (after, *_) = problem.chain
    return Tail(
        n * h * w,
        c,
        middle,
        wide,
        after,
        projection[1] if projection else 0,
        problem.dtype.itemsize,
        problem.capability,
    )


def padded(channels: int) -> int:
    """The block that holds so many channels: a power of two that a matrix instruction takes."""
    return max(16, gemm_config.power_of_two(channels))


def shared(g: Tail, c: TailConfig) -> int:
    """Bytes of shared memory: the operands under way in the 3×3 or, after it, the weights and the residual's tile; a
    projected residual lies there for good, as on tensor memory the middle does; a block of the result on its way out.
    """
    first = c.num_stages * (c.block_m + g.middle) * c.block_k
    second = c.num_stages * c.block_n * (g.columns + c.block_m * (not g.projected))
    if g.projected:
        second += c.block_m * padded(g.projected)
    if gemm_config.uses_tensor_memory(g):
        second += c.block_m * g.middle
    return (max(first, second) + c.block_m * c.block_n) * g.itemsize


def registers(g: Tail, c: TailConfig) -> int:
    """Roughly the registers that a thread can be held to without a spill, fitted to what ptxas reported: the middle, the
    sums for the next convolution, a block of the wide result twice (as the products leave it, as it is stored), the
    residual's; float32 goes through FMA units, whose operands take registers as well.
    """
    half = g.itemsize == 2
    middle, residual = (g.middle / 2, c.block_n / 2) if half else (g.middle, c.block_n)
    own = (middle + padded(g.next) + 2 * c.block_n + residual) * c.block_m / (32 * c.num_warps)
    return ceil(25 + own) if half else ceil(15 + 2 * own)


def predicted_ns(g: Tail, c: TailConfig) -> float:
    """Predicted nanoseconds on the fullest SM: both loops' trips × (max(matrix units, L2 → SM) + barriers), and for each
    wave two pipelines' fills.

    What all configs share (DRAM, the launch) is left out.
    """
    on = chip(g.capability)
    rate = on.mma if g.itemsize == 2 else on.fma
    first = max(2 * c.block_m * g.middle * c.block_k / rate, (c.block_m + g.middle) * c.block_k * g.itemsize / on.l2)
    second = max(
        2 * c.block_m * c.block_n * g.columns / rate, c.block_n * (g.columns + 2 * c.block_m) * g.itemsize / on.l2
    )
    block = 9 * ceil(g.channels / c.block_k) * (first + gemm_config.TRIP_NS) + ceil(g.wide / c.block_n) * (
        second + 2 * gemm_config.TRIP_NS
    )
    per_sm = ceil(ceil(g.m / c.block_m) / on.sms)
    return per_sm * block + ceil(per_sm / c.blocks) * 2 * gemm_config.FILL_NS


@lru_cache(maxsize=4096)
def tail_configs(g: Tail) -> tuple[TailConfig, ...]:
    """Every config that fits the chip, best predicted first; none if the next convolution has too many channels."""
    on = chip(g.capability)
    fitting = []
    for sizes in _tiles(g):
        c = TailConfig(*sizes)
        if shared(g, c) + gemm_config.KIB <= on.shared and registers(g, c) <= 255:
            threads, blocks = 32 * c.num_warps, 1
            if g.itemsize == 2:  # float32 only spills under a cap
                # 15 registers more than the least: a cap that ptxas reaches without contortions.
                by_registers = 65536 // (threads * (registers(g, c) + 15))
                blocks = min(on.shared_sm // (shared(g, c) + 2 * gemm_config.KIB), by_registers, 4)
            fitting.append(TailConfig(*sizes, max(1, blocks)))
    return tuple(sorted(fitting, key=lambda c: (predicted_ns(g, c), -c.block_m * c.block_n, -c.block_k, -c.num_stages)))


def tail_config(g: Tail) -> TailConfig:
    """The config the kernel runs with when no table says otherwise."""
    return tail_configs(g)[0]


def _tiles(g: Tail) -> Iterator[tuple[int, int, int, int, int]]:
    half = g.itemsize == 2
    rows = (64, 128, 256) if half else (32, 64)  # wgmma's and tcgen05's tiles have 64 rows
    columns, depths = ((32, 64, 128), (32, 64)) if half else ((32,), (16, 32))
    for block_m, block_n, block_k in product(
        rows, gemm_config.useful_sizes(columns, g.wide), gemm_config.useful_sizes(depths, g.channels)
    ):
        num_warps = 4 if half and block_m == 64 else 8
        for num_stages in (2, 3, 4):
            yield block_m, block_n, block_k, num_warps, num_stages
