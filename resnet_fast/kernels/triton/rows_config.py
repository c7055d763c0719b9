"""Configs of the passes over rows of channels, pointwise and reducing, as pure functions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil

from .gemm_config import KIB, chip, power_of_two


@dataclass(frozen=True)
class RowsConfig:
    """Tile over pixels × channels; a reducing block walks ``trips`` of them, ``partials`` blocks share channels."""

    block_m: int
    block_c: int
    trips: int
    partials: int
    num_warps: int = 8


@lru_cache(maxsize=4096)
def rows_config(
    m: int, channels: int, itemsize: int, capability: tuple[int, int] | None
) -> RowsConfig:
    """Tiles of 8 KiB with one 128-byte line a row where the channels suffice; about four reducing blocks on each SM,
    each with two or three tiles in flight (4.3 TB/s for 0.8 µs is 26 KiB an SM on an H200).
    """
    on = chip(capability)
    block_c = min(128 // itemsize, power_of_two(channels))
    block_m = max(16, min(8 * KIB // (block_c * itemsize), 256, power_of_two(m)))
    tiles = ceil(m / block_m)
    blocks = ceil(4 * on.sms / ceil(channels / block_c))
    trips = ceil(tiles / blocks)
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
    rows = min(256, max(16, power_of_two(partials)))
    return MergeConfig(rows, min(16, power_of_two(channels)), ceil(partials / rows))
