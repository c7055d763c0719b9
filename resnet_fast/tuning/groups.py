"""The search for the groups of steps that make one network faster as a whole, as ``Plan.tune`` runs it.

Kernels are measured one by one, groups end to end: by the time of the whole network, not by a sum of kernels. The
choice is stored in the GPU's table, so that a later process needs no measurement.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

from ..dispatch.problem import ACROSS, Problem
from ..graph.across import grouped, label
from ..graph.ir import Group
from . import group_table, kernels
from .group_search import UNTRIED, Choice, Option, search
from .group_table import GroupChoice, NetworkCase
from .kernels import Device, first_line

if TYPE_CHECKING:
    from ..runtime.explanation import Explanation, Line
    from ..util.timing import Timing

FAILED = "could not be run"
# Of a whole network's median, so narrow because one group is a small part of it.
NETWORK_CONFIDENCE = 0.0005

Result = TypeVar("Result")


class RunnablePlan(Protocol):
    """A plan as far as tuning uses it."""

    def __call__(self, x: Tensor) -> Any: ...

    def explain(self, x: Tensor) -> Explanation: ...


@dataclass
class GroupTuner:
    """Chooses the groups that make one network faster, by the kernels in the table.

    ``variant`` returns the plan of the network with other groups. ``asked`` names the groups that may be used, () for
    all: a choice among named groups is not stored, since it says nothing of the others. ``seconds`` bounds the search.
    A variant that fails or runs out of memory is left out and named in the notes.
    """

    case: NetworkCase
    variant: Callable[[tuple[str, ...]], RunnablePlan]
    asked: tuple[str, ...]
    example: Tensor
    device: Device
    seconds: float
    say: Callable[[str], None]
    _notes: list[str] = field(init=False, default_factory=list)
    _options: list[Option] = field(init=False, default_factory=list)
    # Variants that the last timing used: the next timing has one of them again.
    _built: dict[Choice, RunnablePlan] = field(init=False, default_factory=dict)

    def tune(self) -> GroupChoice:
        """Measure the kernels of the network's problems, with and without groups, then :meth:`choose`."""
        stored = self.settled()
        if stored is not None:
            return stored
        kernels.tune(self._problems(), device=self.device, say=self.say)
        return self.choose()

    def settled(self) -> GroupChoice | None:
        """Return the stored choice if nothing is left to be tried."""
        found = None if self.asked else group_table.lookup(self.case, self.device.name)
        if found is None or not found.settled:
            return None
        self.say(f"{kernels.BEFORE}: {', '.join(found.across) or 'no groups'}")
        return found

    def choose(self) -> GroupChoice:
        """Search among the groups with the kernels that the table has now, and store the choice."""
        self._notes = []
        self._built = {}
        self._options = self._winning_options()
        end = time.monotonic() + self.seconds
        chosen, decisions = search(
            self._options,
            clock=self._time_networks,
            formed=self._formed,
            late=lambda: time.monotonic() > end,
            say=self.say,
        )
        notes = tuple(dict.fromkeys([*self._notes, *decisions]))
        settled = not any(UNTRIED in note or FAILED in note for note in notes)
        choice = GroupChoice(self._names(chosen), notes, settled)
        was_timed = bool(self._built) or not self._options
        if was_timed and not self.asked:
            plan = self._built.get(chosen) or self.variant(choice.across)
            ran = _kernel_ids(plan.explain(self.example))
            group_table.store(self.case, self.device.name, choice, ran)
        return choice

    # ------------------------------------------------------------ what can be grouped

    def _problems(self) -> list[Problem]:
        """The problems that the network poses, as single steps and with each kind of group."""
        lines = list(self.variant(()).explain(self.example))
        for name in self._candidates():
            lines += self._explain(name) or ()
        problems: dict[Problem, None] = {}
        for line in lines:
            if line.problem is not None:
                problems[line.problem] = None
        return list(problems)

    def _candidates(self) -> list[str]:
        """The groups that were asked for, or every kind, as far as the network has their form."""
        names = self.asked or ACROSS
        return [name for name in names if self._labels([name])]

    def _labels(self, across: Iterable[str]) -> set[str]:
        """The labels of the groups that form for these names."""
        lowered = grouped(self.case.lowered, across, self.case.normalize)
        labels = set()
        for step in lowered.steps:
            if isinstance(step, Group):
                labels.add(label(step))
        return labels

    def _winning_options(self) -> list[Option]:
        """The groups that a kernel of their op runs; those of one shape are one option."""
        options: list[Option] = []
        for name in self._candidates():
            lines = self._explain(name)
            if lines is None:
                continue
            won = _won(lines)
            if not won:
                self._notes.append(
                    f"across: {name}: not used: no kernel of it won against single steps"
                )
            for option in won.values():
                if option not in options:
                    options.append(option)
        return options

    def _formed(self, options: Iterable[Option]) -> Choice:
        """Those of the options of which at least one group forms."""
        options = list(options)
        labels = self._labels(chain.from_iterable(options))
        return frozenset(option for option in options if labels.intersection(option))

    def _names(self, choice: Choice) -> tuple[str, ...]:
        """The names of the groups of a choice, in the order of the options."""
        chosen = [option for option in self._options if option in choice]
        return tuple(chain.from_iterable(chosen))

    # ------------------------------------------------------------ running variants

    def _time_networks(self, choices: list[Choice]) -> dict[Choice, Timing]:
        """The search's clock: whole networks, built and captured before they are timed."""
        for choice in self._built.keys() - set(choices):
            del self._built[choice]
        for choice in choices:
            if choice in self._built:
                continue
            plan = self._try(self._names(choice), self._ready)
            if plan is not None:
                self._built[choice] = plan
        if not self._built:
            return {}
        runs: dict[Choice, Callable[[], object]]
        runs = {choice: partial(plan, self.example) for choice, plan in self._built.items()}
        return self.device.clock(runs, NETWORK_CONFIDENCE)

    def _ready(self, plan: RunnablePlan) -> RunnablePlan:
        """The plan after its first call, which chooses kernels and captures."""
        plan(self.example)
        return plan

    def _explain(self, name: str) -> Explanation | None:
        """Which kernels run the network with these groups, or None if it cannot be run."""

        def explained(plan: RunnablePlan) -> Explanation:
            return plan.explain(self.example)

        return self._try((name,), explained)

    def _try(
        self, across: tuple[str, ...], work: Callable[[RunnablePlan], Result]
    ) -> Result | None:
        """Return ``work`` of the variant with these groups, or None with a note why it failed."""
        try:
            return work(self.variant(across))
        except (torch.OutOfMemoryError, RuntimeError, ValueError) as trouble:
            what = ", ".join(across) or "the plan without groups"
            self._notes.append(f"across: {what} {FAILED}: {first_line(trouble)}")
            return None
        finally:
            self.device.settle()


def _won(lines: Iterable[Line]) -> dict[Problem, Option]:
    """The groups that one kernel of their op runs, by problem; the others run as single steps."""
    won: dict[Problem, Option] = {}
    for line in lines:
        if line.op not in ACROSS or line.why.startswith("one by one"):
            continue
        others = won.get(line.problem, ())
        won[line.problem] = (*others, f"{line.op}:{line.module}")
    return won


def _kernel_ids(lines: Iterable[Line]) -> set[str]:
    """The ids of the kernels that ran; a group that runs as single steps names several."""
    ids: set[str] = set()
    for line in lines:
        names = line.kernel.split(" + ")
        ids.update(name for name in names if "." in name)
    return ids
