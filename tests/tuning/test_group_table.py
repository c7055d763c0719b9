"""What ``Plan.tune`` chose is found again by later plans of the same network, and by no others."""

from __future__ import annotations

import json
import re

import pytest
import torch
from clockwork import Clockwork
from clockwork import tune as search
from plans import count, images, ready

import resnet_fast
from resnet_fast import plan
from resnet_fast.dispatch import registry as dispatch
from resnet_fast.dispatch import tables, use
from resnet_fast.tuning import group_search, group_table, kernels

GPU = "fake"


class Costs(dict):
    """All other groups cost."""

    def get(self, name, default=None):
        return super().get(name, 0.3)


COSTS = Costs({"conv_tail:layer1.1.conv2": -2.0, "pointwise_pair:layer2.0.conv3": -0.5})
WINNERS = {"conv_tail:layer1.1.conv2", "pointwise_pair:layer2.0.conv3"}


@pytest.fixture(scope="module")
def model():
    return ready(resnet_fast.ResNet(resnet_fast.Bottleneck, [3, 1, 1, 1], width_per_group=16, num_classes=12))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("RESNET_FAST_TABLES", str(tmp_path))
    monkeypatch.setattr(tables, "gpu_name", lambda device=None: GPU)
    monkeypatch.setattr(kernels, "tune", lambda problems, device, say: None)
    tables.load.cache_clear()
    yield tmp_path
    tables.load.cache_clear()


def tuned(model, x, seconds: float = 60.0, costs: dict = COSTS):
    run = plan(model, x)
    with use("aten.conv_tail", "aten.pointwise_pair"):  # stand for kernels that won
        search(run, x, costs, seconds)
    return run


def case(run, x) -> group_table.NetworkCase:
    return run.network_case(x)


def later(model, x, **how) -> group_table.GroupChoice | None:
    """What a plan made in another process would find."""
    tables.load.cache_clear()
    return group_table.lookup(case(plan(model, x, **how), x), GPU)


def test_another_plan_of_the_network_finds_the_groups(model) -> None:
    x = images()
    run = tuned(model, x)
    assert set(run.across) == WINNERS
    other = ready(
        resnet_fast.ResNet(resnet_fast.Bottleneck, [3, 1, 1, 1], width_per_group=16, num_classes=12)
    )  # other weights
    found = later(other, x)
    assert set(found.across) == WINNERS and found.settled
    assert found.notes[0].startswith("across: as measured on fake on 2") and found.notes[1:] == tuple(run.notes)


def test_torchvisions_network_is_the_same(model) -> None:
    torchvision = pytest.importorskip("torchvision")
    x = images()
    names = [
        group_table.key(case(plan(net.eval(), x), x))
        for net in (resnet_fast.resnet50(), torchvision.models.resnet50(), resnet_fast.resnet34())
    ]
    assert names[0] == names[1] != names[2]


def test_another_input_dtype_way_or_network_finds_nothing(model) -> None:
    x = images()
    tuned(model, x)
    assert (
        later(model, x[:1]) is None
        and later(model, x, dtype=torch.float64) is None
        and later(model, x, cuda_graph=False) is None
    )
    deeper = ready(resnet_fast.ResNet(resnet_fast.Bottleneck, [4, 1, 1, 1], width_per_group=16, num_classes=12))
    assert later(deeper, x) is None and later(model, x) is not None
    assert group_table.lookup(case(plan(model, x), x), "another GPU") is None


@pytest.mark.parametrize(
    "what, reason",
    [("source", "the source of .* changed"), ("versions", "was verified with"), ("kernel", "is unknown")],
)
def test_a_stale_choice_is_not_used_and_says_why(model, folder, monkeypatch, what, reason) -> None:
    x = images()
    tuned(model, x)
    if what == "source":
        real = tables.source_hash
        monkeypatch.setattr(tables, "source_hash", lambda sources: real(sources) + "edited")
    elif what == "versions":
        monkeypatch.setattr(tables, "versions", lambda: {"torch": "9.9", "triton": "9", "driver": "1"})
    else:
        path = folder / "fake.json"
        table = json.loads(path.read_text())
        for record in table["networks"].values():
            record["sources"]["experimental.gone"] = "x"
        path.write_text(json.dumps(table))
    found = later(model, x)
    assert found.across == () and not found.settled
    (note,) = found.notes
    assert re.search(reason, note) and "measure them again with tune=True" in note


def test_plans_use_it_by_default_on_a_gpu_and_unless_told_otherwise(model, monkeypatch) -> None:
    """Here a CPU stands for the GPU."""
    x = images()
    tuned(model, x)
    assert count(plan(model, x)) == {}  # nothing is looked up for a CPU
    monkeypatch.setattr(group_table, "DEVICE", "cpu")
    run = plan(model, x)
    assert (
        set(run.across) == WINNERS
        and count(run) == {"conv_tail": 1, "pointwise_pair": 1}
        and "as measured on fake" in str(run)
    )
    torch.testing.assert_close(run(x), plan(model, x, across=())(x))
    assert count(plan(model, x, across=())) == {} and count(plan(model, x, across=("conv_pool",))) == {"conv_pool": 1}


def test_what_is_settled_is_not_searched_again_and_what_is_not_is(model, registry, monkeypatch) -> None:
    x = images()
    late = tuned(model, x, seconds=-1.0)
    assert any(group_search.UNTRIED in note for note in late.notes) and not later(model, x).settled
    tuned(model, x)
    clocks: list = []
    monkeypatch.setattr(Clockwork, "clock", lambda *args: clocks.append(args) or {})
    monkeypatch.setattr(kernels, "tune", lambda *args, **how: clocks.append(args))
    run, said = plan(model, x), []
    run.use_groups(run.group_tuner(x, Clockwork(GPU, kind="cpu"), 60.0, said.append).tune())
    assert clocks == [] and set(run.across) == WINNERS and said[0].startswith("measured before: ")
    dispatch.kernel("experimental.new", op="conv_tail", supports=lambda p: None)(lambda *args: None)
    assert set(later(model, x).across) == WINNERS and not later(model, x).settled  # used, and worth a new search


def test_what_a_user_named_and_what_could_not_be_timed_is_not_remembered(model, folder, monkeypatch) -> None:
    x = images()
    named = plan(model, x, across=("pointwise_pair",))
    with use("aten.pointwise_pair"):
        search(named, x, COSTS)
    monkeypatch.setattr(Clockwork, "clock", lambda *args: {})
    monkeypatch.setattr(resnet_fast.planning.plan.Plan, "variant", failing(resnet_fast.planning.plan.Plan.variant))
    tuned(model, x)
    assert not (folder / "fake.json").exists()


def failing(make):
    """Explains, but cannot be run with any choice of groups."""
    calls: list = []

    def variant(self, across):
        calls.append(across)
        if len(calls) > 2 * 4 + 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return make(self, across)

    return variant
