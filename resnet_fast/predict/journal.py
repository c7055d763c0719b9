"""The append-only record of a run: a JSON line for each file, in the walk's order; where a killed run is gone on with.

Line 1 holds the settings; then {"i", "name", and "class", "p" | "features" | "error"}; last {"done": count, "files":
digest}. Lines reach the operating system batch by batch, so a kill costs at most the batches under way; a line that it
tore, or that a power cut filled with zeros, is cut off when the record is opened again.
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
    """Begin the record at ``path`` or go on with it; close it when done (it is a context manager).

    ``kept`` and ``failed`` count what an earlier run left. Raises ValueError if the record was begun with other
    settings, is none, or is being written by another process.
    """

    def __init__(self, path: Path, settings: dict) -> None:
        self.path, self.kept, self.failed = path, 0, 0
        self._done: dict = {}  # the last line of a record that was complete, and where it begins
        self._end = 0
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
        self._file.seek(0)
        first = self._file.readline()
        header = _parse(first)
        torn = not first.endswith(b"\n") and (first.startswith(_MAGIC) or _MAGIC.startswith(first))
        if torn:
            self._file.truncate(0)  # or nothing there yet
            self._append([settings])
        elif header is None or not first.startswith(_MAGIC):
            raise ValueError(f"{self.path} is in the way: it is not a record of this program")
        elif header != settings:
            keys = [key for key in {**header, **settings} if header.get(key) != settings.get(key)]
            other = ", ".join(f"{key} {header.get(key)!r} → {settings.get(key)!r}" for key in keys)
            raise ValueError(
                f"{self.path} was begun with other settings ({other}): go on with those, or delete it to start anew"
            )

    def resume(self, items: Iterator[Item], batch: int) -> Iterator[Item]:
        """The items still to be done; what the record holds from there on is cut off.

        Records count while their names are the walk's, in whole batches: the rest then falls into the batches of an
        uninterrupted run and gives the same bits.
        """
        self._file.seek(0)
        keep = position = len(self._file.readline())
        pending: list[Item] = []  # recorded, but not yet a whole batch
        failed = 0
        for line in itertools.chain(self._file, [b""]):
            position += len(line)
            record = _parse(line) or {}
            item = next(items, None)
            if item is None:
                if not line or record.get("done") == self.kept + len(pending):
                    self._end, self._done = position - len(line), record
                    self.kept, self.failed = self.kept + len(pending), self.failed + failed
                    return iter(())
                break
            pending.append(item)
            if (record.get("i"), record.get("name")) != (item.index, item.name):
                break
            failed += "error" in record
            if len(pending) == batch:
                keep, self.kept, self.failed = position, self.kept + batch, self.failed + failed
                pending, failed = [], 0
        self._file.truncate(keep)
        return itertools.chain(pending, items)

    def write(self, items: Iterable[Item], rows: Iterable[dict]) -> None:
        """Append one row for each item."""
        self._append({"i": item.index, "name": item.name, **row} for item, row in zip(items, rows, strict=True))

    def finish(self, count: int, files: str) -> None:
        """Say that all ``count`` files are recorded, kept ones included, and bring everything to the disk.

        ``files`` is a digest of what the walk found, all ranks' shares: records of different walks do not fit together.
        """
        last = {"done": count, "files": files}
        if self._done != last:
            if self._done:
                self._file.truncate(self._end)
            self._append([last])
        os.fsync(self._file.fileno())

    def _append(self, records: Iterable[dict]) -> None:
        self._file.write(b"".join(json.dumps(record).encode() + b"\n" for record in records))
        self._file.flush()


def is_done(path: Path) -> bool:
    """Whether the record at ``path`` exists and is complete."""
    return "done" in _last(path)


def _last(path: Path) -> dict:
    """The last line, if it is there, whole and as short as that of a complete record."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.path.getsize(path) - 256))
            lines = file.read().splitlines(keepends=True)
    except FileNotFoundError:
        return {}
    return _parse(lines[-1]) or {} if lines else {}


def merged(paths: list[Path]) -> Iterator[dict]:
    """The records of all ranks in the walk's order: file i is the record of rank i mod len(paths).

    Raises ValueError if the ranks did not see the same files.
    """
    if len({_last(path)["files"] for path in paths}) > 1:
        raise ValueError(
            f"{', '.join(map(str, paths))} do not fit together: the files changed between their walks; "
            "run all ranks again"
        )
    streams = itertools.cycle([_records(path) for path in paths])
    return itertools.takewhile(lambda record: record is not None, (next(stream, None) for stream in streams))


def _records(path: Path) -> Iterator[dict]:
    with open(path, "rb") as file:
        next(file)
        for line in file:
            record = json.loads(line)
            if "done" in record:
                return
            yield record


def _parse(line: bytes) -> dict | None:
    """The line's object; None if it is torn."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
