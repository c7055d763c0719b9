"""A Triton kernel's real launches compiled for a GPU that is not here, and the machine code read.

The kernel's own host function runs on meta tensors with a driver that only names a target, and every launch stops after compilation:
what is read is exactly what that GPU would be given, config, specialisation and all.
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

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from ..dispatch.problem import ACROSS, Problem
from ..dispatch.registry import Kernel
from ..kernels.triton import launch
from ..testing.samples import across_args
from .launches import Launch, read


@dataclass(frozen=True)
class Call:
    """One call of a kernel: its Triton launches, and torch's own ops around them with the bytes that these read and write."""

    launches: tuple[Launch, ...]
    torch_ops: Counter
    torch_bytes: int


def compile_call(kernel: Kernel, problem: Problem) -> Call:
    """What ``kernel`` would do for ``problem`` on a GPU of the problem's capability.

    Raises RuntimeError under TRITON_INTERPRET=1, where nothing is compiled, and whatever the kernel or the compiler raises.
    """
    if launch.INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET=1 was set when triton was imported: nothing is compiled in this process")
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
    launched, run, active, here = [], JITFunction.run, driver._active, launch.capability

    def compile_only(self, *args, grid, warmup, **options):
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        bound = {**dict(zip(self.arg_names, args, strict=False)), **options}
        launched.append((self.fn.__name__, compiled, prod(grid(bound) if callable(grid) else grid)))

    JITFunction.run, launch.capability = compile_only, lambda x: capability
    driver.set_active(_Target(capability))
    try:
        yield launched
    finally:
        JITFunction.run, launch.capability = run, here
        driver._active = active


class TorchOps(TorchDispatchMode):
    """Counts torch's ops that touch memory and the bytes of their tensors: views move nothing, nor do allocation and questions of dtypes."""

    FREE = ("aten.empty", "aten.new_empty", "aten.empty_strided", "aten.empty_like", "aten.new_empty_strided")

    def __init__(self) -> None:
        super().__init__()
        self.ops, self.bytes = Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in (*args, *(out if isinstance(out, tuple) else (out,))) if isinstance(t, Tensor)]
        if tensors and not func.is_view and str(func).rpartition(".")[0] not in self.FREE:
            self.ops[str(func).split(".")[1]] += 1
            self.bytes += sum(t.nbytes for t in tensors)
        return out


def meta_args(problem: Problem) -> tuple:
    """Flat arguments without data."""

    def nhwc(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=problem.dtype, device="meta", memory_format=torch.channels_last)

    def vector(n: int) -> Tensor:
        return torch.empty(n, device="meta")

    if problem.op in ACROSS:
        return across_args(problem, lambda *shape, **_: nhwc(*shape), lambda k: [vector(k)] * 4)
    x = nhwc(*problem.x)
    if problem.op == "conv_bn_act":
        k = problem.weight[0]
        residual = nhwc(problem.x[0], k, *problem.out_hw) if problem.residual else None
        vectors = [vector(k) for _ in range(4)]
        return (
            x,
            nhwc(*problem.weight),
            *vectors[:2],
            residual,
            *vectors[2:],
            1e-5,
            problem.stride,
            problem.padding,
            problem.dilation,
            problem.groups,
            problem.act,
        )
    v, second = vector(problem.x[1]), nhwc(*problem.x)
    gate = nhwc(*problem.x[:2], 1, 1) if problem.gate else None
    return {
        "bn_act": (x, v, v, second if problem.residual else None, 1e-5, problem.act),
        "bn_act_backward": (second, x, second, v, v, v, 1e-5, problem.act, problem.residual is not None),
        "add_act": (x, second, gate, problem.act),
        "add_act_backward": (x, second, x if problem.gate else None, gate, problem.act),
    }[problem.op]


def _read(name: str, compiled, blocks: int) -> Launch:
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


def _narrow(ttir: str) -> frozenset[str]:
    """The pointer arguments to which, as they are, splatted or chosen by a scalar, a 32-bit offset is added first."""
    made = {name: (pointer,) for name, pointer in re.findall(r"(%[\w.]+) = tt\.splat (%[\w.]+) : !tt\.ptr", ttir)}
    made |= {
        name: of
        for name, *of in re.findall(r"(%[\w.]+) = arith\.select %[\w.]+, (%[\w.]+), (%[\w.]+) : !tt\.ptr", ttir)
    }

    def origins(pointer: str) -> set[str]:
        return {one for of in made[pointer] for one in origins(of)} if pointer in made else {pointer.lstrip("%")}

    found = re.findall(r"tt\.addptr (%[\w.]+), \S+ : .*, (?:tensor<[\dx]+xi32>|i32\b)", ttir)
    return frozenset(one for pointer in found for one in origins(pointer))
