"""A CUDA graph of a run, captured so that a capture that fails leaves the caller as he was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


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
