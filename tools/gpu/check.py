"""Tasks that check kernels: every problem and dtype against float64.

Also NaN and infinities, CUDA graphs, fresh threads, calls without a wait in between, and more than 2³¹ elements.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from math import ceil, prod

import torch
from torch import Tensor

from resnet_fast.bench.op import op_problems
from resnet_fast.dispatch.problem import ACROSS, Problem
from resnet_fast.dispatch.registry import Kernel, find, kernels
from resnet_fast.runtime import cuda_graph
from resnet_fast.testing import eager, rule, samples
from resnet_fast.testing.check import check_kernel, oracle
from resnet_fast.testing.diagnose import diagnose
from resnet_fast.testing.full_size import ORACLE_IMAGES, verify
from resnet_fast.testing.grids import nasty_problems
from resnet_fast.testing.rule import Verdict

from .scale import Alive, Cases, Scale

Tensors = tuple[Tensor, ...]


# ---------------------------------------------------------------- tasks


def inventory(scale: Scale, alive: Alive) -> Cases:
    """List every kernel with its op and, if it cannot run here, the reason."""
    for kernel in chosen_kernels(scale):
        reason = why_absent(kernel, scale)
        status = "absent" if reason else "here"
        row = {"op": kernel.op, "status": status, "reason": reason}
        yield kernel.id, partial(dict, row)


def check(
    scale: Scale,
    alive: Alive,
    kernel: str,
    dtypes: list[str],
    share: int = 0,
    shares: int = 1,
) -> Cases:
    """Check one of ``shares`` shares of a kernel's cases; a row "float16 complete 1/4" says that none was left out."""
    torch.backends.cudnn.allow_tf32 = False  # the bar for float32 is float32
    found = find(kernel)
    for name in dtypes:
        dtype = getattr(torch, name)
        declined: Counter[str] = Counter()
        cases = dict.fromkeys(problems(found, dtype, scale))
        for i, (label, problem) in enumerate(cases):
            reason = found.supports(problem)
            if reason is not None:
                declined[reason] += 1
            elif i % shares == share:
                yield f"{label} {problem.key}", partial(judged, found, problem)
        if share == 0:
            yield from special_values(found, dtype, scale)
            yield from captures(found, dtype, scale)
            yield from chains(found, dtype, scale)
        row = {"status": "complete", "shares": shares, "declined": declined}
        yield f"{name} complete {share + 1}/{shares}", partial(dict, row)


def memory(scale: Scale, alive: Alive, kernel: str) -> Cases:
    """Check about six of a kernel's edge problems: under a memory checker everything takes a hundred times longer."""
    found = find(kernel)
    dtype = getattr(torch, scale.dtypes[0])

    def size(problem: Problem) -> int:
        weights = prod(problem.weight or (1,))
        return prod(problem.x) * weights

    by_size = sorted(edges(found, dtype, scale), key=size)
    step = max(1, len(by_size) // 6)
    for problem in by_size[::step]:
        yield f"memory {problem.key}", partial(judged, found, problem)


def large(scale: Scale, alive: Alive, kernels: list[str]) -> Cases:
    """Check each kernel on tensors of more than 2³¹ elements, where the card has the memory."""
    dtype = getattr(torch, scale.dtypes[0])
    for id in kernels:
        kernel = find(id)
        for problem in huge(kernel.op, dtype, scale):
            if kernel.supports(problem) is None:
                yield f"{id} {problem.key}", partial(judged_huge, kernel, problem, alive)


# ---------------------------------------------------------------- kernels and their problems


def place(scale: Scale) -> tuple[str, tuple[int, int] | None]:
    """Return the device and its compute capability, as a Problem names them."""
    capability = torch.cuda.get_device_capability() if scale.device == "cuda" else None
    return scale.device, capability


def chosen_kernels(scale: Scale) -> list[Kernel]:
    """Return the kernels of the families that this run covers."""
    if not scale.families:
        return kernels()
    chosen = []
    for kernel in kernels():
        family = kernel.id.split(".")[0]
        if family in scale.families:
            chosen.append(kernel)
    return chosen


def why_absent(kernel: Kernel, scale: Scale) -> str | None:
    """Return why a kernel cannot run here, or None."""
    if scale.device == "cuda" and kernel.id.startswith("cpu."):
        return "it is for processors"
    return kernel.available()


def problems(kernel: Kernel, dtype: torch.dtype, scale: Scale) -> Iterator[tuple[str, Problem]]:
    """Yield (kind, problem): the edges, the networks at a small batch, and the sizes that will be timed."""
    for problem in nasty_problems(kernel.op, dtype, *place(scale))[:: scale.every]:
        yield "edge", problem
    timed = str(dtype) == f"torch.{scale.dtypes[0]}"
    more_models = scale.more_models if timed else ()
    for model in (scale.model, *more_models):
        for problem in of_network(model, scale.check_batch, dtype, scale, kernel.op):
            yield "small", problem
    if not timed:
        return
    for batch in scale.batches:
        for problem in of_network(scale.model, batch, dtype, scale, kernel.op):
            # As a plan asks. What is compiled for these, the later stages find compiled.
            yield "full", replace(problem, bn=False)


def of_network(
    model: str,
    batch: int,
    dtype: torch.dtype,
    scale: Scale,
    op: str,
) -> list[Problem]:
    """Return the distinct problems of one op in a network and its training step."""
    found = op_problems(model, batch, scale.size, dtype, *place(scale))
    return [problem for problem in found if problem.op == op]


def edges(kernel: Kernel, dtype: torch.dtype, scale: Scale) -> list[Problem]:
    """Return the edge problems that the kernel takes, but for empty ones."""
    taken = []
    for problem in nasty_problems(kernel.op, dtype, *place(scale)):
        empty = prod(problem.x) == 0
        if not empty and kernel.supports(problem) is None:
            taken.append(problem)
    return taken


def first_of_network(
    kernel: Kernel,
    dtype: torch.dtype,
    scale: Scale,
    accept: Callable[[Problem], bool] = lambda problem: True,
) -> list[Problem]:
    """Return the network's first problem that the kernel takes, alone in a list, or an empty list."""
    for problem in of_network(scale.model, scale.check_batch, dtype, scale, kernel.op):
        if kernel.supports(problem) is None and accept(problem):
            return [problem]
    return []


# ---------------------------------------------------------------- one problem


def judged(kernel: Kernel, problem: Problem) -> dict:
    """Return the verdict on one problem, at full size if it is large; for a wrong small one also where it is wrong."""
    small = problem.x[0] <= ORACLE_IMAGES
    verdict = check_kernel(kernel, problem) if small else verify(kernel, problem)
    row = verdict_row(verdict)
    if small and not verdict.ok:
        row["where"] = diagnose(kernel, problem)
    return row


def verdict_row(verdict: Verdict) -> dict:
    """Return a verdict as a row."""
    return {
        "status": "right" if verdict.ok else "wrong",
        "reason": verdict.reason,
        "error": verdict.error.rms,
        "error_max": verdict.error.max,
        "eager_error": verdict.eager.rms,
        "eager_error_max": verdict.eager.max,
    }


def outputs(value: Tensor | Tensors) -> Tensors:
    """Return a kernel's result as a tuple."""
    return value if isinstance(value, tuple) else (value,)


def compared(
    got: Tensors,
    expected: Tensors,
    problem: Problem,
    what: str,
) -> dict:
    """Return a row that says whether two results of one kernel agree."""
    errors = [
        rule.error(g, e.double()).max for g, e in zip(got, expected, strict=True) if e.numel()
    ]
    apart = max(errors, default=0.0)
    if apart <= rule.FLOOR[problem.dtype]:
        return {"status": "right"}
    return {"status": "wrong", "reason": f"{what} by {apart:.3g}"}


# ---------------------------------------------------------------- NaN and infinities


def special_values(kernel: Kernel, dtype: torch.dtype, scale: Scale) -> Cases:
    """Put NaN and both infinities into the input of problems with and without residual and activation."""
    one_of_each = {}
    for problem in edges(kernel, dtype, scale):
        pixels = prod(problem.x[2:])
        if pixels > 3 and not problem.bytes:
            has_residual = problem.residual is not None
            one_of_each[has_residual, problem.act] = problem
    for problem in one_of_each.values():
        yield f"nan {problem.key}", partial(nonfinite, kernel, problem)


def nonfinite(kernel: Kernel, problem: Problem) -> dict:
    """Whether NaN and infinities come out where eager's do, or where float64's do: Winograd in eager spreads them."""
    args = nonfinite_args(problem)
    with torch.no_grad():
        got = outputs(kernel.fn(*args))
    by_eager = eager.eager(problem.op, args)
    by_oracle = oracle(problem.op, args)
    if same_nonfinite(got, by_eager):
        return {"status": "right", "as": "eager"}
    if same_nonfinite(got, by_oracle):
        return {"status": "right", "as": "float64"}
    lost = 0
    for g, e in zip(got, by_eager, strict=True):
        if e.numel():
            lost += int((e.cpu().isnan() & ~g.cpu().isnan()).sum())
    return {
        "status": "wrong",
        "reason": f"{lost} NaN of eager's are lost; NaN and infinities differ from eager's",
    }


def nonfinite_args(problem: Problem) -> tuple:
    """Return arguments of a problem with NaN and both infinities in the first channel of the first image."""
    x, *rest = map(copied, samples.make_args(problem))
    height, width = x.shape[2:]
    values = (float("nan"), float("inf"), -float("inf"))
    for spot, value in enumerate(values):
        row = spot % height
        column = -1 - spot % width
        x[0, 0, row, column] = value
    return x, *rest


def copied(value: object) -> object:
    """Return a tensor's copy; any other argument is returned as it is."""
    return value.clone() if isinstance(value, Tensor) else value


def same_nonfinite(got: Iterable[Tensor], expected: Iterable[Tensor]) -> bool:
    """Whether NaN and infinities are at the same places in all results."""
    for g, e in zip(got, expected, strict=True):
        if e.numel() and not rule.same_nonfinite(g, e):
            return False
    return True


# ---------------------------------------------------------------- graphs and threads


def captures(kernel: Kernel, dtype: torch.dtype, scale: Scale) -> Cases:
    """Run one problem in a CUDA graph, and in a thread that has not used the GPU before."""
    for problem in first_of_network(kernel, dtype, scale):
        yield f"graph {problem.key}", partial(captured, kernel, problem)
        yield f"thread {problem.key}", partial(in_a_thread, kernel, problem)


def captured(kernel: Kernel, problem: Problem) -> dict:
    """Whether a replay on new data gives the result of a call on it."""
    args = samples.make_args(problem, 0)
    new_args = samples.make_args(problem, 1)
    with torch.no_grad():
        for _ in range(2):  # compiles, and lets cuDNN choose, outside the capture
            kernel.fn(*args)
        replay, result = graph(lambda: outputs(kernel.fn(*args)), problem.device)
        for static, new in zip(args, new_args, strict=True):
            if isinstance(static, Tensor):
                static.copy_(new)
        replayed = replay() or result
        direct = outputs(kernel.fn(*args))
    return compared(replayed, direct, problem, "a replay on new data differs from a call on it")


def in_a_thread(kernel: Kernel, problem: Problem) -> dict:
    """Whether a call may be its thread's first use of the GPU.

    With memory at hand in the allocator's cache, no other call gives the thread a CUDA context.
    """
    args = samples.make_args(problem)
    with torch.no_grad():
        at_hand = kernel.fn(*args)
        expected = outputs(kernel.fn(*args))
        del at_hand
        with ThreadPoolExecutor(1) as fresh:
            got = fresh.submit(lambda: outputs(kernel.fn(*args))).result()
        return compared(got, expected, problem, "a call in a fresh thread differs from one here")


def graph(run: Callable[[], Tensors], device: str) -> tuple[Callable[[], Tensors | None], Tensors]:
    """Return (replay, its result) of ``run`` as a CUDA graph; on a CPU, without graphs, ``run`` itself."""
    if device != "cuda":
        return run, run()
    recorded, result = cuda_graph.captured(run)
    return recorded.replay, result


# ---------------------------------------------------------------- one call after another

CALLS = 4


def chains(kernel: Kernel, dtype: torch.dtype, scale: Scale) -> Cases:
    """Run one problem whose result has its input's shape several times, each call on the result of the one before."""
    for problem in first_of_network(kernel, dtype, scale, same_shape):
        yield f"row {problem.key}", partial(in_a_row, kernel, problem)


def same_shape(problem: Problem) -> bool:
    """Whether a problem's result has the shape of its input."""
    if problem.op in ACROSS:
        return False
    return not problem.weight or (problem.weight[0], *problem.out_hw) == problem.x[1:]


def in_a_row(kernel: Kernel, problem: Problem) -> dict:
    """Whether calls on one another's results need no wait in between: a kernel may start before the last one ends."""
    x, *rest = samples.make_args(problem)

    def run(wait: bool) -> Tensors:
        result = (x,)
        with torch.no_grad():
            for _ in range(CALLS):
                result = outputs(kernel.fn(result[0], *rest))
                if wait and problem.device == "cuda":
                    torch.cuda.synchronize()
        return result

    expected = run(wait=True)
    got = run(wait=False)
    return compared(
        got,
        expected,
        problem,
        f"the last of {CALLS} calls in a row differs from the same with waiting",
    )


# ---------------------------------------------------------------- more elements than 31 bits count


def huge(op: str, dtype: torch.dtype, scale: Scale) -> list[Problem]:
    """Return one problem, for convolutions a 1×1 and a 3×3, with more than ``scale.large`` elements in and out."""
    device, capability = place(scale)
    images = ORACLE_IMAGES * (ceil(scale.large / (ORACLE_IMAGES * 64 * 56 * 56)) + 1)
    base = Problem(
        op,
        device,
        dtype,
        (images, 64, 56, 56),
        "nhwc",
        act="relu",
        capability=capability,
        residual="nhwc" if op.startswith("add_act") else None,
    )
    if op in ACROSS:
        return [_huge_across(replace(base, weight=(64, 64, 1, 1)))]
    if op != "conv_bn_act":
        return [base]
    return [replace(base, weight=(64, 64, r, r), padding=(r // 2, r // 2), bn=True) for r in (1, 3)]


def _huge_across(base: Problem) -> Problem:
    """Return the huge problem of an op across convolutions."""
    pointwise = base.weight
    if base.op == "pointwise_pair":
        return replace(base, chain=(pointwise,), second=base.x[2:], residual="nhwc")
    if base.op == "conv_tail":
        chain = (pointwise, (), pointwise)
        return replace(
            base,
            weight=(64, 64, 3, 3),
            padding=(1, 1),
            chain=chain,
            residual="nhwc",
        )
    if base.op == "conv_pool":
        x = (base.x[0], 4, 224, 224)
        return replace(
            base,
            x=x,
            weight=(64, 4, 7, 7),
            stride=(2, 2),
            padding=(3, 3),
        )
    assert base.op == "pointwise_pool", base.op
    return replace(base, residual="nhwc")


def judged_huge(kernel: Kernel, problem: Problem, alive: Alive) -> dict:
    """Return the verdict on a huge problem, or that the GPU lacks the memory for it."""
    size = prod(problem.x) * problem.dtype.itemsize
    needed = 6 * size
    if problem.device == "cuda" and torch.cuda.mem_get_info()[0] < needed:
        return {"status": "left out", "reason": f"it needs {needed / 2**30:.0f} GiB of free memory"}
    alive("allocating")
    return verdict_row(verify(kernel, problem))
