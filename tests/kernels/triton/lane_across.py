"""The interpreter lane of the kernels over several 1×1 and 3×3 convolutions; ``test_triton_across.py`` runs it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import triton_interpreter

from resnet_fast.dispatch.problem import Problem
from resnet_fast.dispatch.registry import find
from resnet_fast.kernels.triton import conv_tail, launch, pointwise_pair, pointwise_pair_tma
from resnet_fast.kernels.triton.gemm_config import Gemm, GemmConfig
from resnet_fast.kernels.triton.tail_config import TailConfig
from resnet_fast.kernels.triton.tail_config import tail as tail_of
from resnet_fast.kernels.triton.tma_config import TileConfig
from resnet_fast.testing.eager import eager
from resnet_fast.testing.grids import nasty_problems
from resnet_fast.testing.rule import same_nonfinite
from resnet_fast.testing.samples import make_args

assert launch.INTERPRETED, (
    "this file needs TRITON_INTERPRET=1; pytest tests/test_triton_across.py sets it"
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def pair(x, k, c2, second, stride=(1, 1), dtype=torch.float32) -> Problem:
    return Problem(
        op="pointwise_pair",
        device="cpu",
        dtype=dtype,
        x=x,
        layout="nhwc",
        weight=(k, x[1], 1, 1),
        chain=((k, c2, 1, 1),),
        second=second,
        stride=stride,
        residual="nhwc",
        act="relu",
    )


def tail(x, middle, wide, after, projected=0, dtype=torch.float32) -> Problem:
    chain = (wide, middle, 1, 1), (wide, projected, 1, 1) if projected else (), (after, wide, 1, 1)
    return Problem(
        op="conv_tail",
        device="cpu",
        dtype=dtype,
        x=x,
        layout="nhwc",
        weight=(middle, x[1], 3, 3),
        padding=(1, 1),
        chain=chain,
        residual="nhwc",
        act="relu",
    )


def right(case: Problem) -> None:
    triton_interpreter.right(f"triton.{case.op}", case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op, least", [("pointwise_pair", 9), ("conv_tail", 6)])
def test_nasty_grid(op: str, least: int, dtype: torch.dtype) -> None:
    taken = [
        case for case in nasty_problems(op, dtype) if find(f"triton.{op}").supports(case) is None
    ]
    assert len(taken) >= least
    for case in taken:
        right(case)


# ---------------------------------------------------------------- configs that the small problems do not get

# GemmConfig(block_m, block_n, block_k, split_k, warps, stages)
PAIRS = {
    "tails in both inputs, several tiles": (
        pair((3, 75, 5, 7), 50, 41, (10, 13), (2, 2)),
        GemmConfig(32, 16, 32, 1, 4, 2),
    ),
    "whole blocks, no masks": (
        pair((2, 32, 5, 7), 48, 64, (5, 7)),
        GemmConfig(16, 16, 32, 1, 4, 2),
    ),
    "only the second has a tail": (
        pair((2, 32, 5, 4), 16, 40, (9, 4), (2, 1)),
        GemmConfig(16, 16, 32, 1, 4, 2),
    ),
    "uneven strides": (
        pair((2, 16, 3, 4), 24, 16, (8, 10), (3, 3)),
        GemmConfig(16, 32, 16, 1, 4, 2),
    ),
    "strides of their own": (
        pair((2, 16, 3, 4), 24, 16, (5, 11), (2, 3)),
        GemmConfig(16, 32, 16, 1, 4, 2),
    ),
    "split-K, the seam inside a block's share": (
        pair((2, 48, 3, 3), 24, 80, (3, 3)),
        GemmConfig(16, 16, 16, 2, 4, 2),
    ),
    "split-K with tails, one block with nothing": (
        pair((2, 75, 3, 3), 24, 20, (6, 6), (2, 2)),
        GemmConfig(16, 16, 16, 5, 4, 2),
    ),
}
# TailConfig(block_m, block_n, block_k, warps, stages)
TAILS = {
    "tails in all": (tail((2, 20, 5, 7), 32, 75, 50), TailConfig(16, 32, 16, 4, 2)),
    "whole blocks": (tail((2, 32, 4, 4), 16, 64, 32), TailConfig(16, 32, 32, 4, 2)),
    "projected, tails in all": (
        tail((2, 20, 5, 7), 32, 75, 50, projected=41),
        TailConfig(32, 32, 16, 4, 2),
    ),
    "projected, one image a block": (
        tail((3, 16, 4, 8), 16, 64, 16, projected=16),
        TailConfig(32, 64, 16, 4, 2),
    ),
    "a wide result narrower than its block": (
        tail((1, 16, 3, 3), 16, 20, 8),
        TailConfig(16, 32, 16, 4, 2),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", [*PAIRS, *TAILS])
def test_configs(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case, config = {**PAIRS, **TAILS}[name]
    monkeypatch.setattr(pointwise_pair, "gemm_config", lambda g: config)
    monkeypatch.setattr(conv_tail, "tail_config", lambda g: config)
    right(dataclasses.replace(case, dtype=dtype))


# By TMA: TileConfig of box, filters, channels of both inputs; stages and blocks an SM.
BOXES = {
    "the box of 28², tails in pixels and filters": (
        pair((9, 32, 5, 7), 72, 64, (10, 14), (2, 2)),
        ((8, 4, 4), 64, 96),
    ),
    "several trips": (pair((2, 64, 4, 4), 64, 128, (8, 8), (2, 2)), ((2, 4, 4), 64, 48)),
    "like channels, no stride": (pair((3, 64, 5, 7), 40, 64, (5, 7)), ((2, 8, 8), 64, 32)),
    "the second narrow, single pixels": (
        pair((17, 64, 3, 2), 136, 16, (6, 4), (2, 2)),
        ((16, 1, 1), 64, 80),
    ),
    "the second wide, no stride": (pair((2, 16, 3, 5), 24, 64, (3, 5)), ((2, 2, 4), 64, 80)),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BOXES)
def test_boxes(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case, (box, filters, channels) = BOXES[name]
    tile = TileConfig(box, filters, channels, False, 4, 2, 2)
    monkeypatch.setattr(pointwise_pair_tma, "config", lambda *_, **__: tile)
    triton_interpreter.right("triton.pointwise_pair_tma", dataclasses.replace(case, dtype=dtype))


def test_boxes_by_themselves() -> None:
    """The grid's and the predicted tiles; what the stride leaves out may be anything."""
    id = "triton.pointwise_pair_tma"
    for case in (
        p for p in nasty_problems("pointwise_pair", torch.float16) if find(id).supports(p) is None
    ):
        triton_interpreter.right(id, case)
    for case in (
        pair((3, 32, 6, 4), 24, 64, (12, 8), (2, 2), torch.float16),
        pair((3, 64, 6, 4), 24, 32, (6, 4), dtype=torch.float16),
    ):
        triton_interpreter.right(id, case)
        args = make_args(case)
        if case.stride == (2, 2):
            args[2][:, :, 1::2], args[2][:, :, :, 1::2] = float("nan"), float("inf")
        args[0][0, 3, 5, 3], args[2][1, 2, 0, 0], args[4][5] = (
            float("nan"),
            float("inf"),
            -float("inf"),
        )
        assert same_nonfinite(find(id).fn(*args), eager(case.op, args)[0])
    empty = pair((0, 32, 6, 4), 24, 64, (12, 8), (2, 2), torch.float16)
    assert find(id).fn(*make_args(empty)).shape == (0, 24, 6, 4)


# ---------------------------------------------------------------- NaN, infinity, contracts around the arithmetic


@pytest.mark.parametrize(
    "case",
    [
        pair((3, 24, 4, 5), 20, 9, (7, 10), (2, 2)),
        tail((3, 16, 5, 4), 16, 40, 24),
        tail((3, 16, 5, 4), 16, 40, 24, projected=9),
    ],
    ids=["pair", "tail", "projected"],
)
def test_nan_and_infinity_pass_as_eager_has_them(case: Problem) -> None:
    """In every tensor, at its first and last element; padding never reads the neighbouring image.

    A tap that is not finite meets the padding's zeros in an implicit GEMM, cuDNN's too, but in its middle.
    """
    for value in (float("nan"), float("inf"), -float("inf")):
        args = make_args(case)
        for t in (a for a in args if isinstance(a, torch.Tensor)):
            middle = (slice(None), slice(None), 1, 1) if t.shape[2:] == (3, 3) else ...
            for at in (0, -1):
                element = t[middle][(at,) * t[middle].dim()]
                kept = element.clone()
                element.fill_(value)
                outputs, bars = find(f"triton.{case.op}").fn(*args), eager(case.op, args)
                outputs = outputs if isinstance(outputs, tuple) else (outputs,)
                assert all(map(same_nonfinite, outputs, bars)), (list(t.shape), at, value)
                element.copy_(kept)


def test_an_infinite_middle_stays_out_of_channels_that_do_not_exist() -> None:
    """Past the last wide channel the filters are zeros, and 0 · ∞ is NaN: it must not reach the next convolution."""
    args = make_args(tail((1, 16, 3, 3), 16, 20, 8))
    args[2][0], args[3][:] = float("inf"), -args[3].abs()  # y is then relu(−∞)
    outputs, bars = find("triton.conv_tail").fn(*args), eager("conv_tail", args)
    assert (
        not outputs[0].any()
        and all(map(same_nonfinite, outputs, bars))
        and outputs[1].isfinite().all()
    )


@pytest.mark.parametrize(
    "case",
    [pair((2, 16, 4, 4), 24, 8, (8, 7), (2, 2)), tail((2, 16, 4, 4), 16, 40, 24, projected=8)],
    ids=["pair", "tail"],
)
def test_filters_may_be_laid_out_otherwise_and_biases_have_gaps(case: Problem) -> None:
    args = make_args(case)
    plain = find(f"triton.{case.op}").fn(*args)

    def moved(t):
        if not isinstance(t, torch.Tensor):
            return t
        return torch.stack([t, t], 1)[:, 0] if t.dim() == 1 or t.shape[0] != case.x[0] else t

    found = find(f"triton.{case.op}").fn(args[0], *map(moved, args[1:]))
    assert all(map(torch.equal, *((o if isinstance(o, tuple) else (o,)) for o in (plain, found))))


def test_results_are_nhwc_also_where_one_pixel_is_both() -> None:
    for case in (pair((2, 16, 1, 1), 24, 8, (1, 1)), tail((2, 16, 1, 1), 16, 40, 24)):
        outputs = find(f"triton.{case.op}").fn(*make_args(case))
        for out in outputs if isinstance(outputs, tuple) else (outputs,):
            assert out.stride() == (out.shape[1], 1, out.shape[1], out.shape[1])


def test_the_host_asks_for_the_config_of_its_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel asks a config for the shapes that its Problem states: tuner and plan describe what runs."""
    asked = []

    def noting(config):
        return lambda g: asked.append(g) or config(g)

    monkeypatch.setattr(conv_tail, "tail_config", noting(conv_tail.tail_config))
    monkeypatch.setattr(pointwise_pair, "gemm_config", noting(pointwise_pair.gemm_config))
    for projected in (0, 9):
        case = tail((3, 24, 5, 4), 16, 40, 8, projected)
        find("triton.conv_tail").fn(*make_args(case))
        assert asked.pop() == tail_of(case)
    find("triton.pointwise_pair").fn(*make_args(pair((2, 24, 4, 5), 20, 9, (7, 10), (2, 2))))
    assert asked.pop() == Gemm(40, 20, 33, itemsize=4)
