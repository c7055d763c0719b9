"""The ledger and its reports: written atomically, read strictly, summed up, compared, drawn for light and dark."""

from __future__ import annotations

import argparse
import itertools
import json
import math
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from resnet_fast.bench.ledger import (
    Machine,
    Row,
    Run,
    case_name,
    here,
    measured_by,
    newest,
    parse_case,
    read_run,
    read_runs,
    write_run,
)
from resnet_fast.bench.providers import DTYPES
from resnet_fast.cli.report import add_parser
from resnet_fast.models.problems import conv_layers
from resnet_fast.report import figures, page, plots, tables
from resnet_fast.report.summary import changes, geometric_mean, headlines, regressions, slower

CPU = Machine(
    "Test CPU", "cpu", "2026-01-02T00:00:00+00:00", "abc", {"torch": "2.11.0", "threads": "2"}
)
GPU = Machine(
    "NVIDIA H200", "cuda", "2026-01-02T00:00:00+00:00", "abc", {"torch": "2.11.0", "driver": "1"}
)
SPEED = {
    "eager": 10.0,
    "compile": 12.0,
    "compile-best": 20.0,
    "folded": 16.0,
    "ours": 15.0,
    "ours-plan": 18.0,
}


def case_rows(
    case: str = "infer/resnet50/bf16/256", speed: dict[str, float] = SPEED, **changed
) -> list[Row]:
    """Return the rows of a case in which every provider runs at the given img/s."""
    return [model_row(case, id, speed, **changed) for id in speed]


def model_row(case: str, id: str, speed: dict[str, float], **changed) -> Row:
    _, _, dtype, batch, size = parse_case(case)
    img_s = speed[id]
    seconds = batch / img_s
    return Row(
        level="model",
        case=case,
        provider=id,
        ours=id.startswith("ours"),
        dtype=dtype,
        batch=batch,
        size=size,
        layout="nchw",
        seconds=seconds,
        low=seconds * 0.99,
        high=seconds * 1.02,
        rounds=9,
        img_s=img_s,
        error=2e-3,
        eager_error=1e-3,
        roofline=img_s / 100,
        speed_over={other: img_s / speed[other] for other in speed if other != id},
        **changed,
    )


def op_rows(model: str = "resnet18", batch: int = 2) -> list[Row]:
    """Return rows of every convolution of a network, ours twice as fast as folded + fused."""
    keys = dict.fromkeys(
        layer.problem.key for layer in conv_layers(model, batch, 224, DTYPES["bf16"], "cuda")
    )
    rows = []
    for key in keys:
        rows += [
            op_row(key, batch, "eager", 4e-5),
            op_row(key, batch, "folded", 2e-5),
            op_row(key, batch, "triton.conv", 1e-5),
        ]
    return rows


def op_row(key: str, batch: int, id: str, seconds: float) -> Row:
    return Row(
        level="op",
        case=f"op/{key}",
        provider=id,
        ours=id == "triton.conv",
        dtype="bf16",
        batch=batch,
        size=None,
        layout="nhwc",
        seconds=seconds,
        low=seconds,
        high=seconds,
        rounds=9,
        problem=key,
        tflops=1e-4 / seconds,
        gb_s=1e-3 / seconds,
        error=1e-3,
        eager_error=1e-3,
        speed_over={"folded": 2e-5 / seconds} if id != "folded" else {},
    )


def run_of(rows: list[Row], machine: Machine = CPU, name: str = "run.json") -> Run:
    path = Path(name)
    return Run(machine, tuple(rows), path)


def batch_rows(*batches: int, **changed) -> list[Row]:
    """Return rows of ResNet-50 inference at several batches."""
    rows = []
    for batch in batches:
        rows += case_rows(f"infer/resnet50/bf16/{batch}", **changed)
    return rows


# ---------------------------------------------------------------- ledger


def test_a_run_comes_back_as_it_was_written(tmp_path: Path) -> None:
    rows = case_rows() + op_rows()
    path = write_run(rows, CPU, tmp_path / "deep" / "run.json")
    back = read_run(path)
    assert back.machine == CPU
    assert list(back.rows) == rows
    assert [p.name for p in path.parent.iterdir()] == ["run.json"]


def test_a_run_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = write_run(case_rows(), CPU, tmp_path / "run.json")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        write_run(case_rows(first_s=math.nan), CPU, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_reader_never_sees_half_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_run(case_rows(), CPU, tmp_path / "run.json")
    before = path.read_bytes()

    def full(source: str, target: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space"):
        write_run(case_rows(first_s=1.0), CPU, path)
    assert path.read_bytes() == before
    (run,) = read_runs(tmp_path)
    assert run.rows[0].first_s is None


def test_default_name_has_date_machine_and_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_run(case_rows(), GPU)
    assert path == Path("benchmarks/results/20260102000000-nvidia-h200-abc.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ('{"schema": 99}', "schema 99"),
        ('{"schema": 1, "machine": {}, "rows": [{"colour": 1}]}', "unknown fields colour"),
    ],
)
def test_what_is_not_a_run_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "odd.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"odd.json.*{message}"):
        read_runs(tmp_path)


def test_machine_is_this_one() -> None:
    machine = here("cpu")
    assert machine.device == "cpu"
    assert machine.name == machine.facts["cpu"]
    assert machine.facts["torch"]


def test_commit_is_unknown_where_git_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: "false")
    assert here("cpu").commit == "unknown"


def test_newest_run_of_a_case_counts_unless_it_lacks_ours() -> None:
    old = run_of(case_rows())
    new = run_of(case_rows(), name="new.json")
    peers = run_of(case_rows(speed={"eager": 11.0}), name="peers.json")
    run, _ = newest([old, new, peers])["Test CPU", "infer/resnet50/bf16/256"]
    assert run is new


def test_machines_have_their_own_newest_run() -> None:
    runs = [run_of(case_rows()), run_of(case_rows(), GPU)]
    assert len(newest(runs)) == 2


def test_case_names_round_trip() -> None:
    for case in ("infer/resnet50/bf16/256", "train/wide_resnet50_2/fp32/1@320"):
        parts = parse_case(case)
        assert case_name(*parts) == case
    with pytest.raises(ValueError, match="mode/model/dtype/batch"):
        parse_case("op/conv")


# ---------------------------------------------------------------- summary


def test_headline_takes_ratios_over_the_fastest_of_each_baseline() -> None:
    (found,) = headlines([run_of(case_rows(), GPU)])
    assert found.img_s == 18.0
    assert found.gpu == "NVIDIA H200"
    assert found.vs_eager == pytest.approx(1.8)
    assert found.vs_compile == pytest.approx(0.9)
    assert found.vs_cudnn == pytest.approx(18 / 16)


def test_headline_has_no_ratio_over_a_baseline_that_did_not_run() -> None:
    rows = case_rows(speed={"eager": 10.0, "ours": 15.0})
    (found,) = headlines([run_of(rows)])
    assert found.vs_compile is None
    assert found.vs_cudnn is None


def test_headlines_are_ordered_by_number() -> None:
    ordered = [
        "infer/resnet50/fp32/1",
        "infer/resnet50/fp32/2",
        "infer/resnet50/fp32/16",
        "train/resnet50/fp32/1",
        "train/resnet50/fp32/2",
    ]
    runs = [run_of(case_rows(case)) for case in reversed(ordered)]
    assert [headline.case for headline in headlines(runs)] == ordered


def test_every_regression_is_found_worst_first() -> None:
    slow = case_rows(speed={"eager": 20.0, "ours": 15.0})
    worst, other = regressions([run_of(case_rows()), run_of(slow, GPU)])
    assert (worst.machine, worst.peer) == ("NVIDIA H200", "eager")
    assert (other.machine, other.peer) == ("Test CPU", "compile-best")
    assert other.speed == pytest.approx(0.9)


def test_geometric_mean() -> None:
    assert geometric_mean([2.0, 8.0, None]) == pytest.approx(4.0)
    assert geometric_mean([None]) is None


def test_runs_are_compared_against_their_own_eager() -> None:
    slow_machine = {id: img_s / 3 for id, img_s in SPEED.items()}
    before = run_of(case_rows())
    after = run_of(case_rows(speed={**slow_machine, "ours": 4.5}))

    found = changes(before, after)

    by_provider = {change.provider: change for change in found}
    assert by_provider["ours-plan"].relative
    assert by_provider["ours-plan"].speed == pytest.approx(1.0)
    assert by_provider["ours"].speed == pytest.approx(0.9)
    (lost,) = slower(found, 0.05)
    assert lost.provider == "ours"
    assert slower(found, 0.11) == []


def test_runs_without_a_common_case_are_not_compared() -> None:
    before = run_of(case_rows())
    after = run_of(case_rows("infer/resnet18/fp32/1"))
    with pytest.raises(ValueError, match="in common"):
        changes(before, after)


AVX512 = replace(CPU, facts={"cpu isa": "AVX512", "threads": "2"})


@pytest.mark.parametrize(
    ("before", "after", "difference"),
    [
        (
            AVX512,
            replace(AVX512, facts={"cpu isa": "AVX512", "threads": "1"}),
            "2 threads, not 1 thread",
        ),
        (AVX512, replace(AVX512, facts={"cpu isa": "AVX2", "threads": "2"}), "AVX512, not AVX2"),
        (CPU, GPU, "cpu, not cuda"),
        (GPU, replace(GPU, name="NVIDIA A100"), "NVIDIA H200, not NVIDIA A100"),
    ],
    ids=["threads", "instruction set", "device", "GPU model"],
)
def test_machines_of_different_kinds_are_not_compared(
    before: Machine, after: Machine, difference: str
) -> None:
    with pytest.raises(ValueError, match=f"not compared: run.json was measured on {difference}"):
        changes(run_of(case_rows(), before), run_of(case_rows(), after))


def test_cpus_of_one_kind_are_compared_whatever_their_names() -> None:
    other = replace(AVX512, name="Other CPU")
    assert changes(run_of(case_rows(), AVX512), run_of(case_rows(), other))


def test_gate_judges_ratios_and_never_times() -> None:
    before = run_of(case_rows(speed={"ours": 10.0, "ours-plan": 12.0}))
    after = run_of(case_rows(speed={"ours": 5.0, "ours-plan": 6.0}))

    found = changes(before, after)

    assert [change.relative for change in found] == [False, False]
    assert found[0].speed == pytest.approx(0.5)
    with pytest.raises(ValueError, match="nothing to judge"):
        slower(found, 0.05)


@pytest.mark.parametrize(("machine", "speed"), [(CPU, 0.5), (GPU, 1.0)], ids=["cpu", "gpu"])
def test_comparison_is_over_eager_nchw_on_cpu_and_channels_last_on_gpu(
    machine: Machine, speed: float
) -> None:
    before = case_rows(speed={**SPEED, "eager-nchw": 5.0})
    after = case_rows(speed={**SPEED, "eager-nchw": 10.0})  # all other speeds are equal
    found = changes(run_of(before, machine), run_of(after, machine))
    (ours,) = [change for change in found if change.provider == "ours"]
    assert ours.speed == pytest.approx(speed)


@pytest.mark.parametrize(
    "words",
    [["--save", "/a/b.json"], ["--save=/a/b.json"], ["--save"]],
    ids=["path", "path after =", "no path"],
)
def test_command_of_a_run_does_not_name_the_file_it_wrote(words: list[str]) -> None:
    command = measured_by(["resnet_fast", "bench", *words, "--batch", "1"], "--save")
    assert command == "python -m resnet_fast bench --save --batch 1"


# ---------------------------------------------------------------- tables, page, plots


def test_model_table_shows_every_way_and_marks_the_fastest() -> None:
    rows = batch_rows(1, 8, 64, peak_bytes=2**30)
    (table,) = tables.model_tables([run_of(rows, GPU)])
    assert table.header[1:4] == ("batch 1", "batch 8", "batch 64")
    assert len(table.rows) == len(SPEED)
    text = table.markdown()
    for expected in ("**20.0 (2.00×)**", "| 10.0 (1.00×)", "| 2.00 | 1.00 GiB |", "NVIDIA H200"):
        assert expected in text


def test_columns_of_a_model_table_are_limited() -> None:
    runs = [run_of(batch_rows(1, 2, 4, 8, 16, 32, 64), GPU)]
    (wide,) = tables.model_tables(runs)
    (narrow,) = tables.model_tables(runs, columns=3)
    assert len(wide.header) == 1 + 7 + 1
    assert narrow.header[1:4] == ("batch 1", "batch 8", "batch 64")


def test_on_a_cpu_tables_are_against_eager_nchw_and_leave_out_what_was_not_measured() -> None:
    rows = case_rows(speed={**SPEED, "eager-nchw": 5.0})
    (table,) = tables.model_tables([run_of(rows)])
    assert table.header == ("img/s (× eager, NCHW)", "batch 256", "error ÷ eager's")
    assert [cells[1] for cells in table.rows[:2]] == ["5.00 (1.00×)", "10.0 (2.00×)"]


def test_other_image_sizes_stand_in_a_table_of_their_own() -> None:
    rows = batch_rows("1@96", 1, 8, "1@320")
    main, others = tables.model_tables([run_of(rows)])
    assert main.heading.endswith("224²")
    assert main.header[1:3] == ("batch 1", "batch 8")
    assert others.header[1:3] == ("batch 1, 96²", "batch 1, 320²")


def test_regression_table_counts_all_cases() -> None:
    faster = case_rows("infer/resnet50/bf16/1", {"eager": 1.0, "ours": 2.0})
    table = tables.regression_table([run_of(case_rows() + faster)])
    assert table.heading == "Slower than a peer: 1 of 2 cases"
    assert table.rows == (
        ("infer/resnet50/bf16/256", "Test CPU", "0.900×", "torch.compile, max-autotune"),
    )


def test_op_table_names_problems_for_readers() -> None:
    (table,) = tables.op_tables([run_of(op_rows(), GPU)])
    assert table.rows[0] == (
        "7×7/2 3→64, 224², batch 2, bf16",
        "40.0",
        "20.0",
        "10.0",
        "triton.conv",
        "2.00×",
        "–",
    )
    assert table.rows[2][0] == "3×3 64→64 + residual, 56², batch 2, bf16"
    assert table.notes == (f"Slower than folded + fused: 0 of {len(table.rows)}.",)


def test_markers_are_filled_again_and_again_and_strictly() -> None:
    text = "a\n<!-- report:begin cpu -->\nold\n<!-- report:end cpu -->\nb\n"
    once = page.fill(text, {"cpu": lambda: "new"})
    assert once == text.replace("old", "new") == page.fill(once, {"cpu": lambda: "new"})
    with pytest.raises(ValueError, match="'cpu' is unknown"):
        page.fill(text, {"gpu": lambda: ""})
    with pytest.raises(ValueError, match="do not pair"):
        page.fill(text.replace("end cpu", "end gpu"), {"cpu": lambda: ""})


def test_tables_name_the_command_that_measured_them() -> None:
    machine = replace(CPU, facts={"command": "python -m resnet_fast bench --save"})
    runs = [run_of(case_rows(), machine), run_of(op_rows(), CPU, "ops.json")]
    cpu = page.sections(runs, [], "plots")["cpu"]()
    assert cpu.endswith(
        "\n\nRegenerate: `python -m resnet_fast bench --save && python -m resnet_fast report`."
    )


def test_sections_say_when_there_is_nothing() -> None:
    sections = page.sections([run_of(case_rows())], [], "plots")
    cpu = sections["cpu"]()
    assert "18.0" in cpu
    assert "geometric mean" in cpu
    assert sections["gpu"]() == "No GPU measurement is in the ledger yet."


def test_every_plot_is_drawn_in_light_and_dark(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = batch_rows(1, 8, 64) + op_rows()
    found = figures.plots([run_of(rows, GPU)])
    kinds = {plot.name.split("-")[0] for plot in found}
    assert kinds == {"bars", "curve", "layers", "roofline", "errors"}

    files = plots.save(found, tmp_path)

    names = [
        f"{plot.name}-{theme}.png" for plot, theme in itertools.product(found, ("light", "dark"))
    ]
    assert [file.name for file in files] == names
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


def test_plots_of_one_ledger_have_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot, *_ = figures.plots([run_of(case_rows(), GPU)])
    first, *_ = plots.save([plot], tmp_path / "first")
    again, *_ = plots.save([plot], tmp_path / "again")
    assert first.read_bytes() == again.read_bytes()


def test_labels_move_apart_no_further_than_they_must() -> None:
    assert plots.spread([1.0, 5.0, 5.2], 1.0) == pytest.approx([1.0, 4.6, 5.6])
    assert plots.spread([2.0, 2.0, 2.0], 1.0) == pytest.approx([1.0, 2.0, 3.0])


def test_page_holds_everything_it_shows(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    faster = case_rows("infer/resnet50/bf16/1", {"eager": 1.0, "ours": 2.0})
    runs = [run_of(faster + op_rows(), GPU)]
    pictures = [plot for plot in figures.plots(runs) if plot.name.startswith("bars")]
    plots.save(pictures, tmp_path)

    class Sources(HTMLParser):
        found: list[str] = []

        def handle_starttag(self, tag: str, attrs: list) -> None:
            self.found += [value for key, value in attrs if key in ("src", "srcset", "href")]

    text = page.page(runs, pictures, tmp_path)
    Sources().feed(text)
    assert len(Sources.found) == 2 * len(pictures) + 4
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in Sources.found)
    assert "triton.conv" in text
    assert "0 of 1 case." in text


# ---------------------------------------------------------------- command


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    top = argparse.ArgumentParser()
    add_parser(top.add_subparsers())

    def call(*words: str) -> int:
        args = top.parse_args(["report", *words])
        return args.run(args)

    return call


def test_headline_json_has_the_schema_of_the_design(report, capsys: pytest.CaptureFixture) -> None:
    write_run(case_rows(), GPU, "benchmarks/results/run.json")
    assert report("--headline", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert list(row) == [
        "case",
        "gpu",
        "img_s",
        "vs_eager",
        "vs_compile",
        "vs_cudnn",
        "roofline",
        "error",
        "eager_error",
        "date",
        "commit",
    ]


def test_what_the_newer_run_lacks_is_named(report, capsys: pytest.CaptureFixture) -> None:
    write_run(case_rows(), CPU, "a.json")
    without_plan = [row for row in case_rows() if row.provider != "ours-plan"]
    write_run(without_plan, CPU, "b.json")

    assert report("--compare", "a.json", "b.json", "--fail-if", "slower:5%") == 0

    out = capsys.readouterr().out
    assert "In A only: infer/resnet50/bf16/256 ours-plan." in out
    assert "None of ours is slower by more than 5.0%" in out


def test_gate_fails_only_beyond_its_tolerance(report, capsys: pytest.CaptureFixture) -> None:
    write_run(case_rows(), CPU, "a.json")
    write_run(case_rows(speed={**SPEED, "ours": 13.8}), CPU, "b.json")
    assert report("--compare", "a.json", "b.json") == 0
    assert report("--compare", "a.json", "b.json", "--fail-if", "slower:10%") == 0
    assert report("--compare", "a.json", "b.json", "--fail-if", "slower:5%") == 1
    assert (
        "SLOWER by more than 5.0%: infer/resnet50/bf16/256 ours: -8.0%" in capsys.readouterr().out
    )
    with pytest.raises(SystemExit):
        report("--compare", "a.json", "b.json", "--fail-if", "faster:5%")
    with pytest.raises(ValueError, match="needs --compare"):
        report("--fail-if", "slower:5%")


def test_report_fills_readme_and_page(report, capsys: pytest.CaptureFixture) -> None:
    write_run(case_rows(), CPU, "benchmarks/results/run.json")
    Path("README.md").write_text("<!-- report:begin cpu -->\n<!-- report:end cpu -->\n")
    assert report("--no-plots") == 0
    assert "torch.compile" in Path("README.md").read_text()
    assert "torch.compile" in Path("benchmarks/report/index.html").read_text()
    assert report("--no-plots") == 0
    assert "unchanged" in capsys.readouterr().out
    assert report("--no-plots", "--readme", "absent.md") == 0
    assert "tables: not written, absent.md is not there" in capsys.readouterr().out


def test_no_ledger_says_how_to_get_one(report) -> None:
    with pytest.raises(FileNotFoundError, match="pytest benchmarks/ --ledger"):
        report()
