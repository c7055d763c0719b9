"""``cpu``: the C++ kernels of ``csrc/cpu`` for processors with AVX-512 or AVX2.

A CPU runs them where they are faster than oneDNN's packed convolution with ReLU. Measured on an AMD EPYC with AVX-512,
two threads, November 2026, times oneDNN's speed:

- ``cpu.winograd`` 2.0 to 2.5 in float32 for 64 to 256 channels, 1.4 to 1.7 for 512; in bfloat16 1.1 to 1.35.
- ``cpu.conv`` in float32 and bfloat16: 1×1 1.04 to 1.3 and 1.1 to 1.5; 3×3 of stride 2 0.96 to 1.1 and 1.03 to 1.5;
  3×3 of 512 channels in bfloat16 1.04 to 1.4, where ``cpu.winograd`` has 0.8 to 1.08; the 7×7 stem 1.1 and 1.4 to 2.0.
  bfloat16 only where the processor multiplies it, and not where oneDNN has AMX, for which there is no measurement.
- ``cpu.bn_act`` and its backward together 1.2 to 1.3 times torch's batch norm, ReLU and add in a training step of a
  ResNet-50 at batch 8; all of them run at the speed of memory.

Importing this module loads no library: the first question does (``cpu_library``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import Prepacked, Problem, conv_out_hw, kernel, nhwc_or_why
from . import aten, cpu_library, prepack, vendor
from .cpu_library import available

# of a filter's elements: with an input below 2^64 no intermediate result overflows
LARGEST = 2.0**32


def _output(x: Tensor, channels: int, size: torch.Size, geometry: tuple) -> Tensor:
    """Memory in NHWC for a convolution's output; ``size`` is the filter's height and width."""
    stride, padding, dilation, _ = geometry
    sizes = x.shape[0], channels, *conv_out_hw(x.shape, size, stride, padding, dilation)
    return torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _declines(problem: Problem) -> str | None:
    """The devices and dtypes that no kernel of csrc/cpu takes."""
    if problem.device != "cpu":
        return f"it runs on a CPU, not on {problem.device}"
    if problem.dtype not in (torch.float32, torch.bfloat16):
        return f"it takes float32 and bfloat16, not {str(problem.dtype).removeprefix('torch.')}"
    return None


def _supports(problem: Problem) -> str | None:
    why = _declines(problem)
    if why is not None:
        return why
    plain = (problem.dilation, problem.groups) == ((1, 1), 1)
    square = problem.stride[0] == problem.stride[1] and problem.padding[0] == problem.padding[1]
    if not (plain and square):
        return (
            "it takes one stride and one padding for height and width, without dilation and groups"
        )
    panel = torch.ops.resnet_fast_cpu.panel()
    if problem.weight[0] % panel:
        return f"it wants a multiple of {panel} filters, got {problem.weight[0]}"
    why = nhwc_or_why(problem)
    if why is not None:
        return why
    if 0 in problem.x or min(problem.out_hw) < 1:
        return "the input is empty, or smaller than the filters"
    return None


def _yields_to_amx(problem: Problem) -> str | None:
    if problem.dtype == torch.bfloat16 and cpu_library.onednn_has_amx():
        return (
            "oneDNN multiplies bfloat16 with AMX tiles on this processor: by the manuals at several times this "
            "kernel's rate, not measured"
        )
    return None


def _from_packs(
    prepacked: Prepacked,
    x,
    weight,
    scale,
    shift,
    residual,
    mean,
    var,
    eps,
    stride,
    padding,
    dilation,
    groups,
    act,
) -> Tensor:
    """The kernel on filters packed now or before; ``aten`` for weights or an input that it cannot take."""
    geometry = stride, padding, dilation, groups
    pack = out = None
    if prepack.packable(weight, scale, shift, mean, var):
        pack = prepack.packed(x, weight, scale, shift, mean, var, eps, *geometry, prepacked.make)
    if pack is not None:
        out = prepacked.run(x, *pack, residual, weight.shape[2:], geometry, act == "relu", False)
    if out is None:
        return aten.conv_bn_act(x, weight, scale, shift, residual, mean, var, eps, *geometry, act)
    return out if vendor.nhwc(x) or vendor.nhwc(weight) else out.contiguous()


# ---------------------------------------------------------------- 3×3 by Winograd's minimal filtering


def winograd_filters(
    weight: Tensor, bias: Tensor, geometry: tuple, shape: torch.Size
) -> tuple[Tensor, Tensor] | None:
    within_range = weight.abs().amax() < LARGEST  # False for NaN
    if not within_range:
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
    """The convolution; None if x holds a NaN, an infinity or more than 2^64, which would spread within a tile.

    Never in place: after None the residual is still needed.
    """
    out = _output(x, len(bias), size, geometry)
    return (
        out
        if torch.ops.resnet_fast_cpu.winograd.default(x, filters, bias, residual, out, relu)
        else None
    )


def _winograd_supports(problem: Problem) -> str | None:
    if (problem.weight[2:], problem.stride, problem.padding) != ((3, 3), (1, 1), (1, 1)):
        return "it takes 3×3 filters with padding 1 and stride 1"
    channels = problem.x[1]
    if channels % 16:
        return f"it wants a multiple of 16 channels, got {channels}"
    return _supports(problem)


def _winograd_yields(problem: Problem, live: bool) -> str | None:
    amx = _yields_to_amx(problem)
    if amx is not None:
        return amx
    channels = problem.x[1]
    if _memory_bound(problem) and torch.get_num_threads() > FEW_THREADS:
        return (
            "by a model, not a measurement, so many threads would wait for these transformed filters longer than they "
            "take for the plain sum"
        )
    if problem.dtype == torch.bfloat16 and channels > 256:
        return "measured slower than the plain sum in bfloat16 with more than 256 channels"
    # All filters of a ResNet-50 take 88 MB transformed, 33 plain: 389 MB in all at batch 1, where eager takes 140 and
    # two copies of the weights are 344.
    if live and channels > (128 if problem.x[0] == 1 else 256):
        return (
            "filters of so many channels take more memory, transformed, than beside live weights they are worth; a "
            "plan uses them"
        )
    return None


# A model, not a measurement. Memory gives a thread some 5 GB/s when all cores of a server work, and a thread multiplies
# at 100 GFLOP/s (measured on one, float32). The plain sum takes 18 FLOPs for a pixel and a pair of channels; reading
# the pair's 96 transformed bytes takes longer below 96 / 5e9 * 100e9 / 18 = 107 pixels. A few threads get more
# bandwidth each (here 15 GB/s, and cpu.winograd was faster), and filters of few channels stay in the cache between
# passes.
FEW_THREADS, FEW_PIXELS, MANY_CHANNELS = 4, 64, 256


def _memory_bound(problem: Problem) -> bool:
    """Whether reading ``cpu.winograd``'s filters is most of its work: few pixels in the batch, many channels."""
    n, c, h, w = problem.x
    return n * h * w < FEW_PIXELS and c >= MANY_CHANNELS


WINOGRAD = Prepacked(winograd_filters, run_winograd)


@kernel(
    "cpu.winograd",
    op="conv_bn_act",
    supports=_winograd_supports,
    available=available,
    yields=_winograd_yields,
    why="a third of the sum's products",
    prepacked=WINOGRAD,
)
def winograd(*args) -> Tensor:
    return _from_packs(WINOGRAD, *args)


# ---------------------------------------------------------------- any filter size, as one matrix product


def conv_filters(
    weight: Tensor, bias: Tensor, geometry: tuple, shape: torch.Size
) -> tuple[Tensor, Tensor]:
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
    out = residual if in_place else _output(x, len(bias), size, geometry)
    torch.ops.resnet_fast_cpu.conv.default(
        x, filters, bias, residual, out, size, stride, padding, relu
    )
    return out


def _conv_supports(problem: Problem) -> str | None:
    if problem.dtype == torch.bfloat16 and not torch.ops.resnet_fast_cpu.takes_bf16():
        return "this processor does not multiply bfloat16"
    return _supports(problem)


def _conv_yields(problem: Problem, live: bool) -> str | None:
    amx = _yields_to_amx(problem)
    if amx is not None:
        return amx
    if problem.weight[2:] in ((1, 1), (3, 3), (7, 7)):
        return None
    return "measured no faster than oneDNN with filters of other sizes than 1×1, 3×3 and 7×7"  # 5×5: 0.92 to 1.0 times


CONV = Prepacked(conv_filters, run_conv)


@kernel(
    "cpu.conv",
    op="conv_bn_act",
    supports=_conv_supports,
    available=available,
    yields=_conv_yields,
    why="bias, residual and ReLU in registers",
    prepacked=CONV,
)
def conv(*args) -> Tensor:
    return _from_packs(CONV, *args)


# ---------------------------------------------------------------- training batch norm

BATCH_NORM_WHY = "statistics, affine, residual and ReLU in two passes"


def _bn_supports(problem: Problem) -> str | None:
    why = nhwc_or_why(problem, any_residual=problem.op == "bn_act_backward")
    if why is not None:
        return why
    return "the batch is empty" if 0 in problem.x else _declines(problem)


def _bn_yields(problem: Problem, live: bool) -> str | None:
    return "measured with multiples of 16 channels" if problem.x[1] % 16 else None


@kernel(
    "cpu.bn_act",
    op="bn_act",
    supports=_bn_supports,
    available=available,
    yields=_bn_yields,
    why=BATCH_NORM_WHY,
)
def bn_act(x, weight, bias, residual, eps, act) -> tuple[Tensor, Tensor, Tensor]:
    weight, bias = _dense_float32(weight), _dense_float32(bias)
    y = torch.empty_like(x)
    mean, var = torch.empty_like(weight), torch.empty_like(weight)
    torch.ops.resnet_fast_cpu.bn_act.default(
        x, weight, bias, residual, y, mean, var, eps, act == "relu"
    )
    return y, mean, var


@kernel(
    "cpu.bn_act_backward",
    op="bn_act_backward",
    supports=_bn_supports,
    available=available,
    yields=_bn_yields,
    why=BATCH_NORM_WHY,
)
def bn_act_backward(
    dy, x, y, weight, mean, var, eps, act, residual
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gamma = _dense_float32(weight)
    mean, var = _dense_float32(mean), _dense_float32(var)
    dx = torch.empty_like(x)
    dweight, dbias = torch.empty_like(gamma), torch.empty_like(gamma)
    dresidual = torch.empty_like(x) if residual else None
    # A Problem has the layout of x alone.
    dy = dy.contiguous(memory_format=torch.channels_last)
    y = y.contiguous(memory_format=torch.channels_last)
    torch.ops.resnet_fast_cpu.bn_act_backward.default(
        dy, x, y, gamma, mean, var, dx, dweight, dbias, dresidual, eps, act == "relu"
    )
    dtype = weight.dtype
    return dx, dweight.to(dtype), dbias.to(dtype), dresidual if residual else x.new_empty(0)


def _dense_float32(vector: Tensor) -> Tensor:
    """The vector in float32 without gaps; usually itself."""
    return (
        vector
        if vector.dtype == torch.float32 and vector.is_contiguous()
        else vector.float().contiguous()
    )
