"""Measured choice: verify each candidate for a problem, time those that are right, write what won into the table.

An explicit act, never a side effect of a forward. The table is written after each problem, whole and under a lock, so
an interruption loses at most the problem in hand, two processes may tune at once, and what is done is not done again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path

import torch
from torch import Tensor

from ..dispatch import registry, tables
from ..dispatch.problem import Problem
from ..dispatch.registry import Kernel, find
from ..runtime.cuda_graph import captured
from ..testing.full_size import full_args, verify
from ..testing.rule import Verdict
from ..util.timing import Timing, interleaved
from .call import once

MARGIN = 1.01  # a kernel must beat aten by more than a repetition of the same measurement moves
CALLS = 8  # at least so many calls between two clock readings
SETS = 128  # at most so many sets of arguments in rotation
BEFORE = "measured before"
LOST = "lost the device"


class DeviceLost(RuntimeError):
    """The GPU's context is broken: nothing more can run in this process."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


# ---------------------------------------------------------------- the device


@dataclass
class Device:
    """What tuning needs of a machine: the current CUDA device, or a test's stand-in that overrides the clock."""

    name: str
    kind: str = "cuda"
    cache_bytes: int = 0
    seconds: float = 1.0  # of timing for each problem and each way to call

    @classmethod
    def current(cls, seconds: float = 1.0) -> Device:
        """The CUDA device in use; raises ValueError without one."""
        if not torch.cuda.is_available():
            raise ValueError(f"tuning needs a CUDA device, and torch {torch.__version__} sees none here")
        return cls(tables.gpu_name(), cache_bytes=torch.cuda.get_device_properties().L2_cache_size, seconds=seconds)

    def verify(self, kernel: Kernel, problem: Problem) -> Verdict:
        return verify(kernel, problem)

    def clock(self, variants: dict[str, Callable[[], object]], confidence: float = 0.01) -> dict[str, Timing]:
        return interleaved(
            variants, device=self.kind, min_rounds=10, max_rounds=100, max_seconds=self.seconds, confidence=confidence
        )

    def capture(self, runs: dict[str, Callable]) -> tuple[dict[str, Callable], dict[str, str]]:
        """(each run as a CUDA graph's replay, why a run cannot be captured); the graphs share their memory."""
        pool, graphs, reasons = torch.cuda.graph_pool_handle(), {}, {}
        for id, run in runs.items():
            try:
                graphs[id] = captured(run, pool=pool)[0].replay
            except Exception as error:  # as outside of a graph, a kernel may fail in its own way
                reasons[id], pool = first_line(error), torch.cuda.graph_pool_handle()
            self.settle()
        return graphs, reasons

    def settle(self) -> None:
        """Wait for the device and give memory back; raises DeviceLost if an earlier kernel broke the context."""
        if self.kind == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                raise DeviceLost(f"the GPU stopped answering in this process: {first_line(error)}") from error
            torch.cuda.empty_cache()


# ---------------------------------------------------------------- outcomes


@dataclass
class Outcome:
    """What tuning found for a problem: its kernel for ordinary calls and inside graphs, each candidate's record."""

    problem: Problem
    calls: str = "aten"
    graph: str = "aten"
    records: dict[str, dict] = field(default_factory=dict)
    note: str = ""

    @property
    def bad(self) -> dict[str, str]:
        """Kernels that took the problem and failed it, and how."""
        return {
            id: f"{record['status']}: {record['reason']}"
            for id, record in self.records.items()
            if record["status"] != "right"
        }

    def __str__(self) -> str:
        chosen = self.calls if self.calls == self.graph else f"{self.calls}, in graphs {self.graph}"
        lines = [f"{self.problem.key}: {chosen}" + (f" ({self.note})" if self.note else "")]
        return "\n".join([*lines, *(f"    {id:28} {tables.in_words(record)}" for id, record in self.records.items())])


# ---------------------------------------------------------------- tuning


def tune(
    problems: Iterable[Problem],
    *,
    kernels: Iterable[str] | None = None,
    device: Device | None = None,
    folder: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Outcome]:
    """Fill the table of this GPU model for these problems.

    ``kernels`` restricts the candidates (ids; ``aten`` and what the table names already always take part); ``folder``
    is where the table is written, by default the user's. A kernel that is wrong, raises or runs out of memory is named
    in outcome and table and never chosen. Raises ValueError without a GPU, LookupError for an unknown id, and if a
    kernel broke the GPU's context DeviceLost, with everything so far written: the next run passes that kernel over.
    """
    device = device or Device.current()
    wanted = None if kernels is None else {find(id).id for id in kernels}
    problems = list(dict.fromkeys(problems))
    outcomes, start, measured = [], time.monotonic(), 0
    benchmark = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True  # cuDNN at its best is what a kernel has to beat
    try:
        for i, problem in enumerate(problems, 1):
            outcomes.append(_Job(problem, device, folder).run(wanted))
            measured += outcomes[-1].note != BEFORE
            say(
                f"[{i}/{len(problems)}] {_progress(time.monotonic() - start, measured, len(problems) - i)}{outcomes[-1]}"
            )
    finally:
        torch.backends.cudnn.benchmark = benchmark
        registry.forget()  # choices made before the table changed
    return outcomes


def _progress(seconds: float, measured: int, left: int) -> str:
    """Time so far and to come, if any problem took time: at most, for some of those left may have been measured before."""
    if not measured or not left:
        return f"after {seconds:.0f} s: " if measured else ""
    return f"after {seconds:.0f} s, at most some {seconds / measured * left / 60:.1f} min to go: "


class _Job:
    """One problem: its candidates, what the table knows of them, and what is found now."""

    def __init__(self, problem: Problem, device: Device, folder: Path | None) -> None:
        self.problem, self.device, self.folder = problem, device, folder
        path = (folder or tables.user_folder()) / tables.file_name(device.name)
        sections = tables.read(path, device.name)
        self.known: dict[str, dict] = sections["measured"].get(problem.key, {})
        self.chosen: dict[str, dict] = {
            name: sections[name][problem.key] for name in ("entries", "graph") if problem.key in sections[name]
        }
        self.records: dict[str, dict] = {}

    def run(self, wanted: set[str] | None) -> Outcome:
        candidates = self.candidates(wanted)
        if all(self.fresh(k.id, k) for k in candidates):
            return self.outcome(BEFORE)
        if all(self.fresh(k.id, k, versions=False) and self.known[k.id]["status"] == "right" for k in candidates):
            if all(self.verified(k) for k in candidates if k.id in {e["kernel"] for e in self.chosen.values()}):
                self.write(
                    {id: {**record, "versions": tables.versions()} for id, record in self.known.items()},
                    {name: {**entry, "versions": tables.versions()} for name, entry in self.chosen.items()},
                )
                return self.outcome("verified again for these versions; its timings are older")
        passed_over = {k.id for k in candidates if self.fresh(k.id, k) and self.known[k.id]["status"] == LOST}
        try:
            right = [k for k in candidates if k.id not in passed_over and self.verified(k)]
            timings = self.timed(right)
        except DeviceLost as lost:
            gone = {id: record for id, record in self.records.items() if record["status"] == LOST}
            self.write(self.known | gone, self.chosen)
            raise DeviceLost(
                f"{lost}; the kernel was {', '.join(gone)} on {self.problem.key}. The table is intact; "
                "the next run passes that kernel over until its source changes"
            ) from lost
        entries = {
            name: entry
            for name in ("entries", "graph")
            if (entry := best(self.records, timings[name], find("aten", self.problem.op).id)) is not None
        }
        self.write(self.known | self.records, entries)
        return self.outcome()

    def candidates(self, wanted: set[str] | None) -> list[Kernel]:
        """``aten`` first, then the op's kernels that can run here and take the problem."""
        aten = find("aten", self.problem.op)
        if wanted is not None:
            wanted = wanted | {entry["kernel"] for entry in self.chosen.values()}
        return [
            aten,
            *(
                k
                for k in registry.kernels(self.problem.op)
                if k is not aten and (wanted is None or k.id in wanted) and k.reason(self.problem) is None
            ),
        ]

    def fresh(self, id: str, kernel: Kernel, versions: bool = True) -> bool:
        """Whether the table's record of a kernel is of this source (and these versions)."""
        record = self.known.get(id)
        return (
            record is not None
            and record["source"] == tables.source_hash(kernel.sources)
            and (not versions or record["versions"] == tables.versions())
        )

    def outcome(self, note: str = "") -> Outcome:
        calls, graph = (self.chosen.get(name, {}).get("kernel", "aten") for name in ("entries", "graph"))
        return Outcome(self.problem, calls, graph, self.known, note)

    def write(self, records: dict[str, dict], chosen: dict[str, dict]) -> None:
        """Put this problem's records and entries into the table and keep them here."""
        key = self.problem.key

        def edit(sections: dict[str, dict]) -> None:
            sections["measured"].setdefault(key, {}).update(records)
            for name in ("entries", "graph"):
                sections[name].pop(key, None)
                if name in chosen:
                    sections[name][key] = chosen[name]

        tables.update(self.device.name, edit, self.folder)
        self.known, self.chosen = records, chosen

    def note(self, kernel: Kernel, status: str, **facts) -> None:
        self.records[kernel.id] = {
            "status": status,
            "source": tables.source_hash(kernel.sources),
            "versions": tables.versions(),
            **facts,
        }

    def verified(self, kernel: Kernel) -> bool:
        """Whether the kernel is right on the problem; its record says so, or why not."""
        verdict = self.attempt(kernel, lambda: self.device.verify(kernel, self.problem))
        if verdict is None:
            return False
        self.note(
            kernel,
            "right" if verdict.ok else "wrong",
            reason=verdict.reason,
            error=verdict.error.rms,
            eager_error=verdict.eager.rms,
        )
        return verdict.ok

    def attempt(self, kernel: Kernel, work: Callable):
        """work(), or None with a record that says what the kernel did instead."""
        done = trouble = None
        try:
            done = work()
        except torch.OutOfMemoryError as error:
            trouble = "out of memory", first_line(error)
        except Exception as error:  # a candidate may fail in any way that its author or its compiler found
            trouble = "failed", f"{type(error).__name__}: {first_line(error)}"
        try:
            self.device.settle()
        except DeviceLost as lost:
            self.note(kernel, LOST, reason=first_line(lost))
            raise
        if trouble is not None:
            self.note(kernel, trouble[0], reason=trouble[1])
        return done

    def timed(self, kernels: list[Kernel]) -> dict[str, dict[str, Timing]]:
        """Seconds a call of each kernel: with its host time ("entries") and inside a CUDA graph ("graph")."""
        try:
            sets = argument_sets(self.problem, self.device.cache_bytes)
        except torch.OutOfMemoryError as error:
            for kernel in kernels:
                self.note(kernel, "out of memory", reason=f"arguments to time it on: {first_line(error)}")
            self.device.settle()
            return {"entries": {}, "graph": {}}
        times = ceil(CALLS / len(sets))

        def warmed(kernel: Kernel) -> Callable[[], object]:
            calls = [once(kernel, self.problem, args) for args in sets] * times
            run = lambda: [call() for call in calls]  # noqa: E731 the list keeps each output, so none is written twice
            run()
            return run

        with torch.no_grad():
            runs = {k.id: self.attempt(k, lambda k=k: warmed(k)) for k in kernels}
            ready = {id: run for id, run in runs.items() if run is not None}
            timings = {"entries": self.device.clock(ready)}
            graphs, reasons = self.device.capture(ready)
            timings["graph"] = self.device.clock(graphs)
        timings = {
            name: {id: Timing(tuple(s / (times * len(sets)) for s in timing.seconds)) for id, timing in found.items()}
            for name, found in timings.items()
        }
        for id, timing in timings["entries"].items():
            self.records[id] |= {"time_us": timing.median * 1e6, "spread": timing.spread}
        for id, timing in timings["graph"].items():
            self.records[id] |= {"device_us": timing.median * 1e6}
        for id, reason in reasons.items():
            self.records[id] |= {"not_captured": reason}
        return timings


def argument_sets(problem: Problem, cache_bytes: int) -> list[tuple]:
    """Equal arguments at different addresses, three times the cache in all, so that no call finds its inputs there."""
    first = full_args(problem)
    size = sum(a.nbytes for a in first if isinstance(a, Tensor))
    count = max(1, min(SETS, ceil(3 * cache_bytes / max(size, 1))))
    return [first, *(tuple(a.clone() if isinstance(a, Tensor) else a for a in first) for _ in range(count - 1))]


def best(records: dict[str, dict], timings: dict[str, Timing], aten: str) -> dict | None:
    """The table entry of the fastest kernel, or None where that is ``aten``, or not faster by the margin."""
    if aten not in timings:
        return None
    id = min(timings, key=lambda id: timings[id].median)
    if timings[id].speedup_over(timings[aten]) < MARGIN:
        return None
    kept = {name: records[id][name] for name in ("error", "eager_error", "source", "versions")}
    return {
        "kernel": id,
        "time_us": timings[id].median * 1e6,
        "aten_us": timings[aten].median * 1e6,
        "spread": timings[id].spread,
        **kept,
    }
