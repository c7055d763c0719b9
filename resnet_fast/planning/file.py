"""The file format of plans: steps and weights as plain data, versioned.

Files are read with ``weights_only=True``, and a step may call only the functions that are named here, so that loading
runs no foreign code.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from ..graph.across import checked_names
from ..graph.facts import function
from ..graph.functional import attributes
from ..graph.ir import Attribute, Step, Value, names, references
from ..graph.network import Lowered
from ..graph.weights import FoldedConv
from ..util.files import replacing
from ..util.machine import DTYPES
from .request import Options

VERSION = 2
# A name in a file is looked up and called, so only these may be named: everything in three namespaces except
# what is unsafe there, and these functions of torch.
_SAFE_NAMESPACES = ("Tensor", "torch.nn.functional", "operator")
_SAFE_TORCH = {
    f"torch.{name}"
    for name in (
        "flatten relu add sub mul div mean sum sigmoid tanh cat stack split chunk squeeze unsqueeze reshape softmax "
        "transpose permute matmul conv2d _assert"
    ).split()
}
_UNSAFE = {
    f"operator.{name}"
    for name in (
        "attrgetter methodcaller call itemgetter setitem delitem iadd iand iconcat ifloordiv ilshift imatmul imod imul "
        "ior ipow irshift isub itruediv ixor"
    ).split()
}
_SAFE_ATTRIBUTES = {"shape", "ndim", "dtype", "device"}

# ---------------------------------------------------------------- writing


def write(path: str | Path, record: dict[str, Any]) -> None:
    """Write a record to a file, completely or not at all."""
    with replacing(Path(path)) as part:
        torch.save(record, part)


def record(lowered: Lowered, options: Options) -> dict[str, Any]:
    """Return a plan as plain data. Raises ValueError naming the modules and functions that cannot be saved."""
    code = [step.target for step in lowered.steps if not _is_safe(step)]
    if code:
        raise ValueError(f"plan: cannot be saved: {', '.join(code)} would have to travel as code")
    return {
        "resnet_fast_plan": VERSION,
        "steps": [_step_record(step) for step in lowered.steps],
        "inputs": list(lowered.inputs),
        "output": _encode(lowered.output),
        "tensors": dict(lowered.tensors),
        "filters": {output: _filter_record(conv) for output, conv in lowered.filters.items()},
        "dtype": str(options.dtype).removeprefix("torch."),
        "normalize": _encode(options.normalize),
        "softmax": options.softmax,
        "topk": options.topk,
        "across": list(options.across),
    }


def _step_record(step: Step) -> dict[str, Any]:
    values = {}
    for field in fields(step):
        values[field.name] = getattr(step, field.name)
    record: dict[str, Any] = _encode(values)
    return record


def _filter_record(conv: FoldedConv) -> dict[str, Any]:
    return {
        "weight": conv.weight,
        "bias": conv.bias,
        "geometry": [_encode(part) for part in conv.geometry],
    }


def _encode(value: Any) -> Any:
    """Return a nested value in plain containers.

    References become {"value": name} and {"attribute": path}; tuples, slices and dicts {"tuple": […]} and so on.
    """
    if isinstance(value, Value):
        return {"value": value.name}
    if isinstance(value, Attribute):
        return {"attribute": value.path}
    if isinstance(value, tuple):
        return {"tuple": [_encode(part) for part in value]}
    if isinstance(value, list):
        return [_encode(part) for part in value]
    if isinstance(value, dict):
        return {"dict": {key: _encode(part) for key, part in value.items()}}
    if isinstance(value, slice):
        return {"slice": [_encode(part) for part in (value.start, value.stop, value.step)]}
    if value is Ellipsis:
        return {"ellipsis": True}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"plan: cannot be saved: a step holds a {type(value).__name__}")


# ---------------------------------------------------------------- reading


def read(path: str | Path) -> Any:
    """Return the record in a file. Raises ValueError for a file that is not a plan or is damaged."""
    with open(path, "rb") as file:  # a path that cannot be read is an OSError
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as problem:  # torch's reader and its safe unpickler raise anything for foreign or torn files
            raise ValueError(
                f"plan: {path}: not a plan, or damaged ({type(problem).__name__})"
            ) from problem


def restored(record: Any, path: str = "a pickle") -> tuple[Lowered, Options]:
    """Return the network, on the CPU, and the options of a record that was read from ``path``.

    Raises ValueError for a record that is not a plan, has another version, is damaged or names a function that no
    plan calls.
    """
    version = record.get("resnet_fast_plan") if isinstance(record, dict) else None
    if version is None:
        raise ValueError(f"plan: {path}: not a plan: Plan.save writes them")
    if version != VERSION:
        raise ValueError(
            f"plan: {path}: got version {version}, expected {VERSION}: make and save the plan anew"
        )
    try:
        lowered = _restored_network(record)
        options = _restored_options(record)
        invalid = _why_invalid(lowered)
    except (LookupError, TypeError, ValueError, AttributeError) as problem:
        raise ValueError(
            f"plan: {path}: damaged ({type(problem).__name__}: {problem})"
        ) from problem
    if invalid is not None:
        raise ValueError(f"plan: {path}: {invalid}")
    return lowered, options


def _restored_network(record: dict[str, Any]) -> Lowered:
    """Return the network of a record; its weights are shared with other plans that hold the same values."""
    steps = [Step(**_decode(step)) for step in record["steps"]]
    filters = {output: _restored_filter(conv) for output, conv in record["filters"].items()}
    lowered = Lowered(
        steps=tuple(steps),
        inputs=tuple(record["inputs"]),
        output=_decode(record["output"]),
        filters=filters,
        tensors=record["tensors"],
        modules={},
    )
    return lowered.shared()


def _restored_options(record: dict[str, Any]) -> Options:
    return Options(
        dtype=DTYPES[record["dtype"]],
        normalize=_decode(record["normalize"]),
        softmax=record["softmax"],
        topk=record["topk"],
        across=checked_names(record["across"]),
    )


def _restored_filter(record: dict[str, Any]) -> FoldedConv:
    """Return one convolution's filter; raises ValueError for shapes that a kernel would not check."""
    weight, bias = record["weight"], record["bias"]
    geometry = tuple(_decode(part) for part in record["geometry"])
    fits = (
        weight.dim() == 4
        and weight.is_floating_point()
        and bias.shape == weight.shape[:1]
        and bias.dtype == weight.dtype
    )
    if not fits:
        raise ValueError(
            f"weight {list(weight.shape)} and bias {list(bias.shape)} of no convolution"
        )
    if len(geometry) != 4 or not _is_geometry(geometry, len(weight)):
        raise ValueError(f"geometry {geometry} of no convolution")
    return FoldedConv(weight.contiguous(memory_format=torch.channels_last), bias, geometry)


def _is_geometry(geometry: tuple[Any, ...], filters: int) -> bool:
    """Whether these are (stride, padding, dilation, groups) of a convolution with so many filters."""
    stride, padding, dilation, groups = geometry
    if groups < 1 or filters % groups:
        return False
    for pair, least in ((stride, 1), (padding, 0), (dilation, 1)):
        if len(pair) != 2 or min(pair) < least:
            return False
    return True


def _decode(value: Any) -> Any:
    """Return the nested value that :func:`_encode` wrote."""
    if isinstance(value, list):
        return [_decode(part) for part in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "value":
        return Value(content)
    if kind == "attribute":
        return Attribute(content)
    if kind == "tuple":
        return tuple(_decode(part) for part in content)
    if kind == "slice":
        return slice(*(_decode(part) for part in content))
    if kind == "ellipsis":
        return Ellipsis
    return {key: _decode(part) for key, part in content.items()}


# ---------------------------------------------------------------- checking


def _why_invalid(lowered: Lowered) -> str | None:
    """Return which step calls a function that it may not call, or reads a value that is absent; None if none does."""
    available = set(lowered.inputs)
    if len(available) != 1:
        return f"got {len(available)} inputs, expected one"
    for step in lowered.steps:
        if not _is_safe(step):
            return f"step {step.output} wants to call {step.target}, which no saved plan does"
        absent = _absent_reads(step, lowered, available)
        if absent:
            return f"step {step.output} reads {min(absent)}, which is not there"
        available.add(step.output)
    absent_values = set(names(lowered.output)) - available
    absent_tensors = set(attributes(lowered.output)) - lowered.tensors.keys()
    absent = absent_values or absent_tensors
    if absent:
        return f"the answer is {min(absent)}, which is not there"
    return None


def _absent_reads(step: Step, lowered: Lowered, available: set[str]) -> set[str]:
    """The values, tensors or filters that a step reads and that are not there."""
    values = set(references(step)) - available
    if values:
        return values
    tensors = set(attributes((step.args, step.kwargs))) - lowered.tensors.keys()
    if tensors or step.op != "conv_bn_act":
        return tensors
    return {step.output} - lowered.filters.keys()


def _is_safe(step: Step) -> bool:
    """Whether a file may hold this step: a fused op, or a function that is named above."""
    if step.op in ("conv_bn_act", "add_act"):
        return True
    name = step.target
    if name == "builtins.getattr":
        return (
            len(step.args) == 2
            and isinstance(step.args[0], Value)
            and step.args[1] in _SAFE_ATTRIBUTES
        )
    if step.op != "function":
        return False
    return (name in _SAFE_TORCH or _is_in_safe_namespace(name)) and callable(function(name))


def _is_in_safe_namespace(name: str) -> bool:
    """Whether a namespace has this function, and it neither is private nor writes to what it is given."""
    namespace, _, short = name.rpartition(".")
    if namespace not in _SAFE_NAMESPACES or name in _UNSAFE:
        return False
    is_private = short.startswith("_")
    # might write to weights that other plans share
    writes = short.endswith("_") and namespace != "operator"
    return not is_private and not writes
