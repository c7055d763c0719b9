"""One walk through nested results: tuples, lists, dicts and slices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx.immutable_collections import immutable_dict, immutable_list

_ORDINARY: dict[type, type] = {immutable_list: list, immutable_dict: dict}


def mapped(structure: Any, leaf: Callable[[Any], Any]) -> Any:
    """The nested structure with ``leaf(part)`` in place of each part that is no tuple, list, dict or slice.

    torch.fx's immutable lists and dicts become ordinary ones, named tuples become tuples.
    """
    kind = _ORDINARY.get(type(structure), type(structure))
    if isinstance(structure, (tuple, list)):
        kind = tuple if hasattr(kind, "_fields") else kind
        return kind([mapped(part, leaf) for part in structure])
    if isinstance(structure, dict):
        return kind([(key, mapped(part, leaf)) for key, part in structure.items()])
    if isinstance(structure, slice):
        return slice(
            *[mapped(part, leaf) for part in (structure.start, structure.stop, structure.step)]
        )
    return leaf(structure)


def leaves(structure: Any) -> list[Any]:
    """Every part of a nested structure that is no tuple, list, dict or slice, in order."""
    found: list[Any] = []
    mapped(structure, found.append)
    return found
