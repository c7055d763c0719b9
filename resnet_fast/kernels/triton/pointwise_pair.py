"""Two 1×1 convolutions of different inputs, added, + bias + ReLU: one matrix product over concatenated channels.

    out[m, k] = relu(Σ_c x[m, c] · w[k, c] + Σ_c x2[row(m), c] · w2[k, c] + b[k])

The end of a stage's first bottleneck, [x | x2] · [w | w2]ᵀ: x is what conv3 reads, x2 the block's input, w2 the
projection, which is never written. x, x2: NHWC, row(m) skips pixels where the projection has a stride; w: [K, C],
w2: [K, C2]; b: float32 [K]; out: NHWC. Each block owns BLOCK_M pixels × BLOCK_N filters; one loop walks the channels of
x and then those of x2 into the same accumulator, so the operand pipeline fills once.
Floor: (M·(C + C2) + K·(C + C2) + M·K) · itemsize bytes, M = N·H·W, and 2·M·K·(C + C2) FLOP: of the unfused pair it
leaves out the projection's result, written and read. ResNet-50's layer2 (256 images, 28², 128 + 256 → 512, bf16): 360
MB, 78.9 GFLOP, on an H200 100 µs by its matrix units (84 by memory); the unfused pair moves 771 MB in 179 µs.
Source: GEMM with split-K as in CUTLASS; the K-concatenation is that of two linear maps with one sum.
"""

from __future__ import annotations

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...dispatch.problem import Problem
from ...dispatch.registry import kernel
from . import launch
from .dependent_launch import begin
from .epilogue import finish
from .gemm_config import Gemm, GemmConfig, gemm_config
from .split_k import add_partials, partials, store_partial


@triton.jit(do_not_specialize=["M", "H", "W", "H2", "W2"])
def _pointwise_pair(
    x,
    w,
    x2,
    w2,
    bias,
    out,
    M,
    H,
    W,
    H2,
    W2,
    trips,
    C: tl.constexpr,
    C2: tl.constexpr,
    K: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    EXACT: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """One tile of pixels × filters; ``split`` is this block's share of both inputs' channels."""
    begin(PDL)
    tiles_n = tl.cdiv(K, BLOCK_N)
    split = tl.program_id(1)
    m = (tl.program_id(0) // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = (tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)

    # Each pixel's row in x and in x2. Rows and filters beyond the end read the last one; finish() does not store them.
    row, filt = tl.minimum(m, M - 1), tl.minimum(k, K - 1)
    image, pixel = row // (H * W), row % (H * W)
    row2 = image.to(tl.int64) * H2 * W2 + (pixel // W) * SH * W2 + (pixel % W) * SW

    # In registers: one sum for each pixel and filter, of both products.
    first_trips: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in range(trips):
        # Load BLOCK_K channels, first of x and w, then of x2 and w2.
        step = split * trips + i
        first = step < first_trips
        c = tl.where(first, step, step - first_trips) * BLOCK_K + tl.arange(0, BLOCK_K)
        # Rows times channels here, not before: the compiler then knows that the chosen addresses are whole vectors.
        channels = tl.where(first, C, C2)
        pixels = (
            tl.where(first, x, x2) + (tl.where(first, row, row2) * channels)[:, None] + c[None, :]
        )
        filters = tl.where(first, w, w2) + (filt * channels)[None, :] + c[:, None]
        if EXACT:
            a = tl.load(pixels)
            b = tl.load(filters)
        else:
            valid = c < channels
            a = tl.load(pixels, mask=valid[None, :], other=0.0)
            b = tl.load(filters, mask=valid[:, None], other=0.0)
        # Product.
        acc = tl.dot(a, b, acc, input_precision="ieee")

    # Epilogue and store.
    if SPLIT == 1:
        finish(acc, None, bias, None, None, 0.0, None, out, m, k, M, K, True)
    else:
        store_partial(acc, out, split, m, k, M, K)


def supports(problem: Problem) -> str | None:
    """Everything in NHWC."""
    second_side = prod(problem.second or ()), *map(prod, problem.chain)
    if max(second_side) > launch.INDEX_LIMIT:
        return "an image or filter of more than 2³¹ pixels or elements on the second side: their indices are 32-bit"
    return launch.declines(problem)


@kernel(
    "triton.pointwise_pair",
    op="pointwise_pair",
    supports=supports,
    available=launch.available,
    sources=launch.sources("dependent_launch", "epilogue", "split_k"),
)
def pointwise_pair(x, weight, x2, weight2, bias, stride2) -> Tensor:
    n, c, h, w = x.shape
    k, c2 = weight2.shape[:2]
    g = Gemm(n * h * w, k, c + c2, itemsize=x.itemsize, capability=launch.capability(x))
    return run(x, weight, x2, weight2, bias, stride2, g, gemm_config(g))


def run(
    x: Tensor,
    weight: Tensor,
    x2: Tensor,
    weight2: Tensor,
    bias: Tensor,
    stride2: tuple[int, int],
    g: Gemm,
    config: GemmConfig,
) -> Tensor:
    """The product with a given config, which is what a tuner tries; ``g`` counts both inputs' channels."""
    out = torch.empty(
        x.shape[0],
        g.n,
        *x.shape[2:],
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )
    if g.m == 0:
        return out
    c, c2, split = x.shape[1], x2.shape[1], config.split_k
    bias = bias.contiguous()
    target = out if split == 1 else partials(split, g.m, g.n, x)
    steps = triton.cdiv(c, config.block_k) + triton.cdiv(c2, config.block_k)
    trips = triton.cdiv(steps, split)
    exact = steps * config.block_k == c + c2 and trips * split == steps
    grid = (triton.cdiv(g.m, config.block_m) * triton.cdiv(g.n, config.block_n), split)
    _pointwise_pair[grid](
        x,
        launch.nhwc(weight),
        launch.nhwc(x2),
        launch.nhwc(weight2),
        bias,
        target,
        g.m,
        *x.shape[2:],
        *x2.shape[2:],
        trips,
        C=c,
        C2=c2,
        K=g.n,
        SH=stride2[0],
        SW=stride2[1],
        EXACT=exact,
        SPLIT=split,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch.options(x),
    )
    if split > 1:
        add_partials(target, (None, bias, None, None, 0.0), None, out, True)
    return out
