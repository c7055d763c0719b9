"""One problem, every kernel: checked, then timed in interleaved rounds over rotated buffers, beside eager and the bar.

A single op finds its inputs in a cache that a network would have flushed, so each variant walks through several copies
of its arguments, together larger than the cache. On a GPU the walk is one CUDA graph: device time, nothing of Python's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..dispatch import ACROSS, Kernel, Problem
from ..kernels.prepack import fold
from ..models.problems import TRAINING, across_layers, conv_layers, problem_after
from ..roofline import cost
from ..roofline.floor import problem_floor
from ..runtime.cuda_graph import captured
from ..testing.check import check_kernel
from ..testing.eager import eager
from ..testing.samples import make_args
from ..util.machine import SHORT_DTYPES
from ..util.timing import Timing, interleaved
from . import folded
from .ledger import Row
from .network import Measured, known_ceilings
from .providers import fair

# at least this much is walked through: a server core's share of its last-level cache is smaller
CPU_CACHE = 32 << 20
MAX_COPIES = 16
CHECK_BATCH = 2  # the oracle is float64 on the CPU

# What stands beside the kernels: torch's ops one by one, and for convolutions the bar of ``folded``.
BASELINES: dict[str, tuple[str, ...]] = {
    "conv_bn_act": ("eager", "folded"),
    **dict.fromkeys((*TRAINING, *ACROSS), ("eager",)),
}

Call = Callable[[tuple], object]


def op_problems(
    model: str,
    batch: int,
    size: int,
    dtype: torch.dtype,
    device: str,
    capability: tuple[int, int] | None = None,
) -> list[Problem]:
    """Return every distinct problem of a network: its convolutions, what training adds, groups of convolutions."""
    single = conv_layers(model, batch, size, dtype, device, capability)
    convs = [layer.problem for layer in single]
    found = dict.fromkeys(convs)
    for conv in convs:
        after = (problem_after(conv, op) for op in TRAINING)
        found |= dict.fromkeys(problem for problem in after if problem is not None)
    found |= dict.fromkeys(group.problem for group in across_layers(single))
    return list(found)


@dataclass
class _Checked:
    """The calls that may be timed, the errors of each, and what became of the other kernels."""

    calls: dict[str, Call]
    errors: dict[str, float] = field(default_factory=dict)
    refused: dict[str, Measured] = field(default_factory=dict)


def measure_op(
    problem: Problem,
    kernels: Iterable[Kernel],
    *,
    max_seconds: float = 5.0,
    max_rounds: int = 100,
    confidence: float = 0.01,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Measured]:
    """Measure kernels on one problem beside its ``BASELINES``.

    A kernel that breaks the error rule on the same problem at batch 2 gets no time.
    """
    checked = _check(problem, kernels)
    copies = _copies(problem)
    with fair(), torch.inference_mode():
        walks = interleaved(
            _variants(problem, checked.calls, copies),
            device=problem.device,
            max_seconds=max_seconds,
            max_rounds=max_rounds,
            confidence=confidence,
            progress=progress,
        )
    timings = {id: _of_one_call(walk, copies) for id, walk in walks.items()}
    measured = dict(checked.refused)
    for id, timing in timings.items():
        row = _row(problem, id, timings, checked.errors)
        measured[id] = Measured(id, row, timing)
    return measured


def _of_one_call(walk: Timing, calls: int) -> Timing:
    seconds_a_call = tuple(seconds / calls for seconds in walk.seconds)
    return Timing(seconds_a_call)


def _check(problem: Problem, kernels: Iterable[Kernel]) -> _Checked:
    """Check each kernel on the problem at a small batch."""
    checked = _Checked({"eager": lambda args: eager(problem.op, args)})
    small = at_check_batch(problem)
    for kernel in kernels:
        reason = kernel.reason(problem)
        if reason is not None:
            checked.refused[kernel.id] = Measured(kernel.id, skipped=reason)
            continue
        verdict = check_kernel(kernel, small)
        if not verdict.ok:
            checked.refused[kernel.id] = Measured(kernel.id, wrong=verdict.reason)
            continue
        checked.errors[kernel.id] = verdict.error.rms
        checked.errors["eager"] = verdict.eager.rms
        checked.calls[kernel.id] = _call_of(kernel)
    return checked


def at_check_batch(problem: Problem) -> Problem:
    """Return the problem with at most ``CHECK_BATCH`` images."""
    batch, *image = problem.x
    return replace(problem, x=(min(batch, CHECK_BATCH), *image))


def _call_of(kernel: Kernel) -> Call:
    return lambda args: kernel.fn(*args)


def _copies(problem: Problem) -> int:
    """Return how many argument sets flush the cache four times over; at least two."""
    cache = CPU_CACHE
    if problem.device == "cuda":
        cache = torch.cuda.get_device_properties().L2_cache_size
    one = sum(a.nbytes for a in make_args(problem) if isinstance(a, Tensor))
    needed = -(-4 * cache // max(one, 1))  # rounded up
    return max(2, min(MAX_COPIES, needed))


def _variants(
    problem: Problem, calls: dict[str, Call], copies: int
) -> dict[str, Callable[[], object]]:
    """Return one walk for each call, and one for the bar; each has its own copies of the arguments."""

    def argument_sets() -> list[tuple]:
        return [make_args(problem, seed) for seed in range(copies)]

    device = problem.device
    variants = {id: _walk(call, argument_sets(), device) for id, call in calls.items()}
    if "folded" in BASELINES[problem.op]:
        bar = [_bar(args, problem) for args in argument_sets()]
        variants["folded"] = _walk(_call_bar, bar, device)
    return variants


def _walk(call: Call, sets: list[tuple], device: str) -> Callable[[], object]:
    """Return one pass over all argument sets; on a GPU captured as a graph after a first pass outside it."""

    def walk() -> None:
        for args in sets:
            call(args)

    if device != "cuda":
        return walk
    graph, _ = captured(walk, warm=1)
    return graph.replay


def _bar(args: tuple, problem: Problem) -> tuple:
    """Return the bar's convolution for these arguments, folded beforehand, and the tensors to call it with."""
    x, weight, scale, shift, residual, mean, var, eps, stride, padding, dilation, groups, act = args
    weight, bias = fold(weight, scale, shift, mean, var, eps)
    geometry = stride, padding, dilation, groups
    conv = folded.Folded(weight, bias, geometry, act)
    library = folded.onednn if problem.device == "cpu" else folded.cudnn
    return library(conv), x, residual


def _call_bar(prepared: tuple) -> object:
    conv, x, residual = prepared
    return conv(x, residual)


def _row(problem: Problem, id: str, timings: dict[str, Timing], errors: dict[str, float]) -> Row:
    timing = timings[id]
    low, high = timing.quartiles
    step = cost.problem_step(problem)
    limits = known_ceilings(problem.device)
    floor = problem_floor(problem, limits).seconds if limits else None
    return Row(
        level="op",
        case=f"op/{problem.key}",
        provider=id,
        ours=id not in BASELINES[problem.op] and not id.startswith("aten"),
        dtype=next(name for name, dtype in SHORT_DTYPES.items() if dtype == problem.dtype),
        batch=problem.x[0],
        size=None,
        layout=problem.layout,
        seconds=timing.median,
        low=low,
        high=high,
        rounds=len(timing.seconds),
        problem=problem.key,
        tflops=step.flops / timing.median / 1e12 or None,
        gb_s=step.bytes / timing.median / 1e9,
        roofline=floor and floor / timing.median,
        error=errors.get(id),
        eager_error=errors.get("eager"),
        speed_over={
            other: timing.speedup_over(base) for other, base in timings.items() if other != id
        },
    )
