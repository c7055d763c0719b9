"""Ops: every kernel on every distinct problem of the networks, beside eager and folded + fused; a group a problem."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch

from resnet_fast.bench.op import BASELINES, measure_op, op_problems
from resnet_fast.dispatch.problem import Problem
from resnet_fast.dispatch.registry import find, kernels, named
from resnet_fast.util.machine import SHORT_DTYPES


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run the test for every problem that the options ask for and every kernel that is available for it."""
    option = metafunc.config.getoption
    problems = selected_problems(option)
    if not (option("--full") or option("--kernels")):
        problems = [problem for problem in problems if problem.op == "conv_bn_act"]
    pairs = []
    for problem in problems:
        pairs += [(problem, id) for id in kernel_ids(problem, option("--kernels"))]
    ids = [f"{problem.key}-{id}" for problem, id in pairs]
    metafunc.parametrize(("problem", "kernel_id"), pairs, ids=ids)


def selected_problems(option: Callable) -> list[Problem]:
    """Return the distinct problems of the chosen models, dtypes, batches and sizes."""
    device = option("--device")
    on_gpu = device == "cuda"
    capability = torch.cuda.get_device_capability() if on_gpu else None
    models = option("--models") or ["resnet50" if on_gpu else "resnet18"]
    dtypes = option("--dtypes") or ["bf16" if on_gpu else "fp32"]
    batches = option("--batches") or [256 if on_gpu else 1]
    problems: dict[Problem, None] = {}
    for model, dtype, batch, size in itertools.product(models, dtypes, batches, option("--sizes")):
        found = op_problems(model, batch, size, SHORT_DTYPES[dtype], device, capability)
        problems |= dict.fromkeys(found)
    return list(problems)


def kernel_ids(problem: Problem, names: list[str] | None) -> list[str]:
    """Return the baselines of the problem's op and its available kernels, of all or of the named ones."""
    if names:
        candidates = itertools.chain.from_iterable(map(named, names))
    else:
        candidates = kernels()
    of_op = [kernel for kernel in candidates if kernel.op == problem.op]
    available = [kernel.id for kernel in of_op if kernel.available() is None]
    return [*BASELINES[problem.op], *available]


def test_op(
    problem: Problem,
    kernel_id: str,
    together: Callable,
    rounds: int,
    report: Callable,
    pytestconfig: pytest.Config,
) -> None:
    def measure_all(problem: Problem, ids: list[str]) -> dict:
        baselines = BASELINES[problem.op]
        chosen = [find(id) for id in ids if id not in baselines]
        seconds = pytestconfig.getoption("--seconds") / 10  # one op is a small part of a network
        return measure_op(problem, chosen, max_seconds=seconds, max_rounds=rounds)

    outcomes = together("problem", "kernel_id", measure_all)
    report(outcomes[kernel_id], problem.key)
