"""A group of steps for one input shape: the flat arguments of its op, or its members run one by one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ..dispatch import conv_out_hw
from ..graph.ir import Group, Step, outputs, references
from ..ops import across, reference

if TYPE_CHECKING:
    from ..graph.network import Lowered
    from ..graph.weights import FoldedConv

CHECKS: dict[str, Callable[..., None]] = {
    "pointwise_pair": across.check_pointwise_pair,
    "conv_tail": across.check_conv_tail,
    "conv_pool": across.check_conv_pool,
    "pointwise_pool": across.check_pointwise_pool,
}
# Positions of the group's own arguments among the op's.
EXTERNAL = {
    "pointwise_pair": (0, 2),
    "conv_tail": (0, 5),
    "conv_pool": (0,),
    "pointwise_pool": (0, 3),
}


# ---------------------------------------------------------------- as one op


def flat(lowered: Lowered, step: Group, values: dict[str, Any]) -> tuple[tuple, str | None]:
    """The op's flat arguments, and why the op cannot take them (a residual that broadcasts, for example) or None."""
    inputs = [values[value.name] for value in step.args]
    filters = [lowered.filters[part] if part else None for part in step.parts]
    flatten = _FLAT[step.op]
    check = CHECKS[step.op]
    args = flatten(step, inputs, filters)
    try:
        check(*args)
    except RuntimeError as misfit:
        return args, str(misfit)
    return args, None


def _bias_sum(*filters: FoldedConv) -> Tensor:
    """The sum of the biases, in float32 or wider."""
    # Cast: to mypy the sum may be of nothing, and so 0.
    return cast(Tensor, sum(at_least_float32(f.bias) for f in filters))


def at_least_float32(bias: Tensor) -> Tensor:
    return bias.to(torch.promote_types(bias.dtype, torch.float32))


def _pair(step: Group, inputs: list, filters: list) -> tuple:
    x, x2 = inputs
    main, projection = filters
    stride2, *_ = projection.geometry
    return (
        x,
        main.weight,
        x2,
        projection.weight,
        _bias_sum(main, projection),
        tuple(stride2),
    )


def _tail(step: Group, inputs: list, filters: list) -> tuple:
    second, third, projection, first = filters
    x, residual = inputs
    if projection is None:
        bias, projected = _bias_sum(third), None
    else:
        bias, projected = _bias_sum(third, projection), projection.weight
    return (
        x,
        second.weight,
        _bias_sum(second),
        third.weight,
        bias,
        residual,
        projected,
        first.weight,
        _bias_sum(first),
    )


def _conv_pool(step: Group, inputs: list, filters: list) -> tuple:
    (x,) = inputs
    (stem,) = filters
    mean, std = statistics(step, x.device)
    return x, stem.weight, _bias_sum(stem), mean, std


def _pointwise_pool(step: Group, inputs: list, filters: list) -> tuple:
    x, residual = inputs
    (conv,) = filters
    return x, conv.weight, _bias_sum(conv), residual


_FLAT: dict[str, Callable[[Group, list, list], tuple]] = {
    "pointwise_pair": _pair,
    "conv_tail": _tail,
    "conv_pool": _conv_pool,
    "pointwise_pool": _pointwise_pool,
}


def statistics(step: Group, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """Mean and standard deviation in units of uint8, for a stem that normalises; else None twice."""
    if not step.kwargs:
        return None, None
    as_float32 = partial(torch.tensor, dtype=torch.float32, device=device)
    mean = as_float32(step.kwargs["mean"])
    std = as_float32(step.kwargs["std"])
    return mean * 255, std * 255


# ---------------------------------------------------------------- one by one


def conv_shape(f: FoldedConv, x: Tensor) -> tuple[int, ...]:
    """The shape of a convolution's output."""
    stride, padding, dilation, _ = f.geometry
    height, width = conv_out_hw(x.shape, f.weight.shape, stride, padding, dilation)
    images, channels = len(x), len(f.weight)
    return images, channels, height, width


class Members:
    """The members of a group, run one after the other.

    While they are bound, ``values`` holds their inputs and, for their outputs, memory of the right shape.
    ``largest``: bytes of the largest value inside the group.
    """

    def __init__(self, step: Group, lowered: Lowered, values: dict[str, Any]) -> None:
        self.step = step
        self.largest = 0
        self._filters = lowered.filters
        x = values[step.args[0].name]
        first_filter = lowered.filters[step.parts[0]]
        mean, std = statistics(step, x.device)
        self._normalize = mean, std, first_filter.weight.dtype
        inputs = [value.name for value in step.args]
        self._inputs = tuple(dict.fromkeys(inputs))
        self._last_reader: dict[str, Step] = {}
        for member in step.members:
            self._last_reader.update(dict.fromkeys(references(member), member))
        computed = {member.output for member in step.members}
        self._inside = computed - set(outputs(step))
        self._calls: list[tuple[str, Callable, tuple[str, ...]]] = []
        self.values = self._start(values)

    def _start(self, values: dict[str, Any]) -> dict[str, Any]:
        inputs = {name: values[name] for name in self._inputs}
        if self.step.kwargs:
            first = self.step.args[0].name
            inputs[first] = reference.normalized(inputs[first], *self._normalize)
        return inputs

    def writable(self, member: Step, writable: set[str]) -> set[str]:
        """The values that this member may overwrite: no later member reads them, and the group may write there."""
        x = member.args[0].name
        candidates = self._inside | writable
        candidates.discard(x)
        return {name for name in candidates if self._last_reader.get(name) is member}

    def append(self, member: Step, run: Callable) -> None:
        """Add the next member's call."""
        inside = [name for name in dict.fromkeys(references(member)) if name in self._inside]
        dead = tuple(name for name in inside if self._last_reader[name] is member)
        self._calls.append((member.output, run, dead))
        if member.op != "conv_bn_act":
            return
        memory = self._like(member)
        self.values[member.output] = memory
        if member.output in self._inside:
            self.largest = max(self.largest, memory.nbytes)

    def _like(self, member: Step) -> Tensor:
        """Memory like a convolution's output."""
        x = self.values[member.args[0].name]
        folded = self._filters[member.output]
        shape = torch.Size(conv_shape(folded, x))
        if member.residual is not None:
            residual = self.values[member.residual.name]
            shape = torch.broadcast_shapes(shape, residual.shape)
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)

    def forget(self) -> None:
        """Drop the values that binding needed."""
        self.values = {}

    def __call__(self, values: dict[str, Any]) -> Any:
        inside = self._start(values)
        for output, run, dead in self._calls:
            inside[output] = run(inside)
            for name in dead:
                del inside[name]
        results = tuple(inside[name] for name in outputs(self.step))
        return results if self.step.also else results[0]
