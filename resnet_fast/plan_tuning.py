"""``Plan.tune``: kernels measured one by one, then groups of steps end to end, by the whole network's time and not by summing kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import autotune
from .autotune import Device, first_line
from .fusion import greedy
from .problem import ACROSS, Problem
from .schedule import Group

if TYPE_CHECKING:
    from .planning import Plan
    from .timing import Timing


def tune(plan: Plan, example: Tensor, device: Device) -> None:
    """Fill the table for the plan's problems, and for those of every kind of group; then use the kinds that make the network faster.

    The kinds are those that the plan was made with, or all. A variant that runs out of memory or fails is named in ``notes`` and left out.
    """
    plain = plan.variant(())
    found = list(_problems(plain, example))
    kinds = [kind for kind in plan.across or ACROSS if _forms(plan.variant((kind,)), kind)]
    for kind in kinds:
        found += _problems(plan.variant((kind,)), example)
        device.settle()
    autotune.tune(list(dict.fromkeys(found)), device=device)
    worth, told = [], []
    for kind in kinds:
        if _has_kernel(plan.variant((kind,)), kind, example):
            worth.append(kind)
        else:
            told.append(f"across: {kind} is not used: no kernel of it won against single steps")
        device.settle()

    def clock(variants: list[tuple[str, ...]]) -> dict[tuple[str, ...], Timing]:
        ready = {}
        for across in variants:
            try:
                variant = plan.variant(across)
                variant(example)
                ready[across] = lambda variant=variant: variant(example)
            except (torch.OutOfMemoryError, RuntimeError, ValueError) as trouble:
                told.append(f"across: {', '.join(across) or 'the plan without groups'} could not be run: {first_line(trouble)}")
                device.settle()
        return device.clock(ready) if ready else {}

    chosen, decisions = greedy(worth, clock)
    plan.use_across(chosen, [*told, *decisions])


def _forms(plan: Plan, kind: str) -> bool:
    return any(isinstance(step, Group) and step.op == kind for step in plan._lowered.steps)


def _problems(plan: Plan, example: Tensor) -> list[Problem]:
    return [line.problem for line in plan.explain(example) if line.problem is not None]


def _has_kernel(plan: Plan, kind: str, example: Tensor) -> bool:
    """Whether a kernel of the op runs at least one group; else the network is what it is without."""
    return any(line.op == kind and not line.why.startswith("one by one") for line in plan.explain(example))
