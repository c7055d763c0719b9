"""Which steps of a plan one op across convolutions can take the place of: a pure function from steps to steps, by structure alone.

A group stands where its main value was computed. It is formed only where nobody can tell: a value inside has no reader outside, is no
answer, and no module whose code nobody knows runs between the members. Which groups pay is measured (``Plan.tune``), never guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..dispatch.problem import ACROSS
from .ir import Group, Step, Value, names, references

if TYPE_CHECKING:
    from .network import Lowered
    from .weights import Filter

Normalize = tuple[Sequence[float], Sequence[float]]
# Larger ones first: what they leave, the next may take.
ORDER = ("conv_tail", "pointwise_pool", "conv_pool", "pointwise_pair")
_F = "torch.nn.functional."


def known(across: Iterable[str]) -> tuple[str, ...]:
    """The names as a tuple: kinds, or "kind:step" for one group; raises ValueError for one whose kind is none."""
    across = (across,) if isinstance(across, str) or not isinstance(across, Iterable) else tuple(across)
    strange = [name for name in across if not isinstance(name, str) or name.partition(":")[0] not in ACROSS]
    if strange:
        raise ValueError(
            f"plan: across: got {', '.join(map(repr, strange))}, expected some of {', '.join(map(repr, ACROSS))}"
        )
    return across


def label(step: Group) -> str:
    """The name of one group of a network: its kind and the step that it stands for first."""
    return f"{step.op}:{step.target}"


def group(lowered: Lowered, across: Iterable[str], normalize: Normalize | None = None) -> Lowered:
    """The same network with every group of these kinds, or of these names, as one step.

    With ``normalize`` the input is normalised before it is lowered's; a ``conv_pool`` on it, its only reader, does that itself then.
    """
    across = known(across)
    steps = list(lowered.steps)
    for kind in ORDER:
        if any(name.partition(":")[0] == kind for name in across):
            net = _Net(steps, lowered.filters, set(names(lowered.output)))
            taken: set[str] = set()
            for found in map(_MATCHERS[kind], [net] * len(steps), list(steps)):
                wanted = found is not None and (kind in across or label(found) in across)
                members = {m.output for m in found.members} if wanted else set()
                if members and not members & taken and net.close(found.members):
                    taken |= members
                    steps = [
                        found if s.output == found.output else s
                        for s in steps
                        if s.output == found.output or s.output not in members
                    ]
    if normalize is not None:
        steps = _normalizing(steps, lowered, normalize)
    return replace(lowered, steps=tuple(steps))


def takes_bytes(lowered: Lowered) -> bool:
    """Whether the network's first step normalises uint8 by itself."""
    return any(step.op == "conv_pool" and step.kwargs for step in lowered.steps)


def _normalizing(steps: list[Step], lowered: Lowered, normalize: Normalize) -> list[Step]:
    given = lowered.inputs[0]
    readers = [step for step in steps if given in references(step)]
    if len(readers) != 1 or readers[0].op != "conv_pool" or given in names(lowered.output):
        return steps
    mean, std = normalize
    return [
        replace(step, kwargs={"mean": tuple(mean), "std": tuple(std)}) if step is readers[0] else step for step in steps
    ]


# ---------------------------------------------------------------- matching


@dataclass
class _Net:
    """The steps with who makes and who reads each value."""

    steps: list[Step]
    filters: dict[str, Filter]
    kept: set[str]

    def __post_init__(self) -> None:
        self.maker = {step.output: step for step in self.steps}
        self.position = {step.output: i for i, step in enumerate(self.steps)}
        self.readers: dict[str, list[Step]] = {}
        for step in self.steps:
            for name in references(step):
                self.readers.setdefault(name, []).append(step)

    def only_reader(self, step: Step) -> Step | None:
        """The step that alone reads this one's value, once."""
        readers = self.readers.get(step.output, [])
        return readers[0] if len(readers) == 1 and step.output not in self.kept else None

    def close(self, members: Sequence[Step]) -> bool:
        """Whether no module runs between the members: it might write to what they read."""
        places = [self.position[m.output] for m in members]
        return not any(step.op == "module" for step in self.steps[min(places) : max(places)])

    def conv(self, step: Step | None, size: int, *, act: str = "relu", stride: int | None = 1) -> bool:
        """Whether it is a convolution of that size, padded by half of it; ``stride`` None: any."""
        if step is None or step.op != "conv_bn_act" or step.act != act:
            return False
        strides, padding, dilation, groups = self.filters[step.output].geometry
        shape = tuple(self.filters[step.output].weight.shape[2:])
        return (
            shape == (size, size)
            and _pair(padding) == (size // 2, size // 2)
            and groups == 1
            and (size == 1 or _pair(dilation) == (1, 1))
            and (stride is None or _pair(strides) == (stride, stride))
        )

    def projection(self, reader: Step, stride: int | None) -> Step | None:
        """The 1×1 convolution without activation that makes a step's residual and nothing else."""
        made = self.maker.get(reader.residual.name)
        right = (
            self.conv(made, 1, act="none", stride=stride) and made.residual is None and self.only_reader(made) is reader
        )
        return made if right else None


def _pair(value: Any) -> tuple:
    return (
        (value, value)
        if isinstance(value, int)
        else tuple(value)
        if isinstance(value, (tuple, list))
        else (value, value)
    )


def _last(net: _Net, step: Step, stride: int | None = 1) -> bool:
    """A block's last 1×1, which adds a residual that is not its own input."""
    return net.conv(step, 1, stride=stride) and step.residual is not None and step.residual != step.args[0]


def _made(
    net: _Net,
    kind: str,
    main: Step,
    members: Iterable[Step],
    parts: tuple[str, ...],
    args: tuple,
    also: tuple[str, ...] = (),
) -> Group:
    members = tuple(sorted(members, key=lambda m: net.position[m.output]))
    modules = tuple(dict.fromkeys(path for m in members for path in m.modules if path))
    return Group(
        kind, members[0].target, main.output, args, {}, modules, act="relu", also=also, members=members, parts=parts
    )


def _pointwise_pair(net: _Net, step: Step) -> Group | None:
    """Of the two, which a sum does not tell apart, the one without a stride comes first."""
    other = net.projection(step, None) if _last(net, step, None) else None
    if other is None:
        return None
    first, second = (step, other) if net.conv(step, 1) else (other, step)
    if not net.conv(first, 1, act=first.act):
        return None
    args = (first.args[0], second.args[0])
    return replace(
        _made(net, "pointwise_pair", step, (step, other), (first.output, second.output), args), target=first.target
    )


def _conv_tail(net: _Net, step: Step) -> Group | None:
    """From the 3×3 on."""
    if not net.conv(step, 3) or step.residual is not None:
        return None
    last = net.only_reader(step)
    if last is None or not _last(net, last) or last.args[0].name != step.output:
        return None
    following = next((s for s in net.readers.get(last.output, ()) if net.conv(s, 1) and s.residual is None), None)
    if following is None:
        return None
    projection = net.projection(last, 1)
    residual = last.residual if projection is None else projection.args[0]
    if residual.name == step.output:
        return None
    members = (step, last, following) if projection is None else (step, last, following, projection)
    parts = step.output, last.output, projection.output if projection is not None else "", following.output
    return _made(net, "conv_tail", last, members, parts, (step.args[0], residual), (following.output,))


def _conv_pool(net: _Net, step: Step) -> Group | None:
    if step.op != "conv_bn_act" or step.residual is not None:
        return None
    r, s = net.filters[step.output].weight.shape[2:]
    pool = net.only_reader(step)
    if r != s or r % 2 == 0 or not net.conv(step, r, stride=2) or pool is None or not _is_max_pool(pool):
        return None
    return _made(net, "conv_pool", pool, (step, pool), (step.output,), step.args)


def _pointwise_pool(net: _Net, step: Step) -> Group | None:
    if not _last(net, step):
        return None
    members, pool = [step], net.only_reader(step)
    if pool is not None and _call(pool, f"{_F}adaptive_avg_pool2d", ("output_size",)) in (
        {"output_size": 1},
        {"output_size": (1, 1)},
    ):
        members.append(pool)
        pool = net.only_reader(pool)
        flat = pool is not None and any(
            _call(pool, name, ("start_dim", "end_dim"), end_dim=-1) == {"start_dim": 1, "end_dim": -1}
            for name in ("torch.flatten", "Tensor.flatten")
        )
    else:
        flat = pool is not None and any(
            _call(pool, name, ("dim", "keepdim"), keepdim=False)
            in ({"dim": dim, "keepdim": False} for dim in ((2, 3), (-2, -1)))
            for name in ("torch.mean", "Tensor.mean")
        )
    return (
        _made(net, "pointwise_pool", pool, (*members, pool), (step.output,), (step.args[0], step.residual))
        if flat
        else None
    )


def _call(step: Step, target: str, parameters: tuple[str, ...], **defaults: Any) -> dict[str, Any] | None:
    """A function's arguments after the first by name, lists as tuples; None for another function or arguments that are not these."""
    if (
        step.op != "function"
        or step.target != target
        or len(step.args) > 1 + len(parameters)
        or not isinstance(step.args[0], Value)
    ):
        return None
    given = defaults | dict(zip(parameters, step.args[1:], strict=False)) | step.kwargs
    return {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}


def _is_max_pool(step: Step) -> bool:
    given = _call(
        step,
        f"{_F}max_pool2d",
        ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
        dilation=1,
        ceil_mode=False,
        return_indices=False,
    )
    return given is not None and {key: _pair(value) for key, value in given.items()} == {
        "kernel_size": (3, 3),
        "stride": (2, 2),
        "padding": (1, 1),
        "dilation": (1, 1),
        "ceil_mode": (False, False),
        "return_indices": (False, False),
    }


_MATCHERS: dict[str, Callable[[_Net, Step], Group | None]] = {
    "conv_tail": _conv_tail,
    "pointwise_pool": _pointwise_pool,
    "conv_pool": _conv_pool,
    "pointwise_pair": _pointwise_pair,
}
