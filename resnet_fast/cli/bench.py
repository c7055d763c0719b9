"""``bench``: ours against every way to run the same network here, interleaved, with the error beside each time.

With ``--kernel`` it compares single ops: see ``bench_kernel``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace

import torch
from torch import Tensor

from ..bench.ledger import Machine, Row, here, measured_by, write_run
from ..bench.network import Case, Measured, measure
from ..bench.providers import MODES, PROVIDERS, Provider, provider
from ..dispatch import Problem, tables
from ..models.family import list_models
from ..models.problems import TRAINING, conv_layers, problem_after
from ..util.machine import SHORT_DTYPES, default_device, device_or_error
from ..util.text import Column, column_table, counted
from .options import positive, seconds, writable_file

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
WEIGHTS = "Weights: random, seeded, the same for all; no pretrained ones are at hand, so no accuracy is claimed."

DESCRIPTION = """\
Time every way to run a network in interleaved rounds, and print medians,
same-round ratios to eager NCHW and the error against float64. One of ours
whose error breaks the rule gets no time, and the exit code is 1."""
EPILOG = (
    "providers:\n"
    + "\n".join(
        f" {'*' if p.id in DEFAULT else ' '}{p.id:15}  {p.title}" for p in PROVIDERS.values()
    )
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
        "model",
        metavar="MODEL",
        nargs="?",
        default="resnet50",
        help="an architecture (default %(default)s)",
    )
    _add_case(p.add_argument_group("what is run"))
    _add_comparison(p.add_argument_group("what is compared"))
    _add_kernels(p.add_argument_group("single ops instead of networks"))
    _add_output(p.add_argument_group("where it goes"))
    p.set_defaults(run=run)


def _add_case(case: argparse._ArgumentGroup) -> None:
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
        "--size",
        type=positive,
        default=224,
        metavar="N",
        help="height and width in pixels (default %(default)s)",
    )
    case.add_argument("--dtype", choices=SHORT_DTYPES, help="(default fp32, on a GPU bf16)")
    case.add_argument(
        "--device", default=default_device(), help="cpu or cuda (default here: %(default)s)"
    )
    case.add_argument(
        "--photos",
        action="store_true",
        help="real photographs (extra bench) instead of random images",
    )


def _add_comparison(compared: argparse._ArgumentGroup) -> None:
    compared.add_argument(
        "--providers",
        nargs="+",
        metavar="ID",
        default=list(DEFAULT),
        help="ways to run it, of the list below (default: those with *)",
    )
    compared.add_argument(
        "--seconds",
        type=seconds,
        help="at most this long timing each case (default 40; with --kernel 4)",
    )
    compared.add_argument(
        "--cold",
        action="store_true",
        help="also the first answer of a fresh process, and its peak memory",
    )


def _add_kernels(single: argparse._ArgumentGroup) -> None:
    single.add_argument(
        "--kernel",
        nargs="+",
        action="extend",
        metavar="ID|FILE",
        help="these kernels on each distinct problem of MODEL, beside aten and rivals; "
        "without a GPU what the machine code says",
    )
    single.add_argument(
        "--layers",
        nargs="+",
        metavar="PATTERN",
        default=["*"],
        help="only these, as in 'layer3.*.conv3' (default all)",
    )
    single.add_argument(
        "--gpu",
        metavar="GPU",
        default="h200",
        help="without a GPU: the model to compile for (default %(default)s)",
    )


def _add_output(output: argparse._ArgumentGroup) -> None:
    output.add_argument(
        "--json", action="store_true", help="print the ledger rows as JSON instead of the table"
    )
    output.add_argument(
        "--save",
        nargs="?",
        const=False,
        type=writable_file,
        metavar="FILE",
        help="write the run to FILE, or into benchmarks/results",
    )


def run(args: argparse.Namespace) -> int:
    if args.model not in list_models():
        raise ValueError(f"got {args.model!r}, expected one of {', '.join(list_models())}")
    if args.kernel:
        from . import bench_kernel

        return bench_kernel.run(args)
    device = device_or_error(args.device)
    dtype, batches = defaults(device.type, args.mode)
    dtype, batches = args.dtype or dtype, args.batch or batches
    providers = [provider(id) for id in dict.fromkeys(["eager-nchw", *args.providers])]
    machine = here(args.device)
    machine.facts["command"] = measured_by(["resnet_fast", *args.words], "--save")
    _say(f"{args.mode} {args.model}, {dtype}, {args.size}², on {where(machine)}")
    rows: list[Row] = []
    wrong = False
    for batch in batches:
        case = Case(args.mode, args.model, dtype, batch, args.size, device.type)
        measured = _run_case(args, case, batches, providers)
        rows += _rows(measured)
        wrong = wrong or any(one.wrong for one in measured.values())
    _write(args, machine, rows)
    return 1 if wrong else 0


def _run_case(
    args: argparse.Namespace, case: Case, batches: Sequence[int], providers: list[Provider]
) -> dict[str, Measured]:
    """Measure one case and print its table."""
    not_tuned = untuned(case, batches) if case.device == "cuda" else None
    if not_tuned:
        _say(f"  {not_tuned}")
    measured = measure(
        case,
        providers,
        x=_photos(case, torch.device(args.device)) if args.photos else None,
        max_seconds=args.seconds or 40.0,
        cold=args.cold,
        say=lambda line: _say(f"  {line}"),
        progress=_progress,
    )
    _say("")
    if not args.json:
        notes = _refusals(measured) + (f"{not_tuned}\n" if not_tuned else "")
        print("\n".join([case.name, show(_rows(measured)), notes]), flush=True)
    return measured


def _rows(measured: dict[str, Measured]) -> list[Row]:
    return [one.row for one in measured.values() if one.row is not None]


def _write(args: argparse.Namespace, machine: Machine, rows: list[Row]) -> None:
    """Write the rows to a file, and print them as JSON, as --save and --json ask; else print what the tables mean."""
    if args.save is not None:
        _say(f"written: {write_run(rows, machine, args.save or None)}")
    if args.json:
        json.dump(
            {"machine": asdict(machine), "rows": [asdict(row) for row in rows]},
            sys.stdout,
            indent=1,
        )
        print()
    else:
        print(f"{LEGEND}\n{WEIGHTS}")


def defaults(device: str, mode: str) -> tuple[str, tuple[int, ...]]:
    """Return the (dtype, batch sizes) that are usual on such a device."""
    if device == "cpu":
        return "fp32", (1, 16)
    return "bf16", (256, 1) if mode == "infer" else (32,)


def untuned(case: Case, batches: Sequence[int] = ()) -> str | None:
    """Return the command that tunes this GPU for a case, as a sentence; None if something was measured for it."""
    if any(tables.records(problem) for problem in _tuned_problems(case)):
        return None
    dtype = str(SHORT_DTYPES[case.dtype]).removeprefix("torch.")
    command = [
        "python",
        "-m",
        "resnet_fast",
        "tune",
        case.model,
        "--batch",
        *map(str, batches or (case.batch,)),
    ]
    command += ["--size", str(case.size)] if case.size != 224 else []
    command += ["--dtype", dtype] if case.dtype != "bf16" else []
    command += ["--train"] if case.mode == "train" else []
    return (
        f"{case.name}: no kernel of ours was measured for this on {tables.gpu_name()} yet, so ours runs torch's own "
        f"kernels. `{' '.join(command)}` measures them, in minutes, and says how many; then run this again"
    )


def _tuned_problems(case: Case) -> Iterator[Problem]:
    """Yield the problems that `tune` measures for a case."""
    capability, dtype = torch.cuda.get_device_capability(), SHORT_DTYPES[case.dtype]
    for conv in conv_layers(case.model, case.batch, case.size, dtype, "cuda", capability):
        if case.mode == "infer":
            yield replace(conv.problem, bn=False)
            continue
        after = (problem_after(conv.problem, op) for op in TRAINING)
        yield from (problem for problem in after if problem is not None)


def where(machine: Machine) -> str:
    """Return the machine in a few words."""
    facts = machine.facts
    cpu = f"{facts['cpu']}, {facts['cpu isa']}, {counted(facts['threads'], 'thread')}"
    return f"{facts['gpu'] if machine.device == 'cuda' else cpu}, torch {facts['torch']}"


def _title(row: Row) -> str:
    return PROVIDERS[row.provider].title if row.provider in PROVIDERS else row.provider


COLUMNS = (
    Column[Row]("", _title),
    Column[Row]("ms", lambda row: f"{row.seconds * 1e3:.1f}"),
    Column[Row]("img/s", lambda row: f"{row.img_s:.1f}"),
    Column[Row]("ratio", lambda row: f"{row.speed_over.get('eager-nchw', 1.0):.2f}"),
    Column[Row]("spread", lambda row: f"{(row.high - row.low) / row.seconds:.0%}"),
    Column[Row]("error", lambda row: f"{row.error:.1e}"),
    Column[Row]("eager's", lambda row: f"{row.eager_error:.1e}"),
    Column[Row]("first s", lambda row: f"{row.first_s:.1f}"),
    Column[Row](
        "cold s", lambda row: "" if row.cold_s is None else f"{row.cold_s:.1f}", optional=True
    ),
    Column[Row](
        "peak MB",
        lambda row: "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}",
        optional=True,
    ),
)


def show(rows: list[Row]) -> str:
    """Return the comparison as a table."""
    return column_table(COLUMNS, rows)


def _refusals(measured: dict[str, Measured]) -> str:
    lines = []
    for one in measured.values():
        if one.row is None:
            reason = f"skipped: {one.skipped}" if one.skipped else f"WRONG: {one.wrong}"
            lines.append(f"{one.provider}: {reason}\n")
    return "".join(lines)


def _photos(case: Case, device: torch.device) -> Tensor:
    from ..data import samples

    return samples.batch(case.batch, case.size).to(device, SHORT_DTYPES[case.dtype])


def _progress(rounds: int) -> None:
    print(f"\r  timing round {rounds} ", end="", file=sys.stderr, flush=True)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
