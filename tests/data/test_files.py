"""The walk: a stable order, little memory, nothing from outside the folder."""

from __future__ import annotations

import itertools
import os

import pytest

from resnet_fast.data import files
from resnet_fast.data.files import Item, walk
from resnet_fast.predict.ranks import Ranks


def items_of(*arguments) -> list[Item]:
    return list(walk([str(argument) for argument in arguments]))


def names(*arguments) -> list[str]:
    return [item.name for item in items_of(*arguments)]


def under(folder, *names: str) -> list[str]:
    return [str(folder / name) for name in names]


FILES = (
    "b.jpg",
    "a/z.PNG",
    "a/b/c.tiff",
    "c.txt",
    ".hidden.jpg",
    ".cache/x.jpg",
    "a.jpg",
    "noname",
    "d/e.heic",
    "B.jpg",
)
# those of them that are images, in order
IMAGES = ("B.jpg", "a/b/c.tiff", "a/z.PNG", "a.jpg", "b.jpg", "d/e.heic")


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "root"
    for name in FILES:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    os.mkfifo(root / "fifo.jpg")
    return root


def test_order_is_by_name_folder_by_folder(folder):
    found = items_of(folder)
    paths = under(folder, *IMAGES)
    assert found == [Item(index, path, path) for index, path in enumerate(paths)]


def test_arguments_keep_their_order_and_files_need_no_suffix(folder):
    found = names(folder / "noname", folder / "a", folder / "nowhere.jpg")
    assert found == under(folder, "noname", "a/b/c.tiff", "a/z.PNG", "nowhere.jpg")


def test_trailing_slash_changes_no_name(folder):
    assert names(f"{folder}/") == names(folder)


def test_names_that_are_not_utf8_survive(tmp_path):
    path = os.path.join(os.fsencode(tmp_path), b"caf\xe9.jpg")
    open(path, "w").close()
    (name,) = names(tmp_path)
    assert os.fsencode(name) == path


LINKS = {
    "out.jpg": "../outside/secret.jpg",
    "outdir": "../outside",
    "in.jpg": "a/z.PNG",
    "indir": "a",
    "gone.jpg": "nothing.jpg",
    "near.jpg": "../rootless.jpg",  # its path begins like the folder's
    "loop": ".",
    "text": "c.txt",
    "chain.jpg": "indir/../../outside/secret.jpg",
}


def test_links_stay_inside_the_folder(folder, tmp_path):
    secret = tmp_path / "outside" / "secret.jpg"
    secret.parent.mkdir()
    secret.touch()
    (tmp_path / "rootless.jpg").touch()
    (folder / "absolute.jpg").symlink_to(secret)
    for name, target in LINKS.items():
        (folder / name).symlink_to(target)

    found = {os.path.relpath(item.name, folder): item for item in items_of(folder)}

    refused = {name: item.error for name, item in found.items() if item.error is not None}
    assert refused.keys() == {"out.jpg", "outdir", "near.jpg", "absolute.jpg", "chain.jpg"}
    assert all(error.startswith("refused: a link") for error in refused.values())
    # Links inside are followed to files and not to folders; opening a broken link gives the error.
    assert found.keys() - refused.keys() == {*IMAGES, "in.jpg", "gone.jpg"}
    assert found["in.jpg"].path == str((folder / "a/z.PNG").resolve())


def test_link_given_as_an_argument_is_followed(folder, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(folder)
    assert len(names(link)) == len(IMAGES)


def test_folder_that_cannot_be_listed_is_reported(folder, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("/a"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found = items_of(folder)

    errors = [item.error for item in found if item.error]
    assert errors == ["cannot list this folder: Permission denied"]
    assert len(found) == 5


def test_walk_is_streamed(tmp_path, monkeypatch):
    for outer, inner in itertools.product("0123", "0123"):
        leaf = tmp_path / outer / inner
        leaf.mkdir(parents=True)
        (leaf / "a.jpg").touch()
    listed = []
    original = files._listing

    def listing(folder: str):
        listed.append(folder)
        return original(folder)

    monkeypatch.setattr(files, "_listing", listing)
    items = walk([str(tmp_path)])
    assert listed == []

    next(items)
    assert len(listed) == 3

    assert len(list(items)) == 15
    assert len(listed) == 21


def test_ranks_come_from_torchruns_environment(monkeypatch):
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(key, raising=False)
    assert Ranks.from_environment() == Ranks(0, 1, 0, 1)

    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="expected 0 to 1"):
        Ranks.from_environment()
