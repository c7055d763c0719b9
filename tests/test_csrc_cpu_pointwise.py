"""The CPU's 1×1 convolution against float64: every number of rows and blocks, strides, epilogues, in place, NaN, threads, AVX2's copy."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import host_gpu
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import resnet_fast
from resnet_fast.testing import assert_rule, same_nonfinite

BUILT = sorted(Path(resnet_fast.__file__).parent.glob("_cpu*.so"))
if BUILT:
    torch.ops.load_library(BUILT[0])
ops = torch.ops.resnet_fast_cpu
pytestmark = pytest.mark.skipif(not BUILT or ops.instructions() == "none", reason="the CPU kernels are not built, or not for this processor")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.skipif(
    not BUILT or not ops.takes_bf16(), reason="this processor does not multiply bfloat16"))], ids=["f32", "bf16"])
# n, c, h, w, k, stride: one pixel; odd sizes; rows that are copied, for their length or for the stride; several blocks of
# rows read where they are (a block is 256 KB), copied, and copied across images; more panels than threads, fewer rows.
SHAPES = [(1, 16, 1, 1, 32, 1), (1, 64, 7, 7, 64, 1), (2, 48, 5, 3, 96, 1), (3, 32, 9, 7, 64, 2), (1, 512, 13, 11, 64, 1),
          (1, 512, 3, 5, 128, 1), (1, 16, 75, 119, 32, 1), (1, 1024, 26, 15, 32, 1), (3, 1024, 17, 11, 64, 2), (2, 32, 10, 8, 32, 3),
          (1, 2048, 7, 7, 96, 1)]


def nhwc(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def inputs(n: int, c: int, h: int, w: int, k: int, stride: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias that the dtype holds exactly, residual."""
    sizes = [-(-i // stride) for i in (h, w)]
    return (nhwc(torch.randn(n, c, h, w).to(dtype)), torch.randn(k, c, 1, 1).mul(c**-0.5).to(dtype), torch.randn(k).to(dtype),
            nhwc(torch.randn(n, k, *sizes).to(dtype)))


def eager(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, stride: int, relu: bool) -> Tensor:
    y = F.conv2d(x, weight, bias, stride)
    y = y if residual is None else y + residual
    return y.relu() if relu else y


def pointwise(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, stride: int, relu: bool, in_place: bool = False) -> Tensor:
    n, _, h, w = x.shape
    out = nhwc(torch.full((n, len(weight), -(-h // stride), -(-w // stride)), torch.nan, dtype=x.dtype))
    if in_place:
        residual = out.copy_(residual)
    ops.pointwise(x, ops.pointwise_filters(weight), bias.float(), residual, out, stride, relu)
    return out


def judge(run, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, stride: int, relu: bool, **how: bool) -> None:
    args = x, weight, bias, residual
    oracle = eager(*(None if a is None else a.double() for a in args), stride, relu)
    assert_rule(run(*args, stride, relu, **how), eager(*args, stride, relu), oracle, what=f"{list(x.shape)} to {len(weight)}, stride {stride}")


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, bias, residual = inputs(*shape, dtype)
    for relu in (False, True):
        judge(pointwise, x, weight, bias, None, shape[-1], relu)
        judge(pointwise, x, weight, bias, residual, shape[-1], relu)
        judge(pointwise, x, weight, bias, residual, shape[-1], relu, in_place=True)


@DTYPES
def test_every_number_of_rows(dtype: torch.dtype) -> None:
    for rows in range(1, 44):
        x, weight, bias, residual = inputs(1, 16, 1, rows, 64, 1, dtype)
        judge(pointwise, x, weight, bias, residual, 1, False)


@DTYPES
def test_nan_and_infinity_as_eager(dtype: torch.dtype) -> None:
    x, weight, bias, residual = inputs(2, 32, 6, 5, 64, 1, dtype)
    x[0, 3, 1, 2], x[0, 4, 2, 2], x[1, 31, 5, 4], x[1, 0, 0, 0] = torch.nan, torch.inf, -torch.inf, torch.inf
    x[1, 1, 0, 0] = torch.inf
    residual[0, 7, 0, 0], residual[1, 33, 3, 3], residual[1, 34, 3, 3] = torch.nan, torch.inf, -torch.inf
    weight[5, 6], bias[40] = torch.inf, torch.nan
    for stride in (1, 2):
        for relu in (False, True):
            args = x, weight, bias, residual[:, :, ::stride, ::stride].contiguous(memory_format=torch.channels_last), stride, relu
            expected = eager(*args)
            assert expected.isnan().any() and expected.isinf().any()
            assert same_nonfinite(pointwise(*args), expected) and same_nonfinite(pointwise(*args, in_place=True), expected)


@DTYPES
@pytest.mark.parametrize("shape", [(1, 64, 13, 11, 96, 1), (1, 512, 7, 7, 160, 1), (2, 256, 24, 17, 64, 2)], ids=str)
def test_any_number_of_threads_gives_the_same_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, bias, residual = inputs(*shape, dtype)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(pointwise(x, weight, bias, residual, shape[-1], True, in_place=True))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@DTYPES
def test_filters_are_panels_of_any_strides(dtype: torch.dtype) -> None:
    weight, panel = torch.randn(64, 48, 1, 1).to(dtype), ops.panel()
    filters = ops.pointwise_filters(weight)
    assert filters.shape[-1] == (1 if dtype == torch.float32 else 2)  # neighbouring channels side by side
    assert torch.equal(filters.transpose(2, 3).reshape(64 // panel, 48, panel), weight.view(64 // panel, panel, 48).transpose(1, 2))
    wide = torch.randn(48, 130, 1, 1).to(dtype)
    wide[:, 1:129:2] = weight.transpose(0, 1)
    for same in (nhwc(weight), wide[:, 1:129:2].transpose(0, 1)):
        assert torch.equal(ops.pointwise_filters(same), filters)


def test_no_images_are_no_work() -> None:
    x, weight, bias, residual = inputs(0, 32, 4, 4, 32, 1, torch.float32)
    assert pointwise(x, weight, bias, residual, 1, True).shape == (0, 32, 4, 4)


def refused(sentence: str, **changed) -> None:
    x, weight, bias, _ = inputs(2, 32, 4, 6, 64, 1, torch.float32)
    args = {"x": x, "filters": ops.pointwise_filters(weight), "bias": bias, "residual": None, "out": nhwc(torch.empty(2, 64, 4, 6)), "stride": 1,
            "relu": True} | changed
    with pytest.raises(RuntimeError, match=f"^{sentence}"):
        ops.pointwise(*args.values())


def test_what_does_not_fit_is_refused_in_a_sentence() -> None:
    x, out = nhwc(torch.randn(2, 32, 4, 6)), nhwc(torch.empty(2, 64, 4, 6))
    refused("pointwise: got x of dtype Half, expected Float", x=x.half())
    refused("pointwise: got x that is not dense in channels_last", x=x.contiguous())
    refused(r"pointwise: got x of shape \[32\], expected \[N, C, H, W\]", x=x[0, :, 0, 0])
    refused(r"pointwise: got filters of dtype Float and shape .* for x of dtype Float and shape \[2, 16, 4, 6\]", x=nhwc(x[:, :16]))
    refused("pointwise: got filters of dtype Double", filters=torch.zeros(2, 32, ops.panel(), 1, dtype=torch.float64))
    refused(r"pointwise: got bias of dtype Float and shape \[63\], expected Float \[64\]", bias=torch.zeros(63))
    refused("pointwise: got bias of dtype Double", bias=torch.zeros(64, dtype=torch.float64))
    refused("pointwise: got out of dtype BFloat16, expected Float", out=out.bfloat16())
    refused("pointwise: got out that is not dense in channels_last", out=out.contiguous())
    refused(r"pointwise: got out of shape \[2, 64, 4, 6\], expected \[2, 64, 2, 3\]", stride=2)
    refused("pointwise: got stride 0, expected 1 or more", stride=0)
    refused("pointwise: got residual of shape", residual=out[:1])
    refused("pointwise: got residual with other strides than out", residual=out.contiguous())
    square = nhwc(torch.randn(2, 32, 4, 6))
    refused("pointwise: got x as out", x=square, out=square, filters=ops.pointwise_filters(torch.randn(32, 32, 1, 1)), bias=torch.zeros(32))


@pytest.mark.parametrize("shape", [(33, 32, 1, 1), (32, 24, 1, 1), (32, 32, 3, 3), (0, 32, 1, 1), (32, 32)], ids=str)
def test_weight_that_does_not_fit_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match="^pointwise_filters: got weight of shape .* expected .multiple of"):
        ops.pointwise_filters(torch.zeros(shape))


# ---------------------------------------------------------------- the copy for AVX2, which no op chooses on a processor with AVX-512

DRIVER = """
#include "avx2.cpp"
extern "C" void run(const float* x, const float* filters, const float* bias, const float* residual, float* out, const int64_t* size,
                    bool relu, int64_t first, int64_t last, int64_t k0, int64_t k1, float* scratch) {
  resnet_fast::cpu::avx2.pointwise({x, filters, bias, residual, out, size[0], size[1], size[2], size[3], size[4], size[5], false, relu},
                                   first, last, k0, k1, scratch);
}
"""


@pytest.mark.skipif(host_gpu.compiler() is None, reason="needs a g++")
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="needs a processor with AVX2")
def test_avx2(tmp_path: Path) -> None:
    (tmp_path / "driver.cpp").write_text(DRIVER)
    subprocess.run([host_gpu.compiler(), "-std=c++17", "-O2", "-mavx2", "-mfma", "-Wall", "-Werror", "-fPIC", "-shared",
                    f"-I{host_gpu.ROOT / 'csrc' / 'cpu'}",
                    tmp_path / "driver.cpp", "-o", tmp_path / "driver.so"], check=True)
    library = ctypes.CDLL(tmp_path / "driver.so")

    def run(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, stride: int, relu: bool) -> Tensor:
        (n, c, h, w), k = x.shape, len(weight)
        out = nhwc(torch.full((n, k, -(-h // stride), -(-w // stride)), torch.nan))
        filters, scratch = weight.view(k // 16, 16, c).transpose(1, 2).contiguous(), torch.empty(out[:, 0].numel() * (c + 16))
        rows, middle = out[:, 0].numel(), out[:, 0].numel() // 3
        for first, last in ((0, middle), (middle, rows)):
            for k0, k1 in ((0, 16), (16, k)):
                library.run(*(ctypes.c_void_p(None if t is None else t.data_ptr()) for t in (x, filters, bias, residual, out)),
                            (ctypes.c_int64 * 6)(n, h, w, c, k, stride), ctypes.c_bool(relu),
                            *map(ctypes.c_int64, (first, last, k0, k1)), ctypes.c_void_p(scratch.data_ptr()))
        return out

    for shape in [*SHAPES[:6], *((1, 16, 1, rows, 48, 1) for rows in range(1, 20))]:
        x, weight, bias, residual = inputs(*shape, torch.float32)
        judge(run, x, weight, bias, None, shape[-1], False)
        judge(run, x, weight, bias, residual, shape[-1], True)
