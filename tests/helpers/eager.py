"""Eager references for the ops' tests: what a user writes without this package, edge operands, small helpers."""

from __future__ import annotations

import copy
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnet_fast import ops

CL = torch.channels_last
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def eager_conv(
    x,
    weight,
    scale,
    shift,
    residual=None,
    *,
    mean=None,
    var=None,
    eps=0.0,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    act="relu",
) -> Tensor:
    """What a user writes without this package: torch's convolution, batch norm (or affine), add and ReLU."""
    z = F.conv2d(x, weight, None, stride, padding, dilation, groups)
    if mean is None:
        z = z * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
    else:
        z = F.batch_norm(z, mean, var, scale, shift, False, 0.0, eps)
    z = z if residual is None else z + residual
    return torch.relu(z) if act == "relu" else z


def eager_affine(*args, mean=None, var=None, eps=0.0, **keywords) -> Tensor:
    """The same with batch norm written out, because F.batch_norm has no gradient for its statistics."""
    if mean is None:
        return eager_conv(*args, **keywords)
    x, weight, scale, shift, *rest = args
    s = scale * torch.rsqrt(var + eps)
    return eager_conv(x, weight, s, shift - mean * s, *rest, **keywords).to(x.dtype)


def eager_bn(x, weight, bias, residual=None, *, eps=1e-5, act="relu") -> Tensor:
    z = F.batch_norm(x, None, None, weight, bias, True, 0.0, eps)
    z = z if residual is None else z + residual
    return torch.relu(z) if act == "relu" else z


def eager_add(x, y, gate=None, *, act="relu") -> Tensor:
    z = (x if gate is None else x * gate) + y
    return torch.relu(z) if act == "relu" else z


def vectors(
    k: int, dtype: torch.dtype = torch.float64, scales=(0.0, -0.7, 1e-3, 1.3)
) -> tuple[Tensor, ...]:
    """scale (zero, negative and tiny among them), shift, mean, var."""
    scale = torch.tensor([scales[i % len(scales)] for i in range(k)], dtype=dtype)
    return (
        scale,
        torch.randn(k, dtype=dtype) + 0.1,
        torch.randn(k, dtype=dtype),
        torch.rand(k, dtype=dtype) + 0.3,
    )


def conv_case(
    dtype=torch.float64, four=True, residual=True, groups=2, stride=2, size=(4, 3)
) -> tuple[tuple, dict]:
    """Tensors (x, weight, scale, shift, residual, mean, var) and keywords of one small convolution."""
    x, weight = (
        torch.randn(2, 2, *size, dtype=dtype),
        torch.randn(4, 2 // groups, 3, 3, dtype=dtype),
    )
    scale, shift, mean, var = vectors(4, torch.promote_types(dtype, torch.float32))
    geometry = {"stride": stride, "padding": 1, "groups": groups}
    res = torch.randn_like(F.conv2d(x, weight, None, **geometry)) if residual else None
    if not four:
        mean = var = None
    return (x, weight, scale, shift, res, mean, var), {**geometry, "eps": 1e-5 if four else 0.0}


def call_conv(op, tensors: tuple, act: str, **keywords) -> Tensor:
    return op(*tensors[:5], mean=tensors[5], var=tensors[6], act=act, **keywords)


def off_the_kink(residual: Tensor, z: Tensor) -> Tensor:
    """The residual that moves a sum z at least 1 away from ReLU's kink, where a rounding decides the gradient."""
    return residual + torch.sign(z).to(residual.dtype) * 2


def leaves(tensors: tuple) -> tuple:
    return tuple(
        t.detach().clone().requires_grad_() if isinstance(t, Tensor) else t for t in tensors
    )


def given_only(tensors: tuple) -> list[Tensor]:
    return [t for t in tensors if isinstance(t, Tensor)]


def pairs(dtype=torch.float64):
    """(name, ours, eager's, tensors): every op as a function of its tensors alone, beside eager's composite."""
    for four, residual in itertools.product((True, False), (True, False)):
        tensors, keywords = conv_case(dtype, four=four, residual=residual)

        def conv(op, tensors=tensors, keywords=keywords):
            def run(*live):
                it = iter(live)
                return call_conv(
                    op, tuple(None if t is None else next(it) for t in tensors), "relu", **keywords
                )

            return run

        yield (
            f"conv-{four}-{residual}",
            conv(ops.conv_bn_act),
            conv(eager_affine),
            given_only(tensors),
        )
    x, (scale, shift, *_) = (
        torch.randn(3, 4, 3, 2, dtype=dtype),
        vectors(4, torch.promote_types(dtype, torch.float32)),
    )
    yield "bn", lambda *a: ops.bn_act(*a)[0], eager_bn, [x, scale, shift]
    yield (
        "bn-residual",
        lambda *a: ops.bn_act(*a)[0],
        eager_bn,
        [x, scale, shift, torch.randn_like(x)],
    )
    yield "add", ops.add_act, eager_add, [x, torch.randn_like(x)]
    yield (
        "add-gate",
        ops.add_act,
        eager_add,
        [x, torch.randn_like(x), torch.rand(3, 4, 1, 1, dtype=dtype)],
    )


def layouts(t: Tensor) -> dict[str, Tensor]:
    """The same values in NCHW, NHWC, a slice of a wider tensor, every second row of a taller one, transposed."""
    n, c, h, w = t.shape
    wider, taller = t.new_full((n, c, h, w + 3), 7.0), t.new_full((n, c, 2 * h, w), 7.0)
    wider[..., 1:-2], taller[:, :, ::2] = t, t
    return {
        "nchw": t.contiguous(),
        "nhwc": t.contiguous(memory_format=CL),
        "sliced": wider[..., 1:-2],
        "stepped": taller[:, :, ::2],
        "transposed": t.transpose(2, 3).contiguous().transpose(2, 3),
    }


def outcome(m: nn.Module, x: Tensor, training: bool, backward: bool) -> list[Tensor | None]:
    """The answer, what became of the input and the statistics; with ``backward`` every gradient too."""
    m = copy.deepcopy(m).train(training)
    given = x.clone().requires_grad_(backward)
    seen = given * 1  # not a leaf: a forward may write to it
    torch.manual_seed(1)
    with torch.set_grad_enabled(backward):
        y = m(seen)
    if backward:
        y.square().sum().backward()
    return [y.detach(), seen.detach(), given.grad, *(p.grad for p in m.parameters()), *m.buffers()]
