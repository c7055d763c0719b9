"""Why a kernel is far from both ceilings: numbers in, the likeliest causes out, as sentences, worst first.

Each cause estimates the factor that it costs, from what is known without running: grid, registers, shared memory, machine code,
and the bytes that torch's own ops move around the kernel. The estimates rank; they are no measurement.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch

from ..roofline.chips import Ceilings
from ..roofline.floor import Floor
from ..roofline.occupancy import LIMITS, occupancy
from .launches import MATRIX, Launch, main

NEAR = 0.6  # of the floor: from here on only less work makes a kernel much faster
LATENCY = 0.8e-6  # seconds from DRAM, about; Little's law turns it into bytes that must be under way
LAUNCH = 2.5e-6  # seconds that one more launch costs, about
WORTH = 1.15  # causes that cost less than this factor are not told


@dataclass(frozen=True)
class Facts:
    """One kernel on one problem: its floor, the launches of one call, what torch's ops move around them, and the chip."""

    floor: Floor
    dtype: torch.dtype
    launches: tuple[Launch, ...]
    limits: Ceilings
    capability: tuple[int, int]
    sms: int
    torch_bytes: int = 0
    torch_ops: tuple[str, ...] = ()

    @property
    def main(self) -> Launch:
        return main(self.launches)


def causes(facts: Facts, seconds: float | None = None, most: int = 3) -> list[str]:
    """At most ``most`` sentences, or none if the time is near the floor; without a time, what the code and the grid say."""
    if seconds is not None and facts.floor.seconds / seconds >= NEAR:
        return []
    found = [
        cause
        for look in (_torch_ops, _matrix, _spills, _grid, _narrow, _flight, _launches)
        if facts.launches and (cause := look(facts)) is not None and cause[0] >= WORTH
    ]
    told = [f"{text} (costs about {factor:.2g}×, estimated)" for factor, text in sorted(found, reverse=True)[:most]]
    if seconds is not None and len(told) < most:
        told.append(
            "what its code and grid do not show: waits inside the loop, bank conflicts, the same bytes read from DRAM again; "
            "`ncu --set full` measures these"
        )
    return told


def _torch_ops(f: Facts) -> tuple[float, str] | None:
    if not f.torch_bytes:
        return None
    names = ", ".join(dict.fromkeys(f.torch_ops))
    return 1 + f.torch_bytes / f.floor.bytes, (
        f"torch's own {names} around the kernel move {_mega(f.torch_bytes)} beside the "
        f"{_mega(f.floor.bytes)} of the floor: fuse them into it"
    )


def _matrix(f: Facts) -> tuple[float, str] | None:
    """16-bit products on the FMA units."""
    if (
        f.dtype.itemsize > 2
        or not f.floor.flops
        or not f.main.instructions
        or any(one.count(MATRIX) for one in f.launches)
    ):
        return None
    slow, fast = (f.floor.flops / f.limits.rates[dtype] for dtype in (torch.float32, f.dtype))
    return slow / f.floor.seconds, (
        f"its products are no matrix instructions: the FMA units need {slow * 1e6:.0f} µs for them, the tensor "
        f"cores {fast * 1e6:.0f} (tl.dot, mma)"
    )


def _spills(f: Facts) -> tuple[float, str] | None:
    worst = max(f.launches, key=lambda one: one.stack)
    if not worst.stack:
        return None
    moved = 2 * worst.stack * (worst.threads or 1) * (worst.blocks or 1)
    return max(1.3, 1 + moved / f.floor.bytes), (
        f"{worst.name} keeps {worst.stack} bytes a thread in local memory: registers spilled; a "
        "smaller tile, more warps, or no array that is indexed at run time"
    )


def _grid(f: Facts) -> tuple[float, str] | None:
    """Idle SMs, and a last wave that is nearly empty."""
    one = f.main
    resident = _resident(f)
    if not one.blocks or not resident:
        return None
    if one.blocks < f.sms:
        return f.sms / one.blocks, (
            f"its grid of {one.blocks} blocks leaves {f.sms - one.blocks} of {f.sms} SMs idle: smaller tiles, or several "
            "blocks to a tile's inner sum (split-K)"
        )
    if one.blocks <= f.sms * resident:
        ideal = one.blocks / f.sms
        return (
            ceil(ideal) / ideal,
            f"{one.blocks} blocks on {f.sms} SMs: some have {ceil(ideal)}, others {int(ideal)}; the fullest sets the time",
        )
    waves = one.blocks / (f.sms * resident)
    return ceil(waves) / waves, (
        f"{one.blocks} blocks are {waves:.1f} waves of {f.sms * resident}: the last is {waves % 1:.0%} full; another tile, "
        "or blocks that stay and take tile after tile"
    )


def _narrow(f: Facts) -> tuple[float, str] | None:
    """Most bytes come in loads of less than 16; what the epilogue reads once a block is few, as is all but what TMA brings."""
    if f.main.count("UTMALDG"):
        return None
    loads = {name: n for name, n in f.main.instructions.items() if name.startswith(("LDG", "LDGSTS"))}
    moved = sum(_bytes(name) * n for name, n in loads.items())
    if 2 * sum(16 * n for name, n in loads.items() if _bytes(name) == 16) >= moved:
        return None
    width = moved / sum(loads.values())
    return min(4.0, 16 / width), (
        f"most of its loads are narrow, {width:.1f} bytes each on average, 16 are possible: channels along the fast "
        "axis, and sizes or masks from which the compiler can see that addresses are aligned"
    )


def _bytes(load: str) -> int:
    parts = load.split(".")
    return (
        16
        if "128" in parts
        else 8
        if "64" in parts
        else 2
        if "U16" in parts or "S16" in parts
        else 1
        if "U8" in parts or "S8" in parts
        else 4
    )


def _flight(f: Facts) -> tuple[float, str] | None:
    """Little's law: bytes under way = bandwidth × latency; where memory is what binds."""
    one, resident = f.main, _resident(f)
    if f.floor.bound != "memory" or not resident:
        return None
    needed = f.limits.copy * LATENCY / f.sms
    held = resident * max(
        one.shared / 2, one.threads * 32
    )  # half of a pipeline's stages, or two 16-byte loads a thread
    limit = occupancy(one.registers, one.shared, one.threads, f.capability).limit
    return needed / held, (
        f"too little is under way: {resident} blocks an SM (by {limit}) keep about {held / 1024:.0f} KiB of loads in flight, "
        f"{f.limits.copy / 1e12:g} TB/s need {needed / 1024:.0f}"
    )


def _launches(f: Facts) -> tuple[float, str] | None:
    n = len(f.launches) + len(f.torch_ops)
    torchs = f" ({len(f.torch_ops)} of torch's own: {', '.join(dict.fromkeys(f.torch_ops))})" if f.torch_ops else ""
    return 1 + n * LAUNCH / f.floor.seconds, (
        f"{n} launch{'es' * (n > 1)}{torchs} for a floor of {f.floor.seconds * 1e6:.1f} µs: each costs "
        f"about {LAUNCH * 1e6:g} µs, less in a CUDA graph; fuse what is small with a neighbour"
    )


def _resident(f: Facts) -> int:
    one = f.main
    if not one.threads or f.capability < min(LIMITS):
        return 0
    return occupancy(one.registers, one.shared, one.threads, f.capability).blocks


def _mega(n: float) -> str:
    return f"{n / 1e6:.1f} MB"
