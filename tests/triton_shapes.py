"""What the Triton kernels must see in a problem, said a second time: the tests of their predictions start here, those of the kernels end here."""

from __future__ import annotations

from resnet_fast.kernels.triton.gemm_config import Gemm
from resnet_fast.kernels.triton.pool_config import Head, Stem
from resnet_fast.problem import Problem


def gemm(problem: Problem) -> Gemm:
    """The matrix product that a ``conv_bn_act`` problem is."""
    oh, ow = problem.out_hw
    k, _, r, s = problem.weight
    return Gemm(
        problem.x[0] * oh * ow,
        k,
        problem.x[1],
        r * s,
        problem.groups,
        problem.dtype.itemsize,
        problem.residual is not None,
        problem.capability,
    )


def stem_of(problem: Problem) -> Stem:
    """The stem that a ``conv_pool`` problem is."""
    return Stem(
        *problem.x, *(problem.weight[i] for i in (0, 2, 3)), problem.dtype.itemsize, problem.bytes, problem.capability
    )


def head_of(problem: Problem) -> Head:
    """The head that a ``pointwise_pool`` problem is."""
    n, c, h, w = problem.x
    return Head(n, h * w, problem.weight[0], c, problem.dtype.itemsize, problem.capability)
