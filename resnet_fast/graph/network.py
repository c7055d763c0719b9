"""A whole network as steps over its weights (:func:`lowered_network`, :func:`live_network`), or why it cannot be."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from . import liveness
from .facts import is_frozen_bn, is_norm, touched
from .functional import as_function, attribute, attributes
from .fuse import schedule
from .ir import Schedule, Step, called_name
from .trace import Untraceable
from .weights import FoldedConv, shared


@dataclass
class Lowered:
    """A network's steps, which refer only to ``filters`` (by step output), ``tensors`` (by path) and ``modules``.

    ``modules`` are those that stay one call. What follows from the steps alone is computed once, when it is first read.
    """

    steps: tuple[Step, ...]
    inputs: tuple[str, ...]
    output: Any
    filters: dict[str, FoldedConv]
    tensors: dict[str, Tensor]
    modules: dict[str, nn.Module]

    @cached_property
    def dead_after(self) -> list[set[str]]:
        """For each step, the values that nothing reads after it."""
        return liveness.dead_after(self.steps, self.output)

    @cached_property
    def own_memory(self) -> set[str]:
        """The values in memory that nothing else can see: a step may overwrite them after their last read."""
        return liveness.own_memory(self.steps, self.output)

    @cached_property
    def imagewise(self) -> bool:
        """Whether each image is computed by itself, so that a batch may go through in pieces."""
        return liveness.imagewise(self.steps, self.output)

    @cached_property
    def takes_bytes(self) -> bool:
        """Whether the first step takes uint8 and normalises it itself."""
        return any(step.op == "conv_pool" and step.kwargs for step in self.steps)

    def shared(self) -> Lowered:
        """The same network, with each weight taken from a living plan that has an equal one: plans share weights."""
        return replace(
            self,
            filters={name: shared(mine) for name, mine in self.filters.items()},
            tensors={path: shared(mine) for path, mine in self.tensors.items()},
        )

    def to(self, device: torch.device) -> Lowered:
        """The same network with its weights on that device."""
        moved = replace(
            self,
            filters={name: conv.to(device) for name, conv in self.filters.items()},
            tensors={path: tensor.to(device) for path, tensor in self.tensors.items()},
            modules={path: copy.deepcopy(m).to(device) for path, m in self.modules.items()},
        )
        return moved.shared()


def lowered_network(
    model: nn.Module,
    dtype: torch.dtype,
    device: torch.device,
    *,
    fuse: bool = True,
    features: Sequence[str] | None = None,
) -> Lowered:
    """``model`` in inference as steps over a snapshot of its weights. Raises ValueError with everything against it.

    ``features``: module paths; the network then returns their results, as a dict.
    """
    found = network_schedule(model, fuse=fuse, features=features)
    return lower(found, model, dtype, device)


def live_network(model: nn.Module) -> Lowered:
    """``model`` in inference as steps over its own tensors and modules, without filters. Raises ValueError."""
    found = network_schedule(model, lone=False)
    steps = tuple(as_function(step, model) for step in found.steps)
    paths = attributes([(step.args, step.kwargs) for step in steps])
    called = [step.target for step in steps if step.op == "module"]
    return Lowered(
        steps=steps,
        inputs=found.inputs,
        output=found.output,
        filters={},
        tensors={path: attribute(model, path) for path in paths},
        modules={path: model.get_submodule(path) for path in called},
    )


# ---------------------------------------------------------------- schedule


def network_schedule(
    model: nn.Module, *, fuse: bool = True, lone: bool = True, features: Sequence[str] | None = None
) -> Schedule:
    """The whole network's schedule in inference. Raises ValueError with everything against it.

    ``lone``: a convolution without batch norm becomes a fused step too.
    """
    name, hint = type(model).__name__, _wrapper_hint(model)
    _raise_refused(refused(model), name, hint)
    try:
        found = schedule(
            model, stays_one_call, training=False, lone=lone, fuse=fuse, outputs=features
        )
    except Untraceable as reason:
        raise ValueError(f"plan: {name} cannot be planned: {reason}{hint}") from None
    if len(found.inputs) != 1:
        inputs = ", ".join(found.inputs)
        raise ValueError(
            f"plan: {name}: got {len(found.inputs)} inputs ({inputs}), expected one tensor"
        )
    _raise_refused(refused(model, found), name, hint)
    return found


def stays_one_call(path: str, m: nn.Module) -> bool:
    """Whether a module is not traced into: torch's own layers, batch norms of any kind, and what a user hooked."""
    is_torch_layer = type(m).__module__.startswith("torch.nn.") and type(m) is not nn.Sequential
    return is_torch_layer or touched(m) or is_norm(m)


def _raise_refused(reasons: dict[str, str], name: str, hint: str) -> None:
    if not reasons:
        return
    sentences = [f"{what}: {reason}" for what, reason in reasons.items()]
    raise ValueError(f"plan: cannot plan {name}: {'; '.join(sentences)}{hint}")


def _wrapper_hint(model: nn.Module) -> str:
    """The advice for a model in a wrapper: "module" of DDP or an EMA, "_orig_mod" of torch.compile."""
    for child in ("module", "_orig_mod"):
        if list(model._modules) == [child]:
            return f"; it wraps another model: plan that, model.{child}"
    return ""


# Functions and methods with another answer in a plan, which is NHWC inside.
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
    """What cannot be planned of ``model``, and of its schedule if there is one: module or step → why."""
    why = {}
    for path, m in model.named_modules():
        if isinstance(m, nn.BatchNorm2d) and not is_frozen_bn(m) and m.running_mean is None:
            sentence = "a batch norm without running statistics normalises with each batch's own"
            why[path or type(model).__name__] = sentence
    if touched(model):
        why[type(model).__name__] = (
            "the model itself has hooks or a forward of its own, which a plan would not call"
        )
    if found is None:
        return why
    why |= {
        name: "it writes in place what is read later by another name" for name in found.entangled
    }
    for step in found.steps:
        asked = called_name(step)
        if step.op == "function" and asked in _SEES_STRIDES:
            why[step.output] = (
                f"{asked} asks how a tensor lies in memory, and a plan's lie otherwise"
            )
    return why


# ---------------------------------------------------------------- snapshot


def lower(found: Schedule, model: nn.Module, dtype: torch.dtype, device: torch.device) -> Lowered:
    """Fold every convolution, turn torch's layers into functions over copied tensors, copy modules that stay a call."""
    filters: dict[str, FoldedConv] = {}
    modules: dict[str, nn.Module] = {}
    steps: list[Step] = []
    with torch.inference_mode(False), torch.no_grad():
        for step in found.steps:
            if step.op == "conv_bn_act":
                conv_path, bn_path, *_ = step.modules
                conv = model.get_submodule(conv_path)
                bn = model.get_submodule(bn_path) if bn_path else None
                filters[step.output] = _folded(conv, bn, dtype, device)
            step = as_function(step, model)
            if step.op == "module":
                module = model.get_submodule(step.target)
                modules[step.target] = _inference_copy(module).to(device, dtype)
            steps.append(step)
        arguments = [(step.args, step.kwargs) for step in steps]
        paths = attributes((found.output, *arguments))
        tensors = {
            path: _copied(attribute(model, path), dtype, device) for path in dict.fromkeys(paths)
        }
    network = Lowered(tuple(steps), found.inputs, found.output, filters, tensors, modules)
    return network.shared()


def _folded(conv: Any, bn: Any, dtype: torch.dtype, device: torch.device) -> FoldedConv:
    """The convolution with its batch norm folded in, in float64, rounded once.

    ``conv`` is a Conv2d, ``bn`` None or any norm. They are Any because to mypy a module's attribute is Tensor | Module.
    """
    weight = conv.weight.detach().to(device, torch.float64)
    if conv.bias is None:
        bias = weight.new_zeros(conv.out_channels)
    else:
        bias = conv.bias.detach().to(weight)
    if bn is not None:
        state = (bn.weight, bn.bias, bn.running_mean, bn.running_var)
        gamma, beta, mean, var = (tensor.detach().to(weight) for tensor in state)
        scale = gamma / torch.sqrt(var + bn.eps)
        weight = weight * scale.view(-1, 1, 1, 1)
        bias = (bias - mean) * scale + beta
    weight = weight.to(dtype).contiguous(memory_format=torch.channels_last)
    geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
    return FoldedConv(weight, bias.to(dtype), geometry)


def _copied(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    copied = tensor.detach().to(device, copy=True)
    if not copied.is_floating_point():
        return copied
    return copied.to(dtype)


def _inference_copy(m: nn.Module) -> nn.Module:
    """A copy in eval mode that does not write to its input, which other steps may read."""
    copied: Any = copy.deepcopy(m).eval()  # Any: to mypy a module's attribute is Tensor | Module
    if getattr(copied, "inplace", False) is True:
        copied.inplace = False
    return copied
