"""The kernels for Hopper, emulated on the CPU thread by thread.

Tensor copies, barriers and warp-group products follow the PTX ISA, and land as late (or as early) as it allows.
"""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import host_gpu
import pytest
import torch
import torch.nn.functional as F

from resnet_fast.dispatch.problem import Problem
from resnet_fast.dispatch.registry import Kernel, find
from resnet_fast.kernels import native
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


def problem(n, c, h, w, k, *, dtype=torch.float16, act="relu", **more) -> Problem:
    return Problem(
        op="conv_bn_act",
        device="cpu",
        dtype=dtype,
        x=(n, c, h, w),
        layout="nhwc",
        weight=(k, c, 1, 1),
        act=act,
        **more,
    )


TWO = {"stride": (2, 2)}


def problems(dtype: torch.dtype) -> list[Problem]:
    """Tails in pixels, channels and filters, one slice and many, each of five tiles, strides; and the nasty grid."""
    several = [
        problem(1, 8, 5, 7, 8, dtype=dtype),
        problem(2, 72, 9, 11, 136, dtype=dtype, residual="nhwc", bn=True),
        problem(3, 64, 13, 13, 64, dtype=dtype, residual="nhwc", act="none"),
        problem(2, 264, 12, 12, 264, dtype=dtype),
        problem(1, 520, 23, 23, 136, dtype=dtype, residual="nhwc", bn=True),
        problem(1, 640, 16, 16, 72, dtype=dtype, act="none"),
        problem(1, 392, 21, 29, 392, dtype=dtype, residual="nhwc"),
        problem(1, 256, 21, 19, 40, dtype=dtype, residual="nhwc"),
        problem(3, 64, 13, 26, 128, dtype=dtype, **TWO),  # the tiles again, over odd and even sizes
        problem(2, 136, 22, 27, 40, dtype=dtype, residual="nhwc", bn=True, **TWO),
        problem(5, 328, 9, 14, 72, dtype=dtype, act="none", **TWO),
        problem(9, 264, 14, 13, 136, dtype=dtype, **TWO),
        problem(3, 520, 28, 26, 264, dtype=dtype, residual="nhwc", **TWO),
        problem(300, 72, 2, 1, 8, dtype=dtype, **TWO),  # images of one pixel
        problem(2, 72, 17, 40, 64, dtype=dtype, stride=(1, 3)),
        problem(2, 24, 33, 9, 72, dtype=dtype, stride=(8, 1)),
    ]
    nasty = [
        p
        for p in nasty_problems("conv_bn_act", dtype)
        if find("native.pointwise_hopper").supports(replace(p, **HOPPER)) is None
    ]
    assert len(nasty) >= 3
    return several + nasty


@pytest.mark.parametrize("processors", [1, 2, 5, ONE_TILE_A_BLOCK])
@DTYPES
def test_pointwise(gpu: host_gpu.HostGpu, dtype: torch.dtype, processors: int) -> None:
    kernel = Kernel(
        "host.pointwise_hopper", "conv_bn_act", gpu.pointwise_hopper, lambda p: None, lambda: None
    )
    for seed, each in enumerate(problems(dtype)):
        gpu.settings(seed=seed, processors=processors, late_copies=seed % 2 == 0)
        verdict = check_kernel(kernel, each, seed)
        assert verdict.ok, f"{each.key}: {verdict.reason}"


@pytest.mark.parametrize(
    "each",
    [
        problem(2, 200, 17, 16, 200, residual="nhwc", bn=True),
        problem(1, 520, 26, 26, 120, residual="nhwc"),
        problem(1, 520, 26, 26, 136, residual="nhwc"),
        problem(2, 136, 21, 19, 64, residual="nhwc"),
        problem(2, 328, 21, 19, 64, residual="nhwc"),
        problem(2, 200, 34, 31, 200, residual="nhwc", **TWO),
        problem(2, 520, 37, 38, 136, **TWO),
    ],
    ids=["kept", "together", "paired", "kept-narrow", "streamed", "kept-strided", "paired-strided"],
)
def test_pointwise_never_depends_on_order(gpu: host_gpu.HostGpu, each: Problem) -> None:
    """Threads in any order, loads and stores at once or as late as can be."""
    args = make_args(each)
    results = []
    for seed in range(6):
        gpu.settings(seed=seed, processors=2, late_copies=seed % 2 == 0)
        results.append(gpu.pointwise_hopper(*args))
    assert results[0].isfinite().all()
    for other in results[1:]:
        assert torch.equal(results[0], other)


def test_pointwise_beyond_two_to_the_31_elements(gpu: host_gpu.HostGpu) -> None:
    images = 2**19 + 1
    image, residual = (
        torch.randn(1, 64, 8, 8).half().to(memory_format=torch.channels_last) for _ in range(2)
    )
    weight = (torch.randn(64, 64, 1, 1) / 8).half()
    scale, shift = torch.randn(64), torch.randn(64)
    # tiles of 128 pixels: the last one is half an image
    gpu.settings(processors=10**9, first_block=images // 2)
    out = gpu.conv_last_image(
        image, images, weight, scale, shift, residual, (0, 0), kernel="pointwise_hopper"
    )
    args = image, weight, scale, shift, residual, None, None, 0.0, (1, 1), (0, 0), (1, 1), 1, "relu"
    assert_rule(out, eager.eager("conv_bn_act", args)[0], check.oracle("conv_bn_act", args)[0])


@pytest.mark.parametrize("stride", [1, 2])
@DTYPES
def test_pointwise_passes_nan_and_infinity(
    gpu: host_gpu.HostGpu, dtype: torch.dtype, stride: int
) -> None:
    """NaN survives the ReLU; neither spreads into tails or neighbours, or from pixels that a stride leaves out."""
    x = torch.randn(1, 72, 13, 11, dtype=dtype).to(memory_format=torch.channels_last)
    weight = torch.randn(136, 72, 1, 1, dtype=dtype) / 10
    residual = torch.randn(1, 136, -(-13 // stride), -(-11 // stride), dtype=dtype).to(
        memory_format=torch.channels_last
    )
    x[0, 1, 2, 2], x[0, 71, 5, 0], x[0, 5, 12, 10] = float("nan"), float("inf"), float("-inf")
    residual[0, 3, 4, 4], residual[0, 135, 0, 5] = float("nan"), float("inf")
    scale, shift = torch.ones(136), torch.zeros(136)
    gpu.settings(processors=1)
    out = gpu.pointwise_hopper(
        x,
        weight,
        scale,
        shift,
        residual,
        None,
        None,
        0.0,
        (stride, stride),
        (0, 0),
        (1, 1),
        1,
        "relu",
    )
    assert rule.same_nonfinite(
        out, (F.conv2d(x.float(), weight.float(), stride=stride) + residual.float()).relu()
    )


def test_pointwise_wants_addresses_of_whole_16_bytes(gpu: host_gpu.HostGpu) -> None:
    gpu.settings(slack=1)
    with pytest.raises(RuntimeError, match="error 716"):
        gpu.pointwise_hopper(*make_args(problem(1, 64, 4, 4, 64)))


@pytest.mark.parametrize(
    "change, reason",
    [
        ({}, None),
        ({"dtype": torch.bfloat16, "residual": "nhwc", "bn": True}, None),
        ({"capability": (8, 0)}, "8.0"),
        ({"capability": (10, 0)}, "10.0"),
        ({"dtype": torch.float32}, "float32"),
        ({"x": (2, 65, 9, 9), "weight": (64, 65, 1, 1)}, "input has 65"),
        ({"weight": (12, 64, 1, 1)}, "output has 12"),
        ({"stride": (2, 2)}, None),
        ({"stride": (1, 9), "x": (2, 64, 9, 19)}, "stride 1×9"),
        ({"weight": (64, 64, 3, 3), "padding": (1, 1)}, "3×3"),
        ({"layout": "nchw"}, "nchw"),
        ({"residual": "strided"}, "strided"),
        ({"groups": 2, "weight": (64, 32, 1, 1)}, "2 groups"),
        ({"x": (2**26, 64, 8, 8)}, "31 bits"),
        ({"device": "cpu", "capability": None}, "cpu"),
    ],
)
def test_pointwise_declines_with_a_reason(change: dict, reason: str | None) -> None:
    said = find("native.pointwise_hopper").supports(
        replace(problem(2, 64, 9, 9, 64), **{**HOPPER, **change})
    )
    assert said is None if reason is None else reason in said


@pytest.mark.parametrize(
    "archs, reason",
    [("8.0+PTX 9.0a", None), ("8.0+PTX 9.0", "no code for 9.0a"), ("9.0a+PTX", None)],
)
def test_a_build_without_code_for_hopper_is_not_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path, archs: str, reason: str | None
) -> None:
    record = tmp_path / "_build.json"
    record.write_text(f'{{"archs": "{archs}"}}')
    monkeypatch.setattr(native, "RECORD", record)
    monkeypatch.setattr(native, "available", lambda: None)
    said = native.hopper_available()
    assert said is None if reason is None else reason in said


def test_the_probe_tells_the_two_base_offsets_apart(tmp_path: Path) -> None:
    """Here, where the emulation takes the ISA as the kernels do, the pattern's is right wherever a matrix begins."""
    program = tmp_path / "probe"
    source = host_gpu.ROOT / "tools" / "gpu" / "descriptor_probe.cu"
    subprocess.run(
        [
            host_gpu.compiler(),
            "-std=c++17",
            "-O1",
            f"-I{host_gpu.ROOT / 'csrc'}",
            f"-I{host_gpu.EMULATION}",
            "-x",
            "c++",
            source,
            "-o",
            program,
        ],
        check=True,
    )
    said = subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines()
    rows = {"pattern": "0 1 2 3 4 5 6 7", "matrix": "0"}
    assert said == [
        f"operand {operand}, stride {stride}, base offset of the {of}: right from rows {rows[of]}"
        for operand in "ab"
        for stride in (1024, 1280)
        for of in rows
    ]
