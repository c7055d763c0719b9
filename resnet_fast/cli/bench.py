"""``bench``: ours against every way to run the same network here, interleaved, with the error beside each time.

With ``--kernel`` it is single ops that are compared, which is ``bench_kernel``'s.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace

import torch
from torch import Tensor

from ..bench.ledger import Row, here, measured_by, write_run
from ..bench.network import Case, Outcome, measure
from ..bench.op import TRAINING, after
from ..bench.providers import DTYPES, MODES, PROVIDERS, provider
from ..dispatch import tables
from ..models.family import list_models
from ..models.problems import conv_layers
from ..util.machine import default_device, device_or_error
from ..util.text import counted, table
from .options import positive, seconds, target

DEFAULT = (
    "eager-nchw",
    "eager",
    "folded",
    "compile",
    "compile-best",
    "ours",
    "ours-accelerate",
    "ours-plan",
    "openvino",
    "onnxruntime",
)
LEGEND = """\
ratio: speed over eager NCHW, the median of same-round ratios; spread: interquartile range over median;
error: relative RMS against float64; first s: build, compilation and first call."""

DESCRIPTION = """\
Time every way to run a network in interleaved rounds, and print medians,
same-round ratios to eager NCHW and the error against float64. One of ours
whose error breaks the rule gets no time, and the exit code is 1."""
EPILOG = (
    "providers:\n"
    + "\n".join(f" {'*' if p.id in DEFAULT else ' '}{p.id:15}  {p.title}" for p in PROVIDERS.values())
    + """
  kernel:ID|FILE   plan() with that kernel wherever it applies
What is not installed is skipped with the sentence that says what to install."""
)


def add_parser(commands) -> None:
    p = commands.add_parser(
        "bench",
        help="ours against eager, channels_last, torch.compile …",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [MODEL] [options]",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    p.add_argument(
        "model", metavar="MODEL", nargs="?", default="resnet50", help="an architecture (default %(default)s)"
    )
    case = p.add_argument_group("what is run")
    case.add_argument(
        "--mode",
        choices=MODES,
        default="infer",
        help="infer, or train: forward, backward, SGD step (default %(default)s)",
    )
    case.add_argument(
        "--batch",
        type=positive,
        nargs="+",
        metavar="N",
        help="batch sizes (default 1 16, on a GPU 256 1, to train there 32; with --kernel 1, on a GPU 256)",
    )
    case.add_argument(
        "--size", type=positive, default=224, metavar="N", help="height and width in pixels (default %(default)s)"
    )
    case.add_argument("--dtype", choices=DTYPES, help="(default fp32, on a GPU bf16)")
    case.add_argument("--device", default=default_device(), help="cpu or cuda (default here: %(default)s)")
    case.add_argument("--photos", action="store_true", help="real photographs (extra bench) instead of random images")
    compared = p.add_argument_group("what is compared")
    compared.add_argument(
        "--providers",
        nargs="+",
        metavar="ID",
        default=list(DEFAULT),
        help="ways to run it, of the list below (default: those with *)",
    )
    compared.add_argument(
        "--seconds", type=seconds, help="at most this long timing each case (default 40; with --kernel 4)"
    )
    compared.add_argument(
        "--cold", action="store_true", help="also the first answer of a fresh process, and its peak memory"
    )
    single = p.add_argument_group("single ops instead of networks")
    single.add_argument(
        "--kernel",
        nargs="+",
        action="extend",
        metavar="ID|FILE",
        help="these kernels on each distinct problem of MODEL, beside aten and rivals; without a GPU what the machine code says",
    )
    single.add_argument(
        "--layers", nargs="+", metavar="PATTERN", default=["*"], help="only these, as in 'layer3.*.conv3' (default all)"
    )
    single.add_argument(
        "--gpu", metavar="GPU", default="h200", help="without a GPU: the model to compile for (default %(default)s)"
    )
    output = p.add_argument_group("where it goes")
    output.add_argument("--json", action="store_true", help="print the ledger rows as JSON instead of the table")
    output.add_argument(
        "--save",
        nargs="?",
        const=False,
        type=target,
        metavar="FILE",
        help="write the run to FILE, or into benchmarks/results",
    )
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.model not in list_models():
        raise ValueError(f"got {args.model!r}, expected one of {', '.join(list_models())}")
    if args.kernel:
        from . import bench_kernel

        return bench_kernel.run(args)
    device = device_or_error(args.device)
    dtype, batches = defaults(device.type, args.mode)
    dtype, batches = args.dtype or dtype, args.batch or batches
    chosen = [provider(id) for id in dict.fromkeys(["eager-nchw", *args.providers])]
    machine = here(args.device)
    machine.facts["command"] = measured_by(["resnet_fast", *args.words], "--save")
    _say(f"{args.mode} {args.model}, {dtype}, {args.size}², on {where(machine)}")
    rows: list[Row] = []
    wrong = False
    for batch in batches:
        case = Case(args.mode, args.model, dtype, batch, args.size, device.type)
        lacking = untuned(case, batches) if device.type == "cuda" else None
        if lacking:
            _say(f"  {lacking}")
        outcomes = measure(
            case,
            chosen,
            x=_photos(args, batch, device, DTYPES[dtype]),
            max_seconds=args.seconds or 40.0,
            cold=args.cold,
            say=lambda line: _say(f"  {line}"),
            progress=_progress,
        )
        _say("")
        found = [outcome.row for outcome in outcomes.values() if outcome.row is not None]
        rows += found
        wrong = wrong or any(outcome.wrong for outcome in outcomes.values())
        if not args.json:
            print(
                "\n".join([case.name, show(found), _refusals(outcomes) + (f"{lacking}\n" if lacking else "")]),
                flush=True,
            )
    if args.save is not None:
        _say(f"written: {write_run(rows, machine, args.save or None)}")
    if args.json:
        json.dump({"machine": asdict(machine), "rows": [asdict(row) for row in rows]}, sys.stdout, indent=1)
        print()
    else:
        print(
            LEGEND
            + "\nWeights: random, seeded, the same for all; no pretrained ones are at hand, so no accuracy is claimed."
        )
    return 1 if wrong else 0


def defaults(device: str, mode: str) -> tuple[str, tuple[int, ...]]:
    """(dtype, batch sizes) that people run on such a device."""
    if device == "cpu":
        return "fp32", (1, 16)
    return "bf16", (256, 1) if mode == "infer" else (32,)


def untuned(case: Case, batches: Sequence[int] = ()) -> str | None:
    """What ours lacks on a GPU that was never tuned for a case, and the command that brings it; None where something was measured."""
    capability, dtype = torch.cuda.get_device_capability(), DTYPES[case.dtype]
    convs = [layer.problem for layer in conv_layers(case.model, case.batch, case.size, dtype, "cuda", capability)]
    asked = (
        {replace(conv, bn=False) for conv in convs}
        if case.mode == "infer"
        else {after(conv, op) for conv in convs for op in TRAINING} - {None}
    )
    if any(tables.records(problem) for problem in asked):
        return None
    command = ["python", "-m", "resnet_fast", "tune", case.model, "--batch", *map(str, batches or (case.batch,))]
    command += ["--size", str(case.size)] if case.size != 224 else []
    command += ["--dtype", str(dtype).removeprefix("torch.")] if case.dtype != "bf16" else []
    command += ["--train"] if case.mode == "train" else []
    return (
        f"{case.name}: no kernel of ours was measured for this on {tables.gpu_name()} yet, so ours runs torch's own kernels. "
        f"`{' '.join(command)}` measures them, in minutes, and says how many; then run this again"
    )


def where(machine) -> str:
    """The machine in a few words."""
    facts = machine.facts
    what = (
        facts["gpu"]
        if machine.device == "cuda"
        else f"{facts['cpu']}, {facts['cpu isa']}, {counted(facts['threads'], 'thread')}"
    )
    return f"{what}, torch {facts['torch']}"


def show(rows: list[Row]) -> str:
    """The comparison as a table."""

    def line(row: Row) -> tuple[str, ...]:
        title = PROVIDERS[row.provider].title if row.provider in PROVIDERS else row.provider
        ratio = row.speed_over.get("eager-nchw", 1.0)
        cold = "" if row.cold_s is None else f"{row.cold_s:.1f}"
        peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}"
        return (
            title,
            f"{row.seconds * 1e3:.1f}",
            f"{row.img_s:.1f}",
            f"{ratio:.2f}",
            f"{(row.high - row.low) / row.seconds:.0%}",
            f"{row.error:.1e}",
            f"{row.eager_error:.1e}",
            f"{row.first_s:.1f}",
            cold,
            peak,
        )

    header = ["", "ms", "img/s", "ratio", "spread", "error", "eager's", "first s", "cold s", "peak MB"]
    lines = [line(row) for row in rows]
    kept = [i for i in range(len(header)) if i < 8 or any(cells[i] for cells in lines)]
    return table([header[i] for i in kept], [[cells[i] for i in kept] for cells in lines], right=range(1, len(kept)))


def _refusals(outcomes: dict[str, Outcome]) -> str:
    return "".join(
        f"{o.provider}: {'skipped: ' + o.skipped if o.skipped else 'WRONG: ' + o.wrong}\n"
        for o in outcomes.values()
        if o.row is None
    )


def _photos(args: argparse.Namespace, batch: int, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    if not args.photos:
        return None
    from ..data import samples

    return samples.batch(batch, args.size).to(device, dtype)


def _progress(done: int) -> None:
    print(f"\r  timing round {done} ", end="", file=sys.stderr, flush=True)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
