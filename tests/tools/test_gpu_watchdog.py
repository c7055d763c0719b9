"""The watchdog of `make gpu`: children that hang, crash, linger, do not start, or outlive their parent."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from gpu_runs import CHILD, found, gone, job, soon, watchdog

from tools.gpu import watchdog as gpu_run
from tools.gpu.watchdog import Watchdog


@pytest.fixture
def dog(tmp_path) -> Watchdog:
    return watchdog(tmp_path)


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


@pytest.mark.parametrize(
    "how, words",
    [
        ("dies", "died before its first case: exit code 1; ModuleNotFoundError"),
        ("hangs", "hung before its first case: silent for 0.5 s"),
    ],
)
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
