"""Weights from a file, torchvision or a seed, with the preset and category names that belong to them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data.samples import MEAN, STD
from ..models.checkpoint import _clean, _read, _unwrap, load_checkpoint
from ..models.family import create_model, list_models


@dataclass(frozen=True)
class Weights:
    """A model in eval mode, its preset (sizes in pixels, mean and std of RGB in [0, 1]) and its category names."""

    model: nn.Module
    resize: int = 256
    crop: int = 224
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    categories: list[str] | None = None

    @property
    def classes(self) -> int:
        """How many classes the model's last layer has."""
        return self.model.get_parameter("fc.weight").shape[0]

    def digest(self) -> str:
        """Return the SHA-256 of the state's names and bytes; it identifies a set of weights."""
        total = hashlib.sha256()
        for name, value in self.model.state_dict().items():
            total.update(name.encode())
            value = value.detach().cpu().contiguous()
            as_bytes = value.flatten().view(torch.uint8)
            total.update(as_bytes.numpy())
        return total.hexdigest()


def load(name: str, weights: str | None, random: bool) -> Weights:
    """Return architecture ``name`` with weights from a file or torchvision's enum (None: "DEFAULT"), or random ones.

    Raises ValueError, naming the alternatives, if the weights are not available.
    """
    if random:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Weights(create_model(name).eval())
    if name not in list_models():
        raise ValueError(f"--model {name}: expected one of {', '.join(list_models())}")
    if weights is not None and Path(weights).is_file():
        return _from_file(name, weights)
    return _from_torchvision(name, weights)


def _from_torchvision(name: str, weights: str | None) -> Weights:
    instead = "give --weights FILE, or --random-weights for a trial"
    try:
        from torchvision.models import get_model_weights
    except ImportError as error:
        raise ValueError(
            f"no weights for {name}: torchvision, their source, is not installed; {instead}"
        ) from error
    entries = get_model_weights(name).__members__
    if weights is not None and weights not in entries:
        raise ValueError(f"--weights {weights}: neither a file nor one of {', '.join(entries)}")
    entry = entries[weights or "DEFAULT"]
    try:
        # torch.hub reports its download on stdout, where our results go
        with contextlib.redirect_stdout(sys.stderr):
            model = create_model(name, weights=entry).eval()
    except OSError as error:  # no network or no space; its cause is the network's message
        reason = f"{entry.url} could not be fetched ({error.__cause__})"
        raise ValueError(f"no weights for {name}: {reason}; {instead}") from error
    preset = entry.transforms()
    return Weights(
        model,
        resize=preset.resize_size[0],
        crop=preset.crop_size[0],
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        categories=entry.meta["categories"],
    )


def _from_file(name: str, path: str) -> Weights:
    try:
        content = _read(Path(path), weights_only=True)
    except (ImportError, OSError):
        raise
    except Exception as error:  # torch's safe unpickler raises anything for a foreign file
        raise ValueError(
            f"--weights {path}: not a checkpoint of tensors that can be read safely ({type(error).__name__})"
        ) from error
    state = _clean(_unwrap(content))
    options: dict[str, Any] = (
        {"num_classes": len(state["fc.weight"])} if "fc.weight" in state else {}
    )
    model = create_model(name, **options)
    return Weights(load_checkpoint(model, state).eval())


def read_labels(path: str) -> list[str]:
    """Return class names by class number, from one of these forms.

    Lines; a JSON list; or a JSON object {"0": name, …}. In JSON a name may be an [id, name] pair. Raises
    FileNotFoundError if there is no such file, and ValueError for another form or if an object's keys are not the class
    numbers.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"--labels {path}: there is no such file")
    try:
        text = Path(path).read_text(encoding="utf-8")
        if text.lstrip()[:1] not in ("[", "{"):
            return text.splitlines()
        content = json.loads(text)
    except ValueError as error:  # the decoder's or JSON's
        raise ValueError(f"--labels {path}: neither lines in UTF-8 nor JSON: {error}") from error
    if isinstance(content, dict):
        content = _by_class_number(content, path)
    return [_label(entry, path) for entry in content]


def _by_class_number(labels: dict, path: str) -> list:
    numbers = [str(i) for i in range(len(labels))]
    if sorted(labels) != sorted(numbers):
        raise ValueError(
            f"--labels {path}: the keys are not the class numbers 0 to {len(labels) - 1}"
        )
    return [labels[number] for number in numbers]


def _label(entry: object, path: str) -> str:
    """Return the name in an entry: the entry itself, or the last element of a pair."""
    name = entry[-1] if isinstance(entry, list) and entry else entry
    if not isinstance(name, str):
        raise ValueError(f"--labels {path}: got {name!r}, expected names or [id, name] pairs")
    return name
