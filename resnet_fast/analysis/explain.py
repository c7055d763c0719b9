"""``explain``: which kernel runs each layer, why, and why a layer runs as plain modules."""

from __future__ import annotations

import argparse
import copy
import json
import sys
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor, nn

from ..dispatch.problem import ACROSS, Problem
from ..dispatch.registry import record, rejected
from ..live.eligibility import why_plain
from ..models.blocks import BasicBlock, Bottleneck, why_plain_block
from ..util.text import DTYPES, add_problem_options, device_or_error, table


@dataclass(frozen=True)
class Line:
    """One layer: its module, the op that ran it (or "plain"), the kernel and the reason; on a GPU with known ceilings the least time that
    the problem could take, and the time that the tables have of the kernel, in µs.
    """

    module: str
    op: str
    kernel: str
    why: str
    problem: Problem | None = field(default=None, repr=False)
    floor_us: float | None = None
    time_us: float | None = None


def timed(line: Line, graph: bool = False) -> Line:
    """The line with what is known of its times; ``graph``: those in a CUDA graph."""
    problem = line.problem
    if problem is None or problem.device != "cuda":
        return line
    from ..dispatch import tables
    from . import network_floor

    record = tables.records(problem).get(line.kernel if "." in line.kernel else f"{line.kernel}.{line.op}", {})
    try:
        floor = network_floor.problem_floor(problem, network_floor.ceilings(tables.gpu_name())).seconds * 1e6
    except LookupError:  # a GPU that nobody wrote down, or no rate for float64
        floor = None
    return replace(line, floor_us=floor, time_us=record.get("device_us" if graph else "time_us"))


class Explanation(list):
    """The lines of one forward; prints as a table, with times where any is known."""

    def __str__(self) -> str:
        def number(value: float | None, digits: int = 1) -> str:
            return "" if value is None else f"{value:.{digits}f}"

        header, rows = (
            ("layer", "op", "problem", "kernel"),
            [(x.module, x.op, _shape(x.problem), x.kernel) for x in self],
        )
        if any(x.floor_us or x.time_us for x in self):
            header = (*header, "µs", "floor", "%")
            rows = [
                (
                    *row,
                    number(x.time_us),
                    number(x.floor_us),
                    number(x.floor_us and x.time_us and 100 * x.floor_us / x.time_us, 0),
                )
                for row, x in zip(rows, self, strict=True)
            ]
        return table(
            (*header, "why"), [(*row, x.why) for row, x in zip(rows, self, strict=True)], right=range(4, len(header))
        )


def _shape(p: Problem | None) -> str:
    """Input and filter; of an op over several convolutions the channels on their way."""
    if p is None:
        return ""
    x = "×".join(map(str, p.x))
    if p.op == "pointwise_pair":
        return f"{x} + {p.chain[0][1]} → {p.weight[0]}"
    if p.op in ACROSS:
        channels = [p.weight[0], *(p.chain[i][0] for i in (0, 2) if p.op == "conv_tail")]
        return " → ".join([x, *map(str, channels)])
    return x if p.weight is None else f"{x} → {'×'.join(map(str, p.weight))}"


def explain(model: nn.Module, example: Tensor) -> Explanation:
    """Run one forward of a copy of ``model`` on ``example`` and say for each convolution and batch norm what ran it and why.

    The copy keeps the model's statistics as they are; its hooks run once. Accepts a plan too, which knows its own steps.
    """
    steps = getattr(model, "explain", None)
    if steps is not None:
        return steps(example)
    if not isinstance(model, nn.Module):
        raise ValueError(f"explain: model: got {type(model).__name__}, expected an nn.Module or a plan")
    twin = copy.deepcopy(model)
    owners = {id(p): name.rpartition(".")[0] for name, p in twin.named_parameters(remove_duplicate=False)}
    with record() as choices, torch.no_grad():
        twin(example)
    lines = [timed(Line(owners.get(c.tensor, "(add)"), c.problem.op, c.kernel, c.why, c.problem)) for c in choices]
    return Explanation(lines + _plain_lines(twin, example, {line.module for line in lines}))


def _plain_lines(model: nn.Module, example: Tensor, fused: set[str]) -> list[Line]:
    """The blocks and lone convolutions that no op ran, with the path rule's sentence."""
    lines, inside = [], []
    for name, m in model.named_modules():
        if any(name.startswith(prefix) for prefix in inside):
            continue
        if isinstance(m, (BasicBlock, Bottleneck)):
            inside.append(f"{name}.")
            reason = why_plain_block(m, example)
            if reason is not None or type(m).forward not in (BasicBlock.forward, Bottleneck.forward):
                lines.append(Line(name, "plain", "torch modules", reason or "a subclass overrides forward"))
        elif isinstance(m, nn.Conv2d) and name not in fused and not _training_pair(name, fused):
            lines.append(Line(name, "plain", "torch module", why_plain(example, [m]) or "not part of a fused block"))
    return lines


def _training_pair(name: str, fused: set[str]) -> bool:
    """Whether the convolution's batch norm ran fused: in training the convolution itself is torch's."""
    return name.replace("conv", "bn") in fused


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
    from ..models.resnet import create_model

    if args.model_gpu and args.json or args.rejected and (args.model_gpu or args.diff or args.json):
        raise ValueError("--rejected goes with the plain table only, --json not with --model-gpu")
    if args.across and args.train:
        raise ValueError("--across is of plans, which do not train")
    if args.model_gpu:
        from .network_floor import table as roofline_table

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
