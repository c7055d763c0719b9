"""One problem, every kernel: checked, then timed in interleaved rounds over rotated buffers, beside eager and the bar.

A single op finds its inputs in a cache that a network would have flushed, so each variant walks through several copies
of its arguments, together larger than the cache. On a GPU the walk is one CUDA graph: device time, nothing of Python's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from ..dispatch.problem import ACROSS, Problem
from ..dispatch.registry import Kernel
from ..kernels.prepack import fold
from ..models.problems import across_layers, conv_layers
from ..roofline import cost
from ..roofline.floor import problem_floor
from ..runtime.cuda_graph import captured
from ..testing.check import check_kernel
from ..testing.eager import eager
from ..testing.samples import make_args
from ..util.timing import Timing, interleaved
from . import folded
from .ledger import Row
from .network import Outcome, known_ceilings
from .providers import DTYPES, fair

CPU_CACHE = 32 << 20  # at least this much is walked through: a server core's share of its last-level cache is smaller
MAX_COPIES = 16
CHECK_BATCH = 2  # the oracle is float64 on the CPU

# What stands beside the kernels: torch's ops one by one, and for convolutions the bar of ``folded``.
_EAGER = ("eager",)
BASELINES = {
    "conv_bn_act": ("eager", "folded"),
    "bn_act": _EAGER,
    "bn_act_backward": _EAGER,
    "add_act": _EAGER,
    "add_act_backward": _EAGER,
    **dict.fromkeys(ACROSS, _EAGER),
}
TRAINING = tuple(op for op in BASELINES if op not in ("conv_bn_act", *ACROSS))


def op_problems(
    model: str, batch: int, size: int, dtype: torch.dtype, device: str, capability: tuple[int, int] | None = None
) -> list[Problem]:
    """Every distinct problem of a network: its convolutions, the batch norms and adds of its training step, its groups of convolutions."""
    found: dict[Problem, None] = {}
    single = conv_layers(model, batch, size, dtype, device, capability)
    convs = [layer.problem for layer in single]
    found |= dict.fromkeys(convs)
    for conv in convs:
        found |= dict.fromkeys(filter(None, (after(conv, op) for op in TRAINING)))
    found |= dict.fromkeys(group.problem for group in across_layers(single))
    return list(found)


def after(conv: Problem, op: str) -> Problem | None:
    """The batch norm or residual add that follows a convolution in training, or its derivative; None where nothing is added."""
    if op.startswith("add_act") and not conv.residual:
        return None
    return Problem(
        op,
        conv.device,
        conv.dtype,
        (conv.x[0], conv.weight[0], *conv.out_hw),
        "nhwc",
        residual=conv.residual,
        act=conv.act,
        capability=conv.capability,
    )


def measure_op(
    problem: Problem,
    kernels: Iterable[Kernel],
    *,
    max_seconds: float = 5.0,
    max_rounds: int = 100,
    confidence: float = 0.01,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Outcome]:
    """Measure kernels on one problem beside its ``BASELINES``.

    A kernel that breaks the error rule on the same problem at batch 2 gets no time.
    """
    outcomes: dict[str, Outcome] = {}
    errors: dict[str, float] = {}
    calls: dict[str, Callable[[tuple], object]] = {"eager": lambda args: eager(problem.op, args)}
    small = replace(problem, x=(min(problem.x[0], CHECK_BATCH), *problem.x[1:]))
    for kernel in kernels:
        reason = kernel.reason(problem)
        if reason is not None:
            outcomes[kernel.id] = Outcome(kernel.id, skipped=reason)
            continue
        verdict = check_kernel(kernel, small)
        if not verdict.ok:
            outcomes[kernel.id] = Outcome(kernel.id, wrong=verdict.reason)
            continue
        errors[kernel.id] = verdict.error.rms
        errors["eager"] = verdict.eager.rms
        calls[kernel.id] = lambda args, kernel=kernel: kernel.fn(*args)
    copies = _copies(problem)
    with fair(), torch.inference_mode():
        variants = {
            id: _walk(call, [make_args(problem, seed) for seed in range(copies)], problem.device)
            for id, call in calls.items()
        }
        if "folded" in BASELINES[problem.op]:
            bar = [_bar(make_args(problem, seed), problem) for seed in range(copies)]
            variants["folded"] = _walk(lambda ready: ready[0](*ready[1:]), bar, problem.device)
        walks = interleaved(
            variants,
            device=problem.device,
            max_seconds=max_seconds,
            max_rounds=max_rounds,
            confidence=confidence,
            progress=progress,
        )
    timings = {id: Timing(tuple(s / copies for s in walk.seconds)) for id, walk in walks.items()}
    for id, timing in timings.items():
        outcomes[id] = Outcome(id, _row(problem, id, timing, timings, errors.get(id), errors.get("eager")), timing)
    return outcomes


def _copies(problem: Problem) -> int:
    """How many argument sets flush the cache four times over; at least two."""
    cache = torch.cuda.get_device_properties().L2_cache_size if problem.device == "cuda" else CPU_CACHE
    one = sum(a.nbytes for a in make_args(problem) if isinstance(a, Tensor))
    return max(2, min(MAX_COPIES, -(-4 * cache // max(one, 1))))


def _walk(call: Callable[[tuple], object], sets: list[tuple], device: str) -> Callable[[], object]:
    """One pass over all argument sets; on a GPU captured as a graph after a first pass outside it."""

    def walk() -> None:
        for args in sets:
            call(args)

    if device != "cuda":
        return walk
    return captured(walk, warm=1)[0].replay


def _bar(args: tuple, problem: Problem) -> tuple:
    """The bar's convolution for these arguments, folded beforehand, and the tensors to call it with."""
    x, weight, scale, shift, residual, mean, var, eps, stride, padding, dilation, groups, act = args
    weight, bias = fold(weight, scale, shift, mean, var, eps)
    conv = folded.Folded(weight, bias, (stride, padding, dilation, groups), act)
    return (folded.onednn if problem.device == "cpu" else folded.cudnn)(conv), x, residual


def _row(
    problem: Problem,
    id: str,
    timing: Timing,
    timings: dict[str, Timing],
    error: float | None,
    eager_error: float | None,
) -> Row:
    low, high = timing.quartiles
    dtype = next(name for name, dtype in DTYPES.items() if dtype == problem.dtype)
    speed = {other: timing.speedup_over(base) for other, base in timings.items() if other != id}
    ours = id not in BASELINES[problem.op] and not id.startswith("aten")
    step, limits = cost.problem_step(problem), known_ceilings(problem.device)
    floor = limits and problem_floor(problem, limits).seconds
    return Row(
        "op",
        f"op/{problem.key}",
        id,
        ours,
        dtype,
        problem.x[0],
        None,
        problem.layout,
        timing.median,
        low,
        high,
        len(timing.seconds),
        problem=problem.key,
        tflops=step.flops / timing.median / 1e12 or None,
        gb_s=step.bytes / timing.median / 1e9,
        roofline=floor and floor / timing.median,
        error=error,
        eager_error=eager_error,
        speed_over=speed,
    )
