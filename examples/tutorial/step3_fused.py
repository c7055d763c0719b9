"""Step 3, fused: batch norm, residual and ReLU on the accumulators, before the one store.

    out[m, k] = act(s[k] · Σ_c x[m, c] · w[k, c] + t[k] + residual[m, k])       s = γ/√(σ²+ε), t = β − μ·s

Check it:  TRITON_INTERPRET=1 python -m resnet_fast check --kernel examples/tutorial/step3_fused.py
"""

import triton
import triton.language as tl

from resnet_fast import kernel
from resnet_fast.kernels.triton import launch


@triton.jit
def _fused(
    x,
    w,
    scale,
    shift,
    mean,
    var,
    eps,
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
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in range(TRIPS):
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
    s = tl.load(scale + k, mask=k < K, other=0.0).to(tl.float32)
    t = tl.load(shift + k, mask=k < K, other=0.0).to(tl.float32)
    if mean is not None:
        s *= tl.rsqrt(tl.load(var + k, mask=k < K, other=1.0).to(tl.float32) + eps)
        t -= tl.load(mean + k, mask=k < K, other=0.0).to(tl.float32) * s
    inside = (m < M)[:, None] & (k < K)[None, :]
    at = m.to(tl.int64)[:, None] * K + k[None, :]
    z = acc * s[None, :] + t[None, :]
    if residual is not None:
        z += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)  # a NaN stays a NaN, as in torch
    tl.store(out + at, z.to(out.dtype.element_ty), mask=inside)


def supports(problem):
    """Why this kernel does not take the problem, or None."""
    if not problem.pointwise or problem.groups != 1 or problem.stride != (1, 1):
        return "it takes only 1×1 convolutions of stride 1, without padding or groups"
    if 0 in problem.x:
        return "the input is empty"
    return launch.declines(problem)


@kernel("experimental.step3_fused", op="conv_bn_act", supports=supports, available=launch.available)
def step3_fused(
    x, weight, scale, shift, residual, mean, var, eps, stride, padding, dilation, groups, act
):
    n, c, h, w = x.shape
    k, m = weight.shape[0], n * h * w
    out, finished = launch.conv_result(x, weight, (h, w))
    vectors = launch.dense_vectors((scale, shift, mean, var, eps))
    grid = (triton.cdiv(m, 64), triton.cdiv(k, 64))
    _fused[grid](
        x,
        weight.reshape(k, c).contiguous(),
        *vectors,
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
