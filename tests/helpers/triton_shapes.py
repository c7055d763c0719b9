"""Descriptions that configs start from, by a problem: written independently of the kernels, which must agree."""

from __future__ import annotations

from resnet_fast.dispatch.problem import Problem
from resnet_fast.kernels.triton.gemm_config import Gemm
from resnet_fast.kernels.triton.pool_config import Head, Stem


def gemm(problem: Problem) -> Gemm:
    """The matrix product that a ``conv_bn_act`` problem is."""
    n, c = problem.x[:2]
    oh, ow = problem.out_hw
    k, _, r, s = problem.weight
    residual = problem.residual is not None
    return Gemm(
        n * oh * ow,
        k,
        c,
        r * s,
        problem.groups,
        problem.dtype.itemsize,
        residual,
        problem.capability,
    )


def stem_of(problem: Problem) -> Stem:
    """The stem that a ``conv_pool`` problem is."""
    k, _, r, s = problem.weight
    return Stem(*problem.x, k, r, s, problem.dtype.itemsize, problem.bytes, problem.capability)


def head_of(problem: Problem) -> Head:
    """The head that a ``pointwise_pool`` problem is."""
    n, c, h, w = problem.x
    return Head(n, h * w, problem.weight[0], c, problem.dtype.itemsize, problem.capability)
