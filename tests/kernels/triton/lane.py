"""The interpreter lane itself: Triton's kernels against float64 on the CPU. ``test_triton_configs.py`` runs it."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from triton_shapes import gemm

from resnet_fast import use
from resnet_fast.dispatch.problem import Problem
from resnet_fast.dispatch.registry import find
from resnet_fast.kernels.triton import bn_act, bn_act_backward, conv, launch, pointwise
from resnet_fast.kernels.triton.gemm_config import Gemm, GemmConfig, gemm_config
from resnet_fast.kernels.triton.rows_config import MergeConfig, RowsConfig
from resnet_fast.models.blocks import Bottleneck
from resnet_fast.testing.check import check_kernel, oracle
from resnet_fast.testing.eager import eager
from resnet_fast.testing.grids import nasty_problems
from resnet_fast.testing.rule import assert_rule, same_nonfinite
from resnet_fast.testing.samples import make_args

assert launch.INTERPRETED, (
    "this file needs TRITON_INTERPRET=1; pytest tests/test_triton_configs.py sets it"
)

KERNELS = (
    "triton.conv",
    "triton.pointwise",
    "triton.add_act",
    "triton.add_act_backward",
    "triton.bn_act",
    "triton.bn_act_backward",
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def grid() -> list:
    """(kernel, problem) for every kernel, dtype and nasty problem that is in NHWC and that the kernel takes."""
    cases = []
    for id, dtype in itertools.product(KERNELS, DTYPES):
        for problem in nasty_problems(find(id).op, dtype):
            takes = id != "triton.pointwise" or problem.pointwise
            if problem.layout == "nhwc" and takes:
                cases.append(pytest.param(id, problem, id=f"{id}-{problem.key}"))
    return cases


@pytest.mark.parametrize("id, problem", grid())
def test_nasty_grid(id: str, problem: Problem) -> None:
    kernel = find(id)
    assert kernel.reason(problem) is None
    verdict = check_kernel(kernel, problem)
    assert verdict.ok, verdict.reason


# ---------------------------------------------------------------- configs that the small problems do not get


def problem(x, weight, dtype=torch.float16, **rest) -> Problem:
    return Problem(
        op="conv_bn_act",
        device="cpu",
        dtype=dtype,
        x=x,
        layout="nhwc",
        weight=weight,
        **{"bn": True, "act": "relu", "residual": "nhwc", **rest},
    )


# GemmConfig(block_m, block_n, block_k, split_k, warps, stages)
POINTWISE = {
    "several tiles, tails in all": (
        problem((3, 75, 5, 7), (50, 75, 1, 1)),
        GemmConfig(32, 16, 32, 1, 4, 2),
    ),
    "strided, several tiles": (
        problem((2, 64, 9, 7), (48, 64, 1, 1), stride=(2, 2)),
        GemmConfig(16, 32, 32, 1, 4, 2),
    ),
    "split-K, even": (problem((1, 128, 3, 3), (24, 128, 1, 1)), GemmConfig(16, 16, 32, 4, 4, 2)),
    "split-K, one block with a tail, one with nothing": (
        problem((2, 75, 3, 3), (24, 75, 1, 1)),
        GemmConfig(16, 16, 16, 4, 4, 2),
    ),
    "split-K in float32": (
        problem((2, 75, 3, 3), (24, 75, 1, 1), torch.float32),
        GemmConfig(16, 16, 16, 2, 4, 2),
    ),
}
CONV = {
    "several tiles, tails in all": (
        problem((2, 20, 7, 5), (40, 20, 3, 3), padding=(1, 1)),
        GemmConfig(16, 32, 16, 1, 4, 2),
    ),
    "whole blocks, unmasked filters": (
        problem((1, 32, 6, 5), (32, 32, 3, 3), padding=(1, 1)),
        GemmConfig(16, 32, 32, 1, 4, 2),
    ),
    "split-K across taps": (
        problem((1, 32, 5, 5), (16, 32, 3, 3), padding=(1, 1)),
        GemmConfig(32, 16, 32, 4, 4, 2),
    ),
    "split-K, the last block past the last tap": (
        problem((1, 20, 5, 5), (16, 20, 3, 3), padding=(1, 1)),
        GemmConfig(32, 16, 16, 4, 4, 2),
    ),
    "uneven geometry": (
        problem(
            (2, 8, 11, 9),
            (24, 8, 5, 3),
            stride=(2, 3),
            padding=(3, 0),
            dilation=(1, 2),
            residual=None,
        ),
        GemmConfig(32, 32, 16, 1, 4, 2),
    ),
    "uneven geometry, channels in blocks": (
        problem((2, 20, 11, 9), (24, 20, 3, 5), stride=(3, 2), padding=(0, 3), dilation=(2, 1)),
        GemmConfig(32, 32, 32, 1, 4, 2),
    ),
    "flat, split-K": (
        problem((1, 3, 13, 11), (20, 3, 7, 7), stride=(2, 2), padding=(3, 3)),
        GemmConfig(32, 16, 16, 2, 4, 2),
    ),
    "groups that straddle tiles": (
        problem((1, 24, 5, 4), (36, 8, 3, 3), padding=(1, 1), groups=3),
        GemmConfig(32, 16, 16, 1, 4, 2),
    ),
    "many groups in a tile, split-K": (
        problem((1, 48, 5, 4), (48, 4, 3, 3), padding=(1, 1), groups=12),
        GemmConfig(32, 32, 16, 2, 4, 2),
    ),
    "depthwise": (
        problem((1, 40, 5, 4), (40, 1, 3, 3), padding=(1, 1), groups=40),
        GemmConfig(32, 16, 16, 1, 4, 2),
    ),
}


@pytest.mark.parametrize("case", POINTWISE)
def test_pointwise_configs(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, config = POINTWISE[case]
    monkeypatch.setattr(pointwise, "gemm_config", lambda g: config)
    verdict = check_kernel(find("triton.pointwise"), problem)
    assert verdict.ok, verdict.reason


@pytest.mark.parametrize("case", CONV)
def test_conv_configs(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, config = CONV[case]
    monkeypatch.setattr(conv, "gemm_config", lambda g: config)
    verdict = check_kernel(find("triton.conv"), problem)
    assert verdict.ok, verdict.reason


def _small_tiles(monkeypatch: pytest.MonkeyPatch, config: RowsConfig, merge: MergeConfig) -> None:
    for module in (bn_act, bn_act_backward):
        monkeypatch.setattr(module, "rows_config", lambda *_: config)
        monkeypatch.setattr(module, "merge_config", lambda *_: merge)


@pytest.mark.parametrize("op", ["bn_act", "bn_act_backward"])
def test_batch_norm_merges_many_partials(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """75 rows: 5 blocks of two tiles of 8, the last block's second tile empty; merged 2 at a time, the last alone."""
    _small_tiles(monkeypatch, RowsConfig(8, 8, 2, 5), MergeConfig(2, 4, 3))
    case = Problem(
        op=op,
        device="cpu",
        dtype=torch.float32,
        x=(3, 10, 5, 5),
        layout="nhwc",
        act="relu",
        residual="nhwc",
    )
    verdict = check_kernel(find(f"triton.{op}"), case)
    assert verdict.ok, verdict.reason


@pytest.mark.parametrize(
    "config", [RowsConfig(4, 8, 10, 4), RowsConfig(4, 8, 1, 38)], ids=["tiles", "blocks"]
)
def test_variance_survives_a_large_mean(
    config: RowsConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At μ = 1000σ, E[x²] − μ² in float32 would lose all of σ², and partial means rounded at 1000 some digits."""
    _small_tiles(monkeypatch, config, MergeConfig(16, 8, 3))
    x = (torch.randn(3, 6, 5, 10) + 1000).contiguous(memory_format=torch.channels_last)
    args = (x, torch.randn(6), torch.randn(6), None, 1e-5, "none")
    outputs = zip(
        ("y", "mean", "var"),
        find("triton.bn_act").fn(*args),
        eager("bn_act", args),
        oracle("bn_act", args),
        strict=True,
    )
    for name, got, low, true in outputs:
        assert_rule(got, low, true, what=name)


# ---------------------------------------------------------------- NaN and infinity


def _poke(x: torch.Tensor, *values: float) -> None:
    """Put values at spread places of an NHWC tensor."""
    flat = x.permute(0, 2, 3, 1).view(-1)
    for i, value in enumerate(values):
        flat[(2 * i + 1) * flat.numel() // (2 * len(values) + 1)] = value


@pytest.mark.parametrize(
    "id, groups", [("triton.pointwise", 1), *(("triton.conv", groups) for groups in (1, 2, 8))]
)
def test_convolution_passes_nan_and_infinity_on_as_eager(id: str, groups: int) -> None:
    r = 1 if id == "triton.pointwise" else 3
    pad = (r // 2, r // 2)
    args = make_args(
        problem((2, 32, 6, 5), (32, 32 // groups, r, r), torch.float32, padding=pad, groups=groups)
    )
    _poke(args[0], float("inf"), float("nan"), -float("inf"))
    _poke(args[4], float("nan"), float("inf"))
    assert same_nonfinite(find(id).fn(*args), eager("conv_bn_act", args)[0])


@pytest.mark.parametrize(
    "op, poked, gate",
    [
        ("add_act", (0, 1), False),
        ("add_act", (0, 1), True),
        ("add_act_backward", (0, 1), False),
        ("add_act_backward", (0, 1, 2), True),
        ("bn_act", (0,), False),
        ("bn_act", (3,), False),
        ("bn_act_backward", (0, 2), False),
    ],
)
def test_pointwise_ops_pass_nan_and_infinity_on_as_eager(
    op: str, poked: tuple[int, ...], gate: bool
) -> None:
    args = make_args(
        Problem(
            op=op,
            device="cpu",
            dtype=torch.float32,
            x=(2, 9, 4, 5),
            layout="nhwc",
            act="relu",
            residual="nhwc",
            gate=gate,
        )
    )
    for i in poked:
        _poke(args[i], float("nan"), float("inf"), -float("inf"))
    outputs = find(f"triton.{op}").fn(*args)
    for got, low in zip(
        outputs if isinstance(outputs, tuple) else (outputs,), eager(op, args), strict=True
    ):
        assert same_nonfinite(got, low)


# ---------------------------------------------------------------- contracts around the arithmetic


def _laid(shape: tuple[int, ...], memory_format: torch.memory_format) -> torch.Tensor:
    """Random values with the format's own strides, even where torch would call another tensor of that shape fit."""
    n, c, h, w = shape
    strides = (
        (c * h * w, h * w, w, 1)
        if memory_format == torch.contiguous_format
        else (c * h * w, 1, w * c, c)
    )
    return torch.empty_strided(shape, strides).copy_(torch.randn(shape))


FORMATS = (torch.contiguous_format, torch.channels_last)
# One channel, or one pixel: NHWC and NCHW at once. Then one filter, and the plain case in NHWC.
AMBIGUOUS = [
    ((2, 1, 5, 4), (6, 1, 3, 3), *formats) for formats in itertools.product(FORMATS, FORMATS)
]
AMBIGUOUS += [
    ((2, 8, 1, 1), (4, 8, 1, 1), *formats) for formats in itertools.product(FORMATS, FORMATS)
]
AMBIGUOUS += [
    ((1, 8, 3, 3), (k, 8, 3, 3), torch.channels_last, format)
    for k, format in itertools.product((1, 4), FORMATS)
]


@pytest.mark.parametrize("x, weight, x_format, weight_format", AMBIGUOUS)
def test_result_strides_are_those_of_conv2d(x, weight, x_format, weight_format) -> None:
    x, weight, pad = _laid(x, x_format), _laid(weight, weight_format), (weight[2] // 2,) * 2
    scale = torch.ones(weight.shape[0])
    out = find("triton.conv").fn(
        x, weight, scale, 0 * scale, None, None, None, 0.0, (1, 1), pad, (1, 1), 1, "none"
    )
    want = F.conv2d(x, weight, padding=pad)
    assert out.stride() == want.stride()
    torch.testing.assert_close(out, want)


def test_parameters_may_be_strided_narrow_and_laid_out_otherwise() -> None:
    """A filter in KCRS order, vectors with gaps, vectors in half precision: right all the same."""
    args = list(make_args(problem((2, 12, 6, 5), (10, 12, 3, 3), torch.float32, padding=(1, 1))))
    plain = find("triton.conv").fn(*args)
    args[1] = args[1].contiguous()
    args[2:4] = [torch.stack([v, v], 1)[:, 0] for v in args[2:4]]
    torch.testing.assert_close(find("triton.conv").fn(*args), plain, rtol=0, atol=0)
    args[2] = args[2].half()
    wide = (*args[:2], args[2].float(), *args[3:])
    torch.testing.assert_close(
        find("triton.conv").fn(*args), find("triton.conv").fn(*wide), rtol=0, atol=0
    )


@pytest.mark.parametrize("residual", [False, True])
def test_gradients_may_come_in_any_layout(residual: bool) -> None:
    """dy and y are no part of the Problem unless there is a residual: then NCHW gradients must be taken."""
    args = make_args(
        Problem(
            op="bn_act_backward",
            device="cpu",
            dtype=torch.float32,
            x=(2, 6, 4, 5),
            layout="nhwc",
            act="relu",
            residual="nhwc" if residual else None,
        )
    )
    want = find("triton.bn_act_backward").fn(*args)
    got = find("triton.bn_act_backward").fn(
        args[0].contiguous(), args[1], args[2].contiguous(), *args[3:]
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert got[0].stride() == args[1].stride()
    assert not residual or got[3].is_contiguous()


def test_saved_input_of_a_gate_may_be_nchw() -> None:
    args = list(
        make_args(
            Problem(
                op="add_act_backward",
                device="cpu",
                dtype=torch.float32,
                x=(2, 6, 4, 5),
                layout="nhwc",
                act="relu",
                residual="nhwc",
                gate=True,
            )
        )
    )
    want = find("triton.add_act_backward").fn(*args)
    args[2] = args[2].contiguous()
    for a, b in zip(find("triton.add_act_backward").fn(*args), want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_batch_norm_of_an_empty_batch() -> None:
    """No rows: NaN statistics and zero parameter gradients, as the reference."""
    x, w = torch.empty(0, 6, 4, 5).contiguous(memory_format=torch.channels_last), torch.ones(6)
    y, mean, var = find("triton.bn_act").fn(x, w, w, None, 1e-5, "relu")
    assert y.shape == x.shape and mean.isnan().all() and var.isnan().all()
    dx, dweight, dbias, dresidual = find("triton.bn_act_backward").fn(
        y, x, y, w, mean, var, 1e-5, "relu", True
    )
    assert dx.shape == dresidual.shape == x.shape
    assert not dweight.any() and not dbias.any() and dweight.shape == (6,)


def test_no_output_aliases_an_input() -> None:
    """An op's output must not be its input, not even where nothing is to be computed."""
    args = make_args(
        Problem(
            op="add_act_backward",
            device="cpu",
            dtype=torch.float32,
            x=(1, 4, 3, 3),
            layout="nhwc",
            act="none",
            residual="nhwc",
        )
    )
    assert find("triton.add_act_backward").fn(*args)[0].data_ptr() != args[0].data_ptr()


def test_the_host_asks_for_the_config_of_its_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """The product that a kernel asks a config for is the one its Problem says, so that explain and tuner speak of
    what runs.
    """
    asked = []

    def note(g: Gemm, config: Callable = gemm_config) -> GemmConfig:
        asked.append(g)
        return config(g)

    grouped = problem((1, 16, 7, 5), (8, 8, 3, 3), stride=(2, 1), padding=(1, 0), groups=2)
    strided = problem((1, 16, 7, 5), (8, 16, 1, 1), stride=(2, 2), residual=None)
    for module, id, case in (
        (conv, "triton.conv", grouped),
        (pointwise, "triton.pointwise", strided),
    ):
        monkeypatch.setattr(module, "gemm_config", note)
        find(id).fn(*make_args(case))
        assert asked.pop() == gemm(case)


def test_a_bottleneck_trains_and_infers_through_dispatch() -> None:
    """Blocks → ops → dispatch → kernels, forward and backward, with every kernel that a bottleneck needs forced."""
    down = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
    block = Bottleneck(8, 4, 2, down).to(memory_format=torch.channels_last)
    x, cotangent = (
        torch.randn(s).contiguous(memory_format=torch.channels_last)
        for s in ((2, 8, 6, 5), (2, 16, 3, 3))
    )

    def run(dtype: torch.dtype) -> list[torch.Tensor]:
        net, given = copy.deepcopy(block).to(dtype), x.to(dtype, copy=True).requires_grad_()
        out = net(given)
        out.backward(cotangent.to(dtype))
        with torch.no_grad():
            inferred = net.eval()(given)
        statistics = [b for b in net.buffers() if b.dim()]
        return [
            out.detach(),
            inferred,
            given.grad,
            *(p.grad for p in net.parameters()),
            *statistics,
        ]

    with use("triton.bn_act", "triton.bn_act_backward", "triton.conv", strict=True):
        got = run(torch.float32)
    for mine, low, true in zip(got, run(torch.float32), run(torch.float64), strict=True):
        assert_rule(mine, low, true, gradient=True)
