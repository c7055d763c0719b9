"""Portable Triton kernels (pointer-based, sm_80 and later); importing this package imports triton and registers them
all.

``launch``: what every launch shares. ``heuristics``: problem → config, a pure function. ``epilogue`` and ``split_k``:
device code that several kernels end in. ``interpreter``: Triton's interpreter, mended. The rest is one idea a file.
Each kernel was checked in the interpreter and compiled ahead of time for sm_80 to sm_120; no GPU has run one yet.
"""

from . import add_act, bn_act, bn_act_backward, conv, pointwise

__all__ = ["add_act", "bn_act", "bn_act_backward", "conv", "pointwise"]
