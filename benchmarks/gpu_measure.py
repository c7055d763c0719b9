"""How fast: the ceilings of the card, each layer by every proved kernel beside the bars, tables, whole networks."""

from __future__ import annotations

import datetime
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from math import ceil
from pathlib import Path

import torch
from gpu_check import graph, of_network, place
from gpu_scale import Alive, Cases, Scale

from resnet_fast import autotune, folded, info, roofline, tables, testing
from resnet_fast.dispatch import find
from resnet_fast.fold import fold
from resnet_fast.layers import layers
from resnet_fast.measure import Case, known_ceilings, measure
from resnet_fast.problem import ACROSS, Problem
from resnet_fast.providers import PROVIDERS
from resnet_fast.report.ledger import Machine, here
from resnet_fast.timing import Timing, interleaved

SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
CACHE = "compile_cache.bin"


def environment(scale: Scale, alive: Alive) -> Cases:
    """The machine, or that there is no GPU; then its ceilings."""
    def look() -> dict:
        if scale.device == "cuda" and not torch.cuda.is_available():
            return {"status": "no gpu", "reason": f"torch {torch.__version__} sees no CUDA device"}
        facts = {"status": "here", "machine": asdict(machine(scale.device)), "versions": tables.versions()}
        if scale.device == "cuda":
            found, known = torch.cuda.get_device_properties(), known_ceilings("cuda")
            facts |= {"capability": [found.major, found.minor], "sms": found.multi_processor_count,
                      "l2_bytes": found.L2_cache_size, "memory_bytes": found.total_memory,
                      "cudnn": torch.backends.cudnn.version(),
                      "known": known and {"copy": known.copy, "bfloat16": known.rates[torch.bfloat16]}}
        return facts

    yield "machine", look
    if scale.device == "cpu" or torch.cuda.is_available():
        yield from ceilings(scale)


def machine(device: str) -> Machine:
    """The ledger's description; a copy of the checkout whose git does not answer is of an unknown commit."""
    try:
        return here(device)
    except (OSError, subprocess.CalledProcessError):
        name = torch.cuda.get_device_name() if device == "cuda" else info.cpu_name()
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        return Machine(name, device, now, "unknown", info.machine())


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
    """Each distinct convolution of the network at a batch: its first layer and how many have it; dearest first."""
    found = layers(scale.model, batch, scale.size, getattr(torch, scale.dtypes[0]), *place(scale))
    count = Counter(layer.problem for layer in found)
    names: dict[Problem, str] = {}
    for layer in found:
        names.setdefault(layer.problem, layer.name)
    limits = known_ceilings(scale.device) or roofline.ceilings("h200")  # only the order hangs on it
    cost = {p: n * roofline.problem_floor(p, limits).seconds for p, n in count.items()}
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
    kernels = [k for k in map(find, dict.fromkeys(["aten.conv_bn_act", *proved])) if k.reason(problem) is None]
    calls: dict[str, list[Callable[[], object]]] = {"eager": [lambda a=a: testing.eager(problem.op, a) for a in sets]}
    calls["folded"] = bar(sets, problem)
    calls |= {k.id: [lambda k=k, a=a: k.fn(*a) for a in sets] for k in kernels}
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
    floor = limits and roofline.problem_floor(problem, limits)
    step = roofline.problem_step(problem)
    return {"status": "measured", "layer": name, "count": count, "batch": problem.x[0],
            "times": {id: told(t, {o: b for o, b in found.items() if o != id}) for id, t in found.items()},
            "failed": {**failed, **reasons}, "bytes": step.bytes, "flops": step.flops,
            "floor_us": floor and floor.seconds * 1e6, "bound": floor and floor.bound}


def told(timing: Timing, others: dict[str, Timing]) -> dict:
    """A timing as a row's part: microseconds, rounds, and how many times faster than each other variant."""
    low, high = timing.quartiles
    return {"us": timing.median * 1e6, "low": low * 1e6, "high": high * 1e6, "rounds": len(timing.seconds),
            "over": {id: timing.speedup_over(other) for id, other in others.items()}}


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

def fill_tables(scale: Scale, alive: Alive, proved: list[str], first: list[str], folder: str) -> Cases:
    """``autotune`` on the named problems, most to be gained first, then on ops across convolutions and a training step's."""
    dtype = getattr(torch, scale.dtypes[0])
    convs = {p.key: p for batch in scale.batches for p in listed(scale, batch)}
    groups = [p for op in ACROSS for batch in scale.batches for p in of_network(scale.model, batch, dtype, scale, op)]
    training = [p for op in ("bn_act", "bn_act_backward", "add_act", "add_act_backward")
                for p in of_network(scale.model, scale.batches[0], dtype, scale, op)]
    machine = device(scale)
    for problem in [*(convs[key] for key in first), *groups, *training]:
        yield problem.key, lambda p=problem: tuned(p, proved, machine, Path(folder))


def tuned(problem: Problem, proved: list[str], machine: autotune.Device, folder: Path) -> dict:
    outcome, = autotune.tune([problem], kernels=proved, device=machine, folder=folder)
    return {"status": "tuned", "calls": outcome.calls, "graph": outcome.graph, "bad": outcome.bad, "note": outcome.note}


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
    found = measure(case, [PROVIDERS[id] for id in peers], max_seconds=scale.model_seconds, say=alive,
                    progress=lambda n: alive(f"round {n}"))
    artifacts = torch.compiler.save_cache_artifacts() if compiles else None
    if artifacts is not None:
        (folder / CACHE).write_bytes(artifacts[0])
    return {"status": "measured", "rows": [asdict(o.row) for o in found.values() if o.row],
            "skipped": {id: o.skipped for id, o in found.items() if o.skipped},
            "wrong": {id: o.wrong for id, o in found.items() if o.wrong}}
