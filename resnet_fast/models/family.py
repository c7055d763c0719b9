"""The ResNet family as data: one ``ModelSpec`` row for each architecture, and torchvision's constructors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .blocks import BasicBlock, Bottleneck
from .resnet import ResNet


@dataclass(frozen=True)
class ModelSpec:
    """One architecture: its block, blocks per stage, and the Bottleneck's groups and width.

    ``title`` names torchvision's weights enum.
    """

    name: str
    title: str
    block: type[BasicBlock | Bottleneck]
    layers: tuple[int, int, int, int]
    groups: int = 1
    width_per_group: int = 64


_ROWS = (
    # ResNet: He et al. 2016, Deep Residual Learning for Image Recognition, https://arxiv.org/abs/1512.03385
    ModelSpec("resnet18", "ResNet18", BasicBlock, (2, 2, 2, 2)),
    # ResNet: https://arxiv.org/abs/1512.03385
    ModelSpec("resnet34", "ResNet34", BasicBlock, (3, 4, 6, 3)),
    # ResNet: https://arxiv.org/abs/1512.03385
    ModelSpec("resnet50", "ResNet50", Bottleneck, (3, 4, 6, 3)),
    # ResNet: https://arxiv.org/abs/1512.03385
    ModelSpec("resnet101", "ResNet101", Bottleneck, (3, 4, 23, 3)),
    # ResNet: https://arxiv.org/abs/1512.03385
    ModelSpec("resnet152", "ResNet152", Bottleneck, (3, 8, 36, 3)),
    # ResNeXt: Xie et al. 2017, Aggregated Residual Transformations, https://arxiv.org/abs/1611.05431
    ModelSpec(
        "resnext50_32x4d", "ResNeXt50_32X4D", Bottleneck, (3, 4, 6, 3), groups=32, width_per_group=4
    ),
    # ResNeXt: https://arxiv.org/abs/1611.05431
    ModelSpec(
        "resnext101_32x8d",
        "ResNeXt101_32X8D",
        Bottleneck,
        (3, 4, 23, 3),
        groups=32,
        width_per_group=8,
    ),
    # ResNeXt: https://arxiv.org/abs/1611.05431
    ModelSpec(
        "resnext101_64x4d",
        "ResNeXt101_64X4D",
        Bottleneck,
        (3, 4, 23, 3),
        groups=64,
        width_per_group=4,
    ),
    # Wide ResNet: Zagoruyko and Komodakis 2016, Wide Residual Networks, https://arxiv.org/abs/1605.07146
    ModelSpec("wide_resnet50_2", "Wide_ResNet50_2", Bottleneck, (3, 4, 6, 3), width_per_group=128),
    # Wide ResNet: https://arxiv.org/abs/1605.07146
    ModelSpec(
        "wide_resnet101_2", "Wide_ResNet101_2", Bottleneck, (3, 4, 23, 3), width_per_group=128
    ),
)
MODELS = {row.name: row for row in _ROWS}


def create_model(name: str, *, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
    """The named architecture, with torchvision's arguments; ``list_models()`` lists the names.

    ``weights``: None, or an entry of torchvision's enum for this model or its name ("IMAGENET1K_V2", "DEFAULT"),
    downloaded through torchvision. ``progress``: show that download. The other arguments go to :class:`ResNet`. Raises
    ValueError for an unknown name or contradicting ``num_classes``, OSError for weights that cannot be fetched.
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
            raise ValueError(
                f"{name}: {key}: got {kwargs[key]}, expected {value}, which makes it a {name}"
            )
    model = ResNet(spec.block, list(spec.layers), **kwargs)
    if weights is not None:
        model.load_state_dict(_fetched(weights, progress))
    return model


def _verify_weights(spec: ModelSpec, weights: Any) -> Any:
    try:
        from torchvision.models import get_model_weights
    except ImportError as error:
        raise ImportError(
            f"{spec.name}: weights come through torchvision: pip install 'resnet_fast[vision]'"
        ) from error
    entries = get_model_weights(spec.name)
    if (
        isinstance(weights, str)
        and weights.removeprefix(f"{entries.__name__}.") not in entries.__members__
    ):
        raise ValueError(
            f"{spec.name}: weights: got {weights!r}, expected one of {', '.join(entries.__members__)}, or None "
            "(a file of yours: resnet_fast.load_checkpoint)"
        )
    return entries.verify(weights)


def _fetched(weights: Any, progress: bool) -> dict[str, Tensor]:
    try:
        state_dict: dict[str, Tensor] = weights.get_state_dict(progress=progress, check_hash=True)
        return state_dict
    except OSError as error:  # no network, no space
        folder = Path(torch.hub.get_dir(), "checkpoints")
        raise OSError(
            f"{weights}: {weights.url} could not be fetched ({error}): put that file into {folder}, or build the model "
            "without weights and give a file of yours to resnet_fast.load_checkpoint"
        ) from error


def list_models() -> list[str]:
    """The architectures that ``create_model`` knows."""
    return list(MODELS)


def _builder(name: str) -> Callable[..., ResNet]:
    def build(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> ResNet:
        return create_model(name, weights=weights, progress=progress, **kwargs)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = (
        f"{MODELS[name].title} with torchvision's signature: "
        "see :func:`create_model`, of which this is one name."
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
