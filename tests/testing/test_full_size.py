"""Verification at full size passes what is right, and sees each fault that a sample would miss."""

from __future__ import annotations

from dataclasses import replace

import pytest

from resnet_fast.dispatch import registry as dispatch
from resnet_fast.dispatch.problem import Problem
from resnet_fast.testing import grids, samples
from resnet_fast.testing.full_size import full_args, repeats, verify

BATCH = 12  # four images three times


def shapes(args: tuple) -> list:
    return [getattr(a, "shape", a) for a in args]


@pytest.mark.parametrize("op", dispatch.KEYS)
def test_aten_passes(op) -> None:
    kernel = dispatch.find("aten", op)
    for problem in grids.nasty_problems(op)[3::17]:
        large = replace(problem, x=(BATCH, *problem.x[1:]))
        assert repeats(large) == 3
        verdict = verify(kernel, large)
        assert verdict.ok, (large.key, verdict.reason)
        assert shapes(full_args(large)) == shapes(samples.make_args(large))


# Fault → the op that has it, and the reason that verification gives.
FAULTS = {
    "one element": ("conv_bn_act", "rms error"),
    "unwritten": ("conv_bn_act", "rms error nan"),
    "input": ("add_act", "changed an input"),
    "sum of a part": ("bn_act_backward", "output 1: rms error"),
    "too few images": ("add_act", "shape"),
}


def aten_with(fault: str, op: str):
    """aten with one fault."""

    def fn(*args):
        out = dispatch.find("aten", op).fn(*args)
        first = out[0] if isinstance(out, tuple) else out
        if fault == "one element":
            first[7, 1, 2, 3] += 3
        elif fault == "unwritten":
            first[5] = float("nan")
        elif fault == "input":
            args[0][9].add_(1)
        elif fault == "sum of a part":
            out[1].mul_(0.9)
        elif fault == "too few images":
            return first[:8]
        return out

    return fn


def eight_channels(op: str) -> Problem:
    """A full-size problem of the op with more than three rows and columns."""
    found = (p for p in grids.nasty_problems(op) if p.x[1] == 8 and min(p.x[2:]) > 3 and p.x[0])
    problem = next(found)
    if problem.weight:
        problem = replace(problem, stride=(1, 1))
    return replace(problem, x=(BATCH, *problem.x[1:]))


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_seen(registry, monkeypatch, fault) -> None:
    op, reason = FAULTS[fault]
    monkeypatch.setattr("resnet_fast.testing.full_size.CHUNK", 1)
    dispatch.kernel("experimental.spoilt", op=op, supports=lambda problem: None)(
        aten_with(fault, op)
    )

    verdict = verify(dispatch.find("experimental.spoilt"), eight_channels(op))

    assert not verdict.ok
    assert reason in verdict.reason
