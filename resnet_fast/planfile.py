"""A plan in a file: schedule and weights as plain data, versioned, read with ``weights_only``: loading runs nobody's code."""

from __future__ import annotations

import os
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from .nodes import function
from .planned import Filter, Lowered
from .planning import Plan
from .schedule import Attribute, Step, Value

VERSION = 1
# A file may name these functions and no others: a name is looked up and called.
_SAFE = ("Tensor.", "torch.nn.functional.", "operator.")
_SAFE_TORCH = {f"torch.{name}" for name in (
    "flatten", "relu", "add", "mul", "mean", "sum", "sigmoid", "tanh", "cat", "squeeze", "unsqueeze", "reshape", "softmax", "transpose",
    "permute", "matmul", "_assert")}
_UNSAFE = {"operator.attrgetter", "operator.methodcaller", "operator.call", "operator.itemgetter"}
_SAFE_ATTRIBUTES = {"shape", "ndim", "dtype", "device"}


def save(plan: Plan, path: str | Path) -> None:
    """Write whole or not at all. Raises ValueError naming the modules and functions that are not plain data."""
    held = plan._lowered
    code = [step.target for step in held.steps if not _is_safe(step)]
    if code:
        raise ValueError(f"plan: cannot be saved: {', '.join(code)} would have to travel as code")
    record = {
        "resnet_fast_plan": VERSION, "steps": [_encode({f.name: getattr(step, f.name) for f in fields(step)}) for step in held.steps],
        "inputs": list(held.inputs), "output": _encode(held.output), "tensors": dict(held.tensors),
        "filters": {k: {"weight": f.weight, "bias": f.bias, "geometry": list(map(_encode, f.geometry))} for k, f in held.filters.items()},
        "dtype": str(plan.dtype).removeprefix("torch."), "normalize": _encode(plan.normalize), "softmax": plan.softmax, "topk": plan.topk,
    }
    path = Path(path)
    part = tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False)  # noqa: SIM115
    try:
        with part:
            torch.save(record, part)
        os.replace(part.name, path)
    except BaseException:
        os.unlink(part.name)
        raise


def load(path: str | Path, device: torch.device | str, cuda_graph: bool | None) -> Plan:
    """The plan in a file, on a device. Raises ValueError for what is no plan, another version, or names a function no plan calls."""
    record = torch.load(path, map_location=device, weights_only=True)
    version = record.get("resnet_fast_plan") if isinstance(record, dict) else None
    if version != VERSION:
        raise ValueError(f"plan: {path}: got version {version}, expected {VERSION}: make and save the plan anew")
    steps = tuple(Step(**_decode(step)) for step in record["steps"])
    for step in steps:
        if not _is_safe(step):
            raise ValueError(f"plan: {path}: step {step.output} wants to call {step.target}, which no saved plan does")
    filters = {k: Filter(f["weight"], f["bias"], tuple(map(_decode, f["geometry"]))) for k, f in record["filters"].items()}
    lowered = Lowered(steps, tuple(record["inputs"]), _decode(record["output"]), filters, record["tensors"], {})
    return Plan(lowered, getattr(torch, record["dtype"]), torch.device(device), cuda_graph=cuda_graph,
                normalize=_decode(record["normalize"]), softmax=record["softmax"], topk=record["topk"])


def _is_safe(step: Step) -> bool:
    if step.op in ("conv_bn_act", "add_act"):
        return True
    name = step.target
    if name == "builtins.getattr":
        return len(step.args) == 2 and isinstance(step.args[0], Value) and step.args[1] in _SAFE_ATTRIBUTES
    if step.op != "function" or name in _UNSAFE or "__" in name:
        return False
    return (name.startswith(_SAFE) or name in _SAFE_TORCH) and callable(function(name))


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
    (kind, held), = value.items()
    if kind in ("value", "attribute"):
        return Value(held) if kind == "value" else Attribute(held)
    if kind == "tuple":
        return tuple(map(_decode, held))
    if kind == "slice":
        return slice(*map(_decode, held))
    return Ellipsis if kind == "ellipsis" else {k: _decode(v) for k, v in held.items()}
