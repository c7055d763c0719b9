"""Two plans of one model beside each other: what each value's distance is, and what it took each plan to get there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from .console import table

if TYPE_CHECKING:
    from .program import Program


@dataclass(frozen=True)
class Row:
    """A value that both plans compute: its distance from the other's (RMS over the other's RMS) and both times since the last, in ms."""

    value: str
    target: str
    distance: float
    ms: float
    other_ms: float


class Comparison(list):
    """The rows in the order of the steps; prints as a table with the sums below."""

    def __str__(self) -> str:
        rows = [(r.value, r.target, f"{r.distance:.1e}", f"{r.ms:.2f}", f"{r.other_ms:.2f}") for r in self]
        rows.append(("total", "", "", f"{sum(r.ms for r in self):.2f}", f"{sum(r.other_ms for r in self):.2f}"))
        return table(("value", "step", "distance", "ms", "other's ms"), rows, right=(2, 3, 4))


def compare(mine: Program, theirs: Program) -> Comparison:
    """A row for each tensor that both hold by the same name; a step that only one has counts towards the next row."""
    from .testing import error
    targets = {step.output: step.target for step in mine.steps}
    order = {name: i for i, name in enumerate(theirs.values)}
    times = [seconds for _, seconds in theirs.values.values()]
    rows, spent, done = Comparison(), 0.0, 0
    for name, (value, seconds) in mine.values.items():
        spent += seconds
        if name not in order or not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        until = max(done, order[name] + 1)
        distance = error(value, theirs.values[name][0].double()).rms
        rows.append(Row(name, targets[name], distance, spent * 1e3, sum(times[done:until]) * 1e3))
        spent, done = 0.0, until
    return rows
