"""What tests ask of machine code compiled ahead of time: a kernel by its name, one problem, its launches."""

from __future__ import annotations

from resnet_fast.ahead import compile_call
from resnet_fast.dispatch import find
from resnet_fast.machine_code import Launch as Cubin
from resnet_fast.problem import Problem

__all__ = ["Cubin", "cubins"]


def cubins(kernel: str, problem: Problem) -> tuple[Cubin, ...]:
    """The machine code of every launch that ``kernel`` makes for ``problem`` on a GPU of the problem's capability."""
    return compile_call(find(kernel), problem).launches
