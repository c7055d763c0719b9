"""Floors: how fast a GPU could run a step, a layer or a whole network, given its ceilings and what must be moved.

A step's floor is max(bytes / copy bandwidth, FLOPs / matrix rate); a network's is the sum over its kernels, launches
free and L2 ignored (its bandwidth is unmeasured). What a step moves stands in ``traffic`` and ``traffic_training``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from ..graph.across import ORDER, checked_names
from ..models.problems import AcrossLayer, across_layers, conv_layers
from ..roofline.chips import FLOATING, Ceilings, ceilings
from ..roofline.cost import Step, problem_step
from ..roofline.floor import Floor, floor, predict, problem_floor
from ..util import text
from .network_cost import INFERENCE, network
from .training_cost import TRAINING

# What explain and reports measure a network against: each convolution one kernel, stem and head fused too.
LEVEL = "+ stem/pool and avgpool/fc fused"


# ---------------------------------------------------------------- one step


# ---------------------------------------------------------------- a network


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


def total(
    model: str, batch: int, size: int, dtype: torch.dtype, limits: Ceilings, level: str = LEVEL, mode: str = "infer"
) -> Total:
    """The floor of one pass ("infer") or iteration ("train") over a batch; raises KeyError for an unknown level."""
    steps = {"infer": INFERENCE, "train": TRAINING}[mode][level](network(model, batch, size, dtype))
    floors = predict(steps, limits, dtype)
    return Total(
        mode,
        level,
        len(floors),
        sum(f.bytes for f in floors),
        sum(f.flops for f in floors),
        sum(f.seconds for f in floors),
        batch,
    )


@dataclass(frozen=True)
class Saving:
    """All of a network's groups of one op across convolutions: the floors of their members one by one, and of the op."""

    op: str
    count: int
    alone: Floor
    together: Floor


def savings(groups: Iterable[AcrossLayer], limits: Ceilings) -> list[Saving]:
    """What each op across convolutions would save; ops that want the same convolutions are counted as if each were used alone."""
    found: dict[str, list[AcrossLayer]] = {}
    for group in groups:
        found.setdefault(group.problem.op, []).append(group)
    return [
        Saving(
            op,
            len(each),
            _sum(f"{op}, alone", [f for group in each for f in _alone(group, limits)]),
            _sum(op, [problem_floor(group.problem, limits) for group in each]),
        )
        for op, each in found.items()
    ]


def _alone(group: AcrossLayer, limits: Ceilings) -> list[Floor]:
    """The convolutions one by one, and the pool that follows."""
    floors = [problem_floor(member, limits) for member in group.members]
    if group.problem.op in ("conv_pool", "pointwise_pool"):
        (read,) = problem_step(group.members[-1]).writes.values()
        pool = Step(f"{group.name} pool", {"x": read}, problem_step(group.problem).writes)
        floors.append(floor(pool, limits, group.problem.dtype))
    return floors


def _sum(name: str, floors: list[Floor]) -> Floor:
    bound = max(("memory", "compute"), key=lambda bound: sum(f.seconds for f in floors if f.bound == bound))
    return Floor(
        name, sum(f.bytes for f in floors), sum(f.flops for f in floors), sum(f.seconds for f in floors), bound
    )


@dataclass(frozen=True)
class Table:
    """``rows``: each kernel, with convolutions, stem and head fused, and ops across convolutions that were asked for; ``totals``: every level
    of fusion; ``groups``: what ``plan(across=…)`` may use.
    """

    heading: str
    rows: list[Floor]
    totals: list[Total]
    groups: list[Saving]

    def __str__(self) -> str:
        kernels = [
            (f.name, f"{f.bytes / 1e6:.2f}", f"{f.flops / 1e9:.2f}", f"{f.seconds * 1e6:.2f}", f.bound)
            for f in self.rows
        ]
        levels = [
            (t.mode, t.level, t.kernels, f"{t.bytes / t.batch / 1e6:.1f}", f"{t.seconds * 1e3:.3f}", f"{t.img_s:,.0f}")
            for t in self.totals
        ]
        header = "", "level of fusion", "kernels", "MB/img", "floor ms", "img/s"
        groups = [
            (
                g.op,
                g.count,
                f"{g.alone.bytes / 1e6:.1f}",
                f"{g.together.bytes / 1e6:.1f}",
                f"{g.alone.seconds * 1e6:.1f}",
                f"{g.together.seconds * 1e6:.1f}",
            )
            for g in self.groups
        ]
        return "\n".join(
            [
                self.heading,
                "",
                text.table(("kernel", "MB", "GFLOP", "floor µs", "bound"), kernels, right=(1, 2, 3)),
                "",
                text.table(header, levels, right=(2, 3, 4, 5)),
                "",
                text.table(
                    ("across convolutions", "groups", "MB alone", "together", "floor µs alone", "together"),
                    groups,
                    right=(1, 2, 3, 4, 5),
                ),
            ]
        )


def with_groups(
    rows: Iterable[Floor], groups: Iterable[AcrossLayer], wanted: Iterable[str], limits: Ceilings
) -> Iterator[Floor]:
    """The rows with the groups of these names in place of their members: larger ones first, each convolution in one, as in ``fusion``."""
    place: dict[str, AcrossLayer] = {}
    for group in sorted(groups, key=lambda group: ORDER.index(group.problem.op)):
        op = group.problem.op
        if {op, f"{op}:{group.name}"} & set(wanted) and not place.keys() & set(group.names):
            place |= dict.fromkeys(group.names, group)
    told: set[str] = set()
    for row in rows:
        group = place.get(row.name.split()[0])
        if group is None:
            yield row
        elif group.name not in told:
            told.add(group.name)
            yield replace(problem_floor(group.problem, limits), name=f"{group.name} {group.problem.op}")


def table(model: str, batch: int, size: int, dtype: torch.dtype, gpu: str, across_by: Iterable[str] = ()) -> Table:
    """Floors of a network on a GPU model that need not be here, with ``across_by``, names as a plan's ``across``, fused across convolutions.

    Raises LookupError for an unknown GPU or dtype, ValueError for an unknown op.
    """
    limits, wanted = ceilings(gpu), checked_names(across_by)
    net = network(model, batch, size, dtype)
    levels = [("infer", level) for level in INFERENCE] + [("train", level) for level in TRAINING if dtype in FLOATING]
    groups = across_layers(conv_layers(model, batch, size, dtype))
    rows = list(with_groups(predict(INFERENCE[LEVEL](net), limits, dtype), groups, wanted, limits))
    rate = limits.rates[dtype] / 1e12
    heading = (
        f"{model}, batch {batch}, {size}², {str(dtype).removeprefix('torch.')}: the least time physics allows\n"
        f"{limits.title} at {limits.copy / 1e12:g} TB/s and {rate:g} TFLOP/s\n{limits.source}"
    )
    formed = {name for group in groups for name in (group.problem.op, f"{group.problem.op}:{group.name}")}
    heading += "".join(f"\nacross: this network has no {name}" for name in wanted if name not in formed)
    totals = [total(model, batch, size, dtype, limits, level, mode) for mode, level in levels]
    if wanted:
        asked = _sum(f"with {', '.join(wanted)}", rows)
        totals.insert(
            len(INFERENCE), Total("infer", asked.name, len(rows), asked.bytes, asked.flops, asked.seconds, batch)
        )
    return Table(heading, rows, totals, savings(groups, limits))
