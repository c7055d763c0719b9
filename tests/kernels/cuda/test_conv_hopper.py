"""conv_hopper, the 3×3 convolution for Hopper that loads its halo once. Emulated on the CPU."""

from __future__ import annotations

from dataclasses import replace

import host_gpu
import pytest
import torch
import torch.nn.functional as F

from resnet_fast.dispatch.problem import Problem
from resnet_fast.dispatch.registry import Kernel, find
from resnet_fast.testing import check, eager, rule
from resnet_fast.testing.check import check_kernel
from resnet_fast.testing.rule import assert_rule
from resnet_fast.testing.samples import make_args

pytestmark = pytest.mark.skipif(
    host_gpu.compiler() is None, reason="needs a g++ that knows _Float16 (12 or later)"
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
# as many processors: one block walks over all tiles, or each tile has its own
ONE_BLOCK, MANY_BLOCKS = 1, 10**6


def problem(n, c, h, w, k, dtype=torch.float16, act="relu", stride=1, **more) -> Problem:
    return Problem(
        op="conv_bn_act",
        device="cpu",
        dtype=dtype,
        x=(n, c, h, w),
        layout="nhwc",
        weight=(k, c, 3, 3),
        stride=(stride, stride),
        padding=(1, 1),
        act=act,
        **more,
    )


# Each width of products, with 64 filters and with 128; batches, rows, channels and filters with tails and without;
# several slices of channels, several tiles of filters; images of one pixel, one row, one column, and the widest row.
PROBLEMS = [
    problem(1, 8, 1, 1, 8),
    problem(3, 16, 1, 9, 24, act="none"),
    problem(130, 8, 2, 1, 8),
    problem(1, 64, 230, 1, 16, bn=True),
    problem(1, 24, 2, 64, 40, residual="nhwc"),
    problem(1, 64, 9, 56, 64, residual="nhwc", bn=True),
    problem(2, 72, 5, 57, 64),
    problem(5, 136, 4, 4, 64),
    problem(3, 64, 14, 14, 128),
    problem(2, 72, 14, 13, 136, residual="nhwc", act="none"),
    problem(1, 16, 28, 28, 200),
    problem(1, 200, 13, 28, 256, residual="nhwc", bn=True),
    problem(9, 128, 7, 7, 128),
    problem(6, 40, 7, 7, 264, residual="nhwc", bn=True),
    problem(1, 64, 5, 63, 72),
]
# The same of what takes two pixels at a time: sizes even and odd, a single row of output, many images a box.
PROBLEMS += [
    problem(*sizes, stride=2, **more)
    for sizes, more in [
        ((1, 8, 2, 2, 8), {}),
        ((2, 64, 3, 5, 24), {"act": "none"}),
        ((1, 24, 2, 128, 40), {"residual": "nhwc"}),
        ((130, 8, 3, 2, 8), {}),
        ((1, 72, 21, 112, 64), {"residual": "nhwc", "bn": True}),
        ((1, 128, 14, 56, 128), {}),
        ((1, 136, 28, 27, 136), {"residual": "nhwc", "bn": True}),
        ((6, 40, 14, 14, 264), {"residual": "nhwc"}),
        ((5, 64, 13, 14, 64), {}),
    ]
]


@pytest.mark.parametrize(
    "dtype, processors",
    [
        (torch.float16, ONE_BLOCK),
        (torch.float16, 3),
        (torch.float16, MANY_BLOCKS),
        (torch.bfloat16, ONE_BLOCK),
    ],
)
def test_numerics(gpu: host_gpu.HostGpu, dtype: torch.dtype, processors: int) -> None:
    kernel = Kernel(
        "host.conv_hopper", "conv_bn_act", gpu.conv_hopper, lambda p: None, lambda: None
    )
    for i, one in enumerate(PROBLEMS):
        gpu.settings(seed=i, processors=processors, late_copies=i % 3 != 0)
        verdict = check_kernel(kernel, replace(one, dtype=dtype), seed=i)
        assert verdict.ok, f"{one.key}: {verdict.reason}"


@pytest.mark.parametrize(
    "one",
    [
        problem(5, 136, 7, 7, 136, residual="nhwc", bn=True),
        problem(4, 72, 8, 40, 64, residual="nhwc"),
        problem(
            24, 16, 7, 7, 64, bn=True
        ),  # filters stay in shared memory, so that nothing of them holds warps together
        problem(5, 136, 14, 13, 136, stride=2, residual="nhwc", bn=True),
        problem(4, 72, 14, 80, 64, stride=2, residual="nhwc"),
    ],
    ids=[
        "128 filters",
        "64 filters",
        "64 filters that stay",
        "128 filters, stride 2",
        "64 filters, stride 2",
    ],
)
def test_never_depends_on_the_order_of_threads(gpu: host_gpu.HostGpu, one: Problem) -> None:
    """A missing barrier, wait or fence would show: early copies if a slot is refilled, late ones if read, too soon."""
    args = make_args(one)
    results = []
    for seed in range(9):
        gpu.settings(seed=seed, processors=1 + seed % 4 // 3, late_copies=seed % 3 == 0)
        results.append(gpu.conv_hopper(*args))
    assert results[0].isfinite().all()
    for other in results[1:]:
        assert torch.equal(results[0], other)


@pytest.mark.parametrize("k, stride", [(64, 1), (72, 1), (64, 2), (72, 2)])
@DTYPES
def test_passes_nan_and_infinity(
    gpu: host_gpu.HostGpu, dtype: torch.dtype, k: int, stride: int
) -> None:
    """NaN survives the ReLU; neither spreads beyond its 3×3 neighbours, over a row's end, or into another image."""
    x = torch.randn(5, 24, 7, 7, dtype=dtype).to(memory_format=torch.channels_last)
    weight = (torch.randn(k, 24, 3, 3, dtype=dtype) / 10).to(memory_format=torch.channels_last)
    x[0, 1, 0, 0], x[1, 3, 6, 6], x[2, 5, 3, 6], x[3, 7, 0, 3] = (
        float(v) for v in ("nan", "inf", "-inf", "nan")
    )
    scale, shift = torch.ones(k), torch.zeros(k)
    out = gpu.conv_hopper(
        x, weight, scale, shift, None, None, None, 0.0, (stride, stride), (1, 1), (1, 1), 1, "relu"
    )
    assert rule.same_nonfinite(out, F.conv2d(x.float(), weight.float(), None, stride, 1).relu())


@pytest.mark.parametrize("k", [64, 128])
def test_beyond_two_to_the_31_elements(gpu: host_gpu.HostGpu, k: int) -> None:
    images = 2**37 // (64 * 64 * k) + 1
    image, residual = (
        torch.randn(1, c, 8, 8).half().to(memory_format=torch.channels_last) for c in (64, k)
    )
    weight = (torch.randn(k, 64, 3, 3) / 24).half().to(memory_format=torch.channels_last)
    scale, shift = torch.randn(k), torch.randn(k)
    boxes = -(-images // 2)  # of two images of 8×8
    gpu.settings(processors=10**9, first_block=(-(-boxes // 2) if k == 64 else boxes) - 1)
    out = gpu.conv_last_image(
        image, images, weight, scale, shift, residual, (1, 1), kernel="conv_hopper"
    )
    args = image, weight, scale, shift, residual, None, None, 0.0, (1, 1), (1, 1), (1, 1), 1, "relu"
    assert_rule(out, eager.eager("conv_bn_act", args)[0], check.oracle("conv_bn_act", args)[0])


ON_HOPPER = {"device": "cuda", "capability": (9, 0)}


@pytest.mark.parametrize(
    "change, reason",
    [
        ({}, None),
        ({"dtype": torch.bfloat16, "residual": "nhwc"}, None),
        ({"dtype": torch.float32}, "float32"),
        ({"capability": (8, 0)}, "8.0"),
        ({"capability": (10, 0)}, "10.0"),
        ({"device": "cpu", "capability": None}, "cpu"),
        ({"stride": (2, 2)}, None),
        ({"stride": (2, 1)}, "stride"),
        ({"stride": (3, 3)}, "stride"),
        ({"stride": (2, 2), "x": (2, 64, 9, 1)}, "9×1 pixels"),
        ({"stride": (2, 2), "x": (2, 64, 9, 128)}, None),
        ({"stride": (2, 2), "x": (2, 64, 9, 129)}, "65"),
        ({"padding": (0, 1)}, "padding"),
        ({"dilation": (2, 2), "padding": (2, 2)}, "dilation"),
        ({"weight": (64, 64, 1, 1), "padding": (0, 0)}, "1×1"),
        ({"groups": 4, "weight": (64, 16, 3, 3)}, "4 groups"),
        ({"layout": "nchw"}, "nchw"),
        ({"residual": "strided"}, "strided"),
        ({"x": (2, 12, 9, 9), "weight": (64, 12, 3, 3)}, "12"),
        ({"weight": (63, 64, 3, 3)}, "63"),
        ({"x": (2, 64, 9, 65)}, "65"),
        ({"x": (2**26, 64, 8, 8)}, "31 bits"),
    ],
)
def test_takes_what_was_run_here_and_declines_the_rest(change: dict, reason: str | None) -> None:
    said = find("native.conv_hopper").supports(
        replace(problem(2, 64, 9, 9, 64), **{**ON_HOPPER, **change})
    )
    assert said is None if reason is None else reason in said


def test_takes_every_problem_run_here() -> None:
    for one in PROBLEMS:
        assert find("native.conv_hopper").supports(replace(one, **ON_HOPPER)) is None
