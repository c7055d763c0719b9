"""The prediction loop: decoded batches to the device, rows to the sink; a signal stops it after the current batch."""

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
    """Destination of rows."""

    def write(self, items: Iterable[Item], rows: Iterable[dict]) -> None: ...


class _Started(NamedTuple):
    """A batch that the device computes; ``answer`` is None if no file of it was decoded."""

    items: list[Item]
    errors: list[str | None]
    answer: Answer | None
    waited: float


def run(loader: Loader, network: Network, sink: Sink, progress: Progress) -> bool:
    """Predict for every batch of the loader; return False if Ctrl-C or SIGTERM stopped it after the current batch.

    On CUDA the device computes one batch while the host starts the next and writes the previous one.
    """
    lag = 1 if network.device.type == "cuda" else 0
    started: deque[_Started] = deque()
    batches = iter(loader)
    with _stop_signals(progress.say) as stopped:
        batch = None
        while not stopped.is_set():
            start = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                break
            waited = time.perf_counter() - start
            any_decoded = None in batch.errors
            answer = network.start(batch.pixels) if any_decoded else None
            started.append(_Started(batch.items, batch.errors, answer, waited))
            if len(started) > lag:
                _finish(started.popleft(), sink, progress)
        while started:
            _finish(started.popleft(), sink, progress)
        return batch is None


def _finish(batch: _Started, sink: Sink, progress: Progress) -> None:
    """Wait for the batch's answer, write its rows and count it."""
    answer = batch.answer
    if answer is None:
        rows: list[dict] = [{} for _ in batch.items]
        transfer = compute = 0.0
    else:
        rows = answer.rows()
        transfer, compute = answer.seconds()
    for index, error in enumerate(batch.errors):
        if error is not None:
            rows[index] = {"error": error}
    seconds = (batch.waited, transfer, compute)
    sink.write(batch.items, rows)
    progress.add(batch.items, rows, seconds)


@contextmanager
def _stop_signals(say: Callable[[str], None]) -> Iterator[threading.Event]:
    """Yield an event that the first Ctrl-C or SIGTERM sets; a second one interrupts at once."""
    stopped = threading.Event()

    def stop(number: int, frame: object) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()
        say("stopping after this batch; once more stops at once")

    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield stopped
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
