"""Triton kernels, portable ones by pointers (sm_80 and later) and ``*_tma`` by tensor descriptors (sm_90 and later);
importing this package imports triton and registers them all.

``launch``: what every launch shares. ``gemm_config``: problem → config, a pure function. ``dependent_launch``: how the
convolutions begin; ``epilogue`` and ``split_k``: device code that several kernels end in. ``tma`` and ``tma_config``: the
same for descriptors. ``tail_config``: configs of ``conv_tail``; ``pool_config``: of the kernels that end in a pooling.
``interpreter_fixes``: Triton's interpreter, mended. The rest is one idea a file.
Each kernel was checked in the interpreter and compiled ahead of time for sm_80 to sm_120; no GPU has run one yet.
"""

from . import (
    add_act,
    bn_act,
    bn_act_backward,
    conv,
    conv_pool,
    conv_tail,
    conv_tma,
    pointwise,
    pointwise_pair,
    pointwise_pair_tma,
    pointwise_pool,
    pointwise_tma,
)

__all__ = [
    "add_act",
    "bn_act",
    "bn_act_backward",
    "conv",
    "conv_pool",
    "conv_tail",
    "conv_tma",
    "pointwise",
    "pointwise_pair",
    "pointwise_pair_tma",
    "pointwise_pool",
    "pointwise_tma",
]
