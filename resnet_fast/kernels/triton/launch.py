"""Shared by every Triton launch: where it can run, what it declines, layouts of results, compile options."""

from __future__ import annotations

import functools
import os
import shutil
import sysconfig
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path

import torch
import triton
from torch import Tensor

from ...dispatch.problem import Problem
from .. import vendor

INTERPRETED = triton.knobs.runtime.interpret
if INTERPRETED:
    from .interpreter_fixes import install

    install()
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Device code counts rows (pixels) and the offsets inside one image in 32 bits; offsets of whole tensors are 64-bit. The
# margin is what a block may count past the last row: under 2²⁴ for any tensor that fits a GPU.
INDEX_LIMIT = 2**31 - 2**24
# FP fusion (a·b+c rounded once) is off so that the GPU rounds as the interpreter does; Triton's own default is about
# to change. The matrix instructions are not touched by it, and the pointwise arithmetic hides behind memory.
OPTIONS = {"enable_fp_fusion": False}
DEPENDENT_LAUNCH = (9, 0)  # the first compute capability with programmatic dependent launch


def sources(*names: str) -> tuple[str, ...]:
    """Paths of the files beside this one that a kernel depends on; this one, its configs and the chips always count."""
    beside = [Path(__file__).with_name(f"{name}.py") for name in ("launch", "gemm_config", *names)]
    chips = Path(__file__).parents[2] / "roofline" / "chips.py"
    return tuple(map(str, (*beside, chips)))


def available() -> str | None:
    """Why Triton cannot run here, or None."""
    if INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return (
            "there is no CUDA device, and TRITON_INTERPRET=1 was not set before triton was imported"
        )
    if not (os.environ.get("CC") or shutil.which("clang") or shutil.which("gcc")):
        return "Triton builds its launchers with a C compiler, and neither CC nor clang nor gcc is to be found"
    include = sysconfig.get_path("include")
    listed = [include, os.environ.get("CPATH", ""), os.environ.get("C_INCLUDE_PATH", "")]
    folders = os.pathsep.join(listed).split(os.pathsep)
    if not any(Path(folder, "Python.h").is_file() for folder in folders):
        return (
            f"Triton builds its launchers against Python.h, which is not in {include}: "
            "install Python's headers (python3-dev)"
        )
    return None


def declines(problem: Problem) -> str | None:
    """Why no Triton kernel takes the problem (dtype, device before sm_80, layout, size), or None."""
    if problem.dtype not in DTYPES:
        return f"the Triton kernels take float32, float16 and bfloat16, not {str(problem.dtype).removeprefix('torch.')}"
    if problem.device != "cuda" and not INTERPRETED:
        return f"the Triton kernels run on CUDA tensors, not on {problem.device}"
    if problem.capability is not None and problem.capability < (8, 0):
        have = ".".join(map(str, problem.capability))
        return f"the Triton kernels need compute capability 8.0, this GPU has {have}"
    return nhwc_or_why(problem) or _too_large(problem)


def nhwc_or_why(problem: Problem) -> str | None:
    """Why the problem's tensors are not all NHWC, or None."""
    if problem.layout != "nhwc":
        return f"the Triton kernels want NHWC (channels_last), the input is {problem.layout}"
    if problem.residual not in (None, "nhwc"):
        return f"the Triton kernels want every tensor in NHWC (channels_last), the second one is {problem.residual}"
    return None


def _too_large(problem: Problem) -> str | None:
    n, c, *hw = problem.x
    rows = n * max(prod(hw), prod(problem.out_hw))
    image = c * prod(size + 2 * p for size, p in zip(hw, problem.padding, strict=True))
    filters = prod(problem.weight or (0,))
    if max(rows, image, filters) > INDEX_LIMIT:
        return "more than 2³¹ pixels, or an image or filter of more than 2³¹ elements: their indices are 32-bit"
    return None


def capability(x: Tensor) -> tuple[int, int] | None:
    """The compute capability of the GPU that holds ``x``; None in the interpreter."""
    return _capability(x.device) if x.is_cuda else None


def options(x: Tensor) -> dict[str, bool]:
    """The compile options of a kernel that starts with ``dependent_launch.begin(PDL)``, launched where ``x`` is."""
    if (capability(x) or (0, 0)) >= DEPENDENT_LAUNCH:
        return {**OPTIONS, "PDL": True, "launch_pdl": True}
    return {**OPTIONS, "PDL": False}


_capability = functools.cache(torch.cuda.get_device_capability)


def nhwc(t: Tensor | None) -> Tensor | None:
    """``t`` in dense NHWC: itself in the usual case, a copy of a filter or gradient that came otherwise."""
    return None if t is None else t.contiguous(memory_format=torch.channels_last)


def result_like(*inputs: Tensor) -> Tensor:
    """Empty NHWC memory for an elementwise result, with the strides eager gives where NHWC and NCHW coincide."""
    plain = all(t.is_contiguous() for t in inputs)
    return torch.empty(
        inputs[0].shape,
        dtype=inputs[0].dtype,
        device=inputs[0].device,
        memory_format=torch.contiguous_format if plain else torch.channels_last,
    )


def dense_vectors(vectors: tuple) -> tuple:
    """(scale, shift, mean, var, eps) with contiguous per-channel vectors."""
    return tuple(v.contiguous() if isinstance(v, Tensor) else v for v in vectors)


def conv_result(
    x: Tensor, weight: Tensor, out_hw: Sequence[int]
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """NHWC memory for a convolution's result, and a function that gives the filled result ``F.conv2d``'s strides.

    It changes nothing, except where one channel or one pixel makes ``x`` NCHW as well and torch answers in NCHW.
    """
    shape = x.shape[0], weight.shape[0], *out_hw
    answers_nhwc = vendor.nhwc(x) or vendor.nhwc(weight)
    one_order = shape[1] == 1 or prod(out_hw) == 1  # NHWC and NCHW are the same memory
    strides = torch.channels_last if answers_nhwc or not one_order else torch.contiguous_format
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=strides)
    return out, _unchanged if answers_nhwc else Tensor.contiguous


def _unchanged(t: Tensor) -> Tensor:
    return t
