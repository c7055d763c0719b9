"""``make gpu``: prove and measure everything on the GPU of this machine, in one command under nine minutes.

It needs no argument, no network and no installation. It builds the extension, or takes the one that is there, then runs
stage after stage, each with a deadline. Every kernel runs in a process of its own under a watchdog, and results are on
disk row by row. The same command again continues a run that was killed or left stages out, on a new machine too if that
run's folder was put into benchmarks/results. Results go to $OUT, or to benchmarks/results; a short table comes last.
Exit code 0: no kernel was found wrong; 1: one was; 2: there is no GPU. ``--rehearse`` runs the same program on a CPU at
toy sizes.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from .run import NoGpu, Run, say
from .sensors import Sensors
from .stages import STAGES, Stage, lacks_extension
from .summary import summary, write
from .watchdog import ROOT, Ledger, Watchdog

TOTAL = 530.0  # seconds, and a few more to come and to go
# of this checkout: what earlier runs left, though their $OUT be gone
KEPT = ROOT / "benchmarks" / "results"
SOURCES = ("resnet_fast", "csrc", "tools")  # folders whose files name a run
SUFFIXES = (".py", ".cu", ".cuh", ".h", ".cpp")
CHILD = [sys.executable, "-m", "tools.gpu.child"]


# ---------------------------------------------------------------- the stages in turn


def perform(
    run: Run,
    stages: tuple[Stage, ...],
    sensors: Sensors,
    seconds: float,
) -> None:
    """Run every stage in turn. None takes time that a later one needs, unless the later one is optional."""
    end = time.monotonic() + seconds
    complete = done(run.ledger)
    for i, stage in enumerate(stages):
        if stage.name in complete and not (stage.name == "build" and lacks_extension(run)):
            say(f"{stage.name}: done before")
            continue
        if stage.name == "tables":  # the stages that use them run again
            complete -= {"groups", "headline", "peers"}
        perform_stage(run, stage, stages[i + 1 :], sensors, end)


def perform_stage(
    run: Run,
    stage: Stage,
    later: tuple[Stage, ...],
    sensors: Sensors,
    end: float,
) -> None:
    """Run one stage, or leave it out, and add its row to the ledger."""
    start = time.monotonic()
    limit = time_limit(stage, later, end - start)
    if limit <= 0 or (stage.optional and limit < stage.least):
        trouble = f"left out: {max(0, limit):.0f} s left, it needs {stage.least:.0f}"
        status = "left out"
    else:
        say(f"{stage.name} …")
        trouble = stage.work(run, start + limit)
        status = "cut" if trouble and "stopped at its deadline" in trouble else "done"
    row = {
        "stage": "stages",
        "job": stage.name,
        "case": stage.name,
        "status": status,
        "reason": trouble,
        "seconds": time.monotonic() - start,
        "sensors": sensors.since(start),
    }
    run.ledger.add(row)
    remark = f", {trouble}" if trouble else ""
    say(f"{stage.name}: {time.monotonic() - start:.0f} s{remark}")


def time_limit(stage: Stage, later: tuple[Stage, ...], left: float) -> float:
    """Return how many of the seconds left a stage may take. The later stages that are not optional keep theirs."""
    needed_later = sum(other.least for other in later if not other.optional)
    spare = left - needed_later
    if not stage.optional:  # with too little time for all, the last stages go short, not the first
        spare = max(spare, min(stage.least, left))
    return min(stage.most, spare)


def done(ledger: Ledger) -> set[str]:
    """Return the stages that need not run again, by the last row of each."""
    complete = set()
    for row in ledger.of("stages"):
        if row["status"] == "done":
            complete.add(row["job"])
        else:
            complete.discard(row["job"])
    return complete


# ---------------------------------------------------------------- new runs, and runs to go on with


def open_run(
    results: Path,
    rehearse: bool,
    stages: tuple[Stage, ...],
    sensors: Sensors,
) -> Run:
    """Open an unfinished run of the same sources on the same kind of card, or a new one."""
    digest = run_digest(rehearse, sensors)
    earlier = unfinished_run(results, digest, stages)
    now = time.strftime("%Y%m%d%H%M%S")
    name = earlier.name if earlier else f"gpu-{now}-{digest}"
    folder = results / name
    folder.mkdir(parents=True, exist_ok=True)
    if earlier and earlier != folder:
        shutil.copytree(earlier, folder, dirs_exist_ok=True)
    ledger = Ledger(folder / "rows.jsonl")
    if earlier:
        say(f"going on with {folder}, which has {len(ledger.rows)} rows")
    watchdog = Watchdog(CHILD, ledger, folder / "log.txt")
    return Run(folder, ledger, watchdog, rehearse)


def unfinished_run(results: Path, digest: str, stages: tuple[Stage, ...]) -> Path | None:
    """Return the newest folder of such a run with stages left, among the results and those of this checkout."""
    folders = {}
    for place in (KEPT, results):
        for path in place.glob(f"gpu-*-{digest}"):
            folders[path.name] = path
    wanted = {stage.name for stage in stages}
    for name in sorted(folders, reverse=True):
        if goes_on(folders[name], wanted):
            return folders[name]
    return None


def run_digest(rehearse: bool, sensors: Sensors) -> str:
    """Return what names a run: a hash of kind, Python, card, driver and sources."""
    name, driver = sensors.query("name", "driver_version") or ["", ""]
    release = driver.partition(".")[0]  # a driver's patches do not count
    kind = "rehearsal" if rehearse else ""
    words = " ".join([kind, sys.executable, name, release])
    digest = hashlib.sha256(words.encode())
    files = []
    for folder in SOURCES:
        files += (ROOT / folder).rglob("*")
    for path in sorted(files):
        if path.suffix in SUFFIXES:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def goes_on(folder: Path, wanted: set[str]) -> bool:
    """Whether a run has stages left. One with a build that was cut lacks kernels and is not continued."""
    ledger = Ledger(folder / "rows.jsonl")
    complete = done(ledger)
    missing = wanted - complete
    begun = {row["job"] for row in ledger.of("stages")}
    build_was_cut = "build" in begun and "build" not in complete
    return bool(missing) and not build_was_cut


# ---------------------------------------------------------------- the command


def main(argv: list[str] | None = None) -> int:
    parser = command_line()
    args = parser.parse_args(argv)
    stages = selected_stages(args.stages)
    results = Path(os.environ.get("OUT") or KEPT).absolute()  # children run in another folder
    interrupted = False
    with Sensors() as sensors:
        try:
            run = open_run(results, args.rehearse, stages, sensors)
        except OSError as error:
            parser.error(f"results cannot be written: {error}; name another folder in $OUT")
        try:
            perform(run, stages, sensors, args.seconds)
        except NoGpu as reason:
            if not run.ledger.of("stages") and "did not answer" not in str(reason):
                shutil.rmtree(run.folder)
            say(f"make gpu found no GPU to run on: {reason}")
            return 2
        except KeyboardInterrupt:
            interrupted = True
        driver = sensors.query("driver_version")
    return report(run, results, driver, interrupted)


def command_line() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu", description=__doc__.split("\n\n")[0]
    )
    names = ",".join(stage.name for stage in STAGES[2:])
    parser.add_argument("--stages", help=f"only these, after environment and build: {names}")
    parser.add_argument(
        "--seconds", type=float, default=TOTAL, help="for the whole run (default %(default)s)"
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="the same program on a CPU at toy sizes"
    )
    return parser


def selected_stages(names: str | None) -> tuple[Stage, ...]:
    """Return the stages named on the command line, after environment and build; all if none is named."""
    if names is None:
        return STAGES
    named = names.split(",")
    wanted = {*named, "environment", "build"}
    return tuple(stage for stage in STAGES if stage.name in wanted)


def report(
    run: Run,
    results: Path,
    driver: list[str] | None,
    interrupted: bool,
) -> int:
    """Print the summary, write the result files, and return the exit code."""
    found = run.found
    if found.one("environment", "machine") is None:
        return 130
    if driver:
        found.machine["facts"]["driver"] = driver[0]
    print(summary(found), flush=True)
    for lock in run.folder.glob("*.lock"):  # of the table, which no other process writes
        lock.unlink()
    if interrupted:
        return 130
    say("written: " + ", ".join(map(str, write(found, run.folder, results))))
    return 1 if found.bad() else 0


def terminate(*_) -> None:
    """End as Ctrl-C does: children are ended too and do not keep the GPU."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # a checkout need not be installed
    signal.signal(signal.SIGTERM, terminate)
    sys.exit(main())
