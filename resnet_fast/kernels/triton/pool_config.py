"""Problem → config of the two kernels that end in a pooling, as pure functions; the manner and the chips of ``heuristics``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import ceil

from . import heuristics
from .heuristics import chip

SLOTS = 16  # images that a block of the head can own: columns of its second product, of which matrix units want 16
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
        """Bytes of shared memory: the operand pipeline, or after it the residual's tile on its way to the accumulators."""
        return (self.block_m + self.block_n) * self.block_k * itemsize * self.num_stages


def head_registers(c: HeadConfig) -> int:
    """Roughly a thread's registers, from what ptxas reported for sm_80 to sm_120: products, residual, activations."""
    return 64 + 3 * c.block_m * c.block_n // (32 * c.num_warps)


def head_ns(h: Head, c: HeadConfig) -> float:
    """Predicted nanoseconds: waves × chunks of pixels × (trips × (max(matrix units, L2 → SM) + barrier) + residual), where
    the blocks of one SM share its units and hide each other's waiting.
    """
    on = chip(h.capability)
    blocks = ceil(h.images / c.images) * ceil(h.filters / c.block_n)
    threads = 32 * c.num_warps
    resident = max(1, min(on.shared_sm // (c.shared(h.itemsize) + heuristics._KIB), 65536 // (head_registers(c) * threads)))
    rate = on.mma if h.itemsize == 2 else on.fma
    products = c.block_m * c.block_n * (c.block_k * ceil(h.channels / c.block_k) + SLOTS)
    loaded = ((c.block_m + c.block_n) * h.channels + c.block_m * c.block_n) * h.itemsize
    trips = ceil(h.channels / c.block_k)
    chunk = max(2 * products / rate, loaded / on.l2) + trips * heuristics._TRIP_NS / resident
    per_sm = ceil(blocks / on.sms)
    # Each chunk's first operands and residual come from DRAM while only the SM's other blocks work.
    waiting = heuristics._FILL_NS * ceil(per_sm / resident)
    return ceil(c.images * h.pixels / c.block_m) * (per_sm * chunk + waiting)


@lru_cache(maxsize=4096)
def head_configs(h: Head) -> tuple[HeadConfig, ...]:
    """Every config that fits the chip, best predicted first; ties go to the larger tile, then to fewer images a block."""
    on = chip(h.capability)
    fitting = [c for c in _heads(h) if c.shared(h.itemsize) <= on.shared and head_registers(c) <= 256]
    return tuple(sorted(fitting, key=lambda c: (head_ns(h, c), -c.block_m * c.block_n, c.images, -c.block_k)))


def head_config(h: Head) -> HeadConfig:
    """The config the head runs with when no table says otherwise."""
    return head_configs(h)[0]


def _heads(h: Head) -> Iterator[HeadConfig]:
    half = h.itemsize == 2
    # A tile's filters are the matrix unit's rows: tcgen05 has 64 or 128 of them. float32 runs on the FMA units. What is left
    # out spills: deep tiles of 32 filters, wide ones out of tensor memory.
    tensor_memory = half and h.capability is not None and h.capability[0] in (10, 11)
    filters = (64, 128) if tensor_memory else (32, 64, 128) if half else (32,)
    images = max(1, min(h.images, SLOTS, _MOST_ROWS // h.pixels))
    sizes = product(range(1, images + 1), (64, 128) if half else (32, 64), filters, (32, 64) if half else (16, 32))
    for images, block_m, block_n, block_k in sizes:
        if half and block_n == 32 and block_k == 64 or tensor_memory and block_m < block_n:
            continue
        tile = block_m * block_n
        num_warps = 8 if tile > (64 * 64 if tensor_memory else 64 * 128 if half else 1024) else 4
        yield HeadConfig(images, block_m, block_n, block_k, num_warps, max(2, min(4, ceil(h.channels / block_k))))
