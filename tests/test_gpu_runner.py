"""The run on a GPU, without one: watchdog, ledger, deadlines, stages, verdicts, table; children that misbehave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import host_gpu
import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu  # noqa: E402
import gpu_probe  # noqa: E402
import gpu_run  # noqa: E402
from gpu_run import Job, Ledger, Sensors, Watchdog  # noqa: E402

# A child without torch: each of its cases does what its name says.
CHILD = f"""
import json, os, subprocess, sys, time
sys.path.insert(0, {str(BENCHMARKS)!r})
from gpu_child import Events, follow_parent, perform

def work(case, args):
    name = case.rstrip("0123456789")
    if name == "hang":
        time.sleep(600)
    elif name == "slow":
        time.sleep(args["slow"])
    elif name == "crash":
        print("Fatal: an assert in the kernel", flush=True)
        os.abort()
    elif name == "raise":
        raise RuntimeError("no kernel image is available\\nmore")
    elif name == "long":
        for _ in range(8):
            time.sleep(0.2)
            events.send(alive="still compiling")
    elif name == "offspring":
        child = subprocess.Popen(["sleep", "600"])
        open(args["pid"], "w").write(str(child.pid))
        time.sleep(600)
    return {{"status": "right", "pid": os.getpid()}}

job = json.load(open(sys.argv[1]))
args = job["args"]
follow_parent()
if args.get("startup") == "dies":
    sys.exit("ModuleNotFoundError: No module named 'torch'")
if args.get("startup") == "hangs":
    time.sleep(600)
events = Events(sys.argv[2])
events.send(alive="ready")
cases = ((case, lambda case=case: work(case, args)) for case in args["cases"])
perform(cases, set(job["skip"]), events, lambda: not os.path.exists(args.get("broken", "")))
if args.get("linger"):
    time.sleep(600)
"""


@pytest.fixture
def dog(tmp_path):
    child = tmp_path / "child.py"
    child.write_text(CHILD)
    ledger = Ledger(tmp_path / "rows.jsonl")
    return Watchdog([sys.executable, str(child)], ledger, tmp_path / "log.txt")


def job(*cases: str, silence: float = 2.0, **args) -> Job:
    more = {key: args.pop(key) for key in ("restarts", "start", "under") if key in args}
    return Job("kernel", "fake", {"cases": cases, **args}, silence=silence, **more)


def soon(seconds: float = 30.0) -> float:
    return time.monotonic() + seconds


def found(dog: Watchdog) -> list[tuple[str, str]]:
    return [(row["case"], row["status"]) for row in dog.ledger.rows]


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except FileNotFoundError:
        return True


# ---------------------------------------------------------------- the watchdog

def test_a_job_that_goes_well(dog, tmp_path) -> None:
    assert dog.run("check", job("a", "b"), soon()) is None
    assert found(dog) == [("a", "right"), ("b", "right")]
    on_disk = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["job"], row["case"]) for row in on_disk] == [("check", "kernel", c) for c in "ab"]
    assert "==== check kernel: done" in (tmp_path / "log.txt").read_text()


def test_a_hung_case_is_marked_and_the_rest_goes_on(dog) -> None:
    assert dog.run("check", job("a", "hang", "b"), soon()) is None
    assert found(dog) == [("a", "right"), ("hang", "hung"), ("b", "right")]
    assert dog.ledger.rows[1]["reason"].startswith("silent for 2 s")
    assert dog.ledger.rows[0]["pid"] != dog.ledger.rows[2]["pid"]


def test_a_crash_is_marked_with_its_last_words_and_the_rest_goes_on(dog) -> None:
    assert dog.run("check", job("a", "crash", "b"), soon()) is None
    assert found(dog) == [("a", "right"), ("crash", "died"), ("b", "right")]
    assert dog.ledger.rows[1]["reason"] == f"exit code {-signal.SIGABRT}; Fatal: an assert in the kernel"


def test_an_exception_is_a_row_and_costs_no_child(dog) -> None:
    assert dog.run("check", job("raise", "b"), soon()) is None
    assert found(dog) == [("raise", "failed"), ("b", "right")]
    assert dog.ledger.rows[0]["reason"] == "RuntimeError: no kernel image is available"


def test_a_device_that_did_not_survive_costs_the_child(dog, tmp_path) -> None:
    (tmp_path / "broken").touch()
    assert dog.run("check", job("raise", "b", broken=str(tmp_path / "broken"), restarts=3), soon()) is None
    assert found(dog) == [("raise", "died"), ("b", "died")]
    assert "did not survive it; RuntimeError: no kernel image" in dog.ledger.rows[0]["reason"]


def test_signs_of_life_keep_a_long_case(dog) -> None:
    assert dog.run("check", job("long", silence=1.0), soon()) is None
    assert found(dog) == [("long", "right")]


def test_the_deadline_ends_a_job_and_all_that_it_started(dog, tmp_path) -> None:
    start = time.monotonic()
    trouble = dog.run("check", job("a", "offspring", silence=60, pid=str(tmp_path / "pid")), soon(2))
    assert trouble == "stopped at its deadline in offspring" and time.monotonic() - start < 10
    assert found(dog) == [("a", "right")]
    pid = int((tmp_path / "pid").read_text())
    for _ in range(50):
        if gone(pid):
            break
        time.sleep(0.1)
    assert gone(pid)


def test_it_gives_up_after_so_many_children(dog) -> None:
    trouble = dog.run("check", job(*(f"crash{i}" for i in range(9)), restarts=2), soon())
    assert trouble == "given up after 3 children hung or died" and len(found(dog)) == 3


@pytest.mark.parametrize("how, words", [("dies", "died before its first case: exit code 1; ModuleNotFoundError"),
                                        ("hangs", "hung before its first case: silent for 0.5 s")])
def test_a_child_that_does_not_start(dog, how, words) -> None:
    assert dog.run("check", job("a", startup=how, start=0.5 if how == "hangs" else 20), soon()).startswith(words)
    assert found(dog) == []


def test_a_child_that_will_not_leave_is_made_to(dog, monkeypatch) -> None:
    monkeypatch.setattr(gpu_run, "LEAVE", 0.3)
    assert dog.run("check", job("a", linger=True), soon()) is None
    assert found(dog) == [("a", "right")]


def test_children_do_not_outlive_a_killed_parent(tmp_path) -> None:
    child = tmp_path / "child.py"
    child.write_text(CHILD)
    job_file = tmp_path / "job"
    job_file.write_text(json.dumps({"task": "fake", "args": {"cases": ["hang"]}, "skip": []}))
    start = f"""
        import subprocess, sys, time
        p = subprocess.Popen([{sys.executable!r}, {str(child)!r}, {str(job_file)!r}, {str(tmp_path / "events")!r}],
                             start_new_session=True)
        print(p.pid, flush=True)
        time.sleep(600)"""
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(start)], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    events = tmp_path / "events"
    while not (events.is_file() and "begin" in events.read_text()):
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    for _ in range(100):
        if gone(pid):
            break
        time.sleep(0.1)
    assert gone(pid)


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
    first = a_folder(tmp_path, **{stage.name: "done" for stage in gpu.STAGES if stage.name != "peers"}, peers="left out")
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


@pytest.mark.parametrize("reason, built, again", [(None, None, True), ("prebuilt", "other", True), (None, "sources", False),
                                                  ("failed: error: no such instruction", None, False)])
def test_the_extension_is_built_again_where_it_is_not(tmp_path, monkeypatch, reason, built, again) -> None:
    took: list = []
    monkeypatch.setattr(gpu, "prebuilt", lambda: built)
    monkeypatch.setattr(gpu, "sources", lambda: "sources")
    monkeypatch.setattr(gpu, "targets", lambda: ["9.0a"])
    run = replace(a_run(tmp_path), rehearse=False)
    run.ledger.add({"stage": "environment", "job": "machine", "case": "machine", "status": "here", "capability": [9, 0]})
    run.ledger.add({"stage": "stages", "job": "build", "case": "build", "status": "done", "reason": reason})
    gpu.perform(run, (stage("build", took, 1, 5), stage("check", took, 1, 5)), Sensors(program="absent"), 100)
    assert [name for name, _ in took] == ["build", "check"][not again:]


def test_what_uses_the_tables_is_seen_again_once_they_grew(tmp_path, monkeypatch) -> None:
    took: list = []
    stages = tuple(stage(name, took, 1, 5) for name in ("layers", "tables", "groups", "headline", "peers", "others"))
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

def a_run(tmp_path: Path, dog: Watchdog | None = None) -> gpu.Run:
    ledger = dog.ledger if dog else Ledger(tmp_path / "rows.jsonl")
    return gpu.Run(tmp_path, ledger, dog, rehearse=True)


def stage(name: str, took: list, least: float, most: float, optional: bool = False, says: str = "") -> gpu.Stage:
    def work(run: gpu.Run, deadline: float) -> str | None:
        took.append((name, round(deadline - time.monotonic())))
        return says or None

    work.__name__ = name
    return gpu.Stage(work, least, most, optional)


def test_no_stage_eats_what_a_later_one_needs(tmp_path) -> None:
    took: list = []
    stages = (stage("check", took, 10, 500), stage("peers", took, 30, 60, True), stage("headline", took, 20, 80))
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
    stages = (stage("environment", took, 10, 50), stage("check", took, 30, 60), stage("peers", took, 30, 60))
    gpu.perform(a_run(tmp_path), stages, Sensors(program="absent"), 20)
    assert took == [("environment", 10), ("check", 20), ("peers", 20)]  # these take no time


def test_stages_that_are_done_are_not_done_again_and_those_cut_are(tmp_path) -> None:
    took: list = []
    stages = (stage("check", took, 1, 5), stage("layers", took, 1, 5, says="layers: stopped at its deadline in x"))
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
    assert {job.env["RESNET_FAST_TABLES"] for _, job in asked} == {str(tmp_path)} and asked[0][1].args["seconds"] == pytest.approx(24, abs=1)
    assert all({"eager-nchw", "eager", "folded", "ours-plan"} <= set(job.args["peers"]) for _, job in asked[1:])
    by = [(job.args["batches"], [id for id in job.args["peers"] if id.startswith("compile")]) for _, job in asked[2:]]
    assert by == [((256,), ["compile"]), ((256,), ["compile", "compile-best"]), ((1,), ["compile", "compile-best"])]


def test_tables_are_told_what_was_timed_and_checked(tmp_path, monkeypatch) -> None:
    asked: list[Job] = []
    monkeypatch.setattr(gpu.Run, "job", lambda self, stage, job, deadline: asked.append(job))
    run = replace(a_run(tmp_path), rehearse=False)
    case = "conv_bn_act bfloat16 256x8x4x4 relu"
    for kernel, kind, status in (("triton.a", "full", "right"), ("triton.b", "full", "wrong"), ("triton.c", "small", "right")):
        run.ledger.add({"stage": "check", "job": f"{kernel} 1/1 bfloat16", "case": f"{kind} {case}", "status": status, "error": 1.0,
                        "eager_error": 2.0, "shares": 1})
        run.ledger.add({"stage": "check", "job": f"{kernel} 1/1 bfloat16", "case": "bfloat16 complete 1/1", "status": "complete", "shares": 1})
    times = {id: {"us": 5.0} for id in ("eager", "triton.a", "triton.b", "triton.c")}
    run.ledger.add({"stage": "layers", "job": "layers", "case": case, "status": "measured", "times": times})
    run.ledger.add({"stage": "layers", "job": "layers", "case": "other", "status": "measured", "times": times})
    gpu.tables(run, soon(80))
    assert asked[0].args["proved"] == ["triton.a", "triton.c"] and asked[0].args["times"] == dict.fromkeys((case, "other"), dict.fromkeys(times, 5.0))
    assert asked[0].args["known"] == {case: {"triton.a": {"us": 5.0, "error": 1.0, "eager_error": 2.0}}}


def test_jobs_side_by_side_and_their_troubles(dog, tmp_path) -> None:
    jobs = [Job(name, "fake", {"cases": ["slow"], "slow": slow}, silence=5) for name, slow in (("a", 0.1), ("b", 60))]
    trouble = gpu.each(a_run(tmp_path, dog), "check", jobs, soon(3), workers=2)
    assert trouble == "b: stopped at its deadline in slow"
    assert [row["job"] for row in dog.ledger.rows] == ["a"]


def test_without_a_gpu_one_sentence_and_exit_code_2(tmp_path) -> None:
    env = {**os.environ, "OUT": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, str(BENCHMARKS / "gpu.py")], env=env, text=True, capture_output=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("make gpu found no GPU to run on: torch")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("setup, trouble", [
    ("", None), ("import sys; sys.exit('nvcc fatal: no')", "failed: nvcc fatal: no"),
    ("import time; time.sleep(60)", "stopped at its deadline: the kernels of csrc")])
def test_building_the_extension(tmp_path, monkeypatch, setup, trouble) -> None:
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "a.cu").write_text("kernel")
    record = "import os; open('seen', 'w').write(os.environ['TORCH_CUDA_ARCH_LIST'])\n"
    (tmp_path / "setup.py").write_text(record + setup)
    run = a_run(tmp_path)
    run.rehearse = False
    run.ledger.add({"stage": "environment", "job": "machine", "case": "machine", "capability": [9, 0]})
    said = gpu.extension(run, soon(3))
    assert said is None if trouble is None else said.startswith(trouble)
    assert (tmp_path / "seen").read_text() == "9.0a"


def test_a_prebuilt_extension_is_taken_if_it_is_of_these_sources(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu.importlib.machinery, "EXTENSION_SUFFIXES", [".this.so"])
    for folder in ("csrc", "resnet_fast"):
        (tmp_path / folder).mkdir()
    (tmp_path / "csrc" / "a.cu").write_text("kernel")
    record = tmp_path / "resnet_fast" / "_build.json"
    record.write_text(json.dumps({"csrc": gpu.sources(), "archs": "8.0+PTX 9.0a"}))
    assert gpu.prebuilt() is None
    (tmp_path / "resnet_fast" / "_C.this.so").touch()
    run = a_run(tmp_path)
    run.rehearse = False
    run.ledger.add({"stage": "environment", "job": "machine", "case": "machine", "capability": [9, 0]})
    assert gpu.extension(run, soon()) == "prebuilt"
    (tmp_path / "setup.py").write_text("raise SystemExit('built anew')")
    record.write_text(json.dumps({"csrc": gpu.sources(), "archs": "8.0+PTX"}))  # it would run, without what is Hopper's own
    assert gpu.extension(run, soon()) == "failed: built anew" and "==== build\nbuilt anew" in (tmp_path / "log.txt").read_text()
    (tmp_path / "csrc" / "a.cu").write_text("another kernel")
    assert gpu.prebuilt() != gpu.sources()


def test_kernels_of_an_extension_made_of_other_sources_do_not_take_part(tmp_path, monkeypatch) -> None:
    run = a_run(tmp_path)
    run.rehearse = False
    for id in ("native.conv", "triton.conv"):
        run.ledger.add({"stage": "inventory", "job": "inventory", "case": id, "status": "here"})
    monkeypatch.setattr(gpu, "prebuilt", gpu.sources)
    assert run.kernels() == ["native.conv", "triton.conv"]
    monkeypatch.setattr(gpu, "prebuilt", lambda: "other")
    assert run.kernels() == ["triton.conv"]


def test_what_may_win_is_checked_first(tmp_path) -> None:
    run = a_run(tmp_path)
    for id, op in (("aten.conv_bn_act", "conv_bn_act"), ("native.bn_act", "bn_act"), ("triton.add_act_backward", "add_act_backward"),
                   ("triton.conv_tail", "conv_tail"), ("native.conv", "conv_bn_act")):
        run.ledger.add({"stage": "inventory", "job": "inventory", "case": id, "status": "here", "op": op})
    assert run.kernels() == ["triton.conv_tail", "native.conv", "native.bn_act", "triton.add_act_backward", "aten.conv_bn_act"]


def test_a_child_is_ready_once_everything_is_imported() -> None:
    """After that it may be silent for seconds only, and so many children at once import slowly."""
    code = f"import sys; sys.path[:0] = [{str(BENCHMARKS)!r}, {str(gpu.ROOT)!r}]; import gpu_child; from gpu_scale import REHEARSAL\n" \
        "gpu_child.warm_up(REHEARSAL); before = set(sys.modules); from resnet_fast.dispatch import kernels; kernels()\n" \
        "print(sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr


def test_sources_are_hashed_as_the_build_hashes_them() -> None:
    import importlib.util
    spec = importlib.util.spec_from_file_location("resnet_fast_setup", gpu.ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = setup
    spec.loader.exec_module(setup)
    assert gpu.sources() == setup.source_hash(without="cpu")


def test_a_processors_kernels_are_none_of_a_gpus() -> None:
    """Each would be a process that checks nothing, and seconds of the memory checker's."""
    import gpu_check
    from gpu_scale import Scale
    said = {case: work() for case, work in gpu_check.inventory(Scale(), print)}
    mine = {id: row for id, row in said.items() if id.startswith("cpu.")}
    assert mine and {(row["status"], row["reason"]) for row in mine.values()} == {("absent", "it is for processors")}
    assert said["aten.conv_bn_act"]["status"] == "here"


def test_an_inventory_after_a_build_counts(tmp_path) -> None:
    run = a_run(tmp_path)
    for job, status in (("inventory without extension", "absent"), ("inventory 1234", "here")):
        run.ledger.add({"stage": "inventory", "job": job, "case": "native.conv", "status": status, "op": "conv_bn_act", "reason": None})
    assert run.kernels() == ["native.conv"]


MEMORY_ERROR = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 16 bytes
=========     at conv_kernel+0x2a0
========= ERROR SUMMARY: 1 error
"""


@pytest.mark.parametrize("text, status, reason", [
    ("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n", "right", None),
    (MEMORY_ERROR, "wrong", "Invalid __global__ read of size 16 bytes; ERROR SUMMARY: 1 error"),
    ("========= Target application returned an error\n", "left out", "no verdict: ========= Target application"),
])
def test_memory_verdict(text, status, reason) -> None:
    row = gpu.memory_verdict(text)
    assert row["status"] == status and (reason is None or row["reason"].startswith(reason))


@pytest.mark.parametrize("text, rows, said", [
    (MEMORY_ERROR, [("experimental.mine", "a", "right"), ("experimental.mine", "memcheck", "wrong")], None),
    ("========= Error: Device not supported.\n", [("experimental.mine", "a", "right")],
     "left out: compute-sanitizer does not"),
])
def test_sanitizer_stage(dog, tmp_path, monkeypatch, text, rows, said) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!{sys.executable}\nimport subprocess, sys\ni = sys.argv.index('--log-file')\n"
                    f"open(sys.argv[i + 1], 'w').write({text!r})\n"
                    "sys.exit(subprocess.run(sys.argv[i + 2:]).returncode or 1)\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(gpu.Run, "args", lambda self, **more: {"cases": ["a"]})
    run = a_run(tmp_path, dog)
    for id in ("aten.add_act", "experimental.mine"):
        run.ledger.add({"stage": "inventory", "job": "inventory", "case": id, "status": "here"})
    trouble = gpu.sanitizer(run, soon())
    assert trouble is None if said is None else trouble.startswith(said)
    assert [(r["job"], r["case"], r["status"]) for r in run.ledger.of("sanitizer")] == rows


def test_sanitizer_absent(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(gpu, "SANITIZER", "no-such-tool")
    assert gpu.sanitizer(a_run(tmp_path), soon()) == "left out: no-such-tool is not installed"


EMULATED = f'exec g++ "$1" "$2" "$3" -I{host_gpu.EMULATION} -o "$7" -x c++ "$8"'
OTHERWISE = 'printf "#!/bin/sh\\necho operand a, stride 1024, base offset of the pattern: right from rows 0\\n" > "$7"; chmod +x "$7"'


@pytest.mark.parametrize("compiles, lines, said", [
    pytest.param(EMULATED, 8, "matrices that begin inside a pattern of rows are found",
                 marks=pytest.mark.skipif(host_gpu.compiler() is None, reason="needs a g++ that knows _Float16")),
    (OTHERWISE, 1, "MATRICES THAT BEGIN INSIDE A PATTERN OF ROWS ARE NOT FOUND: conv_hopper and conv_tail_hopper rest on that"),
    ("echo no such architecture >&2; exit 1", 0, "failed: no such architecture"),
    ('printf "#!/bin/sh\\nsleep 60\\n" > "$7"; chmod +x "$7"', 0, "stopped at its deadline"),
])
def test_probe_stage(tmp_path, monkeypatch, compiles, lines, said) -> None:
    compiler = tmp_path / "nvcc"
    compiler.write_text(f"#!/bin/sh\n{compiles}\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(gpu_probe, "compiler", lambda: str(compiler))
    run = replace(a_run(tmp_path), rehearse=False)
    run.ledger.add({"stage": "environment", "job": "machine", "case": "machine", "status": "here", "capability": [9, 0]})
    assert gpu.probe(run, soon(2 if "sleep" in compiles else 60)) == said
    assert len(run.ledger.of("probe")) == lines and not (tmp_path / "probe").exists()


def test_sensors_keep_ranges_and_reasons(tmp_path) -> None:
    tool = tmp_path / "smi"
    tool.write_text("#!/bin/sh\ncase $1 in *clocks_event*) exit 2;; esac\n"
                    f"n=$(cat {tmp_path}/n 2>/dev/null || echo 0); echo $((n + 1)) > {tmp_path}/n\n"
                    "echo \"$((1500 + n)), 3201, 412.5, 55, 0x000000000000000$((n % 2))\"\n")
    tool.chmod(0o755)
    with Sensors(every=0.02, program=str(tool)) as sensors:
        while len(sensors.readings) < 4:
            time.sleep(0.02)
    seen = sensors.since(0)
    low, high = map(int, seen["clocks.sm"].split(".."))
    assert 1500 <= low < high and seen["power.draw"] == "412.5..412.5"
    assert seen["throttle"] == "0x0000000000000000 0x0000000000000001"
    with Sensors(program="absent") as absent:
        assert absent.query("driver_version") is None
    assert absent.since(0) == {}
