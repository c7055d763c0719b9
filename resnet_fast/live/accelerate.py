"""``accelerate``: fused steps inside a torchvision, timm or other conv-BN network, in place and reversible.

There is one structural rule and no list of models. A module that owns a convolution and a batch norm gets a ``forward``
in its ``__dict__``. That runs the module's schedule over the live children, or the class's forward where the path rule
forbids it or the module was changed. Classes, parameters, keys, children and hooks stay as they are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from ..graph.facts import is_frozen_bn, is_norm, touched
from ..graph.fuse import schedule
from ..graph.ir import Schedule
from ..graph.trace import Untraceable
from . import network_pass
from .eligibility import fuses_itself, why_plain
from .layout import islands, to_nchw, to_nhwc, wants_nhwc
from .unit_program import UnitProgram


def accelerate(model: nn.Module, *, strict: bool = False) -> nn.Module:
    """Make ``model`` run fused conv → BN → (+ residual) → ReLU steps, in place, and return it; ``restore`` takes it
    back.

    Answers, gradients, statistics, ``state_dict``, hooks and classes stay those of the untouched model, in eval and
    in training; what cannot be fused runs as before, and ``accelerated(model)`` says what and why. Raises
    RuntimeError, leaving the model as it was, if with ``strict`` a convolution with a batch norm would be left
    unfused in the model's present mode.
    """
    _check("accelerate", model)
    found = list(_units("", model, set(), set()))
    if strict:
        _require_fused(found, model.training)
    restore(model)
    units = [unit for unit in found if unit.fuses]
    for unit in units:
        _install(unit.module).unit = True
    for training in (False, True):
        for m in islands(model, training, _fused_convs(model, found, training)).values():
            _install(m).nhwc[training] = True
    for unit in units:  # last: the programs' guards must hold the modules' new attributes
        for training, planned in unit.schedules.items():
            _install(unit.module).programs[training] = UnitProgram(unit.module, planned, training)
    return model


def _require_fused(units: list[_Unit], training: bool) -> None:
    left = _left_unfused(units, training)
    if left:
        raise RuntimeError(
            "accelerate: left unfused: " + "; ".join(f"{path}: {why}" for path, why in left.items())
        )


def restore(model: nn.Module) -> nn.Module:
    """Take back what ``accelerate`` did: every module's ``__dict__`` is what it was. Returns the model."""
    _check("restore", model)
    for m in model.modules():
        _strip(m)
    return model


def _check(name: str, model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name}: model: got {type(model).__name__}, expected an nn.Module")


def _install(m: nn.Module) -> Forward:
    forward = m.__dict__.get("forward")
    if forward is None:
        forward = Forward(m)
        m.__dict__.update(
            forward=forward,
            _replicate_for_data_parallel=forward.replicate,
            __prepare_scriptable__=forward.plain,
        )
    return forward


def _strip(m: nn.Module) -> None:
    if isinstance(m.__dict__.get("forward"), Forward):
        del (
            m.__dict__["forward"],
            m.__dict__["_replicate_for_data_parallel"],
            m.__dict__["__prepare_scriptable__"],
        )


def _plain(m: nn.Module, done: dict[int, nn.Module]) -> nn.Module:
    if id(m) not in done:
        twin = done[id(m)] = object.__new__(type(m))
        twin.__dict__.update(m.__dict__, _parameters=dict(m._parameters), _buffers=dict(m._buffers))
        twin.__dict__["_modules"] = {
            name: None if child is None else _plain(child, done)
            for name, child in m._modules.items()
        }
        _strip(twin)
    return done[id(m)]


# ---------------------------------------------------------------- the instance-level forward


class Forward:
    """An accelerated module's ``forward``: its schedule over its live children, or its class's forward.

    It refers to its module weakly, since a cycle would hold GPU memory until the next collection. A copy, or an
    unpickled one, traces anew. ``unit``: the module has a schedule. ``nhwc``: the modes (training or not) in which its
    activations may be NHWC inside.
    """

    same_answers = True

    def __init__(self, owner: nn.Module) -> None:
        self.__setstate__((owner, False, {}))

    def __getstate__(self) -> tuple[nn.Module, bool, dict[bool, bool]]:
        return self.owner(), self.unit, self.nhwc

    def __setstate__(self, state: tuple[nn.Module, bool, dict[bool, bool]]) -> None:
        owner, self.unit, self.nhwc = state
        self._owner = weakref.ref(owner)
        self.programs: dict[bool, UnitProgram] = {}

    def owner(self) -> nn.Module:
        """The module; raises ReferenceError if it is gone."""
        owner = self._owner()
        if owner is None:
            raise ReferenceError(
                "this forward's accelerated module is gone: keep the module, not just its forward"
            )
        return owner

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The class's forward, whose signature this one has."""
        owner = self.owner()
        bound: Callable[..., Any] = type(owner).forward.__get__(owner)
        return bound

    @property
    def __code__(self) -> CodeType:
        """The class's forward's: torch.export reads where a forward was defined."""
        return self.__wrapped__.__code__

    @property
    def __globals__(self) -> dict[str, Any]:
        """The class's forward's: torch.fx wraps functions where the forward looks them up."""
        return self.__wrapped__.__globals__

    def replicate(self) -> nn.Module:
        """DataParallel's replica. It has other parameters, so it runs its class's forward."""
        owner = self.owner()
        replica: nn.Module = type(owner)._replicate_for_data_parallel(owner)
        _strip(replica)
        return replica

    def plain(self) -> nn.Module:
        """For torch.jit.script, which reads sources: the same modules over the same tensors, none accelerated."""
        return _plain(self.owner(), {})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        owner = self.owner()
        if torch.compiler.is_compiling() or kwargs or not args or type(args[0]) is not Tensor:
            return type(owner).forward(owner, *args, **kwargs)
        if not self.nhwc.get(owner.training) or why_plain(args[0], ()) is not None:
            return self._run(owner, args)
        if len(args) != 1 or not network_pass.is_plain_cpu_inference(owner, args[0]):
            return self._in_nhwc(owner, args)
        answer = network_pass.run_program(owner, args[0])
        return self._inference(owner, args[0]) if answer is None else answer

    def _inference(self, owner: nn.Module, x: Tensor) -> Any:
        """A pass on a CPU without a program."""
        inside = network_pass.unobserved(owner)
        if inside is None:
            return self._in_nhwc(owner, (x,))
        with network_pass.checked_pass(owner, inside, x) as answer:
            return self._in_nhwc(owner, (x,)) if answer is None else answer

    def _in_nhwc(self, owner: nn.Module, args: tuple[Any, ...]) -> Any:
        if wants_nhwc(owner, args[0]):
            return to_nchw(self._run(owner, (to_nhwc(args[0]), *args[1:])))
        return self._run(owner, args)

    def _run(self, owner: nn.Module, args: tuple[Any, ...]) -> Any:
        if self.unit:
            program = self._program(owner, args[0])
            if program is not None and program.why_plain(args) is None:
                return program(*args)
        return type(owner).forward(owner, *args)

    def _program(self, owner: nn.Module, x: Tensor) -> UnitProgram | None:
        """The program for the owner's mode, traced anew if the owner was changed; None while something else traces."""
        found = self.programs.get(owner.training)
        if found is None or found.changed(owner):
            if why_plain(x, ()) is not None:
                return None
            schedule = _unit_schedule(owner, owner.training)
            found = self.programs[owner.training] = UnitProgram(owner, schedule, owner.training)
        return found


# ---------------------------------------------------------------- the structural rule


@dataclass
class _Unit:
    """A module that owns a convolution and a batch norm: its schedule in eval and in training, or why there is none."""

    path: str
    module: nn.Module
    schedules: dict[bool, Schedule | None] = field(default_factory=dict)
    reasons: dict[bool, str] = field(default_factory=dict)

    @property
    def fuses(self) -> bool:
        return any(s is not None and s.fused for s in self.schedules.values())

    def count(self, training: bool) -> int:
        """The number of fused steps."""
        found = self.schedules[training]
        return 0 if found is None else len(found.fused)

    def left(self, training: bool) -> dict[str, str]:
        """The unfused convolutions that a batch norm reads, by path, and why."""
        found = self.schedules[training]
        if found is None:
            return {self.path or "(model)": self.reasons[training]}
        return {_joined(self.path, path): why for path, why in found.left.items()}


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _left_unfused(units: list[_Unit], training: bool) -> dict[str, str]:
    """The unfused convolutions of all units in one mode, and why."""
    left: dict[str, str] = {}
    for unit in units:
        left |= unit.left(training)
    return left


def _units(path: str, m: nn.Module, seen: set[int], inlined: set[int]) -> Iterator[_Unit]:
    """The units from the outermost in. A module that one unit traced into in both modes is no unit itself."""
    if id(m) in seen or fuses_itself(m) == "block":
        return
    seen.add(id(m))
    if id(m) not in inlined and _is_unit(m):
        unit = _Unit(path, m)
        for training in (False, True):
            unit.schedules[training] = None
            try:
                unit.schedules[training] = _schedule(m, training)
            except Untraceable as reason:
                unit.reasons[training] = str(reason)
        looked_into = [set(s.inlined) if s else set() for s in unit.schedules.values()]
        inlined.update(id(m.get_submodule(p)) for p in set.intersection(*looked_into))
        yield unit
    for name, child in m.named_children():
        yield from _units(_joined(path, name), child, seen, inlined)


def _is_unit(m: nn.Module) -> bool:
    """Whether ``m`` owns a convolution and a batch norm (a Sequential's children are its owner's), unpatched."""
    if fuses_itself(m) or type(m).forward is nn.Module.forward or is_norm(m):
        return False
    if m.__dict__.get("forward") is not None and not isinstance(m.__dict__["forward"], Forward):
        return False
    own = list(_own_children(m))
    return any(isinstance(c, nn.Conv2d) for c in own) and any(map(is_norm, own))


def _own_children(m: nn.Module) -> Iterator[nn.Module]:
    for child in m.children():
        yield child
        if _is_sequence(child) and not touched(child):
            yield from _own_children(child)


def _is_sequence(m: nn.Module) -> bool:
    return type(m).forward is nn.Sequential.forward


def _fused_convs(model: nn.Module, units: list[_Unit], training: bool) -> set[nn.Module]:
    """The convolutions that fused steps replace, in units and in this package's blocks."""
    convs: set[nn.Module] = set()
    for m in model.modules():
        if fuses_itself(m) == "block":
            convs.update(m.modules())
    for unit in units:
        found = unit.schedules[training]
        if found is not None:
            convs.update(map(unit.module.get_submodule, found.skipped))
    return convs


def _unit_schedule(m: nn.Module, training: bool) -> Schedule | None:
    try:
        return _schedule(m, training)
    except Untraceable:
        return None


def _schedule(m: nn.Module, training: bool) -> Schedule:
    """The unit's schedule: traced into all children without units, then only into those with a fused step inside."""
    first = schedule(m, _leaf, training=training)
    idle = set(first.idle)
    if not idle:
        return first
    second = schedule(m, lambda path, child: path in idle or _leaf(path, child), training=training)
    return second if len(second.fused) == len(first.fused) else first


def _leaf(path: str, m: nn.Module) -> bool:
    """Whether a child stays one call: torch's own layers, what a user hooked, and what contains units."""
    if touched(m) or is_frozen_bn(m):
        return True
    if _is_sequence(m):
        return _contains_unit(m) and not _is_unit(m)
    return type(m).__module__.startswith("torch.nn.") or _contains_unit(m)


def _contains_unit(m: nn.Module) -> bool:
    return any(fuses_itself(c) or _is_unit(c) for c in m.modules())


# ---------------------------------------------------------------- the report


@dataclass(frozen=True)
class Report:
    """What runs fused in a model and what does not. Prints as a table.

    ``fused``: module → (fused steps in eval, in training). ``left`` and ``left_training``: convolution, or module that
    could not be traced → why it runs as before. ``nhwc``: modules with NHWC activations inside, in the present mode.
    ``own``: blocks of resnet_fast, which fuse by themselves.
    """

    fused: dict[str, tuple[int, int]]
    left: dict[str, str]
    left_training: dict[str, str]
    nhwc: tuple[str, ...]
    own: tuple[str, ...]

    def __str__(self) -> str:
        from ..util.text import table

        rows: list[tuple[object, ...]] = [
            (path, *counts, "") for path, counts in self.fused.items()
        ]
        rows += [(path, "", "", "fuses by itself") for path in self.own]
        rows += [(path, "-", "", why) for path, why in self.left.items()]
        only_in_training = {
            path: why for path, why in self.left_training.items() if self.left.get(path) != why
        }
        rows += [(path, "", "-", f"in training: {why}") for path, why in only_in_training.items()]
        total = sum(eval_count for eval_count, _ in self.fused.values())
        inside = f"; NHWC inside {', '.join(self.nhwc)}" if self.nhwc else ""
        header = "module", "eval", "training", "left because"
        return f"{table(header, rows, right=(1, 2))}\n{total} fused steps in eval{inside}"


def accelerated(model: nn.Module) -> Report:
    """What ``accelerate`` did, or would do, to ``model`` as it is now, by module. The model is not changed."""
    _check("accelerated", model)
    found = list(_units("", model, set(), set()))
    counts = {u.path or "(model)": (u.count(False), u.count(True)) for u in found if u.fuses}
    own = tuple(path for path, m in model.named_modules() if fuses_itself(m) == "block")
    left, left_training = _left_unfused(found, False), _left_unfused(found, True)
    inside = islands(model, model.training, _fused_convs(model, found, model.training))
    return Report(counts, left, left_training, tuple(path or "(model)" for path in inside), own)
