"""The C++/CUDA kernels of ``csrc``, as built into ``resnet_fast._C``. The only importer of the extension.

Importing this module loads no library: the extension comes in with the first call, and registers its ops in torch's
namespace ``resnet_fast_native``. Layout, formula and floor of each kernel stand at the head of its ``csrc/cuda/*.cu``.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from itertools import chain
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from ..dispatch.registry import Problem, kernel
from .aten import nhwc

BUILD = "RESNET_FAST_BUILD=cuda pip install --force-reinstall --no-deps -v . (in the source folder)"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HOPPER = "9.0a"  # the architecture that unlocks wgmma, and runs on compute capability 9.0 only
RECORD = Path(__file__).parents[1] / "_build.json"

# The record holds the hash of csrc, the compiler and its targets: what the kernels are made of. A wheel has no csrc.
SOURCES = (str(RECORD),) if RECORD.is_file() else ()


@functools.cache
def extension() -> ModuleType:
    """The extension: ``kernels()`` names its kernels, ``attributes(name)`` tells their registers and occupancy."""
    from .. import _C  # type: ignore[attr-defined]  # compiled by setup.py

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


def hopper_available() -> str | None:
    """Why the kernels made for Hopper cannot run here, or None: a build may lack them."""
    why = available()
    if why is None and RECORD.is_file():
        archs = json.loads(RECORD.read_text())["archs"]
        if HOPPER not in archs.replace("+PTX", "").split():
            why = f"the extension has no code for {HOPPER} (it was built for {archs}): TORCH_CUDA_ARCH_LIST={HOPPER} {BUILD}"
    return why


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


@kernel(
    "native.add_act_backward", op="add_act_backward", supports=_add_act_supports, available=available, sources=SOURCES
)
def add_act_backward(
    dout: Tensor, out: Tensor, x: Tensor | None, gate: Tensor | None, act: str
) -> tuple[Tensor, Tensor, Tensor]:
    if gate is None:
        return _op("add_act_backward")(dout, out, act == "relu"), dout.new_empty(0), dout.new_empty(0)
    x = x.contiguous(memory_format=torch.channels_last)  # a Problem does not tell x's layout; its gradient follows dout
    dx, dy, dgate = _op("add_act_gate_backward")(dout, out, x, gate.contiguous(), act == "relu")
    return dy, dx, dgate


MOST_PIXELS = 2**31 - 129  # rows of the product are 32-bit, and the last tile may reach beyond the last row


def _conv_supports(problem: Problem) -> str | None:
    if problem.groups != 1:
        return f"it has no grouped form, this convolution has {problem.groups} groups"
    if problem.layout != "nhwc" or problem.residual not in (None, "nhwc"):
        return f"it wants NHWC (channels_last), input and residual are {problem.layout} and {problem.residual}"
    if max(problem.weight[2:]) > 16:
        return "it keeps a filter's rows and columns in 16 bits each, this one is {}×{}".format(*problem.weight[2:])
    n, c, h, w = problem.x
    if n * h * w > MOST_PIXELS or n * problem.out_hw[0] * problem.out_hw[1] > MOST_PIXELS:
        return f"it counts pixels in 31 bits, input or output has more than {MOST_PIXELS}"
    return declines(problem)


def _pointwise_supports(problem: Problem) -> str | None:
    if not problem.pointwise:
        r, s = problem.weight[2:]
        return f"it takes 1×1 filters without padding, this one is {r}×{s} with padding {problem.padding}"
    return _conv_supports(problem)


@kernel("native.conv", op="conv_bn_act", supports=_conv_supports, available=available, sources=SOURCES)
def conv(x, weight, scale, shift, residual, mean, var, eps, stride, padding, dilation, groups, act) -> Tensor:
    scale, shift, mean, var = _vectors(scale, shift, mean, var)
    out = _op("conv")(
        x, _nhwc(weight), scale, shift, residual, mean, var, eps, stride, padding, dilation, act == "relu"
    )
    return out if nhwc(x) or nhwc(weight) else out.contiguous()


@kernel("native.pointwise", op="conv_bn_act", supports=_pointwise_supports, available=available, sources=SOURCES)
def pointwise(x, weight, scale, shift, residual, mean, var, eps, stride, padding, dilation, groups, act) -> Tensor:
    scale, shift, mean, var = _vectors(scale, shift, mean, var)
    out = _op("pointwise")(x, _nhwc(weight), scale, shift, residual, mean, var, eps, stride, act == "relu")
    return out if nhwc(x) or nhwc(weight) else out.contiguous()


def _pointwise_hopper_supports(problem: Problem) -> str | None:
    return _pointwise_supports(problem) or _steps_declined(problem) or hopper_declines(problem)


def _steps_declined(problem: Problem) -> str | None:
    if max(problem.stride) > 8:
        return "TMA steps over an image by up to 8 pixels, this convolution has stride {}×{}".format(*problem.stride)
    return None


def hopper_declines(problem: Problem) -> str | None:
    """What no kernel made for Hopper takes: other chips, float32, pixels that do not start at 16 bytes."""
    if problem.capability != (9, 0):
        return "it is compiled for compute capability 9.0 alone, this GPU has {}.{}".format(*problem.capability)
    if problem.dtype.itemsize != 2:
        return f"it multiplies in float16 and bfloat16, not in {str(problem.dtype).removeprefix('torch.')}"
    for what, channels in (("input", problem.x[1]), ("output", problem.weight[0])):
        if channels % 8:
            return f"TMA wants pixels of whole 16 bytes, the {what} has {channels} channels"
    return None


@kernel(
    "native.pointwise_hopper",
    op="conv_bn_act",
    supports=_pointwise_hopper_supports,
    available=hopper_available,
    sources=SOURCES,
)
def pointwise_hopper(
    x, weight, scale, shift, residual, mean, var, eps, stride, padding, dilation, groups, act
) -> Tensor:
    scale, shift, mean, var = _vectors(scale, shift, mean, var)
    out = _op("pointwise_hopper")(
        _aligned(x), _aligned(_nhwc(weight)), scale, shift, _aligned(residual), mean, var, eps, stride, act == "relu"
    )
    return out if nhwc(x) or nhwc(weight) else out.contiguous()


def _pair_supports(problem: Problem) -> str | None:
    if (problem.layout, problem.residual) != ("nhwc", "nhwc"):
        return f"it wants both inputs in NHWC (channels_last), they are {problem.layout} and {problem.residual}"
    if problem.chain[0][1] % 8:
        return f"TMA wants pixels of whole 16 bytes, the second input has {problem.chain[0][1]} channels"
    return _conv_supports(problem) or _steps_declined(problem) or hopper_declines(problem)


@kernel(
    "native.pointwise_pair_hopper",
    op="pointwise_pair",
    supports=_pair_supports,
    available=hopper_available,
    sources=SOURCES,
)
def pointwise_pair_hopper(
    x: Tensor, weight: Tensor, x2: Tensor, weight2: Tensor, bias: Tensor, stride2: tuple[int, int]
) -> Tensor:
    x, weight, x2, weight2 = (_aligned(t) for t in (x, _nhwc(weight), x2, _nhwc(weight2)))
    return _op("pointwise_pair_hopper")(x, weight, x2, weight2, bias.contiguous(), stride2)


MOST_OFFSET = 127  # corners of TMA's im2col mode have 8 bits with their sign


def _conv_cluster_supports(problem: Problem) -> str | None:
    reach = [d * (size - 1) for d, size in zip(problem.dilation, problem.weight[2:], strict=True)]
    if max(*reach, *problem.padding) > MOST_OFFSET:
        return f"TMA's offsets go to {MOST_OFFSET}, the filter reaches {reach[0]}×{reach[1]} pixels with padding {problem.padding}"
    return _conv_supports(problem) or _steps_declined(problem) or hopper_declines(problem)


@kernel(
    "native.conv_cluster_hopper",
    op="conv_bn_act",
    supports=_conv_cluster_supports,
    available=hopper_available,
    sources=SOURCES,
)
def conv_cluster_hopper(
    x, weight, scale, shift, residual, mean, var, eps, stride, padding, dilation, groups, act
) -> Tensor:
    scale, shift, mean, var = _vectors(scale, shift, mean, var)
    out = _op("conv_cluster_hopper")(
        _aligned(x),
        _aligned(_nhwc(weight)),
        scale,
        shift,
        _aligned(residual),
        mean,
        var,
        eps,
        stride,
        padding,
        dilation,
        act == "relu",
    )
    return out if nhwc(x) or nhwc(weight) else out.contiguous()


WIDEST = (
    64  # pixels of an output row: two boxes of such rows with their halo fit shared memory beside filters and results
)


def _conv_hopper_supports(problem: Problem) -> str | None:
    geometry = problem.weight[2:], problem.stride, problem.padding, problem.dilation
    if geometry not in (((3, 3), (1, 1), (1, 1), (1, 1)), ((3, 3), (2, 2), (1, 1), (1, 1))):
        return (
            "it is for 3×3 filters with stride 1 or 2 and padding and dilation 1, this one is {}×{} with stride {}×{}, "
            "padding {}×{} and dilation {}×{}".format(*chain(*geometry))
        )
    if min(problem.x[2:]) < problem.stride[0]:
        return "with stride 2 it reads even and odd rows and columns, and the input has {}×{} pixels".format(
            *problem.x[2:]
        )
    if problem.out_hw[1] > WIDEST:
        return (
            f"it keeps whole rows in shared memory, of up to {WIDEST} output pixels, and these have {problem.out_hw[1]}"
        )
    return _conv_supports(problem) or hopper_declines(problem)


@kernel(
    "native.conv_hopper", op="conv_bn_act", supports=_conv_hopper_supports, available=hopper_available, sources=SOURCES
)
def conv_hopper(x, weight, scale, shift, residual, mean, var, eps, stride, padding, dilation, groups, act) -> Tensor:
    scale, shift, mean, var = _vectors(scale, shift, mean, var)
    out = _op("conv_hopper")(
        _aligned(x), _aligned(_nhwc(weight)), scale, shift, _aligned(residual), mean, var, eps, stride, act == "relu"
    )
    return out if nhwc(x) or nhwc(weight) else out.contiguous()


def _conv_tail_hopper_supports(problem: Problem) -> str | None:
    if problem.layout != "nhwc" or problem.residual != "nhwc":
        return f"it wants NHWC (channels_last), input and residual are {problem.layout} and {problem.residual}"
    why = declines(problem) or hopper_declines(problem)
    if why is not None:
        return why
    (wide, middle, *_), projection, (after, *_) = problem.chain
    projected = projection[1] if projection else 0
    for what, channels, most in (
        ("input", problem.x[1], 64),
        ("middle", middle, 64),
        ("projected residual", projected, 64),
        ("output", wide, 256),
        ("next convolution", after, 64 if projection else 128),
    ):
        if channels > most:
            return f"it keeps all filters in shared memory, with up to {most} channels of the {what}, and there are {channels}"
        if channels % 8:
            return f"TMA wants pixels of whole 16 bytes, the {what} has {channels} channels"
    n, _, h, w = problem.x
    return f"it counts tiles in 31 bits, and there are {n * h * w} pixels" if n * h * w > MOST_PIXELS // 2 else None


@kernel(
    "native.conv_tail_hopper",
    op="conv_tail",
    supports=_conv_tail_hopper_supports,
    available=hopper_available,
    sources=SOURCES,
)
def conv_tail_hopper(x, weight2, bias2, weight3, bias3, residual, projection, weight1, bias1) -> tuple[Tensor, Tensor]:
    filters = [w if w is None else _aligned(_nhwc(w)) for w in (weight2, weight3, projection, weight1)]
    biases = [_aligned(b.contiguous()) for b in (bias2, bias3, bias1)]
    return _op("conv_tail_hopper")(
        _aligned(x), filters[0], biases[0], filters[1], biases[1], _aligned(residual), filters[2], filters[3], biases[2]
    )


def _aligned(t: Tensor | None) -> Tensor | None:
    """The tensor where TMA can take it, at a multiple of 16 bytes: itself but for odd slices."""
    return t if t is None or t.data_ptr() % 16 == 0 else t.clone()


def _nhwc(t: Tensor) -> Tensor:
    """The tensor in channels_last; a copy only of what is not so already: an NCHW filter, a gradient that came so."""
    return t.contiguous(memory_format=torch.channels_last)


def _vectors(*vectors: Tensor | None) -> list[Tensor | None]:
    """Per-channel vectors without gaps and in one dtype: themselves in the usual case, float32 copies of mixed ones."""
    mixed = len({v.dtype for v in vectors if v is not None}) > 1
    return [v if v is None else (v.float() if mixed else v).contiguous() for v in vectors]


def _bn_supports(problem: Problem) -> str | None:
    if problem.layout != "nhwc" or problem.op == "bn_act" and problem.residual not in (None, "nhwc"):
        return f"it wants NHWC (channels_last), input and residual are {problem.layout} and {problem.residual}"
    return "the batch is empty" if 0 in problem.x else declines(problem)


@kernel("native.bn_act", op="bn_act", supports=_bn_supports, available=available, sources=SOURCES)
def bn_act(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float, act: str
) -> tuple[Tensor, Tensor, Tensor]:
    weight, bias = _vectors(weight, bias)
    return _op("bn_act")(x, weight, bias, residual, eps, act == "relu")


@kernel("native.bn_act_backward", op="bn_act_backward", supports=_bn_supports, available=available, sources=SOURCES)
def bn_act_backward(
    dy: Tensor, x: Tensor, y: Tensor, weight: Tensor, mean: Tensor, var: Tensor, eps: float, act: str, residual: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _op("bn_act_backward")(_nhwc(dy), x, _nhwc(y), weight.contiguous(), mean, var, eps, act == "relu", residual)


def fold_bn(
    weight: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor, eps: float, out: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Filter times scale, channels_last, and bias β − mean·scale, in one launch; scale is γ/√(var + eps).

    weight [K, C, R, S] on a CUDA device with any strides, float32, float16 or bfloat16; ``out`` another of these only
    for a float32 weight; the four vectors [K], contiguous, one dtype. Arithmetic in float32.
    """
    return _op("fold_bn")(weight, gamma, beta, mean, var, eps, out)
