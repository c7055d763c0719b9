"""The stages of ``make gpu``: functions of a run and a deadline that return None or a sentence for the summary."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from . import extension
from . import probe as descriptor_probe
from .found import kernel_of, ours
from .run import NoGpu, Run
from .watchdog import ROOT, Job, last_words

PROCESS_BYTES = 8 << 30  # of GPU memory that a process checking a batch of 256 may take
COMPILING = 45.0  # seconds that a case may be silent in which several kernels, all of them proved, may be compiled
SANITIZER = "compute-sanitizer"


# ---------------------------------------------------------------- the machine and the extension


def environment(run: Run, deadline: float) -> str | None:
    """Describe the machine and measure its ceilings."""
    trouble = run.job("environment", Job("machine", "environment", run.args()), deadline)
    row = run.machine_row()
    if row is None:
        raise NoGpu(f"it did not answer: {trouble}")
    if row["status"] == "no gpu":
        raise NoGpu(row["reason"])
    if row["status"] != "here":
        raise NoGpu(f"it did not answer: {row['reason']}")
    return trouble


def build(run: Run, deadline: float) -> str | None:
    """Build the extension, then list the kernels."""
    said = build_extension(run, deadline)
    version = extension.prebuilt() or "without extension"
    job = Job(f"inventory {version}", "inventory", run.args())
    at_least = time.monotonic() + 30
    trouble = run.job("inventory", job, max(deadline, at_least))
    return joined(said, trouble)


def build_extension(run: Run, deadline: float) -> str | None:
    """Build the extension for this GPU, unless the one that is there was built from these sources."""
    if run.rehearse:
        return "left out of a rehearsal"
    if not (ROOT / "csrc").is_dir():
        return "there are no sources to build from"
    arch = architecture(run)
    if extension.is_current(arch):
        return "prebuilt"
    code, output = extension.compile_extension(arch, deadline)
    run.note("build", output)
    if code is None:
        return "stopped at its deadline: the kernels of csrc are left out"
    return f"failed: {last_words(output)}" if code else None


def architecture(run: Run) -> str:
    """Return nvcc's name for this GPU."""
    return extension.architecture(run.machine_row()["capability"])


def lacks_extension(run: Run) -> bool:
    """Whether this run built the extension before and it is missing now, for example on a new machine."""
    if run.rehearse:
        return False
    rows = run.ledger.of("stages", "build")
    built = any(not row["reason"] or row["reason"].startswith("prebuilt") for row in rows)
    return built and not extension.is_current(architecture(run))


def joined(*sentences: str | None) -> str | None:
    """Join what several jobs reported; None if all went well."""
    given = filter(None, sentences)
    return "; ".join(given) or None


# ---------------------------------------------------------------- right or wrong


def check(run: Run, deadline: float, dtypes: tuple[str, ...] = ("bfloat16",)) -> str | None:
    """Check each kernel in its own processes, many at once: nothing is timed here."""
    if run.rehearse:
        dtypes = ("float32",)
    cores = len(os.sched_getaffinity(0))
    workers = check_processes(run, cores)
    threads = {"OMP_NUM_THREADS": str(max(1, cores // workers))}
    jobs = []
    for id in run.kernels():
        count = shares(id)
        for share in range(count):
            args = run.args(
                kernel=id,
                dtypes=dtypes,
                share=share,
                shares=count,
            )
            jobs.append(
                Job(f"{id} {share + 1}/{count} {dtypes[0]}", "check", env=threads, args=args)
            )
    return run_jobs(run, "check", jobs, deadline, workers)


def check_processes(run: Run, cores: int) -> int:
    """Return how many processes may check at once, by cores and by the GPU's memory."""
    memory = run.machine_row().get("memory_bytes", 0)
    if not memory:
        return 1
    return max(1, min(cores - 2, memory // PROCESS_BYTES))


def others(run: Run, deadline: float) -> str | None:
    """Check the dtypes that are not timed."""
    if run.rehearse:
        return None
    return check(run, deadline, ("float16", "float32"))


def shares(kernel: str) -> int:
    """Return how many processes share a kernel's cases: Triton compiles anew for most of them, a second each."""
    if not kernel.startswith("triton"):
        return 1
    return 4 if kernel.startswith(("triton.conv", "triton.pointwise")) else 2


def run_jobs(
    run: Run,
    stage: str,
    jobs: list[Job],
    deadline: float,
    workers: int = 1,
) -> str | None:
    """Run jobs, ``workers`` at once; return a sentence on those that did not end well."""

    def run_one(job: Job) -> str | None:
        return run.job(stage, job, deadline)

    with ThreadPoolExecutor(workers) as pool:
        try:
            ends = list(pool.map(run_one, jobs))
        except KeyboardInterrupt:
            run.watchdog.stop()
            raise
    troubles = [f"{job.name}: {end}" for job, end in zip(jobs, ends, strict=True) if end]
    more = f"and {len(troubles) - 3} more" if len(troubles) > 3 else None
    return joined(*troubles[:3], more)


def large(run: Run, deadline: float) -> str | None:
    """Check our kernels on tensors of more than 2³¹ elements."""
    checked = run.proved() if run.ledger.of("check") else run.kernels()
    kernels = list(filter(ours, checked))
    job = Job("large", "large", run.args(kernels=kernels), silence=60)
    return run.job("large", job, deadline)


def probe(run: Run, deadline: float) -> str | None:
    """Probe, apart from any kernel, what the kernels for Hopper assume of its matrix descriptors."""
    if run.rehearse or list(run.machine_row()["capability"]) != [9, 0]:
        return "left out: it is about compute capability 9.0 alone"
    if descriptor_probe.compiler() is None:
        return "left out: nvcc is not installed"
    rows, trouble = descriptor_probe.probe(run.folder, deadline)
    for row in rows:
        run.ledger.add(row)
    return trouble or descriptor_probe.verdict(rows)


def sanitizer(run: Run, deadline: float) -> str | None:
    """Run the memory checker over a few problems of each of our kernels."""
    tool = shutil.which(SANITIZER) or shutil.which(SANITIZER, path="/usr/local/cuda/bin")
    if tool is None:
        return f"left out: {SANITIZER} is not installed"
    troubles = []
    for id in filter(ours, run.kernels()):
        report = run.folder / "sanitizer.txt"
        report.unlink(missing_ok=True)
        troubles.append(run.job("sanitizer", sanitizer_job(run, id, tool, report), deadline))
        text = report.read_text(errors="replace") if report.is_file() else ""
        report.unlink(missing_ok=True)
        if "device not supported" in text.lower():
            return f"left out: {SANITIZER} does not support this machine: {last_words(text)}"
        if time.monotonic() < deadline:
            run.ledger.add(
                {
                    "stage": "sanitizer",
                    "job": id,
                    "case": "memcheck",
                    **memory_verdict(text),
                }
            )
    return joined(*troubles)


def sanitizer_job(
    run: Run,
    kernel: str,
    tool: str,
    report: Path,
) -> Job:
    """Return the job that runs a kernel under the memory checker."""
    return Job(
        kernel,
        "memory",
        run.args(kernel=kernel),
        restarts=0,
        silence=60,
        under=(tool, "--tool", "memcheck", "--report-api-errors", "no", "--log-file", str(report)),
        env={
            "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"
        },  # or overruns end in the allocator's own memory
    )


def memory_verdict(text: str) -> dict:
    """Return the memory checker's report as a row."""
    lines = [line.lstrip("= ").strip() for line in text.splitlines()]
    if "ERROR SUMMARY: 0 errors" in lines:
        return {"status": "right"}
    errors = [
        line
        for line in lines
        if line.startswith(("Invalid", "Program hit", "Misaligned", "Address"))
    ]
    total = [line for line in lines if line.startswith("ERROR SUMMARY")]
    if not total:
        return {"status": "left out", "reason": f"no verdict: {last_words(text)}"}
    return {"status": "wrong", "reason": "; ".join([*errors[:1], *total])}


def models(run: Run, deadline: float) -> str | None:
    """Check what users call: whole networks, inference and training, in every dtype."""
    job = Job("models", "models", run.args(), silence=120)
    return run.job("models", job, deadline)


def streams(run: Run, deadline: float) -> str | None:
    """Check our kernels on streams of their own, and on a second GPU where there is one."""
    jobs = []
    for id in filter(ours, run.kernels()):
        jobs.append(Job(id, "streams", run.args(kernel=id), silence=COMPILING))
    workers = check_processes(run, len(os.sched_getaffinity(0)))
    return run_jobs(run, "streams", jobs, deadline, workers)


# ---------------------------------------------------------------- layers and tables


def layers(run: Run, deadline: float) -> str | None:
    """Time each layer by each proved kernel, and by cuDNN's fused forms where they can run."""
    cudnn = [id for id in run.kernels() if id == "aten.cudnn_fused"]
    variants = list(dict.fromkeys([*run.proved(), *cudnn]))
    args = run.args(proved=variants)
    job = Job("layers", "layer_times", args, silence=COMPILING)
    return run.job("layers", job, deadline)


def tables(run: Run, deadline: float) -> str | None:
    """Measure what a plan and the drop-in ask for; the layers' times say where most time is at stake."""
    measured = {
        row["case"]: row["times"] for row in run.ledger.of("layers") if row["status"] == "measured"
    }
    microseconds = {}
    for case, times in measured.items():
        microseconds[case] = {id: timing["us"] for id, timing in times.items()}
    args = run.args(
        proved=run.proved(),
        times=microseconds,
        known=known_entries(run, measured),
        folder=str(run.folder),
    )
    return run.job("tables", Job("tables", "fill_tables", args, silence=COMPILING), deadline)


def known_entries(run: Run, measured: dict[str, dict]) -> dict[str, dict]:
    """Return time and error of each proved kernel that was both timed and checked at a layer's full size.

    Both together make an entry of a table.
    """
    right = full_size_checks(run)
    entries: dict[str, dict] = {}
    for case, times in measured.items():
        for id, timing in times.items():
            row = right.get((id, f"full {case}"))
            if row is None:
                continue
            errors = {name: row[name] for name in ("error", "eager_error")}
            entries.setdefault(case, {})[id] = {**timing, **errors}
    return entries


def full_size_checks(run: Run) -> dict[tuple[str, str], dict]:
    """Return the rows of right checks of proved kernels, by kernel and case."""
    proved = set(run.proved())
    found = {}
    for row in run.ledger.of("check"):
        kernel = kernel_of(row)
        if row["status"] == "right" and kernel in proved:
            found[kernel, row["case"]] = row
    return found


def groups(run: Run, deadline: float) -> str | None:
    """Tune plans as a user does. The groups of layers that pay go into the table, and the headline's plan uses them."""
    # two batches, and the time to build them
    seconds = max(5.0, (deadline - time.monotonic() - 20) / 2.5)
    job = Job(
        f"plans{table_size(run)}",
        "tune_plans",
        run.args(seconds=seconds),
        env={"RESNET_FAST_TABLES": str(run.folder)},
        silence=120,
        restarts=1,
    )
    return run.job("groups", job, deadline)


def table_size(run: Run) -> str:
    """Return how many problems the tables have, for a job's name: with more of them, a network is another case."""
    return f" by {len(run.ledger.of('tables'))} problems"


# ---------------------------------------------------------------- networks

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
    """Time whole networks; ours use the tables that this run has filled."""
    if run.rehearse:
        batches = (5,)
    args = run.args(
        mode=mode,
        batches=batches,
        peers=[*PLAYERS, *more],
        folder=str(run.folder),
    )
    job = Job(
        name + table_size(run),
        "whole_network",
        args,
        env={"RESNET_FAST_TABLES": str(run.folder)},
        silence=silence,
        restarts=1,
    )
    return run.job(stage, job, deadline)


def headline(run: Run, deadline: float) -> str | None:
    """Time the network by everyone but torch.compile."""
    silence = (
        150  # seconds: cuDNN tries its algorithms for every layer, and reports nothing meanwhile
    )
    return network(run, "headline", "networks", deadline, silence)


def peers(run: Run, deadline: float) -> str | None:
    """Time it again beside torch.compile: its default at the large batch, its best mode (minutes), then batch 1."""
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
    """Time a training step. Its oracle is the whole iteration in float64, about 0.3 GB an image."""
    memory = run.machine_row().get("memory_bytes", 0)
    batch = 256 if memory > 120e9 else 32
    return network(run, "train", "training", deadline, 120, mode="train", batches=(batch,))


# ---------------------------------------------------------------- their order and time


@dataclass(frozen=True)
class Stage:
    """``least`` and ``most`` seconds of a stage; an optional one is left out where the others need its time."""

    work: Callable[[Run, float], str | None]
    least: float
    most: float
    optional: bool = False

    @property
    def name(self) -> str:
        return self.work.__name__


# In a first run, with nothing compiled, the headline is the last stage that gets its time. torch.compile gets the rest,
# and the next run.
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
    Stage(models, 30, 90, True),
    Stage(streams, 20, 60, True),
    Stage(probe, 8, 30, True),
    Stage(large, 20, 40, True),
    Stage(sanitizer, 20, 60, True),
    Stage(train, 30, 60, True),
)
