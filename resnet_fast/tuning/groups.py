"""``Plan.tune``: kernels measured one by one, then groups of steps end to end, by the whole network's time and not by summing kernels.

What wins is remembered in the GPU's table: the next process's plan is as fast without measuring.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..dispatch.problem import ACROSS, Problem
from ..graph.across import group, label
from ..graph.ir import Group
from . import group_table, kernels
from .group_search import UNTRIED, Choice, Option, search
from .kernels import Device, first_line

if TYPE_CHECKING:
    from ..planning.plan import Plan
    from ..runtime.explanation import Line
    from ..util.timing import Timing

FAILED = "could not be run"
NETWORK_CONFIDENCE = 0.0005  # of a whole network's median: one group is a small part of it


def tune(plan: Plan, example: Tensor, device: Device, seconds: float, say: Callable[[str], None]) -> None:
    """Fill the table for the plan's problems, and for those of every group; then :func:`choose_groups`.

    The groups are those that the plan's user named, or all. What was settled before is taken from the table.
    """
    if recall(plan, example, device, say):
        return
    tried = _Tried(plan, device)
    lines = {(): plan.variant(()).explain(example)}
    for name in _kinds(plan):
        lines[name] = tried((name,), lambda variant: variant.explain(example))
    problems = [line.problem for some in lines.values() for line in some or () if line.problem is not None]
    kernels.tune(list(dict.fromkeys(problems)), device=device, say=say)
    choose_groups(plan, example, device, seconds, say)


def recall(plan: Plan, example: Tensor, device: Device, say: Callable[[str], None]) -> bool:
    """Whether the groups of this network are settled; they are used then."""
    found = None if plan.asked else group_table.find(plan, example, device.name)
    if found is None or not found.settled:
        return False
    say(f"{kernels.BEFORE}: {', '.join(found.across) or 'no groups'}")
    plan.use_across(found.across, found.notes)
    return True


def choose_groups(plan: Plan, example: Tensor, device: Device, seconds: float, say: Callable[[str], None]) -> None:
    """Use the groups that make the whole network faster by the kernels that the table has now, and remember them there.

    ``seconds`` is what the search may take. A variant that runs out of memory or fails is named in ``notes`` and left out. The plan changes
    at the end only. What was found among groups that a user named is not remembered: it says nothing of the others.
    """
    tried = _Tried(plan, device)
    options: list[Option] = []
    for name in _kinds(plan):
        lines = tried((name,), lambda variant: variant.explain(example))
        won = {} if lines is None else _won(lines)
        options += [option for option in won.values() if option not in options]
        tried.told += (
            [f"across: {name}: not used: no kernel of it won against single steps"]
            if lines is not None and not won
            else []
        )
    networks = _Networks(options, plan, example, device, tried)
    chosen, decisions = search(options, networks, lambda some: _formed(plan, options, some), _deadline(seconds), say)
    plan.use_across(_names(options, chosen), list(dict.fromkeys([*tried.told, *decisions])))
    if not plan.asked and (networks.ready or not options):
        group_table.keep(
            device.name, plan, example, complete=not any(UNTRIED in note or FAILED in note for note in plan.notes)
        )


class _Tried:
    """Runs work on variants of a plan; ``told`` has why one could not be run."""

    def __init__(self, plan: Plan, device: Device) -> None:
        self.plan, self.device, self.told = plan, device, []

    def __call__(self, across: tuple[str, ...], work: Callable[[Plan], Any]) -> Any:
        """``work`` on the plan with these groups, or None with a note why not."""
        try:
            return work(self.plan.variant(across))
        except (torch.OutOfMemoryError, RuntimeError, ValueError) as trouble:
            self.told.append(
                f"across: {', '.join(across) or 'the plan without groups'} {FAILED}: {first_line(trouble)}"
            )
            return None
        finally:
            self.device.settle()


class _Networks:
    """The search's clock: whole networks, built and captured; those of the last call are kept, for the next goes on from one of them."""

    def __init__(self, options: list[Option], plan: Plan, example: Tensor, device: Device, tried: _Tried) -> None:
        self.options, self.plan, self.example, self.device, self.tried = options, plan, example, device, tried
        self.ready: dict[Choice, Callable[[], Any]] = {}

    def __call__(self, choices: list[Choice]) -> dict[Choice, Timing]:
        self.ready = {choice: run for choice, run in self.ready.items() if choice in choices}
        for choice in choices:
            if choice not in self.ready:
                run = self.tried(_names(self.options, choice), self._built)
                self.ready |= {} if run is None else {choice: run}
        return self.device.clock(self.ready, NETWORK_CONFIDENCE) if self.ready else {}

    def _built(self, variant: Plan) -> Callable[[], Any]:
        """The whole call, after a first one that chooses kernels and captures."""
        variant(self.example)
        return lambda: variant(self.example)


def _deadline(seconds: float) -> Callable[[], bool]:
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


def _names(options: list[Option], choice: Choice) -> tuple[str, ...]:
    return tuple(name for option in options if option in choice for name in option)


def _kinds(plan: Plan) -> list[str]:
    """What the user named, or every kind, as far as the network has its form."""
    return [name for name in plan.asked or ACROSS if _labels(plan, (name,))]


def _labels(plan: Plan, across: Iterable[str]) -> set[str]:
    return {label(step) for step in group(plan._plain, across, plan.normalize).steps if isinstance(step, Group)}


def _formed(plan: Plan, options: list[Option], some: Iterable[Option]) -> Choice:
    """Those of the options of which at least one group comes about."""
    labels = _labels(plan, [name for option in some for name in option])
    return frozenset(option for option in some if labels.intersection(option))


def _won(lines: Iterable[Line]) -> dict[Problem, Option]:
    """The groups that a kernel of their op runs, by what they compute; the others are what the network is without."""
    won: dict[Problem, Option] = {}
    for line in lines:
        if line.op in ACROSS and not line.why.startswith("one by one"):
            won[line.problem] = (*won.get(line.problem, ()), f"{line.op}:{line.module}")
    return won
