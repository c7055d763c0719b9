"""A whole network's inference pass on a CPU, where no user code observes it.

Packed filters are compared with the parameters at once, before the first convolution. When two passes used the same
packs the network gets a program (:class:`NetworkProgram`), which runs the passes after that.

===========  ===================================================  ==================================================
state        a pass                                               next state
===========  ===================================================  ==================================================
COLD         runs the forward, records the packs it used          SETTLED if the last pass used the same
SETTLED      makes a program if the packs are still current       HAS_PROGRAM, or UNFIT if there can be none
HAS_PROGRAM  checks the program's guards and runs it; an input    COLD if the network changed or memory was freed,
             without a program runs the forward                   UNFIT if the program cannot serve the network
UNFIT        runs the forward; remembers the modules inside       COLD or SETTLED once other modules are in their place
===========  ===================================================  ==================================================

ResNet-50, two threads of an AVX-512 EPYC, November 2026: 1.37 times eager's speed at batch 1 and 1.97 at batch 16, of
which the comparison takes 8.5 ms; with oneDNN's convolutions alone 1.21 and 1.72. A batch goes through in pieces: glibc
keeps freed blocks of up to 32 MB for the next call and returns larger ones to the system, which then faults them in
again page by page (28,229 faults a pass uncut, 4 in pieces of 8 MB; by time all sizes from 8 to 30 MB are within 4 %).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum, auto
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..dispatch import undisturbed
from ..kernels.prepack import this_pass
from ..runtime.pieces import pieces

if TYPE_CHECKING:
    from .network_program import NetworkProgram


class State(Enum):
    """What is known of a network. See the table in the module's docstring."""

    COLD = auto()
    SETTLED = auto()
    HAS_PROGRAM = auto()
    UNFIT = auto()


class _Network:
    """One network's state and what belongs to it. ``program`` is set in HAS_PROGRAM only, ``unfit`` in UNFIT only.

    ``packs``: the keys of the packs that the last pass used. ``growth``: bytes of its largest activation for each byte
    of input.
    """

    def __init__(self) -> None:
        self.state = State.COLD
        self.packs: set[tuple] = set()
        self.growth = 0.0
        self.program: NetworkProgram | None = None
        self.unfit: tuple[nn.Module, ...] = ()

    # ------------------------------------------------------------ transitions

    def became_cold(self) -> None:
        """The network changed, or memory of its weights was freed."""
        self.state, self.program, self.unfit = State.COLD, None, ()

    def got_program(self, program: NetworkProgram) -> None:
        self.state, self.program = State.HAS_PROGRAM, program

    def became_unfit(self, inside: tuple[nn.Module, ...]) -> None:
        """These modules have no program; others in their place may."""
        self.state, self.program, self.unfit = State.UNFIT, None, inside

    def used(self, packs: set[tuple], inside: list[nn.Module]) -> None:
        """The forward ran and used these packs: SETTLED if the last pass used the same, else COLD."""
        has_repeated = bool(self.packs) and self.packs == packs
        self.packs = packs
        if (
            self.state is State.HAS_PROGRAM
            or self.state is State.UNFIT
            and self.unfit == tuple(inside)
        ):
            return
        self.state, self.unfit = State.SETTLED if has_repeated else State.COLD, ()


_networks: weakref.WeakKeyDictionary[nn.Module, _Network] = weakref.WeakKeyDictionary()


# ---------------------------------------------------------------- conditions


def is_plain_cpu_inference(network: nn.Module, x: Tensor) -> bool:
    """Whether this is an ordinary inference call on a CPU, outside of another network's pass."""
    return not (
        network.training
        or torch.is_grad_enabled()
        or this_pass.packs_verified is not None  # inside another network's pass
        or x.device.type != "cpu"
        or x.dim() != 4
        or x.numel() == 0
        or not undisturbed()  # a kernel is forced
        or torch.autograd._profiler_enabled()  # it must see torch's own calls
    )


def unobserved(network: nn.Module) -> list[nn.Module] | None:
    """The modules inside, if no user code observes their inference and each norm has fixed statistics; else None."""
    found, waiting = [], [network]
    while waiting:  # not modules(), which takes three times as long
        for m in waiting.pop()._modules.values():
            if m is None:
                continue
            if (
                m.training
                or m._forward_hooks
                or m._forward_pre_hooks
                or m._buffers.get("running_mean", m) is None
            ):
                return None
            found.append(m)
            waiting.append(m)
    return found


# ---------------------------------------------------------------- a pass


def run_program(network: nn.Module, x: Tensor) -> Tensor | None:
    """The answer of the network's program. None if it has none, none for such an input, or the network changed."""
    known = _networks.get(network)
    program = None if known is None else known.program
    if program is None or program.refuses(x):
        return None
    if not program.guards_pass(network):
        known.became_cold()
        return None
    from .network_program import Unfit

    try:
        if program.imagewise:
            sizes = pieces(len(x), int(known.growth * x.nbytes) // len(x))
            parts = [program(piece) for piece in x.split(sizes)]
        else:
            parts = [program(x)]
    except Unfit:
        known.became_unfit(program.inside)
        return None
    if any(part is None for part in parts):
        program.refuse(x)
        return None
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@contextmanager
def checked_pass(network: nn.Module, inside: list[nn.Module], x: Tensor) -> Iterator[Tensor | None]:
    """Compare the last pass's packs at once; inside, none is compared again. Records what the body's forward uses.

    ``inside``: the modules inside ``network``, see :func:`unobserved`. Yields the answer of a program that could be
    made now, or None: then the body must run the forward.
    """
    known = _networks.get(network) or _networks.setdefault(network, _Network())
    with this_pass.over(known.packs):
        answer = None
        if known.state is State.SETTLED and this_pass.packs_verified == known.packs:
            answer = make_program(known, network, inside, x)
        yield answer
        if answer is None:
            known.used(this_pass.packs_used, inside)
            known.growth = this_pass.largest / x.nbytes


def make_program(
    known: _Network, network: nn.Module, inside: list[nn.Module], x: Tensor
) -> Tensor | None:
    """Make the network's program and return its answer. None if the network has none."""
    from .network_program import NetworkProgram, Unfit

    reference = weakref.ref(known)  # the program must not keep alive what holds it

    def freed() -> None:
        alive = reference()
        if alive is not None:
            alive.became_cold()

    try:
        known.got_program(NetworkProgram(network, inside, freed))
    except Unfit:
        known.became_unfit(tuple(inside))
        return None
    return run_program(network, x)
