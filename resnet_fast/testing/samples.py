"""One row for each op: its sample arguments, eager form, edge cases, and what its arguments and results mean.

Add an op here to have its kernels checked, verified at full size, compiled ahead of time and measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch.problem import Problem
from ..ops import reference
from .edges import (
    Fields,
    add_edges,
    bn_edges,
    conv_edges,
    conv_pool_edges,
    pair_edges,
    pointwise_pool_edges,
    tail_edges,
)
from .inputs import Inputs, MetaInputs, RandomInputs, lay

# ImageNet's mean and standard deviation of each channel, for pixels in [0, 1].
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class OpSamples:
    """What judging and measuring a kernel needs to know about its op."""

    args: Callable[[Problem, Inputs], tuple]  # the flat arguments of a problem
    # what a user has without this package, in the arguments' dtype
    eager: Callable[..., Tensor | tuple[Tensor, ...]]
    edges: Callable[[], Iterable[Fields]]  # small problems with awkward sizes, layouts and options
    images: tuple[int, ...]  # the flat arguments with one entry for each image
    sums: tuple[int, ...] = ()  # the results that are sums over the batch
    gradient: bool = False  # whether the results are gradients
    baselines: tuple[str, ...] = ("eager",)  # what stands beside its kernels when they are measured


def make_args(problem: Problem, seed: int = 0, device: str | torch.device | None = None) -> tuple:
    """Random flat arguments for a problem, in its dtypes, layouts and device."""
    inputs = RandomInputs(problem, seed, device or problem.device)
    return SAMPLES[problem.op].args(problem, inputs)


def meta_args(problem: Problem) -> tuple:
    """Flat arguments for a problem without data, on the meta device."""
    return SAMPLES[problem.op].args(problem, MetaInputs(problem))


# ---------------------------------------------------------------- conv_bn_act


def _conv_args(problem: Problem, inputs: Inputs) -> tuple:
    """x, weight, scale, shift, residual, mean, var, eps, stride, padding, dilation, groups, act."""
    k = problem.weight[0]
    x = inputs.normal(*problem.x, layout=problem.layout)
    weight = _filter(problem.weight, inputs, layout=problem.layout)
    scale, shift, mean, var = inputs.vectors(k)
    residual = None
    if problem.residual is not None:
        residual = inputs.normal(problem.x[0], k, *problem.out_hw, layout=problem.residual)
    statistics = (mean, var, 1e-5) if problem.bn else (None, None, 0.0)
    geometry = problem.stride, problem.padding, problem.dilation, problem.groups
    return (
        x,
        weight,
        scale,
        shift,
        residual,
        *statistics,
        *geometry,
        problem.act,
    )


def _filter(shape: tuple[int, ...], inputs: Inputs, layout: str = "nhwc") -> Tensor:
    """A filter that keeps the variance of its input."""
    _, c, r, s = shape
    std = (2.0 / (c * r * s)) ** 0.5
    return inputs.normal(*shape, layout=layout, std=std)


def _eager_conv(
    x, weight, scale, shift, residual, mean, var, eps, stride, padding, dilation, groups, act
) -> Tensor:
    """Torch's convolution and batch norm one after the other."""
    out = F.conv2d(x, weight, None, stride, padding, dilation, groups)
    if mean is None:
        mean = torch.zeros_like(scale)
        var = torch.ones_like(scale)
        eps = 1e-30  # torch 2.11 refuses 0
    out = F.batch_norm(out, mean, var, scale, shift, False, 0.0, eps)
    if residual is not None:
        out = out + residual
    return torch.relu(out) if act == "relu" else out


# ---------------------------------------------------------------- bn_act


def _bn_args(problem: Problem, inputs: Inputs) -> tuple:
    """x, weight, bias, residual, eps, act."""
    weight, bias, *_ = inputs.vectors(problem.x[1])
    x = inputs.normal(*problem.x, layout=problem.layout) + 0.5
    residual = (
        None if problem.residual is None else inputs.normal(*problem.x, layout=problem.residual)
    )
    return (
        x,
        weight,
        bias,
        residual,
        1e-5,
        problem.act,
    )


def _bn_backward_args(problem: Problem, inputs: Inputs) -> tuple:
    """dy, x, y, weight, mean, var, eps, act, whether there is a residual; y, mean and var are a forward's."""
    forward = _bn_args(replace(problem, op="bn_act"), inputs.restarted())
    x, weight, _, residual, eps, act = forward
    y, mean, var = reference.bn_act(*forward)
    dy = inputs.normal(*problem.x, layout=problem.layout)
    return (
        dy,
        x,
        lay(y, problem.layout),
        weight,
        mean,
        var,
        eps,
        act,
        residual is not None,
    )


def _eager_bn(x, weight, bias, residual, eps, act) -> tuple[Tensor, Tensor, Tensor]:
    """Torch's own statistics.

    Its one-pass variance in bfloat16 NHWC is ten times less exact than the reference's (CPU, torch 2.15).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    mean = torch.zeros_like(weight, dtype=wide)
    var = torch.zeros_like(bias, dtype=wide)
    out = F.batch_norm(x, mean, var, weight, bias, True, 1.0, eps)
    if residual is not None:
        out = out + residual
    n = x.numel() // x.shape[1]
    biased_var = var * ((n - 1) / n)
    return torch.relu(out) if act == "relu" else out, mean, biased_var


# ---------------------------------------------------------------- add_act


def _add_args(problem: Problem, inputs: Inputs) -> tuple:
    """x, y, gate, act."""
    x = inputs.normal(*problem.x, layout=problem.layout)
    y = inputs.normal(*problem.x, layout=problem.residual or problem.layout)
    gate = torch.sigmoid(inputs.normal(*problem.x[:2], 1, 1)) if problem.gate else None
    return (
        x,
        y,
        gate,
        problem.act,
    )


def _add_backward_args(problem: Problem, inputs: Inputs) -> tuple:
    """dout, out, x, gate, act; out is a forward's."""
    x, y, gate, act = _add_args(problem, inputs)
    out = lay(reference.add_act(x, y, gate, act), problem.layout)
    dout = inputs.normal(*problem.x, layout=problem.layout)
    return (
        dout,
        out,
        x if problem.gate else None,
        gate,
        act,
    )


# ---------------------------------------------------------------- across convolutions


def _bias(shape: tuple[int, ...], inputs: Inputs) -> Tensor:
    """A bias of this filter as a folded batch norm has it."""
    return inputs.vectors(shape[0])[1]


def _eager_block(x, weight, bias, residual, padding=0) -> Tensor:
    """Folded convolution, residual, ReLU, each rounded."""
    out = F.conv2d(x, weight, bias.to(weight.dtype), padding=padding)
    if residual is not None:
        out = out + residual
    return torch.relu(out)


def _pair_args(problem: Problem, inputs: Inputs) -> tuple:
    """x, weight, x2, weight2, bias, stride2."""
    (second,) = problem.chain
    weight = _filter(problem.weight, inputs)
    x = inputs.normal(*problem.x, layout=problem.layout)
    hw = problem.second or tuple(
        size * s for size, s in zip(problem.x[2:], problem.stride, strict=True)
    )
    x2 = inputs.normal(problem.x[0], second[1], *hw, layout=problem.residual or "nhwc")
    return (
        x,
        weight,
        x2,
        _filter(second, inputs),
        _bias(second, inputs),
        problem.stride,
    )


def _eager_pair(x, weight, x2, weight2, bias, stride2) -> Tensor:
    """The second convolution is the first one's residual."""
    second = F.conv2d(x2, weight2, None, stride2)
    return _eager_block(x, weight, bias, second)


def _tail_args(problem: Problem, inputs: Inputs) -> tuple:
    """x, weight2, bias2, weight3, bias3, residual, projection, weight1, bias1."""
    third, projection, following = problem.chain
    weight2 = _filter(problem.weight, inputs)
    x = inputs.normal(*problem.x, layout=problem.layout)
    residual_channels = projection[1] if projection else third[0]
    residual_layout = problem.residual or "nhwc"
    residual = inputs.normal(
        problem.x[0], residual_channels, *problem.x[2:], layout=residual_layout
    )
    bias2 = _bias(problem.weight, inputs)
    weight3 = _filter(third, inputs)
    bias3 = _bias(third, inputs)
    projected = _filter(projection, inputs) if projection else None
    weight1 = _filter(following, inputs)
    bias1 = _bias(following, inputs)
    return (
        x,
        weight2,
        bias2,
        weight3,
        bias3,
        residual,
        projected,
        weight1,
        bias1,
    )


def _eager_tail(
    x, weight2, bias2, weight3, bias3, residual, projection, weight1, bias1
) -> tuple[Tensor, Tensor]:
    """Three folded convolutions, and the projection of the residual."""
    shortcut = residual if projection is None else F.conv2d(residual, projection)
    middle = _eager_block(x, weight2, bias2, None, padding=1)
    y = _eager_block(middle, weight3, bias3, shortcut)
    z = _eager_block(y, weight1, bias1, None)
    return y, z


def _conv_pool_args(problem: Problem, inputs: Inputs) -> tuple:
    """x, weight, bias, mean, std; the last two for bytes only."""
    weight = _filter(problem.weight, inputs)
    if not problem.bytes:
        x = inputs.normal(*problem.x, layout=problem.layout)
        return x, weight, _bias(problem.weight, inputs), None, None
    wide = torch.promote_types(problem.dtype, torch.float32)
    x = inputs.normal(*problem.x, layout=problem.layout, dtype=wide)
    pixels = (x * 64 + 128).clamp(0, 255).to(torch.uint8)
    mean = _in_bytes(_MEAN, x)
    std = _in_bytes(_STD, x)
    return (
        lay(pixels, problem.layout),
        weight,
        _bias(problem.weight, inputs),
        mean,
        std,
    )


def _in_bytes(channels: tuple[float, ...], x: Tensor) -> Tensor:
    """Values of three channels in units of a byte, repeated for the channels of ``x``, in its dtype."""
    c = x.shape[1]
    values = torch.tensor(channels, dtype=x.dtype, device=x.device)
    return values.repeat(c)[:c] * 255


def _eager_conv_pool(x, weight, bias, mean, std) -> Tensor:
    """Normalisation, folded convolution, ReLU, max pool."""
    *_, r, s = weight.shape
    padding = r // 2, s // 2
    x = reference.normalized(x, mean, std, weight.dtype)
    out = F.conv2d(x, weight, bias.to(weight.dtype), stride=2, padding=padding)
    return F.max_pool2d(torch.relu(out), kernel_size=3, stride=2, padding=1)


def _pointwise_pool_args(problem: Problem, inputs: Inputs) -> tuple:
    """x, weight, bias, residual."""
    weight = _filter(problem.weight, inputs)
    x = inputs.normal(*problem.x, layout=problem.layout)
    bias = _bias(problem.weight, inputs)
    residual_shape = problem.x[0], problem.weight[0], *problem.x[2:]
    return (
        x,
        weight,
        bias,
        inputs.normal(*residual_shape, layout=problem.residual or "nhwc"),
    )


def _eager_pointwise_pool(x, weight, bias, residual) -> Tensor:
    """Folded convolution, residual, ReLU, mean over height and width."""
    return _eager_block(x, weight, bias, residual).mean((2, 3))


# ---------------------------------------------------------------- rows

# Of the pointwise ops and derivatives, eager is the reference, which rounds once where torch's modules round twice: a
# stricter bar.
SAMPLES: dict[str, OpSamples] = {
    "conv_bn_act": OpSamples(
        _conv_args,
        _eager_conv,
        conv_edges,
        images=(0, 4),
        baselines=("eager", "folded"),
    ),
    "bn_act": OpSamples(
        _bn_args,
        _eager_bn,
        bn_edges,
        images=(0, 3),
    ),
    "bn_act_backward": OpSamples(
        _bn_backward_args,
        reference.bn_act_backward,
        bn_edges,
        images=(0, 1, 2),
        sums=(1, 2),
        gradient=True,
    ),
    "add_act": OpSamples(
        _add_args,
        reference.add_act,
        add_edges,
        images=(0, 1, 2),
    ),
    "add_act_backward": OpSamples(
        _add_backward_args,
        reference.add_act_backward,
        add_edges,
        images=(0, 1, 2, 3),
        gradient=True,
    ),
    "pointwise_pair": OpSamples(
        _pair_args,
        _eager_pair,
        pair_edges,
        images=(0, 2),
    ),
    "conv_tail": OpSamples(
        _tail_args,
        _eager_tail,
        tail_edges,
        images=(0, 5),
    ),
    "conv_pool": OpSamples(
        _conv_pool_args,
        _eager_conv_pool,
        conv_pool_edges,
        images=(0,),
    ),
    "pointwise_pool": OpSamples(
        _pointwise_pool_args,
        _eager_pointwise_pool,
        pointwise_pool_edges,
        images=(0, 3),
    ),
}
