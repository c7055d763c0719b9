"""When values die, which of them a step may overwrite, and whether each image of a batch is computed by itself.

There is no memory arena: oneDNN's convolutions allocate their own outputs, and cutting a batch into pieces bounds what
the allocator costs (see ``runtime/pieces``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .ir import FUSED, Group, Step, Value, names, outputs, references
from .tree import leaves

_F = "torch.nn.functional."
_POOLS = (f"{_F}max_pool2d", f"{_F}avg_pool2d", f"{_F}adaptive_avg_pool2d")
_ACTIVATIONS = (
    "relu",
    "relu6",
    "silu",
    "gelu",
    "hardswish",
    "hardsigmoid",
    "hardtanh",
    "leaky_relu",
    "elu",
    "mish",
    "sigmoid",
    "tanh",
)
_LAYERS = (
    "linear",
    "conv1d",
    "conv2d",
    "batch_norm",
    "group_norm",
    "dropout",
    "dropout2d",
    "interpolate",
    "adaptive_max_pool2d",
)
# Functions that compute each image by itself, whatever their other arguments.
_IMAGEWISE = {
    *_POOLS,
    *(_F + name for name in (*_ACTIVATIONS, *_LAYERS)),
    *(f"operator.{name}" for name in ("add", "sub", "mul", "truediv", "neg")),
    "torch.relu",
    "torch.sigmoid",
    "torch.add",
    "torch.mul",
    "Tensor.relu",
    "Tensor.sigmoid",
    "Tensor.add",
    "Tensor.mul",
    "Tensor.expand_as",
}
_REDUCTIONS = ("Tensor.mean", "Tensor.sum", "Tensor.amax", "torch.mean", "torch.sum", "torch.amax")
_JOINS = ("torch.flatten", "Tensor.flatten", "torch.cat")


def dead_after(steps: Sequence[Step], output: Any) -> list[set[str]]:
    """For each step, the values that nothing reads after it."""
    last: dict[str, int] = {}
    for i, step in enumerate(steps):
        last.update(dict.fromkeys((*outputs(step), *references(step)), i))
    for name in names(output):
        last.pop(name, None)
    dead: list[set[str]] = [set() for _ in steps]
    for name, i in last.items():
        dead[i].add(name)
    return dead


def own_memory(steps: Sequence[Step], output: Any) -> set[str]:
    """The values that share memory with no other: results of fused steps and pools that only such steps read."""
    found: set[str] = set()
    shared = set(names(output))
    for step in steps:
        if step.op in FUSED or isinstance(step, Group) or step.target in _POOLS:
            found.update(outputs(step))
        else:
            shared.update(references(step))
    return found - shared


def imagewise(steps: Sequence[Step], output: Any) -> bool:
    """Whether each image is computed by itself, so that a batch may go through in pieces; not if a module is called."""
    shapes: set[str] = set()  # values that are a tensor's shape
    sizes: set[str] = set()  # values that are the number of images
    for step in steps:
        if step.target == "builtins.getattr" and step.args[1] == "shape":
            shapes.add(step.output)
        elif _indexes(step, shapes):
            if step.args[1] == 0:
                sizes.add(step.output)
        elif not _is_imagewise(step, sizes):
            return False
    computed = set().union(*map(outputs, steps)) - shapes - sizes
    return _can_be_joined(output, computed)


def _indexes(step: Step, shapes: set[str]) -> bool:
    """Whether the step takes an element of a shape."""
    if step.target != "operator.getitem":
        return False
    indexed = step.args[0]
    return isinstance(indexed, Value) and indexed.name in shapes


def _can_be_joined(output: Any, computed: set[str]) -> bool:
    """Whether a nested output holds only computed values, so that the results of pieces can be joined."""
    return all(isinstance(leaf, Value) and leaf.name in computed for leaf in leaves(output))


def _is_imagewise(step: Step, sizes: set[str]) -> bool:
    if step.op in FUSED or isinstance(step, Group):
        return True
    if step.target in _IMAGEWISE:
        return step.op != "module"
    dim = (
        step.args[1] if len(step.args) > 1 else step.kwargs.get("dim", step.kwargs.get("start_dim"))
    )
    if step.target in _REDUCTIONS:
        dims = dim if isinstance(dim, (tuple, list)) else (dim,)
        return all(isinstance(d, int) and d > 0 for d in dims)
    if step.target in _JOINS:
        return isinstance(dim, int) and dim > 0
    return step.target == "Tensor.reshape" and isinstance(dim, Value) and dim.name in sizes
