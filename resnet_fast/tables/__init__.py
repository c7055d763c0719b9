"""Measured choices: one JSON file for each GPU model, written by ``autotune``, read by ``dispatch``.

A file is ``{"gpu": name, "entries": {problem key: entry}}``; an entry keeps kernel, time_us, spread, error, eager_error, versions and
the normalised source hash of its kernel. An entry counts only while kernel source and versions are those it was verified with;
``stale`` tells why not. Files are looked for beside this one and, first, in ``RESNET_FAST_TABLES`` (default ``~/.cache/resnet_fast``).
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import os
from pathlib import Path

import torch

from ..problem import Problem

SHIPPED = Path(__file__).parent


def user_folder() -> Path:
    """Where this user's own measurements live."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("RESNET_FAST_TABLES") or Path(cache) / "resnet_fast")


def gpu_name(device: int | None = None) -> str:
    """The GPU model as the driver names it, for example "NVIDIA H200"."""
    return torch.cuda.get_device_name(device)


def file_name(gpu: str) -> str:
    return gpu.lower().replace(" ", "-").replace("/", "-") + ".json"


@functools.cache
def load(gpu: str) -> dict[str, dict]:
    """All entries for a GPU model; the user's own override the shipped ones. Cached: ``load.cache_clear()`` after writing."""
    entries: dict[str, dict] = {}
    for folder in (SHIPPED, user_folder()):
        path = folder / file_name(gpu)
        if path.is_file():
            data = json.loads(path.read_text())
            if data["gpu"] == gpu:
                entries.update(data["entries"])
    return entries


def lookup(problem: Problem) -> dict | None:
    """The entry that may be used for this problem on the current GPU, or None."""
    entry = load(gpu_name()).get(problem.key)
    return None if entry is None or stale(entry) else entry


def stale(entry: dict) -> str | None:
    """Why an entry must be verified again before use, or None if it stands."""
    from ..dispatch import find  # a table names kernels; only a check needs the registry
    try:
        kernel = find(entry["kernel"])
    except LookupError as error:
        return str(error)
    if entry["source"] != source_hash(kernel.sources):
        return f"the source of {entry['kernel']} changed since it was measured"
    if entry["versions"] != versions():
        return f"measured with {entry['versions']}, running {versions()}: verify again with `python -m resnet_fast tune`"
    return None


@functools.cache
def versions() -> dict[str, str]:
    """What a measurement depends on besides the GPU and the source."""
    from importlib.metadata import PackageNotFoundError, version
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    driver = str(torch._C._cuda_getDriverVersion()) if torch.cuda.is_available() else "none"
    return {"torch": torch.__version__, "triton": triton, "driver": driver}


@functools.cache
def source_hash(sources: tuple[str, ...]) -> str:
    """Hash of source files without comments, docstrings and layout, so that prose does not void a measurement."""
    digest = hashlib.sha256()
    for source in sorted(sources):
        text = Path(source).read_text()
        if source.endswith(".py"):
            tree = ast.parse(text)
            for node in ast.walk(tree):
                body = getattr(node, "body", None)
                if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
                    body.pop(0)
            text = ast.dump(tree)
        digest.update(text.encode())
    return digest.hexdigest()[:16]
