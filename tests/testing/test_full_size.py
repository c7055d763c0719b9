"""Verification at full size: it passes what is right, and sees each fault that a sample would miss."""

from __future__ import annotations

from dataclasses import replace

import pytest

from resnet_fast.dispatch import registry as dispatch
from resnet_fast.testing import grids, samples
from resnet_fast.testing.full_size import full_args, repeats, verify


@pytest.mark.parametrize("op", dispatch.KEYS)
def test_full_size_verification_passes_aten(op) -> None:
    kernel = dispatch.find("aten", op)
    for problem in grids.nasty_problems(op)[3::17]:
        problem = replace(problem, x=(12, *problem.x[1:]))
        assert repeats(problem) == 3
        verdict = verify(kernel, problem)
        assert verdict.ok, (problem.key, verdict.reason)
        shapes = [[getattr(a, "shape", a) for a in make(problem)] for make in (full_args, samples.make_args)]
        assert shapes[0] == shapes[1]


def spoil(how):
    """aten with one fault."""

    def fn(*args):
        out = dispatch.find("aten", OPS[how]).fn(*args)
        first = out[0] if isinstance(out, tuple) else out
        if how == "one element":
            first[7, 1, 2, 3] += 3
        elif how == "unwritten":
            first[5] = float("nan")
        elif how == "input":
            args[0][9].add_(1)
        elif how == "sum of a part":
            out[1].mul_(0.9)
        elif how == "too few images":
            return first[:8]
        return out

    return fn


OPS = {
    "one element": "conv_bn_act",
    "unwritten": "conv_bn_act",
    "input": "add_act",
    "sum of a part": "bn_act_backward",
    "too few images": "add_act",
}
REASONS = {
    "one element": "rms error",
    "unwritten": "rms error nan",
    "input": "changed an input",
    "sum of a part": "output 1: rms error",
    "too few images": "shape",
}


@pytest.mark.parametrize("how", OPS)
def test_full_size_verification_sees(registry, monkeypatch, how) -> None:
    monkeypatch.setattr("resnet_fast.testing.full_size.CHUNK", 1)
    dispatch.kernel("experimental.spoilt", op=OPS[how], supports=lambda p: None)(spoil(how))
    problem = next(p for p in grids.nasty_problems(OPS[how]) if p.x[1] == 8 and min(p.x[2:]) > 3 and p.x[0])
    if problem.weight:
        problem = replace(problem, stride=(1, 1))
    verdict = verify(dispatch.find("experimental.spoilt"), replace(problem, x=(12, *problem.x[1:])))
    assert not verdict.ok and REASONS[how] in verdict.reason
