"""The measured choice of kernels: verify each candidate for a problem, time the right ones, store the fastest.

Tuning is an explicit act, never a side effect of a forward. The table is written after each problem, as a whole and
under a lock: an interruption loses at most one problem, two processes may tune at once, nothing is measured twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..dispatch import registry, tables
from ..dispatch.problem import Problem
from ..dispatch.registry import Kernel, find
from ..runtime.cuda_graph import captured
from ..testing.full_size import full_args, verify
from ..testing.rule import Verdict
from ..util.timing import Timing, interleaved
from .call import prepared_call

MARGIN = 1.01  # a kernel must beat aten by more than a repetition of the same measurement moves
CALLS = 8  # at least so many calls between two clock readings
SETS = 128  # at most so many sets of arguments in rotation
BEFORE = "measured before"
LOST = "lost the device"
# of the table: the choice for ordinary calls, and inside CUDA graphs
SECTIONS = ("entries", "graph")

Result = TypeVar("Result")


class DeviceLost(RuntimeError):
    """The GPU's context is broken: nothing more can run in this process."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type."""
    message = str(error).strip()
    if not message:
        return type(error).__name__
    return message.splitlines()[0]


# ---------------------------------------------------------------- the device


@dataclass
class Device:
    """The machine as tuning uses it: the current CUDA device, or a test's stand-in that overrides the clock."""

    name: str
    kind: str = "cuda"
    cache_bytes: int = 0
    seconds: float = 1.0  # of timing for each problem and each way to call

    @classmethod
    def current(cls, seconds: float = 1.0) -> Device:
        """Return the CUDA device in use; raises ValueError without one."""
        if not torch.cuda.is_available():
            raise ValueError(
                f"tuning needs a CUDA device, and torch {torch.__version__} sees none here"
            )
        return cls(
            tables.gpu_name(),
            cache_bytes=torch.cuda.get_device_properties().L2_cache_size,
            seconds=seconds,
        )

    def verify(self, kernel: Kernel, problem: Problem) -> Verdict:
        """Judge a kernel's results at full size."""
        return verify(kernel, problem)

    def clock(
        self, variants: dict[Any, Callable[[], object]], confidence: float = 0.01
    ) -> dict[Any, Timing]:
        """Time the variants interleaved; the keys may be of any kind."""
        return interleaved(
            variants,
            device=self.kind,
            min_rounds=10,
            max_rounds=100,
            max_seconds=self.seconds,
            confidence=confidence,
        )

    def capture(self, runs: dict[str, Callable]) -> tuple[dict[str, Callable], dict[str, str]]:
        """Return each run as a CUDA graph's replay, and why a run cannot be captured. The graphs share their memory."""
        pool, graphs, reasons = torch.cuda.graph_pool_handle(), {}, {}
        for id, run in runs.items():
            try:
                graphs[id] = captured(run, pool=pool)[0].replay
            except Exception as error:  # as outside of a graph, a kernel may fail in any way
                reasons[id], pool = first_line(error), torch.cuda.graph_pool_handle()
            self.settle()
        return graphs, reasons

    def settle(self) -> None:
        """Wait for the device and free its cached memory; raises DeviceLost if an earlier kernel broke the context."""
        if self.kind != "cuda":
            return
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise DeviceLost(
                f"the GPU stopped answering in this process: {first_line(error)}"
            ) from error
        torch.cuda.empty_cache()


# ---------------------------------------------------------------- results


@dataclass
class Tuned:
    """The result for one problem: its kernel for ordinary calls and inside graphs, and each candidate's record."""

    problem: Problem
    calls: str = "aten"
    graph: str = "aten"
    records: dict[str, dict] = field(default_factory=dict)
    note: str = ""

    @property
    def bad(self) -> dict[str, str]:
        """The kernels that accepted the problem and failed, and how."""
        reasons = {}
        for id, record in self.records.items():
            if record["status"] != "right":
                reasons[id] = f"{record['status']}: {record['reason']}"
        return reasons

    def __str__(self) -> str:
        line = f"{self.problem.key}: {self.calls}"
        if self.graph != self.calls:
            line += f", in graphs {self.graph}"
        if self.note:
            line += f" ({self.note})"
        lines = [line]
        for id, record in self.records.items():
            lines.append(f"    {id:28} {tables.in_words(record)}")
        return "\n".join(lines)


# ---------------------------------------------------------------- tuning


def tune(
    problems: Iterable[Problem],
    *,
    kernels: Iterable[str] | None = None,
    device: Device | None = None,
    folder: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Tuned]:
    """Fill the table of this GPU model for these problems.

    ``kernels`` restricts the candidates to these ids; ``aten`` and what the table names already always take part.
    ``folder`` is where the table is written, by default the user's. A kernel that is wrong, raises or runs out of
    memory is named in result and table and never chosen. Raises ValueError without a GPU, LookupError for an unknown
    id, and DeviceLost, with everything so far written, if a kernel broke the GPU's context: the next run passes that
    kernel over.
    """
    device = device or Device.current()
    only = None if kernels is None else {find(id).id for id in kernels}
    problems = list(dict.fromkeys(problems))
    results: list[Tuned] = []
    start, measured = time.monotonic(), 0
    benchmark = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True  # a kernel has to beat cuDNN at its best
    try:
        for i, problem in enumerate(problems, 1):
            result = _Job(problem, device, folder).run(only)
            results.append(result)
            measured += result.note != BEFORE
            progress = _progress(time.monotonic() - start, measured, len(problems) - i)
            say(f"[{i}/{len(problems)}] {progress}{result}")
    finally:
        torch.backends.cudnn.benchmark = benchmark
        registry.forget()  # choices made before the table changed
    return results


def _progress(seconds: float, measured: int, left: int) -> str:
    """Time so far and, at most, to come; nothing if no problem was measured.

    At most, because some of the problems left may have been measured before.
    """
    if not measured:
        return ""
    if not left:
        return f"after {seconds:.0f} s: "
    minutes = seconds / measured * left / 60
    return f"after {seconds:.0f} s, at most some {minutes:.1f} min to go: "


class State(Enum):
    """What the table's record of a candidate is worth for its source and the versions of today."""

    FRESH = "right, with this source and these versions"
    FAILED = "failed, with this source and these versions"
    PASSED_OVER = "broke the GPU's context, with this source and these versions"
    TO_VERIFY = (
        "right with this source under other versions: its times still hold if it is still right"
    )
    TO_MEASURE = "no record, another source, or failed under other versions"


# With these nothing is left to do.
KNOWN = {State.FRESH, State.FAILED, State.PASSED_OVER}


class _Job:
    """One problem: its candidates, their records in the table, and what is found now."""

    def __init__(self, problem: Problem, device: Device, folder: Path | None) -> None:
        self.problem = problem
        self.device = device
        self.folder = folder
        table_folder = folder or tables.user_folder()
        sections = tables.read(table_folder / tables.file_name(device.name), device.name)
        self.known: dict[str, dict] = sections["measured"].get(problem.key, {})
        self.chosen: dict[str, dict] = {}
        for name in SECTIONS:
            if problem.key in sections[name]:
                self.chosen[name] = sections[name][problem.key]
        self.records: dict[str, dict] = {}

    def run(self, only: set[str] | None) -> Tuned:
        """Measure what the table does not know yet, and write it."""
        candidates = self.candidates(only)
        states = {kernel.id: self.state(kernel) for kernel in candidates}
        found = set(states.values())
        if found <= KNOWN:
            return self.result(BEFORE)
        if found <= {State.FRESH, State.TO_VERIFY} and self.chosen_are_still_right(candidates):
            self.write_versions()
            return self.result("verified again for these versions; its timings are older")
        self.measure(
            [kernel for kernel in candidates if states[kernel.id] is not State.PASSED_OVER]
        )
        return self.result()

    def candidates(self, only: set[str] | None) -> list[Kernel]:
        """``aten`` first, then the op's kernels that can run here and take the problem."""
        aten = find("aten", self.problem.op)
        if only is not None:
            only = only | {entry["kernel"] for entry in self.chosen.values()}

        found = [aten]
        for kernel in registry.kernels(self.problem.op):
            if kernel is aten or only is not None and kernel.id not in only:
                continue
            if kernel.reason(self.problem) is None:
                found.append(kernel)
        return found

    def state(self, kernel: Kernel) -> State:
        """What the table's record of a kernel is worth today."""
        record = self.known.get(kernel.id)
        if record is None or record["source"] != tables.source_hash(kernel.sources):
            return State.TO_MEASURE
        is_right = record["status"] == "right"
        if record["versions"] != tables.versions():
            return State.TO_VERIFY if is_right else State.TO_MEASURE
        if is_right:
            return State.FRESH
        return State.PASSED_OVER if record["status"] == LOST else State.FAILED

    def result(self, note: str = "") -> Tuned:
        """The result as the table has it now."""
        chosen = {name: entry["kernel"] for name, entry in self.chosen.items()}
        return Tuned(
            self.problem,
            calls=chosen.get("entries", "aten"),
            graph=chosen.get("graph", "aten"),
            records=self.known,
            note=note,
        )

    # ------------------------------------------------------------ the table

    def write(self, records: dict[str, dict], chosen: dict[str, dict]) -> None:
        """Put this problem's records and entries into the table and keep them here."""
        key = self.problem.key

        def edit(sections: dict[str, dict]) -> None:
            sections["measured"].setdefault(key, {}).update(records)
            for name in SECTIONS:
                sections[name].pop(key, None)
                if name in chosen:
                    sections[name][key] = chosen[name]

        tables.update(self.device.name, edit, self.folder)
        self.known, self.chosen = records, chosen

    def write_versions(self) -> None:
        """Write today's versions into the records and entries."""
        versions = {"versions": tables.versions()}
        records = {id: record | versions for id, record in self.known.items()}
        chosen = {name: entry | versions for name, entry in self.chosen.items()}
        self.write(records, chosen)

    def note(self, kernel: Kernel, status: str, **facts) -> None:
        """Record a kernel's status with its source and the versions."""
        self.records[kernel.id] = {
            "status": status,
            "source": tables.source_hash(kernel.sources),
            "versions": tables.versions(),
            **facts,
        }

    # ------------------------------------------------------------ verifying and timing

    def measure(self, candidates: list[Kernel]) -> None:
        """Verify the candidates, time those that are right, and write records and entries.

        Raises DeviceLost if a kernel broke the GPU's context, with that kernel's record written.
        """
        try:
            right = [kernel for kernel in candidates if self.is_right(kernel)]
            timings = self.timed(right)
        except DeviceLost as lost:
            broke = {id: record for id, record in self.records.items() if record["status"] == LOST}
            self.write(self.known | broke, self.chosen)
            raise DeviceLost(
                f"{lost}; the kernel was {', '.join(broke)} on {self.problem.key}. The table is intact; "
                "the next run passes that kernel over until its source changes"
            ) from lost
        aten = find("aten", self.problem.op).id
        chosen = {}
        for name in SECTIONS:
            entry = best(self.records, timings[name], aten)
            if entry is not None:
                chosen[name] = entry
        self.write(self.known | self.records, chosen)

    def chosen_are_still_right(self, candidates: list[Kernel]) -> bool:
        """Whether the kernels that the table chooses are right under today's versions."""
        ids = {entry["kernel"] for entry in self.chosen.values()}
        return all(self.is_right(kernel) for kernel in candidates if kernel.id in ids)

    def is_right(self, kernel: Kernel) -> bool:
        """Whether the kernel is right on the problem; its record says so, or why not."""
        verdict = self.attempt(kernel, lambda: self.device.verify(kernel, self.problem))
        if verdict is None:
            return False
        status = "right" if verdict.ok else "wrong"
        errors = {"error": verdict.error.rms, "eager_error": verdict.eager.rms}
        self.note(kernel, status, reason=verdict.reason, **errors)
        return verdict.ok

    def attempt(self, kernel: Kernel, work: Callable[[], Result]) -> Result | None:
        """Return ``work()``, or None with a record of how the kernel failed."""
        done = trouble = None
        try:
            done = work()
        except torch.OutOfMemoryError as error:
            trouble = "out of memory", first_line(error)
        # a candidate may fail in any way that its author or its compiler found
        except Exception as error:
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
        """Return seconds a call of each kernel, by section: with its host time, and inside a CUDA graph."""
        try:
            sets = argument_sets(self.problem, self.device.cache_bytes)
        except torch.OutOfMemoryError as error:
            for kernel in kernels:
                self.note(
                    kernel, "out of memory", reason=f"arguments to time it on: {first_line(error)}"
                )
            self.device.settle()
            return {name: {} for name in SECTIONS}
        times = ceil(CALLS / len(sets))
        with torch.no_grad():
            runs: dict[str, Callable[[], object]] = {}
            for kernel in kernels:
                run = self.attempt(kernel, partial(self.warmed, kernel, sets, times))
                if run is not None:
                    runs[kernel.id] = run
            entries = self.device.clock(runs)
            graphs, reasons = self.device.capture(runs)
            in_graph = self.device.clock(graphs)
        calls = times * len(sets)
        timings = {
            "entries": _per_call(entries, calls),
            "graph": _per_call(in_graph, calls),
        }
        self.record_times(timings, reasons)
        return timings

    def warmed(self, kernel: Kernel, sets: list[tuple], times: int) -> Callable[[], object]:
        """Return a run that calls the kernel so many times on each set of arguments, after a first one."""
        calls = [prepared_call(kernel, self.problem, args) for args in sets] * times

        def run() -> list[object]:
            # the list keeps each output, so no memory is written twice
            return [call() for call in calls]

        run()
        return run

    def record_times(self, timings: dict[str, dict[str, Timing]], reasons: dict[str, str]) -> None:
        """Add times, and why a kernel was not captured, to the records."""
        for id, timing in timings["entries"].items():
            self.records[id]["time_us"] = timing.median * 1e6
            self.records[id]["spread"] = timing.spread
        for id, timing in timings["graph"].items():
            self.records[id]["device_us"] = timing.median * 1e6
        for id, reason in reasons.items():
            self.records[id]["not_captured"] = reason


def _per_call(timings: dict[str, Timing], calls: int) -> dict[str, Timing]:
    """Return the timings of runs of so many calls as those of one call."""
    found = {}
    for id, timing in timings.items():
        seconds = tuple(run / calls for run in timing.seconds)
        found[id] = Timing(seconds)
    return found


def argument_sets(problem: Problem, cache_bytes: int) -> list[tuple]:
    """Return equal arguments at different addresses, three times the cache in all: no call finds its inputs there."""
    sets = [full_args(problem)]
    size = sum(arg.nbytes for arg in sets[0] if isinstance(arg, Tensor))
    count = ceil(3 * cache_bytes / max(size, 1))
    for _ in range(min(SETS, count) - 1):
        copied = tuple(arg.clone() if isinstance(arg, Tensor) else arg for arg in sets[0])
        sets.append(copied)
    return sets


def best(records: dict[str, dict], timings: dict[str, Timing], aten: str) -> dict | None:
    """Return the table entry of the fastest kernel, or None where that is ``aten`` or is not faster by the margin."""
    if aten not in timings:
        return None
    id = min(timings, key=lambda id: timings[id].median)
    if timings[id].speedup_over(timings[aten]) < MARGIN:
        return None
    return {
        "kernel": id,
        "time_us": timings[id].median * 1e6,
        "aten_us": timings[aten].median * 1e6,
        "spread": timings[id].spread,
        "error": records[id]["error"],
        "eager_error": records[id]["eager_error"],
        "source": records[id]["source"],
        "versions": records[id]["versions"],
    }
