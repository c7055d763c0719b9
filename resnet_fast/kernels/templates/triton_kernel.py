"""my_kernel: a 1×1 convolution as a matrix product over pixels, in the simplest correct form. Make it fast from here.

    out[m, k] = act(s[k] · Σ_c x[m, c] · w[k, c] + t[k] + residual[m, k])        m: pixels of an NHWC tensor

Floor: (M·C + K·C + M·K·(1 + residual)) · itemsize bytes, 2·M·K·C FLOP.
Check it:  python -m resnet_fast check --kernel my_kernel.py     (TRITON_INTERPRET=1 in front, without a GPU)
Time it:   python -m resnet_fast bench --kernel my_kernel.py
"""

import triton
import triton.language as tl

from resnet_fast import kernel, reference
from resnet_fast.kernels.triton import launch


@triton.jit
def _my_kernel(
    x,
    w,
    s,
    t,
    residual,
    out,
    M,
    C,
    K,
    RELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TRIPS: tl.constexpr,
):
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    # In registers: one float32 sum for each pixel and filter of the tile.
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in range(TRIPS):
        # Load BLOCK_K channels and multiply; what is outside of the tensors is zero.
        c = i * BLOCK_K + tl.arange(0, BLOCK_K)
        a = tl.load(
            x + m.to(tl.int64)[:, None] * C + c[None, :],
            mask=(m < M)[:, None] & (c < C)[None, :],
            other=0.0,
        )
        b = tl.load(
            w + k[None, :] * C + c[:, None], mask=(k < K)[None, :] & (c < C)[:, None], other=0.0
        )
        acc = tl.dot(a, b, acc, input_precision="ieee")
    # Epilogue: affine, residual, activation; then one store.
    inside = (m < M)[:, None] & (k < K)[None, :]
    at = m.to(tl.int64)[:, None] * K + k[None, :]
    z = (
        acc * tl.load(s + k, mask=k < K, other=0.0)[None, :]
        + tl.load(t + k, mask=k < K, other=0.0)[None, :]
    )
    if residual is not None:
        z += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out + at, z.to(out.dtype.element_ty), mask=inside)


def supports(problem):
    """Why this kernel does not take the problem, or None."""
    if not problem.pointwise or problem.groups != 1 or problem.stride != (1, 1):
        return "it takes only 1×1 convolutions of stride 1, without padding or groups"
    if 0 in problem.x:
        return "the input is empty"
    return launch.declines(problem)


@kernel("experimental.my_kernel", op="conv_bn_act", supports=supports, available=launch.available)
def my_kernel(
    x, weight, scale, shift, residual, mean, var, eps, stride, padding, dilation, groups, act
):
    n, c, h, w = x.shape
    k, m = weight.shape[0], n * h * w
    s, t = reference.affine(scale, shift, mean, var, eps)
    out, finished = launch.conv_result(x, weight, (h, w))
    grid = (triton.cdiv(m, 64), triton.cdiv(k, 64))
    _my_kernel[grid](
        x,
        weight.reshape(k, c).contiguous(),
        s,
        t,
        residual,
        out,
        m,
        c,
        k,
        RELU=act == "relu",
        BLOCK_M=64,
        BLOCK_N=64,
        BLOCK_K=32,
        TRIPS=triton.cdiv(c, 32),
        **launch.OPTIONS,
    )
    return finished(out)
