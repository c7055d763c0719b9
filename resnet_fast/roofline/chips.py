"""Each chip's facts: capability, SMs, shared memory, rates and bandwidth, with their source."""

from __future__ import annotations

from dataclasses import dataclass

import torch

FLOATING = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Ceilings:
    """A GPU's limits: bytes a second of a large copy (read + written), dense FLOPs a second by dtype, their source."""

    title: str
    copy: float
    rates: dict[torch.dtype, float]
    source: str


def _rates(float32: float, half: float, byte: float, fp8: bool) -> dict[torch.dtype, float]:
    rates = {torch.float32: float32, torch.bfloat16: half, torch.float16: half, torch.int8: byte}
    return {**rates, torch.float8_e4m3fn: byte} if fp8 else rates


MEASURED = "copy and bf16 measured on one such card; fp16 as bf16, bytes at twice that, fp32 from the datasheet"


DATASHEET = "datasheet, not measured"


GPUS = {
    "h200": Ceilings("NVIDIA H200", 4.3e12, _rates(67e12, 790e12, 1580e12, True), MEASURED),
    "h100": Ceilings("NVIDIA H100 80GB HBM3", 3.35e12, _rates(67e12, 989e12, 1979e12, True), DATASHEET),
    "b200": Ceilings("NVIDIA B200", 7.7e12, _rates(75e12, 2250e12, 4500e12, True), DATASHEET),
    "a100": Ceilings("NVIDIA A100-SXM4-80GB", 2.039e12, _rates(19.5e12, 312e12, 624e12, False), DATASHEET),
    "l40s": Ceilings("NVIDIA L40S", 0.864e12, _rates(91.6e12, 362e12, 733e12, True), DATASHEET),
    "rtx4090": Ceilings("NVIDIA GeForce RTX 4090", 1.008e12, _rates(82.6e12, 165e12, 660e12, True), DATASHEET),
}


def ceilings(gpu: str) -> Ceilings:
    """The ceilings of a GPU by short name ("h200") or as the driver names it; raises LookupError with those known."""
    for key, found in GPUS.items():
        if gpu.lower() in (key, found.title.lower()):
            return found
    raise LookupError(f"no ceilings for GPU {gpu!r}; known: {', '.join(GPUS)}")
