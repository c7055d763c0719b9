"""A plan prints and explains its steps, and compares itself with another plan."""

import copy

import pytest
import torch
from plans import images, lowered, ready
from torch.utils.flop_counter import FlopCounterMode

import resnet_fast
from resnet_fast import plan
from resnet_fast.graph.weights import FoldedConv


@pytest.fixture(scope="module")
def model():
    return ready(resnet_fast.resnet18())


# ---------------------------------------------------------------- compare


def test_compare_lists_each_fused_step(model):
    fused, plain = plan(model, images()), plan(model, images(), fuse=False)
    rows = fused.compare(plain, images())

    assert len(plain.steps) > len(fused.steps)
    assert [row.value for row in rows] == [step.output for step in fused.steps]
    assert max(row.distance for row in rows) < 1e-4
    assert all(row.ms > 0 and row.other_ms > 0 for row in rows)
    assert "layer4.1.conv2" in str(rows)


def test_compare_with_other_weights_shows_the_distance(model):
    wrong = plan(ready(copy.deepcopy(model), seed=9), images(), fuse=False)
    rows = plan(model, images()).compare(wrong, images())
    assert rows[0].distance > 1e-2


def test_compare_with_another_dtype(model):
    exact = plan(model, images(), fuse=False, dtype=torch.float64)
    rows = plan(model, images()).compare(exact, images())
    assert 0 < rows[-1].distance < 1e-4


def test_each_step_counts_once_and_for_the_first_row_that_needs_it(model):
    fused, plain = plan(model, images()), plan(model, images(), fuse=False)
    rows = {row.name: row for row in fused.compare(plain, images())}

    assert sum(row.steps for row in rows.values()) == len(fused.steps)
    assert sum(row.other_steps for row in rows.values()) == len(plain.steps)
    # Convolution and batch norm; the other branch has rows of its own before them.
    assert rows["layer2.0.downsample.0"].other_steps == 2
    assert rows["layer2.0.conv2"].other_steps == 4
    assert rows["conv1"].other_steps == 3


@pytest.fixture
def fused_plain_exact(model):
    fused = plan(model, images())
    plain = plan(model, images(), fuse=False)
    exact = plan(model, images(), fuse=False, dtype=torch.float64)
    return fused, plain, exact


def test_with_an_exact_plan_both_errors_are_measured(fused_plain_exact):
    fused, plain, exact = fused_plain_exact
    rows = fused.compare(plain, images(), exact)
    for row in rows:
        assert row.broken is None
        assert 0 < row.error < 1e-4
        assert 0 < row.other_error < 1e-4
    assert "WRONG" not in str(rows)


def test_with_an_exact_plan_a_broken_step_is_named(fused_plain_exact):
    fused, plain, exact = fused_plain_exact
    filters = lowered(fused).filters
    right = filters["layer1_1_relu_1"]
    filters["layer1_1_relu_1"] = FoldedConv(right.weight, right.bias + 1e-3, right.geometry)

    rows = fused.compare(plain, images(), exact)

    first_broken = next(row for row in rows if row.broken)
    assert first_broken.name == "layer1.1.conv2"
    assert "WRONG" in str(rows)


# ---------------------------------------------------------------- print and explain


def test_plan_prints_its_steps_within_120_columns(model):
    text = str(plan(model, images()))
    assert "layer4.1.conv2" in text
    assert "24 steps" in text
    assert all(len(line) <= 120 for line in text.splitlines())


def test_explain_names_module_and_problem(model):
    first, *_ = resnet_fast.explain(plan(model, images()), images())
    assert first.module == "conv1"
    assert first.problem.weight == (64, 3, 7, 7)


def test_step_has_kernel_shapes_and_flops(model):
    steps = plan(model, images()).steps
    conv = next(step for step in steps if step.name == "layer1.0.conv2")
    assert conv.reads == ((2, 64, 16, 16), (2, 64, 16, 16))
    assert conv.shape == (2, 64, 16, 16)
    assert conv.flops == 2 * 2 * 64 * 16 * 16 * 64 * 9
    assert conv.act == "relu"
    assert conv.kernel
    assert conv.modules[:2] == ("layer1.0.conv2", "layer1.0.bn2")


def test_flops_are_those_that_torch_counts(model):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images())
    assert sum(step.flops for step in plan(model, images()).steps) == counter.get_total_flops()
