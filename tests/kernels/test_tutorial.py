"""The tutorial: every step is right on the problem grid, and the counts on its page are up to date."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="no Triton on this platform")
import triton  # noqa: E402

FOLDER = Path(__file__).parents[2] / "examples" / "tutorial"
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")
STEPS = sorted(FOLDER.glob("step*.py"))


@pytest.fixture(scope="module")
def count():
    spec = importlib.util.spec_from_file_location("count", FOLDER / "count.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["count"], before = module, list(sys.path)
    sys.path.insert(0, str(FOLDER))  # the fresh processes that count look for it there
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before
    del sys.modules["count"]


def test_every_step_is_right() -> None:
    command = [
        sys.executable,
        "-m",
        "resnet_fast",
        "check",
        "--dtype",
        "float32",
        "--dtype",
        "bfloat16",
        "--kernel",
    ]
    command += map(str, STEPS)
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0 and "88 checks on cpu, 0 wrong" in done.stdout, (
        done.stdout + done.stderr
    )


def test_counts_on_the_page_are_up_to_date(count) -> None:
    found = count.tables()
    assert count.section(PAGE, "moved") == found["moved"]
    if triton.__version__.startswith("3.9."):  # the version that the page names
        assert count.section(PAGE, "code") == found["code"]


def test_the_page_names_every_step() -> None:
    assert len(STEPS) == 4 and all(f"**`{step.name}`**" in PAGE for step in STEPS)
