"""The ResNet family: topology as data (one ModelSpec row for each architecture), one ResNet class, torchvision's names and signatures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..live.eligibility import conv_bn_act, is_frozen_bn, why_misplaced, why_plain
from ..live.network_pass import at_once, unseen
from .blocks import BasicBlock, Bottleneck, conv1x1


@dataclass(frozen=True)
class ModelSpec:
    """One architecture: its block, blocks per stage, and the Bottleneck's groups and width. ``title`` names the weights enum."""

    name: str
    title: str
    block: type[nn.Module]
    layers: tuple[int, int, int, int]
    groups: int = 1
    width_per_group: int = 64


MODELS = {
    spec.name: spec
    for spec in (
        ModelSpec("resnet18", "ResNet18", BasicBlock, (2, 2, 2, 2)),
        ModelSpec("resnet34", "ResNet34", BasicBlock, (3, 4, 6, 3)),
        ModelSpec("resnet50", "ResNet50", Bottleneck, (3, 4, 6, 3)),
        ModelSpec("resnet101", "ResNet101", Bottleneck, (3, 4, 23, 3)),
        ModelSpec("resnet152", "ResNet152", Bottleneck, (3, 8, 36, 3)),
        ModelSpec("resnext50_32x4d", "ResNeXt50_32X4D", Bottleneck, (3, 4, 6, 3), groups=32, width_per_group=4),
        ModelSpec("resnext101_32x8d", "ResNeXt101_32X8D", Bottleneck, (3, 4, 23, 3), groups=32, width_per_group=8),
        ModelSpec("resnext101_64x4d", "ResNeXt101_64X4D", Bottleneck, (3, 4, 23, 3), groups=64, width_per_group=4),
        ModelSpec("wide_resnet50_2", "Wide_ResNet50_2", Bottleneck, (3, 4, 6, 3), width_per_group=128),
        ModelSpec("wide_resnet101_2", "Wide_ResNet101_2", Bottleneck, (3, 4, 23, 3), width_per_group=128),
    )
}


class ResNet(nn.Module):
    """A residual network with torchvision's constructor, child names, initialisation and answers; forward is fused where it may be.

    x: [N, 3, H, W], any floating dtype and strides → logits [N, num_classes]. Inside an unhooked forward activations are NHWC; what a user
    can see (hooks, children called one by one) keeps torchvision's strides. Raises RuntimeError for a wrong number of channels, rank,
    dtype or device, ValueError for a bad ``replace_stride_with_dilation``. Source: He et al. 2016; torchvision.models.resnet.
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        layers: list[int],
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation: list[bool] | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self._norm_layer = norm_layer or nn.BatchNorm2d
        self.inplanes = 64
        self.dilation = 1
        if replace_stride_with_dilation is None:
            replace_stride_with_dilation = [False, False, False]
        if len(replace_stride_with_dilation) != 3:
            raise ValueError(
                f"replace_stride_with_dilation should be None or a 3-element tuple, got {replace_stride_with_dilation}"
            )
        self.groups = groups
        self.base_width = width_per_group
        self.conv1 = nn.Conv2d(3, self.inplanes, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = self._norm_layer(self.inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = self._make_layer(block, 64, layers[0])
        self.layer2 = self._make_layer(block, 128, layers[1], stride=2, dilate=replace_stride_with_dilation[0])
        self.layer3 = self._make_layer(block, 256, layers[2], stride=2, dilate=replace_stride_with_dilation[1])
        self.layer4 = self._make_layer(block, 512, layers[3], stride=2, dilate=replace_stride_with_dilation[2])
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        self._initialise(zero_init_residual)

    def _initialise(self, zero_init_residual: bool) -> None:
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(m, (nn.BatchNorm2d, nn.GroupNorm)):
                nn.init.constant_(m.weight, 1)
                nn.init.constant_(m.bias, 0)
        # Zero γ in each block's last norm makes every block start as the identity: +0.2–0.3 % (Goyal et al. 2017).
        if zero_init_residual:
            for m in self.modules():
                if isinstance(m, Bottleneck) and m.bn3.weight is not None:
                    nn.init.constant_(m.bn3.weight, 0)
                elif isinstance(m, BasicBlock) and m.bn2.weight is not None:
                    nn.init.constant_(m.bn2.weight, 0)

    def _make_layer(
        self, block: type[BasicBlock | Bottleneck], planes: int, blocks: int, stride: int = 1, dilate: bool = False
    ) -> nn.Sequential:
        norm_layer = self._norm_layer
        downsample = None
        previous_dilation = self.dilation
        if dilate:
            self.dilation *= stride
            stride = 1
        if stride != 1 or self.inplanes != planes * block.expansion:
            downsample = nn.Sequential(
                conv1x1(self.inplanes, planes * block.expansion, stride), norm_layer(planes * block.expansion)
            )
        layers = [
            block(
                self.inplanes, planes, stride, downsample, self.groups, self.base_width, previous_dilation, norm_layer
            )
        ]
        self.inplanes = planes * block.expansion
        for _ in range(1, blocks):
            layers.append(
                block(
                    self.inplanes,
                    planes,
                    groups=self.groups,
                    base_width=self.base_width,
                    dilation=self.dilation,
                    norm_layer=norm_layer,
                )
            )
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self._forward_impl(x)

    def _forward_impl(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if why_plain(x, ()) is None:
                return at_once(self, self._steps, x, _unseen)
        return self._steps(x)

    def _steps(self, x: Tensor) -> Tensor:
        fused = False
        if not torch.jit.is_scripting():
            stem = {"conv": self.conv1, "bn": self.bn1, "relu": self.relu}
            fused = why_plain(x, stem.values()) is None and why_misplaced(stem.items()) is None
            if fused:
                x = self._stem(x)
        if not fused:
            x = self.conv1(x)
            x = self.bn1(x)
            x = self.relu(x)
        x = self.maxpool(x)

        x = self.layer1(x)
        x = self.layer2(x)
        x = self.layer3(x)
        x = self.layer4(x)

        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        x = self.fc(x)

        return x

    @torch.jit.unused
    def _stem(self, x: Tensor) -> Tensor:
        """conv1 + bn1 + ReLU in one step, in NHWC from here on if nobody inside the network can see the strides."""
        nchw = x.dim() == 4 and not x.is_contiguous(memory_format=torch.channels_last)
        if nchw and not any(map(_sees_strides, self._modules.values())):
            if (
                x.requires_grad
            ):  # through a flat view, so that its gradient is contiguous, as in NCHW: callers ``view`` it
                x = x.reshape(-1).view(x.shape)
            x = x.contiguous(memory_format=torch.channels_last)
        return conv_bn_act(self.conv1, self.bn1, x, act="relu")


_STRIDE_BLIND = {
    BasicBlock,
    Bottleneck,
    nn.Sequential,
    nn.Conv2d,
    nn.BatchNorm2d,
    nn.SyncBatchNorm,
    nn.ReLU,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.Identity,
    nn.Dropout,
    nn.Linear,
}


def _unseen(owner: ResNet) -> list[nn.Module] | None:
    """The modules inside, if no user code looks into their inference."""
    inside = unseen(owner)
    blind = inside is not None and all(
        type(m) in _STRIDE_BLIND and "forward" not in m.__dict__ or is_frozen_bn(m) for m in inside
    )
    return inside if blind else None


def _sees_strides(m: nn.Module | None) -> bool:
    """Whether user code runs in or under ``m``: a hook, a module of another class, a forward of its own (``modules()`` is slower)."""
    if m is None:
        return False
    return bool(
        m._forward_hooks
        or m._forward_pre_hooks
        or m._backward_hooks
        or m._backward_pre_hooks
        or "forward" in m.__dict__
        or type(m) not in _STRIDE_BLIND
        and not is_frozen_bn(m)
        or any(map(_sees_strides, m._modules.values()))
    )


def create_model(name: str, *, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """The named architecture, with torchvision's arguments; ``list_models()`` lists the names.

    ``weights``: None, or an entry of torchvision's enum for this model or its name ("IMAGENET1K_V2", "DEFAULT"),
    downloaded through torchvision;
    ``progress``: show that download; the rest goes to :class:`ResNet`. Raises ValueError for an unknown name or
    contradicting ``num_classes``, OSError for weights that cannot be fetched.
    """
    if name not in MODELS:
        raise ValueError(f"create_model: got {name!r}, expected one of {', '.join(MODELS)}")
    spec = MODELS[name]
    if weights is not None:
        weights = _verify_weights(spec, weights)
        classes = len(weights.meta["categories"])
        if kwargs.setdefault("num_classes", classes) != classes:
            raise ValueError(
                f"{name}: num_classes: got {kwargs['num_classes']}, expected {classes} (that of {weights})"
            )
    for key in ("groups", "width_per_group"):
        value = getattr(spec, key)
        if value != getattr(ModelSpec, key) and kwargs.setdefault(key, value) != value:
            raise ValueError(f"{name}: {key}: got {kwargs[key]}, expected {value}, which makes it a {name}")
    model = ResNet(spec.block, list(spec.layers), **kwargs)
    if weights is not None:
        model.load_state_dict(_fetched(weights, progress))
    return model


def _verify_weights(spec: ModelSpec, weights: Any):
    try:
        from torchvision.models import get_model_weights
    except ImportError as error:
        raise ImportError(
            f"{spec.name}: weights come through torchvision: pip install 'resnet_fast[vision]'"
        ) from error
    entries = get_model_weights(spec.name)
    if isinstance(weights, str) and weights.removeprefix(f"{entries.__name__}.") not in entries.__members__:
        raise ValueError(
            f"{spec.name}: weights: got {weights!r}, expected one of {', '.join(entries.__members__)}, or None "
            "(a file of yours: resnet_fast.load_checkpoint)"
        )
    return entries.verify(weights)


def _fetched(weights: Any, progress: bool) -> dict[str, Tensor]:
    try:
        return weights.get_state_dict(progress=progress, check_hash=True)
    except OSError as error:  # no network, no space
        folder = Path(torch.hub.get_dir(), "checkpoints")
        raise OSError(
            f"{weights}: {weights.url} could not be fetched ({error}): put that file into {folder}, or build the model without "
            "weights and give a file of yours to resnet_fast.load_checkpoint"
        ) from error


def list_models() -> list[str]:
    """The architectures that ``create_model`` knows."""
    return list(MODELS)


def _builder(name: str) -> Callable[..., ResNet]:
    def build(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
        return create_model(name, weights=weights, progress=progress, **kwargs)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = (
        f"{MODELS[name].title} with torchvision's signature: see :func:`create_model`, of which this is one name."
    )
    return build


resnet18 = _builder("resnet18")
resnet34 = _builder("resnet34")
resnet50 = _builder("resnet50")
resnet101 = _builder("resnet101")
resnet152 = _builder("resnet152")
resnext50_32x4d = _builder("resnext50_32x4d")
resnext101_32x8d = _builder("resnext101_32x8d")
resnext101_64x4d = _builder("resnext101_64x4d")
wide_resnet50_2 = _builder("wide_resnet50_2")
wide_resnet101_2 = _builder("wide_resnet101_2")
