"""Floors: how fast a GPU could run a step, a layer or a whole network, given its ceilings and what must be moved.

A step's floor is max(bytes / copy bandwidth, FLOPs / matrix rate); a network's is the sum over its kernels, launches
free and L2 ignored (its bandwidth is unmeasured). What a step moves stands in ``traffic`` and ``traffic_training``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod

import torch

from ..dispatch.problem import ACROSS, Problem
from ..graph.across import ORDER, known
from ..models.problems import Across, across, layers
from ..util import text
from .network_cost import INFERENCE, Step, across_step, conv_flops, network, touched
from .training_cost import TRAINING

# What explain and reports measure a network against: each convolution one kernel, stem and head fused too.
LEVEL = "+ stem/pool and avgpool/fc fused"
FLOATING = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Ceilings:
    """A GPU's limits: bytes a second of a large copy (read + written), dense FLOPs a second by dtype, their source."""

    title: str
    copy: float
    rates: dict[torch.dtype, float]
    source: str


def _rates(float32: float, half: float, byte: float, fp8: bool) -> dict[torch.dtype, float]:
    rates = {torch.float32: float32, torch.bfloat16: half, torch.float16: half, torch.int8: byte}
    return {**rates, torch.float8_e4m3fn: byte} if fp8 else rates


MEASURED = "copy and bf16 measured on one such card; fp16 as bf16, bytes at twice that, fp32 from the datasheet"
DATASHEET = "datasheet, not measured"
GPUS = {
    "h200": Ceilings("NVIDIA H200", 4.3e12, _rates(67e12, 790e12, 1580e12, True), MEASURED),
    "h100": Ceilings("NVIDIA H100 80GB HBM3", 3.35e12, _rates(67e12, 989e12, 1979e12, True), DATASHEET),
    "b200": Ceilings("NVIDIA B200", 7.7e12, _rates(75e12, 2250e12, 4500e12, True), DATASHEET),
    "a100": Ceilings("NVIDIA A100-SXM4-80GB", 2.039e12, _rates(19.5e12, 312e12, 624e12, False), DATASHEET),
    "l40s": Ceilings("NVIDIA L40S", 0.864e12, _rates(91.6e12, 362e12, 733e12, True), DATASHEET),
    "rtx4090": Ceilings("NVIDIA GeForce RTX 4090", 1.008e12, _rates(82.6e12, 165e12, 660e12, True), DATASHEET),
}


def ceilings(gpu: str) -> Ceilings:
    """The ceilings of a GPU by short name ("h200") or as the driver names it; raises LookupError with those known."""
    for key, found in GPUS.items():
        if gpu.lower() in (key, found.title.lower()):
            return found
    raise LookupError(f"no ceilings for GPU {gpu!r}; known: {', '.join(GPUS)}")


# ---------------------------------------------------------------- one step


@dataclass(frozen=True)
class Floor:
    """The least time of a step in seconds and which ceiling sets it, "memory" or "compute"."""

    name: str
    bytes: int
    flops: int
    seconds: float
    bound: str


def floor(step: Step, limits: Ceilings, dtype: torch.dtype) -> Floor:
    """The floor of one step; raises LookupError for a dtype that GPU has no rate for."""
    if dtype not in limits.rates:
        raise LookupError(f"no rate for {dtype} on {limits.title}; known: {', '.join(map(str, limits.rates))}")
    memory, compute = step.bytes / limits.copy, step.flops / limits.rates[dtype]
    return Floor(step.name, step.bytes, step.flops, max(memory, compute), "memory" if memory >= compute else "compute")


def predict(steps: Iterable[Step], limits: Ceilings, dtype: torch.dtype) -> list[Floor]:
    """The floor of each step."""
    return [floor(step, limits, dtype) for step in steps]


def flops(problem: Problem) -> int:
    """Two FLOPs for each multiply-add of the convolutions; the pointwise ops count none."""
    return across_step(problem).flops if problem.op in ACROSS else conv_flops(problem)


def problem_step(problem: Problem) -> Step:
    """What one call of an op must move: each operand once, batch norm's twice, since statistics precede their use."""
    width = problem.dtype.itemsize
    x = prod(problem.x) * width
    residual = {} if problem.residual is None else {"residual": x}
    relu = problem.act == "relu"
    if problem.op in ACROSS:
        return across_step(problem)
    if problem.op == "conv_bn_act":
        y = problem.x[0] * problem.weight[0] * prod(problem.out_hw) * width
        reads = {"x": touched(problem) * width, "w": prod(problem.weight) * width}
        return Step(problem.key, {**reads, **({"residual": y} if residual else {})}, {"y": y}, conv_flops(problem))
    if problem.op == "bn_act":
        return Step(problem.key, {"x for statistics": x, "x": x, **residual}, {"y": x})
    if problem.op == "bn_act_backward":  # without a residual the mask comes from x
        once = {"dy": x, "x": x, **({"y": x} if residual and relu else {})}
        twice = {f"{name} for sums": size for name, size in once.items()}
        return Step(problem.key, {**once, **twice}, {"dx": x, **({"dresidual": x} if residual else {})})
    if problem.op == "add_act":
        return Step(problem.key, {"x": x, "y": x}, {"out": x})
    reads = {"dout": x, **({"out": x} if relu else {}), **({"x": x} if problem.gate else {})}
    return Step(problem.key, reads, {"dy": x, **({"dx": x} if problem.gate else {})})


def problem_floor(problem: Problem, limits: Ceilings) -> Floor:
    """The floor of one call of an op."""
    return floor(problem_step(problem), limits, problem.dtype)


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


def savings(groups: Iterable[Across], limits: Ceilings) -> list[Saving]:
    """What each op across convolutions would save; ops that want the same convolutions are counted as if each were used alone."""
    found: dict[str, list[Across]] = {}
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


def _alone(group: Across, limits: Ceilings) -> list[Floor]:
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
    rows: Iterable[Floor], groups: Iterable[Across], wanted: Iterable[str], limits: Ceilings
) -> Iterator[Floor]:
    """The rows with the groups of these names in place of their members: larger ones first, each convolution in one, as in ``fusion``."""
    place: dict[str, Across] = {}
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
    limits, wanted = ceilings(gpu), known(across_by)
    net = network(model, batch, size, dtype)
    levels = [("infer", level) for level in INFERENCE] + [("train", level) for level in TRAINING if dtype in FLOATING]
    groups = across(layers(model, batch, size, dtype))
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
