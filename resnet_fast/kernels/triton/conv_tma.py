"""Convolution with stride 1 or 2 + affine + residual + activation on tensor descriptors: implicit GEMM, box by box.

    z[n, p, q, k] = Σ_{r,s,c} x[n, p·SH − PH + r·DH, q·SW − PW + s·DW, c] · w[k, r, s, c]
    out = act(s[k] · z + t[k] + residual)

x, out, residual: NHWC; w: [K, R, S, C] (channels_last). A tile is a box of images × rows × columns of the result times
filters, the best box one that divides the result (56² in 2·8·8, 28² in 8·4·4, 14² in 32·2·2, 7² in 128·1·1). A tap's
pixels are then one box of x too, at shifted coordinates: TMA loads it as one, and padding is what lies outside.
- Stride 1: x as [N, H, W, C].
- Stride 2: x as [N, H/2, 2, W/2, 2C]: rows and columns p·2 + d lie at p + ⌊d/2⌋ with parity d mod 2, a coordinate of
  its own for rows and C channels on for columns. So H and W must be even; odd sizes are for ``triton.conv``.
- Boxes of one row and column leave out the taps that fall outside: at 7² with 3×3 filters 18 % of the products.

Floor: (N·H·W·C + K·R·S·C + N·H'·W'·K·(1 + residual)) · itemsize bytes and 2·N·H'·W'·K·R·S·C FLOP; each tap re-reads its
pixels from L2, R·S times the input. ResNet-50's layer2 conv2 (256 images, 28², 128 → 128, 3×3, bf16): 103 MB, 59.2
GFLOP, on an H200 75 µs by its matrix units (24 by memory); its strided sister from 56² reads 257 MB, 60 µs by memory.
Source: implicit GEMM, Chetlur et al. 2014 (cuDNN); tiled TMA with padding from its bounds as in cuDNN's and CUTLASS's
sm_90 kernels.
"""

from __future__ import annotations

from itertools import product

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

LEAST_CHANNELS = 16  # one step of the matrix units


@triton.jit
def _products(
    x,
    w,
    n,
    p,
    q,
    k,
    H,
    W,
    C: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    SKIPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Σ w·x over taps × channels for the box of pixels from (n, p, q) on: float32 [BLOCK_N, BLOCK_M]."""
    blocks_c: tl.constexpr = C // BLOCK_K
    # Accumulators filters × pixels, as ``tma`` says why; operands pass through shared memory.
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if SKIPS:  # the taps [r0, r1) × [s0, s1) of these pixels fall inside the image
        r0, s0 = (
            tl.cdiv(tl.maximum(PH - p * STRIDE, 0), DH),
            tl.cdiv(tl.maximum(PW - q * STRIDE, 0), DW),
        )
        r1 = tl.minimum(tl.cdiv(tl.maximum(H + PH - p * STRIDE, 0), DH), R)
        s1 = tl.minimum(tl.cdiv(tl.maximum(W + PW - q * STRIDE, 0), DW), S)
        across = tl.maximum(s1 - s0, 0)
        trips = tl.maximum(r1 - r0, 0) * across * blocks_c
    else:
        r0, s0, across, trips = 0, 0, S, R * S * blocks_c
    for i in range(trips):
        # Load: a tap's pixels are one box of x at shifted coordinates.
        tap, c = i // blocks_c, i % blocks_c * BLOCK_K
        r, s = r0 + tap // across, s0 + tap % across
        down, right = r * DH - PH, s * DW - PW
        if STRIDE == 1:
            pixels = x.load([n, p + down, q + right, c])
        else:
            pixels = x.load([n, p + (down >> 1), down & 1, q + (right >> 1), (right & 1) * C + c])
        weights = w.load([k, (r * S + s) * C + c])
        # Product.
        acc = tl.dot(weights, pixels.reshape(BLOCK_M, BLOCK_K).T, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["count", "tiles_h", "tiles_w", "H", "W"])
def _conv(
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
    tiles_h,
    tiles_w,
    H,
    W,
    C: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    RELU: tl.constexpr,
    SKIPS: tl.constexpr,
    NB: tl.constexpr,
    HB: tl.constexpr,
    WB: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """Tiles of a box of pixels × filters: every ``step``-th of ``count`` from this block's number on."""
    begin(PDL)
    tiles_n: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    BLOCK_M: tl.constexpr = NB * HB * WB
    for tile in tl.range(tl.program_id(0), count, step, flatten=not SKIPS):
        box, k = tile // tiles_n, tile % tiles_n * BLOCK_N
        q, p, n = box % tiles_w * WB, box // tiles_w % tiles_h * HB, box // (tiles_w * tiles_h) * NB
        acc = _products(
            x,
            w,
            n,
            p,
            q,
            k,
            H,
            W,
            C,
            R,
            S,
            STRIDE,
            PH,
            PW,
            DH,
            DW,
            SKIPS,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )

        # Epilogue and store, pixels × filters.
        filters = k + tl.arange(0, BLOCK_N)
        s, t = affine(scale, shift, mean, var, eps, filters, filters < K)
        if residual is not None:
            z = tma.finish_tile(
                acc, s, t, residual.load([n, p, q, k]).reshape(BLOCK_M, BLOCK_N), RELU
            )
        else:
            z = tma.finish_tile(acc, s, t, None, RELU)
        out.store([n, p, q, k], z.to(out.dtype).reshape(NB, HB, WB, BLOCK_N))


def supports(problem: Problem) -> str | None:
    """Stride 1, or 2 over even sizes, without groups, in NHWC with channels in sixteens, from sm_90 on."""
    h, w = problem.x[2:]
    if min(problem.out_hw) < 1:
        return "the filter is larger than the padded input"
    if problem.stride not in ((1, 1), (2, 2)):
        return "its descriptors step by 1 or by 2 in both directions, this stride is {}×{}".format(
            *problem.stride
        )
    if problem.stride == (2, 2) and (h % 2 or w % 2):
        return f"with stride 2 it sees rows and columns in pairs, and of {h}×{w} one has no partner"
    if problem.x[1] % LEAST_CHANNELS:
        return f"it takes input channels by sixteens, and there are {problem.x[1]}"
    return tma.declines(problem)


@kernel(
    "triton.conv_tma",
    op="conv_bn_act",
    supports=supports,
    available=launch.available,
    sources=launch.sources("dependent_launch", "epilogue", "tma", "tma_config"),
)
def conv_tma(
    x, weight, scale, shift, residual, mean, var, eps, stride, padding, dilation, groups, act
) -> Tensor:
    vectors = scale, shift, mean, var, eps
    geometry = stride, padding, dilation
    return run(x, weight, vectors, residual, geometry, act)


def window(x: tuple[int, ...], weight: tuple[int, ...], geometry: tuple) -> Window:
    """The result's images, rows and columns, and the share of taps inside, of an input and filter of these shapes."""
    n, _, h, w = x
    _, _, r, s = weight
    stride, padding, dilation = geometry
    rows, rows_inside = _side(h, r, stride[0], padding[0], dilation[0])
    columns, columns_inside = _side(w, s, stride[1], padding[1], dilation[1])
    return Window(n, rows, columns, rows_inside * columns_inside)


def _side(size: int, taps: int, stride: int, padding: int, dilation: int) -> tuple[int, float]:
    """The result's size along one side, and the share of its taps that falls inside the image."""
    reach = dilation * (taps - 1)
    out = (size + 2 * padding - reach - 1) // stride + 1
    pairs = product(range(out), range(taps))
    positions = (pixel * stride - padding + tap * dilation for pixel, tap in pairs)
    inside = sum(0 <= position < size for position in positions)
    return out, inside / (out * taps)


def run(
    x: Tensor,
    weight: Tensor,
    vectors: tuple,
    residual: Tensor | None,
    geometry: tuple,
    act: str,
    tile: TileConfig | None = None,
) -> Tensor:
    """The convolution with a given tile, which is what a tuner tries, or with the predicted best.

    ``geometry`` is (stride, padding, dilation).
    """
    (n, c, h, w), (k, _, r, s) = x.shape, weight.shape
    seen = window(tuple(x.shape), tuple(weight.shape), geometry)
    shape = n, seen.rows, seen.columns
    out, finished = launch.conv_result(x, weight, shape[1:])
    g = Gemm(
        n * seen.rows * seen.columns,
        k,
        c,
        r * s,
        1,
        x.itemsize,
        residual is not None,
        launch.capability(x),
    )
    if g.m == 0:
        return finished(out)
    tile = tile or config(g, seen)
    pixels, filters = tiles(g, seen, tile)
    (step, _), (nb, hb, wb), ((stride, _), (ph, pw), (dh, dw)) = (
        grid(g, seen, tile),
        tile.box,
        geometry,
    )
    if stride == 1:
        pixel_box = tma.descriptor(tma.dense(x), (n, h, w, c), (*tile.box, tile.channels))
    else:
        pixel_box = tma.descriptor(
            tma.dense(x), (n, h // 2, 2, w // 2, 2 * c), (nb, hb, 1, wb, tile.channels)
        )
    result_box = (*shape, k), (*tile.box, tile.filters)
    _conv[(step,)](
        pixel_box,
        tma.descriptor(tma.dense(weight), (k, r * s * c), (tile.filters, tile.channels)),
        *launch.dense_vectors(vectors),
        tma.descriptor(tma.dense(residual), *result_box),
        tma.descriptor(out, *result_box),
        pixels * filters,
        step,
        triton.cdiv(seen.rows, hb),
        triton.cdiv(seen.columns, wb),
        h,
        w,
        C=c,
        K=k,
        R=r,
        S=s,
        STRIDE=stride,
        PH=ph,
        PW=pw,
        DH=dh,
        DW=dw,
        RELU=act == "relu",
        SKIPS=tile.skips,
        NB=nb,
        HB=hb,
        WB=wb,
        BLOCK_N=tile.filters,
        BLOCK_K=tile.channels,
        **tile.options(),
        **launch.options(x),
    )
    return finished(out)
