"""The ahead-of-time lane: the machine code each GPU generation would run, for the config the heuristic picks there.

Asserted of every launch: tensor-core instructions where there are products, nothing spilled, shared memory within
the chip's limit, 16-byte loads, 64-bit offsets into whole tensors.
"""

from __future__ import annotations

import itertools
import re

import pytest
import torch

pytest.importorskip("triton", reason="no Triton on this platform")

from triton_ahead import TENSOR, Cubin, ahead, assert_nothing_spilled, cubins
from triton_shapes import gemm

from resnet_fast.dispatch.problem import Problem
from resnet_fast.dispatch.registry import find
from resnet_fast.kernels.triton.gemm_config import CHIPS, gemm_config
from resnet_fast.models.problems import across_layers, conv_layers

pytestmark = ahead


def conv(
    name: str, capability: tuple[int, int], dtype: torch.dtype = torch.bfloat16, batch: int = 256
) -> Problem:
    """A layer of ResNet-50 or ResNeXt-50 at 224²."""
    x, weight, stride, padding, groups, residual = {
        "stem 7×7": ((3, 224), (64, 3, 7, 7), 2, 3, 1, False),
        "layer1 conv3": ((64, 56), (256, 64, 1, 1), 1, 0, 1, True),
        "layer2 conv2": ((128, 28), (128, 128, 3, 3), 1, 1, 1, False),
        "layer3 conv1": ((1024, 14), (256, 1024, 1, 1), 1, 0, 1, False),
        "layer3 downsample": ((512, 28), (1024, 512, 1, 1), 2, 0, 1, False),
        "layer4 conv2": ((512, 7), (512, 512, 3, 3), 1, 1, 1, False),
        "layer4 conv3": ((512, 7), (2048, 512, 1, 1), 1, 0, 1, True),
        "layer2 grouped": ((256, 28), (256, 8, 3, 3), 1, 1, 32, False),
    }[name]
    return Problem(
        op="conv_bn_act",
        device="cuda",
        dtype=dtype,
        x=(batch, x[0], x[1], x[1]),
        layout="nhwc",
        weight=weight,
        stride=(stride, stride),
        padding=(padding, padding),
        groups=groups,
        bn=True,
        act="relu",
        residual="nhwc" if residual else None,
        capability=capability,
    )


# Every generation on a 3×3 and a 1×1 with residual; what is special elsewhere, on the generation it is special for.
EVERYWHERE = itertools.product(TENSOR, ("layer1 conv3", "layer2 conv2"))
CASES = [(name, capability, {}) for capability, name in EVERYWHERE]
CASES += [
    (name, (9, 0), {})
    for name in ("stem 7×7", "layer3 conv1", "layer3 downsample", "layer2 grouped")
]
CASES += [(name, (9, 0), {"batch": 1}) for name in ("layer4 conv2", "layer4 conv3")]
CASES += [("layer4 conv2", (8, 0), {"dtype": torch.float16, "batch": 1})]
CASES += [("layer2 conv2", at, {"dtype": torch.float32}) for at in ((8, 0), (9, 0))]


# The tensors that grow with the batch: more than 2³¹ elements are possible in each.
IMAGES = {"x", "y", "out", "residual", "partials", "dout", "dy", "dx", "dz", "g"}


def sound(cubin: Cubin, capability: tuple[int, int]) -> None:
    """Holds for every launch: nothing spilled, shared memory within the chip's limit, 64-bit offsets into images."""
    assert_nothing_spilled(cubin)
    assert cubin.shared <= CHIPS[capability].shared, (
        f"{cubin.name} wants {cubin.shared} bytes of shared memory"
    )
    narrow = IMAGES & cubin.narrow
    assert not narrow, f"{cubin.name} finds its way in {narrow} with 32-bit offsets"


@pytest.mark.parametrize(
    "name, capability, changes", CASES, ids=lambda v: getattr(v, "keys", lambda: v)() and str(v)
)
def test_convolutions(name: str, capability: tuple[int, int], changes: dict) -> None:
    problem = conv(name, capability, **changes)
    config = gemm_config(gemm(problem))
    first, *rest = cubins("triton.pointwise" if problem.pointwise else "triton.conv", problem)
    assert [c.name for c in rest] == ["_add_partials"] * (config.split_k > 1)
    for cubin in (first, *rest):
        sound(cubin, capability)
    # tensor-memory barriers take a few bytes
    assert first.shared <= config.shared(problem.dtype.itemsize) + 64
    if problem.dtype == torch.float32:
        # no TF32 behind anyone's back
        assert first.count("FFMA") and not first.count("HMMA|HGMMA|UTC")
    else:
        assert first.count(rf"{TENSOR[capability]}\b")
    if name != "stem 7×7":  # three channels are six bytes a pixel
        assert first.count(r"LDG(STS)?\.E.*\.128") and not first.count(r"LDG(STS)?\.E\.U?(16|8)\b")


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)], ids=lambda c: f"sm_{c[0]}{c[1]}")
@pytest.mark.parametrize(
    "kernel, name, batch",
    [
        ("triton.conv", "layer2 conv2", 256),
        ("triton.conv", "layer4 conv2", 1),
        ("triton.pointwise", "layer1 conv3", 256),
        ("triton.conv_tma", "layer2 conv2", 256),
        ("triton.pointwise_tma", "layer1 conv3", 256),
        ("triton.pointwise_tma", "layer3 conv1", 256),
    ],
)
def test_convolutions_overlap_with_the_kernel_before_and_touch_nothing_until_it_is_done(
    kernel: str, name: str, batch: int, capability: tuple[int, int]
) -> None:
    problem = conv(name, capability, batch=batch)
    for cubin in cubins(kernel, problem) if find(kernel).supports(problem) is None else ():
        waits_first(cubin, capability)


@pytest.mark.parametrize(
    "kernel",
    [
        "triton.conv_tail",
        "triton.conv_pool",
        "triton.pointwise_pool",
        "triton.pointwise_pair",
        "triton.pointwise_pair_tma",
    ],
)
def test_ops_across_convolutions_overlap_with_the_kernel_before(kernel: str) -> None:
    groups = across_layers(conv_layers("resnet50", 256, 224, torch.bfloat16, "cuda", (9, 0)))
    for cubin in cubins(
        kernel, next(group.problem for group in groups if group.problem.op == find(kernel).op)
    ):
        waits_first(cubin, (9, 0))


def waits_first(cubin: Cubin, capability: tuple[int, int]) -> None:
    """The kernel waits before its first access to memory.

    griddepcontrol.wait is ACQBULK in SASS, launch_dependents PREEXIT; instructions are in order of first appearance.
    """
    order = [re.sub(r"\..*", "", one) for one in cubin.instructions]
    memory = min(
        order.index(one) for one in ("LDG", "LDGSTS", "UTMALDG", "UTMASTG", "STG") if one in order
    )
    if capability < (9, 0):
        assert "ACQBULK" not in order and "PREEXIT" not in order
    else:
        assert order.index("ACQBULK") < order.index("PREEXIT") < memory, cubin.name


POINTWISE = {
    "add_act": {"residual": "nhwc"},
    "add_act with gate": {"residual": "nhwc", "gate": True},
    "add_act_backward": {"residual": "nhwc"},
    "add_act_backward with gate": {"residual": "nhwc", "gate": True},
    "bn_act": {"residual": "nhwc"},
    "bn_act_backward": {},
    "bn_act_backward with residual": {"residual": "nhwc"},
}


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0)], ids=lambda c: f"sm_{c[0]}{c[1]}")
@pytest.mark.parametrize("case", POINTWISE)
def test_pointwise_and_reduction_passes(case: str, capability: tuple[int, int]) -> None:
    """Every big tensor goes through 16-byte loads and stores."""
    op = case.split(" ")[0]
    problem = Problem(
        op=op,
        device="cuda",
        dtype=torch.bfloat16,
        x=(256, 256, 56, 56),
        layout="nhwc",
        act="relu",
        capability=capability,
        **POINTWISE[case],
    )
    for cubin in cubins(f"triton.{op}", problem):
        sound(cubin, capability)
        assert cubin.count(r"LDG(STS)?\.E.*\.128") and not cubin.count(
            r"LDG(STS)?\.E\.U?(16|8)\b"
        ), cubin.name
        writes_images = cubin.name not in (
            "_statistics",
            "_merge_statistics",
            "_merge_sums",
            "_partial_sums",
        )
        assert not writes_images or cubin.count(r"STG\.E\.128"), cubin.name


def test_the_statistics_loop_is_pipelined() -> None:
    """A reducing block has the next tiles under way (cp.async, LDGSTS in SASS) while it adds up the last."""
    problem = Problem(
        op="bn_act",
        device="cuda",
        dtype=torch.bfloat16,
        x=(256, 256, 56, 56),
        layout="nhwc",
        act="relu",
        capability=(9, 0),
    )
    statistics, *_ = cubins("triton.bn_act", problem)
    assert statistics.name == "_statistics" and statistics.count(r"LDGSTS\.E.*\.128")


def test_fp_fusion_is_off_where_it_would_show() -> None:
    """enable_fp_fusion reaches the compiler: x·gate + y is a product and a sum, each rounded as in the interpreter."""
    problem = Problem(
        op="add_act",
        device="cuda",
        dtype=torch.float32,
        x=(2, 64, 8, 8),
        layout="nhwc",
        act="none",
        residual="nhwc",
        gate=True,
        capability=(9, 0),
    )
    (cubin,) = cubins("triton.add_act", problem)
    assert cubin.count("FMUL") and cubin.count("FADD") and not cubin.count("FFMA")
