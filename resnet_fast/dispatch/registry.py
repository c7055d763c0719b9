"""Which kernel runs: a plain-Python chooser from a frozen description of the problem to a registered kernel.

Order: forced by ``use(...)`` or ``RESNET_FAST_KERNEL``; then the measured table of this GPU model, on a CPU what ``kernels/cpu.py``
prefers; then ``aten``. Kernels live in families, one module each (``kernels/aten.py``, ``kernels/cpu.py``, ``kernels/native.py``,
``kernels/triton``, ``kernels/experimental``), imported only when a kernel of theirs is asked for. There is no try/except around a
kernel: what it raises, the caller sees.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .problem import IDENTITY, KEYS, Problem, describe

FAMILIES = ("aten", "cpu", "native", "triton", "experimental")
ENV = "RESNET_FAST_KERNEL"
FILES = (".py", ".cu")  # what a user's own kernel is written in
MEMO_LIMIT = 4096


class NotUsed(RuntimeError):
    """A kernel that was asked for by name cannot run here, or took no problem."""


@dataclass(frozen=True)
class Kernel:
    """A registered implementation of one op: ``fn`` has the op's flat signature, ``supports(problem)`` is None or a sentence why not."""

    id: str
    op: str
    fn: Callable = field(repr=False)
    supports: Callable[[Problem], str | None] = field(repr=False)
    available: Callable[[], str | None] = field(repr=False)
    sources: tuple[str, ...] = field(repr=False, default=())

    def reason(self, problem: Problem) -> str | None:
        """Why this kernel cannot take this problem here, or None if it can."""
        if problem.op != self.op:
            return f"it implements {self.op}, not {problem.op}"
        return self.available() or self.supports(problem)


@dataclass(frozen=True)
class Choice:
    """One selection, as ``record`` and ``explain`` show it; ``tensor`` is the id() of the weight that tells which layer it was."""

    problem: Problem
    kernel: str
    why: str
    tensor: int


_registry: dict[str, Kernel] = {}
_memo: dict[tuple, tuple[Callable, Kernel, str]] = {}
_forced: list[_Use] = []
_recorders: list[list[Choice]] = []
_lock = threading.RLock()


def kernel(
    id: str,
    *,
    op: str,
    supports: Callable[[Problem], str | None],
    available: Callable[[], str | None] = lambda: None,
    sources: tuple[str, ...] = (),
) -> Callable:
    """Register the decorated function as kernel ``id`` ("family.name") of ``op``.

    ``supports`` and ``available`` answer None or one sentence that says why not; ``sources`` are further files whose text the kernel
    is made of (a table entry is void once they change); the function's own file always counts.
    """
    if op not in KEYS:
        raise ValueError(f"kernel {id!r}: unknown op {op!r}, expected one of {', '.join(KEYS)}")

    def register(fn: Callable) -> Callable:
        file = getattr(sys.modules.get(fn.__module__), "__file__", None)  # at a prompt there is none
        with _lock:
            _registry[id] = Kernel(id, op, fn, supports, available, (file, *sources) if file else sources)
            _forget()
        return fn

    return register


def _forget() -> None:
    """A new memo, not an emptied one: a choice that another thread is making now goes into the old one."""
    global _memo
    _memo = {}


def load(family: str) -> None:
    """Import one family of kernels; it registers itself."""
    if family == "triton" and importlib.util.find_spec("triton") is None:
        return
    importlib.import_module(f"resnet_fast.kernels.{family}")


def kernels(op: str | None = None) -> list[Kernel]:
    """Every kernel known here, of one op or of all, ``aten`` first."""
    for family in FAMILIES:
        load(family)
    return [k for k in _registry.values() if op in (None, k.op)]


def find(id: str, op: str | None = None) -> Kernel:
    """The kernel of that id (``aten`` has one for each op); raises LookupError with the ids that may have been meant, or all."""
    name = f"{id}.{op}" if id in FAMILIES and op else id
    if name not in _registry and name.split(".")[0] in FAMILIES:
        load(name.split(".")[0])
    if name not in _registry:
        ids = sorted(k.id for k in kernels())
        meant = [k for k in ids if k.startswith(f"{id}.")] or difflib.get_close_matches(id, ids, cutoff=0.8)
        hint = f"did you mean one of these: {', '.join(meant)}?" if meant else f"known: {', '.join(ids)}"
        raise LookupError(f"kernel {id!r} is unknown; {hint}")
    return _registry[name]


def named(name: str) -> list[Kernel]:
    """The kernels that a user names: those of a .py or .cu file, of a family, or the one of that id."""
    if name.endswith(FILES):
        return load_file(name)
    if name in FAMILIES:
        return [k for k in kernels() if k.id.startswith(f"{name}.")]
    return [find(name)]


# ---------------------------------------------------------------- choosing


class use:
    """Context manager: run the named kernels (ids, or a file of one's own) wherever they support the problem; others are chosen as usual.

    Process-wide, because backward runs in other threads. Raises LookupError for an unknown kernel and NotUsed, a RuntimeError, for one
    that cannot run here; on leaving, NotUsed if one of them claimed no problem. ``strict=True`` raises at the first problem of its op
    that a named kernel declines.
    """

    def __init__(self, *ids: str, strict: bool = False) -> None:
        self._uses = [_Use(k, strict) for id in ids for k in (load_file(id) if id.endswith(FILES) else [find(id)])]
        for entry in self._uses:
            reason = entry.kernel.available()
            if reason:
                raise NotUsed(f"kernel {entry.kernel.id!r} cannot run here: {reason}")

    def __enter__(self) -> None:
        with _lock:
            _forced.extend(self._uses)
            _forget()

    def __exit__(self, kind, value, trace) -> None:
        with _lock:
            for entry in self._uses:
                _forced.remove(entry)
            _forget()
        idle = [entry for entry in self._uses if not entry.claimed]
        if kind is None and idle:
            raise NotUsed(
                "; ".join(
                    f"kernel {e.kernel.id!r} claimed no problem: {e.declined or 'its op was never called'}"
                    for e in idle
                )
            )


class _Use:
    """One forced kernel: whether it ran, and why it last declined."""

    def __init__(self, kernel: Kernel, strict: bool) -> None:
        self.kernel, self.strict, self.claimed, self.declined = kernel, strict, False, None

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


def select(op: str, args: tuple, check: Callable) -> Callable:
    """The function to call for this op on these arguments, after ``check(*args)`` the first time such a combination is seen."""
    hit = chosen(op, args, check)
    if _recorders:
        choice = Choice(describe(op, args), hit[1].id, hit[2], id(args[IDENTITY[op]]))
        for recorder in _recorders:
            recorder.append(choice)
    return hit[0]


def chosen(op: str, args: tuple, check: Callable) -> tuple[Callable, Kernel, str]:
    """What :func:`select` finds, without being seen: the function, its kernel, and why.

    Memoised on a plain tuple: 0.75 µs against 3.9 for a dataclass look-up.
    """
    key = KEYS[op](*args)
    memo = _memo
    hit = memo.get(key)
    if hit is None:
        check(*args)
        kernel, why = choose(describe(op, args))
        hit = _there(kernel.fn, args[0].device), kernel, why
        with _lock:
            if len(memo) >= MEMO_LIMIT:  # a service that sees every shape must not grow without end
                memo.clear()
            memo[key] = hit
    return hit


def _there(fn: Callable, device: torch.device) -> Callable:
    """``fn`` with its tensors' GPU as the current one, where there are several: Triton launches on the current one, wherever the tensors lie."""
    if device.type != "cuda" or torch.cuda.device_count() == 1:
        return fn

    def there(*args):
        with torch.cuda.device(device):
            return fn(*args)

    return there


def choose(problem: Problem) -> tuple[Kernel, str]:
    """The kernel for a problem and the reason in a few words: forced, then measured, then ``aten``."""
    for entry in reversed(_forced):
        if entry.claims(problem):
            return entry.kernel, "forced by use()"
    for id in filter(None, os.environ.get(ENV, "").split(",")):
        wanted = find(id.strip(), problem.op)
        reason = wanted.available()
        if reason:
            raise NotUsed(f"kernel {id!r} from {ENV} cannot run here: {reason}")
        if wanted.reason(problem) is None:
            return wanted, f"forced by {ENV}"
    if problem.device == "cuda":
        from . import tables

        entry = tables.lookup(problem)
        if entry is not None and find(entry["kernel"]).reason(problem) is None:
            return find(entry["kernel"]), f"measured: {entry['time_us']:.1f} µs on {tables.gpu_name()}"
    if problem.device == "cpu" and problem.op in ("conv_bn_act", "bn_act", "bn_act_backward"):
        from ..kernels import cpu

        preferred = cpu.preferred(problem)
        if preferred is not None:
            return find(preferred[0]), preferred[1]
    return find("aten", problem.op), "default"


def rejected(problem: Problem) -> dict[str, str]:
    """Every other kernel of the op and why it was not chosen for this problem."""
    chosen, _ = choose(problem)
    unproved, measured = "no measurement on this GPU: unproved kernels are never chosen by themselves", {}
    if problem.device == "cpu":
        from ..kernels import cpu

        unproved = "kernels of one's own are never chosen by themselves"
        measured = {
            id: cpu.yields(id, problem) or f"{chosen.id} goes first" for id in (*cpu.FORMS, *cpu.BATCH_NORM.values())
        }
    else:
        from . import tables

        measured = {kernel: tables.tell(record) for kernel, record in tables.records(problem).items()}
    return {k.id: k.reason(problem) or measured.get(k.id, unproved) for k in kernels(problem.op) if k is not chosen}


def undisturbed() -> bool:
    """Whether nobody forces a kernel or wants to see what is chosen."""
    return not _forced and not _recorders and ENV not in os.environ


@contextmanager
def record() -> Iterator[list[Choice]]:
    """Collect every selection made while the context is open, in all threads."""
    choices: list[Choice] = []
    with _lock:
        _recorders.append(choices)
    try:
        yield choices
    finally:
        with _lock:
            _recorders.remove(choices)


def load_file(path: str | Path) -> list[Kernel]:
    """Import a Python file that registers kernels, or build a .cu file that is one, and return the kernels it brought."""
    path = Path(path).resolve()
    if not path.is_file():
        raise FileNotFoundError(f"kernel file {path} does not exist")
    if path.suffix == ".cu":
        from ..kernels import jit

        return jit.load_file(path)
    spec = importlib.util.spec_from_file_location(f"resnet_fast_user_{path.stem}", path)
    if spec is None:
        raise ValueError(f"kernel file {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    brought = [k for k in _registry.values() if k.fn.__module__ == spec.name]  # not what it imported
    if not brought:
        raise ValueError(f"kernel file {path} registered no kernel: decorate a function with @resnet_fast.kernel(...)")
    return brought
