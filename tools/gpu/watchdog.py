"""How a run on a GPU survives its kernels: a ledger flushed row by row, and a watchdog over one child process a job.

Nothing here imports torch: a parent without a CUDA context outlives any kernel. A child reads its job from a JSON file
and appends events to another, one object a line: {"begin": case}, {"row": {…}}, {"alive": text}, {"end": true}.
Between two events it has ``silence`` seconds. A child that hangs or dies is replaced by one that skips that case.
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

ROOT = Path(__file__).resolve().parents[2]
POLL = 0.05
LEAVE = 15.0  # seconds that a child has to exit after its last row


# ---------------------------------------------------------------- what was found


class Ledger:
    """Rows of one run, in memory and, flushed one by one, in a file; an existing file is gone on with."""

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        self.rows: list[dict] = [row for row in map(_parse, text.splitlines()) if row is not None]
        self._file = path.open("a", encoding="utf-8")
        if text and not text.endswith("\n"):  # a kill cut the last line
            self._file.write("\n")

    def add(self, row: dict) -> None:
        """Remember a row, with the time of day; in the file before this returns, so that no kill of ours loses it."""
        row = {**row, "at": time.strftime("%H:%M:%S")}
        with self._lock:
            self.rows.append(row)
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self._file.flush()

    def of(self, stage: str, job: str | None = None) -> list[dict]:
        """The rows of a stage, or of one of its jobs."""
        with self._lock:
            return [row for row in self.rows if row["stage"] == stage and job in (None, row["job"])]

    def done(self, stage: str, job: str) -> list[str]:
        """The cases of a job that need not run again."""
        return [row["case"] for row in self.of(stage, job)]


def _parse(line: str) -> dict | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


# ---------------------------------------------------------------- who is watched


@dataclass(frozen=True)
class Job:
    """Work for one child at a time: a task, its arguments, a command to run it under, and how long it may be silent."""

    name: str
    task: str
    args: dict = field(default_factory=dict)
    under: tuple[str, ...] = ()
    env: dict = field(default_factory=dict)
    silence: float = 20.0
    start: float = 120.0  # for importing torch and opening the device
    restarts: int = 5


@dataclass(frozen=True)
class _End:
    """How a child ended: "done", "hung", "died" or "deadline", in which case, its last words, whether it began any."""

    how: str
    case: str | None
    words: str
    began: bool


class Watchdog:
    """Runs jobs in children of ``command`` and writes what they find into the ledger."""

    def __init__(self, command: list[str], ledger: Ledger, log: Path) -> None:
        self.command, self.ledger, self.log = command, ledger, log
        self._lock, self._stopped = threading.Lock(), threading.Event()

    def stop(self) -> None:
        """End the children that run now, as their deadline would."""
        self._stopped.set()

    def run(self, stage: str, job: Job, deadline: float) -> str | None:
        """Run a job to its end or until ``deadline`` (monotonic); None, or a sentence on what kept it from its end."""
        for _ in range(job.restarts + 1):
            end = self._child(stage, job, deadline)
            if end.how == "done":
                return None
            if end.how == "deadline":
                return "stopped at its deadline" + (f" in {end.case}" if end.case else "")
            if end.case is not None:
                row = {"stage": stage, "job": job.name, "case": end.case, "status": end.how, "reason": end.words}
                self.ledger.add(row)
            elif not end.began:
                return f"{end.how} before its first case: {end.words}"
        return f"given up after {job.restarts + 1} children hung or died"

    def _child(self, stage: str, job: Job, deadline: float) -> _End:
        request = {"task": job.task, "args": job.args, "skip": self.ledger.done(stage, job.name)}
        with tempfile.TemporaryDirectory() as scratch:
            job_file, events, words = (Path(scratch, name) for name in ("job", "events", "words"))
            job_file.write_text(json.dumps(request), encoding="utf-8")
            events.touch()
            path = os.pathsep.join(
                filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
            )  # what a user has beside the environment
            env = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **job.env}
            env.pop("RESNET_FAST_KERNEL", None)  # a user's choice is not the subject here
            with words.open("wb") as output:
                process = subprocess.Popen(
                    [*job.under, *self.command, str(job_file), str(events)],
                    cwd=ROOT,
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                try:
                    end = self._watch(process, events, stage, job, deadline)
                finally:
                    kill(process)
            text = words.read_text(encoding="utf-8", errors="replace")
        self._keep(f"{stage} {job.name}: {end.how}", text)
        if end.how in ("hung", "died"):
            return replace(end, words=f"{end.words}{last_words(text)}")
        return end

    def _watch(self, process: subprocess.Popen, events: Path, stage: str, job: Job, deadline: float) -> _End:
        case, ended, began, last, patience = None, False, False, time.monotonic(), job.start
        with events.open(encoding="utf-8") as tail:
            rest = ""
            while True:
                exited = process.poll()
                *lines, rest = (rest + tail.read()).split("\n")
                for event in map(json.loads, lines):
                    last, patience = time.monotonic(), job.silence
                    if "begin" in event:
                        case, began = event["begin"], True
                    elif "row" in event:
                        self.ledger.add({"stage": stage, "job": job.name, **event["row"]})
                        case = None
                    elif "end" in event:
                        ended, patience = True, LEAVE
                now = time.monotonic()
                if exited is not None and not lines:
                    if ended and (exited == 0 or job.under):  # a tool may end with a verdict of its own
                        return _End("done", None, "", began)
                    return _End("died", case, f"exit code {exited}; ", began)
                if now > deadline or self._stopped.is_set():
                    return _End("done" if ended else "deadline", case, "", began)
                if now - last > patience:
                    return _End("done" if ended else "hung", case, f"silent for {patience:g} s; ", began)
                if exited is None and not lines:
                    time.sleep(POLL)

    def _keep(self, title: str, text: str) -> None:
        with self._lock, self.log.open("a", encoding="utf-8") as log:
            log.write(f"==== {title}\n{text}\n")


def kill(process: subprocess.Popen) -> None:
    """End a child and all that it started; one that hangs in the driver is left behind."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        pass


def last_words(text: str) -> str:
    """The last line of a child's output that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"


# ---------------------------------------------------------------- the card meanwhile


class Sensors:
    """Clocks, power, temperature and throttling as nvidia-smi tells them every few seconds; nothing is ever set."""

    FIELDS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
    THROTTLE = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")  # the second in older drivers

    def __init__(self, every: float = 5.0, program: str = "nvidia-smi") -> None:
        self.readings: list[tuple[float, list[str]]] = []
        self._every, self._program, self._stop = every, program, threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def __enter__(self) -> Sensors:
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join(10)

    def query(self, *names: str) -> list[str] | None:
        """One line of values, or None where nvidia-smi is absent or does not know these names."""
        try:
            asked = subprocess.run(
                [self._program, f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits"],
                capture_output=True,
                text=True,
                timeout=10,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        lines = asked.stdout.strip().splitlines()
        return [value.strip() for value in lines[0].split(",")] if asked.returncode == 0 and lines else None

    def _loop(self) -> None:
        names = next((names for reason in self.THROTTLE if self.query(*(names := (*self.FIELDS, reason)))), None)
        while names is not None and not self._stop.is_set():
            values = self.query(*names)
            if values is not None:
                self.readings.append((time.monotonic(), values))
            self._stop.wait(self._every)

    def since(self, start: float) -> dict[str, str]:
        """The range of each reading since a moment, and every throttle reason seen."""
        rows = [values for at, values in self.readings if at >= start]
        if not rows:
            return {}
        found = {name: "{}..{}".format(*_range(row[i] for row in rows)) for i, name in enumerate(self.FIELDS)}
        return {**found, "throttle": " ".join(sorted({row[-1] for row in rows}))}


def _range(values) -> tuple[str, str]:
    numbers = sorted((v for v in values if _number(v)), key=float)
    return (numbers[0], numbers[-1]) if numbers else ("?", "?")


def _number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()
