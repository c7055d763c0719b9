"""``plan``: a whole network as one schedule over a snapshot of its weights, to deploy.

A plan is data: a printable list of fused steps, folded weights, and for each input shape the kernels that were chosen. On a CPU a
batch goes through in pieces that stay in memory which the allocator keeps; on a GPU each input shape becomes one CUDA graph (no GPU
has run this yet). It is the only thing here that is a snapshot: ``refresh()`` takes the model as it is now. What does the work
(``planning``) is imported with the first plan, so that importing the package stays cheap.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .plan import Plan


def plan(
    model: nn.Module,
    example: Tensor,
    *,
    dtype: torch.dtype | None = None,
    cuda_graph: bool | None = None,
    tune: bool = False,
    fuse: bool = True,
    features: Sequence[str] | None = None,
    normalize: tuple[Sequence[float], Sequence[float]] | None = None,
    softmax: bool = False,
    topk: int | None = None,
    across: Sequence[str] | None = None,
) -> Plan:
    """A callable snapshot of ``model`` in eval, made for ``example``'s device and tried on it; the model is left unchanged.

    ``model``: ours, torchvision's, timm's, accelerated or any whose forward can be traced, of one input [N, C, H, W]; other batch
    and image sizes work. ``dtype``: of weights and activations (default the example's; for uint8 float32). ``cuda_graph``: replay one
    graph for each input shape (default: on CUDA, falling back to single steps with a warning; True: or raise). ``tune``: measure the
    kernels for the plan's problems first (CUDA). ``fuse=False``: the same network step by step, for :meth:`Plan.compare`.
    ``features``: return these modules' results as a dict instead of the forward's own. ``normalize``: (mean, std) of RGB in [0, 1]; the
    input is then uint8 [N, H, W, 3]. ``softmax``: probabilities; ``topk``: (probabilities, classes) of the k likeliest.
    ``across``: ops over several convolutions to use wherever the network has their form: "pointwise_pair", "conv_tail", "conv_pool",
    "pointwise_pool" (see :mod:`resnet_fast.fused`), or "conv_tail:layer1.1.conv2" for the one at that step; () for none. With
    ``tune`` those that make the whole network faster, each distinct shape decided by itself; that choice is remembered in the GPU's table, and
    by default a plan of the same network, input shape and dtype uses it (none where nothing was measured), with a line in ``notes``.
    Raises ValueError, before anything is built, with what cannot be planned and why.
    """
    from .plan import make

    return make(
        model,
        example,
        dtype=dtype,
        cuda_graph=cuda_graph,
        tune=tune,
        fuse=fuse,
        features=features,
        normalize=normalize,
        softmax=softmax,
        topk=topk,
        across=across,
    )


def load_plan(path: str | Path, device: torch.device | str = "cpu", *, cuda_graph: bool | None = None) -> Plan:
    """The plan that :meth:`Plan.save` wrote, on a device; runs nobody's code. Raises ValueError for what is no plan or another version's,
    and for a device that this machine has not.
    """
    from .file import load

    return load(path, device, cuda_graph)
