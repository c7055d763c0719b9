"""Decoded batches in the files' order, from worker processes through shared memory, with bounded look-ahead.

A ring of a few batches in shared memory; the n-th file of a batch is decoded into its n-th row, so nothing is collated.
A thread hands out one file at a time and collects. A worker that dies (a codec's segmentation fault, the kernel's
out-of-memory killer) is replaced; if a second one dies on the same file, that file has failed.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from queue import SimpleQueue
from typing import NamedTuple

import torch
from torch import Tensor

from . import decode
from .files import Item

DEPTH = 3  # batches in the ring: one at the device, one ready, one being filled
AHEAD = 2  # files given to a worker at a time, so that it need not wait for the next


class Batch(NamedTuple):
    """``pixels``, uint8 [n, crop, crop, 3], is valid until the next batch is asked for; a failed row holds anything."""

    items: list[Item]
    errors: list[str | None]
    pixels: Tensor


@dataclass
class _Filling:
    """A batch on its way: its place in the ring, and how many of its rows are still with the workers."""

    place: int
    items: list[Item] = field(default_factory=list)
    errors: list[str | None] = field(default_factory=list)
    left: int = 0
    full: bool = False


@dataclass
class _Task:
    filling: _Filling
    row: int
    deaths: int = 0


@dataclass(eq=False)
class _Worker:
    process: subprocess.Popen
    connection: Connection
    tasks: deque[_Task] = field(default_factory=deque)
    ready: bool = False


class Loader:
    """Iterate over it for :class:`Batch` es; close it when done (it is a context manager).

    Raises RuntimeError if a worker cannot start; what ``items`` raises is raised here.
    """

    def __init__(self, items: Iterable[Item], preset: decode.Preset, batch: int, workers: int) -> None:
        self._items = iter(items)
        self._preset = preset
        self._batch = batch
        descriptor = _shared_memory(DEPTH * batch * 3 * preset.crop**2)
        self._descriptor = descriptor
        ring = torch.frombuffer(mmap.mmap(descriptor, 0), dtype=torch.uint8)
        self._ring = ring.view(DEPTH, batch, preset.crop, preset.crop, 3)
        self._free = deque(range(DEPTH))
        self._open: deque[_Filling] = deque()
        self._again: deque[_Task] = deque()
        self._ended = False
        self._out: SimpleQueue[_Filling | BaseException | None] = SimpleQueue()
        self._bell, self._ring_bell = Pipe(duplex=False)
        self._workers = [self._start() for _ in range(workers)]
        self._thread = threading.Thread(target=self._run, name="resnet_fast.predict.loader", daemon=True)
        self._thread.start()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Batch]:
        while (ready := self._out.get()) is not None:
            if isinstance(ready, BaseException):
                raise ready
            yield Batch(ready.items, ready.errors, self._ring[ready.place, : len(ready.items)])
            self._free.append(ready.place)
            self._ring_bell.send_bytes(b"free")

    def close(self) -> None:
        """End the thread and the workers; what they were decoding is dropped."""
        self._ring_bell.send_bytes(b"stop")
        self._thread.join()
        for worker in self._workers:
            worker.process.kill()
            worker.process.wait()
            worker.connection.close()
        self._bell.close()
        self._ring_bell.close()
        os.close(self._descriptor)

    # ------------------------------------------------------------ the thread

    def _run(self) -> None:
        try:
            while True:
                self._feed()
                while self._open and self._open[0].full and not self._open[0].left:
                    self._out.put(self._open.popleft())
                if self._ended and not self._open:
                    self._out.put(None)
                    return
                if not self._collect():
                    return
        except BaseException as error:  # it belongs to whoever iterates
            self._out.put(error)

    def _feed(self) -> None:
        """Give work to every worker that has room, the least busy first."""
        for room in range(AHEAD):
            for worker in [w for w in self._workers if len(w.tasks) <= room]:
                task = self._again.popleft() if self._again else self._next()
                if task is None:
                    return
                slot = task.filling.place * self._batch + task.row
                try:
                    worker.connection.send((slot, task.filling.items[task.row].path))
                except (BrokenPipeError, ConnectionResetError):
                    self._again.append(task)
                    self._bury(worker)
                else:
                    worker.tasks.append(task)

    def _next(self) -> _Task | None:
        """The next file that is to be decoded, with its place in a batch; None if there is none or the ring is full."""
        while not self._ended:
            filling = self._open[-1] if self._open and not self._open[-1].full else None
            if filling is None:
                if not self._free:
                    return None
                filling = _Filling(self._free.popleft())
                self._open.append(filling)
            item = next(self._items, None)
            if item is None:
                self._ended = filling.full = True
                if not filling.items:
                    self._open.remove(filling)
                return None
            filling.items.append(item)
            filling.errors.append(item.error)
            filling.full = len(filling.items) == self._batch
            if item.error is None:
                filling.left += 1
                return _Task(filling, len(filling.items) - 1)
        return None

    def _collect(self) -> bool:
        """Wait for an answer, a death or the bell; False when the bell says stop."""
        for source in wait([self._bell, *(w.connection for w in self._workers)]):
            if source is self._bell:
                if self._bell.recv_bytes() == b"stop":
                    return False
                continue
            worker = next(w for w in self._workers if w.connection is source)
            try:
                answer = source.recv()
            except (EOFError, ConnectionResetError):
                self._bury(worker)
                continue
            if answer == "ready":
                worker.ready = True
                continue
            task = worker.tasks.popleft()
            task.filling.errors[task.row] = answer[1]
            task.filling.left -= 1
        return True

    def _bury(self, worker: _Worker) -> None:
        """Replace a dead worker; the file that it was decoding gets a second chance, then the blame."""
        status = worker.process.wait()
        worker.connection.close()
        if not worker.ready:
            raise RuntimeError(f"a decoding process did not start (code {status}); what it said is above")
        if worker.tasks:
            worker.tasks[0].deaths += 1
            if worker.tasks[0].deaths == 2:
                task = worker.tasks.popleft()
                how = f"signal {signal.Signals(-status).name}" if status < 0 else f"code {status}"
                task.filling.errors[task.row] = f"decoding it ended the process ({how}) twice"
                task.filling.left -= 1
        self._again.extend(worker.tasks)
        self._workers[self._workers.index(worker)] = self._start()

    def _start(self) -> _Worker:
        mine, its = Pipe()
        descriptors = its.fileno(), self._descriptor
        # A session of its own: Ctrl-C reaches the parent only. A safe path: this folder must not shadow other modules.
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", decode.__file__, *map(str, descriptors), json.dumps(asdict(self._preset))],
            pass_fds=descriptors,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "PYTHONSAFEPATH": "1"},
        )
        its.close()
        return _Worker(process, mine)


def _shared_memory(size: int) -> int:
    """A descriptor of that many bytes, shared and unnamed; a container's small /dev/shm does not limit it."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("resnet_fast")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor
