"""Folding batch norm into the convolution before it, and the packed weights that oneDNN wants, with the guard that keeps them true.

A packed weight is reused only while weight and BN vectors are, byte for byte, those it was made from: an edit through ``.data``
bumps no version counter, so nothing less would see it (measured on two CPU cores, times eager at batch 1 and 16: checked 1.22 and 2.16,
unchecked 1.43 and 2.23, refolding each time 0.59 and 2.10).
"""

from __future__ import annotations

import ctypes
import os
import weakref

import torch
from torch import Tensor

from .reference import affine

_libc = ctypes.CDLL("msvcrt" if os.name == "nt" else None)
_libc.memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


def fold(weight: Tensor, scale: Tensor, shift: Tensor, mean: Tensor | None, var: Tensor | None,
         eps: float) -> tuple[Tensor, Tensor]:
    """The convolution that equals convolution + affine: (weight·s, t), in the weight's dtype, rounded once.

    A zero scale times an infinite weight would be NaN as in eager; nothing is special-cased.
    """
    s, t = affine(scale, shift, mean, var, eps)
    return (weight.to(s.dtype) * s.view(-1, 1, 1, 1)).to(weight.dtype), t.to(weight.dtype)


class _Packed:
    """What one (weight, BN) pair was when it was packed, and its packs: one for batch 1, one for larger batches."""

    def __init__(self, key: tuple[int, int], tensors: tuple[Tensor, ...], eps: float) -> None:
        # Gone with whichever memory is freed first. Of storages, because a tensor with a weak reference cannot be swapped
        # (torch.utils.swap_tensors, which modules use under torch.__future__'s flag).
        forget = _packed.pop
        self.memory = [weakref.ref(t.untyped_storage(), lambda _: forget(key, None)) for t in tensors[:2]]
        self.snapshot = tuple(t.detach().clone(memory_format=torch.preserve_format) for t in tensors)
        self.eps = eps
        self.packs: dict[tuple, tuple[Tensor, Tensor]] = {}

    def holds(self, tensors: tuple[Tensor, ...], eps: float) -> bool:
        """Byte for byte the same parameters as at packing."""
        return self.eps == eps and len(tensors) == len(self.snapshot) and all(map(_same_bytes, tensors, self.snapshot))


_packed: dict[tuple[int, int], _Packed] = {}  # by the addresses of weight and scale


def packed(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, mean: Tensor | None, var: Tensor | None, eps: float,
           stride, padding, dilation, groups: int) -> tuple[Tensor, Tensor]:
    """The folded weight in oneDNN's blocked layout and the bias, made now or proved to be still true."""
    tensors = (weight, scale, shift) if mean is None else (weight, scale, shift, mean, var)
    key = weight.data_ptr(), scale.data_ptr()
    entry = _packed.get(key)
    if entry is None or not entry.holds(tensors, eps):
        with torch.inference_mode(False), torch.no_grad():
            entry = _packed[key] = _Packed(key, tensors, eps)
    # oneDNN's blocked layout depends on the batch: a pack for batch ≥ 2 is slower than eager at batch 1, and the other way round.
    case = (x.shape[0] > 1, tuple(stride), tuple(padding), tuple(dilation), groups)
    pack = entry.packs.get(case)
    if pack is None:
        with torch.inference_mode(False), torch.no_grad():
            folded, bias = fold(*(t.detach() for t in tensors[:3]), mean, var, eps)
            pack = torch.ops.mkldnn._reorder_convolution_weight(folded.contiguous(), padding, stride, dilation, groups, x.shape), bias
        entry.packs[case] = pack
    return pack


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    return (a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()
            and _libc.memcmp(a.data_ptr(), b.data_ptr(), a.nbytes) == 0)


def packable(weight: Tensor, *vectors: Tensor | None) -> bool:
    """Whether the bytes of every tensor lie in one run, so that comparing the bytes is comparing the tensor."""
    return ((weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last))
            and all(v is None or v.is_contiguous() for v in vectors))
