"""``diagnose`` names the mistake: each kernel here has one that kernels usually have."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from resnet_fast.dispatch.problem import Problem
from resnet_fast.dispatch.registry import Kernel
from resnet_fast.ops import reference
from resnet_fast.testing.diagnose import diagnose, locate

PROBLEM = Problem(
    "conv_bn_act",
    "cpu",
    torch.float32,
    (2, 8, 9, 7),
    "nhwc",
    weight=(20, 8, 3, 3),
    padding=(1, 1),
    bn=True,
    act="relu",
    residual="nhwc",
)


def kernel(id: str, fn: Callable[..., Tensor]) -> Kernel:
    return Kernel(id, "conv_bn_act", fn, lambda problem: None, lambda: None)


def spoilt(edit: Callable[[Tensor, tuple], Tensor | None]) -> Kernel:
    """A kernel that computes the reference and then spoils it, in place or by another result."""

    def fn(*args):
        out = reference.conv_bn_act(*args)
        edited = edit(out, args)
        return out if edited is None else edited

    return kernel("test.wrong", fn)


def unwritten_filters(out, args):
    out[:, 16:] = torch.nan


def wrong_last_pixels(out, args):
    out[1, :, 8, 3:] += 1


def wrong_first_row(out, args):
    out[:, :, 0, :] += 5


def no_activation(out, args):
    return reference.conv_bn_act(*args[:-1], "none")


def wrong_factor(out, args):
    return out * 1.25


def no_residual(out, args):
    return reference.conv_bn_act(*args[:4], None, *args[5:])


@pytest.mark.parametrize(
    "edit, words",
    [
        (unwritten_filters, "channels 16–19 of 20"),
        (unwritten_filters, "tail of the filter tile"),
        (unwritten_filters, "never written"),
        (wrong_last_pixels, "tail of the pixel tile"),
        (wrong_first_row, "the first row"),
        (wrong_first_row, "padding mask"),
        (no_activation, "activation is missing"),
        (wrong_factor, "same factor 1.25"),
        (no_residual, "the residual"),
    ],
)
def test_mistake_is_named(edit, words) -> None:
    assert words in diagnose(spoilt(edit), PROBLEM)


def test_correct_kernel_is_suspected_of_a_race() -> None:
    assert "race" in diagnose(kernel("test.right", reference.conv_bn_act), PROBLEM)


def test_wrong_shape_is_reported() -> None:
    got, exact = torch.zeros(2, 3), torch.zeros(3, 2, dtype=torch.float64)
    assert "shape" in locate(got, exact, PROBLEM)
