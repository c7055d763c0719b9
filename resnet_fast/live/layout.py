"""Where activations may be NHWC (channels_last) inside a foreign network without a visible difference.

Tensors that a user can see keep the strides that torch gives: results are converted back. A network with hooks, or
with calls that depend on strides (``view``, ``permute``, …), is left as it is.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from ..graph.fuse import schedule
from ..graph.ir import Schedule, Step, called_name, names
from ..graph.trace import Untraceable
from .eligibility import fuses_itself

# Calls that return another result or other strides, or raise, for an NHWC input.
_SEES_STRIDES = {
    "view",
    "view_as",
    "as_strided",
    "stride",
    "is_contiguous",
    "contiguous",
    "data_ptr",
    "storage",
    "untyped_storage",
    "numpy",
    "permute",
    "transpose",
    "movedim",
    "moveaxis",
    "swapaxes",
    "swapdims",
    "t",
    "T",
    "mT",
    "H",
    "mH",
    "unfold",
    "to",
    "clone",
    "data",
}
# Random numbers are drawn in the order of memory: in NHWC the same seed would drop other elements.
_DRAWS = {
    "dropout",
    "alpha_dropout",
    "feature_dropout",
    "bernoulli",
    "bernoulli_",
    "rand_like",
    "randn_like",
    "normal_",
    "uniform_",
    "rrelu",
}
# Calls whose result has the same strides whatever the input's are: pooled and flattened values, new tensors.
_REDUCES = {
    "Tensor.mean",
    "Tensor.sum",
    "Tensor.amax",
    "Tensor.flatten",
    "Tensor.new_empty",
    "Tensor.new_ones",
    "Tensor.new_zeros",
    "torch.mean",
    "torch.flatten",
    "torch.nn.functional.adaptive_avg_pool2d",
}
_REDUCING_MODULES = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Flatten, nn.Linear)
_DRAWING_MODULES = (nn.modules.dropout._DropoutNd, nn.RReLU)


def islands(model: nn.Module, training: bool, fused: set[nn.Module]) -> dict[str, nn.Module]:
    """The largest modules inside ``model`` that may run in NHWC in that mode, by path.

    ``fused``: the convolutions that are fused. This package's ResNet is not among the modules: it does so itself.
    """
    found: dict[str, nn.Module] = {}
    _visit("", model, training, fused, found, set())
    return found


def _visit(path: str, m: nn.Module, training: bool, fused: set, found: dict, seen: set) -> None:
    if m in seen or fuses_itself(m) == "network":
        return
    seen.add(m)
    convs = {c for c in m.modules() if isinstance(c, nn.Conv2d)}
    # Converting and converting back costs two copies, more than one block's three convolutions gain. And where nothing
    # is fused, NHWC alone would change how results round.
    if len(convs) < 4 or not convs & fused:
        return
    # An unfused convolution's weight would get an NHWC gradient.
    has_unfused = training and any(c.kernel_size != (1, 1) for c in convs - fused)
    if not has_unfused and _layout_blind(m, training):
        found[path] = m
        return
    for name, child in m.named_children():
        _visit(f"{path}.{name}" if path else name, child, training, fused, found, seen)


def _layout_blind(m: nn.Module, training: bool) -> bool:
    try:
        found = schedule(m, _torch_or_ours, training=training, fuse=False)
    except Untraceable:
        return False
    return _is_blind(found, m, training)


def _torch_or_ours(path: str, m: nn.Module) -> bool:
    return (
        type(m).__module__.startswith(("torch.nn.", "resnet_fast."))
        and type(m) is not nn.Sequential
        or type(m).__name__ == "FrozenBatchNorm2d"
    )


def _is_blind(found: Schedule, owner: nn.Module, training: bool) -> bool:
    """Whether no step's result depends on its input's strides, except for pooled or flattened inputs."""
    flat: set[str] = set()
    if found.opaque or found.writes_inputs:
        return False
    for step in found.steps:
        is_flat = set(names((step.args, step.kwargs))) <= flat
        reduces, sees = _reduces_and_sees(step, owner, training)
        if sees and not is_flat:
            return False
        if reduces or is_flat or step.target == "builtins.getattr":
            flat.add(step.output)
    return True


def _reduces_and_sees(step: Step, owner: nn.Module, training: bool) -> tuple[bool, bool]:
    """(whether the result has the same strides for any input, whether it depends on the input's strides)."""
    if step.op == "module":
        m = owner.get_submodule(step.target)
        return isinstance(m, _REDUCING_MODULES), training and isinstance(m, _DRAWING_MODULES)
    called = called_name(step)
    return step.target in _REDUCES, called in _SEES_STRIDES or called in _DRAWS


def wants_nhwc(owner: nn.Module, x: Tensor) -> bool:
    """Whether this input should be converted to NHWC: images and weights are NCHW, and no hook inside would see it."""
    if (
        x.dim() != 4
        or not x.is_floating_point()
        or x.is_contiguous(memory_format=torch.channels_last)
    ):
        return False
    waiting, weight = [owner], None
    while waiting:  # not modules(), which takes three times as long
        for m in waiting.pop()._modules.values():
            if m is not None:
                if m._forward_hooks or m._forward_pre_hooks:
                    return False
                if weight is None and type(m) is nn.Conv2d and m.kernel_size != (1, 1):
                    weight = m._parameters.get("weight")
                if m._modules:
                    waiting.append(m)
    return weight is None or weight.is_contiguous()


def to_nhwc(x: Tensor) -> Tensor:
    """The input in NHWC, through a flat view that makes its gradient contiguous, as in NCHW: callers ``view`` it."""
    if x.requires_grad:
        x = x.reshape(-1).view(x.shape)
    return x.contiguous(memory_format=torch.channels_last)


def to_nchw(result: Any) -> Any:
    """The result with its NHWC tensors in NCHW.

    Only plain containers are walked, so this is not ``graph.tree.mapped``: a named tuple is returned as it is.
    """
    if isinstance(result, Tensor):
        if result.dim() == 4 and result.is_contiguous(memory_format=torch.channels_last):
            # one pixel is both, and then keeps NHWC's strides
            return result.contiguous().view(-1).view(result.shape)
        return result
    if type(result) in (tuple, list):
        return type(result)(map(to_nchw, result))
    if type(result) in (dict, OrderedDict):
        return type(result)((key, to_nchw(value)) for key, value in result.items())
    return result
