"""Each op as eager PyTorch computes it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch.problem import ACROSS
from ..ops import reference
from .rule import as_tuple


def eager(op: str, args: tuple) -> tuple[Tensor, ...]:
    """What a user has without this package, in the arguments' dtype: torch's convolution and batch norm one after the other.

    The pointwise ops are their reference, which rounds once where torch's modules round twice: a stricter bar.
    """
    if op == "bn_act":
        return _eager_bn(*args)
    if op in ACROSS:
        return as_tuple(_EAGER_ACROSS[op](*args))
    if op != "conv_bn_act":
        return as_tuple(getattr(reference, op)(*args))
    x, weight, scale, shift, residual, mean, var, eps, *geometry, act = args
    out = torch.nn.functional.conv2d(x, weight, None, *geometry)
    if mean is None:
        mean, var, eps = torch.zeros_like(scale), torch.ones_like(scale), 1e-30  # torch 2.11 refuses 0
    out = torch.nn.functional.batch_norm(out, mean, var, scale, shift, False, 0.0, eps)
    out = out if residual is None else out + residual
    return (torch.relu(out) if act == "relu" else out,)


def _eager_bn(x, weight, bias, residual, eps, act) -> tuple[Tensor, Tensor, Tensor]:
    """Torch's own statistics: its one-pass variance in bfloat16 NHWC is ten times less exact than the reference's (CPU, torch 2.15)."""
    mean, var = (torch.zeros_like(v, dtype=torch.promote_types(x.dtype, torch.float32)) for v in (weight, bias))
    out = torch.nn.functional.batch_norm(x, mean, var, weight, bias, True, 1.0, eps)
    out = out if residual is None else out + residual
    n = x.numel() // x.shape[1]
    return torch.relu(out) if act == "relu" else out, mean, var * ((n - 1) / n)


def _eager_block(x, weight, bias, residual, padding=0) -> Tensor:
    """Folded convolution, residual, ReLU, each rounded."""
    out = torch.nn.functional.conv2d(x, weight, bias.to(weight.dtype), padding=padding)
    return torch.relu(out if residual is None else out + residual)


def _eager_pair(x, weight, x2, weight2, bias, stride2) -> Tensor:
    return _eager_block(x, weight, bias, torch.nn.functional.conv2d(x2, weight2, None, stride2))


def _eager_tail(x, weight2, bias2, weight3, bias3, residual, projection, weight1, bias1) -> tuple[Tensor, Tensor]:
    shortcut = residual if projection is None else torch.nn.functional.conv2d(residual, projection)
    y = _eager_block(_eager_block(x, weight2, bias2, None, 1), weight3, bias3, shortcut)
    return y, _eager_block(y, weight1, bias1, None)


def _eager_conv_pool(x, weight, bias, mean, std) -> Tensor:
    padding = weight.shape[2] // 2, weight.shape[3] // 2
    x = reference.normalized(x, mean, std, weight.dtype)
    out = torch.nn.functional.conv2d(x, weight, bias.to(weight.dtype), 2, padding)
    return torch.nn.functional.max_pool2d(torch.relu(out), 3, 2, 1)


def _eager_pointwise_pool(x, weight, bias, residual) -> Tensor:
    return _eager_block(x, weight, bias, residual).mean((2, 3))


_EAGER_ACROSS = {
    "pointwise_pair": _eager_pair,
    "conv_tail": _eager_tail,
    "conv_pool": _eager_conv_pool,
    "pointwise_pool": _eager_pointwise_pool,
}
