"""The cost of the first answer: wall time and peak memory of a fresh process that builds a provider and runs it once.

``python -m resnet_fast.bench.cold_start PROVIDER MODE MODEL DTYPE BATCH SIZE DEVICE`` is that process.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from .fresh_process import run_module


@dataclass(frozen=True)
class ColdStart:
    """Seconds from the process's start to the first answer, and the most memory that building and running took.

    On CUDA the memory reserved there; on a CPU what became resident beyond libraries and reference model (Linux only).
    """

    seconds: float
    peak_bytes: int | None


def cold_start(
    provider: str, mode: str, model: str, dtype: str, batch: int, size: int, device: str
) -> ColdStart:
    """Measure one cold start with empty compiler caches; raises RuntimeError with the end of the process's errors."""
    case = [provider, mode, model, dtype, str(batch), str(size), device]
    with tempfile.TemporaryDirectory() as cache:
        triton_cache = str(Path(cache, "triton"))
        caches = {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": triton_cache}
        start = time.perf_counter()
        process = run_module("resnet_fast.bench.cold_start", case, caches)
        seconds = time.perf_counter() - start
    if process.returncode:
        errors = process.stderr.strip()[-500:]
        raise RuntimeError(f"cold start of {provider} failed: {errors}")
    result = json.loads(process.stdout.splitlines()[-1])
    return ColdStart(seconds, result["peak_bytes"])


def main(
    provider_id: str, mode: str, model: str, dtype: str, batch: str, size: str, device: str
) -> None:
    """Build, run once, print the peak, and exit without teardown, which no user waits for."""
    import torch

    from ..util.machine import SHORT_DTYPES
    from .providers import example_input, provider, reference_model

    x = example_input(int(batch), int(size), SHORT_DTYPES[dtype], device)
    reference = reference_model(model, device)
    before = _resident(reset=True)
    run = provider(provider_id).prepare(mode, reference, x, SHORT_DTYPES[dtype])
    run(x)
    if device == "cuda":
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_reserved()
    else:
        peak = None if before is None else _resident() - before
    print(json.dumps({"peak_bytes": peak}), flush=True)
    os._exit(0)


def _resident(reset: bool = False) -> int | None:
    """Return the largest resident set since the last reset, in bytes; None where there is no procfs.

    Not getrusage's maximum, which is inherited from the parent and includes the imports.
    """
    clear_refs = Path("/proc/self/clear_refs")
    if not clear_refs.exists():
        return None
    if reset:
        clear_refs.write_text("5")
    status = Path("/proc/self/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    _, kibibytes, *_ = peak.split()
    return int(kibibytes) * 1024


if __name__ == "__main__":
    main(*sys.argv[1:])
