"""What a plan is made of: weights folded once, steps as plain data over them, and steps bound to kernels for one input shape."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bound import names, references
from .dispatch import choose, describe
from .kernels.aten import onednn_takes
from .nodes import function
from .path import is_frozen_bn
from .schedule import Attribute, Schedule, Step, Value


class Filter:
    """One convolution's folded weight (NHWC) and bias in the plan's dtype, the affine apart for kernels that want it, and oneDNN's packs."""

    def __init__(self, weight: Tensor, bias: Tensor, geometry: tuple) -> None:
        self.weight, self.bias, self.geometry = weight, bias, geometry
        self.packs: dict[bool, Tensor] = {}

    def packed(self, x: Tensor) -> Tensor:
        """The weight as oneDNN wants it for this batch: one pack for batch 1, one for larger ones (see fold.py)."""
        several = x.shape[0] > 1
        if several not in self.packs:
            stride, padding, dilation, groups = self.geometry
            with torch.inference_mode(False), torch.no_grad():
                self.packs[several] = torch.ops.mkldnn._reorder_convolution_weight(
                    self.weight.contiguous(), padding, stride, dilation, groups, x.shape)
        return self.packs[several]

    def same(self, other: Filter) -> bool:
        """Whether another plan's filter may serve here too."""
        return (self.geometry == other.geometry and self.weight.device == other.weight.device and self.weight.dtype == other.weight.dtype
                and torch.equal(self.weight, other.weight) and torch.equal(self.bias, other.bias))


# ---------------------------------------------------------------- lowering: a schedule over a model → steps over weights

class Lowered:
    """Steps that refer to nothing but ``filters`` (by step output), ``tensors`` (by path) and copies of ``modules`` that stay one call."""

    def __init__(self, steps: tuple[Step, ...], inputs: tuple[str, ...], output: Any, filters: dict[str, Filter],
                 tensors: dict[str, Tensor], modules: dict[str, nn.Module]) -> None:
        self.steps, self.inputs, self.output = steps, inputs, output
        self.filters, self.tensors, self.modules = filters, tensors, modules


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
            elif step.op == "module":
                step = _as_function(step, model.get_submodule(step.target))
            if step.op == "module":
                modules[step.target] = copy.deepcopy(model.get_submodule(step.target)).eval().to(device, dtype)
            for path in _attributes((step.args, step.kwargs)):
                tensor = _attribute(model, path).detach().to(device, copy=True)
                tensors[path] = tensor.to(dtype) if tensor.is_floating_point() else tensor
            steps.append(step)
    return Lowered(tuple(steps), found.inputs, found.output, filters, tensors, modules)


def _filter(conv: nn.Conv2d, bn: nn.Module | None, dtype: torch.dtype, device: torch.device) -> Filter:
    """Folded in float64 and rounded once."""
    weight = conv.weight.detach().to(device, torch.float64)
    bias = weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias.detach().to(weight)
    if bn is not None:
        if bn.running_mean is None:
            raise ValueError("plan: a batch norm without running statistics normalises with each batch's own: nothing to fold")
        gamma, beta, mean, var = (v.detach().to(weight) for v in (bn.weight, bn.bias, bn.running_mean, bn.running_var))
        scale = gamma / torch.sqrt(var + bn.eps)
        weight, bias = weight * scale.view(-1, 1, 1, 1), (bias - mean) * scale + beta
    weight = weight.to(dtype).contiguous(memory_format=torch.channels_last)
    return Filter(weight, bias.to(dtype), (conv.stride, conv.padding, conv.dilation, conv.groups))


_FUNCTIONS: dict[type, Callable[[nn.Module, str], tuple[str, tuple, dict]]] = {
    nn.MaxPool2d: lambda m, p: ("torch.nn.functional.max_pool2d", (m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode), {}),
    nn.AvgPool2d: lambda m, p: ("torch.nn.functional.avg_pool2d", (m.kernel_size, m.stride, m.padding, m.ceil_mode,
                                                                   m.count_include_pad, m.divisor_override), {}),
    nn.AdaptiveAvgPool2d: lambda m, p: ("torch.nn.functional.adaptive_avg_pool2d", (m.output_size,), {}),
    nn.Linear: lambda m, p: ("torch.nn.functional.linear", (Attribute(f"{p}.weight"), None if m.bias is None else Attribute(f"{p}.bias")), {}),
    nn.Flatten: lambda m, p: ("torch.flatten", (m.start_dim, m.end_dim), {}),
    nn.ReLU: lambda m, p: ("torch.nn.functional.relu", (), {}),
    nn.ReLU6: lambda m, p: ("torch.nn.functional.relu6", (), {}),
    nn.SiLU: lambda m, p: ("torch.nn.functional.silu", (), {}),
    nn.Sigmoid: lambda m, p: ("torch.sigmoid", (), {}),
    nn.Dropout: lambda m, p: ("torch.nn.functional.dropout", (m.p, False), {}),
}


def _as_function(step: Step, m: nn.Module) -> Step:
    """A layer of torch's as a call of its function, which is data; anything else, or anything hooked, stays a module."""
    make = _FUNCTIONS.get(type(m))
    if make is None or len(step.args) != 1 or step.kwargs or m._forward_hooks or m._forward_pre_hooks:
        return step
    name, args, kwargs = make(m, step.target)
    return replace(step, op="function", target=name, args=(*step.args, *args), kwargs=kwargs)


def _attributes(structure: Any) -> list[str]:
    if isinstance(structure, Attribute):
        return [structure.path]
    if isinstance(structure, dict):
        structure = tuple(structure.values())
    if isinstance(structure, (tuple, list)) and not isinstance(structure, Value):
        return [path for part in structure for path in _attributes(part)]
    return []


def _attribute(model: nn.Module, path: str) -> Tensor:
    owner, _, name = path.rpartition(".")
    return getattr(model.get_submodule(owner), name)


def why_unplanned(step: Step, m: nn.Module | None) -> str:
    """Why a step is not fused, for the report."""
    return f"{type(m).__name__} runs as it is" if m is not None else "a function of torch's"


def unplannable(model: nn.Module) -> dict[str, str]:
    """Modules that a plan cannot fuse for what they are: their path and the reason."""
    return {path: "a batch norm without running statistics" for path, m in model.named_modules()
            if isinstance(m, nn.BatchNorm2d) and not is_frozen_bn(m) and m.running_mean is None}


# ---------------------------------------------------------------- binding: steps → callables for one input shape

Run = Callable[[dict[str, Any]], Any]


def bind(lowered: Lowered, step: Step, values: dict[str, Any], dies: set[str]) -> tuple[Run, str, str]:
    """(callable over the values, kernel, why) of one step, for the shapes that ``values`` has."""
    if step.op == "conv_bn_act":
        return _bind_conv(lowered.filters[step.output], step, values, dies)
    if step.op == "add_act":
        return _bind_add(step), "torch", "add and activation"
    call = lowered.modules[step.target] if step.op == "module" else function(step.target)

    def run(values: dict[str, Any]) -> Any:
        return call(*fill(step.args, values, lowered.tensors), **fill(step.kwargs, values, lowered.tensors))

    return run, "torch", f"{step.op} {step.target}"


def fill(structure: Any, values: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    """The structure with values and tensors in place of references."""
    if isinstance(structure, Value):
        return values[structure.name]
    if isinstance(structure, Attribute):
        return tensors[structure.path]
    if isinstance(structure, (tuple, list)):
        return type(structure)(fill(part, values, tensors) for part in structure)
    if isinstance(structure, dict):
        return {key: fill(part, values, tensors) for key, part in structure.items()}
    return structure


def _bind_conv(f: Filter, step: Step, values: dict[str, Any], dies: set[str]) -> tuple[Run, str, str]:
    x_name, act = step.args[0].name, step.act
    x = values[x_name]
    wanted = f.weight.shape[1] * f.geometry[3]
    if x.shape[1] != wanted or min(conv_shape(f, x)[2:]) < 1:
        raise ValueError(f"plan: step {step.output} ({step.target}) does not fit this input: got {list(x.shape)}, expected {wanted} channels "
                         f"and at least one output pixel for filters of {list(f.weight.shape)}")
    residual = None if step.residual is None else values[step.residual.name]
    if residual is not None and tuple(residual.shape) != conv_shape(f, x):
        plain = _conv_then_add(f, step)
        return plain, "torch", "the residual broadcasts"
    ones = torch.ones(f.bias.shape, dtype=torch.promote_types(f.bias.dtype, torch.float32), device=f.bias.device)
    args = (x, f.weight, ones, f.bias.to(ones.dtype), residual, None, None, 0.0, *f.geometry, act)
    chosen, why = choose(describe("conv_bn_act", args))
    if chosen.id != "aten.conv_bn_act":
        rest = (*args[1:4], None, None, 0.0, *f.geometry, act)
        name = step.residual.name if step.residual else None
        return (lambda v: chosen.fn(v[x_name], *rest[:3], v[name] if name else None, *rest[3:])), chosen.id, why
    in_place = residual is not None and step.residual.name in dies and residual.dtype == x.dtype
    if onednn_takes(x, f.weight):
        # One pixel or one channel is NCHW and NHWC at once: torch 2.11 cannot fuse the add then.
        in_place = in_place and not residual.is_contiguous()
        return _bind_onednn(f, step, x, in_place), "aten (oneDNN)", why
    return _bind_torch(f, step, in_place), "aten", why


def _bind_onednn(f: Filter, step: Step, x: Tensor, in_place: bool) -> Run:
    """oneDNN with bias and add fused (the add in the residual's own memory where nobody reads it again); ReLU in place keeps NaN."""
    x_name, relu = step.args[0].name, step.act == "relu"
    weight, bias, (stride, padding, dilation, groups) = f.packed(x), f.bias, f.geometry
    conv, conv_ = torch.ops.mkldnn._convolution_pointwise, torch.ops.mkldnn._convolution_pointwise_
    if step.residual is None:
        def run(v: dict[str, Any]) -> Tensor:
            out = conv(v[x_name], weight, bias, padding, stride, dilation, groups, "none", [], "")
            return out.relu_() if relu else out
        return run
    name = step.residual.name

    def run_add(v: dict[str, Any]) -> Tensor:
        if in_place:
            out = conv_.binary(v[name], v[x_name], weight, bias, padding, stride, dilation, groups, "add", None, None, [], None)
        else:
            out = conv(v[x_name], weight, bias, padding, stride, dilation, groups, "none", [], "").add_(v[name])
        return out.relu_() if relu else out

    return run_add


def _bind_torch(f: Filter, step: Step, in_place: bool) -> Run:
    x_name, relu = step.args[0].name, step.act == "relu"
    name = step.residual.name if step.residual else None

    def run(v: dict[str, Any]) -> Tensor:
        out = F.conv2d(v[x_name], f.weight, f.bias, *f.geometry)
        if name is not None:
            out = v[name].add_(out) if in_place else out.add_(v[name])
        return out.relu_() if relu else out

    return run


def _conv_then_add(f: Filter, step: Step) -> Run:
    x_name, name = step.args[0].name, step.residual.name

    def run(v: dict[str, Any]) -> Tensor:
        out = F.conv2d(v[x_name], f.weight, f.bias, *f.geometry) + v[name]
        return out.relu_() if step.act == "relu" else out

    return run


def conv_shape(f: Filter, x: Tensor) -> tuple[int, ...]:
    """Shape of the convolution's result."""
    stride, padding, dilation, _ = f.geometry
    sizes = [(i + 2 * p - d * (k - 1) - 1) // s + 1 for i, p, d, k, s in
             zip(x.shape[2:], padding, dilation, f.weight.shape[2:], stride, strict=True)]
    return (x.shape[0], f.weight.shape[0], *sizes)


def _bind_add(step: Step) -> Run:
    x_name, y_name = (v.name for v in step.args)
    gate = step.gate.name if step.gate else None

    def run(v: dict[str, Any]) -> Tensor:
        out = v[x_name] + v[y_name] if gate is None else v[x_name] * v[gate] + v[y_name]
        return out.relu_() if step.act == "relu" else out

    return run


def deaths(lowered: Lowered) -> list[set[str]]:
    """For each step, the values that nothing reads after it."""
    last = {name: i for i, step in enumerate(lowered.steps) for name in (step.output, *references(step))}
    kept = set(names(lowered.output))
    found: list[set[str]] = [set() for _ in lowered.steps]
    for name, i in last.items():
        if name not in kept:
            found[i].add(name)
    return found


def own_memory(lowered: Lowered) -> set[str]:
    """Values that lie in memory nobody else can see: results of fused steps and pools that only fused steps and pools read."""
    pools = ("torch.nn.functional.max_pool2d", "torch.nn.functional.avg_pool2d", "torch.nn.functional.adaptive_avg_pool2d")

    def simple(step: Step) -> bool:
        return step.op == "conv_bn_act" or step.op == "add_act" or step.target in pools

    found = {step.output for step in lowered.steps if simple(step)} - set(names(lowered.output))
    for step in lowered.steps:
        if not simple(step):
            found -= set(references(step))
    return found
