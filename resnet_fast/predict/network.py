"""The planned network on one device: a batch of pixels in; top-k classes or features, and their times, out."""

from __future__ import annotations

import time
from array import array
from base64 import b64encode
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..planning.make import plan
from ..planning.plan import Plan


class Seconds(NamedTuple):
    """Device time of one batch: the transfer of its pixels, and everything computed from them."""

    transfer: float
    compute: float


class Network:
    """A plan of ``model`` in ``dtype`` for uint8 pixels [n, H, W, 3]; n must not exceed that of the first call.

    The model maps images normalised by ``mean`` and ``std`` to logits, or to features when ``top`` is None. On CUDA
    ``start`` returns while the device still works; at most two answers may be in progress.
    """

    def __init__(
        self,
        model: nn.Module,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        device: torch.device,
        dtype: torch.dtype,
        top: int | None,
    ) -> None:
        self.device = device
        self.dtype = dtype
        self.top = top
        self._model = model
        self._normalize = (mean, std)
        self._plan: Plan | None = None
        self._pinned: list[Tensor] = []

    def start(self, pixels: Tensor) -> Answer:
        """Begin to compute; the pixels may be overwritten when this returns."""
        cuda = self.device.type == "cuda"
        if self._plan is None:
            self._plan = self._make_plan(pixels)
        clock = _CudaClock() if cuda else _CpuClock()
        staged = self._stage(pixels) if cuda else pixels
        x = staged.to(self.device, non_blocking=True)
        clock.tick()
        with torch.inference_mode():
            out = self._plan(x)[: len(pixels)].float()
            finite = out.isfinite().all(1)
            if self.top is None:
                values = (out,)
            else:
                values = tuple(out.softmax(1).topk(self.top, dim=1))
        clock.tick()
        return Answer(finite, values, clock)

    def _make_plan(self, pixels: Tensor) -> Plan:
        """Plan the model for the whole batch on CUDA, as its graph has that size; for two images on a CPU."""
        if self.device.type == "cuda":
            example = pixels.to(self.device)
        else:
            example = pixels[:2]
        return plan(self._model, example, dtype=self.dtype, normalize=self._normalize)

    def _stage(self, pixels: Tensor) -> Tensor:
        """Copy the pixels into pinned memory, from which transfers run asynchronously; a buffer for each answer.

        Returns a whole batch, so that one CUDA graph serves all: a shorter last batch keeps older pixels behind it.
        """
        if not self._pinned:
            self._pinned = [
                torch.zeros(pixels.shape, dtype=torch.uint8, pin_memory=True) for _ in range(2)
            ]
        self._pinned.reverse()
        buffer = self._pinned[0]
        buffer[: len(pixels)].copy_(pixels)
        return buffer


class Answer:
    """The result that ``Network.start`` began to compute; ``rows`` waits for it."""

    def __init__(
        self, finite: Tensor, values: tuple[Tensor, ...], clock: _CpuClock | _CudaClock
    ) -> None:
        self._finite = finite
        self._values = values
        self._clock = clock

    def rows(self) -> list[dict]:
        """Return a dict for each image: {"class", "p"}, {"features"} (in base64) or {"error"}."""
        values = [value.cpu() for value in self._values]
        rows = _feature_rows(*values) if len(values) == 1 else _class_rows(*values)
        for index, finite in enumerate(self._finite.tolist()):
            if not finite:
                rows[index] = {"error": "the network's answer is not finite"}
        return rows

    def seconds(self) -> Seconds:
        """Return the times of this batch; call it after ``rows``."""
        return self._clock.seconds()


def _feature_rows(features: Tensor) -> list[dict]:
    rows = []
    for values in features:
        packed = array("f", values.tolist())
        rows.append({"features": b64encode(packed).decode()})
    return rows


def _class_rows(probabilities: Tensor, classes: Tensor) -> list[dict]:
    rows = []
    for indices, values in zip(classes.tolist(), probabilities.tolist(), strict=True):
        rounded = [float(f"{p:.9g}") for p in values]  # nine digits restore a float32
        rows.append({"class": indices, "p": rounded})
    return rows


class _CpuClock:
    """Wall-clock times of the start and of two ticks."""

    def __init__(self) -> None:
        self._times = [time.perf_counter()]

    def tick(self) -> None:
        self._times.append(time.perf_counter())

    def seconds(self) -> Seconds:
        start, transferred, computed = self._times
        transfer = transferred - start
        compute = computed - transferred
        return Seconds(transfer, compute)


class _CudaClock:
    """CUDA events at the start and at two ticks."""

    def __init__(self) -> None:
        self._events: list[torch.cuda.Event] = []
        self.tick()

    def tick(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)

    def seconds(self) -> Seconds:
        """Return the times between the events, which must have completed."""
        start, transferred, computed = self._events
        transfer = start.elapsed_time(transferred) / 1e3
        compute = transferred.elapsed_time(computed) / 1e3
        return Seconds(transfer, compute)
