"""The cost model reproduces the project's own figures, and counts what a step moves as anyone would by hand."""

from __future__ import annotations

import pytest
import torch

from resnet_fast.analysis import network_floor
from resnet_fast.analysis.network_cost import INFERENCE, network
from resnet_fast.analysis.training_cost import TRAINING
from resnet_fast.dispatch.problem import Problem
from resnet_fast.models.family import create_model
from resnet_fast.roofline import chips, cost, floor
from resnet_fast.roofline.cost import Cost

BF16 = torch.bfloat16
H200 = chips.ceilings("h200")

# Kernels, MB an image, img/s in bf16 and in bytes: one H200, ResNet-50 at 224², batch 256.
INFERENCE_FIGURES = {
    "eager, unfused": (174, 159.9, 24_255, None),
    "BN folded, pointwise fused after each conv": (105, 93.3, 38_827, 77_653),
    "conv+BN+ReLU(+add) in one kernel": (56, 54.9, 60_242, 120_484),
    "+ stem/pool and avgpool/fc fused": (54, 51.3, 62_733, 125_465),
    "tail fusion in layer1–2": (40, 39.25, 79_960, 159_920),
    "whole block in one kernel": (18, 23.4, 92_711, 185_421),
}
TRAINING_FIGURES = {
    "eager": (475.9, 8_157),
    "pointwise fused": (348.1, 10_767),
    "statistics in the conv's epilogue, normalise+ReLU in the next one's prologue": (309.3, 11_925),
    "+ fused backward": (248.2, 14_952),
    "dgrad and wgrad share their loads": (189.6, 17_947),
}


@pytest.mark.parametrize("level", INFERENCE)
def test_inference_rows_of_the_design(level: str) -> None:
    kernels, megabytes, img_s, img_s_bytes = INFERENCE_FIGURES[level]
    found = network_floor.total("resnet50", 256, 224, BF16, H200, level)
    assert found.kernels == kernels
    assert found.bytes / 256 / 1e6 == pytest.approx(megabytes, abs=0.05)
    assert round(found.img_s) == img_s
    if img_s_bytes is not None:
        assert network_floor.total(
            "resnet50", 256, 224, torch.int8, H200, level
        ).img_s == pytest.approx(img_s_bytes, abs=1)


@pytest.mark.parametrize("level", TRAINING)
def test_training_rows_of_the_design(level: str) -> None:
    megabytes, img_s = TRAINING_FIGURES[level]
    found = network_floor.total("resnet50", 256, 224, BF16, H200, level, "train")
    assert found.bytes / 256 / 1e6 == pytest.approx(megabytes, abs=0.05)
    assert round(found.img_s) == img_s


def test_every_level_computes_the_same() -> None:
    for batch in (1, 256):
        net = network("resnet50", batch, 224, BF16)
        assert {sum(step.flops for step in level(net)) for level in INFERENCE.values()} == {
            8_178_368_512 * batch
        }
        assert len({sum(step.flops for step in level(net)) for level in TRAINING.values()}) == 1


def test_flops_are_torchs_own() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model, x = create_model("resnext50_32x4d").eval(), torch.empty(2, 3, 64, 64)
    with FlopCounterMode(display=False) as counter:
        model(x)
    net = network("resnext50_32x4d", 2, 64, BF16)
    assert sum(step.flops for step in INFERENCE["eager, unfused"](net)) == counter.get_total_flops()


@pytest.mark.parametrize("model", ["resnet18", "resnet50", "wide_resnet50_2"])
def test_parameters_are_the_models(model: str) -> None:
    with torch.device("meta"):
        expected = sum(p.numel() for p in create_model(model).parameters())
    assert network(model, 1, 224, BF16).parameters == expected


def test_fusing_more_never_moves_more() -> None:
    for model in ("resnet18", "resnet34", "resnet101"):
        for mode, levels in (("infer", INFERENCE), ("train", TRAINING)):
            moved = [
                network_floor.total(model, 32, 224, BF16, H200, level, mode).bytes
                for level in levels
            ]
            assert moved == sorted(moved, reverse=True)


def test_a_tail_moves_640_channels_a_pixel_where_three_kernels_move_1024() -> None:
    net = network("resnet50", 1, 224, BF16)
    pixels, width = 56 * 56, 2
    tail = next(s for s in INFERENCE["tail fusion in layer1–2"](net) if s.name == "layer1.1 tail")
    assert (tail.bytes - tail.reads["w"]) == 640 * pixels * width
    single = [
        s
        for s in INFERENCE["conv+BN+ReLU(+add) in one kernel"](net)
        if s.name.startswith("layer1.1.")
    ]
    assert sum(s.bytes - s.reads["w"] for s in single) == 1024 * pixels * width


def test_the_binding_ceiling() -> None:
    memory = floor.floor(Cost("copy", {"x": 43}, {"y": 0}, 1), H200, BF16)
    assert (memory.bound, memory.seconds) == ("memory", pytest.approx(1e-11))
    compute = floor.floor(Cost("matmul", {"x": 1}, {}, 790), H200, BF16)
    assert (compute.bound, compute.seconds) == ("compute", pytest.approx(1e-12))


OPS = [
    (
        Problem(
            "conv_bn_act",
            "cuda",
            BF16,
            (2, 8, 5, 6),
            "nhwc",
            (4, 8, 3, 3),
            padding=(1, 1),
            residual="nhwc",
        ),
        2 * 8 * 30 + 4 * 8 * 9 + 2 * 2 * 4 * 30,
        2 * 2 * 4 * 8 * 9 * 30,
    ),
    (
        Problem("conv_bn_act", "cuda", BF16, (2, 8, 4, 6), "nhwc", (4, 8, 1, 1), stride=(2, 2)),
        2 * 8 * 6 + 4 * 8 + 2 * 4 * 6,
        2 * 2 * 4 * 8 * 6,
    ),
    (
        Problem(
            "conv_bn_act",
            "cuda",
            BF16,
            (2, 8, 5, 6),
            "nhwc",
            (8, 2, 3, 3),
            padding=(1, 1),
            groups=4,
        ),
        2 * 480 + 8 * 2 * 9,
        2 * 2 * 8 * 2 * 9 * 30,
    ),
    (
        Problem("add_act", "cuda", BF16, (2, 8, 5, 6), "nhwc", residual="nhwc", act="relu"),
        3 * 480,
        0,
    ),
    (
        Problem(
            "add_act_backward", "cuda", BF16, (2, 8, 5, 6), "nhwc", residual="nhwc", act="relu"
        ),
        3 * 480,
        0,
    ),
    (
        Problem(
            "add_act_backward",
            "cuda",
            BF16,
            (2, 8, 5, 6),
            "nhwc",
            residual="nhwc",
            act="relu",
            gate=True,
        ),
        5 * 480,
        0,
    ),
    (Problem("bn_act", "cuda", BF16, (2, 8, 5, 6), "nhwc", act="relu"), 3 * 480, 0),
    (
        Problem("bn_act", "cuda", BF16, (2, 8, 5, 6), "nhwc", residual="nhwc", act="relu"),
        4 * 480,
        0,
    ),
    (Problem("bn_act_backward", "cuda", BF16, (2, 8, 5, 6), "nhwc", act="relu"), 5 * 480, 0),
    (
        Problem("bn_act_backward", "cuda", BF16, (2, 8, 5, 6), "nhwc", residual="nhwc", act="relu"),
        8 * 480,
        0,
    ),
]


@pytest.mark.parametrize(
    "problem, elements, flops", OPS, ids=lambda v: v.key if isinstance(v, Problem) else ""
)
def test_what_one_call_must_move(problem: Problem, elements: int, flops: int) -> None:
    step = cost.problem_step(problem)
    assert (step.bytes, step.flops) == (2 * elements, flops)
    assert cost.flops(problem) == flops
    assert floor.problem_floor(problem, H200).seconds > 0


def test_table_for_explain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")  # a narrower terminal gets a cut table
    found = network_floor.table("resnet50", 256, 224, BF16, "h200")
    assert len(found.rows) == 54 and found.rows[0].name == "conv1 + maxpool"
    assert sum(row.seconds for row in found.rows) == pytest.approx(256 / 62_733, rel=1e-4)
    text = str(found)
    assert (
        "60,242" in text
        and "17,947" in text
        and "layer4.2.conv3 + avgpool" in text
        and "measured" in text
    )
    assert not any(
        total.mode == "train"
        for total in network_floor.table("resnet50", 1, 224, torch.int8, "h200").totals
    )


def test_unknown_gpus_and_dtypes_are_named() -> None:
    assert chips.ceilings("NVIDIA H200") is H200
    with pytest.raises(LookupError, match="no ceilings for GPU 'voodoo'; known: h200"):
        network_floor.table("resnet50", 1, 224, BF16, "voodoo")
    with pytest.raises(LookupError, match="no rate for torch.float64 on NVIDIA H200"):
        network_floor.table("resnet50", 1, 224, torch.float64, "h200")
