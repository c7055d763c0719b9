"""Triton kernels, by pointers (sm_80 and later) and ``*_tma`` by tensor descriptors (sm_90 and later).

Importing this package imports triton and registers all of them.

- ``launch``: shared by every launch. ``dependent_launch``: the first statement of every convolution.
- ``epilogue``, ``split_k``: device code that several kernels end in. ``tma``: the same for tensor descriptors.
- ``*_config``: description of a problem → config, as pure functions. ``gemm_config``: products by pointers, chips.
  ``tma_config``: products by descriptors. ``tail_config``: ``conv_tail``. ``pool_config``: kernels that pool.
  ``rows_config``: passes over rows of channels.
- ``interpreter_fixes``: fixes for Triton's interpreter.
- The others hold one kernel each.

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
