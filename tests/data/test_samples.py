"""Sample photographs: real, the same in every call, normalised as for ImageNet."""

from __future__ import annotations

import importlib.util

import pytest
import torch

pytest.importorskip("PIL")
if importlib.util.find_spec("skimage") is None and importlib.util.find_spec("sklearn") is None:
    pytest.skip("neither scikit-image nor scikit-learn is installed", allow_module_level=True)

from resnet_fast.data import samples  # noqa: E402


def test_further_photographs_are_windows_of_the_installed_ones():
    count = len(samples.files())

    images = samples.sample(count + 3)
    again = samples.sample(count + 3)

    assert {image.mode for image in images} == {"RGB"}
    assert len(images) == count + 3
    assert images[count].size != images[0].size
    pixels = [image.tobytes() for image in images]
    assert pixels == [image.tobytes() for image in again]


def test_sample_returns_no_more_than_asked_for():
    assert len(samples.sample(2)) == 2


def test_batch_equals_torchvisions_transforms():
    presets = pytest.importorskip("torchvision.transforms._presets")
    transform = presets.ImageClassification(crop_size=56, resize_size=64)
    images = samples.sample(3)
    expected = torch.stack([transform(image) for image in images])
    assert torch.equal(samples.batch(3, 56), expected)


def test_missing_package_is_named(monkeypatch):
    packages = {"no_such_package": ("data", ("a.png",))}
    monkeypatch.setattr(samples, "PHOTOS", packages)
    with pytest.raises(ImportError, match="pip install scikit-image"):
        samples.sample(1)
