"""A large batch goes through a plan in pieces, where nobody can tell."""

import pytest
import torch
from plans import block, images, ready

import resnet_fast
from resnet_fast import plan
from resnet_fast.runtime import pieces as cutting
from resnet_fast.runtime.pieces import PIECE, pieces


@pytest.fixture(scope="module")
def model():
    return ready(resnet_fast.resnet18())


def test_a_large_batch_goes_through_in_pieces(model, monkeypatch):
    x = images(7)
    one = plan(model, x, features=("layer2", "fc"))
    wanted = one(x)
    assert (7, 3, 64, 64) in one._engine.programs
    monkeypatch.setattr(cutting, "PIECE", 3 * 64 * 32 * 32 * 4)
    cut = plan(model, x, features=("layer2", "fc"))
    got = cut(x)
    assert (7, 3, 64, 64) not in cut._engine.programs and (3, 3, 64, 64) in cut._engine.programs
    assert cut.activation_bytes < 0.6 * one.activation_bytes
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5)


def test_the_size_of_a_piece_does_not_depend_on_the_batch(model, monkeypatch):
    """The first two images, by which it is found, are a part of the whole batch's memory."""
    monkeypatch.setattr(cutting, "PIECE", 4 * 64 * 32 * 32 * 4)
    x = images(40)
    run = plan(model, x)
    assert run._engine.piece_sizes(run._engine.prepared(x)) == pieces(40, 64 * 32 * 32 * 4) == [4] * 10


def test_pieces():
    assert pieces(16, PIECE // 4) == [4, 4, 4, 4] and pieces(17, PIECE // 8) == [6, 6, 5] and pieces(5, 1) == [5]
    for n in range(2, 40):
        for fit in (1, 2, 3, 7):
            found = pieces(n, PIECE // fit)
            assert sum(found) == n and min(found) > 1 and max(found) <= max(3, fit)


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: self.bn(self.conv(x)) - x.mean(0, keepdim=True),
        lambda self, x: self.bn(self.conv(x)).flatten(0, 1),
        lambda self, x: self.bn(self.conv(x)) * torch.softmax(x, 0),
        lambda self, x: self.bn(self.conv(x))[:1],
    ],
    ids=range(4),
)
def test_what_mixes_images_is_not_cut(forward, monkeypatch):
    monkeypatch.setattr(cutting, "PIECE", 1)
    model, x = block(forward), images(6, 12, 12)
    with torch.no_grad():
        torch.testing.assert_close(plan(model, x)(x), model(x), rtol=1e-4, atol=1e-5)


def test_what_is_no_batch_in_an_answer_is_neither_cut_nor_lent(monkeypatch):
    monkeypatch.setattr(cutting, "PIECE", 1)
    model, x = (
        block(lambda self, x: {"y": self.conv(x), "weight": self.bn.weight, "input": x, "level": 3, "none": None}),
        images(6, 12, 12),
    )
    run = plan(model, x)
    got = run(x)
    assert (
        torch.equal(got["weight"], model.bn.weight)
        and torch.equal(got["input"], x)
        and got["level"] == 3
        and got["none"] is None
    )
    got["weight"].zero_(), got["input"].zero_()
    assert torch.equal(run(x)["weight"], model.bn.weight) and x.any() and got["y"].shape == (6, 3, 12, 12)
