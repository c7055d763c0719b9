"""The C++ kernels of ``csrc/cpu`` for processors with AVX-512 or AVX2. The only loader of ``resnet_fast._cpu``.

They are what runs on a CPU where they win, measured against oneDNN's packed convolution with ReLU on an AMD EPYC with AVX-512, two
threads, November 2026: ``cpu.winograd`` 2.0 to 2.5 times its speed in float32 for 64 to 256 channels, 1.4 to 1.7 for 512; in bfloat16 1.1 to
1.35. ``cpu.conv`` in float32 and bfloat16: 1×1 1.04 to 1.3 and 1.1 to 1.5; 3×3 of stride 2 0.96 to 1.1 and 1.03 to 1.5; 3×3 of 512 channels in
bfloat16 1.04 to 1.4, where ``cpu.winograd`` has 0.8 to 1.08; the stem of 7×7 1.1 and 1.4 to 2.0; bfloat16 only where the
processor multiplies it, and not where oneDNN has AMX, on which nothing was measured. ``cpu.bn_act`` and its backward together 1.2 to 1.3
times the speed of torch's batch norm, ReLU and add in a step of a ResNet-50 at batch 8, all of them at the speed of memory. Importing this
module loads no library: it comes in with the first question.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..dispatch.registry import Problem, kernel
from . import aten, prepack

BUILD = "pip install --force-reinstall --no-deps -v . (in the source folder, with a C++ compiler)"
PACKAGE = Path(__file__).parents[1]
RECORD = PACKAGE / "_build.json"
# As csrc/cpu/library.cpp defines its ops: a library that was built before an edit of them is recognised by these.
SCHEMAS = {
    "panel": "() -> int",
    "takes_bf16": "() -> bool",
    "onednn_has_amx": "() -> bool",
    "instructions": "() -> str",
    "same_bytes": "(Tensor places) -> bool",
    "winograd_filters": "(Tensor weight) -> Tensor",
    "winograd": "(Tensor x, Tensor filters, Tensor bias, Tensor? residual, Tensor(a!) out, bool relu) -> bool",
    "conv_filters": "(Tensor weight) -> Tensor",
    "conv": "(Tensor x, Tensor filters, Tensor bias, Tensor? residual, Tensor(a!) out, int[2] size, int stride, int padding, bool relu) -> ()",
    "bn_act": "(Tensor x, Tensor weight, Tensor bias, Tensor? residual, Tensor(a!) y, Tensor(b!) mean, Tensor(c!) var, float eps, bool relu) "
    "-> ()",
    "bn_act_backward": "(Tensor dy, Tensor x, Tensor y, Tensor weight, Tensor mean, Tensor var, Tensor(a!) dx, Tensor(b!) dweight, "
    "Tensor(c!) dbias, Tensor(d!)? dresidual, float eps, bool relu) -> ()",
}
LARGEST = 2.0**32  # of a filter's elements: with an input below 2^64 nothing on the way to the sum overflows


@functools.cache
def available() -> str | None:
    """Why these kernels cannot run here, or None; loads the library."""
    library = max(
        PACKAGE.glob("_cpu.*.so"), key=lambda built: built.stat().st_mtime, default=None
    )  # one for each Python in a source folder
    if library is None:
        record = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
        why = (
            f"_cpu was built, but is not in {PACKAGE}"
            if record.get("cpu") == "built"
            else record.get("cpu_why", "no build record")
        )
        return f"the CPU kernels are not built ({why}): {BUILD}"
    try:
        torch.ops.load_library(str(library))
    except OSError as problem:
        return f"{library.name} cannot be loaded with torch {torch.__version__} ({problem}): {BUILD}"
    known = [
        str(schema) for op in SCHEMAS for schema in torch._C._jit_get_schemas_for_operator(f"resnet_fast_cpu::{op}")
    ]
    if known != [f"resnet_fast_cpu::{op}{signature}" for op, signature in SCHEMAS.items()]:
        return f"{library.name} was built from other sources than this package's: {BUILD}"
    return (
        "this processor has neither AVX-512 nor AVX2, or ATEN_CPU_CAPABILITY forbids them"
        if instructions() == "none"
        else None
    )


def instructions() -> str:
    """The instructions that the kernels use on this processor: "AVX-512", "AVX2" or "none"."""
    return torch.ops.resnet_fast_cpu.instructions()


def onednn_has_amx() -> bool:
    """Whether oneDNN multiplies bfloat16 with AMX tiles here (Intel's Sapphire Rapids and later), which no kernel of this file does."""
    return torch.ops.resnet_fast_cpu.onednn_has_amx()


@dataclass(frozen=True)
class Form:
    """A convolution that runs from filters of its own form.

    ``make(folded weight, bias, geometry, input shape)`` is (filters, float32 bias), or None for weights that it cannot take;
    ``run(x, filters, bias, residual, size, geometry, relu, in_place)``, of filters of that size, is the result, in the residual's memory if
    ``in_place`` and it can, or None for an input that it cannot take, which ``aten`` then computes.
    """

    make: prepack.Make
    run: Callable[[Tensor, Tensor, Tensor, Tensor | None, torch.Size, tuple, bool, bool], Tensor | None]
    supports: Callable[[Problem], str | None]
    why: str


def _nhwc(x: Tensor, k: int, size: torch.Size, geometry: tuple) -> Tensor:
    n, _, *hw = x.shape
    (stride, _), (padding, _), _, _ = geometry
    sizes = n, k, *((i + 2 * padding - r) // stride + 1 for i, r in zip(hw, size, strict=True))
    return torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _declines(problem: Problem) -> str | None:
    """What no kernel of csrc/cpu takes: other devices, other dtypes."""
    if problem.device != "cpu":
        return f"it runs on a CPU, not on {problem.device}"
    if problem.dtype not in (torch.float32, torch.bfloat16):
        return f"it takes float32 and bfloat16, not {str(problem.dtype).removeprefix('torch.')}"
    return None


def _supports(problem: Problem) -> str | None:
    if (why := _declines(problem)) is not None:
        return why
    if (
        (problem.dilation, problem.groups) != ((1, 1), 1)
        or problem.stride[0] != problem.stride[1]
        or problem.padding[0] != problem.padding[1]
    ):
        return "it takes one stride and one padding for height and width, without dilation and groups"
    if problem.weight[0] % (panel := torch.ops.resnet_fast_cpu.panel()):
        return f"it wants a multiple of {panel} filters, got {problem.weight[0]}"
    if problem.layout != "nhwc" or problem.residual not in (None, "nhwc"):
        return f"it wants NHWC (channels_last), the input is {problem.layout}, the residual {problem.residual}"
    return "the input is empty, or smaller than the filters" if 0 in problem.x or min(problem.out_hw) < 1 else None


# ---------------------------------------------------------------- 3×3 by Winograd's minimal filtering


def winograd_filters(weight: Tensor, bias: Tensor, geometry: tuple, shape: torch.Size) -> tuple[Tensor, Tensor] | None:
    if not weight.abs().amax() < LARGEST:  # nor NaN
        return None
    return torch.ops.resnet_fast_cpu.winograd_filters(weight.float()), bias.float()


def run_winograd(
    x: Tensor,
    filters: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    size: torch.Size,
    geometry: tuple,
    relu: bool,
    in_place: bool,
) -> Tensor | None:
    """None where x holds a NaN, an infinity or more than 2^64: within a tile they would spread. So the residual is left whole."""
    out = _nhwc(x, len(bias), size, geometry)
    return out if torch.ops.resnet_fast_cpu.winograd.default(x, filters, bias, residual, out, relu) else None


def _winograd_supports(problem: Problem) -> str | None:
    if (problem.weight[2:], problem.stride, problem.padding) != ((3, 3), (1, 1), (1, 1)):
        return "it takes 3×3 filters with padding 1 and stride 1"
    return f"it wants a multiple of 16 channels, got {problem.x[1]}" if problem.x[1] % 16 else _supports(problem)


@kernel("cpu.winograd", op="conv_bn_act", supports=_winograd_supports, available=available)
def winograd(x, weight, scale, shift, residual, mean, var, eps, stride, padding, dilation, groups, act) -> Tensor:
    return _from_packs(
        FORMS["cpu.winograd"], x, weight, scale, shift, residual, mean, var, eps, stride, padding, dilation, groups, act
    )


# ---------------------------------------------------------------- any size as a product of pixels, or what each sees, and filters


def conv_filters(weight: Tensor, bias: Tensor, geometry: tuple, shape: torch.Size) -> tuple[Tensor, Tensor]:
    return torch.ops.resnet_fast_cpu.conv_filters(weight), bias.float()


def run_conv(
    x: Tensor,
    filters: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    size: torch.Size,
    geometry: tuple,
    relu: bool,
    in_place: bool,
) -> Tensor:
    (stride, _), (padding, _), _, _ = geometry
    out = residual if in_place else _nhwc(x, len(bias), size, geometry)
    torch.ops.resnet_fast_cpu.conv.default(x, filters, bias, residual, out, size, stride, padding, relu)
    return out


def _conv_supports(problem: Problem) -> str | None:
    if problem.dtype == torch.bfloat16 and not torch.ops.resnet_fast_cpu.takes_bf16():
        return "this processor does not multiply bfloat16"
    return _supports(problem)


@kernel("cpu.conv", op="conv_bn_act", supports=_conv_supports, available=available)
def conv(x, weight, scale, shift, residual, mean, var, eps, stride, padding, dilation, groups, act) -> Tensor:
    return _from_packs(
        FORMS["cpu.conv"], x, weight, scale, shift, residual, mean, var, eps, stride, padding, dilation, groups, act
    )


FORMS = {
    "cpu.winograd": Form(winograd_filters, run_winograd, _winograd_supports, "a third of the sum's products"),
    "cpu.conv": Form(conv_filters, run_conv, _conv_supports, "bias, residual and ReLU in registers"),
}


def _from_packs(
    form: Form, x, weight, scale, shift, residual, mean, var, eps, stride, padding, dilation, groups, act
) -> Tensor:
    packs = prepack.packable(weight, scale, shift, mean, var)
    pack = (
        prepack.packed(x, weight, scale, shift, mean, var, eps, stride, padding, dilation, groups, form.make)
        if packs
        else None
    )
    out = (
        None
        if pack is None
        else form.run(x, *pack, residual, weight.shape[2:], (stride, padding, dilation, groups), act == "relu", False)
    )
    if out is None:
        return aten.conv_bn_act(
            x, weight, scale, shift, residual, mean, var, eps, stride, padding, dilation, groups, act
        )
    return out if aten.nhwc(x) or aten.nhwc(weight) else out.contiguous()


# ---------------------------------------------------------------- training batch norm


def _bn_supports(problem: Problem) -> str | None:
    if problem.layout != "nhwc" or problem.op == "bn_act" and problem.residual not in (None, "nhwc"):
        return f"it wants NHWC (channels_last), input and residual are {problem.layout} and {problem.residual}"
    return "the batch is empty" if 0 in problem.x else _declines(problem)


@kernel("cpu.bn_act", op="bn_act", supports=_bn_supports, available=available)
def bn_act(x, weight, bias, residual, eps, act) -> tuple[Tensor, Tensor, Tensor]:
    weight, bias = _plain(weight), _plain(bias)
    y, mean, var = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
    torch.ops.resnet_fast_cpu.bn_act.default(x, weight, bias, residual, y, mean, var, eps, act == "relu")
    return y, mean, var


@kernel("cpu.bn_act_backward", op="bn_act_backward", supports=_bn_supports, available=available)
def bn_act_backward(dy, x, y, weight, mean, var, eps, act, residual) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gamma = _plain(weight)
    dx, dweight, dbias = torch.empty_like(x), torch.empty_like(gamma), torch.empty_like(gamma)
    dresidual = torch.empty_like(x) if residual else None
    dy, y = (
        dy.contiguous(memory_format=torch.channels_last),
        y.contiguous(memory_format=torch.channels_last),
    )  # a Problem tells of x alone
    torch.ops.resnet_fast_cpu.bn_act_backward.default(
        dy, x, y, gamma, _plain(mean), _plain(var), dx, dweight, dbias, dresidual, eps, act == "relu"
    )
    return dx, dweight.to(weight.dtype), dbias.to(weight.dtype), dresidual if residual else x.new_empty(0)


def _plain(vector: Tensor) -> Tensor:
    """Float32 without gaps: itself in the usual case."""
    return vector if vector.dtype == torch.float32 and vector.is_contiguous() else vector.float().contiguous()


# ---------------------------------------------------------------- which of them a CPU runs by itself

BATCH_NORM = {"bn_act": "cpu.bn_act", "bn_act_backward": "cpu.bn_act_backward"}


def preferred(problem: Problem, live: bool = True) -> tuple[str, str] | None:
    """(kernel, why) for a problem on a CPU, or None where oneDNN is to run; ``live``: beside a module's own weights, not in a plan."""
    if available() is not None:
        return None
    if problem.op in BATCH_NORM:
        id = BATCH_NORM[problem.op]
        return (
            None
            if _bn_supports(problem) or yields(id, problem)
            else (id, "statistics, affine, residual and ReLU in two passes")
        )
    return next(((id, form.why) for id, form in FORMS.items() if chooses(id, problem, live)), None)


def chooses(id: str, problem: Problem, live: bool = True) -> bool:
    """Whether a convolution of this file, which is available, can take a problem and was measured to win there."""
    return FORMS[id].supports(problem) is None and yields(id, problem, live) is None


def yields(id: str, problem: Problem, live: bool = True) -> str | None:
    """Why a kernel of this file that could run a problem leaves it to the next of them, or to oneDNN."""
    if problem.op in BATCH_NORM:
        return "measured with multiples of 16 channels" if problem.x[1] % 16 else None
    if problem.dtype == torch.bfloat16 and onednn_has_amx():
        return "oneDNN multiplies bfloat16 with AMX tiles on this processor: by the manuals at several times this kernel's rate, not measured"
    if id == "cpu.conv":
        measured = problem.weight[2:] in ((1, 1), (3, 3), (7, 7))  # 5×5: 0.92 to 1.0 times oneDNN's speed
        return None if measured else "measured no faster than oneDNN with filters of other sizes than 1×1, 3×3 and 7×7"
    if _memory_bound(problem) and torch.get_num_threads() > FEW_THREADS:
        return "by a model, not a measurement, so many threads would wait for these transformed filters longer than they take for the plain sum"
    if problem.dtype == torch.bfloat16 and problem.x[1] > 256:
        return "measured slower than the plain sum in bfloat16 with more than 256 channels"
    if live and problem.x[1] > (128 if problem.x[0] == 1 else 256):
        # All of ResNet-50's take 88 MB transformed, 33 plain: 389 MB at batch 1, where eager's 140 and two copies of the weights are 344.
        return "filters of so many channels take more memory, transformed, than beside live weights they are worth; a plan uses them"
    return None


# A model, for nobody measured it: memory brings a thread some 5 GB/s where all cores of a server are at work, and a thread multiplies at
# 100 GFLOP/s (measured on one, float32). The plain sum of 18 FLOPs for a pixel and a pair of channels is then faster than the reading of the
# pair's 96 bytes, transformed, for fewer than 96 / 5e9 * 100e9 / 18 = 107 pixels. A few threads get more bandwidth each (here 15 GB/s, and
# cpu.winograd won), and filters of few channels stay in the cache from one pass to the next.
FEW_THREADS, FEW_PIXELS, MANY_CHANNELS = 4, 64, 256


def _memory_bound(problem: Problem) -> bool:
    """Whether reading ``cpu.winograd``'s filters is most of its work: a few pixels of all images, many channels."""
    n, c, h, w = problem.x
    return n * h * w < FEW_PIXELS and c >= MANY_CHANNELS
