"""One module's schedule bound to its live children: guards, the reasons against it, and the run."""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..dispatch import conv_out_hw
from ..graph.facts import function, touched
from ..graph.ir import Attribute, Schedule, Step, Value
from ..graph.liveness import dead_after
from .eligibility import Conv, Norm, uses_batch_statistics, why_plain
from .guards import ModuleGuard
from .step import batch_norm_act, fused_step


class UnitProgram:
    """One module's schedule for one mode, bound to the module objects that it was traced with.

    Without a fused step in the schedule it holds only the guard of the module itself.
    """

    def __init__(self, owner: nn.Module, schedule: Schedule | None, training: bool) -> None:
        self.guard = ModuleGuard(owner, training)
        self.schedule = schedule if schedule is not None and schedule.fused else None
        self.inlined: list[tuple[nn.Module, ModuleGuard]] = []
        if self.schedule is None:
            return
        paths = [path for path in schedule.inlined if path]
        self.inlined = [(m, ModuleGuard(m, training)) for m in map(owner.get_submodule, paths)]
        skipped = [owner.get_submodule(path) for path in schedule.skipped]
        self.biased = [
            m for m in skipped if m._parameters.get("bias") is not None and isinstance(m, nn.Conv2d)
        ]
        self.skipped = [m for m in skipped if m not in self.biased]
        value_names = dict.fromkeys((*schedule.inputs, *(step.output for step in schedule.steps)))
        slots = {name: slot for slot, name in enumerate(value_names)}
        self.size, self.inputs = len(slots), len(schedule.inputs)
        self.output = _getter(schedule.output, slots, owner)
        self.steps: list[tuple[Callable[[list], Any], int, list[int]]] = []
        # Dead values are dropped after each step, so that memory is freed when eager frees it.
        for step, dead in zip(
            schedule.steps, dead_after(schedule.steps, schedule.output), strict=True
        ):
            self.steps.append(
                (_bind(step, slots, owner), slots[step.output], [slots[name] for name in dead])
            )

    def changed(self, owner: nn.Module) -> bool:
        """Whether the modules are no longer as they were when they were traced."""
        return not self.guard.passes(owner) or any(not guard.passes(m) for m, guard in self.inlined)

    def why_plain(self, args: tuple) -> str | None:
        """Why the class's forward must run on these arguments, or None."""
        if self.schedule is None:
            return "there is nothing to fuse"
        if len(args) != self.inputs:
            return f"it was called with {len(args)} inputs, not {self.inputs}"
        return (
            why_plain(args[0], self.skipped)
            or next(filter(None, map(_why_plain_biased, self.biased)), None)
            or next(
                (f"a {type(m).__name__} has hooks" for m, _ in self.inlined if touched(m)), None
            )
            or next(
                (f"an input is a {type(a).__name__}" for a in args[1:] if type(a) is not Tensor),
                None,
            )
        )

    def __call__(self, *args: Tensor) -> Any:
        values: list[Any] = [*args, *[None] * (self.size - self.inputs)]
        del args
        for run, out, dead in self.steps:
            values[out] = run(values)
            for slot in dead:
                values[slot] = None
        return self.output(values)


def _why_plain_biased(conv: nn.Conv2d) -> str | None:
    """Why a convolution with a bias must run as it is, or None: the bias would become part of the batch norm's mean."""
    if type(conv) is not nn.Conv2d or touched(conv):
        return "a Conv2d was replaced or has hooks"
    if any(type(p) not in (nn.Parameter, Tensor) for p in conv._parameters.values()):
        return "a Conv2d's weight or bias is pruned, parametrised or a tensor subclass"
    return None


# ---------------------------------------------------------------- steps as callables over the list of values


def _getter(structure: Any, slots: dict[str, int], owner: nn.Module) -> Callable[[list], Any]:
    """A function that fills the nested structure from the values and the owner's live attributes.

    It builds closures once; ``graph.tree.mapped`` would walk the structure in each call.
    """
    if isinstance(structure, Value):
        return itemgetter(slots[structure.name])
    if isinstance(structure, Attribute):
        path, _, name = structure.path.rpartition(".")
        holder = owner.get_submodule(path)
        return lambda values: getattr(holder, name)
    if isinstance(structure, (tuple, list)):
        parts = [_getter(part, slots, owner) for part in structure]
        kind = type(structure)
        return lambda values: kind([part(values) for part in parts])
    if isinstance(structure, dict):
        entries = [(key, _getter(part, slots, owner)) for key, part in structure.items()]
        mapping = type(structure)
        return lambda values: mapping([(key, part(values)) for key, part in entries])
    if isinstance(structure, slice):
        bounds = _getter((structure.start, structure.stop, structure.step), slots, owner)
        return lambda values: slice(*bounds(values))
    return lambda values: structure


def _bind(step: Step, slots: dict[str, int], owner: nn.Module) -> Callable[[list], Any]:
    """The step as a function of the list of values."""
    if step.op == "conv_bn_act":
        return _bind_conv(step, slots, owner)
    if step.op == "add_act":
        return _bind_add(step, slots)
    call = owner.get_submodule(step.target) if step.op == "module" else function(step.target)
    if len(step.args) == 1 and isinstance(step.args[0], Value) and not step.kwargs:
        only = slots[step.args[0].name]
        return lambda values: call(values[only])
    args, kwargs = _getter(step.args, slots, owner), _getter(step.kwargs, slots, owner)
    return lambda values: call(*args(values), **kwargs(values))


def _bind_conv(step: Step, slots: dict[str, int], owner: nn.Module) -> Callable[[list], Tensor]:
    conv_path, bn_path = step.modules[:2]
    conv: Conv = owner.get_submodule(conv_path)
    bn: Norm = owner.get_submodule(bn_path)
    x_slot, act = slots[step.args[0].name], step.act
    fused = fused_step if conv.bias is None else _biased_fused_step
    if step.residual is None:
        return lambda values: fused(conv, bn, values[x_slot], None, act)
    residual_slot = slots[step.residual.name]
    fitting: dict[tuple[torch.Size, torch.Size], bool] = {}

    def run(values: list) -> Tensor:
        x, residual = values[x_slot], values[residual_slot]
        if type(residual) is Tensor and residual.dtype is _result_dtype(x):
            key = x.shape, residual.shape
            if key not in fitting:
                fitting[key] = residual.shape == output_shape(conv, x)
            if fitting[key]:
                return fused(conv, bn, x, residual, act)
        # an addition that broadcasts or promotes is torch's
        out = fused(conv, bn, x, None, "none") + residual
        return torch.relu(out) if act == "relu" else out

    return run


def _biased_fused_step(
    conv: Conv, bn: Norm, x: Tensor, residual: Tensor | None, act: str
) -> Tensor:
    """``fused_step`` for a convolution with a bias: BN(z + b) with statistics μ is BN(z) with statistics μ − b."""
    if uses_batch_statistics(bn):
        return batch_norm_act(
            bn, conv._conv_forward(x, own_strides(conv.weight), conv.bias), residual, act
        )
    return ops.conv_bn_act(
        x,
        conv.weight,
        bn.weight,
        bn.bias,
        residual,
        mean=bn.running_mean - conv.bias,
        var=bn.running_var,
        eps=bn.eps,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
        act=act,
    )


def own_strides(t: Tensor) -> Tensor:
    """The tensor through a flat view that makes its gradient contiguous, which an NHWC convolution's is not."""
    return t.reshape(-1).view(t.shape) if t.requires_grad and t.is_contiguous() else t


def _result_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def output_shape(conv: Conv, x: Tensor) -> tuple[int, ...]:
    """The shape of ``conv(x)``."""
    sizes = conv_out_hw(x.shape, conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    return (x.shape[0], conv.out_channels, *sizes)


def _bind_add(step: Step, slots: dict[str, int]) -> Callable[[list], Any]:
    """``ops.add_act`` for two images of one shape and dtype; torch's operations for all else (broadcasts, sizes)."""
    x_slot, y_slot = (slots[v.name] for v in step.args)
    gate_slot, act = slots[step.gate.name] if step.gate else None, step.act

    def run(values: list) -> Any:
        x, y = values[x_slot], values[y_slot]
        gate = None if gate_slot is None else values[gate_slot]
        if gate is not None:
            x, gate = (gate, x) if _is_gate(x, gate) else (x, _unexpanded(gate))
        if _are_images(x, y) and (gate is None or _is_gate(gate, x)):
            return ops.add_act(x, y, gate, act=act)
        out = (x if gate is None else x * gate) + y
        return torch.relu(out) if act == "relu" else out

    return run


def _are_images(x: Any, y: Any) -> bool:
    return (
        type(x) is Tensor
        and type(y) is Tensor
        and x.dim() == 4
        and x.shape == y.shape
        and x.dtype == y.dtype
    )


def _unexpanded(gate: Any) -> Any:
    """One factor for each image and channel, if the gate was expanded to all pixels."""
    expanded = type(gate) is Tensor and gate.dim() == 4 and gate.stride()[2:] == (0, 0)
    return gate[:, :, :1, :1] if expanded else gate


def _is_gate(gate: Any, x: Any) -> bool:
    return (
        type(gate) is Tensor
        and type(x) is Tensor
        and x.dim() == 4
        and gate.dtype == x.dtype
        and gate.shape == (x.shape[0], x.shape[1], 1, 1)
    )
