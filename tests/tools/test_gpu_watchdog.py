"""The watchdog of `make gpu`: children that hang, crash, linger, do not start, or outlive their parent."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from gpu_runs import CHILD, job, soon, soon_gone, statuses, watchdog

from tools.gpu.watchdog import Watchdog


@pytest.fixture
def dog(tmp_path) -> Watchdog:
    return watchdog(tmp_path)


def test_a_job_that_goes_well(dog, tmp_path) -> None:
    assert dog.run("check", job("a", "b"), soon()) is None
    assert statuses(dog) == [("a", "right"), ("b", "right")]
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    expected = [("check", "kernel", "a"), ("check", "kernel", "b")]
    assert [(row["stage"], row["job"], row["case"]) for row in rows] == expected
    log = (tmp_path / "log.txt").read_text()
    assert "==== check kernel: done" in log


def test_a_hung_case_is_marked_and_the_rest_goes_on(dog) -> None:
    assert dog.run("check", job("a", "hang", "b"), soon()) is None
    assert statuses(dog) == [("a", "right"), ("hang", "hung"), ("b", "right")]
    first, hung, last = dog.ledger.rows
    assert hung["reason"].startswith("silent for 2 s")
    assert first["pid"] != last["pid"]


def test_a_crash_is_marked_with_its_last_words_and_the_rest_goes_on(dog) -> None:
    assert dog.run("check", job("a", "crash", "b"), soon()) is None
    assert statuses(dog) == [("a", "right"), ("crash", "died"), ("b", "right")]
    code = -signal.SIGABRT
    reason = dog.ledger.rows[1]["reason"]
    assert reason == f"exit code {code}; Fatal: an assert in the kernel"


def test_an_exception_is_a_row_and_costs_no_child(dog) -> None:
    assert dog.run("check", job("raise", "b"), soon()) is None
    assert statuses(dog) == [("raise", "failed"), ("b", "right")]
    reason = dog.ledger.rows[0]["reason"]
    assert reason == "RuntimeError: no kernel image is available"


def test_a_device_that_did_not_survive_costs_the_child(dog, tmp_path) -> None:
    broken = tmp_path / "broken"
    broken.touch()
    work = job("raise", "b", broken=str(broken), restarts=3)
    assert dog.run("check", work, soon()) is None
    assert statuses(dog) == [("raise", "died"), ("b", "died")]
    reason = dog.ledger.rows[0]["reason"]
    assert "did not survive it; RuntimeError: no kernel image" in reason


def test_signs_of_life_keep_a_long_case(dog) -> None:
    assert dog.run("check", job("long", silence=1.0), soon()) is None
    assert statuses(dog) == [("long", "right")]


def test_the_deadline_ends_a_job_and_all_that_it_started(dog, tmp_path) -> None:
    start = time.monotonic()
    pid_file = tmp_path / "pid"
    work = job("a", "offspring", silence=60, pid=str(pid_file))
    trouble = dog.run("check", work, soon(2))
    took = time.monotonic() - start
    assert trouble == "stopped at its deadline in offspring"
    assert took < 10
    assert statuses(dog) == [("a", "right")]
    pid = int(pid_file.read_text())
    assert soon_gone(pid)


def test_it_gives_up_after_so_many_children(dog) -> None:
    crashes = [f"crash{i}" for i in range(9)]
    trouble = dog.run("check", job(*crashes, restarts=2), soon())
    assert trouble == "given up after 3 children hung or died"
    assert len(dog.ledger.rows) == 3


@pytest.mark.parametrize(
    "how, start, words",
    [
        ("dies", 20, "died before its first case: exit code 1; ModuleNotFoundError"),
        ("hangs", 0.5, "hung before its first case: silent for 0.5 s"),
    ],
    ids=["dies", "hangs"],
)
def test_a_child_that_does_not_start(dog, how, start, words) -> None:
    trouble = dog.run("check", job("a", startup=how, start=start), soon())
    assert trouble.startswith(words)
    assert dog.ledger.rows == []


def test_a_child_that_will_not_leave_is_made_to(dog, monkeypatch) -> None:
    monkeypatch.setattr("tools.gpu.watchdog.LEAVE", 0.3)
    assert dog.run("check", job("a", linger=True), soon()) is None
    assert statuses(dog) == [("a", "right")]


def test_children_do_not_outlive_a_killed_parent(tmp_path) -> None:
    child = tmp_path / "child.py"
    child.write_text(CHILD)
    job_file = tmp_path / "job"
    job_file.write_text(json.dumps({"task": "fake", "args": {"cases": ["hang"]}, "skip": []}))
    events = tmp_path / "events"
    command = [sys.executable, str(child), str(job_file), str(events)]
    start = f"""
        import subprocess, time
        p = subprocess.Popen({command!r}, start_new_session=True)
        print(p.pid, flush=True)
        time.sleep(600)"""
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(start)], stdout=subprocess.PIPE, text=True
    )
    pid = int(parent.stdout.readline())
    while not (events.is_file() and "begin" in events.read_text()):
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    assert soon_gone(pid)
