"""The public functions ``plan`` and ``load_plan``: a whole network over a snapshot of its weights, to deploy.

A plan is data: a printable list of fused steps, folded weights, and for each input shape the chosen kernels. On a CPU a
batch goes through in pieces that fit in memory which the allocator keeps; on a GPU each input shape becomes one CUDA
graph (no GPU has run this yet). A plan is the only snapshot in this package; ``refresh()`` takes the model as it is
now. The modules that do the work are imported with the first plan, so that importing the package stays cheap.
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
    """Return a callable snapshot of ``model`` in eval, on ``example``'s device and tried on it.

    The model is left unchanged. Other batch and image sizes than the example's work too.

    Args:
        model: ours, torchvision's, timm's, an accelerated one, or any whose forward takes one input [N, C, H, W] and
            can be traced.
        example: images of the shape that the plan is for.
        dtype: of weights and activations; by default the example's, for uint8 float32.
        cuda_graph: replay one graph for each input shape. By default on CUDA, with single steps and a warning where a
            capture fails; True raises there.
        tune: first measure the kernels for the plan's problems, and the groups of ``across`` (CUDA).
        fuse: False runs the same network step by step, for :meth:`Plan.compare`.
        features: return the results of these modules as a dict instead of the forward's own.
        normalize: (mean, std) of RGB in [0, 1]; the input is then uint8 [N, H, W, 3].
        softmax: return probabilities.
        topk: return (probabilities, classes) of the k likeliest classes.
        across: the ops over several convolutions to use wherever the network has their form: "pointwise_pair",
            "conv_tail", "conv_pool", "pointwise_pool" (see :mod:`resnet_fast.fused`), or "conv_tail:layer1.1.conv2" for
            the one at that step; () for none. With ``tune`` those that make the whole network faster, where each
            distinct shape is decided by itself and the choice is stored in the GPU's table. By default a plan of the
            same network, input shape and dtype uses the stored choice, with a line in ``notes``, or else none.

    Raises:
        ValueError: the network cannot be planned, with the reason, before anything is built.
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


def load_plan(
    path: str | Path, device: torch.device | str = "cpu", *, cuda_graph: bool | None = None
) -> Plan:
    """Return the plan that :meth:`Plan.save` wrote, on a device. Loading runs no code from the file.

    Raises ValueError for a file that is not a plan or of another version, and for a device that this machine has not.
    """
    from .file import read
    from .plan import restored_plan

    return restored_plan(read(path), device, cuda_graph, str(path))
