"""Configs of the two kernels that end in a pooling, head and stem: problem → config, as pure functions.

In the manner of ``gemm_config``, with the same chips.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from math import ceil

from .gemm_config import FILL_NS, KIB, TRIP_NS, chip, power_of_two

# ---------------------------------------------------------------- the head

SLOTS = 16  # images that a block of the head can own: columns of its second product, of which matrix units want 16
# 16-bit tiles of pixels, filters, channels that Triton 3.6 or 3.9 spills of.
_SPILLING = ((64, 32, 64), (128, 32, 64), (64, 64, 32))
_MOST_ROWS = 4096  # of several images in a block: beyond, a chunk's last rows are no longer what they could save


@dataclass(frozen=True)
class Head:
    """images × pixels × channels, times filters: the last 1×1 convolution and the mean over each image's pixels."""

    images: int
    pixels: int
    filters: int
    channels: int
    itemsize: int = 2
    capability: tuple[int, int] | None = None


@dataclass(frozen=True)
class HeadConfig:
    """Images of a block; sizes of its tile over their pixels, filters and channels; warps; pipeline stages."""

    images: int
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    def shared(self, itemsize: int) -> int:
        """Bytes of shared memory: the operand pipeline, which the residual's tile reuses afterwards."""
        return (self.block_m + self.block_n) * self.block_k * itemsize * self.num_stages


def head_config(h: Head) -> HeadConfig:
    """The config the head runs with when no table says otherwise."""
    return head_configs(h)[0]


@lru_cache(maxsize=4096)
def head_configs(h: Head) -> tuple[HeadConfig, ...]:
    """Every config that fits the chip, best predicted first; ties go to the larger tile, then to fewer images."""
    on = chip(h.capability)
    fitting = [
        c for c in _head_tiles(h) if c.shared(h.itemsize) <= on.shared and head_registers(c) <= 256
    ]

    def rank(c: HeadConfig) -> tuple:
        area = c.block_m * c.block_n
        return head_ns(h, c), -area, c.images, -c.block_k

    return tuple(sorted(fitting, key=rank))


def _head_tiles(h: Head) -> Iterator[HeadConfig]:
    half = h.itemsize == 2
    tensor_memory = half and h.capability is not None and h.capability[0] in (10, 11)
    # A tile's filters are the matrix unit's rows: tcgen05 has 64 or 128 of them. float32 runs on the FMA units.
    filters: tuple[int, ...]
    if tensor_memory:
        filters, four_warps = (64, 128), 64 * 64
    elif half:
        filters, four_warps = (32, 64, 128), 64 * 128
    else:
        filters, four_warps = (32,), 1024
    pixels, depths = ((64, 128), (32, 64)) if half else ((32, 64), (16, 32))
    most_images = max(1, min(h.images, SLOTS, _MOST_ROWS // h.pixels))
    for images, block_m, block_n, block_k in product(
        range(1, most_images + 1), pixels, filters, depths
    ):
        # What is left out spills: some tiles everywhere, wide ones out of tensor memory.
        if half and (block_m, block_n, block_k) in _SPILLING or tensor_memory and block_m < block_n:
            continue
        num_warps = 8 if block_m * block_n > four_warps else 4
        num_stages = max(2, min(4, ceil(h.channels / block_k)))
        yield HeadConfig(images, block_m, block_n, block_k, num_warps, num_stages)


def head_ns(h: Head, c: HeadConfig) -> float:
    """Predicted nanoseconds: waves × chunks of pixels × (trips × (max(matrix units, L2 → SM) + barrier) + residual).

    The blocks of one SM share its units and hide each other's waiting.
    """
    on = chip(h.capability)
    blocks = ceil(h.images / c.images) * ceil(h.filters / c.block_n)
    per_sm = ceil(blocks / on.sms)
    by_shared = on.shared_sm // (c.shared(h.itemsize) + KIB)
    by_registers = on.registers // (head_registers(c) * 32 * c.num_warps)
    resident = max(1, min(by_shared, by_registers))

    rate = on.mma if h.itemsize == 2 else on.fma
    trips = ceil(h.channels / c.block_k)
    products = c.block_m * c.block_n * (c.block_k * trips + SLOTS)
    loaded = ((c.block_m + c.block_n) * h.channels + c.block_m * c.block_n) * h.itemsize
    chunk = max(2 * products / rate, loaded / on.l2) + trips * TRIP_NS / resident

    # Each chunk's first operands and residual come from DRAM while only the SM's other blocks work.
    waiting = FILL_NS * ceil(per_sm / resident)
    return ceil(c.images * h.pixels / c.block_m) * (per_sm * chunk + waiting)


def head_registers(c: HeadConfig) -> int:
    """Roughly a thread's registers, from what ptxas reported for sm_80 to sm_120: products, residual, activations."""
    return 64 + 3 * c.block_m * c.block_n // (32 * c.num_warps)


# ---------------------------------------------------------------- the stem

# Estimates as in ``gemm_config``.
_MAXIMA_NS = 150.0  # the maxima of one row of the convolution
_FILTERS_NS = 2000.0  # a block's filters on their way


@dataclass(frozen=True)
class Stem:
    """x's shape, filters, their rows and columns, the dtype's bytes, whether x is uint8."""

    images: int
    channels: int
    height: int
    width: int
    filters: int
    r: int
    s: int
    itemsize: int = 2
    bytes: bool = False
    capability: tuple[int, int] | None = None

    @property
    def convolved(self) -> tuple[int, int]:
        """Height and width of the convolution."""
        return (self.height - 1) // 2 + 1, (self.width - 1) // 2 + 1

    @property
    def pooled(self) -> tuple[int, int]:
        oh, ow = self.convolved
        return (oh - 1) // 2 + 1, (ow - 1) // 2 + 1

    @property
    def pad(self) -> int:
        """Pixels that a slot reads before its first, so that it begins at a multiple of four."""
        return -(self.s // 2) % 4

    @property
    def span(self) -> int:
        """Elements of an image row that a slot reads, for its even and its odd column."""
        return max(16, power_of_two((self.pad + self.s + 2) * self.channels))

    @property
    def taps(self) -> int:
        """Rows of the filter where all are one product."""
        return power_of_two(self.r)

    def tiles(self, block_m: int) -> int:
        """Tiles over the columns of all images: each has one slot of the tile before."""
        return max(1, ceil((self.images * self.pooled[1] - 1) / (block_m - 1)))


@dataclass(frozen=True)
class StemConfig:
    """Pooled columns and filters of a block, pooled rows that it walks, whether its filters stay in shared memory."""

    block_m: int
    block_n: int
    rows: int
    resident: bool
    num_warps: int
    num_stages: int

    def shared(self, s: Stem) -> int:
        """Bytes of shared memory: both columns' filters, rows in flight, and the odd columns for the next slot."""
        matrix_unit_waits = s.capability is not None and s.capability[0] in (9, 10, 11)
        under_way = self.num_stages if matrix_unit_waits else self.num_stages - 1
        depth = s.span * (s.taps if self.resident else 1)
        operands = depth * s.itemsize * (2 * self.block_n + under_way * self.block_m)
        odd_columns = 4 * self.block_m * self.block_n
        return operands + odd_columns


def stem_config(s: Stem) -> StemConfig:
    """The config the stem runs with when no table says otherwise."""
    return stem_configs(s)[0]


@lru_cache(maxsize=4096)
def stem_configs(s: Stem) -> tuple[StemConfig, ...]:
    """Every config that fits the chip, best predicted first; ties go to more rows a block.

    A block computes its last row of the convolution twice, so more rows are less work.
    """
    tile = _stem_tile(s)
    configs = [replace(tile, rows=rows) for rows in range(1, s.pooled[0] + 1)]
    return tuple(sorted(configs, key=lambda c: (stem_ns(s, c), -c.rows)))


def _stem_tile(s: Stem) -> StemConfig:
    """The block of one pooled row; ptxas spills nothing of these sizes."""
    on, half = chip(s.capability), s.itemsize == 2
    # Filters that stay are an operand in shared memory of wgmma and tcgen05; mma.sync would keep them all in registers.
    can_stay = s.capability is None or half and s.capability[0] in (9, 10, 11)
    if can_stay:
        tensor_memory = s.capability is not None and s.capability[0] in (10, 11)
        resident = StemConfig(64, 64 if tensor_memory and not s.bytes else 32, 1, True, 8, 2)
        if resident.shared(s) <= on.shared:
            return resident
    return StemConfig(64, 32, 1, False, 4, 2) if half else StemConfig(32, 16, 1, False, 4, 2)


def stem_ns(s: Stem, c: StemConfig) -> float:
    """Predicted nanoseconds: waves × (filters + rows of the convolution × (matrix units + maxima)).

    The blocks of one SM share its matrix units.
    """
    on = chip(s.capability)
    blocks = ceil(s.filters / c.block_n) * ceil(s.pooled[0] / c.rows) * s.tiles(c.block_m)
    by_shared = on.shared_sm // (c.shared(s) + KIB)
    by_registers = on.registers // (128 * 32 * c.num_warps)
    resident = max(1, min(by_shared, by_registers))
    working = min(resident, ceil(blocks / on.sms))
    waves = ceil(blocks / (on.sms * resident))

    rate = on.mma if s.itemsize == 2 else on.fma
    depth = s.span * (s.taps if c.resident else s.r)
    row = 2 * c.block_m * 2 * c.block_n * depth / rate
    return waves * (_FILTERS_NS + (2 * c.rows + 1) * max(working * row, row + _MAXIMA_NS))
