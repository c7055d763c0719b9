"""The C++ convolutions for CPUs: the error rule, NaN and infinity as in eager, and when each is chosen."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import resnet_fast
from resnet_fast.dispatch import Problem, choose, find, record, rejected, use
from resnet_fast.dispatch.select import select
from resnet_fast.kernels import aten, cpu, cpu_library, prepack
from resnet_fast.testing.check import check_kernel, oracle
from resnet_fast.testing.eager import eager
from resnet_fast.testing.rule import assert_rule, same_nonfinite
from resnet_fast.testing.samples import make_args

pytestmark = pytest.mark.skipif(
    cpu_library.available() is not None, reason=str(cpu_library.available())
)
NHWC = torch.channels_last
TAKES_BF16 = cpu_library.available() is None and torch.ops.resnet_fast_cpu.takes_bf16()
BF16_SUM = "cpu.conv" if TAKES_BF16 else "aten.conv_bn_act"


@pytest.fixture(autouse=True)
def without_amx(monkeypatch) -> None:
    """As on the processors that these kernels were measured for; the tests of AMX say otherwise."""
    monkeypatch.setattr(cpu_library, "onednn_has_amx", lambda: False)


def winograd_problem(n=2, c=32, h=9, w=6, k=64, dtype=torch.float32, **more) -> Problem:
    return Problem(
        **{
            "op": "conv_bn_act",
            "device": "cpu",
            "dtype": dtype,
            "x": (n, c, h, w),
            "layout": "nhwc",
            "weight": (k, c, 3, 3),
            "padding": (1, 1),
            "bn": True,
            "act": "relu",
            **more,
        }
    )


@given(
    n=st.integers(1, 3),
    c=st.sampled_from([16, 48, 64, 80, 256]),
    h=st.integers(1, 13),
    w=st.integers(1, 13),
    k=st.sampled_from([32, 64, 96]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    act=st.sampled_from(["relu", "none"]),
    residual=st.sampled_from([None, "nhwc"]),
    bn=st.booleans(),
)
def test_winograd_obeys_the_error_rule(n, c, h, w, k, dtype, act, residual, bn) -> None:
    verdict = check_kernel(
        find("cpu.winograd"),
        winograd_problem(n, c, h, w, k, dtype, act=act, residual=residual, bn=bn),
    )
    assert verdict.ok, verdict.reason


def test_a_long_sum_is_more_exact_than_one_after_the_other() -> None:
    """Runs of 64 channels keep the error below eager's in the same layout; one sum of 512 had 1.2 times eager's."""
    problem = winograd_problem(2, 512, 8, 8, 512)
    args = make_args(problem)
    exact, bar = oracle("conv_bn_act", args)[0], eager("conv_bn_act", args)[0]
    got = find("cpu.winograd").fn(*args)
    assert (got - exact).pow(2).mean() < (bar - exact).pow(2).mean()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_would_spread_over_a_tile_is_computed_as_eager_does(value, dtype) -> None:
    args = list(make_args(winograd_problem(dtype=dtype)))
    args[0][1, 3, 4, 2] = value
    got, bar = find("cpu.winograd").fn(*args), eager("conv_bn_act", tuple(args))[0]
    assert same_nonfinite(got, bar)
    if value == 1e25:  # finite, but its tile's other outputs would drown in its rounding error
        assert_rule(got, bar, oracle("conv_bn_act", tuple(args))[0])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e15])
def test_filters_that_could_overflow_are_left_to_onednn(value) -> None:
    args = list(make_args(winograd_problem()))
    args[1][args[2].abs().argmax(), 7, 1, 1] = value  # not where the scale is zero
    got, bar = find("cpu.winograd").fn(*args), eager("conv_bn_act", tuple(args))[0]
    assert same_nonfinite(got, bar)
    folded, bias = prepack.fold(*args[1:4], *args[5:8])
    assert cpu.winograd_filters(folded, bias, (), torch.Size()) is None


def test_a_plan_says_why_such_weights_go_elsewhere() -> None:
    model = resnet_fast.resnet18().eval()
    model.layer1[0].conv1.weight.data[0, 0, 0, 0] = torch.nan
    step = next(
        s
        for s in resnet_fast.plan(model, torch.randn(2, 3, 64, 64)).steps
        if s.name == "layer1.0.conv1"
    )
    assert step.kernel == "aten (oneDNN)" and "cpu.winograd cannot take these weights" in step.why


def test_a_nan_in_the_residual_stays_where_it_is() -> None:
    args = list(make_args(winograd_problem(residual="nhwc")))
    args[4][0, 3, 2, 1] = torch.nan
    got = find("cpu.winograd").fn(*args)
    assert got.isnan().sum() == 1 and got[0, 3, 2, 1].isnan()


@pytest.mark.parametrize(
    "n, c, h, w, k",
    [
        (1, 32, 30, 30, 96),
        (1, 64, 3, 3, 160),
        (3, 16, 17, 5, 32),
        (1, 256, 1, 1, 512),
        (1, 128, 28, 28, 128),
    ],
)
def test_the_number_of_threads_changes_no_byte(n, c, h, w, k) -> None:
    args = make_args(winograd_problem(n, c, h, w, k, residual="nhwc"))
    one = find("cpu.winograd").fn(*args)
    try:
        for threads in (2, 3, 5, 8, 16):
            torch.set_num_threads(threads)
            assert torch.equal(find("cpu.winograd").fn(*args), one), threads
    finally:
        torch.set_num_threads(1)


def test_avx2_obeys_the_rule_too() -> None:
    """In a new process: torch's variable picks the instructions once. 48 filters are whole panels of AVX2 only."""
    code = """if True:
        from resnet_fast.dispatch import find
        from resnet_fast.kernels import cpu_library
        from resnet_fast.testing.check import check_kernel
        import sys, torch; sys.path.insert(0, "tests/kernels/cpu")
        from test_cpu_choice import winograd_problem
        assert cpu_library.available() is None
        assert cpu_library.instructions() == "AVX2", cpu_library.instructions()
        for case in ((2, 32, 9, 6, 48), (1, 80, 5, 5, 16), (1, 64, 1, 3, 64)):
            verdict = check_kernel(find("cpu.winograd"), winograd_problem(*case, residual="nhwc"))
            assert verdict.ok, verdict.reason
            verdict = check_kernel(find("cpu.conv"), winograd_problem(*case, stride=(2, 2), bn=False))
            assert verdict.ok, verdict.reason
        assert "bfloat16" in find("cpu.conv").reason(winograd_problem(dtype=torch.bfloat16))
    """
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "ATEN_CPU_CAPABILITY": "avx2"}
    )


def test_a_processor_that_is_told_to_be_plain_runs_without() -> None:
    code = """if True:
        from resnet_fast.kernels import cpu_library
        assert "AVX2" in cpu_library.available()
        import resnet_fast, torch
        with torch.no_grad():
            resnet_fast.resnet18().eval()(torch.randn(1, 3, 32, 32))
    """
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env={**os.environ, "ATEN_CPU_CAPABILITY": "default"},
    )


DECLINED = {
    "stride": ({"stride": (2, 2)}, "stride 1"),
    "no padding": ({"padding": (0, 0)}, "padding 1"),
    "dilation": ({"dilation": (2, 2)}, "dilation"),
    "groups": ({"groups": 2, "weight": (64, 16, 3, 3)}, "groups"),
    "channels": ({"x": (1, 24, 4, 4), "weight": (64, 24, 3, 3)}, "16 channels"),
    "filters": ({"weight": (40, 32, 3, 3)}, "filters, got 40"),
    "NCHW": ({"layout": "nchw"}, "NHWC"),
    "empty": ({"x": (0, 32, 4, 4)}, "empty"),
    "half": ({"dtype": torch.float16}, "float16"),
    "cuda": ({"device": "cuda"}, "cuda"),
    "residual": ({"residual": "nchw"}, "nhwc and nchw"),
}


@pytest.mark.parametrize("change, sentence", DECLINED.values(), ids=DECLINED)
def test_it_says_what_it_declines(change, sentence) -> None:
    assert sentence in find("cpu.winograd").reason(winograd_problem(**change))


def test_it_is_chosen_where_it_was_measured_to_win() -> None:
    assert choose(winograd_problem())[0].id == "cpu.winograd"
    assert choose(winograd_problem(c=256, k=256, dtype=torch.bfloat16))[0].id == "cpu.winograd"
    assert choose(winograd_problem(c=512, k=512, dtype=torch.bfloat16))[0].id == BF16_SUM
    assert choose(winograd_problem(stride=(2, 2)))[0].id == "cpu.conv"
    assert (
        choose(winograd_problem(c=3, weight=(64, 3, 7, 7), stride=(2, 2), padding=(3, 3)))[0].id
        == "cpu.conv"
    )
    assert (
        choose(winograd_problem(weight=(64, 32, 5, 5), padding=(2, 2)))[0].id == "aten.conv_bn_act"
    )
    assert rejected(winograd_problem())["cpu.conv"] == "cpu.winograd goes first"
    assert (
        "other sizes than"
        in rejected(winograd_problem(weight=(64, 32, 5, 5), padding=(2, 2)))["cpu.conv"]
    )


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"c": 512, "k": 512},
        {"weight": (64, 32, 1, 1), "padding": (0, 0)},
        {"stride": (2, 2)},
        {"c": 3, "weight": (64, 3, 7, 7), "stride": (2, 2), "padding": (3, 3)},
    ],
)
def test_bfloat16_is_left_to_onednn_where_it_has_amx(monkeypatch, change) -> None:
    monkeypatch.setattr(cpu_library, "onednn_has_amx", lambda: True)
    monkeypatch.setattr(torch.ops.resnet_fast_cpu, "takes_bf16", lambda: True)
    problem = winograd_problem(**change, dtype=torch.bfloat16)
    assert choose(problem)[0].id == choose(problem, live=False)[0].id == "aten.conv_bn_act"
    assert any("AMX" in rejected(problem)[id] for id in ("cpu.winograd", "cpu.conv"))
    assert choose(winograd_problem(**change))[0].id.startswith("cpu.")  # float32


@pytest.mark.skipif(not TAKES_BF16, reason="this processor does not multiply bfloat16")
def test_a_bfloat16_network_runs_without_our_convolutions_where_onednn_has_amx(monkeypatch) -> None:
    monkeypatch.setattr(cpu_library, "onednn_has_amx", lambda: True)
    model, x = resnet_fast.resnet18().eval().bfloat16(), torch.randn(2, 3, 64, 64).bfloat16()
    planned = resnet_fast.plan(model, x)
    assert {step.kernel for step in planned.steps if step.op == "conv_bn_act"} == {"aten (oneDNN)"}
    with use("cpu.conv"):
        bar = model(x)
    assert_rule(planned(x), bar, resnet_fast.plan(model.double(), x.double())(x.double()))


@pytest.mark.parametrize(
    "problem, threads, chosen",
    [
        (winograd_problem(1, 512, 7, 7, 512), 4, "cpu.winograd"),
        (winograd_problem(1, 512, 7, 7, 512), 5, "cpu.conv"),
        (winograd_problem(2, 512, 7, 7, 512), 64, "cpu.winograd"),
        (winograd_problem(1, 256, 7, 7, 256), 64, "cpu.conv"),
        (winograd_problem(1, 256, 14, 14, 256), 64, "cpu.winograd"),
        (winograd_problem(1, 128, 7, 7, 128), 64, "cpu.winograd"),
    ],
)
def test_many_threads_do_not_wait_for_transformed_filters_of_a_few_pixels(
    monkeypatch, problem, threads, chosen
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert choose(problem, live=False)[0].id == chosen
    why_not_winograd = str(find("cpu.winograd").yields(problem, False))
    assert ("by a model, not a measurement" in why_not_winograd) is (chosen == "cpu.conv")


def test_live_weights_stay_within_two_copies() -> None:
    """At batch 1 transformed filters of many channels take more; a plan, which has no snapshot, uses them."""
    assert choose(winograd_problem(1, 128, 28, 28, 128))[0].id == "cpu.winograd"
    assert choose(winograd_problem(1, 256, 14, 14, 256))[0].id == "cpu.conv"
    assert "memory" in rejected(winograd_problem(1, 256, 14, 14, 256))["cpu.winograd"]
    model, x = resnet_fast.resnet18().eval(), torch.randn(1, 3, 64, 64)
    assert [step.kernel for step in resnet_fast.plan(model, x).steps].count("cpu.winograd") == 13


def test_the_models_run_it() -> None:
    model, x = (
        resnet_fast.resnet18().eval(),
        torch.randn(2, 3, 64, 64).contiguous(memory_format=NHWC),
    )
    with torch.inference_mode(), record() as choices:
        model(x)
    assert [c.kernel for c in choices].count("cpu.winograd") == 10
    steps = resnet_fast.plan(model, x).steps
    assert [step.kernel for step in steps].count("cpu.winograd") == 13


def test_an_infinity_passes_through_networks_as_in_eager() -> None:
    """Through a kept program and a plan, which were made for a finite input and go on being used afterwards."""
    model, x = resnet_fast.resnet18().eval(), torch.randn(2, 3, 64, 64)
    bad = x.clone()
    bad[1, :, 20:24] = torch.inf
    with torch.inference_mode():
        good = [model(x) for _ in range(4)][-1]
        planned = resnet_fast.plan(model, x)
        with use("aten.conv_bn_act"):
            bar = model(bad)
        assert same_nonfinite(model(bad), bar) and same_nonfinite(planned(bad), bar)
        assert torch.equal(model(x), good)


def test_a_default_device_elsewhere_changes_nothing() -> None:
    model, x = resnet_fast.resnet18().eval(), torch.randn(2, 3, 64, 64)
    planned = resnet_fast.plan(model, x)
    bottleneck = [
        make_args(winograd_problem()),
        make_args(winograd_problem(weight=(64, 32, 1, 1), padding=(0, 0))),
    ]
    with torch.device("meta"):
        assert planned(x).device.type == "cpu"
        for args in bottleneck:
            assert select("conv_bn_act", args, lambda *_: None)(*args).device.type == "cpu"


def test_a_nan_passes_through_a_plan_where_onednn_has_no_bfloat16(monkeypatch) -> None:
    """As on a processor with AVX2 alone, where what Winograd leaves cannot go to oneDNN's packed convolution."""

    def nothing(*args):
        raise RuntimeError(
            "bf16 path needs the cpu support avx_ne_convert or avx512bw, avx512vl and avx512dq"
        )

    model, x = resnet_fast.resnet18().eval().bfloat16(), torch.randn(1, 3, 64, 64).bfloat16()
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_convolution_weight", nothing)
    planned = resnet_fast.plan(model, x)
    assert "cpu.winograd" in [step.kernel for step in planned.steps]
    x[0, 1, 20, 20] = torch.nan
    with torch.inference_mode(), use("aten.conv_bn_act"):
        bar = model(x)
    assert same_nonfinite(planned(x), bar)


@pytest.mark.parametrize("size", [1, 3])
def test_a_plan_adds_a_residual_of_another_dtype_as_eager_does(size) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = (
                torch.nn.Conv2d(32, 32, size, padding=size // 2, bias=False),
                torch.nn.BatchNorm2d(32),
            )

        def forward(self, x):
            return torch.relu(self.bn(self.conv(x)) + x.float())

    model, x = Model().eval().bfloat16(), torch.randn(2, 32, 5, 5).bfloat16()
    with torch.inference_mode():
        planned, bar = resnet_fast.plan(model, x)(x), model(x)
    assert planned.dtype == bar.dtype
    assert_rule(planned, bar, Model.forward(model.double(), x.double()))


def test_a_library_of_other_sources_is_not_used(monkeypatch) -> None:
    """Else what it lacks would be missed in the middle of a forward."""
    cpu_library.available.cache_clear()
    monkeypatch.setitem(cpu_library.SCHEMAS, "pointwise", "(Tensor x, int new) -> ()")
    try:
        said = cpu_library.available()
        assert "was built from other sources" in said and cpu_library.BUILD in said
        assert choose(winograd_problem())[0].id == "aten.conv_bn_act"
    finally:
        monkeypatch.undo()
        cpu_library.available.cache_clear()


def test_a_library_that_went_missing_is_not_explained_by_its_build(monkeypatch, tmp_path) -> None:
    (tmp_path / "_build.json").write_text('{"cpu": "built", "cpu_why": "c++ works"}')
    monkeypatch.setattr(cpu_library, "PACKAGE", tmp_path)
    monkeypatch.setattr(cpu_library, "RECORD", tmp_path / "_build.json")
    said = cpu_library.available.__wrapped__()
    assert f"not in {tmp_path}" in said and "works" not in said


def test_an_edited_weight_is_transformed_anew() -> None:
    args = list(make_args(winograd_problem()))
    before = find("cpu.winograd").fn(*args)
    args[1].data[3] *= 2
    after = find("cpu.winograd").fn(*args)
    assert not torch.equal(before[:, 3], after[:, 3])
    assert_rule(after, eager("conv_bn_act", tuple(args))[0], oracle("conv_bn_act", tuple(args))[0])


def test_strides_of_the_result_are_eagers() -> None:
    for h, w in ((5, 4), (1, 1)):
        args = make_args(winograd_problem(2, 32, h, w))
        assert find("cpu.winograd").fn(*args).stride() == aten.conv_bn_act(*args).stride()


REFUSED = {
    "dtype": (
        lambda a: a | {"x": a["x"].half()},
        "got x of dtype Half, expected Float or BFloat16",
    ),
    "layout": (lambda a: a | {"x": a["x"].contiguous()}, "expected channels_last"),
    "filters": (
        lambda a: a | {"x": torch.cat((a["x"], a["x"]), 1).contiguous(memory_format=NHWC)},
        "expected those of winograd_filters",
    ),
    "bias": (lambda a: a | {"bias": a["bias"][:-1]}, "expected Float [64]"),
    "out": (lambda a: a | {"out": a["out"][:1]}, "expected [2, 64, 9, 6]"),
    "residual": (lambda a: a | {"residual": a["out"][:, :, 1:]}, "expected out's shape"),
}


@pytest.mark.parametrize("change, sentence", REFUSED.values(), ids=REFUSED)
def test_the_op_refuses_in_one_sentence(change, sentence) -> None:
    args = {
        "x": torch.randn(2, 32, 9, 6).contiguous(memory_format=NHWC),
        "bias": torch.zeros(64),
        "residual": None,
        "filters": torch.ops.resnet_fast_cpu.winograd_filters(torch.randn(64, 32, 3, 3)),
        "out": torch.empty(2, 64, 9, 6).contiguous(memory_format=NHWC),
        "relu": True,
    }
    with pytest.raises(RuntimeError) as refusal:
        torch.ops.resnet_fast_cpu.winograd(**change(args))
    assert str(refusal.value).startswith("winograd: got") and sentence in str(refusal.value)
