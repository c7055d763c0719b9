"""The loader: batches in order, bounded look-ahead; a damaged file or a dead worker costs only that file."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("PIL")

from PIL import Image  # noqa: E402

from resnet_fast.data import decode, loader  # noqa: E402
from resnet_fast.data.decode import Preset  # noqa: E402
from resnet_fast.data.files import Item  # noqa: E402
from resnet_fast.data.loader import DEPTH, Batch, Loader  # noqa: E402

PRESET = Preset(resize=16, crop=16)


@pytest.fixture
def shades(tmp_path) -> list[Item]:
    """33 images, the n-th of shade n; every fifth is large, so that it takes longer."""
    items = []
    for i in range(33):
        path = tmp_path / f"{i:02}.png"
        size = (900, 900) if i % 5 == 0 else (16, 16)
        Image.new("RGB", size, (i, i, i)).save(path)
        items.append(Item(i, path.name, str(path)))
    return items


def read(items, batch: int, workers: int) -> list[Batch]:
    """Return all batches, with their own copies of the pixels."""
    found = []
    with Loader(items, PRESET, batch, workers) as batches:
        for batch in batches:
            found.append(batch._replace(pixels=batch.pixels.clone()))
    return found


def all_items(batches: list[Batch]) -> list[Item]:
    return list(itertools.chain.from_iterable(batch.items for batch in batches))


def all_errors(batches: list[Batch]) -> list[str | None]:
    return list(itertools.chain.from_iterable(batch.errors for batch in batches))


def shade(row: torch.Tensor) -> int:
    """Return the one value of an image's pixels."""
    (value,) = row.unique().tolist()
    return value


def misbehaving(tmp_path: Path, body: str) -> str:
    """Write a worker script that runs ``body`` on (path) before each ``load``; return its path."""
    script = tmp_path / "worker.py"
    folder = str(Path(decode.__file__).parent)
    lines = [
        "import os, sys",
        f"sys.path.insert(0, {folder!r})",
        "import decode",
        "original = decode.load",
        "def load(path, preset):",
        *(f"    {line}" for line in body.splitlines()),
        "    return original(path, preset)",
        "decode.load = load",
        "decode.main(*sys.argv[1:])",
    ]
    script.write_text("\n".join(lines) + "\n")
    return str(script)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("batch", [1, 8, 33, 40])
def test_every_row_is_its_file_in_order(shades, batch, workers):
    whole, rest = divmod(33, batch)
    sizes = [batch] * whole
    if rest:
        sizes.append(rest)

    found = read(shades, batch, workers)

    assert [len(batch.items) for batch in found] == sizes
    assert all_items(found) == shades
    pixels = torch.cat([batch.pixels for batch in found])
    assert pixels.shape == (33, 16, 16, 3)
    assert pixels.dtype == torch.uint8
    expected = torch.arange(33, dtype=torch.uint8).view(-1, 1, 1, 1)
    assert torch.equal(pixels, expected.expand_as(pixels))


def test_no_files_give_no_batches():
    assert read([], 4, 2) == []


def test_damaged_files_and_refused_items_keep_their_rows(shades):
    Path(shades[3].path).write_bytes(b"no image")
    expected: list[str | None] = [None] * 33
    expected[3] = "not an image that Pillow can read"
    for i in (5, *range(8, 16)):
        shades[i] = shades[i]._replace(error="refused")
        expected[i] = "refused"

    found = read(shades, 8, 2)

    assert all_errors(found) == expected
    assert shade(found[0].pixels[7]) == 7
    assert shade(found[3].pixels[0]) == 24


def test_look_ahead_is_bounded_by_the_ring(shades):
    taken = []
    endless = (shades[taken.append(i) or i % 33] for i in itertools.count())
    with Loader(endless, PRESET, 4, 2) as batches:
        first_ten = itertools.islice(batches, 10)
        for done, _ in enumerate(first_ten):
            time.sleep(0.02)  # let the workers run as far ahead as they may
            assert len(taken) <= 4 * (done + DEPTH)


def test_close_does_not_wait_for_an_endless_stream(shades):
    endless = itertools.cycle(shades)
    batches = Loader(endless, PRESET, 4, 2)
    next(iter(batches))
    processes = [worker.process for worker in batches._workers]
    groups = {os.getpgid(process.pid) for process in processes}
    assert os.getpgid(0) not in groups  # so that Ctrl-C does not reach them

    batches.close()

    assert all(process.returncode is not None for process in processes)


def test_file_that_kills_its_worker_twice_has_failed(shades, tmp_path, monkeypatch):
    script = misbehaving(tmp_path, "if path.endswith('07.png'): os.kill(os.getpid(), 11)")
    monkeypatch.setattr(loader.decode, "__file__", script)
    expected: list[str | None] = [None] * 33
    expected[7] = "decoding it ended the process (signal SIGSEGV) twice"

    found = read(shades, 8, 2)

    assert all_items(found) == shades
    assert all_errors(found) == expected
    assert [shade(batch.pixels[0]) for batch in found] == [0, 8, 16, 24, 32]


def test_worker_killed_from_outside_costs_nothing(shades, tmp_path, monkeypatch):
    marker = tmp_path / "killed"
    script = misbehaving(
        tmp_path,
        f"if path.endswith('07.png') and not os.path.exists({str(marker)!r}):\n"
        f"    open({str(marker)!r}, 'w').close(); os.kill(os.getpid(), 9)",
    )
    monkeypatch.setattr(loader.decode, "__file__", script)

    found = read(shades, 8, 2)

    assert marker.exists()
    assert all_errors(found) == [None] * 33
    assert shade(found[0].pixels[7]) == 7


def test_workers_that_cannot_start_are_an_error(shades, tmp_path, monkeypatch, capfd):
    script = tmp_path / "worker.py"
    script.write_text("import no_such_module")
    monkeypatch.setattr(loader.decode, "__file__", str(script))
    with pytest.raises(RuntimeError, match="did not start"):
        read(shades, 8, 2)
    assert "no_such_module" in capfd.readouterr().err


def test_error_of_the_stream_is_raised_by_the_loader(shades):
    def broken():
        yield shades[0]
        raise OSError("the walk broke")

    with pytest.raises(OSError, match="the walk broke"):
        read(broken(), 4, 1)


def test_workers_import_no_torch(shades, tmp_path, monkeypatch):
    script = misbehaving(
        tmp_path, "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    monkeypatch.setattr(loader.decode, "__file__", script)

    (batch,) = read(shades[:3], 4, 1)

    assert batch.errors == [None] * 3
