"""FLOPs and bytes of one problem: one row for each op."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from ..dispatch.problem import Problem

CLASSES = 1000


@dataclass(frozen=True)
class Cost:
    """Cost of one kernel: bytes of each operand that it reads and writes for the whole batch, and its matrix FLOPs."""

    name: str
    reads: dict[str, int]
    writes: dict[str, int]
    flops: int = 0

    @property
    def bytes(self) -> int:
        return sum(self.reads.values()) + sum(self.writes.values())


def problem_step(problem: Problem) -> Cost:
    """The cost of one call of an op: each operand is moved once, batch norm's twice."""
    return _COSTS[problem.op](problem)


def flops(problem: Problem) -> int:
    """Two FLOPs for each multiply-add of the convolutions; the pointwise ops count none."""
    return problem_step(problem).flops


def conv_flops(problem: Problem) -> int:
    """Two FLOPs for each multiply-add of the convolution; 0 for the pointwise ops."""
    return (
        0
        if problem.weight is None
        else 2 * problem.x[0] * prod(problem.weight) * prod(problem.out_hw)
    )


def touched(problem: Problem) -> int:
    """Elements of x that the convolution reads: all, or for a strided 1×1 those it uses."""
    n, c, *hw = problem.x
    return n * c * prod(problem.out_hw if problem.pointwise else hw)


# ---------------------------------------------------------------- one convolution, batch norm, residual add


def _conv_bn_act(problem: Problem) -> Cost:
    """Of x, only what a strided 1×1 filter uses is read."""
    width = problem.dtype.itemsize
    y = problem.x[0] * problem.weight[0] * prod(problem.out_hw) * width
    reads = {"x": touched(problem) * width, "w": prod(problem.weight) * width}
    if problem.residual is not None:
        reads["residual"] = y
    return Cost(
        problem.key,
        reads,
        {"y": y},
        conv_flops(problem),
    )


def _bn_act(problem: Problem) -> Cost:
    """x is read twice, since statistics precede their use."""
    x = _image_bytes(problem)
    reads = {"x for statistics": x, "x": x}
    if problem.residual is not None:
        reads["residual"] = x
    return Cost(
        problem.key,
        reads,
        {"y": x},
    )


def _bn_act_backward(problem: Problem) -> Cost:
    """All is read twice, since the sums precede their use. Without a residual the ReLU's mask comes from x."""
    x = _image_bytes(problem)
    reads = {"dy": x, "x": x}
    writes = {"dx": x}
    if problem.residual is not None:
        writes["dresidual"] = x
        if problem.act == "relu":
            reads["y"] = x
    for_sums = {f"{name} for sums": size for name, size in reads.items()}
    return Cost(
        problem.key,
        {**reads, **for_sums},
        writes,
    )


def _add_act(problem: Problem) -> Cost:
    """The gate is as small as a bias and does not count."""
    x = _image_bytes(problem)
    return Cost(
        problem.key,
        {"x": x, "y": x},
        {"out": x},
    )


def _add_act_backward(problem: Problem) -> Cost:
    """The ReLU's mask comes from the output; x is read for the gate's gradient."""
    x = _image_bytes(problem)
    reads = {"dout": x}
    writes = {"dy": x}
    if problem.act == "relu":
        reads["out"] = x
    if problem.gate:
        reads["x"] = x
        writes["dx"] = x
    return Cost(
        problem.key,
        reads,
        writes,
    )


def _image_bytes(problem: Problem) -> int:
    """Bytes of a tensor as large as x."""
    return prod(problem.x) * problem.dtype.itemsize


# ---------------------------------------------------------------- across convolutions: nothing between them is moved


def _pointwise_pair(problem: Problem) -> Cost:
    """Of the second input only the pixels that its stride leaves are read."""
    (second,) = problem.chain
    width = problem.dtype.itemsize
    pixels = _pixels(problem)
    reads = _across_reads(problem) | {"x2": pixels * second[1] * width}
    writes = {"y": pixels * problem.weight[0] * width}
    return Cost(
        problem.key,
        reads,
        writes,
        _across_flops(problem),
    )


def _conv_tail(problem: Problem) -> Cost:
    """The result between the first two convolutions stays in the kernel, y is written and not read again."""
    third, projection, following = problem.chain
    width = problem.dtype.itemsize
    pixels = _pixels(problem)
    shortcut_channels = projection[1] if projection else third[0]
    reads = _across_reads(problem) | {"shortcut": pixels * shortcut_channels * width}
    writes = {"y": pixels * third[0] * width, "next": pixels * following[0] * width}
    return Cost(
        problem.key,
        reads,
        writes,
        _across_flops(problem),
    )


def _conv_pool(problem: Problem) -> Cost:
    """Only the pooled result is written."""
    pooled_hw = [(size + 1) // 2 for size in problem.out_hw]
    pooled = problem.x[0] * problem.weight[0] * prod(pooled_hw) * problem.dtype.itemsize
    return Cost(
        problem.key,
        _across_reads(problem),
        {"out": pooled},
        _across_flops(problem),
    )


def _pointwise_pool(problem: Problem) -> Cost:
    """Only the mean over height and width is written."""
    width = problem.dtype.itemsize
    k = problem.weight[0]
    reads = _across_reads(problem) | {"residual": _pixels(problem) * k * width}
    return Cost(
        problem.key,
        reads,
        {"pooled": problem.x[0] * k * width},
        _across_flops(problem),
    )


def _pixels(problem: Problem) -> int:
    """Pixels of the result over the whole batch."""
    return problem.x[0] * prod(problem.out_hw)


def _weights(problem: Problem) -> int:
    """Elements of all filters."""
    return prod(problem.weight) + sum(prod(shape) for shape in problem.chain if shape)


def _across_flops(problem: Problem) -> int:
    """Every filter meets every pixel of the result."""
    return 2 * _pixels(problem) * _weights(problem)


def _across_reads(problem: Problem) -> dict[str, int]:
    """Bytes of the first input and of all filters."""
    width = problem.dtype.itemsize
    x_width = 1 if problem.bytes else width
    return {"x": prod(problem.x) * x_width, "w": _weights(problem) * width}


_COSTS: dict[str, Callable[[Problem], Cost]] = {
    "conv_bn_act": _conv_bn_act,
    "bn_act": _bn_act,
    "bn_act_backward": _bn_act_backward,
    "add_act": _add_act,
    "add_act_backward": _add_act_backward,
    "pointwise_pair": _pointwise_pair,
    "conv_tail": _conv_tail,
    "conv_pool": _conv_pool,
    "pointwise_pool": _pointwise_pool,
}
