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
        "ops: pointwise_pair, conv_tail, conv_pool, pointwise_pool; with --diff that is the fused schedule, with --model-gpu "
        "the one whose floors are told",
    )
    p.add_argument(
        "--rejected", action="store_true", help="say for each distinct problem why every other kernel was not chosen"
    )
    p.add_argument("--json", action="store_true", help="print JSON instead of the table")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..models.family import create_model

    if args.model_gpu and args.json or args.rejected and (args.model_gpu or args.diff or args.json):
        raise ValueError("--rejected goes with the plain table only, --json not with --model-gpu")
    if args.across and args.train:
        raise ValueError("--across is of plans, which do not train")
    if args.model_gpu:
        from ..analysis.network_floor import table as roofline_table

        print(roofline_table(args.model, args.batch, args.size, DTYPES[args.dtype], args.model_gpu, args.across))
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

        model = plan(model.eval(), example, across=args.across)
        _say_absent(model.notes)
    found = explain(model, example)
    if args.json:
        print(
            json.dumps(
                [
                    {
                        "layer": x.module,
                        "op": x.op,
                        "problem": x.problem and x.problem.key,
                        "kernel": x.kernel,
                        "why": x.why,
                        "time_us": x.time_us,
                        "floor_us": x.floor_us,
                    }
                    for x in found
                ],
                indent=1,
            )
        )
        return 0
    print(found)
    if args.rejected:
        for problem in dict.fromkeys(line.problem for line in found if line.problem is not None):
            print(f"\n{problem.key}")
            for kernel, reason in rejected(problem).items():
                print(f"  {kernel:26} {reason}")
    return 0


def _say_absent(notes: list[str]) -> None:
    """What --across named and the network does not have: on stderr, for the table alone would not tell."""
    for note in notes:
        print(f"explain: {note}", file=sys.stderr)


DIFF_LEGEND = """\
Each row: a value that both schedules compute, and the steps that either took to it from rows above.
distance: RMS of the difference, relative; error: that from float64. speed: the unfused ms over the
fused; each step is timed by itself, the least of three, so the sum is no whole call's time."""


def _diff(args: argparse.Namespace, model: nn.Module, example: Tensor) -> int:
    """The fused schedule beside the unfused one; 1 if a fused step breaks the error rule."""
    from ..bench.providers import settle
    from ..planning.make import plan

    model = settle(model).eval().to(example.device)
    fused, plain, exact = (
        plan(model, example, dtype=dtype, fuse=fuse, cuda_graph=False, across=args.across if fuse else ())
        for dtype, fuse in ((example.dtype, True), (example.dtype, False), (torch.float64, False))
    )
    _say_absent(fused.notes)
    found = fused.compare(plain, example, exact)
    broken = {row.name: row.broken for row in found if row.broken is not None}
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
        print(
            f"{args.model}, {args.dtype}, {'×'.join(map(str, example.shape))} on {example.device}: "
            f"{len(fused.steps)} fused steps, other: {len(plain.steps)} unfused ones\n{found}\n{DIFF_LEGEND}"
        )
    for name, reason in broken.items():
        print(f"WRONG {name}: {reason}", file=sys.stderr)
    return 1 if broken else 0
