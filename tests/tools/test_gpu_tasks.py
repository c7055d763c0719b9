"""The tasks of a run on a GPU, done on a CPU at toy sizes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from resnet_fast import plan, resnet50
from resnet_fast.bench import providers
from resnet_fast.bench.network import Case
from resnet_fast.bench.op import TRAINING
from resnet_fast.bench.providers import Provider
from resnet_fast.dispatch import Kernel, tables, use
from resnet_fast.dispatch import registry as dispatch
from resnet_fast.dispatch.problem import ACROSS, Problem
from resnet_fast.testing import grids
from resnet_fast.tuning import group_table
from resnet_fast.util.timing import Timing
from tools.gpu import ceilings, check, child, measure, tune
from tools.gpu.found import Found
from tools.gpu.scale import REHEARSAL, Cases, Scale

TINY = replace(REHEARSAL, size=32, every=60)
MORE = replace(TINY, model="resnet50", size=64, batches=(2, 1))
AT_TWO = replace(MORE, batches=(2,))
RIGHT = {"status": "right"}


def run_task(cases: Cases) -> dict[str, dict]:
    """Run every case of a task and return its rows."""
    return {case: work() for case, work in cases}


def silent(text: str) -> None:
    """Take a sign of life."""


def test_every_task_exists() -> None:
    for name in child.TASKS:
        assert callable(child.task_named(name))


# ---------------------------------------------------------------- check


def test_check_goes_through_every_kind_of_case() -> None:
    rows = run_task(check.check(TINY, print, "aten.add_act", ["float32"]))
    kinds = {case.split()[0] for case in rows}
    assert kinds == {"edge", "small", "full", "nan", "graph", "thread", "row", "float32"}
    assert {row["status"] for row in rows.values()} == {"right", "complete"}


def test_shares_of_a_kernels_cases_make_the_whole() -> None:
    def cases(share: int, shares: int) -> list[str]:
        return [
            case for case, _ in check.check(TINY, print, "aten.add_act", ["float32"], share, shares)
        ]

    *whole, whole_end = cases(0, 1)
    *first, first_end = cases(0, 2)
    *second, second_end = cases(1, 2)
    assert sorted(whole) == sorted(first + second)
    assert whole_end == "float32 complete 1/1"
    assert first_end == "float32 complete 1/2"
    assert second_end == "float32 complete 2/2"


def register(name: str, op: str, function: Callable) -> Kernel:
    """Register an experimental kernel that takes every problem."""
    id = f"experimental.{name}"
    dispatch.kernel(id, op=op, supports=lambda problem: None)(function)
    return dispatch.find(id)


@pytest.fixture
def aten() -> Kernel:
    """torch's own add_act."""
    return dispatch.find("aten", "add_act")


@pytest.fixture
def problem() -> Problem:
    """A problem of add_act with eight channels and no gate."""
    return next(p for p in grids.nasty_problems("add_act") if p.x[1] == 8 and not p.gate)


def drops_nan(x, y, gate, act):
    total = x + y if gate is None else x * gate + y
    return torch.relu(total).nan_to_num(nan=0.0)


def test_a_kernel_that_loses_nan_is_wrong(registry) -> None:
    kernel = register("nan", "add_act", drops_nan)
    rows = run_task(check.special_values(kernel, torch.float32, TINY))
    assert {row["status"] for row in rows.values()} == {"wrong"}
    first = next(iter(rows.values()))
    assert "NaN of eager's are lost" in first["reason"]


def test_a_result_of_nan_differs_from_one_without(problem) -> None:
    nan = (torch.full((4,), float("nan")),)
    row = check.compared(nan, (torch.ones(4),), problem, "it differs")
    assert row["status"] == "wrong"


def test_a_kernel_that_bakes_its_first_data_in_fails_its_replay(
    registry, monkeypatch, problem, aten
) -> None:
    memory = []

    def bakes(x, y, gate, act):
        if not memory:
            memory.append(torch.relu(x + y))
        return memory[0] if len(memory) < 2 else torch.relu(x + y)

    original = check.graph

    def graph(run, device):
        _, result = original(run, device)
        # from here on a call computes again, while the replay keeps what was baked in
        memory.append(None)
        return lambda: result, result

    kernel = register("bakes", "add_act", bakes)
    with monkeypatch.context() as patch:
        patch.setattr(check, "graph", graph)
        row = check.captured(kernel, problem)
    assert row["status"] == "wrong"
    assert "a replay on new data differs" in row["reason"]
    assert check.captured(aten, problem) == RIGHT


def test_a_kernel_of_one_thread_is_wrong_in_another(registry, problem, aten) -> None:
    here = threading.get_ident()

    def one_thread(x, y, gate, act):
        elsewhere = threading.get_ident() != here
        return torch.relu(x + y) + float(elsewhere)

    kernel = register("one", "add_act", one_thread)
    assert check.in_a_thread(kernel, problem)["status"] == "wrong"
    assert check.in_a_thread(aten, problem) == RIGHT


def test_a_kernel_that_starts_too_early_fails_in_a_row(registry, problem, aten) -> None:
    """Pretended: once nobody waits, which is from the fifth call on, it reads what the call before was given."""
    given = []

    def early(x, y, gate, act):
        given.append(x)
        waiting = len(given) <= check.CALLS
        return torch.relu((x if waiting else given[-2]) + y)

    row = check.in_a_row(register("early", "add_act", early), problem)
    assert row["status"] == "wrong"
    assert "4 calls in a row differs" in row["reason"]
    assert check.in_a_row(aten, problem) == RIGHT


def test_more_than_the_limit_of_elements() -> None:
    rows = run_task(check.large(TINY, print, ["aten.add_act", "aten.bn_act"]))
    assert [row["status"] for row in rows.values()] == ["right", "right"]


def test_a_huge_problem_is_little_more_than_huge() -> None:
    huge, _ = check.huge("conv_bn_act", torch.bfloat16, Scale(device="cpu"))
    assert huge.x[0] % 4 == 0
    assert 2**31 < torch.Size(huge.x).numel() < 1.01 * 2**31


@pytest.mark.parametrize("op", ACROSS)
def test_every_op_across_convolutions_has_a_huge_problem(op) -> None:
    (huge,) = check.huge(op, torch.bfloat16, Scale(device="cpu"))
    assert huge.op == op
    assert torch.Size(huge.x).numel() > 2**31


def test_full_sizes_are_what_a_plan_asks_for() -> None:
    x = torch.randn(2, 3, 64, 64)
    asked = set()
    for across in ((), *((op,) for op in ACROSS)):
        lines = plan(resnet50(), x, across=across).explain(x)
        asked |= {line.problem for line in lines}
    full = set()
    for op in ("conv_bn_act", *ACROSS):
        found = check.problems(dispatch.find("aten", op), torch.float32, AT_TWO)
        full |= {problem for kind, problem in found if kind == "full"}
    assert asked - {None} == full


# ---------------------------------------------------------------- layers and tables


def test_layers_are_timed_beside_the_bars() -> None:
    problem, (name, count) = next(iter(measure.distinct_layers(TINY, 5).items()))
    row = measure.layer(problem, name, count, [], measure.device(TINY))
    assert row["times"].keys() == {"eager", "folded", "aten.conv_bn_act"}
    assert row["times"]["eager"]["over"].keys() == {"folded", "aten.conv_bn_act"}
    assert row["failed"] == {}
    assert row["count"] == count
    assert row["flops"] > 0


def test_a_variant_that_fails_is_named_with_its_reason(registry) -> None:
    def breaks(*args):
        raise RuntimeError("no registers left\nmore")

    register("breaks", "conv_bn_act", breaks)
    problem, (name, count) = next(iter(measure.distinct_layers(TINY, 5).items()))
    row = measure.layer(problem, name, count, ["experimental.breaks"], measure.device(TINY))
    assert row["times"].keys() == {"eager", "folded", "aten.conv_bn_act"}
    assert row["failed"] == {"experimental.breaks": "RuntimeError: no registers left"}


def test_a_problem_is_tuned_into_the_table(tmp_path) -> None:
    problem = next(iter(measure.distinct_layers(TINY, 5)))
    row = tune.tuned(problem, [], measure.device(TINY), tmp_path)
    assert row["status"] == "tuned"
    assert row["calls"] == "aten"
    assert (tmp_path / "rehearsal.json").is_file()


@pytest.fixture
def tuned(monkeypatch) -> list[tuple[Problem, list[str]]]:
    """Each problem that would be tuned, with its candidates; none is."""
    seen: list[tuple[Problem, list[str]]] = []

    def record(problem, candidates, *rest):
        seen.append((problem, candidates))
        return {"key": problem.key}

    monkeypatch.setattr(tune, "tuned", record)
    return seen


PROVED = ["experimental.fast", "experimental.slow", "experimental.tail"]


@pytest.fixture
def proved_kernels(registry) -> None:
    """Kernels by the names in PROVED; none is ever called."""
    for name, op in (("fast", "conv_bn_act"), ("slow", "conv_bn_act"), ("tail", "conv_tail")):
        register(name, op, lambda *args: None)


def test_tables_begin_with_what_is_most_at_stake_for_plans(proved_kernels, tuned, tmp_path) -> None:
    """A convolution by what the layers stage saw, a group by what its members take; then the drop-in's, training's."""
    times = {}
    for batch in MORE.batches:
        for problem in measure.distinct_layers(MORE, batch):
            times[problem.key] = {
                measure.ATEN: 10.0,
                "experimental.fast": 10.0,
                "experimental.slow": 30.0,
            }
    gains, second = list(times)[2], list(times)[-1]
    times[gains]["experimental.fast"] = 2.0
    times[second]["experimental.fast"] = 5.0
    cases = run_task(tune.fill_tables(MORE, print, PROVED, times, {}, str(tmp_path)))
    problems = [problem for problem, _ in tuned]
    planned = [p for p in problems if p.op in ("conv_bn_act", "conv_tail") and not p.bn]
    live = [p for p in problems if p.bn]
    training = problems[len(planned) + len(live) :]
    assert problems == [*planned, *live, *training]
    assert len(cases) == 1 + len(problems)
    assert {p.op for p in planned} == {"conv_bn_act", "conv_tail"}
    convolutions = [p.key for p in planned if p.op == "conv_bn_act"]
    assert convolutions == [gains, second]  # the others have nothing to gain
    assert len(live) == len(times)
    assert live[0].x[0] in (1, 2)
    assert {p.op for p in training} == set(TRAINING)


def test_slow_kernels_are_no_candidates(proved_kernels, tuned, tmp_path) -> None:
    times = {}
    for problem in measure.distinct_layers(AT_TWO, 2):
        times[problem.key] = {
            measure.ATEN: 10.0,
            "experimental.fast": 10.0,
            "experimental.slow": 30.0,
        }
    run_task(tune.fill_tables(AT_TWO, print, PROVED, times, {}, str(tmp_path)))
    candidates = [ids for problem, ids in tuned if problem.op == "conv_bn_act"]
    assert candidates
    for ids in candidates:
        assert ids == ["experimental.fast"]


def test_tables_are_filled_if_the_layers_stage_did_not_come_so_far(
    proved_kernels, tmp_path
) -> None:
    cases = iter(tune.fill_tables(MORE, print, PROVED, {}, {}, str(tmp_path)))
    next(cases)
    case, _ = next(cases)
    assert case.startswith(("conv_tail", "conv_bn_act"))


def timed(us: float, **over: float) -> dict:
    """A kernel that was timed in a graph and checked."""
    names = {"aten": measure.ATEN, "fast": "experimental.fast"}
    return {
        "us": us,
        "low": us - 0.1,
        "high": us + 0.1,
        "over": {names[name]: ratio for name, ratio in over.items()},
        "error": 1e-7,
        "eager_error": 2e-7,
    }


@pytest.fixture
def known(registry) -> dict[str, dict]:
    """Two layers that were timed and checked: our kernel wins the first and draws the second."""
    register("fast", "conv_bn_act", dispatch.find("aten", "conv_bn_act").fn)
    first, second, *_ = (problem.key for problem in measure.distinct_layers(MORE, 1))
    aten = timed(10.0, fast=0.5)
    return {
        first: {measure.ATEN: aten, "experimental.fast": timed(5.0, aten=2.0)},
        second: {measure.ATEN: aten, "experimental.fast": timed(9.95, aten=1.005)},
    }


def test_what_was_timed_and_checked_goes_into_the_table(known, tmp_path) -> None:
    gains, draws = known
    row = tune.adopted(known, "rehearsal", tmp_path)
    assert row["graph"] == {gains: "experimental.fast"}
    sections = tables.read(tmp_path / "rehearsal.json", "rehearsal")
    entry = sections["graph"][gains]
    assert entry["aten_us"] == 10.0
    assert tables.stale(entry) is None
    assert draws not in sections["graph"]
    record = sections["measured"][draws]["experimental.fast"]
    assert tables.in_words(record) == "not µs a call, 9.9 in a graph; error 1e-07, eager's 2e-07"


def test_what_was_timed_and_checked_is_not_measured_again(known, tmp_path) -> None:
    gains = next(iter(known))
    tune.adopted(known, "rehearsal", tmp_path)
    problem = next(p for p in measure.distinct_layers(MORE, 1) if p.key == gains)
    row = tune.tuned(problem, ["experimental.fast"], measure.device(MORE), tmp_path)
    assert row["note"] == "measured before"


def test_what_is_known_is_not_tuned(known, tuned, tmp_path) -> None:
    times = {}
    for case, kernels in known.items():
        times[case] = {id: found["us"] for id, found in kernels.items()}
    rows = run_task(
        tune.fill_tables(MORE, print, ["experimental.fast"], times, known, str(tmp_path))
    )
    assert "2 layers" in rows
    assert not known.keys() & {problem.key for problem, _ in tuned}


class PrefersGroups(measure.Rehearsed):
    """A timer to which a plan is faster the more groups it has."""

    def clock(self, variants, confidence=0.01):
        for run in variants.values():
            run()
        return {choice: Timing((10.0 - len(choice),) * 5) for choice in variants}


@pytest.fixture
def rehearsal_tables(tmp_path, monkeypatch):
    """The tables of this folder, on a CPU in the place of a GPU."""
    monkeypatch.setenv("RESNET_FAST_TABLES", str(tmp_path))
    monkeypatch.setattr(tables, "gpu_name", lambda device=None: "rehearsal")
    monkeypatch.setattr(group_table, "DEVICE", "cpu")
    tables.load.cache_clear()
    yield
    tables.load.cache_clear()


def test_a_tuned_plan_is_remembered_for_the_headline(
    rehearsal_tables, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(tune, "device", lambda scale: PrefersGroups("rehearsal", "cpu"))
    with use("aten.conv_pool"):
        (row,) = run_task(tune.tune_plans(AT_TWO, silent, 5.0)).values()
    assert row["status"] == "tuned"
    assert row["across"] == ("conv_pool:conv1",)

    made: list = []

    def recorded(*args, **how):
        made.append(plan(*args, **how))
        return made[-1]

    monkeypatch.setattr(providers, "plan", recorded)
    case = Case("infer", "resnet50", "fp32", 2, 64, "cpu")
    measure.network(case, ["eager-nchw", "ours-plan"], AT_TWO, silent, tmp_path)
    assert made[0].across == ("conv_pool:conv1",)


# ---------------------------------------------------------------- the machine and networks


def test_ceilings_of_whatever_this_is() -> None:
    rows = run_task(ceilings.ceilings(TINY))
    assert {"copy", "cache", "bfloat16", "float32", "tf32", "int8", "launch"} <= set(rows)
    for row in rows.values():
        assert row["value"] > 0


H200 = SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    L2_cache_size=60 << 20,
    total_memory=141 << 30,
)


@pytest.fixture
def pretended_h200(monkeypatch) -> None:
    """An H200 with a cuDNN that torch does not accept."""

    def incompatible() -> None:
        raise RuntimeError("cuDNN version incompatibility: PyTorch was compiled against another")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: H200)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: H200.name)
    monkeypatch.setattr(tables, "_driver", lambda: "13000")
    monkeypatch.setattr(tables, "versions", tables.versions.__wrapped__)
    monkeypatch.setattr(torch.backends.cudnn, "version", incompatible)


def test_environment_of_a_gpu(pretended_h200) -> None:
    """A run that does not get this row ends."""
    row = ceilings.machine_row(Scale())
    assert row["status"] == "here"
    assert row["machine"]["name"] == H200.name
    assert row["versions"]["driver"] == "13000"
    assert row["capability"] == [9, 0]
    assert row["cudnn"].startswith("cuDNN version incompatibility")
    assert row["known"]["copy"] > 4e12


def test_environment_names_the_machine() -> None:
    _, work = next(iter(ceilings.environment(TINY, print)))
    row = work()
    assert row["status"] == "here"
    assert row["machine"]["device"] == "cpu"


def test_environment_without_a_gpu_is_one_row(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rows = run_task(ceilings.environment(Scale(), print))
    assert list(rows) == ["machine"]
    assert rows["machine"]["status"] == "no gpu"


def test_a_network_by_everyone_and_one_that_is_wrong(monkeypatch, tmp_path) -> None:
    broken = Provider("ours", "broken", lambda *args: 1 / 0, ours=True)
    monkeypatch.setitem(measure.PROVIDERS, "ours", broken)
    case = Case("infer", "resnet18", "fp32", 1, 32, "cpu")
    row = measure.network(case, ["eager-nchw", "eager", "ours"], TINY, silent, tmp_path)
    assert [r["provider"] for r in row["rows"]] == ["eager-nchw", "eager"]
    assert "ZeroDivisionError" in row["wrong"]["ours"]
    row |= {"stage": "headline", "job": "networks", "case": case.name}
    bad = Found([row]).bad()
    assert [(each["job"], each["status"]) for each in bad] == [("ours", "wrong")]
