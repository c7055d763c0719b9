"""Checkpoints: reads what torchvision, timm, DDP, torch.compile or an EMA wrote, writes torchvision's names.

Names are compared without the segments that wrappers add ("module", "_orig_mod", …), on both sides, so a wrapped
model's file fits a bare model and a bare model's file a wrapped one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..util.files import replacing

# What a training script may have put the weights under; the raw weights go before their moving average.
_WRAPPERS = ("state_dict", "model", "state_dict_ema", "model_ema")
# DDP and AveragedModel, torch.compile, FSDP, activation checkpointing.
_SEGMENTS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_SUFFIXES = (".safetensors", ".pth", ".pt")


def load_checkpoint(
    model: nn.Module,
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    strict: bool = True,
    weights_only: bool = True,
) -> nn.Module:
    """Load weights into ``model`` (in place) and return it.

    ``source``: a file (.safetensors, or anything torch.load reads) or a mapping already in memory. Names may carry
    "module." and "_orig_mod.", at the front or inside. The weights may be under "state_dict", "model",
    "state_dict_ema" or "model_ema", looked for in this order; to take the average from a file with both, pass that
    mapping itself. ``strict``: raise if a name is missing or unexpected. ``weights_only``: torch.load's; False executes
    code in the file. Raises ValueError with what it got and expected: names, shapes, another number of classes.
    """
    state = _clean(
        _unwrap(source if isinstance(source, Mapping) else _read(Path(source), weights_only))
    )
    own = {_bare(name): (name, t) for name, t in model.state_dict().items()}
    _check_shapes(state, own)
    if strict:
        _check_names(state, own)
    model.load_state_dict(
        {own[name][0]: t for name, t in state.items() if name in own}, strict=False
    )
    return model


def save_checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the model's weights under torchvision's names, as .safetensors or (by torch.save) .pth or .pt.

    Wrappers' name segments are left out. Tensors are written contiguous and from the CPU: safetensors refuses
    channels_last ones. The file appears complete or not at all. Raises ValueError for another suffix or a model on the
    meta device.
    """
    path = Path(path)
    if path.suffix not in _SUFFIXES:
        raise ValueError(
            f"save_checkpoint: suffix: got {path.suffix!r}, expected one of {', '.join(_SUFFIXES)}"
        )
    state = _own_memory({_bare(name): t for name, t in model.state_dict().items()})
    with replacing(path) as part:
        if path.suffix == ".safetensors":
            _safetensors().save_file(state, part, metadata={"format": "pt"})
        else:
            torch.save(state, part)


def _read(path: Path, weights_only: bool) -> Any:
    if path.suffix == ".safetensors":
        return _safetensors().load_file(path)
    return torch.load(path, map_location="cpu", weights_only=weights_only)


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError("this file needs safetensors: pip install 'resnet_fast[io]'") from error
    return safetensors.torch


def _unwrap(found: Any) -> Mapping[str, Any]:
    """The mapping of names to tensors inside a file's content."""
    while isinstance(found, Mapping):
        inner = next(
            (found[key] for key in _WRAPPERS if isinstance(found.get(key), (Mapping, nn.Module))),
            None,
        )
        if inner is None:
            return found
        found = inner
    if isinstance(found, nn.Module):
        return found.state_dict()
    raise ValueError(
        f"load_checkpoint: got a {type(found).__name__}, expected a mapping of names to tensors"
    )


def _bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _SEGMENTS)


def _clean(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The same weights under bare names."""
    cleaned: dict[str, Tensor] = {}
    for name, t in state.items():
        if name == "n_averaged":  # AveragedModel's counter is no weight
            continue
        if not isinstance(t, Tensor):
            raise ValueError(
                f"load_checkpoint: {name}: got a {type(t).__name__}, expected a tensor"
            )
        if _bare(name) in cleaned:
            raise ValueError(
                f"load_checkpoint: {_bare(name)}: got it twice, with and without a wrapper's prefix, expected once"
            )
        cleaned[_bare(name)] = t
    return cleaned


def _check_shapes(state: dict[str, Tensor], own: dict[str, tuple[str, Tensor]]) -> None:
    for name, t in state.items():
        if name not in own or t.shape == own[name][1].shape:
            continue
        expected = list(own[name][1].shape)
        sentence = f"load_checkpoint: {name}: got {list(t.shape)}, expected {expected}"
        if name.split(".")[0] in ("fc", "head", "classifier"):
            sentence += (
                f": the checkpoint has {t.shape[0]} classes, the model {expected[0]}; build it with "
                f"num_classes={t.shape[0]}, or leave {name.rpartition('.')[0]}.* out and pass strict=False"
            )
        raise ValueError(sentence)


def _check_names(state: dict[str, Tensor], own: dict[str, tuple[str, Tensor]]) -> None:
    # Files from before torch 0.4.1 have no counters; batch norm starts them at 0.
    missing = [
        name for name in own if name not in state and not name.endswith("num_batches_tracked")
    ]
    unexpected = [name for name in state if name not in own]
    if missing or unexpected:
        raise ValueError(
            "load_checkpoint: the checkpoint is of another architecture: "
            f"{_some(missing)} missing, {_some(unexpected)} unexpected (strict=False loads what fits)"
        )


def _some(names: list[str]) -> str:
    if not names:
        return "0 names"
    more = ", …" if len(names) > 3 else ""
    return f"{len(names)} names ({', '.join(names[:3])}{more})"


def _own_memory(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors that share no memory and are no views of larger ones, as safetensors requires."""
    seen: set[int] = set()
    for name, t in state.items():
        if t.is_meta:
            raise ValueError(f"save_checkpoint: {name}: got a meta tensor, expected one with data")
        t = t.detach().cpu().contiguous()
        if t.untyped_storage().nbytes() != t.nbytes or t.data_ptr() in seen:
            t = t.clone()
        seen.add(t.data_ptr())
        state[name] = t
    return state
