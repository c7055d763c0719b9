"""One kernel judged on one problem: poisoned memory, float64 oracle, error rule."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..dispatch.problem import Problem
from ..dispatch.registry import Kernel
from ..ops import reference
from .eager import eager
from .rule import Verdict, as_tuple, broken_rule, error
from .samples import SAMPLES, make_args


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory from ``torch.empty`` is NaN inside: an element that a kernel forgot to write is then seen."""
    from torch.utils import deterministic

    settings: Any = deterministic  # a module with a property, which its type does not show
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        settings.fill_uninitialized_memory = fill


def run_poisoned(kernel: Kernel, problem: Problem, args: tuple) -> tuple[Tensor, ...]:
    """The kernel's outputs, computed in poisoned memory and without gradients."""
    with poisoned(), torch.no_grad():
        outputs = as_tuple(kernel.fn(*args))
    if problem.device == "cuda":
        torch.cuda.synchronize()
    return outputs


def oracle(op: str, args: tuple) -> tuple[Tensor, ...]:
    """The reference in float64 on the CPU, on exactly the values that the kernel gets."""
    formula = getattr(reference, op)
    wide = [a.detach().to("cpu", torch.float64) if isinstance(a, Tensor) else a for a in args]
    return as_tuple(formula(*wide))


def check_kernel(kernel: Kernel, problem: Problem, seed: int = 0) -> Verdict:
    """Run one kernel on one problem in poisoned memory and judge every output by the error rule.

    Inputs must come back unchanged.
    """
    args = make_args(problem, seed)
    before = tuple(a.clone() if isinstance(a, Tensor) else a for a in args)
    outputs = run_poisoned(kernel, problem, args)
    exact = oracle(problem.op, args)
    bar = eager(problem.op, args)
    gradient = SAMPLES[problem.op].gradient
    reasons = []
    for got, low, true in zip(outputs, bar, exact, strict=True):
        if true.numel():
            reasons.append(broken_rule(got, low, true, gradient=gradient))
    if any(_differ(a, b) for a, b in zip(args, before, strict=True)):
        reasons.append("it changed an input")
    reason = "; ".join(filter(None, reasons)) or None
    return Verdict(
        kernel.id,
        problem,
        error(outputs[0], exact[0]),
        error(bar[0], exact[0]),
        reason,
    )


def _differ(a: Any, b: Any) -> bool:
    """Whether a tensor differs from what it was; NaN equals NaN."""
    if not isinstance(a, Tensor):
        return False
    return not torch.equal(a.nan_to_num(), b.nan_to_num())
