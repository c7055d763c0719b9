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
from . import check, rule, samples
from .eager import eager
from .rule import Error, Verdict

ORACLE_IMAGES = 4
CHUNK = 2**25  # elements compared at once, in float64


def verify(kernel: Kernel, problem: Problem) -> Verdict:
    """Judge a kernel on a problem of any batch size by the error rule, in poisoned memory, inputs unchanged."""
    copies = repeats(problem)
    if copies == 1:
        return check.check_kernel(kernel, problem)
    op = samples.SAMPLES[problem.op]
    small, exact, bar = _small_case(_small(problem, copies))
    args = repeat(problem, small, copies)
    outputs = check.run_poisoned(kernel, problem, args)
    errors = []
    reasons = []
    for i, got in enumerate(outputs):
        if not exact[i].numel():
            continue
        mean = got.double() / copies if i in op.sums else got
        found, reason = _judge(mean, bar[i], exact[i], copies, gradient=op.gradient)
        errors.append(found)
        if reason is not None:
            reasons.append(f"output {i}: {reason}")
    if _changed(problem, args, small, copies):
        reasons.append("it changed an input")
    return Verdict(
        kernel.id,
        problem,
        errors[0],
        rule.error(bar[0], exact[0]),
        "; ".join(reasons) or None,
    )


def repeats(problem: Problem) -> int:
    """How often a small batch of at most four images repeats in the problem's; 1 if it is small already or strided."""
    n = problem.x[0]
    if n <= ORACLE_IMAGES or problem.layout == "strided" or problem.residual == "strided":
        return 1
    small_batch = max(d for d in range(1, ORACLE_IMAGES + 1) if n % d == 0)
    return n // small_batch


def full_args(problem: Problem, seed: int = 0) -> tuple:
    """Flat arguments at the problem's own size: random images, repeated beyond four."""
    copies = repeats(problem)
    small = samples.make_args(_small(problem, copies), seed)
    return repeat(problem, small, copies)


def repeat(problem: Problem, args: tuple, copies: int) -> tuple:
    """The arguments with each per-image tensor ``copies`` times along the batch, in the same layout."""
    images = samples.SAMPLES[problem.op].images
    repeated = list(args)
    for i in images:
        if isinstance(args[i], Tensor):
            repeated[i] = _repeat(args[i], copies)
    return tuple(repeated)


def _repeat(t: Tensor, copies: int) -> Tensor:
    """The tensor ``copies`` times along its first axis."""
    nhwc = t.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if nhwc else torch.contiguous_format
    n, *rest = t.shape
    shape = copies * n, *rest
    out = torch.empty(shape, dtype=t.dtype, device=t.device, memory_format=memory_format)
    repetitions = out.unflatten(0, (copies, n))
    repetitions.copy_(t)
    return out


def _small(problem: Problem, copies: int) -> Problem:
    """The problem of the batch that repeats."""
    batch, *image = problem.x
    return replace(problem, x=(batch // copies, *image))


@functools.lru_cache(maxsize=2)
def _small_case(small: Problem) -> tuple[tuple, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(arguments, float64 oracle, eager's answer) of a small problem; the next kernel asks for the same."""
    args = samples.make_args(small)
    exact = check.oracle(small.op, args)
    bar = eager(small.op, args)
    return args, exact, bar


def _changed(problem: Problem, args: tuple, small: tuple, copies: int) -> bool:
    """Whether any argument is no longer the small one, repeated."""
    images = samples.SAMPLES[problem.op].images
    for i, (arg, one) in enumerate(zip(args, small, strict=True)):
        times = copies if i in images else 1
        if isinstance(arg, Tensor) and not _repeats(arg, one, times):
            return True
    return False


def _repeats(t: Tensor, small: Tensor, copies: int) -> bool:
    """Whether the tensor is the small one, ``copies`` times."""
    repetitions = t.unflatten(0, (copies, small.shape[0]))
    return bool((repetitions == small).all())


def _judge(
    got: Tensor, bar: Tensor, exact: Tensor, copies: int, *, gradient: bool
) -> tuple[Error, str | None]:
    """The worst error of any repetition and how it breaks the rule, or None."""
    shape = list(exact.shape)
    has_images = exact.dim() > 1  # else it is a sum over the batch
    if has_images:
        shape[0] *= copies
    if list(got.shape) != shape:
        nan = float("nan")
        return Error(nan, nan), f"shape {list(got.shape)}, expected {shape}"
    repetitions = got.unflatten(0, (copies, exact.shape[0])) if has_images else got.unsqueeze(0)
    worst = _worst(repetitions, exact)
    eager_error = rule.error(bar, exact)
    return worst, rule.too_large(worst, eager_error, bar.dtype, gradient=gradient)


def _worst(got: Tensor, exact: Tensor) -> Error:
    """Largest RMS and maximum distance from ``exact`` among got[0], got[1] …; NaN anywhere is NaN here."""
    exact = exact.to(got.device)
    tiny = torch.finfo(torch.float64).tiny
    rms = exact.square().mean().sqrt().clamp_min(tiny)
    largest = exact.abs().max().clamp_min(tiny)
    images_at_once = max(1, CHUNK // exact.numel())
    found = []
    for part in got.split(images_at_once):
        distance = (part.double() - exact).flatten(1)
        part_rms = distance.square().mean(1).sqrt().max() / rms
        part_max = distance.abs().max() / largest
        found.append(torch.stack([part_rms, part_max]))
    worst = torch.stack(found).amax(0)
    return Error(*worst.tolist())
