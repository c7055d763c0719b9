"""CUDA files built at run time, for experiments: nvcc and ninja through torch's own loader, errors shown with the user's line.

A .cu file that includes ``resnet_fast_kernel.h`` (``include/`` beside this) is a kernel of ``conv_bn_act`` by itself: ``load_file``.
For another op, or a signature of one's own, ``build`` gives a .py file with @kernel the compiled module.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from ..dispatch.registry import Kernel, Problem, find, kernel
from ..ops import reference

INCLUDE = Path(__file__).parent / "include"
HEADER = INCLUDE / "resnet_fast_kernel.h"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# torch's loader turns the 16-bit types' operators and conversions off, which its own headers need and a plain kernel misses.
FLAGS = [
    "-O3",
    "-lineinfo",
    "-std=c++17",
    *(
        f"-U__CUDA_NO_{what}__"
        for what in ("HALF_OPERATORS", "HALF_CONVERSIONS", "HALF2_OPERATORS", "BFLOAT16_CONVERSIONS")
    ),
]


def search_path() -> str:
    """PATH, and after it the folder of this Python: there pip puts ninja, also for those who did not activate the environment."""
    return os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])


def missing() -> str | None:
    """Why a .cu file cannot be built here, or None."""
    names = [name for name in ("nvcc", "ninja") if shutil.which(name, path=search_path()) is None]
    return (
        f"{' and '.join(names)} not on PATH (ninja: pip install ninja; nvcc: NVIDIA's CUDA toolkit)" if names else None
    )


def available() -> str | None:
    """Why a .cu file cannot be built and run here, or None."""
    return missing() or (None if torch.cuda.is_available() else "there is no CUDA device")


@functools.cache
def build(source: Path) -> ModuleType:
    """The pybind11 module of one .cu file, built now or, if nothing changed, taken from torch's extension cache.

    Raises ImportError with the compiler's messages and the lines they are about, or with what is missing. Without a GPU it compiles for
    TORCH_CUDA_ARCH_LIST or 8.0.
    """
    if missing():
        raise ImportError(f"{source.name} cannot be built: {missing()}")
    os.environ["PATH"] = search_path()
    os.environ.setdefault("CUDA_HOME", cuda_home())
    if not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0")
    from torch.utils import cpp_extension  # reads CUDA_HOME when it is imported

    cpp_extension.CUDA_HOME = os.environ["CUDA_HOME"]
    try:
        return cpp_extension.load(
            f"resnet_fast_{source.stem}", [str(source)], extra_cuda_cflags=FLAGS, extra_include_paths=[str(INCLUDE)]
        )
    except RuntimeError as error:
        raise ImportError(f"{source.name} does not build:\n{messages(str(error))}") from None


def messages(log: str) -> str:
    """The errors of a build log, each with the source lines that the compiler shows below it; all of it where there is none."""
    found: list[str] = []
    for line in log.splitlines():
        starts = re.search(r"\b(error|undefined reference)\b", line) and not line.startswith(
            ("ninja:", "FAILED:", "Error building")
        )
        inside = (
            found and found[-1] and not re.search(r"\b(warning|FAILED|ninja)\b|errors? detected|^\S+\(\d+\)|^$", line)
        )
        if starts or inside:
            found.append(line)
        elif found and found[-1]:
            found.append("")
    return "\n".join(line for line in found if line) or log


def cuda_home() -> str:
    """The toolkit's folder as nvcc itself tells it: the nvcc on PATH may be a wrapper that lies elsewhere."""
    dry = subprocess.run(["nvcc", "-dryrun", "-x", "cu", "-E", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"TOP=(\S+)", dry)
    return str(Path(top[1]).resolve()) if top else str(Path(shutil.which("nvcc")).resolve().parents[1])


# ---------------------------------------------------------------- a .cu file as a kernel


def load_file(path: Path) -> list[Kernel]:
    """Build a .cu file that says RESNET_FAST_KERNEL and register it; raises ImportError if it does not build or does not say it."""
    module = build(path)
    if not hasattr(module, "id"):
        raise ImportError(
            f"{path.name} names no kernel: include resnet_fast_kernel.h and end in RESNET_FAST_KERNEL(id, supports, launch)"
        )
    return [register(module, path, cannot_run)]


def cannot_run() -> str | None:
    """Why a file that was built does not run, or None."""
    return None if torch.cuda.is_available() else "it builds, but there is no CUDA device"


def register(module: ModuleType, path: Path, available, device: str = "cuda") -> Kernel:
    """The module's kernel under its own id, for dense NHWC tensors on ``device``."""

    def supports(problem: Problem) -> str | None:
        if problem.device != device or problem.dtype not in DTYPES:
            return f"it runs on {device} tensors in float32, float16 and bfloat16"
        if problem.layout != "nhwc" or problem.residual not in (None, "nhwc"):
            return f"it wants NHWC (channels_last), input and residual are {problem.layout} and {problem.residual}"
        how = (*problem.stride, *problem.padding, *problem.dilation, problem.groups)
        return (
            module.declines(
                [0] * 6,
                _sizes(problem.x, problem.weight, problem.out_hw),
                how,
                problem.act == "relu",
                problem.residual is not None,
                _name(problem.dtype),
                0,
            )
            or None
        )

    @kernel(module.id, op="conv_bn_act", supports=supports, available=available, sources=(str(path), str(HEADER)))
    def run(x, weight, scale, shift, residual, mean, var, eps, stride, padding, dilation, groups, act) -> Tensor:
        hw = [
            (size + 2 * p - d * (r - 1) - 1) // s + 1
            for size, p, d, r, s in zip(x.shape[2:], padding, dilation, weight.shape[2:], stride, strict=True)
        ]
        filters = weight.contiguous(memory_format=torch.channels_last)
        scale, shift = (v.float().contiguous() for v in reference.affine(scale, shift, mean, var, eps))
        out = torch.empty(
            (x.shape[0], weight.shape[0], *hw), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
        )
        pointers = [0 if t is None else t.data_ptr() for t in (x, filters, scale, shift, residual, out)]
        stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
        module.launch(
            pointers,
            _sizes(x.shape, weight.shape, hw),
            (*stride, *padding, *dilation, groups),
            act == "relu",
            residual is not None,
            _name(x.dtype),
            stream,
        )
        return out

    return find(module.id)


def _sizes(x: Sequence[int], weight: Sequence[int], out_hw: Sequence[int]) -> list[int]:
    """n, c, h, w, k, r, s, out_h, out_w."""
    return [*x, weight[0], *weight[2:], *out_hw]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
