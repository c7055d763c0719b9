"""The problems of an architecture: every convolution, and every group that an op across convolutions can replace."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import nn

from ..dispatch.problem import Problem
from .family import create_model

STAGES = ("layer1", "layer2", "layer3", "layer4")


@dataclass(frozen=True)
class ConvLayer:
    """One fused convolution of a network: its module path and its problem."""

    name: str
    problem: Problem


class _Layers:
    """The convolutions of one network, in the order in which they are added."""

    def __init__(self, **shared: Any) -> None:
        self.shared = shared
        self.found: list[ConvLayer] = []

    def add(
        self, name: str, conv: nn.Conv2d, x: tuple[int, ...], act: str, residual: str | None = None
    ) -> tuple[int, ...]:
        """Add a convolution of that input and return its output's shape."""
        # Any: torch's stubs do not say that these are pairs of int.
        geometry: dict[str, Any] = {
            "stride": conv.stride,
            "padding": conv.padding,
            "dilation": conv.dilation,
        }
        problem = Problem(
            x=x,
            weight=tuple(conv.weight.shape),
            **geometry,
            groups=conv.groups,
            act=act,
            residual=residual,
            **self.shared,
        )
        self.found.append(ConvLayer(name, problem))
        return x[0], conv.out_channels, *problem.out_hw

    def add_block(self, name: str, block: Any, x: tuple[int, ...]) -> tuple[int, ...]:
        """Add a BasicBlock's or Bottleneck's convolutions, the projection before the last; returns the output shape."""
        start = x
        *first, last = (key for key in ("conv1", "conv2", "conv3") if hasattr(block, key))
        for key in first:
            x = self.add(f"{name}.{key}", getattr(block, key), x, "relu")
        if block.downsample is not None:
            self.add(f"{name}.downsample.0", block.downsample[0], start, "none")
        return self.add(f"{name}.{last}", getattr(block, last), x, "relu", residual="nhwc")


def conv_layers(
    model: str,
    batch: int,
    size: int = 224,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    capability: tuple[int, int] | None = None,
) -> list[ConvLayer]:
    """The fused convolutions of ``model`` at [batch, 3, size, size] in NHWC, in the order in which they run.

    A block's projection comes before its last convolution.
    """
    with torch.device("meta"):
        net = create_model(model)
    layers = _Layers(
        op="conv_bn_act", device=device, dtype=dtype, layout="nhwc", bn=True, capability=capability
    )
    x = layers.add("conv1", net.conv1, (batch, 3, size, size), "relu")
    x = (*x[:2], *((s + 1) // 2 for s in x[2:]))  # the 3×3 max pool of stride 2
    for stage in STAGES:
        for i, block in enumerate(getattr(net, stage)):
            x = layers.add_block(f"{stage}.{i}", block, x)
    return layers.found


@dataclass(frozen=True)
class AcrossLayer:
    """One call of an op across convolutions. ``names`` and ``members``: the convolutions it replaces, its own first."""

    names: tuple[str, ...]
    problem: Problem
    members: tuple[Problem, ...]

    @property
    def name(self) -> str:
        return self.names[0]


class _Groups:
    """The groups of one network, in the order in which they are added."""

    def __init__(self, layers: list[ConvLayer]) -> None:
        self.problems = {layer.name: layer.problem for layer in layers}
        self.found: list[AcrossLayer] = []

    def add(self, op: str, *names: str, **facts: Any) -> None:
        """Add one group of those of these convolutions that the network has."""
        members = {name: self.problems[name] for name in names if name in self.problems}
        problem = replace(self.problems[names[0]], op=op, bn=False, **facts)
        self.found.append(AcrossLayer(tuple(members), problem, tuple(members.values())))

    def add_bottleneck(self, block: str, following: str | None) -> None:
        """Add the groups that begin in one Bottleneck; ``following``: the block after it."""
        problems = self.problems
        last, projection = problems[f"{block}.conv3"], problems.get(f"{block}.downsample.0")
        second, first = problems[f"{block}.conv2"], problems.get(f"{following}.conv1")
        if projection is not None:
            facts = {
                "chain": (projection.weight,),
                "stride": projection.stride,
                "second": projection.x[2:],
            }
            self.add("pointwise_pair", f"{block}.conv3", f"{block}.downsample.0", **facts)
        if first is None:
            self.add("pointwise_pool", f"{block}.conv3")
        elif second.groups == 1 and second.stride == (1, 1):
            chain = last.weight, projection.weight if projection is not None else (), first.weight
            names = (
                *(f"{block}.{name}" for name in ("conv2", "conv3", "downsample.0")),
                f"{following}.conv1",
            )
            self.add("conv_tail", *names, chain=chain, residual="nhwc")


def across_layers(layers: list[ConvLayer]) -> list[AcrossLayer]:
    """The groups of a network that each op across convolutions can replace; ``plan`` finds the same."""
    groups = _Groups(layers)
    blocks = list(
        dict.fromkeys(name.rpartition(".")[0] for name in groups.problems if name.count(".") == 2)
    )
    groups.add("conv_pool", "conv1")
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        if f"{block}.conv3" in groups.problems:
            groups.add_bottleneck(block, following)
    return groups.found


Layer = TypeVar("Layer", ConvLayer, AcrossLayer)


def distinct(layers: list[Layer]) -> list[Layer]:
    """The first layer (or group) of each distinct problem. ResNet-50 at one size has 23 distinct convolutions."""
    first: dict[Problem, Layer] = {}
    for layer in layers:
        first.setdefault(layer.problem, layer)
    return list(first.values())


def model_problems(
    model: str = "resnet50",
    batch: int = 2,
    size: int = 224,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    capability: tuple[int, int] | None = None,
    op: str = "conv_bn_act",
) -> list[Problem]:
    """Every distinct convolution of a model, or group of convolutions that ``op`` could take."""
    single = conv_layers(model, batch, size, dtype, device, capability)
    if op == "conv_bn_act":
        return [layer.problem for layer in distinct(single)]
    groups = [group for group in across_layers(single) if group.problem.op == op]
    return [group.problem for group in distinct(groups)]


# What training adds to a network's convolutions: batch norm by itself, the residual add, and their derivatives.
TRAINING = ("bn_act", "bn_act_backward", "add_act", "add_act_backward")


def problem_after(conv: Problem, op: str) -> Problem | None:
    """Return the problem of a training op after a convolution, None for a residual add where nothing is added."""
    if op.startswith("add_act") and not conv.residual:
        return None
    assert conv.weight is not None  # a convolution has a filter
    return Problem(
        op,
        conv.device,
        conv.dtype,
        (conv.x[0], conv.weight[0], *conv.out_hw),
        "nhwc",
        residual=conv.residual,
        act=conv.act,
        capability=conv.capability,
    )
