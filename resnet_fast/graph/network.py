"""A whole network lowered to steps over a snapshot of its weights, or the reason why it cannot be."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..live.eligibility import is_frozen_bn
from .facts import touched
from .functional import as_function, attribute, attributes
from .ir import Schedule, Step
from .weights import Filter, _shared


@dataclass
class Lowered:
    """Steps that refer to nothing but ``filters`` (by step output), ``tensors`` (by path) and copies of ``modules`` that stay one call."""

    steps: tuple[Step, ...]
    inputs: tuple[str, ...]
    output: Any
    filters: dict[str, Filter]
    tensors: dict[str, Tensor]
    modules: dict[str, nn.Module]

    def shared(self) -> Lowered:
        """The same, but what a living plan holds with the very same values is taken from it: plans of one model share weights."""
        return replace(
            self,
            filters={name: _shared(mine) for name, mine in self.filters.items()},
            tensors={path: _shared(mine) for path, mine in self.tensors.items()},
        )

    def to(self, device: torch.device) -> Lowered:
        """The same over weights on that device."""
        filters = {k: Filter(f.weight.to(device), f.bias.to(device), f.geometry) for k, f in self.filters.items()}
        tensors = {k: t.to(device) for k, t in self.tensors.items()}
        modules = {k: copy.deepcopy(m).to(device) for k, m in self.modules.items()}
        return replace(self, filters=filters, tensors=tensors, modules=modules).shared()


# What a plan, NHWC inside, would answer otherwise.
_SEES_STRIDES = {
    "as_strided",
    "stride",
    "is_contiguous",
    "data_ptr",
    "storage",
    "untyped_storage",
    "storage_offset",
    "numpy",
}


def refused(model: nn.Module, found: Schedule | None = None) -> dict[str, str]:
    """What of ``model``, and of its schedule once there is one, cannot be planned: module or step → why."""
    why = {
        path or type(model).__name__: "a batch norm without running statistics normalises with each batch's own"
        for path, m in model.named_modules()
        if isinstance(m, nn.BatchNorm2d) and not is_frozen_bn(m) and m.running_mean is None
    }
    if touched(model):
        why[type(model).__name__] = "the model itself has hooks or a forward of its own, which a plan would not call"
    if found is not None:
        why |= {name: "it writes in place what is read later by another name" for name in found.entangled}
        for step in found.steps:
            asked = step.args[1] if step.target == "builtins.getattr" else step.target.rpartition(".")[2]
            if step.op == "function" and asked in _SEES_STRIDES:
                why[step.output] = f"{asked} asks how a tensor lies in memory, and a plan's lie otherwise"
    return why


def lower(found: Schedule, model: nn.Module, dtype: torch.dtype, device: torch.device) -> Lowered:
    """Fold every convolution, turn torch's layers into functions over copied tensors, and copy what stays a module."""
    filters: dict[str, Filter] = {}
    tensors: dict[str, Tensor] = {}
    modules: dict[str, nn.Module] = {}
    steps: list[Step] = []
    with torch.inference_mode(False), torch.no_grad():
        for step in found.steps:
            if step.op == "conv_bn_act":
                conv, bn = (model.get_submodule(path) if path else None for path in step.modules[:2])
                filters[step.output] = _filter(conv, bn, dtype, device)
            step = as_function(step, model)
            if step.op == "module":
                modules[step.target] = _copy(model.get_submodule(step.target)).to(device, dtype)
            steps.append(step)
        for path in dict.fromkeys(attributes((found.output, *((step.args, step.kwargs) for step in steps)))):
            tensor = attribute(model, path).detach().to(device, copy=True)
            tensors[path] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return Lowered(tuple(steps), found.inputs, found.output, filters, tensors, modules).shared()


def _filter(conv: nn.Conv2d, bn: nn.Module | None, dtype: torch.dtype, device: torch.device) -> Filter:
    """Folded in float64 and rounded once."""
    weight = conv.weight.detach().to(device, torch.float64)
    bias = weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias.detach().to(weight)
    if bn is not None:
        gamma, beta, mean, var = (v.detach().to(weight) for v in (bn.weight, bn.bias, bn.running_mean, bn.running_var))
        scale = gamma / torch.sqrt(var + bn.eps)
        weight, bias = weight * scale.view(-1, 1, 1, 1), (bias - mean) * scale + beta
    weight = weight.to(dtype).contiguous(memory_format=torch.channels_last)
    return Filter(weight, bias.to(dtype), (conv.stride, conv.padding, conv.dilation, conv.groups))


def _copy(m: nn.Module) -> nn.Module:
    """A module of its own for the plan, in eval; it may not write to what other steps read."""
    m = copy.deepcopy(m).eval()
    if getattr(m, "inplace", False) is True:
        m.inplace = False
    return m
