"""Each op as eager PyTorch computes it."""

from __future__ import annotations

from torch import Tensor

from .rule import as_tuple
from .samples import SAMPLES


def eager(op: str, args: tuple) -> tuple[Tensor, ...]:
    """What a user has without this package, in the arguments' dtype: torch's ops one after the other."""
    return as_tuple(SAMPLES[op].eager(*args))
