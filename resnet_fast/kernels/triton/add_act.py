"""Residual add, squeeze-and-excitation gate and activation, forward and backward: one pass over memory each.

    forward   out = act(x · gate[n, c] + y)
    backward  dy = dout · [out > 0];  dx = dy · gate;  dgate[n, c] = Σ_hw dy · x

All tensors NHWC of one dtype, gate [N, C, 1, 1]; arithmetic in float32, rounded once.
dgate is summed per tile of pixels into float32 partials, which are then added in a fixed order: deterministic.
Floor: numel · itemsize · 3 bytes forward (x, y, out); backward 3 (dout, out, dy) without a gate and 5 (also x, dx)
with one. At most three FLOP an element, which hide behind the bytes.
Source: He et al. 2016; Hu et al. 2018 for the gate; torch's threshold_backward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...dispatch.registry import kernel
from . import launch
from .epilogue import activate, masked
from .rows_config import rows_config

BLOCK = 2048  # elements: two 16-byte loads in flight for each thread and 16-bit tensor


@triton.jit(do_not_specialize=["blocks"])
def _add_act(
    x, y, gate, out, size, blocks, C: tl.constexpr, RELU: tl.constexpr, BLOCK: tl.constexpr
):
    """Elements of one image (``size`` of them in ``blocks`` blocks), or of the whole tensor if there is no gate."""
    image = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    at = first + tl.arange(0, BLOCK)
    inside = at < size
    base = image * size
    # Load, in float32 in registers: x times its channel's gate, plus y.
    z = tl.load(x + base + at, mask=inside, other=0.0).to(tl.float32)
    if gate is not None:
        c = ((tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)) % C
        factor = tl.load(gate + image * C + c).to(tl.float32)
        z = z * factor
    z += tl.load(y + base + at, mask=inside, other=0.0).to(tl.float32)
    # Epilogue and store.
    z = activate(z, RELU).to(out.dtype.element_ty)
    tl.store(out + base + at, z, mask=inside)


@triton.jit
def _mask(dout, out, dy, size, RELU: tl.constexpr, BLOCK: tl.constexpr):
    """dy = dout · [out > 0] of one block of elements."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    g = masked(dout, out, at, inside, RELU)
    tl.store(dy + at, g.to(dy.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["pixels", "tiles"])
def _gated_backward(
    dout,
    out,
    x,
    gate,
    dy,
    dx,
    partials,
    pixels,
    tiles,
    C: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One tile of pixels × channels of one image: dy, dx and the tile's share of dgate."""
    blocks_c: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    tile = tl.program_id(0) // blocks_c
    c = (tl.program_id(0) % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    image = (tile // tiles).to(tl.int64)
    row = tile % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (row < pixels)[:, None] & (c < C)[None, :]
    at = (image * pixels + row)[:, None] * C + c[None, :]
    # The gradient before the activation, [BLOCK_M, BLOCK_C] in registers, serves all three results.
    g = masked(dout, out, at, inside, RELU)
    factor = tl.load(gate + image * C + c, mask=c < C, other=0.0).to(tl.float32)
    tl.store(dy + at, g.to(dy.dtype.element_ty), mask=inside)
    tl.store(dx + at, (g * factor[None, :]).to(dx.dtype.element_ty), mask=inside)
    # The tile's share of dgate; the partials are added in a fixed order by the caller.
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    share = tl.sum(g * value, axis=0)
    tl.store(partials + tile.to(tl.int64) * C + c, share, mask=c < C)


@kernel(
    "triton.add_act",
    op="add_act",
    supports=launch.declines,
    available=launch.available,
    sources=launch.sources("epilogue", "rows_config"),
)
def add_act(x, y, gate, act) -> Tensor:
    out = launch.result_like(*(t for t in (x, y, gate) if t is not None))
    if x.numel() == 0:
        return out
    size = x.numel() if gate is None else x.numel() // x.shape[0]
    blocks = triton.cdiv(size, BLOCK)
    grid = (blocks * (x.numel() // size),)
    _add_act[grid](
        x,
        y,
        gate if gate is None else gate.contiguous(),
        out,
        size,
        blocks,
        C=x.shape[1],
        RELU=act == "relu",
        BLOCK=BLOCK,
        num_warps=4,
        num_stages=1,
        **launch.OPTIONS,
    )
    return out


@kernel(
    "triton.add_act_backward",
    op="add_act_backward",
    supports=launch.declines,
    available=launch.available,
    sources=launch.sources("epilogue", "rows_config"),
)
def add_act_backward(dout, out, x, gate, act) -> tuple[Tensor, Tensor, Tensor]:
    relu = act == "relu"
    dy = torch.empty_like(out)
    size = out.numel()
    if gate is None:
        if size:
            grid = (triton.cdiv(size, BLOCK),)
            _mask[grid](
                dout,
                out,
                dy,
                size,
                RELU=relu,
                BLOCK=BLOCK,
                num_warps=4,
                num_stages=1,
                **launch.OPTIONS,
            )
        return dy, dout.new_empty(0), dout.new_empty(0)
    n, c, h, w = out.shape
    config = rows_config(h * w, c, out.itemsize, launch.capability(out))
    tiles = triton.cdiv(h * w, config.block_m)
    dx = torch.empty_like(out)
    partials = torch.empty(n, tiles, c, dtype=torch.float32, device=out.device)
    if size:
        grid = (n * tiles * triton.cdiv(c, config.block_c),)
        _gated_backward[grid](
            dout,
            out,
            launch.nhwc(x),
            gate.contiguous(),
            dy,
            dx,
            partials,
            h * w,
            tiles,
            C=c,
            RELU=relu,
            BLOCK_M=config.block_m,
            BLOCK_C=config.block_c,
            num_warps=config.num_warps,
            num_stages=1,
            **launch.OPTIONS,
        )
    return dy, dx, partials.sum(1).view_as(gate).to(gate.dtype)
