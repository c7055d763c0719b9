"""How a kernel is judged: the error rule against a float64 oracle, problem grids, inputs for a problem, poisoned memory.

The rule: err(kernel, float64) ≤ 2 × err(eager in the same dtype, float64) + floor, 3 × for gradients, by RMS and by
maximum, both relative to the oracle's own. The floor is a few roundings of the dtype. Nothing here loosens it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..dispatch.problem import ACROSS, Problem
from ..ops import reference

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# ---------------------------------------------------------------- inputs


def make_args(problem: Problem, seed: int = 0, device: str | torch.device | None = None) -> tuple:
    """Random flat arguments for a problem, in its dtypes, layouts and device; the affine has negative, zero and tiny scales among others."""
    generator = torch.Generator().manual_seed(seed)
    device = device or problem.device

    def normal(*shape: int, layout: str = "nhwc", dtype: torch.dtype = problem.dtype, std: float = 1.0) -> Tensor:
        return _lay(torch.randn(shape, generator=generator).mul_(std).to(device, dtype), layout)

    def vectors(k: int) -> list[Tensor]:
        wide = torch.promote_types(problem.dtype, torch.float32)
        scale, shift, mean = (normal(k, dtype=wide) for _ in range(3))
        scale[::5], scale[1::7] = 0.0, 1e-3
        return [scale, shift, mean * 0.5, torch.rand(k, generator=generator).add_(0.1).to(device, wide)]

    if problem.op == "conv_bn_act":
        return _conv_args(problem, normal, vectors)
    if problem.op == "bn_act":
        scale, shift, *_ = vectors(problem.x[1])
        x = normal(*problem.x, layout=problem.layout) + 0.5
        return x, scale, shift, _maybe(problem.residual, normal, problem.x), 1e-5, problem.act
    if problem.op == "bn_act_backward":
        forward = make_args(replace(problem, op="bn_act"), seed, device)
        y, mean, var = reference.bn_act(*forward)
        dy = normal(*problem.x, layout=problem.layout)
        return (
            dy,
            forward[0],
            _lay(y, problem.layout),
            forward[1],
            mean,
            var,
            1e-5,
            problem.act,
            problem.residual is not None,
        )
    if problem.op in ACROSS:
        return across_args(problem, normal, vectors)
    x, y = normal(*problem.x, layout=problem.layout), normal(*problem.x, layout=problem.residual or problem.layout)
    gate = torch.sigmoid(normal(*problem.x[:2], 1, 1)) if problem.gate else None
    if problem.op == "add_act":
        return x, y, gate, problem.act
    out = _lay(reference.add_act(x, y, gate, problem.act), problem.layout)
    dout = normal(*problem.x, layout=problem.layout)
    return dout, out, x if problem.gate else None, gate, problem.act


def _conv_args(problem: Problem, normal: Callable, vectors: Callable) -> tuple:
    k, c, r, s = problem.weight
    x = normal(*problem.x, layout=problem.layout)
    weight = normal(*problem.weight, layout=problem.layout, std=(2.0 / (c * r * s)) ** 0.5)
    scale, shift, mean, var = vectors(k)
    residual = _maybe(problem.residual, normal, (problem.x[0], k, *problem.out_hw))
    four = (mean, var, 1e-5) if problem.bn else (None, None, 0.0)
    return (
        x,
        weight,
        scale,
        shift,
        residual,
        *four,
        problem.stride,
        problem.padding,
        problem.dilation,
        problem.groups,
        problem.act,
    )


def across_args(problem: Problem, normal: Callable, vectors: Callable) -> tuple:
    """Filters that keep the variance, biases as a folded batch norm has them."""

    def conv(shape: tuple[int, ...]) -> Tensor:
        return normal(*shape, std=(2.0 / (shape[1] * shape[2] * shape[3])) ** 0.5)

    def bias(shape: tuple[int, ...]) -> Tensor:
        return vectors(shape[0])[1]

    wide = torch.promote_types(problem.dtype, torch.float32)
    n, (k, *_), first = problem.x[0], problem.weight, conv(problem.weight)
    x = normal(*problem.x, layout=problem.layout, **({"dtype": wide} if problem.bytes else {}))
    if problem.op == "pointwise_pair":
        (second,) = problem.chain
        sizes = problem.second or tuple(size * s for size, s in zip(problem.x[2:], problem.stride, strict=True))
        x2 = normal(n, second[1], *sizes, layout=problem.residual or "nhwc")
        return x, first, x2, conv(second), bias(second), problem.stride
    if problem.op == "conv_tail":
        third, projection, after = problem.chain
        residual = normal(
            n, projection[1] if projection else third[0], *problem.x[2:], layout=problem.residual or "nhwc"
        )
        return (
            x,
            first,
            bias(problem.weight),
            conv(third),
            bias(third),
            residual,
            conv(projection) if projection else None,
            conv(after),
            bias(after),
        )
    if problem.op == "conv_pool":
        if not problem.bytes:
            return x, first, bias(problem.weight), None, None
        mean, std = (
            torch.tensor(v, dtype=wide, device=x.device).repeat(problem.x[1])[: problem.x[1]] * 255 for v in IMAGENET
        )
        pixels = _lay((x * 64 + 128).clamp(0, 255).to(torch.uint8), problem.layout)
        return pixels, first, bias(problem.weight), mean, std
    return x, first, bias(problem.weight), normal(n, k, *problem.x[2:], layout=problem.residual or "nhwc")


def _maybe(layout: str | None, normal: Callable, shape: tuple[int, ...]) -> Tensor | None:
    return None if layout is None else normal(*shape, layout=layout)


def _lay(t: Tensor, layout: str) -> Tensor:
    """The same values in the named layout; "strided" is a slice of something wider."""
    if t.dim() != 4:
        return t
    if layout == "nhwc":
        return t.contiguous(memory_format=torch.channels_last)
    if layout == "nchw":
        return t.contiguous()
    wide = t.new_zeros(*t.shape[:-1], t.shape[-1] + 3)
    wide[..., 1:-2] = t
    return wide[..., 1:-2]


# ---------------------------------------------------------------- judging


# ---------------------------------------------------------------- grids
