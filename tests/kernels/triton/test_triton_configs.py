"""Configs and refusals of the Triton kernels as pure functions: nothing is compiled, no device is asked."""

from __future__ import annotations

import dataclasses
from math import ceil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton", reason="no Triton on this platform")

from triton_interpreter import run_lane
from triton_shapes import gemm

from resnet_fast.dispatch.problem import Problem
from resnet_fast.dispatch.registry import find, kernels
from resnet_fast.kernels.triton import launch
from resnet_fast.kernels.triton.gemm_config import (
    CHIPS,
    Gemm,
    GemmConfig,
    chip,
    gemm_config,
    gemm_configs,
    predicted_ns,
    registers,
    span,
)
from resnet_fast.kernels.triton.rows_config import merge_config, rows_config
from resnet_fast.models.problems import model_problems

MODELS = ("resnet50", "resnext50_32x4d")
sizes = st.integers(1, 4096)


def resnet(
    capability: tuple[int, int], batch: int, dtype=torch.bfloat16, model: str = "resnet50"
) -> list[Problem]:
    return model_problems(model, batch, 224, dtype, "cuda", capability)


@pytest.mark.parametrize("capability", CHIPS, ids=lambda c: f"sm_{c[0]}{c[1]}")
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_config_fits_its_chip(
    model: str, dtype: torch.dtype, capability: tuple[int, int]
) -> None:
    for batch in (1, 256):
        for problem in resnet(capability, batch, dtype, model):
            g = gemm(problem)
            for c in gemm_configs(g):
                assert c.shared(g.itemsize) <= chip(capability).shared
                assert registers(g, c) <= 255
                assert c.num_warps in (4, 8) and min(c.block_m, c.block_n, c.block_k) >= 16
                assert all(size & (size - 1) == 0 for size in (c.block_m, c.block_n, c.block_k))


def test_shared_memory_decides_where_chips_differ() -> None:
    """The same product gets deeper or larger tiles on a chip with more shared memory, and never more than there is."""
    g = Gemm(50176, 256, 256, 9, capability=(8, 0))
    small, large = (
        max(c.shared(2) for c in gemm_configs(dataclasses.replace(g, capability=at)))
        for at in ((8, 9), (8, 0))
    )
    assert small <= 99 * 1024 < large <= 163 * 1024


def test_the_answer_is_pure(monkeypatch: pytest.MonkeyPatch) -> None:
    """No device is asked, nothing is remembered: a fresh computation gives the same, and a config cannot be edited."""

    def asked(*args):
        raise AssertionError("a heuristic asked the device")

    for name in (
        "get_device_capability",
        "get_device_properties",
        "is_available",
        "current_device",
    ):
        monkeypatch.setattr(torch.cuda, name, asked)
    problems = resnet((9, 0), 7)
    before = [gemm_config(gemm(p)) for p in problems]
    gemm_configs.cache_clear()
    assert [gemm_config(gemm(p)) for p in reversed(problems)] == before[::-1]
    with pytest.raises(dataclasses.FrozenInstanceError):
        before[0].block_m = 1


def test_the_best_predicted_config_is_taken() -> None:
    for problem in resnet((9, 0), 32):
        g = gemm(problem)
        assert predicted_ns(g, gemm_config(g)) == min(predicted_ns(g, c) for c in gemm_configs(g))


def test_waves_count() -> None:
    """One tile more than fills every SM evenly costs a whole round; tiles within a round cost nothing."""
    c = GemmConfig(128, 128, 64, 1, 8, 4)
    sms = CHIPS[9, 0].sms
    full, over, under = (
        predicted_ns(Gemm(128 * tiles, 128, 1024, capability=(9, 0)), c)
        for tiles in (sms, sms + 1, sms - 9)
    )
    assert under == full < 0.6 * over


def test_small_batches_split_k_and_large_ones_do_not() -> None:
    """At batch 1 layer4 has fewer tiles than an H200 has SMs: 4608 products a result are shared out."""

    def layer4(batch: int) -> Gemm:
        return Gemm(49 * batch, 512, 512, 9, capability=(9, 0))

    one, many = gemm_config(layer4(1)), gemm_config(layer4(256))
    assert one.split_k > 1 and many.split_k == 1
    blocks = ceil(49 / one.block_m) * ceil(512 / one.block_n) * one.split_k
    assert blocks > CHIPS[9, 0].sms / 2
    assert all(gemm_config(gemm(p)).split_k == 1 for p in resnet((8, 0), 256))


def test_hopper_tiles_suit_wgmma() -> None:
    """64 rows are the least that wgmma takes; fewer would fall back to mma.sync."""
    for at, batch in (((9, 0), 1), ((9, 0), 256), ((10, 0), 1)):
        assert all(gemm_config(gemm(p)).block_m >= 64 for p in resnet(at, batch))


def test_an_unlisted_chip_is_taken_for_the_nearest_older() -> None:
    for unlisted, older in (
        ((8, 7), (8, 6)),
        ((9, 9), (9, 0)),
        ((10, 3), (10, 0)),
        ((13, 0), (12, 0)),
    ):
        assert chip(unlisted) is CHIPS[older]


@given(
    per_group=st.integers(1, 9),
    filters=st.integers(1, 40),
    groups=st.integers(1, 9),
    block=st.sampled_from([16, 32, 64]),
)
def test_span_covers_every_channel_a_tile_needs(
    per_group: int, filters: int, groups: int, block: int
) -> None:
    """Against counting: the groups of a tile's first and last filter."""
    g = Gemm(100, groups * filters, groups * per_group, 9, groups)
    tiles = [(first, min(first + block, g.n) - 1) for first in range(0, g.n, block)]
    for first, last in tiles:
        needed = (last // filters + 1) * per_group - first // filters * per_group
        assert needed <= span(g, block) <= g.channels


@given(
    m=st.integers(1, 10**7),
    channels=sizes,
    itemsize=st.sampled_from([2, 4]),
    at=st.sampled_from([None, *CHIPS]),
)
def test_reducing_blocks_cover_every_row_once_and_none_is_idle(
    m: int, channels: int, itemsize: int, at
) -> None:
    c = rows_config(m, channels, itemsize, at)
    rows = c.trips * c.block_m
    assert (c.partials - 1) * rows < m <= c.partials * rows
    assert c.block_m * c.block_c * itemsize <= 8 * 1024
    merge = merge_config(c.partials, channels)
    assert (merge.trips - 1) * merge.rows < c.partials <= merge.trips * merge.rows


# ---------------------------------------------------------------- refusals


def nhwc(**changes) -> Problem:
    return Problem(
        **{
            "op": "conv_bn_act",
            "device": "cuda",
            "dtype": torch.float16,
            "x": (2, 8, 7, 7),
            "layout": "nhwc",
            "weight": (8, 8, 1, 1),
            "capability": (9, 0),
            **changes,
        }
    )


REFUSALS = {
    "float16 and bfloat16, not float64": {"dtype": torch.float64},
    "not on cpu": {"device": "cpu", "capability": None},
    "this GPU has 7.5": {"capability": (7, 5)},
    "the input is nchw": {"layout": "nchw"},
    "the input is strided": {"layout": "strided"},
    "the second one is nchw": {"residual": "nchw"},
    "more than 2³¹ pixels": {"x": (2**17, 8, 2**7, 2**7)},
    "an image or filter of more than 2³¹": {
        "x": (1, 2**12, 2**10, 2**10),
        "weight": (8, 2**12, 1, 1),
    },
}


@pytest.mark.parametrize("sentence", REFUSALS)
@pytest.mark.parametrize("id", ["triton.conv", "triton.pointwise"])
def test_a_declined_problem_names_the_reason(id: str, sentence: str) -> None:
    assert find(id).supports(nhwc()) is None
    assert sentence in find(id).supports(nhwc(**REFUSALS[sentence]))


NOT_A_PRODUCT = (
    {"weight": (8, 8, 3, 3)},
    {"padding": (1, 1)},
    {"groups": 2, "weight": (8, 4, 1, 1)},
)


@pytest.mark.parametrize("changes", NOT_A_PRODUCT)
def test_pointwise_is_for_plain_1x1(changes: dict) -> None:
    assert "1×1 filters, no padding, one group" in find("triton.pointwise").supports(
        nhwc(**changes)
    )
    assert find("triton.conv").supports(nhwc(**changes)) is None


def test_a_filter_larger_than_the_image_is_left_to_eagers_error() -> None:
    assert "larger than the padded input" in find("triton.conv").supports(nhwc(weight=(8, 8, 9, 9)))


def test_more_than_2_31_elements_are_no_reason_to_decline() -> None:
    assert (
        find("triton.conv").supports(nhwc(x=(2**10, 256, 2**7, 2**7), weight=(8, 256, 1, 1)))
        is None
    )


def test_why_triton_cannot_run_here(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(launch.torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in launch.available()
    monkeypatch.setattr(launch.torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(launch.shutil, "which", lambda name: None)
    assert "C compiler" in launch.available()
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(launch.sysconfig, "get_path", lambda name: str(tmp_path / "python"))
    assert "install Python's headers" in launch.available()
    monkeypatch.setenv("CPATH", f"{tmp_path / 'a'}:{tmp_path / 'b'}")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "Python.h").touch()
    assert launch.available() is None


def test_the_family_is_registered() -> None:
    ours = {k.id: k.op for k in kernels() if k.id.startswith("triton.")}
    assert ours == {
        "triton.conv": "conv_bn_act",
        "triton.pointwise": "conv_bn_act",
        "triton.conv_tma": "conv_bn_act",
        "triton.pointwise_tma": "conv_bn_act",
        **{
            f"triton.{op}": op
            for op in ("pointwise_pair", "conv_tail", "conv_pool", "pointwise_pool")
        },
        "triton.pointwise_pair_tma": "pointwise_pair",
        **{
            f"triton.{op}": op
            for op in ("add_act", "add_act_backward", "bn_act", "bn_act_backward")
        },
    }


def test_interpreter_lane() -> None:
    run_lane("lane")
