"""Helpers for the tests of `make gpu`: children that misbehave, a watchdog over them, a run without a GPU."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from tools.gpu.run import Run
from tools.gpu.stages import Stage
from tools.gpu.watchdog import ROOT, Job, Ledger, Watchdog

# A child without torch: each of its cases does what its name says.
CHILD = f"""
import json, os, subprocess, sys, time
sys.path.insert(0, {str(ROOT)!r})
from tools.gpu.child import Events, follow_parent, perform

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


def watchdog(folder: Path) -> Watchdog:
    """A watchdog over such children, with its ledger and log in a folder."""
    child = folder / "child.py"
    child.write_text(CHILD)
    ledger = Ledger(folder / "rows.jsonl")
    return Watchdog([sys.executable, str(child)], ledger, folder / "log.txt")


def job(*cases: str, silence: float = 2.0, **args) -> Job:
    """A job of cases; what is no field of Job is an argument of the child's."""
    fields = ("restarts", "start", "under")
    settings = {name: args.pop(name) for name in fields if name in args}
    return Job("kernel", "fake", {"cases": cases, **args}, silence=silence, **settings)


def soon(seconds: float = 30.0) -> float:
    """A deadline so many seconds from now."""
    return time.monotonic() + seconds


def statuses(dog: Watchdog) -> list[tuple[str, str]]:
    """Case and status of each row in the ledger."""
    return [(row["case"], row["status"]) for row in dog.ledger.rows]


def gone(pid: int) -> bool:
    """Whether a process has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return True
    state = stat.split()[2]
    return state == "Z"


def soon_gone(pid: int, seconds: float = 10.0) -> bool:
    """Whether a process ends within some seconds."""
    deadline = soon(seconds)
    while not gone(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def a_run(tmp_path: Path, dog: Watchdog | None = None, rehearse: bool = True) -> Run:
    """A run without a GPU in a folder, or with the ledger of a watchdog."""
    ledger = dog.ledger if dog else Ledger(tmp_path / "rows.jsonl")
    return Run(tmp_path, ledger, dog, rehearse)


def add_row(run: Run, stage: str, case: str, status: str, **more) -> None:
    """Add a row to a run's ledger; its job has the case's name unless ``more`` names one."""
    run.ledger.add({"stage": stage, "job": case, "case": case, "status": status, **more})


def add_hopper(run: Run) -> None:
    """Add the row of a machine with a Hopper GPU."""
    add_row(run, "environment", "machine", "here", capability=[9, 0])


def a_stage(
    name: str, took: list, least: float, most: float, optional: bool = False, says: str = ""
) -> Stage:
    """A stage that takes no time and appends its name and the seconds it was given to ``took``."""

    def work(run: Run, deadline: float) -> str | None:
        took.append((name, round(deadline - time.monotonic())))
        return says or None

    work.__name__ = name
    return Stage(work, least, most, optional)
