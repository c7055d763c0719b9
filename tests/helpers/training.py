"""What tests of training share: states to compare and batch norm's ways to keep statistics."""

from __future__ import annotations

import torch
from torch import nn


def buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: b.clone() for name, b in model.named_buffers()}


def assert_same(mine: dict, theirs: dict, tolerance: float = 1e-9) -> None:
    assert list(mine) == list(theirs)
    for name, value in mine.items():
        torch.testing.assert_close(
            value,
            theirs[name],
            rtol=tolerance,
            atol=tolerance,
            equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def each(model: nn.Module, kind: type) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, kind)]


STATISTICS = {
    "momentum 0": lambda bn: setattr(bn, "momentum", 0.0),
    "momentum 1": lambda bn: setattr(bn, "momentum", 1.0),
    "cumulative": lambda bn: setattr(bn, "momentum", None),
    "tracking switched off": lambda bn: setattr(bn, "track_running_stats", False),
    "no counter": lambda bn: setattr(bn, "num_batches_tracked", None),
    "no counter, cumulative": lambda bn: (
        setattr(bn, "num_batches_tracked", None),
        setattr(bn, "momentum", None),
    ),
    "no statistics": lambda bn: (
        setattr(bn, "running_mean", None),
        setattr(bn, "running_var", None),
    ),
    "reset": lambda bn: bn.reset_running_stats(),
    "large eps": lambda bn: setattr(bn, "eps", 0.5),
}
