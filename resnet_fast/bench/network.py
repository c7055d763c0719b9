"""One case, every provider: built, checked against float64, timed in interleaved rounds, returned as ledger rows."""

from __future__ import annotations

import copy
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..analysis import network_floor
from ..analysis.network_cost import INFERENCE, network
from ..analysis.training_cost import TRAINING
from ..dispatch.registry import NotUsed
from ..roofline import chips, floor
from ..testing.rule import FACTOR, FLOOR, GRADIENT_FACTOR, error
from ..util.machine import SHORT_DTYPES
from ..util.timing import Timing, interleaved
from .cold_start import ColdStart, cold_start
from .ledger import Row, case_name
from .providers import PROVIDERS, Provider, TrainStep, example_input, fair, reference_model

# The level of fusion that a network's share of the roofline refers to.
CEILING = {"infer": network_floor.LEVEL, "train": "+ fused backward"}
ORACLE_IMAGES = 2  # inference only: images do not mix, and float64 is the slowest thing here


@dataclass(frozen=True)
class Case:
    """A network in one mode, dtype, batch and image size on one device ("cpu" or "cuda")."""

    mode: str
    model: str
    dtype: str
    batch: int
    size: int = 224
    device: str = "cpu"

    @property
    def name(self) -> str:
        return case_name(self.mode, self.model, self.dtype, self.batch, self.size)


@dataclass(frozen=True)
class Measured:
    """The result of one provider: a row and its rounds; or why it was ``skipped``; or how it is ``wrong`` (ours)."""

    provider: str
    row: Row | None = None
    timing: Timing | None = None
    skipped: str | None = None
    wrong: str | None = None


@dataclass
class _Built:
    """A provider that is built and run once; ``error`` is its distance from float64."""

    provider: Provider
    run: Callable[[Tensor], Tensor]
    error: float
    first_s: float
    peak_bytes: int | None


@dataclass(frozen=True)
class _Oracle:
    """What every provider is judged by: the float64 answers, eager's error, and the error that the rule allows."""

    exact: Tensor
    eager: float
    allowed: float


def measure(
    case: Case,
    providers: Iterable[Provider],
    *,
    x: Tensor | None = None,
    max_seconds: float = 40.0,
    max_rounds: int = 60,
    confidence: float = 0.01,
    cold: bool = False,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Measured]:
    """Measure the providers of one case together; ``x`` replaces the random images, ``cold`` adds cold starts.

    One of ours whose error breaks the rule gets no time: the whole-network form of it, RMS over the logits (in
    training, over all gradients) at most 2 × (3 ×) eager's plus the dtype's floor.
    """
    if x is None:
        x = example_input(case.batch, case.size, SHORT_DTYPES[case.dtype], case.device)
    with fair():
        model = reference_model(case.model, case.device)
        say("the answers in float64, and eager's error …")
        judged_by = _oracle(case, model, x)
        built, measured = _build_all(case, providers, model, x, judged_by, say)
        timings: dict[str, Timing] = {}
        if built:
            timings = interleaved(
                {id: partial(one.run, x) for id, one in built.items()},
                device=case.device,
                max_seconds=max_seconds,
                max_rounds=max_rounds,
                confidence=confidence,
                progress=progress,
            )
    for id, timing in timings.items():
        started = None
        if cold:
            say(f"{id}: cold start …")
            started = cold_start(
                id, case.mode, case.model, case.dtype, case.batch, case.size, case.device
            )
        row = _row(case, built[id], timings, judged_by.eager, started)
        measured[id] = Measured(id, row, timing)
    return measured


def _oracle(case: Case, model: nn.Module, x: Tensor) -> _Oracle:
    exact = oracle(case.mode, model, x)
    provider = PROVIDERS["eager-nchw"]
    run = provider.prepare(case.mode, model, x, x.dtype)
    eager = _distance(run, x, exact)
    factor = FACTOR if case.mode == "infer" else GRADIENT_FACTOR
    allowed = factor * eager + FLOOR[x.dtype]
    return _Oracle(exact, eager, allowed)


def _build_all(
    case: Case,
    providers: Iterable[Provider],
    model: nn.Module,
    x: Tensor,
    judged_by: _Oracle,
    say: Callable[[str], None],
) -> tuple[dict[str, _Built], dict[str, Measured]]:
    """Return the providers that may be timed, and why the others may not."""
    built: dict[str, _Built] = {}
    refused: dict[str, Measured] = {}
    for provider in providers:
        skipped = provider.why_not(case.mode, case.device, case.dtype)
        if skipped is None:
            say(f"{provider.id}: building …")
            found = _build(provider, case, model, x, judged_by)
        else:
            found = Measured(provider.id, skipped=skipped)
        if isinstance(found, _Built):
            built[provider.id] = found
            continue
        refused[provider.id] = found
        reason = (
            f"skipped: {found.skipped}"
            if found.wrong is None
            else f"WRONG: {found.wrong}; not timed"
        )
        say(f"{provider.id}: {reason}")
    return built, refused


def _build(
    provider: Provider, case: Case, model: nn.Module, x: Tensor, judged_by: _Oracle
) -> _Built | Measured:
    """Build a provider, or return why it is skipped or wrong."""
    try:
        built = _prepare(provider, case, model, x, judged_by.exact)
    except NotUsed as reason:
        return Measured(provider.id, skipped=str(reason))
    except Exception as error:  # engines raise errors of many types: each is a finding, and the others are still timed
        first_line = next(iter(str(error).splitlines()), "")
        failed = f"failed: {type(error).__name__}: {first_line}"
        if not provider.ours or isinstance(error, torch.OutOfMemoryError):
            return Measured(provider.id, skipped=failed)
        traceback.print_exc()
        return Measured(provider.id, wrong=failed)
    within = built.error <= judged_by.allowed  # false for a NaN
    if provider.ours and not within:
        limits = f"allowed {judged_by.allowed:.3g} (eager's is {judged_by.eager:.3g})"
        return Measured(provider.id, wrong=f"error {built.error:.3g} against float64, {limits}")
    return built


def oracle(mode: str, model: nn.Module, x: Tensor) -> Tensor:
    """Return in float64 the logits of the first images, or the gradients of a training step on all; on the CPU."""
    wide = copy.deepcopy(model).double()
    if mode == "infer":
        with torch.no_grad():
            images = x[:ORACLE_IMAGES].cpu().double()
            return wide.cpu()(images)
    step = TrainStep(wide.train(), wide, torch.float64, torch.contiguous_format)
    step(x.double())
    return step.gradients().cpu()


def _distance(run: Callable[[Tensor], Tensor], x: Tensor, exact: Tensor) -> float:
    """Run a provider for the first time; returns its relative RMS distance from the oracle."""
    out = run(x)
    got = run.gradients() if isinstance(run, TrainStep) else out[:ORACLE_IMAGES]
    return error(got, exact).rms


def _prepare(provider: Provider, case: Case, model: nn.Module, x: Tensor, exact: Tensor) -> _Built:
    """Build a provider and run it, on a GPU once more for its peak memory."""
    on_gpu = case.device == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    start = time.perf_counter()
    run = provider.prepare(case.mode, model, x, SHORT_DTYPES[case.dtype])
    distance = _distance(run, x, exact)  # reads the result back, so it waits for the device
    first = time.perf_counter() - start
    if not on_gpu:
        return _Built(provider, run, distance, first, None)
    torch.cuda.reset_peak_memory_stats()
    run(x)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - allocated
    torch.cuda.empty_cache()
    # A graph's private pool is reserved, not allocated, so each of the two counts alone would miss something.
    return _Built(
        provider, run, distance, first, max(peak, torch.cuda.memory_reserved() - reserved)
    )


def work(case: Case) -> tuple[int, float | None]:
    """Return the FLOPs of one call, and its floor in seconds if this device's ceilings are known."""
    levels = {"infer": INFERENCE, "train": TRAINING}[case.mode]
    level = levels[CEILING[case.mode]]
    dtype = SHORT_DTYPES[case.dtype]
    net = network(case.model, case.batch, case.size, dtype)
    steps = list(level(net))
    flops = sum(step.flops for step in steps)
    limits = known_ceilings(case.device)
    if limits is None:
        return flops, None
    floors = floor.predict(steps, limits, dtype)
    return flops, sum(step.seconds for step in floors)


def known_ceilings(device: str) -> chips.Ceilings | None:
    """Return this GPU's ceilings; None for a CPU and for an unlisted GPU."""
    if device != "cuda":
        return None
    try:
        return chips.ceilings(torch.cuda.get_device_name())
    except LookupError:
        return None


def _row(
    case: Case, built: _Built, timings: dict[str, Timing], eager: float, started: ColdStart | None
) -> Row:
    provider = built.provider
    timing = timings[provider.id]
    low, high = timing.quartiles
    flops, least = work(case)
    peak = built.peak_bytes
    if not peak and started:
        peak = started.peak_bytes
    return Row(
        level="model",
        case=case.name,
        provider=provider.id,
        ours=provider.ours,
        dtype=case.dtype,
        batch=case.batch,
        size=case.size,
        layout="nchw",
        seconds=timing.median,
        low=low,
        high=high,
        rounds=len(timing.seconds),
        img_s=case.batch / timing.median,
        tflops=flops / timing.median / 1e12,
        roofline=least and least / timing.median,
        first_s=built.first_s,
        cold_s=started.seconds if started else None,
        peak_bytes=peak,
        error=built.error,
        eager_error=eager,
        speed_over={
            other: timing.speedup_over(base)
            for other, base in timings.items()
            if other != provider.id
        },
    )
