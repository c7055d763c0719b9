"""One child of a run on a GPU: does one task case by case and tells its parent through a file what it does and finds.

``python benchmarks/gpu_child.py JOB EVENTS``: see ``gpu_run``. A task is a generator of (case, function → row).
"""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from gpu_scale import REHEARSAL, Cases, Scale

BROKEN = 3  # exit code after a fault that this process cannot outlive

TASKS = {
    "environment": "gpu_measure",
    "inventory": "gpu_check",
    "check": "gpu_check",
    "memory": "gpu_check",
    "large": "gpu_check",
    "layer_times": "gpu_measure",
    "fill_tables": "gpu_measure",
    "tune_plans": "gpu_measure",
    "whole_network": "gpu_measure",
}


class Events:
    """The way to the parent; each event is on its way before the next line of code runs."""

    def __init__(self, path: str) -> None:
        self._file = Path(path).open("a", encoding="utf-8", buffering=1)

    def send(self, **event) -> None:
        self._file.write(json.dumps(finite(event), default=str) + "\n")  # ASCII: the reader may see half a line
        self._file.flush()


def finite(value: object) -> object:
    """The same without NaN and infinities, which JSON does not have: None in their place."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def perform(cases: Cases, skip: set[str], events: Events, alive: Callable[[], bool]) -> None:
    """Each case not in ``skip``; one that raises is a row too. Exits with BROKEN if the device did not survive it."""
    for case, work in cases:
        if case in skip:
            continue
        events.send(begin=case)
        try:
            row = work()
        except Exception as error:  # whatever a kernel, a compiler or a library raises is what this run is to find out
            words = next(iter(str(error).strip().splitlines()), "")
            row = {"status": "failed", "reason": f"{type(error).__name__}: {words}"}
        broken = not alive()
        if broken:
            row = {**row, "status": "died", "reason": f"the device did not survive it; {row.get('reason')}"}
        events.send(row={"case": case, **row})
        if broken:
            sys.stdout.flush()
            os._exit(BROKEN)
    events.send(end=True)


def alive() -> bool:
    """Whether the device still answers."""
    import torch

    try:
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def warm_up(scale: Scale) -> None:
    """Import every kernel, open the device and load cuDNN, so that no kernel is taken for hung while libraries load."""
    import torch

    from resnet_fast.dispatch.registry import kernels

    kernels()
    if scale.device == "cuda" and not torch.cuda.is_available():
        return  # the first task says so
    x = torch.ones(1, 8, 8, 8, device=scale.device)
    torch.nn.functional.conv2d(x, torch.ones(8, 8, 3, 3, device=scale.device))
    alive()


def follow_parent() -> None:
    """Leave when the parent is gone: killed, it cannot end its children, and the next run needs the GPU to itself."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(BROKEN)

    threading.Thread(target=watch, daemon=True).start()


def main(job: str, events: str) -> None:
    follow_parent()
    request = json.loads(Path(job).read_text(encoding="utf-8"))
    tell = Events(events)
    args = request["args"]
    scale = REHEARSAL if args.pop("rehearse", False) else Scale()
    task = getattr(importlib.import_module(TASKS[request["task"]]), request["task"])
    warm_up(scale)
    tell.send(alive="ready")
    perform(task(scale, lambda text: tell.send(alive=text), **args), set(request["skip"]), tell, alive)


if __name__ == "__main__":
    main(*sys.argv[1:])
