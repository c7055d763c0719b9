"""Run the interpreter lane: every Triton kernel on its grid, run by Triton's interpreter on the CPU, against float64.

TRITON_INTERPRET=1 decides when Triton is first imported, and then nothing in that process compiles any more; so the
lane's tests, ``triton_lane*.py`` beside this file, run in a pytest of their own. To run some of them alone:
``TRITON_INTERPRET=1 pytest tests/triton_lane.py -k bn_act``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="no Triton on this platform")


@pytest.mark.parametrize("name", ["triton_lane", "triton_lane_tma", "triton_lane_chain", "triton_lane_pool"])
def test_interpreter_lane(name: str) -> None:
    lane = Path(__file__).with_name(f"{name}.py")
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(lane)], text=True,
                          env={**os.environ, "TRITON_INTERPRET": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout[-8000:]
