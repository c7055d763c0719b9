"""Measured choice: everything but the clock, on a pretended GPU with right, wrong, broken and greedy kernels."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch
from gpu_tables import GPU, table

import resnet_fast
from resnet_fast import plan
from resnet_fast.__main__ import main
from resnet_fast.bench.op import TRAINING
from resnet_fast.cli import tune as tune_command
from resnet_fast.dispatch import choose, tables
from resnet_fast.dispatch import registry as dispatch
from resnet_fast.dispatch.problem import ACROSS, Problem
from resnet_fast.testing.full_size import full_args
from resnet_fast.tuning import group_table
from resnet_fast.tuning import kernels as autotune
from resnet_fast.tuning.call import once
from resnet_fast.tuning.kernels import Device, DeviceLost, tune
from resnet_fast.util.timing import Timing

PROBLEM = Problem("add_act", "cpu", torch.float32, (2, 8, 5, 7), "nhwc", residual="nhwc", act="relu")
CONV = Problem(
    "conv_bn_act", "cpu", torch.float32, (2, 8, 6, 6), "nhwc", (8, 8, 3, 3), padding=(1, 1), bn=True, act="relu"
)
OTHER = replace(PROBLEM, x=(3, 16, 5, 7))


@dataclass
class Replay:
    run: Callable

    def __call__(self):
        return self.run()


@dataclass
class Pretended(Device):
    """A CPU that passes for a GPU: its clock reads what a test wrote down, by kernel, for calls and for graphs."""

    name: str = GPU
    kind: str = "cpu"
    calls: dict[str, float] = field(default_factory=dict)
    graph: dict[str, float] = field(default_factory=dict)
    uncapturable: tuple[str, ...] = ()
    verified: list[tuple[str, str]] = field(default_factory=list)
    timed: list[str] = field(default_factory=list)
    lost: bool = False

    def verify(self, kernel, problem):
        self.verified.append((kernel.id, problem.key))
        return super().verify(kernel, problem)

    def clock(self, variants, confidence=0.01):
        for run in variants.values():
            run()
        self.timed += variants
        book = self.graph if any(isinstance(run, Replay) for run in variants.values()) else self.calls
        return {id: Timing((8 * book.get(id, 10e-6),) * 3) for id in variants}  # 8 calls a reading

    def capture(self, runs):
        graphs = {id: Replay(run) for id, run in runs.items() if id not in self.uncapturable}
        return graphs, {id: "operation not permitted when stream is capturing" for id in runs if id not in graphs}

    def settle(self):
        if self.lost:
            raise DeviceLost("the GPU stopped answering in this process: an illegal memory access was encountered")


def right(x, y, gate, act):
    return torch.relu(x + y)


def wrong(x, y, gate, act):
    out = torch.relu(x + y)
    out[-1, -1, -1, -1] += 1
    return out


def greedy(x, y, gate, act):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.\nmore words")


def broken(x, y, gate, act):
    raise RuntimeError("PassManager::run failed")


@pytest.fixture
def candidates(registry, tmp_path, monkeypatch):
    """Registers kernels for add_act by name; only they, ``aten`` and what a plan on a CPU asks for exist; tables live in a folder of the test's."""
    monkeypatch.setattr(dispatch, "FAMILIES", ("aten",))
    for id in [id for id in registry if not id.startswith(("aten.", "cpu."))]:
        del registry[id]
    monkeypatch.setenv("RESNET_FAST_TABLES", str(tmp_path))
    tables.load.cache_clear()
    yield lambda **kernels: [
        dispatch.kernel(f"experimental.{name}", op="add_act", supports=lambda p: None)(fn)
        for name, fn in kernels.items()
    ]
    tables.load.cache_clear()


# ---------------------------------------------------------------- choosing


def test_the_fastest_right_kernel_wins_and_the_wrong_one_is_named(candidates, tmp_path) -> None:
    candidates(fast=right, wrong=wrong)
    device = Pretended(calls={"experimental.fast": 5e-6, "experimental.wrong": 1e-6}, graph={"experimental.fast": 4e-6})
    (outcome,) = tune([PROBLEM], device=device)
    assert (outcome.calls, outcome.graph) == ("experimental.fast", "experimental.fast")
    assert "experimental.wrong" not in device.timed
    assert list(outcome.bad) == ["experimental.wrong"] and "rms error" in outcome.bad["experimental.wrong"]
    entry = table(tmp_path)["entries"][PROBLEM.key]
    assert entry["kernel"] == "experimental.fast"
    assert entry["time_us"] == pytest.approx(5) and entry["aten_us"] == pytest.approx(10)
    assert entry["versions"] == tables.versions() and 0 <= entry["error"] < 1e-6
    assert table(tmp_path)["graph"][PROBLEM.key]["time_us"] == pytest.approx(4)


def test_no_entry_unless_aten_is_beaten_by_more_than_noise(candidates, tmp_path) -> None:
    candidates(near=right)
    device = Pretended(calls={"experimental.near": 9.95e-6}, graph={"experimental.near": 5e-6})
    (outcome,) = tune([PROBLEM], device=device)
    assert (outcome.calls, outcome.graph) == ("aten", "experimental.near")
    assert PROBLEM.key not in table(tmp_path)["entries"]


def test_a_kernel_that_cannot_be_captured_still_serves_calls(candidates, tmp_path) -> None:
    candidates(host=right)
    device = Pretended(calls={"experimental.host": 5e-6}, uncapturable=("experimental.host",))
    (outcome,) = tune([PROBLEM], device=device)
    assert (outcome.calls, outcome.graph) == ("experimental.host", "aten")
    assert "capturing" in outcome.records["experimental.host"]["not_captured"]


@pytest.mark.parametrize(
    "fn, how",
    [
        (greedy, "out of memory: CUDA out of memory. Tried to allocate 3.00 GiB."),
        (broken, "failed: RuntimeError: PassManager::run failed"),
    ],
)
def test_a_candidate_that_fails_is_skipped_and_named(candidates, tmp_path, fn, how) -> None:
    candidates(bad=fn, good=right)
    (outcome,) = tune([PROBLEM], device=Pretended(calls={"experimental.good": 5e-6}))
    assert outcome.calls == "experimental.good" and outcome.bad == {"experimental.bad": how}
    assert how.split(":")[0].upper() in str(outcome)


def test_out_of_memory_while_timing_leaves_the_others_timed(candidates) -> None:
    seen = []

    def grows(x, y, gate, act):
        seen.append(1)
        return greedy(x, y, gate, act) if len(seen) > 1 else right(x, y, gate, act)

    candidates(grows=grows, good=right)
    (outcome,) = tune([PROBLEM], device=Pretended(calls={"experimental.good": 5e-6}))
    assert outcome.calls == "experimental.good" and "out of memory" in outcome.bad["experimental.grows"]


def test_out_of_memory_for_the_arguments_says_so_and_chooses_nothing(candidates, monkeypatch, tmp_path) -> None:
    candidates(good=right)
    monkeypatch.setattr(autotune, "argument_sets", lambda problem, cache: greedy(*[None] * 4))
    (outcome,) = tune([PROBLEM], device=Pretended())
    assert outcome.calls == "aten" and "arguments to time it on" in outcome.bad["experimental.good"]
    assert table(tmp_path)["entries"] == {}


def test_only_the_named_kernels_take_part_but_the_incumbent_stays(candidates, tmp_path) -> None:
    candidates(fast=right, slow=right)
    device = Pretended(calls={"experimental.fast": 5e-6, "experimental.slow": 6e-6})
    tune([PROBLEM], kernels=["experimental.fast"], device=device)
    assert "experimental.slow" not in table(tmp_path)["measured"][PROBLEM.key]
    (outcome,) = tune([PROBLEM], kernels=["experimental.slow"], device=device)
    assert outcome.calls == "experimental.fast"
    with pytest.raises(LookupError, match="'experimental.absent' is unknown"):
        tune([PROBLEM], kernels=["experimental.absent"], device=device)


def test_cudnn_may_choose_by_timing_while_tuning_and_not_afterwards(candidates, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    candidates(looks=lambda *args: seen.append(torch.backends.cudnn.benchmark) or right(*args))
    tune([PROBLEM], device=Pretended())
    assert all(seen) and not torch.backends.cudnn.benchmark


@pytest.mark.parametrize("residual, act", [("nhwc", "relu"), (None, "none")])
def test_a_folded_convolution_is_timed_as_a_plan_binds_it(monkeypatch, residual, act) -> None:
    """Or what our kernels have to beat would fold anew in each call, which a plan does not."""
    problem = replace(CONV, bn=False, residual=residual, act=act)
    aten, args = dispatch.find("aten", "conv_bn_act"), full_args(problem)
    direct, call = aten.fn(*args), once(aten, problem, args)
    live = once(aten, replace(problem, bn=True), full_args(replace(problem, bn=True)))
    monkeypatch.setattr("resnet_fast.kernels.prepack.fold", lambda *args: 1 / 0)
    monkeypatch.setattr("resnet_fast.kernels.prepack.packed", lambda *args: 1 / 0)
    torch.testing.assert_close(call(), direct)
    with pytest.raises(ZeroDivisionError):
        live()


@pytest.mark.parametrize("residual", (None, "nhwc"))
def test_training_norms_are_timed_with_their_running_statistics(residual, monkeypatch) -> None:
    """Torch's as the modules launch it, for so a GPU runs it that has no kernel of ours: not by the op, which takes more launches."""
    problem = Problem(
        op="bn_act", device="cpu", dtype=torch.float32, x=(2, 8, 5, 4), layout="nhwc", residual=residual, act="relu"
    )
    aten, args = dispatch.find("aten", "bn_act"), full_args(problem)
    ours = replace(aten, id="experimental.norm")
    y, mean, var = aten.fn(*args)
    tracked = []
    monkeypatch.setattr("resnet_fast.runtime.program.track", lambda bn, *found: tracked.append(found))
    for kernel in (aten, ours):
        torch.testing.assert_close(once(kernel, problem, args)(), y)
    assert (
        len(tracked) == 1
        and torch.equal(tracked[0][0], mean)
        and torch.equal(tracked[0][1], var)
        and tracked[0][2] == 40
    )
    monkeypatch.setattr(torch, "native_batch_norm", lambda *args: 1 / 0)
    once(aten, problem, args)()


# ---------------------------------------------------------------- resuming


def test_what_was_measured_is_skipped(candidates) -> None:
    candidates(fast=right, wrong=wrong)
    tune([PROBLEM], device=Pretended(calls={"experimental.fast": 5e-6}))
    again = Pretended()
    first, second = tune([PROBLEM, OTHER], device=again)
    assert first.note == "measured before" and first.calls == "experimental.fast" and "experimental.wrong" in first.bad
    assert {key for _, key in again.verified} == {OTHER.key}


def test_other_source_is_measured_again(candidates, monkeypatch) -> None:
    candidates(fast=right)
    tune([PROBLEM], device=Pretended(calls={"experimental.fast": 5e-6}))
    monkeypatch.setattr(tables, "source_hash", lambda sources: "edited")
    (outcome,) = tune([PROBLEM], device=Pretended(calls={"experimental.fast": 20e-6}))
    assert outcome.note == "" and outcome.calls == "aten"


def test_other_versions_are_verified_again_and_keep_their_times(candidates, monkeypatch, tmp_path) -> None:
    candidates(fast=right, slow=right)
    tune([PROBLEM], device=Pretended(calls={"experimental.fast": 5e-6}))
    monkeypatch.setattr(tables, "versions", lambda: {"torch": "9.9", "triton": "9", "driver": "14000"})
    device = Pretended()
    (outcome,) = tune([PROBLEM], device=device)
    assert outcome.note.startswith("verified again") and outcome.calls == "experimental.fast"
    assert device.verified == [("experimental.fast", PROBLEM.key)] and device.timed == []
    entry = table(tmp_path)["entries"][PROBLEM.key]
    assert entry["versions"]["torch"] == "9.9" and entry["time_us"] == pytest.approx(5)


def test_a_kernel_that_new_versions_broke_is_dropped(candidates, monkeypatch, tmp_path) -> None:
    works = [True]
    candidates(fast=lambda *args: (right if works[0] else wrong)(*args))
    tune([PROBLEM], device=Pretended(calls={"experimental.fast": 5e-6}))
    works[0] = False
    monkeypatch.setattr(tables, "versions", lambda: {"torch": "9.9", "triton": "9", "driver": "14000"})
    (outcome,) = tune([PROBLEM], device=Pretended())
    assert outcome.calls == "aten" and "wrong" in outcome.bad["experimental.fast"]
    assert PROBLEM.key not in table(tmp_path)["entries"]


def test_an_interruption_loses_the_problem_in_hand_only(candidates, tmp_path) -> None:
    def stop(x, y, gate, act):
        if x.shape == OTHER.x:
            raise KeyboardInterrupt
        return right(x, y, gate, act)

    candidates(fast=stop)
    with pytest.raises(KeyboardInterrupt):
        tune([PROBLEM, OTHER], device=Pretended(calls={"experimental.fast": 5e-6}))
    assert list(table(tmp_path)["measured"]) == [PROBLEM.key]
    assert not list(tmp_path.glob("*.part"))


def test_a_lost_device_ends_the_run_names_the_kernel_and_is_passed_over_next_time(candidates, tmp_path) -> None:
    device = Pretended(calls={"experimental.good": 5e-6})

    def poison(x, y, gate, act):
        device.lost = True
        raise RuntimeError("an illegal memory access was encountered")

    candidates(poison=poison, good=right)
    with pytest.raises(DeviceLost, match="experimental.poison on add_act .* table is intact"):
        tune([PROBLEM], device=device)
    assert list(table(tmp_path)["measured"][PROBLEM.key]) == ["experimental.poison"]
    fresh = Pretended(calls={"experimental.good": 5e-6})
    (outcome,) = tune([PROBLEM], device=fresh)
    assert outcome.calls == "experimental.good" and "lost the device" in outcome.bad["experimental.poison"]
    assert ("experimental.poison", PROBLEM.key) not in fresh.verified


# ---------------------------------------------------------------- looking up


def test_lookup_wants_this_gpu_this_source_and_these_versions(candidates, monkeypatch, tmp_path) -> None:
    candidates(fast=right)
    monkeypatch.setattr(tables, "gpu_name", lambda device=None: GPU)
    assert tables.lookup(PROBLEM) is None and tables.why_not(PROBLEM) is None
    tune([PROBLEM], device=Pretended(calls={"experimental.fast": 5e-6}))
    assert tables.lookup(PROBLEM)["kernel"] == "experimental.fast"
    assert tables.lookup(PROBLEM, graph=True) is None  # ten microseconds each in a graph
    chosen, why = choose(replace(PROBLEM, device="cuda"))
    assert chosen.id == "experimental.fast" and why.startswith("measured: 5.0 µs on Pretended GPU")
    with monkeypatch.context() as patch:
        patch.setattr(tables, "versions", lambda: {"torch": "9.9", "triton": "9", "driver": "1"})
        assert tables.lookup(PROBLEM) is None and "was verified with" in tables.why_not(PROBLEM)
    with monkeypatch.context() as patch:
        patch.setattr(tables, "source_hash", lambda sources: "edited")
        assert tables.lookup(PROBLEM) is None and "source of experimental.fast changed" in tables.why_not(PROBLEM)
    monkeypatch.setattr(tables, "gpu_name", lambda device=None: "Another GPU")
    assert tables.lookup(PROBLEM) is None


def test_a_stale_entry_of_the_user_does_not_hide_a_shipped_one(candidates, monkeypatch, tmp_path) -> None:
    candidates(fast=right)
    monkeypatch.setattr(tables, "gpu_name", lambda device=None: GPU)
    tune([PROBLEM], device=Pretended(calls={"experimental.fast": 5e-6}), folder=tmp_path / "shipped")
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped")
    tables.update(GPU, lambda s: s["entries"].update({PROBLEM.key: {"kernel": "experimental.gone"}}))
    assert tables.lookup(PROBLEM)["kernel"] == "experimental.fast"


def test_arguments_rotate_through_three_caches() -> None:
    sets = autotune.argument_sets(PROBLEM, cache_bytes=20_000)
    size = sum(t.nbytes for t in sets[0][:2])
    assert (len(sets) - 1) * size < 60_000 <= len(sets) * size
    assert len({t.data_ptr() for args in sets for t in args[:2]}) == 2 * len(sets)
    assert all(t.stride() == sets[0][0].stride() for args in sets for t in args[:2])
    assert len(autotune.argument_sets(PROBLEM, cache_bytes=0)) == 1


# ---------------------------------------------------------------- the command


def test_command_without_a_gpu_says_so(capsys, monkeypatch) -> None:
    monkeypatch.setattr("resnet_fast.__main__.COMMANDS", ("tune",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune", "resnet50"]) == 2
    assert "tuning needs a CUDA device" in capsys.readouterr().err


@pytest.fixture
def pretended_command(candidates, monkeypatch):
    monkeypatch.setattr("resnet_fast.__main__.COMMANDS", ("tune",))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(tables, "gpu_name", lambda device=None: GPU)
    return lambda device: monkeypatch.setattr(Device, "current", classmethod(lambda cls: device))


@pytest.fixture
def two_adds(monkeypatch):
    monkeypatch.setattr("resnet_fast.cli.tune.networks", lambda args, device: [[PROBLEM, OTHER]])


def test_command_reports_choices_and_who_failed(pretended_command, two_adds, candidates, capsys) -> None:
    candidates(fast=right, wrong=wrong)
    pretended_command(Pretended(calls={"experimental.fast": 5e-6}))
    assert main(["tune", "resnet50", "--batch", "2", "--train"]) == 1
    out, err = capsys.readouterr()
    assert "2 problems, 2 with a kernel faster than aten, 0 in graphs" in out
    assert (
        "never chosen: experimental.wrong on add_act" in out
        and "[1/2] after 0 s, at most some 0.0 min to go: add_act" in err
    )
    assert err.index(OTHER.key) < err.index(PROBLEM.key)  # the larger first
    assert main(["tune", "resnet50", "--batch", "2", "--train"]) == 1
    assert "[2/2] add_act" in capsys.readouterr().err  # measured before: no time to speak of


def test_command_asks_to_be_run_again_once_the_device_is_lost(pretended_command, two_adds, candidates, capsys) -> None:
    """Its code is one of its own, for the one that runs it again: the next process goes on."""
    candidates(fast=right)
    pretended_command(Pretended(lost=True))
    assert main(["tune", "resnet50", "--train"]) == 3
    assert "the next run passes that kernel over" in capsys.readouterr().err


ASK = ["tune", "resnet18", "--batch", "2", "--size", "32", "--dtype", "float32"]


def test_command_tunes_what_drop_in_and_plan_ask_and_goes_on(pretended_command, capsys, tmp_path, monkeypatch) -> None:
    """And the groups of the whole network, which later plans then use."""
    device = Pretended()
    pretended_command(device)
    assert main(ASK) == 0
    x, model = torch.randn(2, 3, 32, 32), resnet_fast.resnet18().eval()
    photos = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    asked = {line.problem for line in resnet_fast.explain(model, x) if line.op == "conv_bn_act"}
    asked |= {line.problem for line in plan(model, x, across=ACROSS).explain(x) if line.problem is not None}
    asked |= {
        line.problem
        for line in plan(model, photos, normalize=((0.5,) * 3, (0.2,) * 3), across=ACROSS).explain(photos)
        if line.problem
    }
    keys = {replace(problem, capability=(9, 0)).key for problem in asked} | {replace(p, bn=False).key for p in asked}
    assert set(table(tmp_path)["measured"]) == keys and sum("bytes" in key for key in keys) == 1
    (record,) = table(tmp_path)["networks"].values()
    assert (
        record["notes"] == ["across: conv_pool: not used: no kernel of it won against single steps"]
        and record["complete"]
    )
    out, err = capsys.readouterr()
    assert f"{len(keys)} problems" in out and "groups at batch 2: none\n  across: conv_pool: not used" in out
    tries = len(device.verified)
    assert main(ASK) == 0
    out, err = capsys.readouterr()
    assert (
        len(device.verified) == tries
        and "measured before: no groups" in err
        and "groups at batch 2: none\n  across: as measured on" in out
    )
    monkeypatch.setattr(group_table, "DEVICE", "cpu")
    assert plan(model, x).notes[0].startswith("across: as measured on Pretended GPU")


def test_command_begins_with_the_largest_share_of_its_network(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    args = argparse.Namespace(model="resnet50", batch=[256, 1], size=224, dtype="bfloat16", train=False)
    order = tune_command.problems(args, Pretended(kind="cuda"))
    assert (
        order[0].weight == (256, 64, 1, 1) and order[0].residual
    )  # the last of layer1's blocks, three times: the most bytes
    assert {p.x[0] for p in order[:12]} == {256, 1} and {p.bn for p in order[:12]} == {False, True}
    args.train = True
    assert {p.op for p in tune_command.problems(args, Pretended(kind="cuda"))} == set(TRAINING)


def test_command_says_that_a_network_could_not_be_planned(pretended_command, two_adds, capsys, monkeypatch) -> None:
    def make(model, example, **how):
        raise ValueError(
            "plan: step relu (conv1) failed on this input: CUDA out of memory. Tried to allocate 3.00 GiB."
        )

    pretended_command(Pretended())
    monkeypatch.setattr("resnet_fast.planning.plan.make", make)
    assert main(ASK) == 1
    assert (
        "groups at batch 2: not searched: plan: step relu (conv1) failed on this input: CUDA out of memory"
        in capsys.readouterr().out
    )


def test_command_interrupted_says_how_to_go_on(pretended_command, two_adds, candidates, capsys) -> None:
    def stop(*args):
        raise KeyboardInterrupt

    candidates(stop=stop)
    pretended_command(Pretended())
    assert main(["tune", "resnet50", "--train"]) == 130
    assert "the same command goes on from there" in capsys.readouterr().err


def test_versions_ask_the_driver(monkeypatch) -> None:
    """Pretended: a library like libcuda, of CUDA 13.0, and one that cannot answer."""
    import ctypes
    from types import SimpleNamespace

    def answer(version, error):
        def ask(place):
            place._obj.value = version
            return error

        return lambda name: SimpleNamespace(cuDriverGetVersion=ask)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ctypes, "CDLL", answer(13000, 0))
    assert tables.versions.__wrapped__()["driver"] == "13000"
    monkeypatch.setattr(ctypes, "CDLL", answer(0, 3))
    with pytest.raises(RuntimeError, match="CUDA error 3"):
        tables.versions.__wrapped__()
