"""Split-K: when a problem has too few tiles to fill the GPU, several blocks share one tile's K range.

Each writes its float32 partial sum [split, M, K]; this kernel adds them in a fixed order and runs the epilogue: no
atomics, so two runs agree bit for bit. It costs 4·M·K·(split + split) bytes (mostly in L2) and one launch;
``gemm_config`` weighs that against the idle SMs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .dependent_launch import begin
from .epilogue import finish


@triton.jit
def store_partial(acc, out, split, m, k, M, K: tl.constexpr):
    """One block's float32 partial sum into partials[split, m, k]."""
    row = split.to(tl.int64) * M + m
    tl.store(out + row[:, None] * K + k[None, :], acc, mask=(m < M)[:, None] & (k < K)[None, :])


@triton.jit(do_not_specialize=["M"])
def _add_partials(
    partials,
    scale,
    shift,
    mean,
    var,
    eps,
    residual,
    out,
    M,
    K: tl.constexpr,
    SPLIT: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """The sum of all partials of one tile, in registers, and its epilogue."""
    begin(PDL)
    tiles_k = tl.cdiv(K, BLOCK_K)
    m = (tl.program_id(0) // tiles_k) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = (tl.program_id(0) % tiles_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (m < M)[:, None] & (k < K)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for i in tl.static_range(SPLIT):
        row = i * M.to(tl.int64) + m  # of all partials together there may be more than 2³¹
        acc += tl.load(partials + row[:, None] * K + k[None, :], mask=inside, other=0.0)
    finish(acc, scale, shift, mean, var, eps, residual, out, m, k, M, K, RELU)


def partials(split: int, m: int, k: int, like: Tensor) -> Tensor:
    """Memory for the partial sums, float32 [split, m, k]."""
    return torch.empty(split, m, k, dtype=torch.float32, device=like.device)


def add_partials(
    parts: Tensor, vectors: tuple, residual: Tensor | None, out: Tensor, relu: bool
) -> None:
    """out = act((Σ parts)·s + t + residual) for NHWC ``out`` with as many pixels as the partials have rows."""
    split, m, k = parts.shape
    block_m, block_k = 8, min(128, max(16, triton.next_power_of_2(k)))
    grid = (triton.cdiv(m, block_m) * triton.cdiv(k, block_k),)
    _add_partials[grid](
        parts,
        *vectors,
        residual,
        out,
        m,
        K=k,
        SPLIT=split,
        RELU=relu,
        BLOCK_M=block_m,
        BLOCK_K=block_k,
        num_warps=4,
        num_stages=1,
        **launch.options(out),
    )
