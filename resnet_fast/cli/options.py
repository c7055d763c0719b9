"""Options that mean the same in every command, and types of options."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

from ..util.machine import DTYPES, default_device


def add_problem_options(parser: argparse.ArgumentParser, *, batch: int = 1) -> None:
    """--batch, --size, --dtype, --device."""
    parser.add_argument(
        "--batch", type=positive, default=batch, help="images in a batch (default %(default)s)"
    )
    parser.add_argument(
        "--size",
        type=positive,
        default=224,
        help="height and width in pixels (default %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="of weights and activations (default %(default)s)",
    )
    parser.add_argument(
        "--device", default=default_device(), help="cpu or cuda (default here: %(default)s)"
    )


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


def writable_file(text: str) -> Path:
    """A file that is written at the end of a long run, as an argparse type: refuses now what would fail then."""
    path = Path(text)
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"got {text}, a folder, expected a file")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"got {text}, but {folder} cannot be written into")
    return path
