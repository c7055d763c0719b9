"""Compile a Triton kernel's real launches for a GPU that is not here, and read the machine code.

The kernel's own host function runs on meta tensors with a driver that only names a target, and every launch stops
after compilation: what is inspected is exactly what that GPU would be given, config, specialisation and all.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from resnet_fast.dispatch import find
from resnet_fast.kernels.triton import launch
from resnet_fast.problem import Problem


@dataclass(frozen=True)
class Cubin:
    """One launch's machine code: SASS instructions by full name, registers a thread, bytes spilled, dynamic shared
    memory, and the kernel's pointers to which a 32-bit offset is added.
    """

    name: str
    instructions: Counter
    registers: int
    stack: int
    shared: int
    narrow: frozenset[str]

    def count(self, pattern: str) -> int:
        """How many instructions match a regular expression from their start."""
        return sum(n for name, n in self.instructions.items() if re.match(pattern, name))


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
    """Inside, launches compile for ``capability`` and are collected instead of run."""
    launched, run, active = [], JITFunction.run, driver._active

    def compile_only(self, *args, grid, warmup, **options):
        launched.append((self.fn.__name__, run(self, *args, grid=grid, warmup=True, **options)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", compile_only)
        patch.setattr(launch, "capability", lambda x: capability)
        driver.set_active(_Target(capability))
        try:
            yield launched
        finally:
            driver._active = active


def cubins(kernel: str, problem: Problem) -> list[Cubin]:
    """The machine code of every launch that ``kernel`` makes for ``problem`` on a GPU of the problem's capability."""
    with _compile_only(problem.capability) as launched:
        find(kernel).fn(*meta_args(problem))
    return [_read(name, compiled) for name, compiled in launched]


def meta_args(problem: Problem) -> tuple:
    """Flat arguments without data."""
    def nhwc(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=problem.dtype, device="meta", memory_format=torch.channels_last)

    def vector(n: int) -> torch.Tensor:
        return torch.empty(n, device="meta")

    x = nhwc(*problem.x)
    if problem.op == "conv_bn_act":
        k = problem.weight[0]
        residual = nhwc(problem.x[0], k, *problem.out_hw) if problem.residual else None
        vectors = [vector(k) for _ in range(4)]
        return (x, nhwc(*problem.weight), *vectors[:2], residual, *vectors[2:], 1e-5, problem.stride, problem.padding,
                problem.dilation, problem.groups, problem.act)
    v, second = vector(problem.x[1]), nhwc(*problem.x)
    gate = nhwc(*problem.x[:2], 1, 1) if problem.gate else None
    return {
        "bn_act": (x, v, v, second if problem.residual else None, 1e-5, problem.act),
        "bn_act_backward": (second, x, second, v, v, v, 1e-5, problem.act, problem.residual is not None),
        "add_act": (x, second, gate, problem.act),
        "add_act_backward": (x, second, x if problem.gate else None, gate, problem.act),
    }[problem.op]


def _read(name: str, compiled) -> Cubin:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        sass, usage = (_cuobjdump(flag, file.name) for flag in ("-sass", "-res-usage"))
    line = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ +)?([A-Z][\w.]*)"
    instructions = Counter(re.findall(line, sass, re.MULTILINE))
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
    assert instructions, f"no machine code found in what cuobjdump printed for {name}"
    return Cubin(name, instructions, registers, stack, compiled.metadata.shared, _narrow(compiled.asm["ttir"]))


def _narrow(ttir: str) -> frozenset[str]:
    """The pointer arguments to which, as they are or splatted, a 32-bit offset is added first."""
    splats = dict(re.findall(r"(%[\w.]+) = tt\.splat (%[\w.]+) : !tt\.ptr", ttir))
    found = re.findall(r"tt\.addptr (%[\w.]+), \S+ : .*, (?:tensor<[\dx]+xi32>|i32)\b", ttir)
    assert "tt.addptr" in ttir
    return frozenset(splats.get(pointer, pointer).lstrip("%") for pointer in found)


def _cuobjdump(flag: str, path: str) -> str:
    """cuobjdump ships inside the Triton wheel."""
    command = [triton.knobs.nvidia.cuobjdump.path, flag, path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
