"""The CUDA kernels themselves, run on the CPU thread by thread, and their index computations against naive loops.

What this proves of the source that nvcc compiles: coordinates, tails, padding, fragments, barriers, waits, bounds and
numerics. What only a GPU can: what the compiler made of it, and speed.
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
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["f32", "f16", "bf16"]
)
BIG_TILES, SMALL_TILES = 1, 10**6  # as many processors
TILES = pytest.mark.parametrize(
    "dtype, processors",
    [
        (torch.float32, SMALL_TILES),
        (torch.float16, BIG_TILES),
        (torch.float16, SMALL_TILES),
        (torch.bfloat16, BIG_TILES),
    ],
)


def conv_problem(
    n, c, h, w, k, r=3, stride=1, padding=None, dtype=torch.float16, **more
) -> Problem:
    kernel = (r, r) if isinstance(r, int) else r
    padding = tuple(i // 2 for i in kernel) if padding is None else (padding, padding)
    return Problem(
        op="conv_bn_act",
        device="cpu",
        dtype=dtype,
        x=(n, c, h, w),
        layout="nhwc",
        weight=(k, c, *kernel),
        stride=(stride, stride),
        padding=padding,
        act="relu",
        **more,
    )


def conv_problems(dtype: torch.dtype) -> list[Problem]:
    """The nasty grid, and what it lacks for large tiles: several with tails in M and N, many slices with a tail."""
    several = [
        conv_problem(2, 72, 9, 11, 136, residual="nhwc", bn=True),
        conv_problem(1, 64, 23, 11, 264, stride=2),
        conv_problem(3, 136, 7, 13, 72, 1, 2, padding=0, residual="nhwc"),
        conv_problem(2, 320, 9, 9, 200, 1, padding=0, bn=True),
        conv_problem(1, 16, 12, 9, 40, (1, 7)),
        conv_problem(1, 16, 12, 9, 40, (5, 2), stride=2),
        conv_problem(1, 8, 17, 19, 64, 7, 2),
        conv_problem(1, 8, 5, 6, 32, padding=2, dilation=(2, 2)),
        conv_problem(1, 24, 6, 6, 16, 1, padding=1),
        replace(conv_problem(2, 16, 9, 12, 24), stride=(1, 2), padding=(0, 1), dilation=(2, 1)),
        replace(conv_problem(2, 16, 9, 12, 24, 1), stride=(3, 2)),
    ]
    nasty = [p for p in nasty_problems("conv_bn_act", dtype) if p.groups == 1]
    return nasty + [replace(p, dtype=dtype) for p in several]


def judge(name: str, fn, problem: Problem, seed: int = 0) -> None:
    verdict = check_kernel(
        Kernel(f"host.{name}", problem.op, fn, lambda p: None, lambda: None), problem, seed
    )
    assert verdict.ok, f"{problem.key}: {verdict.reason}"


@pytest.mark.parametrize("check", ["index_check", "hopper_check", "halo_check"])
def test_headers_against_naive_loops(tmp_path: Path, check: str) -> None:
    program = tmp_path / check
    subprocess.run(
        [
            host_gpu.compiler(),
            "-std=c++17",
            "-O2",
            "-Wall",
            "-Werror",
            f"-I{host_gpu.ROOT / 'csrc'}",
            f"-I{host_gpu.EMULATION}",
            host_gpu.EMULATION / f"{check}.cpp",
            "-o",
            program,
        ],
        check=True,
    )
    found = subprocess.run([program], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@TILES
def test_conv(gpu: host_gpu.HostGpu, dtype: torch.dtype, processors: int) -> None:
    gpu.settings(seed=3, processors=processors)
    for problem in conv_problems(dtype):
        judge("conv", gpu.conv, problem)


@TILES
def test_pointwise(gpu: host_gpu.HostGpu, dtype: torch.dtype, processors: int) -> None:
    gpu.settings(seed=4, processors=processors)
    problems = [p for p in conv_problems(dtype) if p.pointwise]
    assert len(problems) > 10
    for problem in problems:
        judge("pointwise", gpu.pointwise, problem)


@pytest.mark.parametrize("name", ["conv", "pointwise"])
@DTYPES
def test_conv_on_unaligned_pointers(gpu: host_gpu.HostGpu, dtype: torch.dtype, name: str) -> None:
    """Channels that would allow 16-byte copies, at addresses that do not."""
    gpu.settings(slack=1)
    judge(
        name,
        getattr(gpu, name),
        conv_problem(2, 72, 5, 7, 80, 1, padding=0, dtype=dtype, residual="nhwc"),
    )


@pytest.mark.parametrize("processors", [BIG_TILES, SMALL_TILES])
def test_conv_never_depends_on_the_order_of_threads(gpu: host_gpu.HostGpu, processors: int) -> None:
    """A missing barrier or wait lets it show: early copies if a slot is refilled, late ones if it is read, too soon."""
    args = make_args(conv_problem(1, 72, 12, 12, 136, residual="nhwc", bn=True))
    results = []
    for seed in range(6):
        gpu.settings(seed=seed, processors=processors, late_copies=seed % 2 == 0)
        results.append(gpu.conv(*args))
    assert results[0].isfinite().all()
    for other in results[1:]:
        assert torch.equal(results[0], other)


@pytest.mark.parametrize("name, padding", [("pointwise", 0), ("conv", 1)])
def test_conv_beyond_two_to_the_31_elements(gpu: host_gpu.HostGpu, name: str, padding: int) -> None:
    images, taps = 2**19 + 1, 2 * padding + 1
    image, residual = (
        torch.randn(1, 64, 8, 8).half().to(memory_format=torch.channels_last) for _ in range(2)
    )
    weight = (torch.randn(64, 64, taps, taps) / 24).half().to(memory_format=torch.channels_last)
    scale, shift = torch.randn(64), torch.randn(64)
    gpu.settings(processors=10**9, first_block=images - 1)
    out = gpu.conv_last_image(
        image, images, weight, scale, shift, residual, (padding, padding), kernel=name
    )
    args = (
        image,
        weight,
        scale,
        shift,
        residual,
        None,
        None,
        0.0,
        (1, 1),
        (padding, padding),
        (1, 1),
        1,
        "relu",
    )
    assert_rule(out, eager("conv_bn_act", args)[0], check.oracle("conv_bn_act", args)[0])


@pytest.mark.parametrize("c", [64, 6])
@DTYPES
def test_conv_passes_nan_and_infinity(gpu: host_gpu.HostGpu, dtype: torch.dtype, c: int) -> None:
    """NaN survives the ReLU, and neither spreads into tails or neighbours, as in eager."""
    x = torch.randn(1, c, 6, 6, dtype=dtype).to(memory_format=torch.channels_last)
    weight = (torch.randn(70, c, 3, 3, dtype=dtype) / 10).to(memory_format=torch.channels_last)
    x[0, 1, 2, 2], x[0, 3, 5, 0], x[0, 5, 0, 5] = float("nan"), float("inf"), float("-inf")
    scale, shift = torch.ones(70), torch.zeros(70)
    out = gpu.conv(
        x, weight, scale, shift, None, None, None, 0.0, (1, 1), (1, 1), (1, 1), 1, "relu"
    )
    assert rule.same_nonfinite(out, F.conv2d(x.float(), weight.float(), padding=1).relu())


ON_GPU = {"device": "cuda", "capability": (8, 0)}


@pytest.mark.parametrize(
    "change, reason",
    [
        ({}, None),
        ({"groups": 4, "weight": (40, 4, 3, 3)}, "4 groups"),
        ({"layout": "nchw"}, "nchw"),
        ({"residual": "strided"}, "strided"),
        ({"weight": (40, 16, 1, 17), "padding": (0, 8)}, "1×17"),
        ({"x": (2**26, 16, 8, 8)}, "31 bits"),
        ({"dtype": torch.float64}, "float64"),
        ({"device": "cpu", "capability": None}, "cpu"),
        ({"capability": (7, 5)}, "7.5"),
    ],
)
def test_conv_takes_what_was_run_here_and_declines_the_rest(
    change: dict, reason: str | None
) -> None:
    problem = replace(conv_problem(2, 16, 9, 9, 40), **{**ON_GPU, **change})
    said = find("native.conv").supports(problem)
    assert said is None if reason is None else reason in said


def test_native_takes_every_problem_run_here() -> None:
    for problem in conv_problems(torch.float16):
        on_gpu = replace(problem, **ON_GPU)
        assert find("native.conv").supports(on_gpu) is None
        assert (find("native.pointwise").supports(on_gpu) is None) == problem.pointwise
    for op in ("bn_act", "bn_act_backward"):
        for problem in nasty_problems(op, torch.float16):
            assert (find(f"native.{op}").supports(replace(problem, **ON_GPU)) is None) == (
                problem.layout == "nhwc"
            )


@DTYPES
@pytest.mark.parametrize("op", ["bn_act", "bn_act_backward"])
def test_batch_norm(gpu: host_gpu.HostGpu, dtype: torch.dtype, op: str) -> None:
    more = [
        Problem(op=op, device="cpu", dtype=dtype, x=x, layout="nhwc", act="relu", residual=residual)
        for x, residual in [((3, 520, 5, 5), "nhwc"), ((2, 16, 67, 41), None), ((2, 1, 1, 1), None)]
    ]
    for problem in [p for p in nasty_problems(op, dtype) if p.layout == "nhwc"] + more:
        judge(op, getattr(gpu, op), problem)


@DTYPES
def test_batch_norm_parameters_may_be_low_precision(
    gpu: host_gpu.HostGpu, dtype: torch.dtype
) -> None:
    x, dy = (
        torch.randn(2, 24, 5, 5, dtype=dtype).to(memory_format=torch.channels_last)
        for _ in range(2)
    )
    weight, bias = torch.randn(24, dtype=dtype), torch.randn(24, dtype=dtype)
    args = x, weight, bias, None, 1e-5, "relu"
    y, mean, var = gpu.bn_act(*args)
    for got, low, true in zip(
        (y, mean, var), reference.bn_act(*args), check.oracle("bn_act", args), strict=True
    ):
        assert_rule(got, low, true)
    args = dy, x, y, weight, mean, var, 1e-5, "relu", True
    low, true = reference.bn_act_backward(*args), check.oracle("bn_act_backward", args)
    for one in zip(gpu.bn_act_backward(*args), low, true, strict=True):
        assert one[0].dtype == dtype
        assert_rule(*one, gradient=True)


def test_batch_norm_variance_survives_a_large_mean(gpu: host_gpu.HostGpu) -> None:
    """E[x²] − E[x]² would lose all digits here."""
    x = (torch.randn(4, 8, 16, 16) + 3000.0).to(memory_format=torch.channels_last)
    _, mean, var = gpu.bn_act(x, torch.ones(8), torch.zeros(8), None, 1e-5, "none")
    wide = x.double()
    torch.testing.assert_close(mean.double(), wide.mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), wide.var((0, 2, 3), unbiased=False), rtol=1e-4, atol=0)


def test_batch_norm_passes_nan_and_infinity(gpu: host_gpu.HostGpu) -> None:
    x = torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last)
    x[0, 1, 2, 2], x[1, 3, 0, 0] = float("nan"), float("inf")
    args = x, torch.ones(8), torch.zeros(8), None, 1e-5, "relu"
    for got, low in zip(gpu.bn_act(*args), eager("bn_act", args), strict=True):
        assert rule.same_nonfinite(got, low)


def test_batch_norm_is_deterministic(gpu: host_gpu.HostGpu) -> None:
    problem = Problem(
        op="bn_act", device="cpu", dtype=torch.float16, x=(2, 72, 21, 19), layout="nhwc", act="relu"
    )
    args = make_args(problem)
    runs = []
    for seed in range(3):
        gpu.settings(seed=seed)
        runs.append(gpu.bn_act(*args))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@DTYPES
@pytest.mark.parametrize("op", ["add_act", "add_act_backward"])
def test_residual_add(gpu: host_gpu.HostGpu, dtype: torch.dtype, op: str) -> None:
    for problem in nasty_problems(op, dtype):
        if problem.layout == "nhwc":
            judge(op, getattr(gpu, op), problem)


@DTYPES
def test_residual_add_in_vectors_with_a_tail(gpu: host_gpu.HostGpu, dtype: torch.dtype) -> None:
    """Aligned tensors whose count is no multiple of 128 bits: vectors first, then the rest one by one."""
    width = 16 // dtype.itemsize
    for left in range(1, width):
        shape = (1, 1, 1, 3 * width + left)
        gpu.settings(slack=width - left)
        x, y = torch.randn(2, *shape).to(dtype)
        out = gpu.add_act(x, y, None, "relu")
        assert torch.equal(out, reference.add_act(x.float(), y.float(), None, "relu").to(dtype))
        assert torch.equal(
            gpu.add_act_backward(x, out, None, None, "relu")[0], torch.where(out > 0, x, 0)
        )


@pytest.mark.parametrize(
    "gate", [None, torch.tensor([0.5, 2.0] * 4).view(1, 8, 1, 1)], ids=["plain", "gated"]
)
@DTYPES
def test_residual_add_passes_nan_and_infinity(
    gpu: host_gpu.HostGpu, dtype: torch.dtype, gate
) -> None:
    """NaN survives the ReLU, and where the output is NaN the gradient passes, as in eager."""
    x, y, dout = torch.randn(3, 1, 8, 4, 4).to(dtype).unbind()
    x[0, 1, 0, 0], x[0, 2, 1, 1], x[0, 3, 2, 2] = float("nan"), float("inf"), float("-inf")
    y[0, 4, 3, 3], y[0, 2, 1, 1], dout[0, 5, 0, 0] = float("nan"), float("-inf"), float("nan")
    gate = None if gate is None else gate.to(dtype)
    x, y, dout = (t.to(memory_format=torch.channels_last) for t in (x, y, dout))
    args = x, y, gate, "relu"
    out, low = gpu.add_act(*args), reference.add_act(*args)
    assert rule.same_nonfinite(out, low)
    args = dout, low, x, gate, "relu"
    for got, low in zip(
        gpu.add_act_backward(*args), reference.add_act_backward(*args), strict=True
    ):
        assert rule.same_nonfinite(got, low)
        assert torch.equal(got.nan_to_num() == 0, low.nan_to_num() == 0)
