"""The command ``tune``, on a pretended GPU."""

from __future__ import annotations

import argparse
from dataclasses import replace

import pytest
import torch
from gpu_tables import GPU, Pretended, right, table, wrong

import resnet_fast
from resnet_fast import plan
from resnet_fast.__main__ import main
from resnet_fast.bench.op import TRAINING
from resnet_fast.cli import tune as tune_command
from resnet_fast.dispatch import tables
from resnet_fast.dispatch.problem import ACROSS, Problem
from resnet_fast.tuning import group_table
from resnet_fast.tuning.kernels import Device

PROBLEM = Problem(
    "add_act", "cpu", torch.float32, (2, 8, 5, 7), "nhwc", residual="nhwc", act="relu"
)
OTHER = replace(PROBLEM, x=(3, 16, 5, 7))
NORMALIZE = (0.5,) * 3, (0.2,) * 3
NETWORK = ["tune", "resnet18", "--batch", "2", "--size", "32", "--dtype", "float32"]


def test_without_a_gpu_it_says_so(capsys, monkeypatch) -> None:
    monkeypatch.setattr("resnet_fast.__main__.COMMANDS", ("tune",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune", "resnet50"]) == 2
    assert "tuning needs a CUDA device" in capsys.readouterr().err


@pytest.fixture
def use_device(candidates, monkeypatch):
    """Return a function that makes a pretended GPU the current device."""
    monkeypatch.setattr("resnet_fast.__main__.COMMANDS", ("tune",))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(tables, "gpu_name", lambda device=None: GPU)
    return lambda device: monkeypatch.setattr(Device, "current", classmethod(lambda cls: device))


@pytest.fixture
def two_problems(monkeypatch):
    monkeypatch.setattr("resnet_fast.cli.tune.networks", lambda args, device: [[PROBLEM, OTHER]])


def test_it_reports_choices_and_failures(use_device, two_problems, candidates, capsys) -> None:
    candidates(fast=right, wrong=wrong)
    use_device(Pretended(calls={"experimental.fast": 5e-6}))
    assert main(["tune", "resnet50", "--batch", "2", "--train"]) == 1
    out, err = capsys.readouterr()
    assert "2 problems, 2 with a kernel faster than aten, 0 in graphs" in out
    assert "never chosen: experimental.wrong on add_act" in out
    assert "[1/2] after 0 s, at most some 0.0 min to go: add_act" in err
    assert err.index(OTHER.key) < err.index(PROBLEM.key)  # the larger first

    assert main(["tune", "resnet50", "--batch", "2", "--train"]) == 1
    assert "[2/2] add_act" in capsys.readouterr().err  # measured before, so without times


def test_lost_device_has_an_exit_code_of_its_own(
    use_device, two_problems, candidates, capsys
) -> None:
    """So that a caller can start the command again: the next process goes on."""
    candidates(fast=right)
    use_device(Pretended(lost=True))
    assert main(["tune", "resnet50", "--train"]) == 3
    assert "the next run passes that kernel over" in capsys.readouterr().err


def test_interruption_says_how_to_go_on(use_device, two_problems, candidates, capsys) -> None:
    def stop(*args):
        raise KeyboardInterrupt

    candidates(stop=stop)
    use_device(Pretended())
    assert main(["tune", "resnet50", "--train"]) == 130
    assert "the same command goes on from there" in capsys.readouterr().err


def problems_of(lines) -> set[Problem]:
    return {line.problem for line in lines if line.problem is not None}


def test_it_tunes_the_problems_of_drop_in_and_plans(use_device, tmp_path) -> None:
    use_device(Pretended())
    assert main(NETWORK) == 0

    x, model = torch.randn(2, 3, 32, 32), resnet_fast.resnet18().eval()
    photos = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    drop_in = [line for line in resnet_fast.explain(model, x) if line.op == "conv_bn_act"]
    posed = problems_of(drop_in)
    posed |= problems_of(plan(model, x, across=ACROSS).explain(x))
    posed |= problems_of(plan(model, photos, normalize=NORMALIZE, across=ACROSS).explain(photos))
    live = {replace(problem, capability=(9, 0)).key for problem in posed}
    folded = {replace(problem, bn=False).key for problem in posed}
    measured = set(table(tmp_path)["measured"])
    assert measured == live | folded
    assert sum("bytes" in key for key in measured) == 1


def test_it_stores_the_groups_for_later_plans(use_device, capsys, tmp_path, monkeypatch) -> None:
    use_device(Pretended())
    assert main(NETWORK) == 0
    (record,) = table(tmp_path)["networks"].values()
    assert record["notes"] == [
        "across: conv_pool: not used: no kernel of it won against single steps"
    ]
    assert record["complete"]
    out, _ = capsys.readouterr()
    assert f"{len(table(tmp_path)['measured'])} problems" in out
    assert "groups at batch 2: none\n  across: conv_pool: not used" in out

    monkeypatch.setattr(group_table, "DEVICE", "cpu")
    run = plan(resnet_fast.resnet18().eval(), torch.randn(2, 3, 32, 32))
    assert run.notes[0].startswith("across: as measured on Pretended GPU")


def test_the_second_time_nothing_is_measured(use_device, capsys) -> None:
    device = Pretended()
    use_device(device)
    assert main(NETWORK) == 0
    verified = len(device.verified)
    capsys.readouterr()

    assert main(NETWORK) == 0

    out, err = capsys.readouterr()
    assert len(device.verified) == verified
    assert "measured before: no groups" in err
    assert "groups at batch 2: none\n  across: as measured on" in out


def test_network_that_cannot_be_planned_is_reported(
    use_device, two_problems, capsys, monkeypatch
) -> None:
    trouble = "plan: step relu (conv1) failed on this input: CUDA out of memory. Tried to allocate 3.00 GiB."

    def make(model, example, **options):
        raise ValueError(trouble)

    use_device(Pretended())
    monkeypatch.setattr("resnet_fast.planning.plan.make", make)
    assert main(NETWORK) == 1
    assert f"groups at batch 2: not searched: {trouble}" in capsys.readouterr().out


def ordered_problems(monkeypatch, **options) -> list[Problem]:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    options = {
        "model": "resnet50",
        "batch": [256, 1],
        "size": 224,
        "dtype": "bfloat16",
        "train": False,
    } | options
    return tune_command.problems(argparse.Namespace(**options), Pretended(kind="cuda"))


def test_it_begins_with_the_largest_share_of_the_network(monkeypatch) -> None:
    order = ordered_problems(monkeypatch)
    # The last convolution of layer1's blocks, three times: the most bytes.
    assert order[0].weight == (256, 64, 1, 1)
    assert order[0].residual
    assert {problem.x[0] for problem in order[:12]} == {256, 1}
    assert {problem.bn for problem in order[:12]} == {False, True}


def test_train_tunes_the_ops_of_training(monkeypatch) -> None:
    assert {problem.op for problem in ordered_problems(monkeypatch, train=True)} == set(TRAINING)
