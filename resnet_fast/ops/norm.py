"""``bn_act``: training batch norm (+ residual) + activation."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dispatch.select import choose_for_call, select
from . import reference
from .contract import (
    check_act,
    check_images,
    check_like,
    check_vectors,
    composite,
    differentiable,
    dispatched,
    unchecked,
)
from .library import below_autograd, define


def bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    *,
    eps: float = 1e-5,
    act: str = "relu",
) -> tuple[Tensor, Tensor, Tensor]:
    """Training batch norm, residual and activation; returns (act((x − μ)/√(σ²+eps)·weight + bias + residual), μ, σ²).

    μ and the biased σ² are those of the batch, float32 (float64 for float64), without gradient: the caller updates its
    running statistics with them. x, residual: [N, C, H, W] of one dtype; weight, bias: [C]. Raises ValueError for one
    value per channel, as torch does, RuntimeError for shapes and dtypes. Source: Ioffe and Szegedy 2015;
    torch.nn.BatchNorm2d.
    """
    args = (x, weight, bias, residual, eps, act)
    if not composite():
        return BN_ACT(*args)
    y, mean, var = reference.bn_act(*args)
    return y, mean.detach(), var.detach()


def fuses_bn_act(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float, act: str
) -> bool:
    """Whether a kernel of ours would compute this :func:`bn_act`; torch's launches more kernels than plain modules do.

    If not, the choice is recorded here, because the op is not called.
    """
    args = (x, weight, bias, residual, eps, act)
    if not choose_for_call("bn_act", args, check_bn_act)[1].id.startswith("aten."):
        return True
    select("bn_act", args, check_bn_act)
    return False


def check_bn_act(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float, act: str
) -> None:
    op = "bn_act"
    check_act(op, act)
    check_images(op, x, weight=weight, bias=bias, residual=residual)
    check_vectors(op, x.shape[1], weight=weight, bias=bias)
    check_like(op, "residual", residual, x.shape, x.dtype)
    n, _, h, w = x.shape
    if n * h * w == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {x.size()} (bn_act)"
        )


def _fake_bn_act(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float, act: str
) -> tuple[Tensor, Tensor, Tensor]:
    check_images("bn_act", x, weight=weight, bias=bias, residual=residual)
    wide = torch.promote_types(x.dtype, torch.float32)
    y, _, _ = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
    mean = torch.empty(x.shape[1], dtype=wide, device=x.device)
    return y, mean, torch.empty_like(mean)


def _fake_bn_act_backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    act: str,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x)
    dweight = torch.empty_like(weight)
    dbias = torch.empty_like(weight)
    dresidual = torch.empty_like(y) if residual else x.new_empty(0)
    return dx, dweight, dbias, dresidual


def _before_activation(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    y, _, _ = reference.bn_act(x, weight, bias, None, eps, "none")
    return y


class _Saved(NamedTuple):
    """What the forward keeps for the backward; ``y`` only with a ReLU, whose mask it is."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    y: Tensor | None
    mean: Tensor
    var: Tensor


class _BnAct(torch.autograd.Function):
    """The derivative of ``bn_act``; formula in :func:`reference.bn_act_backward`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        eps: float,
        act: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, var = below_autograd(BN_ACT, x, weight, bias, residual, eps, act)
        mask = y if act == "relu" else None
        ctx.save_for_backward(x, weight, bias, mask, mean, var)
        ctx.eps = eps
        ctx.act = act
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dmean: Tensor, dvar: Tensor) -> tuple[Tensor | None, ...]:
        saved = _Saved(*ctx.saved_tensors)
        *_, needs_residual, _, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():
            dresidual = reference.relu_mask(dy, saved.y, ctx.act)
            inputs = (saved.x, saved.weight, saved.bias, ctx.eps)
            dx, dweight, dbias, _ = differentiable(_before_activation, inputs, dresidual)
        else:
            y = dy if saved.y is None else saved.y  # without an activation the mask is not read
            args = (
                dy,
                saved.x,
                y,
                saved.weight,
                saved.mean,
                saved.var,
                ctx.eps,
                ctx.act,
                needs_residual,
            )
            dx, dweight, dbias, dresidual = below_autograd(BN_ACT_BACKWARD, *args)
        if not needs_residual:
            return dx, dweight, dbias, None, None, None
        return dx, dweight, dbias, dresidual, None, None


BN_ACT = define(
    "bn_act(Tensor x, Tensor weight, Tensor bias, Tensor? residual, float eps, str act) -> (Tensor, Tensor, Tensor)",
    impl=dispatched("bn_act", check_bn_act),
    fake=_fake_bn_act,
    function=_BnAct,
)


BN_ACT_BACKWARD = define(
    "bn_act_backward(Tensor dy, Tensor x, Tensor y, Tensor weight, Tensor mean, Tensor var, float eps, str act, "
    "bool residual) -> (Tensor, Tensor, Tensor, Tensor)",
    impl=dispatched("bn_act_backward", unchecked),
    fake=_fake_bn_act_backward,
    function=None,
)
