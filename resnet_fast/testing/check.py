"""One kernel judged on one problem: poisoned memory, float64 oracle, error rule."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..dispatch.problem import Problem
from ..dispatch.registry import Kernel
from ..ops import reference
from .eager import eager
from .rule import Verdict, as_tuple, broken_rule, error
from .samples import make_args

_BACKWARD = ("bn_act_backward", "add_act_backward")


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory from ``torch.empty`` is NaN inside: an element that a kernel forgot to write is then seen."""
    from torch.utils import deterministic

    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        deterministic.fill_uninitialized_memory = fill


def oracle(op: str, args: tuple) -> tuple[Tensor, ...]:
    """The reference in float64 on the CPU, on exactly the values that the kernel gets."""
    wide = tuple(a.detach().to("cpu", torch.float64) if isinstance(a, Tensor) else a for a in args)
    return as_tuple(getattr(reference, op)(*wide))


def check_kernel(kernel: Kernel, problem: Problem, seed: int = 0) -> Verdict:
    """Run one kernel on one problem in poisoned memory and judge every output by the error rule; inputs must come back unchanged."""
    args = make_args(problem, seed)
    kept = tuple(a.clone() if isinstance(a, Tensor) else a for a in args)
    with poisoned(), torch.no_grad():
        outputs = as_tuple(kernel.fn(*args))
    if problem.device == "cuda":
        torch.cuda.synchronize()
    exact, bar = oracle(problem.op, args), eager(problem.op, args)
    reasons = [
        broken_rule(got, low, true, gradient=problem.op in _BACKWARD)
        for got, low, true in zip(outputs, bar, exact, strict=True)
        if true.numel()
    ]
    if any(
        isinstance(a, Tensor) and not torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(args, kept, strict=True)
    ):
        reasons.append("it changed an input")
    reason = "; ".join(filter(None, reasons)) or None
    return Verdict(kernel.id, problem, error(outputs[0], exact[0]), error(bar[0], exact[0]), reason)
