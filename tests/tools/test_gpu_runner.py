"""The run on a GPU, without one: what is resumed, what time each stage gets and when it is left out."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from gpu_runs import a_run, a_stage, add_hopper, add_row, job, soon, watchdog

from tools.gpu import __main__ as gpu
from tools.gpu import extension, stages
from tools.gpu.run import NoGpu, Run
from tools.gpu.sensors import Sensors
from tools.gpu.stages import STAGES
from tools.gpu.watchdog import Job, Ledger, Watchdog

NO_SENSORS = Sensors(program="absent")


@pytest.fixture
def dog(tmp_path) -> Watchdog:
    return watchdog(tmp_path)


@pytest.fixture
def asked(monkeypatch) -> list[Job]:
    """The jobs that stages would run; none of them runs."""
    jobs: list[Job] = []
    monkeypatch.setattr(Run, "job", lambda self, stage, job, deadline: jobs.append(job))
    return jobs


def names(took: list[tuple[str, int]]) -> list[str]:
    """The stages that ran, in order."""
    return [name for name, _ in took]


# ---------------------------------------------------------------- resuming


def test_a_killed_run_goes_on_where_it_stopped(dog, tmp_path) -> None:
    rows = tmp_path / "rows.jsonl"
    dog.run("check", job("a", "hang", silence=60), soon(2))
    # the kill came in the middle of a row
    dog.ledger._file.write('{"stage": "check", "job": "kernel", "ca')
    dog.ledger._file.flush()
    again = Watchdog(dog.command, Ledger(rows), tmp_path / "log.txt")
    assert [row["case"] for row in again.ledger.rows] == ["a"]
    assert again.run("check", job("a", "b"), soon()) is None
    third = Ledger(rows)
    assert [row["case"] for row in third.rows] == ["a", "b"]
    assert third.done("check", "kernel") == ["a", "b"]


def open_with(results: Path, **status: str) -> Run:
    """Open a run, new or resumed, and add rows of stages."""
    run = gpu.open_run(results, True, STAGES, NO_SENSORS)
    for name, how in status.items():
        add_row(run, "stages", name, how)
    return run


def wait_for_another_second() -> None:
    """Wait, as a new folder's name has the second in it."""
    time.sleep(1.1)


def test_a_run_goes_on_as_long_as_a_stage_is_missing(tmp_path) -> None:
    """Also one that has its summary: peers that were left out find the tables of the first nine minutes."""
    status = {stage.name: "done" for stage in STAGES}
    status["peers"] = "left out"
    first = open_with(tmp_path, **status)
    (first.folder / "summary.json").write_text("{}")
    wait_for_another_second()
    again = open_with(tmp_path, peers="done")
    assert again.folder == first.folder
    assert "check" in gpu.done(again.ledger)
    wait_for_another_second()
    third = open_with(tmp_path)
    assert third.folder != first.folder


def test_a_run_that_was_brought_to_a_new_machine_goes_on_there(tmp_path, monkeypatch) -> None:
    """Of the first machine only $OUT is left, put into the checkout; the new $OUT has all of it in the end."""
    monkeypatch.setattr(gpu, "KEPT", tmp_path / "kept")
    first = open_with(tmp_path / "kept", check="done")
    (first.folder / "nvidia-h200.json").write_text("{}")
    again = open_with(tmp_path / "out")
    assert again.folder == tmp_path / "out" / first.folder.name
    assert gpu.done(again.ledger) == {"check"}
    assert (again.folder / "nvidia-h200.json").is_file()


def test_the_driver_may_have_another_patch(tmp_path, monkeypatch) -> None:
    folders = []
    for driver in ("580.159.03", "580.159.04", "590.1"):
        answer = ["NVIDIA H200", driver]
        monkeypatch.setattr(Sensors, "query", lambda self, *names, answer=answer: answer)
        folders.append(open_with(tmp_path, check="done").folder)
    first, patched, other = folders
    assert first == patched
    assert first != other


def test_a_run_without_all_kernels_is_not_gone_on_with(tmp_path) -> None:
    first = open_with(tmp_path, environment="done", build="cut", check="done")
    wait_for_another_second()
    again = open_with(tmp_path)
    assert again.folder != first.folder


@pytest.mark.parametrize(
    "reason, built, again",
    [
        pytest.param(None, None, True, id="built, and gone"),
        pytest.param("prebuilt", "other", True, id="prebuilt, and another one now"),
        pytest.param(None, "sources", False, id="still there"),
        pytest.param("failed: error: no such instruction", None, False, id="never built"),
    ],
)
def test_the_extension_is_built_again_where_it_is_not(
    tmp_path, monkeypatch, reason, built, again
) -> None:
    monkeypatch.setattr(extension, "prebuilt", lambda: built)
    monkeypatch.setattr(extension, "sources", lambda: "sources")
    monkeypatch.setattr(extension, "targets", lambda: ["9.0a"])
    run = a_run(tmp_path, rehearse=False)
    add_hopper(run)
    add_row(run, "stages", "build", "done", reason=reason)
    took: list = []
    plan = (a_stage("build", took, 1, 5), a_stage("check", took, 1, 5))
    gpu.perform(run, plan, NO_SENSORS, 100)
    assert names(took) == (["build", "check"] if again else ["check"])


def test_what_uses_the_tables_is_seen_again_once_they_grew(tmp_path) -> None:
    took: list = []
    order = ("layers", "tables", "groups", "headline", "peers", "others")
    run = a_run(tmp_path)
    for name in order:
        add_row(run, "stages", name, "cut" if name == "tables" else "done", reason=None)
    plan = tuple(a_stage(name, took, 1, 5) for name in order)
    gpu.perform(run, plan, NO_SENSORS, 100)
    assert names(took) == ["tables", "groups", "headline", "peers"]


def test_a_job_has_another_name_once_the_tables_grew(tmp_path, asked) -> None:
    """A case of a job is done once."""
    run = a_run(tmp_path)
    for _ in range(2):
        stages.groups(run, soon(80))
        stages.headline(run, soon(80))
        add_row(run, "tables", "conv", "tuned")
    assert len({job.name for job in asked}) == 4


def test_another_card_does_not_go_on_with_the_run_of_one(tmp_path, monkeypatch) -> None:
    first = open_with(tmp_path, check="done")
    monkeypatch.setattr(Sensors, "query", lambda self, *names: ["NVIDIA L40S", "580.1"])
    other = open_with(tmp_path)
    assert other.folder != first.folder


def test_no_gpu_any_more_does_not_throw_a_run_away(tmp_path, monkeypatch) -> None:
    def gone_now(run, stages, sensors, seconds):
        raise NoGpu("torch sees no CUDA device")

    first = open_with(tmp_path, check="done")
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(gpu, "perform", gone_now)
    assert gpu.main(["--rehearse"]) == 2
    assert (first.folder / "rows.jsonl").is_file()


def test_results_lie_where_they_are_wanted_from_any_folder(tmp_path, monkeypatch) -> None:
    """Children run in the checkout, so a relative $OUT is made absolute."""
    seen: list[Path] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OUT", "results")
    monkeypatch.setattr(gpu, "perform", lambda run, *rest: seen.append(run.folder))
    assert gpu.main(["--rehearse"]) == 130  # nothing was found
    assert seen[0].parent == tmp_path / "results"


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("OUT", str(tmp_path / "file" / "results"))
    with pytest.raises(SystemExit) as end:
        gpu.main(["--rehearse"])
    assert end.value.code == 2
    assert "name another folder in $OUT" in capsys.readouterr().err


def test_children_see_what_the_user_has_beside_the_environment(dog, monkeypatch, tmp_path) -> None:
    beside = tmp_path / "beside"
    beside.mkdir()
    (beside / "timm_for_a_test.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(beside))
    child = tmp_path / "child.py"
    child.write_text("import resnet_fast, timm_for_a_test\n" + child.read_text())
    assert dog.run("check", job("a", start=60), soon(60)) is None


# ---------------------------------------------------------------- stages


def test_no_stage_eats_what_a_later_one_needs(tmp_path) -> None:
    took: list = []
    plan = (
        a_stage("check", took, 10, 500),
        a_stage("peers", took, 30, 60, optional=True),
        a_stage("headline", took, 20, 80),
    )
    gpu.perform(a_run(tmp_path), plan, NO_SENSORS, 100)
    assert took == [("check", 80), ("peers", 60), ("headline", 80)]
    took.clear()
    short = a_run(tmp_path / "again")
    gpu.perform(short, plan, NO_SENSORS, 45)
    assert took == [("check", 25), ("headline", 45)]
    _, peers, _ = Ledger(short.ledger.path).of("stages")
    assert peers["status"] == "left out"
    assert peers["reason"] == "left out: 25 s left, it needs 30"


def test_too_little_time_for_all_leaves_out_the_last_not_the_first(tmp_path) -> None:
    """Without the machine's row no later stage could say anything."""
    took: list = []
    plan = (
        a_stage("environment", took, 10, 50),
        a_stage("check", took, 30, 60),
        a_stage("peers", took, 30, 60),
    )
    gpu.perform(a_run(tmp_path), plan, NO_SENSORS, 20)
    assert took == [("environment", 10), ("check", 20), ("peers", 20)]  # these take no time


def test_stages_that_are_done_are_not_done_again_and_those_cut_are(tmp_path) -> None:
    took: list = []
    plan = (
        a_stage("check", took, 1, 5),
        a_stage("layers", took, 1, 5, says="layers: stopped at its deadline in x"),
    )
    gpu.perform(a_run(tmp_path), plan, NO_SENSORS, 100)
    took.clear()
    gpu.perform(a_run(tmp_path), plan, NO_SENSORS, 100)
    assert names(took) == ["layers"]


def test_the_whole_fits_into_nine_minutes() -> None:
    needed = sum(stage.least for stage in STAGES if not stage.optional)
    assert gpu.TOTAL <= 540
    assert needed < gpu.TOTAL
    assert all(stage.least <= stage.most for stage in STAGES)


def test_plans_are_tuned_into_the_table_that_the_headline_reads(tmp_path, asked) -> None:
    run = a_run(tmp_path, rehearse=False)
    for stage in (stages.groups, stages.headline, stages.peers):
        stage(run, soon(80))
    order = [stage.name for stage in STAGES]
    assert (
        order.index("tables")
        < order.index("groups")
        < order.index("headline")
        < order.index("peers")
    )
    tables = {job.env["RESNET_FAST_TABLES"] for job in asked}
    assert tables == {str(tmp_path)}
    groups = asked[0]
    assert groups.args["seconds"] == pytest.approx(24, abs=1)


def test_peers_are_compared_beside_everyone_else(tmp_path, asked) -> None:
    run = a_run(tmp_path, rehearse=False)
    stages.headline(run, soon(80))
    stages.peers(run, soon(80))
    for networks in asked:
        assert {"eager-nchw", "eager", "folded", "ours-plan"} <= set(networks.args["peers"])
    headline, *peers = asked
    compilers = []
    for networks in peers:
        ids = [id for id in networks.args["peers"] if id.startswith("compile")]
        compilers.append((networks.args["batches"], ids))
    assert compilers == [
        ((256,), ["compile"]),
        ((256,), ["compile", "compile-best"]),
        ((1,), ["compile", "compile-best"]),
    ]


def test_tables_are_told_what_was_timed_and_checked(tmp_path, asked) -> None:
    run = a_run(tmp_path, rehearse=False)
    case = "conv_bn_act bfloat16 256x8x4x4 relu"
    checks = (
        ("triton.a", "full", "right"),
        ("triton.b", "full", "wrong"),
        ("triton.c", "small", "right"),
    )
    for kernel, kind, status in checks:
        name = f"{kernel} 1/1 bfloat16"
        add_row(
            run, "check", f"{kind} {case}", status, job=name, error=1.0, eager_error=2.0, shares=1
        )
        add_row(run, "check", "bfloat16 complete 1/1", "complete", job=name, shares=1)
    times = {id: {"us": 5.0} for id in ("eager", "triton.a", "triton.b", "triton.c")}
    for timed in (case, "other"):
        add_row(run, "layers", timed, "measured", times=times)
    stages.tables(run, soon(80))
    args = asked[0].args
    microseconds = dict.fromkeys(times, 5.0)
    assert args["proved"] == ["triton.a", "triton.c"]
    assert args["times"] == {case: microseconds, "other": microseconds}
    assert args["known"] == {case: {"triton.a": {"us": 5.0, "error": 1.0, "eager_error": 2.0}}}


def test_jobs_side_by_side_and_their_troubles(dog, tmp_path) -> None:
    jobs = []
    for name, seconds in (("a", 0.1), ("b", 60)):
        jobs.append(Job(name, "fake", {"cases": ["slow"], "slow": seconds}, silence=5))
    trouble = stages.run_jobs(a_run(tmp_path, dog), "check", jobs, soon(3), workers=2)
    assert trouble == "b: stopped at its deadline in slow"
    assert [row["job"] for row in dog.ledger.rows] == ["a"]
