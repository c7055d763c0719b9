"""``explain``: which kernel runs each layer of a network, and why."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

import torch
from torch import Tensor, nn

from ..analysis.explain import explain
from ..dispatch import rejected
from ..runtime.explanation import Explanation, Line
from ..util.machine import DTYPES, device_or_error
from .options import add_problem_options


def add_parser(commands) -> None:
    p = commands.add_parser(
        "explain",
        help="which kernel runs each layer, and why",
        description="Run one forward and show, layer by layer, the kernel, the reason, and why others were not chosen. "
        "With --diff: plan() fused beside plan() unfused, step by step, by error and by time; the exit code "
        "is 1 if a fused step errs by more than twice the unfused one.",
    )
    p.add_argument("model", help="an architecture (see `list`)")
    add_problem_options(p)
    what = p.add_mutually_exclusive_group()
    what.add_argument("--train", action="store_true", help="explain a training forward")
    what.add_argument(
        "--diff",
        action="store_true",
        help="compare the fused schedule with the unfused one, step by step on the same input",
    )
    what.add_argument(
        "--model-gpu",
        metavar="GPU",
        help="no run: predict each layer's floor on that GPU (h200, …) from the roofline model",
    )
    p.add_argument(
        "--across",
        nargs="+",
        metavar="OP",
        default=(),
        help="explain plan(model, across=OP…), fused across convolutions by these "
        "ops: pointwise_pair, conv_tail, conv_pool, pointwise_pool; with --diff that is the fused schedule, "
        "with --model-gpu the one whose floors are told",
    )
    p.add_argument(
        "--rejected",
        action="store_true",
        help="say for each distinct problem why every other kernel was not chosen",
    )
    p.add_argument("--json", action="store_true", help="print JSON instead of the table")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..models.family import create_model

    _refuse_combinations(args)
    if args.model_gpu:
        from ..analysis.network_floor import table as floor_table

        print(
            floor_table(
                args.model, args.batch, args.size, DTYPES[args.dtype], args.model_gpu, args.across
            )
        )
        return 0
    device, dtype = device_or_error(args.device), DTYPES[args.dtype]
    torch.manual_seed(0)
    model = create_model(args.model)
    example = torch.randn(args.batch, 3, args.size, args.size).to(device, dtype)
    if args.diff:
        return _diff(args, model, example)
    model = model.to(device, dtype).train(args.train)
    if args.across:
        from ..planning.make import plan

        planned = plan(model.eval(), example, across=args.across)
        _say_absent(planned.notes)
        found = explain(planned, example)  # type: ignore[arg-type]  # a plan knows its own steps
    else:
        found = explain(model, example)
    if args.json:
        print(json.dumps([_record(line) for line in found], indent=1))
        return 0
    print(found)
    if args.rejected:
        _print_rejected(found)
    return 0


def _refuse_combinations(args: argparse.Namespace) -> None:
    json_of_floors = args.json and args.model_gpu
    rejected_of_others = args.rejected and (args.model_gpu or args.diff or args.json)
    if json_of_floors or rejected_of_others:
        raise ValueError("--rejected goes with the plain table only, --json not with --model-gpu")
    if args.across and args.train:
        raise ValueError("--across is of plans, which do not train")


def _record(line: Line) -> dict[str, object]:
    """Return a line as it is printed by --json."""
    return {
        "layer": line.module,
        "op": line.op,
        "problem": line.problem and line.problem.key,
        "kernel": line.kernel,
        "why": line.why,
        "time_us": line.time_us,
        "floor_us": line.floor_us,
    }


def _print_rejected(found: Explanation) -> None:
    problems = dict.fromkeys(line.problem for line in found if line.problem is not None)
    for problem in problems:
        print(f"\n{problem.key}")
        for kernel, reason in rejected(problem).items():
            print(f"  {kernel:26} {reason}")


def _say_absent(notes: list[str]) -> None:
    """Print on stderr which ops of --across the network has no group for: the table does not show it."""
    for note in notes:
        print(f"explain: {note}", file=sys.stderr)


DIFF_LEGEND = """\
Each row: a value that both schedules compute, and the steps that either took to it from rows above.
distance: RMS of the difference, relative; error: that from float64. speed: the unfused ms over the
fused; each step is timed by itself, the least of three, so the sum is no whole call's time."""


def _diff(args: argparse.Namespace, model: nn.Module, example: Tensor) -> int:
    """Print the fused schedule beside the unfused one; returns 1 if a fused step breaks the error rule."""
    from ..models.settle import settle
    from ..planning.make import plan

    model = settle(model).eval().to(example.device)
    fused = plan(model, example, dtype=example.dtype, cuda_graph=False, across=args.across)
    plain = plan(model, example, dtype=example.dtype, cuda_graph=False, fuse=False, across=())
    exact = plan(model, example, dtype=torch.float64, cuda_graph=False, fuse=False, across=())
    _say_absent(fused.notes)
    found = fused.compare(plain, example, exact)
    if args.json:
        case = {
            "model": args.model,
            "dtype": args.dtype,
            "batch": args.batch,
            "size": args.size,
            "device": str(example.device),
        }
        print(json.dumps({**case, "rows": [asdict(row) for row in found]}, indent=1))
    else:
        shape = "×".join(map(str, example.shape))
        steps = f"{len(fused.steps)} fused steps, other: {len(plain.steps)} unfused ones"
        print(
            f"{args.model}, {args.dtype}, {shape} on {example.device}: {steps}\n{found}\n{DIFF_LEGEND}"
        )
    broken = [row for row in found if row.broken is not None]
    for row in broken:
        print(f"WRONG {row.name}: {row.broken}", file=sys.stderr)
    return 1 if broken else 0
