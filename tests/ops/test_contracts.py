"""The contract of every op: schema, fake, layouts, dtypes, autocast, empty and wrong input, the error rule."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from eager import CL, DTYPES, call_conv, conv_case, eager_add, eager_bn, eager_conv, layouts, leaves
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from resnet_fast import ops
from resnet_fast.dispatch import registry as dispatch
from resnet_fast.dispatch import use
from resnet_fast.models import problems
from resnet_fast.ops.conv import CONV_BN_ACT
from resnet_fast.ops.norm import BN_ACT, BN_ACT_BACKWARD
from resnet_fast.ops.residual import ADD_ACT, ADD_ACT_BACKWARD
from resnet_fast.testing import check, grids
from resnet_fast.testing.rule import assert_rule, same_nonfinite

# ---------------------------------------------------------------- registration


def _samples() -> list:
    def rand(*shape, dtype=torch.float32, grad=False, cl=False):
        t = torch.randn(*shape).to(dtype)
        return (t.contiguous(memory_format=CL) if cl else t).requires_grad_(grad)

    samples = []
    for dtype, cl, grad in (
        (torch.float32, False, True),
        (torch.float64, True, True),
        (torch.bfloat16, True, False),
    ):
        vector = torch.promote_types(dtype, torch.float32)
        k = [rand(4, dtype=vector, grad=grad) for _ in range(3)] + [
            torch.rand(4, dtype=vector) + 0.5
        ]
        x, w = (
            rand(2, 6, 9, 7, dtype=dtype, cl=cl, grad=grad),
            rand(4, 3, 3, 3, dtype=dtype, grad=grad),
        )
        res = rand(2, 4, 5, 4, dtype=dtype, cl=cl, grad=grad)
        geometry = (2, 2), (1, 1), (1, 1), 2
        samples.append(
            ("conv-bn", CONV_BN_ACT, (x, w, k[0], k[1], res, k[2], k[3], 1e-5, *geometry, "relu"))
        )
        samples.append(
            (
                "conv-affine",
                CONV_BN_ACT,
                (x, w, k[0], k[1], None, None, None, 0.0, *geometry, "none"),
            )
        )
        samples.append(
            (
                "bn",
                BN_ACT,
                (res, k[0], k[1], rand(2, 4, 5, 4, dtype=dtype, cl=cl, grad=grad), 1e-5, "relu"),
            )
        )
        y, dy = res.detach().relu(), rand(2, 4, 5, 4, dtype=dtype, cl=cl)
        four = [v.detach() for v in k]
        for act, residual in (("relu", True), ("none", True), ("none", False)):
            samples.append(
                (
                    f"bn-backward-{act}-{residual}",
                    BN_ACT_BACKWARD,
                    (dy, res.detach(), y, four[0], four[2], four[3], 1e-5, act, residual),
                )
            )
        gate = rand(2, 4, 1, 1, dtype=dtype, grad=grad)
        for g, act in ((None, "relu"), (gate, "relu"), (gate, "none")):
            samples.append((f"add-{g is not None}-{act}", ADD_ACT, (res, y, g, act)))
            detached = None if g is None else g.detach()
            samples.append(
                (
                    f"add-backward-{g is not None}-{act}",
                    ADD_ACT_BACKWARD,
                    (dy, y, None if g is None else res.detach(), detached, act),
                )
            )
    return [
        pytest.param(op, args, id=f"{name}-{args[0].dtype}".replace("torch.", ""))
        for name, op, args in samples
    ]


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


# ---------------------------------------------------------------- autocast


def test_autocast_casts_images_and_weights_only(registry) -> None:
    """Scale and shift stay float32: in bfloat16 a batch norm's shift loses more than the convolution does."""
    seen = []

    @dispatch.kernel("experimental.spy", op="conv_bn_act", supports=lambda p: None)
    def spy(*args):
        seen.append([a.dtype for a in args[:7]])
        return dispatch.find("aten.conv_bn_act").fn(*args)

    tensors, keywords = conv_case(torch.float32)
    with use("experimental.spy"), torch.autocast("cpu", torch.bfloat16):
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


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_are_those_of_conv2d(dtype) -> None:
    """For each layout of input, weight and residual: error rule, strides of F.conv2d, inputs unchanged."""
    (x, weight, scale, shift, res, mean, var), keywords = conv_case(dtype, size=(7, 6), stride=1)
    oracle = call_conv(
        eager_conv,
        [t.double() for t in (x, weight, scale, shift, res, mean, var)],
        "relu",
        **keywords,
    )
    for (a, xl), (b, wl), (c, rl) in itertools.product(
        layouts(x).items(), list(layouts(weight).items())[:2], layouts(res).items()
    ):
        kept = [t.clone() for t in (xl, wl, rl)]
        got = ops.conv_bn_act(xl, wl, scale, shift, rl, mean=mean, var=var, **keywords)
        bare = F.conv2d(
            xl, wl, None, *(keywords[k] for k in ("stride", "padding")), 1, keywords["groups"]
        )
        assert got.stride() == bare.stride(), (a, b, c)
        assert_rule(
            got,
            call_conv(eager_conv, (xl, wl, scale, shift, rl, mean, var), "relu", **keywords),
            oracle,
            what=f"{a} {b} {c}",
        )
        assert all(map(torch.equal, kept, (xl, wl, rl)))


@pytest.mark.parametrize(
    "shape", [(2, 1, 5, 4), (2, 4, 1, 1), (1, 4, 5, 1), (1, 1, 1, 1), (3, 4, 1, 6)]
)
@pytest.mark.parametrize("kernel", (1, 3))
def test_ambiguouslayouts(shape, kernel) -> None:
    """One channel or one pixel is both NCHW and NHWC: what can be viewed in eager can be viewed here."""
    weight, k = torch.randn(6, shape[1], kernel, kernel), torch.rand(6)
    for x in layouts(torch.randn(shape)).values():
        got, bare = (
            ops.conv_bn_act(x, weight, k, k, padding=kernel // 2),
            F.conv2d(x, weight, padding=kernel // 2),
        )
        assert [s for s, n in zip(got.stride(), got.shape, strict=True) if n > 1] == [
            s for s, n in zip(bare.stride(), bare.shape, strict=True) if n > 1
        ]


@pytest.mark.parametrize(
    "shape", [(2, 1, 5, 4), (2, 4, 1, 1), (1, 4, 5, 1), (1, 1, 1, 1), (3, 4, 1, 6), (0, 4, 3, 3)]
)
@pytest.mark.parametrize("filters", (1, 6))
def test_without_onednn_it_is_eager_itself(shape, filters) -> None:
    """float64 does not run in oneDNN: the result has eager's bits and the strides of F.conv2d."""
    weight, vectors = (
        torch.randn(filters, shape[1], 1, 1).double(),
        [torch.rand(filters).double() + 0.5 for _ in range(4)],
    )
    for x in layouts(torch.randn(shape).double()).values():
        bare = F.conv2d(x, weight)
        got = ops.conv_bn_act(x, weight, *vectors[:2], mean=vectors[2], var=vectors[3], eps=1e-5)
        assert got.stride() == bare.stride()
        assert torch.equal(
            got, F.batch_norm(bare, vectors[2], vectors[3], *vectors[:2], eps=1e-5).relu()
        )


def test_expanded_and_sliced_vectors() -> None:
    """A strided BN vector (expanded, or every second element): the byte comparison stays inside its memory."""
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
    torch.testing.assert_close(
        ops.conv_bn_act(x, weight, k, k, res, padding=1),
        eager_conv(x, weight, k, k, res, padding=1),
    )
    torch.testing.assert_close(ops.add_act(res, res), eager_add(res, res))
    torch.testing.assert_close(
        ops.bn_act(res, k, k, res)[0], eager_bn(res, k, k, res), rtol=1e-4, atol=1e-4
    )


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
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_nonfinite_numbers_as_in_eager(bad, where, layout, dtype) -> None:
    """One NaN or infinity in any operand comes out where eager has it (oneDNN's fused ReLU drops NaN).

    Not for a negative variance, which has no meaning. Without padding, because eager's own kernels differ in whether
    they multiply a non-finite weight by the zeros there.
    """
    if where == 6 and bad < 0:
        return
    tensors, keywords = conv_case(dtype, stride=1)
    keywords["padding"] = 0
    tensors = (*tensors[:4], tensors[4][..., :-2, :-2].contiguous(), *tensors[5:])
    tensors[where].view(-1)[1 + tensors[where].numel() // 2] = bad
    tensors = (layouts(tensors[0])[layout], *tensors[1:])
    for act in ("relu", "none"):
        assert same_nonfinite(
            call_conv(ops.conv_bn_act, tensors, act, **keywords),
            call_conv(eager_conv, tensors, act, **keywords),
        )


@pytest.mark.parametrize("bad", (torch.nan, torch.inf, -torch.inf))
def test_nonfinite_numbers_in_training_and_add(bad) -> None:
    x, res = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    x[0, 1, 1, 1] = res[1, 2, 0, 0] = bad
    k = torch.tensor([1.0, -1.0, 0.0, 1e-3])
    for act in ("relu", "none"):
        assert same_nonfinite(ops.bn_act(x, k, k, res, act=act)[0], eager_bn(x, k, k, res, act=act))
        assert same_nonfinite(ops.add_act(x, res, act=act), eager_add(x, res, act=act))
        assert same_nonfinite(
            ops.add_act(x, res, k.view(1, 4, 1, 1).expand(2, 4, 1, 1), act=act),
            eager_add(x, res, k.view(1, 4, 1, 1).expand(2, 4, 1, 1), act=act),
        )


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
        (
            "stride",
            c,
            (x, w, k, k),
            {"stride": 0},
            "stride: got [0, 0], expected one or two whole numbers of 1 or more",
        ),
        (
            "three strides",
            c,
            (x, w, k, k),
            {"stride": (1, 2, 3)},
            "stride: got [1, 2, 3], expected one or two",
        ),
        (
            "padding",
            c,
            (x, w, k, k),
            {"padding": (0, -1)},
            "padding: got [0, -1], expected one or two whole numbers of 0 or more",
        ),
        ("dilation", c, (x, w, k, k), {"dilation": 0}, "dilation: got [0, 0]"),
        ("no groups", c, (x[:, :0], w, k, k), {"groups": 0}, "groups: got 0, expected 1 or more"),
        (
            "filters of groups",
            c,
            (x, w[:5, :2], k[:5], k[:5]),
            {"groups": 2},
            "weight: got [5, 2, 3, 3], expected filters, a multiple of groups (2)",
        ),
        ("no filters", c, (x, w[:0], k[:0], k[:0]), {}, "weight: got [0, 4, 3, 3]"),
        (
            "small image",
            c,
            (x[..., :2], w, k, k),
            {"stride": 2},
            "image: got 5×2 pixels, expected at least one output pixel for filters of [6, 4, 3",
        ),
        (
            "whole scale",
            c,
            (x, w, k.long(), k),
            {},
            "scale dtype: got torch.int64, expected a floating dtype",
        ),
        ("weight rank", c, (x, w[0], k, k), {}, "weight: got 3-D"),
        ("dtype", c, (x.double(), w, k, k), {}, "got torch.float64, expected torch.float32"),
        ("integers", c, (x.byte(), w, k, k), {}, "got torch.uint8, expected a floating dtype"),
        ("scale", c, (x, w, k[:5], k), {}, "scale shape: got [5], expected [6]"),
        ("scale 2-D", c, (x, w, k.view(1, 6), k), {}, "scale shape: got [1, 6], expected [6]"),
        ("shift", c, (x, w, k, torch.ones(7)), {}, "shift shape: got [7], expected [6]"),
        (
            "mean",
            c,
            (x, w, k, k),
            {"mean": torch.ones(1), "var": k},
            "mean shape: got [1], expected [6]",
        ),
        (
            "var",
            c,
            (x, w, k, k),
            {"mean": k, "var": torch.ones(5)},
            "var shape: got [5], expected [6]",
        ),
        ("mean alone", c, (x, w, k, k), {"mean": k}, "mean and var"),
        ("var alone", c, (x, w, k, k), {"var": k}, "mean and var"),
        ("device", c, (x, w, meta, k), {}, "device"),
        (
            "residual",
            c,
            (x, w, k, k, torch.ones(2, 6, 5, 5)),
            {},
            "residual shape: got [2, 6, 5, 5], expected [2, 6, 3, 3]",
        ),
        ("residual broadcast", c, (x, w, k, k, torch.ones(2, 6, 1, 1)), {}, "residual shape"),
        (
            "residual dtype",
            c,
            (x, w, k, k, torch.ones(2, 6, 3, 3).double()),
            {},
            "residual dtype: got torch.float64",
        ),
        (
            "activation",
            c,
            (x, w, k, k),
            {"act": "gelu"},
            "act: got 'gelu', expected one of 'none', 'relu'",
        ),
        ("bn rank", b, (x[0], four, four), {}, "got 3-D"),
        ("bn weight", b, (x, k, four), {}, "weight shape: got [6], expected [4]"),
        ("bn bias", b, (x, four, k), {}, "bias shape: got [6], expected [4]"),
        (
            "bn residual",
            b,
            (x, four, four, x[:1]),
            {},
            "residual shape: got [1, 4, 5, 5], expected [2, 4, 5, 5]",
        ),
        ("bn activation", b, (x, four, four), {"act": "silu"}, "act: got 'silu'"),
        ("add", a, (x, x[:1]), {}, "y shape: got [1, 4, 5, 5], expected [2, 4, 5, 5]"),
        ("add dtype", a, (x, x.double()), {}, "y dtype: got torch.float64, expected torch.float32"),
        (
            "add gate",
            a,
            (x, x, torch.ones(2, 4)),
            {},
            "gate shape: got [2, 4], expected [2, 4, 1, 1]",
        ),
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
        assert (
            message.startswith(f"{op.__name__}: ") and sentence in message and "\n" not in message
        )


def test_one_value_per_channel_raises_torchs_error() -> None:
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        ops.bn_act(torch.randn(1, 3, 1, 1), torch.ones(3), torch.ones(3))


# ---------------------------------------------------------------- the error rule


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
@pytest.mark.parametrize(
    "op", ("conv_bn_act", "bn_act", "bn_act_backward", "add_act", "add_act_backward")
)
def test_aten_obeys_the_error_rule(op, dtype) -> None:
    """The fallback on the whole nasty grid, in poisoned memory, against float64."""
    kernel = dispatch.find("aten", op)
    wrong = [
        (v.problem.key, v.reason)
        for v in (check.check_kernel(kernel, p) for p in grids.nasty_problems(op, dtype))
        if not v.ok
    ]
    assert not wrong


def test_aten_on_the_convolutions_of_resnet18() -> None:
    kernel = dispatch.find("aten", "conv_bn_act")
    for problem in problems.model_problems("resnet18", 2, 64):
        verdict = check.check_kernel(kernel, problem)
        assert verdict.ok, (problem.key, verdict.reason)


@given(st.data())
def test_any_convolution(data) -> None:
    """Random shapes, geometries, groups, layouts and dtypes against eager by the error rule."""
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

    x = layouts(normal(draw(st.integers(0, 3)), c, h, w).to(dtype))[
        draw(st.sampled_from(("nchw", "nhwc", "sliced", "stepped")))
    ]
    weight = layouts(normal(k, c // groups, r, s).to(dtype))[
        draw(st.sampled_from(("nchw", "nhwc")))
    ]
    wide = torch.promote_types(dtype, torch.float32)
    scale, shift, mean, var = (
        v.to(wide) for v in (normal(k), normal(k), normal(k), normal(k).abs() + 0.1)
    )
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    bare = F.conv2d(x, weight, None, **geometry)
    res = normal(*bare.shape).to(dtype) if draw(st.booleans()) else None
    extra = {"mean": mean, "var": var, "eps": 1e-5} if four else {}
    args = (x, weight, scale, shift, res)
    got = ops.conv_bn_act(*args, act=act, **geometry, **extra)
    exact = eager_conv(
        *(t.double() if isinstance(t, Tensor) else t for t in args),
        act=act,
        **geometry,
        **{key: v.double() if isinstance(v, Tensor) else v for key, v in extra.items()},
    )
    if four or dtype in (torch.float32, torch.float64):
        eager = eager_conv(*args, act=act, **geometry, **extra)
    else:  # the affine in the convolution's dtype, as a user would have it
        eager = eager_conv(x, weight, scale.to(dtype), shift.to(dtype), res, act=act, **geometry)
    assert got.dtype == dtype and got.shape == bare.shape
    assert [a for a, n in zip(got.stride(), got.shape, strict=True) if n > 1] == [
        a for a, n in zip(bare.stride(), bare.shape, strict=True) if n > 1
    ] or got.numel() == 0
    assert_rule(got, eager, exact, what="answer")
