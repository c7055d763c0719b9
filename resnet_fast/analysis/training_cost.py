"""Costs of training: what every kernel of an iteration reads and writes, at each level of fusion; see ``network_cost``.

Statistics are a pass of their own until a convolution's epilogue takes them. The two gradients of a block's input are
added in a kernel of their own until something fuses that. Weights, momentum and weight gradients are float32; SGD also
writes the parameters in the network's dtype. ATen's max pool keeps int64 indices, ours one byte. The loss reads the
logits and writes their gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

from ..roofline.cost import Cost
from .network_cost import Block, Conv, Net, conv_step, fc_step, head_steps, unfused, unfused_after

MASTER = 4  # bytes of a float32 weight, momentum or weight gradient
ATEN_INDEX, TAP_INDEX = 8, 1  # bytes of a max-pool index: ATen's int64, or which of nine taps won


def _indices(net: Net, width: int) -> int:
    """Bytes of the max pool's indices, each of ``width`` bytes."""
    return net.pool // net.itemsize * width


def _pool(net: Net, index: int = ATEN_INDEX) -> Cost:
    """The max pool alone, which keeps which pixel won."""
    return Cost(
        "maxpool",
        {"x": net.stem.y},
        {"y": net.pool, "index": _indices(net, index)},
    )


# ---------------------------------------------------------------- forward


def _forward_eager(net: Net) -> Iterator[Cost]:
    """One kernel for each module of torch's; batch norm reads its input twice."""

    def statistics(conv: Conv) -> Iterator[Cost]:
        yield conv_step(conv)
        yield Cost(
            f"{conv.name} statistics",
            {"y": conv.y},
            {},
        )

    yield from statistics(net.stem)
    yield from unfused(net.stem.name, net.stem.y, last=False)
    yield _pool(net)
    for block in net.blocks:
        for conv in block.all:
            yield from statistics(conv)
            yield from unfused_after(block, conv)
    yield from head_steps(net)


def _block_end(block: Block) -> Cost:
    """normalise + add + ReLU; a projection is normalised here too, from its raw output."""
    return Cost(
        f"{block.name} end",
        {"y": block.out, "shortcut": block.out},
        {"out": block.out},
    )


def _forward_pointwise(net: Net) -> Iterator[Cost]:
    """Normalisation, add and ReLU in one kernel."""

    def normalised(conv: Conv) -> Cost:
        return Cost(
            f"{conv.name} normalise",
            {"y": conv.y},
            {"out": conv.y},
        )

    for conv in net.convs:
        yield conv_step(conv)
        yield Cost(
            f"{conv.name} statistics",
            {"y": conv.y},
            {},
        )
    yield normalised(net.stem)
    yield _pool(net)
    for block in net.blocks:
        yield from (normalised(conv) for conv in block.convs[:-1])
        yield _block_end(block)
    yield from head_steps(net)


def _forward_fused(net: Net, index: int) -> Iterator[Cost]:
    """Statistics in the convolution's epilogue, normalise + ReLU in the next one's prologue.

    The stem's are in the pool's prologue. The end of the last block averages as it goes.
    """
    yield from map(conv_step, net.convs)
    yield _pool(net, index)
    for block in net.blocks:
        end = _block_end(block)
        if block is net.blocks[-1]:
            end = Cost(
                f"{end.name} + avgpool",
                end.reads,
                {**end.writes, "pooled": net.pooled},
            )
        yield end
    yield fc_step(net)


# ---------------------------------------------------------------- backward: what every level shares


def _loss_and_fc(net: Net) -> Iterator[Cost]:
    """The loss and the gradients of the fully connected layer."""
    fc = fc_step(net)
    yield Cost(
        "loss",
        {"logits": net.logits},
        {"dlogits": net.logits},
    )
    yield Cost(
        "fc dgrad",
        {"dy": net.logits, "w": fc.reads["w"]},
        {"dx": net.pooled},
        fc.flops,
    )
    yield Cost(
        "fc wgrad",
        {"dy": net.logits, "x": net.pooled},
        {"dw": net.fc_weights * MASTER},
        fc.flops,
    )


def _optimizer(net: Net) -> Cost:
    """One kernel updates all parameters."""
    state = net.parameters * MASTER
    copy = {"copy": net.parameters * net.itemsize} if net.itemsize < MASTER else {}
    return Cost(
        "SGD",
        {"w": state, "momentum": state, "dw": state},
        {"w": state, "momentum": state, **copy},
    )


def _conv_backward(net: Net, conv: Conv) -> Iterator[Cost]:
    """dgrad fills all of dx, as torch does behind a strided 1×1; the images need no gradient."""
    if conv is not net.stem:
        yield Cost(
            f"{conv.name} dgrad",
            {"dy": conv.y, "w": conv.w},
            {"dx": conv.whole_x},
            conv.flops,
        )
    yield Cost(
        f"{conv.name} wgrad",
        {"dy": conv.y, "x": conv.x},
        {"dw": conv.weights * MASTER},
        conv.flops,
    )


def _bn_backward(conv: Conv) -> Iterator[Cost]:
    """The sums, then the gradient of batch norm's input."""
    yield _bn_reduce(conv)
    yield _bn_apply(conv)


def _bn_reduce(conv: Conv) -> Cost:
    """The sums that batch norm's gradient needs."""
    return Cost(
        f"{conv.name} bn reduce",
        {"dz": conv.y, "y": conv.y},
        {},
    )


def _bn_apply(conv: Conv) -> Cost:
    """The gradient of batch norm's input from the sums."""
    return Cost(
        f"{conv.name} bn apply",
        {"dz": conv.y, "y": conv.y},
        {"dy": conv.y},
    )


# ---------------------------------------------------------------- backward, level by level


def _backward_eager(net: Net) -> Iterator[Cost]:
    """One kernel for each node of torch's autograd graph."""

    def mask(conv: Conv) -> Cost:
        return Cost(
            f"{conv.name} relu backward",
            {"g": conv.y, "out": conv.y},
            {"dz": conv.y},
        )

    yield Cost(
        "avgpool backward",
        {"g": net.pooled},
        {"dx": net.blocks[-1].out},
    )
    for block in net.blocks:
        for conv in block.all:
            if conv is not block.projection:
                yield mask(conv)
            yield from _bn_backward(conv)
            yield from _conv_backward(net, conv)
        yield Cost(
            f"{block.name} gradients added",
            {"a": block.x, "b": block.x},
            {"sum": block.x},
        )
    yield Cost(
        "maxpool backward",
        {"g": net.pool, "index": _indices(net, ATEN_INDEX)},
        {"dx": net.stem.y},
    )
    yield mask(net.stem)
    yield from _bn_backward(net.stem)
    yield from _conv_backward(net, net.stem)


def _backward_pointwise(net: Net) -> Iterator[Cost]:
    """The passes between convolutions fused.

    An inner ReLU's mask comes from the raw output that batch norm reads anyway. Where two gradients meet they are
    added, masked and reduced in one kernel; the average pool's gradient is spread and masked in one; the two gradients
    of the max pool's result are added in its own.
    """
    last = net.blocks[-1]
    yield Cost(
        "avgpool backward + mask",
        {"g": net.pooled, "out": last.out},
        {"dz": last.out},
    )
    yield Cost(
        f"{last.name} bn reduce",
        {"dz": last.out, **_raw(last)},
        {},
    )
    for block, following in pairwise((*net.blocks, None)):
        if following is not None:
            reads = {"a": block.out, "b": block.out, "out": block.out, **_raw(block)}
            yield Cost(
                f"{block.name} add + mask + reduce",
                reads,
                {"dz": block.out},
            )
        for conv in block.all:
            if conv in block.convs[:-1]:
                yield _bn_reduce(conv)
            yield _bn_apply(conv)
            yield from _conv_backward(net, conv)
    reads = {"a": net.pool, "b": net.pool, "index": _indices(net, ATEN_INDEX)}
    yield Cost(
        "maxpool backward",
        reads,
        {"dx": net.stem.y},
    )
    yield from _bn_backward(net.stem)
    yield from _conv_backward(net, net.stem)


def _raw(block: Block) -> dict[str, int]:
    """The raw outputs whose batch norms end in this block's sum: the last convolution's and the projection's."""
    outputs = {"y": block.out}
    if block.projection is not None:
        outputs["projection"] = block.projection.y
    return outputs


def _backward_fused(net: Net, shared: bool) -> Iterator[Cost]:
    """Batch norm's backward in the kernels of the convolutions.

    Its dx is formed where a convolution's gradient kernels load it, from dz and the raw output; dgrad's epilogue masks
    and reduces for the batch norm before it. The last block's dz, a broadcast times a mask, is never written: its
    readers load the mask. A strided projection's dgrad writes only the pixels that it reaches. ``shared``: one kernel
    does dgrad and wgrad, so an operand of both is read once.
    """
    last = net.blocks[-1]
    yield Cost(
        "avgpool backward + mask + reduce",
        {"g": net.pooled, "out": last.out, **_raw(last)},
        {},
    )
    for before, block in pairwise((None, *net.blocks)):
        for conv in block.all:
            dgrad, wgrad = _fused_gradients(before, block, conv)
            if shared:
                reads = {**dgrad.reads, **wgrad.reads}
                writes = {**dgrad.writes, **wgrad.writes}
                yield Cost(
                    f"{conv.name} backward",
                    reads,
                    writes,
                    2 * conv.flops,
                )
            else:
                yield from (dgrad, wgrad)
    stem = net.stem
    reads = {"g": net.pool, "index": _indices(net, TAP_INDEX), "y": stem.y}
    yield Cost(
        "maxpool backward + mask + reduce",
        reads,
        {"dz": stem.y},
    )
    reads = {"dz": stem.y, "y": stem.y, "x": stem.x}
    yield Cost(
        "conv1 wgrad",
        reads,
        {"dw": stem.weights * MASTER},
        stem.flops,
    )


def _fused_gradients(before: Block | None, block: Block, conv: Conv) -> tuple[Cost, Cost]:
    """The kernels of a convolution's dgrad and wgrad."""
    gradient = {"dz": conv.y, "y": conv.y}
    dgrad_reads = {**gradient, "w": conv.w, **_epilogue(before, block, conv)}
    dgrad = Cost(
        f"{conv.name} dgrad",
        dgrad_reads,
        {"dx": conv.x},
        conv.flops,
    )
    wgrad = Cost(
        f"{conv.name} wgrad",
        {**gradient, "x": conv.x},
        {"dw": conv.weights * MASTER},
        conv.flops,
    )
    return dgrad, wgrad


def _epilogue(before: Block | None, block: Block, conv: Conv) -> dict[str, int]:
    """What dgrad's epilogue reads: for the mask and the reductions, and the other gradient of a block's input."""
    if conv is block.projection:
        return {}
    if conv is not block.convs[0]:
        return {"x": conv.x}
    other = {"other": block.x if block.projection is None else block.projection.x}
    if before is None:  # the max pool's result: its ReLU is masked in the pool's backward
        return other
    raw_before = {f"before {name}": size for name, size in _raw(before).items()}
    return {**other, "x": conv.x, **raw_before}


def _iteration(net: Net, forward: Iterator[Cost], backward: Iterator[Cost]) -> Iterator[Cost]:
    """Forward, loss, backward and the optimizer's step."""
    yield from forward
    yield from _loss_and_fc(net)
    yield from backward
    yield _optimizer(net)


# ---------------------------------------------------------------- levels of fusion


def eager(net: Net) -> Iterator[Cost]:
    """One kernel for each module of torch's, forward and backward."""
    return _iteration(net, _forward_eager(net), _backward_eager(net))


def pointwise(net: Net) -> Iterator[Cost]:
    """What is between convolutions is fused."""
    return _iteration(net, _forward_pointwise(net), _backward_pointwise(net))


def fused_forward(net: Net) -> Iterator[Cost]:
    """Statistics and normalisation in the convolutions' kernels."""
    return _iteration(net, _forward_fused(net, ATEN_INDEX), _backward_pointwise(net))


def fused_backward(net: Net) -> Iterator[Cost]:
    """And batch norm's backward in the gradient kernels."""
    return _iteration(net, _forward_fused(net, TAP_INDEX), _backward_fused(net, shared=False))


def shared_backward(net: Net) -> Iterator[Cost]:
    """And one kernel for both gradients of a convolution."""
    return _iteration(net, _forward_fused(net, TAP_INDEX), _backward_fused(net, shared=True))


TRAINING: dict[str, Callable[[Net], Iterator[Cost]]] = {
    "eager": eager,
    "pointwise fused": pointwise,
    "statistics in the conv's epilogue, normalise+ReLU in the next one's prologue": fused_forward,
    "+ fused backward": fused_backward,
    "dgrad and wgrad share their loads": shared_backward,
}
