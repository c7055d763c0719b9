"""The kernels that end in a pooling, without a GPU: their configs, what they decline, their machine code."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="no Triton on this platform")

from triton_ahead import TENSOR, Cubin, ahead, assert_nothing_spilled, cubins
from triton_interpreter import run_lane
from triton_shapes import head_of, stem_of

from resnet_fast.dispatch.problem import Problem
from resnet_fast.dispatch.registry import find
from resnet_fast.kernels.triton import pool_config
from resnet_fast.kernels.triton.gemm_config import CHIPS
from resnet_fast.kernels.triton.pool_config import SLOTS, HeadConfig, StemConfig

HOPPER = (9, 0)


def head(
    batch: int = 8,
    at: tuple[int, int] | None = HOPPER,
    dtype: torch.dtype = torch.bfloat16,
    **changes,
) -> Problem:
    """ResNet-50's head at 224²."""
    return Problem(
        **{
            "op": "pointwise_pool",
            "device": "cuda",
            "dtype": dtype,
            "x": (batch, 512, 7, 7),
            "layout": "nhwc",
            "weight": (2048, 512, 1, 1),
            "residual": "nhwc",
            "act": "relu",
            "capability": at,
            **changes,
        }
    )


# ---------------------------------------------------------------- the head's configs


@pytest.mark.parametrize("at", CHIPS, ids=lambda c: f"sm_{c[0]}{c[1]}")
def test_every_head_fits_its_chip(at: tuple[int, int]) -> None:
    for batch, dtype in itertools.product((1, 8, 37, 256), (torch.bfloat16, torch.float32)):
        h = head_of(head(batch, at, dtype))
        for c in pool_config.head_configs(h):
            assert c.shared(h.itemsize) <= CHIPS[at].shared
            assert 1 <= c.images <= min(batch, SLOTS)


def test_the_best_head_is_pure_and_wastes_few_rows() -> None:
    """Five images of 49 pixels in 256 rows, thirteen in 640; a large map goes alone, an empty batch too."""
    problems = [head(256), head(1), head(256, dtype=torch.float32), head(64, x=(64, 512, 10, 10))]
    before = [pool_config.head_config(head_of(p)) for p in problems]
    pool_config.head_configs.cache_clear()
    assert [pool_config.head_config(head_of(p)) for p in reversed(problems)] == before[::-1]
    many = before[0]
    assert many.images * 49 >= 0.95 * -(-many.images * 49 // many.block_m) * many.block_m
    assert (
        before[1].images == 1
        and pool_config.head_config(head_of(head(8, x=(8, 512, 100, 100)))).images == 1
    )
    assert pool_config.head_config(head_of(head(0, x=(0, 512, 7, 7)))).images == 1


def test_the_heads_time_counts_waves_rows_and_bytes() -> None:
    c = HeadConfig(5, 128, 128, 64, 8, 4)

    def ns(batch: int, config: HeadConfig = c) -> float:
        return pool_config.head_ns(head_of(head(batch)), config)

    assert ns(40) == ns(36) < 0.6 * ns(45)  # sixteen filter tiles: eight groups fill 128 of 132 SMs
    assert ns(40) < ns(40, replace(c, block_k=32)) and ns(40, replace(c, images=6)) > 1.4 * ns(40)


# ---------------------------------------------------------------- the stem's configs


def stem(
    batch: int = 8,
    at: tuple[int, int] | None = HOPPER,
    dtype: torch.dtype = torch.bfloat16,
    **changes,
) -> Problem:
    """The stem of every ResNet at 224²."""
    return Problem(
        **{
            "op": "conv_pool",
            "device": "cuda",
            "dtype": dtype,
            "x": (batch, 3, 224, 224),
            "layout": "nhwc",
            "weight": (64, 3, 7, 7),
            "stride": (2, 2),
            "padding": (3, 3),
            "act": "relu",
            "capability": at,
            **changes,
        }
    )


@pytest.mark.parametrize("at", CHIPS, ids=lambda c: f"sm_{c[0]}{c[1]}")
def test_every_stem_fits_its_chip(at: tuple[int, int]) -> None:
    for batch, dtype, channels in itertools.product(
        (1, 256), (torch.bfloat16, torch.float32), (3, 4)
    ):
        s = stem_of(
            stem(batch, at, dtype, x=(batch, channels, 224, 224), weight=(64, channels, 7, 7))
        )
        assert {c.rows for c in pool_config.stem_configs(s)} == set(range(1, 57))
        assert all(c.shared(s) <= CHIPS[at].shared for c in pool_config.stem_configs(s))


def test_the_best_stem_is_pure_and_keeps_every_sm_at_work() -> None:
    problems = [
        stem(1),
        stem(8),
        stem(256),
        stem(8, bytes=True),
        stem(8, (8, 0)),
        stem(8, dtype=torch.float32),
    ]
    before = [pool_config.stem_config(stem_of(p)) for p in problems]
    pool_config.stem_configs.cache_clear()
    assert [pool_config.stem_config(stem_of(p)) for p in reversed(problems)] == before[::-1]
    assert before[0].rows == 1 and before[0].rows < before[1].rows < before[2].rows
    assert [c.resident for c in before] == [True, True, True, True, False, False]


def test_a_slot_reads_what_both_its_columns_need() -> None:
    """Seven columns and two more of three channels, one pixel before them: 30 elements of 32."""
    s = stem_of(stem())
    assert (s.pad, s.span, s.taps, s.convolved, s.pooled) == (1, 32, 8, (112, 112), (56, 56))
    for width in range(1, 8):
        s = replace(s, s=width)
        assert (width // 2 + s.pad) % 4 == 0 and s.span >= (s.pad + width + 2) * 3
    assert s.tiles(64) == -(-(8 * 56 - 1) // 63)


def test_the_stems_time_counts_waves_and_rows() -> None:
    def ns(batch: int, rows: int) -> float:
        return pool_config.stem_ns(stem_of(stem(batch)), StemConfig(64, 32, rows, True, 8, 2))

    # SMs without work; every other row computed twice
    assert ns(256, 56) > ns(256, 14) and ns(256, 1) > ns(256, 14)
    assert ns(1, 1) < ns(1, 2)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "id, problem, sentence, changes",
    [
        ("triton.pointwise_pool", head(), "has no mean", {"x": (2, 512, 0, 7)}),
        ("triton.pointwise_pool", head(), "the second one is nchw", {"residual": "nchw"}),
        ("triton.pointwise_pool", head(), "the input is nchw", {"layout": "nchw"}),
        ("triton.pointwise_pool", head(), "not float64", {"dtype": torch.float64}),
        (
            "triton.conv_pool",
            stem(),
            "not 7×7 of 5",
            {"x": (8, 5, 224, 224), "weight": (64, 5, 7, 7)},
        ),
        ("triton.conv_pool", stem(), "not 9×9 of 3", {"weight": (64, 3, 9, 9), "padding": (4, 4)}),
        ("triton.conv_pool", stem(), "the input is nchw", {"layout": "nchw"}),
        ("triton.conv_pool", stem(), "not on cpu", {"device": "cpu", "capability": None}),
        (
            "triton.pointwise_pool",
            head(),
            "need compute capability 8.0, this GPU has 7.5",
            {"capability": (7, 5)},
        ),
    ],
)
def test_a_declined_problem_names_the_reason(
    id: str, problem: Problem, sentence: str, changes: dict
) -> None:
    assert find(id).supports(problem) is None
    assert sentence in find(id).supports(replace(problem, **changes))


# ---------------------------------------------------------------- machine code


def sound(cubin: Cubin, at: tuple[int, int]) -> None:
    """Nothing spilled, shared memory within the chip's limit, 64-bit offsets into what grows with the batch."""
    assert_nothing_spilled(cubin)
    assert cubin.shared <= CHIPS[at].shared, (
        f"{cubin.name} wants {cubin.shared} bytes of shared memory"
    )
    assert not {"x", "residual", "out"} & cubin.narrow, f"32-bit offsets into {cubin.narrow}"


HEADS = [(at, {"batch": batch}) for at, batch in itertools.product(TENSOR, (1, 8))]
HEADS += [
    (HOPPER, {"batch": 256}),
    (HOPPER, {"dtype": torch.float16, "x": (8, 512, 10, 10)}),
    (HOPPER, {"x": (8, 200, 7, 7), "weight": (104, 200, 1, 1)}),
]


@ahead
@pytest.mark.parametrize("at", TENSOR, ids=str)
def test_no_head_spills(at: tuple[int, int]) -> None:
    """Whatever tile is chosen for a batch, a map or channels with a remainder."""
    shapes = [
        ((n, 512, size, size), (2048, 512, 1, 1))
        for n, size in ((1, 7), (2, 7), (4, 7), (32, 7), (1, 10))
    ]
    shapes += [((8, 200, 7, 7), (100, 200, 1, 1))]
    for x, weight in shapes:
        (cubin,) = cubins("triton.pointwise_pool", head(at=at, x=x, weight=weight))
        sound(cubin, at)


@ahead
@pytest.mark.parametrize("at, changes", HEADS, ids=str)
def test_head(at: tuple[int, int], changes: dict) -> None:
    problem = head(
        **{
            "batch": changes.get("batch", 8),
            "at": at,
            **{k: v for k, v in changes.items() if k != "batch"},
        }
    )
    (cubin,) = cubins("triton.pointwise_pool", problem)
    sound(cubin, at)
    config = pool_config.head_config(head_of(problem))
    assert cubin.shared <= config.shared(2) + 64  # tensor-memory barriers take a few bytes
    # wgmma's rows are 64 filters; a batch of one has more use for twice the blocks.
    assert cubin.count(rf"{TENSOR[at] if config.block_n >= 64 else 'HMMA'}\b")
    assert (
        cubin.count(r"LDG\.E\.128")
        and cubin.count(r"LDGSTS\.E.*\.128")
        and not cubin.count(r"LDG\.E\.U?(16|8)\b")
    )
    if at == HOPPER and config.block_n >= 64:
        # The activations stay in registers between the two products.
        assert any(listed.startswith("R, R, gdesc") for listed in cubin.operands), cubin.operands


@ahead
@pytest.mark.parametrize("at", [(8, 0), HOPPER, (10, 0)], ids=str)
def test_a_float32_head_is_multiplied_in_float32(at: tuple[int, int]) -> None:
    (cubin,) = cubins("triton.pointwise_pool", head(8, at, torch.float32))
    sound(cubin, at)
    assert cubin.count("FFMA") and not cubin.count("HMMA|HGMMA|UTC")  # no TF32 behind anyone's back


STEMS = [(at, torch.bfloat16, bytes) for at, bytes in itertools.product(TENSOR, (False, True))]
STEMS += [
    (HOPPER, torch.float16, False),
    ((8, 0), torch.float32, False),
    (HOPPER, torch.float32, False),
]


@ahead
@pytest.mark.parametrize("at, dtype, bytes", STEMS, ids=str)
def test_stem(at: tuple[int, int], dtype: torch.dtype, bytes: bool) -> None:
    """Patches come by asynchronous copies, at 16 bits eight bytes at a time; resident filters from shared memory."""
    problem = stem(8, at, dtype, bytes=bytes)
    (cubin,) = cubins("triton.conv_pool", problem)
    sound(cubin, at)
    assert cubin.count("LDGSTS") and cubin.count(r"STG\.E\.128")
    if dtype == torch.float32:
        assert cubin.count("FFMA") and not cubin.count("HMMA|HGMMA|UTC")
        return
    assert cubin.count(rf"{TENSOR[at]}\b") and (bytes or cubin.count(r"LDGSTS\.E\.64"))
    if at == HOPPER and not bytes:
        assert all(listed.startswith("R, gdesc[UR], R") for listed in cubin.operands), (
            cubin.operands
        )


def test_interpreter_lane() -> None:
    run_lane("lane_pool")
