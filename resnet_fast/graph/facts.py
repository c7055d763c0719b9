"""Facts about modules and traced nodes: kind, what a node writes to, whether its result is new memory, its name."""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Callable

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
_FRESH_MODULES = (*NORMS, nn.Conv2d, nn.Linear, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.ReLU, nn.Sigmoid)
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
_IN_PLACE = {"iadd", "imul", "isub", "itruediv", "ifloordiv", "ipow", "imod", "iand", "ior", "ixor", "setitem"}


def kind(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    """The part that a node can take in a fused step: "conv", "bn", "relu", "add", "mul", "identity", or "" for none."""
    if node.op == "call_module":
        takes_one_value = len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], fx.Node)
        return _module_kind(modules[node.target]) if takes_one_value else ""
    if node.op not in ("call_function", "call_method"):
        return ""
    found = _KINDS.get(node.target, "")
    if found == "relu":
        return found
    takes_two_values = len(node.args) == 2 and not node.kwargs and all(isinstance(a, fx.Node) for a in node.args)
    return found if takes_two_values else ""


def _module_kind(m: nn.Module) -> str:
    if touched(m):
        return ""
    if type(m) is nn.Conv2d:
        pads_zeros = m.padding_mode == "zeros" and not isinstance(m.padding, str)
        return "conv" if pads_zeros and m._parameters.get("weight") is not None else ""
    if is_frozen_bn(m) or type(m) in NORMS and m._parameters.get("weight") is not None:
        return "bn"
    return {nn.ReLU: "relu", nn.Identity: "identity"}.get(type(m), "")


def writes(node: fx.Node, modules: dict[str, nn.Module]) -> list[fx.Node]:
    """The arguments that a node may write to: an in-place operation's first, every argument of an unknown module."""
    if node.op == "call_module":
        return list(node.all_input_nodes) if _may_write(modules[node.target]) else []
    if node.op not in ("call_function", "call_method"):
        return []
    if "out" in node.kwargs:
        return list(node.all_input_nodes)
    return list(node.all_input_nodes)[:1] if _is_in_place(node) else []


def _may_write(m: nn.Module) -> bool:
    known = type(m).__module__.startswith("torch.nn.") and not m._modules or is_frozen_bn(m)
    return not known or touched(m) or bool(getattr(m, "inplace", False))


def _is_in_place(node: fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else node.target.__name__
    if name.endswith("_") and not name.endswith("__") or name in _IN_PLACE:
        return True
    # A True among the positional arguments of torch.nn.functional may be ``inplace``.
    is_functional = getattr(node.target, "__module__", "") == "torch.nn.functional"
    return is_functional and any(a is True for a in node.args) or bool(node.kwargs.get("inplace"))


def fresh(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether the result certainly shares no memory with an argument."""
    if writes(node, modules):
        return False
    if node.op == "call_module":
        m = modules[node.target]
        return type(m) in _FRESH_MODULES or is_frozen_bn(m)
    if node.target is getattr:
        return node.args[1] in _PLAIN_ATTRIBUTES
    return node.op in ("call_function", "call_method") and (node.target in _FRESH_FUNCTIONS or node.target in _KINDS)


# ---------------------------------------------------------------- functions by name

_SPACES = {"torch": torch, "torch.nn.functional": F, "operator": operator, "math": math, "builtins": builtins}


def function_name(fn: Callable) -> str:
    """The name by which :func:`function` finds ``fn``. Raises Untraceable if there is none."""
    for prefix, space in _SPACES.items():
        if getattr(space, fn.__name__, None) is fn:
            return f"{prefix}.{fn.__name__}"
    raise Untraceable(f"calls {getattr(fn, '__module__', '')}.{fn.__name__}, which is not one of torch's functions")


def function(name: str) -> Callable:
    """The function of that name; "Tensor.x" is the method x of its first argument."""
    prefix, _, short = name.rpartition(".")
    return getattr(Tensor if prefix == "Tensor" else _SPACES[prefix], short)
