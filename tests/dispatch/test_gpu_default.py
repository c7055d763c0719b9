"""What a GPU runs without measurements: as many launches as eager. Tested on fake CUDA tensors, without a GPU."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from training import STATISTICS, assert_same, buffers, each
from twins import images, twins, wide

from resnet_fast.dispatch import find, record, select, tables
from resnet_fast.live import step

LAUNCHES = (
    "aten.convolution",
    "batch_norm",
    "aten.add",
    "aten.mul",
    "aten.sub",
    "aten.rsqrt",
    "aten.relu",
    "aten._to_copy",
    "aten.clone",
    "aten.pow",
)


class Launches(TorchDispatchMode):
    """Counts the ops that would launch kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(name in str(func) for name in LAUNCHES):
            self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
@pytest.mark.parametrize("statistics", (torch.float32, None), ids=("float32", "the image's dtype"))
@pytest.mark.parametrize("shortcut", (False, True), ids=("", "residual"))
def test_inference_launches_what_eager_launches(dtype, statistics, shortcut) -> None:
    with FakeTensorMode(), torch.no_grad():
        conv = nn.Conv2d(64, 64, 3, padding=1, bias=False, device="cuda", dtype=dtype)
        bn = nn.BatchNorm2d(64, device="cuda", dtype=statistics or dtype).eval()
        x = torch.empty(2, 64, 8, 8, device="cuda", dtype=dtype).to(
            memory_format=torch.channels_last
        )
        residual = torch.empty_like(x) if shortcut else None
        with Launches() as eager:
            out = bn(conv(x))
            if shortcut:
                out += residual
            F.relu_(out)
        with Launches() as ours:
            out = find("aten", "conv_bn_act").fn(
                x,
                conv.weight,
                bn.weight,
                bn.bias,
                residual,
                bn.running_mean,
                bn.running_var,
                bn.eps,
                (1, 1),
                (1, 1),
                (1, 1),
                1,
                "relu",
            )
    assert ours.seen == eager.seen and sum(eager.seen.values()) == 3 + shortcut
    assert out.shape == x.shape and out.dtype == dtype


def test_frozen_affines_and_mixed_dtypes_are_folded() -> None:
    """What torch's batch norm does not take: no statistics, statistics of other dtypes."""
    with FakeTensorMode(), torch.no_grad():
        x, weight = torch.empty(2, 8, 5, 5, device="cuda"), torch.empty(4, 8, 1, 1, device="cuda")
        float32, float64 = (x, weight), (x.double(), weight.double())
        k, half = torch.ones(4, device="cuda"), torch.ones(4, device="cuda", dtype=torch.bfloat16)
        for inputs, (scale, shift, mean, var) in (
            (float32, (k, k, None, None)),
            (float32, (half, k, k, k)),
            (float32, (half,) * 4),
            (float64, (k,) * 4),
        ):
            with Launches() as seen:
                out = find("aten", "conv_bn_act").fn(
                    *inputs, scale, shift, None, mean, var, 1e-5, (1, 1), (0, 0), (1, 1), 1, "none"
                )
            assert out.shape == (2, 4, 5, 5) and not any("batch_norm" in op for op in seen.seen)


def test_training_fuses_what_was_measured_and_nothing_else(monkeypatch) -> None:
    entries = {}
    monkeypatch.setattr(tables, "lookup", lambda problem, graph=False: entries.get(problem.op))
    monkeypatch.setattr(tables, "gpu_name", lambda device=None: "Imaginary 1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    fused = find("triton.bn_act")
    monkeypatch.setattr(type(fused), "reason", lambda kernel, problem: None)
    with FakeTensorMode():
        bn = nn.BatchNorm2d(64, device="cuda")
        z, other = (
            torch.empty(n, 64, 8, 8, device="cuda").to(memory_format=torch.channels_last)
            for n in (2, 3)
        )
    # or explain would call a batch norm that ran so no part of a fused block
    with record() as seen:
        assert step._better_apart(bn, z, None, "relu")
    assert [(choice.kernel, choice.why) for choice in seen] == [("aten.bn_act", "default")]
    entries["bn_act"] = {"kernel": "triton.bn_act", "time_us": 1.0}
    with record() as seen:
        assert not step._better_apart(bn, other, None, "relu")
    assert not seen  # the op tells
    # on a CPU torch's own gains nothing apart
    assert not step._better_apart(nn.BatchNorm2d(64), torch.empty(2, 64, 8, 8), None, "relu")


@pytest.fixture
def apart(monkeypatch) -> list[nn.Module]:
    """Training as on such a GPU; the batch norms that went through it."""
    seen: list[nn.Module] = []
    monkeypatch.setattr(step, "_better_apart", lambda bn, z, residual, act: not seen.append(bn))
    return seen


@pytest.mark.parametrize("change", STATISTICS)
def test_one_by_one_is_eager(apart, change) -> None:
    """Answers, gradients and statistics after two steps in training."""
    found = []
    for model in map(wide, twins()):
        for bn in each(model, nn.BatchNorm2d):
            STATISTICS[change](bn)
        answers = [model.train()(images(3, 40, torch.float64, seed=i)) for i in range(2)]
        answers[1].square().sum().backward()
        found.append(
            {
                "answers": torch.stack(answers).detach(),
                **{n: p.grad for n, p in model.named_parameters()},
                **buffers(model),
            }
        )
    assert apart
    assert_same(*found)


def test_one_by_one_counts_a_checkpointed_block_once(apart) -> None:
    found = []
    for segments in (False, True):
        layer = wide(twins()[0]).train().layer1
        x = torch.randn(
            3, 64, 10, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
        ).requires_grad_()
        y = checkpoint(layer, x, use_reentrant=False) if segments else layer(x)
        found.append({"gradient": torch.autograd.grad(y.square().sum(), x)[0], **buffers(layer)})
    assert apart
    assert_same(*found, tolerance=0)


def test_the_table_read_is_that_of_the_tensors_gpu(registry, monkeypatch) -> None:
    """A machine may hold two models: the choice for a tensor of the second is not made by the table of the first."""
    current = ["cuda:0"]

    class Device:
        def __init__(self, device: torch.device) -> None:
            self.device = str(device)

        def __enter__(self) -> None:
            current.append(self.device)

        def __exit__(self, *error: object) -> None:
            current.pop()

    asked = []
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(tables, "gpu_name", lambda index=None: asked.append(current[-1]) or "A")
    with FakeTensorMode():
        x = torch.empty(2, 8, 4, 4, device="cuda:1")
        select.choose_for_call("add_act", (x, x, None, "relu"), lambda *args: None)
    assert set(asked) == {"cuda:1"}
