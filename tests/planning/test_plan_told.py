"""What a plan says of itself: its steps, their kernels, and two plans beside each other."""

import copy

import pytest
import torch
from plans import images, ready

import resnet_fast
from resnet_fast import plan
from resnet_fast.graph.weights import FoldedConv


@pytest.fixture(scope="module")
def model():
    return ready(resnet_fast.resnet18())


def test_fused_beside_unfused(model):
    fused, plain = plan(model, images()), plan(model, images(), fuse=False)
    assert len(plain.steps) > len(fused.steps)
    rows = fused.compare(plain, images())
    assert [r.value for r in rows] == [s.output for s in fused.steps] and max(r.distance for r in rows) < 1e-4
    assert all(r.ms > 0 and r.other_ms > 0 for r in rows) and "layer4.1.conv2" in str(rows)
    wrong = plan(ready(copy.deepcopy(model), seed=9), images(), fuse=False)
    assert fused.compare(wrong, images())[0].distance > 1e-2
    exact = plan(model, images(), fuse=False, dtype=torch.float64)
    assert 0 < fused.compare(exact, images())[-1].distance < 1e-4


def test_each_step_of_both_schedules_counts_once_and_for_the_row_that_needs_it(model):
    fused, plain = plan(model, images()), plan(model, images(), fuse=False)
    rows = {r.name: r for r in fused.compare(plain, images())}
    assert sum(r.steps for r in rows.values()) == len(fused.steps) and sum(r.other_steps for r in rows.values()) == len(
        plain.steps
    )
    assert (
        rows["layer2.0.downsample.0"].other_steps == 2
    )  # convolution, batch norm; not the other branch, which stands before them
    assert rows["layer2.0.conv2"].other_steps == 4 and rows["conv1"].other_steps == 3


def test_beside_an_exact_plan_each_error_is_judged(model):
    fused, plain, exact = (
        plan(model, images(), fuse=fuse, dtype=dtype)
        for fuse, dtype in ((True, torch.float32), (False, torch.float32), (False, torch.float64))
    )
    rows = fused.compare(plain, images(), exact)
    assert all(
        r.broken is None and 0 < r.error < 1e-4 and 0 < r.other_error < 1e-4 for r in rows
    ) and "WRONG" not in str(rows)
    right = fused._engine.lowered.filters["layer1_1_relu_1"]
    fused._engine.lowered.filters["layer1_1_relu_1"] = FoldedConv(right.weight, right.bias + 1e-3, right.geometry)
    rows = fused.compare(plain, images(), exact)
    assert next(r for r in rows if r.broken).name == "layer1.1.conv2" and "WRONG" in str(rows)


def test_it_prints_and_explains(model):
    run = plan(model, images())
    assert "layer4.1.conv2" in str(run) and "24 steps" in str(run)
    found = resnet_fast.explain(run, images())
    assert found[0].module == "conv1" and found[0].problem.weight == (64, 3, 7, 7)


def test_steps_know_kernel_shapes_and_flops(model):
    run = plan(model, images())
    conv = next(s for s in run.steps if s.name == "layer1.0.conv2")
    assert conv.reads == ((2, 64, 16, 16), (2, 64, 16, 16)) and conv.shape == (2, 64, 16, 16) and conv.act == "relu"
    assert (
        conv.flops == 2 * 2 * 64 * 16 * 16 * 64 * 9
        and conv.kernel
        and conv.modules[:2] == ("layer1.0.conv2", "layer1.0.bn2")
    )
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images())
    assert sum(s.flops for s in run.steps) == counter.get_total_flops()
    assert all(len(line) <= 120 for line in str(run).splitlines())
