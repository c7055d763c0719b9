"""torchvision's ResNet in small, accelerated beside itself as it was, and how many of its steps are fused."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet
from twins import images, shake

from resnet_fast.live.accelerate import accelerate


def small(block: type = Bottleneck, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return shake(ResNet(block, [2, 1, 1, 1], num_classes=10, **kwargs)).eval()


def pair(make=small, **kwargs) -> tuple[nn.Module, nn.Module]:
    """(accelerated, untouched) with equal state."""
    theirs = make(**kwargs)
    return accelerate(copy.deepcopy(theirs)), theirs


def fused(m: nn.Module, x: Tensor | None = None) -> int:
    """How many fused steps one forward runs."""
    from resnet_fast.dispatch import record

    with record() as choices, torch.no_grad():
        m(images() if x is None else x)
    return sum(c.problem.op in ("conv_bn_act", "add_act") for c in choices)
