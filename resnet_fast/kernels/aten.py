"""What torch already ships: the fallback for every op, and the honest bar every other kernel must clear.

``aten`` takes every problem on every device with eager's answers, NaN included. On a CPU it is oneDNN's fused convolution with
packed weights. On a GPU, and where oneDNN is not, it is eager's launches, no more: convolution, batch norm, then add and ReLU in place.
Folding there would save none, for ATen adds a bias in a pass of its own, and would cost a dozen for each batch norm. ``aten.cudnn_fused`` is
cuDNN's conv + bias (+ add) + ReLU in one kernel; what it does to NaN is to be seen on a GPU, so like any kernel it waits for a measurement.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch.registry import Problem, kernel
from ..ops import reference
from . import prepack


def _everything(problem: Problem) -> str | None:
    return None


@kernel("aten.conv_bn_act", op="conv_bn_act", supports=_everything)
def conv_bn_act(x, weight, scale, shift, residual, mean, var, eps, stride, padding, dilation, groups, act) -> Tensor:
    packs = onednn_takes(x, weight) and prepack.packable(weight, scale, shift, mean, var)
    pack = prepack.packed(x, weight, scale, shift, mean, var, eps, stride, padding, dilation, groups) if packs else None
    if pack is not None:
        return _onednn(x, weight, *pack, residual, stride, padding, dilation, groups, act)
    if _normalises(x, scale, shift, mean, var):
        z = F.conv2d(x, weight, None, stride, padding, dilation, groups)
        out = F.batch_norm(z, mean, var, scale, shift, False, 0.0, eps)
        out = (
            out if out.stride() == z.stride() else out.as_strided(z.shape, z.stride())
        )  # of one pixel or channel: the same order
    elif x.device.type == "cpu" and not prepack.foldable(
        scale, shift, mean, var, eps
    ):  # on a GPU the host would have to wait
        return reference.conv_bn_act(
            x, weight, scale, shift, residual, mean, var, eps, stride, padding, dilation, groups, act
        )
    else:
        folded, bias = prepack.fold(weight, scale, shift, mean, var, eps)
        out = F.conv2d(x, folded, bias, stride, padding, dilation, groups)
    if residual is not None:
        out += residual
    return out.relu_() if act == "relu" else out


def _normalises(x: Tensor, *vectors: Tensor | None) -> bool:
    """Whether torch's batch norm takes these four vectors with an input of that dtype: all in it, or all in float32."""
    dtypes = {None if v is None else v.dtype for v in vectors}
    return dtypes == {x.dtype} or dtypes == {torch.float32} and x.dtype in (torch.float16, torch.bfloat16)


def onednn_takes(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's packed convolution can take this input: fp32 or (where the processor has it) bf16, on a CPU, not empty."""
    return (
        x.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and (x.dtype == torch.float32 or x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
        and x.numel() > 0
        and weight.numel() > 0
    )


def _onednn(x, weight, packed, bias, residual, stride, padding, dilation, groups, act) -> Tensor:
    """oneDNN fuses bias and add; its fused ReLU turns NaN into 0 (all its forms), so the ReLU is our own, in place: 2–6 %."""
    conv = torch.ops.mkldnn._convolution_pointwise
    # One pixel or one channel is NCHW and NHWC at once: torch 2.11 then fails with "could not create a memory".
    apart = (
        residual is not None and residual.is_contiguous() and residual.is_contiguous(memory_format=torch.channels_last)
    )
    if residual is None or apart:
        out = conv(x, packed, bias, padding, stride, dilation, groups, "none", [], "")
        out = out.add_(residual) if apart else out
    else:
        out = conv.binary(x, residual, packed, bias, padding, stride, dilation, groups, "add", None, None, [], None)
    if not nhwc(x) and not nhwc(weight):
        out = out.contiguous()
    return out.relu_() if act == "relu" else out


def nhwc(t: Tensor) -> bool:
    """Whether torch counts these strides as channels_last (c10's rule); if it does for x or weight, F.conv2d's output has them."""
    sizes, strides = t.shape, t.stride()
    if strides[1] == 0 or 0 in sizes:
        return False
    floor = 0
    for d in (1, 3, 2, 0):
        if strides[d] < floor or d == 0 and floor == strides[1]:
            return False
        floor = strides[d] * sizes[d]
    return True


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


@kernel("aten.cudnn_fused", op="conv_bn_act", supports=_cudnn_supports)
def cudnn_fused(x, weight, scale, shift, residual, mean, var, eps, stride, padding, dilation, groups, act) -> Tensor:
    folded, bias = prepack.fold(weight, scale, shift, mean, var, eps)
    if residual is None:
        return torch.cudnn_convolution_relu(x, folded, bias, stride, padding, dilation, groups)
    return torch.cudnn_convolution_add_relu(x, folded, residual, 1.0, bias, stride, padding, dilation, groups)


@kernel("aten.bn_act", op="bn_act", supports=_everything)
def bn_act(x, weight, bias, residual, eps, act) -> tuple[Tensor, Tensor, Tensor]:
    if x.numel() == 0:
        mean = torch.full((x.shape[1],), torch.nan, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        return torch.empty_like(x), mean, mean.clone()
    weight, bias = _wide(weight), _wide(bias)
    out, mean, invstd = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
    if residual is not None:
        out += residual
    if act == "relu":
        out.relu_()
    return out, mean, invstd.pow(-2).sub_(eps).clamp_(min=0)


@kernel("aten.bn_act_backward", op="bn_act_backward", supports=_everything)
def bn_act_backward(dy, x, y, weight, mean, var, eps, act, residual) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dz = torch.ops.aten.threshold_backward(dy, y, 0) if act == "relu" else dy
    if x.numel() == 0:
        dx, dweight, dbias = torch.empty_like(x), torch.zeros_like(weight), torch.zeros_like(weight)
    else:
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            dz, x, _wide(weight), None, None, mean, torch.rsqrt(var + eps), True, eps, [True, True, True]
        )
    if not residual:
        dz = x.new_empty(0)
    elif act == "none":
        dz = dy.clone()  # an op's output must not alias its input
    return dx, dweight.to(weight.dtype), dbias.to(weight.dtype), dz


def _wide(vector: Tensor) -> Tensor:
    """Float32 at least: with low-precision parameters torch would return low-precision statistics."""
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
    return dy, dy * gate, (dy * x).sum((2, 3), keepdim=True)


# ---------------------------------------------------------------- over several convolutions: one after the other, as a plan runs them


def _biased(x: Tensor, weight: Tensor, bias: Tensor, stride=1, padding=0) -> Tensor:
    return F.conv2d(x, weight, bias.to(weight.dtype), stride, padding)


def _laid(out: Tensor) -> Tensor:
    """NHWC strides, also where one pixel or one channel would pass for it with others."""
    n, c, h, w = out.shape
    out = out.contiguous(memory_format=torch.channels_last)
    return out.as_strided(out.shape, (max(h * w * c, 1), 1, max(w * c, 1), max(c, 1)))


@kernel("aten.pointwise_pair", op="pointwise_pair", supports=_everything)
def pointwise_pair(x, weight, x2, weight2, bias, stride2) -> Tensor:
    return _laid(_biased(x, weight, bias).add_(F.conv2d(x2, weight2, None, stride2)).relu_())


@kernel("aten.conv_tail", op="conv_tail", supports=_everything)
def conv_tail(x, weight2, bias2, weight3, bias3, residual, projection, weight1, bias1) -> tuple[Tensor, Tensor]:
    middle = _biased(x, weight2, bias2, padding=1).relu_()
    shortcut = residual if projection is None else F.conv2d(residual, projection)
    y = _biased(middle, weight3, bias3).add_(shortcut).relu_()
    return _laid(y), _laid(_biased(y, weight1, bias1).relu_())


@kernel("aten.conv_pool", op="conv_pool", supports=_everything)
def conv_pool(x, weight, bias, mean, std) -> Tensor:
    padding = weight.shape[2] // 2, weight.shape[3] // 2
    out = _biased(reference.normalized(x, mean, std, weight.dtype), weight, bias, 2, padding).relu_()
    return _laid(F.max_pool2d(out, 3, 2, 1))


@kernel("aten.pointwise_pool", op="pointwise_pool", supports=_everything)
def pointwise_pool(x, weight, bias, residual) -> Tensor:
    return _biased(x, weight, bias).add_(residual).relu_().mean((2, 3))
