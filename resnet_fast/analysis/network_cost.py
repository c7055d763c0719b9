"""Costs of inference: what every kernel of a network reads and writes, at each level of fusion.

A kernel moves each of its operands once: caches are perfect within a kernel and useless between kernels. A strided 1×1
convolution touches only the pixels it uses. Filters count once a batch, per-channel vectors not at all.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod

import torch

from ..models.problems import ConvLayer, conv_layers
from ..roofline.cost import CLASSES, Cost, conv_flops, touched


@dataclass(frozen=True)
class Conv:
    """A convolution's operands in bytes; ``x`` is the part that it reads, ``weights`` the elements of its filters."""

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
        if self.projection is None:
            return self.convs
        return (*self.convs, self.projection)

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
        itemsize = self.itemsize
        object.__setattr__(self, "pool", self.blocks[0].x)
        object.__setattr__(self, "pooled", self.batch * self.features * itemsize)
        object.__setattr__(self, "logits", self.batch * CLASSES * itemsize)

    @property
    def convs(self) -> tuple[Conv, ...]:
        in_blocks = itertools.chain.from_iterable(block.all for block in self.blocks)
        return (self.stem, *in_blocks)

    @property
    def features(self) -> int:
        """Channels of the last convolution, which fc takes."""
        return self.blocks[-1].convs[-1].channels

    @property
    def fc_weights(self) -> int:
        return self.features * CLASSES

    @property
    def parameters(self) -> int:
        """Filters, two vectors for each batch norm, fc with bias."""
        in_convs = sum(conv.weights + 2 * conv.channels for conv in self.convs)
        in_fc = self.fc_weights + CLASSES
        return in_convs + in_fc


@functools.lru_cache(maxsize=16)
def network(model: str, batch: int, size: int, dtype: torch.dtype) -> Net:
    """The operands of an architecture at [batch, 3, size, size] in ``dtype``."""
    members: dict[str, list[Conv]] = {}
    for layer in conv_layers(model, batch, size, dtype):
        block = ".".join(layer.name.split(".")[:2])
        members.setdefault(block, []).append(_conv(layer))
    (stem,) = members.pop("conv1")
    blocks = tuple(_block(name, convs) for name, convs in members.items())
    return Net(
        stem,
        blocks,
        batch,
        dtype.itemsize,
    )


def _conv(layer: ConvLayer) -> Conv:
    """The operands of one convolution."""
    problem = layer.problem
    width = layer.problem.dtype.itemsize
    batch = problem.x[0]
    filters = problem.weight[0]
    weights = prod(problem.weight)
    return Conv(
        layer.name,
        x=touched(problem) * width,
        whole_x=prod(problem.x) * width,
        y=batch * filters * prod(problem.out_hw) * width,
        w=weights * width,
        weights=weights,
        channels=filters,
        flops=conv_flops(problem),
    )


def _block(name: str, convs: list[Conv]) -> Block:
    """A block from its convolutions in the order in which they run."""
    projection = next((conv for conv in convs if "downsample" in conv.name), None)
    others = tuple(conv for conv in convs if conv is not projection)
    return Block(name, others, projection)


# ---------------------------------------------------------------- single kernels


def fc_step(net: Net) -> Cost:
    """The fully connected layer."""
    reads = {"x": net.pooled, "w": net.fc_weights * net.itemsize}
    return Cost(
        "fc",
        reads,
        {"y": net.logits},
        2 * net.batch * net.fc_weights,
    )


def head_steps(net: Net) -> Iterator[Cost]:
    """Average pool, then fc."""
    yield Cost(
        "avgpool",
        {"x": net.blocks[-1].out},
        {"y": net.pooled},
    )
    yield fc_step(net)


def conv_step(conv: Conv) -> Cost:
    """A convolution alone."""
    return Cost(
        conv.name,
        conv.reads,
        {"y": conv.y},
        conv.flops,
    )


def _pool(net: Net) -> Cost:
    """The max pool alone."""
    return Cost(
        "maxpool",
        {"x": net.stem.y},
        {"y": net.pool},
    )


def unfused(name: str, y: int, *, last: bool, projection: bool = False) -> Iterator[Cost]:
    """Batch norm, residual add and ReLU as torch's modules run them."""
    yield Cost(
        f"{name} bn",
        {"y": y},
        {"z": y},
    )
    if last:
        yield Cost(
            f"{name} add",
            {"z": y, "shortcut": y},
            {"sum": y},
        )
    if not projection:
        yield Cost(
            f"{name} relu",
            {"z": y},
            {"out": y},
        )


def unfused_after(block: Block, conv: Conv) -> Iterator[Cost]:
    """What torch's modules run after one convolution of a block."""
    is_last = conv is block.convs[-1]
    is_projection = conv is block.projection
    return unfused(conv.name, conv.y, last=is_last, projection=is_projection)


# ---------------------------------------------------------------- levels of fusion


def eager(net: Net) -> Iterator[Cost]:
    """One kernel for each module of torch's."""
    yield conv_step(net.stem)
    yield from unfused(net.stem.name, net.stem.y, last=False)
    yield _pool(net)
    for block in net.blocks:
        for conv in block.all:
            yield conv_step(conv)
            yield from unfused_after(block, conv)
    yield from head_steps(net)


def pointwise(net: Net) -> Iterator[Cost]:
    """BN folded into the filters; what follows a convolution is one kernel (what a compiler does)."""
    yield conv_step(net.stem)
    yield Cost(
        f"{net.stem.name} relu",
        {"y": net.stem.y},
        {"out": net.stem.y},
    )
    yield _pool(net)
    for block in net.blocks:
        for conv in block.all:
            yield conv_step(conv)
            if conv is not block.projection:
                reads = {"y": conv.y, **_shortcut(block, conv)}
                yield Cost(
                    f"{conv.name} pointwise",
                    reads,
                    {"out": conv.y},
                )
    yield from head_steps(net)


def _fused_conv(block: Block, conv: Conv) -> Cost:
    """conv + BN + ReLU (+ add) in one kernel."""
    reads = {**conv.reads, **_shortcut(block, conv)}
    return Cost(
        conv.name,
        reads,
        {"out": conv.y},
        conv.flops,
    )


def _fused_convs(net: Net) -> Iterator[Cost]:
    """Each convolution of the blocks with what follows it in one kernel."""
    for block in net.blocks:
        for conv in block.all:
            yield _fused_conv(block, conv)


def _shortcut(block: Block, conv: Conv) -> dict[str, int]:
    """What a block's last convolution reads besides its operands."""
    if conv is not block.convs[-1]:
        return {}
    return {"shortcut": conv.y}


def _ends(net: Net, steps: Iterator[Cost]) -> Iterator[Cost]:
    """The stem writes its pooled output only, the last convolution its average."""
    yield Cost(
        "conv1 + maxpool",
        net.stem.reads,
        {"out": net.pool},
        net.stem.flops,
    )
    last = net.blocks[-1].convs[-1].name
    for step in steps:
        if step.name == last:
            step = Cost(
                f"{step.name} + avgpool",
                step.reads,
                {"pooled": net.pooled},
                step.flops,
            )
        yield step
    yield fc_step(net)


def per_conv(net: Net) -> Iterator[Cost]:
    """conv + BN + ReLU (+ add) in one kernel."""
    yield conv_step(net.stem)
    yield _pool(net)
    yield from _fused_convs(net)
    yield from head_steps(net)


def fused_ends(net: Net) -> Iterator[Cost]:
    """And the max pool in the stem's kernel, the average pool in the last convolution's."""
    return _ends(net, _fused_convs(net))


def tails(net: Net, stages: tuple[str, ...] = ("layer1", "layer2")) -> Iterator[Cost]:
    """And conv2 → conv3 → + residual → ReLU → the next block's conv1 in one kernel; bottlenecks in ``stages`` only."""
    return _ends(net, _tail_steps(net, stages))


def _tail_steps(net: Net, stages: tuple[str, ...]) -> Iterator[Cost]:
    """The kernels of all blocks with tails in ``stages``."""
    taken: set[str] = set()  # first convolutions that are in the tail of the block before
    for block, following in itertools.pairwise((*net.blocks, None)):
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
        reads = {"x": middle.x, "shortcut": end.y, "w": middle.w + end.w + after.w}
        flops = middle.flops + end.flops + after.flops
        yield Cost(
            f"{block.name} tail",
            reads,
            {"out": end.y, "next": after.y},
            flops,
        )


def whole_blocks(net: Net) -> Iterator[Cost]:
    """Each residual block in one kernel; the head is one kernel too."""
    yield Cost(
        "conv1 + maxpool",
        net.stem.reads,
        {"out": net.pool},
        net.stem.flops,
    )
    for block in net.blocks:
        reads = {"x": block.x, "w": sum(conv.w for conv in block.all)}
        flops = sum(conv.flops for conv in block.all)
        yield Cost(
            block.name,
            reads,
            {"out": block.out},
            flops,
        )
    fc = fc_step(net)
    yield Cost(
        "avgpool + fc",
        {"x": net.blocks[-1].out, "w": fc.reads["w"]},
        fc.writes,
        fc.flops,
    )


INFERENCE: dict[str, Callable[[Net], Iterator[Cost]]] = {
    "eager, unfused": eager,
    "BN folded, pointwise fused after each conv": pointwise,
    "conv+BN+ReLU(+add) in one kernel": per_conv,
    "+ stem/pool and avgpool/fc fused": fused_ends,
    "tail fusion in layer1–2": tails,
    "whole block in one kernel": whole_blocks,
}
