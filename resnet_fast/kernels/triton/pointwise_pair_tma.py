"""Two 1×1 convolutions of different inputs, added, + bias + ReLU, on tensor descriptors: ``pointwise_pair`` box by box.

    out[n, p, q, k] = relu(Σ_c x[n, p, q, c] · w[k, c] + Σ_c x2[n, p·S, q·S, c] · w2[k, c] + b[k])

x: NHWC [N, H, W, C], x2: NHWC, of stride S = 1 or 2, w: [K, C], w2: [K, C2], b: float32 [K], out: NHWC; 16-bit. As
many blocks as run at once, each walking tiles: a box of images × rows × columns, which TMA loads from either input as
one (x2 at stride 2 as [N, H, 2, W, 2·C2], of which it takes the even rows and the first C2 channels), times filters.
Each trip of the one loop takes a share of the channels of *both* inputs, the same part of each: the pipeline fills
once, nothing is chosen inside it, and both pairs of operands are wgmma's from shared memory.

Floor: (M·(C + C2) + K·(C + C2) + M·K) · itemsize bytes, M = N·H·W, and 2·M·K·(C + C2) FLOP. ResNet-50's layer2 (256
images, 28², 128 + 256 → 512, bf16) on an H200: 84 µs by memory, 100 by its matrix units. Predicted with L2 → SM and
barriers too, over the four stages 662 µs (layer1 to layer4 163, 179, 163, 155) against 751 by pointers (210, 203, 175,
161), 0.35 µs an image: no GPU has run either.
Source: the K-concatenation of ``pointwise_pair``, the boxes of ``conv_tma``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...dispatch.problem import Problem
from ...dispatch.registry import kernel
from . import launch, pointwise_pair, tma
from .dependent_launch import begin
from .epilogue import activate
from .gemm_config import Gemm
from .tma_config import TileConfig, Window, config, grid, tiles

_SHARES = (64, 32, 16)  # channels of an input that a trip can take


@triton.jit(do_not_specialize=["count", "tiles_h", "tiles_w"])
def _pointwise_pair_tma(
    x,
    w,
    x2,
    w2,
    bias,
    out,
    count,
    step,
    tiles_h,
    tiles_w,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    TRIPS: tl.constexpr,
    NB: tl.constexpr,
    HB: tl.constexpr,
    WB: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_K2: tl.constexpr,
    PDL: tl.constexpr,
):
    """Tiles of a box of pixels × filters: every ``step``-th of ``count`` from this block's number on."""
    begin(PDL)
    tiles_n: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    BLOCK_M: tl.constexpr = NB * HB * WB
    for tile in tl.range(tl.program_id(0), count, step, flatten=True):
        box, k = tile // tiles_n, tile % tiles_n * BLOCK_N
        q, p, n = box % tiles_w * WB, box // tiles_w % tiles_h * HB, box // (tiles_w * tiles_h) * NB

        # Accumulators filters × pixels, as ``tma`` says why; operands pass through shared memory.
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for i in range(TRIPS):
            # Load a share of both inputs' channels, then both products into the same sums.
            c, c2 = i * BLOCK_K, i * BLOCK_K2
            pixels = x.load([n, p, q, c]).reshape(BLOCK_M, BLOCK_K)
            if STRIDE == 1:
                pixels2 = x2.load([n, p, q, c2]).reshape(BLOCK_M, BLOCK_K2)
            else:
                pixels2 = x2.load([n, p, 0, q, c2]).reshape(BLOCK_M, BLOCK_K2)
            acc = tl.dot(w.load([k, c]), pixels.T, acc)
            acc = tl.dot(w2.load([k, c2]), pixels2.T, acc)

        # Epilogue and store, pixels × filters.
        filters = k + tl.arange(0, BLOCK_N)
        z = activate((acc + tl.load(bias + filters, mask=filters < K, other=0.0)[:, None]).T, True)
        out.store([n, p, q, k], z.to(out.dtype).reshape(NB, HB, WB, BLOCK_N))


def shares(channels: int, channels2: int) -> dict[int, tuple[int, int]]:
    """Channels that a trip takes in all → (of the first input, of the second), the same whole part of each."""
    found = {}
    for first in _SHARES:
        second = channels2 * first // channels
        divides = channels % first == 0 and channels2 * first % channels == 0
        if divides and second in _SHARES:
            found[first + second] = first, second
    return found


def supports(problem: Problem) -> str | None:
    """16 bits, strides 1 or 2 over even sizes, channels of both inputs in like shares of 16 to 64, from sm_90 on."""
    channels, channels2 = problem.x[1], problem.chain[0][1]
    if problem.dtype == torch.float32:
        return "its gain is the matrix units', which float32 does not go through"
    if problem.stride not in ((1, 1), (2, 2)):
        return "its descriptors step by 1 or by 2 in both directions, this stride is {}×{}".format(
            *problem.stride
        )
    if problem.stride == (2, 2) and any(size % 2 for size in problem.second):
        h, w = problem.second
        return f"with stride 2 it sees rows and columns in pairs, and of {h}×{w} one has no partner"
    if not shares(channels, channels2):
        return (
            "it takes both inputs' channels in shares of 16, 32 or 64, the same part of each, "
            f"of {channels} and {channels2} it cannot"
        )
    return tma.declines(problem) or pointwise_pair.supports(problem)


@kernel(
    "triton.pointwise_pair_tma",
    op="pointwise_pair",
    supports=supports,
    available=launch.available,
    sources=launch.sources("dependent_launch", "epilogue", "tma", "tma_config"),
)
def pointwise_pair_tma(x, weight, x2, weight2, bias, stride2) -> Tensor:
    capability = launch.capability(x)
    g, window = product_of(x.shape, weight2.shape, x.itemsize, capability)
    return run(x, weight, x2, weight2, bias, stride2, g, window)


def product_of(
    x: tuple[int, ...], weight2: tuple[int, ...], itemsize: int, capability: tuple[int, int] | None
) -> tuple[Gemm, Window]:
    """The matrix product that a pair is, and the window of its result."""
    n, c, h, w = x
    k, c2, *_ = weight2
    g = Gemm(n * h * w, k, c + c2, itemsize=itemsize, capability=capability)
    return g, Window(n, h, w)


def best(g: Gemm, window: Window, channels: int) -> TileConfig:
    """The best predicted tile, of a first input of so many channels."""
    return config(g, window, depths=tuple(shares(channels, g.channels - channels)))


def run(
    x: Tensor,
    weight: Tensor,
    x2: Tensor,
    weight2: Tensor,
    bias: Tensor,
    stride2: tuple[int, int],
    g: Gemm,
    window: Window,
    tile: TileConfig | None = None,
) -> Tensor:
    """The product with a given tile, which is what a tuner tries, or with the predicted best."""
    (n, c, h, w), (_, c2, h2, w2) = x.shape, x2.shape
    out = torch.empty(
        n, g.n, h, w, dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )
    if g.m == 0:
        return out
    tile = tile or best(g, window, c)
    first, second = shares(c, c2)[tile.channels]
    pixels, filters = tiles(g, window, tile)
    (step, _), (nb, hb, wb) = grid(g, window, tile), tile.box
    if stride2[0] == 1:
        shortcut = tma.descriptor(tma.dense(x2), (n, h, w, c2), (*tile.box, second))
    else:
        shortcut = tma.descriptor(
            tma.dense(x2), (n, h2 // 2, 2, w2 // 2, 2 * c2), (nb, hb, 1, wb, second)
        )
    _pointwise_pair_tma[(step,)](
        tma.descriptor(tma.dense(x), (n, h, w, c), (*tile.box, first)),
        tma.descriptor(tma.dense(weight), (g.n, c), (tile.filters, first)),
        shortcut,
        tma.descriptor(tma.dense(weight2), (g.n, c2), (tile.filters, second)),
        bias.contiguous(),
        tma.descriptor(out, (n, h, w, g.n), (*tile.box, tile.filters)),
        pixels * filters,
        step,
        triton.cdiv(h, hb),
        triton.cdiv(w, wb),
        K=g.n,
        STRIDE=stride2[0],
        TRIPS=c // first,
        NB=nb,
        HB=hb,
        WB=wb,
        BLOCK_N=tile.filters,
        BLOCK_K=first,
        BLOCK_K2=second,
        **tile.options(),
        **launch.options(x),
    )
    return out
