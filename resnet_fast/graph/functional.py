"""What a plan is made of: weights folded once, and a schedule's steps as plain data over them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .facts import function, touched
from .ir import Attribute, Step, Value

# ---------------------------------------------------------------- what cannot be planned


# ---------------------------------------------------------------- a schedule over a model → steps over weights


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
