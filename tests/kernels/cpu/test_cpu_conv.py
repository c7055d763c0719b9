"""The CPU's convolution against float64: sizes, borders, rows and blocks, epilogues, in place, NaN, threads, AVX2."""

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
from resnet_fast.testing.rule import assert_rule, same_nonfinite

BUILT = sorted(Path(resnet_fast.__file__).parent.glob("_cpu*.so"))
if BUILT:
    torch.ops.load_library(BUILT[0])
ops = torch.ops.resnet_fast_cpu
pytestmark = pytest.mark.skipif(
    not BUILT or ops.instructions() == "none",
    reason="the CPU kernels are not built, or not for this processor",
)
DTYPES = pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        pytest.param(
            torch.bfloat16,
            marks=pytest.mark.skipif(
                not BUILT or not ops.takes_bf16(),
                reason="this processor does not multiply bfloat16",
            ),
        ),
    ],
    ids=["f32", "bf16"],
)
# n, c, h, w, k, size, stride, padding. 1×1: one pixel; odd sizes; rows that are copied, for their length, the stride,
# the padding or an odd number of channels; several blocks of rows read in place (a block is 512 KB), copied, and copied
# across images; more panels than threads, fewer rows; several runs of a sum.
POINTWISE = [
    (1, 16, 1, 1, 32, 1, 1, 0),
    (1, 64, 7, 7, 64, 1, 1, 0),
    (2, 48, 5, 3, 96, 1, 1, 0),
    (3, 32, 9, 7, 64, 1, 2, 0),
    (1, 512, 13, 11, 64, 1, 1, 0),
    (1, 512, 3, 5, 128, 1, 1, 0),
    (1, 16, 75, 239, 32, 1, 1, 0),
    (1, 1024, 26, 15, 32, 1, 1, 0),
    (3, 1024, 17, 11, 64, 1, 2, 0),
    (2, 32, 10, 8, 32, 1, 3, 0),
    (1, 2048, 7, 7, 96, 1, 1, 0),
    (2, 48, 4, 5, 32, 1, 1, 1),
    (2, 19, 4, 5, 32, 1, 1, 0),
    (1, 1, 5, 4, 32, 1, 1, 0),
]
# Others: stems, of odd rows; one pixel, nothing but borders; every size, stride and padding, also larger than the
# filters; oblong filters; several runs of a sum; several blocks.
WIDER = [
    (1, 3, 33, 47, 64, 7, 2, 3),
    (3, 3, 47, 33, 32, 7, 2, 3),
    (2, 3, 9, 12, 32, 3, 2, 1),
    (1, 5, 1, 1, 32, 3, 1, 1),
    (1, 64, 1, 1, 64, 7, 2, 3),
    (2, 7, 9, 6, 32, 5, 3, 2),
    (2, 16, 7, 6, 32, 5, 1, 0),
    (1, 8, 5, 5, 32, 5, 1, 0),
    (1, 24, 6, 5, 32, 2, 2, 0),
    (1, 3, 4, 3, 32, 3, 2, 5),
    (2, 64, 14, 15, 64, 3, 2, 1),
    (1, 64, 6, 7, 32, (1, 5), 1, 2),
    (1, 33, 8, 7, 32, (5, 1), 2, 1),
    (2, 512, 7, 6, 64, 3, 1, 1),
    (1, 256, 28, 27, 64, 3, 2, 1),
]


def nhwc(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def inputs(
    n: int,
    c: int,
    h: int,
    w: int,
    k: int,
    size: int | tuple[int, int],
    stride: int,
    padding: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias that the dtype holds exactly, residual."""
    r, s = size if isinstance(size, tuple) else (size, size)
    weight, x = (
        torch.randn(k, c, r, s).mul((c * r * s) ** -0.5).to(dtype),
        nhwc(torch.randn(n, c, h, w).to(dtype)),
    )
    return x, weight, torch.randn(k).to(dtype), torch.randn_like(fresh(x, weight, stride, padding))


def fresh(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """NaN, where the result shall be."""
    (n, _, *hw), (k, _, *size) = x.shape, weight.shape
    return nhwc(
        torch.full(
            (n, k, *((i + 2 * padding - r) // stride + 1 for i, r in zip(hw, size, strict=True))),
            torch.nan,
            dtype=x.dtype,
        )
    )


def eager(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    stride: int,
    padding: int,
    relu: bool,
) -> Tensor:
    y = F.conv2d(x, weight, bias, stride, padding)
    y = y if residual is None else y + residual
    return y.relu() if relu else y


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    stride: int,
    padding: int,
    relu: bool,
    in_place: bool = False,
) -> Tensor:
    out = fresh(x, weight, stride, padding)
    if in_place:
        residual = out.copy_(residual)
    ops.conv(
        x,
        ops.conv_filters(weight),
        bias.float(),
        residual,
        out,
        weight.shape[2:],
        stride,
        padding,
        relu,
    )
    return out


def judge(
    run,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    stride: int,
    padding: int,
    relu: bool,
    **how: bool,
) -> None:
    args = x, weight, bias, residual
    oracle = eager(*(None if a is None else a.double() for a in args), stride, padding, relu)
    assert_rule(
        run(*args, stride, padding, relu, **how),
        eager(*args, stride, padding, relu),
        oracle,
        what=f"{list(x.shape)} by {list(weight.shape)}, stride {stride}, padding {padding}",
    )


@DTYPES
@pytest.mark.parametrize("shape", [*POINTWISE, *WIDER], ids=str)
def test_against_float64(shape: tuple, dtype: torch.dtype) -> None:
    x, weight, bias, residual = inputs(*shape, dtype)
    for relu in (False, True):
        judge(conv, x, weight, bias, None, *shape[-2:], relu)
        judge(conv, x, weight, bias, residual, *shape[-2:], relu)
        judge(conv, x, weight, bias, residual, *shape[-2:], relu, in_place=True)


@DTYPES
def test_every_number_of_rows(dtype: torch.dtype) -> None:
    for rows in range(1, 44):
        x, weight, bias, residual = inputs(1, 16, 1, rows, 64, 1, 1, 0, dtype)
        judge(conv, x, weight, bias, residual, 1, 0, False)


@DTYPES
def test_runs_of_a_sum_are_as_exact_as_blocked_ones(dtype: torch.dtype) -> None:
    """Against eager in NCHW, which oneDNN computes in blocks; one sum of 4608 had 4.2 times its error in float32."""
    x, weight, bias, residual = inputs(1, 512, 14, 14, 64, 3, 2, 1, dtype)
    exact = eager(x.double(), weight.double(), bias.double(), None, 2, 1, False)
    assert_rule(
        conv(x, weight, bias, None, 2, 1, False),
        eager(x.contiguous(), weight, bias, None, 2, 1, False),
        exact,
    )


@DTYPES
def test_nan_and_infinity_as_eager(dtype: torch.dtype) -> None:
    x, weight, bias, residual = inputs(2, 32, 6, 5, 64, 1, 1, 0, dtype)
    x[0, 3, 1, 2], x[0, 4, 2, 2], x[1, 31, 5, 4], x[1, 0, 0, 0] = (
        torch.nan,
        torch.inf,
        -torch.inf,
        torch.inf,
    )
    x[1, 1, 0, 0] = torch.inf
    residual[0, 7, 0, 0], residual[1, 33, 3, 3], residual[1, 34, 3, 3] = (
        torch.nan,
        torch.inf,
        -torch.inf,
    )
    weight[5, 6], bias[40] = torch.inf, torch.nan
    for stride in (1, 2):
        for relu in (False, True):
            args = x, weight, bias, nhwc(residual[:, :, ::stride, ::stride]), stride, 0, relu
            expected = eager(*args)
            assert expected.isnan().any() and expected.isinf().any()
            assert same_nonfinite(conv(*args), expected) and same_nonfinite(
                conv(*args, in_place=True), expected
            )


@DTYPES
@pytest.mark.parametrize(
    "shape",
    [
        (2, 3, 11, 13, 32, 7, 2, 3),
        (2, 3, 8, 9, 32, 3, 2, 1),
        (2, 5, 9, 8, 32, 5, 1, 2),
        (2, 16, 6, 7, 32, 3, 1, 0),
        (2, 64, 5, 6, 32, 3, 2, 1),
        (2, 19, 4, 5, 32, 1, 1, 0),
    ],
    ids=str,
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_a_copy_brings_too_much_leaks_nowhere(
    shape: tuple, dtype: torch.dtype, value: float
) -> None:
    """A pixel that is not finite, at a border, inside or the last: exactly the outputs that read it are not finite."""
    x, weight, bias, _ = inputs(*shape, dtype)
    n, _, h, w = x.shape
    for row, column in {
        (i, j) for i in (0, 1, h // 2, h - 1) for j in (0, 1, w // 2, w - 2, w - 1)
    }:
        for image in range(n):
            bad = x.clone()
            bad[image, :, row, column] = value
            # oneDNN's bfloat16 stem leaks itself
            expected = eager(bad.double(), weight.double(), bias.double(), None, *shape[-2:], False)
            assert same_nonfinite(conv(bad, weight, bias, None, *shape[-2:], False), expected)


@DTYPES
@pytest.mark.parametrize(
    "shape",
    [
        (1, 64, 13, 11, 96, 1, 1, 0),
        (1, 512, 7, 7, 160, 1, 1, 0),
        (2, 256, 24, 17, 64, 1, 2, 0),
        (1, 3, 65, 43, 64, 7, 2, 3),
        (1, 512, 7, 7, 160, 3, 1, 1),
    ],
    ids=str,
)
def test_any_number_of_threads_gives_the_same_bytes(shape: tuple, dtype: torch.dtype) -> None:
    x, weight, bias, residual = inputs(*shape, dtype)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5, 8, 16):
            torch.set_num_threads(threads)
            found.append(conv(x, weight, bias, residual, *shape[-2:], True, in_place=True))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


@DTYPES
@pytest.mark.parametrize("c, r, s", [(48, 1, 1), (3, 7, 7), (16, 2, 3), (5, 1, 3)])
def test_filters_are_panels_of_any_strides(c: int, r: int, s: int, dtype: torch.dtype) -> None:
    weight, panel = torch.randn(64, c, r, s).to(dtype), ops.panel()
    # neighbours side by side
    filters, per = ops.conv_filters(weight), 1 if dtype == torch.float32 else 2
    assert filters.shape == (64 // panel, -(-c * r * s // per), panel, per)
    plain = filters.transpose(2, 3).reshape(64 // panel, -1, panel)
    assert torch.equal(
        plain[:, : c * r * s],
        weight.permute(2, 3, 1, 0).reshape(-1, 64 // panel, panel).transpose(0, 1),
    )
    assert not plain[:, c * r * s :].any()
    wide = torch.randn(c, 130, s, r).to(dtype)
    wide[:, 1:129:2] = weight.permute(1, 0, 3, 2)
    for same in (nhwc(weight), wide[:, 1:129:2].permute(1, 0, 3, 2)):
        assert torch.equal(ops.conv_filters(same), filters)


def test_no_images_are_no_work() -> None:
    for shape in ((0, 32, 4, 4, 32, 1, 1, 0), (0, 32, 8, 8, 32, 3, 2, 1)):
        x, weight, bias, residual = inputs(*shape, torch.float32)
        assert conv(x, weight, bias, residual, *shape[-2:], True).shape == (0, 32, 4, 4)


def refused(sentence: str, **changed) -> None:
    x, weight, bias, _ = inputs(2, 32, 4, 6, 64, 1, 1, 0, torch.float32)
    args = {
        "x": x,
        "filters": ops.conv_filters(weight),
        "bias": bias,
        "residual": None,
        "out": nhwc(torch.empty(2, 64, 4, 6)),
        "size": (1, 1),
        "stride": 1,
        "padding": 0,
        "relu": True,
    } | changed
    with pytest.raises(RuntimeError, match=f"^{sentence}"):
        ops.conv(*args.values())


def test_what_does_not_fit_is_refused_in_a_sentence() -> None:
    x, out = nhwc(torch.randn(2, 32, 4, 6)), nhwc(torch.empty(2, 64, 4, 6))
    refused("conv: got x of dtype Half, expected Float", x=x.half())
    refused("conv: got x that is not dense in channels_last", x=x.contiguous())
    refused(r"conv: got x of shape \[32\], expected \[N, C, H, W\]", x=x[0, :, 0, 0])
    refused(
        r"conv: got filters of dtype Float and shape .* for 1x1 on x of dtype Float and shape \[2, 16, 4, 6\]",
        x=nhwc(x[:, :16]),
    )
    refused(r"conv: got filters of dtype Float and shape .* for 3x3 on x", size=(3, 3), padding=1)
    refused(
        "conv: got filters of dtype Double",
        filters=torch.zeros(2, 32, ops.panel(), 1, dtype=torch.float64),
    )
    refused(
        r"conv: got bias of dtype Float and shape \[63\], expected Float \[64\]",
        bias=torch.zeros(63),
    )
    refused("conv: got bias of dtype Double", bias=torch.zeros(64, dtype=torch.float64))
    refused("conv: got out of dtype BFloat16, expected Float", out=out.bfloat16())
    refused("conv: got out that is not dense in channels_last", out=out.contiguous())
    refused(r"conv: got out of shape \[2, 64, 4, 6\], expected \[2, 64, 2, 3\]", stride=2)
    refused(r"conv: got out of shape \[2, 64, 4, 6\], expected \[2, 64, 6, 8\]", padding=1)
    for changed in ({"stride": 0}, {"padding": -1}, {"size": (0, 1)}):
        refused("conv: got filters of .* expected sizes and stride of 1 or more", **changed)
    refused(
        "conv: got x of shape .* with padding 0, expected one no smaller than the filters, 5x1",
        size=(5, 1),
        filters=ops.conv_filters(torch.zeros(64, 32, 5, 1)),
    )
    refused("conv: got residual of shape", residual=out[:1])
    refused("conv: got residual with other strides than out", residual=out.contiguous())
    square = nhwc(torch.randn(2, 32, 4, 6))
    refused(
        "conv: got x as out",
        x=square,
        out=square,
        filters=ops.conv_filters(torch.randn(32, 32, 1, 1)),
        bias=torch.zeros(32),
    )


@pytest.mark.parametrize("shape", [(33, 32, 1, 1), (32, 0, 3, 3), (0, 32, 1, 1), (32, 32)], ids=str)
def test_weight_that_does_not_fit_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        RuntimeError, match="^conv_filters: got weight of shape .* expected .multiple of"
    ):
        ops.conv_filters(torch.zeros(shape))


# ---------------------------------------------------------------- copies that no op chooses on a CPU with AVX-512 BF16

DRIVER = """
#include SOURCE
extern "C" void run(const float* x, const float* filters, const float* bias, const float* residual, float* out,
                    const int64_t* size, bool relu, int64_t first, int64_t last, int64_t k0, int64_t k1) {
  const resnet_fast::cpu::ConvArgs args{x, filters, bias, residual, out, size[0], size[1], size[2], size[3], size[4],
                                        size[5], size[6], size[7], size[8], size[9], size[10], false, relu};
  float* scratch = new float[resnet_fast::cpu::conv_scratch(args, last - first)];
  resnet_fast::cpu::COPY.conv(args, first, last, k0, k1, scratch);
  delete[] scratch;
}
"""


@pytest.mark.skipif(host_gpu.compiler() is None, reason="needs a g++")
@pytest.mark.parametrize(
    "copy, flags, panel",
    [
        ("avx2", ("-mavx2", "-mfma"), 16),
        ("avx512", ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"), 32),
    ],
)
def test_other_instructions(copy: str, flags: tuple[str, ...], panel: int, tmp_path: Path) -> None:
    if torch.backends.cpu.get_cpu_capability() not in ("AVX512", copy.upper()):
        pytest.skip(f"needs a processor with {copy}")
    (tmp_path / "driver.cpp").write_text(DRIVER)
    subprocess.run(
        [
            host_gpu.compiler(),
            "-std=c++17",
            "-O2",
            *flags,
            f"-DCOPY={copy}",
            f'-DSOURCE="{copy}.cpp"',
            "-Wall",
            "-Werror",
            "-fPIC",
            "-shared",
            f"-I{host_gpu.ROOT / 'csrc' / 'cpu'}",
            tmp_path / "driver.cpp",
            "-o",
            tmp_path / "driver.so",
        ],
        check=True,
    )
    library = ctypes.CDLL(tmp_path / "driver.so")

    def run(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        stride: int,
        padding: int,
        relu: bool,
    ) -> Tensor:
        k, c, r, s = weight.shape
        out, filters = (
            fresh(x, weight, stride, padding),
            weight.permute(0, 2, 3, 1).reshape(k // panel, panel, -1).transpose(1, 2).contiguous(),
        )
        n, _, height, width = out.shape
        rows, middle = n * height * width, n * height * width // 3
        for first, last in ((0, middle), (middle, rows)):
            for k0, k1 in ((0, panel), (panel, k)):
                library.run(
                    *(
                        ctypes.c_void_p(None if t is None else t.data_ptr())
                        for t in (x, filters, bias, residual, out)
                    ),
                    (ctypes.c_int64 * 11)(
                        n, *x.shape[2:], c, k, r, s, stride, padding, height, width
                    ),
                    ctypes.c_bool(relu),
                    *map(ctypes.c_int64, (first, last, k0, k1)),
                )
        return out

    for shape in [
        *POINTWISE[:6],
        *WIDER,
        *((1, 16, 1, rows, 3 * panel, 1, 1, 0) for rows in range(1, 20)),
    ]:
        x, weight, bias, residual = inputs(*shape, torch.float32)
        judge(run, x, weight, bias, None, *shape[-2:], False)
        judge(run, x, weight, bias, residual, *shape[-2:], True)
