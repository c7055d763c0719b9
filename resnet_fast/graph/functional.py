"""Functionalization: torch's layers as calls of their functions, and functions in the form that writes to nothing."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .facts import function, touched
from .ir import Attribute, Step
from .tree import leaves

_F = "torch.nn.functional."
# A function's name, its arguments after the input, its keyword arguments.
_Call = tuple[str, tuple, dict]


def as_function(step: Step, model: nn.Module) -> Step:
    """The step as data where possible: a torch layer as a call of its function, a function in its pure form."""
    if step.op == "module":
        step = _layer_as_function(step, model.get_submodule(step.target))
    return _pure(step) if step.op == "function" else step


def attributes(structure: Any) -> list[str]:
    """The paths of all parameters and buffers that a nested structure refers to."""
    return [leaf.path for leaf in leaves(structure) if isinstance(leaf, Attribute)]


def attribute(model: nn.Module, path: str) -> Tensor:
    """The tensor at that path."""
    owner, _, name = path.rpartition(".")
    return getattr(model.get_submodule(owner), name)


# ---------------------------------------------------------------- layers as functions


def _layer_as_function(step: Step, m: nn.Module) -> Step:
    """Anything but an untouched torch layer, called with its input alone, stays a module."""
    make = _FUNCTIONS.get(type(m))
    is_plain_call = len(step.args) == 1 and not step.kwargs
    if (
        make is None
        or not is_plain_call
        or touched(m)
        or getattr(m, "padding_mode", "zeros") != "zeros"
    ):
        return step
    name, args, kwargs = make(m, step.target)
    return replace(step, op="function", target=name, args=(*step.args, *args), kwargs=kwargs)


def _weights(path: str, m: nn.Module, *names: str) -> tuple[Attribute | None, ...]:
    """The parameters or buffers of those names; None for one that the module does not have."""
    return tuple(_attribute_or_none(path, m, name) for name in names)


def _attribute_or_none(path: str, m: nn.Module, name: str) -> Attribute | None:
    if getattr(m, name) is None:
        return None
    return Attribute(f"{path}.{name}")


def _norm(m: nn.BatchNorm1d | nn.BatchNorm2d | nn.SyncBatchNorm, path: str) -> _Call:
    weights = _weights(path, m, "running_mean", "running_var", "weight", "bias")
    return f"{_F}batch_norm", (*weights, False, 0.0, m.eps), {}


def _conv(m: nn.Conv1d | nn.Conv2d, path: str) -> _Call:
    weights = _weights(path, m, "weight", "bias")
    dimensions = m.weight.dim() - 2
    args = *weights, m.stride, m.padding, m.dilation, m.groups
    return f"{_F}conv{dimensions}d", args, {}


def _avg_pool(m: nn.AvgPool2d, path: str) -> _Call:
    window = m.kernel_size, m.stride, m.padding
    args = *window, m.ceil_mode, m.count_include_pad, m.divisor_override
    return f"{_F}avg_pool2d", args, {}


def _max_pool(m: nn.MaxPool2d, path: str) -> _Call:
    window = m.kernel_size, m.stride, m.padding, m.dilation
    args = *window, m.ceil_mode, m.return_indices
    return f"{_F}max_pool2d", args, {}


# Each torch layer as a function: (module, its path) → the call.
_FUNCTIONS: dict[type, Callable[[Any, str], _Call]] = {
    nn.AdaptiveAvgPool2d: lambda m, p: (f"{_F}adaptive_avg_pool2d", (m.output_size,), {}),
    nn.AvgPool2d: _avg_pool,
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
    nn.GroupNorm: lambda m, p: (
        f"{_F}group_norm",
        (m.num_groups, *_weights(p, m, "weight", "bias"), m.eps),
        {},
    ),
    nn.Hardsigmoid: lambda m, p: (f"{_F}hardsigmoid", (), {}),
    nn.Hardswish: lambda m, p: (f"{_F}hardswish", (), {}),
    nn.Hardtanh: lambda m, p: (f"{_F}hardtanh", (m.min_val, m.max_val), {}),
    nn.LeakyReLU: lambda m, p: (f"{_F}leaky_relu", (m.negative_slope,), {}),
    nn.Linear: lambda m, p: (f"{_F}linear", _weights(p, m, "weight", "bias"), {}),
    nn.MaxPool2d: _max_pool,
    nn.Mish: lambda m, p: (f"{_F}mish", (), {}),
    nn.ReLU: lambda m, p: (f"{_F}relu", (), {}),
    nn.ReLU6: lambda m, p: (f"{_F}relu6", (), {}),
    nn.SiLU: lambda m, p: (f"{_F}silu", (), {}),
    nn.Sigmoid: lambda m, p: ("torch.sigmoid", (), {}),
    nn.Softmax: lambda m, p: (f"{_F}softmax", (m.dim,), {}),
    nn.Tanh: lambda m, p: ("torch.tanh", (), {}),
    nn.Upsample: lambda m, p: (
        f"{_F}interpolate",
        (m.size, m.scale_factor, m.mode, m.align_corners),
        {},
    ),
}


# ---------------------------------------------------------------- pure functions


_OUT_OF_PLACE = {
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
    """The call in the form that writes to nothing and takes any strides. Raises ValueError if there is none."""
    space, _, short = step.target.rpartition(".")
    target = f"{space}.{_pure_name(step, space, short)}"
    try:
        call = function(target)
    except AttributeError:
        raise ValueError(
            f"plan: step {step.output}: {step.target} writes in place and has no other form"
        ) from None
    args, kwargs = step.args, step.kwargs
    code = getattr(call, "__code__", None)
    takes_inplace = "inplace" in getattr(code, "co_varnames", ())
    if space == "torch.nn.functional" and takes_inplace:
        bound = inspect.signature(call).bind(*args, **kwargs)
        bound.arguments.pop("inplace", None)
        args, kwargs = bound.args, bound.kwargs
    return replace(step, target=target, args=args, kwargs=kwargs)


def _pure_name(step: Step, space: str, short: str) -> str:
    if space == "operator":
        return _OUT_OF_PLACE.get(short, short)
    if short.endswith("_") and not short.endswith("__"):
        return short[:-1]
    if step.target == "Tensor.view" and not any(isinstance(a, torch.dtype) for a in step.args):
        return "reshape"
    return short
