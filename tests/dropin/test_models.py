"""The ten architectures against torchvision's: keys, initialisation, results, counts, constructor options, weights."""

from __future__ import annotations

import inspect
import pickle
from urllib.error import URLError

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet as tv
from torchvision.ops.misc import FrozenBatchNorm2d
from twins import assert_agree, assert_train_alike, images, shake, twins

import resnet_fast
from resnet_fast.models.family import MODELS

NAMES = resnet_fast.list_models()


def test_the_ten_architectures() -> None:
    assert NAMES == [
        "resnet18",
        "resnet34",
        "resnet50",
        "resnet101",
        "resnet152",
        "resnext50_32x4d",
        "resnext101_32x8d",
        "resnext101_64x4d",
        "wide_resnet50_2",
        "wide_resnet101_2",
    ]
    assert all(
        getattr(resnet_fast, name).__name__ == name and name in resnet_fast.__all__
        for name in NAMES
    )
    assert pickle.loads(pickle.dumps(resnet_fast.resnet18)) is resnet_fast.resnet18


@pytest.mark.parametrize("name", NAMES)
def test_signature_is_torchvisions(name) -> None:
    theirs = inspect.signature(inspect.unwrap(getattr(torchvision.models, name))).parameters
    ours = inspect.signature(getattr(resnet_fast, name)).parameters
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]
    for a, b in (
        (resnet_fast.ResNet, tv.ResNet),
        (resnet_fast.BasicBlock, tv.BasicBlock),
        (resnet_fast.Bottleneck, tv.Bottleneck),
    ):
        mine, other = (inspect.signature(cls).parameters.values() for cls in (a, b))
        assert [(p.name, p.kind, p.default) for p in mine] == [
            (p.name, p.kind, p.default) for p in other
        ]


@pytest.mark.parametrize("name", NAMES)
def test_structure_on_meta_is_torchvisions(name) -> None:
    """Names, shapes, dtypes, repr, parameters (and FLOPs of the shallow ones) at full size, on the meta device."""
    with torch.device("meta"):
        ours, theirs = getattr(resnet_fast, name)(), getattr(torchvision.models, name)()
    assert [(k, v.shape, v.dtype) for k, v in ours.state_dict().items()] == [
        (k, v.shape, v.dtype) for k, v in theirs.state_dict().items()
    ]
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()] and repr(
        ours
    ) == repr(theirs)
    assert {n: v for n, v in vars(ours).items() if n[0] != "_" and n != "training"} == {
        n: v for n, v in vars(theirs).items() if n[0] != "_" and n != "training"
    }
    counts = []
    for model in (ours.eval(), theirs.eval()):
        counts.append([sum(p.numel() for p in model.parameters())])
        if MODELS[name].layers[2] <= 6:
            with FlopCounterMode(display=False) as counter:
                model(torch.empty(1, 3, 224, 224, device="meta"))
            counts[-1].append(counter.get_total_flops())
    assert counts[0] == counts[1]


def test_resnet50_has_the_published_counts() -> None:
    with torch.device("meta"):
        model = resnet_fast.resnet50()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 224, 224))
    assert sum(p.numel() for p in model.parameters()) == 25_557_032
    assert counter.get_total_flops() == 8_178_368_512


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
@pytest.mark.parametrize("zero", (False, True))
def test_seeded_initialisation_is_bit_equal(name, zero) -> None:
    states = []
    for module in (resnet_fast, torchvision.models):
        torch.manual_seed(7)
        states.append(getattr(module, name)(num_classes=3, zero_init_residual=zero).state_dict())
        states[-1]["next random number"] = torch.rand(1)
    assert all(
        torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values(), strict=True)
    )
    assert (states[0]["layer1.0.bn2.weight"].sum() == 0) == (zero and name == "resnet18")


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_answers(name) -> None:
    assert_agree(*twins(name), images(2))


@pytest.mark.parametrize(
    "spec",
    [spec for spec in MODELS.values() if spec.name not in ("resnet18", "resnet50")],
    ids=lambda s: s.name,
)
def test_answers_of_the_large_ones(spec) -> None:
    """Block, groups and width with one block a stage: depth is tested above, and costs seconds to run."""
    ours = shake(
        resnet_fast.ResNet(
            spec.block, [1, 1, 1, 1], 10, groups=spec.groups, width_per_group=spec.width_per_group
        )
    ).eval()
    block = getattr(tv, spec.block.__name__)
    theirs = tv.ResNet(
        block, [1, 1, 1, 1], 10, groups=spec.groups, width_per_group=spec.width_per_group
    ).eval()
    theirs.load_state_dict(ours.state_dict())
    assert_agree(ours, theirs, images(2))


OPTIONS = {
    "dilated": {"replace_stride_with_dilation": [False, True, True]},
    "all dilated": {"replace_stride_with_dilation": [True, True, True]},
    "groups": {"groups": 4, "width_per_group": 16},
    "zero init": {"zero_init_residual": True},
    "classes": {"num_classes": 3},
    "group norm": {"norm_layer": lambda c: nn.GroupNorm(4, c)},
    "frozen": {"norm_layer": FrozenBatchNorm2d},
    "eps and momentum": {"norm_layer": lambda c: nn.BatchNorm2d(c, eps=0.1, momentum=0.3)},
    "no statistics": {"norm_layer": lambda c: nn.BatchNorm2d(c, track_running_stats=False)},
    "cumulative": {"norm_layer": lambda c: nn.BatchNorm2d(c, momentum=None)},
    "instance norm": {"norm_layer": nn.InstanceNorm2d},
    "no norm": {"norm_layer": lambda c: nn.Identity()},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_constructor_options(option) -> None:
    ours, theirs = twins(**OPTIONS[option])
    # as it is at the start of training, not as the twins' statistics make it
    if option == "zero init":
        ours = resnet_fast.ResNet(
            resnet_fast.Bottleneck, [1, 2, 1, 1], 10, True, width_per_group=16
        ).eval()
        theirs.load_state_dict(ours.state_dict())
    assert_agree(ours, theirs, images(2, 40))
    assert_train_alike(ours.train(), theirs.train(), images(3, 40))


def test_basic_block_dilates() -> None:
    """torchvision's BasicBlock refuses; ours must be the composite it would be."""
    torch.manual_seed(0)
    block = shake(resnet_fast.BasicBlock(8, 8, dilation=2)).eval()
    assert block.conv1.dilation == block.conv2.dilation == (2, 2)
    x = torch.randn(2, 8, 9, 9)
    plain = torch.relu(block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x))))) + x)
    torch.testing.assert_close(block(x), plain)
    model = resnet_fast.resnet18(
        num_classes=4, replace_stride_with_dilation=[False, True, True]
    ).eval()
    assert [m.conv1.dilation[0] for m in (*model.layer3, *model.layer4)] == [1, 2, 2, 4]
    with torch.no_grad():
        assert model.layer4(model.layer3(torch.randn(1, 128, 8, 8))).shape == (1, 512, 8, 8)


def test_wrong_options() -> None:
    with pytest.raises(
        ValueError, match="replace_stride_with_dilation should be None or a 3-element tuple"
    ):
        resnet_fast.resnet50(replace_stride_with_dilation=[True])
    with pytest.raises(
        ValueError,
        match="BasicBlock: got groups=2, base_width=64, expected groups=1 and base_width=64",
    ):
        resnet_fast.resnet18(groups=2)
    with pytest.raises(
        ValueError, match="create_model: got 'resnet51', expected one of resnet18, "
    ):
        resnet_fast.create_model("resnet51")
    with pytest.raises(ValueError, match="resnext50_32x4d: groups: got 16, expected 32"):
        resnet_fast.resnext50_32x4d(groups=16)
    with pytest.raises(ValueError, match="wide_resnet50_2: width_per_group: got 64, expected 128"):
        resnet_fast.wide_resnet50_2(width_per_group=64)
    with pytest.raises(TypeError):
        resnet_fast.resnet50(colour="blue")
    assert resnet_fast.resnext50_32x4d(groups=32, num_classes=2).layer1[0].conv2.groups == 32


def test_create_model_is_the_same_function() -> None:
    torch.manual_seed(1)
    a = resnet_fast.create_model("resnet18", num_classes=5)
    torch.manual_seed(1)
    b = resnet_fast.resnet18(num_classes=5)
    assert all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))


# ---------------------------------------------------------------- weights


@pytest.fixture
def download(monkeypatch) -> list:
    """The download replaced: what would be fetched is noted, and a seeded state comes back."""
    fetched = []

    def fake(url, *args, **kwargs):
        fetched.append((url, kwargs))
        torch.manual_seed(11)
        return torchvision.models.resnet18().state_dict()

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fake)
    return fetched


@pytest.mark.parametrize(
    "weights",
    ["IMAGENET1K_V1", "DEFAULT", "ResNet18_Weights.IMAGENET1K_V1", tv.ResNet18_Weights.DEFAULT],
)
def test_weights_by_name_and_by_enum(download, weights) -> None:
    model = resnet_fast.resnet18(weights=weights, progress=False)
    assert download == [
        (tv.ResNet18_Weights.IMAGENET1K_V1.url, {"progress": False, "check_hash": True})
    ]
    torch.manual_seed(11)
    expected = torchvision.models.resnet18().state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())


def test_weights_that_cannot_be_fetched(monkeypatch, tmp_path) -> None:
    def offline(url, *args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    with pytest.raises(
        OSError,
        match=rf"resnet18-f37072fd.pth could not be fetched \(.*no route.* put that file into {tmp_path}/checkp",
    ) as raised:
        resnet_fast.resnet18(weights="DEFAULT")
    assert isinstance(raised.value.__cause__, URLError)


def test_wrong_weights(download) -> None:
    with pytest.raises(ValueError, match="num_classes: got 7, expected 1000"):
        resnet_fast.resnet18(weights="DEFAULT", num_classes=7)
    with pytest.raises(
        ValueError,
        match="resnet18: weights: got 'IMAGENET1K_V9', expected one of IMAGENET1K_V1, DEFAULT, or None",
    ):
        resnet_fast.resnet18(weights="IMAGENET1K_V9")
    with pytest.raises(TypeError, match="ResNet18_Weights"):
        resnet_fast.resnet18(weights=tv.ResNet50_Weights.IMAGENET1K_V1)
    assert not download


@pytest.mark.parametrize("name", NAMES)
def test_every_title_names_an_enum(name) -> None:
    enum = torchvision.models.get_model_weights(name)
    assert enum.__name__ == f"{MODELS[name].title}_Weights"
