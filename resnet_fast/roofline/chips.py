"""One row for each GPU: what an SM holds, the rates that rank tiles, and the ceilings of a roofline with their source.

What an SM holds is from the CUDA C++ Programming Guide (technical specifications per compute capability). The rates
that rank tiles are from datasheets, except for the H200's matrix rate (790 TFLOP/s, measured) and L2 (guessed).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

FLOATING = (torch.float32, torch.bfloat16, torch.float16)
_KIB = 1024


@dataclass(frozen=True)
class Ceilings:
    """A GPU's limits: bytes a second of a large copy (read + written), dense FLOPs a second by dtype, their source."""

    title: str  # as the driver names it
    copy: float
    rates: dict[torch.dtype, float]
    source: str


@dataclass(frozen=True)
class Chip:
    """A GPU: its SMs, what each of them holds, its rates, and the ceilings of the whole GPU where they are known."""

    capability: tuple[int, int]
    sms: int
    warps: int  # of one SM, as are the following
    blocks: int
    shared_sm: int  # bytes of shared memory
    registers: int = 65536
    mma: float | None = None  # 16-bit matrix FLOP per ns and SM, float32 accumulation
    fma: float | None = None  # float32 FLOP per ns and SM
    l2: float | None = None  # bytes per ns and SM out of L2
    ceilings: Ceilings | None = None

    @property
    def shared(self) -> int:
        """Bytes of shared memory that one block may use: 1 KiB of each block is the system's."""
        return self.shared_sm - _KIB


def _rates(float32: float, half: float, byte: float, fp8: bool = True) -> dict[torch.dtype, float]:
    """Dense FLOPs a second by dtype; fp8 runs as fast as bytes where there is fp8."""
    rates = {torch.float32: float32, torch.bfloat16: half, torch.float16: half, torch.int8: byte}
    if fp8:
        rates[torch.float8_e4m3fn] = byte
    return rates


_MEASURED = "copy and bf16 measured on one such card; fp16 as bf16, bytes at twice that, fp32 from the datasheet"
_DATASHEET = "datasheet, not measured"

_H200 = Chip(
    (9, 0),
    sms=132,
    warps=64,
    blocks=32,
    shared_sm=228 * _KIB,
    mma=5980,
    fma=500,
    l2=49,
    ceilings=Ceilings("NVIDIA H200", 4.3e12, _rates(67e12, 790e12, 1580e12), _MEASURED),
)
_B200 = Chip(
    (10, 0),
    sms=148,
    warps=64,
    blocks=32,
    shared_sm=228 * _KIB,
    mma=15200,
    fma=540,
    l2=65,
    ceilings=Ceilings("NVIDIA B200", 7.7e12, _rates(75e12, 2250e12, 4500e12), _DATASHEET),
)
_A100 = Chip(
    (8, 0),
    sms=108,
    warps=64,
    blocks=32,
    shared_sm=164 * _KIB,
    mma=2890,
    fma=180,
    l2=40,
    ceilings=Ceilings(
        "NVIDIA A100-SXM4-80GB", 2.039e12, _rates(19.5e12, 312e12, 624e12, fp8=False), _DATASHEET
    ),
)
_L40S = Chip(
    (8, 9),
    sms=142,
    warps=48,
    blocks=24,
    shared_sm=100 * _KIB,
    mma=2550,
    fma=640,
    l2=40,
    ceilings=Ceilings("NVIDIA L40S", 0.864e12, _rates(91.6e12, 362e12, 733e12), _DATASHEET),
)

# By short name. A GPU of the same architecture as another is that row with its own SMs and ceilings.
CHIPS = {
    "h200": _H200,
    "h100": replace(
        _H200,
        ceilings=Ceilings(
            "NVIDIA H100 80GB HBM3", 3.35e12, _rates(67e12, 989e12, 1979e12), _DATASHEET
        ),
    ),
    "b200": _B200,
    "a100": _A100,
    "l40s": _L40S,
    "rtx4090": replace(
        _L40S,
        sms=128,
        ceilings=Ceilings(
            "NVIDIA GeForce RTX 4090", 1.008e12, _rates(82.6e12, 165e12, 660e12), _DATASHEET
        ),
    ),
    # No ceilings: these rows stand for a compute capability.
    "a40": Chip((8, 6), sms=84, warps=48, blocks=16, shared_sm=100 * _KIB, mma=900, fma=420, l2=30),
    "orin": Chip((8, 7), sms=16, warps=48, blocks=16, shared_sm=164 * _KIB),
    "rtxpro6000": Chip(
        (12, 0), sms=188, warps=48, blocks=24, shared_sm=100 * _KIB, mma=2600, fma=660, l2=40
    ),
}

# The first chip listed of each compute capability, oldest first; all chips of one agree in what an SM holds.
_FIRST = {chip.capability: chip for chip in reversed(CHIPS.values())}
BY_CAPABILITY = dict(sorted(_FIRST.items()))

# By short name, the GPUs whose ceilings are known.
GPUS = {name: chip.ceilings for name, chip in CHIPS.items() if chip.ceilings is not None}


def ceilings(gpu: str) -> Ceilings:
    """The ceilings of a GPU by short name ("h200") or as the driver names it; raises LookupError with those known."""
    for key, found in GPUS.items():
        if gpu.lower() in (key, found.title.lower()):
            return found
    raise LookupError(f"no ceilings for GPU {gpu!r}; known: {', '.join(GPUS)}")


def nearest_chip(capability: tuple[int, int]) -> Chip | None:
    """The chip of a compute capability, or of the nearest older one listed; None before the oldest."""
    listed = [known for known in BY_CAPABILITY if known <= capability]
    return BY_CAPABILITY[max(listed)] if listed else None
