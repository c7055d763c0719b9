"""The walk through nested arguments and results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .ir import Attribute, Value


def mapped(structure: Any, leaf: Callable[[Any], Any]) -> Any:
    """The nested tuples, lists, dicts and slices with ``leaf(x)`` in place of everything else, references included."""
    if isinstance(structure, (Value, Attribute)):  # tuples themselves
        return leaf(structure)
    if isinstance(structure, (tuple, list)):
        return type(structure)([mapped(part, leaf) for part in structure])
    if isinstance(structure, dict):
        return type(structure)([(key, mapped(part, leaf)) for key, part in structure.items()])
    if isinstance(structure, slice):
        return slice(*[mapped(part, leaf) for part in (structure.start, structure.stop, structure.step)])
    return leaf(structure)
