"""``Plan.tune``: kernels measured one by one, then groups of steps end to end, by the whole network's time and not by summing kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

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
    told: list[str] = []

    def tried(across: tuple[str, ...], work: Callable[[Plan], Any]) -> Any:
        """``work`` on the plan with these groups, or None with a note why not."""
        try:
            return work(plan.variant(across))
        except (torch.OutOfMemoryError, RuntimeError, ValueError) as trouble:
            told.append(f"across: {', '.join(across) or 'the plan without groups'} could not be run: {first_line(trouble)}")
            return None
        finally:
            device.settle()

    found = {(): _problems(plan.variant(()), example)}
    for kind in plan.across or ACROSS:
        if _forms(plan.variant((kind,)), kind):
            found[(kind,)] = tried((kind,), lambda variant: _problems(variant, example))
    found = {across: problems for across, problems in found.items() if problems is not None}
    autotune.tune(list(dict.fromkeys(problem for problems in found.values() for problem in problems)), device=device)
    worth = []
    for kind, in filter(None, found):
        wins = tried((kind,), lambda variant, kind=kind: _has_kernel(variant, kind, example))
        worth += [kind] if wins else []
        told += [f"across: {kind} is not used: no kernel of it won against single steps"] if wins is False else []

    def clock(variants: list[tuple[str, ...]]) -> dict[tuple[str, ...], Timing]:
        ready = {across: run for across in variants if (run := tried(across, lambda variant: _built(variant, example))) is not None}
        return device.clock(ready) if ready else {}

    chosen, decisions = greedy(worth, clock)
    plan.use_across(chosen, list(dict.fromkeys([*told, *decisions])))


def _built(plan: Plan, example: Tensor) -> Callable[[], Any]:
    """The whole call, after a first one that chooses kernels and captures."""
    plan(example)
    return lambda: plan(example)


def _forms(plan: Plan, kind: str) -> bool:
    return any(isinstance(step, Group) and step.op == kind for step in plan._lowered.steps)


def _problems(plan: Plan, example: Tensor) -> list[Problem]:
    return [line.problem for line in plan.explain(example) if line.problem is not None]


def _has_kernel(plan: Plan, kind: str, example: Tensor) -> bool:
    """Whether a kernel of the op runs at least one group; else the network is what it is without."""
    return any(line.op == kind and not line.why.startswith("one by one") for line in plan.explain(example))
