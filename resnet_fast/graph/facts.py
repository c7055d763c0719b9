"""What one node of a traced forward is: its part in a chain, what it may write to, whether its result is new
memory, its name.
"""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..live.eligibility import is_frozen_bn
from .trace import Untraceable

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
_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
_FRESH_MODULES = (*_NORMS, nn.Conv2d, nn.Linear, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.ReLU, nn.Sigmoid)
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
_INPLACE = {"iadd", "imul", "isub", "itruediv", "ifloordiv", "ipow", "imod", "iand", "ior", "ixor", "setitem"}


def kind(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    """ "conv", "bn", "relu", "add", "mul", "identity", or "" for everything that no chain knows."""
    if node.op == "call_module":
        m = modules[node.target]
        if touched(m) or len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
            return ""
        if type(m) is nn.Conv2d:
            zeros = m.padding_mode == "zeros" and not isinstance(m.padding, str)
            return "conv" if zeros and m._parameters.get("weight") is not None else ""
        if is_frozen_bn(m) or type(m) in _NORMS and m._parameters.get("weight") is not None:
            return "bn"
        return {nn.ReLU: "relu", nn.Identity: "identity"}.get(type(m), "")
    found = _KINDS.get(node.target, "") if node.op in ("call_function", "call_method") else ""
    if found == "relu":
        return found
    return found if len(node.args) == 2 and not node.kwargs and all(isinstance(a, fx.Node) for a in node.args) else ""


def touched(m: nn.Module) -> bool:
    """Whether a user attached something to this module's call that skipping it would lose."""
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


def is_norm(m: nn.Module) -> bool:
    """Whether this is a 2-D batch norm of any make, fusable or not."""
    return isinstance(m, _NORMS) or is_frozen_bn(m)


def writes(node: fx.Node, modules: dict[str, nn.Module]) -> list[fx.Node]:
    """The arguments that this node may write to: the first of an in-place operation, every one of what is unknown."""
    nodes = list(node.all_input_nodes)
    if node.op == "call_module":
        m = modules[node.target]
        known = type(m).__module__.startswith("torch.nn.") and not m._modules or is_frozen_bn(m)
        return nodes if touched(m) or not known or getattr(m, "inplace", False) else []
    if node.op not in ("call_function", "call_method"):
        return []
    if "out" in node.kwargs:
        return nodes
    name = node.target if isinstance(node.target, str) else node.target.__name__
    # A True among the positional arguments of torch.nn.functional may be its ``inplace``.
    flagged = getattr(node.target, "__module__", "") == "torch.nn.functional" and any(a is True for a in node.args)
    named = name.endswith("_") and not name.endswith("__") or name in _INPLACE
    return nodes[:1] if named or flagged or node.kwargs.get("inplace") else []


def fresh(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether the result certainly shares no memory with an argument."""
    if writes(node, modules):
        return False
    if node.op == "call_module":
        return type(modules[node.target]) in _FRESH_MODULES or is_frozen_bn(modules[node.target])
    if node.target is getattr:
        return node.args[1] in _PLAIN_ATTRIBUTES
    return node.op in ("call_function", "call_method") and (node.target in _FRESH_FUNCTIONS or node.target in _KINDS)


_SPACES = {"torch": torch, "torch.nn.functional": F, "operator": operator, "math": math, "builtins": builtins}


def function_name(fn: Callable) -> str:
    """The name under which :func:`function` finds ``fn``; raises Untraceable for one that has none."""
    for prefix, space in _SPACES.items():
        if getattr(space, fn.__name__, None) is fn:
            return f"{prefix}.{fn.__name__}"
    raise Untraceable(f"calls {getattr(fn, '__module__', '')}.{fn.__name__}, which is not one of torch's functions")


def function(name: str) -> Callable:
    """The function of that name; "Tensor.x" is the method x of its first argument."""
    prefix, _, short = name.rpartition(".")
    return getattr(Tensor if prefix == "Tensor" else _SPACES[prefix], short)
