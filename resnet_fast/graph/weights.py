"""Folded convolution weights, and the sharing of equal weights between plans."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class FoldedConv:
    """One convolution's folded weight (NHWC) and bias in the plan's dtype.

    ``packs``: the filters and bias as kernels pack them, by packing function and input; runtime fills it.
    """

    def __init__(self, weight: Tensor, bias: Tensor, geometry: tuple) -> None:
        self.weight = weight
        self.bias = bias
        self.geometry = geometry
        self.packs: dict[tuple, tuple[Tensor, Tensor] | None] = {}

    def to(self, device: torch.device) -> FoldedConv:
        """The same convolution with its weights on that device."""
        weight, bias = self.weight.to(device), self.bias.to(device)
        return FoldedConv(weight, bias, self.geometry)

    def same(self, other: FoldedConv) -> bool:
        """Whether another plan's convolution is equal, so that it may be used here too."""
        return (
            self.geometry == other.geometry
            and torch.equal(self.weight, other.weight)
            and torch.equal(self.bias, other.bias)
        )


# The weights of living plans by type, shape, dtype and device. Each dict holds weak references, and may be read while
# another thread adds.
_living: dict[tuple, weakref.WeakValueDictionary[int, FoldedConv | Tensor]] = {}
_living_lock = threading.Lock()


def shared(mine: FoldedConv | Tensor) -> Any:
    """The equal weight of a living plan, if there is one; else ``mine``, which later plans then find."""
    weight = mine.weight if isinstance(mine, FoldedConv) else mine
    # Both arguments have the same type, which is a part of the key.
    same: Callable[[Any, Any], bool] = (
        FoldedConv.same if isinstance(mine, FoldedConv) else torch.equal
    )
    key = (type(mine), weight.shape, weight.dtype, weight.device)
    with _living_lock:
        alike = _living.setdefault(key, weakref.WeakValueDictionary())
        equal = (other for other in list(alike.values()) if same(mine, other))
        found = next(equal, mine)
        alike[id(found)] = found
    return found
