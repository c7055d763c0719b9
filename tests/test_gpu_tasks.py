"""The tasks of a run on a GPU, done on a CPU at toy sizes."""

from __future__ import annotations

import threading

import gpu_check
import gpu_measure
import pytest
import torch
from gpu_scale import REHEARSAL, Scale
from gpu_summary import Found

from resnet_fast.dispatch import registry as dispatch
from resnet_fast.testing import grids


def test_every_task_exists() -> None:
    from gpu_child import TASKS

    assert all(
        callable(getattr({"gpu_check": gpu_check, "gpu_measure": gpu_measure}[module], name))
        for name, module in TASKS.items()
    )


TINY = Scale(**{**REHEARSAL.__dict__, "size": 32, "every": 60})


def run_task(cases) -> dict[str, dict]:
    return {case: work() for case, work in cases}


def test_check_goes_through_every_kind_of_case() -> None:
    rows = run_task(gpu_check.check(TINY, print, "aten.add_act", ["float32"]))
    assert {case.split()[0] for case in rows} == {"edge", "small", "full", "nan", "graph", "thread", "row", "float32"}
    assert {row["status"] for row in rows.values()} == {"right", "complete"}


def test_shares_of_a_kernels_cases_make_the_whole() -> None:
    whole, *shares = [
        [case for case, _ in gpu_check.check(TINY, print, "aten.add_act", ["float32"], *share)]
        for share in ((0, 1), (0, 2), (1, 2))
    ]
    assert sorted(whole[:-1]) == sorted(shares[0][:-1] + shares[1][:-1])
    assert [each[-1] for each in (whole, *shares)] == [f"float32 complete {end}" for end in ("1/1", "1/2", "2/2")]


def drops_nan(x, y, gate, act):
    return torch.relu(x + y if gate is None else x * gate + y).nan_to_num(nan=0.0)


def test_a_kernel_that_loses_nan_is_wrong(registry) -> None:
    dispatch.kernel("experimental.nan", op="add_act", supports=lambda p: None)(drops_nan)
    row = run_task(gpu_check.special_values(dispatch.find("experimental.nan"), torch.float32, TINY))
    assert {r["status"] for r in row.values()} == {"wrong"}
    assert "NaN of eager's are lost" in next(iter(row.values()))["reason"]


def test_a_kernel_that_bakes_its_first_data_in_fails_its_replay(registry) -> None:
    memory = []

    def bakes(x, y, gate, act):
        memory.append(torch.relu(x + y)) if not memory else None
        return memory[0] if len(memory) < 2 else torch.relu(x + y)

    problem = next(p for p in grids.nasty_problems("add_act") if p.x[1] == 8 and not p.gate)
    kernel = dispatch.kernel("experimental.bakes", op="add_act", supports=lambda p: None)
    kernel(bakes)
    found = dispatch.find("experimental.bakes")
    original = gpu_check.graph

    def graph(run, device):
        replay, kept = original(run, device)
        memory.append(None)  # from here on a call computes again, while the replay keeps what was baked in
        return lambda: kept, kept

    gpu_check.graph = graph
    try:
        row = gpu_check.captured(found, problem)
    finally:
        gpu_check.graph = original
    assert row["status"] == "wrong" and "a replay on new data differs" in row["reason"]
    assert gpu_check.captured(dispatch.find("aten", "add_act"), problem) == {"status": "right"}


def test_a_kernel_of_one_thread_is_wrong_in_another(registry) -> None:
    here = threading.get_ident()
    problem = next(p for p in grids.nasty_problems("add_act") if p.x[1] == 8 and not p.gate)
    dispatch.kernel("experimental.one", op="add_act", supports=lambda p: None)(
        lambda x, y, gate, act: torch.relu(x + y) + float(threading.get_ident() != here)
    )
    assert gpu_check.in_a_thread(dispatch.find("experimental.one"), problem)["status"] == "wrong"
    assert gpu_check.in_a_thread(dispatch.find("aten", "add_act"), problem) == {"status": "right"}


def test_a_kernel_that_starts_too_early_fails_in_a_row(registry) -> None:
    """Pretended: once nobody waits, which is from the fifth call on, it reads what the call before was given."""
    given = []

    def early(x, y, gate, act):
        given.append(x)
        return torch.relu((x if len(given) <= gpu_check.CALLS else given[-2]) + y)

    problem = next(p for p in grids.nasty_problems("add_act") if p.x[1] == 8 and not p.gate)
    dispatch.kernel("experimental.early", op="add_act", supports=lambda p: None)(early)
    row = gpu_check.in_a_row(dispatch.find("experimental.early"), problem)
    assert row["status"] == "wrong" and "4 calls in a row differs" in row["reason"]
    assert gpu_check.in_a_row(dispatch.find("aten", "add_act"), problem) == {"status": "right"}


def test_more_than_the_limit_of_elements() -> None:
    rows = run_task(gpu_check.large(TINY, print, ["aten.add_act", "aten.bn_act"]))
    assert {row["status"] for row in rows.values()} == {"right"} and len(rows) == 2
    problem = gpu_check.huge("conv_bn_act", torch.bfloat16, Scale(device="cpu"))[0]
    assert problem.x[0] % 4 == 0 and 2**31 < torch.Size(problem.x).numel() < 1.01 * 2**31


def test_layers_are_timed_beside_the_bars_and_tables_filled(tmp_path) -> None:
    machine = gpu_measure.device(TINY)
    problem, (name, count) = next(iter(gpu_measure.listed(TINY, 5).items()))
    row = gpu_measure.layer(problem, name, count, [], machine)
    assert set(row["times"]) == {"eager", "folded", "aten.conv_bn_act"} and row["failed"] == {}
    assert row["count"] == count and row["flops"] > 0
    assert row["times"]["eager"]["over"].keys() == {"folded", "aten.conv_bn_act"}
    row = gpu_measure.tuned(problem, [], machine, tmp_path)
    assert row["status"] == "tuned" and row["calls"] == "aten" and (tmp_path / "rehearsal.json").is_file()


MORE = Scale(**{**TINY.__dict__, "model": "resnet50", "size": 64, "batches": (2, 1)})


def test_full_sizes_are_what_a_plan_asks_for() -> None:
    from resnet_fast import plan, resnet50
    from resnet_fast.dispatch.problem import ACROSS

    x = torch.randn(2, 3, 64, 64)
    asked = {
        line.problem
        for across in ((), *((op,) for op in ACROSS))
        for line in plan(resnet50(), x, across=across).explain(x)
    }
    small = Scale(**{**MORE.__dict__, "batches": (2,)})
    kernels = [dispatch.find("aten", op) for op in ("conv_bn_act", *ACROSS)]
    assert asked - {None} == {
        p for k in kernels for kind, p in gpu_check.problems(k, torch.float32, small) if kind == "full"
    }


def test_tables_begin_with_what_is_most_at_stake_for_plans(registry, tmp_path) -> None:
    """A convolution by what the layers stage saw, a group by what its members take; then the drop-in's, then training's."""
    dispatch.kernel("experimental.fast", op="conv_bn_act", supports=lambda p: None)(lambda *args: None)
    dispatch.kernel("experimental.slow", op="conv_bn_act", supports=lambda p: None)(lambda *args: None)
    dispatch.kernel("experimental.tail", op="conv_tail", supports=lambda p: None)(lambda *args: None)
    proved = ["experimental.fast", "experimental.slow", "experimental.tail"]
    times = {
        p.key: {gpu_measure.ATEN: 10.0, "experimental.fast": 10.0, "experimental.slow": 30.0}
        for batch in MORE.batches
        for p in gpu_measure.listed(MORE, batch)
    }
    gains, second = list(times)[2], list(times)[-1]
    times[gains]["experimental.fast"], times[second]["experimental.fast"] = 2.0, 5.0
    tuned = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_measure, "tuned", lambda problem, some, *rest: tuned.append((problem, some)) or {})
        cases = run_task(gpu_measure.fill_tables(MORE, print, proved, times, {}, str(tmp_path)))
    problems = [problem for problem, _ in tuned]
    planned = [p for p in problems if p.op in ("conv_bn_act", "conv_tail") and not p.bn]
    assert problems[: len(planned)] == planned and {p.op for p in planned} == {"conv_bn_act", "conv_tail"}
    assert [p.key for p in planned if p.op == "conv_bn_act"] == [gains, second]  # the others have nothing to gain
    assert dict(tuned)[planned[0]] and all(
        "experimental.slow" not in some for p, some in tuned if p.op == "conv_bn_act"
    )
    live = [p for p in problems if p.bn]
    assert len(live) == len(times) and problems.index(live[0]) == len(planned) and live[0].x[0] in (1, 2)
    assert {p.op for p in problems[len(planned) + len(live) :]} == set(gpu_measure.TRAINING) and len(cases) == 1 + len(
        problems
    )
    _, (first, _), *_ = gpu_measure.fill_tables(
        MORE, print, proved, {}, {}, str(tmp_path)
    )  # the layers stage did not come so far
    assert first.startswith(("conv_tail", "conv_bn_act"))


def test_what_was_timed_and_checked_goes_into_the_table_and_is_not_measured_again(registry, tmp_path) -> None:
    from resnet_fast.dispatch import tables

    dispatch.kernel("experimental.fast", op="conv_bn_act", supports=lambda p: None)(
        dispatch.find("aten", "conv_bn_act").fn
    )
    (gains, loses, *_) = (p.key for p in gpu_measure.listed(MORE, 1))
    checked = {"error": 1e-7, "eager_error": 2e-7}
    aten = {"us": 10.0, "low": 9.9, "high": 10.1, "over": {"experimental.fast": 0.5}, **checked}
    fast = {"us": 5.0, "low": 4.9, "high": 5.1, "over": {gpu_measure.ATEN: 2.0}, **checked}
    slow = {**fast, "us": 9.95, "over": {gpu_measure.ATEN: 1.005}}
    found = {
        gains: {gpu_measure.ATEN: aten, "experimental.fast": fast},
        loses: {gpu_measure.ATEN: aten, "experimental.fast": slow},
    }
    times = {case: {id: t["us"] for id, t in of.items()} for case, of in found.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_measure, "tuned", lambda problem, *rest: {"key": problem.key})
        rows = run_task(gpu_measure.fill_tables(MORE, print, ["experimental.fast"], times, found, str(tmp_path)))
    assert rows["2 layers"]["graph"] == {gains: "experimental.fast"} and not {gains, loses} & {
        row.get("key") for row in rows.values()
    }
    sections = tables.read(tmp_path / "rehearsal.json", "rehearsal")
    assert (
        sections["graph"][gains]["aten_us"] == 10.0
        and tables.stale(sections["graph"][gains]) is None
        and loses not in sections["graph"]
    )
    assert (
        tables.tell(sections["measured"][loses]["experimental.fast"])
        == "not µs a call, 9.9 in a graph; error 1e-07, eager's 2e-07"
    )
    problem = next(p for p in gpu_measure.listed(MORE, 1) if p.key == gains)
    assert (
        gpu_measure.tuned(problem, ["experimental.fast"], gpu_measure.device(MORE), tmp_path)["note"]
        == "measured before"
    )


def test_a_tuned_plan_is_remembered_for_the_headline(tmp_path, monkeypatch) -> None:
    from resnet_fast import plan
    from resnet_fast.dispatch import tables
    from resnet_fast.dispatch.registry import use
    from resnet_fast.tuning import group_table

    monkeypatch.setenv("RESNET_FAST_TABLES", str(tmp_path))
    monkeypatch.setattr(tables, "gpu_name", lambda device=None: "rehearsal")
    monkeypatch.setattr(group_table, "DEVICE", "cpu")
    tables.load.cache_clear()
    small = Scale(**{**MORE.__dict__, "batches": (2,)})

    class Prefers(gpu_measure.Rehearsed):
        def clock(self, variants, confidence=0.01):
            [run() for run in variants.values()]
            return {choice: gpu_measure.Timing((10.0 - len(choice),) * 5) for choice in variants}

    monkeypatch.setattr(gpu_measure, "device", lambda scale: Prefers("rehearsal", "cpu"))
    with use("aten.conv_pool"):
        (row,) = run_task(gpu_measure.tune_plans(small, lambda text: None, 5.0)).values()
    assert row["status"] == "tuned" and row["across"] == ("conv_pool:conv1",)
    case = gpu_measure.Case("infer", "resnet50", "fp32", 2, 64, "cpu")
    made: list = []
    monkeypatch.setattr(
        "resnet_fast.bench.providers.plan", lambda *args, **how: made.append(plan(*args, **how)) or made[-1]
    )
    gpu_measure.network(case, ["eager-nchw", "ours-plan"], small, lambda text: None, tmp_path)
    assert made[0].across == ("conv_pool:conv1",)
    tables.load.cache_clear()


def test_ceilings_of_whatever_this_is() -> None:
    rows = run_task(gpu_measure.ceilings(TINY))
    assert {"copy", "cache", "bfloat16", "float32", "tf32", "int8", "launch"} <= set(rows)
    assert all(row["value"] > 0 for row in rows.values())


def test_environment_of_a_gpu(monkeypatch) -> None:
    """Pretended: a run that does not get this row ends."""
    from types import SimpleNamespace

    from resnet_fast.dispatch import tables

    def incompatible() -> None:
        raise RuntimeError("cuDNN version incompatibility: PyTorch was compiled against another")

    card = SimpleNamespace(
        name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, L2_cache_size=60 << 20, total_memory=141 << 30
    )
    for name, answer in (
        ("is_available", lambda: True),
        ("get_device_properties", lambda device=None: card),
        ("get_device_name", lambda device=None: card.name),
    ):
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(tables, "_driver", lambda: "13000")
    monkeypatch.setattr(tables, "versions", tables.versions.__wrapped__)
    monkeypatch.setattr(torch.backends.cudnn, "version", incompatible)
    row = next(iter(gpu_measure.environment(Scale(), print)))[1]()
    assert row["status"] == "here" and row["machine"]["name"] == card.name and row["versions"]["driver"] == "13000"
    assert (
        row["capability"] == [9, 0]
        and row["cudnn"].startswith("cuDNN version incompatibility")
        and row["known"]["copy"] > 4e12
    )


def test_environment_names_the_machine() -> None:
    row = next(iter(gpu_measure.environment(TINY, print)))[1]()
    assert row["status"] == "here" and row["machine"]["device"] == "cpu"
    if not torch.cuda.is_available():
        assert {case: row["status"] for case, row in run_task(gpu_measure.environment(Scale(), print)).items()} == {
            "machine": "no gpu"
        }


def test_a_network_by_everyone_and_one_that_is_wrong(monkeypatch, tmp_path) -> None:
    from resnet_fast.bench import providers

    broken = providers.Provider("ours", "broken", lambda *a: 1 / 0, ours=True)
    monkeypatch.setitem(gpu_measure.PROVIDERS, "ours", broken)
    case = gpu_measure.Case("infer", "resnet18", "fp32", 1, 32, "cpu")
    row = gpu_measure.network(case, ["eager-nchw", "eager", "ours"], TINY, lambda text: None, tmp_path)
    assert [r["provider"] for r in row["rows"]] == ["eager-nchw", "eager"] and "ZeroDivisionError" in row["wrong"][
        "ours"
    ]
    row |= {"stage": "headline", "job": "networks", "case": case.name}
    assert [(bad["job"], bad["status"]) for bad in Found([row]).bad()] == [("ours", "wrong")]
