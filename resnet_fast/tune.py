"""``tune``: measure the kernels on this GPU, layer by layer, and remember the fastest right one."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

import torch

from .console import DTYPES, positive, table


def add_parser(commands) -> None:
    p = commands.add_parser("tune", help="measure the kernels on this GPU and remember the fastest",
                            description="For each distinct layer: verify every kernel against float64, time those that "
                                        "are right, write the fastest into this GPU model's table. What was measured "
                                        "before with the same source and versions is skipped, so an interrupted run "
                                        "goes on where it stopped. Exit code 1 if a kernel was wrong or failed.")
    p.add_argument("model", help="an architecture (see `list`)")
    p.add_argument("--batch", type=positive, nargs="+", default=[256], help="batch sizes (default 256)")
    p.add_argument("--size", type=positive, default=224, help="height and width in pixels (default %(default)s)")
    p.add_argument("--dtype", choices=[d for d in DTYPES if d != "float64"], default="bfloat16",
                   help="of weights and activations (default %(default)s)")
    p.add_argument("--train", action="store_true", help="the kernels of training instead of those of inference")
    p.add_argument("--kernels", nargs="+", metavar="ID", help="only these candidates")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from . import tables
    from .autotune import Device, DeviceLost, tune
    from .measure_op import op_problems
    from .problem import ACROSS
    device = Device.current()
    capability = torch.cuda.get_device_capability()
    problems = [problem for batch in args.batch
                for problem in op_problems(args.model, batch, args.size, DTYPES[args.dtype], "cuda", capability)
                if (problem.op not in ("conv_bn_act", *ACROSS)) == args.train]
    problems += [replace(problem, bytes=True) for problem in problems if problem.op == "conv_pool"]  # plans with ``normalize``
    path = tables.user_folder() / tables.file_name(device.name)
    try:
        outcomes = tune(problems, kernels=args.kernels, device=device, say=say)
    except KeyboardInterrupt:
        say(f"\nstopped; what was measured is in {path}, and the same command goes on from there")
        return 130
    except DeviceLost as error:
        say(f"tune: {error}")
        return 1
    print(table(("problem", "calls", "in graphs"), [(o.problem.key, o.calls, o.graph) for o in outcomes]))
    for outcome in outcomes:
        for kernel, how in outcome.bad.items():
            print(f"never chosen: {kernel} on {outcome.problem.key}: {how}")
    print(f"{len(outcomes)} problems, {sum(o.calls != 'aten' for o in outcomes)} with a kernel faster than aten, "
          f"{sum(o.graph != 'aten' for o in outcomes)} in graphs; table: {path}")
    return 1 if any(o.bad for o in outcomes) else 0


def say(line: str) -> None:
    """Progress goes to stderr, so that the result can be piped."""
    print(line, file=sys.stderr, flush=True)
