"""Every derivative of every op beside eager's: reverse, forward, double, batched, functorch, each input alone."""

from __future__ import annotations

import itertools

import pytest
import torch
from eager import (
    CL,
    DTYPES,
    call_conv,
    conv_case,
    eager_add,
    eager_affine,
    eager_bn,
    given_only,
    leaves,
    off_the_kink,
    pairs,
    vectors,
)
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.nn import functional as F

from resnet_fast import ops
from resnet_fast.testing.rule import assert_rule

CONV_CASES = list(itertools.product((True, False), (True, False), ("relu", "none")))


@pytest.mark.parametrize(("four", "residual", "act"), CONV_CASES)
def test_conv_gradcheck(four, residual, act) -> None:
    tensors, keywords = conv_case(four=four, residual=residual)

    def run(*live: Tensor) -> Tensor:
        it = iter(live)
        return call_conv(
            ops.conv_bn_act,
            tuple(None if t is None else next(it) for t in tensors),
            act,
            **keywords,
        )

    inputs = given_only(leaves(tensors))
    assert gradcheck(run, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(run, inputs)


@pytest.mark.parametrize(
    ("residual", "act"), list(itertools.product((True, False), ("relu", "none")))
)
def test_bn_gradcheck(residual, act) -> None:
    x, (scale, shift, *_) = torch.randn(3, 3, 2, 2, dtype=torch.float64), vectors(3)
    inputs = given_only(leaves((x, scale, shift, torch.randn_like(x) if residual else None)))

    def run(*live: Tensor) -> Tensor:
        return ops.bn_act(*live, eps=1e-5, act=act)[0]

    assert gradcheck(run, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(run, inputs)


@pytest.mark.parametrize(("gated", "act"), list(itertools.product((True, False), ("relu", "none"))))
def test_add_gradcheck(gated, act) -> None:
    x, y = (
        torch.randn(2, 3, 3, 2, dtype=torch.float64),
        torch.randn(2, 3, 3, 2, dtype=torch.float64),
    )
    inputs = given_only(
        leaves((x, y, torch.rand(2, 3, 1, 1, dtype=torch.float64) if gated else None))
    )

    def run(*live: Tensor) -> Tensor:
        return ops.add_act(*live, act=act)

    assert gradcheck(run, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(run, inputs)


PAIRS = [pytest.param(*pair[1:], id=pair[0]) for pair in pairs()]


@pytest.mark.parametrize(("ours", "eager", "tensors"), PAIRS)
def test_forward_mode_equals_eager(ours, eager, tensors) -> None:
    """Tangents through dual numbers and through torch.func.jvp: zero tangents have passed gradcheck before."""
    tangents = [torch.randn_like(t) for t in tensors]
    found = []
    for f in (ours, eager):
        with forward_ad.dual_level():
            out = f(*map(forward_ad.make_dual, tensors, tangents))
            found.append(forward_ad.unpack_dual(out).tangent.clone())
        found.append(torch.func.jvp(f, tuple(tensors), tuple(tangents))[1])
    assert found[0].abs().max() > 0
    for tangent in found:
        torch.testing.assert_close(tangent, found[2], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("ours", "eager", "tensors"), PAIRS)
def test_double_backward_equals_eager(ours, eager, tensors) -> None:
    """A gradient penalty differentiates the saved statistics: 48 % wrong once, while gradcheck was green."""
    found = []
    for f in (ours, eager):
        live = leaves(tuple(tensors))
        out = f(*live)
        first = torch.autograd.grad(out, live, torch.cos(out.detach() * 3) + 0.5, create_graph=True)
        penalty = sum((g.square() * (1 + 0.1 * i)).sum() for i, g in enumerate(first))
        if penalty.requires_grad:
            second = torch.autograd.grad(penalty, live, allow_unused=True, materialize_grads=True)
        else:  # an add without a gate is piecewise linear, its second derivatives are 0
            second = tuple(map(torch.zeros_like, live))
        found.append((first, second))
    for mine, theirs in zip(found[0][0] + found[0][1], found[1][0] + found[1][1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("ours", "eager", "tensors"), PAIRS)
def test_functorch_equals_eager(ours, eager, tensors) -> None:
    """torch.func.grad, vmap over a batch of inputs, and the Hessian of a small slice."""

    def loss(f):
        return lambda x, *rest: f(x, *rest).square().sum()

    x, *rest = tensors
    batch = torch.stack([x, 2 * x, -x])
    for transform in (
        lambda f: torch.func.grad(loss(f))(x, *rest),
        lambda f: torch.func.vmap(torch.func.grad(loss(f)), (0, *[None] * len(rest)))(batch, *rest),
        lambda f: torch.func.vmap(f, (0, *[None] * len(rest)))(batch, *rest),
        lambda f: (
            torch.func.hessian(lambda v: loss(f)(x, v, *rest[1:]))(rest[0])
            if rest[0].dim() == 1
            else torch.func.hessian(lambda v: loss(f)(x + x.sin() * v.sum(), *rest))(
                torch.zeros(2, dtype=x.dtype)
            )
        ),
    ):
        torch.testing.assert_close(transform(ours), transform(eager), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("ours", "eager", "tensors"), PAIRS)
@pytest.mark.parametrize("create_graph", (False, True))
def test_every_gradient_alone_equals_eager(ours, eager, tensors, create_graph) -> None:
    """Each input alone needing grad, then all: an op without a formula drops gradients in silence."""
    for which in [{i} for i in range(len(tensors))] + [set(range(len(tensors)))]:
        found = []
        for f in (ours, eager):
            live = [t.detach().clone().requires_grad_(i in which) for i, t in enumerate(tensors)]
            out = f(*live)
            out.backward(torch.sin(out.detach() + 1), create_graph=create_graph)
            assert all((t.grad is not None) == (i in which) for i, t in enumerate(live))
            found.append([live[i].grad.detach() for i in sorted(which)])
        for mine, theirs in zip(*found, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_one_tensor_passed_twice_counts_twice() -> None:
    for create_graph in (False, True):
        found = []
        for f in (ops.add_act, eager_add):
            x = torch.linspace(-1, 1, 8, dtype=torch.float64).view(1, 2, 2, 2).requires_grad_()
            out = f(x, x)
            found.append(
                torch.autograd.grad(out, x, torch.ones_like(out), create_graph=create_graph)[
                    0
                ].detach()
            )
        assert torch.equal(*found)
        weight = torch.randn(2, 2, 1, 1, dtype=torch.float64)
        found = []
        for f in (ops.conv_bn_act, eager_affine):
            x, k = (
                torch.linspace(-1, 1, 8, dtype=torch.float64).view(1, 2, 2, 2).requires_grad_(),
                torch.ones(2).double(),
            )
            k.requires_grad_()
            out = f(x, weight, k, k, x, mean=k.detach() * 0, var=k, eps=1e-5)
            found.append(torch.autograd.grad(out.square().sum(), (x, k), create_graph=create_graph))
        for mine, theirs in zip(*found, strict=True):
            torch.testing.assert_close(mine, theirs)


def test_batched_gradients_equal_eager() -> None:
    """is_grads_batched: backward alone runs under vmap, on a graph that was built outside it."""
    for ours, eager, tensors in (p.values for p in PAIRS):
        found = []
        for f in (ours, eager):
            live = leaves(tuple(tensors))
            out = f(*live)
            cotangents = torch.randn(
                3, *out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(5)
            )
            found.append(torch.autograd.grad(out, live, cotangents, is_grads_batched=True))
        for mine, theirs in zip(*found, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_gradients_keep_strides() -> None:
    """Gradients of contiguous weights are contiguous in every input layout: callers of autograd.grad ``view`` them."""
    for x_format, kernel in itertools.product((torch.contiguous_format, CL), (1, 3)):
        x = torch.randn(2, 4, 6, 5).contiguous(memory_format=x_format).requires_grad_()
        weight = torch.randn(8, 4, kernel, kernel, requires_grad=True)
        k = torch.ones(8)
        out = ops.conv_bn_act(x, weight, k, k, padding=kernel // 2)
        dx, dw = torch.autograd.grad(out.sum(), (x, weight))
        assert dx.stride() == x.stride() and dw.stride() == weight.stride()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("low_vectors", (False, True))
def test_bn_act_every_dtype(dtype, low_vectors) -> None:
    """Output, statistics and gradients by the rule; statistics are float32 or wider for low-precision parameters."""
    vector = dtype if low_vectors else torch.promote_types(dtype, torch.float32)
    x, res = (torch.randn(4, 6, 5, 5) * 2 + 3).to(dtype), torch.randn(4, 6, 5, 5).to(dtype)
    scale, shift = torch.randn(6).to(vector), torch.randn(6).to(vector)
    res = off_the_kink(res, eager_bn(*(t.double() for t in (x, scale, shift, res)), act="none"))

    def run(*tensors):
        live = leaves(tensors)
        running = torch.zeros(6, dtype=live[1].dtype), torch.zeros(6, dtype=live[1].dtype)
        z = F.batch_norm(live[0], *running, *live[1:3], True, 1.0, 1e-5)
        y = torch.relu(z + live[3])
        return y, running, torch.autograd.grad(y, live, torch.sign(live[3].detach()))

    exact, eager = run(*(t.double() for t in (x, scale, shift, res))), run(x, scale, shift, res)
    live = leaves((x, scale, shift, res))
    y, mean, var = ops.bn_act(*live)
    found = torch.autograd.grad(y, live, torch.sign(res))
    assert y.dtype == dtype and mean.dtype == var.dtype == torch.promote_types(dtype, torch.float32)
    assert_rule(y, eager[0], exact[0], what="y")
    assert_rule(mean, eager[1][0], exact[1][0], what="mean")
    assert_rule(var * 100 / 99, eager[1][1], exact[1][1], what="var")
    for name, got, low, true in zip(
        ("x", "weight", "bias", "residual"), found, eager[2], exact[2], strict=True
    ):
        assert got.dtype == low.dtype
        assert_rule(got, low, true, gradient=True, what=name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_conv_bn_act_gradients_every_dtype(dtype) -> None:
    tensors, keywords = conv_case(dtype, size=(9, 8))
    z = call_conv(eager_affine, [t.double() for t in tensors], "none", **keywords)
    tensors = (*tensors[:4], off_the_kink(tensors[4], z), *tensors[5:])

    def run(op, tensors):
        live = leaves(tensors)
        out = call_conv(op, live, "relu", **keywords)
        return torch.autograd.grad(out, live, torch.sign(tensors[4]))

    exact = run(eager_affine, [t.double() for t in tensors])
    for name, got, low, true in zip(
        ("x", "weight", "scale", "shift", "residual", "mean", "var"),
        run(ops.conv_bn_act, tensors),
        run(eager_affine, tensors),
        exact,
        strict=True,
    ):
        # vectors are float32, but no better than the images they were computed from
        assert got.dtype == low.dtype
        assert_rule(got.to(dtype), low.to(dtype), true, gradient=True, what=name)


@pytest.mark.parametrize(
    ("ours", "eager", "tensors"), [pytest.param(*p[1:], id=p[0]) for p in pairs(torch.float32)]
)
def test_nan_gradients_as_in_eager(ours, eager, tensors) -> None:
    """A NaN in the input: the gradients are NaN where eager's are (its ReLU passes a NaN output's gradient)."""
    tensors = [t.clone() for t in tensors]
    tensors[0].view(-1)[5] = torch.nan
    for create_graph in (False, True):
        found = []
        for f in (ours, eager):
            live = leaves(tuple(tensors))
            found.append(torch.autograd.grad(f(*live).sum(), live, create_graph=create_graph))
        for mine, theirs in zip(*found, strict=True):
            assert torch.equal(mine.isnan(), theirs.isnan())
