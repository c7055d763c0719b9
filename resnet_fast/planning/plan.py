"""A plan: a whole network as a list of steps over a snapshot of its weights. ``Engine`` runs it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..graph.across import Normalize, checked_names
from ..graph.network import Lowered, lowered_network
from ..runtime.explanation import Explanation, Line, timed
from ..runtime.program import PlanStep
from ..util.text import table
from .compare import Comparison, compare
from .engine import Engine, inference_settings
from .request import (
    Options,
    check_example,
    check_model,
    check_options,
    checked_device,
    checked_features,
    checked_normalize,
)

if TYPE_CHECKING:
    from ..tuning.group_table import GroupChoice, NetworkCase
    from ..tuning.groups import GroupTuner
    from ..tuning.kernels import Device

# A weak reference to the model, and ``fuse`` and ``features`` of its schedule.
Source = tuple["weakref.ref[nn.Module]", bool, Sequence[str] | None]


class Plan:
    """A network as steps over folded weights. Call it with images; print it for its steps. Thread-safe.

    Outputs never share memory with the input, the weights or a later call. ``asked`` are the groups that the user
    named, ``across`` those in use; ``notes`` say why.
    """

    def __init__(
        self,
        lowered: Lowered,
        options: Options,
        device: torch.device,
        *,
        cuda_graph: bool | None,
        source: Source | None = None,
    ) -> None:
        self._lowered = lowered  # the steps before any is part of a group
        self._source = source
        self.options = options
        self.device = checked_device(device)
        self.cuda_graph = cuda_graph
        self.asked = options.across
        self.notes: list[str] = []
        self._changing = threading.Lock()
        self._start_engine()

    def _start_engine(self) -> None:
        """Take a new engine for the weights, device and groups as they are now."""
        self._engine = Engine(self._lowered, self.options, self.device, self.cuda_graph, self.notes)
        for name in self._engine.absent_groups():
            note = f"across: this network has no {name}"
            if note not in self.notes:
                self.notes.append(note)

    # ------------------------------------------------------------ running

    def __call__(self, x: Tensor) -> Any:
        """Run on [N, C, H, W] (uint8 [N, H, W, 3] if made with ``normalize``).

        Raises ValueError for an input that the plan was not made for.
        """
        # the kernels have no fakes: break the compiler's graph here
        if torch.compiler.is_dynamo_compiling():
            return torch.compiler.disable(self.__call__)(x)
        transform = _active_transform()
        if transform is not None:
            raise ValueError(
                f"plan: {transform} cannot look into a plan, whose kernels have neither fakes nor derivatives: give it "
                "the model, in eval, that the plan was made of"
            )
        return self._engine(x)

    def build(self, example: Tensor) -> None:
        """Choose kernels and pack weights for such an input by running it (on a CPU, two images of it) once."""
        self._engine.build(example)

    def check_classes(self) -> None:
        """Raise ValueError if softmax or top-k is asked for and the program does not answer with that many classes."""
        built = self._engine.last_built
        if built is None or not (self.softmax or self.topk):
            return
        shapes = {step.output: step.shape for step in built.steps}
        output_name: str = getattr(self._lowered.output, "name", "")
        shape = shapes.get(output_name, ())
        least = self.topk or 1
        if len(shape) != 2 or least > shape[1]:
            raise ValueError(
                f"plan: softmax={self.softmax}, topk={self.topk}: expected a network that answers [N, classes] with at "
                f"least {least} classes, got {list(shape) or 'no single tensor'}"
            )

    # ------------------------------------------------------------ looking

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and activations."""
        return self.options.dtype

    @property
    def normalize(self) -> Normalize | None:
        """(mean, std) of uint8 input; None for input that is normalised already."""
        return self.options.normalize

    @property
    def softmax(self) -> bool:
        """Whether the plan answers with probabilities."""
        return self.options.softmax

    @property
    def topk(self) -> int | None:
        """How many of the likeliest classes the plan answers with; None for the whole output."""
        return self.options.topk

    @property
    def across(self) -> tuple[str, ...]:
        """The groups of steps in use, by kind or by name."""
        return self.options.across

    @property
    def steps(self) -> tuple[PlanStep, ...]:
        """The steps as data; with kernels, shapes and FLOPs as for the input shape that was built last."""
        engine = self._engine
        if engine.last_built is not None:
            return tuple(engine.last_built.steps)
        return tuple(PlanStep.of(step) for step in engine.lowered.steps)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the folded weights, without their packed forms."""
        convs = self._lowered.filters.values()
        weights = [conv.weight for conv in convs]
        biases = [conv.bias for conv in convs]
        tensors = self._lowered.tensors.values()
        return sum(tensor.nbytes for tensor in (*weights, *biases, *tensors))

    @property
    def activation_bytes(self) -> int:
        """Most bytes of activations alive at a time in the input shape that was built last; 0 before the first."""
        built = self._engine.last_built
        return 0 if built is None else built.peak

    @property
    def unfused(self) -> dict[str, str]:
        """The steps that are not fused, and what each is, by module or function."""
        return {
            step.name: "a module that runs as it is" if step.op == "module" else step.target
            for step in self.steps
            if step.op in ("module", "function")
        }

    def __str__(self) -> str:
        rows = [_row(step) for step in self.steps]
        dtype = str(self.dtype).removeprefix("torch.")
        head = (
            f"plan of {len(rows)} steps, {dtype} on {self.device}, "
            f"{self.weight_bytes / 1e6:.1f} MB of weights, "
            f"{self.activation_bytes / 1e6:.1f} MB of activations"
        )
        body = table(("step", "what", "in", "out", "GFLOP", "kernel"), rows, right=(4,))
        return "\n".join([head, body, *self.notes])

    __repr__ = __str__

    def explain(self, x: Tensor) -> Explanation:
        """Return which kernel runs each step on such an input, and why."""
        program = self._engine.program(x)
        in_graph = program.graph is not None
        explanation = Explanation()
        for step in program.steps:
            # Line's may be None too, but mypy reads runtime/ without strict_optional
            problem: Any = step.problem
            line = Line(step.target, step.op, step.kernel, step.why, problem)
            explanation.append(timed(line, in_graph))
        return explanation

    def compare(self, other: Plan, x: Tensor, exact: Plan | None = None) -> Comparison:
        """Compare two plans of one model step by step on one input, by distance and time.

        ``other``: say with ``fuse=False``. ``exact``: a third plan, say in float64, from which the error of both is
        measured. Raises ValueError for plans of different networks.
        """
        for plan in (other, exact):
            if plan is not None and not isinstance(plan, Plan):
                raise ValueError(f"plan: compare: got a {type(plan).__name__}, expected a plan")
        mine = self._engine.program_with_values(x)
        theirs = other._engine.program_with_values(x)
        oracle = None if exact is None else exact._engine.program_with_values(x)
        return compare(mine, theirs, oracle)

    # ------------------------------------------------------------ changing

    def refresh(self) -> Plan:
        """Take the model as it is now; raises RuntimeError if it is gone (or the plan was loaded)."""
        model = self._model()
        if model is None or self._source is None:
            raise RuntimeError(
                "plan: the model that this plan was made of is gone: make a new plan"
            )
        _, fuse, features = self._source
        lowered = lowered_network(model, self.dtype, self.device, fuse=fuse, features=features)
        return self._replace(lowered, self.device)

    def to(self, device: torch.device | str) -> Plan:
        """Move the weights to another device, in place. Raises ValueError for one that this machine has not."""
        device = checked_device(device)
        return self._replace(self._lowered.to(device), device)

    def _model(self) -> nn.Module | None:
        """The model that the plan was made of, if it is still there."""
        if self._source is None:
            return None
        model, _, _ = self._source
        return model()

    def _replace(self, lowered: Lowered, device: torch.device) -> Plan:
        with self._changing:
            self._lowered, self.device = lowered, device
            self._start_engine()
        return self

    def use_groups(self, choice: GroupChoice) -> None:
        """Form these groups from now on, in place; ``notes`` say why."""
        with self._changing:
            self.options = replace(self.options, across=checked_names(choice.across))
            others = [note for note in self.notes if not note.startswith("across:")]
            self.notes = [*others, *choice.notes]
            self._start_engine()

    # ------------------------------------------------------------ tuning

    def tune(
        self,
        example: Tensor,
        *,
        seconds: float = 60.0,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Measure this plan's kernels and groups on this GPU, and use the fastest.

        Kernels are measured one by one, then, for so many ``seconds``, whole networks with and without groups. What
        any process measured before with the same sources and versions is not measured again. ``say`` gets a line for
        each decision.
        """
        if self.device.type != "cuda":
            raise ValueError(f"plan: tune measures GPU kernels, this plan is on {self.device}")
        from ..tuning.kernels import Device

        with inference_settings(self.device):
            self.use_groups(self.group_tuner(example, Device.current(), seconds, say).tune())

    def group_tuner(
        self, example: Tensor, device: Device, seconds: float, say: Callable[[str], None]
    ) -> GroupTuner:
        """Return the search for this plan's groups; :meth:`use_groups` takes its choice."""
        from ..tuning.groups import GroupTuner

        return GroupTuner(
            self.network_case(example), self.variant, self.asked, example, device, seconds, say
        )

    def recall(self, example: Tensor) -> None:
        """Use the groups that :meth:`tune` chose for this network and input, in any process; ``notes`` say so."""
        from ..dispatch import tables
        from ..tuning import group_table

        if self.device.type == group_table.DEVICE and example.numel() > 0:
            choice = group_table.lookup(
                self.network_case(example), tables.gpu_name(self.device.index)
            )
            if choice is not None:
                self.use_groups(choice)

    def network_case(self, example: Tensor) -> NetworkCase:
        """Return what a stored choice of groups holds for."""
        from ..tuning.group_table import NetworkCase

        return NetworkCase(
            self._lowered, self.dtype, self.normalize, self.cuda_graph, tuple(example.shape)
        )

    # ------------------------------------------------------------ copying and saving

    def variant(self, across: Sequence[str]) -> Plan:
        """Return the same plan over the same weights with other groups."""
        options = replace(self.options, across=checked_names(across))
        return Plan(
            self._lowered, options, self.device, cuda_graph=self.cuda_graph, source=self._source
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        """Return another plan over the same weights, which no plan writes.

        Its ``refresh`` takes the same model, or the model's copy if that was made before by the same deepcopy.
        """
        copied = self.variant(self.across)
        copied.notes[:] = self.notes  # the list that its engine has too
        model = self._model()
        if self._source is not None and id(model) in memo:
            _, fuse, features = self._source
            copied._source = weakref.ref(memo[id(model)]), fuse, features
        return copied

    def __copy__(self) -> Plan:
        return self.__deepcopy__({})

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickle holds what ``save`` writes, not the model, and raises as ``save`` does."""
        from .file import record

        return restored_plan, (record(self._lowered, self.options), self.device, self.cuda_graph)

    def save(self, path: str | Path) -> None:
        """Write schedule and weights, for ``load_plan``. Raises ValueError if a module that is not data is a step."""
        from .file import record, write

        write(path, record(self._lowered, self.options))


def _row(step: PlanStep) -> tuple[str, ...]:
    """One line of the printed plan."""
    first_read = step.reads[0] if step.reads else ()
    return (
        step.name,
        step.what,
        "×".join(map(str, first_read)),
        "×".join(map(str, step.shape)),
        f"{step.flops / 1e9:.2f}" if step.flops else "",
        step.kernel,
    )


def _active_transform() -> str | None:
    """Return the transform running now that would have to see each of torch's calls, or None."""
    if torch.compiler.is_exporting():
        return "torch.export"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch.func"
    return None


# ---------------------------------------------------------------- making


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
    named, features = checked_names(across or ()), checked_features(features)
    normalize = checked_normalize(normalize)
    check_example(example, normalize)
    if dtype is None:
        dtype = example.dtype if example.is_floating_point() else torch.float32
    checked_device(example.device)
    check_model(model)
    options = Options(dtype, normalize, softmax, topk, named)
    check_options(options, example.device, cuda_graph, features)
    lowered = lowered_network(model, dtype, example.device, fuse=fuse, features=features)
    source = weakref.ref(model), fuse, features
    plan = Plan(lowered, options, example.device, cuda_graph=cuda_graph, source=source)
    if tune:
        plan.tune(example)
    elif across is None:
        plan.recall(example)
    plan.build(example)
    plan.check_classes()
    return plan


def restored_plan(
    record: Any, device: torch.device | str, cuda_graph: bool | None, path: str = "a pickle"
) -> Plan:
    """Return the plan of a record that was read from ``path``, on a device."""
    from .file import restored

    lowered, options = restored(record, path)
    device = checked_device(device)
    if device.type != "cpu":
        lowered = lowered.to(device)
    return Plan(lowered, options, device, cuda_graph=cuda_graph)
