"""What a run tells the terminal: a bar with img/s and the stage that binds, the first failed files, closing figures."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable

from ..data.files import Item
from ..util.text import counted

STAGES = ("decode", "transfer", "compute")
MOST_NAMED = 20  # failed files named on the terminal; all are in OUT.failed.csv


class Progress:
    """Counts on from what an earlier run left, ``done`` and ``failed``; ``count`` runs in a thread and tells the total.

    ``seconds`` of a batch: how long the loop waited for decoded pixels, and the device's time for transfer and compute.
    """

    def __init__(self, done: int, failed: int, count: Callable[[], int]) -> None:
        self.done, self.failed, self.new = done, failed, 0
        self._seconds: Counter[str] = Counter()
        self._named = 0
        self._start = time.perf_counter()
        self._bar = _bar(done)
        if self._bar is not None:
            threading.Thread(target=self._count, args=(count,), name="resnet_fast.predict.count", daemon=True).start()

    def _count(self, count: Callable[[], int]) -> None:
        self._bar.total = count()

    def add(self, items: list[Item], rows: list[dict], seconds: tuple[float, float, float]) -> None:
        """One batch more."""
        self._seconds.update(dict(zip(STAGES, seconds, strict=True)))
        self.done += len(items)
        self.new += len(items)
        for item, row in zip(items, rows, strict=True):
            if "error" in row:
                self.failed += 1
                self._name(item, row["error"])
        if self._bar is not None:
            stage, share = max(self._shares().items(), key=lambda pair: pair[1])
            self._bar.set_postfix_str(f"{stage} binds {share:.0%}", refresh=False)
            self._bar.update(len(items))

    def _name(self, item: Item, error: str) -> None:
        self._named += 1
        if self._named <= MOST_NAMED:
            self.say(f"{item.name!r}: {error}" + ("; others are not named here" if self._named == MOST_NAMED else ""))

    def say(self, line: str) -> None:
        """One line on stderr, above the bar."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr)

    def _shares(self) -> dict[str, float]:
        total = sum(self._seconds.values()) or 1.0
        return {stage: self._seconds[stage] / total for stage in STAGES}

    def close(self) -> str:
        """End the bar; returns the figures in one line."""
        if self._bar is not None:
            self._bar.close()
        elapsed = time.perf_counter() - self._start
        shares = ", ".join(f"{stage} {share:.0%}" for stage, share in self._shares().items())
        return f"{counted(self.new, 'image')} in {elapsed:.1f} s, {self.new / elapsed:.1f} img/s ({shares})"


def _bar(done: int):
    """tqdm's bar, or None where stderr is no terminal or tqdm is not installed."""
    if not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        print("no progress bar: pip install tqdm", file=sys.stderr)
        return None
    return tqdm(initial=done, unit="img", smoothing=0.05, dynamic_ncols=True)
