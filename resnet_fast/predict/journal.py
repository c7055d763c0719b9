"""The append-only record of a run: a JSON line for each file, in the walk's order, from which a killed run resumes.

Line 1 holds the settings; then {"i", "name", and "class", "p" | "features" | "error"}; last {"done": count, "files":
digest}. Lines are flushed to the operating system batch by batch, so a kill loses at most the batches in progress. A
line that the kill tore, or that a power cut filled with zeros, is cut off when the record is opened again.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..data.files import Item

_MAGIC = b'{"resnet_fast": "predict"'


class Journal:
    """Create the record at ``path`` or continue it; a context manager that closes the file.

    ``recorded`` and ``failed`` count the files of an earlier run. Raises ValueError if the record was begun with other
    settings, the file is not a record, or another process is writing it.
    """

    def __init__(self, path: Path, settings: dict) -> None:
        self.path = path
        self.recorded = 0
        self.failed = 0
        self._last_line: dict = {}  # of a record that was complete
        self._last_line_start = 0
        self._file = open(path, "a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._begin({"resnet_fast": "predict", **settings})
        except BlockingIOError as error:
            self._file.close()
            raise ValueError(f"{path}: another run is writing it") from error
        except ValueError:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _begin(self, settings: dict) -> None:
        """Write the settings into a new record, or compare them with those of an existing one."""
        self._file.seek(0)
        first = self._file.readline()
        header = _parse(first)
        is_ours = first.startswith(_MAGIC)
        is_torn = not first.endswith(b"\n") and (is_ours or _MAGIC.startswith(first))
        if is_torn:  # or still empty
            self._file.truncate(0)
            self._append([settings])
            return
        if header is None or not is_ours:
            raise ValueError(f"{self.path} is in the way: it is not a record of this program")
        if header != settings:
            difference = _difference(header, settings)
            raise ValueError(
                f"{self.path} was begun with other settings ({difference}): go on with those, "
                "or delete it to start anew"
            )

    def resume(self, items: Iterator[Item], batch: int) -> Iterator[Item]:
        """Return the items still to do, and cut off the record where it no longer matches them.

        Lines count while their names are the walk's, in whole batches: the remaining files then form the same batches
        as in an uninterrupted run and give the same bits.
        """
        partial: list[Item] = []  # recorded after the last whole batch
        partial_failed = 0
        batch_end = self._settings_end()
        for record, start, end in self._lines(batch_end):
            item = next(items, None)
            if item is None:
                if record is not None and record.get("done") != self.recorded + len(partial):
                    break
                self._count(len(partial), partial_failed)
                self._last_line = record or {}
                self._last_line_start = start
                return iter(())
            partial.append(item)
            if record is None or (record.get("i"), record.get("name")) != (
                item.position,
                item.name,
            ):
                break
            partial_failed += "error" in record
            if len(partial) == batch:
                self._count(batch, partial_failed)
                partial, partial_failed = [], 0
                batch_end = end
        self._file.truncate(batch_end)
        return itertools.chain(partial, items)

    def _settings_end(self) -> int:
        self._file.seek(0)
        return len(self._file.readline())

    def _lines(self, end: int) -> Iterator[tuple[dict | None, int, int]]:
        """Yield (record, start, end) for each line from byte ``end`` on, {} for a torn one; last (None, end, end)."""
        for line in self._file:
            start = end
            end += len(line)
            record = _parse(line) or {}
            yield record, start, end
        yield None, end, end

    def _count(self, files: int, failed: int) -> None:
        self.recorded += files
        self.failed += failed

    def write(self, items: Iterable[Item], rows: Iterable[dict]) -> None:
        """Append one row for each item."""
        pairs = zip(items, rows, strict=True)
        self._append({"i": item.position, "name": item.name, **row} for item, row in pairs)

    def finish(self, count: int, files: str) -> None:
        """Mark the record complete with ``count`` files, those of earlier runs included, and sync it to disk.

        ``files`` is a digest of all names of the walk, for all ranks: records of different walks must not be merged.
        """
        last_line = {"done": count, "files": files}
        if self._last_line != last_line:
            if self._last_line:
                self._file.truncate(self._last_line_start)
            self._append([last_line])
        os.fsync(self._file.fileno())

    def _append(self, records: Iterable[dict]) -> None:
        lines = (json.dumps(record).encode() + b"\n" for record in records)
        self._file.write(b"".join(lines))
        self._file.flush()


def _difference(header: dict, settings: dict) -> str:
    """Return the settings that differ, as "size 32 → 64, …"."""
    keys = {**header, **settings}
    changed = [key for key in keys if header.get(key) != settings.get(key)]
    changes = (f"{key} {header.get(key)!r} → {settings.get(key)!r}" for key in changed)
    return ", ".join(changes)


def is_done(path: Path) -> bool:
    """Return whether the record at ``path`` exists and is complete."""
    return "done" in _last(path)


def _last(path: Path) -> dict:
    """Return the last line if it is whole and as short as a complete record's; else an empty dict."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - 256))
            lines = file.read().splitlines(keepends=True)
    except FileNotFoundError:
        return {}
    if not lines:
        return {}
    return _parse(lines[-1]) or {}


def merged(paths: list[Path]) -> Iterator[dict]:
    """Return the records of all ranks in the walk's order: file i is in the record of rank i mod len(paths).

    Raises ValueError if the ranks did not see the same files.
    """
    digests = {_last(path)["files"] for path in paths}
    if len(digests) > 1:
        raise ValueError(
            f"{', '.join(map(str, paths))} do not fit together: the files changed between their walks; "
            "run all ranks again"
        )
    ranks = itertools.cycle([_records(path) for path in paths])
    records = (next(rank, None) for rank in ranks)
    return itertools.takewhile(lambda record: record is not None, records)


def _records(path: Path) -> Iterator[dict]:
    with open(path, "rb") as file:
        next(file)
        for line in file:
            record = json.loads(line)
            if "done" in record:
                return
            yield record


def _parse(line: bytes) -> dict | None:
    """Return the line's object; None if the line is torn."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
