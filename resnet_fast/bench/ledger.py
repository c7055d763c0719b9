"""The ledger: measurements as data, one small JSON file for each run on one machine, written atomically, never edited.

A file is ``{"schema": 1, "machine": {…}, "rows": [{…}, …]}`` with the fields of :class:`Machine` and :class:`Row`.
Times are seconds, errors are relative to a float64 oracle, speeds are ratios of the same rounds.
"""

from __future__ import annotations

import datetime
import json
import re
import shlex
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch

from ..util import machine
from ..util.files import replacing
from ..util.machine import commit

SCHEMA = 1
RESULTS = Path("benchmarks/results")


@dataclass(frozen=True)
class Machine:
    """Where and when a run was measured; ``name`` is the GPU or else the CPU, ``facts`` hold driver and versions."""

    name: str
    device: str
    date: str
    commit: str
    facts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One provider of one case: a network ("infer/resnet50/bf16/256", level "model") or an op's problem (level "op").

    ``speed_over`` maps the other providers of the case to how many times faster this row was, the median over common
    rounds. ``roofline`` is the share of the physical limit, 1 at the ceiling. ``first_s`` is build and first call in
    the run's own process; ``cold_s`` is a fresh process, from its start to the first answer, with empty compiler
    caches. Values that were not measured are None.
    """

    level: str
    case: str
    provider: str
    ours: bool
    dtype: str
    batch: int
    size: int | None
    layout: str
    seconds: float
    low: float
    high: float
    rounds: int
    problem: str | None = None
    img_s: float | None = None
    tflops: float | None = None
    gb_s: float | None = None
    roofline: float | None = None
    peak_bytes: int | None = None
    first_s: float | None = None
    cold_s: float | None = None
    error: float | None = None
    eager_error: float | None = None
    speed_over: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One file of the ledger."""

    machine: Machine
    rows: tuple[Row, ...]
    path: Path


def case_name(mode: str, model: str, dtype: str, batch: int, size: int = 224) -> str:
    """Return a model case's name, as "infer/resnet50/bf16/256"; an image size other than 224 is appended as "@320"."""
    name = f"{mode}/{model}/{dtype}/{batch}"
    if size == 224:
        return name
    return f"{name}@{size}"


def parse_case(case: str) -> tuple[str, str, str, int, int]:
    """Return (mode, model, dtype, batch, size) of a model case; raises ValueError for any other text."""
    match = re.fullmatch(r"(\w+)/(\w+)/(\w+)/(\d+)(?:@(\d+))?", case)
    if match is None:
        raise ValueError(f"case {case!r} is not mode/model/dtype/batch[@size]")
    mode, model, dtype, batch, size = match.groups(default="224")
    return mode, model, dtype, int(batch), int(size)


def here(device: str) -> Machine:
    """Return this machine, now, at this commit ("+" after it: the work tree differs from the commit)."""
    facts = {**machine.machine(), "driver": _driver()}
    kind = torch.device(device).type
    name = torch.cuda.get_device_name() if kind == "cuda" else facts["cpu"]
    now = datetime.datetime.now(datetime.timezone.utc)
    return Machine(name, kind, now.isoformat(timespec="seconds"), commit(), facts)


def _driver() -> str:
    """Return the NVIDIA driver's version, or "none"."""
    version = Path("/sys/module/nvidia/version")
    return version.read_text().strip() if version.is_file() else "none"


def measured_by(words: Iterable[str], option: str) -> str:
    """Return the command line that repeats a run, without the file that ``option`` names for its result."""
    command: list[str] = ["python", "-m"]
    for word in words:
        is_file = command[-1] == option and not word.startswith("-")
        if is_file:
            continue
        command.append(option if word.startswith(f"{option}=") else word)
    return shlex.join(command)


def write_run(rows: Iterable[Row], machine: Machine, path: Path | str | None = None) -> Path:
    """Write one run and return its file: ``path``, or a new one in ``benchmarks/results`` named by date and machine."""
    path = _default_path(machine) if path is None else Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "schema": SCHEMA,
        "machine": asdict(machine),
        "rows": [asdict(row) for row in rows],
    }
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)
    with replacing(path) as part:
        part.write_text(f"{text}\n", encoding="utf-8")
    return path


def _default_path(machine: Machine) -> Path:
    date = re.sub(r"[^0-9]", "", machine.date[:19])
    name = re.sub(r"[^a-z0-9]+", "-", machine.name.lower()).strip("-")
    commit = machine.commit.rstrip("+")
    return RESULTS / f"{date}-{name}-{commit}.json"


def read_run(path: Path | str) -> Run:
    """Read one file; raises ValueError naming the file if it is not a run of this schema."""
    path = Path(path)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if record.get("schema") != SCHEMA:
        raise ValueError(f"{path}: schema {record.get('schema')!r}, expected {SCHEMA}")
    known = {field.name for field in fields(Row)}
    for row in record["rows"]:
        unknown = set(row) - known
        if unknown:
            raise ValueError(f"{path}: unknown fields {', '.join(sorted(unknown))}")
    machine = Machine(**record["machine"])
    rows = tuple(Row(**row) for row in record["rows"])
    return Run(machine, rows, path)


def read_runs(folder: Path | str = RESULTS) -> list[Run]:
    """Return the runs of a folder (or of the one file that it names), oldest first; an empty list if there are none."""
    folder = Path(folder)
    paths = [folder] if folder.is_file() else folder.glob("*.json")
    runs = [read_run(path) for path in paths]
    return sorted(runs, key=lambda run: (run.machine.date, run.path.name))


def newest(runs: Iterable[Run]) -> dict[tuple[str, str], tuple[Run, list[Row]]]:
    """Return (machine name, case) → the latest run that measured it and its rows of the case; runs are never mixed.

    A run of peers alone does not replace an earlier one that has rows of ours.
    """
    found: dict[tuple[str, str], tuple[Run, list[Row]]] = {}
    for run in runs:
        for case, rows in _by_case(run).items():
            key = run.machine.name, case
            _, earlier = found.get(key, (None, []))
            if _has_ours(rows) or not _has_ours(earlier):
                found[key] = run, rows
    return found


def _by_case(run: Run) -> dict[str, list[Row]]:
    cases: dict[str, list[Row]] = {}
    for row in run.rows:
        cases.setdefault(row.case, []).append(row)
    return cases


def _has_ours(rows: Iterable[Row]) -> bool:
    return any(row.ours for row in rows)
