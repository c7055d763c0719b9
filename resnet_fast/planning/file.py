"""A plan in a file: schedule and weights as plain data, versioned, read with ``weights_only``: loading runs nobody's code."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from ..graph.across import known
from ..graph.facts import function
from ..graph.functional import attributes
from ..graph.ir import Attribute, Step, Value, names, references
from ..graph.network import Lowered
from ..graph.weights import Filter
from ..util.files import replacing
from ..util.machine import DTYPES
from .plan import Plan
from .request import place

VERSION = 2
# A file may name these functions and no others: a name is looked up and called.
_SAFE = ("Tensor", "torch.nn.functional", "operator")
_SAFE_TORCH = {
    f"torch.{name}"
    for name in (
        "flatten",
        "relu",
        "add",
        "sub",
        "mul",
        "div",
        "mean",
        "sum",
        "sigmoid",
        "tanh",
        "cat",
        "stack",
        "split",
        "chunk",
        "squeeze",
        "unsqueeze",
        "reshape",
        "softmax",
        "transpose",
        "permute",
        "matmul",
        "conv2d",
        "_assert",
    )
}
_UNSAFE = {
    f"operator.{name}"
    for name in (
        "attrgetter",
        "methodcaller",
        "call",
        "itemgetter",
        "setitem",
        "delitem",
        "iadd",
        "iand",
        "iconcat",
        "ifloordiv",
        "ilshift",
        "imatmul",
        "imod",
        "imul",
        "ior",
        "ipow",
        "irshift",
        "isub",
        "itruediv",
        "ixor",
    )
}
_SAFE_ATTRIBUTES = {"shape", "ndim", "dtype", "device"}


def save(plan: Plan, path: str | Path) -> None:
    """Write whole or not at all. Raises ValueError naming the modules and functions that are not plain data."""
    found = record(plan)
    with replacing(Path(path)) as part:
        torch.save(found, part)


def record(plan: Plan) -> dict[str, Any]:
    """The plan as plain data. Raises ValueError naming the modules and functions that are none."""
    held = plan._plain
    code = [step.target for step in held.steps if not _is_safe(step)]
    if code:
        raise ValueError(f"plan: cannot be saved: {', '.join(code)} would have to travel as code")
    return {
        "resnet_fast_plan": VERSION,
        "steps": [_encode({f.name: getattr(step, f.name) for f in fields(step)}) for step in held.steps],
        "inputs": list(held.inputs),
        "output": _encode(held.output),
        "tensors": dict(held.tensors),
        "filters": {
            k: {"weight": f.weight, "bias": f.bias, "geometry": list(map(_encode, f.geometry))}
            for k, f in held.filters.items()
        },
        "dtype": str(plan.dtype).removeprefix("torch."),
        "normalize": _encode(plan.normalize),
        "softmax": plan.softmax,
        "topk": plan.topk,
        "across": list(plan.across),
    }


def load(path: str | Path, device: torch.device | str, cuda_graph: bool | None) -> Plan:
    """The plan in a file, on a device. Raises ValueError for what is no plan, another version's, damaged or names a function no plan calls,
    and for a device that this machine has not.
    """
    with open(path, "rb") as file:  # a path that cannot be read is an OSError
        try:
            record = torch.load(file, map_location="cpu", weights_only=True)
        except (
            Exception
        ) as problem:  # a foreign or torn file makes torch's reader and its safe unpickler raise anything
            raise ValueError(f"plan: {path}: not a plan, or damaged ({type(problem).__name__})") from problem
    return restored(record, device, cuda_graph, str(path))


def restored(record: Any, device: torch.device | str, cuda_graph: bool | None, path: str = "a pickle") -> Plan:
    """The plan of a record that came from ``path``; raises as ``load`` does."""
    version = record.get("resnet_fast_plan") if isinstance(record, dict) else None
    if version is None:
        raise ValueError(f"plan: {path}: not a plan: Plan.save writes them")
    if version != VERSION:
        raise ValueError(f"plan: {path}: got version {version}, expected {VERSION}: make and save the plan anew")
    device = place(device)
    try:
        steps = tuple(Step(**_decode(step)) for step in record["steps"])
        filters = {k: _filter(f) for k, f in record["filters"].items()}
        lowered = Lowered(
            steps, tuple(record["inputs"]), _decode(record["output"]), filters, record["tensors"], {}
        ).shared()
        dtype, ends = (
            DTYPES[record["dtype"]],
            {"normalize": _decode(record["normalize"]), "softmax": record["softmax"], "topk": record["topk"]},
        )
        across = known(record["across"])
        wrong = _wrong(lowered)
    except (LookupError, TypeError, ValueError, AttributeError) as problem:
        raise ValueError(f"plan: {path}: damaged ({type(problem).__name__}: {problem})") from problem
    if wrong is not None:
        raise ValueError(f"plan: {path}: {wrong}")
    return Plan(
        lowered if device.type == "cpu" else lowered.to(device),
        dtype,
        device,
        cuda_graph=cuda_graph,
        across=across,
        **ends,
    )


def _filter(record: dict[str, Any]) -> Filter:
    """One convolution's; raises ValueError for shapes that a kernel would take on trust."""
    weight, bias, geometry = record["weight"], record["bias"], tuple(map(_decode, record["geometry"]))
    pairs, groups = geometry[:3], geometry[3]
    if (
        weight.dim() != 4
        or bias.shape != weight.shape[:1]
        or weight.dtype != bias.dtype
        or not weight.is_floating_point()
    ):
        raise ValueError(f"weight {list(weight.shape)} and bias {list(bias.shape)} of no convolution")
    least = 1, 0, 1  # of stride, padding, dilation
    if (
        len(geometry) != 4
        or any(len(p) != 2 or min(p) < n for p, n in zip(pairs, least, strict=True))
        or groups < 1
        or len(weight) % groups
    ):
        raise ValueError(f"geometry {geometry} of no convolution")
    return Filter(weight.contiguous(memory_format=torch.channels_last), bias, geometry)


def _wrong(lowered: Lowered) -> str | None:
    """What a step calls, or reads, that it may not; None if all is well."""
    known = set(lowered.inputs)
    if len(known) != 1:
        return f"got {len(known)} inputs, expected one"
    for step in lowered.steps:
        if not _is_safe(step):
            return f"step {step.output} wants to call {step.target}, which no saved plan does"
        absent = (
            set(references(step)) - known
            or set(attributes((step.args, step.kwargs))) - lowered.tensors.keys()
            or ({step.output} - lowered.filters.keys() if step.op == "conv_bn_act" else set())
        )
        if absent:
            return f"step {step.output} reads {min(absent)}, which is not there"
        known.add(step.output)
    absent = set(names(lowered.output)) - known or set(attributes(lowered.output)) - lowered.tensors.keys()
    return f"the answer is {min(absent)}, which is not there" if absent else None


def _is_safe(step: Step) -> bool:
    if step.op in ("conv_bn_act", "add_act"):
        return True
    name = step.target
    if name == "builtins.getattr":
        return len(step.args) == 2 and isinstance(step.args[0], Value) and step.args[1] in _SAFE_ATTRIBUTES
    space, _, short = name.rpartition(".")
    writes = short.endswith("_") and space != "operator"  # into weights that other plans share
    if step.op != "function" or name in _UNSAFE or writes or short.startswith("_") and name not in _SAFE_TORCH:
        return False
    return (space in _SAFE or name in _SAFE_TORCH) and callable(function(name))


def _encode(value: Any) -> Any:
    """Plain containers: {"value": name}, {"attribute": path}, {"tuple": […]}, {"dict": {…}}, lists, numbers, strings."""
    if isinstance(value, Value):
        return {"value": value.name}
    if isinstance(value, Attribute):
        return {"attribute": value.path}
    if isinstance(value, tuple):
        return {"tuple": list(map(_encode, value))}
    if isinstance(value, list):
        return list(map(_encode, value))
    if isinstance(value, dict):
        return {"dict": {k: _encode(v) for k, v in value.items()}}
    if isinstance(value, slice):
        return {"slice": [_encode(value.start), _encode(value.stop), _encode(value.step)]}
    if value is None or value is Ellipsis or isinstance(value, (bool, int, float, str)):
        return {"ellipsis": True} if value is Ellipsis else value
    raise ValueError(f"plan: cannot be saved: a step holds a {type(value).__name__}")


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return list(map(_decode, value))
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    if kind in ("value", "attribute"):
        return Value(held) if kind == "value" else Attribute(held)
    if kind == "tuple":
        return tuple(map(_decode, held))
    if kind == "slice":
        return slice(*map(_decode, held))
    return Ellipsis if kind == "ellipsis" else {k: _decode(v) for k, v in held.items()}
