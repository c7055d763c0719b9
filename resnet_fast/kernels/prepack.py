"""Weight prepacking: folded batch norm, packed filters for CPU kernels, and the check that they are current.

A packed filter is reused only while weight and BN vectors are, byte for byte, those that it was made from. An edit
through ``.data`` bumps no version counter, so nothing less would see it. Measured on two CPU cores, times eager at
batch 1 and 16: checked 1.22 and 2.16, unchecked 1.43 and 2.23, folded anew each time 0.59 and 2.10.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import starmap

import torch
from torch import Tensor

from ..dispatch.registry import Make
from ..ops.reference import affine
from . import cpu_library
from .vendor import onednn_filters

_libc = ctypes.CDLL("msvcrt" if os.name == "nt" else None)
_libc.memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


# ---------------------------------------------------------------- folding


def fold(
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that equals convolution + affine: (weight·s, t), in the weight's dtype.

    Rounded once; ``out`` is memory for the product in the scale's dtype. A zero scale times an infinite weight is NaN,
    as in eager; nothing is special-cased.
    """
    s, t = affine(scale, shift, mean, var, eps)
    folded = torch.mul(weight.to(s.dtype), s.view(-1, 1, 1, 1), out=out)
    return folded.to(weight.dtype), t.to(weight.dtype)


def foldable(
    scale: Tensor, shift: Tensor, mean: Tensor | None, var: Tensor | None, eps: float
) -> bool:
    """Whether every factor is finite.

    With an infinite one Σ x·(w·∞) is NaN where the products' signs differ; eager's (Σ x·w)·∞ is not.
    """
    s, _ = affine(scale, shift, mean, var, eps)
    return bool(s.isfinite().all())


def packable(weight: Tensor, *vectors: Tensor | None) -> bool:
    """Whether every tensor's bytes are one contiguous run, so that comparing bytes compares tensors."""
    if not (weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)):
        return False
    return all(v is None or v.is_contiguous() for v in vectors)


def pack_case(make: Make, shape: torch.Size) -> tuple:
    """The part of an input's shape that packed filters depend on.

    oneDNN packs for batch 1 or for more: filters packed for the other are slower than eager.
    """
    return make, make is onednn_filters and shape[0] > 1


# ---------------------------------------------------------------- packed filters of live weights


class PackedFilter:
    """A copy of one weight and its BN vectors, and the filters packed from it, one form for each kernel that asks."""

    def __init__(self, key: tuple, tensors: tuple[Tensor, ...], eps: float) -> None:
        self._eps = eps
        # The entry goes with whichever memory is freed first. References are to storages, because a tensor with a weak
        # reference cannot be swapped (torch.utils.swap_tensors, which modules use under torch.__future__'s flag).
        forget = _packed.pop
        storages = [t.untyped_storage() for t in tensors]
        self._memory = [
            (weakref.ref(s, lambda _: forget(key, None)), s.data_ptr(), s.nbytes())
            for s in storages
        ]
        self.snapshot = [t.detach().clone(memory_format=torch.preserve_format) for t in tensors]
        pairs = zip(tensors, self.snapshot, strict=True)
        self.places = torch.tensor(
            [(t.data_ptr(), s.data_ptr(), t.nbytes) for t, s in pairs], device="cpu"
        )
        self.packs: dict[tuple, tuple[Tensor, Tensor] | None] = {}

    def is_current(self) -> bool:
        """Whether the bytes are the same as at packing. The caller must hold the tensors."""
        return same_bytes(self.places)

    def memory(self) -> list[torch.UntypedStorage] | None:
        """The storages of the tensors, for a caller without the tensors to hold while comparing.

        None if one was freed, moved or resized.
        """
        storages = []
        for ref, start, size in self._memory:
            storage = ref()
            if storage is None or storage.data_ptr() != start or storage.nbytes() != size:
                return None
            storages.append(storage)
        return storages

    def pack(
        self, shape: torch.Size, stride, padding, dilation, groups: int, make: Make
    ) -> tuple[Tensor, Tensor] | None:
        """The folded filters as ``make`` packs them, and the bias; None if they cannot be folded or packed."""
        geometry = tuple(stride), tuple(padding), tuple(dilation), groups
        case = pack_case(make, shape), geometry
        if case not in self.packs:
            with torch.inference_mode(False), torch.no_grad():
                self.packs[case] = _pack(self.snapshot, self._eps, geometry, shape, make)
        return self.packs[case]


def _pack(
    snapshot: list[Tensor], eps: float, geometry: tuple, shape: torch.Size, make: Make
) -> tuple[Tensor, Tensor] | None:
    """Fold and pack from the snapshot, never from the live tensors.

    An edit in another thread after the comparison, taken back later (a moving average swapped in and out), would
    otherwise stay in the pack.
    """
    weight, scale, shift, mean, var = snapshot if len(snapshot) == 5 else (*snapshot, None, None)
    if not foldable(scale, shift, mean, var, eps):
        return None
    scratch = this_pass.outside_the_heap(weight, torch.promote_types(scale.dtype, torch.float32))
    folded, bias = fold(weight, scale, shift, mean, var, eps, scratch)
    return make(folded, bias, geometry, shape)


_packed: dict[tuple, PackedFilter] = {}


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
    """The folded filters as ``make`` packs them, and the bias; packed now or checked to be current. None if it cannot.

    Notes the largest activation of a :class:`Pass`.
    """
    if this_pass.packs_verified is not None:
        output = x.nbytes // x.shape[1] * weight.shape[0] // (stride[0] * stride[1])
        this_pass.largest = max(this_pass.largest, x.nbytes, output)
    current = current_pack(weight, scale, shift, mean, var, eps)
    return current.pack(x.shape, stride, padding, dilation, groups, make)


def current_pack(
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
) -> PackedFilter:
    """The packs of these tensors, made now or found to be current. Within a :class:`Pass` each is compared once."""
    tensors = (weight, scale, shift) if mean is None else (weight, scale, shift, mean, var)
    key = (
        eps,
        weight.shape,
        weight.stride(),
        *[t.dtype for t in tensors],
        *[t.data_ptr() for t in tensors],
    )
    entry, verified = _packed.get(key), this_pass.packs_verified
    if entry is None or not (verified is not None and key in verified or entry.is_current()):
        with torch.inference_mode(False), torch.no_grad():
            entry = _packed[key] = PackedFilter(key, tensors, eps)
    if verified is not None:
        verified.add(key)
        this_pass.packs_used.add(key)
    return entry


# ---------------------------------------------------------------- comparing bytes


def all_places(entries: Iterable[PackedFilter]) -> Tensor:
    """The rows of all entries, as ``same_bytes`` takes them."""
    none = torch.empty(0, 3, dtype=torch.int64, device="cpu")
    return torch.cat([none, *(entry.places for entry in entries)])


def same_bytes(places: Tensor) -> bool:
    """Whether the bytes at two addresses are the same, for each row (address, address, bytes).

    The CPU kernels' library compares in all threads.
    """
    if cpu_library.available() is None:
        return torch.ops.resnet_fast_cpu.same_bytes.default(places)
    return not any(starmap(_libc.memcmp, places.tolist()))


def _still_current(keys: Iterable[tuple]) -> set[tuple]:
    """The keys with memory and bytes as at packing. One comparison for all; one each only if that finds an edit."""
    known = [(key, _packed.get(key)) for key in keys]
    held = []  # with the storages, so that none is freed during the comparison
    for key, entry in known:
        memory = None if entry is None else entry.memory()
        if memory is not None:
            held.append((key, entry, memory))
    if same_bytes(all_places(entry for _, entry, _ in held)):
        return {key for key, _, _ in held}
    return {key for key, entry, _ in held if entry.is_current()}


# ---------------------------------------------------------------- one pass through a network


class Pass(threading.local):
    """One thread's pass through a network that nothing observes. The packs of its last pass are compared at its start.

    Between convolutions the comparison would stream twice the weights through the cache that holds the activations.
    """

    def __init__(self) -> None:
        self.packs_verified: set[tuple] | None = (
            None  # keys compared in this pass; None outside of a pass
        )
        self.packs_used: set[tuple] = set()
        self.largest = 0  # bytes of the largest activation
        self._scratch: mmap.mmap | None = None

    @contextmanager
    def over(self, last: Iterable[tuple]) -> Iterator[None]:
        """Compare the packs that the last pass used; inside, none is compared twice."""
        self.packs_verified = _still_current(last)
        self.packs_used = set()
        self.largest = 0
        try:
            yield
        finally:
            self.packs_verified = self._scratch = None

    def outside_the_heap(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Scratch memory like that tensor, returned to the system after the pass.

        In the heap each fold would leave a hole among the packs, 30 to 57 MB in all for a ResNet-50.
        """
        size, memory = like.numel() * dtype.itemsize, self._scratch
        if memory is None or len(memory) < size:
            memory = mmap.mmap(-1, size)
            self._scratch = None if self.packs_verified is None else memory
        return torch.frombuffer(memory, dtype=dtype, count=like.numel()).as_strided(
            like.shape, like.stride()
        )


this_pass = Pass()
