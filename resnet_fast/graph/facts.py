"""Facts about modules and traced nodes: kind, what a node writes to, whether its result is new memory, its name."""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .trace import Untraceable

# ---------------------------------------------------------------- modules

NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


def is_frozen_bn(m: nn.Module) -> bool:
    """Whether this is torchvision's FrozenBatchNorm2d (all state in buffers), by name, without its import."""
    return type(m).__name__ == "FrozenBatchNorm2d" and type(m).__module__ == "torchvision.ops.misc"


def is_norm(m: nn.Module) -> bool:
    """Whether this is a 2-D batch norm of any kind, fusable or not."""
    return isinstance(m, NORMS) or is_frozen_bn(m)


def touched(m: nn.Module) -> bool:
    """Whether a user attached something to this module's call, which skipping the call would lose."""
    own = m.__dict__.get("forward")
    return bool(
        m._forward_hooks
        or m._forward_pre_hooks
        or m._backward_hooks
        or m._backward_pre_hooks
        or m._compiled_call_impl is not None
        or own is not None
        and not getattr(own, "same_answers", False)
    )


# ---------------------------------------------------------------- nodes

_KINDS = {
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu: "relu",
    F.relu_: "relu",
    "relu": "relu",
    "relu_": "relu",
    operator.add: "add",
    operator.iadd: "add",
    torch.add: "add",
    "add": "add",
    "add_": "add",
    operator.mul: "mul",
    operator.imul: "mul",
    torch.mul: "mul",
    "mul": "mul",
    "mul_": "mul",
}
_PLAIN_KINDS: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.Identity: "identity"}
_FRESH_MODULES = (
    *NORMS,
    nn.Conv2d,
    nn.Linear,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.ReLU,
    nn.Sigmoid,
)
_FRESH_FUNCTIONS = {
    "mean",
    "sum",
    "sigmoid",
    "new_empty",
    "new_ones",
    "new_zeros",
    "size",
    "dim",
    torch.cat,
    torch.mean,
    torch.sigmoid,
    F.conv2d,
    F.interpolate,
}
_PLAIN_ATTRIBUTES = {"shape", "ndim", "dtype", "device"}
_IN_PLACE = {
    "iadd",
    "imul",
    "isub",
    "itruediv",
    "ifloordiv",
    "ipow",
    "imod",
    "iand",
    "ior",
    "ixor",
    "setitem",
}


def module_path(node: fx.Node) -> str:
    """The target of a "call_module" or "get_attr" node. Torch's stubs allow a function too, for other nodes."""
    return cast(str, node.target)


def operands(node: fx.Node) -> tuple[fx.Node, ...]:
    """The positional arguments of a node whose :func:`kind` is not "": nodes alone. Torch's stubs allow constants."""
    return cast("tuple[fx.Node, ...]", node.args)


def called_module(node: fx.Node, modules: dict[str, nn.Module]) -> nn.Module:
    """The module that a "call_module" node calls."""
    return modules[module_path(node)]


def kind(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    """The part that a node can take in a fused step: "conv", "bn", "relu", "add", "mul", "identity", or "" for none."""
    if node.op == "call_module":
        return _module_kind(called_module(node, modules)) if _takes_values(node, 1) else ""
    if node.op not in ("call_function", "call_method"):
        return ""
    found = _KINDS.get(node.target, "")
    if found == "relu":
        return found
    return found if _takes_values(node, 2) else ""


def _takes_values(node: fx.Node, count: int) -> bool:
    """Whether the arguments are so many values and no constant."""
    if node.kwargs or len(node.args) != count:
        return False
    return all(isinstance(argument, fx.Node) for argument in node.args)


def _module_kind(m: nn.Module) -> str:
    if touched(m):
        return ""
    if type(m) is nn.Conv2d:
        pads_zeros = m.padding_mode == "zeros" and not isinstance(m.padding, str)
        return "conv" if pads_zeros and _has_weight(m) else ""
    if is_frozen_bn(m) or type(m) in NORMS and _has_weight(m):
        return "bn"
    return _PLAIN_KINDS.get(type(m), "")


def _has_weight(m: nn.Module) -> bool:
    return m._parameters.get("weight") is not None


def writes(node: fx.Node, modules: dict[str, nn.Module]) -> list[fx.Node]:
    """The arguments that a node may write to: an in-place operation's first, every argument of an unknown module."""
    if node.op == "call_module":
        return list(node.all_input_nodes) if _may_write(called_module(node, modules)) else []
    if node.op not in ("call_function", "call_method"):
        return []
    if "out" in node.kwargs:
        return list(node.all_input_nodes)
    return list(node.all_input_nodes)[:1] if _is_in_place(node) else []


def _may_write(m: nn.Module) -> bool:
    is_torch_layer = type(m).__module__.startswith("torch.nn.") and not m._modules
    known = is_torch_layer or is_frozen_bn(m)
    if not known or touched(m):
        return True
    return bool(getattr(m, "inplace", False))


def _is_in_place(node: fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else node.target.__name__
    ends_in_underscore = name.endswith("_") and not name.endswith("__")
    if ends_in_underscore or name in _IN_PLACE:
        return True
    # A True among the positional arguments of torch.nn.functional may be ``inplace``.
    is_functional = getattr(node.target, "__module__", "") == "torch.nn.functional"
    if is_functional and any(argument is True for argument in node.args):
        return True
    return bool(node.kwargs.get("inplace"))


def fresh(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether the result certainly shares no memory with an argument."""
    if writes(node, modules):
        return False
    if node.op == "call_module":
        m = called_module(node, modules)
        return type(m) in _FRESH_MODULES or is_frozen_bn(m)
    if node.target is getattr:
        return node.args[1] in _PLAIN_ATTRIBUTES
    if node.op not in ("call_function", "call_method"):
        return False
    return node.target in _FRESH_FUNCTIONS or node.target in _KINDS


# ---------------------------------------------------------------- functions by name

_SPACES = {
    "torch": torch,
    "torch.nn.functional": F,
    "operator": operator,
    "math": math,
    "builtins": builtins,
}


def function_name(fn: Callable) -> str:
    """The name by which :func:`function` finds ``fn``. Raises Untraceable if there is none."""
    for prefix, space in _SPACES.items():
        if getattr(space, fn.__name__, None) is fn:
            return f"{prefix}.{fn.__name__}"
    raise Untraceable(
        f"calls {getattr(fn, '__module__', '')}.{fn.__name__}, which is not one of torch's functions"
    )


def function(name: str) -> Callable:
    """The function of that name; "Tensor.x" is the method x of its first argument."""
    prefix, _, short = name.rpartition(".")
    return getattr(Tensor if prefix == "Tensor" else _SPACES[prefix], short)
