"""Every way to run a network gives the same answers from the same weights, and what is measured is what was judged."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from resnet_fast.bench import network as measuring
from resnet_fast.bench import providers
from resnet_fast.bench.cold_start import cold_start
from resnet_fast.bench.network import Case, measure, oracle
from resnet_fast.bench.op import BASELINES, measure_op, op_problems
from resnet_fast.bench.providers import DTYPES, PROVIDERS, example_input, provider, reference_model
from resnet_fast.dispatch.problem import Problem
from resnet_fast.dispatch.registry import find, kernel
from resnet_fast.live.eligibility import why_plain
from resnet_fast.ops import reference
from resnet_fast.testing.rule import broken_rule

ROOT = Path(__file__).parents[2]
# Compilers take tens of seconds; the suites in benchmarks/ run them.
QUICK = [p for p in PROVIDERS.values() if p.id not in ("compile", "compile-best")]
CASE = Case("infer", "resnet18", "fp32", 2, 64)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return reference_model("resnet18")


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return example_input(2, 64, torch.float32, "cpu")


@pytest.fixture(scope="module")
def trained(model: nn.Module, x: torch.Tensor) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Eager's loss and gradients of one step, and float64's."""
    step = PROVIDERS["eager-nchw"].prepare("train", model, x, torch.float32)
    return step(x).item(), step.gradients(), oracle("train", model, x)


@pytest.mark.parametrize("p", QUICK, ids=lambda p: p.id)
def test_provider_gives_the_reference_answers(
    p: providers.Provider, model: nn.Module, x: torch.Tensor
) -> None:
    reason = p.why_not("infer", "cpu", "fp32")
    if reason is not None:
        pytest.skip(reason)
    before = copy.deepcopy(model.state_dict())
    run = p.prepare("infer", model, x, torch.float32)
    exact = oracle("infer", model, x)
    for again in range(2):
        assert broken_rule(run(x), model(x), exact) is None, again
    assert all(
        torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("name", ["resnet50", "resnext50_32x4d"])
def test_bar_knows_bottlenecks_and_groups(name: str) -> None:
    model, x = reference_model(name), example_input(1, 64, torch.float32, "cpu")
    run = PROVIDERS["folded"].prepare("infer", model, x, torch.float32)
    assert broken_rule(run(x), model(x), oracle("infer", model, x)) is None


@pytest.mark.parametrize("p", [p for p in QUICK if p.train], ids=lambda p: p.id)
def test_training_step_leaves_the_reference_gradients(
    p: providers.Provider, model: nn.Module, x: torch.Tensor, trained: tuple
) -> None:
    reason = p.why_not("train", "cpu", "fp32")
    if reason is not None:
        pytest.skip(reason)
    loss, eager, exact = trained
    step = p.prepare("train", model, x, torch.float32)
    weights = copy.deepcopy(list(step.net.parameters()))
    assert step(x).item() == pytest.approx(loss, rel=1e-5)
    assert broken_rule(step.gradients(), eager, exact, gradient=True) is None
    assert any(not torch.equal(a, b) for a, b in zip(weights, step.net.parameters(), strict=True))


def test_half_precision_training_is_autocast_over_float32_weights(model: nn.Module) -> None:
    step = PROVIDERS["eager"].prepare(
        "train", model, example_input(2, 64, torch.bfloat16, "cpu"), torch.bfloat16
    )
    step(example_input(2, 64, torch.bfloat16, "cpu"))
    assert {p.dtype for p in step.net.parameters()} == {torch.float32}


def test_reference_without_torchvision_is_our_plain_modules(
    monkeypatch: pytest.MonkeyPatch, x: torch.Tensor
) -> None:
    with_torchvision = reference_model("resnet18")
    monkeypatch.setattr(providers.importlib.util, "find_spec", lambda name: None)
    ours = reference_model("resnet18")
    assert why_plain(x, [ours.relu]) is not None
    assert why_plain(x, [copy.deepcopy(ours).relu]) is not None
    assert torch.equal(ours(x), with_torchvision(x))


def test_a_provider_says_why_not() -> None:
    assert (
        PROVIDERS["openvino"].why_not("infer", "cuda", "fp32")
        == "OpenVINO does not run on cuda here"
    )
    assert PROVIDERS["folded"].why_not("train", "cpu", "fp32").endswith("does not train")
    assert (
        PROVIDERS["cudnn-frontend"]
        .why_not("infer", "cuda", "fp32")
        .endswith("takes fp16, bf16, not fp32")
    )
    absent = replace(
        PROVIDERS["eager"], unavailable=providers.engines.missing("no_such_module_here", "torch")
    )
    both = providers.engines.missing("no_such_module_here", "nor_this")
    monkey = dict.fromkeys(("no_such_module_here", "nor_this"), "no-such-package")
    providers.engines.PACKAGES.update(monkey)
    try:
        assert (
            absent.why_not("infer", "cpu", "fp32") == "not installed: pip install no-such-package"
        )
        assert both() == "not installed: pip install no-such-package"  # named once
    finally:
        for name in monkey:
            del providers.engines.PACKAGES[name]
    assert all(
        "resnet_fast[bench]" in providers.engines.PACKAGES[name]
        for name in ("openvino", "onnxruntime", "onnx", "onnxscript")
    )
    with pytest.raises(LookupError, match="'fastest' is unknown; known: eager-nchw"):
        provider("fastest")


def test_a_kernel_is_a_provider_too(model: nn.Module, x: torch.Tensor, registry: dict) -> None:
    calls = []

    @kernel("test.slow", op="conv_bn_act", supports=lambda problem: None)
    def slow(*args):
        calls.append(args)
        return reference.conv_bn_act(*args)

    run = provider("kernel:test.slow").prepare("infer", model, x, torch.float32)
    assert broken_rule(run(x), model(x), oracle("infer", model, x)) is None
    assert len(calls) >= 20
    with pytest.raises(RuntimeError, match="claimed no problem"):
        provider("kernel:aten.cudnn_fused").prepare("infer", model, x, torch.float32)


# ---------------------------------------------------------------- measuring


def test_measured_rows_stand_beside_their_error_and_each_other() -> None:
    found = measure(
        CASE, [PROVIDERS["eager"], PROVIDERS["ours"], PROVIDERS["tensorrt"]], max_rounds=1
    )
    assert found["tensorrt"].row is None
    assert "does not run on cpu" in found["tensorrt"].skipped
    row = found["ours"].row
    assert row.case == "infer/resnet18/fp32/2@64"
    assert row.ours
    assert row.rounds == 1
    assert row.img_s == pytest.approx(2 / row.seconds)
    assert 0 < row.error <= 2 * row.eager_error + 1e-6
    assert row.speed_over.keys() == {"eager"}
    assert found["eager"].row.speed_over.keys() == {"ours"}
    # 148 million multiply-adds at 64²
    assert row.tflops == pytest.approx(2 * 2 * 148e6 / row.seconds / 1e12, rel=0.02)


def test_ours_gets_no_time_when_it_is_wrong() -> None:
    wrong = replace(
        PROVIDERS["ours"], build=lambda model, example, dtype: lambda x: model(x) * 1.001
    )
    found = measure(CASE, [PROVIDERS["eager"], wrong], max_rounds=1)
    assert found["ours"].row is None
    assert "against float64" in found["ours"].wrong
    peer = replace(wrong, id="peer", ours=False)
    # a peer's error is reported, not judged
    assert measure(CASE, [peer], max_rounds=1)["peer"].row.error > 5e-4


def test_what_breaks_says_so_in_its_own_words_and_the_others_are_timed(
    capsys: pytest.CaptureFixture,
) -> None:
    def broken(model, example, dtype):
        raise RuntimeError("no engine today\nand a long tail")

    peer = replace(PROVIDERS["eager"], id="peer", build=broken)
    found = measure(
        CASE, [peer, replace(PROVIDERS["ours"], build=broken), PROVIDERS["eager"]], max_rounds=1
    )
    assert found["peer"].skipped == "failed: RuntimeError: no engine today"
    assert found["peer"].wrong is None
    assert found["ours"].wrong == "failed: RuntimeError: no engine today"
    assert found["ours"].skipped is None
    assert "a long tail" in capsys.readouterr().err  # where ours broke
    assert found["eager"].row is not None


def test_training_is_judged_by_its_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    true = measuring.TrainStep.gradients
    monkeypatch.setattr(
        measuring.TrainStep,
        "gradients",
        lambda step: true(step) * (1.01 if "resnet_fast" in type(step.net).__module__ else 1),
    )
    found = measure(
        replace(CASE, mode="train"), [PROVIDERS["eager"], PROVIDERS["ours"]], max_rounds=1
    )
    assert found["eager"].row.error < 1e-3
    assert "allowed" in found["ours"].wrong


def test_ops_are_checked_before_they_are_timed(registry: dict) -> None:
    @kernel("test.wrong", op="add_act", supports=lambda problem: None)
    def wrong(x, y, gate, act):
        return torch.relu(x + y) + 0.1

    problem = Problem(
        "add_act", "cpu", torch.float32, (2, 8, 5, 5), "nhwc", residual="nhwc", act="relu"
    )
    found = measure_op(problem, [find("aten.add_act"), find("test.wrong")], max_rounds=1)
    assert found["test.wrong"].row is None
    assert "error" in found["test.wrong"].wrong
    assert found["aten.add_act"].row.error is not None
    assert found["aten.add_act"].row.gb_s > 0
    assert found["aten.add_act"].row.speed_over.keys() == {"eager"}


def test_op_problems_are_those_of_the_network() -> None:
    found = op_problems("resnet50", 4, 224, DTYPES["fp32"], "cpu")
    by_op = {op: [p for p in found if p.op == op] for op in BASELINES}
    assert len(by_op["conv_bn_act"]) == 24
    assert by_op["add_act"][0].x == (4, 256, 56, 56)
    assert len(set(found)) == len(found)
    assert all(p.residual or p.act for p in by_op["bn_act"])


def test_cold_start_is_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    found = cold_start("eager", "infer", "resnet18", "fp32", 1, 64, "cpu")
    assert found.seconds > 0.5
    # at least its copy of the weights
    assert found.peak_bytes is None or found.peak_bytes > 11e6 * 4
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(RuntimeError, match="cold start of eager failed"):
        cold_start("eager", "infer", "resnet18", "fp32", 1, 64, "cpu")


def test_suites_report_through_pytest_benchmark(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    saved, ledger = tmp_path / "b.json", tmp_path / "ledger.json"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks/test_models.py",
        "-q",
        "-p",
        "no:cacheprovider",
        "--models",
        "resnet18",
        "--sizes",
        "64",
        "--providers",
        "eager,ours,tensorrt",
        "--seconds",
        "1",
        "--benchmark-json",
        str(saved),
        "--ledger",
        str(ledger),
    ]
    # A run of its own: what tells pytest-benchmark to stand aside in a parallel run must not reach it.
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout
    assert "2 passed, 1 skipped" in done.stdout
    assert "does not run on cpu" in done.stdout
    benchmarks = {
        b["extra_info"]["provider"]: b for b in json.loads(saved.read_text())["benchmarks"]
    }
    rows = {row["provider"]: row for row in json.loads(ledger.read_text())["rows"]}
    assert benchmarks.keys() == rows.keys() == {"eager", "ours"}
    for id, row in rows.items():
        assert benchmarks[id]["group"] == row["case"] == "infer/resnet18/fp32/1@64"
        assert benchmarks[id]["stats"]["median"] == pytest.approx(row["seconds"])
        assert benchmarks[id]["stats"]["rounds"] == row["rounds"]
        assert benchmarks[id]["extra_info"]["eager_error"] == row["eager_error"]


def test_a_suite_refuses_a_wrong_kernel_of_ones_own(tmp_path: Path) -> None:
    """A file is a kernel here too; what breaks the rule fails its test and gets no time."""
    pytest.importorskip("pytest_benchmark")
    mine, saved = tmp_path / "mine.py", tmp_path / "b.json"
    mine.write_text(
        "import resnet_fast\nfrom resnet_fast.dispatch import find\n"
        "@resnet_fast.kernel('mine.add', op='add_act', supports=lambda p: None)\n"
        "def add(*args):\n    return find('aten.add_act').fn(*args) * 1.01\n"
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks/test_ops.py",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "add_act and not backward",
        "--models",
        "resnet18",
        "--sizes",
        "32",
        "--kernels",
        str(mine),
        "--seconds",
        "1",
        "--benchmark-json",
        str(saved),
    ]
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    told = [b["extra_info"] for b in json.loads(saved.read_text())["benchmarks"]]
    assert done.returncode == 1 and "mine.add" in done.stdout, done.stdout
    assert told
    assert "mine.add" not in str(told)
