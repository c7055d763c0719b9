"""``aten``: the kernels that torch ships. They are the fallback for every op, and the bar for every other kernel.

``aten`` takes every problem on every device and gives eager's answers, NaN included. On a CPU it runs oneDNN's fused
convolution with packed weights. On a GPU, and where oneDNN is missing, it is eager's launches: convolution, batch norm,
then add and ReLU in place. Folding there would save no launch, because ATen adds a bias in a pass of its own, and would
cost a dozen launches for each batch norm. ``aten.cudnn_fused`` is cuDNN's conv + bias (+ add) + ReLU in one kernel;
whether it passes NaN on is known only on a GPU, so like any kernel it is chosen by a measurement.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import Problem, kernel
from ..ops import reference
from . import prepack, vendor

SOURCES = (vendor.__file__,)  # of the convolutions


def _everything(problem: Problem) -> str | None:
    return None


@kernel("aten.conv_bn_act", op="conv_bn_act", supports=_everything, sources=SOURCES)
def conv_bn_act(
    x, weight, scale, shift, residual, mean, var, eps, stride, padding, dilation, groups, act
) -> Tensor:
    geometry = stride, padding, dilation, groups
    if vendor.onednn_takes(x, weight) and prepack.packable(weight, scale, shift, mean, var):
        pack = prepack.packed(x, weight, scale, shift, mean, var, eps, *geometry)
        if pack is not None:
            return _onednn(x, weight, *pack, residual, geometry, act)
    if _batch_norm_takes(x, scale, shift, mean, var):
        out = _conv_then_norm(x, weight, scale, shift, mean, var, eps, geometry)
    # Only on a CPU: on a GPU the host would have to wait for the answer.
    elif x.device.type == "cpu" and not prepack.foldable(scale, shift, mean, var, eps):
        return reference.conv_bn_act(
            x, weight, scale, shift, residual, mean, var, eps, *geometry, act
        )
    else:
        folded, bias = prepack.fold(weight, scale, shift, mean, var, eps)
        out = F.conv2d(x, folded, bias, *geometry)
    if residual is not None:
        out += residual
    return out.relu_() if act == "relu" else out


def _batch_norm_takes(x: Tensor, *vectors: Tensor | None) -> bool:
    """Whether torch's batch norm takes these four vectors with this input: all in its dtype, or all in float32."""
    dtypes = {None if v is None else v.dtype for v in vectors}
    return (
        dtypes == {x.dtype}
        or dtypes == {torch.float32}
        and x.dtype in (torch.float16, torch.bfloat16)
    )


def _conv_then_norm(x, weight, scale, shift, mean, var, eps, geometry) -> Tensor:
    z = F.conv2d(x, weight, None, *geometry)
    out = F.batch_norm(z, mean, var, scale, shift, False, 0.0, eps)
    # With one pixel or one channel batch norm gives other strides for the same order in memory.
    return out if out.stride() == z.stride() else out.as_strided(z.shape, z.stride())


def _onednn(x, weight, packed, bias, residual, geometry, act) -> Tensor:
    """oneDNN's convolution with eager's strides; ReLU by torch, in place, for NaN."""
    if residual is not None and vendor.both_layouts(residual):
        out = vendor.onednn(x, packed, bias, None, geometry).add_(residual)
    else:
        out = vendor.onednn(x, packed, bias, residual, geometry)
    if not vendor.nhwc(x) and not vendor.nhwc(weight):
        out = out.contiguous()
    return out.relu_() if act == "relu" else out


def _cudnn_supports(problem: Problem) -> str | None:
    if problem.device != "cuda":
        return "cuDNN needs a CUDA tensor"
    if problem.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"cuDNN fuses float16, bfloat16 and float32, not {problem.dtype}"
    if problem.act != "relu":
        return "cuDNN's fused forms end in a ReLU"
    if 0 in problem.x:
        return "the input is empty"
    if problem.residual not in (None, problem.layout):
        return "the residual lies in another layout than the input"
    return None


@kernel("aten.cudnn_fused", op="conv_bn_act", supports=_cudnn_supports, sources=SOURCES)
def cudnn_fused(
    x, weight, scale, shift, residual, mean, var, eps, stride, padding, dilation, groups, act
) -> Tensor:
    folded, bias = prepack.fold(weight, scale, shift, mean, var, eps)
    geometry = stride, padding, dilation, groups
    return vendor.cudnn(x, folded, bias, residual, geometry)


@kernel("aten.bn_act", op="bn_act", supports=_everything)
def bn_act(x, weight, bias, residual, eps, act) -> tuple[Tensor, Tensor, Tensor]:
    if x.numel() == 0:
        dtype = torch.promote_types(x.dtype, torch.float32)
        mean = torch.full((x.shape[1],), torch.nan, dtype=dtype, device=x.device)
        return torch.empty_like(x), mean, mean.clone()
    weight = _at_least_float32(weight)
    bias = _at_least_float32(bias)
    out, mean, invstd = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
    if residual is not None:
        out += residual
    if act == "relu":
        out.relu_()
    return out, mean, invstd.pow(-2).sub_(eps).clamp_(min=0)


@kernel("aten.bn_act_backward", op="bn_act_backward", supports=_everything)
def bn_act_backward(
    dy, x, y, weight, mean, var, eps, act, residual
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dz = torch.ops.aten.threshold_backward(dy, y, 0) if act == "relu" else dy
    if x.numel() == 0:
        dx = torch.empty_like(x)
        dweight = torch.zeros_like(weight)
        dbias = torch.zeros_like(weight)
    else:
        gamma = _at_least_float32(weight)
        invstd = torch.rsqrt(var + eps)
        outputs = [True, True, True]
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            dz, x, gamma, None, None, mean, invstd, True, eps, outputs
        )
    if not residual:
        dz = x.new_empty(0)
    elif act == "none":
        dz = dy.clone()  # an op's output must not alias its input
    return dx, dweight.to(weight.dtype), dbias.to(weight.dtype), dz


def _at_least_float32(vector: Tensor) -> Tensor:
    """The vector in float32 or wider. With low-precision parameters torch returns low-precision statistics."""
    return vector.to(torch.promote_types(vector.dtype, torch.float32))


@kernel("aten.add_act", op="add_act", supports=_everything)
def add_act(x, y, gate, act) -> Tensor:
    out = x + y if gate is None else torch.addcmul(y, x, gate)
    return out.relu_() if act == "relu" else out


@kernel("aten.add_act_backward", op="add_act_backward", supports=_everything)
def add_act_backward(dout, out, x, gate, act) -> tuple[Tensor, Tensor, Tensor]:
    dy = torch.ops.aten.threshold_backward(dout, out, 0) if act == "relu" else dout.clone()
    if gate is None:
        return dy, dout.new_empty(0), dout.new_empty(0)
    dx = dy * gate
    dgate = (dy * x).sum((2, 3), keepdim=True)
    return dy, dx, dgate


# ---------------------------------------------------------------- over several convolutions, run one after the other


def _biased(x: Tensor, weight: Tensor, bias: Tensor, stride=1, padding=0) -> Tensor:
    return F.conv2d(x, weight, bias.to(weight.dtype), stride, padding)


def _channels_last(out: Tensor) -> Tensor:
    """The tensor with exact NHWC strides, also for one pixel or one channel, where torch accepts others as NHWC."""
    n, c, h, w = out.shape
    out = out.contiguous(memory_format=torch.channels_last)
    return out.as_strided(out.shape, (max(h * w * c, 1), 1, max(w * c, 1), max(c, 1)))


@kernel("aten.pointwise_pair", op="pointwise_pair", supports=_everything)
def pointwise_pair(x, weight, x2, weight2, bias, stride2) -> Tensor:
    out = _biased(x, weight, bias)
    out.add_(F.conv2d(x2, weight2, None, stride2))
    return _channels_last(out.relu_())


@kernel("aten.conv_tail", op="conv_tail", supports=_everything)
def conv_tail(
    x, weight2, bias2, weight3, bias3, residual, projection, weight1, bias1
) -> tuple[Tensor, Tensor]:
    middle = _biased(x, weight2, bias2, padding=1).relu_()
    shortcut = residual if projection is None else F.conv2d(residual, projection)
    y = _biased(middle, weight3, bias3).add_(shortcut).relu_()
    z = _biased(y, weight1, bias1).relu_()
    return _channels_last(y), _channels_last(z)


@kernel("aten.conv_pool", op="conv_pool", supports=_everything)
def conv_pool(x, weight, bias, mean, std) -> Tensor:
    padding = weight.shape[2] // 2, weight.shape[3] // 2
    x = reference.normalized(x, mean, std, weight.dtype)
    out = _biased(x, weight, bias, 2, padding).relu_()
    return _channels_last(F.max_pool2d(out, 3, 2, 1))


@kernel("aten.pointwise_pool", op="pointwise_pool", supports=_everything)
def pointwise_pool(x, weight, bias, residual) -> Tensor:
    out = _biased(x, weight, bias)
    return out.add_(residual).relu_().mean((2, 3))
