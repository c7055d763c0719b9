"""Output: the table of results in the format of the file's suffix, written from the record and moved into place.

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
from typing import BinaryIO, NamedTuple, TextIO

ROW_GROUP = 4096  # rows of a Parquet file buffered in memory


class Row(NamedTuple):
    """One file's result: its classes, labels and probabilities, best first, or its features."""

    path: str
    classes: list[int]
    labels: list[str | None]
    probabilities: list[float]
    features: array


def writer(out: Path) -> Callable[[Iterable[Row], BinaryIO, bool], None]:
    """Return the writer for the suffix of ``out``; raises ValueError for an unknown suffix or a missing package."""
    suffix = out.suffix.lower()
    if suffix not in WRITERS:
        raise ValueError(
            f"--out {out}: got suffix {suffix!r}, expected one of {', '.join(WRITERS)}"
        )
    if suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ValueError(
            f"--out {out}: Parquet is written by pyarrow: pip install pyarrow, or choose .csv or .jsonl"
        )
    return WRITERS[suffix]


def write(records: Iterable[dict], out: Path, labels: list[str] | None, features: bool) -> int:
    """Write all records and return how many failed; ``labels`` are the names of the classes, if known."""
    partial = out.with_name(f"{out.name}.tmp")
    failures = _Failures(failures_path(out))
    write_rows = writer(out)
    with open(partial, "wb") as file:
        write_rows(_rows(records, labels, failures), file, features)
        file.flush()
        os.fsync(file.fileno())
    failures.close()
    os.replace(partial, out)
    return failures.count


def failures_path(out: Path) -> Path:
    """Return the path of the CSV file with names and errors of failed files."""
    return out.with_name(f"{out.name}.failed.csv")


class _Failures:
    """A CSV file that exists only if a file failed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None
        self.count = 0
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
    """Yield the rows of the files that succeeded; add the others to ``failures``."""
    for record in records:
        path = printable(record["name"])
        if "error" in record:
            failures.add(path, record["error"])
        elif "features" in record:
            features = array("f", b64decode(record["features"]))
            yield Row(path, [], [], [], features)
        else:
            classes = record["class"]
            names = [labels[index] if labels is not None else None for index in classes]
            yield Row(path, classes, names, record["p"], array("f"))


def printable(name: str) -> str:
    """Return a file name as valid UTF-8, in every format alike: other bytes become \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


# ---------------------------------------------------------------- CSV


def _csv(rows: Iterable[Row], file: BinaryIO, features: bool) -> None:
    text = io.TextIOWrapper(file, "utf-8", newline="")
    table = csv.writer(text, lineterminator="\n")
    header = None
    for row in rows:
        if header is None:
            header = _csv_header(row, features)
            table.writerow(header)
        table.writerow([row.path, *_csv_cells(row, features)])
    if header is None:
        table.writerow(["path"])
    text.detach()


def _csv_header(row: Row, features: bool) -> list[str]:
    header = ["path"]
    if features:
        header += [f"f{i}" for i in range(len(row.features))]
        return header
    for i in range(1, len(row.classes) + 1):
        header.append(f"class_{i}")
        header.append(f"label_{i}")
        header.append(f"probability_{i}")
    return header


def _csv_cells(row: Row, features: bool) -> Iterable:
    if features:
        return (f"{value:.9g}" for value in row.features)
    return itertools.chain.from_iterable(
        zip(row.classes, row.labels, row.probabilities, strict=True)
    )


# ---------------------------------------------------------------- JSON and JSON Lines


def _json_lines(rows: Iterable[Row], features: bool) -> Iterator[bytes]:
    for row in rows:
        if features:
            record = {
                "path": row.path,
                "features": [float(f"{value:.9g}") for value in row.features],
            }
        else:
            record = {"path": row.path, "top": _top(row)}
        yield json.dumps(record, ensure_ascii=False).encode()


def _top(row: Row) -> list[dict]:
    """Return an object for each of the top classes."""
    return [
        {"class": index, "label": label, "probability": p}
        for index, label, p in zip(row.classes, row.labels, row.probabilities, strict=True)
    ]


def _jsonl(rows: Iterable[Row], file: BinaryIO, features: bool) -> None:
    for line in _json_lines(rows, features):
        file.write(line + b"\n")


def _json(rows: Iterable[Row], file: BinaryIO, features: bool) -> None:
    separator = b"[\n"
    for line in _json_lines(rows, features):
        file.write(separator + line)
        separator = b",\n"
    is_empty = separator == b"[\n"
    if is_empty:
        file.write(b"[]\n")
    else:
        file.write(b"\n]\n")


# ---------------------------------------------------------------- Parquet


def _parquet(rows: Iterable[Row], file: BinaryIO, features: bool) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    columns = [("path", pa.string())]
    if features:
        columns.append(("features", pa.list_(pa.float32())))
    else:
        columns.append(("classes", pa.list_(pa.int32())))
        columns.append(("labels", pa.list_(pa.string())))
        columns.append(("probabilities", pa.list_(pa.float32())))
    schema = pa.schema(columns)
    rows = iter(rows)
    with parquet.ParquetWriter(file, schema) as table:
        while group := list(itertools.islice(rows, ROW_GROUP)):
            arrays = []
            for name, kind in columns:
                values = [getattr(row, name) for row in group]
                arrays.append(pa.array(values, kind))
            table.write_table(pa.Table.from_arrays(arrays, schema=schema))


WRITERS = {".csv": _csv, ".json": _json, ".jsonl": _jsonl, ".parquet": _parquet}
