"""``check``: every kernel that can run here against float64, as a table; the exit code is 1 if one is wrong."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import torch

from ..dispatch.problem import ACROSS, Problem
from ..dispatch.registry import Kernel, find, kernels, named
from ..models.problems import model_problems
from ..testing.check import check_kernel
from ..testing.diagnose import diagnose
from ..testing.grids import nasty_problems
from ..testing.rule import Verdict
from ..util.machine import DTYPES, default_device, device_or_error
from ..util.text import table, wrapped

SHOWN = 10  # wrong problems that are told in full


def add_parser(commands) -> None:
    p = commands.add_parser(
        "check",
        help="every kernel here against float64",
        description="Check kernels against the float64 reference by the error rule (at most twice eager's own error, three "
        "times for gradients, plus a few roundings) in poisoned memory. Exit code 1 if a kernel is wrong, "
        "2 if none named could run.",
    )
    p.add_argument(
        "--kernel",
        nargs="+",
        action="extend",
        metavar="ID|FILE",
        help="only this kernel, or those of a .py or .cu file",
    )
    p.add_argument("--dtype", action="append", choices=DTYPES, help="default: float32, float16, bfloat16")
    p.add_argument(
        "--model", help="also the distinct convolutions of this architecture (and groups of them), at 224² and batch 2"
    )
    p.add_argument("--device", default=default_device(), help="cpu or cuda (default here: %(default)s)")
    p.set_defaults(run=run)


def wanted(names: list[str] | None) -> list[Kernel]:
    """The kernels that the command line named: all, by id, by family or out of a file. Raises ImportError with what is wrong in a file."""
    return [k for name in names for k in named(name)] if names else kernels()


def problems(kernel: Kernel, dtype: torch.dtype, device: torch.device, model: str | None) -> Iterator[Problem]:
    """The grid for one kernel."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    yield from nasty_problems(kernel.op, dtype, device.type, capability)
    if model and kernel.op in ("conv_bn_act", *ACROSS):
        yield from model_problems(model, 2, 224, dtype, device.type, capability, kernel.op)


def check(
    kernel: Kernel, dtypes: list[torch.dtype], device: torch.device, model: str | None
) -> tuple[list[Verdict], list[str]]:
    """(verdicts, sentences of the declined problems)."""
    verdicts, declined = [], []
    for dtype in dtypes:
        for problem in problems(kernel, dtype, device, model):
            reason = kernel.supports(problem)
            if reason is None:
                verdicts.append(check_kernel(kernel, problem))
            else:
                declined.append(reason)
    return verdicts, declined


def run(args: argparse.Namespace) -> int:
    device = device_or_error(args.device)
    dtypes = [DTYPES[d] for d in args.dtype or ("float32", "float16", "bfloat16")]
    rows, wrong, ran = [], [], 0
    absent: dict[str, list[str]] = {}
    for kernel in wanted(args.kernel):
        reason = kernel.available()
        if reason is not None:
            rows.append((kernel.id, kernel.op, "", "", "", "cannot run here"))
            absent.setdefault(reason, []).append(kernel.id)
            continue
        print(f"checking {kernel.id} …", file=sys.stderr, flush=True)
        verdicts, declined = check(kernel, dtypes, device, args.model)
        bad = [v for v in verdicts if not v.ok]
        wrong += bad
        ran += len(verdicts)
        worst = max((v.error.rms / max(v.eager.rms, 1e-9) for v in verdicts if v.error.rms > 1e-7), default=0.0)
        verdict = f"{len(bad)} WRONG" if bad else "right" if verdicts else f"declines all: {declined[0]}"
        rows.append((kernel.id, kernel.op, len(verdicts), len(declined), f"{worst:.2f}", verdict))
    print(table(("kernel", "op", "checked", "declined", "error/eager", "verdict"), rows, right=(2, 3, 4)))
    for reason, ids in absent.items():  # in full, and once: a table's last column is cut
        print(wrapped(f"cannot run here: {', '.join(ids)}: {reason}", ""))
    for v in wrong[:SHOWN]:
        print(f"WRONG {v.kernel}: {v.problem.key}: {v.reason}\n      {diagnose(find(v.kernel), v.problem)}")
    if len(wrong) > SHOWN:
        print(f"… and {len(wrong) - SHOWN} more")
    print(f"{ran} checks on {device.type}, {len(wrong)} wrong")
    if args.kernel and not ran:
        raise ValueError("nothing was checked of what --kernel named")
    return 1 if wrong else 0
