"""Which files, in which order: a streaming walk, the same for every rank and run, that never leaves a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

# Those that people keep photographs in; HEIC is among them so that its files are reported, not silently left out.
SUFFIXES = frozenset(
    ("avif bmp dib gif heic heif ico j2k jfif jp2 jpe jpeg jpg pbm pgm png pnm ppm tga tif tiff webp").split()
)


class Item(NamedTuple):
    """One file: its place in the walk, the name to report, the path to open, why it must not be opened (or None)."""

    index: int
    name: str
    path: str
    error: str | None = None


def walk(arguments: Sequence[str]) -> Iterator[Item]:
    """The files of the arguments in order; a folder's by name, those with an image suffix that are not hidden.

    Memory: the names of the folders on the way down. Symbolic links to files inside the folder are followed, to folders
    not (what they show is met at its own place); a link that leaves the folder is an Item with an error. A file named
    as an argument is always taken.
    """
    index = 0
    for argument in arguments:
        for name, path, error in _folder(argument) if os.path.isdir(argument) else [(argument, argument, None)]:
            yield Item(index, name, path, error)
            index += 1


def _folder(root: str) -> Iterator[tuple[str, str, str | None]]:
    top = os.path.realpath(root)
    stack: list[tuple[str, list[str], set[str], set[str]]] = []

    def enter(folder: str) -> Iterator[tuple[str, str, str]]:
        try:
            stack.append((folder, *_listing(folder)))
        except OSError as error:
            yield folder, folder, f"cannot list this folder: {error.strerror}"

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
    """(names in reverse order, which are folders, which are links)."""
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
    target = os.path.realpath(path)
    inside = os.path.commonpath([top, target]) == top
    if os.path.isdir(target):
        if not inside:
            yield path, path, "refused: a link to a folder outside"
    elif is_image(path):
        yield path, target, None if inside else "refused: a link out of the folder"


def is_image(name: str) -> bool:
    """Whether the suffix is that of an image."""
    return name.rpartition(".")[2].lower() in SUFFIXES
