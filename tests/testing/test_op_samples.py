"""The rows of samples: every op has one, and its arguments are the same with and without data."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from resnet_fast.dispatch import registry
from resnet_fast.roofline import cost
from resnet_fast.testing.grids import nasty_problems
from resnet_fast.testing.samples import SAMPLES, make_args, meta_args


def described(args: tuple) -> list:
    return [(a.shape, a.dtype) if isinstance(a, Tensor) else a for a in args]


def test_every_op_has_its_rows() -> None:
    assert SAMPLES.keys() == registry.KEYS.keys() == cost._COSTS.keys()


@pytest.mark.parametrize("op", SAMPLES)
def test_meta_arguments_are_those_without_data(op) -> None:
    for problem in nasty_problems(op, torch.bfloat16)[::5]:
        args = meta_args(problem)
        assert all(a.is_meta for a in args if isinstance(a, Tensor))
        assert described(args) == described(make_args(problem)), problem.key


@pytest.mark.parametrize("op", SAMPLES)
def test_images_have_one_entry_for_each_image(op) -> None:
    for problem in nasty_problems(op):
        args = make_args(problem)
        assert all(args[i] is None or args[i].shape[0] == problem.x[0] for i in SAMPLES[op].images)
