"""Batches cut into pieces that fit the cache, and the pieces' results joined."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PIECE = 16 << 20  # bytes of the largest activation in a piece


def pieces(images: int, largest: int) -> list[int]:
    """The number of images in each piece of a batch; ``largest``: bytes of the largest activation, for each image.

    No piece is a single image, unless the batch is: oneDNN packs weights for batch 1 differently.
    """
    most = max(2, PIECE // max(1, largest))
    count = -(-images // most)
    if images // count < 2:
        count = max(1, images // 2)
    return [images // count + (i < images % count) for i in range(count)]


def joined(parts: list[Any]) -> Any:
    """The pieces' nested results as one batch's."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts)
    if isinstance(first, dict):
        return type(first)((key, joined([part[key] for part in parts])) for key in first)
    return type(first)(joined(list(group)) for group in zip(*parts, strict=True))
