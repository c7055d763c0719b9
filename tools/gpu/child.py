"""One child process of ``make gpu``: runs one task case by case and reports to its parent through a file.

``python -m tools.gpu.child JOB EVENTS``: see ``watchdog``. A task is a generator of (case, function → row).
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

from .scale import REHEARSAL, Cases, Scale

BROKEN = 3  # exit code after a fault that the CUDA context of this process does not survive

# The file of each task, by the task's name.
TASKS = {
    "environment": "ceilings",
    "inventory": "check",
    "check": "check",
    "memory": "check",
    "large": "check",
    "models": "check_models",
    "streams": "check_models",
    "layer_times": "measure",
    "fill_tables": "tune",
    "tune_plans": "tune",
    "whole_network": "measure",
}


class Events:
    """Writes events for the parent. Each is in the file before the next line of code runs."""

    def __init__(self, path: str) -> None:
        self._file = Path(path).open("a", encoding="utf-8", buffering=1)

    def send(self, **event) -> None:
        """Append one event."""
        line = json.dumps(finite(event), default=str)  # ASCII: the reader may see half a line
        self._file.write(line + "\n")
        self._file.flush()


def finite(value: object) -> object:
    """Return the same value with None for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def perform(
    cases: Cases,
    skip: set[str],
    events: Events,
    alive: Callable[[], bool],
) -> None:
    """Run each case that is not in ``skip``. Exits with BROKEN if the device did not survive one."""
    for case, work in cases:
        if case in skip:
            continue
        events.send(begin=case)
        row = attempt(work)
        broken = not alive()
        if broken:
            reason = f"the device did not survive it; {row.get('reason')}"
            row = {**row, "status": "died", "reason": reason}
        events.send(row={"case": case, **row})
        if broken:
            sys.stdout.flush()
            os._exit(BROKEN)
    events.send(end=True)


def attempt(work: Callable[[], dict]) -> dict:
    """Run a case and return its row, also when it raises."""
    try:
        return work()
    # whatever a kernel, a compiler or a library raises is what this run is to find out
    except Exception as error:
        message = str(error).strip().splitlines()
        first_line = message[0] if message else ""
        return {"status": "failed", "reason": f"{type(error).__name__}: {first_line}"}


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
    """Import every kernel, open the device and load cuDNN: while libraries load, no kernel must be taken for hung."""
    import torch

    from resnet_fast.dispatch.registry import kernels

    kernels()
    if scale.device == "cuda" and not torch.cuda.is_available():
        return  # the first task says so
    x = torch.ones(1, 8, 8, 8, device=scale.device)
    weight = torch.ones(8, 8, 3, 3, device=scale.device)
    torch.nn.functional.conv2d(x, weight)
    alive()


def follow_parent() -> None:
    """Exit when the parent is gone: a killed parent cannot end its children, and the next run needs the whole GPU."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(BROKEN)

    threading.Thread(target=watch, daemon=True).start()


def task_named(name: str) -> Callable[..., Cases]:
    """Import and return a task."""
    module = importlib.import_module(f"tools.gpu.{TASKS[name]}")
    return getattr(module, name)


def main(job: str, events_file: str) -> None:
    follow_parent()
    request = json.loads(Path(job).read_text(encoding="utf-8"))
    events = Events(events_file)
    args = request["args"]
    scale = REHEARSAL if args.pop("rehearse", False) else Scale()
    task = task_named(request["task"])
    warm_up(scale)
    events.send(alive="ready")

    def report_alive(text: str) -> None:
        events.send(alive=text)

    cases = task(scale, report_alive, **args)
    perform(cases, set(request["skip"]), events, alive)


if __name__ == "__main__":
    main(*sys.argv[1:])
