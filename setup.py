"""Builds resnet_fast: pure Python everywhere, and the CUDA extension ``resnet_fast._C`` where the toolchain allows.

RESNET_FAST_BUILD=auto (default)  the extension if nvcc works and torch is a CUDA build, else pure Python
                  cuda            the extension, or an error that says what is missing
                  none            pure Python
TORCH_CUDA_ARCH_LIST              as in PyTorch: "9.0a", "8.0;9.0+PTX" ...
MAX_JOBS, CUDA_HOME               as in PyTorch

The toolchain decides, never a visible GPU: images are built where there is none. torch is neither imported nor required
to build: its headers and libraries are found by path, under build isolation too. nvcc drives compiler and linker alike,
so it brings its own headers and runtime wherever it is installed; the runtime is linked statically, so that one binary
serves every torch.
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
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
OBJECTS = ROOT / "build" / "csrc"  # kept between builds, so that only what changed is compiled again
RECORD = "_build.json"  # read by `python -m resnet_fast info`
REBUILD = "RESNET_FAST_BUILD=cuda pip install --force-reinstall --no-deps -v ."

# The stable ABI of torch 2.11, the oldest supported: one binary loads on it and on every later torch.
TORCH_OLDEST = (2, 11)
TORCH_TARGET = "0x020b000000000000ULL"

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
class Nvcc:
    """A CUDA compiler, the architectures it knows ("8.0"), and its complaint about a trivial extension, if any."""

    path: str
    version: str
    archs: frozenset[str]
    fault: str | None


@dataclass(frozen=True)
class Decision:
    """Whether the extension is built, and why in one sentence."""

    build: bool
    why: str


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


def find_nvcc() -> Nvcc | None:
    """The nvcc of CUDA_HOME, of PATH, or of the usual place, tried out on a trivial extension."""
    places = [os.path.join(os.environ.get("CUDA_HOME", ""), "bin"), os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    path = shutil.which("nvcc", path=os.pathsep.join(places))
    if path is None:
        return None
    known = subprocess.run([path, "--list-gpu-arch"], capture_output=True, text=True).stdout
    banner = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    archs = frozenset(f"{n[:-1]}.{n[-1]}" for n in re.findall(r"compute_(\d+)\b", known))
    release = re.search(r"release ([\d.]+)", banner)
    return Nvcc(path, release[1] if release else "unknown", archs, try_out(path))


def try_out(nvcc: str) -> str | None:
    """Compile and link three lines: finds a missing or too new host compiler, missing headers, a missing runtime."""
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "probe.cu")
        source.write_text("#include <Python.h>\n__global__ void probe() {}\nvoid run() { probe<<<1, 1>>>(); }\n")
        command = [nvcc, "-shared", "-Xcompiler", "-fPIC", "-arch=sm_80", f"-I{sysconfig.get_path('include')}",
                   str(source), "-o", str(source.with_suffix(".so"))]
        tried = subprocess.run(command, capture_output=True, text=True)
    if tried.returncode == 0:
        return None
    said = (tried.stderr or tried.stdout).strip().splitlines()
    return next((line for line in said if "error" in line), said[-1] if said else f"exit status {tried.returncode}")


# ---------------------------------------------------------------- what to build

def decide(mode: str, system: str, torch: Torch | None, nvcc: Nvcc | None) -> Decision:
    """Whether to build the extension. Raises BuildError for an unknown mode, and if ``cuda`` lacks something."""
    if mode not in ("auto", "cuda", "none"):
        raise BuildError(f"RESNET_FAST_BUILD: got {mode!r}, expected auto, cuda or none")
    if mode == "none":
        return Decision(False, "RESNET_FAST_BUILD=none")
    missing = None
    if system != "Linux":
        missing = f"the extension is built on Linux only, this is {system}"
    elif torch is None:
        missing = "torch is not installed in this environment: install it first (pip install torch)"
    elif torch.release < TORCH_OLDEST:
        missing = f"torch {torch.version} is older than {'.'.join(map(str, TORCH_OLDEST))}: install a newer one"
    elif torch.cuda is None:
        missing = f"torch {torch.version} is not a CUDA build: install one that is"
    elif nvcc is None:
        missing = "nvcc was not found: install the CUDA toolkit, or set CUDA_HOME"
    elif nvcc.fault:
        missing = f"{nvcc.path} cannot build a Python extension: {nvcc.fault}"
    if missing is None:
        return Decision(True, f"nvcc {nvcc.version} works and torch {torch.version} is a CUDA build")
    if mode == "cuda":
        raise BuildError(f"RESNET_FAST_BUILD=cuda: {missing}")
    return Decision(False, missing)


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
    """Compilers to run at once: no more than cores, than free memory feeds, or than MAX_JOBS says; at least one."""
    jobs = min(cores, int(free_gigabytes / GIGABYTES_A_JOB))
    return max(1, min(jobs, int(limit)) if limit else jobs)


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
def plan() -> tuple[Decision, Torch | None, Nvcc | None]:
    """The decision for this machine, taken once."""
    mode = os.environ.get("RESNET_FAST_BUILD", "auto")
    wanted = mode in ("auto", "cuda") and platform.system() == "Linux"
    torch, nvcc = (find_torch(), find_nvcc()) if wanted else (None, None)
    return decide(mode, platform.system(), torch, nvcc), torch, nvcc


def compile_commands(torch: Torch, nvcc: Nvcc, archs: list[str], jobs: int) -> dict[Path, list[str]]:
    """One nvcc command per source file; the two .cpp files see torch's headers, among which pybind11's are."""
    kernels = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    common = [nvcc.path, "-c", "-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    threads = str(max(1, jobs // len(kernels)))  # architectures of one file side by side, where cores are left
    headers = ["-isystem", str(torch.root / "include")]
    device = [*common, "-lineinfo", "-Xptxas", "-warn-spills", "-t", threads, *gencode(archs)]
    commands = dict.fromkeys(kernels, device)
    stable = ["-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    commands[ROOT / "csrc" / "library.cpp"] = [*common, *headers, *stable]
    commands[ROOT / "csrc" / "bindings.cpp"] = [*common, *headers, f"-I{sysconfig.get_path('include')}"]
    return commands


def compile_one(source: Path, command: list[str]) -> Path:
    """Compile a file unless its object is newer than all it was made of and came of the same command."""
    target = OBJECTS / f"{source.name}.o"
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
        raise BuildError(f"{shlex.join(command)}\n{done.stdout}\nThat failed. RESNET_FAST_BUILD=none does without.")
    if done.stdout.strip():
        print(done.stdout.strip(), flush=True)


def source_hash() -> str:
    """Hash of csrc: together with compiler and targets, what a measured kernel was made of."""
    digest = hashlib.sha256()
    for source in sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file()):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def summary(lines: dict[str, str]) -> str:
    """The build in five lines."""
    return "\n".join(f"resnet_fast {key:9} {value}" for key, value in lines.items())


def write_record(folder: Path, facts: dict) -> None:
    """What was built, for `info`; no date and nothing random, so equal builds are equal files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD).write_text(json.dumps(facts, indent=1) + "\n")


class BuildPython(build_py):
    """Copies the Python files, and without the extension records why there is none."""

    def run(self) -> None:
        super().run()
        decision, torch, nvcc = plan()
        if decision.build:
            return
        folder = ROOT / "resnet_fast" if self.editable_mode else Path(self.build_lib) / "resnet_fast"
        if self.editable_mode:  # an extension of an earlier build would otherwise still be imported
            for old in folder.glob("_C.*.so"):
                old.unlink()
        facts = {"extension": "not built (pure Python)", "why": decision.why, "rebuild": REBUILD,
                 "torch": torch.version if torch else "not seen", "nvcc": nvcc.version if nvcc else "not seen"}
        print(summary(facts), flush=True)
        write_record(folder, facts)


class BuildExtension(build_ext):
    """Compiles csrc with nvcc, in parallel and only what changed, and records what was built."""

    def run(self) -> None:
        super().run()
        if self.extensions:
            write_record(ROOT / "resnet_fast" if self.inplace else Path(self.build_lib) / "resnet_fast", self.facts)

    def build_extension(self, ext: Extension) -> None:
        decision, torch, nvcc = plan()
        archs = choose_archs(os.environ.get("TORCH_CUDA_ARCH_LIST"), nvcc.archs)
        free = free_gigabytes()
        jobs = choose_jobs(len(os.sched_getaffinity(0)), free, os.environ.get("MAX_JOBS"))
        commands = compile_commands(torch, nvcc, archs, jobs)
        kernels = [source.stem for source in commands if source.suffix == ".cu"]
        print(summary({"extension": f"{ext.name}: {', '.join(kernels)}",
                       "torch": f"{torch.version}, {torch.root} (stable ABI: loads on 2.11 and later)",
                       "nvcc": f"{nvcc.version}, {nvcc.path}", "archs": " ".join(archs),
                       "jobs": f"{jobs} ({free:.0f} GB of memory free)"}), flush=True)
        OBJECTS.mkdir(parents=True, exist_ok=True)
        with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
            objects = list(pool.map(compile_one, commands, commands.values()))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        libraries = [f"-L{torch.root / 'lib'}", "-ltorch_cpu", "-ltorch_cuda"]
        run([nvcc.path, "-shared", "-cudart", "static", *map(str, objects), *libraries, "-o", str(target)])
        self.facts = {"extension": "built", "why": decision.why, "torch": torch.version, "nvcc": nvcc.version,
                      "archs": " ".join(archs), "kernels": " ".join(kernels), "csrc": source_hash()}


if __name__ == "__main__":
    # Only commands that build need the decision: sdist and metadata work anywhere and cost nothing.
    building = {"build", "build_ext", "bdist_wheel", "editable_wheel", "install", "develop"} & set(sys.argv)
    setup(ext_modules=[Extension("resnet_fast._C", sources=[])] if building and plan()[0].build else [],
          cmdclass={"build_py": BuildPython, "build_ext": BuildExtension})
