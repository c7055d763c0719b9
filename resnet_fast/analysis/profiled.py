"""What a call really launched on this GPU: grids, registers and shared memory of every kernel, as the profiler recorded them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from math import prod
from pathlib import Path

import torch

from .launches import Launch


def profiled(call: Callable[[], object]) -> list[Launch]:
    """The launches of one call after a first; an empty list where the driver lets nobody profile."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(path))
        return launches_of(json.loads(path.read_text()))


def launches_of(trace: dict) -> list[Launch]:
    """The kernels of a Chrome trace that Kineto wrote, in the order in which they began."""
    events = sorted((e for e in trace["traceEvents"] if e.get("cat") == "kernel"), key=lambda e: e["ts"])
    return [
        Launch(
            e["name"],
            int(e["args"]["registers per thread"]),
            0,
            int(e["args"]["shared memory"]),
            prod(e["args"]["block"]),
            prod(e["args"]["grid"]),
        )
        for e in events
    ]
