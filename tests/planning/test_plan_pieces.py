"""A large batch goes through a plan in pieces, with the same answer."""

import pytest
import torch
from plans import block, images, programs, ready

import resnet_fast
from resnet_fast import plan
from resnet_fast.runtime import pieces as cutting
from resnet_fast.runtime.pieces import PIECE, pieces


@pytest.fixture(scope="module")
def model():
    return ready(resnet_fast.resnet18())


def test_large_batch_goes_through_in_pieces(model, monkeypatch):
    x, features = images(7), ("layer2", "fc")
    whole = plan(model, x, features=features)
    expected = whole(x)
    assert (7, 3, 64, 64) in programs(whole)

    monkeypatch.setattr(cutting, "PIECE", 3 * 64 * 32 * 32 * 4)
    cut = plan(model, x, features=features)
    got = cut(x)

    assert (7, 3, 64, 64) not in programs(cut)
    assert (3, 3, 64, 64) in programs(cut)
    assert cut.activation_bytes < 0.6 * whole.activation_bytes
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5)


def test_size_of_a_piece_does_not_depend_on_the_batch(model, monkeypatch):
    """The probe of two images is a view of the whole batch's memory, which must not count."""
    monkeypatch.setattr(cutting, "PIECE", 4 * 64 * 32 * 32 * 4)
    engine = plan(model, images(40))._engine
    sizes = engine.piece_sizes(engine.prepared(images(40)))
    assert sizes == pieces(40, 64 * 32 * 32 * 4) == [4] * 10


@pytest.mark.parametrize(
    ("images", "largest", "sizes"),
    [(16, PIECE // 4, [4, 4, 4, 4]), (17, PIECE // 8, [6, 6, 5]), (5, 1, [5])],
)
def test_pieces_are_of_nearly_equal_size(images, largest, sizes):
    assert pieces(images, largest) == sizes


@pytest.mark.parametrize("fit", [1, 2, 3, 7])
def test_pieces_are_never_single_images(fit):
    for count in range(2, 40):
        sizes = pieces(count, PIECE // fit)
        assert sum(sizes) == count
        assert min(sizes) > 1
        assert max(sizes) <= max(3, fit)


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: self.bn(self.conv(x)) - x.mean(0, keepdim=True),
        lambda self, x: self.bn(self.conv(x)).flatten(0, 1),
        lambda self, x: self.bn(self.conv(x)) * torch.softmax(x, 0),
        lambda self, x: self.bn(self.conv(x))[:1],
    ],
    ids=["mean over images", "flatten images", "softmax over images", "first image"],
)
def test_network_that_mixes_images_is_not_cut(forward, monkeypatch):
    monkeypatch.setattr(cutting, "PIECE", 1)
    model, x = block(forward), images(6, 12, 12)
    with torch.no_grad():
        expected = model(x)
    torch.testing.assert_close(plan(model, x)(x), expected, rtol=1e-4, atol=1e-5)


def returns_more_than_batches(self, x):
    return {"y": self.conv(x), "weight": self.bn.weight, "input": x, "level": 3, "none": None}


def test_results_that_are_no_batch_are_not_cut_and_share_no_memory(monkeypatch):
    monkeypatch.setattr(cutting, "PIECE", 1)
    model, x = block(returns_more_than_batches), images(6, 12, 12)
    run = plan(model, x)

    got = run(x)
    assert torch.equal(got["weight"], model.bn.weight)
    assert torch.equal(got["input"], x)
    assert (got["level"], got["none"]) == (3, None)

    got["weight"].zero_()
    got["input"].zero_()
    assert torch.equal(run(x)["weight"], model.bn.weight)
    assert x.any()
    assert got["y"].shape == (6, 3, 12, 12)
