"""What the first answer costs: a fresh process builds one provider and runs it once; its wall time and its peak memory.

``python -m resnet_fast.bench.cold_start PROVIDER MODE MODEL DTYPE BATCH SIZE DEVICE`` is that process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ColdStart:
    """Seconds from the process's start to the first answer, and the most memory that building and running took.

    On CUDA the memory reserved there; on a CPU what became resident beyond libraries and reference model (Linux only).
    """

    seconds: float
    peak_bytes: int | None


def cold_start(provider: str, mode: str, model: str, dtype: str, batch: int, size: int, device: str) -> ColdStart:
    """Measure one cold start with empty compiler caches; raises RuntimeError with the process's last words."""
    case = [provider, mode, model, dtype, str(batch), str(size), device]
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": str(Path(cache, "triton"))}
        start = time.perf_counter()
        child = subprocess.run(
            [sys.executable, "-m", "resnet_fast.bench.cold_start", *case], env=env, text=True, capture_output=True
        )
        seconds = time.perf_counter() - start
    if child.returncode:
        raise RuntimeError(f"cold start of {provider} failed: {child.stderr.strip()[-500:]}")
    return ColdStart(seconds, json.loads(child.stdout.splitlines()[-1])["peak_bytes"])


def main(provider_id: str, mode: str, model: str, dtype: str, batch: str, size: str, device: str) -> None:
    """Build, run once, print the peak, and leave without teardown, which no user waits for."""
    import torch

    from .providers import DTYPES, example_input, provider, reference_model

    x = example_input(int(batch), int(size), DTYPES[dtype], device)
    reference = reference_model(model, device)
    before = _resident(reset=True)
    run = provider(provider_id).prepare(mode, reference, x, DTYPES[dtype])
    run(x)
    if device == "cuda":
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_reserved()
    else:
        peak = None if before is None else _resident() - before
    print(json.dumps({"peak_bytes": peak}), flush=True)
    os._exit(0)


def _resident(reset: bool = False) -> int | None:
    """The largest resident set since the last reset, in bytes; None where there is no procfs.

    Not from getrusage, whose maximum is inherited from the parent and holds what importing took.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


if __name__ == "__main__":
    main(*sys.argv[1:])
