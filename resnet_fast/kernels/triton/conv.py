"""Convolution of any geometry + affine + residual + activation: implicit GEMM over NHWC.

    z[n, p, q, k] = Σ_{r,s,c} x[n, p·SH − PH + r·DH, q·SW − PW + s·DW, c] · w[k, r, s, c]
    out = act(s[k] · z + t[k] + residual)

x, out, residual: NHWC; w: [K, R, S, C/groups] (channels_last). Each block owns BLOCK_M output pixels × BLOCK_N
filters and walks taps × channels; nothing is unfolded in memory, padding is a masked load. Filter tiles are
neighbours in the grid, so blocks that share pixels run together.

Two ways along K. Usually one tap at a time, BLOCK_K channels a trip: an address is then one add from the pixel's
first. With at most eight channels (the stem) taps and channels are one axis (FLAT), for a block of channels would be
mostly empty: the stem's 147 products take 160 and not 49 · 16.

Groups: a tile of filters may span several; it walks the channels of all groups it touches (SPAN), with zero weights
where filter and channel belong to different groups; a tile that meets a NaN or infinity is done again group by group.
So ResNeXt's groups of 4 to 64 channels run on the matrix units, at BLOCK_N / (filters a group) times the least work.

Floor: (N·H·W·C + K·R·S·C/groups + N·H'·W'·K·(1 + residual)) · itemsize bytes and 2·N·H'·W'·K·R·S·C/groups FLOP; each
tap re-reads its pixels from L2 (or L1), R·S times the input.
Source: implicit GEMM, Chetlur et al. 2014 (cuDNN); the epilogue is cuDNN's ConvBiasAddActivation.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...dispatch import Problem, conv_out_hw, kernel
from . import launch
from .dependent_launch import begin
from .epilogue import finish
from .gemm_config import Gemm, GemmConfig, gemm_config, span, steps
from .split_k import add_partials, partials, store_partial


@triton.jit
def _filters(w_row, k, tap, c, valid, C: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr):
    """Weights [BLOCK_K, BLOCK_N] of one tap, channels ``c``; zero where not valid or of another group."""
    if GROUPS == 1:
        at = w_row[None, :] + (tap * C + c)[:, None]
        seen = valid[:, None]
    else:
        # the channel's place in the filter's group
        own = c[:, None] - (k // (K // GROUPS) * (C // GROUPS))[None, :]
        at = w_row[None, :] + tap * (C // GROUPS) + own
        seen = (own >= 0) & (own < C // GROUPS) & valid[:, None]
    return tl.load(at, mask=seen, other=0.0)


@triton.jit
def _products(
    x_row,
    w_row,
    top,
    left,
    filt,
    first_c,
    low,
    high,
    split,
    trips,
    H,
    W,
    C: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    GROUPS: tl.constexpr,
    FLAT: tl.constexpr,
    SPAN: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Σ x·w over this block's share of taps × channels, for channels in [low, high): float32 [BLOCK_M, BLOCK_N]."""
    blocks_c: tl.constexpr = (SPAN + BLOCK_K - 1) // BLOCK_K
    # In registers: one sum for each pixel and filter.
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in range(trips):
        step = split * trips + i
        if FLAT:
            # Taps and channels as one axis: each product has its own pixel.
            q = step * BLOCK_K + tl.arange(0, BLOCK_K)
            tap, c, valid = q // C, q % C, q < R * S * C
            r, s = tap // S, tap % S
            ih, iw = top[:, None] + (r * DH)[None, :], left[:, None] + (s * DW)[None, :]
        else:
            # One tap: each row of the tile has one pixel.
            tap, c = step // blocks_c, step % blocks_c * BLOCK_K + tl.arange(0, BLOCK_K)
            valid = (c < SPAN) & (tap * SPAN + c < R * S * SPAN)
            c += first_c
            valid = valid & (c >= low) & (c < high)
            r, s = tap // S, tap % S
            ih, iw = (top + r * DH)[:, None], (left + s * DW)[:, None]

        # Load. Padding is masked; where no trip reaches past the channels or taps (EXACT), filters need no mask.
        inside = (ih >= 0) & (ih < H) & (iw >= 0) & (iw < W)
        pixels = x_row[:, None] + ((r * DH * W + s * DW) * C + c)[None, :]
        if EXACT:
            a = tl.load(pixels, mask=inside, other=0.0)
            b = tl.load(w_row[None, :] + (tap * C + c)[:, None])
        else:
            a = tl.load(pixels, mask=inside & valid[None, :], other=0.0)
            b = _filters(w_row, filt, tap, c, valid, C, K, GROUPS)
        # Product.
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["M", "H", "W", "OH", "OW"])
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
    M,
    H,
    W,
    OH,
    OW,
    trips,
    C: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    GROUPS: tl.constexpr,
    FLAT: tl.constexpr,
    SPAN: tl.constexpr,
    EXACT: tl.constexpr,
    RELU: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """One tile of pixels × filters; ``split`` is this block's share of the tile's K range."""
    begin(PDL)
    tiles_n = tl.cdiv(K, BLOCK_N)
    split = tl.program_id(1)
    m = (tl.program_id(0) // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    first_k = (tl.program_id(0) % tiles_n) * BLOCK_N
    k = first_k + tl.arange(0, BLOCK_N)

    # Each pixel's first tap (top, left) and its address. Rows and filters beyond the end read the last one instead;
    # finish() does not store them.
    row, filt = tl.minimum(m, M - 1), tl.minimum(k, K - 1)
    image, pixel = row // (OH * OW), row % (OH * OW)
    top, left = pixel // OW * SH - PH, pixel % OW * SW - PW
    x_row = x + (image.to(tl.int64) * H * W + top * W + left) * C
    w_row = w + filt * (R * S * (C // GROUPS))

    # Product, over the channels of every group that the tile touches.
    first_c = first_k // (K // GROUPS) * (C // GROUPS)
    acc = _products(
        x_row,
        w_row,
        top,
        left,
        filt,
        first_c,
        first_c,
        C,
        split,
        trips,
        H,
        W,
        C,
        K,
        R,
        S,
        DH,
        DW,
        GROUPS,
        FLAT,
        SPAN,
        EXACT,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    if SPAN > C // GROUPS:
        # The zero weights between groups turn an infinity of one group into a NaN of the others: then one by one.
        if tl.max(tl.max((acc != acc).to(tl.int32), axis=1), axis=0) > 0:
            for group in range(SPAN // (C // GROUPS)):
                low = first_c + group * (C // GROUPS)
                high = tl.minimum(low + C // GROUPS, C)
                own = _products(
                    x_row,
                    w_row,
                    top,
                    left,
                    filt,
                    first_c,
                    low,
                    high,
                    split,
                    trips,
                    H,
                    W,
                    C,
                    K,
                    R,
                    S,
                    DH,
                    DW,
                    GROUPS,
                    FLAT,
                    SPAN,
                    EXACT,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_K,
                )
                acc = tl.where((filt // (K // GROUPS) * (C // GROUPS) == low)[None, :], own, acc)

    # Epilogue and store.
    if SPLIT == 1:
        finish(acc, scale, shift, mean, var, eps, residual, out, m, k, M, K, RELU)
    else:
        store_partial(acc, out, split, m, k, M, K)


def supports(problem: Problem) -> str | None:
    """Every convolution in NHWC whose result has at least one pixel."""
    if min(problem.out_hw) < 1:
        return "the filter is larger than the padded input"
    return launch.declines(problem)


@kernel(
    "triton.conv",
    op="conv_bn_act",
    supports=supports,
    available=launch.available,
    sources=launch.sources("dependent_launch", "epilogue", "split_k"),
)
def conv(
    x, weight, scale, shift, residual, mean, var, eps, stride, padding, dilation, groups, act
) -> Tensor:
    k, _, r, s = weight.shape
    n, c, _, _ = x.shape
    oh, ow = conv_out_hw(x.shape, weight.shape, stride, padding, dilation)
    g = Gemm(
        n * oh * ow, k, c, r * s, groups, x.itemsize, residual is not None, launch.capability(x)
    )
    vectors = scale, shift, mean, var, eps
    geometry = stride, padding, dilation
    return run(x, weight, vectors, residual, geometry, act, (oh, ow), g, gemm_config(g))


def run(
    x: Tensor,
    weight: Tensor,
    vectors: tuple,
    residual: Tensor | None,
    geometry: tuple,
    act: str,
    out_hw: tuple[int, int],
    g: Gemm,
    config: GemmConfig,
) -> Tensor:
    """The convolution with a given config, which is what a tuner tries; ``geometry`` is (stride, padding, dilation)."""
    out, finished = launch.conv_result(x, weight, out_hw)
    if g.m == 0:
        return finished(out)
    vectors = launch.dense_vectors(vectors)
    split, relu = config.split_k, act == "relu"
    target = out if split == 1 else partials(split, g.m, g.n, x)
    (sh, sw), (ph, pw), (dh, dw) = geometry
    trips = triton.cdiv(steps(g, config.block_n, config.block_k), split)
    exact = not g.flat and g.groups == 1 and trips * split * config.block_k == g.k
    grid = (triton.cdiv(g.m, config.block_m) * triton.cdiv(g.n, config.block_n), split)
    _conv[grid](
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
        R=weight.shape[2],
        S=weight.shape[3],
        SH=sh,
        SW=sw,
        PH=ph,
        PW=pw,
        DH=dh,
        DW=dw,
        GROUPS=g.groups,
        FLAT=g.flat,
        SPAN=span(g, config.block_n),
        EXACT=exact,
        RELU=relu,
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
