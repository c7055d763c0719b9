"""Build of resnet_fast: pure Python everywhere, and where the toolchain allows ``_C`` and ``_cpu``.

``resnet_fast._C`` holds the CUDA kernels, ``resnet_fast._cpu`` the CPU kernels as a library of torch ops.

RESNET_FAST_BUILD=auto (default)  _C if nvcc works and torch is a CUDA build, _cpu if a C++ compiler works; an extension
                                  that then fails to compile is left out, and the record says so
                  cuda            _C, or an error that says what is missing; _cpu as in auto
                  none            pure Python
TORCH_CUDA_ARCH_LIST              as in PyTorch: "9.0a", "8.0;9.0+PTX" ...
MAX_JOBS, CUDA_HOME, CXX          as in PyTorch; CXX compiles _cpu

The toolchain decides, never a visible GPU nor this processor: images are built elsewhere. torch is neither imported nor
required to build: its headers and libraries are found by path, under build isolation too. nvcc drives compiler and
linker alike, so it brings its own headers and runtime wherever it is installed; the runtime is linked statically, so
that one binary serves every torch.
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import importlib.util
import json
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
OBJECTS = (
    ROOT / "build" / "csrc"
)  # kept between builds, so that only what changed is compiled again
RECORD = "_build.json"  # read by `python -m resnet_fast info`
REBUILD = "RESNET_FAST_BUILD=cuda pip install --force-reinstall --no-deps -v ."

# The stable ABI of torch 2.11, the oldest supported: one binary loads on it and on every later torch.
TORCH_OLDEST = (2, 11)
STABLE = "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"

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
OLDEST = (8, 0)
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
    """The tools found, and for each extension why it is not built, or None."""

    torch: Torch | None
    nvcc: Compiler | None
    cxx: Compiler | None
    no_cuda: str | None
    no_cpu: str | None

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
) -> Plan:
    """Decide what to build with the tools found; raises BuildError for an unknown mode, and if ``cuda`` lacks one."""
    if mode not in ("auto", "cuda", "none"):
        raise BuildError(f"RESNET_FAST_BUILD: got {mode!r}, expected auto, cuda or none")
    neither = why_neither(mode, system, torch)
    no_cuda = neither or why_no_cuda(torch, nvcc)
    no_cpu = neither or why_no_cpu(machine, cxx)
    if mode == "cuda" and no_cuda:
        raise BuildError(f"RESNET_FAST_BUILD=cuda: {no_cuda}")
    return Plan(torch, nvcc, cxx, no_cuda, no_cpu)


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


def choose_archs(wanted: str | None, known: frozenset[str]) -> list[str]:
    """Return architectures, such as ["8.0+PTX", "9.0a"], from TORCH_CUDA_ARCH_LIST or the default list.

    The default keeps those that this nvcc knows. Of a user's list, chips older than 8.0 are left out (containers set
    such lists for all packages at once); anything else that cannot be built raises BuildError.
    """
    if not wanted:
        archs = [arch for arch in ARCHS if arch.rstrip("a") in known]
        return [f"{archs[0]}+PTX", *archs[1:]]
    archs = []
    for arch in wanted.replace(";", " ").replace(",", " ").split():
        number = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
        if number is None:
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST: got {arch!r}, expected numbers such as 8.0 9.0a 12.0+PTX"
            )
        if (int(number[1]), int(number[2])) < OLDEST:
            continue
        if f"{number[1]}.{number[2]}" not in known:
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST: got {arch!r}, this nvcc knows {' '.join(sorted(known))}"
            )
        archs.append(arch)
    if not archs:
        raise BuildError(
            f"TORCH_CUDA_ARCH_LIST: got {wanted!r}, expected at least one architecture from 8.0 on"
        )
    return archs


def gencode(archs: list[str]) -> list[str]:
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


# ---------------------------------------------------------------- building


@functools.cache
def plan() -> Plan:
    """Return the decision for this machine, taken once."""
    mode, system = os.environ.get("RESNET_FAST_BUILD", "auto"), platform.system()
    looked_for = mode in ("auto", "cuda") and system == "Linux"
    tools = (find_torch(), find_nvcc(), find_cxx()) if looked_for else (None, None, None)
    return decide(mode, system, platform.machine(), *tools)


def cuda_commands(
    torch: Torch, nvcc: Compiler, archs: list[str], jobs: int
) -> dict[Path, list[str]]:
    """Return one nvcc command per source file; the two .cpp files see torch's headers, which include pybind11's."""
    kernels = sorted((CSRC / "cuda").glob("*.cu"))
    common = [*nvcc.command, "-c", "-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    threads = str(
        max(1, jobs // len(kernels))
    )  # architectures of one file side by side, where cores are left
    headers = ["-isystem", str(torch.root / "include")]
    commands = dict.fromkeys(
        kernels, [*common, "-lineinfo", "-Xptxas", "-warn-spills", "-t", threads, *gencode(archs)]
    )
    commands[CSRC / "library.cpp"] = [*common, *headers, "-DUSE_CUDA", STABLE]
    commands[CSRC / "bindings.cpp"] = [*common, *headers, f"-I{sysconfig.get_path('include')}"]
    return commands


def cpu_commands(torch: Torch, cxx: Compiler) -> dict[Path, list[str]]:
    """Return one command per source file of csrc/cpu; library.cpp sees torch's headers."""
    common = [*cxx.command, "-c", *HOST]
    headers = ["-isystem", str(torch.root / "include"), STABLE]
    sources = sorted((CSRC / "cpu").glob("*.cpp"))
    return {source: [*common, *INSTRUCTIONS.get(source.name, headers)] for source in sources}


def compile_one(source: Path, command: list[str]) -> Path:
    """Compile a file unless its object is newer than all of its inputs and came from the same command."""
    target = OBJECTS / f"{source.parent.name}-{source.name}.o"
    dependencies, compiled_by = target.with_suffix(".d"), target.with_suffix(".command")
    command = [*command, str(source), "-o", str(target)]
    if is_current(target, dependencies, compiled_by, shlex.join(command)):
        return target
    compiled_by.unlink(missing_ok=True)
    run([*command, "-MD", "-MF", str(dependencies)])
    compiled_by.write_text(shlex.join(command))
    return target


def is_current(target: Path, dependencies: Path, compiled_by: Path, command: str) -> bool:
    """Whether an object was compiled by this command from the files as they are."""
    if not (target.is_file() and dependencies.is_file() and compiled_by.is_file()):
        return False
    if compiled_by.read_text() != command:
        return False
    compiled_at = target.stat().st_mtime
    names = dependencies.read_text().split(":", 1)[1].replace("\\\n", " ").split()
    return all(Path(name).is_file() and Path(name).stat().st_mtime <= compiled_at for name in names)


def run(command: list[str]) -> None:
    """Run a compiler; its output is shown only if it fails or has something to say."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        print(f"{shlex.join(command)}\n{done.stdout}", file=sys.stderr, flush=True)
        reason = complaint(done.stdout) or f"exit status {done.returncode}"
        raise BuildError(f"{command[0]} failed: {reason}")
    if done.stdout.strip():
        print(done.stdout.strip(), flush=True)


def source_hash(without: str) -> str:
    """Return the hash of csrc without the other extension's folder: it identifies the source that was measured."""
    digest = hashlib.sha256()
    for source in sorted(CSRC.rglob("*")):
        if source.is_file() and CSRC / without not in source.parents:
            digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def facts(found: Plan, archs: list[str]) -> dict[str, str]:
    """Return the record of a build. It holds no date and nothing random, so equal builds are equal files."""
    torch = found.torch.version if found.torch else "not seen"
    record = {
        "extension": "not built" if found.no_cuda else "built",
        "why": found.no_cuda
        or f"nvcc {found.nvcc.version} works and torch {torch} is a CUDA build",
        "torch": torch,
        "nvcc": found.nvcc.version if found.nvcc else "not seen",
    }
    if found.no_cuda:
        record["rebuild"] = REBUILD
    else:
        kernels = sorted(source.stem for source in (CSRC / "cuda").glob("*.cu"))
        record |= {
            "archs": " ".join(archs),
            "kernels": " ".join(kernels),
            "csrc": source_hash(without="cpu"),
        }
    # tables.source_hash leaves out keys that begin with cpu: GPU kernels do not depend on them.
    record |= {
        "cpu": "not built" if found.no_cpu else "built",
        "cpu_why": found.no_cpu
        or f"{shlex.join(found.cxx.command)} works and torch {torch} is installed",
        "cpu_compiler": found.cxx.version if found.cxx else "not seen",
    }
    return record if found.no_cpu else record | {"cpu_csrc": source_hash(without="cuda")}


def show(record: dict[str, str], **more: str) -> None:
    """Print the build in a few lines."""
    lines = {
        "extension": f"{record['extension']}: {record['why']}",
        "cpu": f"{record['cpu']}: {record['cpu_why']}",
        **more,
    }
    print("\n".join(f"resnet_fast {key:9} {value}" for key, value in lines.items()), flush=True)


def finish(found: Plan, into: Path, archs: list[str]) -> None:
    """Write the record into the package, print it, and remove extensions of an earlier build that were not rebuilt."""
    folder, record = into / "resnet_fast", facts(found, archs)
    absent = {"_C", "_cpu"} - set(found.extensions)
    for name in absent:
        for old in folder.glob(f"{name}.*.so"):
            old.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    rebuild = {"rebuild": REBUILD.removeprefix("RESNET_FAST_BUILD=cuda ")} if absent else {}
    show(record, **rebuild)


class BuildPython(build_py):
    """Copies the Python files, and without extensions records why there are none."""

    def run(self) -> None:
        super().run()
        if not plan().extensions:
            finish(plan(), ROOT if self.editable_mode else Path(self.build_lib), [])


class BuildExtensions(build_ext):
    """Compiles csrc, in parallel and only what changed, and records what was built."""

    def run(self) -> None:
        self.found, self.archs = plan(), []
        into = ROOT if self.inplace else Path(self.build_lib)
        if self.extensions:
            self._prepare()
            super().run()
        finish(self.found, into, self.archs)

    def _prepare(self) -> None:
        """Choose architectures and jobs, and print the build."""
        nvcc, torch, free = self.found.nvcc, self.found.torch, free_gigabytes()
        if not self.found.no_cuda:
            self.archs = choose_archs(os.environ.get("TORCH_CUDA_ARCH_LIST"), nvcc.archs)
        self.jobs = choose_jobs(len(os.sched_getaffinity(0)), free, os.environ.get("MAX_JOBS"))
        show(
            facts(self.found, self.archs),
            torch=f"{torch.root} (stable ABI: loads on 2.11 and later)",
            nvcc=nvcc.command[0] if nvcc else "not seen",
            archs=" ".join(self.archs) or "none",
            jobs=f"{self.jobs} ({free:.0f} GB of memory free)",
        )

    def build_extensions(self) -> None:
        """Build one by one; one that does not compile is left out, unless RESNET_FAST_BUILD requires it."""
        required = "resnet_fast._C" if os.environ.get("RESNET_FAST_BUILD") == "cuda" else None
        for ext in tuple(self.extensions):
            try:
                self.build_extension(ext)
            except BuildError as error:
                if ext.name == required:
                    raise BuildError(
                        f"RESNET_FAST_BUILD=cuda: {error} (auto does without)"
                    ) from error
                reason = "no_cuda" if ext.name == "resnet_fast._C" else "no_cpu"
                self.found = replace(self.found, **{reason: str(error)})
                # setuptools would install every listed extension.
                self.extensions = [other for other in self.extensions if other is not ext]

    def build_extension(self, ext: Extension) -> None:
        torch, nvcc, cxx = plan().torch, plan().nvcc, plan().cxx
        if ext.name == "resnet_fast._C":
            commands = cuda_commands(torch, nvcc, self.archs, self.jobs)
            link = [*nvcc.command, "-cudart", "static"]
            libraries = ["-ltorch_cpu", "-ltorch_cuda"]
        else:
            commands = cpu_commands(torch, cxx)
            link = list(cxx.command)
            libraries = ["-ltorch_cpu"]
        OBJECTS.mkdir(parents=True, exist_ok=True)
        with concurrent.futures.ThreadPoolExecutor(self.jobs) as pool:
            objects = list(pool.map(compile_one, commands, commands.values()))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        run(
            [
                *link,
                "-shared",
                *map(str, objects),
                f"-L{torch.root / 'lib'}",
                *libraries,
                "-o",
                f"{target}.part",
            ]
        )
        os.replace(f"{target}.part", target)  # loading half a library is a bus error


if __name__ == "__main__":
    # Only commands that build need the decision: sdist and metadata work anywhere and cost nothing.
    building = {"build", "build_ext", "bdist_wheel", "editable_wheel", "install", "develop"} & set(
        sys.argv
    )
    setup(
        ext_modules=[Extension(f"resnet_fast.{name}", sources=[]) for name in plan().extensions]
        if building
        else [],
        cmdclass={"build_py": BuildPython, "build_ext": BuildExtensions},
    )
