"""The walk: stable order, the names on the way down in memory, nothing from outside the folder."""

from __future__ import annotations

import itertools
import os

import pytest

from resnet_fast.data import files
from resnet_fast.data.files import walk
from resnet_fast.predict.ranks import Ranks


def names(*arguments) -> list[str]:
    return [item.name for item in walk([str(argument) for argument in arguments])]


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "root"
    for name in (
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
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    os.mkfifo(root / "fifo.jpg")
    return root


def test_order_is_by_name_folder_by_folder(folder):
    expected = ["B.jpg", "a/b/c.tiff", "a/z.PNG", "a.jpg", "b.jpg", "d/e.heic"]
    assert names(folder) == [str(folder / name) for name in expected]
    assert [item.index for item in walk([str(folder)])] == list(range(6))
    assert all(item.path == item.name and item.error is None for item in walk([str(folder)]))


def test_arguments_keep_their_order_and_files_need_no_suffix(folder):
    assert names(folder / "noname", folder / "a", folder / "nowhere.jpg") == [
        str(folder / name) for name in ("noname", "a/b/c.tiff", "a/z.PNG", "nowhere.jpg")
    ]


def test_a_trailing_slash_changes_no_name(folder):
    assert names(f"{folder}/") == names(folder)


def test_names_that_are_no_utf8_survive(tmp_path):
    raw = os.path.join(os.fsencode(tmp_path), b"caf\xe9.jpg")
    open(raw, "w").close()
    assert [os.fsencode(name) for name in names(tmp_path)] == [raw]


def test_links_stay_inside_the_folder(folder, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.jpg").touch()
    sibling = tmp_path / "rootless.jpg"  # its path begins like the folder's
    sibling.touch()
    links = {
        "out.jpg": "../outside/secret.jpg",
        "outdir": "../outside",
        "in.jpg": "a/z.PNG",
        "indir": "a",
        "gone.jpg": "nothing.jpg",
        "near.jpg": "../rootless.jpg",
        "loop": ".",
        "text": "c.txt",
        "absolute.jpg": str(outside / "secret.jpg"),
        "chain.jpg": "indir/../../outside/secret.jpg",
    }
    for name, target in links.items():
        (folder / name).symlink_to(target)
    found = {os.path.relpath(item.name, folder): item for item in walk([str(folder)])}
    refused = {name for name, item in found.items() if item.error is not None}
    assert refused == {"out.jpg", "outdir", "near.jpg", "absolute.jpg", "chain.jpg"}
    assert all(found[name].error.startswith("refused: a link") for name in refused)
    assert found["in.jpg"].path == str((folder / "a/z.PNG").resolve())
    assert {"loop", "text", "indir"}.isdisjoint(found)
    assert found["gone.jpg"].error is None  # opening it will say so
    assert len([name for name in found if name.startswith("a/")]) == 2


def test_a_link_given_as_an_argument_is_the_users_own_choice(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    assert len(names(tmp_path / "link")) == 6


def test_a_folder_that_cannot_be_listed_is_reported(folder, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("/a"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found = list(walk([str(folder)]))
    assert [item.error for item in found if item.error] == ["cannot list this folder: Permission denied"]
    assert len(found) == 5


def test_the_walk_is_streamed_and_remembers_only_the_way_down(tmp_path, monkeypatch):
    for outer, inner in itertools.product(range(4), range(4)):
        (tmp_path / f"{outer}" / f"{inner}").mkdir(parents=True)
        (tmp_path / f"{outer}" / f"{inner}" / "a.jpg").touch()
    listed = []
    original = files._listing
    monkeypatch.setattr(files, "_listing", lambda folder: listed.append(folder) or original(folder))
    items = walk([str(tmp_path)])
    assert listed == []
    next(items)
    assert len(listed) == 3
    assert len(list(items)) == 15 and len(listed) == 21


def test_ranks_come_from_torchruns_environment(monkeypatch):
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(key, raising=False)
    assert Ranks.from_environment() == Ranks(0, 1, 0, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="expected 0 to 1"):
        Ranks.from_environment()
