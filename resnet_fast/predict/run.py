"""The loop: decoded batches to the device, answers to the sink; stopped without losing an answer."""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

from ..data.files import Item
from ..data.loader import Loader
from .network import Answer, Network
from .progress import Progress


class Sink(Protocol):
    """Where rows go."""

    def write(self, items: Iterable[Item], rows: Iterable[dict]) -> None: ...


class _UnderWay(NamedTuple):
    items: list[Item]
    errors: list[str | None]
    answer: Answer | None
    waited: float


def run(loader: Loader, network: Network, sink: Sink, progress: Progress) -> bool:
    """Answer for every batch of the loader; returns False if Ctrl-C or SIGTERM stopped it, after the batch under way.

    While CUDA computes one batch the host hands over the next and writes the one before.
    """
    lag = 1 if network.device.type == "cuda" else 0
    queue: deque[_UnderWay] = deque()
    batches = iter(loader)
    with _stoppable(progress.say) as stopped:
        batch = None
        while not stopped.is_set():
            start = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                break
            waited = time.perf_counter() - start
            alive = None in batch.errors
            queue.append(_UnderWay(batch.items, batch.errors, network.start(batch.pixels) if alive else None, waited))
            if len(queue) > lag:
                _finish(queue.popleft(), sink, progress)
        while queue:
            _finish(queue.popleft(), sink, progress)
        return batch is None


def _finish(batch: _UnderWay, sink: Sink, progress: Progress) -> None:
    rows: list[dict] = [{} for _ in batch.items]
    transfer = compute = 0.0
    if batch.answer is not None:
        rows = batch.answer.rows()
        transfer, compute = batch.answer.seconds()
    rows = [row if error is None else {"error": error} for row, error in zip(rows, batch.errors, strict=True)]
    sink.write(batch.items, rows)
    progress.add(batch.items, rows, (batch.waited, transfer, compute))


@contextmanager
def _stoppable(say: Callable[[str], None]) -> Iterator[threading.Event]:
    """The event that the first Ctrl-C or SIGTERM sets; a second one interrupts at once."""
    stopped = threading.Event()

    def stop(number: int, frame: object) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()
        say("stopping after this batch; once more stops at once")

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
