"""What every step of a network reads and writes, at each level of fusion: the data that ``roofline`` turns into floors.

A step moves each of its operands once: caches are perfect within a step and useless between steps. A strided 1×1
convolution touches only the pixels it uses. Filters count once a batch, per-channel vectors not at all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod

import torch

from ..models.problems import conv_layers
from ..roofline.cost import CLASSES, Step, conv_flops, touched


@dataclass(frozen=True)
class Conv:
    """A convolution's operands in bytes: ``x`` as far as it is touched, ``whole_x`` all of it."""

    name: str
    x: int
    whole_x: int
    y: int
    w: int
    weights: int
    channels: int
    flops: int

    @property
    def reads(self) -> dict[str, int]:
        return {"x": self.x, "w": self.w}


@dataclass(frozen=True)
class Block:
    """A residual block: its convolutions in order and the projection, if it has one."""

    name: str
    convs: tuple[Conv, ...]
    projection: Conv | None

    @property
    def x(self) -> int:
        return self.convs[0].whole_x

    @property
    def out(self) -> int:
        return self.convs[-1].y

    @property
    def all(self) -> tuple[Conv, ...]:
        return self.convs if self.projection is None else (*self.convs, self.projection)

    @property
    def stage(self) -> str:
        return self.name.split(".")[0]


@dataclass(frozen=True)
class Net:
    """A network's operands in bytes for one batch; ``pool`` is the max pool's result, ``pooled`` the average pool's."""

    stem: Conv
    blocks: tuple[Block, ...]
    batch: int
    itemsize: int
    pool: int = field(init=False)
    pooled: int = field(init=False)
    logits: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pool", self.blocks[0].x)
        object.__setattr__(self, "pooled", self.batch * self.blocks[-1].convs[-1].channels * self.itemsize)
        object.__setattr__(self, "logits", self.batch * CLASSES * self.itemsize)

    @property
    def convs(self) -> tuple[Conv, ...]:
        return (self.stem, *(conv for block in self.blocks for conv in block.all))

    @property
    def fc_weights(self) -> int:
        return self.blocks[-1].convs[-1].channels * CLASSES

    @property
    def parameters(self) -> int:
        """Filters, two vectors for each batch norm, fc with bias."""
        return sum(conv.weights + 2 * conv.channels for conv in self.convs) + self.fc_weights + CLASSES


@functools.lru_cache(maxsize=16)
def network(model: str, batch: int, size: int, dtype: torch.dtype) -> Net:
    """The operands of an architecture at [batch, 3, size, size] in ``dtype``."""
    width = dtype.itemsize
    convs: dict[str, Conv] = {}
    for layer in conv_layers(model, batch, size, dtype):
        p = layer.problem
        y, weights = batch * p.weight[0] * prod(p.out_hw), prod(p.weight)
        convs[layer.name] = Conv(
            layer.name,
            touched(p) * width,
            prod(p.x) * width,
            y * width,
            weights * width,
            weights,
            p.weight[0],
            conv_flops(p),
        )
    members: dict[str, list[Conv]] = {}
    for name, conv in convs.items():
        members.setdefault(".".join(name.split(".")[:2]), []).append(conv)
    (stem,) = members.pop("conv1")
    return Net(stem, tuple(_block(name, found) for name, found in members.items()), batch, width)


def _block(name: str, found: list[Conv]) -> Block:
    projection = next((conv for conv in found if "downsample" in conv.name), None)
    return Block(name, tuple(conv for conv in found if conv is not projection), projection)


# ---------------------------------------------------------------- inference


def fc_step(net: Net) -> Step:
    """The fully connected layer."""
    reads = {"x": net.pooled, "w": net.fc_weights * net.itemsize}
    return Step("fc", reads, {"y": net.logits}, 2 * net.batch * net.fc_weights)


def head_steps(net: Net) -> Iterator[Step]:
    """Average pool, then fc."""
    yield Step("avgpool", {"x": net.blocks[-1].out}, {"y": net.pooled})
    yield fc_step(net)


def conv_step(conv: Conv) -> Step:
    """A convolution alone."""
    return Step(conv.name, conv.reads, {"y": conv.y}, conv.flops)


def _pool(net: Net) -> Step:
    return Step("maxpool", {"x": net.stem.y}, {"y": net.pool})


def unfused(name: str, y: int, *, last: bool, projection: bool = False) -> Iterator[Step]:
    """Batch norm, residual add and ReLU as torch's modules run them."""
    yield Step(f"{name} bn", {"y": y}, {"z": y})
    if last:
        yield Step(f"{name} add", {"z": y, "shortcut": y}, {"sum": y})
    if not projection:
        yield Step(f"{name} relu", {"z": y}, {"out": y})


def eager(net: Net) -> Iterator[Step]:
    """One kernel for each module of torch's."""
    yield conv_step(net.stem)
    yield from unfused(net.stem.name, net.stem.y, last=False)
    yield _pool(net)
    for block in net.blocks:
        for conv in block.all:
            yield conv_step(conv)
            yield from unfused(conv.name, conv.y, last=conv is block.convs[-1], projection=conv is block.projection)
    yield from head_steps(net)


def pointwise(net: Net) -> Iterator[Step]:
    """BN folded into the filters; what follows a convolution is one kernel (what a compiler does)."""
    yield conv_step(net.stem)
    yield Step(f"{net.stem.name} relu", {"y": net.stem.y}, {"out": net.stem.y})
    yield _pool(net)
    for block in net.blocks:
        for conv in block.all:
            yield conv_step(conv)
            if conv is not block.projection:
                shortcut = {"shortcut": conv.y} if conv is block.convs[-1] else {}
                yield Step(f"{conv.name} pointwise", {"y": conv.y, **shortcut}, {"out": conv.y})
    yield from head_steps(net)


def _fused_conv(block: Block, conv: Conv) -> Step:
    shortcut = {"shortcut": conv.y} if conv is block.convs[-1] else {}
    return Step(conv.name, {**conv.reads, **shortcut}, {"out": conv.y}, conv.flops)


def _ends(net: Net, steps: Iterator[Step]) -> Iterator[Step]:
    """The stem writes its pooled output only, the last convolution its average."""
    yield Step("conv1 + maxpool", net.stem.reads, {"out": net.pool}, net.stem.flops)
    last = net.blocks[-1].convs[-1].name
    for step in steps:
        if step.name == last:
            step = Step(f"{step.name} + avgpool", step.reads, {"pooled": net.pooled}, step.flops)
        yield step
    yield fc_step(net)


def per_conv(net: Net) -> Iterator[Step]:
    """conv + BN + ReLU (+ add) in one kernel."""
    yield conv_step(net.stem)
    yield _pool(net)
    yield from (_fused_conv(block, conv) for block in net.blocks for conv in block.all)
    yield from head_steps(net)


def fused_ends(net: Net) -> Iterator[Step]:
    """And the max pool in the stem's kernel, the average pool in the last convolution's."""
    return _ends(net, (_fused_conv(block, conv) for block in net.blocks for conv in block.all))


def tails(net: Net, stages: tuple[str, ...] = ("layer1", "layer2")) -> Iterator[Step]:
    """And conv2 → conv3 → + residual → ReLU → the next block's conv1 in one kernel; bottlenecks in ``stages`` only."""
    return _ends(net, _tail_steps(net, stages))


def _tail_steps(net: Net, stages: tuple[str, ...]) -> Iterator[Step]:
    taken: set[str] = set()
    for block, following in pairwise((*net.blocks, None)):
        if following is None or block.stage not in stages or len(block.convs) < 3:
            yield from (_fused_conv(block, conv) for conv in block.all if conv.name not in taken)
            continue
        head, middle, end = block.convs
        if head.name not in taken:
            yield _fused_conv(block, head)
        if block.projection is not None:
            yield _fused_conv(block, block.projection)
        after = following.convs[0]
        taken.add(after.name)
        yield Step(
            f"{block.name} tail",
            {"x": middle.x, "shortcut": end.y, "w": middle.w + end.w + after.w},
            {"out": end.y, "next": after.y},
            middle.flops + end.flops + after.flops,
        )


def whole_blocks(net: Net) -> Iterator[Step]:
    """Each residual block in one kernel; the head is one kernel too."""
    yield Step("conv1 + maxpool", net.stem.reads, {"out": net.pool}, net.stem.flops)
    for block in net.blocks:
        reads = {"x": block.x, "w": sum(conv.w for conv in block.all)}
        yield Step(block.name, reads, {"out": block.out}, sum(conv.flops for conv in block.all))
    fc = fc_step(net)
    yield Step("avgpool + fc", {"x": net.blocks[-1].out, "w": fc.reads["w"]}, fc.writes, fc.flops)


INFERENCE: dict[str, Callable[[Net], Iterator[Step]]] = {
    "eager, unfused": eager,
    "BN folded, pointwise fused after each conv": pointwise,
    "conv+BN+ReLU(+add) in one kernel": per_conv,
    "+ stem/pool and avgpool/fc fused": fused_ends,
    "tail fusion in layer1–2": tails,
    "whole block in one kernel": whole_blocks,
}
