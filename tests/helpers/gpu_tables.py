"""A pretended GPU model: its table of measured kernels, its clock, and kernels that are right, wrong or fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from resnet_fast.tuning.kernels import Device, DeviceLost
from resnet_fast.util.timing import Timing

GPU = "Pretended GPU"
CALLS = 8  # of a kernel between two clock readings, with the one set of arguments of a device without a cache


def table(folder: Path) -> dict:
    return json.loads((folder / "pretended-gpu.json").read_text())


@dataclass
class Replay:
    """A run that stands for its CUDA graph."""

    run: Callable

    def __call__(self):
        return self.run()


@dataclass
class Pretended(Device):
    """A CPU that stands for a GPU.

    ``calls`` and ``graph`` are the seconds that its clock reads for each kernel, by default ten microseconds.
    ``verified`` and ``timed`` list what was asked of it.
    """

    name: str = GPU
    kind: str = "cpu"
    calls: dict[str, float] = field(default_factory=dict)
    graph: dict[str, float] = field(default_factory=dict)
    uncapturable: tuple[str, ...] = ()
    verified: list[tuple[str, str]] = field(default_factory=list)
    timed: list[str] = field(default_factory=list)
    lost: bool = False

    def verify(self, kernel, problem):
        self.verified.append((kernel.id, problem.key))
        return super().verify(kernel, problem)

    def clock(self, variants, confidence=0.01):
        for run in variants.values():
            run()
        self.timed += variants
        in_graphs = any(isinstance(run, Replay) for run in variants.values())
        seconds = self.graph if in_graphs else self.calls
        return {id: Timing((CALLS * seconds.get(id, 10e-6),) * 3) for id in variants}

    def capture(self, runs):
        graphs = {id: Replay(run) for id, run in runs.items() if id not in self.uncapturable}
        reasons = dict.fromkeys(
            runs.keys() - graphs.keys(), "operation not permitted when stream is capturing"
        )
        return graphs, reasons

    def settle(self):
        if self.lost:
            raise DeviceLost(
                "the GPU stopped answering in this process: an illegal memory access was encountered"
            )


# ---------------------------------------------------------------- kernels of add_act


def right(x, y, gate, act):
    return torch.relu(x + y)


def wrong(x, y, gate, act):
    out = torch.relu(x + y)
    out[-1, -1, -1, -1] += 1
    return out


def greedy(x, y, gate, act):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.\nmore words")


def broken(x, y, gate, act):
    raise RuntimeError("PassManager::run failed")
