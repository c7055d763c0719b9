"""1×1 convolution + affine + residual + activation on tensor descriptors: a persistent matrix product over pixels.

    out[m, k] = act(s[k] · Σ_c x[m, c] · w[k, c] + t[k] + residual[m, k])

x: NHWC as [M, C], w: [K, C], residual, out: NHWC as [M, K]; 16-bit on Hopper's wgmma, float32 on FMA units. As many
blocks as run at once; each walks tiles of pixels × filters, so that the next tile's loads are under way while this one
is finished. Two forms:
- *streamed*: pixels and filters pass through shared memory together; filter tiles are neighbours, so x comes from DRAM
  once.
- *resident*, to 256 channels: a block keeps its filters for good, and x and the residual are loaded some tiles ahead:
  the form for ResNet's widening layers, nearly all of whose bytes are residual and result.

Floor: (M·C + K·C + M·K·(1 + residual)) · itemsize bytes and 2·M·K·C FLOP, M = N·H·W. ResNet-50's layer1 conv3 (256
images, 56², 64 → 256, residual, bf16): 925 MB, 26.3 GFLOP, on an H200 215 µs by memory (33 by its matrix units).
Source: the persistent GEMM with TMA of Triton's tutorials; CUTLASS's sm_90 kernels for operands out of shared memory.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...dispatch.problem import Problem
from ...dispatch.registry import kernel
from . import launch, tma
from .dependent_launch import begin
from .epilogue import affine
from .gemm_config import Gemm
from .tma_config import TileConfig, Window, config, grid, tiles


@triton.jit(do_not_specialize=["count"])
def _streamed(
    x,
    w,
    scale,
    shift,
    mean,
    var,
    eps,
    residual,
    out,
    count,
    step,
    C: tl.constexpr,
    K: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """Tiles of pixels × filters, every ``step``-th of ``count``; both operands pass through shared memory."""
    begin(PDL)
    tiles_n: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    for tile in tl.range(tl.program_id(0), count, step, flatten=True):
        m, k = tile // tiles_n * BLOCK_M, tile % tiles_n * BLOCK_N
        # Load and product. Accumulators filters × pixels, as ``tma`` says why.
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for c in range(0, C, BLOCK_K):
            acc = tl.dot(w.load([k, c]), x.load([m, c]).T, acc, input_precision="ieee")
        # Epilogue and store, pixels × filters.
        filters = k + tl.arange(0, BLOCK_N)
        s, t = affine(scale, shift, mean, var, eps, filters, filters < K)
        z = tma.finish_tile(
            acc, s, t, residual.load([m, k]) if residual is not None else None, RELU
        )
        out.store([m, k], z.to(out.dtype))


@triton.jit(do_not_specialize=["count"])
def _resident(
    x,
    w,
    scale,
    shift,
    mean,
    var,
    eps,
    residual,
    out,
    count,
    step,
    C: tl.constexpr,
    K: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Tiles of pixels, every ``step``-th of ``count``; the block's filters stay in shared memory."""
    begin(PDL)
    # Filters and their affine, once for all tiles.
    k = tl.program_id(1) * BLOCK_N
    filters = k + tl.arange(0, BLOCK_N)
    s, t = affine(scale, shift, mean, var, eps, filters, filters < K)
    weights = w.load([k, 0])
    for tile in tl.range(tl.program_id(0), count, step, num_stages=STAGES):
        # Load pixels and product, all channels in one trip; then epilogue and store.
        m = tile * BLOCK_M
        acc = tl.dot(weights, x.load([m, 0]).T, input_precision="ieee")
        z = tma.finish_tile(
            acc, s, t, residual.load([m, k]) if residual is not None else None, RELU
        )
        out.store([m, k], z.to(out.dtype))


def supports(problem: Problem) -> str | None:
    """1×1 filters without stride, padding or groups, in NHWC with whole 16 bytes a pixel, from sm_90 on."""
    if not problem.pointwise or problem.stride != (1, 1):
        return "it is a matrix product over all pixels: 1×1 filters, no stride, no padding"
    return tma.declines(problem)


@kernel(
    "triton.pointwise_tma",
    op="conv_bn_act",
    supports=supports,
    available=launch.available,
    sources=launch.sources("dependent_launch", "epilogue", "tma", "tma_config"),
)
def pointwise_tma(
    x, weight, scale, shift, residual, mean, var, eps, stride, padding, dilation, groups, act
) -> Tensor:
    n, c, h, w = x.shape
    pixels, filters = n * h * w, weight.shape[0]
    g = Gemm(pixels, filters, c, 1, 1, x.itemsize, residual is not None, launch.capability(x))
    vectors = scale, shift, mean, var, eps
    return run(x, weight, vectors, residual, act, g)


def run(
    x: Tensor,
    weight: Tensor,
    vectors: tuple,
    residual: Tensor | None,
    act: str,
    g: Gemm,
    tile: TileConfig | None = None,
) -> Tensor:
    """The product with a given tile, which is what a tuner tries, or with the predicted best."""
    out, finished = launch.conv_result(x, weight, x.shape[2:])
    if g.m == 0:
        return finished(out)
    window = Window(g.m)
    tile = tile or config(g, window, resident=True)
    blocks = grid(g, window, tile)
    pixels, filters = tiles(g, window, tile)
    m, k, c = tile.pixels, tile.filters, tile.channels
    arguments = (
        tma.descriptor(tma.dense(x), (g.m, g.channels), (m, c)),
        tma.descriptor(tma.dense(weight), (g.n, g.channels), (k, c)),
        *launch.dense_vectors(vectors),
        tma.descriptor(tma.dense(residual), (g.m, g.n), (m, k)),
        tma.descriptor(out, (g.m, g.n), (m, k)),
    )
    sizes = {"C": g.channels, "K": g.n, "RELU": act == "relu", "BLOCK_M": m, "BLOCK_N": k}
    if tile.resident:
        _resident[blocks](
            *arguments,
            pixels,
            blocks[0],
            **sizes,
            STAGES=tile.num_stages,
            **tile.options(),
            **launch.options(x),
        )
    else:
        _streamed[blocks](
            *arguments,
            pixels * filters,
            blocks[0],
            **sizes,
            BLOCK_K=c,
            **tile.options(),
            **launch.options(x),
        )
    return finished(out)
