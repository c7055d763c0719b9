"""Networks whose inference pass is kept from the third on, and the input that they are warmed with."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from twins import images, twins

import resnet_fast

X = images(2, 40)


def warm(*models: nn.Module, x: Tensor = X) -> None:
    with torch.no_grad():
        for model in models:
            for _ in range(3):
                model(x)


def accelerated() -> tuple[nn.Module, nn.Module]:
    """(torchvision's, accelerated; torchvision's as it was)."""
    _, theirs = twins()
    return resnet_fast.accelerate(copy.deepcopy(theirs)), theirs


PAIRS = {"ours": twins, "accelerated": accelerated}
each_pair = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
