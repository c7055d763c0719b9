"""The results in the format that the file's suffix names, made at the end from the record and put in place in one step.

CSV: path, class_1, label_1, probability_1, … or path, f0, f1, …. JSON and JSONL: {"path", "top": [{"class", "label",
"probability"}]} or {"path", "features"}. Parquet: path and lists classes, labels, probabilities, or features. Files
that failed are in OUT.failed.csv.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import itertools
import json
import os
from array import array
from base64 import b64decode
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

ROW_GROUP = 4096  # rows of a Parquet file held in memory


class Row(NamedTuple):
    """One file's result: the classes and their probabilities, best first, or its features."""

    path: str
    classes: list[int]
    labels: list[str | None]
    probabilities: list[float]
    features: array


def writer(out: Path) -> Callable[[Iterable[Row], BinaryIO, bool], None]:
    """The writer for the suffix of ``out``. Raises ValueError for an unknown one or a missing package."""
    suffix = out.suffix.lower()
    if suffix not in WRITERS:
        raise ValueError(f"--out {out}: got suffix {suffix!r}, expected one of {', '.join(WRITERS)}")
    if suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ValueError(f"--out {out}: Parquet is written by pyarrow: pip install pyarrow, or choose .csv or .jsonl")
    return WRITERS[suffix]


def write(records: Iterable[dict], out: Path, labels: list[str] | None, features: bool) -> int:
    """Write all records; returns how many failed. ``labels`` are the names of the classes, if known."""
    partial, failures = out.with_name(f"{out.name}.tmp"), _Failures(failures_path(out))
    with open(partial, "wb") as file:
        writer(out)(_rows(records, labels, failures), file, features)
        file.flush()
        os.fsync(file.fileno())
    failures.close()
    os.replace(partial, out)
    return failures.count


def failures_path(out: Path) -> Path:
    """Where the names and reasons of failed files go."""
    return out.with_name(f"{out.name}.failed.csv")


class _Failures:
    """A CSV file that exists only if something failed."""

    def __init__(self, path: Path) -> None:
        self._path, self._file, self.count = path, None, 0
        path.unlink(missing_ok=True)

    def add(self, path: str, error: str) -> None:
        if self._file is None:
            self._file = open(self._path, "w", newline="", encoding="utf-8")
            self._table = csv.writer(self._file, lineterminator="\n")
            self._table.writerow(("path", "error"))
        self._table.writerow((path, error))
        self.count += 1

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _rows(records: Iterable[dict], labels: list[str] | None, failures: _Failures) -> Iterator[Row]:
    for record in records:
        path = printable(record["name"])
        if "error" in record:
            failures.add(path, record["error"])
        elif "features" in record:
            yield Row(path, [], [], [], array("f", b64decode(record["features"])))
        else:
            names = [labels[c] if labels is not None else None for c in record["class"]]
            yield Row(path, record["class"], names, record["p"], array("f"))


def printable(name: str) -> str:
    """A file name as valid UTF-8: bytes that are none become \\xNN, in every format alike."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _csv(rows: Iterable[Row], file: BinaryIO, features: bool) -> None:
    text = io.TextIOWrapper(file, "utf-8", newline="")
    table = csv.writer(text, lineterminator="\n")
    header = True
    for row in rows:
        if header and features:
            table.writerow(["path", *(f"f{i}" for i in range(len(row.features)))])
        elif header:
            names = itertools.product(range(1, len(row.classes) + 1), ("class", "label", "probability"))
            table.writerow(["path", *(f"{what}_{i}" for i, what in names)])
        header = False
        if features:
            table.writerow([row.path, *(f"{value:.9g}" for value in row.features)])
        else:
            table.writerow([row.path, *itertools.chain(*zip(row.classes, row.labels, row.probabilities, strict=True))])
    if header:
        table.writerow(["path"])
    text.detach()


def _json_lines(rows: Iterable[Row], features: bool) -> Iterator[bytes]:
    for row in rows:
        if features:
            values = {"features": [float(f"{value:.9g}") for value in row.features]}
        else:
            values = {
                "top": [
                    {"class": c, "label": label, "probability": p}
                    for c, label, p in zip(row.classes, row.labels, row.probabilities, strict=True)
                ]
            }
        yield json.dumps({"path": row.path, **values}, ensure_ascii=False).encode()


def _jsonl(rows: Iterable[Row], file: BinaryIO, features: bool) -> None:
    for line in _json_lines(rows, features):
        file.write(line + b"\n")


def _json(rows: Iterable[Row], file: BinaryIO, features: bool) -> None:
    start = b"[\n"
    for line in _json_lines(rows, features):
        file.write(start + line)
        start = b",\n"
    file.write(b"\n]\n" if start == b",\n" else b"[]\n")


def _parquet(rows: Iterable[Row], file: BinaryIO, features: bool) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    if features:
        schema = pa.schema([("path", pa.string()), ("features", pa.list_(pa.float32()))])
    else:
        schema = pa.schema(
            [
                ("path", pa.string()),
                ("classes", pa.list_(pa.int32())),
                ("labels", pa.list_(pa.string())),
                ("probabilities", pa.list_(pa.float32())),
            ]
        )
    rows = iter(rows)
    with parquet.ParquetWriter(file, schema) as table:
        while group := list(itertools.islice(rows, ROW_GROUP)):
            columns = [pa.array([getattr(row, field.name) for row in group], field.type) for field in schema]
            table.write_table(pa.Table.from_arrays(columns, schema=schema))


WRITERS = {".csv": _csv, ".json": _json, ".jsonl": _jsonl, ".parquet": _parquet}
