"""What tests ask of machine code compiled ahead of time: a kernel by its name, one problem, its launches."""

from __future__ import annotations

import warnings

import pytest
import triton

from resnet_fast.analysis.aot import compile_call
from resnet_fast.analysis.launches import Launch as Cubin
from resnet_fast.dispatch.problem import Problem
from resnet_fast.dispatch.registry import find
from resnet_fast.kernels.triton.launch import INTERPRETED

__all__ = ["TENSOR", "Cubin", "ahead", "assert_nothing_spilled", "cubins"]

# What each generation's matrix instruction is called in SASS: mma.sync, wgmma, tcgen05.
TENSOR = {(8, 0): "HMMA", (8, 9): "HMMA", (9, 0): "HGMMA", (10, 0): "UTCHMMA", (12, 0): "HMMA"}
ahead = pytest.mark.skipif(
    INTERPRETED or not triton.knobs.nvidia.cuobjdump,
    reason="nothing is compiled under TRITON_INTERPRET=1"
    if INTERPRETED
    else "this Triton wheel brings no cuobjdump",
)


def cubins(kernel: str, problem: Problem) -> tuple[Cubin, ...]:
    """The machine code of every launch that ``kernel`` makes for ``problem`` on a GPU of the problem's capability."""
    return compile_call(find(kernel), problem).launches


# Register allocation is a fact of the compiler's version. Under these, no case of the tests spills a byte.
VERSIONS_WITHOUT_SPILLS = ("3.6", "3.9")


def assert_nothing_spilled(cubin: Cubin, kept: int = 0) -> None:
    """No more than ``kept`` bytes on the stack and, without any, no local loads and stores.

    Under a version of Triton that was not seen before, spilled bytes are a warning in pytest's summary.
    """
    spilled = cubin.stack > kept or (not kept and cubin.count("STL|LDL"))
    if not spilled:
        return
    message = f"{cubin.name} spills {cubin.stack} bytes under Triton {triton.__version__}"
    assert not triton.__version__.startswith(VERSIONS_WITHOUT_SPILLS), message
    warnings.warn(
        f"{message}; the tiles were chosen with {' and '.join(VERSIONS_WITHOUT_SPILLS)}",
        stacklevel=2,
    )
