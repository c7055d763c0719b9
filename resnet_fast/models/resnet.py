"""The ResNet class: torchvision's constructor, child names, initialisation and results, with a fused forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..graph.facts import is_frozen_bn
from ..live import network_pass
from ..live.eligibility import why_misplaced, why_plain
from ..live.step import fused_step
from .blocks import BasicBlock, Bottleneck, conv1x1


class ResNet(nn.Module):
    """A residual network with torchvision's constructor, child names, initialisation and results. Forward fuses.

    x: [N, 3, H, W], any floating dtype and strides → logits [N, num_classes]. Inside an unhooked forward activations
    are NHWC; what a user can see (hooks, children called one by one) keeps torchvision's strides. Raises RuntimeError
    for a wrong number of channels, rank, dtype or device, ValueError for a bad ``replace_stride_with_dilation``.
    Source: He et al. 2016; torchvision.models.resnet.
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        layers: list[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: list[bool] | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self._norm_layer = norm_layer or nn.BatchNorm2d
        self.inplanes = 64
        self.dilation = 1
        if replace_stride_with_dilation is None:
            replace_stride_with_dilation = [False, False, False]
        if len(replace_stride_with_dilation) != 3:
            raise ValueError(
                f"replace_stride_with_dilation should be None or a 3-element tuple, got {replace_stride_with_dilation}"
            )
        self.groups = groups
        self.base_width = width_per_group
        self.conv1 = nn.Conv2d(3, self.inplanes, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = self._norm_layer(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = self._make_layer(block, 64, layers[0])
        self.layer2 = self._make_layer(
            block, 128, layers[1], stride=2, dilate=replace_stride_with_dilation[0]
        )
        self.layer3 = self._make_layer(
            block, 256, layers[2], stride=2, dilate=replace_stride_with_dilation[1]
        )
        self.layer4 = self._make_layer(
            block, 512, layers[3], stride=2, dilate=replace_stride_with_dilation[2]
        )
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        self._initialise(zero_init_residual)

    def _initialise(self, zero_init_residual: bool) -> None:
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(m, (nn.BatchNorm2d, nn.GroupNorm)):
                nn.init.constant_(m.weight, 1)
                nn.init.constant_(m.bias, 0)
        # Zero γ in each block's last norm makes every block start as the identity: +0.2–0.3 % (Goyal et al. 2017).
        if zero_init_residual:
            for m in self.modules():
                last_norm: Any = None  # torch's stubs give a Module's weight as Tensor | Module
                if isinstance(m, Bottleneck):
                    last_norm = m.bn3
                elif isinstance(m, BasicBlock):
                    last_norm = m.bn2
                if last_norm is not None and last_norm.weight is not None:
                    nn.init.constant_(last_norm.weight, 0)

    def _make_layer(
        self,
        block: type[BasicBlock | Bottleneck],
        planes: int,
        blocks: int,
        stride: int = 1,
        dilate: bool = False,
    ) -> nn.Sequential:
        norm_layer = self._norm_layer
        downsample = None
        previous_dilation = self.dilation
        if dilate:
            self.dilation *= stride
            stride = 1
        if stride != 1 or self.inplanes != planes * block.expansion:
            downsample = nn.Sequential(
                conv1x1(self.inplanes, planes * block.expansion, stride),
                norm_layer(planes * block.expansion),
            )
        layers = [
            block(
                self.inplanes,
                planes,
                stride,
                downsample,
                self.groups,
                self.base_width,
                previous_dilation,
                norm_layer,
            )
        ]
        self.inplanes = planes * block.expansion
        for _ in range(1, blocks):
            layers.append(
                block(
                    self.inplanes,
                    planes,
                    groups=self.groups,
                    base_width=self.base_width,
                    dilation=self.dilation,
                    norm_layer=norm_layer,
                )
            )
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self._forward_impl(x)

    def _forward_impl(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if why_plain(x, ()) is None and network_pass.is_plain_cpu_inference(self, x):
                answer = network_pass.run_program(self, x)
                return self._inference(x) if answer is None else answer
        return self._steps(x)

    @torch.jit.unused
    def _inference(self, x: Tensor) -> Tensor:
        """A pass on a CPU without a program."""
        inside = _unobserved(self)
        if inside is None:
            return self._steps(x)
        with network_pass.checked_pass(self, inside, x) as answer:
            return self._steps(x) if answer is None else answer

    def _steps(self, x: Tensor) -> Tensor:
        fused = False
        if not torch.jit.is_scripting():
            stem = {"conv": self.conv1, "bn": self.bn1, "relu": self.relu}
            fused = why_plain(x, stem.values()) is None and why_misplaced(stem.items()) is None
            if fused:
                x = self._stem(x)
        if not fused:
            x = self.conv1(x)
            x = self.bn1(x)
            x = self.relu(x)
        x = self.maxpool(x)

        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)

        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        x = self.fc(x)

        return x

    @torch.jit.unused
    def _stem(self, x: Tensor) -> Tensor:
        """conv1 + bn1 + ReLU in one step, in NHWC from here on if no code inside the network can see the strides."""
        is_nchw = x.dim() == 4 and not x.is_contiguous(memory_format=torch.channels_last)
        if is_nchw and not any(map(_sees_strides, self._modules.values())):
            # Through a flat view, so that the gradient is contiguous, as in NCHW: callers ``view`` it.
            if x.requires_grad:
                x = x.reshape(-1).view(x.shape)
            x = x.contiguous(memory_format=torch.channels_last)
        return fused_step(self.conv1, self.bn1, x, act="relu")


ResNet.forward.fuses_itself = "network"  # type: ignore[attr-defined]  # typeshed's functions have no attributes

# Modules that return the same for NHWC inputs as for NCHW ones, strides aside.
_STRIDE_BLIND = {
    BasicBlock,
    Bottleneck,
    nn.Sequential,
    nn.Conv2d,
    nn.BatchNorm2d,
    nn.SyncBatchNorm,
    nn.ReLU,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.Identity,
    nn.Dropout,
    nn.Linear,
}


def _unobserved(network: ResNet) -> list[nn.Module] | None:
    """The modules inside, if no user code observes their inference or their strides; else None."""
    inside = network_pass.unobserved(network)
    if inside is None or not all(map(_is_stride_blind, inside)):
        return None
    return inside


def _is_stride_blind(m: nn.Module) -> bool:
    return type(m) in _STRIDE_BLIND and "forward" not in m.__dict__ or is_frozen_bn(m)


def _sees_strides(m: nn.Module | None) -> bool:
    """Whether user code runs in or under ``m``: a hook, another class, a patched forward. ``modules()`` is slower."""
    if m is None:
        return False
    return bool(
        m._forward_hooks
        or m._forward_pre_hooks
        or m._backward_hooks
        or m._backward_pre_hooks
        or "forward" in m.__dict__
        or type(m) not in _STRIDE_BLIND
        and not is_frozen_bn(m)
        or any(map(_sees_strides, m._modules.values()))
    )
