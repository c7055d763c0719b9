"""Folded convolution weights and their packed forms."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor


class Filter:
    """One convolution's folded weight (NHWC) and bias in the plan's dtype, and its packs: one for each form that kernels want."""

    def __init__(self, weight: Tensor, bias: Tensor, geometry: tuple) -> None:
        self.weight, self.bias, self.geometry = weight, bias, geometry
        self.packs: dict[tuple, tuple[Tensor, Tensor] | None] = {}

    def same(self, other: Filter) -> bool:
        """Whether another plan's filter may serve here too."""
        return (
            self.geometry == other.geometry
            and torch.equal(self.weight, other.weight)
            and torch.equal(self.bias, other.bias)
        )


# What living plans hold, by shape: for each a dict of weak references, so that a thread may look while another adds.
_held: dict[tuple, weakref.WeakValueDictionary[int, Filter | Tensor]] = {}


_holding = threading.Lock()


def _shared(mine: Filter | Tensor) -> Any:
    """What a living plan holds with the very same values, else ``mine``, which later plans then find."""
    whole = mine.weight if isinstance(mine, Filter) else mine
    same = Filter.same if isinstance(mine, Filter) else torch.equal
    with _holding:
        alike = _held.setdefault((type(mine), whole.shape, whole.dtype, whole.device), weakref.WeakValueDictionary())
        found = next((other for other in list(alike.values()) if same(mine, other)), mine)
        alike[id(found)] = found
    return found
