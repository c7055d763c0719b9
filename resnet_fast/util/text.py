"""What the commands share: tables that fit a terminal, and the options that mean the same everywhere."""

from __future__ import annotations

import argparse
import math
import os
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


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


def add_problem_options(parser: argparse.ArgumentParser, *, batch: int = 1) -> None:
    """--batch, --size, --dtype, --device."""
    parser.add_argument("--batch", type=positive, default=batch, help="images in a batch (default %(default)s)")
    parser.add_argument("--size", type=positive, default=224, help="height and width in pixels (default %(default)s)")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of weights and activations (default %(default)s)"
    )
    parser.add_argument("--device", default=default_device(), help="cpu or cuda (default here: %(default)s)")


def positive(text: str) -> int:
    """A whole number above 0, as an argparse type."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected a whole number above 0")
    return int(text)


def seconds(text: str) -> float:
    """A time above 0, as an argparse type."""
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < math.inf:
        raise argparse.ArgumentTypeError(f"got {text}, expected seconds above 0")
    return found


def target(text: str) -> Path:
    """A file to be written at the end of a long run, as an argparse type: what would be refused then is refused now."""
    path = Path(text)
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"got {text}, a folder, expected a file")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"got {text}, but {folder} cannot be written into")
    return path


def default_device() -> str:
    """cuda where there is one, else cpu; asks the driver only, so it starts no CUDA context."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_or_error(name: str) -> torch.device:
    """The device, or ValueError with what to do when this machine has none of it."""
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"--device: got {name}, expected cpu or cuda")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"--device {name}: this machine shows no CUDA device to torch {torch.__version__}; use --device cpu"
        )
    return device
