"""Configs of ``conv_tail``: problem → config, as a pure function, in the manner of ``gemm_config``.

A block keeps two things in registers while it walks the wide result between them: all middle channels of its pixels,
and a sum for all channels of the next convolution. What there is to choose: pixels a block, and how much of the wide
result it takes at a time in the registers that are left.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from math import ceil

from ...dispatch.problem import Problem
from ...roofline.chips import Chip
from .gemm_config import FILL_NS, KIB, TRIP_NS, chip, power_of_two, useful_sizes, uses_tensor_memory

MIDDLES = (16, 32, 64, 128)  # channels that are one block of a matrix instruction, and fit


@dataclass(frozen=True)
class Tail:
    """Shape of a tail: m pixels; channels of the input, the middle, the wide result and the next convolution's result.

    ``projected`` are the residual's channels where it is projected, else 0.
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
        cap = (
            {"maxnreg": 65536 // (self.blocks * 32 * self.num_warps) // 8 * 8}
            if self.blocks > 1
            else {}
        )
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **cap}


def tail(problem: Problem) -> Tail:
    """The tail that a ``conv_tail`` problem describes."""
    n, c, h, w = problem.x
    (wide, middle, *_), projection, (after, *_) = problem.chain
    projected = projection[1] if projection else 0
    return Tail(
        n * h * w, c, middle, wide, after, projected, problem.dtype.itemsize, problem.capability
    )


def padded(channels: int) -> int:
    """The block that holds so many channels: a power of two that a matrix instruction takes."""
    return max(16, power_of_two(channels))


def tail_config(g: Tail) -> TailConfig:
    """The config the kernel runs with when no table says otherwise."""
    return tail_configs(g)[0]


@lru_cache(maxsize=4096)
def tail_configs(g: Tail) -> tuple[TailConfig, ...]:
    """Every config that fits the chip, best predicted first; none if the next convolution has too many channels."""
    on = chip(g.capability)
    fitting = []
    for tile in _tiles(g):
        if shared(g, tile) + KIB <= on.shared and registers(g, tile) <= 255:
            fitting.append(replace(tile, blocks=_blocks_per_sm(g, tile, on)))

    def rank(c: TailConfig) -> tuple:
        area = c.block_m * c.block_n
        return predicted_ns(g, c), -area, -c.block_k, -c.num_stages

    return tuple(sorted(fitting, key=rank))


def _tiles(g: Tail) -> Iterator[TailConfig]:
    half = g.itemsize == 2
    rows = (64, 128, 256) if half else (32, 64)  # wgmma's and tcgen05's tiles have 64 rows
    columns = useful_sizes((32, 64, 128) if half else (32,), g.wide)
    depths = useful_sizes((32, 64) if half else (16, 32), g.channels)
    for block_m, block_n, block_k in product(rows, columns, depths):
        num_warps = 4 if half and block_m == 64 else 8
        for num_stages in (2, 3, 4):
            yield TailConfig(block_m, block_n, block_k, num_warps, num_stages)


def _blocks_per_sm(g: Tail, c: TailConfig, on: Chip) -> int:
    if g.itemsize != 2:
        return 1  # float32 only spills under a cap
    by_shared = on.shared_sm // (shared(g, c) + 2 * KIB)
    # 15 registers more than the least: a cap that ptxas reaches without contortions.
    by_registers = on.registers // (32 * c.num_warps * (registers(g, c) + 15))
    return max(1, min(by_shared, by_registers, 4))


# ---------------------------------------------------------------- what a config costs


def predicted_ns(g: Tail, c: TailConfig) -> float:
    """Predicted nanoseconds on the fullest SM: both loops' trips × (max(matrix units, L2 → SM) + barriers), and for
    each wave two pipelines' fills.

    What all configs share (DRAM, the launch) is left out.
    """
    on = chip(g.capability)
    rate = on.mma if g.itemsize == 2 else on.fma

    # First loop: the 3×3 into the middle channels. Second loop: the wide result block by block.
    first_products = 2 * c.block_m * g.middle * c.block_k
    first_bytes = (c.block_m + g.middle) * c.block_k * g.itemsize
    first = max(first_products / rate, first_bytes / on.l2)
    second_products = 2 * c.block_m * c.block_n * g.columns
    second_bytes = c.block_n * (g.columns + 2 * c.block_m) * g.itemsize
    second = max(second_products / rate, second_bytes / on.l2)

    first_trips, second_trips = 9 * ceil(g.channels / c.block_k), ceil(g.wide / c.block_n)
    block = first_trips * (first + TRIP_NS) + second_trips * (second + 2 * TRIP_NS)
    per_sm = ceil(ceil(g.m / c.block_m) / on.sms)
    return per_sm * block + ceil(per_sm / c.blocks) * 2 * FILL_NS


def shared(g: Tail, c: TailConfig) -> int:
    """Bytes of shared memory: the larger of both loops' operands in flight, and a block of the result."""
    first = c.num_stages * (c.block_m + g.middle) * c.block_k
    # The second loop's weights, and the residual's tile unless it is projected.
    second = c.num_stages * c.block_n * (g.columns + c.block_m * (not g.projected))
    if g.projected:  # the residual before its projection stays for the whole loop
        second += c.block_m * padded(g.projected)
    if uses_tensor_memory(g):  # so does the middle
        second += c.block_m * g.middle
    return (max(first, second) + c.block_m * c.block_n) * g.itemsize


def registers(g: Tail, c: TailConfig) -> int:
    """Roughly the registers that a thread can be held to without a spill, fitted to what ptxas reported.

    The middle, the sums for the next convolution, a block of the wide result twice (as the products leave it, as it is
    stored), the residual's; float32 goes through FMA units, whose operands take registers as well.
    """
    half = g.itemsize == 2
    middle, residual = (g.middle / 2, c.block_n / 2) if half else (g.middle, c.block_n)
    row = middle + padded(g.next) + 2 * c.block_n + residual
    own = row * c.block_m / (32 * c.num_warps)
    return ceil(25 + own) if half else ceil(15 + 2 * own)
