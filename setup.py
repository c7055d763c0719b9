"""Builds resnet_fast: pure Python everywhere, and where the toolchain allows ``resnet_fast._C``, the CUDA kernels, and
``resnet_fast._cpu``, the CPU kernels, which is a library of torch ops and no Python module.

RESNET_FAST_BUILD=auto (default)  _C if nvcc works and torch is a CUDA build, _cpu if a C++ compiler works; what then fails to compile
                                  is left out, and the record says so
                  cuda            _C, or an error that says what is missing; _cpu as in auto
                  none            pure Python
TORCH_CUDA_ARCH_LIST              as in PyTorch: "9.0a", "8.0;9.0+PTX" ...
MAX_JOBS, CUDA_HOME, CXX          as in PyTorch; CXX compiles _cpu

The toolchain decides, never a visible GPU nor this processor: images are built elsewhere. torch is neither imported nor required to
build: its headers and libraries are found by path, under build isolation too. nvcc drives compiler and linker alike, so it brings its
own headers and runtime wherever it is installed; the runtime is linked statically, so that one binary serves every torch.
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
OBJECTS = ROOT / "build" / "csrc"  # kept between builds, so that only what changed is compiled again
RECORD = "_build.json"  # read by `python -m resnet_fast info`
REBUILD = "RESNET_FAST_BUILD=cuda pip install --force-reinstall --no-deps -v ."

# The stable ABI of torch 2.11, the oldest supported: one binary loads on it and on every later torch.
TORCH_OLDEST = (2, 11)
STABLE = "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"

# Each instruction set has its file in csrc/cpu; library.cpp asks the processor. Flags, since clang ignores `#pragma GCC target`.
HOST = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
INSTRUCTIONS = {"avx512_bf16.cpp": [*AVX512, "-mavx512bf16"], "avx512.cpp": AVX512, "avx2.cpp": ["-mavx2", "-mfma"]}

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
    """A compiler, its complaint about a few lines of what it is needed for, if any, and nvcc's architectures ("8.0")."""

    command: tuple[str, ...]
    version: str
    fault: str | None
    archs: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Plan:
    """What is there, and of each extension the sentence that says why it is not built, or None."""

    torch: Torch | None
    nvcc: Compiler | None
    cxx: Compiler | None
    no_cuda: str | None
    no_cpu: str | None

    @property
    def extensions(self) -> list[str]:
        return [name for name, why_not in (("_C", self.no_cuda), ("_cpu", self.no_cpu)) if why_not is None]


# ---------------------------------------------------------------- what is there


def find_torch() -> Torch | None:
    """The torch to build against: the importable one, or under build isolation the environment's own."""
    spec = importlib.util.find_spec("torch")
    places = list(spec.submodule_search_locations or ()) if spec else []
    places += [str(Path(sysconfig.get_path(kind)) / "torch") for kind in ("purelib", "platlib")]
    for root in map(Path, places):
        if (root / "version.py").is_file():
            facts = runpy.run_path(str(root / "version.py"))
            return Torch(root, str(facts["__version__"]), facts.get("cuda") or None)
    return None


def find_nvcc() -> Compiler | None:
    """The nvcc of CUDA_HOME, of PATH, or of the usual place, tried out on a trivial extension."""
    places = [os.path.join(os.environ.get("CUDA_HOME", ""), "bin"), os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    path = shutil.which("nvcc", path=os.pathsep.join(places))
    if path is None:
        return None
    known = subprocess.run([path, "--list-gpu-arch"], capture_output=True, text=True).stdout
    banner = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    archs = frozenset(f"{n[:-1]}.{n[-1]}" for n in re.findall(r"compute_(\d+)\b", known))
    release = re.search(r"release ([\d.]+)", banner)
    command = [path, "-shared", "-Xcompiler", "-fPIC", "-arch=sm_80", f"-I{sysconfig.get_path('include')}"]
    fault = try_out(
        command, ".cu", "#include <Python.h>\n__global__ void probe() {}\nvoid run() { probe<<<1, 1>>>(); }\n"
    )
    return Compiler((path,), release[1] if release else "unknown", fault, archs)


# What csrc/cpu is written in: GCC 9 and clang know it.
PROBE = """#include <optional>
using Words __attribute__((vector_size(64))) = unsigned;
using Halves __attribute__((vector_size(32))) = unsigned short;
void widen(const Halves* h, Words* w) { *w = __builtin_convertvector(*h, Words) << 16; }
std::optional<bool> probe() { return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("fma"); }
"""


def find_cxx() -> Compiler | None:
    """The C++ compiler of CXX; else the first of PATH that can compile csrc/cpu, or the last that cannot."""
    named, found = shlex.split(os.environ.get("CXX", "")), None
    for command in [named] if named else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            banner = subprocess.run([*command, "--version"], capture_output=True, text=True).stdout.splitlines()
            fault = try_out([*command, *HOST, *INSTRUCTIONS["avx512_bf16.cpp"], "-shared"], ".cpp", PROBE)
            found = Compiler(tuple(command), banner[0] if banner else "unknown", fault)
            if fault is None:
                break
    return found


def try_out(command: list[str], suffix: str, text: str) -> str | None:
    """Build a few lines: finds a compiler that is missing, too old or too new, missing headers, a missing runtime."""
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, f"probe{suffix}")
        source.write_text(text)
        tried = subprocess.run([*command, str(source), "-o", f"{source}.so"], capture_output=True, text=True)
    return (
        None if tried.returncode == 0 else complaint(tried.stderr or tried.stdout) or f"exit status {tried.returncode}"
    )


def complaint(output: str) -> str:
    """The line of a compiler's output that tells the most."""
    said = output.strip().splitlines()
    return next((line for line in said if "error" in line), said[-1] if said else "")


# ---------------------------------------------------------------- what to build


def decide(
    mode: str, system: str, machine: str, torch: Torch | None, nvcc: Compiler | None, cxx: Compiler | None
) -> Plan:
    """What to build of what is there. Raises BuildError for an unknown mode, and if ``cuda`` lacks something."""
    if mode not in ("auto", "cuda", "none"):
        raise BuildError(f"RESNET_FAST_BUILD: got {mode!r}, expected auto, cuda or none")
    no_cuda = no_cpu = None
    if mode == "none":
        no_cuda = no_cpu = "RESNET_FAST_BUILD=none"
    elif system != "Linux":
        no_cuda = no_cpu = f"extensions are built on Linux only, this is {system}"
    elif torch is None:
        no_cuda = no_cpu = "torch is not installed in this environment: install it first (pip install torch)"
    elif torch.release < TORCH_OLDEST:
        no_cuda = no_cpu = (
            f"torch {torch.version} is older than {'.'.join(map(str, TORCH_OLDEST))}: install a newer one"
        )
    else:
        if torch.cuda is None:
            no_cuda = f"torch {torch.version} is not a CUDA build: install one that is"
        elif nvcc is None:
            no_cuda = "nvcc was not found: install the CUDA toolkit, or set CUDA_HOME"
        elif nvcc.fault:
            no_cuda = f"{nvcc.command[0]} cannot build a Python extension: {nvcc.fault}"
        if machine != "x86_64":
            no_cpu = f"the CPU kernels are for x86-64, this is {machine}"
        elif cxx is None:
            no_cpu = "no C++ compiler was found: install g++ or clang++, or set CXX"
        elif cxx.fault:
            no_cpu = f"{shlex.join(cxx.command)} cannot build the CPU kernels, g++ from 9 on can: {cxx.fault}"
    if mode == "cuda" and no_cuda:
        raise BuildError(f"RESNET_FAST_BUILD=cuda: {no_cuda}")
    return Plan(torch, nvcc, cxx, no_cuda, no_cpu)


def choose_archs(wanted: str | None, known: frozenset[str]) -> list[str]:
    """Architectures to compile for, such as ["8.0+PTX", "9.0a"], from TORCH_CUDA_ARCH_LIST or the default list.

    The default keeps what this nvcc knows. Of a user's list, chips older than 8.0 are left out (containers set such
    lists for all packages at once); anything else that cannot be built raises BuildError.
    """
    if not wanted:
        archs = [arch for arch in ARCHS if arch.rstrip("a") in known]
        return [f"{archs[0]}+PTX", *archs[1:]]
    archs = []
    for arch in wanted.replace(";", " ").replace(",", " ").split():
        number = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
        if number is None:
            raise BuildError(f"TORCH_CUDA_ARCH_LIST: got {arch!r}, expected numbers such as 8.0 9.0a 12.0+PTX")
        if (int(number[1]), int(number[2])) < OLDEST:
            continue
        if f"{number[1]}.{number[2]}" not in known:
            raise BuildError(f"TORCH_CUDA_ARCH_LIST: got {arch!r}, this nvcc knows {' '.join(sorted(known))}")
        archs.append(arch)
    if not archs:
        raise BuildError(f"TORCH_CUDA_ARCH_LIST: got {wanted!r}, expected at least one architecture from 8.0 on")
    return archs


def gencode(archs: list[str]) -> list[str]:
    """nvcc's flags for a list of architectures."""
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        code = f"[sm_{number},compute_{number}]" if arch.endswith("+PTX") else f"sm_{number}"
        flags += ["-gencode", f"arch=compute_{number},code={code}"]
    return flags


def choose_jobs(cores: int, free_gigabytes: float, limit: str | None) -> int:
    """Compilers to run at once: MAX_JOBS, or no more than cores and than free memory feeds; at least one."""
    return max(1, int(limit) if limit else min(cores, int(free_gigabytes / GIGABYTES_A_JOB)))


def free_gigabytes() -> float:
    """Memory this process may still take: the machine's, or less where a container's limit is nearer."""
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
    """The decision for this machine, taken once."""
    mode, system = os.environ.get("RESNET_FAST_BUILD", "auto"), platform.system()
    wanted = mode in ("auto", "cuda") and system == "Linux"
    found = (find_torch(), find_nvcc(), find_cxx()) if wanted else (None, None, None)
    return decide(mode, system, platform.machine(), *found)


def cuda_commands(torch: Torch, nvcc: Compiler, archs: list[str], jobs: int) -> dict[Path, list[str]]:
    """One nvcc command per source file; the two .cpp files see torch's headers, among which pybind11's are."""
    kernels = sorted((CSRC / "cuda").glob("*.cu"))
    common = [*nvcc.command, "-c", "-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    threads = str(max(1, jobs // len(kernels)))  # architectures of one file side by side, where cores are left
    headers = ["-isystem", str(torch.root / "include")]
    commands = dict.fromkeys(kernels, [*common, "-lineinfo", "-Xptxas", "-warn-spills", "-t", threads, *gencode(archs)])
    commands[CSRC / "library.cpp"] = [*common, *headers, "-DUSE_CUDA", STABLE]
    commands[CSRC / "bindings.cpp"] = [*common, *headers, f"-I{sysconfig.get_path('include')}"]
    return commands


def cpu_commands(torch: Torch, cxx: Compiler) -> dict[Path, list[str]]:
    """One command per source file of csrc/cpu; library.cpp sees torch's headers."""
    common, headers = [*cxx.command, "-c", *HOST], ["-isystem", str(torch.root / "include"), STABLE]
    return {
        source: [*common, *INSTRUCTIONS.get(source.name, headers)] for source in sorted((CSRC / "cpu").glob("*.cpp"))
    }


def compile_one(source: Path, command: list[str]) -> Path:
    """Compile a file unless its object is newer than all it was made of and came of the same command."""
    target = OBJECTS / f"{source.parent.name}-{source.name}.o"
    needs, made_by = target.with_suffix(".d"), target.with_suffix(".command")
    command = [*command, str(source), "-o", str(target)]
    if target.is_file() and needs.is_file() and made_by.is_file() and made_by.read_text() == shlex.join(command):
        made = target.stat().st_mtime
        files = [Path(name) for name in needs.read_text().split(":", 1)[1].replace("\\\n", " ").split()]
        if all(file.is_file() and file.stat().st_mtime <= made for file in files):
            return target
    made_by.unlink(missing_ok=True)
    run([*command, "-MD", "-MF", str(needs)])
    made_by.write_text(shlex.join(command))
    return target


def run(command: list[str]) -> None:
    """Run a compiler; its output is shown only if it fails or has something to say."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        print(f"{shlex.join(command)}\n{done.stdout}", file=sys.stderr, flush=True)
        raise BuildError(f"{command[0]} failed: {complaint(done.stdout) or f'exit status {done.returncode}'}")
    if done.stdout.strip():
        print(done.stdout.strip(), flush=True)


def source_hash(without: str) -> str:
    """Hash of csrc without the folder of the other extension: with compiler and targets, what a measured kernel was made of."""
    digest = hashlib.sha256()
    for source in sorted(path for path in CSRC.rglob("*") if path.is_file() and CSRC / without not in path.parents):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def facts(found: Plan, archs: list[str]) -> dict[str, str]:
    """The record: what was built of what. No date and nothing random, so equal builds are equal files."""
    torch = found.torch.version if found.torch else "not seen"
    record = {
        "extension": "not built" if found.no_cuda else "built",
        "why": found.no_cuda or f"nvcc {found.nvcc.version} works and torch {torch} is a CUDA build",
        "torch": torch,
        "nvcc": found.nvcc.version if found.nvcc else "not seen",
    }
    if found.no_cuda:
        record["rebuild"] = REBUILD
    else:
        kernels = sorted(source.stem for source in (CSRC / "cuda").glob("*.cu"))
        record |= {"archs": " ".join(archs), "kernels": " ".join(kernels), "csrc": source_hash(without="cpu")}
    # What begins with cpu is no part of what GPU kernels are made of (tables.source_hash).
    record |= {
        "cpu": "not built" if found.no_cpu else "built",
        "cpu_why": found.no_cpu or f"{shlex.join(found.cxx.command)} works and torch {torch} is installed",
        "cpu_compiler": found.cxx.version if found.cxx else "not seen",
    }
    return record if found.no_cpu else record | {"cpu_csrc": source_hash(without="cuda")}


def show(record: dict[str, str], **more: str) -> None:
    """The build in a few lines."""
    lines = {
        "extension": f"{record['extension']}: {record['why']}",
        "cpu": f"{record['cpu']}: {record['cpu_why']}",
        **more,
    }
    print("\n".join(f"resnet_fast {key:9} {value}" for key, value in lines.items()), flush=True)


def finish(found: Plan, into: Path, archs: list[str]) -> None:
    """Leave the record in the package, tell it, and leave no extension of an earlier build that this one did not replace."""
    folder, record, absent = into / "resnet_fast", facts(found, archs), {"_C", "_cpu"} - {*found.extensions}
    for old in (file for name in absent for file in folder.glob(f"{name}.*.so")):
        old.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    show(record, **({"rebuild": REBUILD.removeprefix("RESNET_FAST_BUILD=cuda ")} if absent else {}))


class BuildPython(build_py):
    """Copies the Python files, and without extensions records why there are none."""

    def run(self) -> None:
        super().run()
        if not plan().extensions:
            finish(plan(), ROOT if self.editable_mode else Path(self.build_lib), [])


class BuildExtensions(build_ext):
    """Compiles csrc, in parallel and only what changed, and records what was built."""

    def run(self) -> None:
        self.found, self.archs, free = plan(), [], free_gigabytes()
        into = ROOT if self.inplace else Path(self.build_lib)
        if self.extensions:
            nvcc, torch = self.found.nvcc, self.found.torch
            self.archs = [] if self.found.no_cuda else choose_archs(os.environ.get("TORCH_CUDA_ARCH_LIST"), nvcc.archs)
            self.jobs = choose_jobs(len(os.sched_getaffinity(0)), free, os.environ.get("MAX_JOBS"))
            show(
                facts(self.found, self.archs),
                torch=f"{torch.root} (stable ABI: loads on 2.11 and later)",
                nvcc=nvcc.command[0] if nvcc else "not seen",
                archs=" ".join(self.archs) or "none",
                jobs=f"{self.jobs} ({free:.0f} GB of memory free)",
            )
            super().run()
        finish(self.found, into, self.archs)

    def build_extensions(self) -> None:
        """One by one; what cannot be compiled is left out, for the package works without, unless RESNET_FAST_BUILD insists on it."""
        for ext in tuple(self.extensions):
            try:
                self.build_extension(ext)
            except BuildError as error:
                if ext.name == "resnet_fast._C" and os.environ.get("RESNET_FAST_BUILD") == "cuda":
                    raise BuildError(f"RESNET_FAST_BUILD=cuda: {error} (auto does without)") from error
                self.found = replace(
                    self.found, **{"no_cuda" if ext.name == "resnet_fast._C" else "no_cpu": str(error)}
                )
                self.extensions = [
                    other for other in self.extensions if other is not ext
                ]  # it is not there to be installed

    def build_extension(self, ext: Extension) -> None:
        torch, nvcc, cxx = plan().torch, plan().nvcc, plan().cxx
        if ext.name == "resnet_fast._C":
            commands, link = cuda_commands(torch, nvcc, self.archs, self.jobs), [*nvcc.command, "-cudart", "static"]
            libraries = ["-ltorch_cpu", "-ltorch_cuda"]
        else:
            commands, link, libraries = cpu_commands(torch, cxx), cxx.command, ["-ltorch_cpu"]
        OBJECTS.mkdir(parents=True, exist_ok=True)
        with concurrent.futures.ThreadPoolExecutor(self.jobs) as pool:
            objects = list(pool.map(compile_one, commands, commands.values()))
        (target := Path(self.get_ext_fullpath(ext.name))).parent.mkdir(parents=True, exist_ok=True)
        run([*link, "-shared", *map(str, objects), f"-L{torch.root / 'lib'}", *libraries, "-o", f"{target}.part"])
        os.replace(f"{target}.part", target)  # half a library, loaded, is a bus error


if __name__ == "__main__":
    # Only commands that build need the decision: sdist and metadata work anywhere and cost nothing.
    building = {"build", "build_ext", "bdist_wheel", "editable_wheel", "install", "develop"} & set(sys.argv)
    setup(
        ext_modules=[Extension(f"resnet_fast.{name}", sources=[]) for name in plan().extensions] if building else [],
        cmdclass={"build_py": BuildPython, "build_ext": BuildExtensions},
    )
