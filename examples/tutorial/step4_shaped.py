"""Step 4, shaped: larger tiles by problem, a deeper pipeline, no masks in the loop, filter tiles as neighbours.

    out[m, k] = act(s[k] · Σ_c x[m, c] · w[k, c] + t[k] + residual[m, k])       s = γ/√(σ²+ε), t = β − μ·s

Check it:  TRITON_INTERPRET=1 python -m resnet_fast check --kernel examples/tutorial/step4_shaped.py
"""

import triton
import triton.language as tl

from resnet_fast import kernel
from resnet_fast.kernels.triton import launch


@triton.jit
def _shaped(
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
    C: tl.constexpr,
    K: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tiles_n: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    # neighbours in the grid share pixels
    m = (tl.program_id(0) // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = (tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    # A row beyond the end reads the last one instead: no mask here, and the store leaves it out.
    x_row = x + tl.minimum(m, M - 1).to(tl.int64) * C
    w_row = w + tl.minimum(k, K - 1) * C
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in range(tl.cdiv(C, BLOCK_K)):
        c = i * BLOCK_K + tl.arange(0, BLOCK_K)
        if C % BLOCK_K == 0:
            a = tl.load(x_row[:, None] + c[None, :])
            b = tl.load(w_row[None, :] + c[:, None])
        else:
            a = tl.load(x_row[:, None] + c[None, :], mask=(c < C)[None, :], other=0.0)
            b = tl.load(w_row[None, :] + c[:, None], mask=(c < C)[:, None], other=0.0)
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


def tile(k, c, itemsize):
    """Block sizes over pixels, filters and channels, and warps: as large as registers and the problem allow."""
    if itemsize == 4:  # float32 runs on the FMA units, where a large tile only spills
        return 64, min(64, max(16, triton.next_power_of_2(k))), 32, 4
    wide = min(128, max(16, triton.next_power_of_2(k)))
    return 128, wide, 64 if c % 64 == 0 else 32, 8


@kernel(
    "experimental.step4_shaped", op="conv_bn_act", supports=supports, available=launch.available
)
def step4_shaped(
    x, weight, scale, shift, residual, mean, var, eps, stride, padding, dilation, groups, act
):
    n, c, h, w = x.shape
    k, m = weight.shape[0], n * h * w
    out, finished = launch.conv_result(x, weight, (h, w))
    vectors = launch.dense_vectors((scale, shift, mean, var, eps))
    block_m, block_n, block_k, warps = tile(k, c, x.itemsize)
    grid = (triton.cdiv(m, block_m) * triton.cdiv(k, block_n),)
    _shaped[grid](
        x,
        weight.reshape(k, c).contiguous(),
        *vectors,
        residual,
        out,
        m,
        C=c,
        K=k,
        RELU=act == "relu",
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=warps,
        num_stages=3,
        **launch.OPTIONS,
    )
    return finished(out)
