"""The comparison of two plans of one model: for each value the distance, which plan errs, and the time of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..graph.ir import outputs, references
from ..util.text import table

if TYPE_CHECKING:
    from ..runtime.program import Program


@dataclass(frozen=True)
class StepRow:
    """A value that both plans compute, and the steps of each since the values before it.

    ``steps`` and ``ms`` are of the one plan, ``other_steps`` and ``other_ms`` of the other. ``distance`` is the RMS of
    the difference over the other's RMS. With a third, exact plan ``error`` and ``other_error`` are the distances from
    it, and ``broken`` says how the error rule is broken, with the other plan as eager; without one all three are None.
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


class Comparison(list[StepRow]):
    """The rows in the order of the steps; prints as a table with the sums below."""

    def __str__(self) -> str:
        has_errors = any(row.error is not None for row in self)
        has_broken = any(row.broken for row in self)
        # The verdict is beside the name, since a narrow terminal cuts a table's right side.
        rule = ["rule"] if has_broken else []
        errors = ["error", "other's"] if has_errors else []
        header = ["step", *rule, "steps", "other's", "distance", *errors, "ms", "other's", "speed"]

        lines = []
        for row in self:
            distances = [row.distance, row.error, row.other_error] if has_errors else [row.distance]
            lines.append(_line(row.name, [row], distances, has_broken))
        lines.append(_line("total", self, [None] * (1 + len(errors)), has_broken))
        return table(header, lines, right=range(1, len(header)))


def _line(
    name: str, rows: Sequence[StepRow], distances: Sequence[float | None], has_broken: bool
) -> list[str]:
    """One line of the table for the sum of some rows."""
    ms, other_ms = sum(row.ms for row in rows), sum(row.other_ms for row in rows)
    verdict = "WRONG" if any(row.broken for row in rows) else ""
    return [
        name,
        *([verdict] if has_broken else []),
        str(sum(row.steps for row in rows)),
        str(sum(row.other_steps for row in rows)),
        *("" if distance is None else f"{distance:.1e}" for distance in distances),
        f"{ms:.2f}",
        f"{other_ms:.2f}",
        f"{other_ms / ms:.2f}×" if ms else "",
    ]


def compare(mine: Program, theirs: Program, exact: Program | None = None) -> Comparison:
    """Return a row for each tensor that all the programs hold by the same name.

    Other steps count towards the first row that needs them. Raises ValueError for programs of different networks.
    """
    _check_same_network(mine, theirs)
    if exact is not None:
        _check_same_network(mine, exact)
    shown_names = _shown_names(mine)
    cost, other_cost = _cost_since_last(mine), _cost_since_last(theirs)
    rows = Comparison()
    for value in mine.values:
        result, other = _result(mine, value), _result(theirs, value)
        if (
            not isinstance(result, Tensor)
            or not isinstance(other, Tensor)
            or not result.is_floating_point()
        ):
            continue
        (steps, ms), (other_steps, other_ms) = cost(value), other_cost(value)
        distances = _distances(result, other, None if exact is None else _result(exact, value))
        rows.append(
            StepRow(
                value=value,
                name=shown_names[value],
                steps=steps,
                other_steps=other_steps,
                ms=ms,
                other_ms=other_ms,
                **distances,
            )
        )
    return rows


def _result(program: Program, value: str) -> Any:
    """What a program computed for a value, or None for a value that it does not have."""
    result, _ = program.values.get(value, (None, 0.0))
    return result


def _shown_names(program: Program) -> dict[str, str]:
    """The module or function of each value."""
    names: dict[str, str] = {}
    steps = zip(program._lowered.steps, program.steps, strict=True)
    for step, shown in steps:
        for value in outputs(step):
            names[value] = shown.name
    return names


def _distances(result: Tensor, other: Tensor, exact: Tensor | None) -> dict[str, Any]:
    """How far two results are apart and, with an exact one, how far each is from it and whether the rule is broken."""
    from ..testing.rule import broken_rule, error

    distance = error(result, other.double()).rms
    if exact is None:
        return {"distance": distance}
    oracle = exact.double().cpu()
    return {
        "distance": distance,
        "error": error(result, oracle).rms,
        "other_error": error(other, oracle).rms,
        "broken": broken_rule(result, other, oracle),
    }


def _check_same_network(mine: Program, other: Program) -> None:
    """Raise ValueError unless modules and shapes are the same; weights may differ.

    The rows of different networks would set unrelated values side by side.
    """
    modules, expected = _module_names(other), _module_names(mine)
    if modules != expected:
        differs = min(modules ^ expected)
        how = "with" if differs in modules else "without"
        raise ValueError(
            f"plan: compare: got a plan of another network, {how} {differs}, expected one of the "
            "same model, with the same features"
        )
    for name in mine.values:
        if name not in other.values:
            continue
        shape, expected_shape = (
            getattr(_result(program, name), "shape", None) for program in (other, mine)
        )
        if shape != expected_shape:
            raise ValueError(
                f"plan: compare: got a plan whose {name} is {list(shape or ())}, "
                f"expected {list(expected_shape or ())}, as in the other"
            )


def _module_names(program: Program) -> set[str]:
    """The modules that the steps stand for."""
    found: set[str] = set()
    for step in program.steps:
        found.update(step.modules)
    return found - {""}


def _cost_since_last(program: Program) -> Callable[[str], tuple[int, float]]:
    """Return a function from a value to (steps, ms) that lead to it and to no value asked for earlier."""
    steps_left = {step.output: references(step) for step in program._lowered.steps}
    computed_by: dict[str, str] = {}
    for step in program._lowered.steps:
        computed_by |= dict.fromkeys(outputs(step), step.output)

    def cost(value: str) -> tuple[int, float]:
        steps, ms = 0, 0.0
        waiting = [value]
        while waiting:
            name = computed_by.get(waiting.pop())
            if name not in steps_left:  # an input, or counted already
                continue
            waiting += steps_left.pop(name)
            _, seconds = program.values[name]
            steps += 1
            ms += seconds * 1e3
        return steps, ms

    return cost
