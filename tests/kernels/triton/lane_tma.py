"""The interpreter lane of the kernels on tensor descriptors; ``test_triton_tma.py`` runs it.

The interpreter reads and writes descriptors by their definition: zero outside on either side, nothing written there.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from triton_interpreter import right

from resnet_fast.dispatch.problem import Problem
from resnet_fast.dispatch.registry import find
from resnet_fast.kernels.triton import conv_tma, launch, pointwise_tma
from resnet_fast.kernels.triton.tma_config import TileConfig
from resnet_fast.testing.eager import eager
from resnet_fast.testing.grids import nasty_problems
from resnet_fast.testing.rule import same_nonfinite
from resnet_fast.testing.samples import make_args

assert launch.INTERPRETED, (
    "this file needs TRITON_INTERPRET=1; pytest tests/test_triton_tma.py sets it"
)

MODULES = {"triton.pointwise_tma": pointwise_tma, "triton.conv_tma": conv_tma}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def problem(x, weight, dtype=torch.float32, **rest) -> Problem:
    padding = (weight[2] // 2, weight[3] // 2)
    return Problem(
        op="conv_bn_act",
        device="cpu",
        dtype=dtype,
        x=x,
        layout="nhwc",
        weight=weight,
        **{"bn": True, "act": "relu", "residual": "nhwc", "padding": padding, **rest},
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("id", MODULES)
def test_nasty_grid(id: str, dtype: torch.dtype) -> None:
    taken = [
        case for case in nasty_problems("conv_bn_act", dtype) if find(id).supports(case) is None
    ]
    assert len(taken) >= 4
    for case in taken:
        right(id, case)


# ---------------------------------------------------------------- each tile on what it has to get right


def streamed(
    box: tuple[int, int, int], filters: int = 64, channels: int = 16, blocks: int = 2
) -> TileConfig:
    return TileConfig(box, filters, channels, False, 4, 2, blocks)


def resident(pixels: int, filters: int, channels: int, blocks: int) -> TileConfig:
    return TileConfig((pixels, 1, 1), filters, channels, True, 4, 2, blocks)


POINTWISE = {
    "tails in pixels, filters and channels": (
        problem((3, 72, 5, 7), (136, 72, 1, 1)),
        streamed((32, 1, 1)),
    ),
    "one channel block, no residual": (
        problem((2, 16, 5, 7), (8, 16, 1, 1), residual=None),
        streamed((32, 1, 1)),
    ),
    "scale and shift, no activation": (
        problem((2, 40, 3, 5), (72, 40, 1, 1), bn=False, act="none"),
        streamed((16, 1, 1), channels=32),
    ),
    "fewer pixels than a tile": (problem((1, 24, 1, 3), (64, 24, 1, 1)), streamed((64, 1, 1))),
    "resident, more tiles than blocks, tails": (
        problem((3, 40, 5, 7), (72, 40, 1, 1)),
        resident(16, 64, 64, 4),
    ),
    "resident, no residual": (
        problem((3, 64, 5, 7), (64, 64, 1, 1), residual=None),
        resident(32, 64, 64, 1),
    ),
    "resident, more filter tiles than blocks": (
        problem((1, 16, 7, 5), (200, 16, 1, 1)),
        resident(16, 64, 16, 1),
    ),
}
CONV = {
    "the box of 56²": (problem((3, 16, 11, 9), (72, 16, 3, 3)), streamed((2, 8, 8))),
    "the box of 28²": (problem((9, 16, 5, 7), (64, 16, 3, 3)), streamed((8, 4, 4))),
    "the box of 14²": (
        problem((33, 16, 3, 5), (64, 16, 3, 3), residual=None),
        streamed((32, 2, 2)),
    ),
    "the box of 7²: taps outside are skipped": (
        problem((17, 16, 3, 2), (72, 16, 3, 3)),
        streamed((16, 1, 1)),
    ),
    "skipped, all of a pixel's taps outside": (
        problem((17, 16, 2, 3), (64, 16, 1, 1), padding=(2, 1)),
        streamed((16, 1, 1)),
    ),
    "skipped, stride 2": (
        problem((17, 16, 4, 6), (64, 16, 3, 3), stride=(2, 2)),
        streamed((16, 1, 1)),
    ),
    "skipped, dilated": (
        problem((17, 16, 6, 5), (64, 16, 3, 3), padding=(2, 3), dilation=(2, 3)),
        streamed((16, 1, 1)),
    ),
    "several channel blocks": (problem((2, 48, 4, 6), (64, 48, 3, 3)), streamed((2, 2, 4))),
    "one wide channel block": (
        problem((2, 64, 4, 6), (64, 64, 3, 3)),
        streamed((1, 4, 8), channels=64),
    ),
    "uneven filter, padding and dilation": (
        problem((2, 32, 9, 8), (72, 32, 5, 3), padding=(3, 0), dilation=(1, 2)),
        streamed((1, 8, 4)),
    ),
    "stride 2, 3×3": (problem((3, 32, 8, 6), (72, 32, 3, 3), stride=(2, 2)), streamed((2, 2, 4))),
    "stride 2, 1×1": (
        problem((3, 32, 8, 6), (136, 32, 1, 1), stride=(2, 2), act="none"),
        streamed((2, 4, 4)),
    ),
    "stride 2, uneven filter": (
        problem((2, 16, 8, 10), (64, 16, 2, 5), stride=(2, 2), padding=(0, 3), dilation=(3, 1)),
        streamed((1, 4, 8)),
    ),
    "the next image begins where the last row ends": (
        problem((4, 16, 2, 2), (64, 16, 3, 3)),
        streamed((1, 2, 2)),
    ),
}
CASES = [("triton.pointwise_tma", name) for name in POINTWISE] + [
    ("triton.conv_tma", name) for name in CONV
]


@pytest.mark.parametrize("id, name", CASES)
def test_tiles(id: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, tile = {**POINTWISE, **CONV}[name]
    monkeypatch.setattr(MODULES[id], "config", lambda *_, **__: tile)
    for dtype in (torch.float32, torch.float16):
        right(id, dataclasses.replace(case, dtype=dtype))


# ---------------------------------------------------------------- NaN, infinity, contracts around the arithmetic


@pytest.mark.parametrize("box", [(2, 4, 8), (2, 1, 1)], ids=["box", "skipping"])
@pytest.mark.parametrize("stride, r", [(1, 1), (1, 3), (2, 1), (2, 3)])
def test_nan_and_infinity_pass_as_eager_has_them(
    stride: int, r: int, box: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the corners too: what lies outside of one image is not its neighbour's."""
    id = "triton.pointwise_tma" if stride == r == 1 else "triton.conv_tma"
    monkeypatch.setattr(MODULES[id], "config", lambda *_, **__: streamed(box))
    args = make_args(problem((3, 16, 6, 4), (24, 16, r, r), stride=(stride, stride)))
    args[0][0, 3, 5, 3], args[0][1, 2, 0, 0], args[0][2, 15, 0, 3] = (
        float("nan"),
        float("inf"),
        -float("inf"),
    )
    args[4][0, 1, 0, 1], args[4][2, 23, -1, -1] = float("inf"), float("nan")
    assert same_nonfinite(find(id).fn(*args), eager("conv_bn_act", args)[0])


@pytest.mark.parametrize("id", MODULES)
def test_operands_may_start_anywhere_and_filters_be_laid_out_otherwise(id: str) -> None:
    """Descriptors want 16-byte addresses and dense memory; slices and plain filters give neither."""
    case = problem((2, 16, 4, 4), (24, 16, 1, 1))
    args = list(make_args(case))
    plain = find(id).fn(*args)

    def moved(t: torch.Tensor) -> torch.Tensor:
        n, c, h, w = t.shape
        start = torch.zeros(t.numel() + 1)[1:].view(n, h, w, c).permute(0, 3, 1, 2)
        return start.copy_(t)

    args[0], args[4] = moved(args[0]), moved(args[4])
    args[1] = torch.stack([args[1], args[1]], 1)[:, 0]
    args[2:4] = [torch.stack([v, v], 1)[:, 0] for v in args[2:4]]
    assert args[0].data_ptr() % 16 and not args[1].is_contiguous()
    assert torch.equal(find(id).fn(*args), plain)


@pytest.mark.parametrize("id", MODULES)
def test_an_empty_batch_and_one_pixel(id: str) -> None:
    for shape in ((0, 16, 4, 4), (1, 16, 1, 1)):
        args = make_args(problem(shape, (24, 16, 1, 1)))
        out, bar = find(id).fn(*args), eager("conv_bn_act", args)[0]
        assert out.shape == bar.shape and (not bar.numel() or out.stride() == bar.stride())
        torch.testing.assert_close(out, bar)


def test_the_host_sees_the_window_of_its_problem() -> None:
    """Rows, columns and the share of taps inside, by counting them on ones."""
    for case in (
        problem((2, 16, 7, 5), (24, 16, 3, 3)),
        problem((2, 16, 8, 6), (24, 16, 3, 5), stride=(2, 2), padding=(1, 4), dilation=(1, 2)),
    ):
        seen = conv_tma.window(case.x, case.weight, (case.stride, case.padding, case.dilation))
        ones = torch.ones(1, 1, *case.x[2:])
        counts = torch.nn.functional.conv2d(
            ones, torch.ones(1, 1, *case.weight[2:]), None, case.stride, case.padding, case.dilation
        )
        assert (seen.rows, seen.columns) == case.out_hw == tuple(counts.shape[2:])
        assert seen.inside == pytest.approx(
            float(counts.mean()) / (case.weight[2] * case.weight[3])
        )
