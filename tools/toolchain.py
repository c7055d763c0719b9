"""What can be built here: torch, nvcc and a C++ compiler, found and tried out; and for which architectures.

Used by setup.py. torch is neither imported nor required: its headers and libraries are found by path, under build
isolation too.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TORCH_OLDEST = (2, 11)

# Each instruction set has its file in csrc/cpu; library.cpp asks the processor. Flags and not pragmas: clang ignores
# `#pragma GCC target`.
HOST = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
INSTRUCTIONS = {
    "avx512_bf16.cpp": [*AVX512, "-mavx512bf16"],
    "avx512.cpp": AVX512,
    "avx2.cpp": ["-mavx2", "-mfma"],
}

# One cubin runs on later chips of its own generation (8.0 on 8.7, 10.0 on 10.3, 12.0 on 12.1), so one per generation
# would do, but for what the variants bring. Older than 8.0 has neither bf16 nor asynchronous copies.
ARCHS = {
    "8.0": "A100; its PTX also serves every chip not listed",
    "8.6": "A10, RTX 30: twice the fp32 units of 8.0, less shared memory",
    "8.9": "L4, L40S, RTX 40",
    "9.0a": "H100, H200; the a unlocks wgmma, at the price of running on 9.0 only",
    "10.0": "B200, B300",
    "12.0": "RTX 50, RTX PRO",
}
OLDEST, OLDEST_NAME = (8, 0), "8.0"
GIGABYTES_A_JOB = 1.0  # the largest of these files took 0.36 GB; tensor-core templates take more


class BuildError(SystemExit):
    """Stops the build with one message and no traceback."""


@dataclass(frozen=True)
class Torch:
    """An installed torch, seen from outside; ``cuda`` is None for a CPU build."""

    root: Path
    version: str
    cuda: str | None

    @property
    def release(self) -> tuple[int, int]:
        major, minor = re.match(r"(\d+)\.(\d+)", self.version).groups()
        return int(major), int(minor)


@dataclass(frozen=True)
class Compiler:
    """A compiler; ``fault`` is its error on a small probe, if any, and ``archs`` nvcc's architectures, as "8.0"."""

    command: tuple[str, ...]
    version: str
    fault: str | None
    archs: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Plan:
    """The tools found, and for each extension why it is not built, or None.

    ``archs`` are the architectures of ``_C``; ``left_out`` has a sentence for each that the user named in vain.
    """

    torch: Torch | None
    nvcc: Compiler | None
    cxx: Compiler | None
    no_cuda: str | None
    no_cpu: str | None
    archs: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def extensions(self) -> list[str]:
        """The extensions to build."""
        reasons = {"_C": self.no_cuda, "_cpu": self.no_cpu}
        return [name for name, reason in reasons.items() if reason is None]


# ---------------------------------------------------------------- the tools


def find_torch() -> Torch | None:
    """Return the torch to build against: the importable one, or under build isolation the environment's."""
    spec = importlib.util.find_spec("torch")
    importable = list(spec.submodule_search_locations or ()) if spec else []
    installed = [str(Path(sysconfig.get_path(kind)) / "torch") for kind in ("purelib", "platlib")]
    for root in map(Path, [*importable, *installed]):
        if (root / "version.py").is_file():
            facts = runpy.run_path(str(root / "version.py"))
            return Torch(root, str(facts["__version__"]), facts.get("cuda") or None)
    return None


CUDA_PROBE = """#include <Python.h>
__global__ void probe() {}
void run() { probe<<<1, 1>>>(); }
"""


def find_nvcc() -> Compiler | None:
    """Return the nvcc of CUDA_HOME, of PATH, or of the usual place, tried out on a trivial extension."""
    places = [
        os.path.join(os.environ.get("CUDA_HOME", ""), "bin"),
        os.environ.get("PATH", ""),
        "/usr/local/cuda/bin",
    ]
    path = shutil.which("nvcc", path=os.pathsep.join(places))
    if path is None:
        return None
    listed = subprocess.run([path, "--list-gpu-arch"], capture_output=True, text=True).stdout
    numbers = re.findall(r"compute_(\d+)\b", listed)
    archs = frozenset(f"{number[:-1]}.{number[-1]}" for number in numbers)
    banner = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release ([\d.]+)", banner)
    command = [
        path,
        "-shared",
        "-Xcompiler",
        "-fPIC",
        "-arch=sm_80",
        f"-I{sysconfig.get_path('include')}",
    ]
    fault = try_out(command, ".cu", CUDA_PROBE)
    return Compiler((path,), release[1] if release else "unknown", fault, archs)


# The language features of csrc/cpu: GCC 9 and clang know them.
CPU_PROBE = """#include <optional>
using Words __attribute__((vector_size(64))) = unsigned;
using Halves __attribute__((vector_size(32))) = unsigned short;
void widen(const Halves* h, Words* w) { *w = __builtin_convertvector(*h, Words) << 16; }
std::optional<bool> probe() { return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("fma"); }
"""


def find_cxx() -> Compiler | None:
    """Return the C++ compiler of CXX; else the first of PATH that can compile csrc/cpu, or the last that cannot."""
    named = shlex.split(os.environ.get("CXX", ""))
    found = None
    for command in [named] if named else [["c++"], ["g++"], ["clang++"]]:
        if not shutil.which(command[0]):
            continue
        banner = subprocess.run(
            [*command, "--version"], capture_output=True, text=True
        ).stdout.splitlines()
        fault = try_out(
            [*command, *HOST, *INSTRUCTIONS["avx512_bf16.cpp"], "-shared"], ".cpp", CPU_PROBE
        )
        found = Compiler(tuple(command), banner[0] if banner else "unknown", fault)
        if fault is None:
            break
    return found


def try_out(command: list[str], suffix: str, text: str) -> str | None:
    """Build a probe; returns the error of a compiler that is missing, too old or too new, or lacks headers."""
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, f"probe{suffix}")
        source.write_text(text)
        tried = subprocess.run(
            [*command, str(source), "-o", f"{source}.so"], capture_output=True, text=True
        )
    if tried.returncode == 0:
        return None
    return complaint(tried.stderr or tried.stdout) or f"exit status {tried.returncode}"


def complaint(output: str) -> str:
    """Return the first line of a compiler's output that names an error, else the last line."""
    lines = output.strip().splitlines()
    errors = [line for line in lines if "error" in line]
    return next(iter(errors or lines[-1:]), "")


# ---------------------------------------------------------------- what to build


def decide(
    mode: str,
    system: str,
    machine: str,
    torch: Torch | None,
    nvcc: Compiler | None,
    cxx: Compiler | None,
    arch_list: str | None = None,
) -> Plan:
    """Decide what to build with the tools found; raises BuildError for an unknown mode, and if ``cuda`` lacks one."""
    if mode not in ("auto", "cuda", "none"):
        raise BuildError(f"RESNET_FAST_BUILD: got {mode!r}, expected auto, cuda or none")
    neither = why_neither(mode, system, torch)
    no_cuda = neither or why_no_cuda(torch, nvcc)
    no_cpu = neither or why_no_cpu(machine, cxx)
    archs: list[str] = []
    left_out: list[str] = []
    if no_cuda is None:
        archs, left_out = choose_archs(arch_list, nvcc.archs)
    if no_cuda is None and not archs:
        no_cuda = f"TORCH_CUDA_ARCH_LIST={arch_list} names nothing from {OLDEST_NAME} on"
    if mode == "cuda" and (no_cuda or left_out):
        raise BuildError(f"RESNET_FAST_BUILD=cuda: {no_cuda or left_out[0]}")
    return Plan(torch, nvcc, cxx, no_cuda, no_cpu, tuple(archs), tuple(left_out))


def why_neither(mode: str, system: str, torch: Torch | None) -> str | None:
    """Return why no extension can be built, or None."""
    if mode == "none":
        return "RESNET_FAST_BUILD=none"
    if system != "Linux":
        return f"extensions are built on Linux only, this is {system}"
    if torch is None:
        return "torch is not installed in this environment: install it first (pip install torch)"
    if torch.release < TORCH_OLDEST:
        oldest = ".".join(map(str, TORCH_OLDEST))
        return f"torch {torch.version} is older than {oldest}: install a newer one"
    return None


def why_no_cuda(torch: Torch, nvcc: Compiler | None) -> str | None:
    """Return why the CUDA kernels cannot be built with this torch, or None."""
    if torch.cuda is None:
        return f"torch {torch.version} is not a CUDA build: install one that is"
    if nvcc is None:
        return "nvcc was not found: install the CUDA toolkit, or set CUDA_HOME"
    if nvcc.fault:
        return f"{nvcc.command[0]} cannot build a Python extension: {nvcc.fault}"
    return None


def why_no_cpu(machine: str, cxx: Compiler | None) -> str | None:
    """Return why the CPU kernels cannot be built, or None."""
    if machine != "x86_64":
        return f"the CPU kernels are for x86-64, this is {machine}"
    if cxx is None:
        return "no C++ compiler was found: install g++ or clang++, or set CXX"
    if cxx.fault:
        return f"{shlex.join(cxx.command)} cannot build the CPU kernels, g++ from 9 on can: {cxx.fault}"
    return None


def choose_archs(wanted: str | None, known: frozenset[str]) -> tuple[list[str], list[str]]:
    """Return architectures, such as ["8.0+PTX", "9.0a"], and a sentence for each of the user's that is left out.

    ``wanted`` is TORCH_CUDA_ARCH_LIST; without it, the default list as far as this nvcc knows it. For a chip newer than
    this nvcc, the PTX of the newest older one that it knows stands in: the driver compiles it.
    """
    if not wanted:
        archs = [arch for arch in ARCHS if arch.rstrip("a") in known]
        return [f"{archs[0]}+PTX", *archs[1:]], []
    archs = []
    left_out = []
    for arch in wanted.replace(";", " ").replace(",", " ").split():
        number = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
        chip = (int(number[1]), int(number[2])) if number else None
        if chip is None:
            left_out.append(f"{arch} is left out: expected numbers such as 8.0 9.0a 12.0+PTX")
        elif chip < OLDEST:
            left_out.append(f"{arch} is left out: the kernels need {OLDEST_NAME} or newer")
        elif f"{chip[0]}.{chip[1]}" in known:
            archs.append(arch)
        else:
            older = newest_before(chip, known)
            archs.append(f"{older}+PTX")
            left_out.append(f"{arch} is unknown to this nvcc: PTX of {older} stands in")
    with_ptx = {arch for arch in archs if arch.endswith("+PTX")}
    archs = [arch for arch in dict.fromkeys(archs) if f"{arch}+PTX" not in with_ptx]
    return archs, left_out


def newest_before(chip: tuple[int, int], known: frozenset[str]) -> str:
    """Return the newest architecture that nvcc knows and that the kernels run on, older than a chip."""
    numbers = [tuple(map(int, arch.split("."))) for arch in known]
    major, minor = max(number for number in numbers if OLDEST <= number < chip)
    return f"{major}.{minor}"


def gencode(archs: Sequence[str]) -> list[str]:
    """Return nvcc's flags for a list of architectures."""
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        code = f"[sm_{number},compute_{number}]" if arch.endswith("+PTX") else f"sm_{number}"
        flags += ["-gencode", f"arch=compute_{number},code={code}"]
    return flags


def choose_jobs(cores: int, free_gigabytes: float, limit: str | None) -> int:
    """Return how many compilers run at once: MAX_JOBS, or as many as cores and free memory allow; at least one."""
    if limit:
        return max(1, int(limit))
    return max(1, min(cores, int(free_gigabytes / GIGABYTES_A_JOB)))


def free_gigabytes() -> float:
    """Return the memory this process may still take: the machine's, or less under a container's limit."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        free = int(re.search(r"MemAvailable:\s+(\d+)", meminfo.read_text())[1]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free / 2**30


@functools.cache
def plan() -> Plan:
    """Return the decision for this machine, taken once."""
    mode, system = os.environ.get("RESNET_FAST_BUILD", "auto"), platform.system()
    looked_for = mode in ("auto", "cuda") and system == "Linux"
    tools = (find_torch(), find_nvcc(), find_cxx()) if looked_for else (None, None, None)
    arch_list = os.environ.get("TORCH_CUDA_ARCH_LIST")
    return decide(mode, system, platform.machine(), *tools, arch_list)
