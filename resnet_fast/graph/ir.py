"""The intermediate representation: values, attributes, steps, groups and schedules."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .tree import leaves

# The ops of fused steps.
FUSED = ("conv_bn_act", "add_act")


@dataclass(frozen=True)
class Value:
    """A reference to an input or to the result of an earlier step."""

    name: str


@dataclass(frozen=True)
class Attribute:
    """A reference to a parameter or buffer by its path."""

    path: str


@dataclass(frozen=True)
class Step:
    """One call. ``op``: "conv_bn_act", "add_act", "module" or "function"; ``target``: the module's path or the
    function's name.

    ``args`` and ``kwargs`` nest :class:`Value`, :class:`Attribute` and constants. ``modules`` are the paths of the
    modules that the step replaces: of a "conv_bn_act" the convolution, its batch norm ("" if none) and the activation.
    ``residual`` and ``gate`` are fused operands.
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
    """Several steps as one op across convolutions, named by ``op``. Its results are ``output`` and the values ``also``.

    ``members``: the steps in an order in which they may run one by one. ``parts``: the outputs that name its filters,
    in the order of the op's arguments; "" for a missing one.
    """

    also: tuple[str, ...] = ()
    members: tuple[Step, ...] = ()
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Schedule:
    """The steps of one forward, from ``inputs`` to the nested ``output``.

    ``inlined``: modules whose forward was traced into. ``idle``: inlined modules without any fused step inside.
    ``skipped``: modules that no step calls, because a fused step replaces them. ``opaque``: modules that could not be
    traced into, and why. ``left``: convolutions with a batch norm that are not fused, and why. ``returned``: the result
    of each module that was called. ``writes_inputs``: the forward may write to its inputs. ``entangled``: steps that
    write in place what is read later under another name.
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
        """The steps that replace several modules or functions."""
        return [s for s in self.steps if s.op in FUSED]

    def __str__(self) -> str:
        from ..util.text import table

        header = ("value", "op", "what", "act", "residual")
        rows = []
        for step in self.steps:
            residual = step.residual.name if step.residual else ""
            rows.append((step.output, step.op, step.target, step.act, residual))
        return table(header, rows)


def outputs(step: Step) -> tuple[str, ...]:
    """The values that a step returns."""
    return (step.output, *step.also) if isinstance(step, Group) else (step.output,)


def references(step: Step) -> list[str]:
    """The values that a step reads."""
    return names((step.args, step.kwargs, step.residual, step.gate))


def names(structure: Any) -> list[str]:
    """The names of all values in a nested structure."""
    return [leaf.name for leaf in leaves(structure) if isinstance(leaf, Value)]


def called_name(step: Step) -> Any:
    """The short name of the function that a step calls; for ``getattr`` the attribute's."""
    if step.target == "builtins.getattr":
        return step.args[1]
    _, _, short = step.target.rpartition(".")
    return short
