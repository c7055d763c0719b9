"""Verification at full size: a kernel on a whole batch, or on more than 2³¹ elements, with an oracle of a few images.

A problem's images repeat a small batch. A convolution or an elementwise op then repeats its answer, batch statistics
stay what they were and sums over the batch are multiplied: so the float64 oracle runs on at most four images, while the
kernel runs exactly as it will in use, and every element that it writes is judged.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from ..dispatch.problem import Problem
from ..dispatch.registry import Kernel
from . import check, eager, rule, samples
from .rule import FACTOR, FLOOR, GRADIENT_FACTOR, Error, Verdict

# Which flat arguments hold one entry for each image, and which outputs are sums over the batch.
IMAGES = {
    "conv_bn_act": (0, 4),
    "bn_act": (0, 3),
    "bn_act_backward": (0, 1, 2),
    "add_act": (0, 1, 2),
    "add_act_backward": (0, 1, 2, 3),
    "pointwise_pair": (0, 2),
    "conv_tail": (0, 5),
    "conv_pool": (0,),
    "pointwise_pool": (0, 3),
}
SUMS = {"bn_act_backward": (1, 2)}
ORACLE_IMAGES = 4
CHUNK = 2**25  # elements compared at once, in float64


def verify(kernel: Kernel, problem: Problem) -> Verdict:
    """Judge a kernel on a problem of any batch size by the error rule, in poisoned memory, inputs unchanged."""
    copies = repeats(problem)
    if copies == 1:
        return check.check_kernel(kernel, problem)
    small, exact, bar = _case(replace(problem, x=(problem.x[0] // copies, *problem.x[1:])))
    args = repeat(problem, small, copies)
    with check.poisoned(), torch.no_grad():
        outputs = kernel.fn(*args)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if problem.device == "cuda":
        torch.cuda.synchronize()
    found = [
        (
            i,
            _judge(
                got,
                bar[i],
                exact[i],
                copies,
                total=i in SUMS.get(problem.op, ()),
                gradient=problem.op.endswith("_backward"),
            ),
        )
        for i, got in enumerate(outputs)
        if exact[i].numel()
    ]
    reasons = [f"output {i}: {reason}" for i, (_, reason) in found if reason]
    if any(
        isinstance(a, Tensor) and not _repeats(a, b, copies if i in IMAGES[problem.op] else 1)
        for i, (a, b) in enumerate(zip(args, small, strict=True))
    ):
        reasons.append("it changed an input")
    return Verdict(kernel.id, problem, found[0][1][0], rule.error(bar[0], exact[0]), "; ".join(reasons) or None)


def repeats(problem: Problem) -> int:
    """How often a small batch of at most four images repeats in the problem's; 1 if it is small already or strided."""
    n = problem.x[0]
    if n <= ORACLE_IMAGES or problem.layout == "strided" or problem.residual == "strided":
        return 1
    return n // max(d for d in range(1, ORACLE_IMAGES + 1) if n % d == 0)


def full_args(problem: Problem, seed: int = 0) -> tuple:
    """Flat arguments at the problem's own size: random images, repeated beyond four."""
    copies = repeats(problem)
    small = samples.make_args(replace(problem, x=(problem.x[0] // copies, *problem.x[1:])), seed)
    return repeat(problem, small, copies)


def repeat(problem: Problem, args: tuple, copies: int) -> tuple:
    """The arguments with each per-image tensor ``copies`` times along the batch, in the same layout."""
    return tuple(
        _repeat(a, copies) if i in IMAGES[problem.op] and isinstance(a, Tensor) else a for i, a in enumerate(args)
    )


def _repeat(t: Tensor, copies: int) -> Tensor:
    nhwc = t.is_contiguous(memory_format=torch.channels_last)
    out = torch.empty(
        (copies * t.shape[0], *t.shape[1:]),
        dtype=t.dtype,
        device=t.device,
        memory_format=torch.channels_last if nhwc else torch.contiguous_format,
    )
    out.unflatten(0, (copies, t.shape[0])).copy_(t)
    return out


@functools.lru_cache(maxsize=2)
def _case(small: Problem) -> tuple[tuple, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(arguments, float64 oracle, eager's answer) of a small problem; the next kernel asks for the same."""
    args = samples.make_args(small)
    return args, check.oracle(small.op, args), eager.eager(small.op, args)


def _repeats(t: Tensor, small: Tensor, copies: int) -> bool:
    return bool((t.unflatten(0, (copies, small.shape[0])) == small).all())


def _judge(
    got: Tensor, bar: Tensor, exact: Tensor, copies: int, *, total: bool, gradient: bool
) -> tuple[Error, str | None]:
    """The worst error of any repetition and how it breaks the rule, or None."""
    images = exact.dim() > 1
    if total:
        got = got.double() / copies
    shape = (copies * exact.shape[0], *exact.shape[1:]) if images else exact.shape
    if got.shape != shape:
        return Error(float("nan"), float("nan")), f"shape {list(got.shape)}, expected {list(shape)}"
    mine = _worst(got.unflatten(0, (copies, exact.shape[0])) if images else got.unsqueeze(0), exact)
    eager, factor, floor = rule.error(bar, exact), GRADIENT_FACTOR if gradient else FACTOR, FLOOR[bar.dtype]
    for name in ("rms", "max"):
        if not getattr(mine, name) <= factor * getattr(eager, name) + floor:
            return mine, (
                f"{name} error {getattr(mine, name):.3g}, allowed {factor:g} × {getattr(eager, name):.3g} + {floor:g}"
            )
    return mine, None


def _worst(got: Tensor, exact: Tensor) -> Error:
    """Largest RMS and maximum distance from ``exact`` among got[0], got[1] …; NaN anywhere is NaN here."""
    exact = exact.to(got.device)
    tiny = torch.finfo(torch.float64).tiny
    rms, top = exact.square().mean().sqrt().clamp_min(tiny), exact.abs().max().clamp_min(tiny)
    found = []
    for part in got.split(max(1, CHUNK // exact.numel())):
        apart = (part.double() - exact).flatten(1)
        found.append(torch.stack([apart.square().mean(1).sqrt().max() / rms, apart.abs().max() / top]))
    worst = torch.stack(found).amax(0)
    return Error(*worst.tolist())
