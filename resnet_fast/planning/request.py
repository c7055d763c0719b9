"""What ``plan`` may be asked for: each argument is checked before anything is built, and refused in one sentence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

Normalize = tuple[Sequence[float], Sequence[float]]


def check_example(example: Tensor, normalize: Any) -> None:
    if not isinstance(example, Tensor) or example.dim() != 4:
        shape = list(example.shape) if isinstance(example, Tensor) else type(example).__name__
        raise ValueError(f"plan: example: got {shape}, expected one 4-D tensor [N, C, H, W]")
    right = example.dtype == torch.uint8 if normalize is not None else example.is_floating_point()
    if not right:
        raise ValueError(
            f"plan: example: got {example.dtype} with normalize={normalize}, expected uint8 [N, H, W, 3] with "
            "normalize=(mean, std), or a floating dtype without"
        )


def numbers(normalize: Any) -> Normalize | None:
    """(mean, std) of whatever kind as plain numbers."""
    if normalize is None:
        return None
    try:
        mean, std = (tuple(float(c) for c in v) for v in normalize)
    except (TypeError, ValueError):
        mean = std = ()
    if len(mean) != 3 or len(std) != 3 or not all(std):
        raise ValueError(f"plan: normalize: got {normalize!r}, expected (mean, std), three numbers each, no std 0")
    return mean, std


def names_of(features: Any) -> Sequence[str] | None:
    """The names of modules, where one may stand by itself."""
    features = (features,) if isinstance(features, str) else features
    if features is not None and (
        not isinstance(features, (tuple, list)) or not features or not all(isinstance(f, str) for f in features)
    ):
        raise ValueError(f"plan: features: got {features!r}, expected names of modules, or None")
    return features


def check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"plan: model: got {type(model).__name__}, expected an nn.Module")
    if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        raise ValueError(
            "plan: model: got one with meta tensors, which have no values, expected weights: load them first"
        )


def check_options(
    dtype: torch.dtype,
    device: torch.device,
    cuda_graph: bool | None,
    softmax: bool,
    topk: int | None,
    features: Sequence[str] | None,
) -> None:
    if dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        raise ValueError(f"plan: dtype: got {dtype}, expected torch.float32, float64, float16 or bfloat16")
    if cuda_graph and device.type != "cuda":
        raise ValueError("plan: cuda_graph: got True for an example that is not on CUDA, expected None or False")
    if topk is not None and (type(topk) is not int or topk < 1):
        raise ValueError(f"plan: topk: got {topk!r}, expected a whole number, at least 1, or None")
    if features is not None and (softmax or topk):
        raise ValueError(
            "plan: features: softmax and topk are of the classes; make two plans, they share their weights"
        )


def place(device: torch.device | str) -> torch.device:
    """The device with its number; raises ValueError for one that a plan cannot be on, or that this machine has not."""
    try:
        found = torch.device(device)
        if found.type in ("cpu", "cuda"):
            torch.empty(0, device=found)
    except (RuntimeError, TypeError, AssertionError) as problem:  # AssertionError: a torch that was built without CUDA
        raise ValueError(
            f'plan: device: got {device}, which is not to be had here ({str(problem).splitlines()[0]}): use "cpu", or "cuda" '
            f"on a machine whose GPU torch {torch.__version__} sees"
        ) from problem
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"plan: device: got {found}, expected cpu or cuda")
    return torch.device("cuda", torch.cuda.current_device()) if found.type == "cuda" and found.index is None else found
