"""The arguments of ``plan``: each is checked before anything is built, and refused in one sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..graph.across import Normalize

PLAN_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Options:
    """What a plan computes around its network, and in which dtype; saved with the plan.

    ``normalize``: (mean, std) of uint8 input. ``across``: the groups of steps to form, by kind or by name.
    """

    dtype: torch.dtype
    normalize: Normalize | None = None
    softmax: bool = False
    topk: int | None = None
    across: tuple[str, ...] = ()


def check_example(example: Tensor, normalize: Any) -> None:
    """Raise ValueError unless the example is a batch of images in a dtype that fits ``normalize``."""
    if not isinstance(example, Tensor) or example.dim() != 4:
        got = list(example.shape) if isinstance(example, Tensor) else type(example).__name__
        raise ValueError(f"plan: example: got {got}, expected one 4-D tensor [N, C, H, W]")
    fits = example.is_floating_point() if normalize is None else example.dtype == torch.uint8
    if not fits:
        raise ValueError(
            f"plan: example: got {example.dtype} with normalize={normalize}, expected uint8 [N, H, W, 3] with "
            "normalize=(mean, std), or a floating dtype without"
        )


def checked_normalize(normalize: Any) -> Normalize | None:
    """Return (mean, std), given as numbers of any kind, as tuples of floats."""
    if normalize is None:
        return None
    try:
        mean, std = (tuple(float(channel) for channel in values) for values in normalize)
    except (TypeError, ValueError):
        mean = std = ()
    if len(mean) != 3 or len(std) != 3 or not all(std):
        raise ValueError(
            f"plan: normalize: got {normalize!r}, expected (mean, std), three numbers each, no std 0"
        )
    return mean, std


def checked_features(features: Any) -> Sequence[str] | None:
    """Return the names of modules as a sequence; a single name may be a string."""
    if features is None:
        return None
    if isinstance(features, str):
        return (features,)
    is_sequence = isinstance(features, (tuple, list)) and len(features) > 0
    if not is_sequence or not all(isinstance(name, str) for name in features):
        raise ValueError(f"plan: features: got {features!r}, expected names of modules, or None")
    names: Sequence[str] = features
    return names


def check_model(model: nn.Module) -> None:
    """Raise ValueError unless the model is a module with values in its weights."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"plan: model: got {type(model).__name__}, expected an nn.Module")
    tensors = (*model.parameters(), *model.buffers())
    if any(tensor.is_meta for tensor in tensors):
        raise ValueError(
            "plan: model: got one with meta tensors, which have no values, expected weights: load them first"
        )


def check_options(
    options: Options,
    device: torch.device,
    cuda_graph: bool | None,
    features: Sequence[str] | None,
) -> None:
    """Raise ValueError for options that do not exist or contradict each other."""
    topk = options.topk
    if options.dtype not in PLAN_DTYPES:
        raise ValueError(
            f"plan: dtype: got {options.dtype}, expected torch.float32, float64, float16 or bfloat16"
        )
    if cuda_graph and device.type != "cuda":
        raise ValueError(
            "plan: cuda_graph: got True for an example that is not on CUDA, expected None or False"
        )
    if topk is not None and (type(topk) is not int or topk < 1):
        raise ValueError(f"plan: topk: got {topk!r}, expected a whole number, at least 1, or None")
    if features is not None and (options.softmax or topk):
        raise ValueError(
            "plan: features: softmax and topk are of the classes; make two plans, they share their weights"
        )


def checked_device(device: torch.device | str) -> torch.device:
    """Return the device with its index; raise ValueError for one that is neither CPU nor CUDA or that is not here."""
    try:
        found = torch.device(device)
        if found.type in ("cpu", "cuda"):
            torch.empty(0, device=found)
    # AssertionError: a torch that was built without CUDA
    except (RuntimeError, TypeError, AssertionError) as problem:
        reason = str(problem).splitlines()[0]
        raise ValueError(
            f'plan: device: got {device}, which is not to be had here ({reason}): use "cpu", or "cuda" '
            f"on a machine whose GPU torch {torch.__version__} sees"
        ) from problem
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"plan: device: got {found}, expected cpu or cuda")
    if found.type == "cuda" and found.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return found
