"""THE CONTRACT: each op's signature, what it computes, its checks, its fake and its derivative. Which kernel runs is ``dispatch``'s.

Three public ops: ``conv_bn_act`` (inference or frozen batch norm), ``bn_act`` (training batch norm) and ``add_act`` (residual add). Each is
differentiable twice; forward-mode AD and functorch transforms run the reference instead of a kernel, in plain ATen. Layout: any strides
are right, NHWC (channels_last) is what the kernels want. Accumulation, affine, residual and activation are float32
(float64 for float64), rounded once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from ..dispatch.registry import chosen, select
from . import reference
from .library import below_autograd, define

Pair = int | tuple[int, int]


def conv_bn_act(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    *,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    eps: float = 0.0,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    act: str = "relu",
) -> Tensor:
    """Convolution, per-channel affine, residual and activation: act(conv(x, weight)·s + t + residual).

    With ``mean`` and ``var`` (batch norm's four vectors and ``eps``) s = scale/√(var+eps) and t = shift − mean·s; without, s = scale and
    t = shift. x: [N, C, H, W]; weight: [K, C/groups, R, S] of the same dtype; scale, shift, mean, var: [K]; residual: the output's shape
    [N, K, H', W'] and dtype; act: "relu" or "none". Any floating dtype; strides of the result are those ``F.conv2d`` gives.
    Raises RuntimeError (ValueError for ``act``) with the op's name, what it got and what it expected. Source: the usual inference
    folding (Jacob et al. 2018, eq. 14; cuDNN's ConvBiasAddActivation).
    """
    args = (x, weight, scale, shift, residual, mean, var, eps, pair(stride), pair(padding), pair(dilation), groups, act)
    if composite():
        return reference.conv_bn_act(*args)
    if _direct(x, weight):
        return select("conv_bn_act", args, check_conv_bn_act)(*args)
    return CONV_BN_ACT(*args)


def bn_act(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None, *, eps: float = 1e-5, act: str = "relu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Training batch norm, residual and activation: act((x − μ)/√(σ²+eps)·weight + bias + residual); returns (y, μ, σ²).

    μ and the biased σ² are the batch's, float32 (float64 for float64), without gradient: the caller updates its running statistics with
    them. x, residual: [N, C, H, W] of one dtype; weight, bias: [C]. Raises ValueError for one value per channel, as
    torch does, RuntimeError for shapes and dtypes. Source: Ioffe and Szegedy 2015; torch.nn.BatchNorm2d.
    """
    args = (x, weight, bias, residual, eps, act)
    if not composite():
        return BN_ACT(*args)
    y, mean, var = reference.bn_act(*args)
    return y, mean.detach(), var.detach()


def fuses_bn_act(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float, act: str) -> bool:
    """Whether a kernel of ours would compute this :func:`bn_act`; torch's has more launches in it than the modules that it stands for.

    If not, the choice is seen here by who records choices, for the op will not be called.
    """
    args = (x, weight, bias, residual, eps, act)
    if not chosen("bn_act", args, check_bn_act)[1].id.startswith("aten."):
        return True
    select("bn_act", args, check_bn_act)
    return False


def add_act(x: Tensor, y: Tensor, gate: Tensor | None = None, *, act: str = "relu") -> Tensor:
    """Residual add, with an optional squeeze-and-excitation gate, and activation: act(x·gate + y).

    x, y: [N, C, H, W] of one dtype; gate: [N, C, 1, 1] of that dtype. Raises RuntimeError naming what it got and expected.
    Source: He et al. 2016; Hu et al. 2018 for the gate.
    """
    return reference.add_act(x, y, gate, act) if composite() else ADD_ACT(x, y, gate, act)


def composite() -> bool:
    """Under functorch, forward-mode AD and dispatch modes an op is its own formula: ATen has every rule for it.

    So FlopCounterMode counts it without a formula of ours, whose registration would import Triton (155 ms) with the package.
    """
    return (
        forward_ad._current_level >= 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
    )


def _direct(x: Tensor, weight: Tensor) -> bool:
    """Whether the dispatcher would only find the kernel: no gradients, autocast, tracing, subclasses or profiler. It takes 17 µs."""
    return (
        not torch.is_grad_enabled()
        and type(x) is Tensor
        and type(weight) in (Tensor, torch.nn.Parameter)
        and not torch.is_autocast_enabled(x.device.type)
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and not torch.autograd._profiler_enabled()
    )


def pair(value: Pair) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


# ---------------------------------------------------------------- checks: once for each new combination of shapes, dtypes and devices


def require(ok: bool, op: str, what: str, got, expected) -> None:
    if not ok:
        raise RuntimeError(f"{op}: {what}: got {got}, expected {expected}")


def _check_act(op: str, act: str) -> None:
    if act not in reference.ACTIVATIONS:
        raise ValueError(f"{op}: act: got {act!r}, expected one of {', '.join(map(repr, reference.ACTIVATIONS))}")


def check_images(op: str, x: Tensor, **others: Tensor | None) -> None:
    require(x.dim() == 4, op, "x", f"{x.dim()}-D shape {list(x.shape)}", "4-D [N, C, H, W]")
    require(x.is_floating_point(), op, "x dtype", x.dtype, "a floating dtype")
    for name, t in others.items():
        if t is not None:
            require(t.device == x.device, op, f"{name} device", t.device, f"{x.device} (that of x)")


def check_like(op: str, name: str, t: Tensor | None, shape, dtype: torch.dtype) -> None:
    if t is not None:
        require(tuple(t.shape) == tuple(shape), op, f"{name} shape", list(t.shape), list(shape))
        require(t.dtype == dtype, op, f"{name} dtype", t.dtype, f"{dtype} (that of x)")


def check_vectors(op: str, channels: int, **vectors: Tensor | None) -> None:
    for name, v in vectors.items():
        if v is not None:
            require(tuple(v.shape) == (channels,), op, f"{name} shape", list(v.shape), [channels])
            require(v.is_floating_point(), op, f"{name} dtype", v.dtype, "a floating dtype")


def check_convolution(x: Tensor, weight: Tensor, groups: int, **others: Tensor | None) -> None:
    """Whether ``weight`` can filter ``x``; also asked where a training block calls torch's convolution. Raises RuntimeError."""
    op = "conv_bn_act"
    check_images(op, x, weight=weight, **others)
    require(weight.dim() == 4, op, "weight", f"{weight.dim()}-D shape {list(weight.shape)}", "4-D [K, C/groups, R, S]")
    require(weight.dtype == x.dtype, op, "x dtype", x.dtype, f"{weight.dtype} (that of weight)")
    require(
        x.shape[1] == weight.shape[1] * groups,
        op,
        "x channels",
        x.shape[1],
        f"{weight.shape[1] * groups} (weight is {list(weight.shape)}, groups {groups})",
    )


def check_geometry(op: str, x: Tensor, weight: Tensor, groups: int, **geometry: tuple[int, int]) -> tuple[int, ...]:
    """The output's shape. Libraries divide by a stride and by groups without asking: a 0 would end the process."""
    for name, numbers in geometry.items():
        least = 0 if name == "padding" else 1
        require(
            len(numbers) == 2 and min(numbers) >= least,
            op,
            name,
            list(numbers),
            f"one or two whole numbers of {least} or more",
        )
    require(groups >= 1, op, "groups", groups, "1 or more")
    require(
        weight.numel() > 0 and weight.shape[0] % groups == 0,
        op,
        "weight",
        list(weight.shape),
        f"filters, a multiple of groups ({groups})",
    )
    sizes = [
        (i + 2 * p - d * (k - 1) - 1) // s + 1
        for i, k, s, p, d in zip(x.shape[2:], weight.shape[2:], *geometry.values(), strict=True)
    ]
    require(
        min(sizes) >= 1,
        op,
        "image",
        f"{x.shape[2]}×{x.shape[3]} pixels",
        f"at least one output pixel for filters of {list(weight.shape)} with {', '.join(f'{k} {list(v)}' for k, v in geometry.items())}",
    )
    return x.shape[0], weight.shape[0], *sizes


def check_conv_bn_act(
    x, weight, scale, shift, residual, mean, var, eps, stride, padding, dilation, groups, act
) -> None:
    op = "conv_bn_act"
    _check_act(op, act)
    check_convolution(x, weight, groups, scale=scale, shift=shift, residual=residual, mean=mean, var=var)
    require((mean is None) == (var is None), op, "mean and var", "one of them", "both or neither")
    check_vectors(op, weight.shape[0], scale=scale, shift=shift, mean=mean, var=var)
    check_like(
        op,
        "residual",
        residual,
        check_geometry(op, x, weight, groups, stride=stride, padding=padding, dilation=dilation),
        x.dtype,
    )


def check_bn_act(x, weight, bias, residual, eps, act) -> None:
    op = "bn_act"
    _check_act(op, act)
    check_images(op, x, weight=weight, bias=bias, residual=residual)
    check_vectors(op, x.shape[1], weight=weight, bias=bias)
    check_like(op, "residual", residual, x.shape, x.dtype)
    if x.shape[0] * x.shape[2] * x.shape[3] == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.size()} (bn_act)")


def check_add_act(x, y, gate, act) -> None:
    op = "add_act"
    _check_act(op, act)
    check_images(op, x, y=y, gate=gate)
    check_like(op, "y", y, x.shape, x.dtype)
    check_like(op, "gate", gate, (*x.shape[:2], 1, 1), x.dtype)


def _unchecked(*args) -> None:
    """A backward gets what its forward made."""


# ---------------------------------------------------------------- fakes: shapes and strides without data


def _fake_conv_bn_act(
    x, weight, scale, shift, residual, mean, var, eps, stride, padding, dilation, groups, act
) -> Tensor:
    # Also the Meta kernel, which the dispatcher calls for a mix of real and meta tensors: without a check it would answer.
    check_images("conv_bn_act", x, weight=weight, scale=scale, shift=shift, residual=residual, mean=mean, var=var)
    return F.conv2d(x, weight, None, stride, padding, dilation, groups)


def _fake_bn_act(x, weight, bias, residual, eps, act) -> tuple[Tensor, Tensor, Tensor]:
    check_images("bn_act", x, weight=weight, bias=bias, residual=residual)
    wide = torch.promote_types(x.dtype, torch.float32)
    stats = (torch.empty(x.shape[1], dtype=wide, device=x.device) for _ in range(2))
    return torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)[0], *stats


def _fake_bn_act_backward(dy, x, y, weight, mean, var, eps, act, residual) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(x),
        torch.empty_like(weight),
        torch.empty_like(weight),
        torch.empty_like(y) if residual else x.new_empty(0),
    )


def _fake_add_act(x, y, gate, act) -> Tensor:
    check_images("add_act", x, y=y, gate=gate)
    return x + y if gate is None else torch.addcmul(y, x, gate)


def _fake_add_act_backward(dout, out, x, gate, act) -> tuple[Tensor, Tensor, Tensor]:
    if gate is None:
        return torch.empty_like(out), dout.new_empty(0), dout.new_empty(0)
    return torch.empty_like(out), torch.empty_like(out), torch.empty_like(gate)


# ---------------------------------------------------------------- derivatives


def differentiable(formula, saved: tuple, grad: Tensor | tuple[Tensor, ...]) -> tuple:
    """First derivatives, under ``create_graph`` such that can be differentiated again: autograd on a formula, say the reference up to
    the activation, whose own second derivative is 0.

    On aliases, or a tensor passed twice would be counted twice.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = [a.view_as(a) if isinstance(a, Tensor) else a for a in saved]
        wanted = [a for a in inputs if isinstance(a, Tensor) and a.requires_grad]
        if not wanted:  # only the residual needs a gradient
            return (None,) * len(inputs)
        found = iter(torch.autograd.grad(formula(*inputs), wanted, grad, create_graph=again, allow_unused=True))
    return tuple(next(found) if isinstance(a, Tensor) and a.requires_grad else None for a in inputs)


def _linear_conv(x, weight, scale, shift, mean, var, eps, *geometry) -> Tensor:
    return reference.conv_bn_act(x, weight, scale, shift, None, mean, var, eps, *geometry, "none")


def _linear_bn(x, weight, bias, eps) -> Tensor:
    return reference.bn_act(x, weight, bias, None, eps, "none")[0]


class _ConvBnAct(torch.autograd.Function):
    """dz = dy·[y > 0];  dx = dgrad(dz, w·s);  dw = wgrad(x, dz)·s;  ds = Σ w·wgrad(x, dz), never by dividing by s;  dt = Σ dz."""

    @staticmethod
    def forward(ctx, x, weight, scale, shift, residual, mean, var, eps, *rest):
        out = below_autograd(CONV_BN_ACT, x, weight, scale, shift, residual, mean, var, eps, *rest)
        ctx.save_for_backward(x, weight, scale, shift, mean, var, out if rest[-1] == "relu" else None)
        ctx.rest = (eps, *rest)
        return out

    @staticmethod
    def backward(ctx, dy):
        x, weight, scale, shift, mean, var, out = ctx.saved_tensors
        eps, stride, padding, dilation, groups, act = ctx.rest
        need = ctx.needs_input_grad
        if torch.is_grad_enabled():
            dz = reference.relu_mask(dy, out, act)
            *first, dmean, dvar = differentiable(
                _linear_conv, (x, weight, scale, shift, mean, var, *ctx.rest[:-1]), dz
            )[:6]
            return *first, dz if need[4] else None, dmean, dvar, *[None] * 6
        dz = torch.ops.aten.threshold_backward(dy, out, 0) if act == "relu" else dy
        s, _ = reference.affine(scale, shift, mean, var, eps)
        s4 = s.view(-1, 1, 1, 1)
        geometry = (None, stride, padding, dilation, False, (0, 0), groups)
        dx = dweight = None
        if need[0]:
            folded = (weight * s4).to(weight.dtype)
            dx = torch.ops.aten.convolution_backward(dz, x, folded, *geometry, (True, False, False))[0]
        vectors = [None] * 4
        if need[1] or need[2] or need[6]:
            raw = torch.ops.aten.convolution_backward(dz, x, weight, *geometry, (False, True, False))[1]
            dweight = _flat_like((raw * s4).to(weight.dtype), weight) if need[1] else None
        if any((need[2], need[3], need[5], need[6])):
            dt = dz.sum((0, 2, 3), dtype=s.dtype)
            ds = (weight.to(s.dtype) * raw).sum((1, 2, 3)) if need[2] or need[6] else None
            vectors = _affine_backward(ds, dt, scale, mean, var, eps)
            vectors = [
                v.to(p.dtype) if wanted else None
                for v, p, wanted in zip(
                    vectors, (scale, shift, mean, var), (need[2], need[3], need[5], need[6]), strict=True
                )
            ]
        return dx, dweight, *vectors[:2], dz if need[4] else None, *vectors[2:], *[None] * 6


def _flat_like(grad: Tensor, t: Tensor) -> Tensor:
    """The gradient with a contiguous parameter's strides: callers of autograd.grad ``view`` it, DDP compares them."""
    return grad.reshape(-1).view(t.shape) if t.is_contiguous() and t.stride(-1) == 1 else grad


def _affine_backward(
    ds: Tensor | None, dt: Tensor, scale: Tensor, mean: Tensor | None, var: Tensor | None, eps: float
) -> list:
    """Through s = γ·r, t = β − μ·s, r = (σ²+ε)^-½: dγ = q·r, dβ = dt, dμ = −γ·r·dt, dσ² = −½·γ·r³·q, with q = ds − μ·dt."""
    if mean is None:
        return [ds, dt, None, None]
    r, gamma = torch.rsqrt(var.to(dt.dtype) + eps), scale.to(dt.dtype)
    dmean = -gamma * r * dt
    if ds is None:
        return [None, dt, dmean, None]
    q = ds - mean.to(dt.dtype) * dt
    return [q * r, dt, dmean, -0.5 * gamma * r**3 * q]


class _BnAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, eps, act):
        y, mean, var = below_autograd(BN_ACT, x, weight, bias, residual, eps, act)
        ctx.save_for_backward(x, weight, bias, y if act == "relu" else None, mean, var)
        ctx.rest = eps, act
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx, dy, dmean, dvar):
        x, weight, bias, y, mean, var = ctx.saved_tensors
        eps, act = ctx.rest
        if torch.is_grad_enabled():
            dz = reference.relu_mask(dy, y, act)
            return (
                *differentiable(_linear_bn, (x, weight, bias, eps), dz)[:3],
                dz if ctx.needs_input_grad[3] else None,
                None,
                None,
            )
        y = dy if y is None else y  # without an activation there is no mask to take from it
        dx, dweight, dbias, dresidual = below_autograd(
            BN_ACT_BACKWARD, dy, x, y, weight, mean, var, eps, act, ctx.needs_input_grad[3]
        )
        return dx, dweight, dbias, dresidual if ctx.needs_input_grad[3] else None, None, None


class _AddAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, gate, act):
        out = below_autograd(ADD_ACT, x, y, gate, act)
        # Without a gate the mask is all that backward needs: saving more would hold an activation for nothing.
        ctx.save_for_backward(None if gate is None else x, gate, out)
        ctx.act = act
        return out

    @staticmethod
    def backward(ctx, dout):
        x, gate, out = ctx.saved_tensors
        args = dout, out, x, gate, ctx.act
        again = torch.is_grad_enabled()
        dy, dx, dgate = reference.add_act_backward(*args) if again else below_autograd(ADD_ACT_BACKWARD, *args)
        return (dy, dy, None, None) if gate is None else (dx, dy, dgate, None)


# ---------------------------------------------------------------- registration


def dispatched(op: str, check):
    """The op's implementation: look the kernel up, checking the arguments the first time such a combination is seen."""

    def run(*args):
        return select(op, args, check)(*args)

    return run


CONV_BN_ACT = define(
    "conv_bn_act(Tensor x, Tensor weight, Tensor scale, Tensor shift, Tensor? residual, Tensor? mean, Tensor? var, float eps, "
    "int[2] stride, int[2] padding, int[2] dilation, int groups, str act) -> Tensor",
    impl=dispatched("conv_bn_act", check_conv_bn_act),
    fake=_fake_conv_bn_act,
    function=_ConvBnAct,
    lowered=(0, 1, 4),
)
BN_ACT = define(
    "bn_act(Tensor x, Tensor weight, Tensor bias, Tensor? residual, float eps, str act) -> (Tensor, Tensor, Tensor)",
    impl=dispatched("bn_act", check_bn_act),
    fake=_fake_bn_act,
    function=_BnAct,
)
BN_ACT_BACKWARD = define(
    "bn_act_backward(Tensor dy, Tensor x, Tensor y, Tensor weight, Tensor mean, Tensor var, float eps, str act, bool residual) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    impl=dispatched("bn_act_backward", _unchecked),
    fake=_fake_bn_act_backward,
    function=None,
)
ADD_ACT = define(
    "add_act(Tensor x, Tensor y, Tensor? gate, str act) -> Tensor",
    impl=dispatched("add_act", check_add_act),
    fake=_fake_add_act,
    function=_AddAct,
)
ADD_ACT_BACKWARD = define(
    "add_act_backward(Tensor dout, Tensor out, Tensor? x, Tensor? gate, str act) -> (Tensor, Tensor, Tensor)",
    impl=dispatched("add_act_backward", _unchecked),
    fake=_fake_add_act_backward,
    function=None,
)
