"""Facts of this machine: its processor, its device, the commit; the names of dtypes."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
from pathlib import Path

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def default_device() -> str:
    """cuda where there is one, else cpu; asks the driver only, so it starts no CUDA context."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_or_error(name: str) -> torch.device:
    """The device, or ValueError with what to do when this machine has none of it."""
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"--device: got {name}, expected cpu or cuda")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"--device {name}: this machine shows no CUDA device to torch {torch.__version__}; use --device cpu"
        )
    return device


def machine() -> dict[str, str]:
    """What a measurement should be read beside: processor, GPU, versions."""
    found = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": cpu_name(),
        "threads": str(torch.get_num_threads()),
        "cpu isa": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "cuda (torch)": torch.version.cuda or "none",
        "triton": version("triton"),
        "gpu": "none",
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = (
            f"{properties.name}, compute {properties.major}.{properties.minor}, {properties.multi_processor_count} SMs, "
            f"{properties.total_memory / 2**30:.0f} GiB"
        )
    return found


def cpu_name() -> str:
    """The processor's name as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def version(package: str) -> str:
    """Installed version, or "none"; imports nothing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def commit() -> str:
    """The checked-out commit of this package's own repository, short, or "unknown" (an installed package)."""
    root = Path(__file__).parents[2]
    git = shutil.which("git")
    if git is None or not (root / ".git").exists():
        return "unknown"

    def ask(*words: str) -> str | None:
        done = subprocess.run([git, "-C", str(root), *words], capture_output=True, text=True)
        return None if done.returncode else done.stdout.strip()  # it may distrust a checkout of another user's

    head, changed = ask("rev-parse", "--short=10", "HEAD"), ask("status", "--porcelain", "-uno")
    return "unknown" if head is None or changed is None else head + ("+" if changed else "")
