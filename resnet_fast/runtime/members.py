"""A group of steps bound for one input shape: the flat arguments of its op, or its members run one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..graph.ir import Group, Step, outputs, references
from ..ops import across, reference

if TYPE_CHECKING:
    from ..graph.network import Lowered
    from ..graph.weights import Filter

CHECKS = {
    "pointwise_pair": across.check_pointwise_pair,
    "conv_tail": across.check_conv_tail,
    "conv_pool": across.check_conv_pool,
    "pointwise_pool": across.check_pointwise_pool,
}
# Where the group's own arguments stand among the op's.
EXTERNAL = {"pointwise_pair": (0, 2), "conv_tail": (0, 5), "conv_pool": (0,), "pointwise_pool": (0, 3)}


def flat(lowered: Lowered, step: Group, values: dict[str, Any]) -> tuple[tuple, str | None]:
    """(the op's flat arguments, why the op cannot take them or None): a residual that broadcasts, say."""
    given = [values[value.name] for value in step.args]
    filters = [lowered.filters[part] if part else None for part in step.parts]
    args = _FLAT[step.op](step, given, filters)
    try:
        CHECKS[step.op](*args)
    except RuntimeError as misfit:
        return args, str(misfit)
    return args, None


def _wide(*filters: Filter) -> Tensor:
    """The biases' sum, float32 at least."""
    return sum(f.bias.to(torch.promote_types(f.bias.dtype, torch.float32)) for f in filters)


def _pair(step: Group, given: list, filters: list) -> tuple:
    main, projection = filters
    return given[0], main.weight, given[1], projection.weight, _wide(main, projection), tuple(projection.geometry[0])


def _tail(step: Group, given: list, filters: list) -> tuple:
    second, third, projection, first = filters
    bias = _wide(third) if projection is None else _wide(third, projection)
    return (
        given[0],
        second.weight,
        _wide(second),
        third.weight,
        bias,
        given[1],
        None if projection is None else projection.weight,
        first.weight,
        _wide(first),
    )


def _conv_pool(step: Group, given: list, filters: list) -> tuple:
    return given[0], filters[0].weight, _wide(filters[0]), *statistics(step, given[0].device)


def _pointwise_pool(step: Group, given: list, filters: list) -> tuple:
    return given[0], filters[0].weight, _wide(filters[0]), given[1]


_FLAT: dict[str, Callable[[Group, list, list], tuple]] = {
    "pointwise_pair": _pair,
    "conv_tail": _tail,
    "conv_pool": _conv_pool,
    "pointwise_pool": _pointwise_pool,
}


def statistics(step: Group, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    """Mean and standard deviation in units of uint8, of a stem that normalises."""
    return tuple(
        torch.tensor(step.kwargs[name], dtype=torch.float32, device=device) * 255 if step.kwargs else None
        for name in ("mean", "std")
    )


class Members:
    """The members one after the other. While binding, ``values`` holds what they read and, for what they make, memory of that shape."""

    def __init__(self, step: Group, lowered: Lowered, values: dict[str, Any]) -> None:
        self.step, self.largest = step, 0
        self._filters = lowered.filters
        self._normalize = (
            *statistics(step, values[step.args[0].name].device),
            lowered.filters[step.parts[0]].weight.dtype,
        )
        self._given = tuple(dict.fromkeys(value.name for value in step.args))
        self._last = {name: m for m in step.members for name in references(m)}
        self._inside = {m.output for m in step.members} - set(outputs(step))
        self._calls: list[tuple[str, Callable, tuple[str, ...]]] = []
        self.values = self._start(values)

    def _start(self, values: dict[str, Any]) -> dict[str, Any]:
        given = {name: values[name] for name in self._given}
        if self.step.kwargs:
            first = self.step.args[0].name
            given[first] = reference.normalized(given[first], *self._normalize)
        return given

    def writable(self, member: Step, writable: set[str]) -> set[str]:
        """Of what the group may write to, and of what is inside it, that which nobody reads after this member."""
        return {
            name for name in self._inside | writable if self._last.get(name) is member and name != member.args[0].name
        }

    def bind(self, member: Step, run: Callable, kernel: str, *told: Any) -> str:
        """Take one member's call, in order; its kernel."""
        self._calls.append(
            (
                member.output,
                run,
                tuple(n for n in dict.fromkeys(references(member)) if n in self._inside and self._last[n] is member),
            )
        )
        if member.op == "conv_bn_act":
            made = self.values[member.output] = self._like(member)
            if member.output in self._inside:
                self.largest = max(self.largest, made.nbytes)
        return kernel

    def _like(self, member: Step) -> Tensor:
        x, f = self.values[member.args[0].name], self._filters[member.output]
        stride, padding, dilation, _ = f.geometry
        sizes = (
            (i + 2 * p - d * (k - 1) - 1) // s + 1
            for i, p, d, k, s in zip(x.shape[2:], padding, dilation, f.weight.shape[2:], stride, strict=True)
        )
        shape = torch.Size((x.shape[0], f.weight.shape[0], *sizes))
        if member.residual is not None:
            shape = torch.broadcast_shapes(shape, self.values[member.residual.name].shape)
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)

    def forget(self) -> None:
        """Binding is over."""
        self.values = {}

    def __call__(self, values: dict[str, Any]) -> Any:
        inside = self._start(values)
        for output, run, dead in self._calls:
            inside[output] = run(inside)
            for name in dead:
                del inside[name]
        found = tuple(inside[name] for name in outputs(self.step))
        return found if self.step.also else found[0]
