"""Occupancy: how many blocks of a kernel an SM holds at a time, from registers, shared memory and threads.

    blocks = min(registers of an SM / those of a block, shared memory likewise, warps likewise, the SM's limit)

The granularities are those of NVIDIA's occupancy calculator: registers go to a warp 256 at a time and warps to four
schedulers, shared memory goes 128 bytes at a time and 1 KiB more.
"""

from __future__ import annotations

from dataclasses import dataclass

from .chips import nearest_chip

_REGISTER_UNIT = 256  # registers are given to a warp in such pieces
_SHARED_UNIT = 128  # bytes
_SHARED_RESERVED = 1024  # bytes of each block that are the system's
_SCHEDULERS = 4


@dataclass(frozen=True)
class Occupancy:
    """``blocks`` on an SM at a time, their ``share`` of the warps it could hold, and what sets the number."""

    blocks: int
    share: float
    limit: str


def occupancy(registers: int, shared: int, threads: int, capability: tuple[int, int]) -> Occupancy:
    """What an SM holds of a block with so many registers a thread, bytes of shared memory and threads.

    ``blocks`` is 0 for a block that does not fit. A capability that is not listed counts as the nearest older one;
    raises LookupError below 8.0.
    """
    chip = nearest_chip(capability)
    if chip is None:
        raise LookupError(
            "occupancy: got compute capability {}.{}, expected 8.0 or later".format(*capability)
        )
    warps = -(-threads // 32)
    registers_a_warp = max(_REGISTER_UNIT, _rounded_up(registers * 32, _REGISTER_UNIT))
    warps_by_registers = chip.registers // registers_a_warp // _SCHEDULERS * _SCHEDULERS
    blocks_by = {
        "warps": chip.warps // warps,
        "registers": warps_by_registers // warps,
        "shared memory": chip.shared_sm // (_rounded_up(shared, _SHARED_UNIT) + _SHARED_RESERVED),
        "blocks": chip.blocks,
    }
    limit = min(blocks_by, key=blocks_by.__getitem__)
    blocks = blocks_by[limit]
    return Occupancy(
        blocks,
        blocks * warps / chip.warps,
        limit,
    )


def _rounded_up(n: int, unit: int) -> int:
    """The least multiple of ``unit`` that is at least n."""
    return -(-n // unit) * unit
