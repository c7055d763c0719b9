"""The interpreter lane of the kernels that end in a pooling, stem and head. ``test_triton_interpreter.py`` runs it."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch

from resnet_fast.dispatch import find
from resnet_fast.kernels.triton import launch, pointwise_pool
from resnet_fast.kernels.triton.pool_config import HeadConfig
from resnet_fast.problem import Problem
from resnet_fast.testing import check_kernel, eager, make_args, nasty_problems, same_nonfinite

assert launch.INTERPRETED, "this file needs TRITON_INTERPRET=1; pytest tests/test_triton_interpreter.py sets it"

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def _quiet_numpy():
    """The interpreter computes with NumPy, which warns where a GPU silently gives an infinity or a NaN."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton.runtime.interpreter")
        yield


def right(id: str, problem: Problem) -> None:
    assert find(id).reason(problem) is None
    verdict = check_kernel(find(id), problem)
    assert verdict.ok, verdict.reason


def grid(op: str) -> list:
    cases = [problem for dtype in DTYPES for problem in nasty_problems(op, dtype) if problem.layout == "nhwc"]
    return [pytest.param(problem, id=problem.key) for problem in cases]


# ---------------------------------------------------------------- the head

@pytest.mark.parametrize("problem", grid("pointwise_pool"))
def test_head_on_the_nasty_grid(problem: Problem) -> None:
    right("triton.pointwise_pool", problem)


def head(x: tuple[int, ...], filters: int, dtype: torch.dtype = torch.float32) -> Problem:
    return Problem(op="pointwise_pool", device="cpu", dtype=dtype, x=x, layout="nhwc", weight=(filters, x[1], 1, 1),
                   residual="nhwc", act="relu")


# HeadConfig(images, block_m, block_n, block_k, warps, stages)
HEADS = {
    "images share a chunk, the last group has fewer": (head((8, 40, 3, 3), 40), HeadConfig(3, 32, 16, 16, 4, 2)),
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
    monkeypatch.setattr(pointwise_pool, "head_config", lambda head: HeadConfig(images, 32, 16, 16, 4, 2))
    args = make_args(head((7, 16, 3, 3), 24))
    args[0][1, 3, 2, 2], args[0][4, 0, 0, 0] = float("nan"), float("inf")
    args[3][6, 5, 1, 1], args[3][2, 7, 0, 2], args[3][0, 2, 0, 0] = float("inf"), float("nan"), -float("inf")
    out, bar = find("triton.pointwise_pool").fn(*args), eager("pointwise_pool", args)[0]
    assert same_nonfinite(out, bar)
    torch.testing.assert_close(out, bar, equal_nan=True)


def test_the_mean_of_what_overflows_is_infinite() -> None:
    """Activations are rounded to x's dtype before they are added, as eager's: above 65504 a float16 is infinite."""
    args = make_args(head((2, 16, 3, 3), 24, torch.float16))
    args[3][1, 5, 1, 1] = 6e4
    args[2][5] = 1e4
    out = find("triton.pointwise_pool").fn(*args)
    assert same_nonfinite(out, eager("pointwise_pool", args)[0]) and out[1, 5].isposinf() and out[0, 5].isfinite()


def test_the_head_is_the_same_every_time_and_its_filter_may_be_laid_out_otherwise() -> None:
    args = list(make_args(head((5, 12, 3, 3), 24)))
    plain = find("triton.pointwise_pool").fn(*args)
    args[1] = torch.stack([args[1], args[1]], 1)[:, 0]
    args[2] = torch.stack([args[2], args[2]], 1)[:, 0]
    assert not args[1].is_contiguous() and torch.equal(find("triton.pointwise_pool").fn(*args), plain)


def test_the_host_asks_for_the_head_of_its_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(pointwise_pool, "head_config", lambda h: asked.append(h) or HeadConfig(1, 32, 32, 16, 4, 2))
    problem = head((2, 16, 3, 5), 24)
    find("triton.pointwise_pool").fn(*make_args(problem))
    assert asked == [pointwise_pool.head_of(problem)]
