"""What the ops share: argument checks, the choice between kernel and formula, derivatives by autograd on the formula.

Each op has a file: ``conv``, ``norm``, ``residual``, and ``across`` for ops that span several convolutions. An op is
its signature, its checks, its fake (result shapes without data) and its derivative; ``dispatch`` decides which kernel
runs. Every op is differentiable twice. Forward-mode AD and functorch transforms run the reference formula, in plain
ATen. Kernels accept any strides and prefer NHWC (channels_last). Accumulation, affine, residual and activation are
float32 (float64 for float64 inputs); results are rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..dispatch.select import select
from . import reference

Pair = int | tuple[int, int]


def composite() -> bool:
    """Whether an op must run as its reference formula: under functorch, forward-mode AD and dispatch modes.

    ATen has every rule for the formula. FlopCounterMode counts it too, without a flop formula of ours, whose
    registration would import Triton (155 ms) with the package.
    """
    return (
        forward_ad._current_level >= 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
    )


def skips_dispatcher(x: Tensor, weight: Tensor) -> bool:
    """Whether calling the kernel directly is the same as going through PyTorch's dispatcher, which takes 17 µs.

    So it is without gradients, autocast, tracing, tensor subclasses and profiler.
    """
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
    """(value, value) for a number; a pair as a tuple."""
    if isinstance(value, int):
        return value, value
    return tuple(value)  # type: ignore[return-value]  # the schema refuses another length


# ---------------------------------------------------------------- checks, once for each new combination of arguments


def require(ok: bool, op: str, what: str, got: object, expected: object) -> None:
    """Raise RuntimeError with the op's name, what it got and what it expected, unless ``ok``."""
    if not ok:
        raise RuntimeError(f"{op}: {what}: got {got}, expected {expected}")


def check_act(op: str, act: str) -> None:
    """Raise ValueError for an activation that no op has."""
    if act not in reference.ACTIVATIONS:
        known = ", ".join(map(repr, reference.ACTIVATIONS))
        raise ValueError(f"{op}: act: got {act!r}, expected one of {known}")


def check_images(op: str, x: Tensor, **others: Tensor | None) -> None:
    """``x`` is [N, C, H, W] and floating; the other tensors are on its device."""
    require(x.dim() == 4, op, "x", f"{x.dim()}-D shape {list(x.shape)}", "4-D [N, C, H, W]")
    require(x.is_floating_point(), op, "x dtype", x.dtype, "a floating dtype")
    for name, t in others.items():
        if t is None:
            continue
        require(t.device == x.device, op, f"{name} device", t.device, f"{x.device} (that of x)")


def check_like(
    op: str, name: str, t: Tensor | None, shape: Iterable[int], dtype: torch.dtype
) -> None:
    """``t``, if given, has this shape and dtype."""
    if t is None:
        return
    expected = list(shape)
    got = list(t.shape)
    require(got == expected, op, f"{name} shape", got, expected)
    require(t.dtype == dtype, op, f"{name} dtype", t.dtype, f"{dtype} (that of x)")


def check_vectors(op: str, channels: int, **vectors: Tensor | None) -> None:
    """Each vector, if given, is [channels] and floating."""
    for name, v in vectors.items():
        if v is None:
            continue
        shape = list(v.shape)
        require(shape == [channels], op, f"{name} shape", shape, [channels])
        require(v.is_floating_point(), op, f"{name} dtype", v.dtype, "a floating dtype")


def unchecked(*args: object) -> None:
    """No checks: the arguments of a backward come from its forward."""


# ---------------------------------------------------------------- derivatives


def differentiable(
    formula: Callable[..., Any], saved: tuple[Any, ...], grad: Tensor | tuple[Tensor, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients by autograd on a formula; under ``create_graph`` they can be differentiated again.

    ``formula`` is a function of ``saved``: the reference up to the activation, whose second derivative is 0. Returns
    one gradient for each element of ``saved``, or None where none is needed.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases: a tensor that was passed twice would be counted twice.
        inputs = [a.view_as(a) if isinstance(a, Tensor) else a for a in saved]
        needed = [a for a in inputs if _needs_gradient(a)]
        if not needed:  # only the residual needs a gradient
            return (None,) * len(inputs)
        result = formula(*inputs)
        gradients = iter(
            torch.autograd.grad(result, needed, grad, create_graph=create_graph, allow_unused=True)
        )
    return tuple(next(gradients) if _needs_gradient(a) else None for a in inputs)


def _needs_gradient(value: object) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def contiguous_gradient(gradient: Tensor, parameter: Tensor) -> Tensor:
    """The gradient with a contiguous parameter's strides: callers of autograd.grad ``view`` it, DDP compares them.

    Through a flat view, because ``contiguous()`` keeps the strides of a tensor with one pixel or one channel.
    """
    if not parameter.is_contiguous() or parameter.stride(-1) != 1:
        return gradient
    return gradient.reshape(-1).view(parameter.shape)


# ---------------------------------------------------------------- registration


def dispatched(op: str, check: Callable[..., None]) -> Callable[..., Any]:
    """The op's implementation: look up the kernel; ``check`` runs for each new combination of arguments."""

    def run(*args: Any) -> Any:
        return select(op, args, check)(*args)

    return run
