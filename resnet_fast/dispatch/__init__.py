"""Which kernel runs: the description of a call, the registry, the choice, the measured tables."""

from .problem import ACROSS, Problem, conv_out_hw, describe, layout, nhwc_or_why
from .registry import Kernel, NotUsed, Prepacked, find, kernel, kernels, load_file, named
from .select import choose, record, rejected, undisturbed, use

__all__ = [
    "ACROSS",
    "Kernel",
    "NotUsed",
    "Prepacked",
    "Problem",
    "choose",
    "conv_out_hw",
    "describe",
    "find",
    "kernel",
    "kernels",
    "layout",
    "load_file",
    "named",
    "nhwc_or_why",
    "record",
    "rejected",
    "undisturbed",
    "use",
]
