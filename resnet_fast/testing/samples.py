"""How a kernel is judged: the error rule against a float64 oracle, problem grids, inputs for a problem, poisoned memory.

The rule: err(kernel, float64) ≤ 2 × err(eager in the same dtype, float64) + floor, 3 × for gradients, by RMS and by
maximum, both relative to the oracle's own. The floor is a few roundings of the dtype. Nothing here loosens it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..dispatch.problem import ACROSS, Problem
from ..dispatch.registry import Kernel
from ..models.problems import across, distinct, layers
from ..ops import reference

FACTOR, GRADIENT_FACTOR = 2.0, 3.0
# An eager result can be exact by luck; no kernel is asked for better than a few roundings of its own dtype.
FLOOR = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_BACKWARD = ("bn_act_backward", "add_act_backward")


@dataclass(frozen=True)
class Error:
    """Relative distance from the oracle: root mean square and maximum, both over the oracle's RMS and maximum."""

    rms: float
    max: float


@dataclass(frozen=True)
class Verdict:
    """What ``check_kernel`` found for one kernel on one problem; ``reason`` is None if it passed."""

    kernel: str
    problem: Problem
    error: Error
    eager: Error
    reason: str | None

    @property
    def ok(self) -> bool:
        return self.reason is None


def error(got: Tensor, oracle: Tensor) -> Error:
    """Distance of ``got`` from a float64 oracle, over the elements where the oracle is finite; empty tensors have none."""
    got, oracle = got.detach().to("cpu", torch.float64), oracle.detach().cpu()
    finite = oracle.isfinite()
    diff, true = (got - oracle)[finite], oracle[finite]
    if true.numel() == 0:
        return Error(0.0, 0.0)
    tiny = torch.finfo(torch.float64).tiny
    return Error(
        (diff.square().mean().sqrt() / true.square().mean().sqrt().clamp_min(tiny)).item(),
        (diff.abs().max() / true.abs().max().clamp_min(tiny)).item(),
    )


def broken_rule(got: Tensor, eager: Tensor, oracle: Tensor, *, gradient: bool = False) -> str | None:
    """The sentence that says how ``got`` breaks the error rule, or None if it obeys it; NaN and infinities must lie where eager's lie."""
    if got.shape != oracle.shape:
        return f"shape {list(got.shape)}, expected {list(oracle.shape)}"
    if not same_nonfinite(got, eager):
        return "NaN or infinity where eager has none, or the other way round"
    factor = GRADIENT_FACTOR if gradient else FACTOR
    mine, bar, floor = error(got, oracle), error(eager, oracle), FLOOR[eager.dtype]
    for name in ("rms", "max"):
        if not getattr(mine, name) <= factor * getattr(bar, name) + floor:
            return f"{name} error {getattr(mine, name):.3g}, allowed {factor:g} × {getattr(bar, name):.3g} + {floor:g}"
    return None


def assert_rule(got: Tensor, eager: Tensor, oracle: Tensor, *, gradient: bool = False, what: str = "") -> None:
    """Raise AssertionError if the error rule is broken."""
    reason = broken_rule(got, eager, oracle, gradient=gradient)
    assert reason is None, f"{what}: {reason}"


def same_nonfinite(got: Tensor, eager: Tensor) -> bool:
    """NaN, +inf and −inf at the same places."""
    got, eager = got.detach().cpu(), eager.detach().cpu()
    return all(torch.equal(test(got), test(eager)) for test in (torch.isnan, torch.isposinf, torch.isneginf))


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


# ---------------------------------------------------------------- inputs


def make_args(problem: Problem, seed: int = 0, device: str | torch.device | None = None) -> tuple:
    """Random flat arguments for a problem, in its dtypes, layouts and device; the affine has negative, zero and tiny scales among others."""
    generator = torch.Generator().manual_seed(seed)
    device = device or problem.device

    def normal(*shape: int, layout: str = "nhwc", dtype: torch.dtype = problem.dtype, std: float = 1.0) -> Tensor:
        return _lay(torch.randn(shape, generator=generator).mul_(std).to(device, dtype), layout)

    def vectors(k: int) -> list[Tensor]:
        wide = torch.promote_types(problem.dtype, torch.float32)
        scale, shift, mean = (normal(k, dtype=wide) for _ in range(3))
        scale[::5], scale[1::7] = 0.0, 1e-3
        return [scale, shift, mean * 0.5, torch.rand(k, generator=generator).add_(0.1).to(device, wide)]

    if problem.op == "conv_bn_act":
        return _conv_args(problem, normal, vectors)
    if problem.op == "bn_act":
        scale, shift, *_ = vectors(problem.x[1])
        x = normal(*problem.x, layout=problem.layout) + 0.5
        return x, scale, shift, _maybe(problem.residual, normal, problem.x), 1e-5, problem.act
    if problem.op == "bn_act_backward":
        forward = make_args(replace(problem, op="bn_act"), seed, device)
        y, mean, var = reference.bn_act(*forward)
        dy = normal(*problem.x, layout=problem.layout)
        return (
            dy,
            forward[0],
            _lay(y, problem.layout),
            forward[1],
            mean,
            var,
            1e-5,
            problem.act,
            problem.residual is not None,
        )
    if problem.op in ACROSS:
        return across_args(problem, normal, vectors)
    x, y = normal(*problem.x, layout=problem.layout), normal(*problem.x, layout=problem.residual or problem.layout)
    gate = torch.sigmoid(normal(*problem.x[:2], 1, 1)) if problem.gate else None
    if problem.op == "add_act":
        return x, y, gate, problem.act
    out = _lay(reference.add_act(x, y, gate, problem.act), problem.layout)
    dout = normal(*problem.x, layout=problem.layout)
    return dout, out, x if problem.gate else None, gate, problem.act


def _conv_args(problem: Problem, normal: Callable, vectors: Callable) -> tuple:
    k, c, r, s = problem.weight
    x = normal(*problem.x, layout=problem.layout)
    weight = normal(*problem.weight, layout=problem.layout, std=(2.0 / (c * r * s)) ** 0.5)
    scale, shift, mean, var = vectors(k)
    residual = _maybe(problem.residual, normal, (problem.x[0], k, *problem.out_hw))
    four = (mean, var, 1e-5) if problem.bn else (None, None, 0.0)
    return (
        x,
        weight,
        scale,
        shift,
        residual,
        *four,
        problem.stride,
        problem.padding,
        problem.dilation,
        problem.groups,
        problem.act,
    )


def across_args(problem: Problem, normal: Callable, vectors: Callable) -> tuple:
    """Filters that keep the variance, biases as a folded batch norm has them."""

    def conv(shape: tuple[int, ...]) -> Tensor:
        return normal(*shape, std=(2.0 / (shape[1] * shape[2] * shape[3])) ** 0.5)

    def bias(shape: tuple[int, ...]) -> Tensor:
        return vectors(shape[0])[1]

    wide = torch.promote_types(problem.dtype, torch.float32)
    n, (k, *_), first = problem.x[0], problem.weight, conv(problem.weight)
    x = normal(*problem.x, layout=problem.layout, **({"dtype": wide} if problem.bytes else {}))
    if problem.op == "pointwise_pair":
        (second,) = problem.chain
        sizes = problem.second or tuple(size * s for size, s in zip(problem.x[2:], problem.stride, strict=True))
        x2 = normal(n, second[1], *sizes, layout=problem.residual or "nhwc")
        return x, first, x2, conv(second), bias(second), problem.stride
    if problem.op == "conv_tail":
        third, projection, after = problem.chain
        residual = normal(
            n, projection[1] if projection else third[0], *problem.x[2:], layout=problem.residual or "nhwc"
        )
        return (
            x,
            first,
            bias(problem.weight),
            conv(third),
            bias(third),
            residual,
            conv(projection) if projection else None,
            conv(after),
            bias(after),
        )
    if problem.op == "conv_pool":
        if not problem.bytes:
            return x, first, bias(problem.weight), None, None
        mean, std = (
            torch.tensor(v, dtype=wide, device=x.device).repeat(problem.x[1])[: problem.x[1]] * 255 for v in IMAGENET
        )
        pixels = _lay((x * 64 + 128).clamp(0, 255).to(torch.uint8), problem.layout)
        return pixels, first, bias(problem.weight), mean, std
    return x, first, bias(problem.weight), normal(n, k, *problem.x[2:], layout=problem.residual or "nhwc")


def _maybe(layout: str | None, normal: Callable, shape: tuple[int, ...]) -> Tensor | None:
    return None if layout is None else normal(*shape, layout=layout)


def _lay(t: Tensor, layout: str) -> Tensor:
    """The same values in the named layout; "strided" is a slice of something wider."""
    if t.dim() != 4:
        return t
    if layout == "nhwc":
        return t.contiguous(memory_format=torch.channels_last)
    if layout == "nchw":
        return t.contiguous()
    wide = t.new_zeros(*t.shape[:-1], t.shape[-1] + 3)
    wide[..., 1:-2] = t
    return wide[..., 1:-2]


# ---------------------------------------------------------------- judging


def oracle(op: str, args: tuple) -> tuple[Tensor, ...]:
    """The reference in float64 on the CPU, on exactly the values that the kernel gets."""
    wide = tuple(a.detach().to("cpu", torch.float64) if isinstance(a, Tensor) else a for a in args)
    return _tuple(getattr(reference, op)(*wide))


def eager(op: str, args: tuple) -> tuple[Tensor, ...]:
    """What a user has without this package, in the arguments' dtype: torch's convolution and batch norm one after the other.

    The pointwise ops are their reference, which rounds once where torch's modules round twice: a stricter bar.
    """
    if op == "bn_act":
        return _eager_bn(*args)
    if op in ACROSS:
        return _tuple(_EAGER_ACROSS[op](*args))
    if op != "conv_bn_act":
        return _tuple(getattr(reference, op)(*args))
    x, weight, scale, shift, residual, mean, var, eps, *geometry, act = args
    out = torch.nn.functional.conv2d(x, weight, None, *geometry)
    if mean is None:
        mean, var, eps = torch.zeros_like(scale), torch.ones_like(scale), 1e-30  # torch 2.11 refuses 0
    out = torch.nn.functional.batch_norm(out, mean, var, scale, shift, False, 0.0, eps)
    out = out if residual is None else out + residual
    return (torch.relu(out) if act == "relu" else out,)


def _eager_bn(x, weight, bias, residual, eps, act) -> tuple[Tensor, Tensor, Tensor]:
    """Torch's own statistics: its one-pass variance in bfloat16 NHWC is ten times less exact than the reference's (CPU, torch 2.15)."""
    mean, var = (torch.zeros_like(v, dtype=torch.promote_types(x.dtype, torch.float32)) for v in (weight, bias))
    out = torch.nn.functional.batch_norm(x, mean, var, weight, bias, True, 1.0, eps)
    out = out if residual is None else out + residual
    n = x.numel() // x.shape[1]
    return torch.relu(out) if act == "relu" else out, mean, var * ((n - 1) / n)


def _eager_block(x, weight, bias, residual, padding=0) -> Tensor:
    """Folded convolution, residual, ReLU, each rounded."""
    out = torch.nn.functional.conv2d(x, weight, bias.to(weight.dtype), padding=padding)
    return torch.relu(out if residual is None else out + residual)


def _eager_pair(x, weight, x2, weight2, bias, stride2) -> Tensor:
    return _eager_block(x, weight, bias, torch.nn.functional.conv2d(x2, weight2, None, stride2))


def _eager_tail(x, weight2, bias2, weight3, bias3, residual, projection, weight1, bias1) -> tuple[Tensor, Tensor]:
    shortcut = residual if projection is None else torch.nn.functional.conv2d(residual, projection)
    y = _eager_block(_eager_block(x, weight2, bias2, None, 1), weight3, bias3, shortcut)
    return y, _eager_block(y, weight1, bias1, None)


def _eager_conv_pool(x, weight, bias, mean, std) -> Tensor:
    padding = weight.shape[2] // 2, weight.shape[3] // 2
    x = reference.normalized(x, mean, std, weight.dtype)
    out = torch.nn.functional.conv2d(x, weight, bias.to(weight.dtype), 2, padding)
    return torch.nn.functional.max_pool2d(torch.relu(out), 3, 2, 1)


def _eager_pointwise_pool(x, weight, bias, residual) -> Tensor:
    return _eager_block(x, weight, bias, residual).mean((2, 3))


_EAGER_ACROSS = {
    "pointwise_pair": _eager_pair,
    "conv_tail": _eager_tail,
    "conv_pool": _eager_conv_pool,
    "pointwise_pool": _eager_pointwise_pool,
}


def check_kernel(kernel: Kernel, problem: Problem, seed: int = 0) -> Verdict:
    """Run one kernel on one problem in poisoned memory and judge every output by the error rule; inputs must come back unchanged."""
    args = make_args(problem, seed)
    kept = tuple(a.clone() if isinstance(a, Tensor) else a for a in args)
    with poisoned(), torch.no_grad():
        outputs = _tuple(kernel.fn(*args))
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


def _tuple(value) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


# ---------------------------------------------------------------- grids


def model_problems(
    model: str = "resnet50",
    batch: int = 2,
    size: int = 224,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    capability: tuple[int, int] | None = None,
    op: str = "conv_bn_act",
) -> list[Problem]:
    """Every distinct convolution of a model, or group of convolutions that ``op`` could take."""
    single = layers(model, batch, size, dtype, device, capability)
    found = single if op == "conv_bn_act" else [group for group in across(single) if group.problem.op == op]
    return [layer.problem for layer in distinct(found)]


def nasty_problems(
    op: str, dtype: torch.dtype = torch.float32, device: str = "cpu", capability: tuple[int, int] | None = None
) -> list[Problem]:
    """Small problems at the edges: channels in {1, 3, 8, 63, 64, 65, 129}, H≠W, odd sizes with stride 2, groups, dilation, N=0 and 1."""
    place = {"op": op, "device": device, "dtype": dtype, "capability": capability}
    if op == "conv_bn_act":
        return [Problem(layout="nhwc", **place, **case) for case in _nasty_convs()]
    if op in ACROSS:
        return [Problem(**{"layout": "nhwc", "act": "relu", **place, **case}) for case in _NASTY_ACROSS[op]()]
    shapes = [(2, c, 5, 7) for c in (1, 3, 8, 63, 64, 65, 129)] + [(1, 64, 1, 9), (4, 128, 14, 14), (0, 8, 4, 4)]
    if op.startswith("bn_act"):
        shapes = shapes[:-1]  # an empty batch has no statistics
    found = []
    for x, act, residual, layout in itertools.product(shapes, ("relu", "none"), (False, True), ("nhwc", "nchw")):
        if op.startswith("bn_act"):
            found.append(Problem(x=x, layout=layout, act=act, residual=layout if residual else None, **place))
        else:
            found.append(Problem(x=x, layout=layout, act=act, residual=layout, gate=residual, **place))
    return found


def _nasty_convs() -> Iterator[dict]:
    def case(n, c, h, w, k, r=1, stride=1, dilation=1, groups=1, act="relu", residual=None, bn=True, padding=None):
        pad = dilation * (r // 2) if padding is None else padding
        return {
            "x": (n, c, h, w),
            "weight": (k, c // groups, r, r),
            "stride": (stride, stride),
            "padding": (pad, pad),
            "dilation": (dilation, dilation),
            "groups": groups,
            "act": act,
            "residual": residual,
            "bn": bn,
        }

    channels = (1, 3, 8, 63, 64, 65, 129)
    for c, k in zip(channels, channels[::-1], strict=True):
        for r, stride in ((1, 1), (1, 2), (3, 1), (3, 2)):
            yield case(2, c, 7, 5, k, r, stride, residual="nhwc" if r == stride else None, bn=stride == 1)
    yield case(1, 3, 33, 47, 64, 7, 2)
    yield case(2, 64, 9, 9, 64, 3, dilation=2, act="none")
    yield case(2, 64, 8, 6, 64, 3, 2, groups=32, residual="nhwc")
    yield case(2, 16, 6, 6, 32, 3, groups=4)
    yield case(1, 256, 1, 1, 64, 1, residual="nhwc")
    yield case(1, 130, 4, 4, 72, 3, act="none", bn=False)
    yield case(1, 8, 6, 6, 8, 3, padding=0)
    yield case(0, 16, 8, 8, 24, 3, residual="nhwc")
    yield case(3, 32, 5, 5, 200, 1, act="none", residual="nhwc")
    for r, stride in ((3, 1), (1, 1), (1, 2)):  # whole panels of filters
        yield case(2, 48, 7, 9, 96, r, stride, residual="nhwc")
        yield case(1, 16, 1, 3, 32, r, stride, act="none", bn=False)


def _nasty_pairs() -> Iterator[dict]:
    """n, c, h, w → k filters; c2 channels at height and width h2, w2."""
    cases = [
        (2, 64, 7, 5, 256, 64, 7, 5, 1),
        (2, 128, 4, 6, 512, 256, 8, 12, 2),
        (2, 128, 4, 3, 512, 256, 7, 5, 2),
        (1, 1, 3, 3, 3, 129, 5, 6, 2),
        (2, 65, 5, 4, 63, 3, 5, 4, 1),
        (3, 8, 1, 1, 130, 8, 2, 1, 2),
        (1, 72, 9, 1, 8, 1, 17, 1, 2),
        (0, 16, 4, 4, 24, 8, 8, 8, 2),
        (4, 64, 7, 7, 64, 32, 13, 13, 2),
    ]
    for n, c, h, w, k, c2, h2, w2, stride in cases:
        yield {
            "x": (n, c, h, w),
            "weight": (k, c, 1, 1),
            "chain": ((k, c2, 1, 1),),
            "second": (h2, w2),
            "stride": (stride, stride),
            "residual": "nhwc",
        }
    yield {
        "x": (2, 8, 5, 5),
        "weight": (16, 8, 1, 1),
        "chain": ((16, 4, 1, 1),),
        "second": (9, 10),
        "stride": (2, 2),
        "layout": "nchw",
        "residual": "nchw",
    }


def _nasty_tails() -> Iterator[dict]:
    """c channels → c2 by 3×3 → k, + residual (of cr channels, projected) → k1."""
    cases = [
        (2, 64, 9, 7, 64, 256, 0, 64),
        (2, 64, 8, 8, 64, 256, 64, 64),
        (1, 128, 14, 5, 128, 512, 0, 128),
        (2, 3, 5, 4, 8, 65, 0, 129),
        (1, 63, 1, 1, 64, 64, 1, 8),
        (3, 16, 1, 6, 24, 40, 0, 1),
        (2, 8, 17, 3, 1, 3, 130, 65),
        (0, 16, 4, 4, 16, 64, 0, 16),
        (2, 64, 6, 6, 64, 256, 0, 128),
    ]
    for n, c, h, w, c2, k, cr, k1 in cases:
        chain = (k, c2, 1, 1), (k, cr, 1, 1) if cr else (), (k1, k, 1, 1)
        yield {"x": (n, c, h, w), "weight": (c2, c, 3, 3), "padding": (1, 1), "chain": chain, "residual": "nhwc"}
    yield {
        "x": (2, 8, 5, 5),
        "weight": (8, 8, 3, 3),
        "padding": (1, 1),
        "chain": ((16, 8, 1, 1), (), (8, 16, 1, 1)),
        "layout": "nchw",
        "residual": "nchw",
    }


def _nasty_stems() -> Iterator[dict]:
    sizes = [
        (2, 3, 32, 32, 64, 7),
        (1, 3, 33, 47, 64, 7),
        (2, 3, 224, 5, 64, 7),
        (1, 3, 1, 1, 64, 7),
        (2, 3, 2, 3, 8, 7),
        (3, 3, 9, 10, 65, 7),
        (0, 3, 16, 16, 64, 7),
        (1, 4, 21, 22, 64, 7),
        (2, 1, 12, 13, 3, 5),
        (1, 3, 19, 18, 32, 3),
    ]
    for n, c, h, w, k, r in sizes:
        for byte in (False, True) if c == 3 else (False,):
            yield {
                "x": (n, c, h, w),
                "weight": (k, c, r, r),
                "stride": (2, 2),
                "padding": (r // 2, r // 2),
                "bytes": byte,
            }
    for byte in (False, True):
        yield {
            "x": (2, 3, 20, 18),
            "weight": (64, 3, 7, 7),
            "stride": (2, 2),
            "padding": (3, 3),
            "layout": "nchw",
            "bytes": byte,
        }


def _nasty_pointwise_pools() -> Iterator[dict]:
    cases = [
        (2, 512, 7, 7, 2048),
        (1, 64, 1, 1, 64),
        (3, 65, 5, 9, 63),
        (2, 8, 14, 13, 129),
        (5, 1, 3, 1, 3),
        (0, 16, 4, 4, 24),
        (2, 130, 2, 8, 72),
    ]
    for n, c, h, w, k in cases:
        yield {"x": (n, c, h, w), "weight": (k, c, 1, 1), "residual": "nhwc"}
    yield {"x": (2, 8, 5, 5), "weight": (16, 8, 1, 1), "layout": "nchw", "residual": "nchw"}


_NASTY_ACROSS = {
    "pointwise_pair": _nasty_pairs,
    "conv_tail": _nasty_tails,
    "conv_pool": _nasty_stems,
    "pointwise_pool": _nasty_pointwise_pools,
}
