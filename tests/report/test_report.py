"""The ledger and what is made of it: written whole, read strictly, summed up honestly, drawn twice."""

from __future__ import annotations

import argparse
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
from resnet_fast.models.problems import layers
from resnet_fast.report import figures, page, plots, tables
from resnet_fast.report.summary import changes, geometric_mean, headlines, regressions, slower

CPU = Machine("Test CPU", "cpu", "2026-01-02T00:00:00+00:00", "abc", {"torch": "2.11.0", "threads": "2"})
GPU = Machine("NVIDIA H200", "cuda", "2026-01-02T00:00:00+00:00", "abc", {"torch": "2.11.0", "driver": "1"})
SPEED = {"eager": 10.0, "compile": 12.0, "compile-best": 20.0, "folded": 16.0, "ours": 15.0, "ours-plan": 18.0}


def case_rows(case: str = "infer/resnet50/bf16/256", speed: dict[str, float] = SPEED, **changed) -> list[Row]:
    """A case in which every provider runs at the given img/s."""
    _, _, dtype, batch, size = parse_case(case)
    return [
        Row(
            "model",
            case,
            id,
            id.startswith("ours"),
            dtype,
            batch,
            size,
            "nchw",
            batch / s,
            batch / s * 0.99,
            batch / s * 1.02,
            9,
            img_s=s,
            error=2e-3,
            eager_error=1e-3,
            roofline=s / 100,
            speed_over={other: s / t for other, t in speed.items() if other != id},
            **changed,
        )
        for id, s in speed.items()
    ]


def op_rows(model: str = "resnet18", batch: int = 2) -> list[Row]:
    """Every convolution of a network, ours twice as fast as the bar."""
    found = {}
    for layer in layers(model, batch, 224, DTYPES["bf16"], "cuda"):
        key = layer.problem.key
        found[key] = [
            Row(
                "op",
                f"op/{key}",
                id,
                id == "triton.conv",
                "bf16",
                batch,
                None,
                "nhwc",
                s,
                s,
                s,
                9,
                problem=key,
                tflops=1e-4 / s,
                gb_s=1e-3 / s,
                error=1e-3,
                eager_error=1e-3,
                speed_over={"folded": 2e-5 / s} if id != "folded" else {},
            )
            for id, s in (("eager", 4e-5), ("folded", 2e-5), ("triton.conv", 1e-5))
        ]
    return [row for rows in found.values() for row in rows]


def run_of(rows: list[Row], machine: Machine = CPU, name: str = "run.json") -> Run:
    return Run(machine, tuple(rows), Path(name))


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
    assert path.read_bytes() == before and read_runs(tmp_path)[0].rows[0].first_s is None


def test_default_name_tells_date_and_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert write_run(case_rows(), GPU) == Path("benchmarks/results/20260102000000-nvidia-h200-abc.json")


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
    assert machine.device == "cpu" and machine.facts["torch"] and machine.name == machine.facts["cpu"]


def test_commit_is_unknown_where_git_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: "false")
    assert here("cpu").commit == "unknown"


def test_newest_run_of_a_case_counts_unless_it_lacks_ours() -> None:
    old, new = run_of(case_rows()), run_of(case_rows(speed={**SPEED, "ours-plan": 30.0}), name="new.json")
    peers = run_of(case_rows(speed={"eager": 11.0}), name="peers.json")
    assert newest([old, new, peers])["Test CPU", "infer/resnet50/bf16/256"][0] is new
    assert len(newest([old, run_of(case_rows(), GPU)])) == 2


def test_case_names_round_trip() -> None:
    for case in ("infer/resnet50/bf16/256", "train/wide_resnet50_2/fp32/1@320"):
        assert case_name(*parse_case(case)) == case
    with pytest.raises(ValueError, match="mode/model/dtype/batch"):
        parse_case("op/conv")


# ---------------------------------------------------------------- summary


def test_headline_takes_ratios_over_the_fastest_of_each_baseline() -> None:
    (found,) = headlines([run_of(case_rows(), GPU)])
    assert found.img_s == 18.0 and found.gpu == "NVIDIA H200"
    assert found.vs_eager == pytest.approx(1.8)
    assert found.vs_compile == pytest.approx(0.9)
    assert found.vs_cudnn == pytest.approx(18 / 16)
    (alone,) = headlines([run_of(case_rows(speed={"eager": 10.0, "ours": 15.0}))])
    assert alone.vs_compile is None and alone.vs_cudnn is None


def test_headlines_are_ordered_by_number() -> None:
    runs = [run_of(case_rows(f"{mode}/resnet50/fp32/{batch}")) for batch in (16, 2, 1) for mode in ("train", "infer")]
    wanted = [f"{mode}/resnet50/fp32/{batch}" for mode in ("infer", "train") for batch in (1, 2, 16)]
    assert [h.case for h in headlines(runs)] == wanted


def test_every_regression_is_found_worst_first() -> None:
    found = regressions([run_of(case_rows()), run_of(case_rows(speed={"eager": 20.0, "ours": 15.0}), GPU)])
    assert [(r.machine, r.peer) for r in found] == [("NVIDIA H200", "eager"), ("Test CPU", "compile-best")]
    assert found[1].speed == pytest.approx(0.9)


def test_geometric_mean() -> None:
    assert geometric_mean([2.0, 8.0, None]) == pytest.approx(4.0)
    assert geometric_mean([None]) is None


def test_runs_are_compared_against_their_own_eager() -> None:
    slow_machine = {id: s / 3 for id, s in SPEED.items()}
    a, b = run_of(case_rows()), run_of(case_rows(speed={**slow_machine, "ours": 4.5}))
    found = {c.provider: c for c in changes(a, b)}
    assert found["ours-plan"].speed == pytest.approx(1.0) and found["ours-plan"].relative
    assert found["ours"].speed == pytest.approx(0.9)
    assert [c.provider for c in slower(found.values(), 0.05)] == ["ours"]
    assert slower(found.values(), 0.11) == []
    with pytest.raises(ValueError, match="in common"):
        changes(a, run_of(case_rows("infer/resnet18/fp32/1")))


@pytest.mark.parametrize(
    ("facts", "words"), [({"threads": "1"}, "2 threads, not 1 thread"), ({"cpu isa": "AVX2"}, "AVX512, not AVX2")]
)
def test_machines_of_different_kinds_are_not_compared(facts: dict[str, str], words: str) -> None:
    here = replace(CPU, facts={"cpu isa": "AVX512", "threads": "2"})
    there = replace(here, facts={**here.facts, **facts})
    with pytest.raises(ValueError, match=f"not compared: run.json was measured on {words}"):
        changes(run_of(case_rows(), here), run_of(case_rows(), there))
    assert changes(run_of(case_rows(), here), run_of(case_rows(), replace(here, name="Other CPU")))
    with pytest.raises(ValueError, match="cpu, not cuda"):
        changes(run_of(case_rows()), run_of(case_rows(), GPU))
    with pytest.raises(ValueError, match="NVIDIA H200, not NVIDIA A100"):
        changes(run_of(case_rows(), GPU), run_of(case_rows(), replace(GPU, name="NVIDIA A100")))


def test_gate_judges_ratios_and_never_times() -> None:
    alone = {"ours": 10.0, "ours-plan": 12.0}
    found = changes(run_of(case_rows(speed=alone)), run_of(case_rows(speed={"ours": 5.0, "ours-plan": 6.0})))
    assert [c.relative for c in found] == [False, False] and found[0].speed == pytest.approx(0.5)
    with pytest.raises(ValueError, match="nothing to judge"):
        slower(found, 0.05)


def test_comparison_prefers_what_people_run_on_that_device() -> None:
    before, after = ({**SPEED, "eager-nchw": nchw} for nchw in (5.0, 10.0))  # eager NCHW doubled, all else as it was
    (on_cpu,) = {
        c.speed
        for c in changes(run_of(case_rows(speed=before)), run_of(case_rows(speed=after)))
        if c.provider == "ours"
    }
    (on_gpu,) = {
        c.speed
        for c in changes(run_of(case_rows(speed=before), GPU), run_of(case_rows(speed=after), GPU))
        if c.provider == "ours"
    }
    assert on_cpu == pytest.approx(0.5) and on_gpu == pytest.approx(1.0)


def test_a_run_names_its_command_without_the_file_it_wrote() -> None:
    for words in (
        ["bench", "--save", "/a/b.json", "--batch", "1"],
        ["bench", "--save=/a/b.json", "--batch", "1"],
        ["bench", "--save", "--batch", "1"],
    ):
        assert measured_by(["resnet_fast", *words], "--save") == "python -m resnet_fast bench --save --batch 1"


# ---------------------------------------------------------------- tables, page, plots


def test_model_table_shows_every_way_and_marks_the_fastest() -> None:
    rows = [
        row for batch in (1, 2, 4, 8, 16, 32, 64) for row in case_rows(f"infer/resnet50/bf16/{batch}", peak_bytes=2**30)
    ]
    runs = [run_of(rows, GPU)]
    (table,) = tables.model_tables(runs)
    assert len(table.header) == 1 + 7 + 2 and len(table.rows) == len(SPEED)
    (narrow,) = tables.model_tables(runs, columns=3)
    assert narrow.header[1:4] == ("batch 1", "batch 8", "batch 64")
    text = narrow.markdown()
    assert "**20.0 (2.00×)**" in text and "| 10.0 (1.00×)" in text and "NVIDIA H200" in text and "2.00" in text


def test_on_a_cpu_tables_are_against_eager_nchw_and_leave_out_what_was_not_measured() -> None:
    (table,) = tables.model_tables([run_of(case_rows(speed={**SPEED, "eager-nchw": 5.0}))])
    assert table.header == ("img/s (× eager, NCHW)", "batch 256", "error ÷ eager's")
    assert [cells[1] for cells in table.rows[:2]] == ["5.00 (1.00×)", "10.0 (2.00×)"]


def test_other_image_sizes_stand_in_a_table_of_their_own() -> None:
    cases = ("infer/resnet50/bf16/1@96", "infer/resnet50/bf16/1", "infer/resnet50/bf16/8", "infer/resnet50/bf16/1@320")
    main, others = tables.model_tables([run_of([row for case in cases for row in case_rows(case)])])
    assert main.heading.endswith("224²") and main.header[1:3] == ("batch 1", "batch 8")
    assert others.header[1:3] == ("batch 1, 96²", "batch 1, 320²")


def test_regression_table_counts_all_cases() -> None:
    faster = case_rows("infer/resnet50/bf16/1", {"eager": 1.0, "ours": 2.0})
    table = tables.regression_table([run_of(case_rows() + faster)])
    assert table.heading == "Slower than a peer: 1 of 2 cases"
    assert table.rows == (("infer/resnet50/bf16/256", "Test CPU", "0.900×", "torch.compile, max-autotune"),)


def test_op_table_names_problems_for_readers() -> None:
    (table,) = tables.op_tables([run_of(op_rows(), GPU)])
    assert table.rows[0] == ("7×7/2 3→64, 224², batch 2, bf16", "40.0", "20.0", "10.0", "triton.conv", "2.00×", "–")
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
    said = replace(CPU, facts={"command": "python -m resnet_fast bench --save"})
    cpu = page.sections([run_of(case_rows(), said), run_of(op_rows(), CPU, "ops.json")], [], "plots")["cpu"]()
    assert cpu.endswith("\n\nRegenerate: `python -m resnet_fast bench --save && python -m resnet_fast report`.")


def test_sections_say_when_there_is_nothing() -> None:
    sections = page.sections([run_of(case_rows())], [], "plots")
    assert "18.0" in sections["cpu"]() and "geometric mean" in sections["cpu"]()
    assert sections["gpu"]() == "No GPU measurement is in the ledger yet."


def test_every_plot_is_drawn_in_light_and_dark(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    batches = [row for batch in (1, 8, 64) for row in case_rows(f"infer/resnet50/bf16/{batch}")]
    found = figures.plots([run_of(batches + op_rows(), GPU)])
    assert {plot.name.split("-")[0] for plot in found} == {"bars", "curve", "layers", "roofline", "errors"}
    files = plots.save(found, tmp_path)
    assert {f.name for f in files} == {f"{plot.name}-{theme}.png" for plot in found for theme in ("light", "dark")}
    assert all(f.read_bytes().startswith(b"\x89PNG") for f in files)
    again = [f.read_bytes() for f in files[:1]]
    assert [f.read_bytes() for f in plots.save(found[:1], tmp_path)[:1]] == again  # no dates inside: diffs stay quiet


def test_labels_move_apart_no_further_than_they_must() -> None:
    assert figures.spread([1.0, 5.0, 5.2], 1.0) == pytest.approx([1.0, 4.6, 5.6])
    assert figures.spread([2.0, 2.0, 2.0], 1.0) == pytest.approx([1.0, 2.0, 3.0])


def test_page_holds_everything_it_shows(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    runs = [run_of(case_rows("infer/resnet50/bf16/1", {"eager": 1.0, "ours": 2.0}) + op_rows(), GPU)]
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
    assert "triton.conv" in text and "0 of 1 case." in text


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
    write_run([row for row in case_rows() if row.provider != "ours-plan"], CPU, "b.json")
    assert report("--compare", "a.json", "b.json", "--fail-if", "slower:5%") == 0
    said = capsys.readouterr().out
    assert (
        "In A only: infer/resnet50/bf16/256 ours-plan." in said and "None of ours is slower by more than 5.0%" in said
    )


def test_gate_fails_only_beyond_its_tolerance(report, capsys: pytest.CaptureFixture) -> None:
    write_run(case_rows(), CPU, "a.json")
    write_run(case_rows(speed={**SPEED, "ours": 13.8}), CPU, "b.json")
    assert report("--compare", "a.json", "b.json") == 0
    assert report("--compare", "a.json", "b.json", "--fail-if", "slower:10%") == 0
    assert report("--compare", "a.json", "b.json", "--fail-if", "slower:5%") == 1
    assert "SLOWER by more than 5.0%: infer/resnet50/bf16/256 ours: -8.0%" in capsys.readouterr().out
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
