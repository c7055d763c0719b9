"""The making and running of plans (``plan`` is the door): steps over folded weights, bound to kernels for each input shape."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..graph.across import group, known, label, takes_bytes
from ..graph.facts import is_norm, touched
from ..graph.fuse import schedule
from ..graph.ir import Group, Schedule
from ..graph.liveness import imagewise
from ..graph.network import Lowered, lower, refused
from ..graph.trace import Untraceable
from ..runtime.cuda_graph import Graph
from ..runtime.explanation import Explanation, Line, timed
from ..runtime.pieces import joined, pieces
from ..runtime.program import PlanStep, Program
from ..util.text import table
from .compare import Comparison, compare
from .request import Normalize, check_example, check_model, check_options, names_of, numbers, place

SHAPES = 8  # programs (and CUDA graphs) kept at a time, oldest out: a service that sees every shape must not grow without end


def make(
    model: nn.Module,
    example: Tensor,
    *,
    dtype: torch.dtype | None,
    cuda_graph: bool | None,
    tune: bool,
    fuse: bool,
    features: Sequence[str] | None,
    normalize: Normalize | None,
    softmax: bool,
    topk: int | None,
    across: Sequence[str] | None,
) -> Plan:
    """See :func:`resnet_fast.plan`."""
    named, features, normalize = known(across or ()), names_of(features), numbers(normalize)
    check_example(example, normalize)
    if dtype is None:
        dtype = example.dtype if example.is_floating_point() else torch.float32
    place(example.device)
    check_model(model)
    check_options(dtype, example.device, cuda_graph, softmax, topk, features)
    found = _schedule(model, fuse, features)
    made = Plan(
        lower(found, model, dtype, example.device),
        dtype,
        example.device,
        cuda_graph=cuda_graph,
        normalize=normalize,
        softmax=softmax,
        topk=topk,
        across=named,
        source=(weakref.ref(model), fuse, features),
    )
    if tune:
        made.tune(example)
    elif across is None:
        made.recall(example)
    made.build(example)
    made.check_classes()
    return made


def _schedule(model: nn.Module, fuse: bool, features: Sequence[str] | None) -> Schedule:
    """The whole network's schedule, or ValueError with everything that stands against it."""
    name = type(model).__name__
    inside = next(
        (child for child in ("module", "_orig_mod") if list(model._modules) == [child]), None
    )  # DDP, EMA; torch.compile
    hint = f"; it wraps another model: plan that, model.{inside}" if inside else ""

    def check(why: dict[str, str]) -> None:
        if why:
            raise ValueError(
                f"plan: cannot plan {name}: " + "; ".join(f"{what}: {reason}" for what, reason in why.items()) + hint
            )

    check(refused(model))
    try:
        found = schedule(model, _leaf, training=False, lone=True, fuse=fuse, outputs=features)
    except Untraceable as reason:
        raise ValueError(f"plan: {name} cannot be planned: {reason}{hint}") from None
    if len(found.inputs) != 1:
        raise ValueError(
            f"plan: {name}: got {len(found.inputs)} inputs ({', '.join(found.inputs)}), expected one tensor"
        )
    check(refused(model, found))
    return found


def _leaf(path: str, m: nn.Module) -> bool:
    """torch's own layers, batch norms of any make and what a user hooked stay one call."""
    return touched(m) or is_norm(m) or type(m).__module__.startswith("torch.nn.") and type(m) is not nn.Sequential


class Plan:
    """A network as steps over folded weights. Call it with images; print it for its steps. Outputs are the caller's own. Thread-safe."""

    def __init__(
        self,
        lowered: Lowered,
        dtype: torch.dtype,
        device: torch.device,
        *,
        cuda_graph: bool | None,
        normalize: Any,
        softmax: bool,
        topk: int | None,
        across: Sequence[str] = (),
        source: tuple | None = None,
    ) -> None:
        self._plain, self.dtype, self.device = lowered, dtype, place(device)  # its steps before any is part of a group
        self.cuda_graph, self.normalize, self.softmax, self.topk, self.across = (
            cuda_graph,
            normalize,
            softmax,
            topk,
            tuple(across),
        )
        self.asked = self.across  # the groups that the user named, whichever are in use
        self._source = source  # a weak reference to the model, and how its schedule was made
        self._lock, self._replaying = threading.RLock(), threading.Lock()
        self.notes: list[str] = []
        self._forget()

    def _forget(self) -> None:
        """Everything that follows from weights, device and the groups to form."""
        self._lowered = group(self._plain, self.across, self.normalize)
        self._bytes = takes_bytes(self._lowered)
        formed = {name for step in self._lowered.steps if isinstance(step, Group) for name in (step.op, label(step))}
        absent = [f"across: this network has no {name}" for name in self.across if name not in formed]
        self.notes += [note for note in absent if note not in self.notes]
        self._imagewise = self.device.type == "cpu" and imagewise(self._lowered.steps, self._lowered.output)
        self._programs: OrderedDict[tuple[int, ...], Program] = OrderedDict()
        self._last: Program | None = None
        self._made_for: tuple[int, ...] | None = None
        self._pool = self._replayed = None

    # ------------------------------------------------------------ running

    def __call__(self, x: Tensor) -> Any:
        """Run on [N, C, H, W] (uint8 [N, H, W, 3] if made with ``normalize``); raises ValueError for what the plan was not made for."""
        if torch.compiler.is_dynamo_compiling():  # its kernels have no fakes: a break in the compiler's graph
            return torch.compiler.disable(self.__call__)(x)
        if (transform := _transform()) is not None:
            raise ValueError(
                f"plan: {transform} cannot look into a plan, whose kernels have neither fakes nor derivatives: give it the model, "
                "in eval, that the plan was made of"
            )
        with _quiet(self.device):
            x = self._prepared(x)
            sizes = self._pieces(x)
            if len(sizes) == 1:
                return self._finish(self._run(x))
            return self._finish(joined([self._run(piece) for piece in x.split(sizes)]))

    def build(self, example: Tensor) -> None:
        """Choose kernels and pack weights for such an input by running it (on a CPU, two images of it) once."""
        with _quiet(self.device):
            x = self._prepared(example)
            if len(self._pieces(x)) == 1:
                self._run(x)

    def check_classes(self) -> None:
        """Raise ValueError if softmax or top-k is asked for and the built program does not answer with that many classes."""
        if (self.softmax or self.topk) and self._last is not None:
            shapes = {step.output: step.shape for step in self._last.steps}
            shape = shapes.get(getattr(self._lowered.output, "name", None), ())
            if len(shape) != 2 or (self.topk or 1) > shape[1]:
                raise ValueError(
                    f"plan: softmax={self.softmax}, topk={self.topk}: expected a network that answers [N, classes] with at least "
                    f"{self.topk or 1} classes, got {list(shape) or 'no single tensor'}"
                )

    def _prepared(self, x: Tensor) -> Tensor:
        """The input checked and normalised; as the first step wants it on a CPU, where it is cut next."""
        if not isinstance(x, Tensor) or x.dim() != 4 or x.device != self.device:
            got = f"{x.dim()}-D on {x.device}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"plan: got a {got} input, expected 4-D on {self.device}")
        if self.normalize is not None:
            if x.dtype != torch.uint8 or x.shape[3] != 3:
                raise ValueError(
                    f"plan: got {x.dtype} {list(x.shape)}, expected uint8 [N, H, W, 3]: the plan normalises by itself"
                )
            if self._bytes:
                return x.contiguous().permute(0, 3, 1, 2)
            mean, std = (torch.tensor(v, dtype=torch.float32, device=x.device) * 255 for v in self.normalize)
            return ((x - mean) / std).to(self.dtype).permute(0, 3, 1, 2)
        if not x.is_floating_point():
            raise ValueError(
                f"plan: got {x.dtype}, expected a floating dtype (uint8 photographs: plan(..., normalize=(mean, std)))"
            )
        return x if self.device.type == "cuda" else self._laid(x)

    def _laid(self, x: Tensor) -> Tensor:
        """In the plan's dtype, NHWC; bytes stay bytes."""
        return x if self._bytes else x.to(self.dtype).contiguous(memory_format=torch.channels_last)

    def _pieces(self, x: Tensor) -> list[int]:
        """How many images go through at a time; an image size that is new is tried with two."""
        if not self._imagewise or len(x) < 3:
            return [len(x)]
        key = (2, *x.shape[1:])
        if key not in self._programs:
            self._run(x[:2])
        probe = self._programs.get(key)
        return pieces(len(x), probe.largest // 2) if probe else [len(x)]

    def _run(self, x: Tensor) -> Any:
        with self._lock:
            program = self._programs.get(tuple(x.shape))
            if program is None:
                return self._built(self._laid(x))
            self._programs.move_to_end(tuple(x.shape))
        if program.graph is not None:  # the copy into its input lays it
            return self._replay(program.graph, x)
        x = self._laid(x)
        return _own(program(x), x, self._lowered)

    def _built(self, x: Tensor) -> Any:
        """Bind, and on a GPU capture, the program for a new shape; its answer."""
        graph = self.device.type == "cuda" and self.cuda_graph is not False and x.numel() > 0
        try:
            program = Program(self._lowered, x, graph=graph)
        except ValueError as problem:
            made_for = f" (the plan was made for {list(self._made_for)})" if self._made_for else ""
            raise ValueError(f"plan: got {list(x.shape)}{made_for}: {str(problem).removeprefix('plan: ')}") from problem
        answer, program.answer = _own(program.answer, x, self._lowered), None
        if graph:
            self._capture(program, x)
        self._programs[tuple(x.shape)] = self._last = program
        self._made_for = self._made_for or tuple(x.shape)
        while len(self._programs) > SHAPES:
            self._programs.popitem(last=False)
        return answer

    def _capture(self, program: Program, x: Tensor) -> None:
        self._pool = self._pool or (torch.cuda.graph_pool_handle(), torch.cuda.Stream(self.device))
        try:
            program.graph = Graph(program, x, *self._pool)
        except (RuntimeError, ValueError) as problem:
            self._pool = None  # see ``captured``
            if self.cuda_graph:
                raise
            self.notes.append(f"no CUDA graph for {list(x.shape)}, its steps run one by one: {problem}")
            warnings.warn(f"plan: {self.notes[-1]}", stacklevel=5)

    def _replay(self, graph: Graph, x: Tensor) -> Any:
        """One at a time, on whatever streams the callers are: the graphs share their memory."""
        with self._replaying:
            stream = torch.cuda.current_stream(self.device)
            if self._replayed is not None:
                stream.wait_event(self._replayed)
            answer = graph.replay(x)
            self._replayed = stream.record_event()
        return answer

    def _finish(self, out: Any) -> Any:
        if self.softmax or self.topk:
            out = torch.softmax(out.float(), 1)
        return tuple(torch.topk(out, self.topk, 1)) if self.topk else out

    # ------------------------------------------------------------ looking

    @property
    def steps(self) -> tuple[PlanStep, ...]:
        """The steps as data; with kernels, shapes and FLOPs as for the input shape that was built last."""
        return tuple(self._last.steps) if self._last else tuple(map(PlanStep.of, self._lowered.steps))

    @property
    def weight_bytes(self) -> int:
        """Bytes of the folded weights (packs of them come on top, one for each batch case met)."""
        held = [t for f in self._lowered.filters.values() for t in (f.weight, f.bias)] + list(
            self._lowered.tensors.values()
        )
        return sum(t.nbytes for t in held)

    @property
    def activation_bytes(self) -> int:
        """Most bytes of activations alive at a time in the input shape that was built last; 0 before the first."""
        return self._last.peak if self._last else 0

    @property
    def unfused(self) -> dict[str, str]:
        """What is not a fused step, and what it is, by module or function."""
        return {
            s.name: "a module that runs as it is" if s.op == "module" else s.target
            for s in self.steps
            if s.op in ("module", "function")
        }

    def __str__(self) -> str:
        def size(shape: tuple[int, ...]) -> str:
            return "×".join(map(str, shape))

        rows = [
            (
                s.name,
                s.what,
                size(s.reads[0]) if s.reads else "",
                size(s.shape),
                f"{s.flops / 1e9:.2f}" if s.flops else "",
                s.kernel,
            )
            for s in self.steps
        ]
        head = (
            f"plan of {len(rows)} steps, {str(self.dtype).removeprefix('torch.')} on {self.device}, "
            f"{self.weight_bytes / 1e6:.1f} MB of weights, {self.activation_bytes / 1e6:.1f} MB of activations"
        )
        body = table(("step", "what", "in", "out", "GFLOP", "kernel"), rows, right=(4,))
        return "\n".join([head, body, *self.notes])

    __repr__ = __str__

    def explain(self, x: Tensor) -> Explanation:
        """Which kernel runs each step on such an input, and why."""
        with _quiet(self.device):
            x = self._prepared(x)
            self._run(x)
            with self._lock:
                program = self._programs[tuple(x.shape)]
            return Explanation(
                timed(Line(s.target, s.op, s.kernel, s.why, s.problem), program.graph is not None)
                for s in program.steps
            )

    def compare(self, other: Plan, x: Tensor, exact: Plan | None = None) -> Comparison:
        """Both plans step by step on one input, by distance and time; ``other`` is of the same model, say with ``fuse=False``.

        ``exact``: a third plan of it, say in float64, from which both are measured: then by each one's error too. Raises ValueError for
        plans of different networks.
        """
        for plan in (other, exact):
            if plan is not None and not isinstance(plan, Plan):
                raise ValueError(f"plan: compare: got a {type(plan).__name__}, expected a plan")
        return compare(self._kept(x), other._kept(x), None if exact is None else exact._kept(x))

    def _kept(self, x: Tensor) -> Program:
        with _quiet(self.device):
            return Program(self._lowered, self._laid(self._prepared(x)), keep=True)

    # ------------------------------------------------------------ changing

    def refresh(self) -> Plan:
        """Take the model as it is now; raises RuntimeError if it is gone (or the plan was loaded)."""
        model = self._source[0]() if self._source else None
        if model is None:
            raise RuntimeError("plan: the model that this plan was made of is gone: make a new plan")
        return self._replace(lower(_schedule(model, *self._source[1:]), model, self.dtype, self.device), self.device)

    def to(self, device: torch.device | str) -> Plan:
        """Move the weights to another device, in place. Raises ValueError for one that this machine has not."""
        return self._replace(self._plain.to(place(device)), place(device))

    def _replace(self, lowered: Lowered, device: torch.device) -> Plan:
        with self._lock:
            self._plain, self.device = lowered, device
            self._forget()
        return self

    def tune(self, example: Tensor, *, seconds: float = 60.0, say: Callable[[str], None] = lambda line: None) -> None:
        """Measure this plan's kernels, and then for so many ``seconds`` whole networks with and without groups, on this GPU, and use what won.

        What was measured before with the same sources and versions, in whichever process, is not measured again. ``say`` gets a line for each
        decision. See ``plan_tuning``.
        """
        if self.device.type != "cuda":
            raise ValueError(f"plan: tune measures GPU kernels, this plan is on {self.device}")
        from ..tuning import groups

        with _quiet(self.device):
            groups.tune(self, example, groups.Device.current(), seconds, say)

    def recall(self, example: Tensor) -> None:
        """Use the groups that :meth:`tune` found to pay for this network and input, in whichever process; ``notes`` say so."""
        from ..dispatch import tables
        from ..tuning import group_table

        if self.device.type == group_table.DEVICE and example.numel() > 0:
            found = group_table.find(self, example, tables.gpu_name(self.device.index))
            if found is not None:
                self.use_across(found.across, found.notes)

    def variant(self, across: Sequence[str]) -> Plan:
        """The same plan over the same weights with other groups."""
        return Plan(
            self._plain,
            self.dtype,
            self.device,
            cuda_graph=self.cuda_graph,
            normalize=self.normalize,
            softmax=self.softmax,
            topk=self.topk,
            across=known(across),
            source=self._source,
        )

    def use_across(self, across: Sequence[str], why: Sequence[str] = ()) -> None:
        """Form these groups from now on, in place; ``notes`` say why."""
        with self._lock:
            self.across = known(across)
            self.notes = [*(note for note in self.notes if not note.startswith("across:")), *why]
            self._forget()

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        """A plan of its own over the same weights, which no plan writes. ``refresh`` takes the same model, or its copy if that came before."""
        copied, model = self.variant(self.across), self._source[0]() if self._source else None
        copied.notes = list(self.notes)
        if id(model) in memo:
            copied._source = (weakref.ref(memo[id(model)]), *self._source[1:])
        return copied

    def __copy__(self) -> Plan:
        return self.__deepcopy__({})

    def __reduce__(self) -> tuple:
        """A pickle holds what ``save`` writes, not the model, and raises as ``save`` does."""
        from .file import record, restored

        return restored, (record(self), self.device, self.cuda_graph)

    def save(self, path: str | Path) -> None:
        """Write schedule and weights; ``load_plan`` reads them. Raises ValueError if a module that is not data is part of the plan."""
        from .file import save

        save(self, path)


def _transform() -> str | None:
    """What runs now that would have to see each of torch's calls, or None."""
    if torch.compiler.is_exporting():
        return "torch.export"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace"
    return "torch.func" if torch._C._functorch.peek_interpreter_stack() is not None else None


@contextmanager
def _quiet(device: torch.device) -> Iterator[None]:
    """No gradients; no autocast: it would cast what the plan has in its dtype already; and its GPU the current one, where kernels and graphs go.

    Autocast is turned off only where it is on: that alone takes 6 µs of a call, in which a GPU waits.
    """
    autocast = torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()
    with torch.no_grad(), autocast, torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        yield


def _own(result: Any, x: Tensor, lowered: Lowered) -> Any:
    """The nested result, copied where it lies in the input's memory or in a weight's."""
    if isinstance(result, Tensor):
        lent = {t.untyped_storage().data_ptr() for t in (x, *lowered.tensors.values())}
        return result.clone() if result.untyped_storage().data_ptr() in lent else result
    if isinstance(result, dict):
        return type(result)((k, _own(v, x, lowered)) for k, v in result.items())
    return type(result)(_own(v, x, lowered) for v in result) if isinstance(result, (tuple, list)) else result
