"""Non-trivial batch norms for a model without trained weights."""

from __future__ import annotations

import torch
from torch import nn


def settle(model: nn.Module) -> nn.Module:
    """Set random γ and β and the statistics of random images, and leave the model in training mode.

    So no parameter is trivial, and activations stay in range.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for bn in norms:
        nn.init.uniform_(bn.weight, 0.5, 1.0)
        nn.init.normal_(bn.bias, std=0.2)
        bn.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(4, 3, 64, 64))
    for bn in norms:
        bn.momentum = 0.1
        if bn.num_batches_tracked is not None:
            bn.num_batches_tracked.zero_()
    return model
