"""``tune``: measure kernels on this GPU by layer, groups of layers by the whole network, and store what won."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING

import torch

from ..util.machine import DTYPES
from ..util.text import table
from .options import positive, seconds

if TYPE_CHECKING:
    from ..dispatch.problem import Problem
    from ..tuning.kernels import Device


def add_parser(commands) -> None:
    p = commands.add_parser(
        "tune",
        help="measure the kernels on this GPU and remember the fastest",
        description="For each distinct layer, as the drop-in and as a plan asks for it: verify every kernel against "
        "float64, time those that are right, write the fastest into this GPU model's table. Then time the "
        "plan of the whole network with and without each group of layers and remember those that pay. "
        "The largest part of the network's time comes first. What was measured before with the same source "
        "and versions is skipped, so an interrupted run goes on where it stopped. Exit code 1 if a kernel "
        "was wrong or failed, or if a network could not be planned; 3 if a kernel broke the GPU's context: run "
        "it again, it goes on without that kernel.",
    )
    p.add_argument("model", help="an architecture (see `list`)")
    p.add_argument(
        "--batch", type=positive, nargs="+", default=[256], help="batch sizes (default 256)"
    )
    p.add_argument(
        "--size",
        type=positive,
        default=224,
        help="height and width in pixels (default %(default)s)",
    )
    p.add_argument(
        "--dtype",
        choices=[d for d in DTYPES if d != "float64"],
        default="bfloat16",
        help="of weights and activations (default %(default)s)",
    )
    p.add_argument(
        "--train", action="store_true", help="the kernels of training instead of those of inference"
    )
    p.add_argument("--kernels", nargs="+", metavar="ID", help="only these candidates")
    p.add_argument(
        "--seconds",
        type=seconds,
        default=60.0,
        help="for the search among groups, each batch size (default %(default)s)",
    )
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..dispatch import tables
    from ..tuning.kernels import Device, DeviceLost, tune

    device = Device.current()
    path = tables.user_folder() / tables.file_name(device.name)
    try:
        tuned = tune(problems(args, device), kernels=args.kernels, device=device, say=say)
        print(
            table(
                ("problem", "calls", "in graphs"),
                [(t.problem.key, t.calls, t.graph) for t in tuned],
            )
        )
        planned = [] if args.train else [groups(args, batch, device) for batch in args.batch]
    except KeyboardInterrupt:
        say(f"\nstopped; what was measured is in {path}, and the same command goes on from there")
        return 130
    except DeviceLost as error:
        say(f"tune: {error}")
        return 3
    for one in tuned:
        for kernel, reason in one.bad.items():
            print(f"never chosen: {kernel} on {one.problem.key}: {reason}")
    faster = sum(one.calls != "aten" for one in tuned)
    in_graphs = sum(one.graph != "aten" for one in tuned)
    print(
        f"{len(tuned)} problems, {faster} with a kernel faster than aten, {in_graphs} in graphs; table: {path}"
    )
    failed = any(one.bad for one in tuned) or not all(planned)
    return 1 if failed else 0


def problems(args: argparse.Namespace, device: Device) -> list[Problem]:
    """Return the problems of all networks, the largest share of its network's time first."""
    from ..roofline.chips import GPUS, ceilings
    from ..roofline.floor import problem_floor

    listed = device.name in {gpu.title for gpu in GPUS.values()}
    limits = ceilings(device.name if listed else "h200")  # decides the order only
    shares: dict[Problem, float] = {}
    for network in networks(args, device.kind):
        counts = Counter(network)
        seconds = {
            problem: count * problem_floor(problem, limits).seconds
            for problem, count in counts.items()
        }
        total = sum(seconds.values())
        shares |= {problem: one / total for problem, one in seconds.items()}
    return sorted(shares, key=shares.__getitem__, reverse=True)


def networks(args: argparse.Namespace, device: str) -> Iterable[list[Problem]]:
    """Yield for each batch size the problems of the drop-in and those of a plan, or those of training.

    Folded or not, our kernels do the same work. But torch's kernels fold anew in each call of the drop-in and never in
    a plan, so each is timed beside torch's way. A plan's are single steps and groups; with ``normalize`` its stem takes
    photographs, so ``conv_pool`` is also timed on bytes.
    """
    from ..models.problems import TRAINING, across_layers, conv_layers, problem_after

    capability = torch.cuda.get_device_capability()
    for batch in args.batch:
        found = conv_layers(args.model, batch, args.size, DTYPES[args.dtype], device, capability)
        convs = [layer.problem for layer in found]
        if args.train:
            after = (problem_after(conv, op) for conv, op in product(convs, TRAINING))
            yield [problem for problem in after if problem is not None]
            continue
        groups = [group.problem for group in across_layers(found)]
        folded = [replace(conv, bn=False) for conv in convs]
        of_bytes = [replace(group, bytes=True) for group in groups if group.op == "conv_pool"]
        yield convs
        yield [*folded, *groups, *of_bytes]


def groups(args: argparse.Namespace, batch: int, device: Device) -> bool:
    """Search among the groups of one network with the table's kernels; returns whether it could be planned."""
    from ..models.family import create_model
    from ..models.settle import settle
    from ..planning.make import plan

    dtype = DTYPES[args.dtype]
    torch.manual_seed(0)
    model = settle(create_model(args.model)).eval()
    try:
        example = torch.randn(batch, 3, args.size, args.size).to(device.kind, dtype)
        planned = plan(model, example, dtype=dtype, across=())
    except (ValueError, torch.OutOfMemoryError) as error:
        print(f"groups at batch {batch}: not searched: {error}")
        return False
    tuner = planned.group_tuner(example, device, args.seconds, say)
    planned.use_groups(tuner.settled() or tuner.choose())
    print(f"groups at batch {batch}: {', '.join(planned.across) or 'none'}")
    for note in planned.notes:
        print(f"  {note}")
    return True


def say(line: str) -> None:
    """Print progress on stderr, so that the result can be piped."""
    print(line, file=sys.stderr, flush=True)
