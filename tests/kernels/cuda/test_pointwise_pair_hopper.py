"""pointwise_pair_hopper: two 1×1 convolutions into one sum, scheduled as pointwise_hopper. Emulated on the CPU."""

from __future__ import annotations

from dataclasses import replace

import host_gpu
import pytest
import torch
import torch.nn.functional as F

from resnet_fast.dispatch.problem import Problem
from resnet_fast.dispatch.registry import Kernel, find
from resnet_fast.models import problems
from resnet_fast.testing import check, eager, rule
from resnet_fast.testing.check import check_kernel
from resnet_fast.testing.grids import nasty_problems
from resnet_fast.testing.rule import assert_rule
from resnet_fast.testing.samples import make_args

pytestmark = pytest.mark.skipif(
    host_gpu.compiler() is None, reason="needs a g++ that knows _Float16 (12 or later)"
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["f16", "bf16"])
HOPPER = {"device": "cuda", "capability": (9, 0)}
ONE_TILE_A_BLOCK = 10**6  # as many processors; with few of them, a block makes many tiles


def pair(n, c, h, w, k, c2, stride=(1, 1), odd=(0, 0), dtype=torch.float16) -> Problem:
    """``odd`` is how many rows and columns of the second input come after the last that its stride takes."""
    second = tuple(
        (size - 1) * s + 1 + more for size, s, more in zip((h, w), stride, odd, strict=True)
    )
    return Problem(
        "pointwise_pair",
        device="cpu",
        dtype=dtype,
        x=(n, c, h, w),
        layout="nhwc",
        weight=(k, c, 1, 1),
        chain=((k, c2, 1, 1),),
        second=second,
        stride=stride,
        residual="nhwc",
        act="relu",
    )


# Each of the five tiles; tails in pixels, in filters, in the channels of either input; one slice of an input and many.
PROBLEMS = [
    pair(1, 8, 5, 7, 8, 8),
    pair(2, 64, 9, 11, 136, 72),
    pair(3, 136, 7, 13, 200, 64, (2, 2)),
    pair(2, 72, 12, 12, 64, 40, (2, 2), (1, 0)),
    pair(5, 128, 7, 5, 72, 264, (2, 2), (0, 1)),
    pair(9, 136, 7, 7, 136, 264, (2, 2)),
    pair(3, 200, 13, 14, 264, 328, (2, 2), (1, 1)),
    pair(2, 264, 21, 12, 392, 72),
    pair(300, 24, 1, 1, 16, 72, (2, 2), (1, 1)),
    pair(2, 64, 17, 13, 64, 64, (1, 3), (0, 2)),
]


@pytest.mark.parametrize("processors", [1, 2, 5, ONE_TILE_A_BLOCK])
@DTYPES
def test_numerics(gpu: host_gpu.HostGpu, dtype: torch.dtype, processors: int) -> None:
    kernel = Kernel(
        "host.pointwise_pair_hopper",
        "pointwise_pair",
        gpu.pointwise_pair_hopper,
        lambda p: None,
        lambda: None,
    )
    supports = find("native.pointwise_pair_hopper").supports
    nasty = [
        p for p in nasty_problems("pointwise_pair", dtype) if supports(replace(p, **HOPPER)) is None
    ]
    assert len(nasty) >= 5
    for seed, each in enumerate([*(replace(p, dtype=dtype) for p in PROBLEMS), *nasty]):
        gpu.settings(seed=seed, processors=processors, late_copies=seed % 2 == 0)
        verdict = check_kernel(kernel, each, seed)
        assert verdict.ok, f"{each.key}: {verdict.reason}"


@pytest.mark.parametrize(
    "each",
    [
        pair(2, 72, 17, 16, 200, 64, (2, 2)),
        pair(1, 264, 26, 26, 120, 72),
        pair(2, 264, 19, 18, 136, 72, (2, 2), (1, 0)),
        pair(2, 72, 21, 19, 64, 136, (2, 2), (0, 1)),
        pair(2, 72, 21, 19, 64, 264, (2, 2)),
    ],
    ids=["kept", "together", "paired", "kept-narrow", "streamed"],
)
def test_never_depends_on_order(gpu: host_gpu.HostGpu, each: Problem) -> None:
    """Threads in any order, loads and stores at once or as late as can be."""
    args = make_args(each)
    results = []
    for seed in range(6):
        gpu.settings(seed=seed, processors=2, late_copies=seed % 2 == 0)
        results.append(gpu.pointwise_pair_hopper(*args))
    assert results[0].isfinite().all()
    for other in results[1:]:
        assert torch.equal(results[0], other)


@DTYPES
def test_passes_nan_and_infinity(gpu: host_gpu.HostGpu, dtype: torch.dtype) -> None:
    """NaN survives the ReLU; nothing spreads to the other input's slices, to neighbours, or from pixels left out."""
    x, weight, x2, weight2, bias, stride = make_args(
        pair(3, 72, 6, 11, 136, 136, (2, 2), (1, 1), dtype)
    )
    x[0, 1, 2, 2], x[2, 71, 5, 10], x2[0, 135, 4, 0], x2[1, 0, 0, 21] = (
        float(v) for v in ("nan", "inf", "-inf", "nan")
    )
    x2[:, 7, 1], x2[:, 9, :, 3] = float("nan"), float("inf")  # odd rows and columns
    gpu.settings(processors=1)
    out = gpu.pointwise_pair_hopper(x, weight, x2, weight2, bias, stride)
    exact = F.conv2d(x.float(), weight.float(), bias) + F.conv2d(
        x2.float(), weight2.float(), stride=2
    )
    assert rule.same_nonfinite(out, exact.relu())


def test_beyond_two_to_the_31_elements(gpu: host_gpu.HostGpu) -> None:
    """In the second input, of which a stride of 2 takes a quarter, and in the result."""
    images = 2**19 + 1
    image, image2 = (
        torch.randn(1, 64, size, size).half().to(memory_format=torch.channels_last)
        for size in (8, 16)
    )
    weight, weight2 = (torch.randn(2, 64, 64, 1, 1) / 12).half().unbind()
    bias = torch.randn(64)
    # tiles of 128 pixels: the last one is half an image
    gpu.settings(processors=10**9, first_block=images // 2)
    out = gpu.pair_last_image(image, image2, images, weight, weight2, bias, (2, 2))
    args = image, weight, image2, weight2, bias, (2, 2)
    assert_rule(
        out, eager.eager("pointwise_pair", args)[0], check.oracle("pointwise_pair", args)[0]
    )


@pytest.mark.parametrize("odd", range(5), ids=["x", "weight", "x2", "weight2", "out"])
def test_wants_addresses_of_whole_16_bytes(gpu: host_gpu.HostGpu, odd: int) -> None:
    *tensors, bias, stride = make_args(pair(1, 64, 4, 4, 64, 64))
    laid = []
    for i, t in enumerate([*tensors, torch.empty(1, 64, 4, 4, dtype=torch.float16)]):
        gpu.settings(slack=int(i == odd))
        laid.append(gpu._put(t))
    with pytest.raises(RuntimeError, match="error 716"):
        gpu._pair(*laid[:4], bias, stride, laid[4])


@pytest.mark.parametrize(
    "change, reason",
    [
        ({}, None),
        ({"dtype": torch.bfloat16}, None),
        ({"stride": (2, 2), "second": (17, 18)}, None),
        ({"stride": (9, 1), "second": (73, 9)}, "stride 9×1"),
        ({"capability": (8, 0)}, "8.0"),
        ({"capability": (10, 0)}, "10.0"),
        ({"dtype": torch.float32}, "float32"),
        ({"x": (2, 65, 9, 9), "weight": (64, 65, 1, 1)}, "the input has 65"),
        ({"chain": ((64, 60, 1, 1),)}, "second input has 60"),
        ({"weight": (12, 64, 1, 1), "chain": ((12, 64, 1, 1),)}, "output has 12"),
        ({"layout": "nchw"}, "nchw and nhwc"),
        ({"residual": "strided"}, "nhwc and strided"),
        ({"x": (2**26, 64, 8, 8)}, "31 bits"),
        ({"device": "cpu", "capability": None}, "cpu"),
    ],
)
def test_declines_with_a_reason(change: dict, reason: str | None) -> None:
    said = find("native.pointwise_pair_hopper").supports(
        replace(pair(2, 64, 9, 9, 64, 64), **{**HOPPER, **change})
    )
    assert said is None if reason is None else reason in said


def test_takes_every_pair_of_resnet50() -> None:
    pairs = problems.model_problems("resnet50", 256, 224, torch.bfloat16, op="pointwise_pair")
    assert len(pairs) == 4
    for one in pairs:
        assert find("native.pointwise_pair_hopper").supports(replace(one, **HOPPER)) is None
