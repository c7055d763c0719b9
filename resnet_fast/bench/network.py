"""One case, every provider: built, judged against float64, timed in interleaved rounds, written down as ledger rows."""

from __future__ import annotations

import copy
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..analysis import network_floor
from ..analysis.network_cost import INFERENCE, network
from ..analysis.training_cost import TRAINING
from ..dispatch.registry import NotUsed
from ..roofline import chips, floor
from ..testing.rule import FACTOR, FLOOR, GRADIENT_FACTOR, error
from ..util.timing import Timing, interleaved
from .cold_start import ColdStart, cold_start
from .ledger import Row, case_name
from .providers import DTYPES, PROVIDERS, Provider, TrainStep, example_input, fair, reference_model

# The level of fusion whose floor a network's share of the roofline is taken of.
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
class Outcome:
    """What became of one provider: a row and its rounds; or why it was ``skipped``; or how it is ``wrong`` (ours)."""

    provider: str
    row: Row | None = None
    timing: Timing | None = None
    skipped: str | None = None
    wrong: str | None = None


@dataclass
class _Ready:
    """A provider that is built and judged."""

    provider: Provider
    run: Callable[[Tensor], Tensor]
    error: float
    first_s: float
    peak_bytes: int | None


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
) -> dict[str, Outcome]:
    """Measure the providers of one case together; ``x`` replaces the random images, ``cold`` adds cold starts.

    One of ours whose error breaks the rule gets no time: the whole-network form of it, RMS over the logits (in
    training, over all gradients) at most 2 × (3 ×) eager's plus the dtype's floor.
    """
    x = example_input(case.batch, case.size, DTYPES[case.dtype], case.device) if x is None else x
    with fair():
        ready, outcomes, eager = _build(case, providers, x, say)
        runs = {id: (lambda made=made: made.run(x)) for id, made in ready.items()}
        timings = (
            interleaved(
                runs,
                device=case.device,
                max_seconds=max_seconds,
                max_rounds=max_rounds,
                confidence=confidence,
                progress=progress,
            )
            if runs
            else {}
        )
    for id, timing in timings.items():
        started = None
        if cold:
            say(f"{id}: cold start …")
            started = cold_start(id, case.mode, case.model, case.dtype, case.batch, case.size, case.device)
        outcomes[id] = Outcome(id, _row(case, ready[id], timing, timings, eager, started), timing)
    return outcomes


def _build(
    case: Case, providers: Iterable[Provider], x: Tensor, say: Callable[[str], None]
) -> tuple[dict[str, _Ready], dict[str, Outcome], float]:
    """(what may be timed, what became of the others, eager's error)."""
    model = reference_model(case.model, case.device)
    say("the answers in float64, and eager's error …")
    exact = oracle(case.mode, model, x)
    eager = _distance(case.mode, PROVIDERS["eager-nchw"].prepare(case.mode, model, x, x.dtype), x, exact)
    allowed = (FACTOR if case.mode == "infer" else GRADIENT_FACTOR) * eager + FLOOR[x.dtype]
    ready: dict[str, _Ready] = {}
    outcomes: dict[str, Outcome] = {}
    for p in providers:
        skipped, wrong = p.why_not(case.mode, case.device, case.dtype), None
        if skipped is None:
            say(f"{p.id}: building …")
            try:
                made = _prepare(p, case, model, x, exact)
                if p.ours and not made.error <= allowed:
                    wrong = f"error {made.error:.3g} against float64, allowed {allowed:.3g} (eager's is {eager:.3g})"
            except NotUsed as reason:
                skipped = str(reason)
            except Exception as error:  # engines fail in ways of their own: a finding, and no reason to lose the others
                words = f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
                if p.ours and not isinstance(error, torch.OutOfMemoryError):
                    traceback.print_exc()
                    wrong = words
                else:
                    skipped = words
        if skipped is None and wrong is None:
            ready[p.id] = made
        else:
            outcomes[p.id] = Outcome(p.id, skipped=skipped, wrong=wrong)
            say(f"{p.id}: {f'skipped: {skipped}' if wrong is None else f'WRONG: {wrong}; not timed'}")
    return ready, outcomes, eager


def oracle(mode: str, model: nn.Module, x: Tensor) -> Tensor:
    """Float64: the logits of the first images (on the CPU), or the gradients of a training step on all of them."""
    wide = copy.deepcopy(model).double()
    if mode == "infer":
        with torch.no_grad():
            return wide.cpu()(x[:ORACLE_IMAGES].cpu().double())
    step = TrainStep(wide.train(), wide, torch.float64, torch.contiguous_format)
    step(x.double())
    return step.gradients().cpu()


def _distance(mode: str, run: Callable[[Tensor], Tensor], x: Tensor, exact: Tensor) -> float:
    """Relative RMS distance from the oracle of a provider that has not run before."""
    out = run(x)
    got = out[:ORACLE_IMAGES] if mode == "infer" else run.gradients()
    return error(got, exact).rms


def _prepare(p: Provider, case: Case, model: nn.Module, x: Tensor, exact: Tensor) -> _Ready:
    on_gpu = case.device == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        held, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    start = time.perf_counter()
    run = p.prepare(case.mode, model, x, DTYPES[case.dtype])
    found = _distance(case.mode, run, x, exact)  # reads the result back, so it waits for the device
    first = time.perf_counter() - start
    if not on_gpu:
        return _Ready(p, run, found, first, None)
    torch.cuda.reset_peak_memory_stats()
    run(x)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - held
    torch.cuda.empty_cache()
    # A graph's private pool is reserved, not allocated, so each of the two counts alone would miss something.
    return _Ready(p, run, found, first, max(peak, torch.cuda.memory_reserved() - reserved))


def work(case: Case) -> tuple[int, float | None]:
    """FLOPs of one call, and its floor in seconds if this device's ceilings are known."""
    levels = {"infer": INFERENCE, "train": TRAINING}[case.mode]
    dtype = DTYPES[case.dtype]
    steps = list(levels[CEILING[case.mode]](network(case.model, case.batch, case.size, dtype)))
    limits = known_ceilings(case.device)
    seconds = None if limits is None else sum(f.seconds for f in floor.predict(steps, limits, dtype))
    return sum(step.flops for step in steps), seconds


def known_ceilings(device: str) -> chips.Ceilings | None:
    """This GPU's ceilings, or None: a CPU, or a GPU that nobody wrote down."""
    if device != "cuda":
        return None
    try:
        return chips.ceilings(torch.cuda.get_device_name())
    except LookupError:
        return None


def _row(
    case: Case, made: _Ready, timing: Timing, timings: dict[str, Timing], eager: float, started: ColdStart | None
) -> Row:
    low, high = timing.quartiles
    p = made.provider
    flops, floor = work(case)
    speed = {other: timing.speedup_over(base) for other, base in timings.items() if other != p.id}
    return Row(
        "model",
        case.name,
        p.id,
        p.ours,
        case.dtype,
        case.batch,
        case.size,
        "nchw",
        timing.median,
        low,
        high,
        len(timing.seconds),
        img_s=case.batch / timing.median,
        tflops=flops / timing.median / 1e12,
        roofline=floor and floor / timing.median,
        first_s=made.first_s,
        cold_s=started and started.seconds,
        peak_bytes=made.peak_bytes or started and started.peak_bytes,
        error=made.error,
        eager_error=eager,
        speed_over=speed,
    )
