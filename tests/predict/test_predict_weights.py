"""Sources of weights, the presets and names that belong to them, and the messages when there are none."""

from __future__ import annotations

import json
import sys
from urllib.error import URLError

import pytest
import torch

pytest.importorskip("torchvision")

from torchvision.models import ResNet18_Weights, ResNet50_Weights  # noqa: E402
from torchvision.models._api import WeightsEnum  # noqa: E402

from resnet_fast import create_model  # noqa: E402
from resnet_fast.predict import weights  # noqa: E402


@pytest.fixture
def published(monkeypatch):
    """Replace torchvision's download by weights made here; return the list of requested entries."""
    requested = []

    def get_state_dict(entry, *args, **kwargs):
        requested.append(entry)
        print(f"Downloading: {entry.url}")  # as torch.hub does
        model = type(entry).__name__.partition("_")[0].lower()
        return create_model(model).state_dict()

    monkeypatch.setattr(WeightsEnum, "get_state_dict", get_state_dict)
    return requested


def test_torchvisions_default_weights_bring_preset_and_categories(published, capsys):
    found = weights.load("resnet50", None, False)

    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("Downloading: ")
    assert published == [ResNet50_Weights.IMAGENET1K_V2]
    assert (found.resize, found.crop) == (232, 224)
    assert found.categories[281] == "tabby"
    assert not found.model.training


def test_torchvisions_weights_are_chosen_by_name(published):
    found = weights.load("resnet18", "IMAGENET1K_V1", False)

    assert published == [ResNet18_Weights.IMAGENET1K_V1]
    assert (found.resize, found.crop) == (256, 224)
    assert found.mean == (0.485, 0.456, 0.406)
    assert found.std == (0.229, 0.224, 0.225)


def test_no_network_names_the_alternatives(monkeypatch):
    def get_state_dict(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr(WeightsEnum, "get_state_dict", get_state_dict)
    with pytest.raises(
        ValueError, match=r"resnet18-.*no route to host.*--weights FILE, or --random-weights"
    ):
        weights.load("resnet18", None, False)


def test_no_torchvision_names_the_alternatives(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(
        ValueError, match=r"torchvision.*not installed.*--weights FILE, or --random-weights"
    ):
        weights.load("resnet18", None, False)


@pytest.mark.parametrize(
    ("model", "name", "message"),
    [
        (
            "resnet18",
            "IMAGENET1K_V9",
            "--weights IMAGENET1K_V9: neither a file nor one of IMAGENET1K_V1, DEFAULT",
        ),
        ("resnet17", None, "--model resnet17: expected one of resnet18, resnet34"),
    ],
)
def test_unknown_names_list_the_known_ones(model, name, message):
    with pytest.raises(ValueError, match=message):
        weights.load(model, name, False)


def test_number_of_classes_comes_from_the_file(tmp_path):
    path = tmp_path / "own.pth"
    expected = create_model("resnet18", num_classes=7).state_dict()
    state = {f"module.{key}": value for key, value in expected.items()}
    torch.save({"epoch": 3, "state_dict": state}, path)

    found = weights.load("resnet18", str(path), False)

    assert found.categories is None
    assert not found.model.training
    loaded = found.model.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)


class Code:
    def __reduce__(self):
        return print, ("a checkpoint ran code",)


def test_code_in_a_file_is_refused_and_never_run(tmp_path, capsys):
    path = tmp_path / "code.pth"
    torch.save({"state_dict": Code()}, path)
    with pytest.raises(ValueError, match="not a checkpoint"):
        weights.load("resnet18", str(path), False)
    assert "ran code" not in capsys.readouterr().out


@pytest.mark.parametrize("content", ["a text", ""])
def test_files_that_are_no_checkpoint_are_refused(tmp_path, content):
    path = tmp_path / "text.pth"
    path.write_text(content)
    with pytest.raises(ValueError, match="not a checkpoint"):
        weights.load("resnet18", str(path), False)


def test_weights_of_another_architecture_are_refused(tmp_path):
    path = tmp_path / "other.pth"
    other = create_model("resnet34", num_classes=7)
    torch.save(other.state_dict(), path)
    with pytest.raises(ValueError, match="another architecture"):
        weights.load("resnet18", str(path), False)


def test_random_weights_are_reproducible_and_leave_the_generator_alone():
    before = torch.get_rng_state()
    first = weights.load("resnet18", None, True)
    second = weights.load("resnet18", None, True)
    assert torch.equal(before, torch.get_rng_state())
    assert first.digest() == second.digest()


def test_digest_changes_with_any_weight():
    found = weights.load("resnet18", None, True)
    before = found.digest()
    found.model.fc.bias.data[0] += 1
    assert found.digest() != before


@pytest.mark.parametrize(
    "text",
    [
        "cat\ndog\n",
        '["cat", "dog"]',
        '{"1": "dog", "0": "cat"}',
        '{"0": ["n01", "cat"], "1": ["n02", "dog"]}',
    ],
    ids=["lines", "list", "object", "pairs"],
)
def test_labels_in_the_usual_forms(tmp_path, text):
    path = tmp_path / "labels"
    path.write_text(text)
    labels = weights.read_labels(str(path))
    assert labels == ["cat", "dog"]


def test_labels_without_a_class_are_refused(tmp_path):
    path = tmp_path / "labels"
    path.write_text(json.dumps({"0": "cat", "2": "dog"}))
    with pytest.raises(ValueError, match="not the class numbers 0 to 1"):
        weights.read_labels(str(path))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"0": ', "neither lines in UTF-8 nor JSON: Expecting value"),
        (b"\xff\xfe", "neither lines in UTF-8 nor JSON: .*can't decode byte"),
        (b"[1, 2]", "got 1, expected names or .id, name. pairs"),
        (b'["cat", []]', r"got \[\], expected names"),
        (b'[["n01", 2]]', "got 2, expected names"),
    ],
)
def test_malformed_labels_are_refused(tmp_path, data, message):
    path = tmp_path / "labels"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"^--labels .*labels: {message}"):
        weights.read_labels(str(path))
