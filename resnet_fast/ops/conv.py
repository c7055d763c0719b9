"""``conv_bn_act``: convolution + affine (+ residual) + activation."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import conv_out_hw
from ..dispatch.select import select
from . import reference
from .contract import (
    Pair,
    check_act,
    check_images,
    check_like,
    check_vectors,
    composite,
    contiguous_gradient,
    differentiable,
    dispatched,
    pair,
    require,
    skips_dispatcher,
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

    With ``mean`` and ``var`` (batch norm's four vectors and ``eps``) s = scale/√(var+eps) and t = shift − mean·s;
    without, s = scale and t = shift. x: [N, C, H, W]; weight: [K, C/groups, R, S] of the same dtype; scale, shift,
    mean, var: [K]; residual: the output's shape [N, K, H', W'] and dtype; act: "relu" or "none". Any floating dtype;
    strides of the result are those ``F.conv2d`` gives. Raises RuntimeError (ValueError for ``act``) with the op's
    name, what it got and what it expected. Source: the usual inference folding (Jacob et al. 2018, eq. 14; cuDNN's
    ConvBiasAddActivation).
    """
    args = (
        x,
        weight,
        scale,
        shift,
        residual,
        mean,
        var,
        eps,
        pair(stride),
        pair(padding),
        pair(dilation),
        groups,
        act,
    )
    if composite():
        return reference.conv_bn_act(*args)
    if skips_dispatcher(x, weight):
        return select("conv_bn_act", args, check_conv_bn_act)(*args)
    return CONV_BN_ACT(*args)


def check_convolution(x: Tensor, weight: Tensor, groups: int, **others: Tensor | None) -> None:
    """Raise RuntimeError unless ``weight`` fits ``x``; a training block asks it before it calls torch's convolution."""
    op = "conv_bn_act"
    check_images(op, x, weight=weight, **others)
    shape = list(weight.shape)
    require(
        weight.dim() == 4,
        op,
        "weight",
        f"{weight.dim()}-D shape {shape}",
        "4-D [K, C/groups, R, S]",
    )
    require(weight.dtype == x.dtype, op, "x dtype", x.dtype, f"{weight.dtype} (that of weight)")
    channels = weight.shape[1] * groups
    require(
        x.shape[1] == channels,
        op,
        "x channels",
        x.shape[1],
        f"{channels} (weight is {shape}, groups {groups})",
    )


def check_geometry(
    op: str, x: Tensor, weight: Tensor, groups: int, **geometry: tuple[int, int]
) -> tuple[int, ...]:
    """The result's shape, after checks. oneDNN divides by stride and groups unchecked: a 0 would end the process."""
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
    sizes = conv_out_hw(x.shape, weight.shape, **geometry)
    settings = ", ".join(f"{name} {list(numbers)}" for name, numbers in geometry.items())
    require(
        min(sizes) >= 1,
        op,
        "image",
        f"{x.shape[2]}×{x.shape[3]} pixels",
        f"at least one output pixel for filters of {list(weight.shape)} with {settings}",
    )
    return x.shape[0], weight.shape[0], *sizes


def check_conv_bn_act(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    act: str,
) -> None:
    op = "conv_bn_act"
    check_act(op, act)
    check_convolution(
        x, weight, groups, scale=scale, shift=shift, residual=residual, mean=mean, var=var
    )
    require((mean is None) == (var is None), op, "mean and var", "one of them", "both or neither")
    check_vectors(op, weight.shape[0], scale=scale, shift=shift, mean=mean, var=var)
    result = check_geometry(
        op, x, weight, groups, stride=stride, padding=padding, dilation=dilation
    )
    check_like(op, "residual", residual, result, x.dtype)


def _fake_conv_bn_act(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    act: str,
) -> Tensor:
    # This is also the Meta kernel, which the dispatcher calls for a mix of real and meta tensors: hence the check.
    check_images(
        "conv_bn_act",
        x,
        weight=weight,
        scale=scale,
        shift=shift,
        residual=residual,
        mean=mean,
        var=var,
    )
    return F.conv2d(x, weight, None, stride, padding, dilation, groups)


# ---------------------------------------------------------------- derivative


class _Arguments(NamedTuple):
    """One value for each argument of the op: whether it needs a gradient, or its gradient."""

    x: Any = None
    weight: Any = None
    scale: Any = None
    shift: Any = None
    residual: Any = None
    mean: Any = None
    var: Any = None
    eps: None = None
    stride: None = None
    padding: None = None
    dilation: None = None
    groups: None = None
    act: None = None


class _Saved(NamedTuple):
    """What the forward keeps for the backward; ``out`` only with a ReLU, whose mask it is."""

    x: Tensor
    weight: Tensor
    scale: Tensor
    shift: Tensor
    mean: Tensor | None
    var: Tensor | None
    out: Tensor | None


class _Settings(NamedTuple):
    """The arguments that are no tensors."""

    eps: float
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    act: str


class _ConvBnAct(torch.autograd.Function):
    """The derivative of ``conv_bn_act``, with s and t of the affine and z = conv(x, w).

    dz = dy·[y > 0];  dx = dgrad(dz, w·s);  dw = wgrad(x, dz)·s;  dt = Σ dz;
    ds = Σ w·wgrad(x, dz), which does not divide by s: ``zero_init_residual`` sets it to 0.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        shift: Tensor,
        residual: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        *settings: Any,
    ) -> Tensor:
        out: Tensor = below_autograd(
            CONV_BN_ACT, x, weight, scale, shift, residual, mean, var, *settings
        )
        ctx.settings = _Settings(*settings)
        mask = out if ctx.settings.act == "relu" else None
        ctx.save_for_backward(x, weight, scale, shift, mean, var, mask)
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        saved = _Saved(*ctx.saved_tensors)
        needs = _Arguments(*ctx.needs_input_grad)
        gradients = _differentiable_gradients if torch.is_grad_enabled() else _gradients
        return tuple(gradients(saved, ctx.settings, needs, dy))


def _differentiable_gradients(
    saved: _Saved, settings: _Settings, needs: _Arguments, dy: Tensor
) -> _Arguments:
    """Gradients that can be differentiated again (``create_graph``): autograd on the reference formula."""
    dz = reference.relu_mask(dy, saved.out, settings.act)
    inputs = (*saved[:-1], *settings[:-1])
    dx, dweight, dscale, dshift, dmean, dvar, *_ = differentiable(_before_activation, inputs, dz)
    dresidual = dz if needs.residual else None
    return _Arguments(dx, dweight, dscale, dshift, dresidual, dmean, dvar)


def _before_activation(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    geometry = (stride, padding, dilation, groups)
    return reference.conv_bn_act(x, weight, scale, shift, None, mean, var, eps, *geometry, "none")


def _gradients(saved: _Saved, settings: _Settings, needs: _Arguments, dy: Tensor) -> _Arguments:
    """First derivatives by ATen's convolution_backward on the folded filter, and reductions for the affine."""
    dz = dy
    if settings.act == "relu":
        dz = torch.ops.aten.threshold_backward(dy, saved.out, 0)
    x = saved.x
    weight = saved.weight
    s, _ = reference.affine(saved.scale, saved.shift, saved.mean, saved.var, settings.eps)
    s4 = s.view(-1, 1, 1, 1)
    dx: Tensor | None = None
    dweight: Tensor | None = None
    unscaled: Any = None  # the filter's gradient before it is multiplied by s
    if needs.x:
        folded = (weight * s4).to(weight.dtype)
        dx, _, _ = _convolution_backward(dz, x, folded, settings, (True, False, False))
    if needs.weight or needs.scale or needs.var:
        _, unscaled, _ = _convolution_backward(dz, x, weight, settings, (False, True, False))
    if needs.weight:
        scaled = (unscaled * s4).to(weight.dtype)
        dweight = contiguous_gradient(scaled, weight)
    dscale, dshift, dmean, dvar = _vector_gradients(saved, settings, needs, dz, unscaled, s.dtype)
    dresidual = dz if needs.residual else None
    return _Arguments(dx, dweight, dscale, dshift, dresidual, dmean, dvar)


def _convolution_backward(
    dz: Tensor, x: Tensor, weight: Tensor, settings: _Settings, outputs: tuple[bool, bool, bool]
) -> tuple[Any, Any, Any]:
    _, stride, padding, dilation, groups, _ = settings
    transposed, output_padding = False, (0, 0)
    return torch.ops.aten.convolution_backward(
        dz, x, weight, None, stride, padding, dilation, transposed, output_padding, groups, outputs
    )


def _vector_gradients(
    saved: _Saved,
    settings: _Settings,
    needs: _Arguments,
    dz: Tensor,
    unscaled: Any,
    wide: torch.dtype,
) -> list[Tensor | None]:
    """Gradients of scale, shift, mean and var, each in its vector's dtype; None where none is needed."""
    vectors = (saved.scale, saved.shift, saved.mean, saved.var)
    needed = (needs.scale, needs.shift, needs.mean, needs.var)
    if not any(needed):
        return [None] * 4
    dt = dz.sum((0, 2, 3), dtype=wide)
    ds = (saved.weight.to(wide) * unscaled).sum((1, 2, 3)) if needs.scale or needs.var else None
    gradients = _affine_backward(ds, dt, saved.scale, saved.mean, saved.var, settings.eps)
    found: list[Tensor | None] = []
    for gradient, vector, need in zip(gradients, vectors, needed, strict=True):
        if not need or gradient is None or vector is None:
            found.append(None)
        else:
            found.append(gradient.to(vector.dtype))
    return found


def _affine_backward(
    ds: Tensor | None,
    dt: Tensor,
    scale: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
) -> list[Tensor | None]:
    """Through s = γ·r, t = β − μ·s, r = (σ²+ε)^-½: dγ = q·r, dβ = dt, dμ = −γ·r·dt, dσ² = −½·γ·r³·q; q = ds − μ·dt."""
    if mean is None:
        return [ds, dt, None, None]
    assert var is not None  # checked: mean and var come together
    r = torch.rsqrt(var.to(dt.dtype) + eps)
    gamma = scale.to(dt.dtype)
    dmean = -gamma * r * dt
    if ds is None:
        return [None, dt, dmean, None]
    q = ds - mean.to(dt.dtype) * dt
    return [q * r, dt, dmean, -0.5 * gamma * r**3 * q]


CONV_BN_ACT = define(
    "conv_bn_act(Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor? residual, Tensor? mean, Tensor? var, "
    "float eps, int[2] stride, int[2] padding, int[2] dilation, int groups, str act) -> Tensor",
    impl=dispatched("conv_bn_act", check_conv_bn_act),
    fake=_fake_conv_bn_act,
    function=_ConvBnAct,
    lowered=(0, 1, 4),
)
