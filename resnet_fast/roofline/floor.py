"""Floors: the least time that one problem takes on a chip, max(bytes / copy bandwidth, FLOPs / matrix rate)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..dispatch.problem import Problem
from .chips import Ceilings
from .cost import Cost, problem_step


@dataclass(frozen=True)
class Floor:
    """The least time of one kernel in seconds and which ceiling sets it, "memory" or "compute"."""

    name: str
    bytes: int
    flops: int
    seconds: float
    bound: str


def floor(cost: Cost, limits: Ceilings, dtype: torch.dtype) -> Floor:
    """The floor of one kernel; raises LookupError for a dtype that GPU has no rate for."""
    if dtype not in limits.rates:
        known = ", ".join(map(str, limits.rates))
        raise LookupError(f"no rate for {dtype} on {limits.title}; known: {known}")
    memory = cost.bytes / limits.copy
    compute = cost.flops / limits.rates[dtype]
    bound = "memory" if memory >= compute else "compute"
    return Floor(
        cost.name,
        cost.bytes,
        cost.flops,
        max(memory, compute),
        bound,
    )


def predict(costs: Iterable[Cost], limits: Ceilings, dtype: torch.dtype) -> list[Floor]:
    """The floor of each kernel."""
    return [floor(cost, limits, dtype) for cost in costs]


def problem_floor(problem: Problem, limits: Ceilings) -> Floor:
    """The floor of one call of an op."""
    return floor(problem_step(problem), limits, problem.dtype)
