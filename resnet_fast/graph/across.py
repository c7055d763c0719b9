"""Groups: the steps that one op across convolutions can replace, found by structure alone.

A group runs where its main value was computed. It is formed only where no difference can be seen: no step outside
reads a value inside, the network does not return one, and no module of unknown code runs between the members. Which
groups are faster is measured (``Plan.tune``), never guessed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..dispatch.problem import ACROSS
from .ir import Group, Step, Value, names, references

if TYPE_CHECKING:
    from .network import Lowered
    from .weights import FoldedConv

Normalize = tuple[Sequence[float], Sequence[float]]
# Larger groups first; the next kind takes from what they leave.
ORDER = ("conv_tail", "pointwise_pool", "conv_pool", "pointwise_pair")
_F = "torch.nn.functional."


def checked_names(across: Iterable[str]) -> tuple[str, ...]:
    """The names as a tuple: kinds, or "kind:step" for one group. Raises ValueError for an unknown kind."""
    is_one_name = isinstance(across, str) or not isinstance(across, Iterable)
    given: tuple[Any, ...] = (across,) if is_one_name else tuple(across)
    unknown = [name for name in given if not _is_known(name)]
    if unknown:
        got = ", ".join(map(repr, unknown))
        expected = ", ".join(map(repr, ACROSS))
        raise ValueError(f"plan: across: got {got}, expected some of {expected}")
    return given


def _is_known(name: object) -> bool:
    return isinstance(name, str) and _kind_of(name) in ACROSS


def _kind_of(name: str) -> str:
    return name.partition(":")[0]


def label(step: Group) -> str:
    """The name of one group of a network: its kind and its first step's target."""
    return f"{step.op}:{step.target}"


def grouped(lowered: Lowered, across: Iterable[str], normalize: Normalize | None = None) -> Lowered:
    """The same network with every group of these kinds, or of these names, as one step.

    With ``normalize`` the network's input must be normalised first. A ``conv_pool`` that alone reads the input then
    takes uint8 and does it itself (:attr:`Lowered.takes_bytes`).
    """
    across = checked_names(across)
    steps = list(lowered.steps)
    for kind in ORDER:
        if any(_kind_of(name) == kind for name in across):
            steps = _with_groups(kind, steps, lowered, across)
    if normalize is not None:
        steps = _with_normalizing_stem(steps, lowered, normalize)
    return replace(lowered, steps=tuple(steps))


def _with_groups(
    kind: str, steps: list[Step], lowered: Lowered, across: tuple[str, ...]
) -> list[Step]:
    """The steps with the groups of one kind, each in the place of its main value."""
    net = _Net(steps, lowered.filters, lowered.output)
    by_output: dict[str, Group] = {}
    taken: set[str] = set()
    for step in steps:
        found = _MATCHERS[kind](net, step)
        if found is None or not (kind in across or label(found) in across):
            continue
        members = {m.output for m in found.members}
        if not members & taken and net.are_uninterrupted(found.members):
            taken |= members
            by_output[found.output] = found
    remaining = [step for step in steps if step.output in by_output or step.output not in taken]
    return [by_output.get(step.output, step) for step in remaining]


def _with_normalizing_stem(steps: list[Step], lowered: Lowered, normalize: Normalize) -> list[Step]:
    given = lowered.inputs[0]
    readers = [step for step in steps if given in references(step)]
    if len(readers) != 1 or given in names(lowered.output):
        return steps
    (stem,) = readers
    if stem.op != "conv_pool":
        return steps
    mean, std = normalize
    statistics = {"mean": tuple(mean), "std": tuple(std)}
    normalizing = replace(stem, kwargs=statistics)
    return [normalizing if step is stem else step for step in steps]


# ---------------------------------------------------------------- matching


class _Net:
    """The steps of a network, with the maker and the readers of each value."""

    def __init__(self, steps: list[Step], filters: dict[str, FoldedConv], output: Any) -> None:
        self.steps = steps
        self.filters = filters
        self.returned = set(names(output))
        self.maker = {step.output: step for step in steps}
        self.position = {step.output: i for i, step in enumerate(steps)}
        self.readers: dict[str, list[Step]] = {}
        for step in steps:
            for name in references(step):
                self.readers.setdefault(name, []).append(step)

    def only_reader(self, step: Step) -> Step | None:
        """The step that alone reads this one's value, once."""
        readers = self.readers.get(step.output, [])
        if len(readers) != 1 or step.output in self.returned:
            return None
        return readers[0]

    def are_uninterrupted(self, members: Sequence[Step]) -> bool:
        """Whether no module runs between the members; one might write to what they read."""
        positions = [self.position[m.output] for m in members]
        between = self.steps[min(positions) : max(positions)]
        return not any(step.op == "module" for step in between)

    def is_conv(
        self, step: Step | None, size: int, *, act: str = "relu", stride: int | None = 1
    ) -> bool:
        """Whether this is a convolution of that size, padded by half of it; ``stride`` None: any."""
        if step is None or step.op != "conv_bn_act" or step.act != act:
            return False
        strides, padding, dilation, groups = self.filters[step.output].geometry
        if tuple(self.filters[step.output].weight.shape[2:]) != (size, size) or groups != 1:
            return False
        if _pair(padding) != (size // 2, size // 2):
            return False
        if size != 1 and _pair(dilation) != (1, 1):
            return False
        return stride is None or _pair(strides) == (stride, stride)

    def projection(self, reader: Step, stride: int | None) -> Step | None:
        """The 1×1 convolution without activation that computes a step's residual and nothing else."""
        made = self.maker.get(reader.residual.name)
        if not self.is_conv(made, 1, act="none", stride=stride) or made.residual is not None:
            return None
        return made if self.only_reader(made) is reader else None

    def adds_shortcut(self, step: Step, stride: int | None = 1) -> bool:
        """Whether this is a block's last 1×1, which adds a residual other than its own input."""
        if step.residual is None or not self.is_conv(step, 1, stride=stride):
            return False
        return step.residual != step.args[0]


def _pair(value: Any) -> tuple:
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


def _group(
    net: _Net,
    kind: str,
    main: Step,
    members: Iterable[Step],
    parts: tuple[str, ...],
    args: tuple,
    also: tuple[str, ...] = (),
) -> Group:
    members = tuple(sorted(members, key=lambda m: net.position[m.output]))
    paths = itertools.chain.from_iterable(m.modules for m in members)
    modules = tuple(dict.fromkeys(path for path in paths if path))
    return Group(
        op=kind,
        target=members[0].target,
        output=main.output,
        args=args,
        modules=modules,
        act="relu",
        also=also,
        members=members,
        parts=parts,
    )


def _pointwise_pair(net: _Net, step: Step) -> Group | None:
    """A block's last 1×1 and its projection, the one without stride first: the sum does not depend on the order."""
    projection = net.projection(step, None) if net.adds_shortcut(step, None) else None
    if projection is None:
        return None
    first, second = (step, projection) if net.is_conv(step, 1) else (projection, step)
    if not net.is_conv(first, 1, act=first.act):
        return None
    args, parts = (first.args[0], second.args[0]), (first.output, second.output)
    group = _group(net, "pointwise_pair", step, (step, projection), parts, args)
    return replace(group, target=first.target)


def _conv_tail(net: _Net, step: Step) -> Group | None:
    """A block from its 3×3 on, with the next block's first 1×1."""
    if not net.is_conv(step, 3) or step.residual is not None:
        return None
    last = net.only_reader(step)
    if last is None or not net.adds_shortcut(last) or last.args[0].name != step.output:
        return None
    readers = net.readers.get(last.output, ())
    following = next((s for s in readers if net.is_conv(s, 1) and s.residual is None), None)
    if following is None:
        return None
    projection = net.projection(last, 1)
    residual = last.residual if projection is None else projection.args[0]
    if residual.name == step.output:
        return None
    members = [step, last, following]
    parts = step.output, last.output, "", following.output
    if projection is not None:
        members.append(projection)
        parts = step.output, last.output, projection.output, following.output
    return _group(
        net, "conv_tail", last, members, parts, (step.args[0], residual), (following.output,)
    )


def _conv_pool(net: _Net, step: Step) -> Group | None:
    """The stem: a convolution of stride 2 and a 3×3 max pool."""
    if step.op != "conv_bn_act" or step.residual is not None:
        return None
    height, width = net.filters[step.output].weight.shape[2:]
    pool = net.only_reader(step)
    if height != width or height % 2 == 0 or not net.is_conv(step, height, stride=2):
        return None
    if pool is None or not _is_max_pool(pool):
        return None
    return _group(net, "conv_pool", pool, (step, pool), (step.output,), step.args)


def _pointwise_pool(net: _Net, step: Step) -> Group | None:
    """The network's last 1×1 and its average pool: a mean, or an adaptive average pool and a flatten."""
    if not net.adds_shortcut(step):
        return None
    members, pool = [step], net.only_reader(step)
    if pool is not None and _is_global_average_pool(pool):
        members.append(pool)
        pool = net.only_reader(pool)
        found = pool is not None and _is_flatten(pool)
    else:
        found = pool is not None and _is_mean_of_pixels(pool)
    if not found:
        return None
    args = step.args[0], step.residual
    return _group(net, "pointwise_pool", pool, (*members, pool), (step.output,), args)


# ---------------------------------------------------------------- what a function's call computes


def _is_global_average_pool(step: Step) -> bool:
    given = _call(step, f"{_F}adaptive_avg_pool2d", ("output_size",))
    if given is None or len(given) != 1:
        return False
    return given.get("output_size") in (1, (1, 1))


def _is_flatten(step: Step) -> bool:
    for target in ("torch.flatten", "Tensor.flatten"):
        if _call(step, target, ("start_dim", "end_dim"), end_dim=-1) == {
            "start_dim": 1,
            "end_dim": -1,
        }:
            return True
    return False


def _is_mean_of_pixels(step: Step) -> bool:
    for target in ("torch.mean", "Tensor.mean"):
        given = _call(step, target, ("dim", "keepdim"), keepdim=False)
        if given in ({"dim": (2, 3), "keepdim": False}, {"dim": (-2, -1), "keepdim": False}):
            return True
    return False


_MAX_POOL = {
    "kernel_size": (3, 3),
    "stride": (2, 2),
    "padding": (1, 1),
    "dilation": (1, 1),
    "ceil_mode": (False, False),
    "return_indices": (False, False),
}


def _is_max_pool(step: Step) -> bool:
    defaults = {"dilation": 1, "ceil_mode": False, "return_indices": False}
    given = _call(step, f"{_F}max_pool2d", tuple(_MAX_POOL), **defaults)
    if given is None:
        return False
    pairs = {name: _pair(value) for name, value in given.items()}
    return pairs == _MAX_POOL


def _call(
    step: Step, target: str, parameters: tuple[str, ...], **defaults: Any
) -> dict[str, Any] | None:
    """A call's arguments after its input by name, lists as tuples; None if this is no such call of that function."""
    if step.op != "function" or step.target != target or not step.args:
        return None
    x, *arguments = step.args
    if len(arguments) > len(parameters) or not isinstance(x, Value):
        return None
    positional = dict(zip(parameters, arguments, strict=False))
    given = defaults | positional | step.kwargs
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in given.items()
    }


_MATCHERS: dict[str, Callable[[_Net, Step], Group | None]] = {
    "conv_tail": _conv_tail,
    "pointwise_pool": _pointwise_pool,
    "conv_pool": _conv_pool,
    "pointwise_pair": _pointwise_pair,
}
