"""How fast: the ceilings of the card, each layer by every proved kernel beside the bars, tables, whole networks."""

from __future__ import annotations

import datetime
import math
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from math import ceil
from pathlib import Path

import torch
from gpu_check import graph, of_network, place
from gpu_scale import Alive, Cases, Scale

from resnet_fast.bench import folded
from resnet_fast.bench.ledger import Machine, here
from resnet_fast.bench.network import Case, known_ceilings, measure
from resnet_fast.bench.op import TRAINING
from resnet_fast.bench.providers import DTYPES, PROVIDERS, example_input, fair, reference_model
from resnet_fast.dispatch import tables
from resnet_fast.dispatch.problem import Problem
from resnet_fast.dispatch.registry import find
from resnet_fast.kernels.prepack import fold
from resnet_fast.models.problems import across, layers
from resnet_fast.planning.make import plan
from resnet_fast.roofline import chips, cost
from resnet_fast.roofline.floor import problem_floor
from resnet_fast.testing import eager
from resnet_fast.tuning import groups
from resnet_fast.tuning import kernels as autotune
from resnet_fast.tuning.call import once
from resnet_fast.util import machine as util_machine
from resnet_fast.util.machine import cpu_name
from resnet_fast.util.timing import Timing, interleaved

SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
CACHE = "compile_cache.bin"
ATEN = "aten.conv_bn_act"


def environment(scale: Scale, alive: Alive) -> Cases:
    """The machine, or that there is no GPU; then its ceilings."""

    def look() -> dict:
        if scale.device == "cuda" and not torch.cuda.is_available():
            return {"status": "no gpu", "reason": f"torch {torch.__version__} sees no CUDA device"}
        facts = {"status": "here", "machine": asdict(machine(scale.device)), "versions": tables.versions()}
        if scale.device == "cuda":
            found, known = torch.cuda.get_device_properties(), known_ceilings("cuda")
            facts |= {
                "capability": [found.major, found.minor],
                "sms": found.multi_processor_count,
                "l2_bytes": found.L2_cache_size,
                "memory_bytes": found.total_memory,
                "cudnn": cudnn(),
                "known": known and {"copy": known.copy, "bfloat16": known.rates[torch.bfloat16]},
            }
        return facts

    yield "machine", look
    if scale.device == "cpu" or torch.cuda.is_available():
        yield from ceilings(scale)


def cudnn() -> int | str:
    """Its version, or why torch does not accept the one that it found: no reason to end here."""
    try:
        return torch.backends.cudnn.version()
    except RuntimeError as error:
        return autotune.first_line(error)


def machine(device: str) -> Machine:
    """The ledger's description; a copy of the checkout whose git does not answer is of an unknown commit."""
    try:
        return here(device)
    except (OSError, subprocess.CalledProcessError):
        name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        return Machine(name, device, now, "unknown", util_machine.machine())


# ---------------------------------------------------------------- ceilings


def seconds(work: Callable[[], object], scale: Scale) -> float:
    """The median time of one call."""
    return interleaved({"": work}, device=scale.device, min_rounds=5, max_rounds=30, max_seconds=0.5)[""].median


def ceilings(scale: Scale) -> Cases:
    """Copy bandwidth, cache bandwidth, matrix rate of each dtype, the cost of a launch; on random data."""
    yield "copy", lambda: copy(scale)
    yield "cache", lambda: cache(scale)
    for name in ("bfloat16", "float16", "float32", "tf32", "int8", "float8_e4m3fn"):
        yield name, lambda name=name: matmul(scale, name)
    yield "launch", lambda: launch(scale)


def copy(scale: Scale) -> dict:
    """Bytes read and written a second, in a copy of much more than any cache holds."""
    source = torch.randn(scale.copy_bytes // 2, device=scale.device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    took = seconds(lambda: target.copy_(source), scale)
    return {"status": "measured", "value": 2 * source.nbytes / took, "unit": "B/s"}


def cache(scale: Scale, times: int = 50) -> dict:
    """Bytes read and written a second by a kernel whose operands stay in the cache; many in a graph, for the launches."""
    source = torch.randn(scale.cache_copy_bytes // 2, device=scale.device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    torch.mul(source, 2, out=target)
    replay, _ = graph(lambda: [torch.mul(source, 2, out=target) for _ in range(times)], scale.device)
    return {"status": "measured", "value": 2 * source.nbytes * times / seconds(replay, scale), "unit": "B/s"}


def matmul(scale: Scale, name: str) -> dict:
    """FLOPs a second of a square product in one dtype, float32 without and with TF32."""
    n, device = scale.matmul, scale.device
    a, b = (torch.randn(n, n, device=device) for _ in range(2))
    if name == "int8":
        a, b = ((m * 40).clamp(-127, 127).to(torch.int8) for m in (a, b))
        work = lambda: torch._int_mm(a, b.t())  # noqa: E731 three ways to spell one product
    elif name == "float8_e4m3fn":
        a, b, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn), torch.ones((), device=device)
        work = lambda: torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16)  # noqa: E731
    else:
        a, b = (m.to(getattr(torch, "float32" if name == "tf32" else name)) for m in (a, b))
        work = lambda: a @ b  # noqa: E731
    torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
    took = seconds(work, scale)
    torch.backends.cuda.matmul.allow_tf32 = False
    return {"status": "measured", "value": 2 * n**3 / took, "unit": "FLOP/s"}


def launch(scale: Scale) -> dict:
    """Seconds from one small op to the next when Python issues them as fast as it can."""
    x = torch.ones(1, device=scale.device)
    return {"status": "measured", "value": seconds(lambda: [x.add_(1) for _ in range(200)], scale) / 200, "unit": "s"}


# ---------------------------------------------------------------- layers


def device(scale: Scale) -> autotune.Device:
    if scale.device == "cuda":
        return autotune.Device.current(scale.seconds)
    return Rehearsed("rehearsal", "cpu", seconds=scale.seconds)


class Rehearsed(autotune.Device):
    """A CPU in the place of a GPU: a graph is the run itself."""

    def capture(self, runs: dict[str, Callable]) -> tuple[dict[str, Callable], dict[str, str]]:
        return runs, {}


def listed(scale: Scale, batch: int) -> dict[Problem, tuple[str, int]]:
    """Each distinct convolution of the network's plan at a batch: its first layer and how many have it; dearest first."""
    found = layers(scale.model, batch, scale.size, getattr(torch, scale.dtypes[0]), *place(scale))
    count = Counter(replace(layer.problem, bn=False) for layer in found)
    names: dict[Problem, str] = {}
    for layer in found:
        names.setdefault(replace(layer.problem, bn=False), layer.name)
    limits = known_ceilings(scale.device) or chips.ceilings("h200")  # only the order hangs on it
    cost = {p: n * problem_floor(p, limits).seconds for p, n in count.items()}
    return {p: (names[p], count[p]) for p in sorted(cost, key=cost.get, reverse=True)}


def layer_times(scale: Scale, alive: Alive, proved: list[str]) -> Cases:
    """Each distinct layer at each batch in a graph over rotating buffers: proved kernels, eager, the prefolded bar."""
    machine = device(scale)
    torch.backends.cudnn.benchmark = True
    for batch in scale.batches:
        for problem, (name, count) in listed(scale, batch).items():
            yield problem.key, lambda p=problem, name=name, count=count: layer(p, name, count, proved, machine)


def layer(problem: Problem, name: str, count: int, proved: list[str], machine: autotune.Device) -> dict:
    """Median device time of one call of each variant, with its floor; a variant that fails is named with its reason."""
    sets = autotune.argument_sets(problem, machine.cache_bytes)
    sets *= ceil(autotune.CALLS / len(sets))
    kernels = [k for k in map(find, dict.fromkeys([ATEN, *proved])) if k.reason(problem) is None]
    calls: dict[str, list[Callable[[], object]]] = {"eager": [lambda a=a: eager.eager(problem.op, a) for a in sets]}
    calls["folded"] = bar(sets, problem)
    calls |= {k.id: [once(k, problem, a) for a in sets] for k in kernels}
    runs, failed = {}, {}
    with torch.no_grad():
        for id, each in calls.items():
            runs[id] = lambda each=each: [call() for call in each]
            try:
                runs[id]()
            except Exception as error:  # a proved kernel may still fail at this size, in its compiler's own way
                failed[id] = f"{type(error).__name__}: {autotune.first_line(error)}"
                del runs[id]
            machine.settle()
        graphs, reasons = machine.capture(runs)
        found = {id: Timing(tuple(s / len(sets) for s in t.seconds)) for id, t in machine.clock(graphs).items()}
    limits = known_ceilings(problem.device)
    floor = limits and problem_floor(problem, limits)
    step = cost.problem_step(problem)
    return {
        "status": "measured",
        "layer": name,
        "count": count,
        "batch": problem.x[0],
        "times": {id: told(t, {o: b for o, b in found.items() if o != id}) for id, t in found.items()},
        "failed": {**failed, **reasons},
        "bytes": step.bytes,
        "flops": step.flops,
        "floor_us": floor and floor.seconds * 1e6,
        "bound": floor and floor.bound,
    }


def told(timing: Timing, others: dict[str, Timing]) -> dict:
    """A timing as a row's part: microseconds, rounds, and how many times faster than each other variant."""
    low, high = timing.quartiles
    return {
        "us": timing.median * 1e6,
        "low": low * 1e6,
        "high": high * 1e6,
        "rounds": len(timing.seconds),
        "over": {id: timing.speedup_over(other) for id, other in others.items()},
    }


def bar(sets: list[tuple], problem: Problem) -> list[Callable[[], object]]:
    """The convolution with batch norm folded beforehand, by cuDNN's fused forms (on a CPU oneDNN's)."""
    made = folded.cudnn if problem.device == "cuda" else folded.onednn
    calls = []
    for x, weight, scale, shift, residual, mean, var, eps, *geometry, act in sets:
        filters, bias = fold(weight, scale, shift, mean, var, eps)
        conv = made(folded.Folded(filters.contiguous(memory_format=torch.channels_last), bias, tuple(geometry), act))
        calls.append(lambda conv=conv, x=x, residual=residual: conv(x, residual))
    return calls


# ---------------------------------------------------------------- tables

SHORTLIST = 1.5  # of the fastest proved kernel's time: slower ones are not tuned


def fill_tables(
    scale: Scale,
    alive: Alive,
    proved: list[str],
    times: dict[str, dict[str, float]],
    known: dict[str, dict],
    folder: str,
) -> Cases:
    """What is ``known``, then ``autotune`` on what else a plan asks for, on what the drop-in and a training step ask for, as long as there is time.

    ``times``: microseconds of each timed convolution by variant. What is most at stake for its network comes first.
    """
    machine, dtype = device(scale), getattr(torch, scale.dtypes[0])
    yield f"{len(known)} layers", lambda: adopted(known, machine.name, Path(folder))
    best = {key: min(t for id, t in found.items() if id in {*proved, ATEN}) for key, found in times.items()}
    stakes: dict[Problem, float] = {}
    for batch in scale.batches:
        single = layers(scale.model, batch, scale.size, dtype, *place(scale))
        gains = at_stake(single, times, best, proved)
        whole = sum(best.get(key(layer.problem), 0.0) for layer in single) or sum(us for _, us in gains)
        for problem, us in gains:
            stakes[problem] = stakes.get(problem, 0.0) + us / whole
    order = sorted(stakes, key=stakes.get, reverse=True)
    planned = [
        problem
        for problem in order
        if problem.key not in known and (stakes[problem] > 0 or problem.op != "conv_bn_act")
    ]
    live = [replace(problem, bn=True) for problem in order if problem.op == "conv_bn_act"]
    training = [p for op in TRAINING for p in of_network(scale.model, scale.batches[0], dtype, scale, op)]
    for problem in [*planned, *live, *training]:
        found = times.get(key(problem), {})
        some = [id for id in proved if found.get(id, math.inf) <= SHORTLIST * best[key(problem)]] if found else proved
        yield problem.key, lambda p=problem, some=some: tuned(p, some, machine, Path(folder))


def adopted(known: dict[str, dict], gpu: str, folder: Path) -> dict:
    """Write into the table what was timed in graphs and checked at the same sizes: neither is done again."""

    def entry(id: str, found: dict) -> dict:
        return {
            "source": tables.source_hash(find(id).sources),
            "versions": tables.versions(),
            "error": found["error"],
            "eager_error": found["eager_error"],
        }

    def edit(sections: dict[str, dict]) -> None:
        for key, kernels in known.items():
            records = {
                id: {**entry(id, found), "status": "right", "reason": None, "device_us": found["us"]}
                for id, found in kernels.items()
            }
            sections["measured"].setdefault(key, {}).update(records)
            best = min(kernels, key=lambda id: kernels[id]["us"], default=ATEN)
            gain = 1.0 if best == ATEN else kernels[best]["over"].get(ATEN, 1.0)
            sections["graph"].pop(key, None)
            if gain >= autotune.MARGIN:
                found = kernels[best]
                sections["graph"][key] = {
                    **entry(best, found),
                    "kernel": best,
                    "time_us": found["us"],
                    "aten_us": found["us"] * gain,
                    "spread": (found["high"] - found["low"]) / found["us"],
                }
                chosen[key] = best

    chosen: dict[str, str] = {}
    tables.update(gpu, edit, folder)
    return {"status": "tuned", "calls": "aten", "graph": chosen, "bad": {}, "note": "as timed and checked before"}


def key(problem: Problem) -> str:
    """Under which name the layers stage has a convolution."""
    return replace(problem, bn=False).key


def at_stake(single: list, times: dict, best: dict, proved: list[str]) -> list[tuple[Problem, float]]:
    """(problem of a plan, microseconds to be gained by a proved kernel): beside torch's, and for a group beside its members one by one."""
    limits = known_ceilings(single[0].problem.device) or chips.ceilings("h200")

    def floor(problem: Problem) -> float:
        return 1e6 * problem_floor(problem, limits).seconds

    gains = []
    for layer in single:
        problem, found = replace(layer.problem, bn=False), times.get(key(layer.problem), {})
        gains.append(
            (problem, found[ATEN] - best[problem.key] if ATEN in found else floor(problem))
        )  # not timed: who knows
    ops = {find(id).op for id in proved}
    return gains + [
        (group.problem, sum(best.get(key(m), floor(m)) for m in group.members) - floor(group.problem))
        for group in across(single)
        if group.problem.op in ops
    ]


def tuned(problem: Problem, proved: list[str], machine: autotune.Device, folder: Path) -> dict:
    (outcome,) = autotune.tune([problem], kernels=proved, device=machine, folder=folder)
    return {"status": "tuned", "calls": outcome.calls, "graph": outcome.graph, "bad": outcome.bad, "note": outcome.note}


def tune_plans(scale: Scale, alive: Alive, seconds: float) -> Cases:
    """The plan of the network at each batch: which groups make it faster by the kernels that the table has; remembered there."""
    for batch in scale.batches:
        case = Case("infer", scale.model, SHORT[scale.dtypes[0]], batch, scale.size, scale.device)
        yield case.name, lambda case=case: tuned_plan(case, seconds, device(scale), alive)


def tuned_plan(case: Case, seconds: float, machine: autotune.Device, alive: Alive) -> dict:
    """Planned and tuned under what the networks are timed under, so that the choice is of the same algorithms of cuDNN's."""
    alive("planning")
    x = example_input(case.batch, case.size, DTYPES[case.dtype], case.device)
    with fair():
        made = plan(reference_model(case.model, case.device), x, dtype=x.dtype, across=())
        groups.choose_groups(made, x, machine, seconds, alive)
    return {"status": "tuned", "across": made.across, "notes": made.notes}


# ---------------------------------------------------------------- networks


def whole_network(scale: Scale, alive: Alive, mode: str, batches: list[int], peers: list[str], folder: str) -> Cases:
    """A whole network by these providers; ``folder`` keeps the compiler's cache, and one put beside it is used."""
    for batch in batches:
        case = Case(mode, scale.model, SHORT[scale.dtypes[0]], batch, scale.size, scale.device)
        yield case.name, lambda case=case: network(case, peers, scale, alive, Path(folder))


def network(case: Case, peers: list[str], scale: Scale, alive: Alive, folder: Path) -> dict:
    alive("starting")
    compiles = any(id.startswith("compile") for id in peers)
    brought = [path for path in (folder / CACHE, folder.parent / CACHE) if path.is_file()]
    if compiles and brought:
        torch.compiler.load_cache_artifacts(brought[0].read_bytes())
    found = measure(
        case,
        [PROVIDERS[id] for id in peers],
        max_seconds=scale.model_seconds,
        say=alive,
        progress=lambda n: alive(f"round {n}"),
    )
    artifacts = torch.compiler.save_cache_artifacts() if compiles else None
    if artifacts is not None:
        (folder / CACHE).write_bytes(artifacts[0])
    return {
        "status": "measured",
        "rows": [asdict(o.row) for o in found.values() if o.row],
        "skipped": {id: o.skipped for id, o in found.items() if o.skipped},
        "wrong": {id: o.wrong for id, o in found.items() if o.wrong},
    }
