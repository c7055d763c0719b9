"""The mathematics of every op in plain torch: the oracle. Written to be obviously right, in any dtype.

Every function here has the flat signature of the op it defines, is differentiable in every mode (reverse, forward,
double) because it is made of ATen operations only, and depends on torch alone. Kernels are judged against these
functions in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda z: z, "relu": torch.relu}


def affine(
    scale: Tensor, shift: Tensor, mean: Tensor | None, var: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The per-channel map y = s·x + t that batch norm is at inference: s = γ/√(σ²+ε), t = β − μ·s.

    Without ``mean`` and ``var`` the two vectors are s and t already. Low-precision vectors are widened to float32
    first.
    """
    wide = torch.promote_types(scale.dtype, torch.float32)
    s, t = scale.to(wide), shift.to(wide)
    if mean is None or var is None:
        return s, t
    s = s * torch.rsqrt(var.to(wide) + eps)
    return s, t - mean.to(wide) * s


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    eps: float = 0.0,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    act: str = "none",
) -> Tensor:
    """act(conv(x, weight)·s + t + residual), with (s, t) from :func:`affine`."""
    s, t = affine(scale, shift, mean, var, eps)
    z = F.conv2d(x, weight, None, stride, padding, dilation, groups)
    z = z * s.view(1, -1, 1, 1) + t.view(1, -1, 1, 1)
    if residual is not None:
        z = z + residual
    return ACTIVATIONS[act](z).to(x.dtype)


def bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    act: str = "none",
) -> tuple[Tensor, Tensor, Tensor]:
    """(act((x − μ)/√(σ²+ε)·γ + β + residual), μ, σ²): training batch norm with the batch's μ and biased σ²."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = wide.mean((0, 2, 3))
    var = (wide - mean.view(1, -1, 1, 1)).square().mean((0, 2, 3))
    s, t = affine(weight, bias, mean, var, eps)
    z = wide * s.view(1, -1, 1, 1) + t.view(1, -1, 1, 1)
    if residual is not None:
        z = z + residual
    y = ACTIVATIONS[act](z)
    return y.to(x.dtype), mean, var


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
    """Gradients of :func:`bn_act` with respect to x, γ, β and (empty if there is none) the residual.

    dz = dy·[y > 0];  x̂ = (x − μ)/√(σ²+ε);  dβ = Σdz;  dγ = Σdz·x̂;  dx = γ/√(σ²+ε)·(dz − mean(dz) − x̂·mean(dz·x̂)).
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    dz = relu_mask(dy, y, act)
    g = dz.to(wide)
    rstd = torch.rsqrt(var + eps)
    centred = x.to(wide) - mean.view(1, -1, 1, 1)
    xhat = centred * rstd.view(1, -1, 1, 1)
    dbias = g.sum((0, 2, 3))
    dweight = (g * xhat).sum((0, 2, 3))
    n = x.numel() // x.shape[1]
    mean_g = (dbias / n).view(1, -1, 1, 1)
    mean_gx = (dweight / n).view(1, -1, 1, 1)
    s = (weight.to(wide) * rstd).view(1, -1, 1, 1)
    dx = (g - mean_g - xhat * mean_gx) * s
    dresidual = dz if residual else x.new_empty(0)
    return dx.to(x.dtype), dweight.to(weight.dtype), dbias.to(weight.dtype), dresidual


def add_act(x: Tensor, y: Tensor, gate: Tensor | None = None, act: str = "none") -> Tensor:
    """act(x·gate + y); ``gate``, [N, C, 1, 1], scales each channel of each image (squeeze-and-excitation)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    z = x.to(wide)
    if gate is not None:
        z = z * gate
    return ACTIVATIONS[act](z + y).to(x.dtype)


def add_act_backward(
    dout: Tensor, out: Tensor, x: Tensor | None, gate: Tensor | None, act: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`add_act`: (dy, dx, dgate); dx and dgate are empty without a gate, where dx equals dy.

    dy = dout·[out > 0];  dx = dy·gate;  dgate = Σ_hw dy·x.
    """
    dy = relu_mask(dout, out, act)
    if gate is None:
        return dy, dout.new_empty(0), dout.new_empty(0)
    assert x is not None, "a gate's gradient needs x"
    wide = torch.promote_types(dy.dtype, torch.float32)
    dgate = (dy.to(wide) * x).sum((2, 3), keepdim=True)
    return dy, (dy.to(wide) * gate).to(dout.dtype), dgate.to(gate.dtype)


def pointwise_pair(
    x: Tensor,
    weight: Tensor,
    x2: Tensor,
    weight2: Tensor,
    bias: Tensor,
    stride2: Sequence[int] = (1, 1),
) -> Tensor:
    """relu(conv(x, weight) + conv(x2, weight2) + bias), both 1×1, the second with a stride."""
    z = F.conv2d(x, weight) + F.conv2d(x2, weight2, None, stride2)
    return torch.relu(z + bias.view(1, -1, 1, 1)).to(x.dtype)


def conv_tail(
    x: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    weight3: Tensor,
    bias3: Tensor,
    residual: Tensor,
    projection: Tensor | None,
    weight1: Tensor,
    bias1: Tensor,
) -> tuple[Tensor, Tensor]:
    """(y, z): m = relu(conv3×3(x) + b₂);  y = relu(conv1×1(m) + b₃ + r);  z = relu(conv1×1(y) + b₁).

    r is the residual or its projection.
    """
    middle = torch.relu(F.conv2d(x, weight2, padding=1) + bias2.view(1, -1, 1, 1)).to(x.dtype)
    shortcut = residual if projection is None else F.conv2d(residual, projection)
    y = torch.relu(F.conv2d(middle, weight3) + shortcut + bias3.view(1, -1, 1, 1)).to(x.dtype)
    return y, torch.relu(F.conv2d(y, weight1) + bias1.view(1, -1, 1, 1)).to(x.dtype)


def normalized(x: Tensor, mean: Tensor | None, std: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(x − mean)/std for each channel, in ``dtype``; x itself without them."""
    if mean is None or std is None:
        return x
    centred = x - mean.view(1, -1, 1, 1)
    return (centred / std.view(1, -1, 1, 1)).to(dtype)


def conv_pool(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor | None = None, std: Tensor | None = None
) -> Tensor:
    """maxpool3×3(relu(conv(x', weight) + bias)), both of stride 2; x' = x or (x − mean)/std."""
    *_, r, s = weight.shape
    x = normalized(x, mean, std, weight.dtype)
    z = F.conv2d(x, weight, None, stride=2, padding=(r // 2, s // 2))
    z = z + bias.view(1, -1, 1, 1)
    pooled = F.max_pool2d(torch.relu(z), kernel_size=3, stride=2, padding=1)
    return pooled.to(weight.dtype)


def pointwise_pool(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """The mean over height and width of relu(conv1×1(x, weight) + bias + residual)."""
    z = F.conv2d(x, weight) + bias.view(1, -1, 1, 1) + residual
    return torch.relu(z).mean((2, 3)).to(x.dtype)


def relu_mask(dout: Tensor, out: Tensor | None, act: str) -> Tensor:
    """The gradient before the activation, from the output: eager's rule, which lets a NaN output's gradient through."""
    if act == "none":
        return dout.clone()
    assert out is not None  # a ReLU's mask is read from its output
    return torch.where(out <= 0, 0, dout)
