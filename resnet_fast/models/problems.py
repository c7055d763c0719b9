"""Every convolution of an architecture as a Problem: what roofline, test grids, benchmarks and ``explain --model-gpu`` speak of."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..dispatch.problem import Problem
from .family import create_model


@dataclass(frozen=True)
class Layer:
    """One fused convolution of a network: its module path and its problem."""

    name: str
    problem: Problem


def layers(
    model: str,
    batch: int,
    size: int = 224,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    capability: tuple[int, int] | None = None,
) -> list[Layer]:
    """The fused convolutions of ``model`` at [batch, 3, size, size] in NHWC, in the order in which they run.

    A block's projection comes before its last convolution.
    """
    with torch.device("meta"):
        net = create_model(model)
    shared = {
        "op": "conv_bn_act",
        "device": device,
        "dtype": dtype,
        "layout": "nhwc",
        "bn": True,
        "capability": capability,
    }
    found: list[Layer] = []

    def add(name: str, conv: nn.Conv2d, x: tuple[int, ...], act: str, residual: str | None = None) -> tuple[int, ...]:
        problem = Problem(
            x=x,
            weight=tuple(conv.weight.shape),
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=conv.groups,
            act=act,
            residual=residual,
            **shared,
        )
        found.append(Layer(name, problem))
        return x[0], conv.out_channels, *problem.out_hw

    x = add("conv1", net.conv1, (batch, 3, size, size), "relu")
    x = (*x[:2], *((s + 1) // 2 for s in x[2:]))  # the 3×3 max pool of stride 2
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        for i, block in enumerate(getattr(net, stage)):
            name, start = f"{stage}.{i}", x
            convs = [key for key in ("conv1", "conv2", "conv3") if hasattr(block, key)]
            for key in convs[:-1]:
                x = add(f"{name}.{key}", getattr(block, key), x, "relu")
            if block.downsample is not None:
                add(f"{name}.downsample.0", block.downsample[0], start, "none")
            x = add(f"{name}.{convs[-1]}", getattr(block, convs[-1]), x, "relu", residual="nhwc")
    return found


@dataclass(frozen=True)
class Across:
    """One call of an op across convolutions, and the convolutions that it stands for with their names; its own is the first of these."""

    names: tuple[str, ...]
    problem: Problem
    members: tuple[Problem, ...]

    @property
    def name(self) -> str:
        return self.names[0]


def across(found: list[Layer]) -> list[Across]:
    """Where a network has the form of each op across convolutions, of :func:`layers`' convolutions; ``plan`` finds the same."""
    problems = {layer.name: layer.problem for layer in found}
    blocks = list(dict.fromkeys(name.rpartition(".")[0] for name in problems if name.count(".") == 2))
    groups: list[Across] = []

    def add(op: str, *names: str, **facts: Any) -> None:
        members = {name: problems[name] for name in names if name in problems}
        groups.append(
            Across(tuple(members), replace(problems[names[0]], op=op, bn=False, **facts), tuple(members.values()))
        )

    add("conv_pool", "conv1")
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        last, projection = problems.get(f"{block}.conv3"), problems.get(f"{block}.downsample.0")
        if last is None:
            continue
        second, first = problems[f"{block}.conv2"], problems.get(f"{following}.conv1")
        if projection is not None:
            add(
                "pointwise_pair",
                f"{block}.conv3",
                f"{block}.downsample.0",
                chain=(projection.weight,),
                stride=projection.stride,
                second=projection.x[2:],
            )
        if first is None:
            add("pointwise_pool", f"{block}.conv3")
        elif second.groups == 1 and second.stride == (1, 1):
            chain = last.weight, projection.weight if projection is not None else (), first.weight
            add(
                "conv_tail",
                *(f"{block}.{name}" for name in ("conv2", "conv3", "downsample.0")),
                f"{following}.conv1",
                chain=chain,
                residual="nhwc",
            )
    return groups


def distinct(found: list) -> list:
    """One layer (or group) for each different problem (ResNet-50 at one size has 23 convolutions), the first of its kind."""
    seen: dict[Problem, Any] = {}
    for layer in found:
        seen.setdefault(layer.problem, layer)
    return list(seen.values())


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
    single = layers(model, batch, size, dtype, device, capability)
    found = single if op == "conv_bn_act" else [group for group in across(single) if group.problem.op == op]
    return [layer.problem for layer in distinct(found)]
