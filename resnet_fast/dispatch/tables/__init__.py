"""Tables of measured choices: one JSON file for each GPU model. ``tuning`` writes them, ``select`` reads them.

A file is ``{"gpu": name, "entries": {problem key: entry}, "graph": {…}, "measured": {problem key: {kernel: record}},
"networks": {…}}``. ``entries`` holds the choices for ordinary calls (host and device time), ``graph`` those inside a
CUDA graph (device time). ``measured`` holds what tuning found for every candidate, ``networks`` belongs to
``tuning.group_table``.

An entry has kernel, time_us, aten_us, spread, error, eager_error, versions and its kernel's normalised source hash.
It is valid only while kernel source and versions are those that it was verified with; ``stale`` says why it is not.
Files are read first from ``RESNET_FAST_TABLES`` (default ``~/.cache/resnet_fast``), then from this package.
"""

from __future__ import annotations

import ast
import ctypes
import functools
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ...util.files import replacing
from ..problem import Problem
from ..registry import find

SHIPPED = Path(__file__).parent
SECTIONS = ("entries", "graph", "measured", "networks")


def user_folder() -> Path:
    """The folder of this user's own measurements."""
    folder = os.environ.get("RESNET_FAST_TABLES")
    if folder:
        return Path(folder)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "resnet_fast"


def gpu_name(device: int | None = None) -> str:
    """The GPU model as the driver names it, for example "NVIDIA H200"."""
    return torch.cuda.get_device_name(device)


def file_name(gpu: str) -> str:
    name = gpu.lower().replace(" ", "-").replace("/", "-")
    return f"{name}.json"


# ---------------------------------------------------------------- reading


def read(path: Path, gpu: str) -> dict[str, dict[str, Any]]:
    """The sections of one file, empty if there is no file; an unusable file is ignored with a warning."""
    empty: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    if not path.is_file():
        return empty
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["gpu"] != gpu:
            raise ValueError(f"it holds measurements of {data['gpu']}, not of {gpu}")
        return {section: dict(data.get(section, {})) for section in SECTIONS}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(
            f"table {path} is ignored: {error!r}; delete it, or measure again with `python -m resnet_fast tune`",
            stacklevel=2,
        )
        return empty


@functools.cache
def load(gpu: str) -> tuple[dict[str, dict[str, Any]], ...]:
    """The sections of the user's own file, then those of the shipped one; cached until ``update`` writes."""
    name = file_name(gpu)
    folders = (user_folder(), SHIPPED)
    return tuple(read(folder / name, gpu) for folder in folders)


def lookup(problem: Problem, *, graph: bool = False) -> dict[str, Any] | None:
    """The valid entry for this problem on the current GPU, or None."""
    valid = (entry for entry in _entries(problem, graph) if stale(entry) is None)
    return next(valid, None)


def why_not(problem: Problem, *, graph: bool = False) -> str | None:
    """Why the entry for this problem is not used, or None if it is used or there is none."""
    found = list(_entries(problem, graph))
    if not found or lookup(problem, graph=graph):
        return None
    return stale(found[0])


def _entries(problem: Problem, graph: bool) -> Iterator[dict[str, Any]]:
    section = "graph" if graph else "entries"
    for sections in load(gpu_name()):
        entry = sections[section].get(problem.key)
        if entry is not None:
            yield entry


def records(problem: Problem) -> dict[str, dict[str, Any]]:
    """Kernel id → its valid record for this problem on the current GPU."""
    found: dict[str, dict[str, Any]] = {}
    for sections in reversed(load(gpu_name())):
        found |= sections["measured"].get(problem.key, {})
    valid = {}
    for kernel, record in found.items():
        if stale({"kernel": kernel, **record}) is None:
            valid[kernel] = record
    return valid


def in_words(record: dict[str, Any]) -> str:
    """One record of ``measured`` as a sentence."""
    if record["status"] != "right":
        return f"{record['status'].upper()}: {record['reason']}"
    call = _microseconds(record, "time_us")
    device = _microseconds(record, "device_us")
    error = f"{record['error']:.2g}"
    eager_error = f"{record['eager_error']:.2g}"
    return f"{call} µs a call, {device} in a graph; error {error}, eager's {eager_error}"


def _microseconds(record: dict[str, Any], name: str) -> str:
    if name not in record:
        return "not"
    return f"{record[name]:.1f}"


def stale(entry: dict[str, Any]) -> str | None:
    """Why an entry must be verified again before use, or None if it is valid."""
    try:
        kernel = find(entry["kernel"])
    except LookupError as error:
        return str(error)
    if entry["source"] != source_hash(kernel.sources):
        return f"the source of {entry['kernel']} changed since it was measured"
    if entry["versions"] != versions():
        return (
            f"{entry['kernel']} was verified with {_spell(entry['versions'])}, this is {_spell(versions())}: "
            "verify it again with `python -m resnet_fast tune`"
        )
    return None


def _spell(found: dict[str, str]) -> str:
    parts = [f"{name} {version}" for name, version in found.items()]
    return ", ".join(parts)


@functools.cache
def versions() -> dict[str, str]:
    """The versions of torch, Triton and the driver: a measurement depends on them too."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return {
        "torch": torch.__version__,
        "triton": triton,
        "driver": _driver() if torch.cuda.is_available() else "none",
    }


def _driver() -> str:
    """The CUDA version that the driver implements, for example "13000". Torch has no call for it."""
    # The library is already loaded in this process.
    library = ctypes.CDLL("nvcuda" if os.name == "nt" else "libcuda.so.1")
    version = ctypes.c_int()
    error = library.cuDriverGetVersion(ctypes.byref(version))
    if error:
        raise RuntimeError(f"cuDriverGetVersion: CUDA error {error}")
    return str(version.value)


@functools.cache
def source_hash(sources: tuple[str, ...]) -> str:
    """Hash of source files without comments, docstrings and layout, so that prose does not void a measurement."""
    digest = hashlib.sha256()
    for source in sorted(sources):
        digest.update(_normalised(source).encode())
    return digest.hexdigest()[:16]


def _normalised(source: str) -> str:
    """The part of a source file's text that decides what runs on a GPU."""
    text = Path(source).read_text(encoding="utf-8")
    if source.endswith(".py"):
        return ast.dump(_without_docstrings(ast.parse(text)))
    if source.endswith("_build.json"):  # what it records of the CPU kernels does not run on a GPU
        return json.dumps(
            {key: value for key, value in json.loads(text).items() if not key.startswith("cpu")}
        )
    return text


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and _is_constant(body[0]):
            body.pop(0)
    return tree


def _is_constant(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


# ---------------------------------------------------------------- writing


def update(
    gpu: str, edit: Callable[[dict[str, dict[str, Any]]], None], folder: Path | None = None
) -> Path:
    """Let ``edit`` change the sections of a GPU's file in ``folder`` (default: the user's), and write the file.

    A lock is held from reading to writing, so two processes lose none of each other's entries. The file is replaced in
    one step: a reader sees the old file or the new one, and a killed process leaves the old one.
    """
    path = (folder or user_folder()) / file_name(gpu)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_suffix(".lock")):
        sections = read(path, gpu)
        edit(sections)
        text = json.dumps(
            {"gpu": gpu, **sections}, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False
        )
        with replacing(path) as part:
            part.write_text(text + "\n", encoding="utf-8")
    load.cache_clear()
    return path


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an advisory lock, which the system drops when the process dies."""
    import fcntl  # POSIX only, as are the GPUs that get tuned

    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
