"""The C++/CUDA kernels of ``csrc``, as built into ``resnet_fast._C``. The only importer of the extension.

Importing this module loads no library: the extension comes in with the first call, and registers its ops in torch's
namespace ``resnet_fast_native``. Layout, formula and floor of each kernel stand at the head of its ``csrc/cuda/*.cu``.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from ..dispatch import Problem, kernel

BUILD = "RESNET_FAST_BUILD=cuda pip install --force-reinstall --no-deps -v . (in the source folder)"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
RECORD = Path(__file__).parents[1] / "_build.json"

# The record holds the hash of csrc, the compiler and its targets: what the kernels are made of. A wheel has no csrc.
SOURCES = (str(RECORD),) if RECORD.is_file() else ()


@functools.cache
def extension() -> ModuleType:
    """The extension: ``kernels()`` names its kernels, ``attributes(name)`` tells their registers and occupancy."""
    from .. import _C
    return _C


@functools.cache
def _op(name: str):
    extension()
    return getattr(torch.ops.resnet_fast_native, name).default


def available() -> str | None:
    """Why the extension cannot run here, or None; looks for it without loading it."""
    if importlib.util.find_spec("resnet_fast._C") is None:
        why = json.loads(RECORD.read_text())["why"] if RECORD.is_file() else "no build record"
        return f"the CUDA extension is not built ({why}): {BUILD}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build"
    return None if torch.cuda.is_available() else "there is no CUDA device"


def declines(problem: Problem) -> str | None:
    """What no kernel of csrc takes: other devices, other dtypes, chips older than sm_80."""
    if problem.device != "cuda":
        return f"the C++ kernels run on CUDA tensors, not on {problem.device}"
    if problem.dtype not in DTYPES:
        return f"the C++ kernels take float32, float16 and bfloat16, not {str(problem.dtype).removeprefix('torch.')}"
    if problem.capability < (8, 0):
        return "the C++ kernels need compute capability 8.0, this GPU has {}.{}".format(*problem.capability)
    return None


def _add_act_supports(problem: Problem) -> str | None:
    if problem.gate and problem.layout != "nhwc":
        return f"the gated form wants NHWC (channels_last), the input is {problem.layout}"
    if problem.layout == "strided" or problem.residual != problem.layout:
        return f"it wants both tensors dense in one layout, they are {problem.layout} and {problem.residual}"
    return declines(problem)


@kernel("native.add_act", op="add_act", supports=_add_act_supports, available=available, sources=SOURCES)
def add_act(x: Tensor, y: Tensor, gate: Tensor | None, act: str) -> Tensor:
    return _op("add_act")(x, y, gate if gate is None else gate.contiguous(), act == "relu")


@kernel("native.add_act_backward", op="add_act_backward", supports=_add_act_supports, available=available,
        sources=SOURCES)
def add_act_backward(dout: Tensor, out: Tensor, x: Tensor | None, gate: Tensor | None,
                     act: str) -> tuple[Tensor, Tensor, Tensor]:
    if gate is None:
        return _op("add_act_backward")(dout, out, act == "relu"), dout.new_empty(0), dout.new_empty(0)
    x = x.contiguous(memory_format=torch.channels_last)  # a Problem does not tell x's layout; its gradient follows dout
    dx, dy, dgate = _op("add_act_gate_backward")(dout, out, x, gate.contiguous(), act == "relu")
    return dy, dx, dgate


def fold_bn(weight: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor, eps: float,
            out: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Filter times scale, channels_last, and bias β − mean·scale, in one launch; scale is γ/√(var + eps).

    weight [K, C, R, S] on a CUDA device with any strides, float32, float16 or bfloat16; ``out`` another of these only
    for a float32 weight; the four vectors [K], contiguous, one dtype. Arithmetic in float32.
    """
    return _op("fold_bn")(weight, gamma, beta, mean, var, eps, out)
