"""``make gpu``: prove and measure everything on the GPU of this machine, in one command under nine minutes.

No argument, no network, from any checkout: builds the extension or takes the one that is there, then stage after stage,
each with a deadline, every kernel in a process of its own under a watchdog, results on disk row by row. The same command
again goes on with what a run left out, or with one that was killed, on a new machine too if that run's folder was put into
benchmarks/results. Results go to $OUT, or to benchmarks/results; the short table comes last. Exit code 0: no kernel was
found wrong; 1: one was; 2: there is no GPU. ``--rehearse`` runs the same program on a CPU at toy sizes.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.machinery
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from . import probe as descriptor_probe
from .summary import Found, kernel_of, ours, summary, write
from .watchdog import ROOT, Job, Ledger, Sensors, Watchdog, kill, last_words

TOTAL = 530.0  # seconds, and a few more to come and to go
PROCESS_BYTES = 8 << 30  # of GPU memory that a process checking a batch of 256 may take
COMPILING = (
    45.0  # seconds that a case may be silent in which several kernels, all of them proved, may have to be compiled
)
SANITIZER = "compute-sanitizer"
KEPT = ROOT / "benchmarks" / "results"  # of this checkout: what earlier runs left, though their $OUT be gone


class NoGpu(Exception):
    """There is nothing to run on."""


@dataclass
class Run:
    """One run: where its results go, who watches, and whether it is a rehearsal."""

    folder: Path
    ledger: Ledger
    watchdog: Watchdog
    rehearse: bool

    def job(self, stage: str, job: Job, deadline: float) -> str | None:
        """Run a job of a stage; None, or what kept it from its end."""
        if self.rehearse:  # on a machine that others use too
            job = replace(job, env={**job.env, "OMP_NUM_THREADS": "1"})
        return self.watchdog.run(stage, job, deadline)

    def note(self, title: str, text: str) -> None:
        """Keep what a tool said beside what the children said."""
        with (self.folder / "log.txt").open("a", encoding="utf-8") as log:
            log.write(f"==== {title}\n{text}\n")

    def args(self, **more) -> dict:
        return {"rehearse": True, **more} if self.rehearse else more

    @property
    def found(self) -> Found:
        return Found(self.ledger.rows)

    def kernels(self) -> list[str]:
        """The kernels that can run here, what may win first: a deadline costs the others' checks. Of an extension made of other sources, none."""
        stale = not self.rehearse and prebuilt() != sources()
        found = {
            id: row.get("op", "")
            for id, row in self.found.inventory.items()
            if row["status"] == "here" and not (stale and id.startswith("native"))
        }
        return sorted(found, key=lambda id: (not ours(id), found[id].startswith(("bn_act", "add_act"))))

    def proved(self) -> list[str]:
        """The kernels proved in the dtype that is timed."""
        return self.found.proved("float32" if self.rehearse else "bfloat16")


# ---------------------------------------------------------------- the stages: each returns None, or a sentence


def environment(run: Run, deadline: float) -> str | None:
    """What machine this is, and its ceilings."""
    trouble = run.job("environment", Job("machine", "environment", run.args()), deadline)
    row = run.found.one("environment", "machine")
    if row is None or row["status"] != "here":
        raise NoGpu(
            row["reason"]
            if row and row["status"] == "no gpu"
            else f"it did not answer: {row['reason'] if row else trouble}"
        )
    return trouble


def build(run: Run, deadline: float) -> str | None:
    """The extension, and with it the list of kernels."""
    said = extension(run, deadline)
    job = Job(f"inventory {prebuilt() or 'without extension'}", "inventory", run.args())
    trouble = run.job("inventory", job, max(deadline, time.monotonic() + 30))
    return "; ".join(filter(None, (said, trouble))) or None


def extension(run: Run, deadline: float) -> str | None:
    """Build it for this GPU, unless the one that is there was made of these sources."""
    if run.rehearse:
        return "left out of a rehearsal"
    if not (ROOT / "csrc").is_dir():
        return "there are no sources to build from"
    arch = architecture(run)
    if prebuilt() == sources() and arch in targets():
        return "prebuilt"
    jobs = {
        "MAX_JOBS": str(os.cpu_count())
    }  # a virtual machine may tell of little free memory until it is asked for; there are a dozen files
    env = {**jobs, **os.environ, "RESNET_FAST_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": arch}
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            code = process.wait(max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return "stopped at its deadline: the kernels of csrc are left out"
        finally:
            kill(process)
            log.seek(0)
            said = log.read()
            run.note("build", said)
    return f"failed: {last_words(said)}" if code else None


def architecture(run: Run) -> str:
    """What nvcc calls this GPU."""
    major, minor = run.found.one("environment", "machine")["capability"]
    return "9.0a" if (major, minor) == (9, 0) else f"{major}.{minor}"


def lacks_extension(run: Run) -> bool:
    """Whether a run that has built it goes on where it is not, on a new machine say."""
    built = [
        row for row in run.ledger.of("stages", "build") if not row["reason"] or row["reason"].startswith("prebuilt")
    ]
    return not run.rehearse and bool(built) and (prebuilt() != sources() or architecture(run) not in targets())


def sources() -> str:
    """Hash of csrc without the CPU kernels, as setup.py records it."""
    digest, cpu = hashlib.sha256(), ROOT / "csrc" / "cpu"
    for path in sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file() and cpu not in path.parents):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def prebuilt() -> str | None:
    """The hash of the sources that the extension for this Python was made of, or None if there is none."""
    package = ROOT / "resnet_fast"
    record = package / "_build.json"
    built = any((package / f"_C{suffix}").is_file() for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    if not record.is_file() or not built:
        return None
    return json.loads(record.read_text()).get("csrc")


def targets() -> list[str]:
    """The architectures that the extension has machine code for; one with PTX alone would leave out what Hopper has of its own."""
    return json.loads((ROOT / "resnet_fast" / "_build.json").read_text()).get("archs", "").replace("+PTX", "").split()


def check(run: Run, deadline: float, dtypes: tuple[str, ...] = ("bfloat16",)) -> str | None:
    """A process of its own for each kernel, many at once, as nothing is timed."""
    dtypes = ("float32",) if run.rehearse else dtypes
    cores = len(os.sched_getaffinity(0))
    memory = run.found.one("environment", "machine").get("memory_bytes", 0)
    workers = max(1, min(cores - 2, memory // PROCESS_BYTES)) if memory else 1
    threads = {"OMP_NUM_THREADS": str(max(1, cores // workers))}
    jobs = [
        Job(
            f"{id} {share + 1}/{shares(id)} {dtypes[0]}",
            "check",
            env=threads,
            args=run.args(kernel=id, dtypes=dtypes, share=share, shares=shares(id)),
        )
        for id in run.kernels()
        for share in range(shares(id))
    ]
    return each(run, "check", jobs, deadline, workers)


def others(run: Run, deadline: float) -> str | None:
    """The dtypes that are not timed."""
    return None if run.rehearse else check(run, deadline, ("float16", "float32"))


def shares(kernel: str) -> int:
    """Among how many processes a kernel's cases are shared: Triton compiles anew for most of them, a second each."""
    if not kernel.startswith("triton"):
        return 1
    return 4 if kernel.startswith(("triton.conv", "triton.pointwise")) else 2


def each(run: Run, stage: str, jobs: list[Job], deadline: float, workers: int = 1) -> str | None:
    """Run jobs, ``workers`` at once; what kept any of them from its end."""
    with ThreadPoolExecutor(workers) as pool:
        try:
            found = list(pool.map(lambda job: (job.name, run.job(stage, job, deadline)), jobs))
        except KeyboardInterrupt:
            run.watchdog.stop()
            raise
    troubles = [f"{name}: {trouble}" for name, trouble in found if trouble]
    return "; ".join([*troubles[:3], *([f"and {len(troubles) - 3} more"] if len(troubles) > 3 else [])]) or None


def layers(run: Run, deadline: float) -> str | None:
    proved = list(dict.fromkeys([*run.proved(), *(k for k in run.kernels() if k == "aten.cudnn_fused")]))
    return run.job("layers", Job("layers", "layer_times", run.args(proved=proved), silence=COMPILING), deadline)


def tables(run: Run, deadline: float) -> str | None:
    """What a plan and the drop-in ask for, with the layers' times to tell what is most at stake."""
    measured = {row["case"]: row["times"] for row in run.ledger.of("layers") if row["status"] == "measured"}
    args = run.args(
        proved=run.proved(),
        times={case: {id: time["us"] for id, time in times.items()} for case, times in measured.items()},
        known=known(run, measured),
        folder=str(run.folder),
    )
    return run.job("tables", Job("tables", "fill_tables", args, silence=COMPILING), deadline)


def known(run: Run, measured: dict[str, dict]) -> dict[str, dict]:
    """Of each timed layer the proved kernels that were checked at just this size, with error and time: entries of a table."""
    proved = set(run.proved())
    right = {
        (kernel_of(row), row["case"]): row
        for row in run.ledger.of("check")
        if row["status"] == "right" and kernel_of(row) in proved
    }
    found = {
        case: {
            id: {**time, **{name: row[name] for name in ("error", "eager_error")}}
            for id, time in times.items()
            if (row := right.get((id, f"full {case}"))) is not None
        }
        for case, times in measured.items()
    }
    return {case: kernels for case, kernels in found.items() if kernels}


def groups(run: Run, deadline: float) -> str | None:
    """Plans as a user tunes them: which groups of layers pay is remembered in the table, and the headline's plan uses it."""
    seconds = max(5.0, (deadline - time.monotonic() - 20) / 2.5)  # two batches, and what building them takes
    job = Job(
        f"plans{tuned(run)}",
        "tune_plans",
        run.args(seconds=seconds),
        env={"RESNET_FAST_TABLES": str(run.folder)},
        silence=120,
        restarts=1,
    )
    return run.job("groups", job, deadline)


def tuned(run: Run) -> str:
    """By how many problems of the tables: with more of them, a network is another case."""
    return f" by {len(run.ledger.of('tables'))} problems"


PLAYERS = ("eager-nchw", "eager", "folded", "ours", "ours-plan", "ours-plan-across")


def network(
    run: Run,
    stage: str,
    name: str,
    deadline: float,
    silence: float,
    *more: str,
    mode: str = "infer",
    batches: tuple[int, ...] = (256, 1),
) -> str | None:
    """Whole networks, ours by the tables that this run has filled."""
    args = run.args(
        mode=mode, batches=(5,) if run.rehearse else batches, peers=[*PLAYERS, *more], folder=str(run.folder)
    )
    env = {"RESNET_FAST_TABLES": str(run.folder)}
    return run.job(stage, Job(name + tuned(run), "whole_network", args, env=env, silence=silence, restarts=1), deadline)


def headline(run: Run, deadline: float) -> str | None:
    return network(
        run, "headline", "networks", deadline, 150
    )  # cuDNN tries its algorithms for every layer, and says nothing meanwhile


def peers(run: Run, deadline: float) -> str | None:
    """Again, beside torch.compile where throughput is compared: as it is by default, then its best mode, which takes minutes; then at batch 1."""
    jobs = (
        ("compile", ("compile",), (256,)),
        ("compile-best", ("compile", "compile-best"), (256,)),
        ("compile at batch 1", ("compile", "compile-best"), (1,)),
    )
    for name, more, batches in jobs[1:2] if run.rehearse else jobs:
        trouble = network(run, "peers", name, deadline, 400, *more, batches=batches)
        if trouble:
            return trouble
    return None


def train(run: Run, deadline: float) -> str | None:
    """The oracle is the whole iteration in float64: about 0.3 GB an image."""
    memory = run.found.one("environment", "machine").get("memory_bytes", 0)
    return network(run, "train", "training", deadline, 120, mode="train", batches=(256 if memory > 120e9 else 32,))


def large(run: Run, deadline: float) -> str | None:
    checked = run.proved() if run.ledger.of("check") else run.kernels()
    args = run.args(kernels=[id for id in checked if ours(id)])
    return run.job("large", Job("large", "large", args, silence=60), deadline)


def probe(run: Run, deadline: float) -> str | None:
    """What the kernels made for Hopper take for granted of its matrix descriptors, apart from any kernel."""
    if run.rehearse or list(run.found.one("environment", "machine")["capability"]) != [9, 0]:
        return "left out: it is about compute capability 9.0 alone"
    if descriptor_probe.compiler() is None:
        return "left out: nvcc is not installed"
    rows, trouble = descriptor_probe.probe(run.folder, deadline)
    for row in rows:
        run.ledger.add(row)
    return trouble or descriptor_probe.verdict(rows)


def sanitizer(run: Run, deadline: float) -> str | None:
    """The memory checker over a handful of problems of each kernel of ours."""
    tool = shutil.which(SANITIZER) or shutil.which(SANITIZER, path="/usr/local/cuda/bin")
    if tool is None:
        return f"left out: {SANITIZER} is not installed"
    trouble = []
    for id in filter(ours, run.kernels()):
        report = run.folder / "sanitizer.txt"
        report.unlink(missing_ok=True)
        job = Job(
            id,
            "memory",
            run.args(kernel=id),
            restarts=0,
            silence=60,
            under=(tool, "--tool", "memcheck", "--report-api-errors", "no", "--log-file", str(report)),
            env={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )  # or overruns end in the allocator's own memory
        trouble.append(run.job("sanitizer", job, deadline))
        text = report.read_text(errors="replace") if report.is_file() else ""
        report.unlink(missing_ok=True)
        if "device not supported" in text.lower():
            return f"left out: {SANITIZER} does not support this machine: {last_words(text)}"
        if time.monotonic() < deadline:
            run.ledger.add({"stage": "sanitizer", "job": id, "case": "memcheck", **memory_verdict(text)})
    return "; ".join(filter(None, trouble)) or None


def memory_verdict(text: str) -> dict:
    """What the memory checker said, as a row."""
    lines = [line.lstrip("= ").strip() for line in text.splitlines()]
    if "ERROR SUMMARY: 0 errors" in lines:
        return {"status": "right"}
    errors = [line for line in lines if line.startswith(("Invalid", "Program hit", "Misaligned", "Address"))]
    total = [line for line in lines if line.startswith("ERROR SUMMARY")]
    if not total:
        return {"status": "left out", "reason": f"no verdict: {last_words(text)}"}
    return {"status": "wrong", "reason": "; ".join([*errors[:1], *total])}


@dataclass(frozen=True)
class Stage:
    """``least`` and ``most`` seconds; an optional stage is left out where the others need its time."""

    work: Callable[[Run, float], str | None]
    least: float
    most: float
    optional: bool = False

    @property
    def name(self) -> str:
        return self.work.__name__


# Of a first run, with nothing compiled, the last that has its time is the headline; torch.compile has what is left, and the next run.
STAGES = (
    Stage(environment, 10, 120),
    Stage(build, 20, 150),
    Stage(check, 40, 170),
    Stage(layers, 40, 90),
    Stage(tables, 30, 80),
    Stage(groups, 35, 70),
    Stage(headline, 100, 200),
    Stage(peers, 60, 330, True),
    Stage(others, 30, 120, True),
    Stage(probe, 8, 30, True),
    Stage(large, 20, 40, True),
    Stage(sanitizer, 20, 60, True),
    Stage(train, 30, 60, True),
)


# ---------------------------------------------------------------- the run


def perform(run: Run, stages: tuple[Stage, ...], sensors: Sensors, seconds: float) -> None:
    """Every stage in turn; an earlier one never eats what a later one that is not optional needs."""
    end = time.monotonic() + seconds
    complete = done(run.ledger)
    for i, stage in enumerate(stages):
        if stage.name in complete and not (stage.name == "build" and lacks_extension(run)):
            say(f"{stage.name}: done before")
            continue
        if stage.name == "tables":  # what uses them is to be seen again
            complete -= {"groups", "headline", "peers"}
        start = time.monotonic()
        spare = end - start - sum(later.least for later in stages[i + 1 :] if not later.optional)
        limit = min(
            stage.most, spare if stage.optional else max(spare, min(stage.least, end - start))
        )  # what comes first has first to be
        if limit < stage.least and stage.optional or limit <= 0:
            trouble, status = f"left out: {max(0, limit):.0f} s left, it needs {stage.least:.0f}", "left out"
        else:
            say(f"{stage.name} …")
            trouble = stage.work(run, start + limit)
            status = "cut" if trouble and "stopped at its deadline" in trouble else "done"
        run.ledger.add(
            {
                "stage": "stages",
                "job": stage.name,
                "case": stage.name,
                "status": status,
                "reason": trouble,
                "seconds": time.monotonic() - start,
                "sensors": sensors.since(start),
            }
        )
        say(f"{stage.name}: {time.monotonic() - start:.0f} s" + (f", {trouble}" if trouble else ""))


def done(ledger: Ledger) -> set[str]:
    """The stages that need not run again: the last row of each tells."""
    return {
        name for name, status in {row["job"]: row["status"] for row in ledger.of("stages")}.items() if status == "done"
    }


def goes_on(folder: Path, wanted: set[str]) -> bool:
    """Whether something is left to do of a run; of one whose kernels were not all built everything is."""
    ledger = Ledger(folder / "rows.jsonl")
    complete, begun = done(ledger), {row["job"] for row in ledger.of("stages")}
    return bool(wanted - complete) and ("build" in complete or "build" not in begun)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def open_run(results: Path, rehearse: bool, stages: tuple[Stage, ...], sensors: Sensors) -> Run:
    """A new run's folder, or that of one of the same sources on such a card in which some of these stages are not done."""
    name, driver = sensors.query("name", "driver_version") or ["", ""]
    card = name, driver.partition(".")[0]  # of the same driver but for its patches
    digest = hashlib.sha256(" ".join(["rehearsal" if rehearse else "", sys.executable, *card]).encode())
    files = [p for folder in ("resnet_fast", "csrc", "tools") for p in (ROOT / folder).rglob("*")]
    for path in sorted(p for p in files if p.suffix in (".py", ".cu", ".cuh", ".h", ".cpp")):
        digest.update(path.read_bytes())
    name = digest.hexdigest()[:8]
    brought = {p.name: p for place in (KEPT, results) for p in place.glob(f"gpu-*-{name}")}
    unfinished = [key for key in sorted(brought) if goes_on(brought[key], {stage.name for stage in stages})]
    folder = results / (unfinished[-1] if unfinished else f"gpu-{time.strftime('%Y%m%d%H%M%S')}-{name}")
    folder.mkdir(parents=True, exist_ok=True)
    if unfinished and brought[folder.name] != folder:
        shutil.copytree(brought[folder.name], folder, dirs_exist_ok=True)
    ledger = Ledger(folder / "rows.jsonl")
    if unfinished:
        say(f"going on with {folder}, which has {len(ledger.rows)} rows")
    command = [sys.executable, "-m", "tools.gpu.child"]
    return Run(folder, ledger, Watchdog(command, ledger, folder / "log.txt"), rehearse)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    names = ",".join(stage.name for stage in STAGES[2:])
    parser.add_argument("--stages", help=f"only these, after environment and build: {names}")
    parser.add_argument("--seconds", type=float, default=TOTAL, help="for the whole run (default %(default)s)")
    parser.add_argument("--rehearse", action="store_true", help="the same program on a CPU at toy sizes")
    args = parser.parse_args(argv)
    wanted = None if args.stages is None else {*args.stages.split(","), "environment", "build"}
    stages = tuple(stage for stage in STAGES if wanted is None or stage.name in wanted)
    results = Path(os.environ.get("OUT") or KEPT).absolute()  # children run elsewhere
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
    found = run.found
    if found.one("environment", "machine") is None:
        return 130
    found.machine["facts"] |= {"driver": driver[0]} if driver else {}
    print(summary(found), flush=True)
    for lock in run.folder.glob("*.lock"):  # of the table; nobody else writes there
        lock.unlink()
    if not interrupted:
        say("written: " + ", ".join(map(str, write(found, run.folder, results))))
    return 130 if interrupted else 1 if found.bad() else 0


def terminate(*_) -> None:
    """Ends as Ctrl-C does, so that children are not left with the GPU."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # a checkout need not be installed
    signal.signal(signal.SIGTERM, terminate)
    sys.exit(main())
