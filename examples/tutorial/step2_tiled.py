"""Step 2, tiled: a block owns 64 pixels × 64 filters and multiplies tiles with tl.dot; torch still does the rest.

    conv[m, k] = Σ_c x[m, c] · w[k, c]          m: pixels of an NHWC tensor; then torch's batch norm, add and ReLU

Check it:  TRITON_INTERPRET=1 python -m resnet_fast check --kernel examples/tutorial/step2_tiled.py
"""

import torch
import triton
import triton.language as tl

from resnet_fast import kernel
from resnet_fast.kernels.triton import launch


@triton.jit
def _tiled(
    x,
    w,
    conv,
    M,
    C,
    K,
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
    inside = (m < M)[:, None] & (k < K)[None, :]
    tl.store(
        conv + m.to(tl.int64)[:, None] * K + k[None, :], acc.to(conv.dtype.element_ty), mask=inside
    )


def supports(problem):
    """Why this kernel does not take the problem, or None."""
    if not problem.pointwise or problem.groups != 1 or problem.stride != (1, 1):
        return "it takes only 1×1 convolutions of stride 1, without padding or groups"
    if 0 in problem.x:
        return "the input is empty"
    return launch.declines(problem)


def unfused(out, scale, shift, residual, mean, var, eps, act):
    """Batch norm, residual and activation as torch's modules run them: each reads and writes the whole tensor."""
    if mean is None:
        mean, var, eps = torch.zeros_like(scale), torch.ones_like(scale), 1e-30
    out = torch.nn.functional.batch_norm(out, mean, var, scale, shift, False, 0.0, eps)
    out = out if residual is None else out + residual
    return torch.relu(out) if act == "relu" else out


@kernel("experimental.step2_tiled", op="conv_bn_act", supports=supports, available=launch.available)
def step2_tiled(
    x, weight, scale, shift, residual, mean, var, eps, stride, padding, dilation, groups, act
):
    n, c, h, w = x.shape
    k, m = weight.shape[0], n * h * w
    out, finished = launch.conv_result(x, weight, (h, w))
    grid = (triton.cdiv(m, 64), triton.cdiv(k, 64))
    _tiled[grid](
        x,
        weight.reshape(k, c).contiguous(),
        out,
        m,
        c,
        k,
        BLOCK_M=64,
        BLOCK_N=64,
        BLOCK_K=32,
        TRIPS=triton.cdiv(c, 32),
        **launch.OPTIONS,
    )
    return finished(unfused(out, scale, shift, residual, mean, var, eps, act))
