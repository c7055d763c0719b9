"""How many blocks of a kernel an SM holds at a time, computed from registers, shared memory and threads; and the chips' limits.

    blocks = min(registers of an SM / those of a block, shared memory likewise, warps likewise, the most blocks an SM takes)

Source: CUDA C++ Programming Guide, technical specifications per compute capability; the granularities are those of NVIDIA's occupancy
calculator: registers go to a warp 256 at a time and warps to four schedulers, shared memory goes 128 bytes at a time and 1 KiB more.
"""

from __future__ import annotations

from dataclasses import dataclass

REGISTERS = 65536  # of one SM, on every chip here
_KIB = 1024


@dataclass(frozen=True)
class Limits:
    """What one SM of a compute capability holds: warps, blocks, bytes of shared memory."""

    warps: int
    blocks: int
    shared: int


LIMITS = {
    (8, 0): Limits(64, 32, 164 * _KIB),
    (8, 6): Limits(48, 16, 100 * _KIB),
    (8, 7): Limits(48, 16, 164 * _KIB),
    (8, 9): Limits(48, 24, 100 * _KIB),
    (9, 0): Limits(64, 32, 228 * _KIB),
    (10, 0): Limits(64, 32, 228 * _KIB),
    (12, 0): Limits(48, 24, 100 * _KIB),
}


@dataclass(frozen=True)
class Chip:
    """A GPU as far as a grid is concerned: compute capability and SMs."""

    capability: tuple[int, int]
    sms: int


# By the short names of ``roofline.GPUS``.
CHIPS = {
    "h200": Chip((9, 0), 132),
    "h100": Chip((9, 0), 132),
    "b200": Chip((10, 0), 148),
    "a100": Chip((8, 0), 108),
    "l40s": Chip((8, 9), 142),
    "rtx4090": Chip((8, 9), 128),
}


@dataclass(frozen=True)
class Occupancy:
    """``blocks`` on an SM at a time, their ``share`` of the warps it could hold, and what sets the number."""

    blocks: int
    share: float
    limit: str


def occupancy(registers: int, shared: int, threads: int, capability: tuple[int, int]) -> Occupancy:
    """Registers a thread, bytes of shared memory and threads a block → what an SM holds; blocks is 0 for a block that does not fit.

    A capability that is not listed counts as the nearest older one; raises LookupError below 8.0.
    """
    known = [c for c in LIMITS if c <= capability]
    if not known:
        raise LookupError("occupancy: got compute capability {}.{}, expected 8.0 or later".format(*capability))
    sm, warps = LIMITS[max(known)], -(-threads // 32)
    per_warp = max(256, -(-registers * 32 // 256) * 256)
    by = {
        "warps": sm.warps // warps,
        "registers": REGISTERS // per_warp // 4 * 4 // warps,
        "shared memory": sm.shared // (-(-shared // 128) * 128 + _KIB),
        "blocks": sm.blocks,
    }
    limit = min(by, key=by.get)
    return Occupancy(by[limit], by[limit] * warps / sm.warps, limit)
