"""conv_cluster_hopper: convolutions of few pixels; a cluster of blocks shares the depth. Emulated on the CPU."""

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
from resnet_fast.testing.grids import nasty_problems
from resnet_fast.testing.rule import assert_rule
from resnet_fast.testing.samples import make_args

pytestmark = pytest.mark.skipif(
    host_gpu.compiler() is None, reason="needs a g++ that knows _Float16 (12 or later)"
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
ON_HOPPER = {"device": "cuda", "capability": (9, 0)}
FEW, MANY = 4, 132  # processors: clusters of one block, or of as many as eight


def problem(n, c, h, w, k, r=3, stride=1, dtype=torch.float16, act="relu", **more) -> Problem:
    kernel = (r, r) if isinstance(r, int) else r
    return Problem(
        op="conv_bn_act",
        device="cpu",
        dtype=dtype,
        x=(n, c, h, w),
        layout="nhwc",
        weight=(k, c, *kernel),
        stride=(stride, stride),
        **{"padding": tuple(i // 2 for i in kernel), "act": act, **more},
    )


# One pixel and several tiles of them; tails in pixels, channels and filters; depths of one slice, of fewer slices than
# a cluster has blocks and of more than fit in flight; strides, dilation, oblong filters, odd padding.
PROBLEMS = [
    problem(1, 8, 1, 1, 8, 1),
    problem(1, 64, 7, 7, 64),
    problem(2, 72, 9, 11, 136, 1, residual="nhwc", bn=True),
    problem(1, 200, 14, 14, 72, residual="nhwc"),
    problem(3, 64, 13, 10, 40, stride=2, act="none"),
    problem(1, 512, 4, 4, 32, 1),
    problem(2, 136, 8, 7, 256, 1, 2, bn=True),
    problem(1, 1024, 7, 7, 40, 1, residual="nhwc"),
    problem(1, 16, 9, 12, 24, (1, 5)),
    problem(2, 24, 8, 6, 16, padding=(2, 2), dilation=(2, 2)),
    problem(1, 16, 6, 5, 8, padding=(0, 0)),
    problem(2, 8, 5, 6, 16, 1, padding=(1, 1)),
    problem(1, 8, 11, 13, 64, 7, 2),
    problem(1, 40, 2, 9, 24, stride=3),
    replace(problem(2, 16, 9, 12, 24), stride=(1, 2), padding=(0, 1), dilation=(2, 1)),
]


def kernel(gpu: host_gpu.HostGpu) -> Kernel:
    return Kernel(
        "host.conv_cluster_hopper",
        "conv_bn_act",
        gpu.conv_cluster_hopper,
        lambda p: None,
        lambda: None,
    )


@pytest.mark.parametrize(
    "dtype, processors", [(torch.float16, MANY), (torch.float16, FEW), (torch.bfloat16, MANY)]
)
def test_numerics(gpu: host_gpu.HostGpu, dtype: torch.dtype, processors: int) -> None:
    nasty = [
        p
        for p in nasty_problems("conv_bn_act", dtype)
        if find("native.conv_cluster_hopper").supports(replace(p, **ON_HOPPER)) is None
    ]
    assert len(nasty) >= 6
    for i, one in enumerate([*PROBLEMS, *nasty]):
        gpu.settings(seed=i, processors=processors, late_copies=i % 3 != 0)
        verdict = check_kernel(kernel(gpu), replace(one, dtype=dtype), seed=i)
        assert verdict.ok, f"{one.key}: {verdict.reason}"


@pytest.mark.parametrize(
    "one",
    [
        problem(1, 136, 14, 13, 72, residual="nhwc", bn=True),
        problem(2, 1024, 7, 7, 264, 1, residual="nhwc"),
        problem(1, 1032, 3, 3, 40, 1),
    ],
    ids=["3×3", "1×1", "one tile"],
)
def test_never_depends_on_the_order_of_threads(gpu: host_gpu.HostGpu, one: Problem) -> None:
    """A missing barrier of block or cluster, or a slot used too soon, would show; sums are added in one order."""
    args = make_args(one)
    results = []
    for seed in range(8):
        gpu.settings(seed=seed, processors=MANY, late_copies=seed % 3 == 0)
        results.append(gpu.conv_cluster_hopper(*args))
    assert results[0].isfinite().all()
    for other in results[1:]:
        assert torch.equal(results[0], other)


@DTYPES
def test_passes_nan_and_infinity(gpu: host_gpu.HostGpu, dtype: torch.dtype) -> None:
    """NaN survives the ReLU, and none spreads beyond its taps: not over a line's end, not into another image."""
    x = torch.randn(3, 72, 7, 7, dtype=dtype).to(memory_format=torch.channels_last)
    weight = (torch.randn(40, 72, 3, 3, dtype=dtype) / 10).to(memory_format=torch.channels_last)
    x[0, 1, 0, 0], x[0, 71, 6, 6], x[1, 5, 3, 6], x[2, 7, 0, 3] = (
        float(v) for v in ("nan", "inf", "-inf", "nan")
    )
    scale, shift = torch.ones(40), torch.zeros(40)
    out = gpu.conv_cluster_hopper(
        x, weight, scale, shift, None, None, None, 0.0, (1, 1), (1, 1), (1, 1), 1, "relu"
    )
    assert rule.same_nonfinite(out, F.conv2d(x.float(), weight.float(), padding=1).relu())


def test_beyond_two_to_the_31_elements(gpu: host_gpu.HostGpu) -> None:
    images = 2**31 // (64 * 64) + 1
    image, residual = (
        torch.randn(1, 64, 8, 8).half().to(memory_format=torch.channels_last) for _ in range(2)
    )
    weight = (torch.randn(64, 64, 3, 3) / 24).half().to(memory_format=torch.channels_last)
    scale, shift = torch.randn(64), torch.randn(64)
    # an image is two tiles of 32 filters, each of eight blocks
    gpu.settings(processors=10**9, first_block=16 * (images - 1))
    out = gpu.conv_last_image(
        image, images, weight, scale, shift, residual, (1, 1), kernel="conv_cluster_hopper"
    )
    args = image, weight, scale, shift, residual, None, None, 0.0, (1, 1), (1, 1), (1, 1), 1, "relu"
    assert_rule(out, eager.eager("conv_bn_act", args)[0], check.oracle("conv_bn_act", args)[0])


def test_wants_addresses_of_whole_16_bytes(gpu: host_gpu.HostGpu) -> None:
    gpu.settings(slack=1)
    with pytest.raises(RuntimeError, match="error 716"):
        gpu.conv_cluster_hopper(*make_args(PROBLEMS[1]))


@pytest.mark.parametrize(
    "change, reason",
    [
        ({}, None),
        ({"dtype": torch.bfloat16, "residual": "nhwc", "bn": True}, None),
        ({"dtype": torch.float32}, "float32"),
        ({"capability": (8, 0)}, "8.0"),
        ({"capability": (10, 0)}, "10.0"),
        ({"device": "cpu", "capability": None}, "cpu"),
        ({"stride": (8, 8)}, None),
        ({"stride": (9, 1)}, "9×1"),
        ({"dilation": (64, 64), "padding": (64, 64), "x": (2, 64, 80, 80)}, "offsets"),
        ({"padding": (130, 1)}, "offsets"),
        ({"groups": 4, "weight": (64, 16, 3, 3)}, "4 groups"),
        ({"layout": "nchw"}, "nchw"),
        ({"residual": "strided"}, "strided"),
        ({"x": (2, 12, 9, 9), "weight": (64, 12, 3, 3)}, "12"),
        ({"weight": (63, 64, 3, 3)}, "63"),
        ({"x": (2**26, 64, 8, 8)}, "31 bits"),
    ],
)
def test_takes_what_was_run_here_and_declines_the_rest(change: dict, reason: str | None) -> None:
    said = find("native.conv_cluster_hopper").supports(
        replace(problem(2, 64, 9, 9, 64), **{**ON_HOPPER, **change})
    )
    assert said is None if reason is None else reason in said


def test_takes_every_problem_run_here() -> None:
    for one in PROBLEMS:
        assert find("native.conv_cluster_hopper").supports(replace(one, **ON_HOPPER)) is None
