"""diagnose() names the mistake: each kernel here has one, made the way kernels usually have it."""

import pytest
import torch

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


def wrong(edit):
    """A kernel that computes the reference and then spoils it."""

    def fn(*args):
        out = reference.conv_bn_act(*args)
        edited = edit(out, args)
        return out if edited is None else edited

    return Kernel("test.wrong", "conv_bn_act", fn, lambda p: None, lambda: None)


def tail_of_filters(out, args):
    out[:, 16:] = torch.nan


def tail_of_pixels(out, args):
    out[1, :, 8, 3:] += 1


def padding(out, args):
    out[:, :, 0, :] += 5


def no_activation(out, args):
    return reference.conv_bn_act(*args[:-1], "none")


def factor(out, args):
    return out * 1.25


def no_residual(out, args):
    return reference.conv_bn_act(*args[:4], None, *args[5:])


@pytest.mark.parametrize(
    "edit, words",
    [
        (tail_of_filters, "channels 16–19 of 20"),
        (tail_of_filters, "tail of the filter tile"),
        (tail_of_filters, "never written"),
        (tail_of_pixels, "tail of the pixel tile"),
        (padding, "the first row"),
        (padding, "padding mask"),
        (no_activation, "activation is missing"),
        (factor, "same factor 1.25"),
        (no_residual, "the residual"),
    ],
)
def test_the_mistake_is_named(edit, words):
    assert words in diagnose(wrong(edit), PROBLEM)


def test_a_right_kernel_is_a_suspected_race():
    assert "race" in diagnose(
        Kernel("test.right", "conv_bn_act", reference.conv_bn_act, lambda p: None, lambda: None), PROBLEM
    )


def test_a_shape_is_said():
    assert "shape" in locate(torch.zeros(2, 3), torch.zeros(3, 2, dtype=torch.float64), PROBLEM)
