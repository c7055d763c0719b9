"""Run an interpreter lane: Triton kernels on their grid, run by Triton's interpreter on the CPU, against float64.

TRITON_INTERPRET=1 decides when Triton is first imported, and then nothing in that process compiles any more; so the
lanes' tests, ``kernels/triton/lane*.py``, run in a pytest of their own, started by the test file of the same
kernels. To run some of them alone: ``TRITON_INTERPRET=1 pytest tests/kernels/triton/lane.py -k bn_act``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from resnet_fast.dispatch.problem import Problem
from resnet_fast.dispatch.registry import find
from resnet_fast.testing.check import check_kernel


def run_lane(name: str) -> None:
    """Raises AssertionError with the end of what pytest printed."""
    lane = Path(__file__).parents[1] / "kernels" / "triton" / f"{name}.py"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(lane)],
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout[-8000:]


def right(id: str, problem: Problem) -> None:
    """The kernel takes the problem and keeps the error rule on it; raises AssertionError."""
    assert find(id).reason(problem) is None
    verdict = check_kernel(find(id), problem)
    assert verdict.ok, verdict.reason
