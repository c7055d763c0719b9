"""Where weights come from, what belongs to them, and what is said when there are none."""

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
    """torchvision's download, replaced by weights made here; the entries asked for."""
    asked = []

    def get_state_dict(entry, *args, **kwargs):
        asked.append(entry)
        print(f"Downloading: {entry.url}")  # as torch.hub does
        return create_model(type(entry).__name__.partition("_")[0].lower()).state_dict()

    monkeypatch.setattr(WeightsEnum, "get_state_dict", get_state_dict)
    return asked


def test_torchvisions_weights_bring_preset_and_categories(published, capsys):
    found = weights.load("resnet50", None, False)
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("Downloading: ")
    assert published == [ResNet50_Weights.DEFAULT] == [ResNet50_Weights.IMAGENET1K_V2]
    assert (found.resize, found.crop) == (232, 224) and found.categories[281] == "tabby"
    assert not found.model.training
    found = weights.load("resnet18", "IMAGENET1K_V1", False)
    assert (found.resize, found.crop) == (256, 224) and published[-1] is ResNet18_Weights.IMAGENET1K_V1
    assert (found.mean, found.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_no_network_names_the_ways_out(monkeypatch):
    def get_state_dict(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr(WeightsEnum, "get_state_dict", get_state_dict)
    with pytest.raises(ValueError, match=r"resnet18-.*no route to host.*--weights FILE, or --random-weights"):
        weights.load("resnet18", None, False)


def test_no_torchvision_names_the_ways_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(ValueError, match=r"torchvision.*not installed.*--weights FILE, or --random-weights"):
        weights.load("resnet18", None, False)


@pytest.mark.parametrize(
    ("model", "name", "sentence"),
    [
        ("resnet18", "IMAGENET1K_V9", "--weights IMAGENET1K_V9: neither a file nor one of IMAGENET1K_V1, DEFAULT"),
        ("resnet17", None, "--model resnet17: expected one of resnet18, resnet34"),
    ],
)
def test_unknown_names_list_the_known_ones(model, name, sentence):
    with pytest.raises(ValueError, match=sentence):
        weights.load(model, name, False)


def test_a_file_says_how_many_classes_there_are(tmp_path):
    model = create_model("resnet18", num_classes=7)
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "own.pth")
    found = weights.load("resnet18", str(tmp_path / "own.pth"), False)
    assert found.categories is None and not found.model.training
    pairs = zip(found.model.state_dict().values(), model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


class Code:
    def __reduce__(self):
        return print, ("a checkpoint ran code",)


def test_files_that_are_no_checkpoint_are_refused_and_never_run(tmp_path, capsys):
    torch.save({"state_dict": Code()}, tmp_path / "code.pth")
    (tmp_path / "text.pth").write_text("a text")
    (tmp_path / "empty.pth").touch()
    torch.save(create_model("resnet34", num_classes=7).state_dict(), tmp_path / "other.pth")
    for name in ("code", "text", "empty", "other"):
        with pytest.raises(ValueError, match="another architecture" if name == "other" else "not a checkpoint"):
            weights.load("resnet18", str(tmp_path / f"{name}.pth"), False)
    assert "ran code" not in capsys.readouterr().out


def test_random_weights_are_the_same_each_time_and_leave_the_generator_alone():
    before = torch.get_rng_state()
    one, two = weights.load("resnet18", None, True), weights.load("resnet18", None, True)
    assert one.digest() == two.digest() and torch.equal(before, torch.get_rng_state())
    two.model.fc.bias.data[0] += 1
    assert one.digest() != two.digest()


@pytest.mark.parametrize(
    "text", ["cat\ndog\n", '["cat", "dog"]', '{"1": "dog", "0": "cat"}', '{"0": ["n01", "cat"], "1": ["n02", "dog"]}']
)
def test_labels_in_the_usual_forms(tmp_path, text):
    (tmp_path / "labels").write_text(text)
    assert weights.read_labels(str(tmp_path / "labels")) == ["cat", "dog"]


def test_labels_that_leave_out_a_class_are_refused(tmp_path):
    (tmp_path / "labels").write_text(json.dumps({"0": "cat", "2": "dog"}))
    with pytest.raises(ValueError, match="not the class numbers 0 to 1"):
        weights.read_labels(str(tmp_path / "labels"))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'{"0": ', "neither lines in UTF-8 nor JSON: Expecting value"),
        (b"\xff\xfe", "neither lines in UTF-8 nor JSON: .*can't decode byte"),
        (b"[1, 2]", "got 1, expected names or .id, name. pairs"),
        (b'["cat", []]', r"got \[\], expected names"),
        (b'[["n01", 2]]', "got 2, expected names"),
    ],
)
def test_labels_that_are_none_are_refused_in_a_sentence(tmp_path, data, words):
    (tmp_path / "labels").write_bytes(data)
    with pytest.raises(ValueError, match=f"^--labels .*labels: {words}"):
        weights.read_labels(str(tmp_path / "labels"))
