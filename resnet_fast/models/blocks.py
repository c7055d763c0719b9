"""The residual blocks: torchvision's modules and names, with a forward that calls fused ops where the path rule allows.

State stays in ordinary ``nn.Conv2d`` and ``nn.BatchNorm2d`` children, so state_dict, optimisers, DDP, SyncBN, EMA, init
and hooks work as before. The plain forward is torchvision's, operation by operation: fx, scripting, export and
torch.compile see that one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..live.eligibility import why_misplaced, why_plain
from ..live.step import fused_step


def conv3x3(
    in_planes: int, out_planes: int, stride: int = 1, groups: int = 1, dilation: int = 1
) -> nn.Conv2d:
    """3×3 convolution with padding, no bias."""
    return nn.Conv2d(
        in_planes,
        out_planes,
        kernel_size=3,
        stride=stride,
        padding=dilation,
        groups=groups,
        bias=False,
        dilation=dilation,
    )


def conv1x1(in_planes: int, out_planes: int, stride: int = 1) -> nn.Conv2d:
    """1×1 convolution, no bias."""
    return nn.Conv2d(in_planes, out_planes, kernel_size=1, stride=stride, bias=False)


def _skipped(block: BasicBlock | Bottleneck) -> list[nn.Module | None]:
    """The modules that a fused forward does not call: the children, and the projection's."""
    children: list[nn.Module | None] = [m for m in block._modules.values() if m is not None]
    return (
        children if block.downsample is None else [*children, *block.downsample._modules.values()]
    )


def _identity(block: BasicBlock | Bottleneck, x: Tensor) -> Tensor:
    """The shortcut: the input itself, or the fused projection."""
    if block.downsample is None:
        return x
    conv: Any  # a Conv2d and a BatchNorm2d: why_plain_block has checked both
    bn: Any
    conv, bn = block.downsample._modules.values()
    return fused_step(conv, bn, x)


def why_plain_block(block: BasicBlock | Bottleneck, x: Tensor) -> str | None:
    """Why this block's plain modules must run on ``x``, or None."""
    downsample = block.downsample
    if downsample is not None and (
        type(downsample) is not nn.Sequential
        or len(downsample) != 2
        or why_misplaced(zip(("conv", "bn"), downsample._modules.values(), strict=True))
    ):
        return "the projection is not Conv2d + BatchNorm2d"
    return why_plain(x, _skipped(block)) or why_misplaced(block._modules.items())


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut (He et al. 2016, ResNet-18 and -34), torchvision's constructor and names.

    x: [N, inplanes, H, W] → [N, planes, H/stride, W/stride]. Unlike torchvision's, it takes ``dilation`` > 1 (both
    convolutions). Raises ValueError for groups or base_width, which the architecture does not have.
    """

    expansion: int = 1

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        if groups != 1 or base_width != 64:
            raise ValueError(
                f"BasicBlock: got groups={groups}, base_width={base_width}, expected groups=1 and base_width=64"
            )
        self.conv1 = conv3x3(inplanes, planes, stride, dilation=dilation)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes, dilation=dilation)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if why_plain_block(self, x) is None:
                out = fused_step(self.conv1, self.bn1, x, act="relu")
                return fused_step(self.conv2, self.bn2, out, _identity(self, x), act="relu")

        identity = x

        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)

        out = self.conv2(out)
        out = self.bn2(out)

        if self.downsample is not None:
            identity = self.downsample(x)

        out += identity
        out = self.relu(out)

        return out


BasicBlock.forward.fuses_itself = "block"  # type: ignore[attr-defined]  # typeshed's functions have no attributes


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 convolutions and a shortcut, torchvision's constructor and names; stride in the 3×3 ("v1.5").

    x: [N, inplanes, H, W] → [N, 4·planes, H/stride, W/stride]; the 3×3 has planes·base_width/64·groups channels.
    Source: He et al. 2016; Xie et al. 2017 for groups; Zagoruyko and Komodakis 2016 for width.
    """

    expansion: int = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        groups: int = 1,
        base_width: int = 64,
        dilation: int = 1,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        norm_layer = norm_layer or nn.BatchNorm2d
        width = int(planes * (base_width / 64.0)) * groups
        self.conv1 = conv1x1(inplanes, width)
        self.bn1 = norm_layer(width)
        self.conv2 = conv3x3(width, width, stride, groups, dilation)
        self.bn2 = norm_layer(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.bn3 = norm_layer(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if why_plain_block(self, x) is None:
                out = fused_step(self.conv1, self.bn1, x, act="relu")
                out = fused_step(self.conv2, self.bn2, out, act="relu")
                return fused_step(self.conv3, self.bn3, out, _identity(self, x), act="relu")

        identity = x

        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)

        out = self.conv2(out)
        out = self.bn2(out)
        out = self.relu(out)

        out = self.conv3(out)
        out = self.bn3(out)

        if self.downsample is not None:
            identity = self.downsample(x)

        out += identity
        out = self.relu(out)

        return out


Bottleneck.forward.fuses_itself = "block"  # type: ignore[attr-defined]  # typeshed's functions have no attributes
