"""The command from files to tables: golden answers, every format, damaged files, kills and stops, ranks, weights."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("PIL")
torchvision = pytest.importorskip("torchvision")
np = pytest.importorskip("numpy")

from PIL import Image  # noqa: E402

from resnet_fast import __main__ as cli  # noqa: E402
from resnet_fast import create_model  # noqa: E402
from resnet_fast.predict import output  # noqa: E402
from resnet_fast.predict.progress import Progress  # noqa: E402

TRIAL = ("--model", "resnet18", "--random-weights", "--size", "32", "--device", "cpu", "--workers", "1")
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def quiet_environment(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def photos(tmp_path) -> Path:
    """Seven pictures in two folders; "b/4.png" is damaged."""
    root = tmp_path / "photos"
    (root / "b").mkdir(parents=True)
    noise = np.random.default_rng(0)
    for i in range(7):
        array = noise.integers(0, 256, (40 + 3 * i, 60 - 2 * i, 3), dtype=np.uint8)
        Image.fromarray(array).resize((80, 60)).save(root / ("b" if i > 3 else "") / f"{i}.png")
    damaged = root / "b" / "4.png"
    damaged.write_bytes(damaged.read_bytes()[:2000])
    return root


def predict(*arguments, trial=TRIAL) -> int:
    return cli.main(["predict", *trial, *map(str, arguments)])


def expected(root: Path) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """(paths, probabilities, features) by the plain path: PIL, torchvision's preset, one image at a time."""
    torch.manual_seed(0)
    model = create_model("resnet18").eval()
    features = torch.nn.Sequential(*list(model.children())[:-1], torch.nn.Flatten())
    preset = torchvision.transforms._presets.ImageClassification(crop_size=32, resize_size=37)
    paths = [path for path in sorted(root.glob("*.png")) + sorted(root.glob("b/*.png")) if path.name != "4.png"]
    x = torch.stack([preset(Image.open(path)) for path in paths])
    with torch.no_grad():
        return list(map(str, paths)), model(x).softmax(1), features(x)


def read_top(path: Path) -> tuple[list[str], list[list[int]], torch.Tensor, list]:
    """(paths, classes, probabilities, labels) from any format."""
    if path.suffix == ".csv":
        rows = list(csv.reader(path.open(newline="", encoding="utf-8")))[1:]
        return (
            [r[0] for r in rows],
            [[int(c) for c in r[1::3]] for r in rows],
            torch.tensor([[float(p) for p in r[3::3]] for r in rows]),
            [r[2::3] for r in rows],
        )
    if path.suffix == ".parquet":
        rows = pytest.importorskip("pyarrow.parquet").read_table(path).to_pylist()
        return (
            [r["path"] for r in rows],
            [r["classes"] for r in rows],
            torch.tensor([r["probabilities"] for r in rows]),
            [r["labels"] for r in rows],
        )
    rows = json.loads(path.read_text()) if path.suffix == ".json" else [json.loads(line) for line in path.open()]
    return (
        [r["path"] for r in rows],
        [[t["class"] for t in r["top"]] for r in rows],
        torch.tensor([[t["probability"] for t in r["top"]] for r in rows]),
        [[t["label"] for t in r["top"]] for r in rows],
    )


def skip_without_pyarrow(suffix: str) -> None:
    if suffix == "parquet":
        pytest.importorskip("pyarrow")


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl", "parquet"])
def test_top_classes_in_every_format_are_those_of_the_plain_path(photos, suffix, capsys):
    skip_without_pyarrow(suffix)
    out = Path(f"out.{suffix}")
    Path("labels.txt").write_text("\n".join(f'name, "{i}"' for i in range(1000)))
    assert predict(photos, "--out", out, "--top", 3, "--batch", 4, "--labels", "labels.txt") == 1
    paths, probabilities, _ = expected(photos)
    got = read_top(out)
    assert got[0] == paths
    best = probabilities.topk(3)
    assert got[1] == best.indices.tolist()
    torch.testing.assert_close(got[2], best.values, rtol=1e-5, atol=0)
    assert got[3] == [[f'name, "{c}"' for c in row] for row in got[1]]
    assert list(csv.reader(open("out." + suffix + ".failed.csv")))[1][0] == str(photos / "b" / "4.png")
    err = capsys.readouterr().err
    assert "b/4.png': " in err and f"1 file failed: out.{suffix}.failed.csv" in err and "7 images in" in err
    assert {path.name for path in Path().iterdir()} == {"photos", "labels.txt", out.name, f"{out.name}.failed.csv"}


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl", "parquet"])
def test_features_in_every_format_are_those_of_the_plain_path(photos, suffix):
    skip_without_pyarrow(suffix)
    out = Path(f"out.{suffix}")
    assert predict(photos, "--out", out, "--features") == 1
    if suffix == "csv":
        rows = list(csv.reader(out.open()))
        assert rows[0][:2] == ["path", "f0"] and len(rows[0]) == 513
        rows = [{"path": r[0], "features": [float(v) for v in r[1:]]} for r in rows[1:]]
    elif suffix == "parquet":
        rows = pytest.importorskip("pyarrow.parquet").read_table(out).to_pylist()
    else:
        rows = json.loads(out.read_text()) if suffix == "json" else [json.loads(line) for line in out.open()]
    paths, _, features = expected(photos)
    assert [row["path"] for row in rows] == paths
    torch.testing.assert_close(torch.tensor([row["features"] for row in rows]), features, rtol=1e-4, atol=1e-5)


def test_a_name_is_one_line_on_the_terminal_and_no_command_to_it(photos, capsys):
    (photos / "1.png").rename(photos / "ä\n\x1b[2J.png")
    assert predict(photos / "ä\n\x1b[2J.png") == 0
    assert capsys.readouterr().out.startswith(f"{photos}/ä\\n\\x1b[2J.png: class ")


def test_of_few_classes_all_are_told_unless_more_are_asked_for(photos, capsys):
    torch.save(create_model("resnet18", num_classes=3).state_dict(), "three.pt")
    few = ("--model", "resnet18", "--weights", "three.pt", "--size", "32", "--device", "cpu", "--workers", "1")
    assert predict(photos / "1.png", trial=few) == 0
    assert capsys.readouterr().out.count("class ") == 3
    assert predict(photos / "1.png", "--top", 5, trial=few) == 2
    assert "--top: got 5, expected at most 3" in capsys.readouterr().err


def test_five_classes_and_features_contradict_each_other(capsys):
    with pytest.raises(SystemExit):  # argparse sees no contradiction in what is the default
        predict("photos", "--top", 5, "--features")
    assert "--features: not allowed with argument --top" in capsys.readouterr().err


def test_without_out_the_answers_go_to_the_terminal(photos, capsys):
    assert predict(photos / "1.png", photos / "b" / "5.png", "--top", 2) == 0
    paths, probabilities, _ = expected(photos)
    wanted = []
    for path in (str(photos / "1.png"), str(photos / "b" / "5.png")):
        (p, q), (c, d) = (values.tolist() for values in probabilities[paths.index(path)].topk(2))
        wanted.append(f"{path}: class {c} {p:.3f}, class {d} {q:.3f}")
    assert capsys.readouterr().out.splitlines() == wanted


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl", "parquet"])
def test_nothing_but_failures_gives_an_empty_table(suffix, tmp_path):
    skip_without_pyarrow(suffix)
    out = tmp_path / f"out.{suffix}"
    assert predict("nowhere.jpg", "--out", out) == 1
    if suffix == "csv":
        assert out.read_bytes() == b"path\n"
    elif suffix == "jsonl":
        assert out.read_bytes() == b""
    elif suffix == "json":
        assert json.loads(out.read_text()) == []
    else:
        assert pytest.importorskip("pyarrow.parquet").read_table(out).num_rows == 0
    assert "No such file" in (tmp_path / f"{out.name}.failed.csv").read_text()


def test_odd_names_are_valid_text_in_every_table(photos):
    picture = (photos / "1.png").read_bytes()
    folder = Path("odd")
    folder.mkdir()
    for name in (b"caf\xe9.png", 'naïve, "quoted"\n.png'.encode()):
        with open(os.path.join(b"odd", name), "wb") as file:
            file.write(picture)
    assert predict(folder, "--out", "out.csv") == 0
    assert predict(folder, "--out", "out.jsonl") == 0
    names = read_top(Path("out.csv"))[0]
    assert names == read_top(Path("out.jsonl"))[0] == [r"odd/caf\xe9.png", 'odd/naïve, "quoted"\n.png']


def test_answers_that_are_not_finite_are_failures(photos, monkeypatch):
    from resnet_fast.predict import job, weights

    original = weights.load

    def broken(*arguments):
        found = original(*arguments)
        found.model.fc.bias.data[3] = float("nan")
        return found

    monkeypatch.setattr(job.weights, "load", broken)
    assert predict(photos / "1.png", "--out", "out.csv") == 1
    assert "not finite" in Path("out.csv.failed.csv").read_text()


def test_bfloat16_answers_are_near(photos):
    assert predict(photos / "1.png", "--out", "out.jsonl", "--dtype", "bfloat16", "--features") == 0
    features = json.loads(Path("out.jsonl").read_text())["features"]
    assert torch.nn.functional.cosine_similarity(torch.tensor(features), expected(photos)[2][1], dim=0) > 0.999


@pytest.mark.gpu
def test_a_gpu_answers_as_the_plain_path(photos):
    assert predict(photos, "--out", "out.jsonl", "--features", "--batch", 4, "--device", "cuda") == 1
    rows = [json.loads(line) for line in open("out.jsonl")]
    paths, _, features = expected(photos)
    assert [row["path"] for row in rows] == paths  # the second batch is filled up
    got = torch.tensor([row["features"] for row in rows])
    assert (torch.nn.functional.cosine_similarity(got, features) > 0.999).all()


# ---------------------------------------------------------------- kills, stops, going on


@pytest.fixture
def many(tmp_path) -> Path:
    """160 small pictures, every 20th damaged."""
    root = tmp_path / "many"
    root.mkdir()
    noise = np.random.default_rng(1).integers(0, 256, (160, 8, 8, 3), dtype=np.uint8)
    for i in range(160):
        Image.fromarray(noise[i]).resize((40, 36)).save(root / f"{i:03}.png")
        if i % 20 == 10:
            (root / f"{i:03}.png").write_bytes(b"damaged")
    return root


def environment() -> dict[str, str]:
    """For a process that imports this checkout."""
    return {**os.environ, "PYTHONPATH": str(REPOSITORY)}


def started(out: str, lines: int) -> subprocess.Popen:
    """The command over ``many`` as a process of its own, when its record has that many lines."""
    command = [sys.executable, "-m", "resnet_fast", "predict", "many", "--out", out, "--batch", "4", *TRIAL]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment())
    record = Path(f"{out}.part")
    deadline = time.monotonic() + 300
    while not record.exists() or record.read_bytes().count(b"\n") < lines:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)
    return process


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_killed_it_goes_on_and_gives_the_same_bytes_and_leaves_no_process(many, capsys):
    assert predict("many", "--out", "whole.csv", "--batch", 4) == 1
    process = started("out.csv", 40)
    workers = children(process.pid)
    process.kill()
    process.communicate()
    with open("out.csv.part", "ab") as record:
        record.write(b'{"i": 77, "name": "many/0')
    assert workers and not Path("out.csv").exists()
    capsys.readouterr()
    assert predict("many", "--out", "out.csv", "--batch", 4) == 1
    err = capsys.readouterr().err
    kept = int(err.partition("going on after ")[2].split()[0])
    assert kept >= 36 and kept % 4 == 0 and f"{160 - kept} images in" in err
    assert Path("out.csv").read_bytes() == Path("whole.csv").read_bytes()
    assert Path("out.csv.failed.csv").read_bytes() == Path("whole.csv.failed.csv").read_bytes()
    assert len(list(csv.reader(open("out.csv.failed.csv")))) == 9
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_it_finishes_its_batch_and_loses_nothing(many, number, capsys, monkeypatch):
    original = Progress.add

    def stop_after_the_third_batch(progress, *arguments):
        original(progress, *arguments)
        if progress.done == 12:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Progress, "add", stop_after_the_third_batch)
    assert predict("many", "--out", "out.csv", "--batch", 4) == 130
    assert "stopped after 12 files; the same command goes on" in capsys.readouterr().err
    assert Path("out.csv.part").read_bytes().count(b"\n") == 13
    assert predict("many", "--out", "out.csv", "--batch", 4) == 1
    assert "going on after 12 files" in capsys.readouterr().err
    assert len(read_top(Path("out.csv"))[0]) == 152


def test_a_second_ctrl_c_does_not_wait(many, monkeypatch, capsys):
    monkeypatch.setattr(Progress, "add", lambda *arguments: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    before = signal.getsignal(signal.SIGINT)
    assert predict("many", "--out", "out.csv", "--batch", 4) == 130
    assert signal.getsignal(signal.SIGINT) is before
    err = capsys.readouterr().err
    assert "interrupted" in err and "stopped after" not in err
    assert Path("out.csv.part").read_bytes().count(b"\n") == 5


# ---------------------------------------------------------------- ranks


def as_rank(monkeypatch, rank: int, world: int) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world))


def test_ranks_one_after_another_give_one_table_in_order(photos, monkeypatch, capsys):
    assert predict(photos, "--out", "whole.csv") == 1
    for rank in (2, 1):
        as_rank(monkeypatch, rank, 3)
        assert predict(photos, "--out", "out.csv") == 0
        assert not Path("out.csv").exists()
    as_rank(monkeypatch, 0, 3)
    assert predict(photos, "--out", "out.csv") == 1
    one, three = read_top(Path("whole.csv")), read_top(Path("out.csv"))
    assert one[:2] == three[:2]
    torch.testing.assert_close(one[2], three[2])
    assert Path("out.csv.failed.csv").read_text() == Path("whole.csv.failed.csv").read_text()
    assert not list(Path().glob("*.part*"))


def test_torchrun(photos):
    names = [f"photos/{i}.png" for i in range(3)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command = [*torchrun, "resnet_fast", "predict", *names, "--out", "out.jsonl", *TRIAL]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr
    assert read_top(Path("out.jsonl"))[0] == names


def test_ranks_that_saw_different_files_are_not_merged(photos, monkeypatch):
    as_rank(monkeypatch, 1, 2)
    assert predict(photos, "--out", "out.csv") == 0
    (photos / "0.png").unlink()
    (photos / "1.png").unlink()
    as_rank(monkeypatch, 0, 2)
    assert predict(photos, "--out", "out.csv") == 2
    assert not Path("out.csv").exists()


def test_records_of_another_number_of_ranks_are_not_passed_over(photos, monkeypatch, capsys):
    as_rank(monkeypatch, 1, 2)
    assert predict(photos, "--out", "out.csv") == 0
    as_rank(monkeypatch, 0, 1)
    assert predict(photos, "--out", "out.csv") == 2
    assert "out.csv.part-1-of-2 was left by another number of ranks" in capsys.readouterr().err


# ---------------------------------------------------------------- what is refused, and how


def test_an_existing_table_is_replaced_only_on_demand(photos, capsys):
    Path("out.csv").write_text("precious")
    assert predict(photos / "0.png", "--out", "out.csv") == 2
    assert "--overwrite" in capsys.readouterr().err and Path("out.csv").read_text() == "precious"
    assert predict(photos / "0.png", "--out", "out.csv", "--overwrite") == 0
    assert Path("out.csv").read_text().startswith("path,")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("photos", "--features"), "--features needs --out"),
        (("photos", "--out", "out.xls"), "expected one of .csv, .json, .jsonl, .parquet"),
        (("empty",), "no images in empty"),
        (("photos", "--labels", "two.txt"), "got 2 names, expected 1000"),
        (("photos", "--labels", "absent.txt"), "--labels absent.txt: there is no such file"),
        (("photos", "--out", "nowhere/out.csv"), "nowhere"),
        (("photos", "--top", "1001"), "--top: got 1001, expected at most 1000"),
    ],
)
def test_mistakes_end_in_a_sentence(photos, capsys, arguments, sentence):
    Path("empty").mkdir()
    Path("two.txt").write_text("a\nb\n")
    assert predict(*arguments) == 2
    assert sentence in capsys.readouterr().err


def test_parquet_without_pyarrow_says_what_to_install(photos, capsys, monkeypatch):
    monkeypatch.setattr(output.importlib.util, "find_spec", lambda name: None if name == "pyarrow" else object())
    assert predict(photos, "--out", "out.parquet") == 2
    assert "pip install pyarrow" in capsys.readouterr().err


def test_a_link_out_of_the_folder_and_a_bomb_are_failures(photos, capsys):
    (photos / "link.png").symlink_to("/etc/passwd")
    Image.new("L", (100, 100)).save(photos / "large.png")
    assert predict(photos, "--out", "out.csv", "--max-pixels", 9_000) == 1
    failed = dict(list(csv.reader(open("out.csv.failed.csv")))[1:])
    assert failed["photos/link.png".replace("photos", str(photos))] == "refused: a link out of the folder"
    assert "--max-pixels" in failed[str(photos / "large.png")]
