"""``bench --kernel``: kernels on a network's problems, beside ``aten`` and rivals; what limits them, and likely why.

A kernel that runs here is timed. One that cannot, as a Triton kernel without a GPU, is checked in Triton's
interpreter and compiled for a named GPU, and what its machine code says is printed: no time.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path

from ..analysis.bottlenecks import NEAR, Facts, causes
from ..analysis.launches import dominant, read
from ..bench.kernel_report import (
    CallCode,
    Check,
    Gpu,
    Request,
    Times,
    can_be_timed,
    check_here,
    check_interpreted,
    compiled,
    facts,
    gpu_model,
    is_triton,
    network_problems,
    requested_kernels,
    rivals,
    time_problem,
)
from ..bench.ledger import Row, here, measured_by, write_run
from ..dispatch import Kernel, Problem
from ..report.tables import short_problem
from ..roofline import cost
from ..roofline.floor import problem_floor
from ..roofline.occupancy import occupancy
from ..util.machine import SHORT_DTYPES, device_or_error
from ..util.text import Column, column_table, table, wrapped


def run(args: argparse.Namespace) -> int:
    request = _request(args)
    kernels = requested_kernels(request.names)
    timed = [k for k in kernels if can_be_timed(k, request.device)]
    untimed = [k for k in kernels if k not in timed]
    rows: list[Row] = []
    all_right = True
    with redirect_stdout(sys.stderr if args.json else sys.stdout):
        for of_op in _by_op(timed):
            right, found = report_times(request, of_op)
            rows += found
            all_right = all_right and right
        for of_op in _by_op(untimed):
            all_right = report_code(request, of_op) and all_right
    _write(args, rows)
    return 0 if all_right else 1


def _request(args: argparse.Namespace) -> Request:
    device = device_or_error(args.device)
    return Request(
        names=tuple(args.kernel),
        model=args.model,
        layers=tuple(args.layers),
        batches=tuple(args.batch) if args.batch else None,
        size=args.size,
        dtype=SHORT_DTYPES[args.dtype] if args.dtype else None,
        seconds=args.seconds or 4.0,
        device=device,
        gpu=gpu_model(args.gpu, device),
    )


def _by_op(kernels: list[Kernel]) -> list[list[Kernel]]:
    found: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        found.setdefault(kernel.op, []).append(kernel)
    return list(found.values())


def _write(args: argparse.Namespace, rows: list[Row]) -> None:
    """Print the rows as JSON and write them to a file, as --json and --save ask."""
    if args.json:
        as_dicts = [asdict(row) for row in rows]
        record = {"machine": asdict(here(args.device)), "rows": as_dicts}
        json.dump(record, sys.stdout, indent=1)
        print()
    if args.save is not None and rows:
        machine = here(args.device)
        machine.facts["command"] = measured_by(["resnet_fast", *args.words], "--save")
        path = write_run(rows, machine, args.save or None)
        print(f"written: {path}", file=sys.stderr)


# ---------------------------------------------------------------- kernels that run here


def report_times(request: Request, kernels: list[Kernel]) -> tuple[bool, list[Row]]:
    """Check the kernels of one op, then time those that are right; returns (whether all are right, ledger rows)."""
    problems = network_problems(request, kernels[0].op, timed=True)
    grid = list(problems.values())
    right = [k for k in kernels if say_check(k, check_here(k, grid), "")]
    all_right = len(right) == len(kernels)
    if not right:
        return all_right, []
    others = rivals(right, request.device)
    on_gpu = request.device.type == "cuda"
    code = {}
    if on_gpu:
        in_triton = [k for k in (*right, *others) if is_triton(k)]
        code = compiled(request.names, in_triton, grid)
    ids = [k.id for k in right]
    rows: list[Row] = []
    for name, problem in problems.items():
        print(f"  {name} …", file=sys.stderr, flush=True)
        times = time_problem(name, problem, right, others, code, request.seconds)
        for measured in times.measured.values():
            if measured.row is not None:
                rows.append(measured.row)
        print(show_times(times, ids, request.gpu))
    if not on_gpu:
        print(
            "No roofline on a CPU: nobody wrote its ceilings down. Ratios are medians of same-round ratios."
        )
    return all_right, rows


def say_check(kernel: Kernel, check: Check, where: str) -> bool:
    """Print how a kernel's check went; returns whether it is right on at least one problem and wrong on none."""
    for words in check.wrong[:3]:
        print(f"WRONG {kernel.id}: {words}")
    if check.wrong:
        print(
            f"{kernel.id} is wrong on {len(check.wrong)} of {check.taken} problems{where}: it gets no time. "
            "`check --kernel` tells more."
        )
    elif not check.taken:
        print(f"{kernel.id} declines every problem of the check{where}: it gets no time.")
    else:
        print(f"{kernel.id} is right on {check.taken} problems{where}.")
    return check.passed


@dataclass(frozen=True)
class Line:
    """One kernel's line in the table of times."""

    row: Row
    requested: bool
    ratio: float | None
    registers: str
    shared: str
    occupancy: str


COLUMNS = (
    Column[Line]("", lambda line: ("→ " if line.requested else "  ") + line.row.provider),
    Column[Line]("µs", lambda line: f"{line.row.seconds * 1e6:,.1f}"),
    Column[Line]("spread", lambda line: f"{(line.row.high - line.row.low) / line.row.seconds:.0%}"),
    Column[Line]("× aten", lambda line: _or_empty(line.ratio, ".2f"), optional=True),
    Column[Line]("roofline", lambda line: _or_empty(line.row.roofline, ".0%"), optional=True),
    Column[Line]("GB/s", lambda line: f"{line.row.gb_s:,.0f}", optional=True),
    Column[Line]("TFLOP/s", lambda line: _or_empty(line.row.tflops, ".2f"), optional=True),
    Column[Line]("error", lambda line: _or_empty(line.row.error, ".1e"), optional=True),
    Column[Line]("registers", lambda line: line.registers, optional=True),
    Column[Line]("shared KiB", lambda line: line.shared, optional=True),
    Column[Line]("occupancy", lambda line: line.occupancy, optional=True),
)


def _or_empty(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


def show_times(times: Times, requested: list[str], gpu: Gpu) -> str:
    """One problem: every way to compute it, fastest first, and why the requested kernels are not faster."""
    problem = times.problem
    rows = times.rows
    bar = f"aten.{problem.op}"
    lines = []
    for row in rows:
        id = row.provider
        ratio = 1.0 if id == bar else row.speed_over.get(bar)
        numbers = _numbers(times.code.get(id), gpu)
        lines.append(Line(row, id in requested, ratio, *numbers))
    on_gpu = problem.device == "cuda"
    parts = [heading(times.name, problem, gpu if on_gpu else None), column_table(COLUMNS, lines)]
    for measured in times.measured.values():
        if measured.row is None:
            reason = measured.skipped or f"WRONG: {measured.wrong}: not timed"
            parts.append(f"{measured.provider}: {reason}")
    if on_gpu and gpu.limits is not None:
        seconds = {row.provider: row.seconds for row in rows}
        for id in requested:
            code = times.code.get(id)
            if isinstance(code, CallCode):
                parts.append(why(id, facts(problem, code, gpu), seconds[id]))
    return "\n".join(parts) + "\n"


def heading(name: str, problem: Problem, gpu: Gpu | None) -> str:
    """The layer, its problem, and the least time or work."""
    title = f"{name.split(',')[0]}: {short_problem(problem.key)}"
    step = cost.problem_step(problem)
    work = f"{step.bytes / 1e6:.1f} MB"
    if step.flops:
        work += f", {step.flops / 1e9:.2f} GFLOP"
    if gpu is None or gpu.limits is None:
        return f"{title}; at least {work}"
    floor = problem_floor(problem, gpu.limits)
    return f"{title}; floor {floor.seconds * 1e6:.1f} µs by {floor.bound} ({work}; {gpu.limits.source})"


def why(id: str, facts: Facts, seconds: float) -> str:
    """How far a time is from both ceilings, and likely why."""
    floor, limits = facts.floor, facts.limits
    memory = floor.bytes / limits.copy / seconds
    compute = floor.flops / limits.rates[facts.dtype] / seconds
    start = f"{id}: {memory:.0%} of the memory ceiling, {compute:.0%} of the matrix units'"
    if floor.seconds / seconds >= NEAR:
        return f"{start}: near the {floor.bound} ceiling; only less work makes it much faster"
    return "\n".join([f"{start}. Likely causes:", *map(wrapped, causes(facts, seconds))])


def _numbers(code: CallCode | str | None, gpu: Gpu) -> tuple[str, str, str]:
    """Registers, KiB of shared memory and occupancy of a call's main launch; empty without its code."""
    if not isinstance(code, CallCode) or not code.launches:
        return "", "", ""
    launch = dominant(code.launches)
    share = occupancy(launch.registers, launch.shared, launch.threads, gpu.capability)
    return (
        str(launch.registers),
        f"{launch.shared / 1024:.0f}",
        f"{share.share:.0%} ({share.limit})",
    )


# ---------------------------------------------------------------- kernels that do not


def report_code(request: Request, kernels: list[Kernel]) -> bool:
    """Check the kernels of one op in the interpreter and compile them; returns whether all are right."""
    problems = network_problems(request, kernels[0].op, timed=False)
    grid = list(problems.values())
    all_right = True
    for kernel in kernels:
        if is_triton(kernel):
            check = check_interpreted(request.names, kernel, grid)
            if not say_check(kernel, check, " in Triton's interpreter"):
                all_right = False
                continue
            code = compiled(request.names, [kernel], grid)
            by_layer = {name: code[kernel.id, problem] for name, problem in problems.items()}
            print(show_code(kernel.id, by_layer, problems, request.gpu))
        else:
            print(f"{kernel.id} cannot run here: {kernel.available()}. It was not checked.")
            print(show_library(kernel))
        print("No time is given: no GPU ran it.\n")
    return all_right


CODE_HEADER = (
    "layer",
    "problem",
    "floor µs",
    "by",
    "launches",
    "grid",
    "regs",
    "KiB",
    "spilled",
    "occupancy",
)


def show_code(
    id: str, codes: dict[str, CallCode | str], problems: dict[str, Problem], gpu: Gpu
) -> str:
    """What the compiler made of a kernel for each problem, and what that says."""
    import triton

    lines, words = [], []
    for name, problem in problems.items():
        code = codes[name]
        lines.append(_code_line(name, problem, code, gpu))
        if isinstance(code, str):
            words.append(wrapped(f"{name}: {code}", ""))
        elif found := causes(facts(problem, code, gpu)):
            words += [f"{name}:", *map(wrapped, found)]
    legend = (
        f"Out of the machine code by Triton {triton.__version__}: blocks × threads, registers a thread, "
        f"KiB of shared memory a block, bytes spilled. Computed: occupancy, and floor ({gpu.limits.source})."
    )
    parts = [
        f"{id} as {gpu.title} would run it",
        wrapped(legend, ""),
        table(CODE_HEADER, lines, right=(2, 4, 5, 6, 7, 8)),
        "What grid and machine code say:" if words else "Grid and machine code look well.",
        *words,
    ]
    return "\n".join(parts)


def _code_line(name: str, problem: Problem, code: CallCode | str, gpu: Gpu) -> tuple[object, ...]:
    floor = problem_floor(problem, gpu.limits)
    start = (
        name,
        short_problem(problem.key).split(",")[0],
        f"{floor.seconds * 1e6:.1f}",
        floor.bound,
    )
    if isinstance(code, str):
        return (*start, "", "", "", "", "", "")
    launch = facts(problem, code, gpu).main
    registers, shared, share = _numbers(code, gpu)
    launches = len(code.launches) + len(code.torch_ops)
    return (
        *start,
        launches,
        f"{launch.blocks}×{launch.threads}",
        registers,
        shared,
        launch.stack,
        share,
    )


def show_library(kernel: Kernel) -> str:
    """Registers and shared memory of a kernel that nvcc built, read from its shared library."""
    from ..kernels import jit, native

    files = [Path(source) for source in kernel.sources if source.endswith(".cu")]
    if not files:
        in_package = kernel.sources == native.SOURCES or native.RECORD.is_file()
        where = "`make gpu` reads its registers on a GPU" if in_package else "no build"
        return f"  built into the package: {where}."
    lines = []
    for file in files:
        for launch in read(Path(jit.build(file).__file__)):
            size = f"{launch.shared / 1024:g}"
            lines.append(
                (launch.name, launch.registers, launch.stack, size, launch.instructions.total())
            )
    return table(
        ("kernel", "registers", "stack", "static shared KiB", "instructions"),
        lines,
        right=(1, 2, 3, 4),
    )
