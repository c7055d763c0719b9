"""The choice of a kernel for a problem, and what overrides or observes it.

Order: forced by ``use(...)`` or ``RESNET_FAST_KERNEL``; then on a GPU the measured table of its model, on a CPU the
first kernel that does not yield; then ``aten``. No kernel call is in a try/except: the caller sees what it raises.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from . import registry, tables
from .problem import IDENTITY, KEYS, Problem, describe
from .registry import Kernel, NotUsed, find, is_file, load_file

ENV = "RESNET_FAST_KERNEL"
MEMO_LIMIT = 4096

Args = tuple[Any, ...]
Function = Callable[..., Any]
Chosen = tuple[Kernel, str]  # the kernel, and the reason in a few words


@dataclass(frozen=True)
class Choice:
    """One selection, as ``record`` and ``explain`` show it; ``tensor``: the id() of the weight, which names a layer."""

    problem: Problem
    kernel: str
    why: str
    tensor: int


_forced: list[_Forced] = []
_recorders: list[list[Choice]] = []


# ---------------------------------------------------------------- forcing a kernel


class use:
    """Context manager: run the named kernels (ids, or a user's file) where they support the problem.

    Other problems are dispatched as usual. The effect is process-wide, because backward runs in other threads. Raises
    LookupError for an unknown kernel and NotUsed, a RuntimeError, for a kernel that cannot run here; on exit, NotUsed
    if one of them took no problem. ``strict=True`` raises at the first problem of its op that a named kernel declines.
    """

    def __init__(self, *ids: str, strict: bool = False) -> None:
        self._uses: list[_Forced] = []
        for id in ids:
            named = load_file(id) if is_file(id) else [find(id)]
            self._uses += [_Forced(k, strict) for k in named]
        for entry in self._uses:
            kernel = entry.kernel
            reason = kernel.available()
            if reason:
                raise NotUsed(f"kernel {kernel.id!r} cannot run here: {reason}")

    def __enter__(self) -> None:
        with registry._lock:
            _forced.extend(self._uses)
            registry.forget()

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        with registry._lock:
            for entry in self._uses:
                _forced.remove(entry)
            registry.forget()
        unused = [entry for entry in self._uses if not entry.claimed]
        if kind is None and unused:
            raise NotUsed("; ".join(entry.why_unused() for entry in unused))


class _Forced:
    """One forced kernel: whether it ran, and why it last declined."""

    def __init__(self, kernel: Kernel, strict: bool) -> None:
        self.kernel = kernel
        self.strict = strict
        self.claimed = False
        self.declined: str | None = None

    def claims(self, problem: Problem) -> bool:
        reason = self.kernel.reason(problem)
        if reason is None:
            self.claimed = True
            return True
        if problem.op == self.kernel.op:
            self.declined = reason
            if self.strict:
                raise RuntimeError(f"kernel {self.kernel.id!r} declines {problem.key}: {reason}")
        return False

    def why_unused(self) -> str:
        reason = self.declined or "its op was never called"
        return f"kernel {self.kernel.id!r} claimed no problem: {reason}"


# ---------------------------------------------------------------- one call


def select(op: str, args: Args, check: Function) -> Function:
    """The function to call for this op on these arguments.

    ``check(*args)`` runs the first time that a combination of shapes, strides and dtypes is seen.
    """
    hit = choose_for_call(op, args, check)
    if _recorders:
        choice = Choice(describe(op, args), hit[1].id, hit[2], id(args[IDENTITY[op]]))
        for recorder in _recorders:
            recorder.append(choice)
    return hit[0]


def choose_for_call(op: str, args: Args, check: Function) -> tuple[Function, Kernel, str]:
    """What :func:`select` finds, without recording it: the function, its kernel, and why.

    Memoised on a plain tuple: 0.75 µs against 3.9 for a dataclass look-up.
    """
    key = KEYS[op](*args)
    memo = registry._memo
    hit = memo.get(key)
    if hit is None:
        check(*args)
        device = args[0].device
        with current_gpu(device):  # whose tables are read
            kernel, why = choose(describe(op, args))
        hit = on_device_of(kernel.fn, device), kernel, why
        with registry._lock:
            if len(memo) >= MEMO_LIMIT:  # a service that sees every shape must not grow without end
                memo.clear()
            memo[key] = hit
    return hit


def on_device_of(fn: Function, device: torch.device) -> Function:
    """``fn`` run with ``device`` as the current GPU, if there are several: Triton launches on the current one."""
    if not one_of_several(device):
        return fn

    def on_device(*args: Any) -> Any:
        with torch.cuda.device(device):
            return fn(*args)

    return on_device


def current_gpu(device: torch.device) -> AbstractContextManager[Any]:
    """Make ``device`` the current GPU, if there are several."""
    return torch.cuda.device(device) if one_of_several(device) else nullcontext()


def one_of_several(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.device_count() > 1


# ---------------------------------------------------------------- the choice


def choose(problem: Problem, live: bool = True, graph: bool = False) -> Chosen:
    """The kernel for a problem, and the reason in a few words.

    ``live``: the weights are a module's own; False in a plan, which holds a copy of them. ``graph``: the call runs
    inside a CUDA graph, where host time does not count, so the times measured there decide.
    """
    found = (
        _forced_kernel(problem)
        or _measured_kernel(problem, graph)
        or _preferred_cpu_kernel(problem, live)
    )
    return found or (find("aten", problem.op), "default")


def _forced_kernel(problem: Problem) -> Chosen | None:
    for entry in reversed(_forced):
        if entry.claims(problem):
            return entry.kernel, "forced by use()"
    for id in filter(None, os.environ.get(ENV, "").split(",")):
        kernel = find(id.strip(), problem.op)
        reason = kernel.available()
        if reason:
            raise NotUsed(f"kernel {id!r} from {ENV} cannot run here: {reason}")
        if kernel.reason(problem) is None:
            return kernel, f"forced by {ENV}"
    return None


def _measured_kernel(problem: Problem, graph: bool) -> Chosen | None:
    """What the table of this GPU model names, if the kernel still takes the problem."""
    if problem.device != "cuda":
        return None
    entry = tables.lookup(problem, graph=graph)
    if entry is None:
        return None
    kernel = find(entry["kernel"])
    if kernel.reason(problem) is not None:
        return None
    gpu = tables.gpu_name()
    if graph:
        return kernel, f"measured in a graph on {gpu}"
    return kernel, f"measured: {entry['time_us']:.1f} µs on {gpu}"


def _preferred_cpu_kernel(problem: Problem, live: bool) -> Chosen | None:
    """The first CPU kernel, in order of registration, that takes the problem and does not yield it."""
    if problem.device != "cpu":
        return None
    registry.load("cpu")
    for kernel in registry.registered(problem.op):
        if (
            kernel.yields
            and kernel.reason(problem) is None
            and kernel.yields(problem, live) is None
        ):
            return kernel, kernel.why
    return None


# ---------------------------------------------------------------- observing


def rejected(problem: Problem) -> dict[str, str]:
    """Every other kernel of the op, and why it was not chosen for this problem."""
    chosen, _ = choose(problem)
    passed_over = _yielded if problem.device == "cpu" else _measured_slower
    reasons = passed_over(problem, chosen)
    found = {}
    for kernel in registry.kernels(problem.op):
        if kernel is not chosen:
            found[kernel.id] = kernel.reason(problem) or reasons(kernel)
    return found


def _yielded(problem: Problem, chosen: Kernel) -> Callable[[Kernel], str]:
    def reason(kernel: Kernel) -> str:
        if kernel.yields is None:
            return "kernels of one's own are never chosen by themselves"
        return kernel.yields(problem, True) or f"{chosen.id} goes first"

    return reason


def _measured_slower(problem: Problem, chosen: Kernel) -> Callable[[Kernel], str]:
    records = tables.records(problem)

    def reason(kernel: Kernel) -> str:
        if kernel.id not in records:
            return "no measurement on this GPU: unproved kernels are never chosen by themselves"
        return tables.in_words(records[kernel.id])

    return reason


def undisturbed() -> bool:
    """Whether no kernel is forced and no choice is recorded."""
    return not _forced and not _recorders and ENV not in os.environ


@contextmanager
def record() -> Iterator[list[Choice]]:
    """Collect every selection made while the context is open, in all threads."""
    choices: list[Choice] = []
    with registry._lock:
        _recorders.append(choices)
    try:
        yield choices
    finally:
        with registry._lock:  # by identity: two records without choices are equal
            _recorders[:] = [other for other in _recorders if other is not choices]
