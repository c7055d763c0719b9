"""Training batch norm + residual + activation, backward: the two sums in one read, dx in a second.

    dz = dy · [y > 0];  x̂ = (x − μ)/√(σ²+ε);  dβ = Σ dz;  dγ = Σ dz · x̂;  dresidual = dz
    dx = γ/√(σ²+ε) · (dz − dβ/M − x̂ · dγ/M)

All tensors NHWC as rows [M, C], M = N·H·W; sums in float32, dγ and dβ in γ's dtype. Three launches: partial sums of
each block's rows, their merge in a fixed order (no atomics: deterministic), then dx. With a residual the first pass
has to write dz, so the second reads that one tensor in place of dy and y.
Floor: M·C·itemsize · 7 bytes (dy, x, y and dz; then dz, x and dx. Without a residual dy, x, y; then dy, x, y and dx).
About ten FLOP an element, which hide behind the bytes.
Source: Ioffe and Szegedy 2015, §3; cuDNN's BatchNormalizationBackward; torch's threshold_backward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...dispatch.registry import kernel
from . import launch
from .epilogue import masked
from .rows_config import RowsConfig, merge_config, rows_config


@triton.jit(do_not_specialize=["M"])
def _partial_sums(
    dy,
    x,
    y,
    mean,
    dz,
    sums,
    products,
    M,
    trips,
    C: tl.constexpr,
    RELU: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Σ dz, Σ dz·(x − μ) of trips · BLOCK_M rows into sums[block, c], products[block, c]; dz itself unless None."""
    blocks_c: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    block = tl.program_id(0) // blocks_c
    c = (tl.program_id(0) % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    mid = tl.load(mean + c, mask=c < C, other=0.0)
    # In registers: both sums of each channel.
    total, product = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    for i in tl.range(trips, num_stages=STAGES):
        m = (block * trips + i) * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = (m < M)[:, None] & (c < C)[None, :]
        at = m.to(tl.int64)[:, None] * C + c[None, :]
        g = masked(dy, y, at, inside, RELU)
        if dz is not None:
            tl.store(dz + at, g.to(dz.dtype.element_ty), mask=inside)
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        off = tl.where(inside, value - mid[None, :], 0.0)
        total += tl.sum(g, axis=0)
        product += tl.sum(g * off, axis=0)
    tl.store(sums + block * C + c, total, mask=c < C)
    tl.store(products + block * C + c, product, mask=c < C)


@triton.jit(do_not_specialize=["partials"])
def _merge_sums(
    sums,
    products,
    var,
    eps,
    dbias,
    dweight,
    partials,
    trips,
    C: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dβ = Σ sums and dγ = Σ products / √(σ²+ε), float32."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total, product = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    for i in tl.range(trips, num_stages=STAGES):
        p = i * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = (p < partials)[:, None] & (c < C)[None, :]
        total += tl.sum(tl.load(sums + p[:, None] * C + c[None, :], mask=inside, other=0.0), axis=0)
        product += tl.sum(
            tl.load(products + p[:, None] * C + c[None, :], mask=inside, other=0.0), axis=0
        )
    tl.store(dbias + c, total, mask=c < C)
    rstd = tl.rsqrt(tl.load(var + c, mask=c < C, other=1.0) + eps)
    tl.store(dweight + c, product * rstd, mask=c < C)


@triton.jit(do_not_specialize=["M"])
def _dx(
    g,
    y,
    x,
    weight,
    mean,
    var,
    eps,
    dbias,
    dweight,
    dx,
    M,
    C: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx from the gradient ``g``: dy, still to be masked by y, or dz."""
    blocks_c: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    m = (tl.program_id(0) // blocks_c) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = (tl.program_id(0) % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (m < M)[:, None] & (c < C)[None, :]
    at = m.to(tl.int64)[:, None] * C + c[None, :]
    rstd = tl.rsqrt(tl.load(var + c, mask=c < C, other=1.0) + eps)
    scale = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32) * rstd
    # dx = scale·dz + slope·(x − μ) + shift: three vectors and μ for each thread, not five.
    slope = -scale * rstd * (tl.load(dweight + c, mask=c < C, other=0.0) / M)
    shift = -scale * (tl.load(dbias + c, mask=c < C, other=0.0) / M)
    mid = tl.load(mean + c, mask=c < C, other=0.0)
    off = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - mid[None, :]
    out = masked(g, y, at, inside, RELU) * scale[None, :] + off * slope[None, :] + shift[None, :]
    tl.store(dx + at, out.to(dx.dtype.element_ty), mask=inside)


@kernel(
    "triton.bn_act_backward",
    op="bn_act_backward",
    supports=launch.declines,
    available=launch.available,
    sources=launch.sources("epilogue", "rows_config"),
)
def bn_act_backward(
    dy, x, y, weight, mean, var, eps, act, residual
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    c = x.shape[1]
    m = x.numel() // max(c, 1)
    dx = torch.empty_like(x)
    y_nhwc = launch.nhwc(y)
    dz = torch.empty_like(y_nhwc) if residual else None
    dbias, dweight = torch.zeros(2, c, dtype=torch.float32, device=x.device)
    if m:
        dy, mean, var = launch.nhwc(dy), mean.contiguous(), var.contiguous()
        config = rows_config(m, c, x.itemsize, launch.capability(x))
        relu = act == "relu"
        _sums(dy, x, y_nhwc, mean, var, eps, dz, dbias, dweight, m, relu, config)
        g, relu = (dz, False) if residual else (dy, relu)
        grid = (triton.cdiv(m, config.block_m) * triton.cdiv(c, config.block_c),)
        _dx[grid](
            g,
            y_nhwc,
            x,
            weight.contiguous(),
            mean,
            var,
            eps,
            dbias,
            dweight,
            dx,
            m,
            C=c,
            RELU=relu,
            BLOCK_M=config.block_m,
            BLOCK_C=config.block_c,
            num_warps=config.num_warps,
            num_stages=1,
            **launch.OPTIONS,
        )
    if dz is None:
        dz = x.new_empty(0)
    elif y_nhwc is not y:  # the residual's gradient has y's strides
        dz = torch.empty_like(y).copy_(dz)
    return dx, dweight.to(weight.dtype), dbias.to(weight.dtype), dz


def _sums(
    dy: Tensor,
    x: Tensor,
    y: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    dz: Tensor | None,
    dbias: Tensor,
    dweight: Tensor,
    m: int,
    relu: bool,
    config: RowsConfig,
) -> None:
    """Fill dβ and dγ (float32 [C]), and dz unless it is None."""
    c = x.shape[1]
    sums, products = torch.empty(2, config.partials, c, dtype=torch.float32, device=x.device)
    grid = (config.partials * triton.cdiv(c, config.block_c),)
    _partial_sums[grid](
        dy,
        x,
        y,
        mean,
        dz,
        sums,
        products,
        m,
        config.trips,
        C=c,
        RELU=relu,
        STAGES=3,
        BLOCK_M=config.block_m,
        BLOCK_C=config.block_c,
        num_warps=config.num_warps,
        num_stages=1,
        **launch.OPTIONS,
    )
    merge = merge_config(config.partials, c)
    _merge_sums[(triton.cdiv(c, merge.block_c),)](
        sums,
        products,
        var,
        eps,
        dbias,
        dweight,
        config.partials,
        merge.trips,
        C=c,
        STAGES=2,
        BLOCK_P=merge.rows,
        BLOCK_C=merge.block_c,
        num_warps=merge.num_warps,
        num_stages=1,
        **launch.OPTIONS,
    )
