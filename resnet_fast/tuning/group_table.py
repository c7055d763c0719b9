"""The stored choices of groups: which groups made a whole network faster, in the GPU's table.

``groups`` writes a choice; later plans, in any process, read it. A choice holds for the same network (its steps and how
they are connected, for any weights), input shape, dtype and way to run, on the same GPU model, as long as the versions
and the source of every kernel that ran the network are the same. A stale choice is not used, and its note says why.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..dispatch import tables
from ..dispatch.problem import ACROSS
from ..dispatch.registry import Kernel, kernels
from ..graph.ir import Step, references

if TYPE_CHECKING:
    from ..graph.across import Normalize
    from ..graph.network import Lowered

DEVICE = "cuda"  # the type of device that is tuned
SECTION = "networks"
# A plan falls back on this kernel, so it counts among those that ran: every choice depends on some source and version.
FALLBACK = "aten.conv_bn_act"


class NetworkCase(NamedTuple):
    """What a choice of groups holds for: a network without groups, its input shape and how a plan runs it."""

    lowered: Lowered
    dtype: torch.dtype
    normalize: Normalize | None
    cuda_graph: bool | None
    shape: tuple[int, ...]


class GroupChoice(NamedTuple):
    """The groups to use, and a sentence for each decision.

    ``settled``: nothing was left untried, with any kernel that can run here now.
    """

    across: tuple[str, ...]
    notes: tuple[str, ...]
    settled: bool


def key(case: NetworkCase) -> str:
    """Return the network, its input and how it runs as one line. Names of modules count, since they name groups."""
    parts = [
        str(case.dtype).removeprefix("torch."),
        "x".join(map(str, case.shape)),
    ]
    if case.normalize is not None:
        parts.append("bytes")
    parts.append("steps" if case.cuda_graph is False else "graph")
    parts.append(_network_hash(case.lowered))
    return " ".join(parts)


def _network_hash(lowered: Lowered) -> str:
    """Hash of the steps and how they are connected, without weights and without the names of values."""
    number: dict[str, int] = {}
    outputs = [step.output for step in lowered.steps]
    for name in [*lowered.inputs, *outputs]:
        number.setdefault(name, len(number))
    digest = hashlib.sha256()
    for step in lowered.steps:
        reads = [number[name] for name in references(step)]
        identity = (step.op, _computation(lowered, step), reads, step.act)
        digest.update(repr(identity).encode())
    return digest.hexdigest()[:16]


def _computation(lowered: Lowered, step: Step) -> object:
    """The module, filter size and geometry of a convolution; of another step the last part of its target."""
    conv = lowered.filters.get(step.output)
    if conv is None:
        return step.target.rpartition(".")[2]
    return step.target, tuple(conv.weight.shape), conv.geometry


def lookup(case: NetworkCase, gpu: str) -> GroupChoice | None:
    """Return the choice in this GPU's tables, or None; of a stale choice no groups and the reason."""
    name, why_stale = key(case), None
    for sections in tables.load(gpu):
        record = sections[SECTION].get(name)
        if record is None:
            continue
        why_stale = _why_stale(record)
        if why_stale is None:
            return _choice(record, gpu)
    if why_stale is None:
        return None
    note = f"across: the groups that were found to pay are not used, measure them again with tune=True: {why_stale}"
    return GroupChoice((), (note,), False)


def _choice(record: dict, gpu: str) -> GroupChoice:
    """Return a stored choice; a first note says where it comes from."""
    source = f"across: as measured on {gpu} on {record['date']}"
    return GroupChoice(
        across=tuple(record["across"]),
        notes=(source, *record["notes"]),
        settled=record["complete"] and record["candidates"] == candidates(),
    )


def _why_stale(record: dict) -> str | None:
    """Return what changed in a kernel that the choice depends on, or None."""
    for id, source in record["sources"].items():
        why = tables.stale({"kernel": id, "source": source, "versions": record["versions"]})
        if why is not None:
            return why
    return None


def store(case: NetworkCase, gpu: str, choice: GroupChoice, ran: Iterable[str]) -> Path:
    """Write a choice into the GPU's table; ``ran`` are the ids of the kernels that ran the network with it."""
    depends_on = {FALLBACK, *ran}
    record = {
        "across": list(choice.across),
        "notes": list(choice.notes),
        "complete": choice.settled,
        "sources": {k.id: tables.source_hash(k.sources) for k in kernels() if k.id in depends_on},
        "versions": tables.versions(),
        "candidates": candidates(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }
    return tables.update(gpu, lambda sections: sections[SECTION].__setitem__(key(case), record))


def candidates() -> str:
    """Hash of every kernel that a plan may choose and that can run here: with a new one a new search is worthwhile."""
    found: dict[str, Kernel] = {}
    for op in ("conv_bn_act", *ACROSS):
        found |= {kernel.id: kernel for kernel in kernels(op)}
    digest = hashlib.sha256()
    for id, kernel in sorted(found.items()):
        if kernel.available() is not None:
            continue
        source = tables.source_hash(kernel.sources)
        digest.update(f"{id} {source}\n".encode())
    return digest.hexdigest()[:16]
