"""The kernels on tensor descriptors, without a GPU: their tiles, what they decline, their machine code."""

from __future__ import annotations

import dataclasses
import itertools
from math import prod

import pytest
import torch

pytest.importorskip("triton", reason="no Triton on this platform")

import triton
from triton_ahead import TENSOR, ahead, assert_nothing_spilled, cubins
from triton_interpreter import run_lane
from triton_shapes import gemm

from resnet_fast.dispatch.problem import Problem
from resnet_fast.dispatch.registry import find
from resnet_fast.kernels.triton import conv_tma, tma_config
from resnet_fast.kernels.triton.gemm_config import CHIPS, Gemm
from resnet_fast.kernels.triton.tma_config import TileConfig, Window
from resnet_fast.models.problems import model_problems

HOPPER = (9, 0)
CHIPS_WITH_TMA = [at for at in CHIPS if at >= HOPPER]


def kernel_of(p: Problem) -> str:
    return "triton.pointwise_tma" if p.pointwise and p.stride == (1, 1) else "triton.conv_tma"


def window_of(p: Problem) -> tuple[Window, bool]:
    """The window that the kernel's host sees, and whether the kernel has a resident form."""
    if kernel_of(p) == "triton.pointwise_tma":
        return Window(gemm(p).m), True
    return conv_tma.window(p.x, p.weight, (p.stride, p.padding, p.dilation)), False


def resnet(at: tuple[int, int], batch: int, dtype: torch.dtype = torch.bfloat16) -> list[Problem]:
    """What the kernels take of ResNet-50: all but the stem."""
    found = [
        p
        for p in model_problems("resnet50", batch, 224, dtype, "cuda", at)
        if find(kernel_of(p)).supports(p) is None
    ]
    assert len(found) == 23
    return found


# ---------------------------------------------------------------- tiles


@pytest.mark.parametrize("at", CHIPS_WITH_TMA, ids=lambda c: f"sm_{c[0]}{c[1]}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_tile_fits_its_chip(dtype: torch.dtype, at: tuple[int, int]) -> None:
    on = CHIPS[at]
    for p in itertools.chain.from_iterable(resnet(at, batch, dtype) for batch in (1, 37, 256)):
        (window, resident), g = window_of(p), gemm(p)
        for c in tma_config.configs(g, window, resident):
            assert (
                c.blocks * (tma_config.shared(g, c) + 1024) <= on.shared_sm
                and tma_config.shared(g, c) < on.shared
            )
            assert (
                tma_config.registers(g, c) <= 255
                and c.blocks * c.threads * tma_config.registers(g, c) <= 65536
            )
            assert c.options().get("maxnreg", 255) >= min(255, tma_config.registers(g, c) // 8 * 8)
            assert max(*c.box, c.filters, c.channels) <= 256  # what a TMA box may measure
            assert g.taps == 1 or g.channels % c.channels == 0
            assert resident or not c.resident
            blocks, tiles = (
                prod(tma_config.grid(g, window, c)),
                prod(tma_config.tiles(g, window, c)),
            )
            assert 1 <= blocks <= min(tiles, on.sms * c.blocks)


@pytest.mark.parametrize(
    "size, box", [(56, (2, 8, 8)), (28, (8, 4, 4)), (14, (32, 2, 2)), (7, (128, 1, 1))]
)
def test_boxes_divide_resnets_images(size: int, box: tuple[int, int, int]) -> None:
    assert tma_config._box(128, Window(256, size, size)) == box


def test_boxes_waste_little_of_small_batches() -> None:
    """Images come in only where there are some: 49 pixels of one image in a box of 64, not in 49 boxes of one."""
    assert tma_config._box(64, Window(1, 7, 7)) == (1, 8, 8)
    assert tma_config._box(64, Window(1, 1, 1)) == (64, 1, 1)


def test_the_answer_is_pure_and_the_best_predicted() -> None:
    problems = resnet(HOPPER, 32)
    before = [tma_config.config(gemm(p), *window_of(p)) for p in problems]
    tma_config.configs.cache_clear()
    assert [tma_config.config(gemm(p), *window_of(p)) for p in reversed(problems)] == before[::-1]
    for p, c in zip(problems, before, strict=True):
        (window, resident), g = window_of(p), gemm(p)
        least = min(
            tma_config.predicted_ns(g, window, other)
            for other in tma_config.configs(g, window, resident)
        )
        assert tma_config.predicted_ns(g, window, c) == least


def test_waves_and_skipped_taps_count() -> None:
    """One tile more than fills every SM evenly costs a round; taps that fall outside cost nothing."""
    c, sms = TileConfig((128, 1, 1), 128, 64, False, 8, 4), CHIPS[HOPPER].sms

    def ns(images: int, inside: float = 1.0) -> float:
        g = Gemm(128 * images, 128, 512, 9, capability=HOPPER)
        return tma_config.predicted_ns(g, Window(128 * images, 1, 1, inside), c)

    assert ns(sms - 9) == ns(sms) < 0.6 * ns(sms + 1)
    assert ns(sms, 0.82) < 0.85 * ns(sms)


# ---------------------------------------------------------------- refusals


def taken(**changes) -> Problem:
    return Problem(
        **{
            "op": "conv_bn_act",
            "device": "cuda",
            "dtype": torch.bfloat16,
            "x": (2, 16, 8, 8),
            "layout": "nhwc",
            "weight": (8, 16, 1, 1),
            "capability": HOPPER,
            **changes,
        }
    )


BOTH = ("triton.pointwise_tma", "triton.conv_tma")
REFUSALS = [
    (BOTH, "need compute capability 9.0, this GPU has 8.9", {"capability": (8, 9)}),
    (BOTH, "16 bytes, the output has 12 channels", {"weight": (12, 16, 1, 1)}),
    (BOTH, "no grouped form, this convolution has 2 groups", {"groups": 2, "weight": (8, 8, 1, 1)}),
    (BOTH, "not float64", {"dtype": torch.float64}),
    (BOTH, "not on cpu", {"device": "cpu", "capability": None}),
    (BOTH, "the input is nchw", {"layout": "nchw"}),
    (BOTH, "the second one is nchw", {"residual": "nchw"}),
    (BOTH, "more than 2³¹ pixels", {"x": (2**17, 16, 2**7, 2**7)}),
    (
        BOTH[:1],
        "16 bytes, the input has 12 channels",
        {"x": (2, 12, 8, 8), "weight": (8, 12, 1, 1)},
    ),
    (BOTH[:1], "1×1 filters, no stride, no padding", {"stride": (2, 2)}),
    (BOTH[:1], "1×1 filters, no stride, no padding", {"padding": (1, 1)}),
    (BOTH[:1], "1×1 filters, no stride, no padding", {"weight": (8, 16, 3, 3), "padding": (1, 1)}),
    (BOTH[1:], "by sixteens, and there are 24", {"x": (2, 24, 8, 8), "weight": (8, 24, 1, 1)}),
    (BOTH[1:], "this stride is 2×1", {"stride": (2, 1)}),
    (BOTH[1:], "of 7×8 one has no partner", {"stride": (2, 2), "x": (2, 16, 7, 8)}),
    (BOTH[1:], "larger than the padded input", {"weight": (8, 16, 9, 9)}),
]


@pytest.mark.parametrize("ids, sentence, changes", REFUSALS)
def test_a_declined_problem_names_the_reason(
    ids: tuple[str, ...], sentence: str, changes: dict
) -> None:
    for id in ids:
        assert find(id).supports(taken()) is None
        assert sentence in find(id).supports(taken(**changes))


def test_float32_has_other_sixteen_bytes() -> None:
    assert (
        find("triton.pointwise_tma").supports(
            taken(dtype=torch.float32, x=(2, 4, 8, 8), weight=(12, 4, 1, 1))
        )
        is None
    )
    assert "2 channels" in find("triton.pointwise_tma").supports(
        taken(dtype=torch.float32, x=(2, 2, 8, 8), weight=(8, 2, 1, 1))
    )


@pytest.mark.parametrize("at", [*CHIPS_WITH_TMA, None], ids=str)
def test_a_convolution_takes_all_its_channels(at: tuple[int, int] | None) -> None:
    """1×1 too: conv_tma takes whole blocks of channels only, and 112 are not one and a half."""
    for channels, size in itertools.product((48, 80, 112, 144, 240), (7, 14, 28)):
        g = Gemm(size * size, 64, channels, itemsize=2, capability=at)
        for found in tma_config.configs(g, Window(1, size, size)):
            assert channels % found.channels == 0, found


# ---------------------------------------------------------------- machine code


def layer(
    at: tuple[int, int],
    x: tuple[int, int],
    weight: tuple[int, int, int],
    stride: int = 1,
    residual: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    batch: int = 256,
) -> Problem:
    k, c, r = weight
    return taken(
        x=(batch, x[0], x[1], x[1]),
        weight=(k, c, r, r),
        stride=(stride, stride),
        padding=(r // 2, r // 2),
        bn=True,
        act="relu",
        residual="nhwc" if residual else None,
        dtype=dtype,
        capability=at,
    )


LAYERS = {
    "layer1 conv3": {"x": (64, 56), "weight": (256, 64, 1), "residual": True},
    "layer3 conv1": {"x": (1024, 14), "weight": (256, 1024, 1)},
    "layer4 conv3": {"x": (512, 7), "weight": (2048, 512, 1), "residual": True},
    "layer1 conv2": {"x": (64, 56), "weight": (64, 64, 3)},
    "layer2 conv2": {"x": (128, 28), "weight": (128, 128, 3)},
    "basic block": {"x": (128, 28), "weight": (128, 128, 3), "residual": True},
    "layer4 conv2": {"x": (512, 7), "weight": (512, 512, 3)},
    "layer2 strided": {"x": (128, 56), "weight": (128, 128, 3), "stride": 2},
    "layer3 downsample": {"x": (512, 28), "weight": (1024, 512, 1), "stride": 2},
}
CODE = [(name, HOPPER) for name in LAYERS]
AFTER_HOPPER = ("layer1 conv3", "layer3 conv1", "layer2 conv2", "layer2 strided")
CODE += [(name, at) for at, name in itertools.product(CHIPS_WITH_TMA[1:], AFTER_HOPPER)]


def loads_boxes(p: Problem) -> str:
    """The TMA instruction that loads a box of pixels, by its dimensions."""
    if kernel_of(p) == "triton.pointwise_tma":
        return "UTMALDG.2D"
    return "UTMALDG.4D" if p.stride == (1, 1) else "UTMALDG.5D"


@ahead
@pytest.mark.parametrize("name, at", CODE, ids=lambda v: str(v))
def test_machine_code(name: str, at: tuple[int, int]) -> None:
    """Tensor cores and TMA both ways, nothing spilled, shared memory and registers as the tile was chosen for."""
    p = layer(at, **LAYERS[name])
    g = gemm(p)
    tile = tma_config.config(g, *window_of(p))
    (cubin,) = cubins(kernel_of(p), p)
    assert (
        cubin.count(rf"{TENSOR[at]}\b") and cubin.count(loads_boxes(p)) and cubin.count("UTMASTG")
    )
    assert not cubin.count(r"LDG(STS)?\.E.*\.(64|128)\b") and not cubin.count("STG"), (
        "tiles go by TMA alone"
    )
    # Triton 3.6's assembler keeps a few addresses on sm_120's stack whatever the tile, also one of half the registers.
    kept = 64 if at == (12, 0) and triton.__version__.startswith("3.6.") else 0
    assert_nothing_spilled(cubin, kept)
    assert cubin.registers <= tile.options().get("maxnreg", 255)
    # Barriers, and where several warps share a row some padding.
    assert cubin.shared <= tma_config.shared(g, tile) + 2048 and cubin.shared <= CHIPS[at].shared
    if at == HOPPER:
        assert all(listed.startswith("R, gdesc[UR], R") for listed in cubin.operands), (
            cubin.operands
        )
        # What goes through ldmatrix is the residual, as often as the result goes through stmatrix; no operand does.
        assert cubin.count("LDSM") == (cubin.count("STSM") if p.residual else 0)


@ahead
@pytest.mark.parametrize("weight", [(128, 128, 3), (128, 128, 1)])
def test_float32_is_multiplied_in_float32(weight: tuple[int, int, int]) -> None:
    """No TF32 behind anyone's back."""
    (cubin,) = cubins(kernel_of(p := layer(HOPPER, (128, 28), weight, dtype=torch.float32)), p)
    assert cubin.count("FFMA") and not cubin.count("HMMA|HGMMA") and cubin.count("UTMALDG")
    assert_nothing_spilled(cubin)


@ahead
def test_a_skipped_tap_costs_no_spill_and_small_batches_compile() -> None:
    for p in (
        layer(HOPPER, batch=1, **LAYERS["layer4 conv2"]),
        layer(HOPPER, batch=1, **LAYERS["layer1 conv3"]),
    ):
        p = dataclasses.replace(p, dtype=torch.float16)
        for cubin in cubins(kernel_of(p), p):
            assert_nothing_spilled(cubin)
            assert cubin.count("HGMMA")


def test_interpreter_lane() -> None:
    run_lane("lane_tma")
