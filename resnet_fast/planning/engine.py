"""The running of a plan: steps bound to kernels for each input shape; on a GPU each shape is one CUDA graph."""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..graph.across import Normalize, grouped, label
from ..graph.ir import Group
from ..graph.network import Lowered
from ..runtime.cuda_graph import Graph
from ..runtime.pieces import joined, pieces
from ..runtime.program import Program
from .request import Options

# Programs (and CUDA graphs) at a time, oldest out: a service that sees every shape must not grow without end.
SHAPES = 8


class Engine:
    """Runs one network with one choice of groups on one device. Thread-safe.

    Weights, options and device never change: a plan whose network, device or groups change takes a new engine.
    ``notes`` is the plan's list; a failed capture adds a sentence to it.
    """

    def __init__(
        self,
        lowered: Lowered,
        options: Options,
        device: torch.device,
        cuda_graph: bool | None,
        notes: list[str],
    ) -> None:
        self.lowered = grouped(lowered, options.across, options.normalize)
        self.options = options
        self.device = device
        self.cuda_graph = cuda_graph
        self.notes = notes
        self.takes_bytes = self.lowered.takes_bytes
        self.cuts_batches = device.type == "cpu" and self.lowered.imagewise
        self.programs: OrderedDict[tuple[int, ...], Program] = OrderedDict()
        self.last_built: Program | None = None
        self._first_shape: tuple[int, ...] | None = None
        self._lock = threading.RLock()
        self._replaying = threading.Lock()
        # The graphs' memory pool and stream, and the event after the last replay.
        self._pool: tuple[Any, torch.cuda.Stream] | None = None
        self._replayed: torch.cuda.Event | None = None

    def absent_groups(self) -> list[str]:
        """The groups that were asked for and that this network does not have."""
        formed: set[str] = set()
        for step in self.lowered.steps:
            if isinstance(step, Group):
                formed |= {step.op, label(step)}
        return [name for name in self.options.across if name not in formed]

    def __call__(self, x: Tensor) -> Any:
        """Return the answer for a batch, which goes through in pieces where that is faster."""
        with inference_settings(self.device):
            x = self.prepared(x)
            sizes = self.piece_sizes(x)
            if len(sizes) == 1:
                return self._finished(self.run(x))
            return self._finished(joined([self.run(piece) for piece in x.split(sizes)]))

    def build(self, example: Tensor) -> None:
        """Choose kernels and pack weights for such an input by running it (on a CPU, two images of it) once."""
        with inference_settings(self.device):
            x = self.prepared(example)
            if len(self.piece_sizes(x)) == 1:
                self.run(x)

    def program(self, x: Tensor) -> Program:
        """Return the program for such an input, which is run once and not cut."""
        with inference_settings(self.device):
            x = self.prepared(x)
            self.run(x)
            with self._lock:
                return self.programs[tuple(x.shape)]

    def program_with_values(self, x: Tensor) -> Program:
        """Return a new program that holds every value of this input, and how long it took."""
        with inference_settings(self.device):
            return Program(self.lowered, self._channels_last(self.prepared(x)), keep=True)

    # ------------------------------------------------------------ input and answer

    def prepared(self, x: Tensor) -> Tensor:
        """Return the input checked and normalised; on a CPU, where it is cut next, in the plan's dtype and NHWC."""
        if not isinstance(x, Tensor) or x.dim() != 4 or x.device != self.device:
            got = f"{x.dim()}-D on {x.device}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"plan: got a {got} input, expected 4-D on {self.device}")
        if self.options.normalize is not None:
            return self._normalized(x, self.options.normalize)
        if not x.is_floating_point():
            raise ValueError(
                f"plan: got {x.dtype}, expected a floating dtype (uint8 photographs: plan(..., normalize=(mean, std)))"
            )
        return x if self.device.type == "cuda" else self._channels_last(x)

    def _normalized(self, pixels: Tensor, normalize: Normalize) -> Tensor:
        """Return uint8 [N, H, W, 3] as [N, 3, H, W], normalised unless the first step does that itself."""
        if pixels.dtype != torch.uint8 or pixels.shape[3] != 3:
            raise ValueError(
                f"plan: got {pixels.dtype} {list(pixels.shape)}, expected uint8 [N, H, W, 3]: "
                "the plan normalises by itself"
            )
        if self.takes_bytes:
            return pixels.contiguous().permute(0, 3, 1, 2)
        mean, std = (
            torch.tensor(channels, dtype=torch.float32, device=pixels.device) * 255
            for channels in normalize
        )
        normalized = (pixels - mean) / std
        return normalized.to(self.options.dtype).permute(0, 3, 1, 2)

    def _channels_last(self, x: Tensor) -> Tensor:
        """Return the input in the plan's dtype and NHWC; bytes stay bytes."""
        if self.takes_bytes:
            return x
        return x.to(self.options.dtype).contiguous(memory_format=torch.channels_last)

    def _finished(self, out: Any) -> Any:
        """Apply softmax and top-k, where they are asked for."""
        topk = self.options.topk
        if self.options.softmax or topk:
            out = torch.softmax(out.float(), 1)
        return tuple(torch.topk(out, topk, 1)) if topk else out

    # ------------------------------------------------------------ running

    def piece_sizes(self, x: Tensor) -> list[int]:
        """Return how many images go through at a time; a new image size is tried with two images."""
        if not self.cuts_batches or len(x) < 3:
            return [len(x)]
        two_images = (2, *x.shape[1:])
        if two_images not in self.programs:
            self.run(x[:2])
        probe = self.programs.get(two_images)
        if probe is None:
            return [len(x)]
        return pieces(len(x), probe.largest // 2)

    def run(self, x: Tensor) -> Any:
        """Return the steps' result for a prepared input in one piece, by the program for its shape."""
        shape = tuple(x.shape)
        with self._lock:
            program = self.programs.get(shape)
            if program is None:
                return self._built(self._channels_last(x))
            self.programs.move_to_end(shape)
        if program.graph is not None:  # the copy into the graph's input converts dtype and layout
            return self._replay(program.graph, x)
        x = self._channels_last(x)
        return callers_own(program(x), x, self.lowered)

    def _built(self, x: Tensor) -> Any:
        """Bind the program for a new shape, capture it on a GPU, and return its answer for this input."""
        capture = self.device.type == "cuda" and self.cuda_graph is not False and x.numel() > 0
        try:
            program = Program(self.lowered, x, graph=capture)
        except ValueError as problem:
            made_for = (
                f" (the plan was made for {list(self._first_shape)})" if self._first_shape else ""
            )
            reason = str(problem).removeprefix("plan: ")
            raise ValueError(f"plan: got {list(x.shape)}{made_for}: {reason}") from problem
        answer = callers_own(program.answer, x, self.lowered)
        program.answer = None
        if capture:
            self._capture(program, x)
        shape = tuple(x.shape)
        self.programs[shape] = self.last_built = program
        self._first_shape = self._first_shape or shape
        while len(self.programs) > SHAPES:
            self.programs.popitem(last=False)
        return answer

    def _capture(self, program: Program, x: Tensor) -> None:
        """Capture the program as a CUDA graph; a capture that fails is an error only if graphs were asked for."""
        self._pool = self._pool or (torch.cuda.graph_pool_handle(), torch.cuda.Stream(self.device))
        try:
            program.graph = Graph(program, x, *self._pool)
        except (RuntimeError, ValueError) as problem:
            self._pool = None  # torch counts it as in use by the failed capture, see ``captured``
            if self.cuda_graph:
                raise
            note = f"no CUDA graph for {list(x.shape)}, its steps run one by one: {problem}"
            self.notes.append(note)
            warnings.warn(f"plan: {note}", stacklevel=6)  # the caller of the plan

    def _replay(self, graph: Graph, x: Tensor) -> Any:
        """Replay one graph at a time, on whichever streams the callers are: the graphs share their memory."""
        with self._replaying:
            stream = torch.cuda.current_stream(self.device)
            if self._replayed is not None:
                stream.wait_event(self._replayed)
            answer = graph.replay(x)
            self._replayed = stream.record_event()
        return answer


@contextmanager
def inference_settings(device: torch.device) -> Iterator[None]:
    """Run the body without gradients and autocast, on this device.

    Autocast would cast what the plan has in its dtype already. It is turned off only where it is on, since that alone
    takes 6 µs of a call, in which a GPU waits. Kernels and graphs go to the current GPU, so the device becomes that.
    """
    autocast = (
        torch.autocast(device.type, enabled=False)
        if torch.is_autocast_enabled(device.type)
        else nullcontext()
    )
    with (
        torch.no_grad(),
        autocast,
        torch.cuda.device(device) if device.type == "cuda" else nullcontext(),
    ):
        yield


def callers_own(result: Any, x: Tensor, lowered: Lowered) -> Any:
    """Return the nested result with a copy of each tensor that shares memory with the input or a weight."""
    if isinstance(result, Tensor):
        shared = {tensor.untyped_storage().data_ptr() for tensor in (x, *lowered.tensors.values())}
        return result.clone() if result.untyped_storage().data_ptr() in shared else result
    if isinstance(result, dict):
        return type(result)((key, callers_own(value, x, lowered)) for key, value in result.items())
    if isinstance(result, (tuple, list)):
        return type(result)(callers_own(value, x, lowered) for value in result)
    return result
