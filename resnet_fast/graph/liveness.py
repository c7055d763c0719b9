"""When a plan's values die, whose memory a step may write to, and whether each image is computed by itself.

No arena: oneDNN's convolutions make their own outputs, and what an output costs is the allocator's, which pieces of a batch settle (see ``whole``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .ir import Attribute, Group, Step, Value, names, outputs, references

if TYPE_CHECKING:
    from .network import Lowered

_F = "torch.nn.functional."
_POOLS = (f"{_F}max_pool2d", f"{_F}avg_pool2d", f"{_F}adaptive_avg_pool2d")
# Functions that compute each image by itself, whatever their other arguments.
_IMAGEWISE = {
    *_POOLS,
    *(
        _F + name
        for name in (
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
    ),
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
_REDUCTIONS = {f"{space}.{name}" for space in ("Tensor", "torch") for name in ("mean", "sum", "amax")}


def deaths(lowered: Lowered) -> list[set[str]]:
    """For each step, the values that nothing reads after it."""
    last = {name: i for i, step in enumerate(lowered.steps) for name in (*outputs(step), *references(step))}
    kept = set(names(lowered.output))
    found: list[set[str]] = [set() for _ in lowered.steps]
    for name, i in last.items():
        if name not in kept:
            found[i].add(name)
    return found


def own_memory(lowered: Lowered) -> set[str]:
    """Values in memory nobody else can see: results of fused steps and pools that only fused steps and pools read."""

    def simple(step: Step) -> bool:
        return step.op in ("conv_bn_act", "add_act") or isinstance(step, Group) or step.target in _POOLS

    found = {name for step in lowered.steps if simple(step) for name in outputs(step)} - set(names(lowered.output))
    for step in lowered.steps:
        if not simple(step):
            found -= set(references(step))
    return found


def imagewise(steps: Sequence[Step], output: Any) -> bool:
    """Whether each image is computed by itself, so that a batch may go through in pieces; of steps that are functions, not modules."""
    shapes: set[str] = set()  # values that are a tensor's shape
    sizes: set[str] = set()  # values that are the number of images
    for step in steps:
        if step.target == "builtins.getattr" and step.args[1] == "shape":
            shapes.add(step.output)
        elif step.target == "operator.getitem" and isinstance(step.args[0], Value) and step.args[0].name in shapes:
            sizes |= {step.output} if step.args[1] == 0 else set()
        elif not _imagewise(step, sizes):
            return False
    computed = {name for step in steps for name in outputs(step)} - shapes - sizes
    return _all_in(output, computed)


def _all_in(output: Any, computed: set[str]) -> bool:
    """Whether a nested output holds such values and nothing else, which pieces of a batch could not be joined to."""
    if isinstance(output, Value):
        return output.name in computed
    if isinstance(output, dict):
        output = tuple(output.values())
    return (
        isinstance(output, (tuple, list))
        and not isinstance(output, Attribute)
        and all(_all_in(part, computed) for part in output)
    )


def _imagewise(step: Step, sizes: set[str]) -> bool:
    if step.op in ("conv_bn_act", "add_act") or isinstance(step, Group) or step.target in _IMAGEWISE:
        return step.op != "module"
    given = step.args[1] if len(step.args) > 1 else step.kwargs.get("dim", step.kwargs.get("start_dim"))
    if step.target in _REDUCTIONS:
        dims = given if isinstance(given, (tuple, list)) else (given,)
        return all(isinstance(d, int) and d > 0 for d in dims)
    if step.target in ("torch.flatten", "Tensor.flatten", "torch.cat"):
        return isinstance(given, int) and given > 0
    return step.target == "Tensor.reshape" and isinstance(given, Value) and given.name in sizes
