"""One call of a kernel on a problem's arguments, as a plan or a training step makes it."""

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


def once(chosen: Kernel, problem: Problem, args: tuple) -> Callable[[], Any]:
    """One call of a kernel on a problem's arguments as it is in use.

    Torch's convolutions on folded weights as a plan binds them, folded before; a training step's batch norm with its running statistics.
    """
    if problem.op == "bn_act":
        return _training_norm(chosen, *args)
    if problem.op != "conv_bn_act" or problem.bn or not chosen.id.startswith("aten."):
        return lambda: chosen.fn(*args)
    x, weight, scale, shift, residual, mean, var, eps, *geometry, act = args
    weight, bias = fold(weight, scale, shift, mean, var, eps)
    step = Step("conv_bn_act", "", "", (Value("x"),), residual=None if residual is None else Value("residual"), act=act)
    bind = bind_cudnn if chosen.id == "aten.cudnn_fused" else bind_torch
    run = bind(step, weight, bias, tuple(geometry))
    return lambda: run({"x": x, "residual": residual})


def _training_norm(
    chosen: Kernel, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float, act: str
) -> Callable[[], Tensor]:
    bn = nn.BatchNorm2d(len(weight), eps, device=x.device, dtype=weight.dtype)
    bn.weight, bn.bias = nn.Parameter(weight), nn.Parameter(bias)
    if chosen.id.startswith("aten."):
        return lambda: norm_by_torch(bn, x, residual, act)

    def run() -> Tensor:
        y, mean, var = chosen.fn(x, weight, bias, residual, eps, act)
        update_running_stats(bn, mean, var, x.numel() // x.shape[1])
        return y

    return run
