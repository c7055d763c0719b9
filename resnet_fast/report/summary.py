"""The ledger in a few numbers: the headline of each case, geometric means, every regression, run against run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..bench.ledger import Machine, Row, Run, newest, parse_case
from ..util.text import counted

# The ratios of a headline and the providers that each is taken over; of several, over the fastest.
BASELINES = {"vs_eager": ("eager",), "vs_compile": ("compile", "compile-best"), "vs_cudnn": ("folded",)}

BASE = {"cpu": "eager-nchw", "cuda": "eager"}  # what tables and plots show multiples of: what people run on that device


@dataclass(frozen=True)
class Headline:
    """The fastest of ours in the newest run of a case on a machine; ratios are None where a baseline was not run."""

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
    """The fastest of our rows of one case, or None."""
    return min((row for row in rows if row.ours), key=lambda row: row.seconds, default=None)


def speed_over(row: Row, providers: Sequence[str]) -> float | None:
    """How many times faster ``row`` was than the fastest of the named providers, in common rounds."""
    return min((row.speed_over[id] for id in providers if id in row.speed_over), default=None)


def headlines(runs: Iterable[Run]) -> list[Headline]:
    """One for each machine and model case, newest measurement, ordered by machine, mode, model, dtype, size, batch."""
    found = []
    for (machine, case), (run, rows) in newest(runs).items():
        best = best_ours(rows)
        if best is None or best.level != "model":
            continue
        ratios = {name: speed_over(best, ids) for name, ids in BASELINES.items()}
        found.append(
            Headline(
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
        )
    return sorted(found, key=lambda h: (h.gpu, case_order(h.case)))


def case_order(case: str) -> tuple:
    """Sorts cases as a reader expects: batches and sizes as numbers."""
    mode, model, dtype, batch, size = parse_case(case)
    return mode, len(model), model, dtype, size, batch


def in_main_size(cases: Iterable[str]) -> list[str]:
    """Those of the image size with the most cases, 224² if there are several such, in order."""
    order = sorted(cases, key=case_order)
    sizes = [parse_case(case)[4] for case in order]
    main = max(sorted(set(sizes)), key=lambda size: (sizes.count(size), size == 224))
    return [case for case, size in zip(order, sizes, strict=True) if size == main]


def geometric_mean(values: Iterable[float | None]) -> float | None:
    """exp(mean(log)) of those that are there, or None."""
    present = [value for value in values if value is not None]
    return math.exp(sum(map(math.log, present)) / len(present)) if present else None


@dataclass(frozen=True)
class Regression:
    """A case in which the fastest of ours is slower than a peer: ``speed`` < 1 is ours over that peer."""

    machine: str
    case: str
    ours: str
    peer: str
    speed: float


def regressions(runs: Iterable[Run], level: str = "model") -> list[Regression]:
    """Every peer of every case that was faster than the fastest of ours, worst first."""
    found = []
    for (machine, case), (_, rows) in newest(runs).items():
        best = best_ours(row for row in rows if row.level == level)
        if best is None:
            continue
        peers = {row.provider for row in rows if not row.ours}
        found += [
            Regression(machine, case, best.provider, peer, speed)
            for peer, speed in best.speed_over.items()
            if peer in peers and speed < 1
        ]
    return sorted(found, key=lambda r: r.speed)


# ---------------------------------------------------------------- one run against another


@dataclass(frozen=True)
class Change:
    """One provider of one case in run A and run B; ``speed`` > 1: B is faster, as far as can be told.

    ``relative`` says how: the ratio of the two runs' own speed over eager, which cancels the machine; else of times.
    """

    case: str
    provider: str
    ours: bool
    before: float
    after: float
    speed: float
    relative: bool


def changes(before: Run, after: Run) -> list[Change]:
    """What both runs measured, worst change first.

    Raises ValueError if the machines are of different kinds, or the runs share no case and provider.
    """
    difference = unlike(before.machine, after.machine)
    if difference is not None:
        raise ValueError(
            f"not compared: {before.path} was measured on {difference}: even ratios to eager differ between such machines"
        )
    base = BASE[after.machine.device]
    old = {(row.case, row.provider): row for row in before.rows}
    found = []
    for row in after.rows:
        was = old.get((row.case, row.provider))
        if was is None or row.provider == base:  # its ratio is always 1
            continue
        common = next((id for id in (base, "eager") if id in row.speed_over and id in was.speed_over), None)
        relative = common is not None
        speed = row.speed_over[common] / was.speed_over[common] if relative else was.seconds / row.seconds
        found.append(Change(row.case, row.provider, row.ours, was.seconds, row.seconds, speed, relative))
    if not found:
        raise ValueError(f"{before.path} and {after.path} have no case and provider in common")
    return sorted(found, key=lambda change: change.speed)


def unlike(before: Machine, after: Machine) -> str | None:
    """What makes the machines different in kind, as "AVX2, not AVX512"; None if ratios carry over from one to the other.

    A CPU's kind is its instruction set and the threads used, a GPU's its model.
    """
    if before.device != after.device:
        return f"{before.device}, not {after.device}"
    if before.device == "cuda":
        return None if before.name == after.name else f"{before.name}, not {after.name}"
    for fact, told in (("cpu isa", str), ("threads", lambda n: counted(n, "thread"))):
        old, new = before.facts.get(fact), after.facts.get(fact)
        if old != new:
            return f"{told(old)}, not {told(new)}"
    return None


def slower(found: Iterable[Change], tolerance: float) -> list[Change]:
    """Those of ours that lost more than ``tolerance`` (0.05 for 5 %) of their speed over eager.

    Raises ValueError if no row of ours can be judged by such a ratio: times of two runs measure the hour as well.
    """
    judged = [change for change in found if change.ours and change.relative]
    if not judged:
        raise ValueError("nothing to judge: no row of ours stands beside eager in both runs")
    return [change for change in judged if change.speed < 1 - tolerance]
