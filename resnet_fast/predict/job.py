"""One rank's job: from its arguments to results on the terminal, or through a record to a table."""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import nn

from ..data.decode import MAX_PIXELS, Preset
from ..data.files import Item, walk
from ..data.loader import Loader
from ..util.machine import DTYPES, device_or_error
from ..util.text import counted
from . import journal, output, weights
from .journal import Journal
from .network import Network
from .progress import Progress
from .ranks import Ranks
from .run import Sink, run

INTERRUPTED = 130  # the shell's exit code for Ctrl-C


class Job:
    """One rank's work: its network, preset and share of the files.

    A record can be continued by a job with equal ``settings``. ``files_digest`` is set when ``files`` is exhausted.
    """

    def __init__(self, args: argparse.Namespace, ranks: Ranks) -> None:
        self.args = args
        self.ranks = ranks
        self.files_digest = ""
        device = _device(args.device, ranks)
        source = weights.load(args.model, args.weights, args.random_weights)
        self.labels = weights.read_labels(args.labels) if args.labels else source.categories
        classes = source.classes
        _check_classes(args, self.labels, classes)
        self.preset = _preset(args, source)
        self.batch = args.batch or (128 if device.type == "cuda" else 16)
        self.workers = args.workers or _default_workers(device, ranks)
        top = None if args.features else args.top or min(5, classes)
        self.settings = {
            "model": args.model,
            "weights": source.digest(),
            "dtype": args.dtype,
            "size": self.preset.crop,
            "resize": self.preset.resize,
            "fast decode": args.fast_decode,
            "answer": "features" if args.features else f"top {top}",
            "inputs": _summary(args.inputs),
            "rank": ranks.rank,
            "ranks": ranks.world,
        }
        if args.features:
            source.model.fc = nn.Identity()
        dtype = DTYPES[args.dtype]
        self.network = Network(
            source.model, source.mean, source.std, device=device, dtype=dtype, top=top
        )

    def files(self) -> Iterator[Item]:
        """Yield this rank's share in order, every ``world``-th file; at the end set ``files_digest`` (of all names)."""
        digest = hashlib.sha256()
        for item in walk(self.args.inputs):
            name = os.fsencode(item.name)
            digest.update(name + b"\0")
            rank = item.position % self.ranks.world
            if rank == self.ranks.rank:
                yield item
        self.files_digest = digest.hexdigest()

    def count(self) -> int:
        """Return how many files this rank's share has."""
        total = sum(1 for _ in walk(self.args.inputs))
        share = range(self.ranks.rank, total, self.ranks.world)
        return len(share)

    def run(self, items: Iterator[Item], sink: Sink, progress: Progress) -> bool:
        """Predict for the items and write the rows to the sink; return False if stopped before the end."""
        with Loader(items, self.preset, self.batch, self.workers) as loader:
            finished = run(loader, self.network, sink, progress)
        progress.say(progress.close())
        return finished


def _device(name: str, ranks: Ranks) -> torch.device:
    device = device_or_error(name)
    if device.type != "cuda":
        return device
    if device.index is None:
        device = torch.device("cuda", ranks.local_rank)
    torch.cuda.set_device(device)  # pinned memory and events belong to the current device
    return device


def _check_classes(args: argparse.Namespace, labels: list[str] | None, classes: int) -> None:
    """Raise ValueError for labels of another number of classes, and for more top classes than there are."""
    if labels is not None and len(labels) != classes:
        raise ValueError(
            f"--labels {args.labels}: got {len(labels)} names, expected {classes}, one a class"
        )
    if args.top is not None and args.top > classes:
        raise ValueError(
            f"--top: got {args.top}, expected at most {classes}: {args.model} with these weights has no more classes"
        )


def _preset(args: argparse.Namespace, source: weights.Weights) -> Preset:
    """Return the weights' preset, scaled to another image size if one is given."""
    size = args.size or source.crop
    return Preset(
        resize=round(source.resize * size / source.crop),
        crop=size,
        fast=args.fast_decode,
        max_pixels=args.max_pixels or MAX_PIXELS,
    )


def _default_workers(device: torch.device, ranks: Ranks) -> int:
    """Return this rank's cores on CUDA, where decoding is the bottleneck; on a CPU a quarter, since the network is."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    share = cores // ranks.local_world
    if device.type != "cuda":
        share //= 4
    return max(1, share)


def _summary(inputs: list[str]) -> str:
    """Return the arguments as text, or their digest if that is long."""
    text = " ".join(inputs)
    if len(text) <= 200:
        return text
    digest = hashlib.sha256()
    digest.update(os.fsencode(text))
    return f"{len(inputs)} arguments, SHA-256 {digest.hexdigest()}"


# ---------------------------------------------------------------- to the terminal


class _Terminal:
    """A sink that prints a line for each file: its most probable classes."""

    def __init__(self, labels: list[str] | None) -> None:
        self._labels = labels

    def write(self, items: Iterable[Item], rows: Iterable[dict]) -> None:
        for item, row in zip(items, rows, strict=True):
            if "error" not in row:
                print(f"{_one_line(item.name)}: {self._answer(row)}", flush=True)

    def _answer(self, row: dict) -> str:
        """Return "label probability, …"."""
        answers = []
        for index, p in zip(row["class"], row["p"], strict=True):
            label = self._labels[index] if self._labels else f"class {index}"
            answers.append(f"{label} {p:.3f}")
        return ", ".join(answers)


def _one_line(name: str) -> str:
    """Return a file name with newlines and terminal control characters escaped."""
    characters = output.printable(name)
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in characters)


def to_terminal(job: Job) -> int:
    """Print the results; return the exit code."""
    progress = Progress(0, 0, job.count)
    finished = job.run(job.files(), _Terminal(job.labels), progress)
    if not finished:
        return INTERRUPTED
    return 1 if progress.failed else 0


# ---------------------------------------------------------------- to a table


def to_file(job: Job, out: Path) -> int:
    """Complete this rank's record, resuming an earlier one; rank 0 then writes the table. Return the exit code."""
    with Journal(job.ranks.part(out), job.settings) as record:
        todo = record.resume(job.files(), job.batch)
        progress = Progress(record.recorded, record.failed, job.count)
        if record.recorded:
            progress.say(f"going on after {record.recorded} files")
        if not job.run(todo, record, progress):
            progress.say(f"stopped after {progress.done} files; the same command goes on")
            return INTERRUPTED
        record.finish(progress.done, job.files_digest)
        if job.ranks.rank != 0:
            return (
                0  # even with failures: torchrun would kill rank 0, which merges and reports them
            )
        failed = _merge(job, out)
    if failed:
        print(f"{counted(failed, 'file')} failed: {output.failures_path(out)}", file=sys.stderr)
    return 1 if failed else 0


def _merge(job: Job, out: Path) -> int:
    """Wait for all ranks' records, write the table from them and delete them; return how many files failed."""
    parts = job.ranks.parts(out)
    _wait(parts)
    failed = output.write(journal.merged(parts), out, job.labels, job.args.features)
    for part in parts:
        part.unlink()
    return failed


def _wait(parts: list[Path]) -> None:
    """Wait until all records are complete, whether the ranks run together, one after another or on other machines."""
    missing = [part for part in parts if not journal.is_done(part)]
    if missing:
        print(f"waiting for {', '.join(map(str, missing))}", file=sys.stderr)
    while not all(journal.is_done(part) for part in missing):
        time.sleep(0.2)
