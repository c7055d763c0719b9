"""Which groups made a network faster as a whole: written by ``plan_tuning`` into the GPU's table, read by ``plan`` in later processes.

A choice holds for the same network (its steps and their wiring, whatever the weights), input shape, dtype and way to run, on the same GPU
model, as long as versions are the same and so is the source of every kernel that ran the network then. A stale one is not used and says why.
"""

from __future__ import annotations

import hashlib
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from ..dispatch import tables
from ..dispatch.problem import ACROSS
from ..dispatch.registry import kernels
from ..graph.ir import references

if TYPE_CHECKING:
    from ..planning.plan import Plan

DEVICE = "cuda"  # what is tuned
SECTION = "networks"
TIES = "aten.conv_bn_act"  # what a plan falls back on counts among its kernels, so that no choice is free of source and versions


class Remembered(NamedTuple):
    """The groups to use and a sentence for each decision; ``settled``: nothing was left to be tried, by any kernel that can run here now."""

    across: tuple[str, ...]
    notes: tuple[str, ...]
    settled: bool


def key(plan: Plan, example: Tensor) -> str:
    """The network, its input and how it is run, in one line; module names count, for groups are named by them."""
    lowered = plan._plain
    number: dict[str, int] = {}
    for name in (*lowered.inputs, *(step.output for step in lowered.steps)):
        number.setdefault(name, len(number))
    digest = hashlib.sha256()
    for step in lowered.steps:
        f = lowered.filters.get(step.output)
        what = (step.target, tuple(f.weight.shape), f.geometry) if f else step.target.rpartition(".")[2]
        digest.update(repr((step.op, what, [number[name] for name in references(step)], step.act)).encode())
    parts = [str(plan.dtype).removeprefix("torch."), "x".join(map(str, example.shape))]
    parts += ["bytes"] if plan.normalize is not None else []
    return " ".join([*parts, "steps" if plan.cuda_graph is False else "graph", digest.hexdigest()[:16]])


def find(plan: Plan, example: Tensor, gpu: str) -> Remembered | None:
    """What this GPU's tables say of the network; None if nothing. Of a choice that is stale no groups, and why."""
    name, why = key(plan, example), None
    for sections in tables.load(gpu):
        record = sections[SECTION].get(name)
        if record is not None:
            why = _stale(record)
            if why is None:
                first = f"across: as measured on {gpu} on {record['date']}"
                return Remembered(
                    tuple(record["across"]),
                    (first, *record["notes"]),
                    record["complete"] and record["candidates"] == candidates(),
                )
    if why is None:
        return None
    return Remembered(
        (),
        (f"across: the groups that were found to pay are not used, measure them again with tune=True: {why}",),
        False,
    )


def keep(gpu: str, plan: Plan, example: Tensor, complete: bool) -> Path:
    """Write the plan's groups and notes into the GPU's table; its kernels on this input are those that the choice stands on."""
    ran = {id for line in plan.explain(example) for id in line.kernel.split(" + ") if "." in id}
    sources = {k.id: tables.source_hash(k.sources) for k in kernels() if k.id in {TIES, *ran}}
    record = {
        "across": list(plan.across),
        "notes": list(plan.notes),
        "complete": complete,
        "sources": sources,
        "versions": tables.versions(),
        "candidates": candidates(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }
    return tables.update(gpu, lambda sections: sections[SECTION].__setitem__(key(plan, example), record))


def candidates() -> str:
    """Hash of every kernel that can run here and that a plan may choose: another one makes it worth while to search again."""
    digest = hashlib.sha256()
    for kernel in sorted((k for op in ("conv_bn_act", *ACROSS) for k in kernels(op)), key=lambda k: k.id):
        if kernel.available() is None:
            digest.update(f"{kernel.id} {tables.source_hash(kernel.sources)}\n".encode())
    return digest.hexdigest()[:16]


def _stale(record: dict) -> str | None:
    whys = (
        tables.stale({"kernel": id, "source": source, "versions": record["versions"]})
        for id, source in record["sources"].items()
    )
    return next(filter(None, whys), None)
