"""Problem: one call of one op as plain data. Choosers, tables, tests and reports key on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


def conv_out_hw(
    sizes: Sequence[int],
    weight: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int] = (1, 1),
) -> tuple[int, int]:
    """Height and width of a convolution's output.

    ``sizes`` and ``weight`` end in height and width: the shapes of an NCHW input and a KCRS filter, or those two alone.
    """
    # Written out: kernels call this before each launch, and a generator costs half a microsecond more.
    height = (sizes[-2] + 2 * padding[0] - dilation[0] * (weight[-2] - 1) - 1) // stride[0] + 1
    width = (sizes[-1] + 2 * padding[1] - dilation[1] * (weight[-1] - 1) - 1) // stride[1] + 1
    return height, width


@dataclass(frozen=True)
class Problem:
    """One call of one op without its data: what a kernel needs to accept or decline it, and the key of a table entry.

    ``x`` is the NCHW shape of the main input, ``weight`` the KCRS shape of the filter. ``layout`` is the memory layout
    of ``x``: "nhwc", "nchw" or "strided" (neither); ``residual`` is the residual's layout, or None. ``bn`` says that
    the affine is given as the four BN vectors. ``capability`` is the GPU's, (9, 0) for Hopper, None on a CPU.

    Ops over several convolutions: ``weight``, ``stride`` and ``padding`` belong to the first one. ``chain`` holds the
    shapes of the further filters in argument order, () for a filter that is not given. ``second`` is height and width
    of the second input; ``stride`` and ``residual`` (its layout) then describe that input. ``bytes`` says that ``x`` is
    uint8; ``dtype`` is then the filter's.
    """

    op: str
    device: str
    dtype: torch.dtype
    x: tuple[int, ...]
    layout: str
    weight: tuple[int, ...] | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    residual: str | None = None
    bn: bool = False
    gate: bool = False
    act: str = "none"
    capability: tuple[int, int] | None = None
    chain: tuple[tuple[int, ...], ...] = ()
    second: tuple[int, int] | None = None
    bytes: bool = False

    @cached_property
    def out_hw(self) -> tuple[int, int]:
        """Height and width of the first convolution's output; the input's own for the pointwise ops."""
        if self.weight is None or self.second is not None or self.op == "pointwise_pair":
            return self.x[2], self.x[3]
        return conv_out_hw(self.x, self.weight, self.stride, self.padding, self.dilation)

    @property
    def pointwise(self) -> bool:
        """Whether this is a 1×1 convolution without padding: a matrix product over pixels."""
        if self.weight is None:
            return False
        return self.weight[2:] == (1, 1) and self.padding == (0, 0)

    @cached_property
    def key(self) -> str:
        """One line that names this problem in tables and reports, the same on every machine."""
        dtype = str(self.dtype).removeprefix("torch.")
        parts = [self.op, dtype, _sizes(self.x), self.layout]
        if self.weight is not None:
            parts += [
                f"w{_sizes(self.weight)}",
                f"s{_sizes(self.stride)}",
                f"p{_sizes(self.padding)}",
                f"d{_sizes(self.dilation)}",
                f"g{self.groups}",
            ]
        for shape in self.chain:
            parts.append(f"w{_sizes(shape)}" if shape else "w-none")
        if self.second:
            parts.append(f"second-{_sizes(self.second)}")
        if self.residual:
            parts.append(f"res-{self.residual}")
        parts += [name for name in ("bn", "gate", "bytes") if getattr(self, name)]
        return " ".join([*parts, self.act])


def _sizes(sizes: Sequence[int]) -> str:
    """The sizes as in a key: "256x64x56x56"."""
    return "x".join(map(str, sizes))


def nhwc_or_why(problem: Problem, *, any_residual: bool = False) -> str | None:
    """None if the input and the residual, if there is one, are NHWC; else a sentence that names their layouts.

    ``any_residual``: the kernel copies a residual of another layout.
    """
    residual_fits = any_residual or problem.residual in (None, "nhwc")
    if problem.layout == "nhwc" and residual_fits:
        return None
    return f"it wants NHWC (channels_last), input and residual are {problem.layout} and {problem.residual}"


def layout(x: Tensor) -> str:
    """The memory layout of a 4-D tensor. One pixel or one channel is both; it counts as "nhwc", which kernels want."""
    if x.is_contiguous(memory_format=torch.channels_last):
        return "nhwc"
    return "nchw" if x.is_contiguous() else "strided"


def _place(x: Tensor) -> dict[str, Any]:
    on_gpu = x.device.type == "cuda"
    return {
        "device": x.device.type,
        "dtype": x.dtype,
        "x": tuple(x.shape),
        "layout": layout(x),
        "capability": torch.cuda.get_device_capability(x.device) if on_gpu else None,
    }


def describe(op: str, args: tuple[Any, ...]) -> Problem:
    """The Problem of a call, from its flat arguments."""
    return DESCRIBE[op](*args)


def _layout_or_none(residual: Tensor | None) -> str | None:
    return None if residual is None else layout(residual)


def _pair(sizes: Sequence[int]) -> tuple[int, int]:
    height, width = sizes
    return height, width


def _describe_conv(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    act: str,
) -> Problem:
    return Problem(
        op="conv_bn_act",
        weight=tuple(weight.shape),
        stride=_pair(stride),
        padding=_pair(padding),
        dilation=_pair(dilation),
        groups=groups,
        residual=_layout_or_none(residual),
        bn=mean is not None,
        act=act,
        **_place(x),
    )


def _describe_bn(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float, act: str
) -> Problem:
    return Problem(
        op="bn_act",
        residual=_layout_or_none(residual),
        act=act,
        **_place(x),
    )


def _describe_bn_backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    act: str,
    residual: bool,
) -> Problem:
    return Problem(
        op="bn_act_backward",
        residual=layout(dy) if residual else None,
        act=act,
        **_place(x),
    )


def _describe_add(x: Tensor, y: Tensor, gate: Tensor | None, act: str) -> Problem:
    return Problem(
        op="add_act",
        residual=layout(y),
        gate=gate is not None,
        act=act,
        **_place(x),
    )


def _describe_add_backward(
    dout: Tensor, out: Tensor, x: Tensor | None, gate: Tensor | None, act: str
) -> Problem:
    return Problem(
        op="add_act_backward",
        residual=layout(out),
        gate=gate is not None,
        act=act,
        **_place(dout),
    )


def _describe_pair(
    x: Tensor, weight: Tensor, x2: Tensor, weight2: Tensor, bias: Tensor, stride2: Sequence[int]
) -> Problem:
    return Problem(
        op="pointwise_pair",
        weight=tuple(weight.shape),
        chain=(tuple(weight2.shape),),
        stride=_pair(stride2),
        second=_pair(x2.shape[2:]),
        residual=layout(x2),
        act="relu",
        **_place(x),
    )


def _describe_tail(
    x: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    weight3: Tensor,
    bias3: Tensor,
    residual: Tensor,
    projection: Tensor | None,
    weight1: Tensor,
    bias1: Tensor,
) -> Problem:
    projected = () if projection is None else tuple(projection.shape)
    return Problem(
        op="conv_tail",
        weight=tuple(weight2.shape),
        chain=(tuple(weight3.shape), projected, tuple(weight1.shape)),
        padding=(1, 1),
        residual=layout(residual),
        act="relu",
        **_place(x),
    )


def _describe_conv_pool(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor | None, std: Tensor | None
) -> Problem:
    place = _place(x) | {"dtype": weight.dtype}
    return Problem(
        op="conv_pool",
        weight=tuple(weight.shape),
        stride=(2, 2),
        padding=(weight.shape[2] // 2, weight.shape[3] // 2),
        bytes=x.dtype == torch.uint8,
        act="relu",
        **place,
    )


def _describe_pointwise_pool(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Problem:
    return Problem(
        op="pointwise_pool",
        weight=tuple(weight.shape),
        residual=layout(residual),
        act="relu",
        **_place(x),
    )


DESCRIBE: dict[str, Callable[..., Problem]] = {
    "conv_bn_act": _describe_conv,
    "bn_act": _describe_bn,
    "bn_act_backward": _describe_bn_backward,
    "add_act": _describe_add,
    "add_act_backward": _describe_add_backward,
    "pointwise_pair": _describe_pair,
    "conv_tail": _describe_tail,
    "conv_pool": _describe_conv_pool,
    "pointwise_pool": _describe_pointwise_pool,
}

# Ops over several convolutions. Only a plan, which knows who reads each value, may use them in place of single ones.
ACROSS = ("pointwise_pair", "conv_tail", "conv_pool", "pointwise_pool")

# Position of the flat argument that identifies the layer in explain(): the (first) filter, the BN weight, or the input.
IDENTITY = {
    "conv_bn_act": 1,
    "bn_act": 1,
    "bn_act_backward": 3,
    "add_act": 0,
    "add_act_backward": 0,
    **dict.fromkeys(ACROSS, 1),
}


def _strides(t: Tensor | None) -> tuple[int, ...] | None:
    return None if t is None else t.stride()


def _metadata(a: Any) -> tuple[Any, ...] | None:
    """All that is known of an argument without its data, hashable."""
    if isinstance(a, Tensor):
        return a.shape, a.stride(), a.dtype, a.device
    return None if a is None else tuple(a)


def _full_key(op: str) -> Callable[..., tuple[Any, ...]]:
    """A key function over the metadata of all arguments of ``op``."""

    def key(*args: Any) -> tuple[Any, ...]:
        return (op, *map(_metadata, args))

    return key


# The memo's keys: one lambda for each op, written out, because the look-up runs before every call of an op.
KEYS: dict[str, Callable[..., tuple[Any, ...]]] = {
    "conv_bn_act": lambda x, w, scale, shift, res, mean, var, eps, stride, padding, dilation, groups, act: (
        "conv_bn_act",
        x.shape,
        x.stride(),
        x.dtype,
        x.device,
        w.shape,
        w.stride(),
        w.dtype,
        w.device,
        scale.shape,
        scale.dtype,
        scale.device,
        shift.shape,
        shift.dtype,
        shift.device,
        mean is None,
        var is None,
        None if res is None else (res.shape, res.stride(), res.dtype, res.device),
        None
        if mean is None or var is None
        else (mean.shape, mean.dtype, mean.device, var.shape, var.dtype, var.device),
        *stride,
        *padding,
        *dilation,
        groups,
        act,
    ),
    "bn_act": lambda x, w, b, res, eps, act: (
        "bn_act",
        x.shape,
        x.stride(),
        x.dtype,
        x.device,
        w.shape,
        w.dtype,
        w.device,
        b.shape,
        b.dtype,
        b.device,
        None if res is None else (res.shape, res.stride(), res.dtype, res.device),
        act,
    ),
    "bn_act_backward": lambda dy, x, y, w, mean, var, eps, act, res: (
        "bn_act_backward",
        x.shape,
        x.stride(),
        dy.stride(),
        y.stride(),
        x.dtype,
        x.device,
        w.dtype,
        act,
        res,
    ),
    "add_act": lambda x, y, gate, act: (
        "add_act",
        x.shape,
        x.stride(),
        x.dtype,
        x.device,
        y.shape,
        y.stride(),
        y.dtype,
        y.device,
        None if gate is None else (gate.shape, gate.stride(), gate.dtype, gate.device),
        act,
    ),
    "add_act_backward": lambda dout, out, x, gate, act: (
        "add_act_backward",
        dout.shape,
        dout.stride(),
        out.stride(),
        _strides(x),
        dout.dtype,
        dout.device,
        _strides(gate),
        act,
    ),
    **{op: _full_key(op) for op in ACROSS},
}
