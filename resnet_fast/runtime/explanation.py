"""Which kernel ran each step, why, and how long it took: the data that ``explain`` prints."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ..dispatch.problem import ACROSS, Problem
from ..util.text import table


@dataclass(frozen=True)
class Line:
    """One layer: its module, the op that ran it (or "plain"), the kernel and the reason; on a GPU with known ceilings the least time that
    the problem could take, and the time that the tables have of the kernel, in µs.
    """

    module: str
    op: str
    kernel: str
    why: str
    problem: Problem | None = field(default=None, repr=False)
    floor_us: float | None = None
    time_us: float | None = None


def timed(line: Line, graph: bool = False) -> Line:
    """The line with what is known of its times; ``graph``: those in a CUDA graph."""
    problem = line.problem
    if problem is None or problem.device != "cuda":
        return line
    from ..dispatch import tables
    from ..roofline.chips import ceilings
    from ..roofline.floor import problem_floor

    record = tables.records(problem).get(line.kernel if "." in line.kernel else f"{line.kernel}.{line.op}", {})
    try:
        floor = problem_floor(problem, ceilings(tables.gpu_name())).seconds * 1e6
    except LookupError:  # a GPU that nobody wrote down, or no rate for float64
        floor = None
    return replace(line, floor_us=floor, time_us=record.get("device_us" if graph else "time_us"))


class Explanation(list):
    """The lines of one forward; prints as a table, with times where any is known."""

    def __str__(self) -> str:
        def number(value: float | None, digits: int = 1) -> str:
            return "" if value is None else f"{value:.{digits}f}"

        header, rows = (
            ("layer", "op", "problem", "kernel"),
            [(x.module, x.op, _shape(x.problem), x.kernel) for x in self],
        )
        if any(x.floor_us or x.time_us for x in self):
            header = (*header, "µs", "floor", "%")
            rows = [
                (
                    *row,
                    number(x.time_us),
                    number(x.floor_us),
                    number(x.floor_us and x.time_us and 100 * x.floor_us / x.time_us, 0),
                )
                for row, x in zip(rows, self, strict=True)
            ]
        return table(
            (*header, "why"), [(*row, x.why) for row, x in zip(rows, self, strict=True)], right=range(4, len(header))
        )


def _shape(p: Problem | None) -> str:
    """Input and filter; of an op over several convolutions the channels on their way."""
    if p is None:
        return ""
    x = "×".join(map(str, p.x))
    if p.op == "pointwise_pair":
        return f"{x} + {p.chain[0][1]} → {p.weight[0]}"
    if p.op in ACROSS:
        channels = [p.weight[0], *(p.chain[i][0] for i in (0, 2) if p.op == "conv_tail")]
        return " → ".join([x, *map(str, channels)])
    return x if p.weight is None else f"{x} → {'×'.join(map(str, p.weight))}"
