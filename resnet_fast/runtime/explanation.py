"""Which kernel ran each step, why, and how long it took: the data that ``explain`` prints."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ..dispatch import ACROSS, Problem, tables
from ..util.text import table


@dataclass(frozen=True)
class Line:
    """One layer: its module, the op that ran it (or "plain"), the kernel and the reason.

    On a GPU with known ceilings ``floor_us`` is the least time that the problem could take; ``time_us`` is the kernel's
    time in the tables.
    """

    module: str
    op: str
    kernel: str
    why: str
    problem: Problem | None = field(default=None, repr=False)
    floor_us: float | None = None
    time_us: float | None = None


def timed(line: Line, graph: bool = False) -> Line:
    """The line with the times that are known of it; ``graph``: those inside a CUDA graph."""
    problem = line.problem
    if problem is None or problem.device != "cuda":
        return line
    kernel = line.kernel if "." in line.kernel else f"{line.kernel}.{line.op}"
    record = tables.records(problem).get(kernel, {})
    return replace(
        line, floor_us=_floor_us(problem), time_us=record.get("device_us" if graph else "time_us")
    )


def _floor_us(problem: Problem) -> float | None:
    from ..roofline.chips import ceilings
    from ..roofline.floor import problem_floor

    try:
        return problem_floor(problem, ceilings(tables.gpu_name())).seconds * 1e6
    except LookupError:  # an unknown GPU, or no rate for float64
        return None


class Explanation(list):
    """The lines of one forward. Prints as a table, with times if any is known."""

    def __str__(self) -> str:
        header = ["layer", "op", "problem", "kernel"]
        rows = [[line.module, line.op, _shape(line.problem), line.kernel] for line in self]
        if any(line.floor_us or line.time_us for line in self):
            header += ["µs", "floor", "%"]
            for row, line in zip(rows, self, strict=True):
                row += _times(line)
        right = range(4, len(header))
        header.append("why")
        for row, line in zip(rows, self, strict=True):
            row.append(line.why)
        return table(header, rows, right=right)


def _times(line: Line) -> list[str]:
    """Time, floor, and the floor in percent of the time; "" for what is not known."""
    time_us, floor_us = line.time_us, line.floor_us
    percent = floor_us and time_us and 100 * floor_us / time_us
    return [
        _number(time_us),
        _number(floor_us),
        _number(percent, digits=0),
    ]


def _number(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _shape(p: Problem | None) -> str:
    """Input and filter; for an op over several convolutions its input and the channels after each."""
    if p is None:
        return ""
    x = "×".join(map(str, p.x))
    if p.op == "pointwise_pair":
        return f"{x} + {p.chain[0][1]} → {p.weight[0]}"
    if p.op in ACROSS:
        channels = [p.weight[0]]
        if p.op == "conv_tail":
            channels += [p.chain[0][0], p.chain[2][0]]
        return " → ".join([x, *map(str, channels)])
    return x if p.weight is None else f"{x} → {'×'.join(map(str, p.weight))}"
