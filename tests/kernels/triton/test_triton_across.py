"""``pointwise_pair`` and ``conv_tail`` without a GPU: their configs, what they decline, their machine code."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton", reason="no Triton on this platform")

import triton
from triton_ahead import TENSOR, Cubin, ahead, assert_nothing_spilled, cubins
from triton_interpreter import run_lane

from resnet_fast.dispatch.problem import Problem
from resnet_fast.dispatch.registry import find
from resnet_fast.kernels.triton import pointwise_pair_tma, tail_config, tma_config
from resnet_fast.kernels.triton.gemm_config import CHIPS, Gemm, gemm_config, predicted_ns
from resnet_fast.kernels.triton.tail_config import MIDDLES, Tail, TailConfig, tail

HOPPER = (9, 0)
# ResNet-50's ends of first blocks: conv3's channels, filters, size; the block's input and stride.
PAIRS = {
    "layer1": (64, 256, 56, 64, 1),
    "layer2": (128, 512, 28, 256, 2),
    "layer3": (256, 1024, 14, 512, 2),
    "layer4": (512, 2048, 7, 1024, 2),
}
# Its tails: channels of the middle, of the block, of the next conv1, of a projected input; size.
TAILS = {
    "layer1": (64, 256, 64, 0, 56),
    "layer1 first": (64, 256, 64, 64, 56),
    "layer1 last": (64, 256, 128, 0, 56),
    "layer2": (128, 512, 128, 0, 28),
    "layer2 last": (128, 512, 256, 0, 28),
}


def pair(
    name: str, at: tuple[int, int] = HOPPER, dtype: torch.dtype = torch.bfloat16, batch: int = 8
) -> Problem:
    c, k, size, c2, stride = PAIRS[name]
    return Problem(
        op="pointwise_pair",
        device="cuda",
        dtype=dtype,
        x=(batch, c, size, size),
        layout="nhwc",
        weight=(k, c, 1, 1),
        chain=((k, c2, 1, 1),),
        second=(size * stride, size * stride),
        stride=(stride, stride),
        residual="nhwc",
        act="relu",
        capability=at,
    )


def bottleneck(
    name: str, at: tuple[int, int] = HOPPER, dtype: torch.dtype = torch.bfloat16, batch: int = 8
) -> Problem:
    middle, wide, after, projected, size = TAILS[name]
    chain = (wide, middle, 1, 1), (wide, projected, 1, 1) if projected else (), (after, wide, 1, 1)
    return Problem(
        op="conv_tail",
        device="cuda",
        dtype=dtype,
        x=(batch, middle, size, size),
        layout="nhwc",
        weight=(middle, middle, 3, 3),
        padding=(1, 1),
        chain=chain,
        residual="nhwc",
        act="relu",
        capability=at,
    )


# ---------------------------------------------------------------- configs


@pytest.mark.parametrize("at", CHIPS, ids=lambda c: f"sm_{c[0]}{c[1]}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_config_fits_its_chip(dtype: torch.dtype, at: tuple[int, int]) -> None:
    on = CHIPS[at]
    for name, batch in itertools.product(TAILS, (1, 256)):
        g = tail(bottleneck(name, at, dtype, batch))
        configs = tail_config.tail_configs(g)
        assert configs or dtype == torch.float32 and g.next == 256 and on.shared < 100 * 1024
        for c in configs:
            assert tail_config.shared(g, c) < on.shared and tail_config.registers(g, c) <= 255
            assert c.blocks == 1 or c.blocks * (tail_config.shared(g, c) + 1024) <= on.shared_sm
            assert c.blocks * 32 * c.num_warps * min(255, c.options().get("maxnreg", 0)) <= 65536
            assert c.options().get("maxnreg", 255) >= tail_config.registers(g, c)
            assert all(
                size >= 16 and size & (size - 1) == 0 for size in (c.block_m, c.block_n, c.block_k)
            )


def test_the_answer_is_pure_and_the_best_predicted() -> None:
    shapes = [
        tail(bottleneck(name, batch=batch))
        for name, batch in itertools.product(TAILS, (1, 37, 256))
    ]
    before = [tail_config.tail_config(g) for g in shapes]
    tail_config.tail_configs.cache_clear()
    assert [tail_config.tail_config(g) for g in reversed(shapes)] == before[::-1]
    for g, c in zip(shapes, before, strict=True):
        best = min(tail_config.predicted_ns(g, other) for other in tail_config.tail_configs(g))
        assert tail_config.predicted_ns(g, c) == best


def test_weights_are_shared_by_more_pixels_where_there_are_many() -> None:
    """Each block reads all weights: a full GPU takes large blocks, a small batch blocks enough for every SM."""
    few, many = (
        tail_config.tail_config(tail(bottleneck("layer1", batch=batch))) for batch in (1, 256)
    )
    assert few.block_m < many.block_m


def test_waves_count() -> None:
    c, sms = TailConfig(128, 64, 64, 8, 3), CHIPS[HOPPER].sms
    full, over, under = (
        tail_config.predicted_ns(Tail(128 * blocks, 64, 64, 256, 64, capability=HOPPER), c)
        for blocks in (sms, sms + 1, sms - 9)
    )
    assert under == full < 0.6 * over


@given(channels=st.integers(1, 4096))
def test_padded_blocks_cover_their_channels(channels: int) -> None:
    block = tail_config.padded(channels)
    assert block & (block - 1) == 0 and max(16, channels) <= block < max(17, 2 * channels)


def test_the_tail_of_a_problem() -> None:
    assert tail(bottleneck("layer1 first")) == Tail(8 * 56 * 56, 64, 64, 256, 64, 64, 2, HOPPER)
    assert tail(bottleneck("layer2 last", dtype=torch.float32, at=(8, 0))) == Tail(
        8 * 28 * 28, 128, 128, 512, 256, 0, 4, (8, 0)
    )


# ---------------------------------------------------------------- refusals

REFUSALS = [
    ("the input is nchw", {"layout": "nchw"}),
    ("the second one is nchw", {"residual": "nchw"}),
    ("not float64", {"dtype": torch.float64}),
    ("not on cpu", {"device": "cpu", "capability": None}),
    ("this GPU has 7.5", {"capability": (7, 5)}),
    ("more than 2³¹ pixels", {"x": (2**17, 64, 2**7, 2**7)}),
]


@pytest.mark.parametrize("sentence, changes", REFUSALS)
def test_a_declined_problem_names_the_reason(sentence: str, changes: dict) -> None:
    for problem in (pair("layer1"), bottleneck("layer1")):
        kernel = find(f"triton.{problem.op}")
        assert kernel.supports(problem) is None
        assert sentence in kernel.supports(dataclasses.replace(problem, **changes))


def test_a_pair_says_when_its_second_side_is_too_large() -> None:
    problem = pair("layer1")
    for changes in ({"second": (2**16, 2**16)}, {"chain": ((256, 2**24, 1, 1),)}):
        assert "on the second side" in find("triton.pointwise_pair").supports(
            dataclasses.replace(problem, **changes)
        )


def test_a_tail_says_what_a_block_cannot_keep() -> None:
    def said(middle: int, wide: int, projected: int, after: int, **rest) -> str | None:
        chain = (
            (wide, middle, 1, 1),
            (wide, projected, 1, 1) if projected else (),
            (after, wide, 1, 1),
        )
        return find("triton.conv_tail").supports(
            dataclasses.replace(
                bottleneck("layer1"), weight=(middle, 64, 3, 3), chain=chain, **rest
            )
        )

    assert all(said(middle, 4 * middle, 0, middle) is None for middle in MIDDLES)
    for middle in (8, 48, 96, 256, 512):
        assert f"16, 32, 64 or 128 of them, and there are {middle}" in said(middle, 256, 0, 64)
    assert said(64, 256, 128, 64) is None and "at most 128, and there are 129" in said(
        64, 256, 129, 64
    )
    assert "128 middle channels and 512 of the next convolution are more than" in said(
        128, 512, 0, 512
    )
    assert "256 of the next convolution" in said(
        128, 512, 0, 256, dtype=torch.float32, capability=(8, 9)
    )


# ---------------------------------------------------------------- machine code


def sound(cubin: Cubin, at: tuple[int, int], least_shared: int) -> None:
    """Nothing spilled, shared memory within the chip's limit and the config's count, 16-byte copies, 64-bit offsets."""
    assert_nothing_spilled(cubin)
    assert cubin.shared <= min(least_shared + 1024, CHIPS[at].shared)
    assert cubin.count(r"LDG(STS)?\.E.*\.128") and not cubin.count(r"LDG(STS)?\.E\.U?(16|8)\b")
    assert not cubin.narrow & {"x", "x2", "out", "residual", "y", "z"}
    assert {"w", "w2"} & cubin.narrow  # filters are small; and offsets are seen at all


CODE = [(name, HOPPER, {}) for name in PAIRS] + [
    (name, HOPPER, {"batch": 1}) for name in ("layer3", "layer4")
]
CODE += [("layer2", at, {}) for at in TENSOR if at != HOPPER] + [
    ("layer2", (8, 0), {"dtype": torch.float32})
]


@ahead
@pytest.mark.parametrize("name, at, changes", CODE, ids=str)
def test_pairs(name: str, at: tuple[int, int], changes: dict) -> None:
    problem = pair(name, at, **changes)
    c, k, size, c2, _ = PAIRS[name]
    config = gemm_config(
        Gemm(problem.x[0] * size**2, k, c + c2, itemsize=problem.dtype.itemsize, capability=at)
    )
    first, *rest = cubins("triton.pointwise_pair", problem)
    assert len(rest) == (config.split_k > 1)
    sound(first, at, config.shared(problem.dtype.itemsize))
    assert (
        first.count(rf"{TENSOR[at]}\b")
        if problem.dtype != torch.float32
        else not first.count(r"\w*MMA\b")
    )
    # One loop over both inputs, whose copies are under way while the matrix units work.
    assert first.count(r"LDGSTS\.E.*\.128")


@ahead
@pytest.mark.parametrize(
    "name, at, batch",
    [(name, HOPPER, 256) for name in PAIRS]
    + [("layer1", HOPPER, 1), ("layer4", HOPPER, 1)]
    + [("layer2", at, 256) for at in ((10, 0), (12, 0))],
    ids=str,
)
def test_pairs_by_tma(name: str, at: tuple[int, int], batch: int) -> None:
    """Tiles come and go by TMA alone, both inputs' as boxes; wgmma reads both operands from shared memory."""
    problem = pair(name, at, batch=batch)
    g, window = pointwise_pair_tma.product_of(problem.x, problem.chain[0], 2, at)
    tile = pointwise_pair_tma.best(g, window, problem.x[1])
    (cubin,) = cubins("triton.pointwise_pair_tma", problem)
    # Triton 3.6's assembler keeps a few addresses on sm_120's stack, as of every kernel on descriptors.
    kept = 64 if at == (12, 0) and triton.__version__.startswith("3.6.") else 0
    assert_nothing_spilled(cubin, kept)
    assert (
        cubin.count(rf"{TENSOR[at]}\b")
        and cubin.count("UTMALDG.4D")
        and cubin.count("UTMALDG.2D")
        and cubin.count("UTMASTG.4D")
    )
    assert bool(cubin.count("UTMALDG.5D")) == (problem.stride == (2, 2))
    assert not cubin.count(r"LDG(STS)?\.E.*\.(64|128)\b") and not cubin.count("STG")
    assert cubin.registers <= tile.options().get("maxnreg", 255)
    assert cubin.shared <= tma_config.shared(g, tile) + 2048 and cubin.shared <= CHIPS[at].shared
    if at == HOPPER:
        assert cubin.operands and all(
            listed.startswith("R, gdesc[UR], R") for listed in cubin.operands
        ), cubin.operands
        assert not cubin.count("LDSM")


def test_a_pair_by_tma_says_what_it_cannot_do_and_what_it_should_gain() -> None:
    """Like shares of both inputs' channels: each trip does its part of either."""
    kernel = find("triton.pointwise_pair_tma")
    refused = {
        "float32": {"dtype": torch.float32},
        "sees rows and columns in pairs": {"second": (55, 56)},
        "step by 1 or by 2": {"stride": (3, 3), "second": (84, 84)},
        "of 64 and 96 it cannot": {"chain": ((512, 96, 1, 1),)},
        "compute capability 9.0": {"capability": (8, 9)},
        "has 100 channels": {"weight": (100, 128, 1, 1)},
    }
    for sentence, changes in refused.items():
        changes = {"x": (8, 64, 28, 28)} | changes
        assert sentence in kernel.supports(dataclasses.replace(pair("layer2"), **changes)), sentence
    assert pointwise_pair_tma.shares(64, 64) == {128: (64, 64), 64: (32, 32), 32: (16, 16)}
    assert (
        pointwise_pair_tma.shares(48, 48) == {32: (16, 16)}
        and pointwise_pair_tma.shares(48, 50) == {}
    )
    assert pointwise_pair_tma.shares(128, 256) == {
        96: (32, 64),
        48: (16, 32),
    } and pointwise_pair_tma.shares(256, 64) == {80: (64, 16)}
    for name in PAIRS:
        problem = pair(name, batch=256)
        assert kernel.supports(problem) is None
        g, window = pointwise_pair_tma.product_of(problem.x, problem.chain[0], 2, HOPPER)
        tile = pointwise_pair_tma.best(g, window, problem.x[1])
        assert tma_config.predicted_ns(g, window, tile) < 0.98 * predicted_ns(g, gemm_config(g))


TAIL_CODE = [(name, HOPPER, {}) for name in TAILS] + [
    ("layer1", HOPPER, {"batch": 256}),
    ("layer2", HOPPER, {"batch": 256}),
]
TAIL_CODE += [("layer2", at, {}) for at in TENSOR if at != HOPPER]
TAIL_CODE += [("layer1 first", at, {"batch": 256}) for at in ((8, 9), (12, 0))]
TAIL_CODE += [
    ("layer1", HOPPER, {"dtype": torch.float16}),
    ("layer1", HOPPER, {"dtype": torch.float32}),
]


@ahead
@pytest.mark.parametrize("name, at, changes", TAIL_CODE, ids=str)
def test_tails(name: str, at: tuple[int, int], changes: dict) -> None:
    problem = bottleneck(name, at, **changes)
    g = tail(problem)
    config = tail_config.tail_config(g)
    (cubin,) = cubins("triton.conv_tail", problem)
    sound(cubin, at, tail_config.shared(g, config))
    assert cubin.registers <= config.options().get("maxnreg", 255)
    if problem.dtype == torch.float32:
        assert cubin.count("FFMA") and not cubin.count(r"\w*MMA\b")  # no TF32 behind anyone's back
    else:
        assert cubin.count(rf"{TENSOR[at]}\b") and cubin.count(r"LDGSTS\.E.*\.128")
    assert cubin.count(r"STG\.E\.128") == cubin.count("STG")


def test_interpreter_lane() -> None:
    run_lane("lane_across")
