"""conv_tail_hopper: a bottleneck's tail and the next one's first convolution for Hopper. Emulated on the CPU."""

from __future__ import annotations

from dataclasses import replace

import host_gpu
import pytest
import torch

from resnet_fast.dispatch.problem import Problem
from resnet_fast.dispatch.registry import Kernel, find
from resnet_fast.ops import reference
from resnet_fast.testing import check, rule
from resnet_fast.testing.check import check_kernel
from resnet_fast.testing.eager import eager
from resnet_fast.testing.grids import nasty_problems
from resnet_fast.testing.rule import assert_rule
from resnet_fast.testing.samples import make_args

pytestmark = pytest.mark.skipif(
    host_gpu.compiler() is None, reason="needs a g++ that knows _Float16 (12 or later)"
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
# as many processors: one block walks over all tiles, or each tile has its own
ONE_BLOCK, MANY_BLOCKS = 1, 10**6
ON_HOPPER = {"device": "cuda", "capability": (9, 0)}


def problem(n, c, h, w, middle, wide, after, projected=0, dtype=torch.float16) -> Problem:
    chain = (wide, middle, 1, 1), (wide, projected, 1, 1) if projected else (), (after, wide, 1, 1)
    return Problem(
        op="conv_tail",
        device="cpu",
        dtype=dtype,
        x=(n, c, h, w),
        layout="nhwc",
        weight=(middle, c, 3, 3),
        padding=(1, 1),
        chain=chain,
        residual="nhwc",
        act="relu",
    )


# The three tails of a ResNet-50's first stage; each group of channels with a tail; one pixel, one row, one column;
# tiles that the image cuts, and an odd number of them.
PROBLEMS = [
    problem(2, 64, 9, 17, 64, 256, 64),
    problem(1, 64, 24, 8, 64, 256, 128),
    problem(3, 64, 11, 8, 64, 256, 64, 64),
    problem(3, 8, 1, 1, 16, 24, 40),
    problem(1, 40, 1, 19, 48, 200, 120),
    problem(2, 24, 18, 1, 8, 72, 8, 56),
    problem(5, 64, 8, 8, 56, 64, 72),
    problem(1, 16, 16, 16, 64, 128, 64, 8),
]
IDS = pytest.mark.parametrize("one", PROBLEMS[:3], ids=["64", "128", "projected"])


def kernel(gpu: host_gpu.HostGpu) -> Kernel:
    return Kernel(
        "host.conv_tail_hopper", "conv_tail", gpu.conv_tail_hopper, lambda p: None, lambda: None
    )


@pytest.mark.parametrize(
    "dtype, processors",
    [
        (torch.float16, ONE_BLOCK),
        (torch.float16, 2),
        (torch.float16, MANY_BLOCKS),
        (torch.bfloat16, ONE_BLOCK),
    ],
)
def test_numerics(gpu: host_gpu.HostGpu, dtype: torch.dtype, processors: int) -> None:
    nasty = [
        p
        for p in nasty_problems("conv_tail", dtype)
        if find("native.conv_tail_hopper").supports(replace(p, **ON_HOPPER)) is None
    ]
    assert len(nasty) >= 4
    for i, one in enumerate([*PROBLEMS, *nasty]):
        gpu.settings(seed=i, processors=processors, late_copies=i % 3 != 0)
        verdict = check_kernel(kernel(gpu), replace(one, dtype=dtype), seed=i)
        assert verdict.ok, f"{one.key}: {verdict.reason}"


@IDS
def test_never_depends_on_the_order_of_threads(gpu: host_gpu.HostGpu, one: Problem) -> None:
    """A missing barrier, wait or fence would show: early copies if a slot is refilled, late ones if read, too soon."""
    args = make_args(replace(one, x=(2, one.x[1], 16, 24)))
    results = []
    for seed in range(9):
        gpu.settings(seed=seed, processors=1 + seed % 4 // 3, late_copies=seed % 3 == 0)
        results.append(gpu.conv_tail_hopper(*args))
    assert all(out.isfinite().all() for out in results[0])
    for y, z in results[1:]:
        assert torch.equal(results[0][0], y) and torch.equal(results[0][1], z)


@pytest.mark.parametrize("projected", [0, 24])
@DTYPES
def test_passes_nan_and_infinity(gpu: host_gpu.HostGpu, dtype: torch.dtype, projected: int) -> None:
    """NaN survives every ReLU and reaches the same pixels and channels as in eager, though all channels have tails."""
    x, two, bias2, three, bias3, residual, projection, one, bias1 = make_args(
        problem(3, 24, 9, 10, 40, 72, 24, projected, dtype)
    )
    x[0, 1, 0, 0], x[1, 3, 8, 9], residual[2, 5, 3, 6], residual[2, 7, 8, 3] = (
        float(v) for v in ("nan", "inf", "inf", "nan")
    )
    three[9] = 0  # so that an infinity of m meets zeros that are there
    args = x, two, bias2, three, bias3, residual, projection, one, bias1
    for got, expected in zip(gpu.conv_tail_hopper(*args), reference.conv_tail(*args), strict=True):
        assert not expected.isfinite().all() and rule.same_nonfinite(got, expected)


def test_beyond_two_to_the_31_elements(gpu: host_gpu.HostGpu) -> None:
    images = 2**31 // (64 * 256) + 1
    one = problem(1, 64, 8, 8, 64, 256, 64)
    args = make_args(one)
    gpu.settings(processors=10**9, first_block=images - 1)
    got = gpu.tail_of_last_image(args, images)
    for out, bar, oracle in zip(
        got, eager("conv_tail", args), check.oracle("conv_tail", args), strict=True
    ):
        assert_rule(out, bar, oracle)


def test_wants_addresses_of_whole_16_bytes(gpu: host_gpu.HostGpu) -> None:
    gpu.settings(slack=1)
    with pytest.raises(RuntimeError, match="error 716"):
        gpu.conv_tail_hopper(*make_args(PROBLEMS[0]))


@pytest.mark.parametrize(
    "change, reason",
    [
        ({}, None),
        ({"dtype": torch.bfloat16}, None),
        ({"dtype": torch.float32}, "float32"),
        ({"capability": (8, 0)}, "8.0"),
        ({"capability": (10, 0)}, "10.0"),
        ({"device": "cpu", "capability": None}, "cpu"),
        ({"layout": "nchw"}, "nchw"),
        ({"residual": "strided"}, "strided"),
        ({"x": (2, 72, 9, 9)}, "64 channels of the input, and there are 72"),
        ({"x": (2, 12, 9, 9)}, "12"),
        (
            {"weight": (128, 64, 3, 3), "chain": ((256, 128, 1, 1), (), (64, 256, 1, 1))},
            "of the middle, and there are 128",
        ),
        ({"chain": ((264, 64, 1, 1), (), (64, 264, 1, 1))}, "of the output, and there are 264"),
        ({"chain": ((250, 64, 1, 1), (), (64, 250, 1, 1))}, "the output has 250"),
        (
            {"chain": ((256, 64, 1, 1), (), (136, 256, 1, 1))},
            "up to 128 channels of the next convolution",
        ),
        (
            {"chain": ((256, 64, 1, 1), (256, 64, 1, 1), (128, 256, 1, 1))},
            "up to 64 channels of the next convolution",
        ),
        (
            {"chain": ((256, 64, 1, 1), (256, 72, 1, 1), (64, 256, 1, 1))},
            "of the projected residual, and there are 72",
        ),
        ({"x": (2**25, 64, 8, 8)}, "31 bits"),
    ],
)
def test_takes_what_was_run_here_and_declines_the_rest(change: dict, reason: str | None) -> None:
    said = find("native.conv_tail_hopper").supports(
        replace(problem(2, 64, 9, 9, 64, 256, 64), **{**ON_HOPPER, **change})
    )
    assert said is None if reason is None else reason in said


def test_takes_every_problem_run_here() -> None:
    for one in PROBLEMS:
        assert find("native.conv_tail_hopper").supports(replace(one, **ON_HOPPER)) is None
