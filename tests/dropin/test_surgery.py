"""Changed models give what torchvision's give after the same change: blocks, norms, activations, filters, heads."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn
from torch.ao.quantization import fuse_modules
from torch.nn.utils import fusion, parametrizations, parametrize, prune
from torch.testing import assert_close
from torchvision.models import detection, resnet, segmentation
from torchvision.models.detection.backbone_utils import BackboneWithFPN, _resnet_fpn_extractor
from torchvision.ops.misc import FrozenBatchNorm2d
from twins import CL, assert_agree, assert_train_alike, gradients, images, shake, twins, wide

import resnet_fast
from resnet_fast.testing.rule import assert_rule

X = images(3, 40)


class Doubling(nn.Module):
    def forward(self, w: torch.Tensor) -> torch.Tensor:
        return w * 2


class Standardised(nn.Conv2d):
    """Weight standardisation, as many write it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / (
            self.weight.std((1, 2, 3), keepdim=True) + 1e-5
        )
        return self._conv_forward(x, w, self.bias)


class Viewing(nn.Module):
    """User code inside the network that relies on NCHW strides."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(x)
        return x.view(x.shape[0], -1).view(x.shape)


class Norm(nn.BatchNorm2d):
    """A batch norm of the user's own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


def at(block: nn.Module, name: str, change) -> None:
    setattr(block, name, change(getattr(block, name)))


def _replace_conv(block: nn.Module, name: str, new: nn.Conv2d) -> None:
    torch.manual_seed(4)
    nn.init.normal_(new.weight, std=0.05)
    setattr(block, name, new)


def _delete(m: nn.Module, name: str) -> None:
    value = getattr(m, name).detach().clone()
    delattr(m, name)
    setattr(m, name, value)


def _prune(model: nn.Module, remove: bool) -> None:
    for m in (
        model.conv1,
        model.layer1[0].conv1,
        model.layer2[0].downsample[0],
        model.layer3[0].conv2,
    ):
        prune.l1_unstructured(m, "weight", 0.3)
        if remove:
            prune.remove(m, "weight")


def _spectral(model: nn.Module) -> None:
    torch.manual_seed(5)
    parametrizations.spectral_norm(model.layer2[1].conv2)


def _sync(model: nn.Module) -> None:
    for name, child in nn.SyncBatchNorm.convert_sync_batchnorm(model).named_children():
        setattr(model, name, child)


def _patched_forward(m: nn.Module) -> None:
    original = m.forward
    m.forward = lambda *args: original(*args) * 1.5


BLOCK = "layer2", 1  # a Bottleneck without projection; its neighbour 0 has one
CHANGES = {
    "ReLU to GELU": lambda m: at(m.layer2[1], "relu", lambda r: nn.GELU()),
    "ReLU to Identity": lambda m: at(m.layer2[1], "relu", lambda r: nn.Identity()),
    "ReLU to ReLU6": lambda m: at(m.layer2[1], "relu", lambda r: nn.ReLU6()),
    "stem ReLU to Identity": lambda m: at(m, "relu", lambda r: nn.Identity()),
    "stem ReLU to SiLU": lambda m: at(m, "relu", lambda r: nn.SiLU()),
    "ReLU not in place": lambda m: at(m.layer2[1], "relu", lambda r: nn.ReLU()),
    "norm to Identity": lambda m: at(m.layer2[1], "bn2", lambda b: nn.Identity()),
    "stem norm to Identity": lambda m: at(m, "bn1", lambda b: nn.Identity()),
    "projection norm to Identity": lambda m: m.layer2[0].downsample.__setitem__(1, nn.Identity()),
    "norm to GroupNorm": lambda m: at(
        m.layer2[1], "bn2", lambda b: nn.GroupNorm(4, b.num_features)
    ),
    "norm of their own": lambda m: at(m.layer2[1], "bn2", lambda b: Norm(b.num_features)),
    "norm without affine": lambda m: at(
        m.layer2[1], "bn2", lambda b: nn.BatchNorm2d(b.num_features, affine=False)
    ),
    "one frozen norm": lambda m: at(
        m.layer2[1], "bn2", lambda b: FrozenBatchNorm2d(b.num_features, eps=0.3)
    ),
    "norm and ReLU swapped": lambda m: (
        setattr(m.layer2[1], "bn2", nn.ReLU()),
        setattr(m.layer2[1], "relu", nn.Sequential()),
    ),
    "norm removed and bias added": lambda m: (
        at(m.layer2[1], "bn2", lambda b: nn.Identity()),
        _replace_conv(m.layer2[1], "conv2", nn.Conv2d(32, 32, 3, padding=1)),
    ),
    "convolution to Identity": lambda m: at(m.layer2[1], "conv2", lambda c: nn.Identity()),
    "convolution in a Sequential": lambda m: at(m.layer2[1], "conv2", lambda c: nn.Sequential(c)),
    "convolution with bias": lambda m: _replace_conv(
        m.layer2[1], "conv2", nn.Conv2d(32, 32, 3, padding=1)
    ),
    "convolution of their own": lambda m: _replace_conv(
        m.layer2[1], "conv2", Standardised(32, 32, 3, padding=1, bias=False)
    ),
    "reflecting padding": lambda m: _replace_conv(
        m.layer2[1], "conv2", nn.Conv2d(32, 32, 3, padding=1, padding_mode="reflect", bias=False)
    ),
    "padding 'same'": lambda m: _replace_conv(
        m.layer2[1], "conv2", nn.Conv2d(32, 32, 3, padding="same", bias=False)
    ),
    "5×3, dilated, grouped": lambda m: _replace_conv(
        m.layer2[1],
        "conv2",
        nn.Conv2d(32, 32, (5, 3), padding=(4, 2), dilation=2, groups=4, bias=False),
    ),
    "projection of three": lambda m: at(
        m.layer2[0], "downsample", lambda d: nn.Sequential(nn.AvgPool2d(1), *d)
    ),
    "projection with bias": lambda m: _replace_conv(
        m.layer2[0].downsample, "0", nn.Conv2d(256, 512, 1, 2)
    ),
    "small-image stem": lambda m: (
        _replace_conv(m, "conv1", nn.Conv2d(3, 64, 3, padding=1, bias=False)),
        at(m, "maxpool", lambda p: nn.Identity()),
    ),
    "headless": lambda m: at(m, "fc", lambda f: nn.Identity()),
    "no pooling": lambda m: (
        at(m, "avgpool", lambda p: nn.Identity()),
        at(m, "fc", lambda f: nn.Identity()),
    ),
    "views in the pool": lambda m: at(m, "avgpool", Viewing),
    "views in a stage": lambda m: at(m, "layer3", Viewing),
    "views in a block": lambda m: at(m.layer2, "1", Viewing),
    "views in the projection": lambda m: at(m.layer2[0], "downsample", Viewing),
    "dropout in the head": lambda m: at(m, "fc", lambda f: nn.Sequential(nn.Dropout(0.0), f)),
    "pruned": lambda m: _prune(m, remove=False),
    "pruned for good": lambda m: _prune(m, remove=True),
    "pruned norm": lambda m: prune.random_unstructured(m.layer2[1].bn2, "weight", 0.0),
    "parametrised": lambda m: parametrize.register_parametrization(
        m.layer2[1].conv2, "weight", Doubling()
    ),
    "parametrised norm": lambda m: parametrize.register_parametrization(
        m.layer2[1].bn2, "weight", Doubling()
    ),
    "weight norm": lambda m: parametrizations.weight_norm(m.layer2[1].conv2),
    "spectral norm": _spectral,
    "deleted weight": lambda m: _delete(m.layer2[1].conv2, "weight"),
    "deleted norm weight": lambda m: _delete(m.layer2[1].bn2, "weight"),
    "deleted norm bias": lambda m: _delete(m.bn1, "bias"),
    "patched convolution": lambda m: _patched_forward(m.layer2[1].conv2),
    "patched block": lambda m: _patched_forward(m.layer2[1]),
    "patched projection": lambda m: _patched_forward(m.layer2[0].downsample),
    "dilated by hand": lambda m: (
        setattr(m.layer3[0].conv2, "stride", (1, 1)),
        setattr(m.layer3[0].downsample[0], "stride", (1, 1)),
        setattr(m.layer4[0].conv2, "dilation", (2, 2)),
        setattr(m.layer4[0].conv2, "padding", (2, 2)),
    ),
    "extra child": lambda m: m.layer2[1].add_module("se", nn.Linear(3, 3).requires_grad_(False)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_models(change) -> None:
    """Results in float32 by the error rule, from a model that was packed before; training's gradients in float64."""
    ours, theirs = twins()
    exact, ours64, theirs64 = wide(theirs), wide(ours), wide(theirs)
    with torch.no_grad():
        ours(X)
    for model in (ours, theirs, exact, ours64, theirs64):
        dtype = model.conv1.weight.dtype
        torch.manual_seed(6)
        CHANGES[change](model)
        model.to(dtype).eval()
    with torch.no_grad():
        got, eager, oracle = ours(X), theirs(X), exact(X.double())
    assert got.stride() == eager.stride()
    assert_rule(got, eager, oracle, what=change)
    found = [gradients(model.train(), X.double()) for model in (ours64, theirs64)]
    assert_close(*found, rtol=1e-8, atol=1e-8)


def test_fused_by_the_quantisation_tools() -> None:
    """fuse_modules leaves ConvReLU2d, Identity, Identity; fuse_conv_bn_eval a convolution with bias."""
    ours, theirs = twins()
    triples = [["conv1", "bn1", "relu"], ["layer2.1.conv1", "bn1".join(["layer2.1.", ""])]]
    assert_agree(fuse_modules(ours, triples), fuse_modules(theirs, triples), X)
    ours, theirs = twins()
    for model in (ours, theirs):
        block = model.layer3[0]
        block.conv2, block.bn2 = fusion.fuse_conv_bn_eval(block.conv2, block.bn2), nn.Identity()
    assert_agree(ours, theirs, X)


def test_sync_batch_norm() -> None:
    """Conversion keeps state and answers; in eval it still fuses."""
    ours, theirs = (nn.SyncBatchNorm.convert_sync_batchnorm(m) for m in twins())
    assert_agree(ours, theirs, X)
    assert (
        sum(isinstance(m, nn.SyncBatchNorm) for m in ours.modules())
        == sum(isinstance(m, nn.SyncBatchNorm) for m in theirs.modules())
        > 5
    )
    from resnet_fast.models.blocks import why_plain_block

    assert why_plain_block(ours.layer2[1], torch.randn(2, 512, 4, 4)) is None
    assert "SyncBatchNorm in training" in why_plain_block(
        ours.train().layer2[1], torch.randn(2, 512, 4, 4)
    )


# ---------------------------------------------------------------- subclasses


def _attention(base: type) -> type:
    class Attentive(base):
        """A block with a squeeze-and-excitation of its own and its own forward."""

        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            self.squeeze = nn.Conv2d(self.bn3.num_features, self.bn3.num_features, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            identity = x if self.downsample is None else self.downsample(x)
            out = self.relu(self.bn1(self.conv1(x)))
            out = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(out)))))
            n, c = out.shape[:2]
            gate = torch.sigmoid(self.squeeze(out.view(n, c, -1).mean(2).view(n, c, 1, 1)))
            return self.relu(out * gate + identity)

    return Attentive


def _narrow(base: type) -> type:
    class Narrow(base):
        expansion = 2

        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            self.extra = nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * self.extra

    return Narrow


@pytest.mark.parametrize("make", (_attention, _narrow))
def test_subclassed_blocks(make) -> None:
    pair = []
    for module in (resnet_fast, resnet):
        torch.manual_seed(0)
        pair.append(
            shake(
                module.ResNet(make(module.Bottleneck), [1, 2, 1, 1], 10, width_per_group=16)
            ).eval()
        )
    pair[1].load_state_dict(pair[0].state_dict())
    assert_agree(*pair, X)
    assert_train_alike(pair[0].train(), pair[1].train(), X)


def test_subclassed_models() -> None:
    """Own stages, own ``_forward_impl``, super() calls, and a torchvision block in our ResNet."""

    def build(module) -> nn.Module:
        class Two(module.ResNet):
            def __init__(self) -> None:
                super().__init__(module.BasicBlock, [1, 1, 1, 1], 10)
                self.layer5 = self._make_layer(module.BasicBlock, 32, 2, stride=2)
                self.fc = nn.Linear(32, 10)

            def _forward_impl(self, x: torch.Tensor) -> torch.Tensor:
                x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
                x = self.layer5(self.layer4(self.layer3(self.layer2(self.layer1(x)))))
                return self.fc(x.view(x.shape[0], x.shape[1], -1).mean(2))

        class Scaled(Two):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return super().forward(x * 2)

        torch.manual_seed(0)
        return shake(Scaled()).eval()

    ours, theirs = build(resnet_fast), build(resnet)
    assert_agree(ours, theirs, X)
    mixed = [
        shake(module.ResNet(resnet.BasicBlock, [1, 1, 1, 1], 10)).eval()
        for module in (resnet_fast, resnet)
    ]
    mixed[1].load_state_dict(mixed[0].state_dict())
    assert_agree(*mixed, X)
    assert_agree(*mixed, X.contiguous(memory_format=CL))


# ---------------------------------------------------------------- heads on top


def test_fpn_backbone_with_frozen_norms() -> None:
    """Detection's backbone: FrozenBatchNorm2d, some stages frozen, IntermediateLayerGetter inside."""
    outs = []
    for model in twins("resnet18", norm_layer=FrozenBatchNorm2d):
        torch.manual_seed(3)
        backbone = _resnet_fpn_extractor(model, 3)
        assert isinstance(backbone, BackboneWithFPN)
        features = backbone.double()(X.double())
        sum(f.sum() for f in features.values()).backward()
        outs.append(
            {
                **features,
                **{n: p.grad for n, p in backbone.named_parameters() if p.grad is not None},
            }
        )
    assert_close(*outs, rtol=1e-8, atol=1e-8)


def test_faster_rcnn() -> None:
    outs = []
    for model in twins("resnet18", norm_layer=FrozenBatchNorm2d):
        torch.manual_seed(3)
        net = detection.FasterRCNN(
            _resnet_fpn_extractor(model, 5),
            num_classes=3,
            min_size=64,
            max_size=96,
            box_score_thresh=0.0,
        ).double()
        losses = net.train()(
            list(images(1, 64, torch.float64)),
            [
                {
                    "boxes": torch.tensor([[4.0, 4.0, 40.0, 50.0]]).double(),
                    "labels": torch.tensor([1]),
                }
            ],
        )
        outs.append(
            [losses["loss_classifier"], net.eval()(list(images(1, 64, torch.float64)))[0]["boxes"]]
        )
    assert_close(*outs, rtol=1e-6, atol=1e-6)


def test_segmentation_heads() -> None:
    outs = []
    for model in twins("resnet50", replace_stride_with_dilation=[False, True, True]):
        torch.manual_seed(3)
        net = segmentation.fcn._fcn_resnet(model, num_classes=3, aux=True).eval()
        with torch.no_grad():
            outs.append(net(images(1, 33)))
    assert_close(*outs, rtol=1e-4, atol=1e-4)


def test_other_wrappers() -> None:
    """DataParallel without a GPU, a linear probe, a model inside another, torchvision's own model beside ours."""
    ours, theirs = twins()
    assert_agree(nn.DataParallel(ours), nn.DataParallel(theirs), X)
    for model in (ours, theirs):
        model.requires_grad_(False)
        model.fc.requires_grad_(True)
        model(X).sum().backward()
    assert_close(ours.fc.weight.grad, theirs.fc.weight.grad, rtol=1e-4, atol=1e-4)
    assert type(torchvision.models.resnet18(num_classes=2).layer1[0]) is resnet.BasicBlock
