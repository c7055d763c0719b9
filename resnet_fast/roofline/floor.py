"""The least time that one problem takes on a chip."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..dispatch.problem import Problem
from .chips import Ceilings
from .cost import Step, problem_step


@dataclass(frozen=True)
class Floor:
    """The least time of a step in seconds and which ceiling sets it, "memory" or "compute"."""

    name: str
    bytes: int
    flops: int
    seconds: float
    bound: str


def floor(step: Step, limits: Ceilings, dtype: torch.dtype) -> Floor:
    """The floor of one step; raises LookupError for a dtype that GPU has no rate for."""
    if dtype not in limits.rates:
        raise LookupError(f"no rate for {dtype} on {limits.title}; known: {', '.join(map(str, limits.rates))}")
    memory, compute = step.bytes / limits.copy, step.flops / limits.rates[dtype]
    return Floor(step.name, step.bytes, step.flops, max(memory, compute), "memory" if memory >= compute else "compute")


def predict(steps: Iterable[Step], limits: Ceilings, dtype: torch.dtype) -> list[Floor]:
    """The floor of each step."""
    return [floor(step, limits, dtype) for step in steps]


def problem_floor(problem: Problem, limits: Ceilings) -> Floor:
    """The floor of one call of an op."""
    return floor(problem_step(problem), limits, problem.dtype)
