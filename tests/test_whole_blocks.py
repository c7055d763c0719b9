"""The model of whole blocks in one kernel: what it counts, and the answer on record."""

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

from resnet_fast.roofline import total

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import whole_blocks
from whole_blocks import Bottleneck, blocks, predict

STAGES = blocks("resnet50", 256)


def us(stage: str, whole: bool) -> float:
    return predict(STAGES[stage][0], whole).seconds * 1e6


def test_the_blocks_of_a_network() -> None:
    assert {stage: n for stage, (_, n) in STAGES.items()} == {"layer1": 2, "layer2": 3, "layer3": 5, "layer4": 2}
    assert STAGES["layer2"][0] == Bottleneck(256, 28, 512, 128) and STAGES["layer1"][0].weights == 2 * (
        2 * 64 * 256 + 9 * 64 * 64
    )
    assert blocks("resnet18", 8) == {}


def test_the_answer_on_record() -> None:
    """It pays in layer1 alone, by a twentieth of what tails save; the figures are those of the docstring."""
    said = {"layer1": (239, 221), "layer2": (167, 199), "layer3": (224, 236), "layer4": (384, 760)}
    assert {stage: (round(us(stage, False)), round(us(stage, True))) for stage in STAGES} == said
    for figures in (
        "layer1 239 → 221",
        "layer2 167 → 199",
        "layer3 224 → 236",
        "layer4 384 → 760",
        "37 µs of the 3,202",
        "879 of 4,081",
    ):
        assert figures in whole_blocks.__doc__.replace("\n", " ")
    gain = sum(max(0.0, us(stage, False) - us(stage, True)) * n for stage, (_, n) in STAGES.items())
    assert gain == pytest.approx(37, abs=0.5)
    fused, tails = (
        total("resnet50", 256, 224, torch.bfloat16, whole_blocks.ceilings("h200"), level).seconds * 1e6
        for level in ("+ stem/pool and avgpool/fc fused", "tail fusion in layer1–2")
    )
    assert (round(fused), round(tails), round(fused - tails)) == (4081, 3202, 879)


def test_memory_is_what_is_between_blocks(monkeypatch) -> None:
    """With L2 and products for nothing: x and out once, or with the narrow result there and back."""
    monkeypatch.setattr(whole_blocks, "L2", 1e9)
    assert us("layer1", True) == pytest.approx(191, abs=0.5)
    monkeypatch.setattr(whole_blocks, "MMA", 1e9)
    b = STAGES["layer1"][0]
    pixels = 256 * 56 * 56 * 2
    assert us("layer1", True) == pytest.approx((pixels * 512 + b.weights) / 4.3e6)
    assert us("layer1", False) == pytest.approx((pixels * (512 + 128) + b.weights) / 4.3e6)


def test_a_halo_costs_products_and_a_whole_map_has_none(monkeypatch) -> None:
    b = STAGES["layer1"][0]
    square = 2 * 64 * (64 * 3 * 256 + 128 * (9 * 64 + 256))
    assert whole_blocks._products(b, True, 128, 180) == square and whole_blocks._products(b, False, 128, 180) < square
    monkeypatch.setattr(whole_blocks, "L2", 1e9)
    monkeypatch.setattr(whole_blocks, "MMA", 100.0)  # products bind
    small = dataclasses.replace(b, size=14)
    whole, tail = ({c.box: c.seconds for c in whole_blocks._candidates(small, form)} for form in (True, False))
    assert whole[1, 14, 14] == tail[1, 14, 14] and whole[1, 4, 14] > tail[1, 4, 14]


def test_what_does_not_fit_is_no_candidate(monkeypatch) -> None:
    """Weights stay where they fit, 139 kB of layer1's; without room there is no kernel."""
    assert predict(STAGES["layer1"][0], True).resident and not predict(STAGES["layer2"][0], True).resident
    monkeypatch.setattr(whole_blocks, "SHARED", 128 * 1024)
    assert not predict(STAGES["layer1"][0], True).resident
    monkeypatch.setattr(whole_blocks, "SHARED", 1024)
    assert predict(STAGES["layer1"][0], True) is None


def test_the_rates_are_the_heuristics_own() -> None:
    chips = pytest.importorskip("resnet_fast.kernels.triton.gemm_config").CHIPS
    on = chips[9, 0]
    assert (on.sms, on.shared, on.mma, on.l2) == (
        whole_blocks.SMS,
        whole_blocks.SHARED,
        whole_blocks.MMA,
        whole_blocks.L2,
    )
