"""A network's cached inference program: it runs when it may, gives the same results, and keeps nothing alive."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch
from kept_networks import X, each_pair, warm
from torch import Tensor, nn
from twins import assert_agree, images, shake, twins

import resnet_fast
from resnet_fast.dispatch import record
from resnet_fast.live import network_pass
from resnet_fast.runtime import pieces


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
    monkeypatch.setattr(pieces, "PIECE", 3 * 16 * 20 * 20 * 4 * 4)
    warm(ours, x=x)
    passes.clear()
    assert_agree(ours, theirs, x)
    assert [shape[0] for shape in passes] == pieces.pieces(7, 16 * 20 * 20 * 4 * 4) and len(
        passes
    ) > 1


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
    with record() as choices:
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
    monkeypatch.setattr(pieces, "PIECE", 1)
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
        first = {
            "read again": y,
            "broadcasts": y.mean((2, 3), keepdim=True),
            "promotes": y.double() / 3,
        }[self.kind]
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
@pytest.mark.parametrize(
    "move",
    [nn.Module.double, lambda m: m.to(memory_format=torch.channels_last)],
    ids=["double", "channels_last"],
)
def test_what_was_packed_goes_with_the_weights_though_no_pass_comes_again(
    pair, move, passes
) -> None:
    """As when a network moves to a GPU: 200 MB of a ResNet-50's packs would stay for good."""
    ours, theirs = pair()
    warm(ours)
    entry = weakref.ref(network_pass._networks[ours].program._filters["relu"][1].snapshot[0])
    assert entry() is not None and passes
    move(ours)
    gc.collect()
    assert entry() is None and network_pass._networks[ours].program is None
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
    assert len([shape for shape in passes if shape == tuple(X.shape)]) == 3, (
        "one bad input must not end it"
    )


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
