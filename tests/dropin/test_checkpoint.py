"""Checkpoints of every origin load, wrong ones are named in a sentence, and what is saved anyone can read."""

from __future__ import annotations

import os
import stat

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import nn
from torch.optim.swa_utils import AveragedModel
from twins import CL, assert_agree, images, shake, twins

import resnet_fast
from resnet_fast import load_checkpoint, save_checkpoint


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return twins("resnet18")[1].state_dict()


def fresh(name: str = "resnet18", num_classes: int = 10) -> nn.Module:
    """A model full of zeros: random initialisation is slow, and here for nothing."""
    with torch.device("meta"):
        model = resnet_fast.create_model(name, num_classes=num_classes)
    model.to_empty(device="cpu")
    for t in model.state_dict().values():
        t.zero_()
    return model


def assert_loaded(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    own = {
        name.replace("_orig_mod.", "").replace("module.", ""): t
        for name, t in model.state_dict().items()
    }
    assert all(torch.equal(own[name], t) for name, t in state.items()) and len(own) == len(state)


def prefixed(state: dict, prefix: str) -> dict:
    return {prefix + name: t for name, t in state.items()}


FORMS = {
    "bare": lambda s: s,
    "DDP": lambda s: prefixed(s, "module."),
    "compiled": lambda s: prefixed(s, "_orig_mod."),
    "DDP of compiled": lambda s: prefixed(s, "module._orig_mod."),
    "compiled DDP": lambda s: prefixed(s, "_orig_mod.module."),
    "compiled stages": lambda s: {
        n.replace("layer1.", "layer1._orig_mod."): t for n, t in s.items()
    },
    "state_dict": lambda s: {"epoch": 3, "arch": "resnet18", "state_dict": prefixed(s, "module.")},
    "reference script": lambda s: {"model": s, "optimizer": {"state": {}}, "epoch": 1},
    "average alone": lambda s: {
        "model_ema": {"n_averaged": torch.tensor(5), **prefixed(s, "module.")}
    },
    "timm's average": lambda s: {"state_dict_ema": s, "epoch": 2},
    "nested": lambda s: {"state_dict": {"model": prefixed(s, "module.")}},
    "both": lambda s: {"model_ema": {n: t + 1 for n, t in s.items()}, "model": s},
    "half precision's upcast": lambda s: {
        n: t.double() if t.is_floating_point() else t for n, t in s.items()
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_loads(form, state, tmp_path) -> None:
    assert_loaded(load_checkpoint(fresh(), FORMS[form](dict(state))), state)
    torch.save(FORMS[form](dict(state)), tmp_path / "checkpoint.pth.tar")
    model = fresh()
    assert load_checkpoint(model, str(tmp_path / "checkpoint.pth.tar")) is model
    assert_loaded(model, state)


def test_a_safetensors_file_and_timms_state(tmp_path) -> None:
    theirs = shake(timm.create_model("resnet18", num_classes=10)).eval()
    safetensors.torch.save_file(theirs.state_dict(), tmp_path / "timm.safetensors")
    ours = load_checkpoint(fresh(), tmp_path / "timm.safetensors").eval()
    assert_loaded(ours, theirs.state_dict())
    assert_agree(ours, theirs, images(2))


def test_an_old_file_without_counters(state) -> None:
    old = {name: t for name, t in state.items() if not name.endswith("num_batches_tracked")}
    model = load_checkpoint(fresh(), old)
    assert_loaded(model, {**state, **{n: torch.tensor(0) for n in state if n not in old}})


def test_into_a_wrapped_model(state) -> None:
    assert_loaded(load_checkpoint(torch.compile(fresh()), state), state)
    averaged = AveragedModel(fresh())
    load_checkpoint(averaged, state, strict=False)
    assert_loaded(averaged.module, state)


def test_a_whole_model_needs_trust(state, tmp_path) -> None:
    torch.save(load_checkpoint(fresh(), state), tmp_path / "model.pt")
    with pytest.raises(Exception, match="weights_only|Weights only"):
        load_checkpoint(fresh(), tmp_path / "model.pt")
    assert_loaded(load_checkpoint(fresh(), {"model": load_checkpoint(fresh(), state)}), state)
    assert_loaded(load_checkpoint(fresh(), tmp_path / "model.pt", weights_only=False), state)


def test_another_number_of_classes(state) -> None:
    model = fresh(num_classes=7)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(
        ValueError,
        match=r"load_checkpoint: fc.weight: got \[10, 512\], expected \[7, 512\]: the checkpoint has 10 classes"
        r", the model 7; build it with num_classes=10, or leave fc.\* out and pass strict=False",
    ):
        load_checkpoint(model, state)
    assert_loaded(model, before)  # nothing was loaded by halves
    load_checkpoint(
        model, {n: t for n, t in state.items() if not n.startswith("fc.")}, strict=False
    )
    assert torch.equal(model.conv1.weight, state["conv1.weight"]) and torch.equal(
        model.fc.weight, before["fc.weight"]
    )


def test_another_architecture(state) -> None:
    model = fresh("resnet34")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(
        ValueError,
        match=r"of another architecture: 80 names \(layer1.2.conv1.weight, .*, …\) missing, 0 names unexpected",
    ):
        load_checkpoint(model, state)
    assert_loaded(model, before)
    with pytest.raises(ValueError, match=r"0 names missing, 1 names \(extra\) unexpected"):
        load_checkpoint(fresh(), {**state, "extra": torch.ones(1)})
    with pytest.raises(
        ValueError, match=r"layer1.0.conv1.weight: got \[64, 64, 3, 3\], expected \[64, 64, 1, 1\]"
    ):
        load_checkpoint(fresh("resnet50"), state)
    load_checkpoint(fresh(), {**state, "extra": torch.ones(1)}, strict=False)


def test_what_is_no_checkpoint(state, tmp_path) -> None:
    with pytest.raises(ValueError, match="epoch: got a int, expected a tensor"):
        load_checkpoint(fresh(), {**state, "epoch": 3})
    with pytest.raises(ValueError, match="conv1.weight: got it twice"):
        load_checkpoint(fresh(), {**state, "module.conv1.weight": state["conv1.weight"]})
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="got a list, expected a mapping"):
        load_checkpoint(fresh(), tmp_path / "list.pth")
    with pytest.raises(FileNotFoundError):
        load_checkpoint(fresh(), tmp_path / "nothing.pth")


# ---------------------------------------------------------------- saving


@pytest.mark.parametrize("suffix", (".safetensors", ".pth", ".pt"))
def test_saved_files_are_for_everyone(suffix, state, tmp_path) -> None:
    """From a channels_last model: torchvision, timm, torch and safetensors read it without us."""
    path = tmp_path / f"model{suffix}"
    save_checkpoint(load_checkpoint(fresh(), state).to(memory_format=CL), path)
    raw = (
        safetensors.torch.load_file(path)
        if suffix == ".safetensors"
        else torch.load(path, weights_only=True)
    )
    for other in (
        torchvision.models.resnet18(num_classes=10),
        timm.create_model("resnet18", num_classes=10),
    ):
        other.load_state_dict(raw)
        assert_loaded(other, state)
    assert all(t.is_contiguous() for t in raw.values())
    assert_loaded(load_checkpoint(fresh(), path), state)


def test_saving_from_wrappers_leaves_their_names_out(state, tmp_path) -> None:
    save_checkpoint(torch.compile(load_checkpoint(fresh(), state)), tmp_path / "a.safetensors")
    assert list(safetensors.torch.load_file(tmp_path / "a.safetensors").keys() ^ state.keys()) == []


def test_shared_and_sliced_weights_are_written_apart(tmp_path) -> None:
    model = fresh()
    model.layer1[0].conv2.weight = model.layer1[0].conv1.weight
    model.fc.weight = nn.Parameter(torch.randn(1000, 512)[:10])
    for name in ("a.safetensors", "a.pth"):
        save_checkpoint(model, tmp_path / name)
        assert os.path.getsize(tmp_path / name) < 46e6
        assert_loaded(load_checkpoint(fresh(), tmp_path / name), model.state_dict())


def test_a_failed_save_leaves_the_old_file(state, tmp_path, monkeypatch) -> None:
    path = tmp_path / "model.pth"
    save_checkpoint(load_checkpoint(fresh(), state), path)
    before = path.read_bytes()

    def fails(obj, file):
        with open(file, "wb") as out:
            out.write(b"half a file")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(fresh(), path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["model.pth"]


def test_saving_says_what_is_wrong(tmp_path) -> None:
    with pytest.raises(
        ValueError, match="suffix: got '.txt', expected one of .safetensors, .pth, .pt"
    ):
        save_checkpoint(fresh(), tmp_path / "model.txt")
    with torch.device("meta"):
        model = resnet_fast.resnet18()
    with pytest.raises(ValueError, match="conv1.weight: got a meta tensor"):
        save_checkpoint(model, tmp_path / "model.pth")
    assert os.listdir(tmp_path) == []


def test_a_saved_file_has_the_users_permissions(tmp_path) -> None:
    before = os.umask(0o022)
    try:
        save_checkpoint(fresh(), tmp_path / "model.pth")
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(tmp_path / "model.pth").st_mode) == 0o644
