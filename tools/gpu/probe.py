"""Where wgmma finds a matrix that begins inside a swizzle pattern: builds and runs descriptor_probe.cu."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

from .watchdog import ROOT, last_words

SOURCE = Path(__file__).with_name("descriptor_probe.cu")
TARGET = "arch=compute_90a,code=sm_90a"


def compiler() -> str | None:
    """Return the path of nvcc, or None if it is not installed."""
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def probe(folder: Path, deadline: float) -> tuple[list[dict], str | None]:
    """Return a row for each line that the program prints, "case: answer", and a sentence if it failed."""
    program = folder / "probe"
    include = str(ROOT / "csrc")
    build = [
        compiler(),
        "-std=c++17",
        "-I",
        include,
        "-gencode",
        TARGET,
        "-o",
        str(program),
        str(SOURCE),
    ]
    output = ""
    try:
        for command in (build, [str(program)]):
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                stdin=subprocess.DEVNULL,
                timeout=max(1.0, deadline - time.monotonic()),
            )
            output = done.stdout
            if done.returncode:
                return [], f"failed: {last_words(done.stdout + done.stderr)}"
    except subprocess.TimeoutExpired:
        return [], "stopped at its deadline"
    except OSError as error:
        return [], f"failed: {error}"
    finally:
        program.unlink(missing_ok=True)
    return [row(line) for line in output.splitlines()], None


def row(line: str) -> dict:
    """Return one printed line as a row."""
    case, _, answer = line.partition(": ")
    return {
        "stage": "probe",
        "job": "descriptors",
        "case": case,
        "status": "measured",
        "says": answer,
    }


def verdict(rows: list[dict]) -> str:
    """Return one sentence: whether matrices are found by the base offset of the pattern, which the kernels use."""
    of_pattern = [row for row in rows if row["case"].endswith("of the pattern")]
    answers = [row["says"].split()[3:] for row in of_pattern]  # "right from rows 0 1 2 …"
    everywhere = bool(answers) and all(len(right) == 8 for right in answers)
    if everywhere:
        return "matrices that begin inside a pattern of rows are found"
    return "MATRICES THAT BEGIN INSIDE A PATTERN OF ROWS ARE NOT FOUND: conv_hopper and conv_tail_hopper rest on that"
