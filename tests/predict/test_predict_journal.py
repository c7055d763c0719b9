"""The record of a run: what a resumed run keeps of it, what it cuts off, and what it leaves alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from resnet_fast.data.files import Item
from resnet_fast.predict.journal import Journal, is_done, merged

SETTINGS = {"model": "resnet18", "size": 32}


def items(count: int, start: int = 0) -> list[Item]:
    indices = range(start, count)
    return [Item(i, f"{i}.png", f"/{i}.png") for i in indices]


def record(path: Path, count: int, done: bool = False) -> list[bytes]:
    """Write ``count`` rows, the third of them an error; return the file's lines."""
    rows = [{"class": [i], "p": [0.5]} for i in range(count)]
    rows[2] = {"error": "damaged"}
    with Journal(path, SETTINGS) as journal:
        todo = journal.resume(iter(items(count)), 4)
        assert list(todo) == items(count)
        journal.write(items(count), rows)
        if done:
            journal.finish(count, "digest")
    return path.read_bytes().splitlines(keepends=True)


def resumed(path: Path, found: list[Item], batch: int = 4) -> tuple[int, int, list[Item]]:
    """Return (files recorded, failed among them, items still to do)."""
    with Journal(path, SETTINGS) as journal:
        todo = journal.resume(iter(found), batch)
        remaining = list(todo)
        return journal.recorded, journal.failed, remaining


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "out.csv.part"


def test_whole_batches_are_kept(path):
    lines = record(path, 10)

    result = resumed(path, items(12))

    assert result == (8, 1, items(12, start=8))
    assert path.read_bytes() == b"".join(lines[:9])


@pytest.mark.parametrize(
    "tail",
    [b'{"i": 10, "na', b"\0" * 50, b"\0" * 50 + b"\n", b"[]\n", b"\xff\n", b"7\n"],
)
def test_torn_tail_is_cut_off(path, tail):
    whole = b"".join(record(path, 8))
    path.write_bytes(whole + tail)

    result = resumed(path, items(12))

    assert result == (8, 1, items(12, start=8))
    assert path.read_bytes() == whole


def test_record_cut_anywhere_can_be_resumed(path):
    whole = b"".join(record(path, 9, done=True))
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])

        recorded, _, todo = resumed(path, items(9))

        assert recorded in {0, 4, 8, 9}
        assert todo == items(9, start=recorded)


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("digest", ["digest", "that of other ranks' files, too"])
def test_complete_record_leaves_nothing_to_do_but_the_last_line(path, done, digest):
    record(path, 9, done)
    assert resumed(path, items(9)) == (9, 1, [])
    assert is_done(path) == done

    with Journal(path, SETTINGS) as journal:
        todo = journal.resume(iter(items(9)), 4)
        assert list(todo) == []
        journal.finish(9, digest)

    assert is_done(path)
    assert [row["i"] for row in merged([path])] == list(range(9))
    lines = path.read_bytes().splitlines()
    assert len(lines) == 11
    assert json.loads(lines[-1]) == {"done": 9, "files": digest}


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize(
    ("renamed", "count", "recorded"),
    [(5, 10, 4), (None, 12, 8), (None, 7, 4)],
    ids=["one renamed", "two more", "three fewer"],
)
def test_changed_files_cost_only_what_follows_them(path, done, renamed, count, recorded):
    record(path, 10, done=done)
    found = items(count)
    if renamed is not None:
        found[renamed] = found[renamed]._replace(name="new.png")

    result = resumed(path, found)

    assert result == (recorded, 1, found[recorded:])


def test_other_settings_are_named_and_nothing_is_lost(path):
    before = b"".join(record(path, 4))
    with pytest.raises(ValueError, match="size 32 → 64.*delete it to start anew"):
        Journal(path, {**SETTINGS, "size": 64})
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"precious", b"precious\n", b'{"a": 1}\n', b"[1]\n"])
def test_file_that_is_not_a_record_is_left_alone(path, content):
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not a record"):
        Journal(path, SETTINGS)
    assert path.read_bytes() == content


def test_two_runs_cannot_write_one_record(path):
    with Journal(path, SETTINGS), pytest.raises(ValueError, match="another run is writing it"):
        Journal(path, SETTINGS)
    Journal(path, SETTINGS).__exit__()


def write_rank(path: Path, rank: int, share: list[Item]) -> None:
    rows = [{"class": [item.position]} for item in share]
    with Journal(path, {**SETTINGS, "rank": rank}) as journal:
        journal.write(share, rows)
        journal.finish(len(share), "digest")


def test_ranks_are_merged_in_the_walks_order(tmp_path):
    found = items(7)
    paths = [tmp_path / f"{rank}" for rank in range(3)]
    for rank, path in enumerate(paths):
        assert not is_done(path)
        write_rank(path, rank, found[rank::3])

    rows = [(row["i"], row["class"]) for row in merged(paths)]

    assert rows == [(i, [i]) for i in range(7)]


def test_ranks_of_different_walks_are_not_merged(tmp_path):
    found = items(7)
    paths = [tmp_path / f"{rank}" for rank in range(2)]
    for rank, path in enumerate(paths):
        write_rank(path, rank, found[rank::2])
    *lines, _ = paths[1].read_bytes().splitlines(keepends=True)
    last_line = json.dumps({"done": 3, "files": "another"}).encode()
    paths[1].write_bytes(b"".join(lines) + last_line + b"\n")

    with pytest.raises(ValueError, match="do not fit together"):
        merged(paths)
