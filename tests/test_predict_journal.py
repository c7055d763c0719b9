"""The record of a run: what it keeps of an earlier one, what it cuts off, and what it does not touch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from resnet_fast.predict.files import Item
from resnet_fast.predict.journal import Journal, is_done, merged

SETTINGS = {"model": "resnet18", "size": 32}


def items(count: int, start: int = 0) -> list[Item]:
    return [Item(i, f"{i}.png", f"/{i}.png") for i in range(start, count)]


def record(path: Path, count: int, done: bool = False) -> list[bytes]:
    """Write ``count`` rows, the third of them an error; returns the file's lines."""
    with Journal(path, SETTINGS) as journal:
        assert list(journal.resume(iter(items(count)), 4)) == items(count)
        rows = [{"error": "damaged"} if i == 2 else {"class": [i], "p": [0.5]} for i in range(count)]
        journal.write(items(count), rows)
        if done:
            journal.finish(count, "digest")
    return path.read_bytes().splitlines(keepends=True)


def resumed(path: Path, found: list[Item], batch: int = 4) -> tuple[int, int, list[Item]]:
    """(kept, failed among them, still to be done)."""
    with Journal(path, SETTINGS) as journal:
        todo = list(journal.resume(iter(found), batch))
        return journal.recorded, journal.failed, todo


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "out.csv.part"


def test_whole_batches_are_kept(path):
    lines = record(path, 10)
    assert resumed(path, items(12)) == (8, 1, items(12, 8))
    assert path.read_bytes() == b"".join(lines[:9])


@pytest.mark.parametrize("tail", [b'{"i": 10, "na', b"\0" * 50, b"\0" * 50 + b"\n", b"[]\n", b"\xff\n", b"7\n"])
def test_a_torn_tail_is_cut_off(path, tail):
    lines = record(path, 8)
    path.write_bytes(b"".join(lines) + tail)
    assert resumed(path, items(12)) == (8, 1, items(12, 8))
    assert path.read_bytes() == b"".join(lines)


def test_any_cut_leaves_a_record_that_can_be_gone_on_with(path):
    whole = b"".join(record(path, 9, done=True))
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        kept, _, todo = resumed(path, items(9))
        assert todo == items(9, kept) and kept in {0, 4, 8, 9}


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("digest", ["digest", "that of other ranks' files, too"])
def test_a_whole_record_leaves_nothing_to_do_but_to_say_so(path, done, digest):
    record(path, 9, done)
    assert resumed(path, items(9)) == (9, 1, [])
    assert is_done(path) == done
    with Journal(path, SETTINGS) as journal:
        assert list(journal.resume(iter(items(9)), 4)) == []
        journal.finish(9, digest)
    assert is_done(path) and [row["i"] for row in merged([path])] == list(range(9))
    lines = path.read_bytes().splitlines()
    assert len(lines) == 11 and json.loads(lines[-1]) == {"done": 9, "files": digest}


@pytest.mark.parametrize("done", [False, True])
def test_files_that_came_or_went_cost_what_follows_them(path, done):
    lines = record(path, 10, done=done)
    changed = items(10)
    changed[5] = changed[5]._replace(name="new.png")
    for found, kept in ((changed, 4), (items(12), 8), (items(7), 4)):
        path.write_bytes(b"".join(lines))
        assert resumed(path, found) == (kept, 1, found[kept:])


def test_other_settings_are_named_and_nothing_is_lost(path):
    before = b"".join(record(path, 4))
    with pytest.raises(ValueError, match="size 32 → 64.*delete it to start anew"):
        Journal(path, {**SETTINGS, "size": 64})
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"precious", b"precious\n", b'{"a": 1}\n', b"[1]\n"])
def test_a_file_that_is_no_record_is_left_alone(path, content):
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not a record"):
        Journal(path, SETTINGS)
    assert path.read_bytes() == content


def test_two_runs_cannot_write_one_record(path):
    with Journal(path, SETTINGS), pytest.raises(ValueError, match="another run is writing it"):
        Journal(path, SETTINGS)
    Journal(path, SETTINGS).__exit__()


def test_ranks_are_merged_in_the_walks_order(tmp_path):
    found = items(7)
    paths = [tmp_path / f"{rank}" for rank in range(3)]
    for rank, path in enumerate(paths):
        assert not is_done(path)
        with Journal(path, {**SETTINGS, "rank": rank}) as journal:
            share = found[rank::3]
            journal.write(share, [{"class": [item.index]} for item in share])
            journal.finish(len(share), "digest")
    assert [(row["i"], row["class"]) for row in merged(paths)] == [(i, [i]) for i in range(7)]
    last = paths[1].read_bytes().splitlines(keepends=True)
    paths[1].write_bytes(b"".join(last[:-1]) + json.dumps({"done": 2, "files": "another"}).encode() + b"\n")
    with pytest.raises(ValueError, match="do not fit together"):
        merged(paths)
