"""Work in a fresh process: a function under another Triton mode, or a module with other environment variables."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import TypeVar

Result = TypeVar("Result")


def call(interpret: bool, function: Callable[..., Result], *args) -> Result:
    """Return the function's result from a fresh process in which Triton interprets kernels or compiles them.

    Triton reads TRITON_INTERPRET when it is imported, so one process cannot do both.
    """
    spawn = get_context("spawn")
    with _triton_interpret(interpret), ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(function, *args).result()


@contextmanager
def _triton_interpret(interpret: bool) -> Iterator[None]:
    """Set TRITON_INTERPRET for processes started in this block."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1" if interpret else "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


def run_module(
    module: str, args: list[str], environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run ``python -m module`` with these variables added to the environment; its output is captured."""
    command = [sys.executable, "-m", module, *args]
    variables = {**os.environ, **environment}
    return subprocess.run(command, env=variables, text=True, capture_output=True)
