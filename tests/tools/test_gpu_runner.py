"""The run on a GPU, without one: what is resumed, what each stage is given and when it is left out."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
from gpu_runs import a_run, a_stage, job, soon, watchdog

from tools.gpu import __main__ as gpu
from tools.gpu.watchdog import Job, Ledger, Sensors, Watchdog


@pytest.fixture
def dog(tmp_path) -> Watchdog:
    return watchdog(tmp_path)


# ---------------------------------------------------------------- resuming


def test_a_killed_run_goes_on_where_it_stopped(dog, tmp_path) -> None:
    dog.run("check", job("a", "hang", silence=60), soon(2))
    dog.ledger._file.write('{"stage": "check", "job": "kernel", "ca')  # the kill came in the middle of a row
    dog.ledger._file.flush()
    again = Watchdog(dog.command, Ledger(tmp_path / "rows.jsonl"), tmp_path / "log.txt")
    assert [row["case"] for row in again.ledger.rows] == ["a"]
    assert again.run("check", job("a", "b"), soon()) is None
    third = Ledger(tmp_path / "rows.jsonl")
    assert [row["case"] for row in third.rows] == ["a", "b"] and third.done("check", "kernel") == ["a", "b"]


def a_folder(results: Path, **status: str) -> gpu.Run:
    """A run with rows of stages."""
    run = gpu.open_run(results, True, gpu.STAGES, Sensors(program="absent"))
    for name, how in status.items():
        run.ledger.add({"stage": "stages", "job": name, "case": name, "status": how})
    return run


def test_a_run_goes_on_as_long_as_a_stage_is_missing(tmp_path) -> None:
    """Also one that has its summary: peers that were left out find the tables of the first nine minutes."""
    first = a_folder(
        tmp_path, **{stage.name: "done" for stage in gpu.STAGES if stage.name != "peers"}, peers="left out"
    )
    (first.folder / "summary.json").write_text("{}")
    time.sleep(1.1)  # a folder's name has the second
    again = a_folder(tmp_path, peers="done")
    assert again.folder == first.folder and "check" in gpu.done(again.ledger)
    time.sleep(1.1)
    assert a_folder(tmp_path).folder != first.folder


def test_a_run_that_was_brought_to_a_new_machine_goes_on_there(tmp_path, monkeypatch) -> None:
    """Of the first machine only what was in $OUT is left, put into the checkout; the new $OUT has all of it in the end."""
    monkeypatch.setattr(gpu, "KEPT", tmp_path / "kept")
    first = a_folder(tmp_path / "kept", check="done")
    (first.folder / "nvidia-h200.json").write_text("{}")
    again = a_folder(tmp_path / "out")
    assert again.folder == tmp_path / "out" / first.folder.name and gpu.done(again.ledger) == {"check"}
    assert (again.folder / "nvidia-h200.json").is_file()


def test_the_driver_may_have_another_patch(tmp_path, monkeypatch) -> None:
    folders = []
    for driver in ("580.159.03", "580.159.04", "590.1"):
        monkeypatch.setattr(Sensors, "query", lambda self, *names, driver=driver: ["NVIDIA H200", driver])
        folders.append(a_folder(tmp_path, check="done").folder)
    assert folders[0] == folders[1] != folders[2]


def test_a_run_without_all_kernels_is_not_gone_on_with(tmp_path) -> None:
    first = a_folder(tmp_path, environment="done", build="cut", check="done")
    time.sleep(1.1)
    assert a_folder(tmp_path).folder != first.folder


@pytest.mark.parametrize(
    "reason, built, again",
    [
        (None, None, True),
        ("prebuilt", "other", True),
        (None, "sources", False),
        ("failed: error: no such instruction", None, False),
    ],
)
def test_the_extension_is_built_again_where_it_is_not(tmp_path, monkeypatch, reason, built, again) -> None:
    took: list = []
    monkeypatch.setattr(gpu, "prebuilt", lambda: built)
    monkeypatch.setattr(gpu, "sources", lambda: "sources")
    monkeypatch.setattr(gpu, "targets", lambda: ["9.0a"])
    run = replace(a_run(tmp_path), rehearse=False)
    run.ledger.add(
        {"stage": "environment", "job": "machine", "case": "machine", "status": "here", "capability": [9, 0]}
    )
    run.ledger.add({"stage": "stages", "job": "build", "case": "build", "status": "done", "reason": reason})
    gpu.perform(run, (a_stage("build", took, 1, 5), a_stage("check", took, 1, 5)), Sensors(program="absent"), 100)
    assert [name for name, _ in took] == ["build", "check"][not again :]


def test_what_uses_the_tables_is_seen_again_once_they_grew(tmp_path, monkeypatch) -> None:
    took: list = []
    stages = tuple(a_stage(name, took, 1, 5) for name in ("layers", "tables", "groups", "headline", "peers", "others"))
    run = a_run(tmp_path)
    for name in ("layers", "groups", "headline", "peers", "others"):
        run.ledger.add({"stage": "stages", "job": name, "case": name, "status": "done", "reason": None})
    run.ledger.add({"stage": "stages", "job": "tables", "case": "tables", "status": "cut", "reason": None})
    gpu.perform(run, stages, Sensors(program="absent"), 100)
    assert [name for name, _ in took] == ["tables", "groups", "headline", "peers"]
    asked: list[Job] = []
    monkeypatch.setattr(gpu.Run, "job", lambda self, stage, job, deadline: asked.append(job))
    for _ in range(2):
        gpu.groups(run, soon(80)), gpu.headline(run, soon(80))
        run.ledger.add({"stage": "tables", "job": "tables", "case": "conv", "status": "tuned"})
    assert len({job.name for job in asked}) == 4  # a case of a job is done once


def test_another_card_does_not_go_on_with_the_run_of_one(tmp_path, monkeypatch) -> None:
    first = a_folder(tmp_path, check="done")
    monkeypatch.setattr(Sensors, "query", lambda self, *names: ["NVIDIA L40S", "580.1"])
    assert a_folder(tmp_path).folder != first.folder


def test_no_gpu_any_more_does_not_throw_a_run_away(tmp_path, monkeypatch) -> None:
    def gone_now(run, stages, sensors, seconds):
        raise gpu.NoGpu("torch sees no CUDA device")

    first = a_folder(tmp_path, check="done")
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(gpu, "perform", gone_now)
    assert gpu.main(["--rehearse"]) == 2 and (first.folder / "rows.jsonl").is_file()


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
    assert end.value.code == 2 and "name another folder in $OUT" in capsys.readouterr().err


def test_children_see_what_the_user_has_beside_the_environment(dog, monkeypatch, tmp_path) -> None:
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "timm_for_a_test.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "beside"))
    child = tmp_path / "child.py"
    child.write_text("import resnet_fast, timm_for_a_test\n" + child.read_text())
    assert dog.run("check", job("a", start=60), soon(60)) is None


# ---------------------------------------------------------------- stages


def test_no_stage_eats_what_a_later_one_needs(tmp_path) -> None:
    took: list = []
    stages = (a_stage("check", took, 10, 500), a_stage("peers", took, 30, 60, True), a_stage("headline", took, 20, 80))
    run = a_run(tmp_path)
    gpu.perform(run, stages, Sensors(program="absent"), 100)
    assert took == [("check", 80), ("peers", 60), ("headline", 80)]
    took.clear()
    gpu.perform(a_run(tmp_path / "again"), stages, Sensors(program="absent"), 45)
    assert took == [("check", 25), ("headline", 45)]
    left_out = Ledger(tmp_path / "again" / "rows.jsonl").of("stages")[1]
    assert left_out["status"] == "left out" and left_out["reason"] == "left out: 25 s left, it needs 30"


def test_too_little_time_for_all_leaves_out_the_last_not_the_first(tmp_path) -> None:
    """Without the machine's row no later stage could say anything."""
    took: list = []
    stages = (a_stage("environment", took, 10, 50), a_stage("check", took, 30, 60), a_stage("peers", took, 30, 60))
    gpu.perform(a_run(tmp_path), stages, Sensors(program="absent"), 20)
    assert took == [("environment", 10), ("check", 20), ("peers", 20)]  # these take no time


def test_stages_that_are_done_are_not_done_again_and_those_cut_are(tmp_path) -> None:
    took: list = []
    stages = (a_stage("check", took, 1, 5), a_stage("layers", took, 1, 5, says="layers: stopped at its deadline in x"))
    gpu.perform(a_run(tmp_path), stages, Sensors(program="absent"), 100)
    took.clear()
    gpu.perform(a_run(tmp_path), stages, Sensors(program="absent"), 100)
    assert [name for name, _ in took] == ["layers"]


def test_the_whole_fits_into_nine_minutes() -> None:
    assert gpu.TOTAL <= 540 and sum(s.least for s in gpu.STAGES if not s.optional) < gpu.TOTAL
    assert all(s.least <= s.most for s in gpu.STAGES)


def test_plans_are_tuned_into_the_table_that_the_headline_reads(tmp_path, monkeypatch) -> None:
    asked: list[tuple[str, Job]] = []
    monkeypatch.setattr(gpu.Run, "job", lambda self, stage, job, deadline: asked.append((stage, job)))
    run = a_run(tmp_path)
    run.rehearse = False
    for stage in (gpu.groups, gpu.headline, gpu.peers):
        stage(run, soon(80))
    names = [stage.name for stage in gpu.STAGES]
    assert [stage for stage, _ in asked] == ["groups", "headline", "peers", "peers", "peers"]
    assert names.index("tables") < names.index("groups") < names.index("headline") < names.index("peers")
    assert {job.env["RESNET_FAST_TABLES"] for _, job in asked} == {str(tmp_path)} and asked[0][1].args[
        "seconds"
    ] == pytest.approx(24, abs=1)
    assert all({"eager-nchw", "eager", "folded", "ours-plan"} <= set(job.args["peers"]) for _, job in asked[1:])
    by = [(job.args["batches"], [id for id in job.args["peers"] if id.startswith("compile")]) for _, job in asked[2:]]
    assert by == [((256,), ["compile"]), ((256,), ["compile", "compile-best"]), ((1,), ["compile", "compile-best"])]


def test_tables_are_told_what_was_timed_and_checked(tmp_path, monkeypatch) -> None:
    asked: list[Job] = []
    monkeypatch.setattr(gpu.Run, "job", lambda self, stage, job, deadline: asked.append(job))
    run = replace(a_run(tmp_path), rehearse=False)
    case = "conv_bn_act bfloat16 256x8x4x4 relu"
    for kernel, kind, status in (
        ("triton.a", "full", "right"),
        ("triton.b", "full", "wrong"),
        ("triton.c", "small", "right"),
    ):
        run.ledger.add(
            {
                "stage": "check",
                "job": f"{kernel} 1/1 bfloat16",
                "case": f"{kind} {case}",
                "status": status,
                "error": 1.0,
                "eager_error": 2.0,
                "shares": 1,
            }
        )
        run.ledger.add(
            {
                "stage": "check",
                "job": f"{kernel} 1/1 bfloat16",
                "case": "bfloat16 complete 1/1",
                "status": "complete",
                "shares": 1,
            }
        )
    times = {id: {"us": 5.0} for id in ("eager", "triton.a", "triton.b", "triton.c")}
    run.ledger.add({"stage": "layers", "job": "layers", "case": case, "status": "measured", "times": times})
    run.ledger.add({"stage": "layers", "job": "layers", "case": "other", "status": "measured", "times": times})
    gpu.tables(run, soon(80))
    assert asked[0].args["proved"] == ["triton.a", "triton.c"] and asked[0].args["times"] == dict.fromkeys(
        (case, "other"), dict.fromkeys(times, 5.0)
    )
    assert asked[0].args["known"] == {case: {"triton.a": {"us": 5.0, "error": 1.0, "eager_error": 2.0}}}


def test_jobs_side_by_side_and_their_troubles(dog, tmp_path) -> None:
    jobs = [Job(name, "fake", {"cases": ["slow"], "slow": slow}, silence=5) for name, slow in (("a", 0.1), ("b", 60))]
    trouble = gpu.each(a_run(tmp_path, dog), "check", jobs, soon(3), workers=2)
    assert trouble == "b: stopped at its deadline in slow"
    assert [row["job"] for row in dog.ledger.rows] == ["a"]
