"""The tail of a bottleneck in one kernel: 3×3 convolution, 1×1, residual add and the next block's 1×1 convolution.

    m = relu(b2[j] + Σ_{r,s,c} x[n, p − 1 + r, q − 1 + s, c] · w2[j, r, s, c])
    y = relu(b3[k] + Σ_j m[j] · w3[k, j] + residual[k])      with a projection: + Σ_c residual[c] · wd[k, c]
    z = relu(b1[l] + Σ_k y[k] · w1[l, k])

x, residual, y, z: NHWC; w2: [J, 3, 3, C], w3: [K, J], wd: [K, C'], w1: [L, K]; vectors float32. m and y are rounded to
x's dtype, as the unfused kernels store them. A block owns BLOCK_M pixels and all J channels of m, which never leave the
SM; it walks y in blocks of BLOCK_N channels, writes each and adds its products with w1 to the L channels of z. The 3×3
comes first, so no halo is computed twice.

Floor: (M·(C + residual's channels + K + L) + weights) · itemsize bytes, M = N·H·W, and 2·M·(9·C·J + J·K + K·L + C'·K)
FLOP: of the unfused three it leaves out m, written and read, and y, read again. ResNet-50's layer1 (256 images, 56²,
64 → 64 → 256 → 64, bf16): 1027 MB, 111.8 GFLOP, on an H200 239 µs by memory (142 by its matrix units); the unfused
three move 1644 MB in 382 µs. Each block reads all weights from L2, 139 kB for BLOCK_M pixels.
Source: back-to-back GEMM fusion, as in CUTLASS's example 13, with the residual between.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...dispatch.problem import Problem
from ...dispatch.registry import kernel
from . import launch
from .dependent_launch import begin
from .epilogue import activate
from .tail_config import MIDDLES, Tail, TailConfig, padded, tail, tail_config, tail_configs


@triton.jit
def _three_by_three(
    x,
    w2,
    row,
    H,
    W,
    trips,
    C: tl.constexpr,
    J: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Σ x·w2 over taps × channels at pixels ``row``: float32 [BLOCK_M, J]."""
    tap_stride: tl.constexpr = C
    filter_stride: tl.constexpr = 9 * C
    blocks_c: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    p, q, j = row % (H * W) // W, row % W, tl.arange(0, J)
    pixels = x + row.to(tl.int64) * C
    # In registers: one sum for each pixel and middle channel.
    acc = tl.zeros((BLOCK_M, J), tl.float32)
    for i in range(trips):
        # Load: one tap and BLOCK_K channels a trip. A tap's pixels are the block's own, moved; padding is masked.
        tap, c = i // blocks_c, i % blocks_c * BLOCK_K + tl.arange(0, BLOCK_K)
        down, right = tap // 3 - 1, tap % 3 - 1
        inside = ((p + down >= 0) & (p + down < H) & (q + right >= 0) & (q + right < W))[:, None]
        at = pixels[:, None] + ((down * W + right) * C + c)[None, :]
        filters = w2 + (j * filter_stride)[None, :] + (tap * tap_stride + c)[:, None]
        if EXACT:
            a = tl.load(at, mask=inside, other=0.0)
            b = tl.load(filters)
        else:
            valid = c < C
            a = tl.load(at, mask=inside & valid[None, :], other=0.0)
            b = tl.load(filters, mask=valid[:, None], other=0.0)
        # Product.
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["M", "H", "W"])
def _conv_tail(
    x,
    w2,
    b2,
    w3,
    b3,
    residual,
    wd,
    w1,
    b1,
    y,
    z,
    M,
    H,
    W,
    trips,
    wide_trips,
    C: tl.constexpr,
    J: tl.constexpr,
    K: tl.constexpr,
    L: tl.constexpr,
    CD: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """y and z at BLOCK_M pixels. ``trips`` are those of the 3×3, ``wide_trips`` those over y's channels."""
    begin(PDL)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    # Rows beyond the end repeat the last one and are not stored.
    row, in_m = tl.minimum(m, M - 1), (m < M)[:, None]
    wide_row = row.to(tl.int64)[:, None] * K  # where each pixel begins in residual and y
    j, after = tl.arange(0, J), tl.arange(0, BLOCK_L)
    in_after = after < L

    # The 3×3. Its rounded result stays in registers: an operand of every product below.
    hidden = _three_by_three(x, w2, row, H, W, trips, C, J, EXACT, BLOCK_M, BLOCK_K)
    hidden = activate(hidden + tl.load(b2 + j)[None, :], True).to(x.dtype.element_ty)
    if wd is not None:
        # The residual before its projection, all channels: it stays as well.
        d = tl.arange(0, BLOCK_D)
        entry = tl.load(
            residual + row.to(tl.int64)[:, None] * CD + d[None, :],
            mask=(d < CD)[None, :],
            other=0.0,
        )

    # In registers from here on: one sum for each pixel and channel of z.
    acc = tl.zeros((BLOCK_M, BLOCK_L), tl.float32)
    for i in range(wide_trips):
        # Product: BLOCK_N channels of y, and the residual or its projection on top.
        k = i * BLOCK_N + tl.arange(0, BLOCK_N)
        in_k = k < K
        w3_block = tl.load(w3 + (k * J)[None, :] + j[:, None], mask=in_k[None, :], other=0.0)
        out = (
            tl.dot(hidden, w3_block, input_precision="ieee")
            + tl.load(b3 + k, mask=in_k, other=0.0)[None, :]
        )
        if wd is not None:
            wd_block = tl.load(
                wd + (k * CD)[None, :] + d[:, None],
                mask=in_k[None, :] & (d < CD)[:, None],
                other=0.0,
            )
            out = tl.dot(entry, wd_block, out, input_precision="ieee")
        else:
            out += tl.load(residual + wide_row + k[None, :], mask=in_k[None, :], other=0.0).to(
                tl.float32
            )

        # Store y. Channels past the last one would pass an infinity of m on as NaN: 0 · ∞.
        out = tl.where(in_k[None, :], activate(out, True), 0.0).to(x.dtype.element_ty)
        tl.store(y + wide_row + k[None, :], out, mask=in_m & in_k[None, :])

        # Product: what these channels of y, still in registers, add to z.
        w1_block = tl.load(
            w1 + (after * K)[None, :] + k[:, None],
            mask=in_k[:, None] & in_after[None, :],
            other=0.0,
        )
        acc = tl.dot(out, w1_block, acc, input_precision="ieee")

    # Store z.
    acc = activate(acc + tl.load(b1 + after, mask=in_after, other=0.0)[None, :], True)
    next_row = row.to(tl.int64)[:, None] * L
    tl.store(
        z + next_row + after[None, :], acc.to(x.dtype.element_ty), mask=in_m & in_after[None, :]
    )


def supports(problem: Problem) -> str | None:
    """A middle, and a projected residual, that a block can keep whole; in NHWC."""
    reason = launch.declines(problem)
    if reason is not None:
        return reason
    g = tail(problem)
    if g.middle not in MIDDLES:
        return f"a block keeps the middle channels whole: 16, 32, 64 or 128 of them, and there are {g.middle}"
    if g.projected > MIDDLES[-1]:
        reason = "a block keeps the residual's channels before a projection whole"
        return f"{reason}: at most 128, and there are {g.projected}"
    if not tail_configs(g):
        return f"{g.middle} middle channels and {g.next} of the next convolution are more than a block's registers hold"
    return None


@kernel(
    "triton.conv_tail",
    op="conv_tail",
    supports=supports,
    available=launch.available,
    sources=launch.sources("dependent_launch", "epilogue", "tail_config"),
)
def conv_tail(
    x, weight2, bias2, weight3, bias3, residual, projection, weight1, bias1
) -> tuple[Tensor, Tensor]:
    n, c, h, w = x.shape
    middle, wide, after = weight2.shape[0], weight3.shape[0], weight1.shape[0]
    projected = 0 if projection is None else projection.shape[1]
    g = Tail(n * h * w, c, middle, wide, after, projected, x.itemsize, launch.capability(x))
    return run(
        x, weight2, bias2, weight3, bias3, residual, projection, weight1, bias1, g, tail_config(g)
    )


def run(
    x: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    weight3: Tensor,
    bias3: Tensor,
    residual: Tensor,
    projection: Tensor | None,
    weight1: Tensor,
    bias1: Tensor,
    g: Tail,
    config: TailConfig,
) -> tuple[Tensor, Tensor]:
    """The tail with a given config, which is what a tuner tries."""
    n, _, h, w = x.shape
    nhwc: dict[str, Any] = {
        "dtype": x.dtype,
        "device": x.device,
        "memory_format": torch.channels_last,
    }
    y = torch.empty(n, g.wide, h, w, **nhwc)
    z = torch.empty(n, g.next, h, w, **nhwc)
    if g.m == 0:
        return y, z
    # Run-time trips keep LLVM from unrolling whole loops: three times the code, and for sm_89 it spilled.
    trips = 9 * triton.cdiv(g.channels, config.block_k)
    wide_trips = triton.cdiv(g.wide, config.block_n)
    _conv_tail[triton.cdiv(g.m, config.block_m),](
        x,
        launch.nhwc(weight2),
        bias2.contiguous(),
        launch.nhwc(weight3),
        bias3.contiguous(),
        launch.nhwc(residual),
        launch.nhwc(projection),
        launch.nhwc(weight1),
        bias1.contiguous(),
        y,
        z,
        g.m,
        h,
        w,
        trips,
        wide_trips,
        C=g.channels,
        J=g.middle,
        K=g.wide,
        L=g.next,
        CD=g.projected,
        EXACT=g.channels % config.block_k == 0,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        BLOCK_L=padded(g.next),
        BLOCK_D=padded(g.projected),
        **config.options(),
        **launch.options(x),
    )
    return y, z
