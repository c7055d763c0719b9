"""``check``: every kernel that can run here against float64, as a table; the exit code is 1 if one is wrong."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

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

SHOWN = 10  # wrong problems that are printed in full


def add_parser(commands) -> None:
    p = commands.add_parser(
        "check",
        help="every kernel here against float64",
        description="Check kernels against the float64 reference by the error rule (at most twice eager's own error, "
        "three times for gradients, plus a few roundings) in poisoned memory. Exit code 1 if a kernel is wrong, "
        "2 if none named could run.",
    )
    p.add_argument(
        "--kernel",
        nargs="+",
        action="extend",
        metavar="ID|FILE",
        help="only this kernel, or those of a .py or .cu file",
    )
    p.add_argument(
        "--dtype", action="append", choices=DTYPES, help="default: float32, float16, bfloat16"
    )
    p.add_argument(
        "--model",
        help="also the distinct convolutions of this architecture (and groups of them), at 224² and batch 2",
    )
    p.add_argument(
        "--device", default=default_device(), help="cpu or cuda (default here: %(default)s)"
    )
    p.set_defaults(run=run)


def requested_kernels(names: list[str] | None) -> list[Kernel]:
    """Return the kernels that --kernel names by id, family or file; all without names."""
    if not names:
        return kernels()
    return list(chain.from_iterable(named(name) for name in names))


def problems(
    kernel: Kernel, dtype: torch.dtype, device: torch.device, model: str | None
) -> Iterator[Problem]:
    """Yield the problems that one kernel is checked on."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    yield from nasty_problems(kernel.op, dtype, device.type, capability)
    if model and kernel.op in ("conv_bn_act", *ACROSS):
        yield from model_problems(model, 2, 224, dtype, device.type, capability, kernel.op)


@dataclass
class Report:
    """A kernel's verdicts, and the reasons why it declines other problems."""

    kernel: Kernel
    verdicts: list[Verdict] = field(default_factory=list)
    declined: list[str] = field(default_factory=list)

    @property
    def wrong(self) -> list[Verdict]:
        return [verdict for verdict in self.verdicts if not verdict.ok]

    def row(self) -> tuple[object, ...]:
        """The kernel's line in the table."""
        ratios = [v.error.rms / max(v.eager.rms, 1e-9) for v in self.verdicts if v.error.rms > 1e-7]
        worst = max(ratios, default=0.0)
        counts = len(self.verdicts), len(self.declined)
        return (self.kernel.id, self.kernel.op, *counts, f"{worst:.2f}", self._verdict())

    def _verdict(self) -> str:
        if self.wrong:
            return f"{len(self.wrong)} WRONG"
        return "right" if self.verdicts else f"declines all: {self.declined[0]}"


def check(
    kernel: Kernel, dtypes: list[torch.dtype], device: torch.device, model: str | None
) -> Report:
    """Check a kernel on each problem that it takes."""
    report = Report(kernel)
    for dtype in dtypes:
        for problem in problems(kernel, dtype, device, model):
            reason = kernel.supports(problem)
            if reason is None:
                report.verdicts.append(check_kernel(kernel, problem))
            else:
                report.declined.append(reason)
    return report


def run(args: argparse.Namespace) -> int:
    device = device_or_error(args.device)
    dtypes = [DTYPES[name] for name in args.dtype or ("float32", "float16", "bfloat16")]
    rows: list[tuple[object, ...]] = []
    reports: list[Report] = []
    unavailable: dict[str, list[str]] = {}
    for kernel in requested_kernels(args.kernel):
        reason = kernel.available()
        if reason is not None:
            rows.append((kernel.id, kernel.op, "", "", "", "cannot run here"))
            unavailable.setdefault(reason, []).append(kernel.id)
            continue
        print(f"checking {kernel.id} …", file=sys.stderr, flush=True)
        report = check(kernel, dtypes, device, args.model)
        rows.append(report.row())
        reports.append(report)
    print(
        table(
            ("kernel", "op", "checked", "declined", "error/eager", "verdict"), rows, right=(2, 3, 4)
        )
    )
    for reason, ids in unavailable.items():  # in full, and once: a table's last column is cut
        print(wrapped(f"cannot run here: {', '.join(ids)}: {reason}", ""))
    wrong = list(chain.from_iterable(report.wrong for report in reports))
    checks = sum(len(report.verdicts) for report in reports)
    _say_wrong(wrong)
    print(f"{checks} checks on {device.type}, {len(wrong)} wrong")
    if args.kernel and not checks:
        raise ValueError("nothing was checked of what --kernel named")
    return 1 if wrong else 0


def _say_wrong(wrong: list[Verdict]) -> None:
    for v in wrong[:SHOWN]:
        print(
            f"WRONG {v.kernel}: {v.problem.key}: {v.reason}\n      {diagnose(find(v.kernel), v.problem)}"
        )
    if len(wrong) > SHOWN:
        print(f"… and {len(wrong) - SHOWN} more")
