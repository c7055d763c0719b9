"""A kernel's launches from two sources: machine code, read by cuobjdump without a GPU, and the profiler of a GPU."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch

MATRIX = r"\w*MMA"  # mma.sync is HMMA, wgmma HGMMA, tcgen05 UTCHMMA in SASS


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Registers and stack (spills, or arrays that are indexed dynamically) are a thread's, ``shared`` bytes a block's.
    ``threads`` of a block and ``blocks`` of the grid are None where only the code is known; ``instructions`` (SASS, by
    full name) are empty where only the launch is. ``operands`` are those of wgmma as written, without register numbers;
    ``narrow`` are the pointers to which a 32-bit offset is added, known of Triton only.
    """

    name: str
    registers: int
    stack: int
    shared: int
    threads: int | None = None
    blocks: int | None = None
    instructions: Counter = field(default_factory=Counter, repr=False)
    operands: frozenset[str] = frozenset()
    narrow: frozenset[str] = frozenset()

    def count(self, pattern: str) -> int:
        """How many instructions match a regular expression from their start."""
        start = re.compile(pattern)
        return sum(n for name, n in self.instructions.items() if start.match(name))


def dominant(launches: Iterable[Launch]) -> Launch:
    """The launch that does most: the one with matrix instructions, or else with the most threads."""

    def work(launch: Launch) -> tuple[bool, int]:
        has_matrix_instructions = launch.count(MATRIX) > 0
        threads = (launch.threads or 0) * (launch.blocks or 0)
        return has_matrix_instructions, threads

    return max(launches, key=work)


# ---------------------------------------------------------------- from machine code


def cuobjdump() -> str | None:
    """The program's path: it ships inside Triton's wheel and beside nvcc."""
    if importlib.util.find_spec("triton") is not None:
        import triton

        if triton.knobs.nvidia.cuobjdump:
            return triton.knobs.nvidia.cuobjdump.path
    return shutil.which("cuobjdump")


def read(path: Path) -> list[Launch]:
    """Every kernel in a cubin or shared library.

    Raises LookupError without cuobjdump, ValueError if it finds no kernel.
    """
    tool = cuobjdump()
    if tool is None:
        raise LookupError(
            "machine code: cuobjdump is in Triton's wheel and in the CUDA toolkit, and neither is here"
        )

    def dump(flag: str) -> str:
        command = [tool, flag, str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    usage = re.findall(r"Function (\S+?):?\n\s*(REG:.*)", dump("-res-usage"))
    code = _code(dump("-sass"))
    if not usage or not all(_instructions(code.get(name, "")) for name, _ in usage):
        raise ValueError(f"machine code: cuobjdump found none in {path}")
    return [_launch(name, line, code[name]) for name, line in usage]


def _launch(name: str, usage: str, code: str) -> Launch:
    """One kernel of a binary."""
    registers, stack, shared = (
        int(re.search(rf"\b{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "SHARED")
    )
    return Launch(
        readable(name),
        registers,
        stack,
        shared,
        instructions=_instructions(code),
        operands=_operands(code),
    )


def readable(name: str) -> str:
    """A kernel's name without its mangling, namespaces and parameters, where c++filt is at hand."""
    if shutil.which("c++filt") is None:
        return name
    plain = subprocess.run(
        ["c++filt", name], capture_output=True, text=True, check=True
    ).stdout.strip()
    return re.sub(
        r"^void |\b_GLOBAL__N_\w+::|\(.*", "", plain.replace("(anonymous namespace)::", "")
    )


def _code(sass: str) -> dict[str, str]:
    """Kernel → its part of a disassembly."""
    _, *parts = re.split(r"^\s*Function : ", sass, flags=re.MULTILINE)
    found = {}
    for part in parts:
        name, _, body = part.partition("\n")
        found[name.strip()] = body
    return found


def _instructions(code: str) -> Counter:
    """SASS instructions by full name, without their predicates."""
    return Counter(
        re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ +)?([A-Z][\w.]*)", code, re.MULTILINE)
    )


def _operands(code: str) -> frozenset[str]:
    """Operands of wgmma, without register numbers."""
    listed = re.findall(r"HGMMA\S* +([^;]*?) *;", code)
    return frozenset(re.sub(r"\d+", "", operands) for operands in listed)


# ---------------------------------------------------------------- from the profiler


def profiled(call: Callable[[], object]) -> list[Launch]:
    """The launches of one call after a first, as the profiler recorded them; empty where profiling is forbidden."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return launches_of(json.loads(path.read_text()))


def launches_of(trace: dict) -> list[Launch]:
    """The kernels of a Chrome trace that Kineto wrote, in the order in which they began."""
    events = [event for event in trace["traceEvents"] if event.get("cat") == "kernel"]
    events.sort(key=lambda event: event["ts"])
    return [_profiled_launch(event) for event in events]


def _profiled_launch(event: dict) -> Launch:
    """One kernel event of a trace."""
    facts = event["args"]
    return Launch(
        event["name"],
        registers=int(facts["registers per thread"]),
        stack=0,
        shared=int(facts["shared memory"]),
        threads=prod(facts["block"]),
        blocks=prod(facts["grid"]),
    )
