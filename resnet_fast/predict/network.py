"""From a batch of pixels to answers on one device, by a plan: top-k or features, and the time they took."""

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
    """Device time of one batch: bringing the pixels there, and all that is computed from them."""

    transfer: float
    compute: float


class Network:
    """A plan of ``model`` in ``dtype`` that answers for uint8 pixels [n, H, W, 3], n at most that of the first call.

    The model maps images normalised by ``mean`` and ``std`` to logits, or to features when ``top`` is None. On CUDA
    ``start`` returns while the device still works; at most two answers may be under way.
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
        self.device, self.dtype, self.top = device, dtype, top
        self._model, self._normalize = model, (mean, std)
        self._plan: Plan | None = None
        self._pinned: list[Tensor] = []

    def start(self, pixels: Tensor) -> Answer:
        """Begin to compute; the pixels are no longer needed when this returns."""
        cuda = self.device.type == "cuda"
        if self._plan is None:  # a GPU's graph is of the whole batch; on the CPU two images show what any number needs
            example = pixels.to(self.device) if cuda else pixels[:2]
            self._plan = plan(self._model, example, dtype=self.dtype, normalize=self._normalize)
        clock = _CudaClock() if cuda else _CpuClock()
        x = (self._stage(pixels) if cuda else pixels).to(self.device, non_blocking=True)
        clock.tick()
        with torch.inference_mode():
            out = self._plan(x)[: len(pixels)].float()
            finite = out.isfinite().all(1)
            answer = (out,) if self.top is None else tuple(out.softmax(1).topk(self.top, dim=1))
        clock.tick()
        return Answer(finite, answer, clock)

    def _stage(self, pixels: Tensor) -> Tensor:
        """The pixels in pinned memory, whence a copy runs beside the host: a buffer for each answer under way.

        Always a whole batch, the last one filled up with what was there, so that one graph serves all.
        """
        if not self._pinned:
            self._pinned = [torch.zeros(pixels.shape, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._pinned.reverse()
        self._pinned[0][: len(pixels)].copy_(pixels)
        return self._pinned[0]


class Answer:
    """What ``Network.start`` began; ``rows`` waits for it."""

    def __init__(self, finite: Tensor, values: tuple[Tensor, ...], clock: _CpuClock | _CudaClock) -> None:
        self._finite, self._values, self._clock = finite, values, clock

    def rows(self) -> list[dict]:
        """A dict for each row: {"class", "p"} (nine digits keep a float32), {"features"} (in base64) or {"error"}."""
        values = [value.cpu() for value in self._values]
        if len(values) == 1:
            rows = [{"features": b64encode(array("f", row.tolist())).decode()} for row in values[0]]
        else:
            rows = [
                {"class": classes, "p": [float(f"{p:.9g}") for p in ps]}
                for ps, classes in zip(values[0].tolist(), values[1].tolist(), strict=True)
            ]
        return [
            row if finite else {"error": "the network's answer is not finite"}
            for row, finite in zip(rows, self._finite.tolist(), strict=True)
        ]

    def seconds(self) -> Seconds:
        """Call it after ``rows``."""
        return self._clock.seconds()


class _CpuClock:
    def __init__(self) -> None:
        self._times = [time.perf_counter()]

    def tick(self) -> None:
        self._times.append(time.perf_counter())

    def seconds(self) -> Seconds:
        a, b, c = self._times
        return Seconds(b - a, c - b)


class _CudaClock:
    def __init__(self) -> None:
        self._events: list[torch.cuda.Event] = []
        self.tick()

    def tick(self) -> None:
        self._events.append(torch.cuda.Event(enable_timing=True))
        self._events[-1].record()

    def seconds(self) -> Seconds:
        a, b, c = self._events
        return Seconds(a.elapsed_time(b) / 1e3, b.elapsed_time(c) / 1e3)
