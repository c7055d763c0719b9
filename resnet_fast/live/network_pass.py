"""A whole network at once, in inference on a CPU when nobody looks inside: what single ops cannot do for memory.

Packed weights are compared with the parameters in one go before the first convolution, and if nothing has changed since the last
pass this one runs as a kept program (``kept``), which adds residuals in place. ResNet-50, two threads of an AVX-512 EPYC, November 2026:
1.37 times eager's speed at batch 1 and 1.97 at batch 16, of which the comparison takes 8.5 ms; with oneDNN's convolutions alone 1.21 and 1.72.
A batch goes through in pieces: glibc keeps freed blocks of up to 32 MB for the next call and gives larger
ones back, to be faulted in again page by page (28,229 faults a pass uncut, 4 in pieces of 8 MB; by time all sizes from 8 to 30 MB are within 4 %).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..dispatch import undisturbed
from ..kernels.prepack import this_pass
from ..runtime.pieces import pieces


class _State:
    """What is known of one network: the packs that its last pass used, whether the pass before used the same, its largest
    activation for each byte of input, and its program, or the modules that have none.
    """

    def __init__(self) -> None:
        self.used: set[tuple] = set()
        self.settled = False
        self.growth = 0.0
        self.kept: Any = None  # a kept.Kept, which is imported with the first
        self.unfit: Sequence[nn.Module] = ()


_states: weakref.WeakKeyDictionary[nn.Module, _State] = weakref.WeakKeyDictionary()


def unseen(owner: nn.Module) -> list[nn.Module] | None:
    """The modules inside, if no user code looks into their inference; each then normalises with fixed statistics."""
    found, waiting = [], [owner]
    while waiting:  # not modules(), which takes three times as long
        for m in waiting.pop()._modules.values():
            if m is not None:
                if m.training or m._forward_hooks or m._forward_pre_hooks or m._buffers.get("running_mean", m) is None:
                    return None
                found.append(m)
                waiting.append(m)
    return found


def at_once(
    owner: nn.Module, forward: Callable[[Tensor], Any], x: Tensor, look: Callable[[nn.Module], list[nn.Module] | None]
) -> Any:
    """``forward(x)``, the forward of ``owner``; ``look(owner)`` gives the modules inside if they are unseen."""
    if (
        owner.training
        or torch.is_grad_enabled()
        or this_pass.packs_verified is not None
        or x.device.type != "cpu"
        or x.dim() != 4
        or x.numel() == 0
        or not undisturbed()
        or torch.autograd._profiler_enabled()
    ):
        return forward(x)
    state = _states.get(owner) or _states.setdefault(owner, _State())
    kept = state.kept
    out = None if kept is None else _again(state, kept, owner, x)
    if out is not None:
        return out
    inside = look(owner)
    if inside is None:
        return forward(x)
    with this_pass.over(state.used):
        if kept is None and state.settled and this_pass.packs_verified == state.used and state.unfit != tuple(inside):
            out = _keep(state, owner, x, inside)
            if out is not None:
                return out
        out = forward(x)
        state.settled = bool(state.used) and state.used == this_pass.packs_used
        state.used, state.growth = this_pass.packs_used, this_pass.largest / x.nbytes
    return out


def _keep(state: _State, owner: nn.Module, x: Tensor, inside: list[nn.Module]) -> Tensor | None:
    """The answer of a program that is made now, since two passes used the same weights; None if there can be none."""
    from .network_program import Kept, Unfit

    still = weakref.ref(state)  # it holds what is to forget it

    def forget() -> None:
        if (it := still()) is not None:
            it.kept, it.settled = None, False

    try:
        state.kept = kept = Kept(owner, inside, forget)
    except Unfit:
        state.unfit = tuple(inside)
        return None
    return _again(state, kept, owner, x)


def _again(state: _State, kept: Any, owner: nn.Module, x: Tensor) -> Tensor | None:
    """The answer of the kept program; None if the network has changed since, or if there is no program for such an input."""
    from .network_program import Unfit

    if kept.refuses(x):
        return None
    if not kept.holds(owner):
        state.kept, state.settled = None, False
        return None
    try:
        sizes = pieces(len(x), int(state.growth * x.nbytes) // len(x)) if kept.imagewise else [len(x)]
        parts = [kept(piece) for piece in x.split(sizes)]
    except Unfit:
        state.kept, state.unfit = None, kept.inside
        return None
    if any(part is None for part in parts):
        kept.refuse(x)
        return None
    return parts[0] if len(parts) == 1 else torch.cat(parts)
