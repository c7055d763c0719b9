"""Ops that span several convolutions: ``plan`` may replace several steps of a network by one of them.

Inference over folded weights: batch norm is in filter and bias already. The activation is always ReLU, and NaN stays
NaN. x, filters and residual are of one dtype, biases float32 (float64 for float64); any strides are right, results
are NHWC (channels_last), rounded once. Every op has first derivatives, by autograd on its formula; forward-mode AD
and functorch transforms run the formula itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import conv_out_hw
from . import reference
from .contract import (
    Pair,
    check_images,
    check_like,
    composite,
    differentiable,
    dispatched,
    pair,
    require,
)
from .library import below_autograd, define


def pointwise_pair(
    x: Tensor, weight: Tensor, x2: Tensor, weight2: Tensor, bias: Tensor, *, stride2: Pair = 1
) -> Tensor:
    """Two 1×1 convolutions into one sum: relu(conv(x, weight) + conv(x2, weight2, stride2) + bias).

    A stage's first block in one product over concatenated channels: its last convolution and its projection, which is
    never written. x: [N, C, H, W]; weight: [K, C, 1, 1]; x2: [N, C2, H2, W2] with (H2−1)//stride+1 = H, W likewise;
    weight2: [K, C2, 1, 1]; bias: [K], of both. Result [N, K, H, W]. Raises RuntimeError with what it got and
    expected. Source: He et al. 2016, eq. 2.
    """
    args = (x, weight, x2, weight2, bias, pair(stride2))
    return reference.pointwise_pair(*args) if composite() else POINTWISE_PAIR(*args)


def conv_tail(
    x: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    weight3: Tensor,
    bias3: Tensor,
    residual: Tensor,
    projection: Tensor | None,
    weight1: Tensor,
    bias1: Tensor,
) -> tuple[Tensor, Tensor]:
    """A bottleneck from its 3×3 convolution on, and the next bottleneck's first 1×1; returns (y, z).

    m = relu(conv3×3(x, weight2, padding 1) + bias2)
    y = relu(conv1×1(m, weight3) + bias3 + r), the block's output; r = residual, or conv1×1(residual, projection)
    z = relu(conv1×1(y, weight1) + bias1), the next block's first convolution

    m and y are rounded to x's dtype. x: [N, C, H, W]; weight2: [C2, C, 3, 3]; weight3: [K, C2, 1, 1]; residual:
    [N, K, H, W], or [N, Cr, H, W] with projection [K, Cr, 1, 1]; weight1: [K1, K, 1, 1]. Raises RuntimeError with
    what it got and expected. Source: He et al. 2016, fig. 5.
    """
    args = (x, weight2, bias2, weight3, bias3, residual, projection, weight1, bias1)
    return reference.conv_tail(*args) if composite() else CONV_TAIL(*args)


def conv_pool(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor | None = None, std: Tensor | None = None
) -> Tensor:
    """The stem: the 3×3 maximum (stride 2, padding 1) of relu(conv(x', weight, stride 2) + bias).

    weight: [K, C, R, S], R and S odd, padded by R//2 and S//2: 7×7 in a ResNet. x: [N, C, H, W], x' = x; or uint8
    with mean and std [C] float32 in units of uint8: x' = (x − mean)/std in weight's dtype, padded by zeros after
    that. Result [N, K, …] in weight's dtype. Raises RuntimeError with what it got and expected. Source: He et al.
    2016, table 1.
    """
    args = (x, weight, bias, mean, std)
    return reference.conv_pool(*args) if composite() else CONV_POOL(*args)


def pointwise_pool(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """The head, 1×1 convolution and global average pool: mean over H, W of relu(conv(x, weight) + bias + residual).

    x: [N, C, H, W]; weight: [K, C, 1, 1]; bias: [K]; residual: [N, K, H, W]. Result [N, K], accumulated in float32.
    Raises RuntimeError with what it got and expected. Source: He et al. 2016; Lin et al. 2013 for the pool.
    """
    args = (x, weight, bias, residual)
    return reference.pointwise_pool(*args) if composite() else POINTWISE_POOL(*args)


# ---------------------------------------------------------------- checks


def _check_filter(
    op: str,
    name: str,
    weight: Tensor,
    channels: int,
    dtype: torch.dtype,
    of: str,
    size: tuple[int, ...] = (1, 1),
) -> None:
    """[any, channels, *size] of x's dtype; ``of`` names what has the channels."""
    right = weight.dim() == 4 and (weight.shape[1], *weight.shape[2:]) == (channels, *size)
    require(
        right,
        op,
        f"{name} shape",
        list(weight.shape),
        f"[K, {channels}, {size[0]}, {size[1]}] ({of} has {channels} channels)",
    )
    require(weight.dtype == dtype, op, f"{name} dtype", weight.dtype, f"{dtype} (that of x)")


def _check_bias(op: str, name: str, bias: Tensor, weight: Tensor) -> None:
    shape = list(bias.shape)
    filters = weight.shape[0]
    require(shape == [filters], op, f"{name} shape", shape, [filters])
    wide = torch.promote_types(weight.dtype, torch.float32)
    require(
        bias.dtype == wide, op, f"{name} dtype", bias.dtype, f"{wide} (weights are {weight.dtype})"
    )


def check_pointwise_pair(
    x: Tensor, weight: Tensor, x2: Tensor, weight2: Tensor, bias: Tensor, stride2: Sequence[int]
) -> None:
    op = "pointwise_pair"
    check_images(op, x, weight=weight, x2=x2, weight2=weight2, bias=bias)
    _check_filter(op, "weight", weight, x.shape[1], x.dtype, "x")
    require(min(stride2) > 0, op, "stride2", list(stride2), "two positive numbers")
    require(
        x2.dim() == 4 and x2.dtype == x.dtype,
        op,
        "x2",
        f"{x2.dtype} {list(x2.shape)}",
        f"4-D {x.dtype} (that of x)",
    )
    strided = x2.shape[0], *conv_out_hw(x2.shape, (1, 1), stride2, padding=(0, 0))
    require(
        strided == (x.shape[0], *x.shape[2:]),
        op,
        "x2 shape",
        list(x2.shape),
        f"images and pixels that stride {list(stride2)} makes those of x, {list(x.shape)}",
    )
    _check_filter(op, "weight2", weight2, x2.shape[1], x.dtype, "x2")
    require(
        weight2.shape[0] == weight.shape[0],
        op,
        "weight2 filters",
        weight2.shape[0],
        f"{weight.shape[0]} (those of weight)",
    )
    _check_bias(op, "bias", bias, weight)


def check_conv_tail(
    x: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    weight3: Tensor,
    bias3: Tensor,
    residual: Tensor,
    projection: Tensor | None,
    weight1: Tensor,
    bias1: Tensor,
) -> None:
    op = "conv_tail"
    check_images(
        op,
        x,
        weight2=weight2,
        bias2=bias2,
        weight3=weight3,
        bias3=bias3,
        residual=residual,
        projection=projection,
        weight1=weight1,
        bias1=bias1,
    )
    _check_filter(op, "weight2", weight2, x.shape[1], x.dtype, "x", (3, 3))
    _check_filter(op, "weight3", weight3, weight2.shape[0], x.dtype, "weight2's result")
    n, _, h, w = x.shape
    if projection is None:
        check_like(op, "residual", residual, (n, weight3.shape[0], h, w), x.dtype)
    else:
        require(
            residual.dim() == 4,
            op,
            "residual",
            f"{residual.dim()}-D shape {list(residual.shape)}",
            "4-D [N, C, H, W]",
        )
        check_like(op, "residual", residual, (n, residual.shape[1], h, w), x.dtype)
        _check_filter(op, "projection", projection, residual.shape[1], x.dtype, "residual")
        require(
            projection.shape[0] == weight3.shape[0],
            op,
            "projection filters",
            projection.shape[0],
            f"{weight3.shape[0]} (those of weight3)",
        )
    _check_filter(op, "weight1", weight1, weight3.shape[0], x.dtype, "y")
    for name, bias, weight in (
        ("bias2", bias2, weight2),
        ("bias3", bias3, weight3),
        ("bias1", bias1, weight1),
    ):
        _check_bias(op, name, bias, weight)


def check_conv_pool(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor | None, std: Tensor | None
) -> None:
    op = "conv_pool"
    require((mean is None) == (std is None), op, "mean and std", "one of them", "both or neither")
    if mean is None or std is None:
        check_images(op, x, weight=weight, bias=bias)
    else:
        require(
            x.dim() == 4 and x.dtype == torch.uint8,
            op,
            "x with mean and std",
            f"{x.dtype} {list(x.shape)}",
            "uint8 [N, C, H, W]",
        )
        for name, t in (("weight", weight), ("bias", bias), ("mean", mean), ("std", std)):
            require(t.device == x.device, op, f"{name} device", t.device, f"{x.device} (that of x)")
    require(
        weight.dim() == 4,
        op,
        "weight",
        f"{weight.dim()}-D shape {list(weight.shape)}",
        "4-D [K, C, R, S]",
    )
    *_, r, s = weight.shape
    is_odd = r % 2 == 1 and s % 2 == 1
    require(is_odd, op, "weight shape", list(weight.shape), "[K, C, R, S], R and S odd")
    dtype = x.dtype if mean is None else weight.dtype
    _check_filter(op, "weight", weight, x.shape[1], dtype, "x", (r, s))
    require(min(x.shape[2:]) > 0, op, "x shape", list(x.shape), "at least one pixel")
    _check_bias(op, "bias", bias, weight)
    if mean is not None and std is not None:
        channels = x.shape[1]
        for name, v in (("mean", mean), ("std", std)):
            shape = list(v.shape)
            require(shape == [channels], op, f"{name} shape", shape, [channels])
            require(
                v.dtype in (torch.float32, bias.dtype),
                op,
                f"{name} dtype",
                v.dtype,
                "torch.float32",
            )


def check_pointwise_pool(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> None:
    op = "pointwise_pool"
    check_images(op, x, weight=weight, bias=bias, residual=residual)
    _check_filter(op, "weight", weight, x.shape[1], x.dtype, "x")
    _check_bias(op, "bias", bias, weight)
    n, _, h, w = x.shape
    check_like(op, "residual", residual, (n, weight.shape[0], h, w), x.dtype)


# ---------------------------------------------------------------- fakes: shapes and strides without data


def _nhwc(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape).to(memory_format=torch.channels_last)


def _fake_pointwise_pair(
    x: Tensor, weight: Tensor, x2: Tensor, weight2: Tensor, bias: Tensor, stride2: Sequence[int]
) -> Tensor:
    check_pointwise_pair(x, weight, x2, weight2, bias, stride2)
    n, _, h, w = x.shape
    return _nhwc(x, n, weight.shape[0], h, w)


def _fake_conv_tail(
    x: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    weight3: Tensor,
    bias3: Tensor,
    residual: Tensor,
    projection: Tensor | None,
    weight1: Tensor,
    bias1: Tensor,
) -> tuple[Tensor, Tensor]:
    check_conv_tail(x, weight2, bias2, weight3, bias3, residual, projection, weight1, bias1)
    n, _, h, w = x.shape
    y = _nhwc(x, n, weight3.shape[0], h, w)
    z = _nhwc(x, n, weight1.shape[0], h, w)
    return y, z


def _fake_conv_pool(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor | None, std: Tensor | None
) -> Tensor:
    check_conv_pool(x, weight, bias, mean, std)
    *_, r, s = weight.shape
    padding = r // 2, s // 2
    z = F.conv2d(x.to(weight.dtype), weight, None, stride=2, padding=padding)
    pooled = F.max_pool2d(z, kernel_size=3, stride=2, padding=1)
    return _nhwc(weight, *pooled.shape)


def _fake_pointwise_pool(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    check_pointwise_pool(x, weight, bias, residual)
    return x.new_empty(x.shape[0], weight.shape[0])


# ---------------------------------------------------------------- derivatives


def _function(name: str, formula: Callable[..., Any]) -> type[torch.autograd.Function]:
    """First derivatives by autograd on the formula, which is run again: nothing inside a fused op was kept."""

    class Across(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            ctx.save_for_backward(*(a if isinstance(a, Tensor) else None for a in args))
            ctx.rest = tuple(None if isinstance(a, Tensor) else a for a in args)
            return below_autograd(getattr(torch.ops.resnet_fast, name).default, *args)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            pairs = zip(ctx.saved_tensors, ctx.rest, strict=True)
            args = tuple(other if tensor is None else tensor for tensor, other in pairs)
            return differentiable(formula, args, grads)

    Across.__name__ = f"_{name}"
    return Across


def _define(
    schema: str, check: Callable[..., None], fake: Callable[..., Any], lowered: tuple[int, ...]
) -> Callable[..., Any]:
    name = schema.split("(")[0]
    return define(
        schema,
        impl=dispatched(name, check),
        fake=fake,
        function=_function(name, getattr(reference, name)),
        lowered=lowered,
    )


POINTWISE_PAIR = _define(
    "pointwise_pair(Tensor x, Tensor weight, Tensor x2, Tensor weight2, Tensor bias, int[2] stride2) -> Tensor",
    check_pointwise_pair,
    _fake_pointwise_pair,
    lowered=(0, 1, 2, 3),
)
CONV_TAIL = _define(
    "conv_tail(Tensor x, Tensor weight2, Tensor bias2, Tensor weight3, Tensor bias3, Tensor residual, "
    "Tensor? projection, Tensor weight1, Tensor bias1) -> (Tensor, Tensor)",
    check_conv_tail,
    _fake_conv_tail,
    lowered=(0, 1, 3, 5, 6, 7),
)
CONV_POOL = _define(
    "conv_pool(Tensor x, Tensor weight, Tensor bias, Tensor? mean, Tensor? std) -> Tensor",
    check_conv_pool,
    _fake_conv_pool,
    lowered=(0, 1),
)
POINTWISE_POOL = _define(
    "pointwise_pool(Tensor x, Tensor weight, Tensor bias, Tensor residual) -> Tensor",
    check_pointwise_pool,
    _fake_pointwise_pool,
    lowered=(0, 1, 3),
)
