"""The loader of ``resnet_fast._cpu``, the C++ kernels of ``csrc/cpu``, and what the library says of this processor.

Importing this module loads no library: the first question does.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch

BUILD = "pip install --force-reinstall --no-deps -v . (in the source folder, with a C++ compiler)"
PACKAGE = Path(__file__).parents[1]
RECORD = PACKAGE / "_build.json"
# As csrc/cpu/library.cpp defines its ops. They identify a library that was built before an op was edited.
SCHEMAS = {
    "panel": "() -> int",
    "takes_bf16": "() -> bool",
    "onednn_has_amx": "() -> bool",
    "instructions": "() -> str",
    "same_bytes": "(Tensor places) -> bool",
    "winograd_filters": "(Tensor weight) -> Tensor",
    "winograd": "(Tensor x, Tensor filters, Tensor bias, Tensor? residual, Tensor(a!) out, bool relu) -> bool",
    "conv_filters": "(Tensor weight) -> Tensor",
    "conv": (
        "(Tensor x, Tensor filters, Tensor bias, Tensor? residual, Tensor(a!) out, int[2] size, int stride, "
        "int padding, bool relu) -> ()"
    ),
    "bn_act": (
        "(Tensor x, Tensor weight, Tensor bias, Tensor? residual, Tensor(a!) y, Tensor(b!) mean, Tensor(c!) var, "
        "float eps, bool relu) -> ()"
    ),
    "bn_act_backward": (
        "(Tensor dy, Tensor x, Tensor y, Tensor weight, Tensor mean, Tensor var, Tensor(a!) dx, Tensor(b!) dweight, "
        "Tensor(c!) dbias, Tensor(d!)? dresidual, float eps, bool relu) -> ()"
    ),
}


@functools.cache
def available() -> str | None:
    """Why the CPU kernels cannot run here, or None; loads the library."""
    libraries = PACKAGE.glob("_cpu.*.so")  # one for each Python in a source folder
    library = max(libraries, key=lambda path: path.stat().st_mtime, default=None)
    if library is None:
        return f"the CPU kernels are not built ({_why_not_built()}): {BUILD}"
    try:
        torch.ops.load_library(str(library))
    except OSError as problem:
        return (
            f"{library.name} cannot be loaded with torch {torch.__version__} ({problem}): {BUILD}"
        )
    if _loaded_schemas() != [
        f"resnet_fast_cpu::{op}{signature}" for op, signature in SCHEMAS.items()
    ]:
        return f"{library.name} was built from other sources than this package's: {BUILD}"
    if instructions() == "none":
        return "this processor has neither AVX-512 nor AVX2, or ATEN_CPU_CAPABILITY forbids them"
    return None


def _why_not_built() -> str:
    record = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    if record.get("cpu") == "built":
        return f"_cpu was built, but is not in {PACKAGE}"
    return record.get("cpu_why", "no build record")


def _loaded_schemas() -> list[str]:
    schemas: list[str] = []
    for op in SCHEMAS:
        schemas += map(str, torch._C._jit_get_schemas_for_operator(f"resnet_fast_cpu::{op}"))
    return schemas


def instructions() -> str:
    """The instruction set that the kernels use on this processor: "AVX-512", "AVX2" or "none"."""
    return torch.ops.resnet_fast_cpu.instructions()


def onednn_has_amx() -> bool:
    """Whether oneDNN multiplies bfloat16 with AMX tiles here (Intel's Sapphire Rapids and later).

    None of the CPU kernels uses AMX.
    """
    return torch.ops.resnet_fast_cpu.onednn_has_amx()
