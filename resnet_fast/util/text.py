"""What the commands share: tables that fit a terminal, and the options that mean the same everywhere."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Sequence


def table(
    header: Sequence[str], rows: Iterable[Sequence[object]], *, right: Iterable[int] = (), width: int | None = None
) -> str:
    """Columns aligned, the last one cut to the terminal's width; ``right`` are the columns of numbers."""
    cells = [list(map(str, row)) for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    right = set(right)
    limit = width or shutil.get_terminal_size((120, 40)).columns

    def line(row: Sequence[str]) -> str:
        text = "  ".join(
            cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        return text if len(text) <= limit else text[: limit - 1] + "…"

    rule = "  ".join("-" * w for w in widths)[:limit]
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])


def wrapped(text: str, bullet: str = "  - ") -> str:
    """Prose as wide as the terminal; what a compiler said keeps its lines."""
    if "\n" in text:
        return bullet + text
    return textwrap.fill(
        text, shutil.get_terminal_size((120, 40)).columns, initial_indent=bullet, subsequent_indent=" " * len(bullet)
    )


def counted(count: object, noun: str) -> str:
    """As "1 thread" and "2 threads"."""
    return f"{count} {noun}" if str(count) == "1" else f"{count} {noun}s"
