"""Costs that no machine's speed blurs: torch ops that do work and bytes allocated in one pass, against a snapshot.

A change that adds a launch, a copy or a buffer shows here without a GPU and without a clock. A change that means to:
``python tests/bench/test_counts.py`` writes ``counts.json`` anew for the running torch; review its diff like code.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from resnet_fast import create_model, plan
from resnet_fast.dispatch import record

SNAPSHOT = Path(__file__).parent / "counts.json"
TORCH = ".".join(torch.__version__.split(".")[:2])

# Each of these reads or writes whole tensors; views, allocations and bookkeeping are not counted.
WORK = (
    "resnet_fast::conv_bn_act",
    "resnet_fast::bn_act",
    "resnet_fast::bn_act_backward",
    "resnet_fast::add_act",
    "mkldnn::_convolution_pointwise",
    "mkldnn::_convolution_pointwise_",
    "aten::convolution",
    "aten::convolution_backward",
    "aten::batch_norm",
    "aten::native_batch_norm",
    "aten::native_batch_norm_backward",
    "aten::relu",
    "aten::relu_",
    "aten::threshold_backward",
    "aten::copy_",
    "aten::add",
    "aten::add_",
    "aten::mul",
    "aten::mul_",
    "aten::max_pool2d_with_indices",
    "aten::mean",
    "aten::addmm",
)


def counts(run: Callable[[], object]) -> dict[str, int]:
    """What one call does after a first: calls of each op in WORK, bytes held at most, bytes allocated."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = seen.profiler.kineto_results.events()
    calls = Counter(event.name() for event in events)
    held = most = allocated = 0
    for event in sorted(
        (event for event in events if event.name() == "[memory]"),
        key=lambda event: event.start_ns(),
    ):
        held += event.nbytes()
        allocated += max(0, event.nbytes())
        most = max(most, held)
    return {
        **{op: calls[op] for op in WORK if calls[op]},
        "peak bytes": most,
        "allocated bytes": allocated,
    }


def images() -> Tensor:
    return torch.randn(2, 3, 64, 64)


def infer(model: nn.Module) -> dict[str, int]:
    model, x = model.eval(), images()
    with torch.inference_mode():
        return counts(lambda: model(x))


def train(model: nn.Module) -> dict[str, int]:
    """Forward and backward; gradients exist already, so that what they take is not counted."""
    model, x = model.train(), images()
    return counts(lambda: model(x).sum().backward())


def planned(name: str) -> dict[str, int]:
    """A plan's call, how many steps it has and the bytes of its weights."""
    x = images()
    run = plan(create_model(name).eval(), x)
    return {**counts(lambda: run(x)), "steps": len(run.steps), "weight bytes": run.weight_bytes}


def accelerated(name: str) -> nn.Module:
    from torchvision.models import get_model

    from resnet_fast.live.accelerate import accelerate

    return accelerate(get_model(name))


CASES: dict[str, Callable[[], dict[str, int]]] = {
    "resnet50 drop-in, inference": lambda: infer(create_model("resnet50")),
    "resnet50 drop-in, training": lambda: train(create_model("resnet50")),
    "resnet18 drop-in, inference": lambda: infer(create_model("resnet18")),
    "resnet50 plan, inference": lambda: planned("resnet50"),
    "resnet50 of torchvision, accelerated, inference": lambda: infer(accelerated("resnet50")),
}


def expected(case: str) -> dict[str, int]:
    """The snapshot for this torch, or for the newest one before it."""
    found = json.loads(SNAPSHOT.read_text())

    def number(version: str) -> tuple[int, ...]:
        return tuple(map(int, version.split(".")))

    known = [version for version in found if number(version) <= number(TORCH)]
    return found[max(known, key=number)][case]


@pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="the snapshot counts oneDNN's ops"
)
@pytest.mark.parametrize("case", CASES)
def test_no_pass_does_more_than_it_did(case: str) -> None:
    found, allowed = CASES[case](), expected(case)
    more = {}
    for name, count in found.items():
        before = allowed.get(name, 0)
        if count > before:
            more[name] = f"{before} → {count}"
    assert not more, (
        f"costs more than {SNAPSHOT.name} says; if it must: python tests/bench/test_counts.py ({more})"
    )


def test_every_layer_is_one_op() -> None:
    """53 convolutions, 53 fused ops, nothing else: the drop-in ResNet-50 at inference."""
    model, x = create_model("resnet50").eval(), images()
    with torch.inference_mode(), record() as choices:
        model(x)
    assert Counter(choice.problem.op for choice in choices) == {"conv_bn_act": 53}


if __name__ == "__main__":
    torch.set_num_threads(1)
    snapshot = json.loads(SNAPSHOT.read_text()) if SNAPSHOT.is_file() else {}
    snapshot[TORCH] = {case: count() for case, count in CASES.items()}
    SNAPSHOT.write_text(json.dumps(dict(sorted(snapshot.items())), indent=1) + "\n")
