"""A network's inference pass kept as a program (whole.py, kept.py): it runs when it may, and never on yesterday's network."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch
import torchvision
from torch import Tensor, nn
from twins import assert_agree, images, shake, twins

import resnet_fast
from resnet_fast import dispatch, kept, whole
from resnet_fast.testing import assert_rule

X = images(2, 40)


@pytest.fixture
def passes(monkeypatch) -> list:
    """The shapes that kept programs ran on: which pass was kept, and in which pieces."""
    ran, original = [], kept.Kept.__call__

    def noted(self, x):
        out = original(self, x)
        ran.extend([tuple(x.shape)] if out is not None else [])
        return out

    monkeypatch.setattr(kept.Kept, "__call__", noted)
    return ran


def warm(*models: nn.Module, x: Tensor = X) -> None:
    with torch.no_grad():
        for model in models:
            for _ in range(3):
                model(x)


def accelerated() -> tuple[nn.Module, nn.Module]:
    """(torchvision's, accelerated; torchvision's as it was)."""
    _, theirs = twins()
    return resnet_fast.accelerate(copy.deepcopy(theirs)), theirs


PAIRS = {"ours": twins, "accelerated": accelerated}
each_pair = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)


# ---------------------------------------------------------------- when it runs

@each_pair
def test_the_third_pass_is_kept_and_answers_the_same(pair, passes) -> None:
    ours, theirs = pair()
    for n in range(1, 5):
        assert_agree(ours, theirs, X)
        assert len(passes) == max(0, n - 2)


@each_pair
def test_a_batch_goes_through_in_pieces(pair, passes, monkeypatch) -> None:
    ours, theirs = pair()
    x = images(7, 40)
    monkeypatch.setattr(whole, "PIECE", 3 * 16 * 20 * 20 * 4 * 4)
    warm(ours, x=x)
    passes.clear()
    assert_agree(ours, theirs, x)
    assert [shape[0] for shape in passes] == whole.pieces(7, 16 * 20 * 20 * 4 * 4) and len(passes) > 1


@each_pair
def test_other_shapes_and_batches_are_kept_too(pair, passes) -> None:
    ours, theirs = pair()
    warm(ours)
    for shape in ((1, 40), (3, 40), (2, 56), (2, 33), (0, 40), (2, 40)):
        assert_agree(ours, theirs, images(*shape))
    assert {s for s in passes if s[2] != 40} == {(2, 3, 56, 56), (2, 3, 33, 33)}


@each_pair
def test_nothing_is_kept_where_somebody_looks(pair, passes) -> None:
    ours, _ = pair()
    ours(X), ours(X), ours(X)  # gradients
    assert not passes
    handle = ours.layer2.register_forward_hook(lambda *_: None)
    warm(ours)
    assert not passes
    handle.remove()
    with dispatch.record() as choices:
        warm(ours)
    assert choices and not passes
    warm(ours)
    assert passes


@pytest.mark.parametrize("last", [-2, -1], ids=["map", "one pixel"])
def test_a_network_that_answers_with_an_image_is_not_kept(last, passes) -> None:
    """Its strides would show how it lay inside."""
    _, theirs = twins()
    body = nn.Sequential(*list(theirs.children())[:last])
    ours = resnet_fast.accelerate(copy.deepcopy(body))
    for _ in range(4):
        assert_agree(ours, body, X)
    assert not passes


class Centred(nn.Module):
    """Answers that depend on the whole batch."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return x - x.mean(0)


def test_a_batch_is_not_cut_where_images_see_each_other(passes, monkeypatch) -> None:
    theirs = Centred(twins()[1]).eval()
    ours = resnet_fast.accelerate(copy.deepcopy(theirs))
    x = images(6, 40)
    monkeypatch.setattr(whole, "PIECE", 1)
    for _ in range(4):
        assert_agree(ours, theirs, x)
    assert set(passes) == {tuple(x.shape)}


class Odd(nn.Module):
    """Residuals that are read again, that broadcast, that promote, and that are a convolution's own input."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        for i, channels in enumerate((3, 8, 8, 8)):
            self.add_module(f"conv{i}", nn.Conv2d(channels, 8, 3, padding=1, bias=False))
            self.add_module(f"norm{i}", nn.BatchNorm2d(8))
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm0(self.conv0(x)))
        y = torch.relu(self.norm1(self.conv1(x)) + x)
        first = {"read again": y, "broadcasts": y.mean((2, 3), keepdim=True), "promotes": y.double() / 3}[self.kind]
        z = torch.relu(self.norm2(self.conv2(y)) + first).type_as(y)
        z = torch.relu(self.norm3(self.conv3(z)) + z)
        return self.fc(torch.cat([z.mean((2, 3)), y.mean((2, 3))], 1))


@pytest.mark.parametrize("kind", ["read again", "broadcasts", "promotes"])
def test_residuals_that_nothing_may_write(kind, passes) -> None:
    theirs = shake(Odd(kind)).eval()
    ours = resnet_fast.accelerate(copy.deepcopy(theirs))
    for _ in range(4):
        assert_agree(ours, theirs, X)
    assert len(passes) == (2 if kind == "read again" else 0)


# ---------------------------------------------------------------- what changes after it was kept

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
    for t in (block.conv1.weight, *(getattr(block.bn1, name) for name in ("weight", "bias", "running_mean", "running_var"))):
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
    "forward of a pool": lambda m: setattr(m.avgpool, "forward", lambda x: x.amax((2, 3), keepdim=True)),
    "a ReLU in place of another": lambda m: setattr(m.layer2[0], "relu", nn.LeakyReLU(0.3)),
    "a class": lambda m: setattr(m.layer3[0].relu, "__class__", nn.Tanh),
    "a new last layer": lambda m: setattr(m, "fc", shake(nn.Linear(m.fc.in_features, 5))),
    "the last layer's weight": lambda m: m.fc.weight.data.mul_(2),
    "a new last weight": lambda m: setattr(m.fc, "weight", nn.Parameter(m.fc.weight.detach() * 2)),
    "a last layer without bias": lambda m: setattr(m.fc, "bias", None),
    "a pool's size": lambda m: setattr(m.maxpool, "kernel_size", 5) or setattr(m.maxpool, "padding", 2),
    "a block more": lambda m: m.layer2.append(copy.deepcopy(m.layer2[1])),
    "a block less": lambda m: m.layer2.__delitem__(1),
    "blocks in another order": lambda m: setattr(m, "layer2", nn.Sequential(m.layer2[0], m.layer2[1], m.layer2[1])),
    "batch statistics": lambda m: [setattr(m.layer1[0].bn1, name, None) for name in ("running_mean", "running_var")],
    "partly in training": _partly_training,
    "float64": lambda m: m.double(),
    "strides": lambda m: setattr(m.layer1[0].conv2.weight, "data", m.layer1[0].conv2.weight.data.transpose(2, 3)),
    "an infinite factor": lambda m: m.layer1[0].bn1.weight.data.__setitem__(0, float("inf")),
    "an infinite weight": lambda m: m.layer1[0].conv1.weight.data.view(-1).__setitem__(0, float("inf")),
    "memory given back and taken anew": _anew,
    "half the channels": _narrowed,
    "data elsewhere": _elsewhere,
    "parameters in another dict": lambda m: _other_dict(m.fc, "_parameters", bias=m.fc.bias.detach() + 1),
    "buffers in another dict": lambda m: _other_dict(m.layer1[0].bn1, "_buffers", running_mean=m.layer1[0].bn1.running_mean + 1),
    "children in another dict": lambda m: _other_dict(m.layer1[0], "_modules", relu=nn.Tanh()),
    "everything in another dict": lambda m: setattr(m.maxpool, "__dict__", {**m.maxpool.__dict__, "kernel_size": 5, "padding": 2}),
    "the network's children in another dict": lambda m: _other_dict(m, "_modules", maxpool=nn.Identity()),
    "a bias": lambda m: setattr(m.layer1[0].conv2, "bias", nn.Parameter(torch.ones(m.layer1[0].conv2.out_channels))),
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
    monkeypatch.setattr(Flagged, "forward", lambda self, x: 3 * torchvision.models.ResNet.forward(self, x))
    for _ in range(4):
        assert_agree(ours, theirs, X)


def test_the_order_in_another_dict_is_seen(passes) -> None:
    torch.manual_seed(0)
    units = [m for channels in (3, 8, 8, 8) for m in (nn.Conv2d(channels, 8, 3, bias=False), nn.BatchNorm2d(8))]
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
            torch.testing.assert_close(torch.func.functional_call(ours, other, (X,)), torch.func.functional_call(theirs, other, (X,)),
                                       rtol=1e-3, atol=1e-4)
        assert_agree(ours, theirs, X)


@each_pair
def test_copies_keep_programs_of_their_own(pair, passes) -> None:
    ours, theirs = pair()
    warm(ours)
    twin = copy.deepcopy(ours)
    with torch.no_grad():
        twin.fc.weight.mul_(3)
        twin.layer1[0].conv1.weight.mul_(3)
    changed = copy.deepcopy(theirs)
    with torch.no_grad():
        changed.fc.weight.mul_(3)
        changed.layer1[0].conv1.weight.mul_(3)
    for _ in range(4):
        assert_agree(twin, changed, X)
        assert_agree(ours, theirs, X)


@each_pair
@pytest.mark.parametrize("move", [nn.Module.double, lambda m: m.to(memory_format=torch.channels_last)], ids=["double", "channels_last"])
def test_what_was_packed_goes_with_the_weights_though_no_pass_comes_again(pair, move, passes) -> None:
    """As when a network moves to a GPU: 200 MB of a ResNet-50's packs would stay for good."""
    ours, theirs = pair()
    warm(ours)
    entry = weakref.ref(whole._states[ours].kept._filters["relu"][1].snapshot[0])
    assert entry() is not None and passes
    move(ours)
    gc.collect()
    assert entry() is None and whole._states[ours].kept is None
    assert_agree(ours, move(theirs), X.to(ours.fc.weight.dtype))


@each_pair
def test_threads_share_a_kept_program(pair, passes) -> None:
    ours, theirs = pair()
    warm(ours)
    inputs = [images(2, 40, seed=i) for i in range(8)]
    with torch.no_grad():
        expected = [theirs(x) for x in inputs]
    wrong: list = []

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(5):
                if not torch.allclose(ours(inputs[i]), expected[i], rtol=1e-3, atol=1e-4):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong and len(passes) > 30


@each_pair
def test_an_input_that_does_not_fit_is_refused_in_the_networks_own_words(pair, passes) -> None:
    ours, _ = pair()
    fresh, _ = pair()
    warm(ours)
    for bad in (torch.randn(2, 4, 40, 40), torch.randn(2, 3, 40, 40).half(), torch.randn(3, 40)):
        with torch.no_grad(), pytest.raises(Exception) as first:
            fresh(bad)
        with torch.no_grad(), pytest.raises(type(first.value)) as kept_error:
            ours(bad)
        assert str(kept_error.value) == str(first.value)
    passes.clear()
    warm(ours)
    assert len([shape for shape in passes if shape == tuple(X.shape)]) == 3, "one bad input must not end it"


@each_pair
def test_another_dtype_in_the_same_place_is_seen(pair, passes) -> None:
    ours, _ = pair()
    warm(ours)
    assert passes
    weight = ours.layer2[1].conv2.weight
    weight.requires_grad_(False).data = weight.data.view(torch.int32)
    with torch.no_grad(), pytest.raises(RuntimeError, match="dtype|type"):
        ours(X)


@each_pair
def test_an_input_is_never_written(pair) -> None:
    ours, _ = pair()
    x = X.to(memory_format=torch.channels_last)
    held = x.clone()
    warm(ours, x=x)
    assert torch.equal(x, held)


@each_pair
def test_an_answer_stays_what_it_was(pair) -> None:
    ours, _ = pair()
    warm(ours)
    with torch.no_grad():
        first = ours(X)
        held = first.clone()
        ours(X * 2)
    assert torch.equal(first, held)
