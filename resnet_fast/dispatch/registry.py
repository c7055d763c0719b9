"""The registry of kernels: registration, look-up by id, family or file, and the memo of past choices.

Kernels live in families, one module each (``kernels/aten.py``, ``kernels/cpu.py``, ``kernels/native.py``,
``kernels/triton``, ``kernels/experimental``). A family is imported when one of its kernels is first asked for.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .problem import KEYS, Problem

FAMILIES = ("aten", "cpu", "native", "triton", "experimental")
F = TypeVar("F", bound=Callable[..., Any])
# Suffixes of a user's kernel file, and the module whose ``load_file`` builds one (None: Python imports it).
FILES = {".py": None, ".cu": "resnet_fast.kernels.jit"}


class NotUsed(RuntimeError):
    """A kernel that was asked for by name cannot run here, or took no problem."""


# (folded weight, bias, (stride, padding, dilation, groups), input shape) → packed filters and bias, or None.
Make = Callable[[Tensor, Tensor, tuple[Any, ...], torch.Size], "tuple[Tensor, Tensor] | None"]
PackedRun = Callable[
    [Tensor, Tensor, Tensor, "Tensor | None", torch.Size, tuple[Any, ...], bool, bool],
    "Tensor | None",
]


@dataclass(frozen=True)
class Prepacked:
    """How a convolution runs from filters that were packed beforehand.

    ``make(folded weight, bias, geometry, input shape)`` returns packed filters and a float32 bias, or None for weights
    that it cannot take. ``run(x, filters, bias, residual, filter size, geometry, relu, in_place)`` returns the output,
    in the residual's memory if ``in_place`` and the kernel can; None for an input that it cannot take, which ``aten``
    then computes.
    """

    make: Make
    run: PackedRun


@dataclass(frozen=True)
class Kernel:
    """A registered implementation of one op. See :func:`kernel` for the fields."""

    id: str
    op: str
    fn: Callable[..., Any] = field(repr=False)
    supports: Callable[[Problem], str | None] = field(repr=False)
    available: Callable[[], str | None] = field(repr=False)
    sources: tuple[str, ...] = field(repr=False, default=())
    yields: Callable[[Problem, bool], str | None] | None = field(repr=False, default=None)
    why: str = field(repr=False, default="")
    prepacked: Prepacked | None = field(repr=False, default=None)

    def reason(self, problem: Problem) -> str | None:
        """Why this kernel cannot take this problem here, or None if it can."""
        if problem.op != self.op:
            return f"it implements {self.op}, not {problem.op}"
        return self.available() or self.supports(problem)


_registry: dict[str, Kernel] = {}
# select.choose_for_call fills it
_memo: dict[tuple[Any, ...], tuple[Callable[..., Any], Kernel, str]] = {}
_lock = threading.RLock()


def kernel(
    id: str,
    *,
    op: str,
    supports: Callable[[Problem], str | None],
    available: Callable[[], str | None] = lambda: None,
    sources: tuple[str, ...] = (),
    yields: Callable[[Problem, bool], str | None] | None = None,
    why: str = "",
    prepacked: Prepacked | None = None,
) -> Callable[[F], F]:
    """Register the decorated function as kernel ``id`` ("family.name") of ``op``.

    The function has the op's flat signature. ``supports(problem)`` and ``available()`` return None, or one sentence
    that says why not. ``sources`` are further files that the kernel is made of: a table entry is void once they change;
    the function's own file always counts.

    On a CPU a kernel with ``yields`` is chosen without being forced: ``yields(problem, live)`` returns None if the
    kernel goes first, or why it leaves a problem that it could run to the next kernel or to torch; ``live`` says that
    the weights are a module's own, not a plan's copy. ``why`` is the reason shown when it is chosen. ``prepacked`` runs
    a convolution from filters that are packed once.
    """
    if op not in KEYS:
        raise ValueError(f"kernel {id!r}: unknown op {op!r}, expected one of {', '.join(KEYS)}")

    def register(fn: F) -> F:
        file = getattr(sys.modules.get(fn.__module__), "__file__", None)  # None at a prompt
        files = (file, *sources) if file else sources
        with _lock:
            _registry[id] = Kernel(id, op, fn, supports, available, files, yields, why, prepacked)
            forget()
        return fn

    return register


def forget() -> None:
    """Drop every memoised choice.

    The memo is replaced, not emptied: a choice that another thread is making now goes into the old one.
    """
    global _memo
    with _lock:
        _memo = {}


# ---------------------------------------------------------------- look-up


def load(family: str) -> None:
    """Import one family of kernels, which registers them."""
    if family == "triton" and importlib.util.find_spec("triton") is None:
        return
    importlib.import_module(f"resnet_fast.kernels.{family}")


def registered(op: str | None = None) -> list[Kernel]:
    """The kernels of the families loaded so far, of one op or of all, in order of registration."""
    return [k for k in list(_registry.values()) if op in (None, k.op)]


def kernels(op: str | None = None) -> list[Kernel]:
    """All kernels, of one op or of all, ``aten`` first."""
    for family in FAMILIES:
        load(family)
    return registered(op)


def find(id: str, op: str | None = None) -> Kernel:
    """The kernel of that id; ``aten`` with an op is that op's. Raises LookupError with similar ids, or all of them."""
    name = f"{id}.{op}" if id in FAMILIES and op else id
    family = name.split(".")[0]
    if name not in _registry and family in FAMILIES:
        load(family)
    if name not in _registry:
        raise LookupError(f"kernel {id!r} is unknown; {_hint(id)}")
    return _registry[name]


def _hint(id: str) -> str:
    """The ids that an unknown id may stand for, or all known ids."""
    ids = sorted(k.id for k in kernels())
    in_family = [k for k in ids if k.startswith(f"{id}.")]
    similar = in_family or difflib.get_close_matches(id, ids, cutoff=0.8)
    if similar:
        return f"did you mean one of these: {', '.join(similar)}?"
    return f"known: {', '.join(ids)}"


def named(name: str) -> list[Kernel]:
    """The kernels that a user names: by id, by family, or by a .py or .cu file.

    Raises ImportError with the line at fault if the user's file raises.
    """
    if is_file(name):
        return _from_user_file(name)
    if name in FAMILIES:
        return [k for k in kernels() if k.id.startswith(f"{name}.")]
    return [find(name)]


# ---------------------------------------------------------------- kernels from a user's file


def is_file(name: str) -> bool:
    """Whether a name that a user gives is a kernel file, not an id."""
    return name.endswith(tuple(FILES))


def load_file(path: str | Path) -> list[Kernel]:
    """Import a Python file that registers kernels, or build a .cu file that is one. Returns its kernels."""
    path = Path(path).resolve()
    if not path.is_file():
        raise FileNotFoundError(f"kernel file {path} does not exist")
    loader = FILES.get(path.suffix)
    if loader is not None:
        kernels: list[Kernel] = importlib.import_module(loader).load_file(path)
        return kernels
    return _import_file(path)


def _import_file(path: Path) -> list[Kernel]:
    spec = importlib.util.spec_from_file_location(f"resnet_fast_user_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"kernel file {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    # without those of modules that it imports
    found = [k for k in registered() if k.fn.__module__ == spec.name]
    if not found:
        raise ValueError(
            f"kernel file {path} registered no kernel: decorate a function with @resnet_fast.kernel(...)"
        )
    return found


def _from_user_file(name: str) -> list[Kernel]:
    """``load_file`` with errors inside the file reported by their line."""
    try:
        return load_file(name)
    # a user's file may raise anything; its line says more than our own traceback
    except Exception as error:
        line = _line_at_fault(error, Path(name).resolve())
        if line is None:
            raise
        message = getattr(error, "msg", error)
        raise ImportError(
            f"kernel file {name}, line {line}: {type(error).__name__}: {message}"
        ) from error


def _line_at_fault(error: Exception, path: Path) -> int | None:
    """The line of the file that raised, None if the error is not from inside the file."""
    if isinstance(error, SyntaxError):
        return error.lineno
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    return lines[-1] if lines else None
