"""Binding: each step of a lowered network as a callable, for one input shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import Kernel, Problem, choose, describe
from ..dispatch.registry import Make
from ..graph.facts import function
from ..graph.ir import Attribute, Group, Step, Value
from ..graph.network import Lowered
from ..graph.tree import mapped
from ..graph.weights import FoldedConv
from ..kernels import vendor
from ..kernels.prepack import pack_case
from .members import EXTERNAL, Members, at_least_float32, conv_shape, flat

Values = dict[str, Any]
Run = Callable[[Values], Any]


class Bound(NamedTuple):
    """A step's callable over the values, its kernel, why that one, and the problem (None for torch's functions)."""

    run: Run
    kernel: str
    why: str
    problem: Problem | None


Binder = Callable[[Lowered, Step, Values, set[str], bool], Bound]


def _fill(structure: Any, values: Values, tensors: dict[str, Tensor]) -> Any:
    """The structure with values and tensors in place of references."""

    def leaf(part: Any) -> Any:
        if isinstance(part, Value):
            return values[part.name]
        return tensors[part.path] if isinstance(part, Attribute) else part

    return mapped(structure, leaf)


def bind(lowered: Lowered, step: Step, values: Values, writable: set[str], graph: bool) -> Bound:
    """Bind one step for the values that it will read.

    ``writable``: the values with memory that the step may overwrite. ``graph``: the step will run in a CUDA graph.
    """
    if isinstance(step, Group):
        return _bind_group(lowered, step, values, writable, graph)
    if step.op == "conv_bn_act":
        return _bind_conv(lowered.filters[step.output], step, values, writable, graph)
    if step.op == "add_act":
        return Bound(_bind_add(step), "torch", "add and activation", None)
    is_module = step.op == "module"
    call = lowered.modules[step.target] if is_module else function(step.target)

    def run(v: Values) -> Any:
        return call(*_fill(step.args, v, lowered.tensors), **_fill(step.kwargs, v, lowered.tensors))

    return Bound(
        run, "torch", "a module that is no data" if is_module else "a function of torch's", None
    )


def _bind_group(
    lowered: Lowered, step: Group, values: Values, writable: set[str], graph: bool
) -> Bound:
    """The group op's kernel, if one is forced or was measured to win; else the members, each by its own choice."""
    args, misfit = flat(lowered, step, values)
    why, problem = misfit, None
    if misfit is None:
        problem = describe(step.op, args)
        chosen, why = choose(problem, live=False, graph=graph)
        if chosen.id != f"aten.{step.op}" or why.startswith("forced"):
            return Bound(_bind_across(chosen, step, args), chosen.id, why, problem)
    members = Members(step, lowered, values)
    kernels = []
    for member in step.members:
        bound = bind(lowered, member, members.values, members.writable(member, writable), graph)
        members.append(member, bound.run)
        kernels.append(bound.kernel)
    members.forget()
    names = " + ".join(dict.fromkeys(kernel for kernel in kernels if kernel != "torch"))
    return Bound(members, names, f"one by one: {why}", problem)


def _bind_across(chosen: Kernel, step: Group, args: tuple) -> Run:
    positions = EXTERNAL[step.op]
    names = {i: value.name for i, value in zip(positions, step.args, strict=True)}
    # without this call's activations
    constants = tuple(None if i in names else a for i, a in enumerate(args))

    def run(v: Values) -> Any:
        return chosen.fn(*(v[names[i]] if i in names else a for i, a in enumerate(constants)))

    return run


def _bind_add(step: Step) -> Run:
    x, y = (v.name for v in step.args)
    gate = step.gate.name if step.gate else None
    relu = step.act == "relu"

    def run(v: Values) -> Any:
        out = v[x] + v[y] if gate is None else v[x] * v[gate] + v[y]
        return torch.relu_(out) if relu else out

    return run


# ---------------------------------------------------------------- a convolution


@dataclass(frozen=True)
class ConvCall:
    """One convolution step to bind for one input. It holds no activation, so the callables may hold it.

    ``folded``: weight and bias with the batch norm folded in; None for live weights, which only ``packed`` reads.
    ``packed(make)``: the filters as ``make`` packs them for this input, and the bias, or None. ``in_place``: the step
    may overwrite its residual; ``onednn_in_place``: oneDNN can. ``onednn``: oneDNN takes this input.
    """

    step: Step
    problem: Problem
    geometry: tuple
    folded: tuple[Tensor, Tensor] | None
    packed: Callable[[Make], tuple[Tensor, Tensor] | None]
    in_place: bool
    onednn_in_place: bool
    onednn: bool

    @classmethod
    def of(
        cls,
        step: Step,
        problem: Problem,
        geometry: tuple,
        folded: tuple[Tensor, Tensor] | None,
        packed: Callable[[Make], tuple[Tensor, Tensor] | None],
        values: Values,
        weight: Tensor,
        writable: set[str],
    ) -> ConvCall:
        """The call for these values; ``weight``: the filter, folded or not."""
        residual = None if step.residual is None else values[step.residual.name]
        in_place = residual is not None and step.residual.name in writable
        # A residual of one pixel or channel is NCHW and NHWC at once: torch 2.11 cannot fuse that add.
        onednn_in_place = in_place and not residual.is_contiguous()
        onednn = vendor.onednn_takes(values[step.args[0].name], weight)
        return cls(step, problem, geometry, folded, packed, in_place, onednn_in_place, onednn)


def bind_conv(conv: ConvCall, chosen: Kernel, why: str) -> Bound:
    """Bind a convolution to the first of :data:`WAYS` that can run it. Raises ValueError if none can."""
    reasons = []
    for kernel, way in WAYS:
        found = way(conv, chosen)
        if not isinstance(found, str):
            return Bound(found, kernel or chosen.id, why, conv.problem)
        reasons.append(found)
        if way is _chosen_prepacked and chosen.prepacked is not None:
            why = found
    raise ValueError(f"{conv.step.target} has no kernel: {'; '.join(reasons)}")


def _chosen_kernel(conv: ConvCall, chosen: Kernel) -> Run | str:
    """The forced or measured kernel's own function; torch's kernels and those with packed filters have better ways."""
    if chosen.prepacked is not None or chosen.id in ("aten.conv_bn_act", "aten.cudnn_fused"):
        return f"{chosen.id} has a form on folded filters"
    if conv.folded is None:
        return "the weights are not folded"
    return bind_kernel(chosen, conv.step, *conv.folded, conv.geometry)


def _chosen_prepacked(conv: ConvCall, chosen: Kernel) -> Run | str:
    """The chosen kernel on filters packed now."""
    prepacked = chosen.prepacked
    if prepacked is None:
        return f"{chosen.id} has no packed filters"
    packs = conv.packed(prepacked.make)
    if packs is None:
        return f"{chosen.id} cannot take these weights: not finite, or too large"
    x, residual, relu = _names(conv.step)
    filters, bias = packs
    size = torch.Size(conv.problem.weight[2:])
    geometry, in_place = conv.geometry, conv.in_place

    def run(v: Values) -> Tensor:
        added = v[residual] if residual else None
        out = prepacked.run(v[x], filters, bias, added, size, geometry, relu, in_place)
        if out is not None:
            return out
        plain = _bind_plain(conv, chosen)
        return plain(v)

    return run


def _bind_plain(conv: ConvCall, chosen: Kernel) -> Run:
    """oneDNN, or torch's convolution where oneDNN has no packed form (bfloat16 with AVX2 alone). Keeps the residual."""
    conv = replace(conv, in_place=False, onednn_in_place=False)
    reasons = []
    for way in (_onednn, _torch):
        found = way(conv, chosen)
        if not isinstance(found, str):
            return found
        reasons.append(found)
    raise ValueError(f"{conv.step.target} has no kernel: {'; '.join(reasons)}")


def _onednn(conv: ConvCall, chosen: Kernel) -> Run | str:
    if not conv.onednn:
        return "oneDNN has no packed form"
    packs = conv.packed(vendor.onednn_filters)
    if packs is None:
        return "a factor is not finite"
    return bind_onednn(conv.step, *packs, conv.geometry, conv.onednn_in_place)


def _cudnn(conv: ConvCall, chosen: Kernel) -> Run | str:
    if chosen.id != "aten.cudnn_fused":
        return "cuDNN's fused form was not measured to win"
    if conv.folded is None:
        return "the weights are not folded"
    return bind_cudnn(conv.step, *conv.folded, conv.geometry)


def _torch(conv: ConvCall, chosen: Kernel) -> Run | str:
    if conv.folded is None:
        return "the weights are not folded"
    return bind_torch(conv.step, *conv.folded, conv.geometry, conv.in_place)


# The kernel's name ("": the chosen kernel's id) and the function that binds it, in the order in which they are tried.
# Each returns a callable, or why it cannot run the step.
WAYS: tuple[tuple[str, Callable[[ConvCall, Kernel], Run | str]], ...] = (
    ("", _chosen_kernel),
    ("", _chosen_prepacked),
    ("", _cudnn),
    ("aten (oneDNN)", _onednn),
    ("aten", _torch),
)


def _bind_conv(f: FoldedConv, step: Step, values: Values, writable: set[str], graph: bool) -> Bound:
    x = values[step.args[0].name]
    _check_input(f, step, x)
    residual = None if step.residual is None else values[step.residual.name]
    if residual is not None and not _fits(residual, x, conv_shape(f, x)):
        run = bind_torch(step, f.weight, f.bias, f.geometry, add=torch.add)
        return Bound(run, "torch", "the residual broadcasts or promotes", None)
    scale, shift = _affine(f.bias)
    args = (x, f.weight, scale, shift, residual, None, None, 0.0, *f.geometry, step.act)
    problem = describe("conv_bn_act", args)
    conv = ConvCall.of(
        step,
        problem,
        f.geometry,
        (f.weight, f.bias),
        partial(_packed, f, x.shape),
        values,
        f.weight,
        writable,
    )
    chosen, why = choose(problem, live=False, graph=graph)
    return bind_conv(conv, chosen, why)


def _fits(residual: Tensor, x: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a residual neither broadcasts nor promotes."""
    if residual.dtype != x.dtype:
        return False
    return tuple(residual.shape) == shape


def _check_input(f: FoldedConv, step: Step, x: Tensor) -> None:
    _, _, _, groups = f.geometry
    channels = f.weight.shape[1] * groups
    takes_channels = x.dim() == 4 and x.shape[1] == channels
    if not takes_channels or min(conv_shape(f, x)[2:]) < 1:
        raise ValueError(
            f"plan: step {step.output} ({step.target}) does not fit this input: got {list(x.shape)}, expected "
            f"{channels} channels and at least one output pixel for filters of {list(f.weight.shape)}"
        )


def _packed(f: FoldedConv, shape: torch.Size, make: Make) -> tuple[Tensor, Tensor] | None:
    """Filters and bias as ``make`` packs them for such an input, packed once; None if it cannot take these weights."""
    case = pack_case(make, shape)
    if case not in f.packs:
        with torch.inference_mode(False), torch.no_grad():
            f.packs[case] = make(f.weight, f.bias, f.geometry, shape)
    return f.packs[case]


def _affine(bias: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift that add a bias, in float32 or wider."""
    shift = at_least_float32(bias)
    return torch.ones_like(shift), shift


# ---------------------------------------------------------------- callables


def _names(step: Step) -> tuple[str, str | None, bool]:
    """The names of input and residual, and whether a ReLU follows."""
    x = step.args[0].name
    residual = step.residual.name if step.residual else None
    relu = step.act == "relu"
    return x, residual, relu


def bind_kernel(chosen: Kernel, step: Step, weight: Tensor, bias: Tensor, geometry: tuple) -> Run:
    """A kernel's own function on folded weights."""
    x, residual, _ = _names(step)
    scale, shift = _affine(bias)
    rest = (None, None, 0.0, *geometry, step.act)

    def run(v: Values) -> Tensor:
        added = v[residual] if residual else None
        return chosen.fn(v[x], weight, scale, shift, added, *rest)

    return run


def bind_onednn(step: Step, packed: Tensor, bias: Tensor, geometry: tuple, in_place: bool) -> Run:
    """oneDNN's convolution with fused bias; the add is fused only in place. ReLU by torch, in place, keeps NaN."""
    x, residual, relu = _names(step)

    def run(v: Values) -> Tensor:
        if in_place:
            out = vendor.onednn(v[x], packed, bias, v[residual], geometry, in_place=True)
        else:
            out = vendor.onednn(v[x], packed, bias, None, geometry)
            if residual is not None:
                out.add_(v[residual])
        return out.relu_() if relu else out

    return run


def bind_cudnn(step: Step, weight: Tensor, bias: Tensor, geometry: tuple) -> Run:
    """cuDNN's fused call on folded weights; the kernel's own function would fold in each call."""
    x, residual, _ = _names(step)

    def run(v: Values) -> Tensor:
        added = v[residual] if residual else None
        return vendor.cudnn(v[x], weight, bias, added, geometry)

    return run


def bind_torch(
    step: Step,
    weight: Tensor,
    bias: Tensor,
    geometry: tuple,
    in_place: bool = False,
    add: Callable[[Tensor, Tensor], Tensor] = Tensor.add_,
) -> Run:
    """Torch's convolution on folded weights, then add and ReLU."""
    x, residual, relu = _names(step)

    def run(v: Values) -> Tensor:
        out = F.conv2d(v[x], weight, bias, *geometry)
        if residual is not None:
            out = v[residual].add_(out) if in_place else add(out, v[residual])
        return out.relu_() if relu else out

    return run
