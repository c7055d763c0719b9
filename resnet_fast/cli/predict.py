"""``predict``: top-k classes or features of image files and folders, as lines or a table; sharded by torchrun."""

from __future__ import annotations

import argparse
import importlib.util
import os
from pathlib import Path

from ..predict.ranks import Ranks
from ..util.machine import DTYPES, default_device
from .options import positive

_DESCRIPTION = """\
Classes or features of image files. Folders are walked by name; hidden files and other suffixes are left out, links out
of the folder are refused. With --out a killed run goes on where it was when the same command is given again; without,
results go to the terminal. Damaged files are reported and skipped, and the exit code is 1. Under torchrun each rank
takes every n-th file; rank 0 waits for the others' records (OUT.part-…, on a file system that they share) and merges
them in order."""


def add_parser(commands) -> None:
    """Add the command and its options."""
    p = commands.add_parser(
        "predict", help="classes or features of image files", description=_DESCRIPTION
    )
    p.add_argument("inputs", nargs="+", metavar="FILE|DIR", help="images, and folders of images")
    p.add_argument(
        "--out", type=Path, metavar="OUT", help="table to write: .csv, .json, .jsonl or .parquet"
    )
    p.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    answer = p.add_mutually_exclusive_group()
    answer.add_argument(
        "--top",
        type=positive,
        metavar="K",
        help="the K most probable classes (default 5, or as many as there are)",
    )
    answer.add_argument(
        "--features", action="store_true", help="the pooled features before the classifier instead"
    )
    p.add_argument(
        "--model", default="resnet50", help="one that `list` shows (default %(default)s)"
    )
    weights = p.add_mutually_exclusive_group()
    weights.add_argument(
        "--weights",
        metavar="NAME|FILE",
        help="torchvision's name, or a checkpoint (default: torchvision's DEFAULT)",
    )
    weights.add_argument(
        "--random-weights", action="store_true", help="for trials: the answers mean nothing"
    )
    p.add_argument(
        "--labels",
        metavar="FILE",
        help="names of the classes: one a line, or JSON (default: those of torchvision's weights)",
    )
    p.add_argument(
        "--batch", type=positive, help="images in a batch (default: 128 on cuda, 16 on cpu)"
    )
    p.add_argument(
        "--size",
        type=positive,
        help="height and width in pixels (default: the weights' own, else 224)",
    )
    p.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="of weights and activations (%(default)s)",
    )
    p.add_argument(
        "--device", default=default_device(), help="cpu or cuda (default here: %(default)s)"
    )
    p.add_argument(
        "--workers", type=positive, help="decoding processes (default: all cores; on cpu a quarter)"
    )
    p.add_argument(
        "--fast-decode",
        action="store_true",
        help="decode JPEGs scaled down, resize the crop only: pixels differ a little from torchvision's",
    )
    p.add_argument(
        "--max-pixels",
        type=positive,
        metavar="N",
        help="refuse larger images (default: 178956970, as Pillow)",
    )
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    if importlib.util.find_spec("PIL") is None:
        raise ImportError("images are decoded by Pillow: pip install pillow")
    if os.name != "posix":
        raise ValueError(
            "predict needs Linux or macOS: its workers share memory by file descriptor"
        )
    from ..data.files import SUFFIXES, walk
    from ..predict.job import Job, to_file, to_terminal

    ranks = Ranks.from_environment()
    if next(walk(args.inputs), None) is None:
        raise ValueError(
            f"no images in {' '.join(args.inputs)} (suffixes: {' '.join(sorted(SUFFIXES))})"
        )
    _check_output(args, ranks)
    job = Job(args, ranks)
    if args.out is None:
        return to_terminal(job)
    return to_file(job, args.out)


def _check_output(args: argparse.Namespace, ranks: Ranks) -> None:
    """Raise ValueError for an output that would fail only after all the work."""
    from ..predict.output import writer

    if args.out is None:
        if args.features or ranks.world > 1:
            cause = "--features" if args.features else "torchrun"
            raise ValueError(f"{cause} needs --out OUT.csv, .json, .jsonl or .parquet")
        return
    writer(args.out)
    can_resume = ranks.part(args.out).exists()
    if args.out.exists() and not args.overwrite and not can_resume:
        raise ValueError(f"--out {args.out} exists; --overwrite replaces it")
    others = set(ranks.leftovers(args.out)) - set(ranks.parts(args.out))
    if others:
        raise ValueError(
            f"{min(others)} was left by another number of ranks: go on with that number, or delete it"
        )
