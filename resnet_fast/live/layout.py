"""Where activations may be NHWC (channels_last) inside a foreign network without anybody being able to tell.

Tensors that a user can see keep the strides that torch gives: results are brought back, and a network in which
somebody looks (a hook) or which asks how its tensors lie (``view``, ``permute``, …) is left as it is.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from ..graph.fuse import schedule
from ..graph.ir import Schedule, names
from ..graph.trace import Untraceable
from ..models.resnet import ResNet

# What answers otherwise, raises, or returns other strides, when its input lies in NHWC.
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
# What has the same strides whatever its input's are: pooled and flattened values, new tensors.
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
    """The largest modules inside ``model`` that may run in NHWC in that mode, by path, given the convolutions that are
    fused in it. Our own ResNet sees to itself.
    """
    found: dict[str, nn.Module] = {}
    _visit("", model, training, fused, found, set())
    return found


def _visit(path: str, m: nn.Module, training: bool, fused: set, found: dict, seen: set) -> None:
    if m in seen or type(m).forward is ResNet.forward:
        return
    seen.add(m)
    convs = {c for c in m.modules() if isinstance(c, nn.Conv2d)}
    # Converting and bringing back costs two copies: one block's three convolutions do not win them back. And where nothing is
    # fused, NHWC alone would change how answers round.
    if len(convs) < 4 or not convs & fused:
        return
    # A convolution that is not fused would give its weight a gradient in NHWC.
    alone = training and any(c.kernel_size != (1, 1) for c in convs - fused)
    if not alone and _layout_blind(m, training):
        found[path] = m
        return
    for name, child in m.named_children():
        _visit(f"{path}.{name}" if path else name, child, training, fused, found, seen)


def _layout_blind(m: nn.Module, training: bool) -> bool:
    try:
        return _blind(schedule(m, _torch_or_ours, training=training, fuse=False), m, training)
    except Untraceable:
        return False


def _torch_or_ours(path: str, m: nn.Module) -> bool:
    return (
        type(m).__module__.startswith(("torch.nn.", "resnet_fast."))
        and type(m) is not nn.Sequential
        or type(m).__name__ == "FrozenBatchNorm2d"
    )


def _blind(found: Schedule, owner: nn.Module, training: bool) -> bool:
    """Whether no step but those on pooled or flattened values can see how its input lies."""
    flat: set[str] = set()
    if found.opaque or found.writes_inputs:
        return False
    for step in found.steps:
        read = set(names((step.args, step.kwargs)))
        if step.op == "module":
            m = owner.get_submodule(step.target)
            reduces, sees = isinstance(m, _REDUCING_MODULES), training and isinstance(m, _DRAWING_MODULES)
        else:
            asked = step.args[1] if step.target == "builtins.getattr" else step.target.rpartition(".")[2]
            reduces, sees = step.target in _REDUCES, asked in _SEES_STRIDES or asked in _DRAWS
        if sees and not read <= flat:
            return False
        if reduces or read <= flat or step.target == "builtins.getattr":
            flat.add(step.output)
    return True


def wants_nhwc(owner: nn.Module, x: Tensor) -> bool:
    """Whether this input should be brought to NHWC: NCHW images and weights, and nobody inside to see it."""
    if x.dim() != 4 or not x.is_floating_point() or x.is_contiguous(memory_format=torch.channels_last):
        return False
    unseen, weight = [owner], None
    while unseen:  # not modules(), which takes three times as long
        for m in unseen.pop()._modules.values():
            if m is not None:
                if m._forward_hooks or m._forward_pre_hooks:
                    return False
                if weight is None and type(m) is nn.Conv2d and m.kernel_size != (1, 1):
                    weight = m._parameters.get("weight")
                if m._modules:
                    unseen.append(m)
    return weight is None or weight.is_contiguous()


def to_nhwc(x: Tensor) -> Tensor:
    """The input in NHWC, through a flat view: its gradient comes back contiguous, as in NCHW; callers ``view`` it."""
    if x.requires_grad:
        x = x.reshape(-1).view(x.shape)
    return x.contiguous(memory_format=torch.channels_last)


def to_nchw(result: Any) -> Any:
    """A result whose NHWC tensors lie in NCHW, in the same containers."""
    if isinstance(result, Tensor):
        if result.dim() == 4 and result.is_contiguous(memory_format=torch.channels_last):
            return result.contiguous().view(-1).view(result.shape)  # one pixel is both, and then keeps NHWC's strides
        return result
    if type(result) in (tuple, list):
        return type(result)(map(to_nchw, result))
    if type(result) in (dict, OrderedDict):
        return type(result)((key, to_nchw(value)) for key, value in result.items())
    return result
