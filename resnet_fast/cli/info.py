"""``info``: this machine, this build, the kernels, and how to get what is missing."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from ..util.machine import machine, version
from ..util.text import table

# Package → the extra of ours that installs it.
EXTRAS = {
    "torchvision": "vision",
    "timm": "timm",
    "safetensors": "io",
    "matplotlib": "report",
    "pytest_benchmark": "bench",
    "openvino": "bench",
    "onnxruntime": "bench",
}


def add_parser(commands) -> None:
    p = commands.add_parser(
        "info",
        help="machine, build, kernels, what is missing",
        description="Show this machine, how the package was built, which kernels can run, and how to get the rest.",
    )
    p.add_argument("--json", action="store_true", help="machine-readable")
    p.set_defaults(run=run)


def build() -> dict:
    """Return what setup.py recorded when it built the extensions, or why there are none; and how CPU kernels run."""
    record = Path(__file__).parents[1] / "_build.json"
    recorded = json.loads(record.read_text()) if record.is_file() else {"extension": "not built"}
    return {**recorded, "cpu kernels": cpu_kernels()}


def cpu_kernels() -> str:
    """Return what the CPU kernels run with, or why they do not run here."""
    from ..kernels import cpu_library

    reason = cpu_library.available()
    if reason:
        return reason
    runs_with = f"run with {cpu_library.instructions()}"
    if cpu_library.onednn_has_amx():
        return f"{runs_with}; bfloat16 convolutions are left to oneDNN, which has AMX here"
    return runs_with


def kernel_rows() -> list[tuple[str, str, str]]:
    """Return (id, op, "ready" or why it cannot run here) of every kernel."""
    from ..dispatch.registry import kernels

    return [(k.id, k.op, k.available() or "ready") for k in kernels()]


def missing() -> list[str]:
    """Return one line for each thing that is not here, with how to get it."""
    from ..kernels import cpu_library

    absent = [package for package in EXTRAS if version(package) == "none"]
    lines = [f"{package}: pip install 'resnet_fast[{EXTRAS[package]}]'" for package in absent]
    if version("triton") == "none":
        lines.append("triton: comes with torch's CUDA builds on Linux")
    reason = cpu_library.available()
    if reason is not None:
        lines.append(f"kernels for this processor, without which oneDNN runs: {reason}")
    if not torch.cuda.is_available():
        lines.append(
            "a CUDA device: without one the CPU path runs (oneDNN); "
            "GPU kernels are compiled and interpreted in tests only"
        )
    return lines


def run(args: argparse.Namespace) -> int:
    sections = {"machine": machine(), "build": build()}
    kernels, absent = kernel_rows(), missing()
    if args.json:
        json.dump({**sections, "kernels": kernels, "missing": absent}, sys.stdout, indent=1)
        print()
        return 0
    for title, facts in sections.items():
        print(title)
        for key, value in facts.items():
            print(f"  {key:14} {value}")
        print()
    print(table(("kernel", "op", "here"), kernels) + "\n")
    print("missing")
    for line in absent or ["nothing"]:
        print(f"  {line}")
    return 0
