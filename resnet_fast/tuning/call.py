"""One call of a kernel on a problem's arguments, prepared as a plan or a training step makes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..dispatch.problem import Problem
from ..dispatch.registry import Kernel
from ..graph.ir import Step, Value
from ..kernels.prepack import fold
from ..live.step import norm_by_torch, update_running_stats
from ..runtime.bind import bind_cudnn, bind_torch


def prepared_call(kernel: Kernel, problem: Problem, args: tuple) -> Callable[[], Any]:
    """Return a call of the kernel on these arguments, as it is made in use.

    Torch's convolutions run on weights that were folded before, as a plan binds them; the batch norm of a training step
    runs with its running statistics.
    """
    if problem.op == "bn_act":
        return _training_norm(kernel, *args)
    is_folded_by_plan = (
        problem.op == "conv_bn_act" and not problem.bn and kernel.id.startswith("aten.")
    )
    if is_folded_by_plan:
        return _planned_conv(kernel, *args)
    return lambda: kernel.fn(*args)


def _planned_conv(
    kernel: Kernel,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    *rest: Any,
) -> Callable[[], Tensor]:
    """``rest``: stride, padding, dilation, groups and the activation."""
    *geometry, act = rest
    folded_weight, bias = fold(weight, scale, shift, mean, var, eps)
    added = None if residual is None else Value("residual")
    step = Step("conv_bn_act", "", "", (Value("x"),), residual=added, act=act)
    bind = bind_cudnn if kernel.id == "aten.cudnn_fused" else bind_torch
    run = bind(step, folded_weight, bias, tuple(geometry))
    return lambda: run({"x": x, "residual": residual})


def _training_norm(
    kernel: Kernel,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    eps: float,
    act: str,
) -> Callable[[], Tensor]:
    bn = nn.BatchNorm2d(len(weight), eps, device=x.device, dtype=weight.dtype)
    bn.weight, bn.bias = nn.Parameter(weight), nn.Parameter(bias)
    if kernel.id.startswith("aten."):
        return lambda: norm_by_torch(bn, x, residual, act)

    def run() -> Tensor:
        y, mean, var = kernel.fn(x, weight, bias, residual, eps, act)
        update_running_stats(bn, mean, var, x.numel() // x.shape[1])
        return y

    return run
