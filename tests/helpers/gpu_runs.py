"""What the tests of `make gpu` share: children that misbehave, a watchdog over them, a run without a GPU."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from tools.gpu import __main__ as gpu
from tools.gpu.watchdog import Job, Ledger, Watchdog

ROOT = Path(__file__).resolve().parents[2]

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
    child = folder / "child.py"
    child.write_text(CHILD)
    return Watchdog([sys.executable, str(child)], Ledger(folder / "rows.jsonl"), folder / "log.txt")


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


def a_run(tmp_path: Path, dog: Watchdog | None = None) -> gpu.Run:
    ledger = dog.ledger if dog else Ledger(tmp_path / "rows.jsonl")
    return gpu.Run(tmp_path, ledger, dog, rehearse=True)


def a_stage(name: str, took: list, least: float, most: float, optional: bool = False, says: str = "") -> gpu.Stage:
    def work(run: gpu.Run, deadline: float) -> str | None:
        took.append((name, round(deadline - time.monotonic())))
        return says or None

    work.__name__ = name
    return gpu.Stage(work, least, most, optional)
