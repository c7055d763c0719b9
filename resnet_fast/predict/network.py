"""From a batch of pixels to answers on one device: normalisation, forward, top-k or features, and the time it took."""

from __future__ import annotations

import time
from array import array
from base64 import b64encode
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..photos import normalise


class Seconds(NamedTuple):
    """Device time of one batch: bringing the pixels there, and all that is computed from them."""

    transfer: float
    compute: float


class Network:
    """A model that answers for uint8 pixels [n, H, W, 3].

    ``forward`` maps the normalised [n, 3, H, W] in ``dtype`` to logits, or to features when ``top`` is None. On CUDA
    ``start`` returns while the device still works; at most two answers may be under way.
    """

    def __init__(self, forward: nn.Module, mean: tuple[float, ...], std: tuple[float, ...], *, device: torch.device,
                 dtype: torch.dtype, top: int | None) -> None:
        self.device, self.dtype, self.top = device, dtype, top
        self._forward = forward
        self._mean, self._std = torch.tensor(mean, device=device), torch.tensor(std, device=device)
        self._pinned: list[Tensor] = []

    @torch.inference_mode()
    def start(self, pixels: Tensor) -> Answer:
        """Begin to compute; the pixels are no longer needed when this returns."""
        clock = _CudaClock() if self.device.type == "cuda" else _CpuClock()
        x = (self._stage(pixels) if self.device.type == "cuda" else pixels).to(self.device, non_blocking=True)
        clock.tick()
        x = normalise(x.permute(0, 3, 1, 2), self._mean, self._std).to(self.dtype)
        out = self._forward(x).float()
        finite = out.isfinite().all(1)
        answer = (out,) if self.top is None else out.softmax(1).topk(min(self.top, out.shape[1]), dim=1)
        clock.tick()
        return Answer(finite, tuple(answer), clock)

    def _stage(self, pixels: Tensor) -> Tensor:
        """The pixels in pinned memory, whence a copy runs beside the host: a buffer for each answer under way."""
        if not self._pinned or len(self._pinned[0]) < len(pixels):
            self._pinned = [torch.empty(pixels.shape, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._pinned.reverse()
        return self._pinned[0][:len(pixels)].copy_(pixels)


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
            rows = [{"class": classes, "p": [float(f"{p:.9g}") for p in ps]}
                    for ps, classes in zip(values[0].tolist(), values[1].tolist(), strict=True)]
        return [row if finite else {"error": "the network's answer is not finite"}
                for row, finite in zip(rows, self._finite.tolist(), strict=True)]

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
