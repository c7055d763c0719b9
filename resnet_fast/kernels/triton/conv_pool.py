"""The stem: convolution of stride 2 + bias + ReLU + 3×3 max pooling of stride 2; the convolution stays on the chip.

    out[n, i, j, k] = max over p in 2i−1…2i+1, q in 2j−1…2j+1 of relu(z[n, p, q, k] + bias[k])
    z[n, p, q, k] = Σ_{r,s,c} x'[n, 2p − R//2 + r, 2q − S//2 + s, c] · w[k, r, s, c]

x: NHWC of C ≤ 4 channels, x' = x; or uint8, x' = (x − mean)/std, divided exactly, rounded to w's dtype and zero outside
the picture. w: [K, R, S, C] (channels_last), R, S ≤ 7; out: NHWC. A block owns BLOCK_M pooled columns, of all images
one after the other, × BLOCK_N filters. It walks down some pooled rows, one row of the convolution at a time, and keeps
the running maxima:
- A *slot* is one pooled column j. Columns 2j and 2j+1 of the convolution are one product: their pixels overlap, a row's
  share is SPAN neighbouring elements (30 of 32 at 7×7×3), read 8 bytes at a time; the filters stay in shared memory at
  both offsets for as long as the block runs. Before Hopper the operands of products are registers, which would hold
  them all: there each row of taps fetches them again.
- Column 2j−1 is the odd one of the slot to the left, fetched once every pooled row; tiles overlap by one slot for it.
  Row 2i+1 is kept for the next pooled row.
- Maximum commutes with adding a bias, rounding and ReLU: the maxima are of raw sums, −∞ where there is no column or
  row.
- A zero weight times NaN or infinity is NaN: a block that meets a NaN walks again, columns apart, with only their own
  pixels and one row of taps at a time: as one product that rare walk alone took more registers than a thread has.

Floor: (N·H·W·C · itemsize, or · 1 from uint8, + N·H'·W'·K · itemsize) bytes and 2·N·P·Q·R·S·C·K FLOP, P × Q the
convolution's size. ResNet's at 224², bf16, an image: 0.70 MB (0.55 from uint8) and 236 MFLOP; on an H200 (4.3 TB/s,
790 TFLOP/s) 0.16 µs (0.13) by memory, 0.30 by its matrix units. This form takes 8·32 products for 7·21 and one row more
a block: predicted 0.55 µs by its matrix units, 0.61 with all that ``stem_ns`` counts. Convolution and pooling one after
the other move 3.9 MB, 0.91 µs. A product for each window position would be 9/4 of the least work (0.67 µs) on scattered
loads of 2 bytes.
Source: implicit GEMM, Chetlur et al. 2014; running maxima, van Herk 1992, with a window of three.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...dispatch.problem import Problem
from ...dispatch.registry import kernel
from . import launch
from .dependent_launch import begin
from .epilogue import activate
from .pool_config import Stem, StemConfig, stem_config

NOTHING = tl.constexpr(float("-inf"))  # the maximum of no elements


@triton.jit
def _maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _filters(
    w,
    q,
    first_k,
    C: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    PAD: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Weights of elements ``q`` (taps × SPAN), even columns' filters and then odd columns': [len(q), 2 · BLOCK_N]."""
    tap_stride: tl.constexpr = S * C
    filter_stride: tl.constexpr = R * S * C
    column = tl.arange(0, 2 * BLOCK_N)
    k, odd = first_k + column % BLOCK_N, column // BLOCK_N
    tap = q // SPAN
    # An odd column's filter begins two pixels after the even one's; what is outside of it is a zero weight.
    own = (q % SPAN)[:, None] - (PAD + 2 * odd)[None, :] * C
    seen = (own >= 0) & (own < S * C) & (tap < R)[:, None] & (k < K)[None, :]
    return tl.load(
        w + k[None, :] * filter_stride + tap[:, None] * tap_stride + own, mask=seen, other=0.0
    )


@triton.jit
def _patch(
    x_slot,
    col,
    top,
    q,
    mean,
    std,
    H,
    pitch,
    low: tl.constexpr,
    high: tl.constexpr,
    dtype: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    SPAN: tl.constexpr,
    EXACT: tl.constexpr,
):
    """x' at elements ``q`` of each slot, from image row ``top`` on: [slots, len(q)]; zero outside the image.

    EXACT: zero outside elements [low, high) of a row as well. ``col``: where a slot begins in its image row, in
    elements; ``pitch``: elements of an image row.
    """
    row, e = top + q // SPAN, q % SPAN
    at = col[:, None] + e[None, :]
    inside = ((row >= 0) & (row < H))[None, :] & (at >= 0) & (at < pitch)
    if EXACT:
        inside = inside & ((e >= low) & (e < high) & (q < R * SPAN))[None, :]
    a = tl.load(x_slot[:, None] + (row * pitch + e)[None, :], mask=inside, other=0)
    if mean is not None:
        # uint8: normalised in float32, rounded once.
        d, s = a.to(tl.float32) - tl.load(mean + e % C)[None, :], tl.load(std + e % C)[None, :]
        # The quotient rounded once, by Markstein's correction: a division instruction is many times as long.
        inverse = tl.div_rn(1.0, s)
        z = d * inverse
        a = tl.where(inside, tl.fma(tl.fma(-z, s, d), inverse, z), 0.0).to(dtype)
    return a


@triton.jit
def _products(
    x_slot,
    col,
    p,
    w,
    weights,
    first_k,
    mean,
    std,
    H,
    pitch,
    low: tl.constexpr,
    high: tl.constexpr,
    dtype: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    PAD: tl.constexpr,
    SPAN: tl.constexpr,
    TAPS: tl.constexpr,
    RESIDENT: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Row ``p`` of the convolution, without bias, at columns (2j, 2j + 1): float32 [BLOCK_M, BLOCK_N] each."""
    top = 2 * p - R // 2
    if RESIDENT:
        # One product of all taps, with the filters in shared memory.
        a = _patch(
            x_slot,
            col,
            top,
            tl.arange(0, TAPS * SPAN),
            mean,
            std,
            H,
            pitch,
            low,
            high,
            dtype,
            C,
            R,
            SPAN,
            EXACT,
        )
        acc = tl.dot(a, weights, input_precision="ieee")
    else:
        # One product for each row of taps.
        acc = tl.zeros((BLOCK_M, 2 * BLOCK_N), tl.float32)
        for tap in range(R):
            q = tap * SPAN + tl.arange(0, SPAN)
            a = _patch(
                x_slot, col, top, q, mean, std, H, pitch, low, high, dtype, C, R, SPAN, EXACT
            )
            acc = tl.dot(
                a,
                _filters(w, q, first_k, C, K, R, S, PAD, SPAN, BLOCK_N),
                acc,
                input_precision="ieee",
            )
    # Even columns' sums, then odd columns'.
    return acc.reshape(BLOCK_M, 2, BLOCK_N).permute(0, 2, 1).split()


@triton.jit
def _walk(
    x_slot,
    col,
    j,
    keep,
    out_slot,
    w,
    weights,
    first_k,
    bias,
    mean,
    std,
    H,
    OH,
    OW,
    PH,
    PW,
    pitch,
    first,
    rows,
    dtype: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    PAD: tl.constexpr,
    SPAN: tl.constexpr,
    TAPS: tl.constexpr,
    RESIDENT: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Pool ``rows`` rows from ``first`` on; returns for each slot whether a NaN came out.

    EXACT: even and odd columns are products of their own, with only their own pixels.
    """
    k = first_k + tl.arange(0, BLOCK_N)
    b = tl.load(bias + k, mask=k < K, other=0.0)
    left = tl.maximum(tl.arange(0, BLOCK_M) - 1, 0)[:, None] + tl.zeros(
        (BLOCK_M, BLOCK_N), tl.int32
    )
    # In registers, for each slot and filter: the maximum over both columns (best) and over the odd one (odds) of the
    # convolution's rows since the pooled row began.
    best = tl.full((BLOCK_M, BLOCK_N), NOTHING, tl.float32)
    nothing = tl.zeros((BLOCK_M,), tl.int32)
    odds, nan = best, nothing
    for step in range(2 * rows + 1):
        # Product: row p of the convolution at each slot's two columns.
        p = 2 * first - 1 + step
        even, odd = _products(
            x_slot,
            col,
            p,
            w,
            weights,
            first_k,
            mean,
            std,
            H,
            pitch,
            PAD * C,
            (PAD + S) * C,
            dtype,
            C,
            K,
            R,
            S,
            PAD,
            SPAN,
            TAPS,
            RESIDENT,
            EXACT,
            BLOCK_M,
            BLOCK_N,
        )
        if EXACT:
            _, odd = _products(
                x_slot,
                col,
                p,
                w,
                weights,
                first_k,
                mean,
                std,
                H,
                pitch,
                (PAD + 2) * C,
                (PAD + 2 + S) * C,
                dtype,
                C,
                K,
                R,
                S,
                PAD,
                SPAN,
                TAPS,
                RESIDENT,
                EXACT,
                BLOCK_M,
                BLOCK_N,
            )

        # Running maxima, where the convolution has such a row and column.
        seen = (p + nothing >= 0) & (p + nothing < OH)
        odd = tl.where((seen & (2 * j + 1 < OW))[:, None], odd, NOTHING)
        both = _maximum(tl.where(seen[:, None], even, NOTHING), odd)
        best, odds = _maximum(best, both), _maximum(odds, odd)

        # Store: every other row completes a pooled row, and begins the next one.
        if step % 2 == 0:
            i = first + step // 2 - 1 + nothing
            before = tl.where((j > 0)[:, None], tl.gather(odds, left, 0), NOTHING)
            z = activate(_maximum(best, before) + b[None, :], True)
            here = keep & (i >= first) & (i < PH)
            out_row = out_slot + i.to(tl.int64) * (PW * K)
            tl.store(
                out_row[:, None] + k[None, :], z.to(dtype), mask=here[:, None] & (k < K)[None, :]
            )
            nan = tl.maximum(nan, tl.where(here, tl.max((z != z).to(tl.int32), axis=1), 0))
            best, odds = both, odd
    return nan


@triton.jit(do_not_specialize=["T", "H", "OH", "OW", "PH", "PW", "bands", "rows"])
def _conv_pool(
    x,
    w,
    bias,
    mean,
    std,
    out,
    T,
    H,
    OH,
    OW,
    PH,
    PW,
    pitch,
    bands,
    rows,
    C: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    PAD: tl.constexpr,
    SPAN: tl.constexpr,
    TAPS: tl.constexpr,
    RESIDENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """A block's pooled columns × filters × rows, of ``T`` columns of all images, ``bands`` × ``rows`` rows."""
    begin(PDL)
    dtype: tl.constexpr = w.dtype.element_ty
    tiles_k: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    first_k = tl.program_id(0) % tiles_k * BLOCK_N
    first = tl.program_id(0) // tiles_k % bands * rows
    tile = tl.program_id(0) // tiles_k // bands

    # Pooled column t of all images is column j of image n. The tile before has this one's first slot too.
    slot = tl.arange(0, BLOCK_M)
    t = tile * (BLOCK_M - 1) + slot
    keep = ((slot > 0) | (t == 0)) & (t < T)
    t = tl.minimum(t, T - 1)
    n, j = (t // PW).to(tl.int64), t % PW

    # Where a slot begins: four pixels each, and PAD brings the first one down to a multiple of four.
    col = (j - (S // 2 + PAD) // 4) * (4 * C)
    x_slot, out_slot = x + (n * H * pitch + col), out + (n * PH * PW + j) * K

    weights = (
        _filters(w, tl.arange(0, TAPS * SPAN), first_k, C, K, R, S, PAD, SPAN, BLOCK_N)
        if RESIDENT
        else None
    )
    nan = _walk(
        x_slot,
        col,
        j,
        keep,
        out_slot,
        w,
        weights,
        first_k,
        bias,
        mean,
        std,
        H,
        OH,
        OW,
        PH,
        PW,
        pitch,
        first,
        rows,
        dtype,
        C,
        K,
        R,
        S,
        PAD,
        SPAN,
        TAPS,
        RESIDENT,
        False,
        BLOCK_M,
        BLOCK_N,
    )
    # A NaN may come from a zero weight: walk again with each column's own pixels only.
    if tl.max(nan, axis=0) > 0:
        tl.debug_barrier()  # what other threads of the block stored first
        _walk(
            x_slot,
            col,
            j,
            keep,
            out_slot,
            w,
            None,
            first_k,
            bias,
            mean,
            std,
            H,
            OH,
            OW,
            PH,
            PW,
            pitch,
            first,
            rows,
            dtype,
            C,
            K,
            R,
            S,
            PAD,
            SPAN,
            TAPS,
            False,
            True,
            BLOCK_M,
            BLOCK_N,
        )


def supports(problem: Problem) -> str | None:
    """NHWC of one to four channels, filters of one to seven rows and columns."""
    _, c, r, s = problem.weight
    if c > 4 or max(r, s) > 7:
        return f"a stem's filters: up to 7×7 of up to 4 channels, not {r}×{s} of {c}"
    return launch.declines(problem)


@kernel(
    "triton.conv_pool",
    op="conv_pool",
    supports=supports,
    available=launch.available,
    sources=launch.sources("dependent_launch", "epilogue", "pool_config"),
)
def conv_pool(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor | None, std: Tensor | None
) -> Tensor:
    n, c, h, w = x.shape
    k, _, r, s = weight.shape
    stem = Stem(n, c, h, w, k, r, s, weight.itemsize, mean is not None, launch.capability(x))
    return run(x, weight, bias, mean, std, stem, stem_config(stem))


def run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None,
    std: Tensor | None,
    stem: Stem,
    config: StemConfig,
) -> Tensor:
    """The stem with a given config, which is what a tuner tries."""
    n, c, h, w = x.shape
    (oh, ow), (ph, pw) = stem.convolved, stem.pooled
    k, _, r, s = weight.shape
    nhwc_strides = (k * ph * pw, 1, k * pw, k)
    out = torch.empty_strided((n, k, ph, pw), nhwc_strides, dtype=weight.dtype, device=x.device)
    if n * k == 0:
        return out
    bands = triton.cdiv(ph, config.rows)
    grid = (triton.cdiv(k, config.block_n) * bands * stem.tiles(config.block_m),)
    if mean is not None:
        mean, std = mean.contiguous(), std.contiguous()
    tensors = (x, launch.nhwc(weight), bias.contiguous(), mean, std, out)
    sizes = (n * pw, h, oh, ow, ph, pw, w * c, bands, config.rows)
    filters = {"C": c, "K": k, "R": r, "S": s}
    patch = {"PAD": stem.pad, "SPAN": stem.span, "TAPS": stem.taps}
    _conv_pool[grid](
        *tensors,
        *sizes,
        **filters,
        **patch,
        RESIDENT=config.resident,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch.options(x),
    )
    return out
