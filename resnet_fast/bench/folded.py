"""The bar: a ResNet with batch norm folded away, run by oneDNN, or by cuDNN in a CUDA graph: none of it ours.

A peer as fast as these libraries allow. Unlike ``aten``, its weights are a snapshot, oneDNN's fused ReLU turns NaN into
0, and the projection's bias moves into the block's last convolution.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import vendor
from ..kernels.prepack import fold
from ..runtime.cuda_graph import captured

Conv = Callable[[Tensor, Tensor | None], Tensor]
Block = tuple[Conv | None, list[Conv], Conv]  # projection, inner convolutions, last convolution


@dataclass(frozen=True)
class Folded:
    """A convolution with folded weight and bias; geometry: stride, padding, dilation, groups; act: "relu" or "none"."""

    weight: Tensor
    bias: Tensor | None
    geometry: tuple
    act: str


def onednn(conv: Folded) -> Conv:
    """oneDNN's packed convolution with bias, in-place residual add and ReLU fused; packed for its first input."""
    packed: list[Tensor] = []
    relu = conv.act == "relu"

    def run(x: Tensor, residual: Tensor | None = None) -> Tensor:
        if not packed:
            filters, *_ = vendor.onednn_filters(conv.weight, conv.bias, conv.geometry, x.shape)
            packed.append(filters)
        return vendor.onednn(
            x, packed[0], conv.bias, residual, conv.geometry, in_place=True, relu=relu
        )

    return run


def cudnn(conv: Folded) -> Conv:
    """cuDNN's convolution with bias, residual add and ReLU in one call.

    They run one by one without ReLU, and where cuDNN has no such kernel.
    """
    fused = conv.act == "relu"

    def run(x: Tensor, residual: Tensor | None = None) -> Tensor:
        nonlocal fused
        if fused:
            try:
                return vendor.cudnn(x, conv.weight, conv.bias, residual, conv.geometry)
            except torch.OutOfMemoryError:
                raise
            # a stem with three channels, for example: the other layers still fuse
            except RuntimeError:
                fused = False
        out = F.conv2d(x, conv.weight, conv.bias, *conv.geometry)
        out = out if residual is None else out.add_(residual)
        return out.relu_() if conv.act == "relu" else out

    return run


class FoldedNet:
    """A torchvision-shaped ResNet in eval mode as a flat program of fused convolutions; x: [N, 3, H, W] → logits.

    ``make`` turns a :class:`Folded` into a callable, so that one topology serves every library.
    """

    def __init__(self, model: Any, dtype: torch.dtype, make: Callable[[Folded], Conv]) -> None:
        stem = _weights(model.conv1, model.bn1, dtype)
        self.stem = make(Folded(*stem, "relu"))
        self.blocks: list[Block] = []
        for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
            self.blocks += [_block(block, dtype, make) for block in stage]
        fc = model.fc
        self.fc_weight = fc.weight.detach().to(dtype)
        self.fc_bias = fc.bias.detach().to(dtype)

    @torch.inference_mode()
    def __call__(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.stem(x, None)
        x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
        for projection, inner, last in self.blocks:
            y = x
            for conv in inner:
                y = conv(y, None)
            shortcut = x if projection is None else projection(x, None)
            x = last(y, shortcut)
        pooled = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return F.linear(pooled, self.fc_weight, self.fc_bias)


def _block(block: Any, dtype: torch.dtype, make: Callable[[Folded], Conv]) -> Block:
    """Return the convolutions of a residual block."""
    pairs = [(block.conv1, block.bn1), (block.conv2, block.bn2)]
    if hasattr(block, "conv3"):
        pairs.append((block.conv3, block.bn3))
    *inner_weights, last_weights = [_weights(conv, bn, dtype) for conv, bn in pairs]
    inner = [make(Folded(*weights, "relu")) for weights in inner_weights]
    weight, bias, geometry = last_weights
    if block.downsample is None:
        last = Folded(weight, bias, geometry, "relu")
        return None, inner, make(last)
    conv, bn = block.downsample
    projected, projected_bias, projected_geometry = _weights(conv, bn, dtype)
    projection = Folded(projected, None, projected_geometry, "none")
    last = Folded(weight, bias + projected_bias, geometry, "relu")
    return make(projection), inner, make(last)


def _weights(
    conv: nn.Conv2d, bn: nn.BatchNorm2d, dtype: torch.dtype
) -> tuple[Tensor, Tensor, tuple]:
    """Return the folded weight, bias and geometry of a convolution and its batch norm."""
    parameters = (conv.weight, bn.weight, bn.bias, bn.running_mean, bn.running_var)
    kernel, scale, shift, mean, var = (t.detach() for t in parameters)
    weight, bias = fold(kernel, scale, shift, mean, var, bn.eps)
    weight = weight.to(dtype).contiguous(memory_format=torch.channels_last)
    geometry = conv.stride, conv.padding, conv.dilation, conv.groups
    return weight, bias.to(dtype), geometry


def graphed(run: Callable[[Tensor], Tensor], example: Tensor) -> Callable[[Tensor], Tensor]:
    """``run`` as one CUDA graph over a static channels_last input; the copy into it is part of each call."""
    static = example.clone(memory_format=torch.channels_last)
    graph, out = captured(lambda: run(static), warm=3)

    def replay(x: Tensor) -> Tensor:
        static.copy_(x)
        graph.replay()
        return out

    return replay
