"""The CPU's training batch norm, forward and backward: error rule, outliers, NaN, layouts, dtypes, threads, choice."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import resnet_fast
from resnet_fast import ops
from resnet_fast.dispatch import Problem, choose, find, record, rejected
from resnet_fast.kernels import aten, cpu, cpu_library
from resnet_fast.testing.check import check_kernel, oracle
from resnet_fast.testing.eager import eager
from resnet_fast.testing.grids import nasty_problems
from resnet_fast.testing.rule import assert_rule, same_nonfinite
from resnet_fast.testing.samples import make_args

pytestmark = pytest.mark.skipif(
    cpu_library.available() is not None, reason=str(cpu_library.available())
)
NHWC = torch.channels_last
OPS = pytest.mark.parametrize("op", ["bn_act", "bn_act_backward"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
# Fewer pixels than a pivot takes; one chunk, and 8 pixels more; 64 chunks and a shorter one; chunks of 512; many
# channels.
SIZES = [
    (1, 64, 1, 3),
    (1, 16, 4, 8),
    (1, 16, 5, 8),
    (3, 48, 60, 57),
    (2, 16, 130, 130),
    (2, 2048, 7, 7),
    (1, 40, 9, 9),
]


def problem(
    op="bn_act",
    x=(2, 32, 9, 6),
    dtype=torch.float32,
    layout="nhwc",
    residual="nhwc",
    act="relu",
    **more,
) -> Problem:
    return Problem(
        op=op, device="cpu", dtype=dtype, x=x, layout=layout, residual=residual, act=act, **more
    )


def judged(op: str, dtype: torch.dtype) -> list[Problem]:
    nasty = [p for p in nasty_problems(op, dtype) if p.layout == "nhwc"]
    return [
        *nasty,
        *(problem(op, x, dtype, residual=residual) for x in SIZES for residual in (None, "nhwc")),
    ]


@OPS
@DTYPES
def test_it_obeys_the_error_rule(op, dtype) -> None:
    for p in judged(op, dtype):
        verdict = check_kernel(find(f"cpu.{op}"), p)
        assert verdict.ok, f"{p.key}: {verdict.reason}"


@pytest.mark.parametrize(
    "change",
    [lambda x: x + 1e4, lambda x: x * 1e-4, lambda x: torch.full_like(x, 1234.567)],
    ids=["far", "small", "constant"],
)
def test_moments_do_not_cancel(change) -> None:
    args = list(make_args(problem(x=(2, 16, 31, 40), residual=None, act="none")))
    args[0] = change(args[0])
    for got, bar, exact in zip(
        cpu.bn_act(*args), eager("bn_act", tuple(args)), oracle("bn_act", tuple(args)), strict=True
    ):
        assert_rule(got, bar, exact)


def test_an_outlier_where_the_pivot_is_taken_does_little_harm() -> None:
    """The pivot is the mean of 8 pixels. With the first pixel as pivot the variance would lose seven times as much."""
    args = list(make_args(problem(x=(1, 16, 16, 32), residual=None, act="none")))
    args[0][0, :, 0, 0] = 1e5
    var, exact = cpu.bn_act(*args)[2], oracle("bn_act", tuple(args))[2]
    assert ((var - exact) / exact).abs().max() < 1e-6


@DTYPES
@pytest.mark.parametrize("act", ["relu", "none"])
def test_nan_and_infinity_as_eager(dtype, act) -> None:
    x, weight, bias, residual, eps, _ = make_args(problem(dtype=dtype))
    x[0, 3, 1, 2], x[1, 5, 4, 4], x[1, 6, 0, 0] = torch.nan, torch.inf, -torch.inf
    residual[0, 7, 0, 0], residual[1, 8, 3, 3], residual[1, 9, 8, 5] = (
        torch.nan,
        torch.inf,
        -torch.inf,
    )
    weight[10] = torch.nan
    args = x, weight, bias, residual, eps, act
    got, bar = cpu.bn_act(*args), eager("bn_act", args)
    assert bar[0].isnan().any() and bar[0].isinf().any()
    for mine, theirs in zip(got, bar, strict=True):
        assert same_nonfinite(mine, theirs)
    dy = torch.randn_like(x)
    dy[0, 11, 2, 2], dy[1, 12, 2, 2], dy[1, 13] = torch.nan, torch.inf, 0
    for keeps in (False, True):
        back = dy, x, got[0], weight, *got[1:], eps, act, keeps
        for mine, theirs in zip(
            cpu.bn_act_backward(*back), aten.bn_act_backward(*back), strict=True
        ):
            assert same_nonfinite(mine, theirs)


def test_the_gradient_passes_where_the_output_is_positive_or_nan() -> None:
    dy, x, y, *rest = make_args(problem("bn_act_backward"))
    y.zero_()
    y[:, ::4], y[:, 1::4], y[:, 2::4] = torch.nan, 1e-40, -0.0
    dresidual = cpu.bn_act_backward(dy, x, y, *rest)[3]
    assert torch.equal(dresidual[:, ::4], dy[:, ::4]) and torch.equal(
        dresidual[:, 1::4], dy[:, 1::4]
    )
    assert not dresidual[:, 2::4].any() and not dresidual[:, 3::4].any()


@OPS
@pytest.mark.parametrize("x", [(2, 63, 21, 19), (1, 256, 5, 7), (2, 16, 130, 130)], ids=str)
def test_the_number_of_threads_changes_no_byte(op, x) -> None:
    args, run, before = make_args(problem(op, x)), find(f"cpu.{op}").fn, torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(run(*args))
    finally:
        torch.set_num_threads(before)
    assert all(
        torch.equal(mine, one)
        for other in found[1:]
        for mine, one in zip(other, found[0], strict=True)
    )


@pytest.mark.parametrize("vectors", [torch.bfloat16, torch.float64])
def test_vectors_of_another_dtype_and_with_gaps(vectors) -> None:
    x, weight, bias, residual, eps, act = make_args(problem())
    wide = torch.stack((weight, bias)).to(vectors).t().contiguous()
    weight, bias = wide.unbind(1)
    assert weight.stride() == (2,)
    y, mean, var = cpu.bn_act(x, weight, bias, residual, eps, act)
    assert torch.equal(y, cpu.bn_act(x, weight.float(), bias.float(), residual, eps, act)[0])
    dy = torch.randn_like(x)
    _, dweight, dbias, none = cpu.bn_act_backward(dy, x, y, weight, mean, var, eps, act, False)
    assert dweight.dtype == dbias.dtype == vectors and none.numel() == 0


def test_gradients_that_come_in_another_layout() -> None:
    dy, x, y, *rest = make_args(problem("bn_act_backward"))
    expected = cpu.bn_act_backward(dy, x, y, *rest)
    for other in (dy.contiguous(), torch.stack((dy, dy), -1)[..., 1]):
        for mine, theirs in zip(
            cpu.bn_act_backward(other, x, y.contiguous(), *rest), expected, strict=True
        ):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("x", [(2, 32, 5, 4), (3, 32, 1, 1), (2, 1, 5, 4), (1, 16, 3, 3)], ids=str)
def test_strides_of_the_results_are_atens(x) -> None:
    args = make_args(problem(x=x))
    assert cpu.bn_act(*args)[0].stride() == aten.bn_act(*args)[0].stride()
    back = make_args(problem("bn_act_backward", x))
    for mine, theirs in zip(cpu.bn_act_backward(*back), aten.bn_act_backward(*back), strict=True):
        assert mine.stride() == theirs.stride()


DECLINED = {
    "NCHW": ({"layout": "nchw"}, "NHWC"),
    "residual": ({"residual": "nchw"}, "residual are nhwc and nchw"),
    "empty": ({"x": (0, 32, 4, 4)}, "empty"),
    "half": ({"dtype": torch.float16}, "float16"),
    "double": ({"dtype": torch.float64}, "float64"),
    "cuda": ({"device": "cuda"}, "cuda"),
}


@pytest.mark.parametrize("change, sentence", DECLINED.values(), ids=DECLINED)
def test_it_says_what_it_declines(change, sentence) -> None:
    assert sentence in find("cpu.bn_act").reason(Problem(**{**vars(problem()), **change}))


def test_it_is_chosen_where_it_was_measured() -> None:
    assert (
        choose(problem())[0].id == "cpu.bn_act"
        and choose(problem("bn_act_backward"))[0].id == "cpu.bn_act_backward"
    )
    assert (
        choose(problem(layout="nchw"))[0].id == "aten.bn_act"
        and choose(problem(dtype=torch.float64))[0].id == "aten.bn_act"
    )
    assert choose(problem(x=(2, 65, 4, 4)))[0].id == "aten.bn_act"
    assert "multiples of 16" in rejected(problem(x=(2, 65, 4, 4)))["cpu.bn_act"]


def test_the_models_train_with_it() -> None:
    model, x = resnet_fast.resnet18().train(), torch.randn(2, 3, 64, 64)
    with record() as choices:
        model(x).sum().backward()
    kernels = [c.kernel for c in choices]
    assert kernels.count("cpu.bn_act") == kernels.count("cpu.bn_act_backward") == 20


def test_a_residual_without_gradient() -> None:
    """Its forward had one, its backward has none to give: the mask must be the output's."""
    x, weight, bias, residual, eps, act = make_args(problem())
    found = []
    for wants in (True, False):
        live = x.clone().requires_grad_()
        y = ops.bn_act(
            live, weight, bias, residual.clone().requires_grad_(wants), eps=eps, act=act
        )[0]
        y.backward(torch.linspace(-1, 2, y.numel()).view(y.shape).contiguous(memory_format=NHWC))
        found.append(live.grad)
    assert torch.equal(*found)


def test_avx2_obeys_the_rule_too() -> None:
    code = """if True:
        from resnet_fast.dispatch import find
        from resnet_fast.kernels import cpu_library
        from resnet_fast.testing.check import check_kernel
        import sys, torch; sys.path.insert(0, "tests/kernels/cpu")
        from test_cpu_norm import judged
        assert cpu_library.available() is None
        assert cpu_library.instructions() == "AVX2", cpu_library.instructions()
        for op in ("bn_act", "bn_act_backward"):
            for dtype in (torch.float32, torch.bfloat16):
                for p in judged(op, dtype)[::9]:
                    verdict = check_kernel(find(f"cpu.{op}"), p)
                    assert verdict.ok, f"{p.key}: {verdict.reason}"
    """
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "ATEN_CPU_CAPABILITY": "avx2"}
    )


def refused(name: str, sentence: str, **changed: Tensor | None) -> None:
    x, c = torch.randn(2, 32, 4, 6).contiguous(memory_format=NHWC), torch.ones(32)
    args = {
        "bn_act": {
            "x": x,
            "weight": c,
            "bias": c,
            "residual": None,
            "y": x.clone(),
            "mean": c,
            "var": c,
            "eps": 1e-5,
            "relu": True,
        },
        "bn_act_backward": {
            "dy": x,
            "x": x,
            "y": x,
            "weight": c,
            "mean": c,
            "var": c,
            "dx": x.clone(),
            "dweight": c.clone(),
            "dbias": c.clone(),
            "dresidual": None,
            "eps": 1e-5,
            "relu": True,
        },
    }[name]
    with pytest.raises(RuntimeError, match=f"^{name}: got {sentence}"):
        getattr(torch.ops.resnet_fast_cpu, name)(*(args | changed).values())


@pytest.mark.parametrize("name", ["bn_act", "bn_act_backward"])
def test_what_does_not_fit_is_refused_in_a_sentence(name) -> None:
    x = torch.randn(2, 32, 4, 6).contiguous(memory_format=NHWC)
    refused(name, "x of dtype Half, expected Float or BFloat16", x=x.half())
    refused(name, "x that is not dense in channels_last", x=x.contiguous())
    refused(name, r"x of shape \[0, 32, 4, 6\], expected at least one pixel", x=x[:0])
    refused(
        name,
        r"weight of dtype Float and shape \[31\], expected Float \[32\]",
        weight=torch.ones(31),
    )
    refused(name, "mean of dtype Double", mean=torch.ones(32, dtype=torch.float64))
    refused(name, "var of dtype", var=torch.ones(64)[::2])
    refused(name, "y of dtype BFloat16 and x of dtype Float", y=x.bfloat16())
    refused(name, r"y of shape \[1, 32, 4, 6\]", y=x[:1])
    extra = "residual" if name == "bn_act" else "dresidual"
    refused(name, f"{extra} that is not dense in channels_last", **{extra: x.contiguous()})
