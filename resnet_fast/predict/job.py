"""One rank's work from its arguments to its results: to the terminal, or through a record to a table."""

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
    """Network, preset and share of the files; with the same ``settings`` a record can be gone on with."""

    def __init__(self, args: argparse.Namespace, ranks: Ranks) -> None:
        self.args, self.ranks = args, ranks
        device = device_or_error(args.device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", ranks.local_rank)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # pinned memory and events belong to the current device
        source = weights.load(args.model, args.weights, args.random_weights)
        self.labels = weights.read_labels(args.labels) if args.labels else source.categories
        classes = source.model.fc.out_features
        if self.labels is not None and len(self.labels) != classes:
            raise ValueError(f"--labels {args.labels}: got {len(self.labels)} names, expected {classes}, one a class")
        if args.top is not None and args.top > classes:
            raise ValueError(
                f"--top: got {args.top}, expected at most {classes}: {args.model} with these weights has no more classes"
            )
        size = args.size or source.crop
        self.preset = Preset(
            resize=round(source.resize * size / source.crop),
            crop=size,
            fast=args.fast_decode,
            max_pixels=args.max_pixels or MAX_PIXELS,
        )
        self.batch = args.batch or (128 if device.type == "cuda" else 16)
        self.workers = args.workers or _workers(device, ranks)
        top = None if args.features else args.top or min(5, classes)
        answer = "features" if args.features else f"top {top}"
        self.settings = {
            "model": args.model,
            "weights": source.digest(),
            "dtype": args.dtype,
            "size": size,
            "resize": self.preset.resize,
            "fast decode": args.fast_decode,
            "answer": answer,
            "inputs": _summary(args.inputs),
            "rank": ranks.rank,
            "ranks": ranks.world,
        }
        if args.features:
            source.model.fc = nn.Identity()
        self.network = Network(source.model, source.mean, source.std, device=device, dtype=DTYPES[args.dtype], top=top)

    def files(self) -> Iterator[Item]:
        """This rank's share, in order: every ``world``-th file. At its end ``found`` is the digest of all names."""
        names = hashlib.sha256()
        for item in walk(self.args.inputs):
            names.update(os.fsencode(item.name) + b"\0")
            if item.index % self.ranks.world == self.ranks.rank:
                yield item
        self.found = names.hexdigest()

    def count(self) -> int:
        """How many files this rank's share has."""
        found = sum(1 for _ in walk(self.args.inputs))
        return len(range(self.ranks.rank, found, self.ranks.world))

    def run(self, items: Iterator[Item], sink: Sink, progress: Progress) -> bool:
        """Answer for the items; False if stopped on the way."""
        with Loader(items, self.preset, self.batch, self.workers) as loader:
            finished = run(loader, self.network, sink, progress)
        progress.say(progress.close())
        return finished


def _workers(device: torch.device, ranks: Ranks) -> int:
    """All cores on CUDA, where decoding binds; on the CPU it shares them with the network, which takes longer."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // ranks.local_world // (1 if device.type == "cuda" else 4))


def _summary(inputs: list[str]) -> str:
    text = " ".join(inputs)
    digest = hashlib.sha256(os.fsencode(text)).hexdigest()
    return text if len(text) <= 200 else f"{len(inputs)} arguments, SHA-256 {digest}"


# ---------------------------------------------------------------- to the terminal


class _Terminal:
    """A line for each file: its most probable classes."""

    def __init__(self, labels: list[str] | None) -> None:
        self._labels = labels

    def write(self, items: Iterable[Item], rows: Iterable[dict]) -> None:
        for item, row in zip(items, rows, strict=True):
            if "error" not in row:
                names = [self._labels[c] if self._labels else f"class {c}" for c in row["class"]]
                answers = ", ".join(f"{name} {p:.3f}" for name, p in zip(names, row["p"], strict=True))
                # A name may hold a newline, or what a terminal obeys.
                name = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in output.printable(item.name))
                print(f"{name}: {answers}", flush=True)


def to_terminal(job: Job) -> int:
    """Print results; the exit code."""
    progress = Progress(0, 0, job.count)
    if not job.run(job.files(), _Terminal(job.labels), progress):
        return INTERRUPTED
    return 1 if progress.failed else 0


# ---------------------------------------------------------------- to a table


def to_file(job: Job, out: Path) -> int:
    """Fill this rank's record, going on with what there is; rank 0 then makes the table of all. The exit code."""
    with Journal(job.ranks.part(out), job.settings) as record:
        todo = record.resume(job.files(), job.batch)
        progress = Progress(record.kept, record.failed, job.count)
        if record.kept:
            progress.say(f"going on after {record.kept} files")
        if not job.run(todo, record, progress):
            progress.say(f"stopped after {progress.done} files; the same command goes on")
            return INTERRUPTED
        record.finish(progress.done, job.found)
        if job.ranks.rank != 0:
            return 0  # even with failures: torchrun would kill rank 0, which is to merge them and tell
        parts = job.ranks.parts(out)
        _wait(parts)
        failed = output.write(journal.merged(parts), out, job.labels, job.args.features)
        for part in parts:
            part.unlink()
    if failed:
        print(f"{counted(failed, 'file')} failed: {output.failures_path(out)}", file=sys.stderr)
    return 1 if failed else 0


def _wait(parts: list[Path]) -> None:
    """Until all records are complete. Only they count: ranks may run one after another, or on other machines."""
    missing = [part for part in parts if not journal.is_done(part)]
    if missing:
        print(f"waiting for {', '.join(map(str, missing))}", file=sys.stderr)
    while not all(journal.is_done(part) for part in missing):
        time.sleep(0.2)
