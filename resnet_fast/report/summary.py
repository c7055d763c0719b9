"""Summaries of the ledger: headlines, geometric means, regressions, and one run compared with another."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..bench.ledger import Machine, Row, Run, newest, parse_case
from ..util.text import counted

# Each ratio of a headline, with its baselines: the ratio is over the fastest of them.
BASELINES = {
    "vs_eager": ("eager",),
    "vs_compile": ("compile", "compile-best"),
    "vs_cudnn": ("folded",),
}

# The provider that tables and plots show multiples of: what people run on that device.
BASE = {"cpu": "eager-nchw", "cuda": "eager"}

Key = tuple[str, str, str, str]  # machine, mode, model, dtype
Group = dict[str, tuple[Run, list[Row]]]  # case → the run that measured it and its rows


@dataclass(frozen=True)
class Headline:
    """The fastest of ours in the newest run of a case on a machine; a ratio is None if its baselines were not run."""

    case: str
    gpu: str
    img_s: float
    vs_eager: float | None
    vs_compile: float | None
    vs_cudnn: float | None
    roofline: float | None
    error: float | None
    eager_error: float | None
    date: str
    commit: str


def best_ours(rows: Iterable[Row]) -> Row | None:
    """Return the fastest of our rows of one case, or None."""
    ours = [row for row in rows if row.ours]
    return min(ours, key=lambda row: row.seconds, default=None)


def speed_over(row: Row, providers: Sequence[str]) -> float | None:
    """Return how many times faster ``row`` was than the fastest of the providers, in common rounds; None if unknown."""
    ratios = [row.speed_over[id] for id in providers if id in row.speed_over]
    return min(ratios, default=None)


def headlines(runs: Iterable[Run]) -> list[Headline]:
    """Return one for each machine and model case, ordered by machine, mode, model, dtype, size and batch."""
    found = []
    for (machine, case), (run, rows) in newest(runs).items():
        best = best_ours(rows)
        if best is None or best.level != "model":
            continue
        ratios = {name: speed_over(best, ids) for name, ids in BASELINES.items()}
        headline = Headline(
            case,
            machine,
            best.img_s,
            **ratios,
            roofline=best.roofline,
            error=best.error,
            eager_error=best.eager_error,
            date=run.machine.date,
            commit=run.machine.commit,
        )
        found.append(headline)
    return sorted(found, key=lambda headline: (headline.gpu, case_order(headline.case)))


def groups(runs: Iterable[Run]) -> dict[Key, Group]:
    """Return the newest rows of each network's cases, cases in order, by machine, mode, model and dtype."""
    found: dict[Key, Group] = {}
    for (machine, case), (run, rows) in newest(runs).items():
        if rows[0].level == "model":
            mode, model, dtype, *_ = parse_case(case)
            key = machine, mode, model, dtype
            group = found.setdefault(key, {})
            group[case] = run, rows
    for key, group in found.items():
        cases = sorted(group, key=case_order)
        found[key] = {case: group[case] for case in cases}
    return found


def case_order(case: str) -> tuple:
    """Return a sort key of a case; batches and sizes sort as numbers."""
    mode, model, dtype, batch, size = parse_case(case)
    return mode, len(model), model, dtype, size, batch


def in_main_size(cases: Iterable[str]) -> list[str]:
    """Return, in order, the cases of the image size that has most of them; 224 wins a tie."""
    by_size: dict[int, list[str]] = {}
    for case in sorted(cases, key=case_order):
        *_, size = parse_case(case)
        same_size = by_size.setdefault(size, [])
        same_size.append(case)
    most = max(len(same_size) for same_size in by_size.values())
    candidates = [size for size in sorted(by_size) if len(by_size[size]) == most]
    main = 224 if 224 in candidates else candidates[0]
    return by_size[main]


def geometric_mean(values: Iterable[float | None]) -> float | None:
    """Return the geometric mean of the values that are not None, or None if there are none."""
    logarithms = [math.log(value) for value in values if value is not None]
    if not logarithms:
        return None
    mean = sum(logarithms) / len(logarithms)
    return math.exp(mean)


@dataclass(frozen=True)
class Regression:
    """A case in which the fastest of ours is slower than a peer; ``speed`` is ours over that peer, below 1."""

    machine: str
    case: str
    ours: str
    peer: str
    speed: float


def regressions(runs: Iterable[Run], level: str = "model") -> list[Regression]:
    """Return every peer of every case that was faster than the fastest of ours, worst first."""
    found = []
    for (machine, case), (_, rows) in newest(runs).items():
        best = best_ours(row for row in rows if row.level == level)
        if best is None:
            continue
        peers = {row.provider for row in rows if not row.ours}
        for peer, speed in best.speed_over.items():
            if peer in peers and speed < 1:
                regression = Regression(machine, case, best.provider, peer, speed)
                found.append(regression)
    return sorted(found, key=lambda regression: regression.speed)


# ---------------------------------------------------------------- one run compared with another


@dataclass(frozen=True)
class Change:
    """One provider of one case in runs A and B; ``speed`` above 1 means that B is faster.

    ``relative``: the speed compares the runs' ratios to eager, which cancels the machine; else it compares times.
    """

    case: str
    provider: str
    ours: bool
    before: float
    after: float
    speed: float
    relative: bool


def changes(before: Run, after: Run) -> list[Change]:
    """Return a change for each case and provider of both runs, worst first.

    Raises ValueError if the machines are of different kinds, or the runs share no case and provider.
    """
    difference = unlike(before.machine, after.machine)
    if difference is not None:
        raise ValueError(
            f"not compared: {before.path} was measured on {difference}: "
            "even ratios to eager differ between such machines"
        )
    base = BASE[after.machine.device]
    old_rows = {(row.case, row.provider): row for row in before.rows}
    found = []
    for row in after.rows:
        old = old_rows.get((row.case, row.provider))
        if old is not None and row.provider != base:  # the ratio of ``base`` is always 1
            found.append(_change(old, row, base))
    if not found:
        raise ValueError(f"{before.path} and {after.path} have no case and provider in common")
    return sorted(found, key=lambda change: change.speed)


def _change(old: Row, new: Row, base: str) -> Change:
    """Compare two rows by their ratios to a common baseline if there is one, else by time."""
    common = [id for id in (base, "eager") if id in new.speed_over and id in old.speed_over]
    if common:
        speed = new.speed_over[common[0]] / old.speed_over[common[0]]
    else:
        speed = old.seconds / new.seconds
    return Change(
        new.case,
        new.provider,
        new.ours,
        before=old.seconds,
        after=new.seconds,
        speed=speed,
        relative=bool(common),
    )


def unlike(before: Machine, after: Machine) -> str | None:
    """Return how the machines differ in kind, as "AVX2, not AVX512"; None if ratios carry over from one to the other.

    The kind of a CPU is its instruction set and the threads used, that of a GPU its model.
    """
    if before.device != after.device:
        return f"{before.device}, not {after.device}"
    if before.device == "cuda":
        if before.name == after.name:
            return None
        return f"{before.name}, not {after.name}"
    old = before.facts
    new = after.facts
    if old.get("cpu isa") != new.get("cpu isa"):
        return f"{old.get('cpu isa')}, not {new.get('cpu isa')}"
    if old.get("threads") != new.get("threads"):
        old_threads = counted(old.get("threads"), "thread")
        new_threads = counted(new.get("threads"), "thread")
        return f"{old_threads}, not {new_threads}"
    return None


def slower(changes: Iterable[Change], tolerance: float) -> list[Change]:
    """Return those of ours that lost more than ``tolerance`` (0.05 for 5 %) of their speed over eager.

    Raises ValueError if none of ours has such a ratio in both runs: times also depend on the machine's other load.
    """
    judged = [change for change in changes if change.ours and change.relative]
    if not judged:
        raise ValueError("nothing to judge: no row of ours stands beside eager in both runs")
    return [change for change in judged if change.speed < 1 - tolerance]
