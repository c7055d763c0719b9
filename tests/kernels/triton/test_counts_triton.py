"""What Triton's compiler makes of the kernels for ResNet-50 on a GPU that is not here, against a snapshot.

Registers, spills, shared memory and machine instructions of each launch are exact for one version of Triton: a change
that costs occupancy or adds work in the inner loop shows without a GPU. A change that means to:
``python tests/test_counts_triton.py`` writes ``counts_triton.json`` anew for the running version; review the diff.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from resnet_fast.dispatch.problem import Problem
from resnet_fast.models.problems import across_layers, conv_layers

SNAPSHOT = Path(__file__).parent / "counts_triton.json"
HOPPER = (9, 0)
# One of each kind: the stem, a 3×3, a strided 3×3, a 1×1 that widens with a residual, a 1×1 that narrows.
LAYERS = ("conv1", "layer1.0.conv2", "layer2.0.conv2", "layer2.1.conv3", "layer3.1.conv1")
AFTER = Problem(
    "bn_act",
    "cuda",
    torch.bfloat16,
    (256, 256, 56, 56),
    "nhwc",
    act="relu",
    residual="nhwc",
    capability=HOPPER,
)
# By tensor descriptors: a 3×3, and a 1×1 that narrows.
BY_TMA = {"layer1.0.conv2": "triton.conv_tma", "layer3.1.conv1": "triton.pointwise_tma"}
TRITON = importlib.util.find_spec("triton")


def cases() -> dict[str, tuple[str, Problem]]:
    """Name → (kernel, problem)."""
    single = conv_layers("resnet50", 256, 224, torch.bfloat16, "cuda", HOPPER)
    found = {layer.name: layer.problem for layer in single}
    # Of each op across convolutions the network's first.
    groups = {
        group.problem.op: (f"triton.{group.problem.op}", group.problem)
        for group in reversed(across_layers(single))
    }
    tma = {f"{name} by TMA": (kernel, found[name]) for name, kernel in BY_TMA.items()}
    tma["pointwise_pair by TMA"] = "triton.pointwise_pair_tma", groups["pointwise_pair"][1]
    named = {
        name: ("triton.pointwise" if found[name].pointwise else "triton.conv", found[name])
        for name in LAYERS
    }
    return {**named, **tma, **groups, "bn_act + residual": ("triton.bn_act", AFTER)}


def counts(kernel: str, problem: Problem) -> dict[str, int]:
    """Of all launches together: the most registers and shared memory, the sum of spilled bytes and instructions."""
    from triton_ahead import cubins

    launched = cubins(kernel, problem)
    return {
        "launches": len(launched),
        "registers": max(c.registers for c in launched),
        "spilled bytes": sum(c.stack for c in launched),
        "shared bytes": max(c.shared for c in launched),
        "instructions": sum(c.instructions.total() for c in launched),
    }


def version() -> str:
    import triton

    return ".".join(triton.__version__.split(".")[:2])


@pytest.mark.skipif(TRITON is None, reason="triton is not installed")
@pytest.mark.parametrize("name", cases())
def test_no_kernel_costs_more_than_it_did(name: str) -> None:
    known = json.loads(SNAPSHOT.read_text())
    if version() not in known:
        pytest.skip(f"no snapshot for triton {version()}; known: {', '.join(known)}")
    allowed = known[version()][name]
    more = {
        what: f"{allowed[what]} → {n}"
        for what, n in counts(*cases()[name]).items()
        if n > allowed[what]
    }
    assert not more, (
        f"costs more than counts_triton.json says; if it must: python tests/test_counts_triton.py ({more})"
    )


if __name__ == "__main__":
    snapshot = json.loads(SNAPSHOT.read_text()) if SNAPSHOT.is_file() else {}
    snapshot[version()] = {name: counts(*case) for name, case in cases().items()}
    SNAPSHOT.write_text(json.dumps(dict(sorted(snapshot.items())), indent=1) + "\n")
