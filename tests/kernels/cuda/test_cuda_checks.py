"""The CUDA extension without a GPU: it loads, names its kernels, and refuses a bad input in one sentence."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch

from resnet_fast.kernels import native

ROOT = Path(__file__).parents[3]
built = pytest.mark.skipif(
    importlib.util.find_spec("resnet_fast._C") is None, reason="the CUDA extension is not built"
)


def test_without_the_extension_the_reason_and_the_remedy_are_said(monkeypatch):
    monkeypatch.setattr(native.importlib.util, "find_spec", lambda name: None)
    assert native.BUILD in native.available() and "not built" in native.available()


@built
def test_the_extension_loads_and_names_its_kernels():
    names = native.extension().kernels()
    files = {path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu")}
    assert {re.split(r"[.<]", name)[0] for name in names} == files
    assert len(names) == len(set(names))


@built
@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without a GPU")
def test_without_a_gpu_attributes_are_an_error_and_not_garbage():
    extension = native.extension()
    with pytest.raises(RuntimeError, match="expected a CUDA device"):
        extension.attributes(extension.kernels()[0])
    with pytest.raises(KeyError, match="expected one of kernels()"):
        extension.attributes("no such kernel")


@built
@pytest.mark.gpu
def test_attributes_on_a_gpu():
    # and there Hopper's ask for more shared memory than there is
    elsewhere = torch.cuda.get_device_capability() != (
        9,
        0,
    )
    for name in native.extension().kernels():
        if "_hopper<" in name and elsewhere:
            continue
        found = native.extension().attributes(name)
        assert found["registers"] > 0 and found["blocks_per_sm"] > 0 and found["local_bytes"] == 0


def call(op: str, *args):
    native.extension()
    return getattr(torch.ops.resnet_fast_native, op)(*args)


X = torch.randn(2, 8, 4, 4)
NHWC = X.contiguous(memory_format=torch.channels_last)
GATE = torch.rand(2, 8, 1, 1)
BN = [torch.rand(8) for _ in range(4)]
FILTER = torch.randn(8, 8, 3, 3).contiguous(memory_format=torch.channels_last)
POINT, WIDE_POINT = torch.randn(8, 8, 1, 1), torch.randn(16, 8, 1, 1)
GEOMETRY = [1, 1], [1, 1], [1, 1]  # stride, padding, dilation
ONE = FILTER[:, :, :1, :1].contiguous().half()
TAIL = NHWC.half(), FILTER.half(), BN[0], ONE, BN[1], NHWC.half(), None, ONE, BN[2]


@built
@pytest.mark.parametrize(
    "op, args, sentence",
    [
        (
            "add_act",
            (X.double(), X.double(), None, True),
            "got x of dtype Double, expected Float, Half or BFloat16",
        ),
        (
            "add_act",
            (X, X.half(), None, True),
            "got y of dtype Half and x of dtype Float, expected the same",
        ),
        (
            "add_act",
            (X, X[:, :4], None, True),
            r"got y of shape \[2, 4, 4, 4\], expected x's shape \[2, 8, 4, 4\]",
        ),
        (
            "add_act",
            (X, NHWC, None, True),
            "got y with other strides than x, expected one memory layout",
        ),
        (
            "add_act",
            (X[..., :2], X[..., :2], None, True),
            "got x with gaps or overlaps in memory, expected a dense tensor",
        ),
        ("add_act", (X[:1].expand(2, 8, 4, 4),) * 2 + (None, True), "gaps or overlaps"),
        ("add_act", (X, X, GATE, True), "got x that is not dense in channels_last"),
        (
            "add_act",
            (NHWC, NHWC, GATE[:, :4], True),
            r"got gate of shape \[2, 4, 1, 1\], expected \[2, 8, 1, 1\]",
        ),
        (
            "add_act",
            (NHWC, NHWC, GATE.bfloat16(), True),
            "got gate of dtype BFloat16 and x of dtype Float",
        ),
        ("add_act_backward", (X, X.flatten(), True), "got out of shape"),
        (
            "add_act_gate_backward",
            (NHWC, NHWC, X, GATE, True),
            "got x with other strides than dout",
        ),
        (
            "conv",
            (X, FILTER, *BN[:2], None, None, None, 0.0, *GEOMETRY, True),
            "got x that is not dense in channels_last",
        ),
        (
            "conv",
            (NHWC, FILTER[:, :4], *BN[:2], None, None, None, 0.0, *GEOMETRY, True),
            "got weight that is not dense",
        ),
        (
            "conv",
            (NHWC, FILTER.half(), *BN[:2], None, None, None, 0.0, *GEOMETRY, True),
            "expected its channels and dtype",
        ),
        (
            "conv",
            (NHWC, FILTER, *BN[:2], NHWC[:1], None, None, 0.0, *GEOMETRY, True),
            "got residual of shape",
        ),
        (
            "conv",
            (NHWC, FILTER, *BN[:2], None, BN[2], BN[3][:7], 0.0, *GEOMETRY, True),
            r"got var of shape \[7\]",
        ),
        (
            "pointwise",
            (NHWC, FILTER, *BN[:2], None, None, None, 0.0, [1, 1], True),
            r"expected \[K, C, 1, 1\]",
        ),
        (
            "pointwise_hopper",
            (NHWC, POINT, *BN[:2], None, None, None, 0.0, [1, 1], True),
            "got x of dtype Float, expected Half or BFloat16",
        ),
        (
            "pointwise_hopper",
            (NHWC.half(), FILTER.half(), *BN[:2], None, None, None, 0.0, [1, 1], True),
            r"expected \[K, C, 1, 1\] with K and C mult",
        ),
        (
            "pointwise_hopper",
            (
                torch.zeros(9).half()[1:].view(1, 8, 1, 1),
                FILTER[..., :1, :1].half(),
                *BN[:2],
                None,
                None,
                None,
                0.0,
                [1, 1],
                True,
            ),
            r"got \[1, 8, 1, 1\] at an address that is no multiple of 16",
        ),
        (
            "pointwise_hopper",
            (NHWC.half(), POINT.half(), *BN[:2], None, None, None, 0.0, [9, 1], True),
            "got strides 9 and 1, expected 1 to 8",
        ),
        (
            "pointwise_pair_hopper",
            (NHWC.half(), POINT.half(), NHWC, POINT, BN[0], [1, 1]),
            "got x2 of dtype Float and weight2 Float, expected x's, Half",
        ),
        (
            "pointwise_pair_hopper",
            (NHWC.half(), POINT.half(), NHWC.bfloat16(), POINT.half(), BN[0], [1, 1]),
            "got x2 of dtype BFloat16 and w",
        ),
        (
            "pointwise_pair_hopper",
            (NHWC.half(), POINT.half(), NHWC.half(), FILTER.half(), BN[0], [1, 1]),
            r"got weight2 \[8, 8, 3, 3\], expected",
        ),
        (
            "pointwise_pair_hopper",
            (NHWC.half(), POINT.half(), X.half(), POINT.half(), BN[0], [1, 1]),
            "got x2 that is not dense in channels_last",
        ),
        (
            "pointwise_pair_hopper",
            (NHWC.half(), POINT.half(), NHWC.half(), POINT.half(), BN[0], [2, 2]),
            r"got x2 \[2, 8, 4, 4\], expected images and",
        ),
        (
            "pointwise_pair_hopper",
            (NHWC.half(), POINT.half(), NHWC[:, :4].half(), POINT[:, :4].half(), BN[0], [1, 1]),
            r"expected .* multiples of 8",
        ),
        (
            "pointwise_pair_hopper",
            (
                NHWC.half()[:1, :, :1, :1],
                POINT.half(),
                torch.zeros(9).half()[1:].view(1, 8, 1, 1),
                POINT.half(),
                BN[0],
                [1, 1],
            ),
            r"got \[1, 8, 1, 1\] at an address that is no multiple of 16",
        ),
        (
            "pointwise_pair_hopper",
            (NHWC.half(), POINT.half(), NHWC.half(), POINT.half(), BN[0], [0, 1]),
            "got strides 0 and 1, expected 1 to 8",
        ),
        (
            "pointwise_pair_hopper",
            (NHWC.half(), POINT.half(), NHWC.half(), WIDE_POINT.half(), BN[0], [1, 1]),
            r"got weight2 \[16, 8, 1, 1\], exp",
        ),
        (
            "pointwise_pair_hopper",
            (NHWC.half(), POINT.half(), NHWC.half(), POINT.half(), BN[0][:4], [1, 1]),
            r"got bias of shape \[4\], expected \[8\]",
        ),
        (
            "conv_hopper",
            (NHWC.half(), FILTER[..., :1, :1].half(), *BN[:2], None, None, None, 0.0, [1, 1], True),
            r"expected \[K, C, 3, 3\] with K",
        ),
        (
            "conv_hopper",
            (NHWC.half(), FILTER.half(), *BN[:2], None, None, None, 0.0, [2, 1], True),
            r"got stride \[2, 1\] for x",
        ),
        (
            "conv_cluster_hopper",
            (
                NHWC.half(),
                FILTER.half(),
                *BN[:2],
                None,
                None,
                None,
                0.0,
                [1, 1],
                [130, 1],
                [1, 1],
                True,
            ),
            "got padding 130",
        ),
        (
            "conv_cluster_hopper",
            (NHWC.half(), FILTER[:7].half(), *BN[:2], None, None, None, 0.0, *GEOMETRY, True),
            r"expected \[K, C, R, S\] with K",
        ),
        (
            "conv_cluster_hopper",
            (
                NHWC.half(),
                FILTER.half(),
                *BN[:2],
                None,
                None,
                None,
                0.0,
                [1, 9],
                [1, 1],
                [1, 1],
                True,
            ),
            "got strides 1 and 9",
        ),
        (
            "conv_tail_hopper",
            (*TAIL[:1], TAIL[1].float(), *TAIL[2:]),
            r"got weight2 \[8, 8, 3, 3\] Float, expected \[K, 8, 3, 3\] Half",
        ),
        (
            "conv_tail_hopper",
            (*TAIL[:3], torch.zeros(264, 8, 1, 1).half(), *TAIL[4:]),
            r"got weight3 \[264, 8, 1, 1\].* with K up to 256",
        ),
        (
            "conv_tail_hopper",
            (*TAIL[:8], TAIL[8].half()),
            r"got weight1's bias \[8\] Half, expected \[8\] Float",
        ),
        (
            "conv_tail_hopper",
            (*TAIL[:5], TAIL[5][:1], *TAIL[6:]),
            r"got residual \[1, 8, 4, 4\] Half, expected \[2, 8, 4, 4\] Half",
        ),
        (
            "conv_tail_hopper",
            (*TAIL[:6], TAIL[3][:, :4].contiguous(), *TAIL[7:]),
            r"got projection \[8, 4, 1, 1\] Half, expected \[K, 8, 1, 1\]",
        ),
        (
            "bn_act",
            (NHWC, BN[0][:4], BN[1], None, 1e-5, True),
            r"got weight of shape \[4\], expected \[8\]",
        ),
        ("bn_act", (NHWC, *BN[:2], X, 1e-5, True), "got residual with other strides than x"),
        (
            "bn_act_backward",
            (NHWC, NHWC, NHWC, *BN[:2], BN[2].double(), 1e-5, True, True),
            "got statistics of shape",
        ),
    ],
)
def test_bad_input_gets_one_sentence(op, args, sentence):
    with pytest.raises(RuntimeError, match=f"^{op}: .*{sentence}"):
        call(op, *args)


@built
@pytest.mark.parametrize(
    "op, args",
    [
        ("add_act", (X, X, None, True)),
        ("add_act", (NHWC, NHWC, GATE, False)),
        ("add_act", (X[:0], X[:0], None, True)),
        ("add_act", (X.permute(3, 0, 2, 1), X.permute(3, 0, 2, 1), None, True)),
        ("add_act", (X[:, :, :1, :1].contiguous(), X[:, :, :1, :1].contiguous(), GATE, True)),
        ("add_act_backward", (X, X, True)),
        ("add_act_gate_backward", (NHWC, NHWC, NHWC, GATE, True)),
        ("conv", (NHWC, FILTER, *BN[:2], NHWC, *BN[2:], 1e-5, *GEOMETRY, True)),
        (
            "pointwise",
            (
                NHWC,
                FILTER[:, :, :1, :1].contiguous(),
                *BN[:2],
                None,
                None,
                None,
                0.0,
                [2, 2],
                False,
            ),
        ),
        (
            "pointwise_hopper",
            (NHWC.half(), POINT.half(), *BN[:2], NHWC.half(), None, None, 0.0, [1, 1], False),
        ),
        (
            "pointwise_hopper",
            (NHWC.half(), POINT.half(), *BN[:2], None, None, None, 0.0, [2, 3], False),
        ),
        (
            "pointwise_pair_hopper",
            (
                NHWC.half()[:, :, :2, :1].contiguous(memory_format=torch.channels_last),
                POINT.half(),
                NHWC.half(),
                POINT.half(),
                BN[0],
                [2, 4],
            ),
        ),
        (
            "pointwise_pair_hopper",
            (NHWC.half()[:0], POINT.half(), NHWC.half()[:0], POINT.half(), BN[0], [1, 1]),
        ),
        (
            "conv_hopper",
            (NHWC.half(), FILTER.half(), *BN[:2], NHWC.half(), None, None, 0.0, [1, 1], False),
        ),
        (
            "conv_cluster_hopper",
            (NHWC.half(), FILTER.half(), *BN[:2], NHWC.half(), None, None, 0.0, *GEOMETRY, False),
        ),
        ("conv_tail_hopper", TAIL),
        ("conv_tail_hopper", (*TAIL[:6], TAIL[3], *TAIL[7:])),
        ("bn_act", (NHWC, *BN[:2], NHWC, 1e-5, True)),
        ("bn_act_backward", (NHWC, NHWC, NHWC, *BN[:3], 1e-5, True, False)),
    ],
)
def test_good_input_is_refused_only_for_being_on_the_cpu(op, args):
    with pytest.raises(RuntimeError, match=f"^{op}: got tensors on the CPU, expected CUDA tensors"):
        call(op, *args)
