"""The contract of every op: schema, fake, derivatives of every kind, layouts, dtypes, empty and wrong input, the error rule."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from resnet_fast import dispatch, ops, testing
from resnet_fast.ops import ADD_ACT, ADD_ACT_BACKWARD, BN_ACT, BN_ACT_BACKWARD, CONV_BN_ACT
from resnet_fast.testing import assert_rule, same_nonfinite

CL = torch.channels_last
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def eager_conv(x, weight, scale, shift, residual=None, *, mean=None, var=None, eps=0.0, stride=1, padding=0, dilation=1,
               groups=1, act="relu") -> Tensor:
    """What a user writes without this package: torch's convolution, batch norm (or affine), add and ReLU."""
    z = F.conv2d(x, weight, None, stride, padding, dilation, groups)
    if mean is None:
        z = z * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
    else:
        z = F.batch_norm(z, mean, var, scale, shift, False, 0.0, eps)
    z = z if residual is None else z + residual
    return torch.relu(z) if act == "relu" else z


def eager_affine(*args, mean=None, var=None, eps=0.0, **keywords) -> Tensor:
    """The same with batch norm written out, because F.batch_norm has no gradient for its statistics."""
    if mean is None:
        return eager_conv(*args, **keywords)
    x, weight, scale, shift, *rest = args
    s = scale * torch.rsqrt(var + eps)
    return eager_conv(x, weight, s, shift - mean * s, *rest, **keywords).to(x.dtype)


def eager_bn(x, weight, bias, residual=None, *, eps=1e-5, act="relu") -> Tensor:
    z = F.batch_norm(x, None, None, weight, bias, True, 0.0, eps)
    z = z if residual is None else z + residual
    return torch.relu(z) if act == "relu" else z


def eager_add(x, y, gate=None, *, act="relu") -> Tensor:
    z = (x if gate is None else x * gate) + y
    return torch.relu(z) if act == "relu" else z


def vectors(k: int, dtype: torch.dtype = torch.float64, scales=(0.0, -0.7, 1e-3, 1.3)) -> tuple[Tensor, ...]:
    """scale (zero, negative and tiny among them), shift, mean, var."""
    scale = torch.tensor([scales[i % len(scales)] for i in range(k)], dtype=dtype)
    return scale, torch.randn(k, dtype=dtype) + 0.1, torch.randn(k, dtype=dtype), torch.rand(k, dtype=dtype) + 0.3


def conv_case(dtype=torch.float64, four=True, residual=True, groups=2, stride=2, size=(4, 3)) -> tuple[tuple, dict]:
    """Tensors (x, weight, scale, shift, residual, mean, var) and keywords of one small convolution."""
    x, weight = torch.randn(2, 2, *size, dtype=dtype), torch.randn(4, 2 // groups, 3, 3, dtype=dtype)
    scale, shift, mean, var = vectors(4, torch.promote_types(dtype, torch.float32))
    geometry = {"stride": stride, "padding": 1, "groups": groups}
    res = torch.randn_like(F.conv2d(x, weight, None, **geometry)) if residual else None
    if not four:
        mean = var = None
    return (x, weight, scale, shift, res, mean, var), {**geometry, "eps": 1e-5 if four else 0.0}


def call_conv(op, tensors: tuple, act: str, **keywords) -> Tensor:
    return op(*tensors[:5], mean=tensors[5], var=tensors[6], act=act, **keywords)


def off_the_kink(residual: Tensor, z: Tensor) -> Tensor:
    """The residual that moves a sum z at least 1 away from ReLU's kink, where a rounding decides the gradient."""
    return residual + torch.sign(z).to(residual.dtype) * 2


def leaves(tensors: tuple) -> tuple:
    return tuple(t.detach().clone().requires_grad_() if isinstance(t, Tensor) else t for t in tensors)


def given_only(tensors: tuple) -> list[Tensor]:
    return [t for t in tensors if isinstance(t, Tensor)]


# ---------------------------------------------------------------- registration

def _samples() -> list:
    def rand(*shape, dtype=torch.float32, grad=False, cl=False):
        t = torch.randn(*shape).to(dtype)
        return (t.contiguous(memory_format=CL) if cl else t).requires_grad_(grad)

    samples = []
    for dtype, cl, grad in ((torch.float32, False, True), (torch.float64, True, True), (torch.bfloat16, True, False)):
        vector = torch.promote_types(dtype, torch.float32)
        k = [rand(4, dtype=vector, grad=grad) for _ in range(3)] + [torch.rand(4, dtype=vector) + 0.5]
        x, w = rand(2, 6, 9, 7, dtype=dtype, cl=cl, grad=grad), rand(4, 3, 3, 3, dtype=dtype, grad=grad)
        res = rand(2, 4, 5, 4, dtype=dtype, cl=cl, grad=grad)
        geometry = (2, 2), (1, 1), (1, 1), 2
        samples.append(("conv-bn", CONV_BN_ACT, (x, w, k[0], k[1], res, k[2], k[3], 1e-5, *geometry, "relu")))
        samples.append(("conv-affine", CONV_BN_ACT, (x, w, k[0], k[1], None, None, None, 0.0, *geometry, "none")))
        samples.append(("bn", BN_ACT, (res, k[0], k[1], rand(2, 4, 5, 4, dtype=dtype, cl=cl, grad=grad), 1e-5, "relu")))
        y, dy = res.detach().relu(), rand(2, 4, 5, 4, dtype=dtype, cl=cl)
        four = [v.detach() for v in k]
        for act, residual in (("relu", True), ("none", True), ("none", False)):
            samples.append((f"bn-backward-{act}-{residual}", BN_ACT_BACKWARD,
                            (dy, res.detach(), y, four[0], four[2], four[3], 1e-5, act, residual)))
        gate = rand(2, 4, 1, 1, dtype=dtype, grad=grad)
        for g, act in ((None, "relu"), (gate, "relu"), (gate, "none")):
            samples.append((f"add-{g is not None}-{act}", ADD_ACT, (res, y, g, act)))
            detached = None if g is None else g.detach()
            samples.append((f"add-backward-{g is not None}-{act}", ADD_ACT_BACKWARD,
                            (dy, y, None if g is None else res.detach(), detached, act)))
    return [pytest.param(op, args, id=f"{name}-{args[0].dtype}".replace("torch.", "")) for name, op, args in samples]


@pytest.mark.parametrize(("op", "args"), _samples())
def test_opcheck(op, args) -> None:
    """Schema, autograd registration, fake (shapes, dtypes, strides) and AOT dispatch."""
    opcheck(op, args)


def test_a_backward_op_refuses_to_drop_gradients() -> None:
    """The backward ops have no formula of their own: differentiating them must raise, not give silence."""
    dout, out = torch.randn(1, 2, 3, 3, requires_grad=True), torch.randn(1, 2, 3, 3)
    with pytest.raises(RuntimeError, match="add_act_backward.*requires grad"):
        ADD_ACT_BACKWARD(dout, out, None, None, "relu")
    with torch.no_grad():
        ADD_ACT_BACKWARD(dout, out, None, None, "relu")


def test_flops_are_those_of_the_convolution() -> None:
    tensors, keywords = conv_case(torch.float32)
    counts = []
    for op in (ops.conv_bn_act, eager_conv):
        with FlopCounterMode(display=False) as counter:
            call_conv(op, tensors, "relu", **keywords)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


# ---------------------------------------------------------------- derivatives

CONV_CASES = list(itertools.product((True, False), (True, False), ("relu", "none")))


@pytest.mark.parametrize(("four", "residual", "act"), CONV_CASES)
def test_conv_gradcheck(four, residual, act) -> None:
    tensors, keywords = conv_case(four=four, residual=residual)

    def run(*live: Tensor) -> Tensor:
        it = iter(live)
        return call_conv(ops.conv_bn_act, tuple(None if t is None else next(it) for t in tensors), act, **keywords)

    inputs = given_only(leaves(tensors))
    assert gradcheck(run, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(run, inputs)


@pytest.mark.parametrize(("residual", "act"), list(itertools.product((True, False), ("relu", "none"))))
def test_bn_gradcheck(residual, act) -> None:
    x, (scale, shift, *_) = torch.randn(3, 3, 2, 2, dtype=torch.float64), vectors(3)
    inputs = given_only(leaves((x, scale, shift, torch.randn_like(x) if residual else None)))

    def run(*live: Tensor) -> Tensor:
        return ops.bn_act(*live, eps=1e-5, act=act)[0]

    assert gradcheck(run, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(run, inputs)


@pytest.mark.parametrize(("gated", "act"), list(itertools.product((True, False), ("relu", "none"))))
def test_add_gradcheck(gated, act) -> None:
    x, y = torch.randn(2, 3, 3, 2, dtype=torch.float64), torch.randn(2, 3, 3, 2, dtype=torch.float64)
    inputs = given_only(leaves((x, y, torch.rand(2, 3, 1, 1, dtype=torch.float64) if gated else None)))

    def run(*live: Tensor) -> Tensor:
        return ops.add_act(*live, act=act)

    assert gradcheck(run, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(run, inputs)


def _pairs(dtype=torch.float64):
    """(name, ours, eager's, tensors): every op as a function of its tensors alone, beside eager's composite."""
    for four, residual in itertools.product((True, False), (True, False)):
        tensors, keywords = conv_case(dtype, four=four, residual=residual)

        def conv(op, tensors=tensors, keywords=keywords):
            def run(*live):
                it = iter(live)
                return call_conv(op, tuple(None if t is None else next(it) for t in tensors), "relu", **keywords)
            return run

        yield f"conv-{four}-{residual}", conv(ops.conv_bn_act), conv(eager_affine), given_only(tensors)
    x, (scale, shift, *_) = torch.randn(3, 4, 3, 2, dtype=dtype), vectors(4, torch.promote_types(dtype, torch.float32))
    yield "bn", lambda *a: ops.bn_act(*a)[0], eager_bn, [x, scale, shift]
    yield "bn-residual", lambda *a: ops.bn_act(*a)[0], eager_bn, [x, scale, shift, torch.randn_like(x)]
    yield "add", ops.add_act, eager_add, [x, torch.randn_like(x)]
    yield "add-gate", ops.add_act, eager_add, [x, torch.randn_like(x), torch.rand(3, 4, 1, 1, dtype=dtype)]


PAIRS = [pytest.param(*pair[1:], id=pair[0]) for pair in _pairs()]


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
    """The gradient of a gradient penalty, which runs through the saved statistics: 48 % wrong once while gradcheck was green."""
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
    for transform in (lambda f: torch.func.grad(loss(f))(x, *rest),
                      lambda f: torch.func.vmap(torch.func.grad(loss(f)), (0, *[None] * len(rest)))(batch, *rest),
                      lambda f: torch.func.vmap(f, (0, *[None] * len(rest)))(batch, *rest),
                      lambda f: torch.func.hessian(lambda v: loss(f)(x, v, *rest[1:]))(rest[0]) if rest[0].dim() == 1
                      else torch.func.hessian(lambda v: loss(f)(x + x.sin() * v.sum(), *rest))(torch.zeros(2, dtype=x.dtype))):
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
            found.append(torch.autograd.grad(out, x, torch.ones_like(out), create_graph=create_graph)[0].detach())
        assert torch.equal(*found)
        weight = torch.randn(2, 2, 1, 1, dtype=torch.float64)
        found = []
        for f in (ops.conv_bn_act, eager_affine):
            x, k = torch.linspace(-1, 1, 8, dtype=torch.float64).view(1, 2, 2, 2).requires_grad_(), torch.ones(2).double()
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
            cotangents = torch.randn(3, *out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(5))
            found.append(torch.autograd.grad(out, live, cotangents, is_grads_batched=True))
        for mine, theirs in zip(*found, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_gradients_keep_strides() -> None:
    """Gradients of contiguous weights come back contiguous whatever the input's layout: callers of autograd.grad ``view`` them."""
    for x_format, kernel in itertools.product((torch.contiguous_format, CL), (1, 3)):
        x = torch.randn(2, 4, 6, 5).contiguous(memory_format=x_format).requires_grad_()
        weight = torch.randn(8, 4, kernel, kernel, requires_grad=True)
        k = torch.ones(8)
        out = ops.conv_bn_act(x, weight, k, k, padding=kernel // 2)
        dx, dw = torch.autograd.grad(out.sum(), (x, weight))
        assert dx.stride() == x.stride() and dw.stride() == weight.stride()


# ---------------------------------------------------------------- autocast

def test_autocast_casts_images_and_weights_only(registry) -> None:
    """Scale and shift stay float32: in bfloat16 a batch norm's shift loses more than the convolution does."""
    seen = []

    @dispatch.kernel("experimental.spy", op="conv_bn_act", supports=lambda p: None)
    def spy(*args):
        seen.append([a.dtype for a in args[:7]])
        return dispatch.find("aten.conv_bn_act").fn(*args)

    tensors, keywords = conv_case(torch.float32)
    with dispatch.use("experimental.spy"), torch.autocast("cpu", torch.bfloat16):
        out = call_conv(ops.conv_bn_act, leaves(tensors), "relu", **keywords)
        wide = [t.double() if isinstance(t, Tensor) else t for t in tensors]
        assert call_conv(ops.conv_bn_act, wide, "relu", **keywords).dtype == torch.float64
    low, full = torch.bfloat16, torch.float32
    assert seen[0] == [low, low, full, full, low, full, full]
    assert seen[1] == [torch.float64] * 7 and out.dtype == low


def test_autocast_gradients_come_back_in_the_parameters_dtype() -> None:
    tensors, keywords = conv_case(torch.float32)
    live = leaves(tensors)
    with torch.autocast("cpu", torch.bfloat16):
        out = call_conv(ops.conv_bn_act, live, "relu", **keywords)
    out.float().sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in live)


# ---------------------------------------------------------------- layouts, dtypes, empties, non-finite numbers

def _layouts(t: Tensor) -> dict[str, Tensor]:
    """The same values: NCHW, NHWC, a slice of something wider, every second row of something taller, a transposed view."""
    n, c, h, w = t.shape
    wider, taller = t.new_full((n, c, h, w + 3), 7.0), t.new_full((n, c, 2 * h, w), 7.0)
    wider[..., 1:-2], taller[:, :, ::2] = t, t
    return {"nchw": t.contiguous(), "nhwc": t.contiguous(memory_format=CL), "sliced": wider[..., 1:-2],
            "stepped": taller[:, :, ::2], "transposed": t.transpose(2, 3).contiguous().transpose(2, 3)}


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_are_those_of_conv2d(dtype) -> None:
    """For every layout of input, weight and residual: values by the rule, strides those of F.conv2d, inputs untouched."""
    (x, weight, scale, shift, res, mean, var), keywords = conv_case(dtype, size=(7, 6), stride=1)
    oracle = call_conv(eager_conv, [t.double() for t in (x, weight, scale, shift, res, mean, var)], "relu", **keywords)
    for (a, xl), (b, wl), (c, rl) in itertools.product(_layouts(x).items(), list(_layouts(weight).items())[:2], _layouts(res).items()):
        kept = [t.clone() for t in (xl, wl, rl)]
        got = ops.conv_bn_act(xl, wl, scale, shift, rl, mean=mean, var=var, **keywords)
        bare = F.conv2d(xl, wl, None, *(keywords[k] for k in ("stride", "padding")), 1, keywords["groups"])
        assert got.stride() == bare.stride(), (a, b, c)
        assert_rule(got, call_conv(eager_conv, (xl, wl, scale, shift, rl, mean, var), "relu", **keywords), oracle, what=f"{a} {b} {c}")
        assert all(map(torch.equal, kept, (xl, wl, rl)))


@pytest.mark.parametrize("shape", [(2, 1, 5, 4), (2, 4, 1, 1), (1, 4, 5, 1), (1, 1, 1, 1), (3, 4, 1, 6)])
@pytest.mark.parametrize("kernel", (1, 3))
def test_ambiguous_layouts(shape, kernel) -> None:
    """One channel or one pixel is both NCHW and NHWC: what can be viewed in eager can be viewed here."""
    weight, k = torch.randn(6, shape[1], kernel, kernel), torch.rand(6)
    for x in _layouts(torch.randn(shape)).values():
        got, bare = ops.conv_bn_act(x, weight, k, k, padding=kernel // 2), F.conv2d(x, weight, padding=kernel // 2)
        assert [s for s, n in zip(got.stride(), got.shape, strict=True) if n > 1] == \
            [s for s, n in zip(bare.stride(), bare.shape, strict=True) if n > 1]


def test_expanded_and_sliced_vectors() -> None:
    """A BN vector that is an expanded scalar or every second of a longer one: the byte guard must not read past its end."""
    x, weight = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 1, 1)
    long = torch.arange(1.0, 9.0)
    for v in (torch.tensor([1.5]).expand(4), long[::2], long[2:6]):
        for eps in (1e-5, 1e-3):  # twice: packed, then looked up
            got = ops.conv_bn_act(x, weight, v, v, mean=v, var=v, eps=eps)
            torch.testing.assert_close(got, eager_conv(x, weight, v, v, mean=v, var=v, eps=eps))
    base = torch.tensor([1.0])
    scale = base.expand(4)
    before = ops.conv_bn_act(x, weight, scale, scale, act="none")
    base.mul_(2)
    torch.testing.assert_close(ops.conv_bn_act(x, weight, scale, scale, act="none"), 2 * before)


def test_expanded_images_and_residuals() -> None:
    x, res = torch.randn(1, 3, 5, 5).expand(4, 3, 5, 5), torch.randn(4, 6, 1, 1).expand(4, 6, 5, 5)
    weight, k = torch.randn(6, 3, 3, 3), torch.rand(6)
    torch.testing.assert_close(ops.conv_bn_act(x, weight, k, k, res, padding=1), eager_conv(x, weight, k, k, res, padding=1))
    torch.testing.assert_close(ops.add_act(res, res), eager_add(res, res))
    torch.testing.assert_close(ops.bn_act(res, k, k, res)[0], eager_bn(res, k, k, res), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("low_vectors", (False, True))
def test_bn_act_every_dtype(dtype, low_vectors) -> None:
    """Output, statistics and gradients by the rule; statistics are float32 at least, also with low-precision parameters."""
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
    for name, got, low, true in zip(("x", "weight", "bias", "residual"), found, eager[2], exact[2], strict=True):
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
    for name, got, low, true in zip(("x", "weight", "scale", "shift", "residual", "mean", "var"), run(ops.conv_bn_act, tensors),
                                    run(eager_affine, tensors), exact, strict=True):
        assert got.dtype == low.dtype  # vectors are float32, but no better than the images they were computed from
        assert_rule(got.to(dtype), low.to(dtype), true, gradient=True, what=name)


def test_empty_batch_forward_and_backward() -> None:
    tensors, keywords = conv_case(torch.float32)
    empty = leaves((tensors[0][:0], *tensors[1:4], tensors[4][:0], *tensors[5:]))
    out = call_conv(ops.conv_bn_act, empty, "relu", **keywords)
    assert out.shape == (0, *tensors[4].shape[1:])
    out.sum().backward()
    assert all(t.grad is not None and not t.grad.any() for t in empty)
    live = leaves((tensors[4][:0], *tensors[2:4], tensors[4][:0]))
    y, mean, var = ops.bn_act(*live)
    assert y.shape == live[0].shape and mean.isnan().all() and var.isnan().all()
    y.sum().backward()
    assert all(t.grad is not None and not t.grad.any() for t in live)
    assert ops.add_act(live[0], live[0]).shape == live[0].shape


@pytest.mark.parametrize("bad", (torch.nan, torch.inf, -torch.inf))
@pytest.mark.parametrize("where", range(7))
@pytest.mark.parametrize("layout", ("nchw", "nhwc"))
def test_nonfinite_numbers_as_in_eager(bad, where, layout) -> None:
    """One NaN or infinity in any operand: NaN and infinities come out where eager has them (oneDNN's fused ReLU drops NaN).

    Not for an infinite scale, where folding gives NaN for eager's infinity, nor a negative variance, which has no meaning. Without padding,
    because eager's own kernels differ in whether they multiply a non-finite weight by the zeros there.
    """
    if where == 2 and bad in (torch.inf, -torch.inf) or where == 6 and bad < 0:
        return
    tensors, keywords = conv_case(torch.float32, stride=1)
    keywords["padding"] = 0
    tensors = (*tensors[:4], tensors[4][..., :-2, :-2].contiguous(), *tensors[5:])
    tensors[where].view(-1)[1 + tensors[where].numel() // 2] = bad
    tensors = (_layouts(tensors[0])[layout], *tensors[1:])
    for act in ("relu", "none"):
        assert same_nonfinite(call_conv(ops.conv_bn_act, tensors, act, **keywords), call_conv(eager_conv, tensors, act, **keywords))


@pytest.mark.parametrize("bad", (torch.nan, torch.inf, -torch.inf))
def test_nonfinite_numbers_in_training_and_add(bad) -> None:
    x, res = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    x[0, 1, 1, 1] = res[1, 2, 0, 0] = bad
    k = torch.tensor([1.0, -1.0, 0.0, 1e-3])
    for act in ("relu", "none"):
        assert same_nonfinite(ops.bn_act(x, k, k, res, act=act)[0], eager_bn(x, k, k, res, act=act))
        assert same_nonfinite(ops.add_act(x, res, act=act), eager_add(x, res, act=act))
        assert same_nonfinite(ops.add_act(x, res, k.view(1, 4, 1, 1).expand(2, 4, 1, 1), act=act),
                              eager_add(x, res, k.view(1, 4, 1, 1).expand(2, 4, 1, 1), act=act))


@pytest.mark.parametrize(("ours", "eager", "tensors"), [pytest.param(*p[1:], id=p[0]) for p in _pairs(torch.float32)])
def test_nan_gradients_as_in_eager(ours, eager, tensors) -> None:
    """A NaN in the input: the gradients are NaN where eager's are (eager's ReLU lets a NaN output's gradient through)."""
    tensors = [t.clone() for t in tensors]
    tensors[0].view(-1)[5] = torch.nan
    for create_graph in (False, True):
        found = []
        for f in (ours, eager):
            live = leaves(tuple(tensors))
            found.append(torch.autograd.grad(f(*live).sum(), live, create_graph=create_graph))
        for mine, theirs in zip(*found, strict=True):
            assert torch.equal(mine.isnan(), theirs.isnan())


# ---------------------------------------------------------------- wrong input: one sentence with op, got and expected

def _wrong() -> list:
    x, w, k = torch.randn(2, 4, 5, 5), torch.randn(6, 4, 3, 3), torch.ones(6)
    meta = torch.ones(6, device="meta")
    c, b, a = ops.conv_bn_act, ops.bn_act, ops.add_act
    four = torch.ones(4)
    cases = [
        ("channels", c, (x[:, :3], w, k, k), {}, "x channels: got 3, expected 4"),
        ("grouped channels", c, (x, w, k, k), {"groups": 2}, "x channels: got 4, expected 8"),
        ("rank", c, (x[0], w, k, k), {}, "got 3-D"),
        ("weight rank", c, (x, w[0], k, k), {}, "weight: got 3-D"),
        ("dtype", c, (x.double(), w, k, k), {}, "got torch.float64, expected torch.float32"),
        ("integers", c, (x.byte(), w, k, k), {}, "got torch.uint8, expected a floating dtype"),
        ("scale", c, (x, w, k[:5], k), {}, "scale shape: got [5], expected [6]"),
        ("scale 2-D", c, (x, w, k.view(1, 6), k), {}, "scale shape: got [1, 6], expected [6]"),
        ("shift", c, (x, w, k, torch.ones(7)), {}, "shift shape: got [7], expected [6]"),
        ("mean", c, (x, w, k, k), {"mean": torch.ones(1), "var": k}, "mean shape: got [1], expected [6]"),
        ("var", c, (x, w, k, k), {"mean": k, "var": torch.ones(5)}, "var shape: got [5], expected [6]"),
        ("mean alone", c, (x, w, k, k), {"mean": k}, "mean and var"),
        ("var alone", c, (x, w, k, k), {"var": k}, "mean and var"),
        ("device", c, (x, w, meta, k), {}, "device"),
        ("residual", c, (x, w, k, k, torch.ones(2, 6, 5, 5)), {}, "residual shape: got [2, 6, 5, 5], expected [2, 6, 3, 3]"),
        ("residual broadcast", c, (x, w, k, k, torch.ones(2, 6, 1, 1)), {}, "residual shape"),
        ("residual dtype", c, (x, w, k, k, torch.ones(2, 6, 3, 3).double()), {}, "residual dtype: got torch.float64"),
        ("activation", c, (x, w, k, k), {"act": "gelu"}, "act: got 'gelu', expected one of 'none', 'relu'"),
        ("bn rank", b, (x[0], four, four), {}, "got 3-D"),
        ("bn weight", b, (x, k, four), {}, "weight shape: got [6], expected [4]"),
        ("bn bias", b, (x, four, k), {}, "bias shape: got [6], expected [4]"),
        ("bn residual", b, (x, four, four, x[:1]), {}, "residual shape: got [1, 4, 5, 5], expected [2, 4, 5, 5]"),
        ("bn activation", b, (x, four, four), {"act": "silu"}, "act: got 'silu'"),
        ("add", a, (x, x[:1]), {}, "y shape: got [1, 4, 5, 5], expected [2, 4, 5, 5]"),
        ("add dtype", a, (x, x.double()), {}, "y dtype: got torch.float64, expected torch.float32"),
        ("add gate", a, (x, x, torch.ones(2, 4)), {}, "gate shape: got [2, 4], expected [2, 4, 1, 1]"),
    ]
    return [pytest.param(*case[1:], id=case[0]) for case in cases]


@pytest.mark.parametrize(("op", "args", "keywords", "sentence"), _wrong())
def test_wrong_input(op, args, keywords, sentence) -> None:
    """Also right after a right call of the same shapes: what is memoised must not hide what changed."""
    k = torch.ones(6)
    ops.conv_bn_act(torch.randn(2, 4, 5, 5), torch.randn(6, 4, 3, 3), k, k, mean=k, var=k)
    ops.conv_bn_act(torch.randn(2, 4, 5, 5), torch.randn(6, 4, 3, 3), k, k)
    ops.bn_act(torch.randn(2, 4, 5, 5), torch.ones(4), torch.ones(4))
    for _ in range(2):
        with pytest.raises((RuntimeError, ValueError)) as raised:
            op(*args, **keywords)
        message = str(raised.value)
        assert message.startswith(f"{op.__name__}: ") and sentence in message and "\n" not in message


def test_one_value_per_channel_raises_torchs_error() -> None:
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        ops.bn_act(torch.randn(1, 3, 1, 1), torch.ones(3), torch.ones(3))


# ---------------------------------------------------------------- the error rule

@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
@pytest.mark.parametrize("op", ("conv_bn_act", "bn_act", "bn_act_backward", "add_act", "add_act_backward"))
def test_aten_obeys_the_error_rule(op, dtype) -> None:
    """The fallback on the whole nasty grid, in poisoned memory, against float64."""
    kernel = dispatch.find("aten", op)
    wrong = [(v.problem.key, v.reason) for v in (testing.check_kernel(kernel, p) for p in testing.nasty_problems(op, dtype)) if not v.ok]
    assert not wrong


def test_aten_on_the_convolutions_of_resnet18() -> None:
    kernel = dispatch.find("aten", "conv_bn_act")
    for problem in testing.model_problems("resnet18", 2, 64):
        verdict = testing.check_kernel(kernel, problem)
        assert verdict.ok, (problem.key, verdict.reason)


@given(st.data())
def test_any_convolution(data) -> None:
    """Random shapes, kernels, strides, paddings, dilations, groups, layouts and dtypes against eager by the error rule."""
    draw = data.draw
    groups, dtype = draw(st.sampled_from((1, 1, 2, 3))), draw(st.sampled_from(DTYPES))
    c, k = groups * draw(st.integers(1, 5)), groups * draw(st.integers(1, 5))
    r, s = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    stride, dilation = draw(pair), draw(pair)
    padding = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    h = draw(st.integers(max(1, dilation[0] * (r - 1) + 1 - 2 * padding[0]), 14))
    w = draw(st.integers(max(1, dilation[1] * (s - 1) + 1 - 2 * padding[1]), 14))
    four, act = draw(st.booleans()), draw(st.sampled_from(("relu", "none")))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    x = _layouts(normal(draw(st.integers(0, 3)), c, h, w).to(dtype))[draw(st.sampled_from(("nchw", "nhwc", "sliced", "stepped")))]
    weight = _layouts(normal(k, c // groups, r, s).to(dtype))[draw(st.sampled_from(("nchw", "nhwc")))]
    wide = torch.promote_types(dtype, torch.float32)
    scale, shift, mean, var = (v.to(wide) for v in (normal(k), normal(k), normal(k), normal(k).abs() + 0.1))
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    bare = F.conv2d(x, weight, None, **geometry)
    res = normal(*bare.shape).to(dtype) if draw(st.booleans()) else None
    extra = {"mean": mean, "var": var, "eps": 1e-5} if four else {}
    args = (x, weight, scale, shift, res)
    got = ops.conv_bn_act(*args, act=act, **geometry, **extra)
    exact = eager_conv(*(t.double() if isinstance(t, Tensor) else t for t in args), act=act, **geometry,
                       **{key: v.double() if isinstance(v, Tensor) else v for key, v in extra.items()})
    if four or dtype in (torch.float32, torch.float64):
        eager = eager_conv(*args, act=act, **geometry, **extra)
    else:  # the affine in the convolution's dtype, as a user would have it
        eager = eager_conv(x, weight, scale.to(dtype), shift.to(dtype), res, act=act, **geometry)
    assert got.dtype == dtype and got.shape == bare.shape
    assert [a for a, n in zip(got.stride(), got.shape, strict=True) if n > 1] == \
        [a for a, n in zip(bare.stride(), bare.shape, strict=True) if n > 1] or got.numel() == 0
    assert_rule(got, eager, exact, what="answer")
