"""One clock for tuner, command line and benchmarks: interleaved rounds, medians, ratios taken within a round.

A machine's speed drifts; two variants timed one after the other measure the drift. So every round runs every variant
once, in turn, and a ratio is the median of the ratios of the same round. CUDA work is timed by device events after
warm-up, CPU work by ``perf_counter``.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of each round of one variant."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The 25 % and 75 % quantiles."""
        if len(self.seconds) < 2:
            return self.seconds[0], self.seconds[0]
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high

    @property
    def spread(self) -> float:
        """Interquartile range over the median."""
        low, high = self.quartiles
        return (high - low) / self.median

    def speedup_over(self, base: Timing) -> float:
        """Return how many times faster than ``base`` this is: the median of base/self, round by round."""
        return statistics.median(self._ratios(base))

    def lead_over(self, base: Timing) -> float:
        """Return the part of ``speedup_over`` that is beyond noise: three standard errors less."""
        ratios = self._ratios(base)
        return statistics.median(ratios) * (1 - 3 * _standard_error(ratios))

    def _ratios(self, base: Timing) -> list[float]:
        return [b / s for b, s in zip(base.seconds, self.seconds, strict=True)]


def interleaved(
    variants: dict[str, Callable[[], object]],
    *,
    device: str = "cpu",
    warmup: int = 2,
    min_rounds: int = 5,
    max_rounds: int = 200,
    max_seconds: float = 20.0,
    confidence: float = 0.02,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Timing]:
    """Time the variants in interleaved rounds.

    Each round has its own order, so that no variant always runs on the caches that the same neighbour leaves. Stops
    after ``min_rounds`` as soon as every variant's standard error of the median is below ``confidence`` of it, at
    ``max_rounds``, or when ``max_seconds`` have passed (never before 3 rounds). ``progress`` is called with the
    round's number.
    """
    clock = _cuda_seconds if torch.device(device).type == "cuda" else _cpu_seconds
    for fn in variants.values():
        for _ in range(warmup):
            fn()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    start = time.perf_counter()
    for rounds in range(1, max_rounds + 1):
        for name in random.Random(rounds).sample(list(variants), len(variants)):
            seconds[name].append(clock(variants[name]))
        if progress is not None:
            progress(rounds)
        out_of_time = time.perf_counter() - start > max_seconds
        if rounds >= 3 and out_of_time:
            break
        if rounds >= min_rounds and all(_standard_error(s) < confidence for s in seconds.values()):
            break
    return {name: Timing(tuple(s)) for name, s in seconds.items()}


def _standard_error(seconds: list[float]) -> float:
    """Return the relative standard error of the median: 0.93·IQR/√n/median (interquartile range, normal theory)."""
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return 0.93 * (high - low) / len(seconds) ** 0.5 / statistics.median(seconds)


def _cpu_seconds(fn: Callable[[], object]) -> float:
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def _cuda_seconds(fn: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    fn()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
