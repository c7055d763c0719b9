"""Fixes for three faults of Triton's interpreter (3.6 and 3.9), without which TRITON_INTERPRET=1 gives wrong results.

``tl.dot`` multiplies the bit patterns of bfloat16 as integers; float32 → bfloat16 truncates where the GPU rounds to
nearest even; on Triton 3.6 with NumPy 2.4 a run-time loop bound raises TypeError. Only the interpreter is touched,
never a compiled kernel.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def _widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns (uint16) as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _round(values: np.ndarray) -> np.ndarray:
    """float32 as bfloat16 bit patterns, to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    nearest = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, nearest).astype(np.uint16)


def install() -> None:
    """Replace the three faulty functions; called once, when the kernels are imported under TRITON_INTERPRET=1."""
    original_cast, original_dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot
    original_patch = interpreter._patch_lang_tensor

    def cast_impl(self, src, dst_type):
        conversion = src.dtype.scalar, dst_type.scalar
        if conversion == (tl.float32, tl.bfloat16):
            return TensorHandle(_round(src.data), tl.bfloat16)
        if conversion == (tl.bfloat16, tl.float32):
            return TensorHandle(_widen(src.data), tl.float32)
        return original_cast(self, src, dst_type)

    def widened(operand):
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return TensorHandle(_widen(operand.data), tl.float32)

    def create_dot(self, a, b, *rest):
        return original_dot(self, widened(a), widened(b), *rest)

    def patch_lang_tensor(tensor, scope):
        original_patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast_impl, create_dot
    interpreter._patch_lang_tensor = patch_lang_tensor
