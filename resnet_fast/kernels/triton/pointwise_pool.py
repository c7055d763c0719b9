"""The head: 1×1 convolution + bias + residual + ReLU + mean over the image; the activations stay on the chip.

    out[n, k] = 1/(H·W) · Σ_p relu(Σ_c x[n, p, c] · w[k, c] + bias[k] + residual[n, p, k])

x, residual: NHWC; w: [K, C]; out: [N, K]. A block owns some images × BLOCK_N filters and walks the images' pixels, one
after the other without gaps, BLOCK_M at a time: five images of 7² are 245 rows of 256. The products are taken filters ×
pixels, so that the activations are the first operand of a second product as they lie in registers: with the 0/1 matrix
that says which pixel is whose, which adds them up image by image in float32, in the same order every time. 0 · NaN is
NaN: a tile that meets a NaN or infinity is done again image by image.

The sums are over activations rounded to x's dtype, as eager's are: over n pixels the roundings add 1/n to the square of
the result's own, 1 % of its error at 7². Next to the sum of the unrounded ones they are exact products of 16-bit
operands for the matrix units; these would take a second product for the rest.

Floor: (N·H·W·(C + K) + K·C + N·K) · itemsize bytes and 2·N·H·W·K·C FLOP. ResNet-50 (512 → 2048 at 7²), 256 images,
bf16: 67.3 MB and 26.3 GFLOP; on an H200 (4.3 TB/s, 790 TFLOP/s) 16 µs by memory and 33 by its matrix units, a predicted
0.13 µs an image. The convolution alone moves 117 MB, the mean after it another 52 (12 µs).
Source: the chained product of FlashAttention, Dao et al. 2022; GEMM with cuDNN's epilogue otherwise.
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
from .pool_config import SLOTS, Head, HeadConfig, head_config


@triton.jit
def _sums(
    x,
    w_row,
    t,
    residual,
    first,
    k,
    only,
    N,
    P,
    chunks,
    trips,
    C: tl.constexpr,
    K: tl.constexpr,
    ALONE: tl.constexpr,
    EXACT: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Σ of each image's activations from row ``first`` on, of image ``only`` where ALONE: float32 [BLOCK_N, SLOTS]."""
    dtype: tl.constexpr = x.dtype.element_ty
    # In registers: one sum for each filter and image of the block.
    sums = tl.zeros((BLOCK_N, SLOTS), tl.float32)
    for chunk in range(chunks):
        local = chunk * BLOCK_M + tl.arange(0, BLOCK_M)
        image = local // P
        # Rows past the last image read the last row instead; they belong to a slot that is not stored.
        row = tl.minimum(first + local, N * P - 1).to(tl.int64)
        x_row = x + row * C

        # Load the residual first: it is on its way while the products are taken.
        r = tl.load(residual + row[:, None] * K + k[None, :], mask=(k < K)[None, :], other=0.0)

        # Product: filters × pixels.
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for i in range(trips):
            c = i * BLOCK_K + tl.arange(0, BLOCK_K)
            if EXACT:
                a = tl.load(w_row[:, None] + c[None, :])
                b = tl.load(x_row[None, :] + c[:, None])
            else:
                a = tl.load(w_row[:, None] + c[None, :], mask=(c < C)[None, :], other=0.0)
                b = tl.load(x_row[None, :] + c[:, None], mask=(c < C)[:, None], other=0.0)
            acc = tl.dot(a, b, acc, input_precision="ieee")

        # Epilogue, then the second product adds the activations up image by image.
        z = activate(acc + t[:, None] + r.T.to(tl.float32), True).to(dtype)
        if ALONE:
            z = tl.where((image == only)[None, :], z, 0.0).to(dtype)
        membership = (image[:, None] == tl.arange(0, SLOTS)[None, :]).to(tl.float32).to(dtype)
        sums = tl.dot(z, membership, sums, input_precision="ieee")
    return sums


@triton.jit(do_not_specialize=["N", "P", "images", "chunks"])
def _pointwise_pool(
    x,
    w,
    bias,
    residual,
    out,
    N,
    P,
    images,
    chunks,
    trips,
    C: tl.constexpr,
    K: tl.constexpr,
    EXACT: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """Means of ``images`` images of ``P`` pixels × a block of filters."""
    begin(PDL)
    tiles_n = tl.cdiv(K, BLOCK_N)
    group = tl.program_id(0) // tiles_n
    k = (tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    # filters past the last read it instead, unmasked; they are not stored
    filt = tl.minimum(k, K - 1)
    w_row, t = w + filt * C, tl.load(bias + filt)
    first, slot = group * images * P, tl.arange(0, SLOTS)
    sums = _sums(
        x,
        w_row,
        t,
        residual,
        first,
        k,
        0,
        N,
        P,
        chunks,
        trips,
        C,
        K,
        False,
        EXACT,
        SLOTS,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )

    # 0 · NaN is NaN: where one came out, each image alone. Triton 3.6 cannot lay out the maximum of a maximum along
    # another axis of what comes out of tensor memory; of all axes it can.
    if tl.max(tl.max((sums != sums).to(tl.int32), axis=1), axis=None) > 0:
        for image in range(images):
            own = _sums(
                x,
                w_row,
                t,
                residual,
                first,
                k,
                image,
                N,
                P,
                chunks,
                trips,
                C,
                K,
                True,
                EXACT,
                SLOTS,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
            )
            sums = tl.where((slot == image)[None, :], own, sums)

    # Store the means.
    n = group * images + slot
    inside = (k < K)[:, None] & ((slot < images) & (n < N))[None, :]
    tl.store(
        out + n.to(tl.int64)[None, :] * K + k[:, None],
        (sums / P).to(out.dtype.element_ty),
        mask=inside,
    )


def supports(problem: Problem) -> str | None:
    """NHWC, with at least one pixel an image."""
    if min(problem.x[2:]) < 1:
        return "an image without pixels has no mean"
    return launch.declines(problem)


@kernel(
    "triton.pointwise_pool",
    op="pointwise_pool",
    supports=supports,
    available=launch.available,
    sources=launch.sources("dependent_launch", "epilogue", "pool_config"),
)
def pointwise_pool(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    n, c, h, w = x.shape
    head = Head(n, h * w, weight.shape[0], c, x.itemsize, launch.capability(x))
    return run(x, weight, bias, residual, head, head_config(head))


def run(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, head: Head, config: HeadConfig
) -> Tensor:
    """The head with a given config, which is what a tuner tries."""
    out = torch.empty(head.images, head.filters, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    grid = (triton.cdiv(head.images, config.images) * triton.cdiv(head.filters, config.block_n),)
    _pointwise_pool[grid](
        x,
        launch.nhwc(weight),
        bias.contiguous(),
        residual,
        out,
        head.images,
        head.pixels,
        config.images,
        triton.cdiv(config.images * head.pixels, config.block_m),
        triton.cdiv(head.channels, config.block_k),
        C=head.channels,
        K=head.filters,
        EXACT=head.channels % config.block_k == 0,
        SLOTS=SLOTS,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch.options(x),
    )
    return out
