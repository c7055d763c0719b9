"""The sample photographs: real, deterministic, normalised as ImageNet's."""

from __future__ import annotations

import importlib.util

import pytest
import torch

pytest.importorskip("PIL")
if importlib.util.find_spec("skimage") is None and importlib.util.find_spec("sklearn") is None:
    pytest.skip("neither scikit-image nor scikit-learn is installed", allow_module_level=True)

from resnet_fast.data import samples  # noqa: E402


def test_more_photos_than_there_are_are_windows_of_them():
    count = len(samples.files())
    first, again = samples.sample(count + 3), samples.sample(count + 3)
    assert [image.mode for image in first] == ["RGB"] * (count + 3)
    assert [image.tobytes() for image in first] == [image.tobytes() for image in again]
    assert first[count].size != first[0].size
    assert len(samples.sample(2)) == 2


def test_batch_is_what_torchvisions_transforms_give():
    presets = pytest.importorskip("torchvision.transforms._presets")
    transform = presets.ImageClassification(crop_size=56, resize_size=64)
    assert torch.equal(samples.batch(3, 56), torch.stack([transform(image) for image in samples.sample(3)]))


def test_without_a_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(samples, "PHOTOS", {"no_such_package": ("data", ("a.png",))})
    with pytest.raises(ImportError, match="pip install scikit-image"):
        samples.sample(1)
