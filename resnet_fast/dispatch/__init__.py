"""Which kernel runs: the description of a call, the registry, the choice, the measured tables."""

from .problem import Problem
from .registry import Kernel, NotUsed, find, kernel, kernels, load_file, use

__all__ = ["Kernel", "NotUsed", "Problem", "find", "kernel", "kernels", "load_file", "use"]
