"""A choice of groups that ``Plan.tune`` stored is found by later plans of the same network, and by no others."""

from __future__ import annotations

import json
import re

import pytest
import torch
from clockwork import Clockwork, tune
from plans import count, images, ready

import resnet_fast
from resnet_fast import plan
from resnet_fast.dispatch import registry as dispatch
from resnet_fast.dispatch import tables, use
from resnet_fast.planning.plan import Plan
from resnet_fast.tuning import group_search, group_table, kernels

GPU = "fake"


class Costs(dict):
    """Seconds of groups by name; every group that is not named costs."""

    def get(self, name, default=None):
        return super().get(name, 0.3)


COSTS = Costs({"conv_tail:layer1.1.conv2": -2.0, "pointwise_pair:layer2.0.conv3": -0.5})
WINNERS = {"conv_tail:layer1.1.conv2", "pointwise_pair:layer2.0.conv3"}


def network(layers=(3, 1, 1, 1)):
    net = resnet_fast.ResNet(
        resnet_fast.Bottleneck, list(layers), width_per_group=16, num_classes=12
    )
    return ready(net)


@pytest.fixture(scope="module")
def model():
    return network()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The folder of the tables of a pretended GPU, whose kernels count as measured."""
    monkeypatch.setenv("RESNET_FAST_TABLES", str(tmp_path))
    monkeypatch.setattr(tables, "gpu_name", lambda device=None: GPU)
    monkeypatch.setattr(kernels, "tune", lambda problems, device, say: None)
    tables.load.cache_clear()
    yield tmp_path
    tables.load.cache_clear()


def tuned(model, x, seconds: float = 60.0):
    run = plan(model, x)
    with use("aten.conv_tail", "aten.pointwise_pair"):  # stand for kernels that won
        tune(run, x, COSTS, seconds)
    return run


def stored(model, x, gpu=GPU, **options) -> group_table.GroupChoice | None:
    """What a plan in another process would find."""
    tables.load.cache_clear()
    case = plan(model, x, **options).network_case(x)
    return group_table.lookup(case, gpu)


# ---------------------------------------------------------------- which plans find a choice


def test_another_model_of_the_same_network_finds_the_groups(model) -> None:
    x = images()
    run = tuned(model, x)
    assert set(run.across) == WINNERS

    found = stored(network(), x)

    assert set(found.across) == WINNERS
    assert found.settled
    assert found.notes[0].startswith("across: as measured on fake on 2")
    assert found.notes[1:] == tuple(run.notes)


def test_torchvisions_network_has_the_same_key() -> None:
    torchvision = pytest.importorskip("torchvision")

    def key(net):
        return group_table.key(plan(net.eval(), images()).network_case(images()))

    ours = key(resnet_fast.resnet50())
    assert ours == key(torchvision.models.resnet50())
    assert ours != key(resnet_fast.resnet34())


def test_another_input_dtype_or_way_to_run_finds_nothing(model) -> None:
    x = images()
    tuned(model, x)
    assert stored(model, x) is not None
    assert stored(model, x[:1]) is None
    assert stored(model, x, dtype=torch.float64) is None
    assert stored(model, x, cuda_graph=False) is None


def test_another_network_or_gpu_finds_nothing(model) -> None:
    x = images()
    tuned(model, x)
    assert stored(network(layers=(4, 1, 1, 1)), x) is None
    assert stored(model, x, gpu="another GPU") is None


def test_plans_on_a_gpu_use_the_stored_choice(model, monkeypatch) -> None:
    """A CPU stands for the GPU."""
    x = images()
    tuned(model, x)
    monkeypatch.setattr(group_table, "DEVICE", "cpu")

    run = plan(model, x)

    assert set(run.across) == WINNERS
    assert count(run) == {"conv_tail": 1, "pointwise_pair": 1}
    assert "as measured on fake" in str(run)
    torch.testing.assert_close(run(x), plan(model, x, across=())(x))


def test_groups_that_a_user_names_come_before_the_stored_choice(model, monkeypatch) -> None:
    x = images()
    tuned(model, x)
    monkeypatch.setattr(group_table, "DEVICE", "cpu")
    assert count(plan(model, x, across=())) == {}
    assert count(plan(model, x, across=("conv_pool",))) == {"conv_pool": 1}


def test_plans_on_a_cpu_look_nothing_up(model) -> None:
    tuned(model, images())
    assert count(plan(model, images())) == {}


# ---------------------------------------------------------------- when a choice is stale


def edit_sources(folder, monkeypatch):
    real = tables.source_hash
    monkeypatch.setattr(tables, "source_hash", lambda sources: real(sources) + "edited")


def change_versions(folder, monkeypatch):
    monkeypatch.setattr(tables, "versions", lambda: {"torch": "9.9", "triton": "9", "driver": "1"})


def remove_a_kernel(folder, monkeypatch):
    path = folder / "fake.json"
    table = json.loads(path.read_text())
    for record in table["networks"].values():
        record["sources"]["experimental.gone"] = "x"
    path.write_text(json.dumps(table))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (edit_sources, "the source of .* changed"),
        (change_versions, "was verified with"),
        (remove_a_kernel, "is unknown"),
    ],
)
def test_stale_choice_is_not_used_and_says_why(model, folder, monkeypatch, change, reason) -> None:
    x = images()
    tuned(model, x)
    change(folder, monkeypatch)

    found = stored(model, x)

    assert found.across == ()
    assert not found.settled
    (note,) = found.notes
    assert re.search(reason, note)
    assert "measure them again with tune=True" in note


# ---------------------------------------------------------------- what is stored


def test_unfinished_search_is_not_settled(model) -> None:
    x = images()
    run = tuned(model, x, seconds=-1.0)
    assert any(group_search.UNTRIED in note for note in run.notes)
    assert not stored(model, x).settled


def test_settled_choice_is_not_searched_again(model, monkeypatch) -> None:
    x, measurements, said = images(), [], []
    tuned(model, x)
    monkeypatch.setattr(Clockwork, "clock", lambda *args: measurements.append(args) or {})
    monkeypatch.setattr(kernels, "tune", lambda *args, **how: measurements.append(args))

    run = plan(model, x)
    run.use_groups(run.group_tuner(x, Clockwork(GPU, kind="cpu"), 60.0, said.append).tune())

    assert measurements == []
    assert set(run.across) == WINNERS
    assert said[0].startswith("measured before: ")


def test_choice_before_a_new_kernel_is_used_but_not_settled(model, registry) -> None:
    x = images()
    tuned(model, x)
    dispatch.kernel("experimental.new", op="conv_tail", supports=lambda p: None)(lambda *args: None)
    found = stored(model, x)
    assert set(found.across) == WINNERS
    assert not found.settled


def test_choice_among_groups_that_a_user_named_is_not_stored(model, folder) -> None:
    x = images()
    run = plan(model, x, across=("pointwise_pair",))
    with use("aten.pointwise_pair"):
        tune(run, x, COSTS)
    assert not (folder / "fake.json").exists()


def test_choice_without_any_timing_is_not_stored(model, folder, monkeypatch) -> None:
    """Each kind of group explains itself, but no network can be run to be timed."""
    real, calls = Plan.variant, []
    # the plan without groups, then each kind before and after its kernels are tuned
    explained = 1 + 2 * 4

    def variant(self, across):
        calls.append(across)
        if len(calls) > explained:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, across)

    monkeypatch.setattr(Plan, "variant", variant)
    tuned(model, images())
    assert len(calls) > explained
    assert not (folder / "fake.json").exists()
