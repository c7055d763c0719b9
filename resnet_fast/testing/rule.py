"""The error rule: a kernel's error against float64 is at most twice eager's own, three times for gradients.

The rule: err(kernel, float64) ≤ 2 × err(eager in the same dtype, float64) + floor, 3 × for gradients, by RMS and by
maximum, both relative to the oracle's own. The floor is a few roundings of the dtype. Nothing here loosens it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..dispatch.problem import Problem

FACTOR, GRADIENT_FACTOR = 2.0, 3.0

# An eager result can be exact by luck; no kernel is asked for better than a few roundings of its own dtype.
FLOOR = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@dataclass(frozen=True)
class Error:
    """Relative distance from the oracle: root mean square and maximum, both over the oracle's RMS and maximum."""

    rms: float
    max: float


@dataclass(frozen=True)
class Verdict:
    """What ``check_kernel`` found for one kernel on one problem; ``reason`` is None if it passed."""

    kernel: str
    problem: Problem
    error: Error
    eager: Error
    reason: str | None

    @property
    def ok(self) -> bool:
        return self.reason is None


def error(got: Tensor, oracle: Tensor) -> Error:
    """Distance of ``got`` from a float64 oracle, over the elements where the oracle is finite.

    Empty tensors have none.
    """
    got, oracle = got.detach().to("cpu", torch.float64), oracle.detach().cpu()
    finite = oracle.isfinite()
    difference = (got - oracle)[finite]
    exact = oracle[finite]
    if exact.numel() == 0:
        return Error(0.0, 0.0)
    tiny = torch.finfo(torch.float64).tiny
    rms = difference.square().mean().sqrt() / exact.square().mean().sqrt().clamp_min(tiny)
    largest = difference.abs().max() / exact.abs().max().clamp_min(tiny)
    return Error(rms.item(), largest.item())


def broken_rule(
    got: Tensor, eager: Tensor, oracle: Tensor, *, gradient: bool = False
) -> str | None:
    """The sentence that says how ``got`` breaks the error rule, or None if it obeys it.

    NaN and infinities must lie where eager's lie.
    """
    if got.shape != oracle.shape:
        return f"shape {list(got.shape)}, expected {list(oracle.shape)}"
    if not same_nonfinite(got, eager):
        return "NaN or infinity where eager has none, or the other way round"
    return too_large(error(got, oracle), error(eager, oracle), eager.dtype, gradient=gradient)


def too_large(
    found: Error, eager: Error, dtype: torch.dtype, *, gradient: bool = False
) -> str | None:
    """The sentence that says which error is larger than eager's allows, or None; NaN is too large."""
    factor = GRADIENT_FACTOR if gradient else FACTOR
    floor = FLOOR[dtype]
    for name in ("rms", "max"):
        mine = getattr(found, name)
        bar = getattr(eager, name)
        if not mine <= factor * bar + floor:
            return f"{name} error {mine:.3g}, allowed {factor:g} × {bar:.3g} + {floor:g}"
    return None


def assert_rule(
    got: Tensor, eager: Tensor, oracle: Tensor, *, gradient: bool = False, what: str = ""
) -> None:
    """Raise AssertionError if the error rule is broken."""
    reason = broken_rule(got, eager, oracle, gradient=gradient)
    assert reason is None, f"{what}: {reason}"


def same_nonfinite(got: Tensor, eager: Tensor) -> bool:
    """NaN, +inf and −inf at the same places."""
    got = got.detach().cpu()
    eager = eager.detach().cpu()
    tests = (torch.isnan, torch.isposinf, torch.isneginf)
    return all(torch.equal(test(got), test(eager)) for test in tests)


def as_tuple(value) -> tuple[Tensor, ...]:
    """A kernel's result as a tuple of its outputs."""
    if isinstance(value, tuple):
        return value
    return (value,)
