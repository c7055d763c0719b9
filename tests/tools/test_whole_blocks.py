"""The model of whole blocks in one kernel: what it counts, and the answer on record."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from resnet_fast.analysis.network_floor import total
from tools import whole_blocks
from tools.whole_blocks import Bottleneck, blocks, predict

STAGES = blocks("resnet50", 256)
LAYER1, _ = STAGES["layer1"]
# µs by the tail and by the whole block, as the docstring has them.
ON_RECORD = {"layer1": (239, 221), "layer2": (167, 199), "layer3": (224, 236), "layer4": (384, 760)}


def us(stage: str, whole: bool) -> float:
    """The predicted microseconds of a block."""
    block, _ = STAGES[stage]
    return predict(block, whole).seconds * 1e6


def floor_us(level: str) -> float:
    """The network's floor at a level of fusion."""
    floor = total("resnet50", 256, 224, torch.bfloat16, whole_blocks.ceilings("h200"), level)
    return floor.seconds * 1e6


def test_the_blocks_of_a_network() -> None:
    counts = {stage: count for stage, (_, count) in STAGES.items()}
    assert counts == {"layer1": 2, "layer2": 3, "layer3": 5, "layer4": 2}
    assert STAGES["layer2"][0] == Bottleneck(256, 28, 512, 128)
    assert LAYER1.weights == 2 * (2 * 64 * 256 + 9 * 64 * 64)


def test_a_network_of_basic_blocks_has_none() -> None:
    assert blocks("resnet18", 8) == {}


@pytest.mark.parametrize("stage", ON_RECORD)
def test_the_prediction_on_record(stage) -> None:
    tail, whole = ON_RECORD[stage]
    assert round(us(stage, whole=False)) == tail
    assert round(us(stage, whole=True)) == whole
    text = whole_blocks.__doc__.replace("\n", " ")
    assert f"{stage} {tail} → {whole}" in text


def test_the_answer_on_record() -> None:
    """It pays in layer1 alone, by a twentieth of what tails save."""
    gain = 0.0
    for stage, (_, count) in STAGES.items():
        gain += count * max(0.0, us(stage, whole=False) - us(stage, whole=True))
    assert gain == pytest.approx(37, abs=0.5)
    fused = floor_us("+ stem/pool and avgpool/fc fused")
    tails = floor_us("tail fusion in layer1–2")
    assert (round(fused), round(tails), round(fused - tails)) == (4081, 3202, 879)
    text = whole_blocks.__doc__.replace("\n", " ")
    assert "37 µs of the 3,202" in text
    assert "879 of 4,081" in text


def test_memory_is_what_is_between_blocks(monkeypatch) -> None:
    """With L2 and products for nothing: x and out once, or with the narrow result there and back."""
    monkeypatch.setattr(whole_blocks, "L2", 1e9)
    assert us("layer1", whole=True) == pytest.approx(191, abs=0.5)
    monkeypatch.setattr(whole_blocks, "MMA", 1e9)
    pixels = 256 * 56 * 56 * 2
    whole = pixels * 512 + LAYER1.weights
    tail = pixels * (512 + 128) + LAYER1.weights
    assert us("layer1", whole=True) == pytest.approx(whole / 4.3e6)
    assert us("layer1", whole=False) == pytest.approx(tail / 4.3e6)


def test_a_halo_costs_products() -> None:
    in_rows_of_64 = 2 * 64 * (64 * 3 * 256 + 128 * (9 * 64 + 256))
    assert whole_blocks._products(LAYER1, True, 128, 180) == in_rows_of_64
    assert whole_blocks._products(LAYER1, False, 128, 180) < in_rows_of_64


def test_a_tile_of_the_whole_map_has_no_halo(monkeypatch) -> None:
    monkeypatch.setattr(whole_blocks, "L2", 1e9)
    monkeypatch.setattr(whole_blocks, "MMA", 100.0)  # products bind
    small = dataclasses.replace(LAYER1, size=14)

    def seconds(whole: bool) -> dict[tuple, float]:
        return {c.box: c.seconds for c in whole_blocks._candidates(small, whole)}

    whole, tail = seconds(True), seconds(False)
    assert whole[1, 14, 14] == tail[1, 14, 14]
    assert whole[1, 4, 14] > tail[1, 4, 14]


def test_weights_stay_where_they_fit(monkeypatch) -> None:
    """Those of layer1 have 139 kB."""
    layer2, _ = STAGES["layer2"]
    assert predict(LAYER1, True).resident
    assert not predict(layer2, True).resident
    monkeypatch.setattr(whole_blocks, "SHARED", 128 * 1024)
    assert not predict(LAYER1, True).resident


def test_without_room_there_is_no_kernel(monkeypatch) -> None:
    monkeypatch.setattr(whole_blocks, "SHARED", 1024)
    assert predict(LAYER1, True) is None
