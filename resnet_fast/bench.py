"""``bench``: ours against every way to run the same network here, interleaved, with the error beside each time."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from .console import DTYPES, default_device, device_or_error, positive, table
from .info import machine
from .providers import PROVIDERS, Provider, example_input, fair, provider, reference_model
from .testing import FACTOR, FLOOR, error
from .timing import interleaved

DEFAULT = ("eager-nchw", "eager", "compile", "compile-best", "ours", "ours-accelerate", "ours-plan")
SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}
ORACLE_IMAGES = 2  # enough to judge an error; float64 is the slowest thing here


@dataclass(frozen=True)
class Result:
    """One provider in one case. ``ratio`` is speed over eager NCHW, the median of same-round ratios; errors are relative to float64."""

    provider: str
    batch: int
    dtype: str
    ms: float
    img_s: float
    spread: float
    ratio: float
    error: float
    eager_error: float
    first_s: float
    rounds: int


def add_parser(commands) -> None:
    p = commands.add_parser("bench", help="ours against eager, channels_last, torch.compile …",
                            description="Time every way to run the network in interleaved rounds and print medians, same-round ratios to eager "
                                        "NCHW and the error against float64. A provider whose error breaks the rule gets no time.")
    p.add_argument("model", nargs="?", default="resnet50", help="an architecture (default %(default)s)")
    p.add_argument("--batch", type=positive, nargs="+", default=[1, 16], help="batch sizes (default 1 16)")
    p.add_argument("--size", type=positive, default=224, help="height and width (default %(default)s)")
    p.add_argument("--dtype", choices=[d for d in DTYPES if d != "float64"], default="float32")
    p.add_argument("--device", default=default_device(), help="cpu or cuda (default here: %(default)s)")
    p.add_argument("--providers", nargs="+", metavar="ID", default=list(DEFAULT), help=f"of {', '.join(PROVIDERS)} or kernel:ID")
    p.add_argument("--photos", action="store_true", help="real photographs as input (package scikit-image) instead of random images")
    p.add_argument("--seconds", type=float, default=40.0, help="at most this long timing each case (default %(default)s)")
    p.add_argument("--json", action="store_true", help="print JSON instead of the table")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    device = device_or_error(args.device)
    chosen = [provider(id) for id in args.providers]
    if "eager-nchw" not in args.providers:
        chosen.insert(0, PROVIDERS["eager-nchw"])
    model = reference_model(args.model, device)
    say(f"{args.model}, {SHORT[args.dtype]}, {args.size}², on {where(device)}")
    results: list[Result] = []
    for batch in args.batch:
        x = images(args, batch, device)
        results += case(model, chosen, x, args)
        if not args.json:
            print(f"\nbatch {batch}\n{show([r for r in results if r.batch == batch])}", flush=True)
    if args.json:
        json.dump({"machine": machine(), "model": args.model, "size": args.size, "results": [asdict(r) for r in results]}, sys.stdout, indent=1)
        print()
    else:
        print("\nratio: speed over eager NCHW, median of same-round ratios; error: relative RMS of the logits against float64;\n"
              "first: build, compilation and first call, in seconds. Weights are random: no pretrained ones were asked for." )
    return 0 if any(r.provider.startswith("ours") for r in results) else 1


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def where(device: torch.device) -> str:
    """The machine in a few words."""
    facts = machine()
    return facts["gpu"] if device.type == "cuda" else f"{facts['cpu']} ({facts['cpu isa']}, {facts['threads']} threads), torch {facts['torch']}"


def images(args: argparse.Namespace, batch: int, device: torch.device) -> Tensor:
    """The input of a case, NCHW."""
    if args.photos:
        from . import photos
        return photos.batch(batch, args.size).to(device, DTYPES[args.dtype])
    return example_input(batch, args.size, DTYPES[args.dtype], device)


def case(model: nn.Module, chosen: list[Provider], x: Tensor, args: argparse.Namespace) -> list[Result]:
    """Build, judge and time the providers that can run this case."""
    with torch.no_grad():
        oracle = model.cpu().double()(x[:ORACLE_IMAGES].cpu().double())
        model.float().to(x.device)
    runs: dict[str, Callable[[], object]] = {}
    first: dict[str, float] = {}
    errors: dict[str, float] = {}
    with fair():
        for p in chosen:
            reason = p.why_not("infer", x.device.type, SHORT[args.dtype])
            if reason is not None:
                say(f"  {p.id}: skipped: {reason}")
                continue
            say(f"  {p.id}: building …")
            start = time.perf_counter()
            fn = p.prepare("infer", model, x, x.dtype)
            out = fn(x).float().cpu()
            first[p.id] = time.perf_counter() - start
            errors[p.id] = error(out[:ORACLE_IMAGES], oracle).rms
            if p.ours and not errors[p.id] <= FACTOR * errors["eager-nchw"] + FLOOR[x.dtype]:
                say(f"  {p.id}: WRONG: error {errors[p.id]:.2g} against eager's {errors['eager-nchw']:.2g}; not timed")
                continue
            runs[p.id] = lambda fn=fn: fn(x)
        timings = interleaved(runs, device=x.device.type, max_seconds=args.seconds, max_rounds=60, confidence=0.01,
                              progress=lambda n: print(f"\r  timing round {n} ", end="", file=sys.stderr, flush=True))
    say("")
    base = timings["eager-nchw"]
    return [Result(id, x.shape[0], SHORT[args.dtype], t.median * 1e3, x.shape[0] / t.median, t.spread, t.speedup_over(base), errors[id],
                   errors["eager-nchw"], first[id], len(t.seconds)) for id, t in timings.items()]


def show(results: list[Result]) -> str:
    """The comparison as a table."""
    return table(("", "ms", "img/s", "ratio", "spread", "error", "eager's", "first s", "rounds"),
                 [(PROVIDERS[r.provider].title if r.provider in PROVIDERS else r.provider, f"{r.ms:.1f}", f"{r.img_s:.1f}",
                   f"{r.ratio:.2f}", f"{r.spread:.0%}", f"{r.error:.1e}", f"{r.eager_error:.1e}", f"{r.first_s:.1f}", r.rounds)
                  for r in results], right=range(1, 9))
