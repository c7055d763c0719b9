"""The tables of measured choices: atomic writes, several processes, and unusable files, which are ignored."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
from gpu_tables import GPU, table

from resnet_fast.dispatch import tables


def _write_entries(folder: str, mine: str) -> None:
    for i in range(20):
        tables.update(
            GPU, lambda s, i=i: s["measured"].__setitem__(f"{mine} {i}", {}), Path(folder)
        )


def test_two_processes_lose_none_of_each_others_entries(tmp_path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [
        context.Process(target=_write_entries, args=(str(tmp_path), name)) for name in ("a", "b")
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert len(table(tmp_path)["measured"]) == 40


def test_a_failed_write_leaves_the_old_table(tmp_path) -> None:
    tables.update(GPU, lambda s: s["entries"].update(a={"kernel": "x"}), tmp_path)
    with pytest.raises(ValueError, match="Out of range"):
        tables.update(GPU, lambda s: s["entries"].update(b=float("nan")), tmp_path)
    assert list(table(tmp_path)["entries"]) == ["a"]


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"gpu": "Another GPU", "entries": {}}', '{"gpu": "Pretended GPU", "entries": 3}'],
)
def test_a_table_that_cannot_be_used_is_ignored_and_says_so(tmp_path, text) -> None:
    (tmp_path / "pretended-gpu.json").write_text(text)
    with pytest.warns(UserWarning, match="pretended-gpu.json is ignored"):
        assert tables.read(tmp_path / "pretended-gpu.json", GPU) == dict.fromkeys(
            tables.SECTIONS, {}
        )


def test_prose_does_not_void_a_measurement(tmp_path) -> None:
    source = tmp_path / "kernel.py"
    hashes = []
    for text in (
        "def f(x):\n    return x + 1\n",
        '"""A kernel."""\n\n\ndef f(x):\n    "Adds."  # one\n    return x + 1\n',
        "def f(x):\n    return x + 2\n",
    ):
        source.write_text(text)
        tables.source_hash.cache_clear()
        hashes.append(tables.source_hash((str(source),)))
    assert hashes[0] == hashes[1] != hashes[2]
