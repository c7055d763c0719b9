"""Kernels on the problems of a network: checked, then timed beside rivals, or compiled for a GPU that is not here.

The work of ``bench --kernel``; ``cli/bench_kernel`` prints what these functions return.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from itertools import chain
from typing import NamedTuple

import torch

from ..analysis.bottlenecks import Facts
from ..analysis.launches import Launch, profiled
from ..dispatch import ACROSS, Kernel, Problem, kernels, named
from ..models import problems as model_problems
from ..models.problems import problem_after
from ..roofline import chips
from ..roofline.chips import CHIPS
from ..roofline.floor import problem_floor
from ..testing.check import check_kernel
from ..testing.diagnose import diagnose
from ..testing.grids import nasty_problems
from ..testing.samples import make_args
from . import fresh_process
from .ledger import Row
from .network import Measured, known_ceilings
from .op import at_check_batch, measure_op

INTERPRETED_SIZE = (
    9  # height and width in the interpreter: channels and filters are the network's own
)


# ---------------------------------------------------------------- the request


@dataclass(frozen=True)
class Gpu:
    """The GPU that numbers are about: this machine's, or named by ``--gpu``; ``limits`` is None for an unlisted one."""

    title: str
    capability: tuple[int, int]
    sms: int
    limits: chips.Ceilings | None


def gpu_model(name: str, device: torch.device) -> Gpu:
    """Return this machine's GPU, or without one the model of that short name; raises LookupError for an unknown one."""
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        capability = found.major, found.minor
        return Gpu(found.name, capability, found.multi_processor_count, known_ceilings("cuda"))
    limits = chips.ceilings(name)
    chip = CHIPS[name.lower()]
    return Gpu(limits.title, chip.capability, chip.sms, limits)


@dataclass(frozen=True)
class Request:
    """What ``bench --kernel`` is asked for; ``batches`` and ``dtype`` are None where the device decides."""

    names: tuple[str, ...]
    model: str
    layers: tuple[str, ...]
    batches: tuple[int, ...] | None
    size: int
    dtype: torch.dtype | None
    seconds: float
    device: torch.device
    gpu: Gpu


def requested_kernels(names: Iterable[str]) -> list[Kernel]:
    """Return the kernels that the names stand for: ids, families or files."""
    found = chain.from_iterable(named(name) for name in names)
    return list(found)


def can_be_timed(kernel: Kernel, device: torch.device) -> bool:
    """Whether a time would mean something: the kernel runs here, and not only in an interpreter."""
    if kernel.available() is not None:
        return False
    return device.type == "cuda" or not is_triton(kernel)


def is_triton(kernel: Kernel) -> bool:
    """Whether the kernel's module holds Triton functions."""
    module = sys.modules[kernel.fn.__module__]
    types = [type(value) for value in vars(module).values()]
    return any(kind.__module__.startswith("triton.") for kind in types)


def network_problems(request: Request, op: str, timed: bool) -> dict[str, Problem]:
    """Return name of the first layer → problem, for each distinct problem of the network's layers that were asked for.

    Kernels that cannot be timed here are compiled for the request's GPU, so their problems are on "cuda".
    """
    device = request.device.type if timed else "cuda"
    on_gpu = device == "cuda"
    batches = request.batches or (256 if on_gpu else 1,)
    dtype = request.dtype or (torch.bfloat16 if on_gpu else torch.float32)
    capability = request.gpu.capability if on_gpu else None
    found: dict[Problem, str] = {}
    for batch in batches:
        convs = model_problems.conv_layers(
            request.model, batch, request.size, dtype, device, capability
        )
        for name, problem in _problems_of_op(op, convs):
            if any(fnmatch(name, pattern) for pattern in request.layers):
                found.setdefault(problem, name)
    if not found:
        raise ValueError(
            f"--layers: got {' '.join(request.layers)}, which no layer of {request.model} with {op} is called; "
            "`explain` lists them"
        )
    if len(batches) == 1:
        return {name: problem for problem, name in found.items()}
    return {f"{name}, batch {problem.x[0]}": problem for problem, name in found.items()}


def _problems_of_op(op: str, convs: list) -> list[tuple[str, Problem]]:
    """Return (layer, problem) of each call of ``op`` in a network of these convolutions."""
    if op in ACROSS:
        groups = model_problems.across_layers(convs)
        return [(group.name, group.problem) for group in groups if group.problem.op == op]
    if op == "conv_bn_act":
        return [(conv.name, conv.problem) for conv in convs]
    found = []
    for conv in convs:
        after = problem_after(conv.problem, op)
        if after is not None:
            found.append((conv.name, after))
    return found


# ---------------------------------------------------------------- checking


class Check(NamedTuple):
    """How many problems a kernel takes, and what is wrong with those that it gets wrong."""

    taken: int
    wrong: list[str]

    @property
    def passed(self) -> bool:
        return self.taken > 0 and not self.wrong


def check(kernel: Kernel, grid: Iterable[Problem]) -> Check:
    """Check a kernel in this process."""
    taken = [problem for problem in grid if kernel.reason(problem) is None]
    wrong = []
    for problem in taken:
        verdict = check_kernel(kernel, problem)
        if not verdict.ok:
            wrong.append(f"{problem.key}: {verdict.reason}\n      {diagnose(kernel, problem)}")
    return Check(len(taken), wrong)


def check_here(kernel: Kernel, problems: list[Problem]) -> Check:
    """Check a kernel on the grid of its op and on the network's problems at a small batch."""
    first = problems[0]
    grid = nasty_problems(kernel.op, first.dtype, first.device, first.capability)
    small = [at_check_batch(problem) for problem in problems]
    return check(kernel, [*grid, *small])


def check_interpreted(names: tuple[str, ...], kernel: Kernel, problems: list[Problem]) -> Check:
    """Check a Triton kernel in Triton's interpreter, in a fresh process, on CPU copies of the problems."""
    dtype = problems[0].dtype
    nasty = nasty_problems(kernel.op, dtype)
    small = dict.fromkeys(interpreted(problem) for problem in problems)
    grid = [*nasty, *small]
    return fresh_process.call(True, _check_named, names, kernel.id, grid)


def _check_named(names: tuple[str, ...], id: str, grid: list[Problem]) -> Check:
    requested = requested_kernels(names)
    kernel = next(k for k in requested if k.id == id)
    return check(kernel, grid)


def interpreted(problem: Problem) -> Problem:
    """Return the problem on one small image; a second input is as large as the first then requires."""
    _, channels, *size = problem.x
    height, width = (min(pixels, INTERPRETED_SIZE) for pixels in size)
    second = None
    if problem.second:
        second = height * problem.stride[0], width * problem.stride[1]
    return replace(
        problem, device="cpu", capability=None, x=(1, channels, height, width), second=second
    )


# ---------------------------------------------------------------- the code of a call


class CallCode(NamedTuple):
    """The launches of one call, and the bytes and names of torch's own ops around them."""

    launches: tuple[Launch, ...]
    torch_bytes: int
    torch_ops: tuple[str, ...]


# (kernel id, problem) → its code, or the reason why there is none.
CodeTable = dict[tuple[str, Problem], "CallCode | str"]


def compiled(names: tuple[str, ...], chosen: list[Kernel], problems: list[Problem]) -> CodeTable:
    """Compile Triton kernels for each problem in a fresh process."""
    if not chosen:
        return {}
    ids = [kernel.id for kernel in chosen]
    return fresh_process.call(False, _compile_named, names, ids, problems)


def _compile_named(names: tuple[str, ...], ids: list[str], problems: list[Problem]) -> CodeTable:
    known = {k.id: k for k in (*requested_kernels(names), *kernels())}
    found: CodeTable = {}
    for id in ids:
        kernel = known[id]
        for problem in problems:
            found[id, problem] = kernel.supports(problem) or _compile(kernel, problem)
    return found


def _compile(kernel: Kernel, problem: Problem) -> CallCode | str:
    from ..analysis.aot import compile_call

    try:
        call = compile_call(kernel, problem)
    except Exception as error:  # a user's kernel and a compiler: whatever they raise is the finding
        return f"does not compile: {type(error).__name__}: {error}"
    return CallCode(call.launches, call.torch_bytes, tuple(call.torch_ops.elements()))


def _profile(kernel: Kernel, problem: Problem) -> CallCode | None:
    """Return the launches that the profiler sees on a GPU; None on a CPU."""
    if problem.device != "cuda":
        return None
    args = make_args(problem)
    return CallCode(tuple(profiled(lambda: kernel.fn(*args))), 0, ())


def facts(problem: Problem, code: CallCode, gpu: Gpu) -> Facts:
    """Return what the likely causes are judged by."""
    return Facts(
        problem_floor(problem, gpu.limits),
        problem.dtype,
        code.launches,
        gpu.limits,
        gpu.capability,
        gpu.sms,
        code.torch_bytes,
        code.torch_ops,
    )


# ---------------------------------------------------------------- timing


@dataclass(frozen=True)
class Times:
    """Every kernel measured on one problem, and the code of those that were timed."""

    name: str
    problem: Problem
    measured: dict[str, Measured]
    code: dict[str, CallCode | str | None]

    @property
    def rows(self) -> list[Row]:
        """The ledger rows, fastest first."""
        rows = [measured.row for measured in self.measured.values() if measured.row is not None]
        return sorted(rows, key=lambda row: row.seconds)


def rivals(chosen: list[Kernel], device: torch.device) -> list[Kernel]:
    """Return the other kernels of the same op that can be timed here."""
    of_op = kernels(chosen[0].op)
    return [k for k in of_op if k not in chosen and can_be_timed(k, device)]


def time_problem(
    name: str,
    problem: Problem,
    chosen: list[Kernel],
    others: list[Kernel],
    code: CodeTable,
    seconds: float,
) -> Times:
    """Time the chosen kernels beside the others that take the problem; ``code`` is that of the Triton kernels."""
    able_others = [k for k in others if k.reason(problem) is None]
    able = [*chosen, *able_others]
    measured = measure_op(problem, able, max_seconds=seconds)
    codes = {}
    for kernel in able:
        if measured[kernel.id].row is not None:
            codes[kernel.id] = code.get((kernel.id, problem)) or _profile(kernel, problem)
    return Times(name, problem, measured, codes)
