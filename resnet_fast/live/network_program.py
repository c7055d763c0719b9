"""A network's inference pass as a program over its live modules: what a plan does, but true to every edit.

It holds no weights of its own: packed filters are those of ``fold``, everything else is the modules' own tensors. Before each pass
``holds`` says whether modules and tensors are still the objects that it was made of (``made``), and the packed ones byte for byte.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ..dispatch import choose, describe
from ..graph.facts import is_norm, touched
from ..graph.functional import as_function, attribute, attributes
from ..graph.fuse import schedule
from ..graph.ir import Step, Value
from ..graph.liveness import imagewise
from ..graph.network import Lowered, refused
from ..graph.trace import Untraceable
from ..kernels import prepack
from ..kernels.vendor import onednn_takes
from ..runtime.bind import Bound, ConvCall, Values, bind, bind_conv
from ..runtime.program import Program
from .guards import Made
from .unit_program import output_shape

SHAPES = 8  # programs kept for each network, oldest out


class Kept:
    """The programs of one network in inference, one for each input shape. Raises Unfit for a network that has none.

    ``forget`` is called when memory of packed weights is freed, by ``.to("cuda")`` say.
    ``imagewise``: a batch may go through in pieces; ``inside``: the modules inside ``owner``, itself not held.
    """

    def __init__(self, owner: nn.Module, inside: list[nn.Module], forget: Callable[[], None]) -> None:
        self.inside = tuple(inside)
        self._made = Made(owner, self.inside)  # first: what changes while the rest is read is seen by the next pass
        try:
            found = schedule(owner, _leaf, training=False)
            steps = tuple(as_function(step, owner) for step in found.steps)
        except (Untraceable, ValueError) as reason:
            raise Unfit(str(reason)) from None
        if len(found.inputs) != 1 or not isinstance(found.output, Value) or refused(owner, found):
            raise Unfit("a plan of it would be refused, or it answers with something else than one value")
        tensors = {path: attribute(owner, path) for step in steps for path in attributes((step.args, step.kwargs))}
        called = {step.target: owner.get_submodule(step.target) for step in steps if step.op == "module"}
        self._lowered = Lowered(steps, found.inputs, found.output, {}, tensors, called)
        self._filters = {
            step.output: _filter(*(owner.get_submodule(path) for path in step.modules[:2]))
            for step in steps
            if step.op == "conv_bn_act"
        }
        entries = dict.fromkeys(entry for _, entry in self._filters.values())
        # A network that moved to a GPU, or to another dtype, may never come back to ask whether this still holds.
        self._memory = [
            weakref.ref(conv.weight.untyped_storage(), lambda _: forget()) for conv, _ in self._filters.values()
        ]
        self._places = prepack.all_places(entries)
        self.imagewise = imagewise(steps, found.output)
        self._programs: dict[tuple, Program | None] = {}

    def holds(self, owner: nn.Module) -> bool:
        """Whether the modules are made as they were, over the same tensors, with the same bytes where these were packed."""
        return self._made.holds(owner) and prepack.same_bytes(self._places)

    def refuses(self, x: Tensor) -> bool:
        """Whether it is known that such an input has no program."""
        return self._programs.get((x.shape, x.dtype), self) is None

    def refuse(self, x: Tensor) -> None:
        """Make it known."""
        self._remember((x.shape, x.dtype), None)

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
        self._remember(key, program)
        return answer

    def _remember(self, key: tuple, program: Program | None) -> None:
        if len(self._programs) >= SHAPES:
            self._programs.pop(next(iter(self._programs)), None)
        self._programs[key] = program

    def _bind(self, lowered: Lowered, step: Step, values: Values, writable: set[str], graph: bool) -> Bound:
        if step.op != "conv_bn_act":
            return bind(lowered, step, values, writable, graph)
        conv, entry = self._filters[step.output]
        x = values[step.args[0].name]
        residual = None if step.residual is None else values[step.residual.name]
        if not onednn_takes(x, conv.weight):
            raise Unfit(f"oneDNN has no packed form of {step.target}")
        if residual is not None and (residual.dtype != x.dtype or residual.shape != output_shape(conv, x)):
            raise Unfit(f"the residual of {step.target} broadcasts or promotes")
        geometry = conv.stride, conv.padding, conv.dilation, conv.groups
        vectors = entry.snapshot[1:] if len(entry.snapshot) == 5 else (*entry.snapshot[1:], None, None)
        problem = describe(
            "conv_bn_act", (x, conv.weight, *vectors[:2], residual, *vectors[2:], 0.0, *geometry, step.act)
        )
        packed = partial(entry.pack, x.shape, *geometry)
        call = ConvCall.of(step, problem, geometry, None, packed, values, conv.weight, writable)
        return bind_conv(call, *choose(problem))


def _filter(conv: nn.Conv2d, bn: nn.Module) -> tuple[nn.Conv2d, prepack.PackedFilter]:
    vectors = bn.weight, bn.bias, bn.running_mean, bn.running_var
    if conv.bias is not None or not prepack.packable(conv.weight, *vectors):
        raise Unfit("a convolution has a bias, or weights whose bytes do not lie in one run")
    return conv, prepack.current_pack(conv.weight, *vectors, bn.eps)


def _leaf(path: str, m: nn.Module) -> bool:
    return touched(m) or is_norm(m) or type(m).__module__.startswith("torch.nn.") and type(m) is not nn.Sequential


class Unfit(ValueError):
    """Why a pass cannot be kept."""
