"""Folding batch norm into the convolution before it, and the packed weights that CPU kernels want, with the guard that keeps them true.

A packed weight is reused only while weight and BN vectors are, byte for byte, those it was made from: an edit through ``.data``
bumps no version counter, so nothing less would see it (measured on two CPU cores, times eager at batch 1 and 16: checked 1.22 and 2.16,
unchecked 1.43 and 2.23, refolding each time 0.59 and 2.10).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import starmap

import torch
from torch import Tensor

from ..ops.reference import affine

_libc = ctypes.CDLL("msvcrt" if os.name == "nt" else None)
_libc.memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


def fold(
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The convolution that equals convolution + affine: (weight·s, t), in the weight's dtype, rounded once, by way of ``out`` (as wide as s).

    A zero scale times an infinite weight would be NaN as in eager; nothing is special-cased.
    """
    s, t = affine(scale, shift, mean, var, eps)
    return torch.mul(weight.to(s.dtype), s.view(-1, 1, 1, 1), out=out).to(weight.dtype), t.to(weight.dtype)


# (folded weight, bias, (stride, padding, dilation, groups), input shape) → filters in the form that a kernel wants, and the bias; or None.
Make = Callable[[Tensor, Tensor, tuple, torch.Size], "tuple[Tensor, Tensor] | None"]


def onednn_filters(weight: Tensor, bias: Tensor, geometry: tuple, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """oneDNN's blocked layout."""
    stride, padding, dilation, groups = geometry
    return torch.ops.mkldnn._reorder_convolution_weight(
        weight.contiguous(), padding, stride, dilation, groups, shape
    ), bias


def pack_case(make: Make, shape: torch.Size) -> tuple:
    """What of an input's shape a form of the filters depends on: oneDNN's for batch ≥ 2 is slower than eager at batch 1, and the other way round."""
    return make, make is onednn_filters and shape[0] > 1


class Packed:
    """What one (weight, BN) was, byte for byte, when it was packed, and its packs: one for each form that kernels want."""

    def __init__(self, key: tuple, tensors: tuple[Tensor, ...], eps: float) -> None:
        self._eps = eps
        # Gone with whichever memory is freed first. Of storages, because a tensor with a weak reference cannot be swapped
        # (torch.utils.swap_tensors, which modules use under torch.__future__'s flag).
        forget, storages = _packed.pop, [t.untyped_storage() for t in tensors]
        self._memory = [(weakref.ref(s, lambda _: forget(key, None)), s.data_ptr(), s.nbytes()) for s in storages]
        self.snapshot = [t.detach().clone(memory_format=torch.preserve_format) for t in tensors]
        self.places = torch.tensor(
            [(t.data_ptr(), s.data_ptr(), t.nbytes) for t, s in zip(tensors, self.snapshot, strict=True)], device="cpu"
        )
        self.packs: dict[tuple, tuple[Tensor, Tensor] | None] = {}

    def holds(self) -> bool:
        """Whether the bytes are the same as at packing; for a caller who holds the tensors that are there now."""
        return same_bytes(self.places)

    def memory(self) -> list[torch.UntypedStorage] | None:
        """For a caller who has no tensors, to hold while he compares: what they lie in, or None if it was freed, moved or resized since."""
        storages = [ref() for ref, _, _ in self._memory]
        lies = all(
            s is not None and s.data_ptr() == start and s.nbytes() == size
            for s, (_, start, size) in zip(storages, self._memory, strict=True)
        )
        return storages if lies else None

    def pack(
        self, shape: torch.Size, stride, padding, dilation, groups: int, make: Make
    ) -> tuple[Tensor, Tensor] | None:
        """The folded weight in the form that ``make`` gives it, and the bias; None if unfoldable, or if it has no such form."""
        geometry = tuple(stride), tuple(padding), tuple(dilation), groups
        case = pack_case(make, shape), geometry
        if case not in self.packs:
            with torch.inference_mode(False), torch.no_grad():
                self.packs[case] = _pack(self.snapshot, self._eps, geometry, shape, make)
        return self.packs[case]


def all_places(entries: Iterable[Packed]) -> Tensor:
    """What ``same_bytes`` takes, of all of them."""
    return torch.cat([torch.empty(0, 3, dtype=torch.int64, device="cpu"), *(entry.places for entry in entries)])


def same_bytes(places: Tensor) -> bool:
    """Whether the bytes at two addresses are the same, for each row (address, address, bytes); by all threads where the CPU kernels are."""
    from . import cpu  # which stands on this file

    if cpu.available() is None:
        return torch.ops.resnet_fast_cpu.same_bytes.default(places)
    return not any(starmap(_libc.memcmp, places.tolist()))


_packed: dict[tuple, Packed] = {}


class Pass(threading.local):
    """One thread's pass through a network into which nobody looks: what its last pass used is compared in one go, before.

    Between convolutions the comparison streams twice the weights through the cache that holds the activations.
    """

    def __init__(self) -> None:
        self.proved: set[tuple] | None = None  # what was compared in this pass; None outside of one
        self.met: set[tuple] = set()  # what it used
        self.largest = 0  # bytes of its largest activation
        self._scratch: mmap.mmap | None = None

    @contextmanager
    def over(self, last: Iterable[tuple]) -> Iterator[None]:
        """Compare what the last pass proved; inside, nothing is compared twice."""
        self.proved = _holding(last)
        self.met, self.largest = set(), 0
        try:
            yield
        finally:
            self.proved = self._scratch = None

    def outside_the_heap(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Memory of that form, for the moment, which goes back to the system after the pass: in the heap each fold would leave a hole
        among the packs, of a ResNet-50 30 to 57 MB in all.
        """
        size, memory = like.numel() * dtype.itemsize, self._scratch
        if memory is None or len(memory) < size:
            memory = mmap.mmap(-1, size)
            self._scratch = None if self.proved is None else memory
        return torch.frombuffer(memory, dtype=dtype, count=like.numel()).as_strided(like.shape, like.stride())


running = Pass()


def _holding(keys: Iterable[tuple]) -> set[tuple]:
    """Those of which memory and bytes are the same as at packing: all in one comparison, one by one only where that finds an edit."""
    known = [(key, entry) for key in keys if (entry := _packed.get(key)) is not None]
    held = [(key, entry, memory) for key, entry in known if (memory := entry.memory()) is not None]
    if same_bytes(all_places(entry for _, entry, _ in held)):
        return {key for key, _, _ in held}
    return {key for key, entry, _ in held if entry.holds()}


def packed(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    stride,
    padding,
    dilation,
    groups: int,
    make: Make = onednn_filters,
) -> tuple[Tensor, Tensor] | None:
    """The folded weight in a kernel's form and the bias, made now or proved to be still true; None if it has no such form."""
    if running.proved is not None:
        running.largest = max(
            running.largest, x.nbytes, x.nbytes // x.shape[1] * weight.shape[0] // (stride[0] * stride[1])
        )
    return proved(weight, scale, shift, mean, var, eps).pack(x.shape, stride, padding, dilation, groups, make)


def proved(weight: Tensor, scale: Tensor, shift: Tensor, mean: Tensor | None, var: Tensor | None, eps: float) -> Packed:
    """What these tensors were packed from, made now or found to be the same still, in a pass once for all."""
    tensors = (weight, scale, shift) if mean is None else (weight, scale, shift, mean, var)
    key = (eps, weight.shape, weight.stride(), *[t.dtype for t in tensors], *[t.data_ptr() for t in tensors])
    entry, seen = _packed.get(key), running.proved
    if entry is None or not (seen is not None and key in seen or entry.holds()):
        with torch.inference_mode(False), torch.no_grad():
            entry = _packed[key] = Packed(key, tensors, eps)
    if seen is not None:
        seen.add(key)
        running.met.add(key)
    return entry


def _pack(
    snapshot: tuple[Tensor, ...], eps: float, geometry: tuple, shape: torch.Size, make: Make
) -> tuple[Tensor, Tensor] | None:
    """From the snapshot, never from the live tensors: an edit in another thread after the comparison, taken back later
    (a moving average swapped in and out), would stay in the pack for good.
    """
    vectors = snapshot[1:] if len(snapshot) == 5 else (*snapshot[1:], None, None)
    if not foldable(*vectors, eps):
        return None
    scratch = running.outside_the_heap(snapshot[0], torch.promote_types(snapshot[1].dtype, torch.float32))
    folded, bias = fold(snapshot[0], *vectors, eps, scratch)
    return make(folded, bias, geometry, shape)


def foldable(scale: Tensor, shift: Tensor, mean: Tensor | None, var: Tensor | None, eps: float) -> bool:
    """Whether every factor is finite: Σ x·(w·∞) is NaN wherever the products' signs differ, (Σ x·w)·∞ as in eager is not."""
    return bool(affine(scale, shift, mean, var, eps)[0].isfinite().all())


def packable(weight: Tensor, *vectors: Tensor | None) -> bool:
    """Whether the bytes of every tensor lie in one run, so that comparing the bytes is comparing the tensor."""
    return (weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)) and all(
        v is None or v.is_contiguous() for v in vectors
    )
