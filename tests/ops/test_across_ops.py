"""The ops across convolutions: registration, the error rule at the edges, derivatives beside eager's, wrong input."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from eager import DTYPES, layouts, leaves
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.library import opcheck

from resnet_fast import create_model, ops, plan
from resnet_fast.analysis import network_floor
from resnet_fast.bench.op import op_problems
from resnet_fast.dispatch import registry
from resnet_fast.dispatch.problem import ACROSS, Problem, describe
from resnet_fast.models.problems import across_layers, conv_layers, distinct
from resnet_fast.ops import across as fused
from resnet_fast.ops.across import CONV_POOL, CONV_TAIL, POINTWISE_PAIR, POINTWISE_POOL
from resnet_fast.roofline import chips, cost
from resnet_fast.testing import check, eager, full_size, grids, rule, samples

OPS = {
    "pointwise_pair": POINTWISE_PAIR,
    "conv_tail": CONV_TAIL,
    "conv_pool": CONV_POOL,
    "pointwise_pool": POINTWISE_POOL,
}
PLACE = {"device": "cpu", "dtype": torch.float64, "layout": "nhwc", "act": "relu"}
SMALL = {
    "pointwise_pair": Problem(
        "pointwise_pair",
        x=(2, 3, 2, 3),
        weight=(4, 3, 1, 1),
        chain=((4, 2, 1, 1),),
        second=(3, 6),
        stride=(2, 2),
        residual="nhwc",
        **PLACE,
    ),
    "conv_tail": Problem(
        "conv_tail",
        x=(2, 2, 3, 2),
        weight=(3, 2, 3, 3),
        padding=(1, 1),
        chain=((4, 3, 1, 1), (), (2, 4, 1, 1)),
        residual="nhwc",
        **PLACE,
    ),
    "conv_tail with projection": Problem(
        "conv_tail",
        x=(2, 2, 3, 2),
        weight=(3, 2, 3, 3),
        padding=(1, 1),
        residual="nhwc",
        chain=((4, 3, 1, 1), (4, 2, 1, 1), (2, 4, 1, 1)),
        **PLACE,
    ),
    "conv_pool": Problem(
        "conv_pool", x=(2, 2, 9, 7), weight=(3, 2, 5, 3), stride=(2, 2), padding=(2, 1), **PLACE
    ),
    "conv_pool of bytes": Problem(
        "conv_pool",
        x=(2, 3, 7, 6),
        weight=(3, 3, 3, 3),
        stride=(2, 2),
        padding=(1, 1),
        bytes=True,
        **PLACE,
    ),
    "pointwise_pool": Problem(
        "pointwise_pool", x=(2, 3, 2, 3), weight=(4, 3, 1, 1), residual="nhwc", **PLACE
    ),
}


def grown(args: tuple, dtype: torch.dtype, grad: bool) -> tuple:
    """The arguments in a dtype, biases and the like at least float32, as leaves that may need a gradient."""
    wide = torch.promote_types(dtype, torch.float32)
    return tuple(
        a.detach().to(wide if a.dim() == 1 else dtype).requires_grad_(grad)
        if isinstance(a, Tensor) and a.is_floating_point()
        else a
        for a in args
    )


# ---------------------------------------------------------------- registration


@pytest.mark.parametrize("case", SMALL)
@pytest.mark.parametrize(
    ("dtype", "grad"), [(torch.float32, True), (torch.float64, True), (torch.bfloat16, False)]
)
def test_opcheck(case, dtype, grad) -> None:
    """Schema, autograd registration, fake (shapes, dtypes, strides) and AOT dispatch."""
    problem = SMALL[case]
    opcheck(OPS[problem.op], grown(samples.make_args(problem), dtype, grad))


@pytest.mark.parametrize("op", ACROSS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_rule_at_the_edges(op, dtype) -> None:
    """``aten`` through the op: NHWC and other layouts, batch 0, odd sizes, one pixel; the problem is right."""
    for problem in grids.nasty_problems(op, dtype):
        args = samples.make_args(problem)
        out = OPS[op](*args)
        for got, low, exact in zip(
            rule.as_tuple(out), eager.eager(op, args), check.oracle(op, args), strict=True
        ):
            rule.assert_rule(got, low, exact, what=problem.key)
            assert got.dtype == dtype and (
                got.dim() == 2 or got.is_contiguous(memory_format=torch.channels_last)
            )
        said = describe(op, args)
        # what one pixel's layout is named is free
        assert replace(said, layout=problem.layout, residual=problem.residual) == problem
        assert samples.make_args(said, 3)[1].shape == args[1].shape


@pytest.mark.parametrize("case", SMALL)
def test_public_functions_take_any_strides(case) -> None:
    problem = SMALL[case]
    args = samples.make_args(problem)
    expected = rule.as_tuple(OPS[problem.op](*args))
    for name in ("nchw", "nhwc", "sliced", "stepped", "transposed"):
        laid = [layouts(a)[name] if isinstance(a, Tensor) and a.dim() == 4 else a for a in args]
        keywords = {"stride2": laid.pop()} if problem.op == "pointwise_pair" else {}
        for got, want in zip(
            rule.as_tuple(getattr(fused, problem.op)(*laid, **keywords)), expected, strict=True
        ):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("case", SMALL)
def test_nonfinite_values_are_where_eager_has_them(case) -> None:
    problem = SMALL[case]
    for value in (torch.nan, torch.inf, -torch.inf):
        args = samples.make_args(replace(problem, dtype=torch.float32))
        for i, a in enumerate(args):
            if isinstance(a, Tensor) and a.is_floating_point():
                first = (0,) * a.dim()
                kept = a[first].clone()
                a[first] = value
                found = rule.as_tuple(OPS[problem.op](*args))
                assert all(map(rule.same_nonfinite, found, eager.eager(problem.op, args))), (
                    i,
                    value,
                )
                a[first] = kept


def test_autocast_casts_images_and_filters_only() -> None:
    args = grown(samples.make_args(SMALL["conv_tail"]), torch.float32, True)
    with torch.autocast("cpu", torch.bfloat16):
        y, z = fused.conv_tail(*args)
    assert y.dtype == z.dtype == torch.bfloat16
    (y.float().sum() + z.float().sum()).backward()
    assert all(a.grad is not None and a.grad.dtype == torch.float32 for a in args if a is not None)


# ---------------------------------------------------------------- derivatives


def live_parts(case: str) -> tuple[Problem, tuple, list[int]]:
    problem = SMALL[case]
    args = samples.make_args(problem)
    return (
        problem,
        args,
        [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point()],
    )


def caller(op, args: tuple, live: list[int]):
    def run(*given):
        it = iter(given)
        return op(*(next(it) if i in live else a for i, a in enumerate(args)))

    return run


def public(problem: Problem):
    op = getattr(fused, problem.op)
    return (lambda *a: op(*a[:-1], stride2=a[-1])) if problem.op == "pointwise_pair" else op


@pytest.mark.parametrize("case", SMALL)
def test_gradcheck(case) -> None:
    problem, args, live = live_parts(case)
    run = caller(public(problem), args, live)
    inputs = leaves(tuple(args[i] for i in live))
    assert gradcheck(run, inputs, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("case", SMALL)
def test_every_derivative_is_eagers(case) -> None:
    """First and double backward, tangents through dual numbers and torch.func.jvp, vmap; each input has a gradient."""
    problem, args, live = live_parts(case)
    tensors = [args[i] for i in live]
    tangents = [torch.randn_like(t) for t in tensors]
    found = []
    for f in (public(problem), lambda *a: samples.SAMPLES[problem.op].eager(*a)):
        run, inputs = caller(f, args, live), leaves(tuple(tensors))
        outs = rule.as_tuple(run(*inputs))
        first = torch.autograd.grad(
            outs, inputs, [torch.cos(o.detach() * 3) for o in outs], create_graph=True
        )
        plain = torch.autograd.grad(
            rule.as_tuple(run(*inputs)), inputs, [torch.cos(o.detach() * 3) for o in outs]
        )
        second = torch.autograd.grad(
            sum((g.square() * (1 + 0.1 * i)).sum() for i, g in enumerate(first)), inputs
        )
        with forward_ad.dual_level():
            duals = rule.as_tuple(run(*map(forward_ad.make_dual, tensors, tangents)))
            forward = [forward_ad.unpack_dual(o).tangent.clone() for o in duals]
        functional = rule.as_tuple(torch.func.jvp(run, tuple(tensors), tuple(tangents))[1])
        batched = torch.func.vmap(lambda t, run=run: rule.as_tuple(run(t, *tensors[1:])))(
            torch.stack([tensors[0], -tensors[0]])
        )
        assert all(t.abs().max() > 0 for t in (*first, *plain, *forward, *functional)) and any(
            t.abs().max() > 0 for t in second
        )
        found.append([*first, *plain, *second, *forward, *functional, *batched])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------- wrong input


def changed(case: str, i: int, value) -> tuple:
    args = list(samples.make_args(replace(SMALL[case], dtype=torch.float32)))
    args[i] = value(args[i])
    return tuple(args)


WRONG = [
    ("pointwise_pair", 0, lambda x: x[0], "pointwise_pair: x: got 3-D shape .* expected 4-D"),
    (
        "pointwise_pair",
        1,
        lambda w: w[:, :2],
        r"pointwise_pair: weight shape: got \[4, 2, 1, 1\], expected \[K, 3, 1, 1\]",
    ),
    (
        "pointwise_pair",
        1,
        lambda w: w.half(),
        "pointwise_pair: weight dtype: got torch.float16, expected torch.float32",
    ),
    (
        "pointwise_pair",
        2,
        lambda x: x[:, :, :2],
        r"pointwise_pair: x2 shape: got \[2, 2, 2, 6\], expected images and pixels that stride \[2, 2\]",
    ),
    ("pointwise_pair", 2, lambda x: x[:1], "pointwise_pair: x2 shape"),
    ("pointwise_pair", 3, lambda w: w[:3], "pointwise_pair: weight2 filters: got 3, expected 4"),
    (
        "pointwise_pair",
        4,
        lambda b: b.half(),
        "pointwise_pair: bias dtype: got torch.float16, expected torch.float32",
    ),
    (
        "pointwise_pair",
        5,
        lambda s: (0, 2),
        r"pointwise_pair: stride2: got \[0, 2\], expected two positive",
    ),
    (
        "conv_tail",
        1,
        lambda w: w[:, :, :1, :1],
        r"conv_tail: weight2 shape: .* expected \[K, 2, 3, 3\]",
    ),
    (
        "conv_tail",
        3,
        lambda w: w[:, :2],
        r"conv_tail: weight3 shape: .* \(weight2's result has 3 channels\)",
    ),
    (
        "conv_tail",
        5,
        lambda r: r[:, :3],
        r"conv_tail: residual shape: got \[2, 3, 3, 2\], expected \[2, 4, 3, 2\]",
    ),
    (
        "conv_tail with projection",
        6,
        lambda p: p[:3],
        "conv_tail: projection filters: got 3, expected 4",
    ),
    (
        "conv_tail with projection",
        5,
        lambda r: r[:, :1],
        r"conv_tail: projection shape: got \[4, 2, 1, 1\], expected \[K, 1, 1, 1\]",
    ),
    ("conv_tail", 8, lambda b: b[:1], r"conv_tail: bias1 shape: got \[1\], expected \[2\]"),
    (
        "conv_pool",
        0,
        lambda x: x.to(torch.uint8),
        "conv_pool: x dtype: got torch.uint8, expected a floating dtype",
    ),
    (
        "conv_pool",
        1,
        lambda w: w[:, :, :4],
        r"conv_pool: weight shape: .* expected \[K, C, R, S\], R and S odd",
    ),
    (
        "conv_pool of bytes",
        0,
        lambda x: x.float(),
        "conv_pool: x with mean and std: got torch.float32 .* expected uint8",
    ),
    (
        "conv_pool of bytes",
        3,
        lambda m: None,
        "conv_pool: mean and std: got one of them, expected both or neither",
    ),
    ("conv_pool of bytes", 4, lambda m: m[:2], r"conv_pool: std shape: got \[2\], expected \[3\]"),
    (
        "conv_pool of bytes",
        3,
        lambda m: m.half(),
        "conv_pool: mean dtype: got torch.float16, expected torch.float32",
    ),
    (
        "pointwise_pool",
        3,
        lambda r: r[..., :1],
        r"pointwise_pool: residual shape: got \[2, 4, 2, 1\], expected \[2, 4, 2, 3\]",
    ),
]


@pytest.mark.parametrize(("case", "i", "value", "sentence"), WRONG)
def test_wrong_input_says_what_it_got_and_expected(case, i, value, sentence) -> None:
    op = OPS[SMALL[case].op]
    args = changed(case, i, value)
    with pytest.raises(RuntimeError, match=sentence):
        op(*args)
    meta = tuple(a.to("meta") if isinstance(a, Tensor) else a for a in args)
    with pytest.raises(RuntimeError, match=sentence):
        op(*meta)


# ---------------------------------------------------------------- what speaks of the ops


@pytest.mark.parametrize("op", ACROSS)
def test_verified_at_full_size_and_wrong_kernels_are_seen(op) -> None:
    """A whole batch against an oracle of few images; a kernel that forgets the last image, or the bias, fails."""
    right = registry.find("aten", op)
    problem = replace(
        next(p for p in SMALL.values() if p.op == op),
        x=(12, *next(p for p in SMALL.values() if p.op == op).x[1:]),
        dtype=torch.float32,
    )
    assert full_size.repeats(problem) == 3 and full_size.verify(right, problem).ok

    def forgets(*args):
        out = right.fn(*args)
        rule.as_tuple(out)[0][-1] = 0
        return out

    wrong = registry.Kernel("experimental.wrong", op, forgets, lambda p: None, lambda: None)
    assert not full_size.verify(wrong, problem).ok


def test_bytes_are_normalised_before_the_padding() -> None:
    """A picture of the mean gives what zeros give, at the border too."""
    mean, std = torch.tensor([100.0, 50.0, 25.0]), torch.tensor([60.0, 50.0, 40.0])
    x = mean.to(torch.uint8).view(1, 3, 1, 1).expand(2, 3, 20, 18)
    weight, bias = torch.randn(8, 3, 7, 7), torch.randn(8)
    torch.testing.assert_close(
        fused.conv_pool(x, weight, bias, mean, std),
        fused.conv_pool(torch.zeros(x.shape), weight, bias),
    )


@pytest.mark.parametrize("op", ACROSS)
def test_keys_tell_problems_apart(op) -> None:
    grid = grids.nasty_problems(op)
    assert len({p.key for p in grid}) == len(set(grid)) == len(grid)
    one = grid[0]
    others = [
        replace(one, chain=(*one.chain, (1, 1, 1, 1))),
        replace(one, chain=((), *one.chain[1:])),
        replace(one, second=(99, 99)),
        replace(one, bytes=not one.bytes),
    ]
    assert len({p.key for p in (one, *others)}) == 5


def test_ops_agree_with_single_convolutions() -> None:
    """Each against ``conv_bn_act`` step by step, the way a plan would have run it."""
    x, weight, x2, weight2, bias, stride2 = samples.make_args(SMALL["pointwise_pair"])
    one = torch.ones_like(bias)
    shortcut = ops.conv_bn_act(x2, weight2, one, 0 * bias, stride=stride2, act="none")
    torch.testing.assert_close(
        fused.pointwise_pair(x, weight, x2, weight2, bias, stride2=stride2),
        ops.conv_bn_act(x, weight, one, bias, shortcut),
    )
    x, weight, bias, *_ = samples.make_args(SMALL["conv_pool"])
    stem = ops.conv_bn_act(x, weight, torch.ones_like(bias), bias, stride=2, padding=(2, 1))
    torch.testing.assert_close(fused.conv_pool(x, weight, bias), F.max_pool2d(stem, 3, 2, 1))


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2"])
def test_the_groups_of_an_architecture_are_those_that_a_plan_finds(name) -> None:
    """Else a table measured for the one would not serve the other."""
    run = plan(create_model(name), torch.randn(1, 3, 64, 64))
    found = across_layers(conv_layers(name, 1, 64, torch.float32, "cpu"))
    square = run.variant(ACROSS).explain(torch.randn(1, 3, 64, 64))
    singles = [run.variant((op,)).explain(torch.randn(1, 3, 64, 64)) for op in ACROSS]
    assert {(g.name, g.problem) for g in found} == {
        (line.module, line.problem) for lines in singles for line in lines if line.op in ACROSS
    }
    assert {line.problem for line in square if line.op in ACROSS} <= {g.problem for g in found}
    assert [p for p in op_problems(name, 1, 64, torch.float32, "cpu") if p.op in ACROSS] == [
        g.problem for g in distinct(found)
    ]


def test_what_a_group_saves_is_what_is_between_its_members() -> None:
    limits = chips.ceilings("h200")
    found = {
        s.op: s for s in network_floor.savings(across_layers(conv_layers("resnet50", 256)), limits)
    }
    assert {op: s.count for op, s in found.items()} == {
        "conv_pool": 1,
        "pointwise_pair": 4,
        "conv_tail": 12,
        "pointwise_pool": 1,
    }
    stem, head = found["conv_pool"], found["pointwise_pool"]
    # written and read again
    assert stem.alone.bytes - stem.together.bytes == 2 * 2 * 256 * 64 * 112 * 112
    assert head.alone.bytes - head.together.bytes == 2 * 2 * 256 * 2048 * 49
    pixels = 256 * (56 * 56 * 256 + 28 * 28 * 512 + 14 * 14 * 1024 + 7 * 7 * 2048)
    pair = found["pointwise_pair"]
    assert (
        pair.alone.bytes - pair.together.bytes == 2 * 2 * pixels
        and pair.alone.flops == pair.together.flops
    )
    assert all(s.together.seconds < s.alone.seconds for s in found.values())
    text = str(network_floor.table("resnet50", 256, 224, torch.bfloat16, "h200"))
    assert "across convolutions" in text and "conv_tail" in text


def test_floors_count_each_operand_once() -> None:
    place = {"device": "cuda", "dtype": torch.bfloat16, "layout": "nhwc", "act": "relu"}
    pair = cost.problem_step(
        Problem(
            "pointwise_pair",
            x=(2, 64, 28, 28),
            weight=(256, 64, 1, 1),
            chain=((256, 128, 1, 1),),
            second=(56, 56),
            stride=(2, 2),
            residual="nhwc",
            **place,
        )
    )
    pixels = 2 * 28 * 28
    assert pair.bytes == 2 * (
        pixels * (64 + 128 + 256) + 256 * (64 + 128)
    ) and pair.flops == 2 * pixels * 256 * (64 + 128)
    tail = Problem(
        "conv_tail",
        x=(2, 64, 8, 8),
        weight=(64, 64, 3, 3),
        padding=(1, 1),
        residual="nhwc",
        chain=((256, 64, 1, 1), (), (32, 256, 1, 1)),
        **place,
    )
    weights = 64 * 64 * 9 + 256 * 64 + 32 * 256
    step = cost.problem_step(tail)
    assert (
        step.bytes == 2 * (128 * (64 + 256 + 256 + 32) + weights)
        and step.flops == 2 * 128 * weights
    )
    projected = cost.problem_step(
        replace(tail, chain=((256, 64, 1, 1), (256, 16, 1, 1), (32, 256, 1, 1)))
    )
    assert (
        projected.bytes == step.bytes + 2 * (256 * 16 - 128 * (256 - 16))
        and projected.flops == step.flops + 2 * 128 * 256 * 16
    )
    stem = Problem(
        "conv_pool", x=(2, 3, 32, 32), weight=(64, 3, 7, 7), stride=(2, 2), padding=(3, 3), **place
    )
    step = cost.problem_step(stem)
    assert (
        step.bytes == 2 * (2 * 3 * 32 * 32 + 64 * 147 + 2 * 64 * 64)
        and step.flops == 2 * 2 * 256 * 64 * 147
    )
    assert cost.problem_step(replace(stem, bytes=True)).bytes == step.bytes - 2 * 3 * 32 * 32
    head = cost.problem_step(
        Problem(
            "pointwise_pool", x=(2, 512, 7, 7), weight=(2048, 512, 1, 1), residual="nhwc", **place
        )
    )
    assert (
        head.bytes == 2 * (98 * (512 + 2048) + 2048 * 512 + 2 * 2048)
        and head.flops == 2 * 98 * 2048 * 512
    )
