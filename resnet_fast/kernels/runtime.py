"""CUDA files built at run time, for experiments: nvcc and ninja through torch's own loader, errors shown with the user's line."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import torch

# torch's loader turns the 16-bit types' operators and conversions off, which its own headers need and a plain kernel misses.
FLAGS = ["-O3", "-lineinfo", "-std=c++17", *(f"-U__CUDA_NO_{what}__" for what in (
    "HALF_OPERATORS", "HALF_CONVERSIONS", "HALF2_OPERATORS", "BFLOAT16_CONVERSIONS"))]


def available() -> str | None:
    """Why a .cu file cannot be built and run here, or None."""
    missing = [name for name in ("nvcc", "ninja") if shutil.which(name) is None]
    if missing:
        return f"{' and '.join(missing)} not on PATH (ninja: pip install ninja; nvcc: NVIDIA's CUDA toolkit)"
    return None if torch.cuda.is_available() else "there is no CUDA device"


@functools.cache
def build(source: Path) -> ModuleType:
    """The pybind11 module of one .cu file, built now or, if nothing changed, taken from torch's extension cache.

    Raises RuntimeError with the compiler's messages, which name file and line. Without a GPU it compiles for TORCH_CUDA_ARCH_LIST or 8.0.
    """
    os.environ.setdefault("CUDA_HOME", cuda_home())
    if not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0")
    from torch.utils import cpp_extension  # reads CUDA_HOME when it is imported
    cpp_extension.CUDA_HOME = os.environ["CUDA_HOME"]
    try:
        return cpp_extension.load(f"resnet_fast_{source.stem}", [str(source)], extra_cuda_cflags=FLAGS)
    except RuntimeError as error:
        wanted = [line for line in str(error).splitlines() if re.search(r"error|warning|\^", line)]
        raise RuntimeError(f"{source.name} does not build:\n" + "\n".join(wanted or [str(error)])) from None


def cuda_home() -> str:
    """The toolkit's folder as nvcc itself tells it: the nvcc on PATH may be a wrapper that lies elsewhere."""
    dry = subprocess.run(["nvcc", "-dryrun", "-x", "cu", "-E", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"TOP=(\S+)", dry)
    return str(Path(top[1]).resolve()) if top else str(Path(shutil.which("nvcc")).resolve().parents[1])
