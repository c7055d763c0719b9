"""Ahead-of-time compilation: a Triton kernel's launches compiled for a GPU that is not here, and the machine code read.

The kernel's own host function runs on meta tensors with a driver that only names a target, and every launch stops after
compilation: what is read is exactly what that GPU would be given, with its config and specialisation.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from ..dispatch.problem import Problem
from ..dispatch.registry import Kernel
from ..kernels.triton import launch
from ..testing.samples import meta_args
from .launches import Launch, read


@dataclass(frozen=True)
class Call:
    """One call of a kernel: its Triton launches, torch's own ops around them, and the bytes that these ops move."""

    launches: tuple[Launch, ...]
    torch_ops: Counter
    torch_bytes: int


def compile_call(kernel: Kernel, problem: Problem) -> Call:
    """What ``kernel`` would do for ``problem`` on a GPU of the problem's capability.

    Raises RuntimeError under TRITON_INTERPRET=1, where nothing is compiled, and whatever the kernel or the compiler
    raises.
    """
    if launch.INTERPRETED:
        raise RuntimeError(
            "TRITON_INTERPRET=1 was set when triton was imported: nothing is compiled in this process"
        )
    args = meta_args(problem)
    with _compile_only(problem.capability) as launched, TorchOps() as around:
        kernel.fn(*args)
    return Call(tuple(_read(*one) for one in launched), around.ops, around.bytes)


class _Target:
    """As much of a Triton driver as compiling needs."""

    def __init__(self, capability: tuple[int, int]) -> None:
        self.arch = 10 * capability[0] + capability[1]

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # compiled kernels are cached by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def _compile_only(capability: tuple[int, int]) -> Iterator[list]:
    """Inside, launches compile for ``capability`` and are collected, with the blocks of their grids, instead of run."""
    launched: list[tuple] = []
    run = JITFunction.run
    active = driver._active
    capability_of = launch.capability

    def compile_only(self, *args, grid, warmup, **options):
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        if callable(grid):
            positional = dict(zip(self.arg_names, args, strict=False))
            grid = grid({**positional, **options})
        launched.append((self.fn.__name__, compiled, prod(grid)))

    JITFunction.run = compile_only
    launch.capability = lambda x: capability
    driver.set_active(_Target(capability))
    try:
        yield launched
    finally:
        JITFunction.run = run
        launch.capability = capability_of
        driver._active = active


class TorchOps(TorchDispatchMode):
    """Counts torch's ops that touch memory and the bytes of their tensors.

    Views move nothing, nor do allocation and questions of dtypes.
    """

    FREE = (
        "aten.empty",
        "aten.new_empty",
        "aten.empty_strided",
        "aten.empty_like",
        "aten.new_empty_strided",
    )

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter = Counter()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = str(func)  # aten.add.Tensor
        without_overload, _, _ = name.rpartition(".")
        if func.is_view or without_overload in self.FREE:
            return out
        results = out if isinstance(out, tuple) else (out,)
        tensors = [value for value in (*args, *results) if isinstance(value, Tensor)]
        if tensors:
            self.ops[name.split(".")[1]] += 1
            self.bytes += sum(t.nbytes for t in tensors)
        return out


def _read(name: str, compiled, blocks: int) -> Launch:
    """The launch of a compiled Triton kernel, from its machine code and metadata."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        (code,) = read(Path(file.name))
    return replace(
        code,
        name=name,
        shared=compiled.metadata.shared,
        threads=32 * compiled.metadata.num_warps,
        blocks=blocks,
        narrow=_narrow(compiled.asm["ttir"]),
    )


# In Triton's IR: a pointer splatted to a block, one chosen from two by a scalar, a 32-bit offset added to a pointer.
_SPLAT = re.compile(r"(%[\w.]+) = tt\.splat (%[\w.]+) : !tt\.ptr")
_SELECT = re.compile(r"(%[\w.]+) = arith\.select %[\w.]+, (%[\w.]+), (%[\w.]+) : !tt\.ptr")
_NARROW_OFFSET = re.compile(r"tt\.addptr (%[\w.]+), \S+ : .*, (?:tensor<[\dx]+xi32>|i32\b)")


def _narrow(ttir: str) -> frozenset[str]:
    """The pointer arguments to which, as they are, splatted or chosen by a scalar, a 32-bit offset is added first."""
    sources = {name: (pointer,) for name, pointer in _SPLAT.findall(ttir)}
    sources |= {name: (first, second) for name, first, second in _SELECT.findall(ttir)}

    def arguments(pointer: str) -> set[str]:
        if pointer not in sources:
            return {pointer.lstrip("%")}
        return set().union(*map(arguments, sources[pointer]))

    offset_pointers = _NARROW_OFFSET.findall(ttir)
    return frozenset().union(*map(arguments, offset_pointers))
