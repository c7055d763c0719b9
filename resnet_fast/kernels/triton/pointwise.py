"""1×1 convolution + affine + residual + activation: a matrix product over pixels.

    out[m, k] = act(s[k] · Σ_c x[row(m), c] · w[k, c] + t[k] + residual[m, k])

x: NHWC, any stride (row(m) skips pixels), no padding; w: [K, C]; out, residual: NHWC. Each block owns BLOCK_M pixels
× BLOCK_N filters and walks C; filter tiles are neighbours in the grid, so the blocks that share pixels run together
and x comes from DRAM once.
Floor: (M·C + K·C + M·K·(1 + residual)) · itemsize bytes and 2·M·K·C FLOP, M = N·H'·W'. At bf16 on an H200 (4.3 TB/s
and 790 TFLOP/s: 184 FLOP a byte) bytes bind in ResNet-50's layer1 and layer2 and in layer3 where a residual is read,
the matrix units elsewhere.
Source: GEMM with split-K as in CUTLASS; the epilogue is cuDNN's ConvBiasAddActivation with batch norm's vectors as
the bias.
"""

from __future__ import annotations

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


@triton.jit(do_not_specialize=["M", "H", "W", "OH", "OW"])
def _pointwise(
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
    H,
    W,
    OH,
    OW,
    trips,
    C: tl.constexpr,
    K: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    RELU: tl.constexpr,
    EXACT: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """One tile of pixels × filters; ``split`` is this block's share of the tile's channels."""
    begin(PDL)
    tiles_n = tl.cdiv(K, BLOCK_N)
    split = tl.program_id(1)
    m = (tl.program_id(0) // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = (tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)

    # Where each pixel and filter begins. Rows and filters beyond the end read the last one, unmasked; finish() does not
    # store them.
    row = tl.minimum(m, M - 1)
    if SH != 1 or SW != 1:
        image, pixel = row // (OH * OW), row % (OH * OW)
        row = image.to(tl.int64) * H * W + (pixel // OW) * SH * W + (pixel % OW) * SW
    x_row = x + row.to(tl.int64) * C
    w_row = w + tl.minimum(k, K - 1) * C

    # In registers: one sum for each pixel and filter.
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in range(trips):
        # Load BLOCK_K channels; where they divide evenly (EXACT) without a mask.
        c = (split * trips + i) * BLOCK_K + tl.arange(0, BLOCK_K)
        if EXACT:
            a = tl.load(x_row[:, None] + c[None, :])
            b = tl.load(w_row[None, :] + c[:, None])
        else:
            a = tl.load(x_row[:, None] + c[None, :], mask=(c < C)[None, :], other=0.0)
            b = tl.load(w_row[None, :] + c[:, None], mask=(c < C)[:, None], other=0.0)
        # Product.
        acc = tl.dot(a, b, acc, input_precision="ieee")

    # Epilogue and store.
    if SPLIT == 1:
        finish(acc, scale, shift, mean, var, eps, residual, out, m, k, M, K, RELU)
    else:
        store_partial(acc, out, split, m, k, M, K)


def supports(problem: Problem) -> str | None:
    """1×1 filters without padding or groups, in NHWC."""
    if not problem.pointwise or problem.groups != 1:
        return "it is a matrix product over pixels: 1×1 filters, no padding, one group"
    return launch.declines(problem)


@kernel(
    "triton.pointwise",
    op="conv_bn_act",
    supports=supports,
    available=launch.available,
    sources=launch.sources("dependent_launch", "epilogue", "split_k"),
)
def pointwise(
    x, weight, scale, shift, residual, mean, var, eps, stride, padding, dilation, groups, act
) -> Tensor:
    n, c, h, w = x.shape
    oh = (h - 1) // stride[0] + 1
    ow = (w - 1) // stride[1] + 1
    pixels, filters = n * oh * ow, weight.shape[0]
    g = Gemm(pixels, filters, c, 1, 1, x.itemsize, residual is not None, launch.capability(x))
    vectors = scale, shift, mean, var, eps
    return run(x, weight, vectors, residual, stride, act, (oh, ow), g, gemm_config(g))


def run(
    x: Tensor,
    weight: Tensor,
    vectors: tuple,
    residual: Tensor | None,
    stride: tuple[int, int],
    act: str,
    out_hw: tuple[int, int],
    g: Gemm,
    config: GemmConfig,
) -> Tensor:
    """The product with a given config, which is what a tuner tries."""
    out, finished = launch.conv_result(x, weight, out_hw)
    if g.m == 0:
        return finished(out)
    vectors = launch.dense_vectors(vectors)
    split, relu = config.split_k, act == "relu"
    target = out if split == 1 else partials(split, g.m, g.n, x)
    trips = triton.cdiv(triton.cdiv(g.channels, config.block_k), split)
    exact = trips * split * config.block_k == g.channels
    grid = (triton.cdiv(g.m, config.block_m) * triton.cdiv(g.n, config.block_n), split)
    _pointwise[grid](
        x,
        launch.nhwc(weight),
        *vectors,
        residual,
        target,
        g.m,
        *x.shape[2:],
        *out_hw,
        trips,
        C=g.channels,
        K=g.n,
        SH=stride[0],
        SW=stride[1],
        RELU=relu,
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
        add_partials(target, vectors, residual, out, relu)
    return finished(out)
