"""One fused step over live modules: conv → BN → (+ residual) → activation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .eligibility import Conv, Norm, uses_batch_statistics
from .training_conv import convolve


def fused_step(
    conv: Conv, bn: Norm, x: Tensor, residual: Tensor | None = None, act: str = "none"
) -> Tensor:
    """conv → BN → (+ residual) → act over live modules.

    With fixed statistics this is ``ops.conv_bn_act``, in training a convolution and ``ops.bn_act``.
    """
    if uses_batch_statistics(bn):
        _require_fit(x, conv)
        z = convolve(conv, x, _with_own_strides(conv.weight))
        return batch_norm_act(bn, z, residual, act)
    return ops.conv_bn_act(
        x,
        conv.weight,
        bn.weight,
        bn.bias,
        residual,
        mean=bn.running_mean,
        var=bn.running_var,
        eps=bn.eps,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
        act=act,
    )


def _require_fit(x: Tensor, conv: nn.Conv2d) -> None:
    """Raise as ``ops.conv_bn_act`` does for a wrong input; in training the convolution is torch's own."""
    weight = conv.weight
    fits = (
        x.dim() == 4
        and x.dtype is weight.dtype
        and x.device == weight.device
        and x.shape[1] == weight.shape[1] * conv.groups
    )
    if not fits and not torch.is_autocast_enabled(x.device.type):  # autocast makes the dtypes meet
        ops.check_convolution(x, weight, conv.groups)


def _with_own_strides(weight: Tensor) -> Tensor:
    """The weight through a view that makes its gradient contiguous, as callers expect; an NHWC convolution's is not."""
    if weight.requires_grad and weight.is_contiguous() and weight.stride(-1) == 1:
        return weight.view(-1).view(weight.shape)
    return weight


def batch_norm_act(bn: Norm, z: Tensor, residual: Tensor | None, act: str) -> Tensor:
    """``ops.bn_act`` in training, then the update of the running statistics.

    On a GPU without a kernel that was measured to be faster, torch's modules run.
    """
    if _better_apart(bn, z, residual, act):
        return norm_by_torch(bn, z, residual, act)
    y, mean, var = ops.bn_act(z, bn.weight, bn.bias, residual, eps=bn.eps, act=act)
    if _updates_running_stats(bn):
        update_running_stats(bn, mean, var, z.numel() // z.shape[1])
    return y


def _better_apart(bn: nn.BatchNorm2d, z: Tensor, residual: Tensor | None, act: str) -> bool:
    """Whether this is a GPU without a kernel of ours that was measured to be faster than torch's."""
    return z.device.type == "cuda" and not ops.fuses_bn_act(
        z, bn.weight, bn.bias, residual, bn.eps, act
    )


def norm_by_torch(bn: nn.BatchNorm2d, z: Tensor, residual: Tensor | None, act: str) -> Tensor:
    """Eager's own launches: 3 for batch norm, its count and ReLU; ``aten.bn_act`` and the statistics would take 11."""
    is_recomputing = bn.training and bn.track_running_stats and not _updates_running_stats(bn)
    if is_recomputing:  # momentum 0: the statistics do not move, but they are saved for backward
        out = F.batch_norm(
            z, bn.running_mean, bn.running_var, bn.weight, bn.bias, True, 0.0, bn.eps
        )
    else:
        out = bn(z)
    if residual is not None:
        out += residual
    return F.relu(out, inplace=True) if act == "relu" else out


def _updates_running_stats(bn: nn.BatchNorm2d) -> bool:
    """Whether this forward updates the running statistics.

    Not when checkpointing recomputes a block inside backward: they were updated already. Eager updates them twice.
    """
    return bn.training and bn.track_running_stats and torch._C._current_graph_task_id() == -1


def update_running_stats(bn: nn.BatchNorm2d, mean: Tensor, var: Tensor, n: int) -> None:
    """Update the running statistics in torch's order: the count, then μ and the unbiased σ².

    Through ``.data``, so that like torch's own kernel this bumps no version: an earlier graph in eval stays usable.
    """
    momentum = bn.momentum
    if bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        momentum = 1.0 / float(bn.num_batches_tracked) if momentum is None else momentum
    if bn.running_mean is not None and momentum is not None:
        bn.running_mean.data.mul_(1 - momentum).add_(mean.to(bn.running_mean.dtype), alpha=momentum)
        bn.running_var.data.mul_(1 - momentum).add_(
            var.to(bn.running_var.dtype), alpha=momentum * n / max(n - 1, 1)
        )
