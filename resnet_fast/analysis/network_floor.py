"""Floors of a network: how fast a GPU could run it, given its ceilings and what each kernel must move.

A network's floor is the sum over its kernels, launches free and L2 ignored (its bandwidth is unmeasured). What a kernel
moves is in ``network_cost`` and ``training_cost``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from ..graph.across import ORDER, checked_names
from ..models.problems import AcrossLayer, across_layers, conv_layers
from ..roofline.chips import FLOATING, Ceilings, ceilings
from ..roofline.cost import Cost, problem_step
from ..roofline.floor import Floor, floor, predict, problem_floor
from ..util import text
from .network_cost import INFERENCE, network
from .training_cost import TRAINING

# What explain and reports measure a network against: each convolution one kernel, stem and head fused too.
LEVEL = "+ stem/pool and avgpool/fc fused"


@dataclass(frozen=True)
class Total:
    """A whole network at one level of fusion, for one batch."""

    mode: str
    level: str
    kernels: int
    bytes: int
    flops: int
    seconds: float
    batch: int

    @property
    def img_s(self) -> float:
        return self.batch / self.seconds


@dataclass(frozen=True)
class Saving:
    """All groups of one op across convolutions in a network: the floors of their members alone, and of the op."""

    op: str
    count: int
    alone: Floor
    together: Floor


@dataclass(frozen=True)
class NetworkFloors:
    """The floors of a network on one GPU.

    ``rows``: each kernel, with convolutions, stem and head fused, and the ops across convolutions that were asked for;
    ``totals``: every level of fusion; ``groups``: what ``plan(across=…)`` may use.
    """

    heading: str
    rows: list[Floor]
    totals: list[Total]
    groups: list[Saving]

    def __str__(self) -> str:
        kernel_header = "kernel", "MB", "GFLOP", "floor µs", "bound"
        level_header = "", "level of fusion", "kernels", "MB/img", "floor ms", "img/s"
        group_header = (
            "across convolutions",
            "groups",
            "MB alone",
            "together",
            "floor µs alone",
            "together",
        )
        kernel_rows = [_kernel_row(floor) for floor in self.rows]
        level_rows = [_level_row(total) for total in self.totals]
        group_rows = [_group_row(saving) for saving in self.groups]
        tables = (
            text.table(kernel_header, kernel_rows, right=(1, 2, 3)),
            text.table(level_header, level_rows, right=(2, 3, 4, 5)),
            text.table(group_header, group_rows, right=(1, 2, 3, 4, 5)),
        )
        return "\n\n".join([self.heading, *tables])


def _kernel_row(f: Floor) -> tuple:
    """The table's row of one kernel."""
    megabytes = f"{f.bytes / 1e6:.2f}"
    gigaflops = f"{f.flops / 1e9:.2f}"
    microseconds = f"{f.seconds * 1e6:.2f}"
    return f.name, megabytes, gigaflops, microseconds, f.bound


def _level_row(t: Total) -> tuple:
    """The table's row of one level of fusion."""
    megabytes_an_image = f"{t.bytes / t.batch / 1e6:.1f}"
    milliseconds = f"{t.seconds * 1e3:.3f}"
    images_a_second = f"{t.img_s:,.0f}"
    return t.mode, t.level, t.kernels, megabytes_an_image, milliseconds, images_a_second


def _group_row(s: Saving) -> tuple:
    """The table's row of one op across convolutions."""
    floors = (s.alone, s.together)
    megabytes = [f"{floor.bytes / 1e6:.1f}" for floor in floors]
    microseconds = [f"{floor.seconds * 1e6:.1f}" for floor in floors]
    return s.op, s.count, *megabytes, *microseconds


def table(
    model: str, batch: int, size: int, dtype: torch.dtype, gpu: str, across_by: Iterable[str] = ()
) -> NetworkFloors:
    """Floors of a network on a GPU model that need not be here.

    Convolutions that ``across_by`` names (as a plan's ``across``) are fused across. Raises LookupError for an unknown
    GPU or dtype, ValueError for an unknown op.
    """
    limits = ceilings(gpu)
    names = checked_names(across_by)
    groups = across_layers(conv_layers(model, batch, size, dtype))
    single = predict(INFERENCE[LEVEL](network(model, batch, size, dtype)), limits, dtype)
    rows = list(with_groups(single, groups, names, limits))
    totals = [total(model, batch, size, dtype, limits, level) for level in INFERENCE]
    if names:
        asked = _sum(f"with {', '.join(names)}", rows)
        totals.append(
            Total(
                "infer",
                asked.name,
                len(rows),
                asked.bytes,
                asked.flops,
                asked.seconds,
                batch,
            )
        )
    if dtype in FLOATING:
        totals += [total(model, batch, size, dtype, limits, level, "train") for level in TRAINING]
    rate = limits.rates[dtype] / 1e12
    heading = [
        f"{model}, batch {batch}, {size}², {str(dtype).removeprefix('torch.')}: the least time physics allows",
        f"{limits.title} at {limits.copy / 1e12:g} TB/s and {rate:g} TFLOP/s",
        limits.source,
        *(
            f"across: this network has no {name}"
            for name in names
            if not any(_is_named(g, (name,)) for g in groups)
        ),
    ]
    return NetworkFloors("\n".join(heading), rows, totals, savings(groups, limits))


def total(
    model: str,
    batch: int,
    size: int,
    dtype: torch.dtype,
    limits: Ceilings,
    level: str = LEVEL,
    mode: str = "infer",
) -> Total:
    """The floor of one pass ("infer") or iteration ("train") over a batch; raises KeyError for an unknown level."""
    costs = {"infer": INFERENCE, "train": TRAINING}[mode][level](network(model, batch, size, dtype))
    floors = predict(costs, limits, dtype)
    return Total(
        mode,
        level,
        kernels=len(floors),
        bytes=sum(f.bytes for f in floors),
        flops=sum(f.flops for f in floors),
        seconds=sum(f.seconds for f in floors),
        batch=batch,
    )


def savings(groups: Iterable[AcrossLayer], limits: Ceilings) -> list[Saving]:
    """What each op across convolutions would save.

    Ops that compete for the same convolutions are counted as if each were used alone.
    """
    by_op: dict[str, list[AcrossLayer]] = {}
    for group in groups:
        by_op.setdefault(group.problem.op, []).append(group)
    return [_saving(op, found, limits) for op, found in by_op.items()]


def _saving(op: str, groups: list[AcrossLayer], limits: Ceilings) -> Saving:
    """What one op saves over all of its groups."""
    alone: list[Floor] = []
    for group in groups:
        alone += _members_alone(group, limits)
    together = [problem_floor(group.problem, limits) for group in groups]
    return Saving(
        op,
        len(groups),
        _sum(f"{op}, alone", alone),
        _sum(op, together),
    )


def _members_alone(group: AcrossLayer, limits: Ceilings) -> list[Floor]:
    """The convolutions one by one, and the pool that follows."""
    floors = [problem_floor(member, limits) for member in group.members]
    if group.problem.op in ("conv_pool", "pointwise_pool"):
        (read,) = problem_step(group.members[-1]).writes.values()
        pool = Cost(
            f"{group.name} pool",
            {"x": read},
            problem_step(group.problem).writes,
        )
        floors.append(floor(pool, limits, group.problem.dtype))
    return floors


def _sum(name: str, floors: list[Floor]) -> Floor:
    """One floor of several kernels; its bound is the one that takes most of the time."""
    memory = sum(f.seconds for f in floors if f.bound == "memory")
    compute = sum(f.seconds for f in floors if f.bound == "compute")
    return Floor(
        name,
        bytes=sum(f.bytes for f in floors),
        flops=sum(f.flops for f in floors),
        seconds=sum(f.seconds for f in floors),
        bound="memory" if memory >= compute else "compute",
    )


def with_groups(
    rows: Iterable[Floor], groups: Iterable[AcrossLayer], names: Iterable[str], limits: Ceilings
) -> Iterator[Floor]:
    """The rows with the groups of these names in place of their members.

    Larger groups come first and each convolution is in one, as in ``graph.across``.
    """
    names = tuple(names)
    group_of: dict[str, AcrossLayer] = {}
    for group in sorted(groups, key=lambda group: ORDER.index(group.problem.op)):
        if _is_named(group, names) and group_of.keys().isdisjoint(group.names):
            group_of |= dict.fromkeys(group.names, group)
    shown: set[str] = set()
    for row in rows:
        group = group_of.get(row.name.split()[0])
        if group is None:
            yield row
        elif group.name not in shown:
            shown.add(group.name)
            yield replace(
                problem_floor(group.problem, limits), name=f"{group.name} {group.problem.op}"
            )


def _is_named(group: AcrossLayer, names: tuple[str, ...]) -> bool:
    """Whether the names have the group's op, or the op at the group's first convolution ("conv_pool:conv1")."""
    op = group.problem.op
    return op in names or f"{op}:{group.name}" in names
