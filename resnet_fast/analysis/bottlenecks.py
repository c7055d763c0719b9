"""Bottlenecks: the likeliest causes why a kernel is far from both ceilings, as sentences, worst first.

Each cause estimates the factor that it costs, from what is known without running: grid, registers, shared memory,
machine code, and the bytes that torch's own ops move around the kernel. The estimates rank; they are no measurement.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch

from ..roofline.chips import Ceilings, nearest_chip
from ..roofline.floor import Floor
from ..roofline.occupancy import occupancy
from .launches import MATRIX, Launch, dominant

NEAR = 0.6  # of the floor: from here on only less work makes a kernel much faster
LATENCY = (
    0.8e-6  # seconds from DRAM, about; Little's law turns it into bytes that must be in flight
)
LAUNCH = 2.5e-6  # seconds that one more launch costs, about
WORTH = 1.15  # causes that cost less than this factor are left out

# A cause: the factor that it costs, and the sentence.
Cause = tuple[float, str]


@dataclass(frozen=True)
class Facts:
    """One kernel on one problem: its floor, the launches of one call, what torch's ops move, and the chip."""

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
        return dominant(self.launches)


def causes(facts: Facts, seconds: float | None = None, most: int = 3) -> list[str]:
    """At most ``most`` sentences, or none if the time is near the floor.

    Without a time, what the code and the grid say.
    """
    if seconds is not None and facts.floor.seconds / seconds >= NEAR:
        return []
    found = [cause for cause in _all_causes(facts) if cause[0] >= WORTH]
    sentences = [
        f"{text} (costs about {factor:.2g}×, estimated)"
        for factor, text in sorted(found, reverse=True)[:most]
    ]
    if seconds is not None and len(sentences) < most:
        sentences.append(
            "what its code and grid do not show: waits inside the loop, bank conflicts, the same bytes read from DRAM "
            "again; `ncu --set full` measures these"
        )
    return sentences


def _all_causes(facts: Facts) -> list[Cause]:
    """Every cause that applies, whatever it costs."""
    if not facts.launches:
        return []
    checks = (
        _torch_ops,
        _no_matrix_instructions,
        _spills,
        _grid,
        _narrow_loads,
        _bytes_in_flight,
        _launches,
    )
    found = (check(facts) for check in checks)
    return [cause for cause in found if cause is not None]


def _torch_ops(f: Facts) -> Cause | None:
    """Torch's own ops move bytes that a fused kernel would not."""
    if not f.torch_bytes:
        return None
    factor = 1 + f.torch_bytes / f.floor.bytes
    return factor, (
        f"torch's own {_distinct(f.torch_ops)} around the kernel move {_mega(f.torch_bytes)} beside the "
        f"{_mega(f.floor.bytes)} of the floor: fuse them into it"
    )


def _no_matrix_instructions(f: Facts) -> Cause | None:
    """16-bit products on the FMA units."""
    if f.dtype.itemsize > 2 or not f.floor.flops or not f.main.instructions:
        return None
    if any(one.count(MATRIX) for one in f.launches):
        return None
    rates = f.limits.rates
    slow = f.floor.flops / rates[torch.float32]
    fast = f.floor.flops / rates[f.dtype]
    return slow / f.floor.seconds, (
        f"its products are no matrix instructions: the FMA units need {slow * 1e6:.0f} µs for them, the tensor "
        f"cores {fast * 1e6:.0f} (tl.dot, mma)"
    )


def _spills(f: Facts) -> Cause | None:
    """Registers in local memory."""
    worst = max(f.launches, key=lambda one: one.stack)
    if not worst.stack:
        return None
    moved = 2 * worst.stack * (worst.threads or 1) * (worst.blocks or 1)
    factor = max(1.3, 1 + moved / f.floor.bytes)
    return factor, (
        f"{worst.name} keeps {worst.stack} bytes a thread in local memory: registers spilled; a "
        "smaller tile, more warps, or no array that is indexed at run time"
    )


def _grid(f: Facts) -> Cause | None:
    """Idle SMs, and a last wave that is nearly empty."""
    blocks = f.main.blocks
    resident = _resident_blocks(f)
    if not blocks or not resident:
        return None
    if blocks < f.sms:
        return f.sms / blocks, (
            f"its grid of {blocks} blocks leaves {f.sms - blocks} of {f.sms} SMs idle: smaller tiles, or several "
            "blocks to a tile's inner sum (split-K)"
        )
    if blocks <= f.sms * resident:
        mean = blocks / f.sms
        return ceil(mean) / mean, (
            f"{blocks} blocks on {f.sms} SMs: some have {ceil(mean)}, others {int(mean)}; the fullest sets the time"
        )
    waves = blocks / (f.sms * resident)
    return ceil(waves) / waves, (
        f"{blocks} blocks are {waves:.1f} waves of {f.sms * resident}: the last is {waves % 1:.0%} full; another tile, "
        "or blocks that stay and take tile after tile"
    )


def _narrow_loads(f: Facts) -> Cause | None:
    """Most bytes come in loads of less than 16.

    What the epilogue reads once a block is few, as is all but what TMA brings.
    """
    if f.main.count("UTMALDG"):
        return None
    loads = {
        name: n for name, n in f.main.instructions.items() if name.startswith(("LDG", "LDGSTS"))
    }
    moved = sum(_width(name) * n for name, n in loads.items())
    moved_wide = sum(16 * n for name, n in loads.items() if _width(name) == 16)
    if 2 * moved_wide >= moved:
        return None
    mean_width = moved / sum(loads.values())
    return min(4.0, 16 / mean_width), (
        f"most of its loads are narrow, {mean_width:.1f} bytes each on average, 16 are possible: channels along the "
        "fast axis, and sizes or masks from which the compiler can see that addresses are aligned"
    )


# Bytes of a load by the modifier of its SASS instruction; without one it loads 4.
_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


def _width(load: str) -> int:
    """Bytes of one thread's load."""
    modifiers = load.split(".")
    return next((width for name, width in _WIDTHS.items() if name in modifiers), 4)


def _bytes_in_flight(f: Facts) -> Cause | None:
    """Little's law: bytes in flight = bandwidth × latency; where memory is what binds."""
    one = f.main
    resident = _resident_blocks(f)
    if f.floor.bound != "memory" or not resident:
        return None
    needed = f.limits.copy * LATENCY / f.sms
    # Half of a pipeline's stages, or two 16-byte loads a thread.
    in_flight = resident * max(one.shared / 2, one.threads * 32)
    limit = occupancy(one.registers, one.shared, one.threads, f.capability).limit
    return needed / in_flight, (
        f"too little is under way: {resident} blocks an SM (by {limit}) keep about {in_flight / 1024:.0f} KiB of loads "
        f"in flight, {f.limits.copy / 1e12:g} TB/s need {needed / 1024:.0f}"
    )


def _launches(f: Facts) -> Cause | None:
    """Launches that take a share of a small problem's time."""
    n = len(f.launches) + len(f.torch_ops)
    plural = "es" if n > 1 else ""
    torchs = ""
    if f.torch_ops:
        torchs = f" ({len(f.torch_ops)} of torch's own: {_distinct(f.torch_ops)})"
    floor = f.floor.seconds
    return 1 + n * LAUNCH / floor, (
        f"{n} launch{plural}{torchs} for a floor of {floor * 1e6:.1f} µs: each costs "
        f"about {LAUNCH * 1e6:g} µs, less in a CUDA graph; fuse what is small with a neighbour"
    )


def _resident_blocks(f: Facts) -> int:
    """Blocks of the main launch that an SM holds; 0 if that is not known."""
    one = f.main
    if not one.threads or nearest_chip(f.capability) is None:
        return 0
    return occupancy(one.registers, one.shared, one.threads, f.capability).blocks


def _distinct(names: tuple[str, ...]) -> str:
    return ", ".join(dict.fromkeys(names))


def _mega(n: float) -> str:
    return f"{n / 1e6:.1f} MB"
