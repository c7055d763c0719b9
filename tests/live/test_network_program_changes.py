"""A network changes after its pass was kept (whole.py, kept.py): the kept program never answers for yesterday's."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from kept_networks import X, each_pair, warm
from torch import Tensor, nn
from twins import assert_agree, shake

import resnet_fast
from resnet_fast.testing.rule import assert_rule


class Flagged(torchvision.models.ResNet):
    """A forward that reads attributes of its own network, one of them its class's until it is set."""

    twice = False

    def __init__(self) -> None:
        super().__init__(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], 10, width_per_group=16)
        self.negate = False

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        x = x * 2 if self.twice else x
        return -x if self.negate else x


class Outer(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def flagged(wrap=lambda m: m) -> tuple[nn.Module, nn.Module]:
    theirs = wrap(shake(Flagged())).eval()
    return resnet_fast.accelerate(copy.deepcopy(theirs)), theirs


def _hook(model: nn.Module) -> None:
    model.layer3[0].bn2.register_forward_hook(lambda m, i, out: out * 2)


def _forward(model: nn.Module) -> None:
    relu = model.layer2[0].relu
    relu.forward = lambda x: x.clamp(min=-0.1)


def _block_forward(model: nn.Module) -> None:
    model.layer2[1].forward = lambda x: x * 2


def _partly_training(model: nn.Module) -> None:
    model.layer2[0].bn1.train()


def _anew(model: nn.Module) -> None:
    """As FSDP does between passes: the storage stays, its memory does not."""
    weight = model.layer2[0].conv2.weight.data
    storage, held = weight.untyped_storage(), weight.clone() * 2
    size = storage.nbytes()
    storage.resize_(0)
    storage.resize_(size)
    weight.copy_(held)


def _narrowed(model: nn.Module) -> None:
    """Half the channels between two convolutions: other shapes in the same place, with the same strides."""
    block = model.layer2[1]
    half = block.conv1.out_channels // 2
    for t in (
        block.conv1.weight,
        *(getattr(block.bn1, name) for name in ("weight", "bias", "running_mean", "running_var")),
    ):
        t.data = t.data[:half]
    block.conv2.weight.data = block.conv2.weight.data[:, :half]


def _elsewhere(model: nn.Module) -> None:
    """Another data, while the old lives on with its bytes."""
    weight = model.layer2[1].conv2.weight
    weight.held = weight.data
    weight.data = weight.data * 2


def _other_dict(m: nn.Module, holder: str, **entries) -> None:
    m.__dict__[holder] = {**m.__dict__[holder], **entries}


CHANGES = {
    "hook": _hook,
    "pre-hook": lambda m: m.layer1.register_forward_pre_hook(lambda m, i: (i[0] * 2,)),
    "forward of a ReLU": _forward,
    "forward of a block": _block_forward,
    "forward of a pool": lambda m: setattr(
        m.avgpool, "forward", lambda x: x.amax((2, 3), keepdim=True)
    ),
    "a ReLU in place of another": lambda m: setattr(m.layer2[0], "relu", nn.LeakyReLU(0.3)),
    "a class": lambda m: setattr(m.layer3[0].relu, "__class__", nn.Tanh),
    "a new last layer": lambda m: setattr(m, "fc", shake(nn.Linear(m.fc.in_features, 5))),
    "the last layer's weight": lambda m: m.fc.weight.data.mul_(2),
    "a new last weight": lambda m: setattr(m.fc, "weight", nn.Parameter(m.fc.weight.detach() * 2)),
    "a last layer without bias": lambda m: setattr(m.fc, "bias", None),
    "a pool's size": lambda m: (
        setattr(m.maxpool, "kernel_size", 5) or setattr(m.maxpool, "padding", 2)
    ),
    "a block more": lambda m: m.layer2.append(copy.deepcopy(m.layer2[1])),
    "a block less": lambda m: m.layer2.__delitem__(1),
    "blocks in another order": lambda m: setattr(
        m, "layer2", nn.Sequential(m.layer2[0], m.layer2[1], m.layer2[1])
    ),
    "batch statistics": lambda m: [
        setattr(m.layer1[0].bn1, name, None) for name in ("running_mean", "running_var")
    ],
    "partly in training": _partly_training,
    "float64": lambda m: m.double(),
    "strides": lambda m: setattr(
        m.layer1[0].conv2.weight, "data", m.layer1[0].conv2.weight.data.transpose(2, 3)
    ),
    "an infinite factor": lambda m: m.layer1[0].bn1.weight.data.__setitem__(0, float("inf")),
    "an infinite weight": lambda m: (
        m.layer1[0].conv1.weight.data.view(-1).__setitem__(0, float("inf"))
    ),
    "memory given back and taken anew": _anew,
    "half the channels": _narrowed,
    "data elsewhere": _elsewhere,
    "parameters in another dict": lambda m: _other_dict(
        m.fc, "_parameters", bias=m.fc.bias.detach() + 1
    ),
    "buffers in another dict": lambda m: _other_dict(
        m.layer1[0].bn1, "_buffers", running_mean=m.layer1[0].bn1.running_mean + 1
    ),
    "children in another dict": lambda m: _other_dict(m.layer1[0], "_modules", relu=nn.Tanh()),
    "everything in another dict": lambda m: setattr(
        m.maxpool, "__dict__", {**m.maxpool.__dict__, "kernel_size": 5, "padding": 2}
    ),
    "the network's children in another dict": lambda m: _other_dict(
        m, "_modules", maxpool=nn.Identity()
    ),
    "a bias": lambda m: setattr(
        m.layer1[0].conv2, "bias", nn.Parameter(torch.ones(m.layer1[0].conv2.out_channels))
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@each_pair
def test_a_change_after_it_was_kept_is_seen(pair, change, passes) -> None:
    ours, theirs = pair()
    warm(ours)
    assert passes
    for model in (ours, theirs):
        torch.manual_seed(5)
        CHANGES[change](model)
    x = X.double() if change == "float64" else X
    for _ in range(4):  # at once, and when it is kept anew
        with torch.no_grad():
            oracle, eager, got = copy.deepcopy(theirs).double()(x.double()), theirs(x), ours(x)
        assert got.stride() == eager.stride()
        assert_rule(got, eager, oracle, what=change)


@pytest.mark.parametrize("name", ["negate", "twice"])
@pytest.mark.parametrize("wrap", [lambda m: m, Outer], ids=["itself", "inside"])
def test_an_attribute_that_a_forward_reads_is_seen(name, wrap, passes) -> None:
    ours, theirs = flagged(wrap)
    warm(ours)
    assert passes
    for model in (ours, theirs):
        setattr(getattr(model, "body", model), name, True)
    for _ in range(4):
        assert_agree(ours, theirs, X)


@pytest.mark.parametrize("wrap", [lambda m: m, Outer], ids=["itself", "inside"])
def test_another_forward_of_a_class_is_seen(wrap, passes, monkeypatch) -> None:
    ours, theirs = flagged(wrap)
    warm(ours)
    assert passes
    monkeypatch.setattr(
        Flagged, "forward", lambda self, x: 3 * torchvision.models.ResNet.forward(self, x)
    )
    for _ in range(4):
        assert_agree(ours, theirs, X)


def test_the_order_in_another_dict_is_seen(passes) -> None:
    torch.manual_seed(0)
    units = [
        m
        for channels in (3, 8, 8, 8)
        for m in (nn.Conv2d(channels, 8, 3, bias=False), nn.BatchNorm2d(8))
    ]
    theirs = nn.Sequential(nn.ReLU(), *units, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Tanh())
    ours = resnet_fast.accelerate(copy.deepcopy(shake(theirs).eval()))
    warm(ours)
    assert passes
    for model in (ours, theirs):
        relu, *middle, tanh = model._modules.items()
        model.__dict__["_modules"] = dict([tanh, *middle, relu])
    for _ in range(4):
        assert_agree(ours, theirs, X)


@each_pair
def test_the_order_of_blocks_is_seen(pair, passes) -> None:
    ours, theirs = pair()
    for model in (ours, theirs):
        model.layer2.append(shake(copy.deepcopy(model.layer2[1]), seed=7))
    warm(ours)
    assert passes
    for model in (ours, theirs):
        blocks = model.layer2._modules
        blocks["1"] = blocks.pop("1")
    for _ in range(4):
        assert_agree(ours, theirs, X)


@each_pair
def test_other_parameters_for_one_call(pair, passes) -> None:
    """functional_call puts other tensors in for one call, by turns with the model's own."""
    ours, theirs = pair()
    warm(ours)
    other = {name: p.detach() * 1.1 for name, p in theirs.named_parameters()}
    for _ in range(3):
        with torch.no_grad():
            torch.testing.assert_close(
                torch.func.functional_call(ours, other, (X,)),
                torch.func.functional_call(theirs, other, (X,)),
                rtol=1e-3,
                atol=1e-4,
            )
        assert_agree(ours, theirs, X)


@each_pair
def test_another_dtype_in_the_same_place_is_seen(pair, passes) -> None:
    ours, _ = pair()
    warm(ours)
    assert passes
    weight = ours.layer2[1].conv2.weight
    weight.requires_grad_(False).data = weight.data.view(torch.int32)
    with torch.no_grad(), pytest.raises(RuntimeError, match="dtype|type"):
        ours(X)
