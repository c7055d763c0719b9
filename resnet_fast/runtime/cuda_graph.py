"""A CUDA graph of a run, captured so that a capture that fails leaves the caller as he was."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .program import Program


def captured(
    run: Callable[[], Any], *, stream: torch.cuda.Stream | None = None, pool: Any = None, mode: str = "global"
) -> tuple[torch.cuda.CUDAGraph, Any]:
    """(graph, what ``run`` answered in it, which each replay writes anew); ``stream``: where to capture, by default torch's own stream for it.

    Raises what ``run`` raised, or what the capture did. Up to torch 2.11 at least a capture that fails leaves its stream as the thread's current
    one, so the caller's is set again here; and it leaves ``pool`` counted as in use by a capture: the caller has to take another one.
    """
    graph, raised = torch.cuda.CUDAGraph(), []

    def watched() -> Any:
        try:
            return run()
        except Exception as error:
            raised.append(error)
            raise

    try:
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode=mode),
        ):
            answer = watched()
    except RuntimeError as error:
        if raised and error is not raised[0]:
            raise raised[0] from error  # the end of a broken capture says only that it is broken
        raise
    return graph, answer


class Graph:
    """One input shape's steps as a CUDA graph over a static input. Graphs of a plan share ``pool``, so they run one at a time.

    ``side``: the stream to capture on, of the input's device, which is the current one; the same for all graphs of a pool, or each would take
    memory of its own.
    """

    def __init__(self, program: Program, x: Tensor, pool: Any, side: torch.cuda.Stream) -> None:
        with torch.inference_mode(False):  # or no later call outside of it might write there
            self._static = x.clone(memory_format=torch.preserve_format)
        side.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(side):
            program(self._static)  # lazy handles and workspaces come into being outside the capture
        torch.cuda.current_stream(x.device).wait_stream(side)
        self._graph, self._answer = captured(
            partial(program, self._static), stream=side, pool=pool, mode="thread_local"
        )

    def replay(self, x: Tensor) -> Any:
        """Copies of the answer: it lies in the graph's own memory, which the next replay writes."""
        self._static.copy_(x)
        self._graph.replay()
        return copied(self._answer)


def copied(result: Any) -> Any:
    """The nested result with every tensor cloned."""
    if isinstance(result, Tensor):
        return result.clone()
    if isinstance(result, dict):
        return type(result)((k, copied(v)) for k, v in result.items())
    return type(result)(map(copied, result)) if isinstance(result, (tuple, list)) else result
