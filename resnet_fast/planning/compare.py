"""Two plans of one model beside each other: how far apart each value is, which of the two errs, and what it took each to get there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ..graph.ir import outputs, references
from ..util.text import table

if TYPE_CHECKING:
    from ..runtime.program import Program


@dataclass(frozen=True)
class Row:
    """A value that both plans compute, and how they came to it from other such values.

    ``steps`` and ``ms`` of the one plan, ``other_steps`` and ``other_ms`` of the other; ``distance``: RMS of the difference over the
    other's RMS. With a third, exact plan ``error`` and ``other_error`` are each one's distance from it, and ``broken`` is the sentence
    that says how the error rule is broken, taking the other for eager; else all three are None.
    """

    value: str
    name: str
    steps: int
    other_steps: int
    distance: float
    ms: float
    other_ms: float
    error: float | None = None
    other_error: float | None = None
    broken: str | None = None


class Comparison(list):
    """The rows in the order of the steps; prints as a table with the sums below."""

    def __str__(self) -> str:
        judged, wrong = any(r.error is not None for r in self), any(r.broken for r in self)
        # The verdict stands beside the name, since a narrow terminal cuts a table's right side.
        header = [
            "step",
            *(["rule"] if wrong else []),
            "steps",
            "other's",
            "distance",
            *(["error", "other's"] if judged else []),
            "ms",
            "other's",
            "speed",
        ]

        def line(name: str, rows: list[Row], errors: Iterable[float | None]) -> list[str]:
            ms, other_ms = sum(r.ms for r in rows), sum(r.other_ms for r in rows)
            return [
                name,
                *(["WRONG" if any(r.broken for r in rows) else ""] if wrong else []),
                str(sum(r.steps for r in rows)),
                str(sum(r.other_steps for r in rows)),
                *("" if e is None else f"{e:.1e}" for e in errors),
                f"{ms:.2f}",
                f"{other_ms:.2f}",
                f"{other_ms / ms:.2f}×" if ms else "",
            ]

        rows = [line(r.name, [r], (r.distance, *((r.error, r.other_error) if judged else ()))) for r in self]
        rows.append(line("total", list(self), (None,) * (3 if judged else 1)))
        return table(header, rows, right=range(1, len(header)))


def compare(mine: Program, theirs: Program, exact: Program | None = None) -> Comparison:
    """A row for each tensor that both (and ``exact``) hold by the same name; other steps count towards the first row that needs them.

    Raises ValueError for programs of different networks.
    """
    from ..testing.rule import broken_rule, error

    for other in (theirs, exact):
        if other is not None:
            _check_same_network(mine, other)
    names = {
        name: shown.name for step, shown in zip(mine._lowered.steps, mine.steps, strict=True) for name in outputs(step)
    }
    spent, other_spent = _spender(mine), _spender(theirs)
    rows = Comparison()
    for name, (value, _) in mine.values.items():
        other = theirs.values.get(name, (None,))[0]
        if not isinstance(value, Tensor) or not isinstance(other, Tensor) or not value.is_floating_point():
            continue
        judged = {}
        if exact is not None and name in exact.values:
            oracle = exact.values[name][0].double().cpu()
            judged = {
                "error": error(value, oracle).rms,
                "other_error": error(other, oracle).rms,
                "broken": broken_rule(value, other, oracle),
            }
        (steps, ms), (other_steps, other_ms) = spent(name), other_spent(name)
        rows.append(
            Row(name, names[name], steps, other_steps, error(value, other.double()).rms, ms, other_ms, **judged)
        )
    return rows


def _check_same_network(mine: Program, other: Program) -> None:
    """Weights may differ, modules and shapes may not: a row would set side by side what has nothing to do with each other."""
    held, expected = ({name for step in program.steps for name in step.modules if name} for program in (other, mine))
    if held != expected:
        differs = min(held ^ expected)
        raise ValueError(
            f"plan: compare: got a plan of another network, {'with' if differs in held else 'without'} {differs}, expected one of the "
            "same model, with the same features"
        )
    for name, (value, _) in mine.values.items():
        got, wanted = (getattr(v, "shape", None) for v in (other.values.get(name, (value,))[0], value))
        if got != wanted:
            raise ValueError(
                f"plan: compare: got a plan whose {name} is {list(got or ())}, expected {list(wanted or ())}, as in the other"
            )


def _spender(program: Program) -> Callable[[str], tuple[int, float]]:
    """A function: value → how many steps that no earlier value asked for lead to it, and their ms."""
    steps_left = {step.output: references(step) for step in program._lowered.steps}
    made_by = {name: step.output for step in program._lowered.steps for name in outputs(step)}

    def spend(value: str) -> tuple[int, float]:
        steps, ms, waiting = 0, 0.0, [value]
        while waiting:
            name = made_by.get(waiting.pop())
            if name in steps_left:  # neither an input nor counted already
                waiting += steps_left.pop(name)
                steps, ms = steps + 1, ms + program.values[name][1] * 1e3
        return steps, ms

    return spend
