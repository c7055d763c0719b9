"""Decoded batches: in order, whatever ends first; bounded look-ahead; a damaged file or dead worker costs that file."""

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
from resnet_fast.data.loader import DEPTH, Loader  # noqa: E402

PRESET = Preset(resize=16, crop=16)


@pytest.fixture
def shades(tmp_path) -> list[Item]:
    """33 images, the n-th of shade n; every fifth is large, so that it takes longer."""
    for i in range(33):
        Image.new("RGB", (900, 900) if i % 5 == 0 else (16, 16), (i, i, i)).save(tmp_path / f"{i:02}.png")
    return [Item(i, path.name, str(path)) for i, path in enumerate(sorted(tmp_path.iterdir()))]


def read(items, batch: int, workers: int) -> list[tuple[list[Item], list[str | None], torch.Tensor]]:
    with Loader(items, PRESET, batch, workers) as batches:
        return [(b.items, b.errors, b.pixels.clone()) for b in batches]


def misbehaving(tmp_path: Path, body: str) -> str:
    """A worker script whose ``load`` first runs ``body`` on (path)."""
    script = tmp_path / "worker.py"
    script.write_text(
        f"import os, sys\nsys.path.insert(0, {str(Path(decode.__file__).parent)!r})\nimport decode\n"
        "original = decode.load\ndef load(path, preset):\n"
        + "".join(f"    {line}\n" for line in body.splitlines())
        + "    return original(path, preset)\ndecode.load = load\ndecode.main(*sys.argv[1:])\n"
    )
    return str(script)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("batch", [1, 8, 33, 40])
def test_every_row_is_its_file_in_order(shades, batch, workers):
    found = read(shades, batch, workers)
    assert [len(items) for items, _, _ in found] == [batch] * (33 // batch) + [33 % batch] * (33 % batch > 0)
    assert [item for items, _, _ in found for item in items] == shades
    pixels = torch.cat([pixels for _, _, pixels in found])
    assert pixels.shape == (33, 16, 16, 3) and pixels.dtype == torch.uint8
    assert torch.equal(pixels, torch.arange(33, dtype=torch.uint8).view(-1, 1, 1, 1).expand_as(pixels))


def test_nothing_to_do():
    assert read([], 4, 2) == []


def test_damaged_files_and_refused_items_keep_their_rows(shades):
    Path(shades[3].path).write_bytes(b"no image")
    shades[5] = shades[5]._replace(error="refused")
    shades[8:16] = [item._replace(error="refused") for item in shades[8:16]]
    found = read(shades, 8, 2)
    errors = [error for _, errors, _ in found for error in errors]
    assert errors == [
        "not an image that Pillow can read" if i == 3 else "refused" if i == 5 or 8 <= i < 16 else None
        for i in range(33)
    ]
    assert found[0][2][7].unique().tolist() == [7] and found[3][2][0].unique().tolist() == [24]


def test_look_ahead_is_bounded_by_the_ring(shades):
    taken = []
    endless = (shades[taken.append(i) or i % 33] for i in itertools.count())
    with Loader(endless, PRESET, 4, 2) as batches:
        for done, _ in enumerate(itertools.islice(batches, 10)):
            time.sleep(0.02)  # let the workers run as far ahead as they may
            assert len(taken) <= 4 * (done + DEPTH)


def test_close_does_not_wait_for_an_endless_stream(shades):
    batches = Loader(itertools.cycle(shades), PRESET, 4, 2)
    next(iter(batches))
    groups = {os.getpgid(worker.process.pid) for worker in batches._workers}
    assert os.getpgid(0) not in groups  # so that Ctrl-C does not reach them
    batches.close()
    assert all(worker.process.returncode is not None for worker in batches._workers)


def test_a_file_that_kills_its_worker_twice_has_failed(shades, tmp_path, monkeypatch):
    script = misbehaving(tmp_path, "if path.endswith('07.png'): os.kill(os.getpid(), 11)")
    monkeypatch.setattr(loader.decode, "__file__", script)
    found = read(shades, 8, 2)
    rows = [row for items, errors, _ in found for row in zip(items, errors, strict=True)]
    failed = {item.name: error for item, error in rows if error}
    assert failed == {"07.png": "decoding it ended the process (signal SIGSEGV) twice"}
    assert [pixels[0, 0, 0, 0].item() for _, _, pixels in found] == [0, 8, 16, 24, 32]


def test_a_worker_killed_from_outside_costs_nothing(shades, tmp_path, monkeypatch):
    marker = tmp_path / "killed"
    script = misbehaving(
        tmp_path,
        f"if path.endswith('07.png') and not os.path.exists({str(marker)!r}):\n"
        f"    open({str(marker)!r}, 'w').close(); os.kill(os.getpid(), 9)",
    )
    monkeypatch.setattr(loader.decode, "__file__", script)
    found = read(shades, 8, 2)
    assert marker.exists()
    assert all(error is None for _, errors, _ in found for error in errors)
    assert found[0][2][7].unique().tolist() == [7]


def test_workers_that_cannot_start_are_an_error(shades, tmp_path, monkeypatch, capfd):
    (tmp_path / "worker.py").write_text("import no_such_module")
    monkeypatch.setattr(loader.decode, "__file__", str(tmp_path / "worker.py"))
    with pytest.raises(RuntimeError, match="did not start"):
        read(shades, 8, 2)
    assert "no_such_module" in capfd.readouterr().err


def test_what_the_stream_raises_arrives(shades):
    def broken():
        yield shades[0]
        raise OSError("the walk broke")

    with pytest.raises(OSError, match="the walk broke"):
        read(broken(), 4, 1)


def test_workers_import_no_torch(shades, tmp_path, monkeypatch):
    script = misbehaving(tmp_path, "assert 'torch' not in sys.modules and 'numpy' not in sys.modules")
    monkeypatch.setattr(loader.decode, "__file__", script)
    assert read(shades[:3], 4, 1)[0][1] == [None] * 3
