"""Child processes under a watchdog, and the ledger that keeps every row they report.

Nothing here imports torch: a parent without a CUDA context survives any fault of a kernel. A child reads its job from
one JSON file and appends events to another, one object a line: {"begin": case}, {"row": {…}}, {"alive": text},
{"end": true}. Between two events it may be silent for ``Job.silence`` seconds. A child that hangs or dies is replaced
by a new one that skips the case.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # of the checkout
POLL = 0.05  # seconds between two looks at a child
LEAVE = 15.0  # seconds that a child has to exit after its last row


# ---------------------------------------------------------------- rows


class Ledger:
    """The rows of one run, in memory and in a file. Rows of an existing file are read first."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        parsed = map(_parse, text.splitlines())
        self.rows: list[dict] = [row for row in parsed if row is not None]
        self._file = path.open("a", encoding="utf-8")
        if text and not text.endswith("\n"):  # a kill cut the last line
            self._file.write("\n")

    def add(self, row: dict) -> None:
        """Append a row with the time of day. It is in the file before this returns: a kill of this process keeps it."""
        row = {**row, "at": time.strftime("%H:%M:%S")}
        line = json.dumps(row, ensure_ascii=False)
        with self._lock:
            self.rows.append(row)
            self._file.write(line + "\n")
            self._file.flush()

    def of(self, stage: str, job: str | None = None) -> list[dict]:
        """Return the rows of a stage, or of one of its jobs."""
        with self._lock:
            rows = [row for row in self.rows if row["stage"] == stage]
        if job is not None:
            rows = [row for row in rows if row["job"] == job]
        return rows

    def done(self, stage: str, job: str) -> list[str]:
        """Return the cases of a job that have a row, so need not run again."""
        rows = self.of(stage, job)
        return [row["case"] for row in rows]


def _parse(line: str) -> dict | None:
    """Return a line's row, or None for a line that a kill cut short."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


# ---------------------------------------------------------------- child processes


@dataclass(frozen=True)
class Job:
    """Work for one child at a time: a task, its arguments, a command to run it under, and how long it may be silent."""

    name: str
    task: str
    args: dict = field(default_factory=dict)
    under: tuple[str, ...] = ()
    env: dict = field(default_factory=dict)
    silence: float = 20.0
    start: float = 120.0  # seconds of silence allowed while torch is imported and the device opened
    restarts: int = 5


@dataclass(frozen=True)
class _End:
    """How a child ended: "done", "hung", "died" or "deadline", in which case, why, and whether it began any case."""

    how: str
    case: str | None
    reason: str
    began: bool


@dataclass
class _Progress:
    """What a child has reported so far, and how long it may be silent from its last event on."""

    patience: float
    last_event: float = field(default_factory=time.monotonic)
    case: str | None = None
    began: bool = False
    ended: bool = False


class Watchdog:
    """Runs jobs in children of ``command`` and writes their rows into the ledger."""

    def __init__(
        self,
        command: list[str],
        ledger: Ledger,
        log: Path,
    ) -> None:
        self.command = command
        self.ledger = ledger
        self.log = log
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def stop(self) -> None:
        """End the children that run now, as their deadline would."""
        self._stopped.set()

    def run(
        self,
        stage: str,
        job: Job,
        deadline: float,
    ) -> str | None:
        """Run a job until it is done or until ``deadline`` (monotonic); None, or a sentence on what stopped it."""
        for _ in range(job.restarts + 1):
            end = self._run_child(stage, job, deadline)
            if end.how == "done":
                return None
            if end.how == "deadline":
                return "stopped at its deadline" + (f" in {end.case}" if end.case else "")
            if end.case is not None:
                row = {
                    "stage": stage,
                    "job": job.name,
                    "case": end.case,
                    "status": end.how,
                    "reason": end.reason,
                }
                self.ledger.add(row)
            elif not end.began:
                return f"{end.how} before its first case: {end.reason}"
        return f"given up after {job.restarts + 1} children hung or died"

    def _run_child(
        self,
        stage: str,
        job: Job,
        deadline: float,
    ) -> _End:
        """Run one child until it exits, hangs or is stopped, and keep its output in the log."""
        request = {"task": job.task, "args": job.args, "skip": self.ledger.done(stage, job.name)}
        with tempfile.TemporaryDirectory() as scratch:
            job_file = Path(scratch, "job")
            events = Path(scratch, "events")
            output_file = Path(scratch, "words")
            job_file.write_text(json.dumps(request), encoding="utf-8")
            events.touch()
            command = [*job.under, *self.command, str(job_file), str(events)]
            with output_file.open("wb") as output:
                process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=_environment(job),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                try:
                    end = self._watch(process, events, stage, job, deadline)
                finally:
                    kill(process)
            text = output_file.read_text(encoding="utf-8", errors="replace")
        self._write_log(f"{stage} {job.name}: {end.how}", text)
        if end.how in ("hung", "died"):
            return replace(end, reason=f"{end.reason}{last_words(text)}")
        return end

    def _watch(
        self,
        process: subprocess.Popen,
        events: Path,
        stage: str,
        job: Job,
        deadline: float,
    ) -> _End:
        """Follow a child's events until it exits, is silent for too long, or reaches the deadline."""
        progress = _Progress(patience=job.start)
        with events.open(encoding="utf-8") as tail:
            rest = ""
            while True:
                # before the events are read: an exited child writes no more
                exit_code = process.poll()
                *lines, rest = (rest + tail.read()).split("\n")
                for line in lines:
                    self._follow(json.loads(line), progress, stage, job)
                if exit_code is not None and not lines:
                    return _exited(exit_code, progress, job)
                end = self._overdue(progress, deadline)
                if end is not None:
                    return end
                if exit_code is None and not lines:
                    time.sleep(POLL)

    def _follow(
        self,
        event: dict,
        progress: _Progress,
        stage: str,
        job: Job,
    ) -> None:
        """Take one event of a child into its progress; a row goes into the ledger."""
        progress.last_event = time.monotonic()
        progress.patience = job.silence
        if "begin" in event:
            progress.case = event["begin"]
            progress.began = True
        elif "row" in event:
            self.ledger.add({"stage": stage, "job": job.name, **event["row"]})
            progress.case = None
        elif "end" in event:
            progress.ended = True
            progress.patience = LEAVE

    def _overdue(self, progress: _Progress, deadline: float) -> _End | None:
        """Return how a running child must be ended now, or None if it may go on."""
        now = time.monotonic()
        if now > deadline or self._stopped.is_set():
            how = "done" if progress.ended else "deadline"
            return _End(how, progress.case, "", progress.began)
        if now - progress.last_event > progress.patience:
            how = "done" if progress.ended else "hung"
            return _End(how, progress.case, f"silent for {progress.patience:g} s; ", progress.began)
        return None

    def _write_log(self, title: str, text: str) -> None:
        """Append a child's output to the log."""
        with self._lock, self.log.open("a", encoding="utf-8") as log:
            log.write(f"==== {title}\n{text}\n")


def _environment(job: Job) -> dict[str, str]:
    """Return a child's environment: the user's, with the checkout on the path and no kernel forced."""
    # packages that the user has beside the Python environment
    user_path = os.environ.get("PYTHONPATH")
    path = os.pathsep.join(filter(None, (str(ROOT), user_path)))
    env = {
        **os.environ,
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
        **job.env,
    }
    env.pop("RESNET_FAST_KERNEL", None)  # every kernel is the subject here, not the user's choice
    return env


def _exited(exit_code: int, progress: _Progress, job: Job) -> _End:
    """Return how a child ended that exited by itself."""
    # a tool that it runs under may exit with a verdict of its own
    well = exit_code == 0 or bool(job.under)
    if progress.ended and well:
        return _End("done", None, "", progress.began)
    return _End("died", progress.case, f"exit code {exit_code}; ", progress.began)


def kill(process: subprocess.Popen) -> None:
    """End a child and all processes that it started. One that hangs in the driver is left behind after 5 seconds."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        pass


def last_words(text: str) -> str:
    """Return the last non-empty line of a child's output."""
    lines = text.strip().splitlines()
    if not lines:
        return "it said nothing"
    return lines[-1].strip()[:300]
