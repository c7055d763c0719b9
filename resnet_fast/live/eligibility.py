"""The path rule: when a block may run its fused ops.

A block fuses only if nothing that a user attached to it, or wrapped around it, needs the modules that fusing skips.
Otherwise its plain modules run, exactly as torchvision's do, and ``explain`` repeats the sentence returned here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from ..graph.facts import NORMS, is_frozen_bn

# A Conv2d, and a BatchNorm2d or FrozenBatchNorm2d. Any, because torch's stubs give a Module's attributes as
# ``Tensor | Module`` and a Conv2d's stride and padding as ``tuple[int, ...]`` and ``str | tuple[int, ...]``.
Conv: TypeAlias = Any
Norm: TypeAlias = Any

_DEVICES = ("cpu", "cuda")
_TENSORS = (nn.Parameter, Tensor)
_FITS = {"conv": (nn.Conv2d,), "bn": NORMS, "relu": (nn.ReLU,)}


def why_plain(x: Tensor, modules: Iterable[nn.Module | None]) -> str | None:
    """Why ``modules``, which a fused step would not call, must run one by one on ``x``; None if they may be fused."""
    return _why_plain_here(x) or next(filter(None, map(_why_plain_module, modules)), None)


def _why_plain_here(x: Tensor) -> str | None:
    """Reasons from the call's context: tracing, compiling, transforms, and the kind of input."""
    if type(x) is not Tensor and type(x) is not nn.Parameter:
        return f"the input is a {type(x).__name__} (tracing or a tensor subclass)"
    if torch.compiler.is_compiling():
        return "torch.compile or torch.export is tracing: opaque ops would cost the compiler its own fusions"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace is tracing"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a functorch transform is active"
    if forward_ad._current_level >= 0:
        return "forward-mode AD is active"
    if torch._C._len_torch_dispatch_stack() > 0:
        return "a TorchDispatchMode is active (counting FLOPs, faking tensors, choosing what to checkpoint)"
    if torch._C._len_torch_function_stack() > 0 and _any_function_mode():
        return "a TorchFunctionMode is active"
    if nn_module._has_any_global_hook():
        return "a global module hook is registered"
    if x.numel() == 0:
        return "the input is empty: nothing to compute, and torch's batch norm leaves its statistics alone"
    if x.layout is not torch.strided:
        return f"the input's layout is {x.layout}"
    if x.device.type not in _DEVICES:
        return f"no fused kernels for device {x.device.type}"
    if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        return (
            "CPU autocast casts the weights anew in each call, which costs more than fusing gains"
        )
    return None


def _any_function_mode() -> bool:
    """Whether a mode must see torch's functions. torch.set_default_device's need not."""
    return any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())


def _why_plain_module(m: nn.Module) -> str | None:
    """Reasons from one module: it is hooked, replaced, reparametrised, or has no fused op."""
    if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
        return f"a {type(m).__name__} has hooks"
    if "forward" in m.__dict__:
        return f"a {type(m).__name__} has its own forward"
    return _CHECKS.get(type(m), _why_plain_other)(m)


def why_misplaced(named: Iterable[tuple[str, nn.Module | None]]) -> str | None:
    """Why a child is not of the type that its name (conv…, bn…, relu) says, a bn3 that is an Identity say; or None."""
    for name, m in named:
        fits = _FITS.get(name.rstrip("0123456789"))
        if fits is not None and type(m) not in fits and not (fits is NORMS and is_frozen_bn(m)):
            return f"{name} is a {type(m).__name__}"
    return None


def _why_plain_conv(conv: nn.Conv2d) -> str | None:
    parameters = conv._parameters
    if parameters.get("bias") is not None:
        return "a Conv2d has a bias"
    if type(parameters.get("weight")) not in _TENSORS:
        return "a Conv2d's weight is pruned, parametrised or a tensor subclass"
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return f"a Conv2d pads with {conv.padding_mode!r}, {conv.padding!r}"
    return None


def _why_plain_bn(bn: nn.BatchNorm2d | nn.SyncBatchNorm) -> str | None:
    if (
        type(bn._parameters.get("weight")) not in _TENSORS
        or type(bn._parameters.get("bias")) not in _TENSORS
    ):
        return "a BatchNorm2d has no affine parameters, or a tensor subclass"
    return None


def _why_plain_sync(bn: nn.SyncBatchNorm) -> str | None:
    return (
        "a SyncBatchNorm in training reduces across processes"
        if uses_batch_statistics(bn)
        else _why_plain_bn(bn)
    )


def _why_plain_other(m: nn.Module) -> str | None:
    if is_frozen_bn(m):
        return None
    return f"a {type(m).__name__} stands where only Conv2d, BatchNorm2d and ReLU fuse"


def _never(m: nn.Module) -> None:
    return None


_CHECKS: dict[type[nn.Module], Callable[[Any], str | None]] = {
    nn.Conv2d: _why_plain_conv,
    nn.BatchNorm2d: _why_plain_bn,
    nn.SyncBatchNorm: _why_plain_sync,
    nn.ReLU: _never,
    nn.Sequential: _never,
}


def fuses_itself(m: nn.Module) -> str | None:
    """ "block" or "network" for a module of this package, which fuses without ``accelerate``; else None.

    The mark is on the class's forward, so a subclass with another forward does not have it.
    """
    return getattr(type(m).forward, "fuses_itself", None)


def uses_batch_statistics(bn: nn.Module) -> bool:
    """Whether this batch norm would normalise with the batch's own statistics if it were called now."""
    return not is_frozen_bn(bn) and (bn.training or bn.running_mean is None)
