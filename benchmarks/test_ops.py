"""Ops: every kernel on every distinct problem of the networks, one group for each problem, beside eager and the bar."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from resnet_fast.bench.op import BASELINES, measure_op, op_problems
from resnet_fast.bench.providers import DTYPES
from resnet_fast.dispatch.problem import Problem
from resnet_fast.dispatch.registry import find, kernels, named


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    get = metafunc.config.getoption
    device = get("--device")
    on_gpu = device == "cuda"
    capability = torch.cuda.get_device_capability() if on_gpu else None
    problems: dict[Problem, None] = {}
    for model in get("--models") or ["resnet50" if on_gpu else "resnet18"]:
        for dtype in get("--dtypes") or ["bf16" if on_gpu else "fp32"]:
            for batch in get("--batches") or [256 if on_gpu else 1]:
                for size in get("--sizes"):
                    problems |= dict.fromkeys(op_problems(model, batch, size, DTYPES[dtype], device, capability))
    wanted = [k for name in get("--kernels") for k in named(name)] if get("--kernels") else kernels()
    whole = get("--full") or get("--kernels")
    pairs = [
        (p, id)
        for p in problems
        if whole or p.op == "conv_bn_act"
        for id in (*BASELINES[p.op], *(k.id for k in wanted if k.op == p.op and k.available() is None))
    ]
    metafunc.parametrize(("problem", "kernel_id"), pairs, ids=[f"{p.key}-{id}" for p, id in pairs])


def test_op(
    problem: Problem, kernel_id: str, together: Callable, rounds: int, report: Callable, pytestconfig: pytest.Config
) -> None:
    def all_kernels(problem: Problem, ids: list[str]) -> dict:
        chosen = [find(id) for id in ids if id not in BASELINES[problem.op]]
        seconds = pytestconfig.getoption("--seconds") / 10  # one op is a small part of a network
        return measure_op(problem, chosen, max_seconds=seconds, max_rounds=rounds)

    report(together("problem", "kernel_id", all_kernels)[kernel_id], problem.key)
