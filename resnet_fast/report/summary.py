"""The ledger in a few numbers: the headline of each case, geometric means, every regression, run against run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .ledger import Row, Run, newest, parse_case

# The ratios of a headline and the providers that each is taken over; of several, over the fastest.
BASELINES = {"vs_eager": ("eager",), "vs_compile": ("compile", "compile-best"), "vs_cudnn": ("folded",)}


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
        found.append(Headline(case, machine, best.img_s, **ratios, roofline=best.roofline, error=best.error,
                              eager_error=best.eager_error, date=run.machine.date, commit=run.machine.commit))
    return sorted(found, key=lambda h: (h.gpu, case_order(h.case)))


def case_order(case: str) -> tuple:
    """Sorts cases as a reader expects: batches and sizes as numbers."""
    mode, model, dtype, batch, size = parse_case(case)
    return mode, len(model), model, dtype, size, batch


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
        found += [Regression(machine, case, best.provider, peer, speed)
                  for peer, speed in best.speed_over.items() if peer in peers and speed < 1]
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
    """What both runs measured, worst change first; raises ValueError if they share no case and provider."""
    old = {(row.case, row.provider): row for row in before.rows}
    found = []
    for row in after.rows:
        was = old.get((row.case, row.provider))
        if was is None:
            continue
        relative = "eager" in row.speed_over and "eager" in was.speed_over
        speed = row.speed_over["eager"] / was.speed_over["eager"] if relative else was.seconds / row.seconds
        found.append(Change(row.case, row.provider, row.ours, was.seconds, row.seconds, speed, relative))
    if not found:
        raise ValueError(f"{before.path} and {after.path} have no case and provider in common")
    return sorted(found, key=lambda change: change.speed)


def slower(found: Iterable[Change], tolerance: float) -> list[Change]:
    """Those of ours that lost more than ``tolerance`` (0.05 for 5 %) of their speed."""
    return [change for change in found if change.ours and change.speed < 1 - tolerance]
