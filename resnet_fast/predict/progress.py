"""Progress on the terminal: a bar with img/s and the slowest stage, the first failed files, closing figures."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable

from ..data.files import Item
from ..util.text import counted

STAGES = ("decode", "transfer", "compute")
MOST_NAMED = 20  # failed files named on the terminal; all of them are in OUT.failed.csv


class Progress:
    """Counters of done and failed files, starting from those of an earlier run, and the progress bar.

    ``count`` returns the total number of files; it runs in a thread, since the walk may take long. The ``seconds`` of a
    batch: how long the loop waited for decoded pixels, and the device's time for transfer and compute.
    """

    def __init__(self, done: int, failed: int, count: Callable[[], int]) -> None:
        self.done = done
        self.failed = failed
        self.new = 0
        self._seconds: Counter[str] = Counter()
        self._named = 0
        self._start = time.perf_counter()
        self._bar = _bar(done)
        if self._bar is not None:
            thread = threading.Thread(
                target=self._set_total,
                args=(count,),
                name="resnet_fast.predict.count",
                daemon=True,
            )
            thread.start()

    def _set_total(self, count: Callable[[], int]) -> None:
        self._bar.total = count()

    def add(self, items: list[Item], rows: list[dict], seconds: tuple[float, float, float]) -> None:
        """Add one batch."""
        self._seconds.update(dict(zip(STAGES, seconds, strict=True)))
        self.done += len(items)
        self.new += len(items)
        for item, row in zip(items, rows, strict=True):
            if "error" in row:
                self._add_failure(item, row["error"])
        if self._bar is not None:
            self._update_bar(len(items))

    def _update_bar(self, files: int) -> None:
        """Add the files to the bar, and name the slowest stage beside it."""
        shares = self._shares()
        slowest = max(shares, key=shares.get)
        share = shares[slowest]
        self._bar.set_postfix_str(f"{slowest} binds {share:.0%}", refresh=False)
        self._bar.update(files)

    def _add_failure(self, item: Item, error: str) -> None:
        """Count a failed file; name it if not too many were named."""
        self.failed += 1
        self._named += 1
        if self._named < MOST_NAMED:
            self.say(f"{item.name!r}: {error}")
        elif self._named == MOST_NAMED:
            self.say(f"{item.name!r}: {error}; others are not named here")

    def say(self, line: str) -> None:
        """Print one line on stderr, above the bar."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr)

    def _shares(self) -> dict[str, float]:
        """Return each stage's share of the time."""
        total = sum(self._seconds.values()) or 1.0
        return {stage: self._seconds[stage] / total for stage in STAGES}

    def close(self) -> str:
        """End the bar; return the figures in one line."""
        if self._bar is not None:
            self._bar.close()
        elapsed = time.perf_counter() - self._start
        rate = self.new / elapsed
        images = counted(self.new, "image")
        shares = ", ".join(f"{stage} {share:.0%}" for stage, share in self._shares().items())
        return f"{images} in {elapsed:.1f} s, {rate:.1f} img/s ({shares})"


def _bar(done: int):
    """Return tqdm's bar, or None if stderr is not a terminal or tqdm is not installed."""
    if not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        print("no progress bar: pip install tqdm", file=sys.stderr)
        return None
    return tqdm(initial=done, unit="img", smoothing=0.05, dynamic_ncols=True)
