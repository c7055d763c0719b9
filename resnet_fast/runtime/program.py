"""A program: the steps of a lowered network bound to kernels for one input shape, run one after another."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..dispatch import Problem
from ..graph.ir import Group, Step, outputs, references
from ..graph.network import Lowered
from .bind import Binder, Bound, Run, Values, _fill, bind
from .cuda_graph import Graph
from .members import Members


@dataclass(frozen=True)
class PlanStep:
    """One step as it runs.

    ``output`` names its value, ``target`` its convolution, module or function; ``modules`` are all that it stands for,
    ``others`` the further convolutions of a group. For the input shape that was last built: ``kernel`` and ``why`` it
    was chosen, the shapes read and returned, the convolution's ``problem``, and ``flops``, two for each multiply-add
    (convolutions and linear layers only).
    """

    output: str
    op: str
    target: str
    modules: tuple[str, ...]
    residual: str | None
    act: str
    others: tuple[str, ...] = ()
    kernel: str = ""
    why: str = ""
    reads: tuple[tuple[int, ...], ...] = ()
    shape: tuple[int, ...] = ()
    flops: int = 0
    problem: Problem | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        """The module that it stands for (the first of several), or the function's name."""
        return self.target if self.others or not self.modules else self.modules[0]

    @property
    def what(self) -> str:
        """What it does in a word or two."""
        words = [self.target.rpartition(".")[2] if self.op == "function" else self.op]
        if self.others:
            words += ["with", ", ".join(self.others)]
        if self.residual:
            words += ["+", self.residual]
        if self.act != "none":
            words.append(self.act)
        return " ".join(words)

    @classmethod
    def of(cls, step: Step, **ran: Any) -> PlanStep:
        return cls(
            output=step.output,
            op=step.op,
            target=step.target,
            modules=step.modules,
            residual=step.residual.name if step.residual else None,
            act=step.act,
            others=_further_convolutions(step) if isinstance(step, Group) else (),
            **ran,
        )


def _further_convolutions(step: Group) -> tuple[str, ...]:
    """The group's convolutions but the first, named within their block."""
    block, _, _ = step.target.rpartition(".")
    convs = [m.target for m in step.members if m.op == "conv_bn_act"]
    further = [target for target in convs if target != step.target]
    return tuple(target.removeprefix(f"{block}.") for target in further)


class Program:
    """A lowered network bound for one input shape. It is built by running it once: ``answer`` is that result.

    ``largest``: bytes of its largest value; ``peak``: most bytes alive at a time. ``binder`` replaces :func:`bind`.
    With ``keep`` no value is dropped, and ``values`` holds each with its seconds, the least of three runs.
    """

    def __init__(
        self,
        lowered: Lowered,
        x: Tensor,
        *,
        graph: bool = False,
        keep: bool = False,
        binder: Binder | None = None,
    ) -> None:
        self._lowered = lowered
        self._calls: list[tuple[Step, Run, frozenset[str]]] = []
        self.steps: list[PlanStep] = []
        self.values: dict[str, tuple[Any, float]] = {}
        self.graph: Graph | None = None
        self.largest = self.peak = x.nbytes
        values: Values = {lowered.inputs[0]: x}
        own = lowered.own_memory
        for step, dead in zip(lowered.steps, lowered.dead_after, strict=True):
            if keep:
                dead = set()
            bound = (binder or bind)(lowered, step, values, _writable(step, dead & own), graph)
            read = [values[name] for name in references(step)]
            _store(step, _run_named(step, bound.run, values), values)
            self.steps.append(_plan_step(lowered, step, bound, read, values[step.output]))
            if keep:
                self._keep(step, bound.run, values)
            self._measure(bound.run, values, x)
            for name in dead:
                values.pop(name, None)
            self._calls.append((step, bound.run, frozenset(dead)))
        self.answer = _fill(lowered.output, values, lowered.tensors)

    def __call__(self, x: Tensor) -> Any:
        """Run the steps one by one. An error names its step."""
        values: Values = {self._lowered.inputs[0]: x}
        for step, run, dead in self._calls:
            _store(step, _run_named(step, run, values), values)
            for name in dead:
                del values[name]
        return _fill(self._lowered.output, values, self._lowered.tensors)

    def _keep(self, step: Step, run: Run, values: Values) -> None:
        """Keep the step's values; the time counts for the first of them."""
        times = [_seconds(step, run, values) for _ in range(3)]
        for name in outputs(step):
            seconds = min(times) if name == step.output else 0.0
            self.values[name] = values[name], seconds

    def _measure(self, run: Run, values: Values, x: Tensor) -> None:
        """Update ``largest`` and ``peak`` after a step."""
        alive: dict[int, int] = {}
        for value in values.values():
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                # x may be a part of a batch
                alive[storage.data_ptr()] = value.nbytes if value is x else storage.nbytes()
        inside = run.largest if isinstance(run, Members) else 0
        self.largest = max(self.largest, inside, *alive.values())
        self.peak = max(self.peak, inside + sum(alive.values()))


def _writable(step: Step, dead: set[str]) -> set[str]:
    """The values that a step may overwrite, of those that nothing reads later; never a convolution's input."""
    if step.op != "conv_bn_act":
        return dead
    return dead - {step.args[0].name}


def _plan_step(lowered: Lowered, step: Step, bound: Bound, read: list[Any], out: Any) -> PlanStep:
    shape = tuple(out.shape) if isinstance(out, Tensor) else ()
    return PlanStep.of(
        step,
        kernel=bound.kernel,
        why=bound.why,
        reads=tuple(tuple(v.shape) for v in read if isinstance(v, Tensor)),
        shape=shape,
        problem=bound.problem,
        flops=_flops(lowered, step, shape, bound.problem),
    )


def _store(step: Step, result: Any, values: Values) -> None:
    if isinstance(step, Group) and step.also:
        values.update(zip(outputs(step), result, strict=True))
    else:
        values[step.output] = result


def _run_named(step: Step, run: Run, values: Values) -> Any:
    """``run(values)``; what it raises names the step."""
    try:
        return run(values)
    except torch.OutOfMemoryError:  # any step may be the one that does not fit
        raise
    except (RuntimeError, TypeError, ValueError) as problem:
        raise ValueError(
            f"plan: step {step.output} ({step.target}) failed on this input: {problem}"
        ) from problem


def _seconds(step: Step, run: Run, values: Values) -> float:
    start = _now()
    _run_named(step, run, values)
    return _now() - start


def _now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def _flops(lowered: Lowered, step: Step, shape: tuple[int, ...], problem: Problem | None) -> int:
    if isinstance(step, Group):
        if problem is None:
            return 0
        filters = [lowered.filters[part] for part in step.parts if part]
        weights = sum(f.weight.numel() for f in filters)
        images = problem.x[0]
        height, width = problem.out_hw
        return 2 * images * height * width * weights
    filter_ = lowered.filters.get(step.output)
    if filter_ is not None and len(shape) == 4:
        images, _, height, width = shape
        return 2 * images * height * width * filter_.weight.numel()
    if step.target == "torch.nn.functional.linear" and shape:
        rows = torch.Size(shape[:-1]).numel()
        weight = lowered.tensors[step.args[1].path]
        return 2 * weight.numel() * rows
    return 0
