"""Right or wrong: every kernel on every problem and dtype against float64, NaN and infinities, graphs, fresh threads, one
call after another, 2³¹ elements.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import ceil, prod

import torch
from gpu_scale import Alive, Cases, Scale
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


def place(scale: Scale) -> tuple[str, tuple[int, int] | None]:
    """The device and its compute capability, as a Problem names them."""
    return scale.device, torch.cuda.get_device_capability() if scale.device == "cuda" else None


def chosen_kernels(scale: Scale) -> list[Kernel]:
    """The kernels of the families that this run is about."""
    return [k for k in kernels() if not scale.families or k.id.split(".")[0] in scale.families]


def inventory(scale: Scale, alive: Alive) -> Cases:
    """Every kernel: its op, and why it cannot run here."""
    for kernel in chosen_kernels(scale):
        reason = (
            "it is for processors" if scale.device == "cuda" and kernel.id.startswith("cpu.") else kernel.available()
        )
        yield (
            kernel.id,
            lambda kernel=kernel, reason=reason: {
                "op": kernel.op,
                "status": "absent" if reason else "here",
                "reason": reason,
            },
        )


def check(scale: Scale, alive: Alive, kernel: str, dtypes: list[str], share: int = 0, shares: int = 1) -> Cases:
    """One of ``shares`` shares of a kernel's cases; a row "float16 complete 1/4" says that none of it was left out."""
    torch.backends.cudnn.allow_tf32 = False  # the bar for float32 is float32
    found = find(kernel)
    for name in dtypes:
        declined: Counter[str] = Counter()
        cases = dict.fromkeys(problems(found, getattr(torch, name), scale))
        for i, (label, problem) in enumerate(cases):
            reason = found.supports(problem)
            if reason is not None:
                declined[reason] += 1
            elif i % shares == share:
                yield f"{label} {problem.key}", lambda p=problem: judged(found, p)
        if share == 0:
            yield from special_values(found, getattr(torch, name), scale)
            yield from captures(found, getattr(torch, name), scale)
            yield from rows(found, getattr(torch, name), scale)
        yield (
            f"{name} complete {share + 1}/{shares}",
            lambda declined=declined: {"status": "complete", "shares": shares, "declined": declined},
        )


def memory(scale: Scale, alive: Alive, kernel: str) -> Cases:
    """Some six of the edges that a kernel takes: under a memory checker everything takes a hundred times longer."""
    taken = sorted(
        edges(find(kernel), getattr(torch, scale.dtypes[0]), scale), key=lambda p: prod(p.x) * prod(p.weight or (1,))
    )
    for problem in taken[:: max(1, len(taken) // 6)]:
        yield f"memory {problem.key}", lambda p=problem: judged(find(kernel), p)


def problems(kernel: Kernel, dtype: torch.dtype, scale: Scale) -> Iterator[tuple[str, Problem]]:
    """(what kind, problem): the edges, the networks at a small batch, and the sizes that will be timed."""
    where = place(scale)
    for problem in nasty_problems(kernel.op, dtype, *where)[:: scale.every]:
        yield "edge", problem
    timed = str(dtype) == f"torch.{scale.dtypes[0]}"
    for model in (scale.model, *(scale.more_models if timed else ())):
        for problem in of_network(model, scale.check_batch, dtype, scale, kernel.op):
            yield "small", problem
    for batch in scale.batches if timed else ():
        for problem in of_network(scale.model, batch, dtype, scale, kernel.op):
            yield (
                "full",
                replace(problem, bn=False),
            )  # as a plan asks; what this compiles, the later stages find compiled


def of_network(model: str, batch: int, dtype: torch.dtype, scale: Scale, op: str) -> list[Problem]:
    """The distinct problems of one op in a network and its training step."""
    return [p for p in op_problems(model, batch, scale.size, dtype, *place(scale)) if p.op == op]


def edges(kernel: Kernel, dtype: torch.dtype, scale: Scale) -> list[Problem]:
    """The nasty problems, but for empty ones, that the kernel takes."""
    return [p for p in nasty_problems(kernel.op, dtype, *place(scale)) if prod(p.x) and kernel.supports(p) is None]


def judged(kernel: Kernel, problem: Problem) -> dict:
    """The verdict on one problem, at its full size if it is large; for a wrong small one also where it is wrong."""
    small = problem.x[0] <= ORACLE_IMAGES
    verdict = check_kernel(kernel, problem) if small else verify(kernel, problem)
    row = told(verdict)
    if small and not verdict.ok:
        row["where"] = diagnose(kernel, problem)
    return row


def told(verdict: Verdict) -> dict:
    """A verdict as a row."""
    return {
        "status": "right" if verdict.ok else "wrong",
        "reason": verdict.reason,
        "error": verdict.error.rms,
        "error_max": verdict.error.max,
        "eager_error": verdict.eager.rms,
        "eager_error_max": verdict.eager.max,
    }


# ---------------------------------------------------------------- NaN and infinities


def special_values(kernel: Kernel, dtype: torch.dtype, scale: Scale) -> Cases:
    """NaN and both infinities in the input of problems with and without residual and activation."""
    kinds = {
        (p.residual is not None, p.act): p for p in edges(kernel, dtype, scale) if prod(p.x[2:]) > 3 and not p.bytes
    }
    for problem in kinds.values():
        yield f"nan {problem.key}", lambda p=problem: nonfinite(kernel, p)


def nonfinite(kernel: Kernel, problem: Problem) -> dict:
    """Whether NaN and infinities come out where eager's do, or where float64's do: Winograd in eager spreads them."""
    args = tuple(a.clone() if isinstance(a, Tensor) else a for a in samples.make_args(problem))
    spots = float("nan"), float("inf"), -float("inf")
    for spot, value in enumerate(spots):
        args[0][0, 0, spot % args[0].shape[2], -1 - spot % args[0].shape[3]] = value
    with torch.no_grad():
        got = outputs(kernel.fn(*args))
    bars = eager.eager(problem.op, args), oracle(problem.op, args)
    same = [all(rule.same_nonfinite(g, b) for g, b in zip(got, bar, strict=True) if b.numel()) for bar in bars]
    if any(same):
        return {"status": "right", "as": "eager" if same[0] else "float64"}
    lost = sum(int((b.cpu().isnan() & ~g.cpu().isnan()).sum()) for g, b in zip(got, bars[0], strict=True) if b.numel())
    return {"status": "wrong", "reason": f"{lost} NaN of eager's are lost; NaN and infinities differ from eager's"}


def outputs(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


# ---------------------------------------------------------------- graphs and threads


def captures(kernel: Kernel, dtype: torch.dtype, scale: Scale) -> Cases:
    """One problem of the network, the first that the kernel takes, in a CUDA graph and in a thread that has not used the GPU before."""
    found = of_network(scale.model, scale.check_batch, dtype, scale, kernel.op)
    for problem in [p for p in found if kernel.supports(p) is None][:1]:
        yield f"graph {problem.key}", lambda p=problem: captured(kernel, p)
        yield f"thread {problem.key}", lambda p=problem: in_a_thread(kernel, p)


def captured(kernel: Kernel, problem: Problem) -> dict:
    """Whether a replay on new data gives what a call on it gives."""
    args, other = (samples.make_args(problem, seed) for seed in (0, 1))
    with torch.no_grad():
        for _ in range(2):  # compiles, and lets cuDNN choose, outside the capture
            kernel.fn(*args)
        replay, kept = graph(lambda: outputs(kernel.fn(*args)), problem.device)
        for mine, new in zip(args, other, strict=True):
            if isinstance(mine, Tensor):
                mine.copy_(new)
        kept = replay() or kept
        direct = outputs(kernel.fn(*args))
    return alike(kept, direct, problem, "a replay on new data differs from a call on it")


def in_a_thread(kernel: Kernel, problem: Problem) -> dict:
    """Whether a call may be the first that its thread makes of the GPU: with memory at hand, no other has given it a context."""
    args = samples.make_args(problem)
    with torch.no_grad():
        at_hand, wanted = kernel.fn(*args), outputs(kernel.fn(*args))
        del at_hand
        with ThreadPoolExecutor(1) as fresh:
            return alike(
                fresh.submit(lambda: outputs(kernel.fn(*args))).result(),
                wanted,
                problem,
                "a call in a fresh thread differs from one here",
            )


def alike(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...], problem: Problem, what: str) -> dict:
    apart = max((rule.error(g, w.double()).max for g, w in zip(got, wanted, strict=True) if w.numel()), default=0.0)
    if apart <= rule.FLOOR[problem.dtype]:
        return {"status": "right"}
    return {"status": "wrong", "reason": f"{what} by {apart:.3g}"}


def graph(run, device: str):
    """(replay, what it writes) of ``run`` as a CUDA graph; on a CPU, where there are none, ``run`` itself."""
    if device != "cuda":
        return run, run()
    made, kept = cuda_graph.captured(run)
    return made.replay, kept


# ---------------------------------------------------------------- one call after another

CALLS = 4


def rows(kernel: Kernel, dtype: torch.dtype, scale: Scale) -> Cases:
    """One problem of the network, the first that the kernel takes whose result has its input's shape, several times in a row."""
    found = of_network(scale.model, scale.check_batch, dtype, scale, kernel.op)
    for problem in [p for p in found if kernel.supports(p) is None and same_shape(p)][:1]:
        yield f"row {problem.key}", lambda p=problem: in_a_row(kernel, p)


def same_shape(problem: Problem) -> bool:
    return problem.op not in ACROSS and (not problem.weight or (problem.weight[0], *problem.out_hw) == problem.x[1:])


def in_a_row(kernel: Kernel, problem: Problem) -> dict:
    """Whether calls on one another's results need nobody to wait in between: a kernel may be started before the last is done."""
    x, *rest = samples.make_args(problem)

    def run(wait: bool) -> tuple[Tensor, ...]:
        made = (x,)
        with torch.no_grad():
            for _ in range(CALLS):
                made = outputs(kernel.fn(made[0], *rest))
                if wait and problem.device == "cuda":
                    torch.cuda.synchronize()
        return made

    wanted = run(wait=True)
    return alike(
        run(wait=False), wanted, problem, f"the last of {CALLS} calls in a row differs from the same with waiting"
    )


# ---------------------------------------------------------------- more elements than 31 bits count


def large(scale: Scale, alive: Alive, kernels: list[str]) -> Cases:
    """Each kernel on tensors of more than 2³¹ elements, where the card has the memory."""
    dtype = getattr(torch, scale.dtypes[0])
    for id in kernels:
        kernel = find(id)
        for problem in huge(kernel.op, dtype, scale):
            if kernel.supports(problem) is None:
                yield f"{id} {problem.key}", lambda kernel=kernel, problem=problem: enormous(kernel, problem, alive)


def huge(op: str, dtype: torch.dtype, scale: Scale) -> list[Problem]:
    """One problem, for convolutions a 1×1 and a 3×3, whose input and output both exceed ``scale.large`` elements."""
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
    one = base.weight
    return {
        "pointwise_pair": replace(base, chain=(one,), second=base.x[2:], residual="nhwc"),
        "conv_tail": replace(base, weight=(64, 64, 3, 3), padding=(1, 1), chain=(one, (), one), residual="nhwc"),
        "conv_pool": replace(base, x=(base.x[0], 4, 224, 224), weight=(64, 4, 7, 7), stride=(2, 2), padding=(3, 3)),
        "pointwise_pool": replace(base, residual="nhwc"),
    }[base.op]


def enormous(kernel: Kernel, problem: Problem, alive: Alive) -> dict:
    size = prod(problem.x) * problem.dtype.itemsize
    needed = 6 * size
    if problem.device == "cuda" and torch.cuda.mem_get_info()[0] < needed:
        return {"status": "left out", "reason": f"it needs {needed / 2**30:.0f} GiB of free memory"}
    alive("allocating")
    return told(verify(kernel, problem))
