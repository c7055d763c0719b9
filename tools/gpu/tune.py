"""Tasks that fill the tables: which kernel for each problem of a network, and which groups of layers for its plan."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from resnet_fast.bench.network import Case, known_ceilings
from resnet_fast.bench.providers import example_input, fair, reference_model
from resnet_fast.dispatch import tables
from resnet_fast.dispatch.problem import Problem
from resnet_fast.dispatch.registry import find
from resnet_fast.models.problems import TRAINING, across_layers, conv_layers
from resnet_fast.planning.make import plan
from resnet_fast.roofline import chips
from resnet_fast.roofline.floor import problem_floor
from resnet_fast.tuning import kernels as autotune
from resnet_fast.util.machine import SHORT_DTYPES

from .check import of_network, place
from .measure import ATEN, device, network_case
from .scale import Alive, Cases, Scale

SHORTLIST = 1.5  # of the fastest proved kernel's time: slower ones are not tuned

Times = dict[str, dict[str, float]]  # microseconds of each timed convolution by variant


# ---------------------------------------------------------------- kernels


def fill_tables(
    scale: Scale, alive: Alive, proved: list[str], times: Times, known: dict[str, dict], folder: str
) -> Cases:
    """Write what is ``known`` into the table, then tune the problems of plan, drop-in and training step.

    ``times`` are those of the layers stage. Problems with most at stake for their network come first, as time may end.
    """
    timer = device(scale)
    yield f"{len(known)} layers", partial(adopted, known, timer.name, Path(folder))
    best = fastest_proved(times, proved)
    for problem in problems_to_tune(scale, times, best, proved, known):
        measured = times.get(key(problem), {})
        candidates = proved
        if measured:
            limit = SHORTLIST * best[key(problem)]
            candidates = [id for id in proved if measured.get(id, math.inf) <= limit]
        yield problem.key, partial(tuned, problem, candidates, timer, Path(folder))


def key(problem: Problem) -> str:
    """Return the name of a convolution in the layers stage."""
    return replace(problem, bn=False).key


def fastest_proved(times: Times, proved: list[str]) -> dict[str, float]:
    """Return the time of each convolution by its fastest proved kernel or torch's own."""
    allowed = {*proved, ATEN}
    best = {}
    for case, measured in times.items():
        best[case] = min(us for id, us in measured.items() if id in allowed)
    return best


def problems_to_tune(
    scale: Scale, times: Times, best: dict[str, float], proved: list[str], known: dict[str, dict]
) -> Iterator[Problem]:
    """Yield problems of plans that are not known and may gain; then the drop-in's; then those of a training step."""
    dtype = getattr(torch, scale.dtypes[0])
    stakes = stakes_of(scale, times, best, proved)
    order = sorted(stakes, key=stakes.get, reverse=True)
    for problem in order:
        promising = stakes[problem] > 0 or problem.op != "conv_bn_act"
        if promising and problem.key not in known:
            yield problem
    for problem in order:
        if problem.op == "conv_bn_act":
            yield replace(problem, bn=True)
    for op in TRAINING:
        yield from of_network(scale.model, scale.batches[0], dtype, scale, op)


def stakes_of(
    scale: Scale,
    times: Times,
    best: dict[str, float],
    proved: list[str],
) -> dict[Problem, float]:
    """Return each problem's possible gain as a share of its network's time, summed over batches."""
    dtype = getattr(torch, scale.dtypes[0])
    stakes: dict[Problem, float] = {}
    for batch in scale.batches:
        convolutions = conv_layers(scale.model, batch, scale.size, dtype, *place(scale))
        gains = possible_gains(convolutions, times, best, proved)
        network_us = sum(best.get(key(layer.problem), 0.0) for layer in convolutions)
        if not network_us:
            network_us = sum(us for _, us in gains)
        for problem, us in gains:
            stakes[problem] = stakes.get(problem, 0.0) + us / network_us
    return stakes


def possible_gains(
    convolutions: list, times: Times, best: dict[str, float], proved: list[str]
) -> list[tuple[Problem, float]]:
    """Return (problem of a plan, microseconds that a proved kernel may gain).

    A convolution's gain is over torch's time, a group's over its members one by one.
    """
    limits = known_ceilings(convolutions[0].problem.device) or chips.ceilings("h200")

    def floor(problem: Problem) -> float:
        return 1e6 * problem_floor(problem, limits).seconds

    gains = []
    for layer in convolutions:
        problem = replace(layer.problem, bn=False)
        measured = times.get(problem.key, {})
        gain = floor(problem)  # not timed: the gain is unknown
        if ATEN in measured:
            gain = measured[ATEN] - best[problem.key]
        gains.append((problem, gain))
    ops = {find(id).op for id in proved}
    for group in across_layers(convolutions):
        if group.problem.op in ops:
            apart = sum(best.get(key(member), floor(member)) for member in group.members)
            gains.append((group.problem, apart - floor(group.problem)))
    return gains


def tuned(
    problem: Problem,
    proved: list[str],
    timer: autotune.Device,
    folder: Path,
) -> dict:
    """Tune one problem and return what was chosen."""
    (outcome,) = autotune.tune([problem], kernels=proved, device=timer, folder=folder)
    return {
        "status": "tuned",
        "calls": outcome.calls,
        "graph": outcome.graph,
        "bad": outcome.bad,
        "note": outcome.note,
    }


# ---------------------------------------------------------------- entries of earlier stages


def adopted(known: dict[str, dict], gpu: str, folder: Path) -> dict:
    """Write into the table what was timed in graphs and checked at the same sizes: neither is done again."""
    chosen: dict[str, str] = {}

    def edit(sections: dict[str, dict]) -> None:
        for case, kernels in known.items():
            records = {id: measured_record(id, found) for id, found in kernels.items()}
            sections["measured"].setdefault(case, {}).update(records)
            sections["graph"].pop(case, None)
            best, gain = best_in_graph(kernels)
            if gain >= autotune.MARGIN:
                sections["graph"][case] = graph_record(best, kernels[best], gain)
                chosen[case] = best

    tables.update(gpu, edit, folder)
    return {
        "status": "tuned",
        "calls": "aten",
        "graph": chosen,
        "bad": {},
        "note": "as timed and checked before",
    }


def best_in_graph(kernels: dict[str, dict]) -> tuple[str, float]:
    """Return the fastest kernel and how many times faster than torch's it is."""
    best = min(kernels, key=lambda id: kernels[id]["us"], default=ATEN)
    if best == ATEN:
        return best, 1.0
    return best, kernels[best]["over"].get(ATEN, 1.0)


def entry(id: str, found: dict) -> dict:
    """Return what each record of a kernel has in a table."""
    return {
        "source": tables.source_hash(find(id).sources),
        "versions": tables.versions(),
        "error": found["error"],
        "eager_error": found["eager_error"],
    }


def measured_record(id: str, found: dict) -> dict:
    """Return a table's record of a kernel that was measured."""
    return {
        **entry(id, found),
        "status": "right",
        "reason": None,
        "device_us": found["us"],
    }


def graph_record(id: str, found: dict, gain: float) -> dict:
    """Return a table's record of the kernel that was chosen for graphs."""
    return {
        **entry(id, found),
        "kernel": id,
        "time_us": found["us"],
        "aten_us": found["us"] * gain,
        "spread": (found["high"] - found["low"]) / found["us"],
    }


# ---------------------------------------------------------------- groups of layers


def tune_plans(scale: Scale, alive: Alive, seconds: float) -> Cases:
    """Tune the network's plan at each batch: groups that make it faster by the table's kernels are remembered there."""
    for batch in scale.batches:
        case = network_case(scale, batch)
        yield case.name, partial(tuned_plan, case, seconds, device(scale), alive)


def tuned_plan(
    case: Case,
    seconds: float,
    timer: autotune.Device,
    alive: Alive,
) -> dict:
    """Plan and tune under the settings that networks are timed under, so that cuDNN's algorithms are the same."""
    alive("planning")
    x = example_input(case.batch, case.size, SHORT_DTYPES[case.dtype], case.device)
    with fair():
        made = plan(reference_model(case.model, case.device), x, dtype=x.dtype, across=())
        made.use_groups(made.group_tuner(x, timer, seconds, alive).choose())
    return {"status": "tuned", "across": made.across, "notes": made.notes}
