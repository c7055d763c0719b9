"""THE CONTRACT: each op's signature, what it computes, its checks, its fake and its derivative. Which kernel runs is ``dispatch``'s.

Three public ops: ``conv_bn_act`` (inference or frozen batch norm), ``bn_act`` (training batch norm) and ``add_act`` (residual add). Each is
differentiable twice; forward-mode AD and functorch transforms run the reference instead of a kernel, in plain ATen. Layout: any strides
are right, NHWC (channels_last) is what the kernels want. Accumulation, affine, residual and activation are float32
(float64 for float64), rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..dispatch.registry import select
from . import reference

Pair = int | tuple[int, int]


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
    if isinstance(value, int):
        return value, value
    return tuple(value)  # type: ignore[return-value]  # the schema refuses another length


# ---------------------------------------------------------------- checks: once for each new combination of shapes, dtypes and devices


def require(ok: bool, op: str, what: str, got: object, expected: object) -> None:
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


def check_like(op: str, name: str, t: Tensor | None, shape: Iterable[int], dtype: torch.dtype) -> None:
    if t is not None:
        require(tuple(t.shape) == tuple(shape), op, f"{name} shape", list(t.shape), list(shape))
        require(t.dtype == dtype, op, f"{name} dtype", t.dtype, f"{dtype} (that of x)")


def check_vectors(op: str, channels: int, **vectors: Tensor | None) -> None:
    for name, v in vectors.items():
        if v is not None:
            require(tuple(v.shape) == (channels,), op, f"{name} shape", list(v.shape), [channels])
            require(v.is_floating_point(), op, f"{name} dtype", v.dtype, "a floating dtype")


def _unchecked(*args: Any) -> None:
    """A backward gets what its forward made."""


# ---------------------------------------------------------------- fakes: shapes and strides without data


# ---------------------------------------------------------------- derivatives


def differentiable(
    formula: Callable[..., Any], saved: tuple[Any, ...], grad: Tensor | tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
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


def _flat_like(grad: Tensor, t: Tensor) -> Tensor:
    """The gradient with a contiguous parameter's strides: callers of autograd.grad ``view`` it, DDP compares them."""
    return grad.reshape(-1).view(t.shape) if t.is_contiguous() and t.stride(-1) == 1 else grad


# ---------------------------------------------------------------- registration


def dispatched(op: str, check: Callable[..., None]) -> Callable[..., Any]:
    """The op's implementation: look the kernel up, checking the arguments the first time such a combination is seen."""

    def run(*args: Any) -> Any:
        return select(op, args, check)(*args)

    return run
