"""The extension ``resnet_fast._C``: whether it was built from these sources for this GPU, and building it."""

from __future__ import annotations

import hashlib
import importlib.machinery
import json
import os
import subprocess
import sys
import tempfile
import time

from .watchdog import ROOT, kill


def sources() -> str:
    """Return the hash of csrc without the CPU kernels, as setup.py records it."""
    csrc = ROOT / "csrc"
    cpu = csrc / "cpu"
    files = (path for path in csrc.rglob("*") if path.is_file() and cpu not in path.parents)
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def prebuilt() -> str | None:
    """Return the hash of the sources that the extension for this Python was built from, or None if there is none."""
    package = ROOT / "resnet_fast"
    record = package / "_build.json"
    libraries = [package / f"_C{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    built = any(library.is_file() for library in libraries)
    if not record.is_file() or not built:
        return None
    return json.loads(record.read_text()).get("csrc")


def targets() -> list[str]:
    """Return the architectures that the extension has machine code for.

    PTX does not count: compiled from the PTX of an older architecture, the kernels for Hopper would be missing.
    """
    record = json.loads((ROOT / "resnet_fast" / "_build.json").read_text())
    return record.get("archs", "").replace("+PTX", "").split()


def is_current(arch: str) -> bool:
    """Whether the extension was built from these sources and for this architecture."""
    return prebuilt() == sources() and arch in targets()


def architecture(capability: tuple[int, int] | list[int]) -> str:
    """Return nvcc's name for a compute capability."""
    major, minor = capability
    if (major, minor) == (9, 0):
        return "9.0a"
    return f"{major}.{minor}"


def compile_extension(arch: str, deadline: float) -> tuple[int | None, str]:
    """Build the extension for one architecture: setup.py's exit code, None at the deadline, and its output."""
    # A virtual machine may report little free memory until it is asked for, which would slow setup.py down to a few
    # jobs. There are a dozen files.
    jobs = {"MAX_JOBS": str(os.cpu_count())}
    env = {
        **jobs,
        **os.environ,
        "RESNET_FAST_BUILD": "cuda",
        "TORCH_CUDA_ARCH_LIST": arch,
    }
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            [sys.executable, "setup.py", "build_ext", "--inplace"],
            cwd=ROOT,
            env=env,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            code = process.wait(max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            kill(process)
        log.seek(0)
        return code, log.read()
