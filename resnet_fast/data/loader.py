"""Loader: batches of decoded images in the files' order, from worker processes through shared memory.

The look-ahead is bounded by a ring of a few batches in shared memory. A worker decodes the n-th file of a batch into
the batch's n-th row, so nothing is collated. A thread sends files to the workers one at a time and collects answers.
A worker that dies (a codec's segmentation fault, the kernel's out-of-memory killer) is replaced; a file that kills two
workers has failed.
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
AHEAD = 2  # files queued at a worker, so that it need not wait for the next one


class Batch(NamedTuple):
    """Items, their errors and their pixels.

    ``pixels``, uint8 [n, crop, crop, 3], is valid until the next batch is requested. A failed file's row is undefined.
    """

    items: list[Item]
    errors: list[str | None]
    pixels: Tensor


@dataclass
class _PendingBatch:
    """A batch being filled: its index in the ring, and how many of its rows the workers have not answered yet."""

    ring_index: int
    items: list[Item] = field(default_factory=list)
    errors: list[str | None] = field(default_factory=list)
    unanswered: int = 0
    full: bool = False


@dataclass
class _Task:
    """One file to decode into one row; ``deaths`` counts the workers that died on it."""

    batch: _PendingBatch
    row: int
    deaths: int = 0

    def finish(self, error: str | None) -> None:
        self.batch.errors[self.row] = error
        self.batch.unanswered -= 1


@dataclass(eq=False)
class _Worker:
    process: subprocess.Popen
    connection: Connection
    tasks: deque[_Task] = field(default_factory=deque)
    ready: bool = False


class Loader:
    """Iterable of :class:`Batch`; a context manager that ends the workers.

    Raises RuntimeError if a worker cannot start. Errors that ``items`` raises are raised by the iteration.
    """

    def __init__(
        self, items: Iterable[Item], preset: decode.Preset, batch: int, workers: int
    ) -> None:
        self._items = iter(items)
        self._items_ended = False
        self._preset = preset
        self._batch = batch
        size = preset.crop
        self._descriptor = _shared_memory(DEPTH * batch * 3 * size**2)
        memory = mmap.mmap(self._descriptor, 0)
        pixels = torch.frombuffer(memory, dtype=torch.uint8)
        self._ring = pixels.view(DEPTH, batch, size, size, 3)
        self._free = deque(range(DEPTH))
        self._pending: deque[_PendingBatch] = deque()
        self._retries: deque[_Task] = deque()
        self._out: SimpleQueue[_PendingBatch | BaseException | None] = SimpleQueue()
        self._wakeup_receiver, self._wakeup_sender = Pipe(duplex=False)
        self._workers = [self._start() for _ in range(workers)]
        self._thread = threading.Thread(
            target=self._run, name="resnet_fast.predict.loader", daemon=True
        )
        self._thread.start()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Batch]:
        while True:
            ready = self._out.get()
            if ready is None:
                return
            if isinstance(ready, BaseException):
                raise ready
            pixels = self._ring[ready.ring_index, : len(ready.items)]
            yield Batch(ready.items, ready.errors, pixels)
            self._free.append(ready.ring_index)
            self._wakeup_sender.send_bytes(b"free")

    def close(self) -> None:
        """End the thread and the workers; drop what they were decoding."""
        self._wakeup_sender.send_bytes(b"stop")
        self._thread.join()
        for worker in self._workers:
            worker.process.kill()
            worker.process.wait()
            worker.connection.close()
        self._wakeup_receiver.close()
        self._wakeup_sender.close()
        os.close(self._descriptor)

    # ------------------------------------------------------------ the thread

    def _run(self) -> None:
        try:
            while True:
                self._feed()
                self._put_out_complete_batches()
                if self._items_ended and not self._pending:
                    self._out.put(None)
                    return
                if not self._collect():
                    return
        except BaseException as error:  # raised again by the iteration
            self._out.put(error)

    def _put_out_complete_batches(self) -> None:
        while self._pending:
            first = self._pending[0]
            if not first.full or first.unanswered:
                return
            self._out.put(self._pending.popleft())

    def _feed(self) -> None:
        """Give a task to every worker that has room, the least busy first."""
        for queued in range(AHEAD):
            with_room = [worker for worker in self._workers if len(worker.tasks) <= queued]
            for worker in with_room:
                task = self._retries.popleft() if self._retries else self._next_task()
                if task is None:
                    return
                self._send(task, worker)

    def _send(self, task: _Task, worker: _Worker) -> None:
        slot = task.batch.ring_index * self._batch + task.row
        item = task.batch.items[task.row]
        try:
            worker.connection.send((slot, item.path))
        except (BrokenPipeError, ConnectionResetError):
            self._retries.append(task)
            self._replace(worker)
        else:
            worker.tasks.append(task)

    def _next_task(self) -> _Task | None:
        """Return the next file to decode and its row; None if there is none or the ring is full."""
        while not self._items_ended:
            batch = self._batch_to_fill()
            if batch is None:
                return None
            item = next(self._items, None)
            if item is None:
                self._items_ended = batch.full = True
                if not batch.items:
                    self._pending.remove(batch)
                return None
            batch.items.append(item)
            batch.errors.append(item.error)
            batch.full = len(batch.items) == self._batch
            if item.error is None:
                batch.unanswered += 1
                return _Task(batch, len(batch.items) - 1)
        return None

    def _batch_to_fill(self) -> _PendingBatch | None:
        """Return the last pending batch, or a new one if that is full; None if the ring has no place for it."""
        if self._pending and not self._pending[-1].full:
            return self._pending[-1]
        if not self._free:
            return None
        batch = _PendingBatch(self._free.popleft())
        self._pending.append(batch)
        return batch

    def _collect(self) -> bool:
        """Wait for an answer, a worker's death or a wake-up; return False if the wake-up says stop."""
        connections = [worker.connection for worker in self._workers]
        for source in wait([self._wakeup_receiver, *connections]):
            if source is self._wakeup_receiver:
                if self._wakeup_receiver.recv_bytes() == b"stop":
                    return False
                continue
            worker = next(worker for worker in self._workers if worker.connection is source)
            try:
                answer = worker.connection.recv()
            except (EOFError, ConnectionResetError):
                self._replace(worker)
                continue
            if answer == "ready":
                worker.ready = True
                continue
            _, error = answer
            worker.tasks.popleft().finish(error)
        return True

    def _replace(self, worker: _Worker) -> None:
        """Start a new worker for a dead one; the file that it was decoding is retried once, then it has failed."""
        status = worker.process.wait()
        worker.connection.close()
        if not worker.ready:
            raise RuntimeError(
                f"a decoding process did not start (code {status}); what it said is above"
            )
        if worker.tasks:
            suspect = worker.tasks[0]
            suspect.deaths += 1
            if suspect.deaths == 2:
                worker.tasks.popleft()
                how = f"signal {signal.Signals(-status).name}" if status < 0 else f"code {status}"
                suspect.finish(f"decoding it ended the process ({how}) twice")
        self._retries.extend(worker.tasks)
        index = self._workers.index(worker)
        self._workers[index] = self._start()

    def _start(self) -> _Worker:
        parent_end, worker_end = Pipe()
        descriptors = worker_end.fileno(), self._descriptor
        preset = json.dumps(asdict(self._preset))
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", decode.__file__, *map(str, descriptors), preset],
            pass_fds=descriptors,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C reaches only the parent
            env={
                **os.environ,
                "PYTHONSAFEPATH": "1",
            },  # files of this folder must not shadow other modules
        )
        worker_end.close()
        return _Worker(process, parent_end)


def _shared_memory(size: int) -> int:
    """Return a descriptor of ``size`` bytes of unnamed shared memory, independent of a container's small /dev/shm."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("resnet_fast")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor
