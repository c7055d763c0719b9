"""CUDA files built at run time, for experiments: nvcc and ninja by torch's loader, errors with the user's line.

A .cu file that includes ``resnet_fast_kernel.h`` (in ``include/``) is a kernel of ``conv_bn_act``, which ``load_file``
registers. For another op or signature ``build`` returns the compiled module, for use in a .py file with @kernel.
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

from ..dispatch import Kernel, Problem, conv_out_hw, find, kernel, nhwc_or_why
from ..ops import reference

INCLUDE = Path(__file__).parent / "include"
HEADER = INCLUDE / "resnet_fast_kernel.h"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# torch's loader turns off operators and conversions of the 16-bit types; a plain kernel needs them.
_NEEDED = ("HALF_OPERATORS", "HALF_CONVERSIONS", "HALF2_OPERATORS", "BFLOAT16_CONVERSIONS")
FLAGS = ["-O3", "-lineinfo", "-std=c++17", *(f"-U__CUDA_NO_{name}__" for name in _NEEDED)]


def search_path() -> str:
    """PATH, then the folder of this Python: pip installs ninja there, and the environment may not be activated."""
    return os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])


def missing() -> str | None:
    """Why a .cu file cannot be built here, or None."""
    names = [name for name in ("nvcc", "ninja") if shutil.which(name, path=search_path()) is None]
    if not names:
        return None
    return (
        f"{' and '.join(names)} not on PATH (ninja: pip install ninja; nvcc: NVIDIA's CUDA toolkit)"
    )


def available() -> str | None:
    """Why a .cu file cannot be built and run here, or None."""
    return missing() or (None if torch.cuda.is_available() else "there is no CUDA device")


@functools.cache
def build(source: Path) -> ModuleType:
    """The pybind11 module of one .cu file, built now or taken from torch's extension cache if nothing changed.

    Raises ImportError with the compiler's messages and their source lines, or with what is missing. Without a GPU it
    compiles for TORCH_CUDA_ARCH_LIST or 8.0.
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
            f"resnet_fast_{source.stem}",
            [str(source)],
            extra_cuda_cflags=FLAGS,
            extra_include_paths=[str(INCLUDE)],
        )
    except RuntimeError as error:
        raise ImportError(f"{source.name} does not build:\n{messages(str(error))}") from None


def messages(log: str) -> str:
    """The errors of a build log, each with the source lines that the compiler shows below it; the whole log if none."""
    found: list[str] = []
    in_error = False
    for line in log.splitlines():
        in_error = _starts_error(line) or in_error and not re.search(_ENDS_ERROR, line)
        if in_error:
            found.append(line)
    return "\n".join(found) or log


_ENDS_ERROR = r"\b(warning|FAILED|ninja)\b|errors? detected|^\S+\(\d+\)|^$"


def _starts_error(line: str) -> bool:
    if line.startswith(("ninja:", "FAILED:", "Error building")):
        return False
    return re.search(r"\b(error|undefined reference)\b", line) is not None


def cuda_home() -> str:
    """The toolkit's folder as nvcc itself prints it: the nvcc on PATH may be a wrapper elsewhere."""
    command = ["nvcc", "-dryrun", "-x", "cu", "-E", os.devnull]
    dry = subprocess.run(command, capture_output=True, text=True).stderr
    top = re.search(r"TOP=(\S+)", dry)
    return (
        str(Path(top[1]).resolve()) if top else str(Path(shutil.which("nvcc")).resolve().parents[1])
    )


# ---------------------------------------------------------------- a .cu file as a kernel


def load_file(path: Path) -> list[Kernel]:
    """Build and register a .cu file that ends in RESNET_FAST_KERNEL. Raises ImportError if it does neither."""
    module = build(path)
    if not hasattr(module, "id"):
        raise ImportError(
            f"{path.name} names no kernel: include resnet_fast_kernel.h and end in "
            "RESNET_FAST_KERNEL(id, supports, launch)"
        )
    return [register(module, path, cannot_run)]


def cannot_run() -> str | None:
    """Why a file that was built cannot run, or None."""
    return None if torch.cuda.is_available() else "it builds, but there is no CUDA device"


def register(module: ModuleType, path: Path, available, device: str = "cuda") -> Kernel:
    """Register the module's kernel under its own id, for dense NHWC tensors on ``device``."""

    def supports(problem: Problem) -> str | None:
        if problem.device != device or problem.dtype not in DTYPES:
            return f"it runs on {device} tensors in float32, float16 and bfloat16"
        why = nhwc_or_why(problem)
        if why is not None:
            return why
        sizes = _sizes(problem.x, problem.weight, problem.out_hw)
        geometry = (*problem.stride, *problem.padding, *problem.dilation, problem.groups)
        relu = problem.act == "relu"
        residual = problem.residual is not None
        no_pointers, no_stream = [0] * 6, 0
        return (
            module.declines(
                no_pointers, sizes, geometry, relu, residual, _name(problem.dtype), no_stream
            )
            or None
        )

    @kernel(
        module.id,
        op="conv_bn_act",
        supports=supports,
        available=available,
        sources=(str(path), str(HEADER)),
    )
    def run(
        x, weight, scale, shift, residual, mean, var, eps, stride, padding, dilation, groups, act
    ) -> Tensor:
        hw = conv_out_hw(x.shape, weight.shape, stride, padding, dilation)
        filters = weight.contiguous(memory_format=torch.channels_last)
        affine = reference.affine(scale, shift, mean, var, eps)
        scale, shift = (vector.float().contiguous() for vector in affine)
        shape = x.shape[0], weight.shape[0], *hw
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        tensors = (x, filters, scale, shift, residual, out)
        pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        sizes = _sizes(x.shape, weight.shape, hw)
        geometry = (*stride, *padding, *dilation, groups)
        stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
        module.launch(
            pointers, sizes, geometry, act == "relu", residual is not None, _name(x.dtype), stream
        )
        return out

    return find(module.id)


def _sizes(x: Sequence[int], weight: Sequence[int], out_hw: Sequence[int]) -> list[int]:
    """n, c, h, w, k, r, s, out_h, out_w."""
    return [*x, weight[0], *weight[2:], *out_hw]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
