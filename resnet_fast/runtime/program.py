"""A plan's steps bound to kernels for one input shape, run one after another, and on a GPU as one graph."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..dispatch.problem import Problem
from ..graph.ir import Group, Step, outputs, references
from ..graph.liveness import deaths, own_memory
from ..graph.network import Lowered
from .bind import Binder, Run, Values, _fill, bind
from .cuda_graph import Graph
from .members import Members


@dataclass(frozen=True)
class PlanStep:
    """One step as it runs: ``output`` names its value, ``target`` its convolution, module or function, ``modules`` all that it stands for.

    ``others``: of a group of steps the further convolutions.
    For the input shape that was last built: ``kernel`` and ``why`` it was chosen, shapes read and returned, two FLOPs for each multiply-add
    (convolutions and linear layers only), and the convolution's ``problem``.
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
        """The module that it stands for (of several the first), or the function's name."""
        return self.target if self.others else self.modules[0] if self.modules else self.target

    @property
    def what(self) -> str:
        """What it does in a word or two."""
        short = self.target.rpartition(".")[2] if self.op == "function" else self.op
        others = ["with", ", ".join(self.others)] if self.others else []
        return " ".join(
            [
                short,
                *others,
                *(["+", self.residual] if self.residual else []),
                *([self.act] if self.act != "none" else []),
            ]
        )

    @classmethod
    def of(cls, step: Step, **ran: Any) -> PlanStep:
        residual = step.residual.name if step.residual else None
        block = step.target.rpartition(".")[0] + "."
        others = (
            tuple(
                m.target.removeprefix(block) for m in step.members if m.op == "conv_bn_act" and m.target != step.target
            )
            if isinstance(step, Group)
            else ()
        )
        return cls(step.output, step.op, step.target, step.modules, residual, step.act, others, **ran)


class Program:
    """Built by running it once: ``answer`` is what that gave. ``largest``: bytes of its largest value; ``peak``: bytes alive at most.

    ``binder`` replaces :func:`bind`. With ``keep`` no value dies and ``values`` holds each with the seconds that it took, the least of three runs.
    """

    def __init__(
        self, lowered: Lowered, x: Tensor, *, graph: bool = False, keep: bool = False, binder: Binder | None = None
    ) -> None:
        self._lowered = lowered
        self._calls: list[tuple[Step, Run, frozenset[str]]] = []
        self.steps: list[PlanStep] = []
        self.values: dict[str, tuple[Any, float]] = {}
        self.graph: Graph | None = None
        self.largest = self.peak = x.nbytes
        values: Values = {lowered.inputs[0]: x}
        own = own_memory(lowered)
        for step, dead in zip(lowered.steps, deaths(lowered), strict=True):
            if keep:
                dead = set()
            writable = dead & own - ({step.args[0].name} if step.op == "conv_bn_act" else set())
            run, kernel, why, problem = (binder or bind)(lowered, step, values, writable, graph)
            reads = tuple(tuple(v.shape) for name in references(step) if isinstance(v := values[name], Tensor))
            result = _named(step, run, values)
            _leave(step, result, values)
            out = values[step.output]
            shape = tuple(out.shape) if isinstance(out, Tensor) else ()
            self.steps.append(
                PlanStep.of(
                    step,
                    kernel=kernel,
                    why=why,
                    reads=reads,
                    shape=shape,
                    problem=problem,
                    flops=_flops(lowered, step, shape, problem),
                )
            )
            if keep:
                seconds = min(_seconds(step, run, values) for _ in range(3))
                self.values |= {name: (values[name], seconds if name == step.output else 0.0) for name in outputs(step)}
            alive = {
                v.untyped_storage().data_ptr(): v.nbytes
                if v is x
                else v.untyped_storage().nbytes()  # x may be a part of a batch
                for v in values.values()
                if isinstance(v, Tensor)
            }
            inside = run.largest if isinstance(run, Members) else 0
            self.largest, self.peak = (
                max(self.largest, inside, *alive.values()),
                max(self.peak, inside + sum(alive.values())),
            )
            for name in dead:
                values.pop(name, None)
            self._calls.append((step, run, frozenset(dead)))
        self.answer = _fill(lowered.output, values, lowered.tensors)

    def __call__(self, x: Tensor) -> Any:
        """The steps one by one; what fails is named."""
        values: Values = {self._lowered.inputs[0]: x}
        for step, run, dead in self._calls:
            _leave(step, _named(step, run, values), values)
            for name in dead:
                del values[name]
        return _fill(self._lowered.output, values, self._lowered.tensors)


def _leave(step: Step, result: Any, values: Values) -> None:
    if isinstance(step, Group) and step.also:
        values.update(zip(outputs(step), result, strict=True))
    else:
        values[step.output] = result


def _named(step: Step, run: Run, values: Values) -> Any:
    try:
        return run(values)
    except torch.OutOfMemoryError:  # says no more of the step than of any other
        raise
    except (RuntimeError, TypeError, ValueError) as problem:
        raise ValueError(f"plan: step {step.output} ({step.target}) failed on this input: {problem}") from problem


def _seconds(step: Step, run: Run, values: Values) -> float:
    def now() -> float:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter()

    start = now()
    _named(step, run, values)
    return now() - start


def _flops(lowered: Lowered, step: Step, shape: tuple[int, ...], problem: Problem | None) -> int:
    if isinstance(step, Group):
        weights = sum(lowered.filters[part].weight.numel() for part in step.parts if part)
        return 0 if problem is None else 2 * problem.x[0] * problem.out_hw[0] * problem.out_hw[1] * weights
    filter_ = lowered.filters.get(step.output)
    if filter_ is not None and len(shape) == 4:
        return 2 * shape[0] * shape[2] * shape[3] * filter_.weight.numel()
    if step.target == "torch.nn.functional.linear" and shape:
        return 2 * lowered.tensors[step.args[1].path].numel() * (torch.Size(shape[:-1]).numel())
    return 0


# ---------------------------------------------------------------- binding a step for the shapes that it meets


# ---------------------------------------------------------------- a GPU's graph
