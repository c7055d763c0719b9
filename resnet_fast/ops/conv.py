"""``conv_bn_act``: convolution + affine (+ residual) + activation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch.registry import select
from . import reference
from .contract import (
    Pair,
    _check_act,
    _direct,
    _flat_like,
    check_images,
    check_like,
    check_vectors,
    composite,
    differentiable,
    dispatched,
    pair,
    require,
)
from .library import below_autograd, define


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    *,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    eps: float = 0.0,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    act: str = "relu",
) -> Tensor:
    """Convolution, per-channel affine, residual and activation: act(conv(x, weight)·s + t + residual).

    With ``mean`` and ``var`` (batch norm's four vectors and ``eps``) s = scale/√(var+eps) and t = shift − mean·s; without, s = scale and
    t = shift. x: [N, C, H, W]; weight: [K, C/groups, R, S] of the same dtype; scale, shift, mean, var: [K]; residual: the output's shape
    [N, K, H', W'] and dtype; act: "relu" or "none". Any floating dtype; strides of the result are those ``F.conv2d`` gives.
    Raises RuntimeError (ValueError for ``act``) with the op's name, what it got and what it expected. Source: the usual inference
    folding (Jacob et al. 2018, eq. 14; cuDNN's ConvBiasAddActivation).
    """
    args = (x, weight, scale, shift, residual, mean, var, eps, pair(stride), pair(padding), pair(dilation), groups, act)
    if composite():
        return reference.conv_bn_act(*args)
    if _direct(x, weight):
        return select("conv_bn_act", args, check_conv_bn_act)(*args)
    return CONV_BN_ACT(*args)


def check_convolution(x: Tensor, weight: Tensor, groups: int, **others: Tensor | None) -> None:
    """Whether ``weight`` can filter ``x``; also asked where a training block calls torch's convolution. Raises RuntimeError."""
    op = "conv_bn_act"
    check_images(op, x, weight=weight, **others)
    require(weight.dim() == 4, op, "weight", f"{weight.dim()}-D shape {list(weight.shape)}", "4-D [K, C/groups, R, S]")
    require(weight.dtype == x.dtype, op, "x dtype", x.dtype, f"{weight.dtype} (that of weight)")
    require(
        x.shape[1] == weight.shape[1] * groups,
        op,
        "x channels",
        x.shape[1],
        f"{weight.shape[1] * groups} (weight is {list(weight.shape)}, groups {groups})",
    )


def check_geometry(op: str, x: Tensor, weight: Tensor, groups: int, **geometry: tuple[int, int]) -> tuple[int, ...]:
    """The output's shape. Libraries divide by a stride and by groups without asking: a 0 would end the process."""
    for name, numbers in geometry.items():
        least = 0 if name == "padding" else 1
        require(
            len(numbers) == 2 and min(numbers) >= least,
            op,
            name,
            list(numbers),
            f"one or two whole numbers of {least} or more",
        )
    require(groups >= 1, op, "groups", groups, "1 or more")
    require(
        weight.numel() > 0 and weight.shape[0] % groups == 0,
        op,
        "weight",
        list(weight.shape),
        f"filters, a multiple of groups ({groups})",
    )
    sizes = [
        (i + 2 * p - d * (k - 1) - 1) // s + 1
        for i, k, s, p, d in zip(x.shape[2:], weight.shape[2:], *geometry.values(), strict=True)
    ]
    require(
        min(sizes) >= 1,
        op,
        "image",
        f"{x.shape[2]}×{x.shape[3]} pixels",
        f"at least one output pixel for filters of {list(weight.shape)} with {', '.join(f'{k} {list(v)}' for k, v in geometry.items())}",
    )
    return x.shape[0], weight.shape[0], *sizes


def check_conv_bn_act(
    x, weight, scale, shift, residual, mean, var, eps, stride, padding, dilation, groups, act
) -> None:
    op = "conv_bn_act"
    _check_act(op, act)
    check_convolution(x, weight, groups, scale=scale, shift=shift, residual=residual, mean=mean, var=var)
    require((mean is None) == (var is None), op, "mean and var", "one of them", "both or neither")
    check_vectors(op, weight.shape[0], scale=scale, shift=shift, mean=mean, var=var)
    check_like(
        op,
        "residual",
        residual,
        check_geometry(op, x, weight, groups, stride=stride, padding=padding, dilation=dilation),
        x.dtype,
    )


def _fake_conv_bn_act(
    x, weight, scale, shift, residual, mean, var, eps, stride, padding, dilation, groups, act
) -> Tensor:
    # Also the Meta kernel, which the dispatcher calls for a mix of real and meta tensors: without a check it would answer.
    check_images("conv_bn_act", x, weight=weight, scale=scale, shift=shift, residual=residual, mean=mean, var=var)
    return F.conv2d(x, weight, None, stride, padding, dilation, groups)


def _linear_conv(x, weight, scale, shift, mean, var, eps, *geometry) -> Tensor:
    return reference.conv_bn_act(x, weight, scale, shift, None, mean, var, eps, *geometry, "none")


class _ConvBnAct(torch.autograd.Function):
    """dz = dy·[y > 0];  dx = dgrad(dz, w·s);  dw = wgrad(x, dz)·s;  ds = Σ w·wgrad(x, dz), never by dividing by s;  dt = Σ dz."""

    @staticmethod
    def forward(ctx, x, weight, scale, shift, residual, mean, var, eps, *rest):
        out = below_autograd(CONV_BN_ACT, x, weight, scale, shift, residual, mean, var, eps, *rest)
        ctx.save_for_backward(x, weight, scale, shift, mean, var, out if rest[-1] == "relu" else None)
        ctx.rest = (eps, *rest)
        return out

    @staticmethod
    def backward(ctx, dy):
        x, weight, scale, shift, mean, var, out = ctx.saved_tensors
        eps, stride, padding, dilation, groups, act = ctx.rest
        need = ctx.needs_input_grad
        if torch.is_grad_enabled():
            dz = reference.relu_mask(dy, out, act)
            *first, dmean, dvar = differentiable(
                _linear_conv, (x, weight, scale, shift, mean, var, *ctx.rest[:-1]), dz
            )[:6]
            return *first, dz if need[4] else None, dmean, dvar, *[None] * 6
        dz = torch.ops.aten.threshold_backward(dy, out, 0) if act == "relu" else dy
        s, _ = reference.affine(scale, shift, mean, var, eps)
        s4 = s.view(-1, 1, 1, 1)
        geometry = (None, stride, padding, dilation, False, (0, 0), groups)
        dx = dweight = None
        if need[0]:
            folded = (weight * s4).to(weight.dtype)
            dx = torch.ops.aten.convolution_backward(dz, x, folded, *geometry, (True, False, False))[0]
        vectors = [None] * 4
        if need[1] or need[2] or need[6]:
            raw = torch.ops.aten.convolution_backward(dz, x, weight, *geometry, (False, True, False))[1]
            dweight = _flat_like((raw * s4).to(weight.dtype), weight) if need[1] else None
        if any((need[2], need[3], need[5], need[6])):
            dt = dz.sum((0, 2, 3), dtype=s.dtype)
            ds = (weight.to(s.dtype) * raw).sum((1, 2, 3)) if need[2] or need[6] else None
            vectors = _affine_backward(ds, dt, scale, mean, var, eps)
            vectors = [
                v.to(p.dtype) if wanted else None
                for v, p, wanted in zip(
                    vectors, (scale, shift, mean, var), (need[2], need[3], need[5], need[6]), strict=True
                )
            ]
        return dx, dweight, *vectors[:2], dz if need[4] else None, *vectors[2:], *[None] * 6


def _affine_backward(
    ds: Tensor | None, dt: Tensor, scale: Tensor, mean: Tensor | None, var: Tensor | None, eps: float
) -> list:
    """Through s = γ·r, t = β − μ·s, r = (σ²+ε)^-½: dγ = q·r, dβ = dt, dμ = −γ·r·dt, dσ² = −½·γ·r³·q, with q = ds − μ·dt."""
    if mean is None:
        return [ds, dt, None, None]
    r, gamma = torch.rsqrt(var.to(dt.dtype) + eps), scale.to(dt.dtype)
    dmean = -gamma * r * dt
    if ds is None:
        return [None, dt, dmean, None]
    q = ds - mean.to(dt.dtype) * dt
    return [q * r, dt, dmean, -0.5 * gamma * r**3 * q]


CONV_BN_ACT = define(
    "conv_bn_act(Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor? residual, Tensor? mean, Tensor? var, float eps, "
    "int[2] stride, int[2] padding, int[2] dilation, int groups, str act) -> Tensor",
    impl=dispatched("conv_bn_act", check_conv_bn_act),
    fake=_fake_conv_bn_act,
    function=_ConvBnAct,
    lowered=(0, 1, 4),
)
