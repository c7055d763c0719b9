"""Shared by the kernels on tensor descriptors: what they decline, descriptors of dense tensors, their epilogue.

A tensor descriptor is a tensor's shape and strides in a launch's arguments; with it the copy unit of Hopper and later
GPUs (TMA) moves a whole tile between memory and shared memory for one instruction: no addresses, no masks, no
registers. What is outside of the tensor, on either side of any dimension, is read as zero and never written. In return
every stride and address is a multiple of 16 bytes.

The products are taken filters × pixels, dot(w, xᵀ): wgmma then reads both operands from shared memory as TMA wrote
them, an affine by filter is four values a thread, and the results are turned on their way out (stmatrix). 128 × 128 of
them take some 100 registers where pixels × filters take 212 (ptxas, sm_90a).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...dispatch.problem import Problem
from . import launch
from .epilogue import activate

ALIGNMENT = 16  # bytes, of every address and stride but the last


def declines(problem: Problem) -> str | None:
    """Why no kernel on descriptors takes the problem (GPU before sm_90, groups, pixels not of 16 bytes), or None."""
    if problem.capability is not None and problem.capability < (9, 0):
        have = ".".join(map(str, problem.capability))
        return f"tensor descriptors (TMA) need compute capability 9.0, this GPU has {have}"
    if problem.groups != 1:
        return f"it has no grouped form, this convolution has {problem.groups} groups"
    for what, channels in (("input", problem.x[1]), ("output", problem.weight[0])):
        if channels * problem.dtype.itemsize % ALIGNMENT:
            return f"tensor descriptors want pixels of whole 16 bytes, the {what} has {channels} channels"
    return launch.declines(problem)


def dense(t: Tensor | None) -> Tensor | None:
    """``t`` in dense, 16-byte aligned NHWC: itself but for filters in another layout and odd slices."""
    t = launch.nhwc(t)
    return t if t is None or t.data_ptr() % ALIGNMENT == 0 else t.clone()


def descriptor(
    t: Tensor | None, shape: tuple[int, ...], block: tuple[int, ...]
) -> TensorDescriptor | None:
    """The descriptor that sees dense memory as ``shape`` and moves ``block``s of it."""
    if t is None:
        return None
    strides = [1]
    for size in shape[:0:-1]:
        strides.insert(0, strides[0] * size)
    return TensorDescriptor(t, list(shape), strides, list(block))


@triton.jit
def finish_tile(acc, s, t, residual, RELU: tl.constexpr):
    """act(acc·s + t + residual) in float32, pixels × filters, of products filters × pixels."""
    z = (acc * s[:, None] + t[:, None]).T
    if residual is not None:
        z += residual.to(tl.float32)
    return activate(z, RELU)
