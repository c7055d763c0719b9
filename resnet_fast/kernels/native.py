"""``native``: the C++/CUDA kernels of ``csrc``, as built into ``resnet_fast._C``. The only importer of the extension.

Importing this module loads no library. The extension is loaded by the first call and registers its ops in torch's
namespace ``resnet_fast_native``. Each ``csrc/cuda/*.cu`` begins with its kernel's formula, layout and floor.
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

from ..dispatch import Problem, kernel, nhwc_or_why
from .vendor import nhwc

BUILD = "RESNET_FAST_BUILD=cuda pip install --force-reinstall --no-deps -v . (in the source folder)"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HOPPER = "9.0a"  # the architecture that has wgmma; its code runs on compute capability 9.0 only
RECORD = Path(__file__).parents[1] / "_build.json"

# The record holds the hash of csrc, the compiler and its targets. A wheel has no csrc.
SOURCES = (str(RECORD),) if RECORD.is_file() else ()


@functools.cache
def extension() -> ModuleType:
    """The extension: ``kernels()`` names its kernels, ``attributes(name)`` returns their registers and occupancy."""
    from .. import _C  # type: ignore[attr-defined]  # compiled by setup.py

    return _C


@functools.cache
def _op(name: str):
    extension()
    return getattr(torch.ops.resnet_fast_native, name).default


def available() -> str | None:
    """Why the extension cannot run here, or None. Does not load it."""
    if importlib.util.find_spec("resnet_fast._C") is None:
        why = json.loads(RECORD.read_text())["why"] if RECORD.is_file() else "no build record"
        return f"the CUDA extension is not built ({why}): {BUILD}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build"
    return None if torch.cuda.is_available() else "there is no CUDA device"


def hopper_available() -> str | None:
    """Why the kernels for Hopper cannot run here, or None: a build may lack them."""
    why = available()
    if why is not None or not RECORD.is_file():
        return why
    archs = json.loads(RECORD.read_text())["archs"]
    if HOPPER in archs.replace("+PTX", "").split():
        return None
    return f"the extension has no code for {HOPPER} (it was built for {archs}): TORCH_CUDA_ARCH_LIST={HOPPER} {BUILD}"


def declines(problem: Problem) -> str | None:
    """The devices, dtypes and chips (older than sm_80) that no kernel of csrc takes."""
    if problem.device != "cuda":
        return f"the C++ kernels run on CUDA tensors, not on {problem.device}"
    if problem.dtype not in DTYPES:
        return f"the C++ kernels take float32, float16 and bfloat16, not {str(problem.dtype).removeprefix('torch.')}"
    if problem.capability < (8, 0):
        return "the C++ kernels need compute capability 8.0, this GPU has {}.{}".format(
            *problem.capability
        )
    return None


def _add_act_supports(problem: Problem) -> str | None:
    if problem.gate and problem.layout != "nhwc":
        return f"the gated form wants NHWC (channels_last), the input is {problem.layout}"
    if problem.layout == "strided" or problem.residual != problem.layout:
        return f"it wants both tensors dense in one layout, they are {problem.layout} and {problem.residual}"
    return declines(problem)


@kernel(
    "native.add_act", op="add_act", supports=_add_act_supports, available=available, sources=SOURCES
)
def add_act(x: Tensor, y: Tensor, gate: Tensor | None, act: str) -> Tensor:
    if gate is not None:
        gate = gate.contiguous()
    return _op("add_act")(x, y, gate, act == "relu")


@kernel(
    "native.add_act_backward",
    op="add_act_backward",
    supports=_add_act_supports,
    available=available,
    sources=SOURCES,
)
def add_act_backward(
    dout: Tensor, out: Tensor, x: Tensor | None, gate: Tensor | None, act: str
) -> tuple[Tensor, Tensor, Tensor]:
    if gate is None:
        dy = _op("add_act_backward")(dout, out, act == "relu")
        return dy, dout.new_empty(0), dout.new_empty(0)
    x = x.contiguous(memory_format=torch.channels_last)  # the Problem has the layout of dout alone
    dx, dy, dgate = _op("add_act_gate_backward")(dout, out, x, gate.contiguous(), act == "relu")
    return dy, dx, dgate


# ---------------------------------------------------------------- convolutions

# rows of the product are 32-bit, and the last tile may reach beyond the last row
MOST_PIXELS = 2**31 - 129


def _conv_supports(problem: Problem) -> str | None:
    if problem.groups != 1:
        return f"it has no grouped form, this convolution has {problem.groups} groups"
    why = nhwc_or_why(problem)
    if why is not None:
        return why
    if max(problem.weight[2:]) > 16:
        return "it keeps a filter's rows and columns in 16 bits each, this one is {}×{}".format(
            *problem.weight[2:]
        )
    n, _, h, w = problem.x
    out_h, out_w = problem.out_hw
    if max(n * h * w, n * out_h * out_w) > MOST_PIXELS:
        return f"it counts pixels in 31 bits, input or output has more than {MOST_PIXELS}"
    return declines(problem)


def _pointwise_supports(problem: Problem) -> str | None:
    if not problem.pointwise:
        r, s = problem.weight[2:]
        return f"it takes 1×1 filters without padding, this one is {r}×{s} with padding {problem.padding}"
    return _conv_supports(problem)


@kernel(
    "native.conv", op="conv_bn_act", supports=_conv_supports, available=available, sources=SOURCES
)
def conv(
    x, weight, scale, shift, residual, mean, var, eps, stride, padding, dilation, groups, act
) -> Tensor:
    scale, shift, mean, var = _vectors(scale, shift, mean, var)
    out = _op("conv")(
        x,
        _nhwc(weight),
        scale,
        shift,
        residual,
        mean,
        var,
        eps,
        stride,
        padding,
        dilation,
        act == "relu",
    )
    return _eager_strides(out, x, weight)


@kernel(
    "native.pointwise",
    op="conv_bn_act",
    supports=_pointwise_supports,
    available=available,
    sources=SOURCES,
)
def pointwise(
    x, weight, scale, shift, residual, mean, var, eps, stride, padding, dilation, groups, act
) -> Tensor:
    scale, shift, mean, var = _vectors(scale, shift, mean, var)
    out = _op("pointwise")(
        x, _nhwc(weight), scale, shift, residual, mean, var, eps, stride, act == "relu"
    )
    return _eager_strides(out, x, weight)


def _pointwise_hopper_supports(problem: Problem) -> str | None:
    return _pointwise_supports(problem) or _steps_declined(problem) or hopper_declines(problem)


def _steps_declined(problem: Problem) -> str | None:
    if max(problem.stride) > 8:
        return (
            "TMA steps over an image by up to 8 pixels, this convolution has stride {}×{}".format(
                *problem.stride
            )
        )
    return None


def hopper_declines(problem: Problem) -> str | None:
    """The chips, dtypes and channels (pixels that do not start at 16 bytes) that no kernel for Hopper takes."""
    if problem.capability != (9, 0):
        return "it is compiled for compute capability 9.0 alone, this GPU has {}.{}".format(
            *problem.capability
        )
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
        _aligned(x),
        _filter(weight),
        scale,
        shift,
        _aligned(residual),
        mean,
        var,
        eps,
        stride,
        act == "relu",
    )
    return _eager_strides(out, x, weight)


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
    operands = (x, _nhwc(weight), x2, _nhwc(weight2))
    x, weight, x2, weight2 = (_aligned(operand) for operand in operands)
    return _op("pointwise_pair_hopper")(x, weight, x2, weight2, bias.contiguous(), stride2)


MOST_OFFSET = 127  # the corners of TMA's im2col mode are signed 8-bit numbers


def _conv_cluster_supports(problem: Problem) -> str | None:
    reach = [d * (size - 1) for d, size in zip(problem.dilation, problem.weight[2:], strict=True)]
    if max(*reach, *problem.padding) > MOST_OFFSET:
        return (
            f"TMA's offsets go to {MOST_OFFSET}, the filter reaches {reach[0]}×{reach[1]} pixels with padding "
            f"{problem.padding}"
        )
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
        _filter(weight),
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
    return _eager_strides(out, x, weight)


# Pixels of an output row: two boxes of such rows with their halo fit shared memory beside filters and results.
WIDEST = 64


def _conv_hopper_supports(problem: Problem) -> str | None:
    geometry = problem.weight[2:], problem.stride, problem.padding, problem.dilation
    stride_1 = (3, 3), (1, 1), (1, 1), (1, 1)
    stride_2 = (3, 3), (2, 2), (1, 1), (1, 1)
    if geometry not in (stride_1, stride_2):
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
            f"it keeps whole rows in shared memory, of up to {WIDEST} output pixels, "
            f"and these have {problem.out_hw[1]}"
        )
    return _conv_supports(problem) or hopper_declines(problem)


@kernel(
    "native.conv_hopper",
    op="conv_bn_act",
    supports=_conv_hopper_supports,
    available=hopper_available,
    sources=SOURCES,
)
def conv_hopper(
    x, weight, scale, shift, residual, mean, var, eps, stride, padding, dilation, groups, act
) -> Tensor:
    scale, shift, mean, var = _vectors(scale, shift, mean, var)
    out = _op("conv_hopper")(
        _aligned(x),
        _filter(weight),
        scale,
        shift,
        _aligned(residual),
        mean,
        var,
        eps,
        stride,
        act == "relu",
    )
    return _eager_strides(out, x, weight)


def _conv_tail_hopper_supports(problem: Problem) -> str | None:
    why = nhwc_or_why(problem) or declines(problem) or hopper_declines(problem)
    if why is not None:
        return why
    for what, channels, most in _tail_channels(problem):
        if channels > most:
            return (
                f"it keeps all filters in shared memory, with up to {most} channels of the {what}, and there are "
                f"{channels}"
            )
        if channels % 8:
            return f"TMA wants pixels of whole 16 bytes, the {what} has {channels} channels"
    n, _, h, w = problem.x
    return (
        f"it counts tiles in 31 bits, and there are {n * h * w} pixels"
        if n * h * w > MOST_PIXELS // 2
        else None
    )


def _tail_channels(problem: Problem) -> list[tuple[str, int, int]]:
    """What has channels in a tail, how many, and how many fit in shared memory."""
    (wide, middle, *_), projection, (after, *_) = problem.chain
    projected = projection[1] if projection else 0
    return [
        ("input", problem.x[1], 64),
        ("middle", middle, 64),
        ("projected residual", projected, 64),
        ("output", wide, 256),
        ("next convolution", after, 64 if projection else 128),
    ]


@kernel(
    "native.conv_tail_hopper",
    op="conv_tail",
    supports=_conv_tail_hopper_supports,
    available=hopper_available,
    sources=SOURCES,
)
def conv_tail_hopper(
    x, weight2, bias2, weight3, bias3, residual, projection, weight1, bias1
) -> tuple[Tensor, Tensor]:
    projection = None if projection is None else _filter(projection)
    return _op("conv_tail_hopper")(
        *(_aligned(x), _filter(weight2), _bias(bias2)),
        *(_filter(weight3), _bias(bias3), _aligned(residual), projection),
        *(_filter(weight1), _bias(bias1)),
    )


# ---------------------------------------------------------------- arguments as the kernels take them


def _aligned(t: Tensor | None) -> Tensor | None:
    """The tensor at a multiple of 16 bytes, as TMA wants it; a copy only of odd slices."""
    return t if t is None or t.data_ptr() % 16 == 0 else t.clone()


def _nhwc(t: Tensor) -> Tensor:
    """The tensor in channels_last; a copy only if it is not, such as an NCHW filter or gradient."""
    return t.contiguous(memory_format=torch.channels_last)


def _filter(weight: Tensor) -> Tensor:
    return _aligned(_nhwc(weight))


def _bias(bias: Tensor) -> Tensor:
    return _aligned(bias.contiguous())


def _vectors(*vectors: Tensor | None) -> list[Tensor | None]:
    """Per-channel vectors without gaps and in one dtype: usually themselves, float32 copies of mixed ones."""
    mixed = len({v.dtype for v in vectors if v is not None}) > 1
    return [v if v is None else (v.float() if mixed else v).contiguous() for v in vectors]


def _eager_strides(out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The NHWC output with the strides that F.conv2d would give."""
    return out if nhwc(x) or nhwc(weight) else out.contiguous()


# ---------------------------------------------------------------- training batch norm


def _bn_supports(problem: Problem) -> str | None:
    why = nhwc_or_why(problem, any_residual=problem.op == "bn_act_backward")
    if why is not None:
        return why
    return "the batch is empty" if 0 in problem.x else declines(problem)


@kernel("native.bn_act", op="bn_act", supports=_bn_supports, available=available, sources=SOURCES)
def bn_act(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float, act: str
) -> tuple[Tensor, Tensor, Tensor]:
    weight, bias = _vectors(weight, bias)
    return _op("bn_act")(x, weight, bias, residual, eps, act == "relu")


@kernel(
    "native.bn_act_backward",
    op="bn_act_backward",
    supports=_bn_supports,
    available=available,
    sources=SOURCES,
)
def bn_act_backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    act: str,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dy, y = _nhwc(dy), _nhwc(y)
    weight = weight.contiguous()
    return _op("bn_act_backward")(dy, x, y, weight, mean, var, eps, act == "relu", residual)
