"""One step bound to a kernel for the shapes that it meets."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch.problem import Problem
from ..dispatch.registry import Kernel, choose, describe, find
from ..graph.facts import function
from ..graph.ir import Attribute, Group, Step, Value
from ..graph.network import Lowered
from ..graph.weights import Filter
from ..kernels.aten import onednn_takes
from ..kernels.cpu import FORMS, Form
from ..kernels.cpu import preferred as preferred_on_cpu
from .members import EXTERNAL, Members, flat

Values = dict[str, Any]


Run = Callable[[Values], Any]


Binder = Callable[[Lowered, Step, Values, set[str], bool], tuple[Run, str, str, Problem | None]]


def _fill(structure: Any, values: Values, tensors: dict[str, Tensor]) -> Any:
    """The structure with values and tensors in place of references."""
    if isinstance(structure, Value):
        return values[structure.name]
    if isinstance(structure, Attribute):
        return tensors[structure.path]
    if isinstance(structure, (tuple, list)):
        return type(structure)(_fill(part, values, tensors) for part in structure)
    if isinstance(structure, dict):
        return type(structure)((key, _fill(part, values, tensors)) for key, part in structure.items())
    if isinstance(structure, slice):
        return slice(*(_fill(part, values, tensors) for part in (structure.start, structure.stop, structure.step)))
    return structure


def bind(
    lowered: Lowered, step: Step, values: Values, writable: set[str], graph: bool
) -> tuple[Run, str, str, Problem | None]:
    """(callable over the values, kernel, why it, problem) of a step; ``writable`` are the values whose memory the step may take for its own."""
    if isinstance(step, Group):
        return _bind_group(lowered, step, values, writable, graph)
    if step.op == "conv_bn_act":
        return _bind_conv(lowered.filters[step.output], step, values, writable, graph)
    if step.op == "add_act":
        return _bind_add(step), "torch", "add and activation", None
    call = lowered.modules[step.target] if step.op == "module" else function(step.target)

    def run(v: Values) -> Any:
        return call(*_fill(step.args, v, lowered.tensors), **_fill(step.kwargs, v, lowered.tensors))

    return run, "torch", "a module that is no data" if step.op == "module" else "a function of torch's", None


def _bind_conv(
    f: Filter, step: Step, values: Values, writable: set[str], graph: bool
) -> tuple[Run, str, str, Problem | None]:
    x = values[step.args[0].name]
    wanted = f.weight.shape[1] * f.geometry[3]
    if x.dim() != 4 or x.shape[1] != wanted or min(_conv_shape(f, x)[2:]) < 1:
        raise ValueError(
            f"plan: step {step.output} ({step.target}) does not fit this input: got {list(x.shape)}, expected "
            f"{wanted} channels and at least one output pixel for filters of {list(f.weight.shape)}"
        )
    residual = None if step.residual is None else values[step.residual.name]
    if residual is not None and (residual.dtype != x.dtype or tuple(residual.shape) != _conv_shape(f, x)):
        return _bind_torch(f, step, False, torch.add), "torch", "the residual broadcasts or promotes", None
    shift = f.bias.to(torch.promote_types(f.bias.dtype, torch.float32))
    affine = (torch.ones_like(shift), shift)
    problem = describe("conv_bn_act", (x, f.weight, *affine, residual, None, None, 0.0, *f.geometry, step.act))
    chosen, why = _choose(problem, graph)
    in_place = residual is not None and step.residual.name in writable
    if chosen.id == "aten.cudnn_fused":
        return _bind_cudnn(f, step), chosen.id, why, problem
    form = FORMS.get(chosen.id)
    packs = f.packed(x.shape, form.make) if form else None
    if packs is not None:
        plain = partial(_bind_plain, f, step, onednn_takes(x, f.weight), x.shape)
        return bind_form(step, form, packs, plain, f.weight.shape[2:], f.geometry, in_place), chosen.id, why, problem
    if form is not None:
        why = f"{chosen.id} cannot take these weights: not finite, or too large"
    elif chosen.id != "aten.conv_bn_act":
        return _bind_kernel(chosen, f, affine, step), chosen.id, why, problem
    if onednn_takes(x, f.weight):
        # One pixel or one channel is NCHW and NHWC at once: torch 2.11 cannot fuse the add then.
        in_place = in_place and not residual.is_contiguous()
        return bind_onednn(step, *f.packed(x.shape), f.geometry, in_place), "aten (oneDNN)", why, problem
    return _bind_torch(f, step, in_place), "aten", why, problem


def _bind_group(
    lowered: Lowered, step: Group, values: Values, writable: set[str], graph: bool
) -> tuple[Run, str, str, Problem | None]:
    """The op's kernel if one is forced or was measured to win; else the members one by one, each by its own choice."""
    args, misfit = flat(lowered, step, values)
    problem = None if misfit else describe(step.op, args)
    if problem is not None:
        chosen, why = _choose(problem, graph)
        if chosen.id != f"aten.{step.op}" or why.startswith("forced"):
            return _bind_across(chosen, step, args), chosen.id, why, problem
    members = Members(step, lowered, values)
    told = [
        members.bind(m, *bind(lowered, m, members.values, members.writable(m, writable), graph)) for m in step.members
    ]
    kernels = " + ".join(dict.fromkeys(kernel for kernel in told if kernel != "torch"))
    members.forget()
    return members, kernels, f"one by one: {misfit or why}", problem


def _bind_across(chosen: Kernel, step: Group, args: tuple) -> Run:
    names = {i: value.name for i, value in zip(EXTERNAL[step.op], step.args, strict=True)}
    held = tuple(None if i in names else a for i, a in enumerate(args))  # the activations of this call are not kept
    return lambda v: chosen.fn(*(v[names[i]] if i in names else a for i, a in enumerate(held)))


def _choose(problem: Problem, graph: bool) -> tuple[Kernel, str]:
    """As every op chooses, but that weights lie here once; inside a CUDA graph, where host time is nothing, by the times measured there."""
    chosen, why = choose(problem)
    if problem.device == "cpu" and not why.startswith("forced") and problem.op == "conv_bn_act":
        preferred = preferred_on_cpu(problem, live=False)
        return (find(preferred[0]), preferred[1]) if preferred else (chosen, why)
    if not graph or problem.device != "cuda" or why.startswith("forced"):
        return chosen, why
    from ..dispatch import tables

    entry = tables.lookup(problem, graph=True)
    if entry is None or find(entry["kernel"]).reason(problem) is not None:
        return find("aten", problem.op), "default"
    return find(entry["kernel"]), f"measured in a graph on {tables.gpu_name()}"


def _names(step: Step) -> tuple[str, str | None, bool]:
    return step.args[0].name, step.residual.name if step.residual else None, step.act == "relu"


def _bind_kernel(chosen: Kernel, f: Filter, affine: tuple[Tensor, Tensor], step: Step) -> Run:
    x, residual, _ = _names(step)
    rest = (None, None, 0.0, *f.geometry, step.act)
    return lambda v: chosen.fn(v[x], f.weight, *affine, v[residual] if residual else None, *rest)


def _bind_cudnn(f: Filter, step: Step) -> Run:
    """The fused call on the folded weight itself; the kernel's own function would fold anew each time."""
    x, residual, _ = _names(step)
    if residual is None:
        return lambda v: torch.cudnn_convolution_relu(v[x], f.weight, f.bias, *f.geometry)
    return lambda v: torch.cudnn_convolution_add_relu(v[x], f.weight, v[residual], 1.0, f.bias, *f.geometry)


def bind_onednn(step: Step, packed: Tensor, bias: Tensor, geometry: tuple, in_place: bool) -> Run:
    """Bias and add fused (the add in the residual's memory where nobody reads it again); our own ReLU, in place, keeps NaN."""
    x, residual, relu = _names(step)
    stride, padding, dilation, groups = geometry
    filters = packed, bias, padding, stride, dilation, groups
    conv, conv_ = torch.ops.mkldnn._convolution_pointwise.default, torch.ops.mkldnn._convolution_pointwise_.binary

    def run(v: Values) -> Tensor:
        if in_place:
            out = conv_(v[residual], v[x], *filters, "add", None, None, [], None)
        else:
            out = conv(v[x], *filters, "none", [], "")
            if residual is not None:
                out.add_(v[residual])
        return out.relu_() if relu else out

    return run


def bind_form(
    step: Step,
    form: Form,
    packs: tuple[Tensor, Tensor],
    plain: Callable[[], Run],
    size: torch.Size,
    geometry: tuple,
    in_place: bool,
) -> Run:
    """A kernel of ours from filters of that size in its form; for an input that it cannot take torch's, which ``plain`` binds then."""
    x, residual, relu = _names(step)
    rest = size, geometry, relu, in_place

    def run(v: Values) -> Tensor:
        out = form.run(v[x], *packs, v[residual] if residual else None, *rest)
        return plain()(v) if out is None else out

    return run


def _bind_plain(f: Filter, step: Step, onednn: bool, shape: torch.Size) -> Run:
    """oneDNN, or where it has no packed form (bfloat16 on processors with AVX2 alone) torch's convolution; the residual is left whole."""
    return bind_onednn(step, *f.packed(shape), f.geometry, False) if onednn else _bind_torch(f, step, False)


def _bind_torch(f: Filter, step: Step, in_place: bool, add: Callable[[Tensor, Tensor], Tensor] = Tensor.add_) -> Run:
    x, residual, relu = _names(step)

    def run(v: Values) -> Tensor:
        out = F.conv2d(v[x], f.weight, f.bias, *f.geometry)
        if residual is not None:
            out = v[residual].add_(out) if in_place else add(out, v[residual])
        return out.relu_() if relu else out

    return run


def _conv_shape(f: Filter, x: Tensor) -> tuple[int, ...]:
    stride, padding, dilation, _ = f.geometry
    sizes = [
        (i + 2 * p - d * (k - 1) - 1) // s + 1
        for i, p, d, k, s in zip(x.shape[2:], padding, dilation, f.weight.shape[2:], stride, strict=True)
    ]
    return (x.shape[0], f.weight.shape[0], *sizes)


def _bind_add(step: Step) -> Run:
    x, y = (v.name for v in step.args)
    gate = step.gate.name if step.gate else None

    def run(v: Values) -> Any:
        out = v[x] + v[y] if gate is None else v[x] * v[gate] + v[y]
        return torch.relu_(out) if step.act == "relu" else out

    return run
