"""oneDNN's and cuDNN's fused convolutions, and torch's layout rules around them.

``geometry`` is (stride, padding, dilation, groups) throughout.
"""

from __future__ import annotations

import torch
from torch import Tensor

# ---------------------------------------------------------------- oneDNN


def onednn_takes(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's packed convolution takes this input: fp32, or bf16 if the processor has it; CPU; not empty."""
    if x.device.type != "cpu" or x.numel() == 0 or weight.numel() == 0:
        return False
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    return (
        x.dtype == torch.float32
        or x.dtype == torch.bfloat16
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def onednn_filters(
    weight: Tensor, bias: Tensor, geometry: tuple, shape: torch.Size
) -> tuple[Tensor, Tensor]:
    """The filters in oneDNN's blocked layout for inputs of that shape, and the bias."""
    stride, padding, dilation, groups = geometry
    reorder = torch.ops.mkldnn._reorder_convolution_weight
    return reorder(weight.contiguous(), padding, stride, dilation, groups, shape), bias


def onednn(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    geometry: tuple,
    *,
    in_place: bool = False,
    relu: bool = False,
) -> Tensor:
    """oneDNN's packed convolution with bias and, if given, residual fused.

    ``in_place``: the output takes the residual's memory. ``relu``: oneDNN's own fused ReLU. It turns NaN into 0 in all
    its forms, so only the benchmark's baseline uses it; kernels apply torch's ReLU in place afterwards (2–6 % slower).
    """
    stride, padding, dilation, groups = geometry
    mkldnn = torch.ops.mkldnn
    if residual is None:
        act = "relu" if relu else "none"
        conv = mkldnn._convolution_pointwise.default
        return conv(x, packed, bias, padding, stride, dilation, groups, act, [], "")
    act = "relu" if relu else None
    if in_place:
        conv_add_ = mkldnn._convolution_pointwise_.binary
        return conv_add_(
            residual, x, packed, bias, padding, stride, dilation, groups, "add", None, act, [], None
        )
    conv_add = mkldnn._convolution_pointwise.binary
    return conv_add(
        x, residual, packed, bias, padding, stride, dilation, groups, "add", None, act, [], None
    )


# ---------------------------------------------------------------- cuDNN


def cudnn(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, geometry: tuple
) -> Tensor:
    """cuDNN's convolution with bias, residual add and ReLU in one call."""
    if residual is None:
        return torch.cudnn_convolution_relu(x, weight, bias, *geometry)
    return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *geometry)


# ---------------------------------------------------------------- layouts


def nhwc(t: Tensor) -> bool:
    """Whether torch counts these strides as channels_last (c10's rule).

    The output of F.conv2d is channels_last if its input or its weight is.
    """
    sizes, strides = t.shape, t.stride()
    if strides[1] == 0 or 0 in sizes:
        return False
    least = 0
    for d in (1, 3, 2, 0):
        if strides[d] < least or d == 0 and least == strides[1]:
            return False
        least = strides[d] * sizes[d]
    return True


def both_layouts(t: Tensor) -> bool:
    """Whether a tensor is NCHW and NHWC at once, for it has one pixel or one channel.

    With such a residual oneDNN's fused add fails in torch 2.11: "could not create a memory".
    """
    return t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last)
