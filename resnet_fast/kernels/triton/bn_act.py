"""Training batch norm + residual + activation, forward: statistics in one read, normalisation in a second.

    μ[c] = mean(x),  σ²[c] = mean((x − μ)²),  y = act((x − μ) · γ/√(σ²+ε) + β + residual)

x, residual, y: NHWC as rows [M, C], M = N·H·W; γ, β: [C]; μ, σ² float32 [C]. Three launches: each block reduces its
tiles of rows to (μ, M2), tile after tile by Chan's rule; a second kernel merges the blocks' partials in a fixed order
(no atomics: deterministic); the third normalises. Two passes inside a tile and Chan's rule between tiles keep σ²
right where |μ| ≫ σ, which E[x²] − μ² does not.
Floor: M·C·itemsize · (3 + residual) bytes (x twice, y, residual); what fits L2 is read from DRAM once. About ten FLOP
an element, which hide behind the bytes.
Source: Ioffe and Szegedy 2015; Chan, Golub and LeVeque 1983, eq. 2.1; torch.nn.BatchNorm2d.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...dispatch.registry import kernel
from . import launch
from .epilogue import activate
from .rows_config import RowsConfig, merge_config, rows_config


@triton.jit
def chan(n_a, mean_a, m2_a, n_b, mean_b, m2_b):
    """Merge (count, mean, M2 = Σ(x − mean)²) of two disjoint sets.

    An empty second set changes nothing, whatever the first holds; the mean is weighted, not stepped, so that two
    infinite means stay infinite, as in a plain sum.
    """
    n = n_a + n_b
    delta = mean_b - mean_a
    mean = mean_a * (n_a / n) + mean_b * (n_b / n)
    m2 = m2_a + m2_b + delta * (n_a * (n_b / n)) * delta
    return n, tl.where(n_b > 0, mean, mean_a), tl.where(n_b > 0, m2, m2_a)


@triton.jit
def pivot(first, c, C: tl.constexpr):
    """The first row's values, 0 where not finite: statistics of x − pivot keep all bits of σ² where |μ| ≫ σ."""
    value = tl.load(first + c, mask=c < C, other=0.0).to(tl.float32)
    return tl.where(tl.abs(value) < float("inf"), value, 0.0)


@triton.jit(do_not_specialize=["M"])
def _statistics(
    x,
    first,
    means,
    m2s,
    M,
    trips,
    C: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean and M2 of x − pivot over trips · BLOCK_M rows into means[block, c], m2s[block, c]."""
    blocks_c: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    block = tl.program_id(0) // blocks_c
    c = (tl.program_id(0) % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    base = pivot(first, c, C)
    # In registers: rows seen so far, and for each channel their mean and M2.
    n, mean, m2 = 0.0, tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    for i in tl.range(trips, num_stages=STAGES):
        m = (block * trips + i) * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = (m < M)[:, None] & (c < C)[None, :]
        # Load a tile, minus the pivot.
        at = m.to(tl.int64)[:, None] * C + c[None, :]
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        value = tl.where(inside, value - base[None, :], 0.0)
        # Two passes over the tile in registers: its mean, then its M2. Then Chan's rule.
        rows = tl.sum((m < M).to(tl.float32), axis=0)
        tile_mean = tl.sum(value, axis=0) / tl.maximum(rows, 1.0)
        off = tl.where(inside, value - tile_mean[None, :], 0.0)
        tile_m2 = tl.sum(off * off, axis=0)
        n, mean, m2 = chan(n, mean, m2, rows, tile_mean, tile_m2)
    tl.store(means + block * C + c, mean, mask=c < C)
    tl.store(m2s + block * C + c, m2, mask=c < C)


@triton.jit(do_not_specialize=["M", "partials", "rows"])
def _merge_statistics(
    first,
    means,
    m2s,
    mean_out,
    var_out,
    M,
    partials,
    rows,
    trips,
    C: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """μ and biased σ² of each channel from ``partials`` sets of ``rows`` rows (the last may be shorter)."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    n, mean, m2 = 0.0, tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    for i in tl.range(trips, num_stages=STAGES):
        p = i * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = (p < partials)[:, None] & (c < C)[None, :]
        count = tl.where(p < partials, tl.minimum(M - p * rows, rows), 0).to(tl.float32)
        total = tl.sum(count, axis=0)
        # The partials' mean is weighted by their rows; their M2 grows by what each is off it.
        part = tl.load(means + p[:, None] * C + c[None, :], mask=inside, other=0.0)
        weight = count / tl.maximum(total, 1.0)
        mid = tl.sum(part * weight[:, None], axis=0)
        spread = tl.load(m2s + p[:, None] * C + c[None, :], mask=inside, other=0.0)
        off = part - mid[None, :]
        tile_m2 = tl.sum(spread + off * count[:, None] * off, axis=0)
        n, mean, m2 = chan(n, mean, m2, total, mid, tile_m2)
    tl.store(mean_out + c, pivot(first, c, C) + mean, mask=c < C)
    tl.store(var_out + c, m2 / M, mask=c < C)


@triton.jit(do_not_specialize=["M"])
def _normalise(
    x,
    weight,
    bias,
    mean,
    var,
    eps,
    residual,
    y,
    M,
    C: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y of one tile of rows × channels."""
    blocks_c: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    m = (tl.program_id(0) // blocks_c) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = (tl.program_id(0) % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (m < M)[:, None] & (c < C)[None, :]
    at = m.to(tl.int64)[:, None] * C + c[None, :]
    # Four vectors in registers, formed once for the tile's rows.
    rstd = tl.rsqrt(tl.load(var + c, mask=c < C, other=1.0) + eps)
    s = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32) * rstd
    t = tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
    mid = tl.load(mean + c, mask=c < C, other=0.0)
    # (x − μ)·s and not x·s − μ·s: the two large products would cancel where |μ| ≫ σ.
    off = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - mid[None, :]
    z = off * s[None, :] + t[None, :]
    if residual is not None:
        z += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, activate(z, RELU).to(y.dtype.element_ty), mask=inside)


@kernel(
    "triton.bn_act",
    op="bn_act",
    supports=launch.declines,
    available=launch.available,
    sources=launch.sources("epilogue", "rows_config"),
)
def bn_act(x, weight, bias, residual, eps, act) -> tuple[Tensor, Tensor, Tensor]:
    c = x.shape[1]
    m = x.numel() // max(c, 1)
    y = launch.result_like(x)
    if m == 0:
        mean, var = torch.full((2, c), torch.nan, dtype=torch.float32, device=x.device)
        return y, mean, var
    config = rows_config(m, c, x.itemsize, launch.capability(x))
    mean, var = statistics(x, m, config)
    grid = (triton.cdiv(m, config.block_m) * triton.cdiv(c, config.block_c),)
    _normalise[grid](
        x,
        weight.contiguous(),
        bias.contiguous(),
        mean,
        var,
        eps,
        residual,
        y,
        m,
        C=c,
        RELU=act == "relu",
        BLOCK_M=config.block_m,
        BLOCK_C=config.block_c,
        num_warps=config.num_warps,
        num_stages=1,
        **launch.OPTIONS,
    )
    return y, mean, var


def statistics(x: Tensor, m: int, config: RowsConfig) -> tuple[Tensor, Tensor]:
    """(μ, biased σ²) of NHWC ``x`` with ``m`` pixels, float32 [C]."""
    c = x.shape[1]
    means, m2s = torch.empty(2, config.partials, c, dtype=torch.float32, device=x.device)
    mean, var = torch.empty(2, c, dtype=torch.float32, device=x.device)
    grid = (config.partials * triton.cdiv(c, config.block_c),)
    _statistics[grid](
        x,
        x,
        means,
        m2s,
        m,
        config.trips,
        C=c,
        STAGES=3,
        BLOCK_M=config.block_m,
        BLOCK_C=config.block_c,
        num_warps=config.num_warps,
        num_stages=1,
        **launch.OPTIONS,
    )
    merge = merge_config(config.partials, c)
    _merge_statistics[(triton.cdiv(c, merge.block_c),)](
        x,
        means,
        m2s,
        mean,
        var,
        m,
        config.partials,
        config.trips * config.block_m,
        merge.trips,
        C=c,
        STAGES=2,
        BLOCK_P=merge.rows,
        BLOCK_C=merge.block_c,
        num_warps=merge.num_warps,
        num_stages=1,
        **launch.OPTIONS,
    )
    return mean, var
