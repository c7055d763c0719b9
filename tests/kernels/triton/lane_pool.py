"""The interpreter lane of the kernels that end in a pooling, stem and head. ``test_triton_pool.py`` runs it."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from triton_interpreter import right
from triton_shapes import head_of, stem_of

from resnet_fast.dispatch.problem import Problem
from resnet_fast.dispatch.registry import find
from resnet_fast.kernels.triton import conv_pool, launch, pointwise_pool
from resnet_fast.kernels.triton.pool_config import HeadConfig, StemConfig, stem_config
from resnet_fast.testing.eager import eager
from resnet_fast.testing.grids import nasty_problems
from resnet_fast.testing.rule import same_nonfinite
from resnet_fast.testing.samples import make_args

assert launch.INTERPRETED, (
    "this file needs TRITON_INTERPRET=1; pytest tests/test_triton_pool.py sets it"
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def grid(op: str) -> list:
    problems = itertools.chain.from_iterable(nasty_problems(op, dtype) for dtype in DTYPES)
    return [
        pytest.param(problem, id=problem.key) for problem in problems if problem.layout == "nhwc"
    ]


# ---------------------------------------------------------------- the head


@pytest.mark.parametrize("problem", grid("pointwise_pool"))
def test_head_on_the_nasty_grid(problem: Problem) -> None:
    right("triton.pointwise_pool", problem)


def head(x: tuple[int, ...], filters: int, dtype: torch.dtype = torch.float32) -> Problem:
    return Problem(
        op="pointwise_pool",
        device="cpu",
        dtype=dtype,
        x=x,
        layout="nhwc",
        weight=(filters, x[1], 1, 1),
        residual="nhwc",
        act="relu",
    )


# HeadConfig(images, block_m, block_n, block_k, warps, stages)
HEADS = {
    "images share a chunk, the last group has fewer": (
        head((8, 40, 3, 3), 40),
        HeadConfig(3, 32, 16, 16, 4, 2),
    ),
    "an image ends inside a chunk": (head((5, 20, 4, 5), 20), HeadConfig(3, 32, 32, 16, 4, 2)),
    "one image in several chunks": (head((2, 32, 9, 11), 16), HeadConfig(1, 32, 16, 32, 4, 2)),
    "as many images as slots": (head((19, 16, 2, 1), 24), HeadConfig(16, 32, 16, 16, 4, 2)),
    "no remainder anywhere": (head((4, 32, 4, 4), 32), HeadConfig(2, 32, 16, 16, 4, 2)),
}


@pytest.mark.parametrize("case", HEADS)
def test_heads_in_pieces(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, config = HEADS[case]
    monkeypatch.setattr(pointwise_pool, "head_config", lambda head: config)
    for dtype in (torch.float32, torch.float16):
        right("triton.pointwise_pool", replace(problem, dtype=dtype))


@pytest.mark.parametrize("images", [1, 3, 16])
def test_nan_and_infinity_stay_in_their_image(images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other images of the block have finite means, and right ones."""
    monkeypatch.setattr(
        pointwise_pool, "head_config", lambda head: HeadConfig(images, 32, 16, 16, 4, 2)
    )
    args = make_args(head((7, 16, 3, 3), 24))
    args[0][1, 3, 2, 2], args[0][4, 0, 0, 0] = float("nan"), float("inf")
    args[3][6, 5, 1, 1], args[3][2, 7, 0, 2], args[3][0, 2, 0, 0] = (
        float("inf"),
        float("nan"),
        -float("inf"),
    )
    out, bar = find("triton.pointwise_pool").fn(*args), eager("pointwise_pool", args)[0]
    assert same_nonfinite(out, bar)
    torch.testing.assert_close(out, bar, equal_nan=True)


def test_the_mean_of_what_overflows_is_infinite() -> None:
    """Activations are rounded to x's dtype before they are added, as eager's: above 65504 a float16 is infinite."""
    args = make_args(head((2, 16, 3, 3), 24, torch.float16))
    args[3][1, 5, 1, 1] = 6e4
    args[2][5] = 1e4
    out = find("triton.pointwise_pool").fn(*args)
    assert (
        same_nonfinite(out, eager("pointwise_pool", args)[0])
        and out[1, 5].isposinf()
        and out[0, 5].isfinite()
    )


def test_the_head_is_the_same_every_time_and_its_filter_may_be_laid_out_otherwise() -> None:
    args = list(make_args(head((5, 12, 3, 3), 24)))
    plain = find("triton.pointwise_pool").fn(*args)
    args[1] = torch.stack([args[1], args[1]], 1)[:, 0]
    args[2] = torch.stack([args[2], args[2]], 1)[:, 0]
    assert not args[1].is_contiguous() and torch.equal(
        find("triton.pointwise_pool").fn(*args), plain
    )


def test_the_host_asks_for_the_head_of_its_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        pointwise_pool, "head_config", lambda h: asked.append(h) or HeadConfig(1, 32, 32, 16, 4, 2)
    )
    problem = head((2, 16, 3, 5), 24)
    find("triton.pointwise_pool").fn(*make_args(problem))
    assert asked == [head_of(problem)]


# ---------------------------------------------------------------- the stem


# Bytes are normalised in float32 whatever the dtype: one of the halves is enough for them.
@pytest.mark.parametrize(
    "problem",
    [
        case
        for case in grid("conv_pool")
        if not (case.values[0].bytes and case.values[0].dtype == torch.float16)
    ],
)
def test_stem_on_the_nasty_grid(problem: Problem) -> None:
    right("triton.conv_pool", problem)


def stem(
    x: tuple[int, ...],
    filters: int = 8,
    taps: tuple[int, int] = (7, 7),
    dtype: torch.dtype = torch.float32,
    bytes: bool = False,
) -> Problem:
    return Problem(
        op="conv_pool",
        device="cpu",
        dtype=dtype,
        x=x,
        layout="nhwc",
        weight=(filters, x[1], *taps),
        stride=(2, 2),
        padding=(taps[0] // 2, taps[1] // 2),
        act="relu",
        bytes=bytes,
    )


# StemConfig(block_m, block_n, rows, resident, warps, stages)
STEMS = {
    "tiles end inside an image, bands inside the map": (
        stem((3, 3, 22, 37), 20),
        StemConfig(16, 16, 2, True, 4, 2),
    ),
    "as many columns as slots": (stem((2, 3, 14, 30)), StemConfig(16, 16, 1, True, 4, 2)),
    "one column more": (stem((1, 3, 9, 65)), StemConfig(16, 16, 3, True, 4, 2)),
    "odd sizes, odd rows and columns": (stem((2, 3, 17, 21)), StemConfig(16, 16, 2, True, 4, 2)),
    "sizes of 4n + 1 and 4n + 3": (stem((2, 3, 13, 23)), StemConfig(16, 16, 9, True, 4, 2)),
    "uneven filter": (stem((2, 2, 12, 15), 8, (3, 5)), StemConfig(16, 16, 2, True, 4, 2)),
    "single tap": (stem((2, 4, 11, 9), 8, (1, 1)), StemConfig(16, 16, 2, True, 4, 2)),
    "uint8": (stem((2, 3, 15, 37), bytes=True), StemConfig(16, 16, 2, True, 4, 2)),
}


@pytest.mark.parametrize("resident", [True, False], ids=["resident", "streamed"])
@pytest.mark.parametrize("case", STEMS)
def test_stems_in_pieces(case: str, resident: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, config = STEMS[case]
    monkeypatch.setattr(conv_pool, "stem_config", lambda stem: replace(config, resident=resident))
    for dtype in (torch.float32, torch.float16):
        right("triton.conv_pool", replace(problem, dtype=dtype))


@pytest.mark.parametrize("at", [(0, 0), (5, 8), (8, 11), (9, 14), (10, 17), (16, 20)])
def test_nan_and_infinity_reach_only_the_windows_they_are_in(
    at: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each place relative to a slot's first pixel, with values that a neighbour's zero weights meet."""
    monkeypatch.setattr(conv_pool, "stem_config", lambda stem: StemConfig(16, 16, 2, True, 4, 2))
    for value in (float("nan"), float("inf"), -float("inf")):
        args = make_args(stem((2, 3, 17, 21)))
        args[0][1, 2, at[0], at[1]] = value
        out, bar = find("triton.conv_pool").fn(*args), eager("conv_pool", args)[0]
        assert same_nonfinite(out, bar)
        torch.testing.assert_close(out, bar, equal_nan=True)


def test_padding_is_zero_after_normalisation() -> None:
    """Black is far from zero: −2.1, and the border must not see it; all of an image alike is alike inside."""
    args = list(make_args(stem((1, 3, 24, 24), 4, bytes=True)))
    args[0] = torch.zeros_like(args[0])
    args[1] = torch.ones_like(args[1])
    args[2] = torch.full((4,), 400.0)
    out = find("triton.conv_pool").fn(*args)
    torch.testing.assert_close(out, eager("conv_pool", tuple(args))[0])
    # 28 taps inside instead of 49 in the corner's brightest pixel
    assert (out[0, 0, 0, 0] - out[0, 0, 3, 3]) > 50


def test_normalisation_divides_exactly_but_for_the_last_place() -> None:
    """A single tap of weight one shows every byte's normalised value."""
    x = (
        torch.arange(256, dtype=torch.uint8)
        .view(1, 1, 16, 16)
        .repeat_interleave(4, 2)
        .repeat_interleave(4, 3)
        .repeat(1, 3, 1, 1)
    )
    x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.eye(3).view(3, 3, 1, 1)
    mean, std, bias = (
        torch.tensor([123.675, 116.28, 103.53]),
        torch.tensor([58.395, 57.12, 57.375]),
        torch.full((3,), 3.0),
    )
    out = find("triton.conv_pool").fn(x, weight, bias, mean, std)
    torch.testing.assert_close(
        out, eager("conv_pool", (x, weight, bias, mean, std))[0], rtol=2e-7, atol=2e-7
    )


def test_the_host_asks_for_the_stem_of_its_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(conv_pool, "stem_config", lambda s: asked.append(s) or stem_config(s))
    for bytes in (False, True):
        problem = stem((2, 3, 17, 12), 8, (5, 3), bytes=bytes)
        find("triton.conv_pool").fn(*make_args(problem))
        assert asked.pop() == stem_of(problem)
