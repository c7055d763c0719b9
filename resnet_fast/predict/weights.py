"""Which weights: a file, torchvision's enum or random ones; and the preset and category names that belong to them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..data.samples import MEAN, STD
from ..models.checkpoint import _clean, _read, _unwrap, load_checkpoint
from ..models.family import create_model, list_models


@dataclass(frozen=True)
class Weights:
    """A model in eval mode; how its input is made: sizes in pixels, mean and std of RGB in [0, 1]; its categories."""

    model: nn.Module
    resize: int = 256
    crop: int = 224
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    categories: list[str] | None = None

    def digest(self) -> str:
        """SHA-256 of names and bytes of the state: what tells one set of weights from another."""
        total = hashlib.sha256()
        for name, value in self.model.state_dict().items():
            total.update(name.encode())
            total.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return total.hexdigest()


def load(name: str, weights: str | None, random: bool) -> Weights:
    """The architecture ``name`` with weights from a file or torchvision's enum (None: "DEFAULT"), or random ones.

    Raises ValueError, with what else could be done, if there are none to be had.
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
        raise ValueError(f"no weights for {name}: torchvision, their source, is not installed; {instead}") from error
    entries = get_model_weights(name).__members__
    if weights is not None and weights not in entries:
        raise ValueError(f"--weights {weights}: neither a file nor one of {', '.join(entries)}")
    entry = entries[weights or "DEFAULT"]
    try:
        with contextlib.redirect_stdout(sys.stderr):  # torch.hub tells of its download where our results go
            model = create_model(name, weights=entry).eval()
    except OSError as error:  # no network, no space; its cause is what the network said
        raise ValueError(
            f"no weights for {name}: {entry.url} could not be fetched ({error.__cause__}); {instead}"
        ) from error
    preset = entry.transforms()
    return Weights(
        model,
        preset.resize_size[0],
        preset.crop_size[0],
        tuple(preset.mean),
        tuple(preset.std),
        entry.meta["categories"],
    )


def _from_file(name: str, path: str) -> Weights:
    try:
        found = _read(Path(path), weights_only=True)
    except (ImportError, OSError):
        raise
    except Exception as error:  # a foreign file makes torch's safe unpickler raise anything
        raise ValueError(
            f"--weights {path}: not a checkpoint of tensors that can be read safely ({type(error).__name__})"
        ) from error
    state = _clean(_unwrap(found))
    classes = {"num_classes": len(state["fc.weight"])} if "fc.weight" in state else {}
    return Weights(load_checkpoint(create_model(name, **classes), state).eval())


def read_labels(path: str) -> list[str]:
    """Names by class number: one a line, a JSON list, or a JSON object {"0": name, …}; or [id, name] pairs.

    Raises FileNotFoundError if it is not there, ValueError if an object's keys are not the class numbers, or for what is none of these.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"--labels {path}: there is no such file")
    try:
        text = Path(path).read_text(encoding="utf-8")
        if text.lstrip()[:1] not in ("[", "{"):
            return text.splitlines()
        found = json.loads(text)
    except ValueError as error:  # of the decoder's or of JSON's
        raise ValueError(f"--labels {path}: neither lines in UTF-8 nor JSON: {error}") from error
    if isinstance(found, dict):
        if sorted(found) != sorted(map(str, range(len(found)))):
            raise ValueError(f"--labels {path}: the keys are not the class numbers 0 to {len(found) - 1}")
        found = [found[str(i)] for i in range(len(found))]
    names = [name[-1] if isinstance(name, list) and name else name for name in found]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"--labels {path}: got {next(name for name in names if not isinstance(name, str))!r}, expected names or [id, name] pairs"
        )
    return names
