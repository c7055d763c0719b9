"""The intermediate representation: values, attributes, steps, groups and schedules."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..util.text import table


class Value(NamedTuple):
    """A reference to what an input or an earlier step left under this name."""

    name: str


class Attribute(NamedTuple):
    """A reference to a parameter or buffer by its path."""

    path: str


@dataclass(frozen=True)
class Step:
    """One call. ``op``: "conv_bn_act", "add_act", "module" or "function"; ``target``: the module's path or the
    function's name.

    ``args`` and ``kwargs`` nest :class:`Value`, :class:`Attribute` and constants. ``modules`` are the paths that the
    step stands for: of a "conv_bn_act" the convolution, its batch norm ("" if none) and the activation. ``residual``
    and ``gate`` are fused operands.
    """

    op: str
    target: str
    output: str
    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    modules: tuple[str, ...] = ()
    residual: Value | None = None
    gate: Value | None = None
    act: str = "none"


@dataclass(frozen=True)
class Group(Step):
    """Several steps as one op across convolutions, which ``op`` names: it leaves ``output`` and the values ``also``.

    ``members``: the steps in the order in which they may run one by one; ``parts``: the outputs that name its filters, in the order of
    the op's arguments, "" for one that is not there.
    """

    also: tuple[str, ...] = ()
    members: tuple[Step, ...] = ()
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Schedule:
    """The steps of one forward, from ``inputs`` to the nested ``output``.

    ``inlined``: modules whose forward was looked into; ``skipped``: those that no step calls because a fused one
    stands for them; ``opaque``: those that stay one call and why; ``left``: convolutions with a batch norm that are
    not fused, and why; ``returned``: what each module that was called returned; ``idle``: inlined modules to which no
    fused step owes anything; ``writes_inputs``: the forward may write to what it is given;
    ``entangled``: steps that write in place what is read later by another name.
    """

    inputs: tuple[str, ...]
    steps: tuple[Step, ...]
    output: Any
    inlined: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    opaque: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    returned: dict[str, Any] = field(default_factory=dict)
    writes_inputs: bool = False
    entangled: tuple[str, ...] = ()

    @property
    def fused(self) -> list[Step]:
        """The steps that stand for several modules or functions."""
        return [s for s in self.steps if s.op in ("conv_bn_act", "add_act")]

    def __str__(self) -> str:
        return table(
            ("value", "op", "what", "act", "residual"),
            [(s.output, s.op, s.target, s.act, s.residual.name if s.residual else "") for s in self.steps],
        )


def outputs(step: Step) -> tuple[str, ...]:
    """The values that a step leaves."""
    return (step.output, *step.also) if isinstance(step, Group) else (step.output,)


def references(step: Step) -> list[str]:
    """The values that a step reads."""
    return names((step.args, step.kwargs, step.residual, step.gate))


def names(structure: Any) -> list[str]:
    """The names of all values in a nested structure."""
    if isinstance(structure, Value):
        return [structure.name]
    if isinstance(structure, slice):
        structure = (structure.start, structure.stop, structure.step)
    if isinstance(structure, dict):
        structure = tuple(structure.values())
    return [name for part in structure for name in names(part)] if isinstance(structure, (tuple, list)) else []
