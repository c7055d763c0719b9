"""FLOPs and bytes of one problem."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from math import prod

from ..dispatch.problem import ACROSS, Problem

CLASSES = 1000


@dataclass(frozen=True)
class Step:
    """One kernel: operand → bytes that it reads and writes for the whole batch, and its matrix FLOPs."""

    name: str
    reads: dict[str, int]
    writes: dict[str, int]
    flops: int = 0

    @property
    def bytes(self) -> int:
        return sum(self.reads.values()) + sum(self.writes.values())


def conv_flops(problem: Problem) -> int:
    """Two FLOPs for each multiply-add of the convolution; 0 for the pointwise ops."""
    return 0 if problem.weight is None else 2 * problem.x[0] * prod(problem.weight) * prod(problem.out_hw)


def touched(problem: Problem) -> int:
    """Elements of x that the convolution reads: all, or for a strided 1×1 those it uses."""
    n, c, *hw = problem.x
    return n * c * prod(problem.out_hw if problem.pointwise else hw)


def across_step(problem: Problem) -> Step:
    """One call of an op over several convolutions: what is between them is neither read nor written."""
    n, width = problem.x[0], problem.dtype.itemsize
    chain = [shape for shape in problem.chain if shape]
    pixels, k = n * prod(problem.out_hw), problem.weight[0]
    weights = prod(problem.weight) + sum(map(prod, chain))
    reads = {"x": prod(problem.x) * (1 if problem.bytes else width), "w": weights * width}
    step = functools.partial(Step, problem.key, flops=2 * pixels * weights)
    if problem.op == "pointwise_pair":  # of the second input, what its stride leaves
        return step({**reads, "x2": pixels * chain[0][1] * width}, {"y": pixels * k * width})
    if problem.op == "conv_tail":
        third, projection, after = problem.chain
        shortcut = pixels * (projection[1] if projection else third[0]) * width
        return step(
            {**reads, "shortcut": shortcut}, {"y": pixels * third[0] * width, "next": pixels * after[0] * width}
        )
    if problem.op == "conv_pool":
        pooled = n * k * prod((size + 1) // 2 for size in problem.out_hw)
        return step(reads, {"out": pooled * width})
    return step({**reads, "residual": pixels * k * width}, {"pooled": n * k * width})


def flops(problem: Problem) -> int:
    """Two FLOPs for each multiply-add of the convolutions; the pointwise ops count none."""
    return across_step(problem).flops if problem.op in ACROSS else conv_flops(problem)


def problem_step(problem: Problem) -> Step:
    """What one call of an op must move: each operand once, batch norm's twice, since statistics precede their use."""
    width = problem.dtype.itemsize
    x = prod(problem.x) * width
    residual = {} if problem.residual is None else {"residual": x}
    relu = problem.act == "relu"
    if problem.op in ACROSS:
        return across_step(problem)
    if problem.op == "conv_bn_act":
        y = problem.x[0] * problem.weight[0] * prod(problem.out_hw) * width
        reads = {"x": touched(problem) * width, "w": prod(problem.weight) * width}
        return Step(problem.key, {**reads, **({"residual": y} if residual else {})}, {"y": y}, conv_flops(problem))
    if problem.op == "bn_act":
        return Step(problem.key, {"x for statistics": x, "x": x, **residual}, {"y": x})
    if problem.op == "bn_act_backward":  # without a residual the mask comes from x
        once = {"dy": x, "x": x, **({"y": x} if residual and relu else {})}
        twice = {f"{name} for sums": size for name, size in once.items()}
        return Step(problem.key, {**once, **twice}, {"dx": x, **({"dresidual": x} if residual else {})})
    if problem.op == "add_act":
        return Step(problem.key, {"x": x, "y": x}, {"out": x})
    reads = {"dout": x, **({"out": x} if relu else {}), **({"x": x} if problem.gate else {})}
    return Step(problem.key, reads, {"dy": x, **({"dx": x} if problem.gate else {})})
