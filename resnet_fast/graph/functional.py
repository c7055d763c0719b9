"""What a plan is made of: weights folded once, and a schedule's steps as plain data over them."""

from __future__ import annotations

import copy
import inspect
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.prepack import Make, onednn_filters, pack_case
from ..live.eligibility import is_frozen_bn
from .facts import function, touched
from .fuse import Attribute, Schedule, Step, Value


class Filter:
    """One convolution's folded weight (NHWC) and bias in the plan's dtype, and its packs: one for each form that kernels want."""

    def __init__(self, weight: Tensor, bias: Tensor, geometry: tuple) -> None:
        self.weight, self.bias, self.geometry = weight, bias, geometry
        self.packs: dict[tuple, tuple[Tensor, Tensor] | None] = {}

    def packed(self, shape: torch.Size, make: Make = onednn_filters) -> tuple[Tensor, Tensor] | None:
        """Filters and bias in a kernel's form for such an input; None if it cannot take these weights."""
        case = pack_case(make, shape)
        if case not in self.packs:
            with torch.inference_mode(False), torch.no_grad():
                self.packs[case] = make(self.weight, self.bias, self.geometry, shape)
        return self.packs[case]

    def same(self, other: Filter) -> bool:
        """Whether another plan's filter may serve here too."""
        return (
            self.geometry == other.geometry
            and torch.equal(self.weight, other.weight)
            and torch.equal(self.bias, other.bias)
        )


# What living plans hold, by shape: for each a dict of weak references, so that a thread may look while another adds.
_held: dict[tuple, weakref.WeakValueDictionary[int, Filter | Tensor]] = {}
_holding = threading.Lock()


def _shared(mine: Filter | Tensor) -> Any:
    """What a living plan holds with the very same values, else ``mine``, which later plans then find."""
    whole = mine.weight if isinstance(mine, Filter) else mine
    same = Filter.same if isinstance(mine, Filter) else torch.equal
    with _holding:
        alike = _held.setdefault((type(mine), whole.shape, whole.dtype, whole.device), weakref.WeakValueDictionary())
        found = next((other for other in list(alike.values()) if same(mine, other)), mine)
        alike[id(found)] = found
    return found


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


# ---------------------------------------------------------------- what cannot be planned

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


# ---------------------------------------------------------------- a schedule over a model → steps over weights


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


_F = "torch.nn.functional."
_Call = tuple[str, tuple, dict]


def _weights(path: str, m: nn.Module, *attributes: str) -> tuple[Attribute | None, ...]:
    return tuple(None if getattr(m, name) is None else Attribute(f"{path}.{name}") for name in attributes)


def _norm(m: nn.Module, p: str) -> _Call:
    return f"{_F}batch_norm", (*_weights(p, m, "running_mean", "running_var", "weight", "bias"), False, 0.0, m.eps), {}


def _conv(m: nn.Module, p: str) -> _Call:
    return (
        f"{_F}conv{m.weight.dim() - 2}d",
        (*_weights(p, m, "weight", "bias"), m.stride, m.padding, m.dilation, m.groups),
        {},
    )


# torch's layers as functions: (module, its path) → name, further arguments, keyword arguments.
_FUNCTIONS: dict[type, Callable[[Any, str], _Call]] = {
    nn.AdaptiveAvgPool2d: lambda m, p: (f"{_F}adaptive_avg_pool2d", (m.output_size,), {}),
    nn.AvgPool2d: lambda m, p: (
        f"{_F}avg_pool2d",
        (m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, m.divisor_override),
        {},
    ),
    nn.BatchNorm1d: _norm,
    nn.BatchNorm2d: _norm,
    nn.SyncBatchNorm: _norm,
    nn.Conv1d: _conv,
    nn.Conv2d: _conv,
    nn.Dropout: lambda m, p: (f"{_F}dropout", (m.p, False), {}),
    nn.Dropout2d: lambda m, p: (f"{_F}dropout2d", (m.p, False), {}),
    nn.ELU: lambda m, p: (f"{_F}elu", (m.alpha,), {}),
    nn.Flatten: lambda m, p: ("torch.flatten", (m.start_dim, m.end_dim), {}),
    nn.GELU: lambda m, p: (f"{_F}gelu", (), {"approximate": m.approximate}),
    nn.GroupNorm: lambda m, p: (f"{_F}group_norm", (m.num_groups, *_weights(p, m, "weight", "bias"), m.eps), {}),
    nn.Hardsigmoid: lambda m, p: (f"{_F}hardsigmoid", (), {}),
    nn.Hardswish: lambda m, p: (f"{_F}hardswish", (), {}),
    nn.Hardtanh: lambda m, p: (f"{_F}hardtanh", (m.min_val, m.max_val), {}),
    nn.LeakyReLU: lambda m, p: (f"{_F}leaky_relu", (m.negative_slope,), {}),
    nn.Linear: lambda m, p: (f"{_F}linear", _weights(p, m, "weight", "bias"), {}),
    nn.MaxPool2d: lambda m, p: (
        f"{_F}max_pool2d",
        (m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices),
        {},
    ),
    nn.Mish: lambda m, p: (f"{_F}mish", (), {}),
    nn.ReLU: lambda m, p: (f"{_F}relu", (), {}),
    nn.ReLU6: lambda m, p: (f"{_F}relu6", (), {}),
    nn.SiLU: lambda m, p: (f"{_F}silu", (), {}),
    nn.Sigmoid: lambda m, p: ("torch.sigmoid", (), {}),
    nn.Softmax: lambda m, p: (f"{_F}softmax", (m.dim,), {}),
    nn.Tanh: lambda m, p: ("torch.tanh", (), {}),
    nn.Upsample: lambda m, p: (f"{_F}interpolate", (m.size, m.scale_factor, m.mode, m.align_corners), {}),
}


def as_function(step: Step, model: nn.Module) -> Step:
    """The step as data where it can be: a layer of torch's as a call of its function, a function in its form that writes to nothing."""
    if step.op == "module":
        step = _layer_as_function(step, model.get_submodule(step.target))
    return _pure(step) if step.op == "function" else step


def _layer_as_function(step: Step, m: nn.Module) -> Step:
    """Anything but an untouched layer of torch's stays a module."""
    make = _FUNCTIONS.get(type(m))
    if (
        make is None
        or len(step.args) != 1
        or step.kwargs
        or touched(m)
        or getattr(m, "padding_mode", "zeros") != "zeros"
    ):
        return step
    name, args, kwargs = make(m, step.target)
    return replace(step, op="function", target=name, args=(*step.args, *args), kwargs=kwargs)


_IN_PLACE = {
    "iadd": "add",
    "isub": "sub",
    "imul": "mul",
    "itruediv": "truediv",
    "ifloordiv": "floordiv",
    "imod": "mod",
    "ipow": "pow",
    "iand": "and_",
    "ior": "or_",
    "ixor": "xor",
}


def _pure(step: Step) -> Step:
    """The step in its form that writes to nothing, and that does not mind how its input lies. Raises ValueError if it has none."""
    space, _, short = step.target.rpartition(".")
    args, kwargs = step.args, step.kwargs
    if space == "operator":
        short = _IN_PLACE.get(short, short)
    elif short.endswith("_") and not short.endswith("__"):
        short = short[:-1]
    elif step.target == "Tensor.view" and not any(isinstance(a, torch.dtype) for a in args):
        short = "reshape"
    target = f"{space}.{short}"
    try:
        call = function(target)
    except AttributeError:
        raise ValueError(f"plan: step {step.output}: {step.target} writes in place and has no other form") from None
    if space == "torch.nn.functional" and "inplace" in getattr(getattr(call, "__code__", None), "co_varnames", ()):
        bound = inspect.signature(call).bind(*args, **kwargs)
        bound.arguments.pop("inplace", None)
        args, kwargs = bound.args, bound.kwargs
    return replace(step, target=target, args=args, kwargs=kwargs)


def attributes(structure: Any) -> list[str]:
    """The paths of all tensors of the model that a nested structure refers to."""
    if isinstance(structure, Attribute):
        return [structure.path]
    if isinstance(structure, dict):
        structure = tuple(structure.values())
    if isinstance(structure, (tuple, list)) and not isinstance(structure, Value):
        return [path for part in structure for path in attributes(part)]
    return []


def attribute(model: nn.Module, path: str) -> Tensor:
    """The tensor at that path."""
    owner, _, name = path.rpartition(".")
    return getattr(model.get_submodule(owner), name)
