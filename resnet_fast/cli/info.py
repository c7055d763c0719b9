"""``info``: this machine, this build, the kernels, and how to get what is missing."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from ..util.machine import machine, version
from ..util.text import table

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
    """What setup.py recorded when it built the extensions, or why there are none; and whether the CPU kernels run here."""
    from ..kernels import cpu_library

    record = Path(__file__).parents[1] / "_build.json"
    recorded = json.loads(record.read_text()) if record.is_file() else {"extension": "not built"}
    why_not = cpu_library.available()
    left = (
        ""
        if why_not or not cpu_library.onednn_has_amx()
        else "; bfloat16 convolutions are left to oneDNN, which has AMX here"
    )
    return {**recorded, "cpu kernels": why_not or f"run with {cpu_library.instructions()}{left}"}


def kernel_rows() -> list[tuple[str, str, str]]:
    """(id, op, "ready" or why it cannot run here) of every kernel."""
    from ..dispatch.registry import kernels

    return [(k.id, k.op, k.available() or "ready") for k in kernels()]


def missing() -> list[str]:
    """One line for each thing that is not here and what would bring it."""
    from ..kernels import cpu_library

    lines = [
        f"{package}: pip install 'resnet_fast[{extra}]'"
        for package, extra in EXTRAS.items()
        if version(package) == "none"
    ]
    if version("triton") == "none":
        lines.append("triton: comes with torch's CUDA builds on Linux")
    if (why := cpu_library.available()) is not None:
        lines.append(f"kernels for this processor, without which oneDNN runs: {why}")
    if not torch.cuda.is_available():
        lines.append(
            "a CUDA device: without one the CPU path runs (oneDNN); GPU kernels are compiled and interpreted in tests only"
        )
    return lines


def run(args: argparse.Namespace) -> int:
    facts = {"machine": machine(), "build": build(), "kernels": kernel_rows(), "missing": missing()}
    if args.json:
        json.dump(facts, sys.stdout, indent=1)
        print()
        return 0
    for title in ("machine", "build"):
        print(f"{title}\n" + "\n".join(f"  {key:14} {value}" for key, value in facts[title].items()) + "\n")
    print(table(("kernel", "op", "here"), facts["kernels"]) + "\n")
    print("missing\n" + "\n".join(f"  {line}" for line in facts["missing"] or ["nothing"]))
    return 0
