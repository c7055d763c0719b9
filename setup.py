"""Build of resnet_fast: pure Python everywhere, and where the toolchain allows ``_C`` and ``_cpu``.

``resnet_fast._C`` holds the CUDA kernels, ``resnet_fast._cpu`` the CPU kernels as a library of torch ops.

RESNET_FAST_BUILD=auto (default)  _C if nvcc works and torch is a CUDA build, _cpu if a C++ compiler works; an extension
                                  that then fails to compile is left out, and the record says so
                  cuda            _C, or an error that says what is missing; _cpu as in auto
                  none            pure Python
TORCH_CUDA_ARCH_LIST              as in PyTorch: "9.0a", "8.0;9.0+PTX" ... An architecture that cannot be built is left
                                  out with a sentence; under RESNET_FAST_BUILD=cuda it stops the build
MAX_JOBS, CUDA_HOME, CXX          as in PyTorch; CXX compiles _cpu

The toolchain decides (tools/toolchain.py), never a visible GPU nor this processor: images are built elsewhere. nvcc
drives compiler and linker alike, so it brings its own headers and runtime wherever it is installed; the runtime is
linked statically, so that one binary serves every torch.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import os
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # a build backend does not add the folder of setup.py
from tools.toolchain import (  # noqa: E402
    HOST,
    INSTRUCTIONS,
    BuildError,
    Compiler,
    Plan,
    Torch,
    choose_jobs,
    complaint,
    free_gigabytes,
    gencode,
    plan,
)

CSRC = ROOT / "csrc"
OBJECTS = ROOT / "build" / "csrc"  # kept, so that only what changed is compiled again
RECORD = "_build.json"  # read by `python -m resnet_fast info`
REBUILD = "RESNET_FAST_BUILD=cuda pip install --force-reinstall --no-deps -v ."

# The stable ABI of torch 2.11, the oldest supported: one binary loads on it and on every later torch.
STABLE = "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"


# ---------------------------------------------------------------- building


def cuda_commands(
    torch: Torch, nvcc: Compiler, archs: Sequence[str], jobs: int
) -> dict[Path, list[str]]:
    """Return one nvcc command per source file; the two .cpp files see torch's headers, which include pybind11's."""
    kernels = sorted((CSRC / "cuda").glob("*.cu"))
    common = [*nvcc.command, "-c", "-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    # architectures of one file side by side, where cores are left
    threads = str(max(1, jobs // len(kernels)))
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


def facts(found: Plan) -> dict[str, str]:
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
            "archs": " ".join(found.archs),
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


def finish(found: Plan, into: Path) -> None:
    """Write the record into the package, print it, and remove extensions of an earlier build that were not rebuilt."""
    folder, record = into / "resnet_fast", facts(found)
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
            finish(plan(), ROOT if self.editable_mode else Path(self.build_lib))


class BuildExtensions(build_ext):
    """Compiles csrc, in parallel and only what changed, and records what was built."""

    def run(self) -> None:
        self.found = plan()
        into = ROOT if self.inplace else Path(self.build_lib)
        if self.extensions:
            self._prepare()
            super().run()
        finish(self.found, into)

    def _prepare(self) -> None:
        """Choose the number of compilers, and print the build."""
        nvcc, torch, free = self.found.nvcc, self.found.torch, free_gigabytes()
        self.jobs = choose_jobs(len(os.sched_getaffinity(0)), free, os.environ.get("MAX_JOBS"))
        show(
            facts(self.found),
            torch=f"{torch.root} (stable ABI: loads on 2.11 and later)",
            nvcc=nvcc.command[0] if nvcc else "not seen",
            archs="; ".join([" ".join(self.found.archs) or "none", *self.found.left_out]),
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
            commands = cuda_commands(torch, nvcc, plan().archs, self.jobs)
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
