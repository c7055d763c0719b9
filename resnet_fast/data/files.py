"""The walk over image files: a streamed list in a fixed order, the same for every rank and run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

# Suffixes of photographs. Pillow cannot read HEIC, but such files are reported instead of being left out silently.
SUFFIXES = frozenset(
    (
        "avif bmp dib gif heic heif ico j2k jfif jp2 jpe jpeg jpg pbm pgm png pnm ppm tga tif tiff webp"
    ).split()
)


class Item(NamedTuple):
    """One file: its position in the walk, the name to report, the path to open, and why not to open it (or None)."""

    position: int
    name: str
    path: str
    error: str | None = None


def walk(arguments: Sequence[str]) -> Iterator[Item]:
    """Yield the files of the arguments in order; of a folder, by name, those with an image suffix that are not hidden.

    Only the names of the current folder and its parents are in memory. Symbolic links to files inside the folder are
    followed, links to folders inside it are not (the walk reaches these folders anyway). A link that leads out of the
    folder becomes an Item with an error. A file that is itself an argument is always taken.
    """
    position = 0
    for argument in arguments:
        entries = _folder(argument) if os.path.isdir(argument) else [(argument, argument, None)]
        for name, path, error in entries:
            yield Item(position, name, path, error)
            position += 1


def _folder(root: str) -> Iterator[tuple[str, str, str | None]]:
    """Yield (name, path, error) of the images below ``root``, depth first."""
    top = os.path.realpath(root)
    stack: list[tuple[str, list[str], set[str], set[str]]] = []

    def enter(folder: str) -> Iterator[tuple[str, str, str]]:
        try:
            listing = _listing(folder)
        except OSError as error:
            yield folder, folder, f"cannot list this folder: {error.strerror}"
        else:
            stack.append((folder, *listing))

    yield from enter(root)
    while stack:
        folder, names, folders, links = stack[-1]
        if not names:
            stack.pop()
            continue
        name = names.pop()
        path = os.path.join(folder, name)
        if name in folders:
            yield from enter(path)
        elif name in links:
            yield from _link(path, top)
        else:
            yield path, path, None


def _listing(folder: str) -> tuple[list[str], set[str], set[str]]:
    """Return (names in reverse order, which of them are folders, which are links)."""
    names: list[str] = []
    folders: set[str] = set()
    links: set[str] = set()
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_symlink():
                links.add(entry.name)
            elif entry.is_dir(follow_symlinks=False):
                folders.add(entry.name)
            elif not (is_image(entry.name) and entry.is_file(follow_symlinks=False)):
                continue
            names.append(entry.name)
    names.sort(reverse=True)
    return names, folders, links


def _link(path: str, top: str) -> Iterator[tuple[str, str, str | None]]:
    """Yield the file that a symbolic link names, or the reason to refuse it; nothing for a folder inside ``top``."""
    target = os.path.realpath(path)
    inside = os.path.commonpath([top, target]) == top
    if os.path.isdir(target):
        if not inside:
            yield path, path, "refused: a link to a folder outside"
    elif is_image(path):
        error = None if inside else "refused: a link out of the folder"
        yield path, target, error


def is_image(name: str) -> bool:
    """Return whether the suffix is an image format's."""
    suffix = name.rpartition(".")[2]
    return suffix.lower() in SUFFIXES
