"""CUDA graphs: a run captured so that a failed capture leaves no trace, and a program replayed on a static input."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..graph.tree import mapped

if TYPE_CHECKING:
    from .program import Program


def captured(
    run: Callable[[], Any],
    *,
    warm: int = 0,
    stream: torch.cuda.Stream | None = None,
    pool: Any = None,
    mode: str = "global",
) -> tuple[torch.cuda.CUDAGraph, Any]:
    """The graph of ``run()``, and what ``run`` returned in it; each replay writes that result anew.

    ``warm``: this many runs come first, on a side stream, so that lazy handles and workspaces are created outside the
    capture. ``stream``: the stream to warm up and capture on; by default torch's own stream for captures.

    Raises what ``run`` raised, or what the capture did. Up to torch 2.11 at least a failed capture leaves its stream as
    the thread's current one, so the caller's stream is restored here; and it leaves ``pool`` counted as in use by a
    capture, so the caller has to take another one.
    """
    if warm:
        _warm_up(run, warm, stream or torch.cuda.Stream())
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
            result = watched()
    except RuntimeError as error:
        if raised and error is not raised[0]:
            raise raised[0] from error  # the end of a broken capture says only that it is broken
        raise
    return graph, result


def _warm_up(run: Callable[[], Any], times: int, side: torch.cuda.Stream) -> None:
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(times):
            run()
    torch.cuda.current_stream().wait_stream(side)


class Graph:
    """One input shape's steps as a CUDA graph over a static input. Graphs of a plan share ``pool`` and run one by one.

    ``side``: the stream to capture on, of the input's device, which is the current one. All graphs of a pool use the
    same stream: memory is shared only within a stream.
    """

    def __init__(self, program: Program, x: Tensor, pool: Any, side: torch.cuda.Stream) -> None:
        # an inference tensor could not be written outside of inference mode
        with torch.inference_mode(False):
            self._static = x.clone(memory_format=torch.preserve_format)
        run = partial(program, self._static)
        self._graph, self._answer = captured(
            run, warm=1, stream=side, pool=pool, mode="thread_local"
        )

    def replay(self, x: Tensor) -> Any:
        """A copy of the result: the next replay writes the graph's own memory again."""
        self._static.copy_(x)
        self._graph.replay()
        return copied(self._answer)


def copied(result: Any) -> Any:
    """The nested result with every tensor cloned."""
    return mapped(result, lambda part: part.clone() if isinstance(part, Tensor) else part)
