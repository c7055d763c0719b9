"""``bench --kernel``: a kernel on the problems of a network, beside ``aten`` and its rivals; what limits it, and likely why.

Where the kernel can run it is timed. Where it cannot, as a Triton kernel without a GPU, it is checked in Triton's interpreter and
compiled for a GPU that is named, and what its machine code says is printed: no time.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from multiprocessing import get_context
from pathlib import Path

import torch

from ..analysis.bottlenecks import NEAR, Facts, causes
from ..analysis.launches import main, read
from ..analysis.profiled import profiled
from ..bench.ledger import Row, here, measured_by, write_run
from ..bench.network import Outcome, known_ceilings
from ..bench.op import CHECK_BATCH, after, measure_op
from ..bench.providers import DTYPES
from ..dispatch.problem import ACROSS, Problem
from ..dispatch.registry import Kernel, kernels
from ..models.problems import across_layers, conv_layers
from ..report.tables import short_problem
from ..roofline import chips, cost
from ..roofline.floor import problem_floor
from ..roofline.occupancy import CHIPS, occupancy
from ..testing.check import check_kernel
from ..testing.diagnose import diagnose
from ..testing.grids import nasty_problems
from ..testing.samples import make_args
from ..util.machine import device_or_error
from ..util.text import table, wrapped
from .check import wanted

INTERPRETED_SIZE = 9  # height and width in the interpreter: channels and filters are the network's own


@dataclass(frozen=True)
class Gpu:
    """The GPU that numbers are about: here, or named by ``--gpu``; ``limits`` is None for one that nobody wrote down."""

    title: str
    capability: tuple[int, int]
    sms: int
    limits: chips.Ceilings | None


def target(name: str, device: torch.device) -> Gpu:
    """This machine's GPU, or without one the model of that short name; raises LookupError for an unknown one."""
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        return Gpu(found.name, (found.major, found.minor), found.multi_processor_count, known_ceilings("cuda"))
    limits = chips.ceilings(name)
    chip = CHIPS[name.lower()]
    return Gpu(limits.title, chip.capability, chip.sms, limits)


def run(args: argparse.Namespace) -> int:
    device = device_or_error(args.device)
    gpu = target(args.gpu, device)
    mine = wanted(args.kernel)
    cold = [k for k in mine if not runs_on(k, device)]
    warm = [k for k in mine if k not in cold]
    red, rows = [], []
    with redirect_stdout(sys.stderr if args.json else sys.stdout):
        for chosen, report in ((warm, timed), (cold, untimed)):
            for op in dict.fromkeys(k.op for k in chosen):
                wrong, found = report([k for k in chosen if k.op == op], args, device, gpu)
                red += wrong
                rows += found
    if args.json:
        json.dump({"machine": asdict(here(args.device)), "rows": [asdict(row) for row in rows]}, sys.stdout, indent=1)
        print()
    if args.save is not None and rows:
        machine = here(args.device)
        machine.facts["command"] = measured_by(["resnet_fast", *args.words], "--save")
        print(f"written: {write_run(rows, machine, args.save or None)}", file=sys.stderr)
    return 1 if red else 0


def runs_on(kernel: Kernel, device: torch.device) -> bool:
    """Whether a time of it would mean something: it can run here, and not only in an interpreter."""
    return kernel.available() is None and (device.type == "cuda" or not is_triton(kernel))


def is_triton(kernel: Kernel) -> bool:
    """Whether the kernel's module holds Triton functions."""
    return any(
        type(value).__module__.startswith("triton.") for value in vars(sys.modules[kernel.fn.__module__]).values()
    )


def problems(op: str, args: argparse.Namespace, device: str, capability: tuple[int, int] | None) -> dict[str, Problem]:
    """First layer of its kind → each distinct problem of the network (of the layers that --layers names)."""
    batch = args.batch or [256 if device == "cuda" else 1]
    dtype = DTYPES[args.dtype or ("bf16" if device == "cuda" else "fp32")]
    found: dict[Problem, str] = {}
    for images in batch:
        single = conv_layers(args.model, images, args.size, dtype, device, capability)
        for layer in [group for group in across_layers(single) if group.problem.op == op] if op in ACROSS else single:
            problem = layer.problem if op in ("conv_bn_act", *ACROSS) else after(layer.problem, op)
            if problem is not None and any(fnmatch(layer.name, pattern) for pattern in args.layers):
                found.setdefault(problem, layer.name)
    if not found:
        raise ValueError(
            f"--layers: got {' '.join(args.layers)}, which no layer of {args.model} with {op} is called; "
            "`explain` lists them"
        )
    return {f"{name}, batch {problem.x[0]}" if len(batch) > 1 else name: problem for problem, name in found.items()}


# ---------------------------------------------------------------- where the kernel runs


def timed(
    mine: list[Kernel], args: argparse.Namespace, device: torch.device, gpu: Gpu
) -> tuple[list[Kernel], list[Row]]:
    """Check, then time; (kernels that are wrong, ledger rows)."""
    capability = gpu.capability if device.type == "cuda" else None
    chosen = problems(mine[0].op, args, device.type, capability)
    grid = nasty_problems(mine[0].op, next(iter(chosen.values())).dtype, device.type, capability)
    small = [replace(p, x=(min(p.x[0], CHECK_BATCH), *p.x[1:])) for p in chosen.values()]
    red = [k for k in mine if refuse(k, *judge(k, [*grid, *small]), "")]
    mine = [k for k in mine if k not in red]
    rivals = [k for k in kernels(mine[0].op) if k not in mine and runs_on(k, device)] if mine else []
    code = (
        compiled(args.kernel, [k for k in (*mine, *rivals) if is_triton(k)], list(chosen.values()))
        if device.type == "cuda"
        else {}
    )
    rows = []
    for name, problem in chosen.items() if mine else ():
        able = [k for k in (*mine, *rivals) if k in mine or k.reason(problem) is None]
        print(f"  {name} …", file=sys.stderr, flush=True)
        outcomes = measure_op(problem, able, max_seconds=args.seconds or 4.0)
        rows += [outcome.row for outcome in outcomes.values() if outcome.row is not None]
        calls = {
            k.id: code.get((k.id, problem)) or _profile(k, problem) for k in able if outcomes[k.id].row is not None
        }
        print(show(name, problem, outcomes, [k.id for k in mine], calls, gpu, device))
    if mine and device.type != "cuda":
        print("No roofline on a CPU: nobody wrote its ceilings down. Ratios are medians of same-round ratios.")
    return red, rows


def _profile(kernel: Kernel, problem: Problem):
    """(launches, bytes of torch's ops, their names) of a kernel that is not Triton's; nothing on a CPU."""
    if problem.device != "cuda":
        return None
    args = make_args(problem)
    return tuple(profiled(lambda: kernel.fn(*args))), 0, ()


def show(
    name: str,
    problem: Problem,
    outcomes: dict[str, Outcome],
    mine: list[str],
    calls: dict,
    gpu: Gpu,
    device: torch.device,
) -> str:
    """One problem: every way to compute it, fastest first, and why the kernels in question are not faster."""
    found = sorted((o.row for o in outcomes.values() if o.row is not None), key=lambda row: row.seconds)
    bar = f"aten.{problem.op}"
    lines = []
    for row in found:
        ratio = 1.0 if row.provider == bar else row.speed_over.get(bar)
        code = _numbers(calls.get(row.provider), gpu)
        lines.append(
            (
                ("→ " if row.provider in mine else "  ") + row.provider,
                f"{row.seconds * 1e6:,.1f}",
                f"{(row.high - row.low) / row.seconds:.0%}",
                _or(ratio, ".2f"),
                _or(row.roofline, ".0%"),
                f"{row.gb_s:,.0f}",
                _or(row.tflops, ".2f"),
                _or(row.error, ".1e"),
                *code,
            )
        )
    header = [
        "",
        "µs",
        "spread",
        "× aten",
        "roofline",
        "GB/s",
        "TFLOP/s",
        "error",
        "registers",
        "shared KiB",
        "occupancy",
    ]
    kept = [i for i in range(len(header)) if i < 3 or any(line[i] for line in lines)]
    parts = [
        heading(name, problem, gpu if device.type == "cuda" else None),
        table([header[i] for i in kept], [[line[i] for i in kept] for line in lines], right=range(1, len(kept))),
    ]
    parts += [
        f"{o.provider}: {o.skipped or f'WRONG: {o.wrong}: not timed'}" for o in outcomes.values() if o.row is None
    ]
    if device.type == "cuda" and gpu.limits is not None:
        seconds = {row.provider: row.seconds for row in found}
        parts += [why(id, facts(problem, calls[id], gpu), seconds[id]) for id in mine if id in seconds]
    return "\n".join(parts) + "\n"


# ---------------------------------------------------------------- where it does not


def untimed(
    mine: list[Kernel], args: argparse.Namespace, device: torch.device, gpu: Gpu
) -> tuple[list[Kernel], list[Row]]:
    """Check in the interpreter and compile for the named GPU; (kernels that are wrong, no rows)."""
    chosen = problems(mine[0].op, args, "cuda", gpu.capability)
    red = []
    for kernel in mine:
        if is_triton(kernel):
            grid = nasty_problems(kernel.op, next(iter(chosen.values())).dtype)
            small = dict.fromkeys(map(interpreted, chosen.values()))
            checked = fresh(True, judge_named, args.kernel, kernel.id, [*grid, *small])
            if refuse(kernel, *checked, " in Triton's interpreter"):
                red.append(kernel)
                continue
            code = compiled(args.kernel, [kernel], list(chosen.values()))
            print(show_code(kernel.id, {name: code[kernel.id, p] for name, p in chosen.items()}, chosen, gpu))
        else:
            print(f"{kernel.id} cannot run here: {kernel.available()}. It was not checked.")
            print(show_file(kernel))
        print("No time is given: no GPU ran it.\n")
    return red, []


def interpreted(problem: Problem) -> Problem:
    """The problem on one small image; the second input, if there is one, as large as the first then wants it."""
    size = tuple(min(s, INTERPRETED_SIZE) for s in problem.x[2:])
    second = problem.second and tuple(s * stride for s, stride in zip(size, problem.stride, strict=True))
    return replace(problem, device="cpu", capability=None, x=(1, problem.x[1], *size), second=second)


def show_code(id: str, found: dict, chosen: dict[str, Problem], gpu: Gpu) -> str:
    """What the compiler made of a kernel for each problem, and what that says."""
    lines, words = [], []
    for name, problem in chosen.items():
        call, floor = found[name], problem_floor(problem, gpu.limits)
        start = (name, short_problem(problem.key).split(",")[0], f"{floor.seconds * 1e6:.1f}", floor.bound)
        if isinstance(call, str):
            lines.append((*start, "", "", "", "", "", ""))
            words.append(wrapped(f"{name}: {call}", ""))
            continue
        f = facts(problem, call, gpu)
        one = f.main
        registers, shared, share = _numbers(call, gpu)
        lines.append(
            (*start, len(call[0]) + len(call[2]), f"{one.blocks}×{one.threads}", registers, shared, one.stack, share)
        )
        told = causes(f)
        words += [f"{name}:", *map(wrapped, told)] if told else []
    header = ("layer", "problem", "floor µs", "by", "launches", "grid", "regs", "KiB", "spilled", "occupancy")
    import triton

    return "\n".join(
        [
            f"{id} as {gpu.title} would run it",
            wrapped(
                f"Out of the machine code by Triton {triton.__version__}: blocks × threads, registers a thread, KiB of shared memory a block, "
                f"bytes spilled. Computed: occupancy, and floor ({gpu.limits.source}).",
                "",
            ),
            table(header, lines, right=(2, 4, 5, 6, 7, 8)),
            "What grid and machine code say:" if words else "Grid and machine code look well.",
            *words,
        ]
    )


def show_file(kernel: Kernel) -> str:
    """Registers and shared memory of a kernel that nvcc built, from its shared library."""
    from ..kernels import jit, native

    files = [Path(s) for s in kernel.sources if s.endswith(".cu")]
    if not files:
        where = (
            "`make gpu` reads its registers on a GPU"
            if kernel.sources == native.SOURCES or native.RECORD.is_file()
            else "no build"
        )
        return f"  built into the package: {where}."
    built = [one for file in files for one in read(Path(jit.build(file).__file__))]
    lines = [(one.name, one.registers, one.stack, f"{one.shared / 1024:g}", one.instructions.total()) for one in built]
    return table(("kernel", "registers", "stack", "static shared KiB", "instructions"), lines, right=(1, 2, 3, 4))


# ---------------------------------------------------------------- numbers and words


def facts(problem: Problem, call: tuple, gpu: Gpu) -> Facts:
    launches, moved, names = call
    return Facts(
        problem_floor(problem, gpu.limits),
        problem.dtype,
        launches,
        gpu.limits,
        gpu.capability,
        gpu.sms,
        moved,
        names,
    )


def why(id: str, f: Facts, seconds: float) -> str:
    """How far from both ceilings, and why."""
    memory, compute = f.floor.bytes / f.limits.copy / seconds, f.floor.flops / f.limits.rates[f.dtype] / seconds
    start = f"{id}: {memory:.0%} of the memory ceiling, {compute:.0%} of the matrix units'"
    if f.floor.seconds / seconds >= NEAR:
        return f"{start}: near the {f.floor.bound} ceiling; only less work makes it much faster"
    return "\n".join([f"{start}. Likely causes:", *map(wrapped, causes(f, seconds))])


def heading(name: str, problem: Problem, gpu: Gpu | None) -> str:
    title = f"{name.split(',')[0]}: {short_problem(problem.key)}"
    step = cost.problem_step(problem)
    work = f"{step.bytes / 1e6:.1f} MB" + (f", {step.flops / 1e9:.2f} GFLOP" if step.flops else "")
    if gpu is None or gpu.limits is None:
        return f"{title}; at least {work}"
    floor = problem_floor(problem, gpu.limits)
    return f"{title}; floor {floor.seconds * 1e6:.1f} µs by {floor.bound} ({work}; {gpu.limits.source})"


def _numbers(call: tuple | str | None, gpu: Gpu) -> tuple[str, str, str]:
    """Registers, KiB of shared memory and occupancy of a call's main launch."""
    if not call or isinstance(call, str) or not call[0]:
        return "", "", ""
    one = main(call[0])
    share = occupancy(one.registers, one.shared, one.threads, gpu.capability)
    return str(one.registers), f"{one.shared / 1024:.0f}", f"{share.share:.0%} ({share.limit})"


def _or(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


# ---------------------------------------------------------------- checking, compiling, in this process or a fresh one


def judge(kernel: Kernel, grid: Iterable[Problem]) -> tuple[int, list[str]]:
    """(problems that the kernel takes, what is wrong with those that it gets wrong)."""
    taken, wrong = 0, []
    for problem in grid:
        if kernel.reason(problem) is None:
            taken += 1
            verdict = check_kernel(kernel, problem)
            if not verdict.ok:
                wrong.append(f"{problem.key}: {verdict.reason}\n      {diagnose(kernel, problem)}")
    return taken, wrong


def judge_named(names: list[str], id: str, grid: list[Problem]) -> tuple[int, list[str]]:
    return judge(next(k for k in wanted(names) if k.id == id), grid)


def refuse(kernel: Kernel, taken: int, wrong: list[str], where: str) -> bool:
    """Say how a kernel's check went; True if it is wrong, or takes nothing that could be checked."""
    for words in wrong[:3]:
        print(f"WRONG {kernel.id}: {words}")
    if wrong:
        print(
            f"{kernel.id} is wrong on {len(wrong)} of {taken} problems{where}: it gets no time. `check --kernel` tells more."
        )
    elif not taken:
        print(f"{kernel.id} declines every problem of the check{where}: it gets no time.")
    else:
        print(f"{kernel.id} is right on {taken} problems{where}.")
    return bool(wrong) or not taken


def compiled(names: list[str], chosen: list[Kernel], grid: list[Problem]) -> dict[tuple[str, Problem], tuple | str]:
    """(kernel, problem) → (launches, bytes of torch's ops, their names), or why there are none."""
    return fresh(False, compile_named, names, [k.id for k in chosen], grid) if chosen else {}


def compile_named(names: list[str], ids: list[str], grid: list[Problem]) -> dict[tuple[str, Problem], tuple | str]:
    from ..analysis.aot import compile_call

    known = {k.id: k for k in (*wanted(names), *kernels())}
    found: dict[tuple[str, Problem], tuple | str] = {}
    for id in ids:
        for problem in grid:
            reason = known[id].supports(problem)
            try:
                call = None if reason else compile_call(known[id], problem)
            except Exception as error:  # a user's kernel and a compiler: whatever they raise is the finding
                reason = f"does not compile: {type(error).__name__}: {error}"
            found[id, problem] = reason or (call.launches, call.torch_bytes, tuple(call.torch_ops.elements()))
    return found


def fresh(interpret: bool, function: Callable, *args):
    """The function's result out of a fresh process in which Triton interprets, or compiles: one process cannot do both."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1" if interpret else "0"
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(function, *args).result()
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before
