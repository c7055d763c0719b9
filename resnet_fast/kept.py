"""A network's inference pass as a program over its live modules: what a plan does, but true to every edit.

It holds no weights of its own: packed filters are those of ``fold``, everything else is the modules' own tensors. ``describes`` says
whether modules and tensors are still the objects that it was made of; ``whole`` compares the bytes before each pass.
"""

from __future__ import annotations

from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from . import fold
from .bound import Part, output_shape
from .buffers import imagewise
from .kernels.aten import onednn_takes
from .nodes import is_norm, touched
from .planned import Lowered, as_function, attribute, attributes, refused
from .problem import Problem
from .program import Program, Run, Values, bind, bind_onednn
from .schedule import Step, Value, schedule
from .tracing import Untraceable

SHAPES = 8  # programs kept for each network, oldest out


class Unfit(ValueError):
    """Why a pass cannot be kept."""


class Kept:
    """The programs of one network in inference, one for each input shape. Raises Unfit for a network that has none."""

    def __init__(self, owner: nn.Module, inside: list[nn.Module]) -> None:
        try:
            found = schedule(owner, _leaf, training=False)
            steps = tuple(as_function(step, owner) for step in found.steps)
        except (Untraceable, ValueError) as reason:
            raise Unfit(str(reason)) from None
        if len(found.inputs) != 1 or not isinstance(found.output, Value) or refused(owner, found):
            raise Unfit("a plan of it would be refused, or it answers with something else than one value")
        self._inside, modules = inside, (owner, *inside)
        self._own = Part(owner, False)  # not the owner itself, with which this is to die
        self._parts = [(m, Part(m, False)) for m in inside]
        self._forwards = [(m.__dict__, m.__dict__.get("forward")) for m in inside]
        self._held = [(tensors, key, t, _place(t)) for m in modules for tensors in (m._parameters, m._buffers) for key, t in tensors.items()]
        tensors = {path: attribute(owner, path) for step in steps for path in attributes((step.args, step.kwargs))}
        called = {step.target: owner.get_submodule(step.target) for step in steps if step.op == "module"}
        self._lowered = Lowered(steps, found.inputs, found.output, {}, tensors, called)
        self._pairs = {step.output: tuple(owner.get_submodule(path) for path in step.modules[:2])
                       for step in steps if step.op == "conv_bn_act"}
        self.imagewise = imagewise(steps, found.output)
        self._programs: dict[tuple, Program | None] = {}

    def describes(self, owner: nn.Module, inside: list[nn.Module]) -> bool:
        """Whether these are still the modules, made as they were, over the same tensors in the same places."""
        return (self._own.holds(owner) and len(inside) == len(self._inside) and all(map(is_, inside, self._inside))
                and all(part.holds(m) for m, part in self._parts)
                and all(attributes.get("forward") is forward for attributes, forward in self._forwards)
                and all(tensors.get(key) is t and _place(t) == place for tensors, key, t, place in self._held))

    def __call__(self, x: Tensor) -> Tensor | None:
        """The answer; None for an input that has no program, or that does not fit the network, whose forward then says so in its own words."""
        x = x.contiguous(memory_format=torch.channels_last)
        key = x.shape, x.dtype
        if key in self._programs:
            program = self._programs[key]
            return None if program is None else program(x)
        try:
            program = Program(self._lowered, x, binder=self._bind)
        except ValueError:  # Unfit among them
            program = answer = None
        else:
            answer, program.answer = program.answer, None
            if not isinstance(answer, Tensor) or answer.dim() > 2 or not answer.is_contiguous():
                raise Unfit("its result's strides or structure would show how it lies inside")
        if len(self._programs) >= SHAPES:
            self._programs.pop(next(iter(self._programs)))
        self._programs[key] = program
        return answer

    def _bind(self, lowered: Lowered, step: Step, values: Values, writable: set[str], graph: bool) -> tuple[Run, str, str, Problem | None]:
        if step.op != "conv_bn_act":
            return bind(lowered, step, values, writable, graph)
        conv, bn = self._pairs[step.output]
        x, weight = values[step.args[0].name], conv.weight
        vectors = bn.weight, bn.bias, bn.running_mean, bn.running_var
        residual = None if step.residual is None else values[step.residual.name]
        if conv.bias is not None or not onednn_takes(x, weight) or not fold.packable(weight, *vectors):
            raise Unfit(f"oneDNN has no packed form of {step.target}")
        if residual is not None and (residual.dtype != x.dtype or residual.shape != output_shape(conv, x)):
            raise Unfit(f"the residual of {step.target} broadcasts or promotes")
        geometry = conv.stride, conv.padding, conv.dilation, conv.groups
        packs = fold.packed(x, weight, *vectors, bn.eps, *geometry)
        if packs is None:
            raise Unfit(f"a factor of {step.target} is not finite")
        in_place = residual is not None and step.residual.name in writable and not residual.is_contiguous()
        return bind_onednn(step, *packs, geometry, in_place), "aten (oneDNN)", "", None


def _leaf(path: str, m: nn.Module) -> bool:
    return touched(m) or is_norm(m) or type(m).__module__.startswith("torch.nn.") and type(m) is not nn.Sequential


def _place(t: Tensor | None) -> tuple[Any, ...] | None:
    return None if t is None else (t.data_ptr(), t.stride(), t.dtype)

