"""Tasks that time: each layer by every proved kernel beside torch's own, and whole networks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from math import ceil
from pathlib import Path

import torch

from resnet_fast.bench import folded
from resnet_fast.bench.network import Case, known_ceilings, measure
from resnet_fast.bench.providers import PROVIDERS
from resnet_fast.dispatch.problem import Problem
from resnet_fast.dispatch.registry import find
from resnet_fast.kernels.prepack import fold
from resnet_fast.models.problems import conv_layers
from resnet_fast.roofline import chips, cost
from resnet_fast.roofline.floor import problem_floor
from resnet_fast.testing import eager
from resnet_fast.tuning import kernels
from resnet_fast.tuning.call import prepared_call
from resnet_fast.util.timing import Timing

from .check import place
from .scale import Alive, Cases, Scale

SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
CACHE = "compile_cache.bin"
ATEN = "aten.conv_bn_act"

Runs = dict[str, Callable[[], object]]


# ---------------------------------------------------------------- layers


def device(scale: Scale) -> kernels.Device:
    """Return the device that times kernels."""
    if scale.device == "cuda":
        return kernels.Device.current(scale.seconds)
    return Rehearsed("rehearsal", "cpu", seconds=scale.seconds)


class Rehearsed(kernels.Device):
    """A CPU in the place of a GPU: a graph is the run itself."""

    def capture(self, runs: dict[str, Callable]) -> tuple[dict[str, Callable], dict[str, str]]:
        return runs, {}


def layer_times(scale: Scale, alive: Alive, proved: list[str]) -> Cases:
    """Time each distinct layer at each batch, in a graph over rotating buffers: proved kernels, eager, the bar."""
    timer = device(scale)
    torch.backends.cudnn.benchmark = True
    for batch in scale.batches:
        for problem, (name, count) in distinct_layers(scale, batch).items():
            yield problem.key, partial(layer, problem, name, count, proved, timer)


def distinct_layers(scale: Scale, batch: int) -> dict[Problem, tuple[str, int]]:
    """Return each distinct convolution of the network's plan: its first layer and their number; dearest first."""
    dtype = getattr(torch, scale.dtypes[0])
    count: Counter[Problem] = Counter()
    names: dict[Problem, str] = {}
    for each in conv_layers(scale.model, batch, scale.size, dtype, *place(scale)):
        problem = replace(each.problem, bn=False)
        count[problem] += 1
        names.setdefault(problem, each.name)
    limits = known_ceilings(scale.device) or chips.ceilings("h200")  # only the order depends on it

    def floor(problem: Problem) -> float:
        return count[problem] * problem_floor(problem, limits).seconds

    dearest_first = sorted(count, key=floor, reverse=True)
    return {problem: (names[problem], count[problem]) for problem in dearest_first}


def layer(
    problem: Problem,
    name: str,
    count: int,
    proved: list[str],
    timer: kernels.Device,
) -> dict:
    """Return the median device time of one call of each variant; a variant that fails is named with its reason."""
    arguments = kernels.argument_sets(problem, timer.cache_bytes)
    arguments *= ceil(kernels.CALLS / len(arguments))
    calls = variants(problem, proved, arguments)
    with torch.no_grad():
        runs, failed = first_runs(calls, timer)
        graphs, not_captured = timer.capture(runs)
        totals = timer.clock(graphs)
    timings = {}
    for id, total in totals.items():
        timings[id] = Timing(tuple(seconds / len(arguments) for seconds in total.seconds))
    limits = known_ceilings(problem.device)
    floor = limits and problem_floor(problem, limits)
    step = cost.problem_step(problem)
    return {
        "status": "measured",
        "layer": name,
        "count": count,
        "batch": problem.x[0],
        "times": {id: timing_row(id, timings) for id in timings},
        "failed": {**failed, **not_captured},
        "bytes": step.bytes,
        "flops": step.flops,
        "floor_us": floor and floor.seconds * 1e6,
        "bound": floor and floor.bound,
    }


def variants(
    problem: Problem, proved: list[str], arguments: list[tuple]
) -> dict[str, list[Callable[[], object]]]:
    """Return each variant's calls, one for each set of arguments: eager, the prefolded bar, torch's and our kernels."""
    calls: dict[str, list[Callable[[], object]]] = {}
    calls["eager"] = [partial(eager.eager, problem.op, each) for each in arguments]
    calls["folded"] = prefolded(arguments, problem)
    ids = dict.fromkeys([ATEN, *proved])
    for kernel in map(find, ids):
        if kernel.reason(problem) is None:
            calls[kernel.id] = [prepared_call(kernel, problem, each) for each in arguments]
    return calls


def first_runs(
    calls: dict[str, list[Callable[[], object]]], timer: kernels.Device
) -> tuple[Runs, dict[str, str]]:
    """Run each variant once; return the runs that succeed, and why the others fail."""
    runs: Runs = {}
    failed: dict[str, str] = {}
    for id, each in calls.items():
        run = partial(run_all, each)
        try:
            run()
            runs[id] = run
        # a proved kernel may still fail at this size, in its compiler's own way
        except Exception as error:
            failed[id] = f"{type(error).__name__}: {kernels.first_line(error)}"
        timer.settle()
    return runs, failed


def run_all(calls: list[Callable[[], object]]) -> list[object]:
    """Make every call and return the results."""
    return [call() for call in calls]


def prefolded(arguments: list[tuple], problem: Problem) -> list[Callable[[], object]]:
    """Return the convolution with batch norm folded beforehand, by cuDNN's fused forms (on a CPU oneDNN's)."""
    fused = folded.cudnn if problem.device == "cuda" else folded.onednn
    calls = []
    for x, weight, scale, shift, residual, mean, var, eps, *geometry, act in arguments:
        filters, bias = fold(weight, scale, shift, mean, var, eps)
        filters = filters.contiguous(memory_format=torch.channels_last)
        conv = fused(folded.Folded(filters, bias, tuple(geometry), act))
        calls.append(partial(conv, x, residual))
    return calls


def timing_row(id: str, timings: dict[str, Timing]) -> dict:
    """Return a variant's timing for a row: microseconds, rounds, and how many times faster than each other one."""
    timing = timings[id]
    low, high = timing.quartiles
    over = {other: timing.speedup_over(timings[other]) for other in timings if other != id}
    return {
        "us": timing.median * 1e6,
        "low": low * 1e6,
        "high": high * 1e6,
        "rounds": len(timing.seconds),
        "over": over,
    }


# ---------------------------------------------------------------- networks


def network_case(scale: Scale, batch: int, mode: str = "infer") -> Case:
    """Return the case of the network at one batch, in the dtype that is timed."""
    return Case(mode, scale.model, SHORT[scale.dtypes[0]], batch, scale.size, scale.device)


def whole_network(
    scale: Scale,
    alive: Alive,
    mode: str,
    batches: list[int],
    peers: list[str],
    folder: str,
) -> Cases:
    """Time a whole network by these providers; ``folder`` keeps the compiler's cache, and one beside it is used."""
    for batch in batches:
        case = network_case(scale, batch, mode)
        yield case.name, partial(network, case, peers, scale, alive, Path(folder))


def network(
    case: Case,
    peers: list[str],
    scale: Scale,
    alive: Alive,
    folder: Path,
) -> dict:
    """Return the rows of all providers of one network, with those skipped and those found wrong."""
    alive("starting")
    compiles = any(id.startswith("compile") for id in peers)
    if compiles:
        load_compile_cache(folder)
    outcomes = measure(
        case,
        [PROVIDERS[id] for id in peers],
        max_seconds=scale.model_seconds,
        say=alive,
        progress=lambda n: alive(f"round {n}"),
    )
    if compiles:
        save_compile_cache(folder)
    return {
        "status": "measured",
        "rows": [asdict(outcome.row) for outcome in outcomes.values() if outcome.row],
        "skipped": {id: outcome.skipped for id, outcome in outcomes.items() if outcome.skipped},
        "wrong": {id: outcome.wrong for id, outcome in outcomes.items() if outcome.wrong},
    }


def load_compile_cache(folder: Path) -> None:
    """Load the compiler's cache that an earlier stage or run left in the folder or beside it."""
    for path in (folder / CACHE, folder.parent / CACHE):
        if path.is_file():
            torch.compiler.load_cache_artifacts(path.read_bytes())
            return


def save_compile_cache(folder: Path) -> None:
    """Write the compiler's cache into the folder."""
    artifacts = torch.compiler.save_cache_artifacts()
    if artifacts is not None:
        (folder / CACHE).write_bytes(artifacts[0])
