"""The making and running of plans (``plan`` is the door): steps over folded weights, bound to kernels for each input shape."""

from __future__ import annotations

import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import planned
from .bound import references
from .console import table
from .explain import Explanation, Line
from .nodes import is_norm, touched
from .planned import Filter, Lowered, deaths, lower, own_memory
from .problem import Problem, layout
from .schedule import Schedule, schedule
from .tracing import Untraceable

SHAPES = 8  # programs (and CUDA graphs) kept at a time, oldest out: a service that sees every shape must not grow without end


def make(model: nn.Module, example: Tensor, *, dtype: torch.dtype | None, cuda_graph: bool | None, tune: bool, fuse: bool,
         features: Sequence[str] | None, normalize: tuple[Sequence[float], Sequence[float]] | None, softmax: bool, topk: int | None) -> Plan:
    """See :func:`resnet_fast.plan`."""
    _check_example(example, normalize)
    if dtype is None:
        dtype = example.dtype if example.is_floating_point() else torch.float32
    refused = planned.unplannable(model)
    if refused:
        raise ValueError("plan: cannot plan " + "; ".join(f"{path or type(model).__name__}: {why}" for path, why in refused.items()))
    try:
        found = schedule(model, _leaf, training=False, lone=True, fuse=fuse, outputs=features)
    except Untraceable as reason:
        raise ValueError(f"plan: {type(model).__name__} cannot be planned: {reason}") from None
    if len(found.inputs) != 1:
        raise ValueError(f"plan: {type(model).__name__}: got {len(found.inputs)} inputs ({', '.join(found.inputs)}), expected one tensor")
    made = Plan(found, lower(found, model, dtype, example.device), dtype, example.device, cuda_graph=cuda_graph, normalize=normalize,
                softmax=softmax, topk=topk, model=model)
    if tune:
        made.tune(example)
    made(example)
    return made


def _leaf(path: str, m: nn.Module) -> bool:
    """torch's own layers, batch norms of any make and what a user hooked stay one call."""
    return touched(m) or is_norm(m) or type(m).__module__.startswith("torch.nn.") and type(m) is not nn.Sequential


def _check_example(example: Tensor, normalize: Any) -> None:
    if not isinstance(example, Tensor) or example.dim() != 4:
        shape = list(example.shape) if isinstance(example, Tensor) else type(example).__name__
        raise ValueError(f"plan: example: got {shape}, expected one 4-D tensor [N, C, H, W]")
    if (normalize is not None) != (example.dtype == torch.uint8):
        raise ValueError(f"plan: example: got {example.dtype} with normalize={normalize}, expected uint8 [N, H, W, 3] with normalize=(mean, std), "
                         "or a floating dtype without")


class Plan:
    """A network as steps over folded weights. Call it with images; print it for its steps. Outputs are the caller's own. Thread-safe."""

    def __init__(self, found: Schedule | None, lowered: Lowered, dtype: torch.dtype, device: torch.device, *, cuda_graph: bool | None,
                 normalize: Any, softmax: bool, topk: int | None, model: nn.Module | None) -> None:
        self._schedule, self._lowered, self.dtype, self.device = found, _shared(lowered), dtype, torch.device(device)
        self.cuda_graph = self.device.type == "cuda" if cuda_graph is None else cuda_graph
        self.normalize, self.softmax, self.topk = normalize, softmax, topk
        self._model = None if model is None else weakref.ref(model)
        self._programs: OrderedDict[tuple, _Program] = OrderedDict()
        self._lock = threading.Lock()
        self.notes: list[str] = []

    # ------------------------------------------------------------ running

    @property
    def steps(self) -> tuple:
        """The steps, as data."""
        return self._lowered.steps

    def __call__(self, x: Tensor) -> Any:
        """Run on [N, C, H, W] (uint8 [N, H, W, 3] if made with ``normalize``); raises ValueError for what the plan was not made for."""
        with torch.inference_mode():
            x = self._prepared(x)
            return self._finish(self._program(x)(x))

    def _prepared(self, x: Tensor) -> Tensor:
        """The input as the first step wants it: checked, normalised, in the plan's dtype, NHWC."""
        if not isinstance(x, Tensor) or x.dim() != 4 or x.device.type != self.device.type:
            got = f"{x.dim()}-D on {x.device}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"plan: got a {got} input, expected 4-D on {self.device}")
        if self.normalize is not None:
            if x.dtype != torch.uint8 or x.shape[3] != 3:
                raise ValueError(f"plan: got {x.dtype} {list(x.shape)}, expected uint8 [N, H, W, 3]: the plan normalises by itself")
            mean, std = (torch.tensor(v, dtype=torch.float32, device=x.device) * 255 for v in self.normalize)
            return ((x.float() - mean) / std).to(self.dtype).permute(0, 3, 1, 2)
        if not x.is_floating_point():
            raise ValueError(f"plan: got {x.dtype}, expected a floating dtype (uint8 photographs: plan(..., normalize=(mean, std)))")
        return x.to(self.dtype).contiguous(memory_format=torch.channels_last)

    def _finish(self, out: Any) -> Any:
        if self.softmax or self.topk:
            out = torch.softmax(out.float(), 1)
        return tuple(torch.topk(out, self.topk, 1)) if self.topk else out

    def _program(self, x: Tensor) -> _Program:
        key = tuple(x.shape)
        with self._lock:
            found = self._programs.get(key)
            if found is None:
                found = self._programs[key] = _Program(self._lowered, x)
                if self.cuda_graph and self.device.type == "cuda" and x.numel():
                    note = found.capture(x)
                    self.notes += [note] if note else []
                while len(self._programs) > SHAPES:
                    self._programs.popitem(last=False)
            self._programs.move_to_end(key)
            return found

    # ------------------------------------------------------------ looking

    def __str__(self) -> str:
        rows = [(s.output, s.op, s.target, s.act, s.residual.name if s.residual else "") for s in self.steps]
        head = f"plan of {len(rows)} steps, {str(self.dtype).removeprefix('torch.')} on {self.device}, {self.weight_bytes / 1e6:.1f} MB of weights"
        return "\n".join([head, table(("value", "op", "what", "act", "residual"), rows), *self.notes])

    __repr__ = __str__

    @property
    def weight_bytes(self) -> int:
        """Bytes of the folded weights (packs of them come on top, one for each batch case met)."""
        held = [t for f in self._lowered.filters.values() for t in (f.weight, f.bias)] + list(self._lowered.tensors.values())
        return sum(t.nbytes for t in held)

    @property
    def unfused(self) -> dict[str, str]:
        """What is not a fused step, and why: by the step's target."""
        return {s.target: planned.why_unplanned(s, self._lowered.modules.get(s.target)) for s in self.steps if s.op in ("module", "function")}

    def explain(self, x: Tensor) -> Explanation:
        """Which kernel runs each step on such an input, and why."""
        with torch.inference_mode():
            x = self._prepared(x)
            return Explanation(Line(step.target, step.op, kernel, why, problem) for step, kernel, why, problem in
                               self._program(x).explained)

    def compare(self, other: Plan, x: Tensor) -> str:
        """Both plans step by step on one input: for each value that both have, its distance (relative RMS) and both times since the last, in ms."""
        from .testing import error  # the judge is not needed to run
        mine, theirs = self._trace(x), other._trace(x)
        rows, spent = [], [0.0, 0.0]
        for name, (value, seconds) in mine.items():
            spent[0] += seconds
            if name in theirs and isinstance(value, Tensor):
                spent[1] = sum(s for other_name, (_, s) in theirs.items() if _not_after(theirs, other_name, name)) - sum(r[3] for r in rows) / 1e3
                distance = error(value, theirs[name][0].double()).rms
                rows.append((name, f"{distance:.1e}", spent[0] * 1e3, spent[1] * 1e3))
                spent = [0.0, 0.0]
        return table(("value", "distance", "ms", "other's ms"), [(n, d, f"{a:.2f}", f"{b:.2f}") for n, d, a, b in rows], right=(1, 2, 3))

    def _trace(self, x: Tensor) -> dict[str, tuple[Any, float]]:
        with torch.inference_mode():
            x = self._prepared(x)
            return _Program(self._lowered, x, keep=True).values

    # ------------------------------------------------------------ changing

    def refresh(self) -> Plan:
        """Take the model's present weights; raises RuntimeError if the model is gone (or the plan was loaded)."""
        model = self._model() if self._model else None
        if model is None:
            raise RuntimeError("plan: the model that this plan was made of is gone: make a new plan")
        return self._replace(lower(self._schedule, model, self.dtype, self.device), self.device)

    def to(self, device: torch.device | str) -> Plan:
        """Move the weights to another device, in place."""
        device = torch.device(device)
        held = self._lowered
        filters = {k: Filter(f.weight.to(device), f.bias.to(device), f.geometry) for k, f in held.filters.items()}
        tensors = {k: t.to(device) for k, t in held.tensors.items()}
        moved = Lowered(held.steps, held.inputs, held.output, filters, tensors, {k: m.to(device) for k, m in held.modules.items()})
        return self._replace(moved, device)

    def _replace(self, lowered: Lowered, device: torch.device) -> Plan:
        with self._lock:
            self._lowered, self.device = _shared(lowered), device
            self._programs.clear()
        return self

    def tune(self, example: Tensor) -> None:
        """Measure the kernels for this plan's problems on this GPU, and use what won; see ``autotune``."""
        if self.device.type != "cuda":
            raise ValueError(f"plan: tune measures GPU kernels, this plan is on {self.device}")
        from . import autotune
        with torch.inference_mode():
            problems = [line.problem for line in self.explain(example) if line.problem is not None]
        autotune.tune(list(dict.fromkeys(problems)))
        with self._lock:
            self._programs.clear()

    def save(self, path: str | Path) -> None:
        """Write schedule and weights; :func:`load_plan` reads them. Raises ValueError if a module that is not data is part of the plan."""
        from .planfile import save
        save(self, path)


def _not_after(values: dict[str, Any], name: str, end: str) -> bool:
    order = list(values)
    return order.index(name) <= order.index(end)


class _Program:
    """A plan's steps bound to kernels for one input shape, and on a GPU their graph. Running it once is how it is built."""

    def __init__(self, lowered: Lowered, x: Tensor, keep: bool = False) -> None:
        self._lowered, self._input = lowered, lowered.inputs[0]
        self._calls: list[tuple[str, planned.Run, tuple[str, ...], str]] = []
        self.explained: list[tuple] = []
        self.values: dict[str, tuple[Any, float]] = {}
        self._graph = None
        values: dict[str, Any] = {self._input: x}
        own = own_memory(lowered)
        for step, dead in zip(lowered.steps, deaths(lowered), strict=True):
            reads = set(references(step))
            dies = set() if keep else dead & own & reads - ({step.args[0].name} if step.op == "conv_bn_act" else set())
            run, kernel, why = planned.bind(lowered, step, values, dies)
            self.explained.append((step, kernel, why, self._problem(step, values)))
            start = time.perf_counter()
            values[step.output] = _named(step, run, values)
            self.values[step.output] = values[step.output] if not keep else (values[step.output], time.perf_counter() - start)
            drop = () if keep else tuple(dead)
            for name in drop:
                values.pop(name, None)
            self._calls.append((step.output, run, drop, step.target))
        if not keep:
            self.values = {}

    def _problem(self, step: Any, values: dict[str, Any]) -> Problem | None:
        if step.op != "conv_bn_act":
            return None
        x, f = values[step.args[0].name], self._lowered.filters[step.output]
        stride, padding, dilation, groups = f.geometry
        residual = None if step.residual is None else layout(values[step.residual.name])
        capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else None
        return Problem("conv_bn_act", x.device.type, x.dtype, tuple(x.shape), layout(x), tuple(f.weight.shape), tuple(stride), tuple(padding),
                       tuple(dilation), groups, residual, False, False, step.act, capability)

    def __call__(self, x: Tensor) -> Any:
        if self._graph is not None:
            with self._replaying:
                self._static.copy_(x)
                self._graph.replay()
                return _own(self._answer)
        return _own_views(self._run(x), x)

    def _run(self, x: Tensor) -> Any:
        values: dict[str, Any] = {self._input: x}
        for name, run, drop, target in self._calls:
            try:
                values[name] = run(values)
            except RuntimeError as problem:
                raise type(problem)(f"plan: step {name} ({target}): {problem}") from problem
            for dead in drop:
                values.pop(dead, None)
        return planned.fill(self._lowered.output, values, self._lowered.tensors)

    def capture(self, x: Tensor) -> str | None:
        """Record one CUDA graph; a sentence if that fails, and the steps then run one by one."""
        self._replaying, self._static = threading.Lock(), x.clone(memory_format=torch.preserve_format)
        side = torch.cuda.Stream(x.device)
        side.wait_stream(torch.cuda.current_stream(x.device))
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(side):
                self._run(self._static)  # warms up allocator and handles outside the capture
            torch.cuda.current_stream(x.device).wait_stream(side)
            with torch.cuda.graph(graph):
                self._answer = self._run(self._static)
        except RuntimeError as problem:
            return f"no CUDA graph for {list(x.shape)}, its steps run one by one: {problem}"
        self._graph = graph
        return None


def _named(step: Any, run: planned.Run, values: dict[str, Any]) -> Any:
    try:
        return run(values)
    except RuntimeError as problem:
        raise ValueError(f"plan: step {step.output} ({step.target}) does not fit this input: {problem}") from problem


def _own(result: Any) -> Any:
    """Copies: a graph's outputs lie in its own memory, and the next replay would change the caller's earlier answer."""
    if isinstance(result, Tensor):
        return result.clone()
    return type(result)((k, _own(v)) for k, v in result.items()) if isinstance(result, dict) else type(result)(map(_own, result))


def _own_views(result: Any, x: Tensor) -> Any:
    """The result itself, copied only where it is the input's memory."""
    if isinstance(result, Tensor):
        return result.clone() if result.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() else result
    if isinstance(result, dict):
        return type(result)((k, _own_views(v, x)) for k, v in result.items())
    return type(result)(_own_views(v, x) for v in result) if isinstance(result, (tuple, list)) else result


_filters: weakref.WeakSet[Filter] = weakref.WeakSet()


def _shared(lowered: Lowered) -> Lowered:
    """Filters that a living plan holds with the very same values are taken from it: plans of one model share their weights."""
    for name, f in lowered.filters.items():
        found = next((g for g in list(_filters) if g.weight.shape == f.weight.shape and g.same(f)), None)
        if found is None:
            _filters.add(f)
        else:
            lowered.filters[name] = found
    return lowered
