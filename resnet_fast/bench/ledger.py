"""The ledger: measurements as data. One small JSON file for each run on one machine, written whole, never edited.

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
    """Where and when a run was measured; ``name`` is the GPU or else the processor, ``facts`` driver and versions."""

    name: str
    device: str
    date: str
    commit: str
    facts: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One way to run one case: a network ("infer/resnet50/bf16/256", level "model") or one op's problem (level "op").

    ``speed_over`` maps the other providers of the case to how many times faster this row was, the median over common
    rounds; ``roofline`` is the share reached of the physical limit, 1 at the ceiling; ``first_s`` is build and first
    call in the run's own process, ``cold_s`` a fresh process from its start to the first answer with empty compiler
    caches. What was not measured is None.
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
    """ "infer/resnet50/bf16/256"; another image size than 224 follows as "@320"."""
    return f"{mode}/{model}/{dtype}/{batch}" + ("" if size == 224 else f"@{size}")


def parse_case(case: str) -> tuple[str, str, str, int, int]:
    """(mode, model, dtype, batch, size) of a model case; raises ValueError for anything else."""
    match = re.fullmatch(r"(\w+)/(\w+)/(\w+)/(\d+)(?:@(\d+))?", case)
    if match is None:
        raise ValueError(f"case {case!r} is not mode/model/dtype/batch[@size]")
    mode, model, dtype, batch, size = match.groups()
    return mode, model, dtype, int(batch), int(size or 224)


def here(device: str) -> Machine:
    """This machine, now, at this commit ("+" after it: the work tree differs from the commit)."""

    facts = {**machine.machine(), "driver": _driver()}
    name = torch.cuda.get_device_name() if torch.device(device).type == "cuda" else facts["cpu"]
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return Machine(name, torch.device(device).type, now, commit(), facts)


def _driver() -> str:
    """The NVIDIA driver's version, or "none"."""
    version = Path("/sys/module/nvidia/version")
    return version.read_text().strip() if version.is_file() else "none"


def measured_by(words: Iterable[str], option: str) -> str:
    """The command line that repeats a run, without the file that ``option`` named for its result."""
    kept: list[str] = []
    for word in words:
        if kept and kept[-1] == option and not word.startswith("-"):
            continue
        kept.append(option if word.startswith(f"{option}=") else word)
    return shlex.join(["python", "-m", *kept])


def write_run(rows: Iterable[Row], machine: Machine, path: Path | str | None = None) -> Path:
    """Write one run and return its file: ``path``, or a new one in ``benchmarks/results`` named by date and machine."""
    if path is None:
        stamp = re.sub(r"[^0-9]", "", machine.date[:19])
        name = re.sub(r"[^a-z0-9]+", "-", machine.name.lower()).strip("-")
        path = RESULTS / f"{stamp}-{name}-{machine.commit.rstrip('+')}.json"
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"schema": SCHEMA, "machine": asdict(machine), "rows": [asdict(row) for row in rows]}
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")
    return path


def read_run(path: Path | str) -> Run:
    """One file; raises ValueError naming the file if it is not a run of this schema."""
    path = Path(path)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if record.get("schema") != SCHEMA:
        raise ValueError(f"{path}: schema {record.get('schema')!r}, expected {SCHEMA}")
    known = {f.name for f in fields(Row)}
    for row in record["rows"]:
        unknown = set(row) - known
        if unknown:
            raise ValueError(f"{path}: unknown fields {', '.join(sorted(unknown))}")
    return Run(Machine(**record["machine"]), tuple(Row(**row) for row in record["rows"]), path)


def read_runs(folder: Path | str = RESULTS) -> list[Run]:
    """Every run of a folder (or the one file that is named), oldest first; an empty list if there is none."""
    folder = Path(folder)
    paths = [folder] if folder.is_file() else folder.glob("*.json")
    return sorted((read_run(path) for path in paths), key=lambda run: (run.machine.date, run.path.name))


def newest(runs: Iterable[Run]) -> dict[tuple[str, str], tuple[Run, list[Row]]]:
    """(machine name, case) → the latest run that measured it and its rows of the case: two runs are never mixed.

    A run of peers alone does not hide an earlier one with ours beside them.
    """
    found: dict[tuple[str, str], tuple[Run, list[Row]]] = {}
    for run in runs:
        cases: dict[str, list[Row]] = {}
        for row in run.rows:
            cases.setdefault(row.case, []).append(row)
        for case, rows in cases.items():
            _, before = found.get((run.machine.name, case), (None, []))
            if any(row.ours for row in rows) or not any(row.ours for row in before):
                found[run.machine.name, case] = run, rows
    return found
