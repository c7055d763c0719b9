"""``add_act``: residual add (+ gate) + activation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from .contract import check_act, check_images, check_like, composite, dispatched, unchecked
from .library import below_autograd, define


def add_act(x: Tensor, y: Tensor, gate: Tensor | None = None, *, act: str = "relu") -> Tensor:
    """Residual add, with an optional squeeze-and-excitation gate, and activation: act(x·gate + y).

    x, y: [N, C, H, W] of one dtype; gate: [N, C, 1, 1] of that dtype. Raises RuntimeError naming what it got and
    expected. Source: He et al. 2016; Hu et al. 2018 for the gate.
    """
    return reference.add_act(x, y, gate, act) if composite() else ADD_ACT(x, y, gate, act)


def check_add_act(x: Tensor, y: Tensor, gate: Tensor | None, act: str) -> None:
    op = "add_act"
    check_act(op, act)
    check_images(op, x, y=y, gate=gate)
    check_like(op, "y", y, x.shape, x.dtype)
    n, c, _, _ = x.shape
    check_like(op, "gate", gate, (n, c, 1, 1), x.dtype)


def _fake_add_act(x: Tensor, y: Tensor, gate: Tensor | None, act: str) -> Tensor:
    check_images("add_act", x, y=y, gate=gate)
    if gate is None:
        return x + y
    return torch.addcmul(y, x, gate)


def _fake_add_act_backward(
    dout: Tensor, out: Tensor, x: Tensor | None, gate: Tensor | None, act: str
) -> tuple[Tensor, Tensor, Tensor]:
    dy = torch.empty_like(out)
    if gate is None:
        return dy, dout.new_empty(0), dout.new_empty(0)
    dx = torch.empty_like(out)
    return dy, dx, torch.empty_like(gate)


class _AddAct(torch.autograd.Function):
    """The derivative of ``add_act``; formula in :func:`reference.add_act_backward`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, gate: Tensor | None, act: str) -> Tensor:
        out: Tensor = below_autograd(ADD_ACT, x, y, gate, act)
        # Without a gate the backward reads the ReLU's mask alone: do not keep x alive for it.
        ctx.save_for_backward(None if gate is None else x, gate, out)
        ctx.act = act
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, out = ctx.saved_tensors
        args = dout, out, x, gate, ctx.act
        # create_graph: gradients of ATen operations can be differentiated again
        if torch.is_grad_enabled():
            dy, dx, dgate = reference.add_act_backward(*args)
        else:
            dy, dx, dgate = below_autograd(ADD_ACT_BACKWARD, *args)
        if gate is None:
            return dy, dy, None, None
        return dx, dy, dgate, None


ADD_ACT = define(
    "add_act(Tensor x, Tensor y, Tensor? gate, str act) -> Tensor",
    impl=dispatched("add_act", check_add_act),
    fake=_fake_add_act,
    function=_AddAct,
)


ADD_ACT_BACKWARD = define(
    "add_act_backward(Tensor dout, Tensor out, Tensor? x, Tensor? gate, str act) -> (Tensor, Tensor, Tensor)",
    impl=dispatched("add_act_backward", unchecked),
    fake=_fake_add_act_backward,
    function=None,
)
