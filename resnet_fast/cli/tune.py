"""``tune``: measure the kernels on this GPU, layer by layer, then groups of layers by the whole network, and remember what won."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
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
    p.add_argument("--batch", type=positive, nargs="+", default=[256], help="batch sizes (default 256)")
    p.add_argument("--size", type=positive, default=224, help="height and width in pixels (default %(default)s)")
    p.add_argument(
        "--dtype",
        choices=[d for d in DTYPES if d != "float64"],
        default="bfloat16",
        help="of weights and activations (default %(default)s)",
    )
    p.add_argument("--train", action="store_true", help="the kernels of training instead of those of inference")
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
        outcomes = tune(problems(args, device), kernels=args.kernels, device=device, say=say)
        print(table(("problem", "calls", "in graphs"), [(o.problem.key, o.calls, o.graph) for o in outcomes]))
        planned = [groups(args, batch, device) for batch in args.batch] if not args.train else []
    except KeyboardInterrupt:
        say(f"\nstopped; what was measured is in {path}, and the same command goes on from there")
        return 130
    except DeviceLost as error:
        say(f"tune: {error}")
        return 3
    for outcome in outcomes:
        for kernel, how in outcome.bad.items():
            print(f"never chosen: {kernel} on {outcome.problem.key}: {how}")
    print(
        f"{len(outcomes)} problems, {sum(o.calls != 'aten' for o in outcomes)} with a kernel faster than aten, "
        f"{sum(o.graph != 'aten' for o in outcomes)} in graphs; table: {path}"
    )
    return 1 if any(o.bad for o in outcomes) or not all(planned) else 0


def problems(args: argparse.Namespace, device: Device) -> list[Problem]:
    """What the drop-in and what a plan asks for at each batch size (or what training does), the largest share of its network's time first."""
    from ..roofline.chips import GPUS, ceilings
    from ..roofline.floor import problem_floor

    limits = ceilings(
        device.name if device.name in {gpu.title for gpu in GPUS.values()} else "h200"
    )  # only the order hangs on it
    share: dict[Problem, float] = {}
    for network in networks(args, device.kind):
        took = {problem: count * problem_floor(problem, limits).seconds for problem, count in Counter(network).items()}
        share |= {problem: seconds / sum(took.values()) for problem, seconds in took.items()}
    return sorted(share, key=share.get, reverse=True)


def networks(args: argparse.Namespace, device: str) -> Iterable[list[Problem]]:
    """For each batch size the problems of the drop-in and those of a plan, single steps and groups; or those of training.

    Folded or not, our kernels do the same work; but torch's fold anew in each call of the drop-in and never in a plan, so each is timed
    beside its own. Photographs are the stem of a plan with ``normalize``.
    """
    from ..bench.op import TRAINING, after
    from ..models.problems import across_layers, conv_layers

    capability = torch.cuda.get_device_capability()
    for batch in args.batch:
        found = conv_layers(args.model, batch, args.size, DTYPES[args.dtype], device, capability)
        convs = [layer.problem for layer in found]
        if args.train:
            yield [problem for conv in convs for op in TRAINING if (problem := after(conv, op)) is not None]
            continue
        groups = [group.problem for group in across_layers(found)]
        yield convs
        yield [
            *(replace(conv, bn=False) for conv in convs),
            *groups,
            *(replace(p, bytes=True) for p in groups if p.op == "conv_pool"),
        ]


def groups(args: argparse.Namespace, batch: int, device: Device) -> bool:
    """Search among the groups of one network with the kernels that the table has now; whether it could be planned."""
    from ..bench.providers import settle
    from ..models.family import create_model
    from ..planning.make import plan

    dtype = DTYPES[args.dtype]
    torch.manual_seed(0)
    model = settle(create_model(args.model)).eval()
    try:
        example = torch.randn(batch, 3, args.size, args.size).to(device.kind, dtype)
        made = plan(model, example, dtype=dtype, across=())
    except (ValueError, torch.OutOfMemoryError) as trouble:
        print(f"groups at batch {batch}: not searched: {trouble}")
        return False
    tuner = made.group_tuner(example, device, args.seconds, say)
    made.use_groups(tuner.settled() or tuner.choose())
    print(
        "\n".join(
            [f"groups at batch {batch}: {', '.join(made.across) or 'none'}", *(f"  {note}" for note in made.notes)]
        )
    )
    return True


def say(line: str) -> None:
    """Progress goes to stderr, so that the result can be piped."""
    print(line, file=sys.stderr, flush=True)
