"""Cached program for one network's inference pass over its live modules.

It has no weights of its own: packed filters are those of ``kernels/prepack``, other tensors are the modules'. It is
dropped when a module, parameter or buffer that it was built from changes (``guards``), or a packed filter by one byte.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ..dispatch import choose, describe
from ..graph.ir import Step, Value
from ..graph.network import Lowered, live_network
from ..kernels import prepack
from ..kernels.vendor import onednn_takes
from ..runtime.bind import Bound, ConvCall, Values, bind, bind_conv
from ..runtime.program import Program
from .eligibility import Conv, Norm
from .guards import ModuleGuards
from .unit_program import output_shape

SHAPES = 8  # programs of one network, oldest out


class Unfit(ValueError):
    """A network has no program. The message says why."""


class NetworkProgram:
    """The programs of one network in inference, one for each input shape. Raises Unfit for a network that has none.

    ``freed`` is called when memory of packed weights is freed, by ``.to("cuda")`` for example. ``imagewise``: a batch
    may go through in pieces. ``inside``: the modules inside the network, which itself is not referenced.
    """

    def __init__(
        self, network: nn.Module, inside: list[nn.Module], freed: Callable[[], None]
    ) -> None:
        self.inside = tuple(inside)
        # First: a change while the rest is read then fails the next pass's guards.
        self._guards = ModuleGuards(network, self.inside)
        try:
            self._lowered = live_network(network)
        except ValueError as reason:
            raise Unfit(str(reason)) from None
        if not isinstance(self._lowered.output, Value):
            raise Unfit("it returns something else than one value")
        self._filters: dict[str, tuple[nn.Conv2d, prepack.PackedFilter]] = {}
        for step in self._lowered.steps:
            if step.op == "conv_bn_act":
                conv_path, bn_path = step.modules[:2]
                conv: Conv = network.get_submodule(conv_path)
                bn: Norm = network.get_submodule(bn_path)
                self._filters[step.output] = conv, _packed_filter(conv, bn)
        # A network that moved to a GPU, or to another dtype, may never run here again and check its guards.
        storages = [conv.weight.untyped_storage() for conv, _ in self._filters.values()]
        self._memory = [weakref.ref(storage, lambda _: freed()) for storage in storages]
        self._places = prepack.all_places(
            dict.fromkeys(packs for _, packs in self._filters.values())
        )
        self.imagewise = self._lowered.imagewise
        self._programs: dict[tuple, Program | None] = {}

    def guards_pass(self, network: nn.Module) -> bool:
        """Whether modules, attributes and tensors are the same as before, and packed weights byte for byte."""
        return self._guards.pass_for(network) and prepack.same_bytes(self._places)

    def refuses(self, x: Tensor) -> bool:
        """Whether it is known that such an input has no program."""
        return self._programs.get((x.shape, x.dtype), self) is None

    def refuse(self, x: Tensor) -> None:
        """Remember that such an input has no program."""
        self._remember((x.shape, x.dtype), None)

    def __call__(self, x: Tensor) -> Tensor | None:
        """The answer; None for an input that has no program or does not fit: the forward then raises in its words."""
        x = x.contiguous(memory_format=torch.channels_last)
        key = x.shape, x.dtype
        if key in self._programs:
            program = self._programs[key]
            return None if program is None else program(x)
        try:
            program = Program(self._lowered, x, binder=self._bind)
        except ValueError:  # Unfit among them
            self._remember(key, None)
            return None
        answer, program.answer = program.answer, None
        if not isinstance(answer, Tensor) or answer.dim() > 2 or not answer.is_contiguous():
            raise Unfit("its result's strides or structure would show that it is NHWC inside")
        self._remember(key, program)
        return answer

    def _remember(self, key: tuple, program: Program | None) -> None:
        if len(self._programs) >= SHAPES:
            self._programs.pop(next(iter(self._programs)), None)
        self._programs[key] = program

    def _bind(
        self, lowered: Lowered, step: Step, values: Values, writable: set[str], graph: bool
    ) -> Bound:
        """Bind a convolution to the live weights' packs; every other step as a plan does. Raises Unfit."""
        if step.op != "conv_bn_act":
            return bind(lowered, step, values, writable, graph)
        conv, packs = self._filters[step.output]
        x = values[step.args[0].name]
        residual = None if step.residual is None else values[step.residual.name]
        if not onednn_takes(x, conv.weight):
            raise Unfit(f"oneDNN has no packed form of {step.target}")
        if residual is not None and (
            residual.dtype != x.dtype or residual.shape != output_shape(conv, x)
        ):
            raise Unfit(f"the residual of {step.target} broadcasts or promotes")
        geometry = conv.stride, conv.padding, conv.dilation, conv.groups
        _, *vectors = packs.snapshot
        scale, shift, mean, var = vectors if len(vectors) == 4 else (*vectors, None, None)
        args = x, conv.weight, scale, shift, residual, mean, var, 0.0, *geometry, step.act
        problem = describe("conv_bn_act", args)
        packed = partial(packs.pack, x.shape, *geometry)
        call = ConvCall.of(step, problem, geometry, None, packed, values, conv.weight, writable)
        return bind_conv(call, *choose(problem))


def _packed_filter(conv: nn.Conv2d, bn: Norm) -> prepack.PackedFilter:
    vectors = bn.weight, bn.bias, bn.running_mean, bn.running_var
    if conv.bias is not None or not prepack.packable(conv.weight, *vectors):
        raise Unfit("a convolution has a bias, or weights that are not contiguous")
    return prepack.current_pack(conv.weight, *vectors, bn.eps)
