"""Text for a terminal: aligned tables, wrapped prose, counted nouns."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Row = TypeVar("Row")


def table(
    header: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    right: Iterable[int] = (),
    width: int | None = None,
) -> str:
    """Return columns aligned, the last one cut to the terminal's width; ``right`` are the columns of numbers."""
    cells = [list(map(str, row)) for row in (header, *rows)]
    columns = zip(*cells, strict=True)
    widths = [max(map(len, column)) for column in columns]
    right = set(right)
    limit = width or _terminal_columns()

    def aligned(row: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        line = "  ".join(padded).rstrip()
        return line if len(line) <= limit else f"{line[: limit - 1]}…"

    first, *rest = [aligned(row) for row in cells]
    rule = "  ".join("-" * width for width in widths)[:limit]
    return "\n".join([first, rule, *rest])


@dataclass(frozen=True)
class Column(Generic[Row]):
    """A table's column: its header and its value of a row; an ``optional`` one is shown if any row has a value."""

    header: str
    value: Callable[[Row], str]
    optional: bool = False


def column_table(columns: Iterable[Column[Row]], rows: Sequence[Row]) -> str:
    """Return a table with a first column of names and other columns of numbers."""
    header, cells = [], []
    for column in columns:
        values = [column.value(row) for row in rows]
        if any(values) or not column.optional:
            header.append(column.header)
            cells.append(values)
    return table(header, zip(*cells, strict=True), right=range(1, len(header)))


def wrapped(text: str, bullet: str = "  - ") -> str:
    """Return prose as wide as the terminal; text of several lines, as a compiler's message, keeps its lines."""
    if "\n" in text:
        return bullet + text
    return textwrap.fill(
        text, _terminal_columns(), initial_indent=bullet, subsequent_indent=" " * len(bullet)
    )


def _terminal_columns() -> int:
    return shutil.get_terminal_size((120, 40)).columns


def counted(count: object, noun: str) -> str:
    """Return as "1 thread" or "2 threads"."""
    return f"{count} {noun}" if str(count) == "1" else f"{count} {noun}s"
