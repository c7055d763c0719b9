"""Where wgmma finds a matrix that begins inside a pattern of rows, seen apart from any kernel: builds descriptor_probe.cu and runs it."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

from .watchdog import ROOT, last_words

SOURCE = Path(__file__).with_name("descriptor_probe.cu")
TARGET = "arch=compute_90a,code=sm_90a"


def compiler() -> str | None:
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def probe(folder: Path, deadline: float) -> tuple[list[dict], str | None]:
    """A row for each line that the program prints, "case: answer", and what kept it from its end."""
    program, said = folder / "probe", ""
    command = [compiler(), "-std=c++17", "-I", str(ROOT / "csrc"), "-gencode", TARGET, "-o", str(program), str(SOURCE)]
    try:
        for each in (command, [str(program)]):
            done = subprocess.run(
                each,
                capture_output=True,
                text=True,
                stdin=subprocess.DEVNULL,
                timeout=max(1.0, deadline - time.monotonic()),
            )
            said = done.stdout
            if done.returncode:
                return [], f"failed: {last_words(done.stdout + done.stderr)}"
    except subprocess.TimeoutExpired:
        return [], "stopped at its deadline"
    except OSError as error:
        return [], f"failed: {error}"
    finally:
        program.unlink(missing_ok=True)
    cases = [line.partition(": ") for line in said.splitlines()]
    return [
        {"stage": "probe", "job": "descriptors", "case": case, "status": "measured", "says": answer}
        for case, _, answer in cases
    ], None


def verdict(rows: list[dict]) -> str:
    """What the kernels take for granted, the pattern's base offset, and whether it holds: one sentence."""
    answers = [row["says"].split()[3:] for row in rows if row["case"].endswith("of the pattern")]
    everywhere = bool(answers) and all(len(right) == 8 for right in answers)
    return (
        "matrices that begin inside a pattern of rows are found"
        if everywhere
        else "MATRICES THAT BEGIN INSIDE A PATTERN OF ROWS ARE NOT FOUND: conv_hopper and conv_tail_hopper rest on that"
    )
