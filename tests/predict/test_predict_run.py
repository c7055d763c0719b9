"""The predict command: answers, every format, damaged files, kills and stops, ranks, refusals."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.nn.functional import cosine_similarity

pytest.importorskip("PIL")
torchvision = pytest.importorskip("torchvision")
np = pytest.importorskip("numpy")

from PIL import Image  # noqa: E402

from resnet_fast import __main__ as cli  # noqa: E402
from resnet_fast import create_model  # noqa: E402
from resnet_fast.predict import output  # noqa: E402
from resnet_fast.predict.progress import Progress  # noqa: E402

TRIAL = (
    "--model",
    "resnet18",
    "--random-weights",
    "--size",
    "32",
    "--device",
    "cpu",
    "--workers",
    "1",
)
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
    inner = root / "b"
    inner.mkdir(parents=True)
    noise = np.random.default_rng(0)
    for i in range(7):
        shape = 40 + 3 * i, 60 - 2 * i, 3
        array = noise.integers(0, 256, shape, dtype=np.uint8)
        folder = inner if i > 3 else root
        Image.fromarray(array).resize((80, 60)).save(folder / f"{i}.png")
    damaged = inner / "4.png"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:2000])
    return root


def predict(*arguments, trial=TRIAL) -> int:
    """Run the command in this process; return its exit code."""
    words = map(str, arguments)
    return cli.main(["predict", *trial, *words])


def expected(root: Path) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    """Return (paths, probabilities, features) by PIL, torchvision's preset and the plain model."""
    torch.manual_seed(0)
    model = create_model("resnet18").eval()
    *layers, _ = model.children()
    features = torch.nn.Sequential(*layers, torch.nn.Flatten())
    preset = torchvision.transforms._presets.ImageClassification(crop_size=32, resize_size=37)
    paths = [*sorted(root.glob("*.png")), *sorted(root.glob("b/*.png"))]
    paths = [path for path in paths if path.name != "4.png"]
    images = [preset(Image.open(path)) for path in paths]
    x = torch.stack(images)
    with torch.no_grad():
        probabilities = model(x).softmax(1)
        return list(map(str, paths)), probabilities, features(x)


class Top(NamedTuple):
    """The columns of a table of top classes, whatever its format."""

    paths: list[str]
    classes: list[list[int]]
    probabilities: torch.Tensor
    labels: list


def read_top(path: Path) -> Top:
    if path.suffix == ".csv":
        return top_from_csv(path)
    rows = read_rows(path)
    if path.suffix != ".parquet":
        rows = [transposed(row) for row in rows]
    return Top(
        [row["path"] for row in rows],
        [row["classes"] for row in rows],
        torch.tensor([row["probabilities"] for row in rows]),
        [row["labels"] for row in rows],
    )


def transposed(row: dict) -> dict:
    """Return a JSON row with lists in place of its list of classes, as Parquet has them."""
    top = row["top"]
    return {
        "path": row["path"],
        "classes": [entry["class"] for entry in top],
        "probabilities": [entry["probability"] for entry in top],
        "labels": [entry["label"] for entry in top],
    }


def top_from_csv(path: Path) -> Top:
    _, *rows = read_csv(path)
    classes = [list(map(int, row[1::3])) for row in rows]
    probabilities = [list(map(float, row[3::3])) for row in rows]
    return Top(
        [row[0] for row in rows],
        classes,
        torch.tensor(probabilities),
        [row[2::3] for row in rows],
    )


def read_csv(path: str | Path) -> list[list[str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def read_rows(path: Path) -> list[dict]:
    """Return the rows of a JSON, JSON Lines or Parquet file."""
    if path.suffix == ".parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        return parquet.read_table(path).to_pylist()
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return json.loads(text)
    return [json.loads(line) for line in text.splitlines()]


def failures(path: str) -> dict[str, str]:
    """Return the errors by file name."""
    _, *rows = read_csv(path)
    return dict(rows)


def skip_without_pyarrow(suffix: str) -> None:
    if suffix == "parquet":
        pytest.importorskip("pyarrow")


# ---------------------------------------------------------------- answers


FORMATS = pytest.mark.parametrize("suffix", ["csv", "json", "jsonl", "parquet"])


@FORMATS
def test_top_classes_in_every_format_equal_the_plain_model(photos, suffix):
    skip_without_pyarrow(suffix)
    out = Path(f"out.{suffix}")
    labels = [f'name, "{i}"' for i in range(1000)]
    Path("labels.txt").write_text("\n".join(labels))

    code = predict(photos, "--out", out, "--top", 3, "--batch", 4, "--labels", "labels.txt")

    assert code == 1
    paths, probabilities, _ = expected(photos)
    best = probabilities.topk(3)
    top = read_top(out)
    assert top.paths == paths
    assert top.classes == best.indices.tolist()
    torch.testing.assert_close(top.probabilities, best.values, rtol=1e-5, atol=0)
    for classes, names in zip(top.classes, top.labels, strict=True):
        assert names == [labels[index] for index in classes]


def test_failures_are_listed_beside_the_table_and_on_the_terminal(photos, capsys):
    assert predict(photos, "--out", "out.csv") == 1

    (damaged,) = failures("out.csv.failed.csv")
    assert damaged == str(photos / "b" / "4.png")
    err = capsys.readouterr().err
    assert "b/4.png': " in err
    assert "1 file failed: out.csv.failed.csv" in err
    assert "7 images in" in err
    files = {path.name for path in Path().iterdir()}
    assert files == {"photos", "out.csv", "out.csv.failed.csv"}


@FORMATS
def test_features_in_every_format_equal_the_plain_model(photos, suffix):
    skip_without_pyarrow(suffix)
    out = Path(f"out.{suffix}")
    assert predict(photos, "--out", out, "--features") == 1

    if suffix == "csv":
        header, *cells = read_csv(out)
        assert header[:2] == ["path", "f0"]
        assert len(header) == 513
        found = {path: list(map(float, values)) for path, *values in cells}
    else:
        found = {row["path"]: row["features"] for row in read_rows(out)}

    paths, _, features = expected(photos)
    assert list(found) == paths
    values = torch.tensor(list(found.values()))
    torch.testing.assert_close(values, features, rtol=1e-4, atol=1e-5)


def test_control_characters_of_a_name_are_escaped_on_the_terminal(photos, capsys):
    odd = photos / "ä\n\x1b[2J.png"
    (photos / "1.png").rename(odd)
    assert predict(odd) == 0
    assert capsys.readouterr().out.startswith(f"{photos}/ä\\n\\x1b[2J.png: class ")


@pytest.fixture
def three_classes() -> tuple[str, ...]:
    """Options for a model of three classes."""
    model = create_model("resnet18", num_classes=3)
    torch.save(model.state_dict(), "three.pt")
    return (
        "--model",
        "resnet18",
        "--weights",
        "three.pt",
        "--size",
        "32",
        "--device",
        "cpu",
        "--workers",
        "1",
    )


def test_default_top_is_limited_by_the_number_of_classes(photos, three_classes, capsys):
    assert predict(photos / "1.png", trial=three_classes) == 0
    assert capsys.readouterr().out.count("class ") == 3


def test_more_top_classes_than_there_are_is_an_error(photos, three_classes, capsys):
    assert predict(photos / "1.png", "--top", 5, trial=three_classes) == 2
    assert "--top: got 5, expected at most 3" in capsys.readouterr().err


def test_top_and_features_exclude_each_other(capsys):
    with pytest.raises(SystemExit):  # argparse ignores an option that is given its default value
        predict("photos", "--top", 5, "--features")
    assert "--features: not allowed with argument --top" in capsys.readouterr().err


def test_without_out_the_answers_go_to_the_terminal(photos, capsys):
    images = [str(photos / "1.png"), str(photos / "b" / "5.png")]
    paths, probabilities, _ = expected(photos)
    lines = []
    for path in images:
        best = probabilities[paths.index(path)].topk(2)
        (p, q), (first, second) = best.values.tolist(), best.indices.tolist()
        lines.append(f"{path}: class {first} {p:.3f}, class {second} {q:.3f}")

    assert predict(*images, "--top", 2) == 0

    assert capsys.readouterr().out.splitlines() == lines


@FORMATS
def test_nothing_but_failures_gives_an_empty_table(suffix, tmp_path):
    skip_without_pyarrow(suffix)
    out = tmp_path / f"out.{suffix}"
    assert predict("nowhere.jpg", "--out", out) == 1
    if suffix == "csv":
        assert out.read_bytes() == b"path\n"
    else:
        assert read_rows(out) == []
    assert "No such file" in (tmp_path / f"{out.name}.failed.csv").read_text()


def test_odd_names_are_valid_text_in_every_table(photos):
    picture = (photos / "1.png").read_bytes()
    folder = Path("odd")
    folder.mkdir()
    for name in (b"caf\xe9.png", 'naïve, "quoted"\n.png'.encode()):
        path = os.path.join(b"odd", name)
        with open(path, "wb") as file:
            file.write(picture)
    for out in (Path("out.csv"), Path("out.jsonl")):
        assert predict(folder, "--out", out) == 0
        assert read_top(out).paths == [r"odd/caf\xe9.png", 'odd/naïve, "quoted"\n.png']


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
    (row,) = read_rows(Path("out.jsonl"))
    found = torch.tensor(row["features"])
    _, _, features = expected(photos)
    assert cosine_similarity(found, features[1], dim=0) > 0.999


@pytest.mark.gpu
def test_a_gpu_answers_as_the_plain_path(photos):
    assert (
        predict(photos, "--out", "out.jsonl", "--features", "--batch", 4, "--device", "cuda") == 1
    )
    rows = read_rows(Path("out.jsonl"))
    paths, _, features = expected(photos)
    assert [row["path"] for row in rows] == paths  # the second batch is filled up
    found = torch.tensor([row["features"] for row in rows])
    similarity = cosine_similarity(found, features)
    assert (similarity > 0.999).all()


# ---------------------------------------------------------------- kills, stops, resuming


@pytest.fixture
def many(tmp_path) -> Path:
    """160 small pictures, every 20th damaged."""
    root = tmp_path / "many"
    root.mkdir()
    noise = np.random.default_rng(1).integers(0, 256, (160, 8, 8, 3), dtype=np.uint8)
    for i, array in enumerate(noise):
        path = root / f"{i:03}.png"
        if i % 20 == 10:
            path.write_bytes(b"damaged")
        else:
            Image.fromarray(array).resize((40, 36)).save(path)
    return root


def environment() -> dict[str, str]:
    """For a process that imports this checkout."""
    return {**os.environ, "PYTHONPATH": str(REPOSITORY)}


def started(out: str, lines: int) -> subprocess.Popen:
    """Start the command over ``many`` in a process; return it when its record has that many lines."""
    command = [
        sys.executable,
        "-m",
        "resnet_fast",
        "predict",
        "many",
        "--out",
        out,
        "--batch",
        "4",
        *TRIAL,
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment())
    record = Path(f"{out}.part")
    deadline = time.monotonic() + 300
    while not record.exists() or record.read_bytes().count(b"\n") < lines:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return process


def children(pid: int) -> list[int]:
    """Return the child processes, from Linux's /proc."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        text = (task / "children").read_text()
        found += map(int, text.split())
    return found


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_killed_run_resumes_gives_the_same_bytes_and_leaves_no_process(many, capsys):
    assert predict("many", "--out", "whole.csv", "--batch", 4) == 1
    process = started("out.csv", 40)
    workers = children(process.pid)
    assert workers
    process.kill()
    process.communicate()
    assert not Path("out.csv").exists()
    with open("out.csv.part", "ab") as record:
        record.write(b'{"i": 77, "name": "many/0')
    capsys.readouterr()

    assert predict("many", "--out", "out.csv", "--batch", 4) == 1

    err = capsys.readouterr().err
    resumed_after = int(err.partition("going on after ")[2].split()[0])
    assert resumed_after >= 36
    assert resumed_after % 4 == 0
    assert f"{160 - resumed_after} images in" in err
    assert Path("out.csv").read_bytes() == Path("whole.csv").read_bytes()
    assert Path("out.csv.failed.csv").read_bytes() == Path("whole.csv.failed.csv").read_bytes()
    assert len(failures("out.csv.failed.csv")) == 8
    wait_until_gone(workers)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_run_finishes_its_batch_and_loses_nothing(many, number, capsys, monkeypatch):
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
    assert len(read_top(Path("out.csv")).paths) == 152


def test_a_second_ctrl_c_does_not_wait(many, monkeypatch, capsys):
    def stop_twice(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Progress, "add", stop_twice)
    before = signal.getsignal(signal.SIGINT)
    assert predict("many", "--out", "out.csv", "--batch", 4) == 130
    assert signal.getsignal(signal.SIGINT) is before
    err = capsys.readouterr().err
    assert "interrupted" in err
    assert "stopped after" not in err
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
    one_rank = read_top(Path("whole.csv"))
    three_ranks = read_top(Path("out.csv"))
    assert one_rank.paths == three_ranks.paths
    assert one_rank.classes == three_ranks.classes
    torch.testing.assert_close(one_rank.probabilities, three_ranks.probabilities)
    assert Path("out.csv.failed.csv").read_text() == Path("whole.csv.failed.csv").read_text()
    assert not list(Path().glob("*.part*"))


def test_torchrun(photos):
    names = [f"photos/{i}.png" for i in range(3)]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
    ]
    command = [*torchrun, "resnet_fast", "predict", *names, "--out", "out.jsonl", *TRIAL]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr
    assert read_top(Path("out.jsonl")).paths == names


def test_ranks_that_saw_different_files_are_not_merged(photos, monkeypatch):
    as_rank(monkeypatch, 1, 2)
    assert predict(photos, "--out", "out.csv") == 0
    (photos / "0.png").unlink()
    (photos / "1.png").unlink()
    as_rank(monkeypatch, 0, 2)
    assert predict(photos, "--out", "out.csv") == 2
    assert not Path("out.csv").exists()


def test_records_of_another_number_of_ranks_are_refused(photos, monkeypatch, capsys):
    as_rank(monkeypatch, 1, 2)
    assert predict(photos, "--out", "out.csv") == 0
    as_rank(monkeypatch, 0, 1)
    assert predict(photos, "--out", "out.csv") == 2
    assert "out.csv.part-1-of-2 was left by another number of ranks" in capsys.readouterr().err


# ---------------------------------------------------------------- refusals


def test_an_existing_table_is_replaced_only_on_demand(photos, capsys):
    Path("out.csv").write_text("precious")
    assert predict(photos / "0.png", "--out", "out.csv") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert Path("out.csv").read_text() == "precious"
    assert predict(photos / "0.png", "--out", "out.csv", "--overwrite") == 0
    assert Path("out.csv").read_text().startswith("path,")


@pytest.mark.parametrize(
    ("arguments", "message"),
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
def test_mistakes_end_with_a_message(photos, capsys, arguments, message):
    Path("empty").mkdir()
    Path("two.txt").write_text("a\nb\n")
    assert predict(*arguments) == 2
    assert message in capsys.readouterr().err


def test_parquet_without_pyarrow_says_what_to_install(photos, capsys, monkeypatch):
    def find_spec(name: str):
        return None if name == "pyarrow" else object()

    monkeypatch.setattr(output.importlib.util, "find_spec", find_spec)
    assert predict(photos, "--out", "out.parquet") == 2
    assert "pip install pyarrow" in capsys.readouterr().err


def test_a_link_out_of_the_folder_and_a_bomb_are_failures(photos, capsys):
    link = photos / "link.png"
    link.symlink_to("/etc/passwd")
    large = photos / "large.png"
    Image.new("L", (100, 100)).save(large)

    assert predict(photos, "--out", "out.csv", "--max-pixels", 9_000) == 1

    errors = failures("out.csv.failed.csv")
    assert errors[str(link)] == "refused: a link out of the folder"
    assert "--max-pixels" in errors[str(large)]
