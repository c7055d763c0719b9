"""Facts of this machine: its processor, its device, the commit; the names of dtypes."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
from pathlib import Path

import torch

# torch's names, as options, plans and journals spell them; and the short ones of benchmarks and the ledger.
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
SHORT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def default_device() -> str:
    """Return cuda where there is one, else cpu; asks the driver only, so it starts no CUDA context."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_or_error(name: str) -> torch.device:
    """Return the device; raises ValueError with what to do if this machine has none of it."""
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"--device: got {name}, expected cpu or cuda")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"--device {name}: this machine shows no CUDA device to torch {torch.__version__}; use --device cpu"
        )
    return device


def machine() -> dict[str, str]:
    """Return the facts that a measurement depends on: processor, GPU, versions."""
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": cpu_name(),
        "threads": str(torch.get_num_threads()),
        "cpu isa": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "cuda (torch)": torch.version.cuda or "none",
        "triton": version("triton"),
        "gpu": _gpu() if torch.cuda.is_available() else "none",
    }


def _gpu() -> str:
    found = torch.cuda.get_device_properties(0)
    capability = f"{found.major}.{found.minor}"
    memory = found.total_memory / 2**30
    return (
        f"{found.name}, compute {capability}, {found.multi_processor_count} SMs, {memory:.0f} GiB"
    )


def cpu_name() -> str:
    """Return the processor's name as the system reports it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def version(package: str) -> str:
    """Return the installed version, or "none"; imports nothing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def commit() -> str:
    """Return the checked-out commit of this package's repository, short, "+" if files differ; else "unknown"."""
    root = Path(__file__).parents[2]
    git = shutil.which("git")
    is_checkout = git is not None and (root / ".git").exists()
    head = _output(git, "-C", str(root), "rev-parse", "--short=10", "HEAD") if is_checkout else None
    changed = (
        _output(git, "-C", str(root), "status", "--porcelain", "-uno") if is_checkout else None
    )
    if head is None or changed is None:
        return "unknown"
    return f"{head}+" if changed else head


def _output(*command: str) -> str | None:
    """Return what a command prints; None if it fails, as git does in another user's checkout."""
    done = subprocess.run(command, capture_output=True, text=True)
    return None if done.returncode else done.stdout.strip()
