"""The result of a run on a GPU: the proved kernels, the table, the decisions, the files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from resnet_fast.bench.ledger import read_run
from tools.gpu.decisions import decisions
from tools.gpu.found import Found
from tools.gpu.summary import layer_rows, summary, write


def check_row(job: str, case: str, status: str, **more) -> dict:
    """A row of the check stage."""
    return {
        "stage": "check",
        "job": job,
        "case": case,
        "status": status,
        "reason": None,
        "shares": 2,
        **more,
    }


FIRST, SECOND = "triton.conv 1/2 bfloat16", "triton.conv 2/2 bfloat16"
WHOLE = [
    check_row(FIRST, "edge conv_bn_act bfloat16 2x8", "right"),
    check_row(FIRST, "bfloat16 complete 1/2", "complete"),
    check_row(SECOND, "full conv_bn_act bfloat16 256x8", "right"),
    check_row(SECOND, "bfloat16 complete 2/2", "complete"),
]
LOSES_NAN = check_row(FIRST, "nan conv_bn_act bfloat16 2x8", "wrong")
HUNG = check_row(FIRST, "graph conv_bn_act bfloat16 2x8", "hung")
WRONG_IN_FLOAT16 = check_row("triton.conv 1/2 float16", "edge conv_bn_act float16 2x8", "wrong")
DECLINED_ALL = [
    check_row("aten.cudnn_fused 1/2 bfloat16", "bfloat16 complete 1/2", "complete"),
    check_row("aten.cudnn_fused 2/2 bfloat16", "bfloat16 complete 2/2", "complete"),
]


@pytest.mark.parametrize(
    "rows, proved",
    [
        pytest.param(WHOLE, ["triton.conv"], id="all right"),
        pytest.param(WHOLE[:-1], [], id="a share missing"),
        pytest.param([*WHOLE, LOSES_NAN], [], id="loses NaN"),
        pytest.param([*WHOLE, HUNG], [], id="hung"),
        pytest.param([*WHOLE, WRONG_IN_FLOAT16], ["triton.conv"], id="wrong in another dtype"),
        pytest.param(DECLINED_ALL, [], id="declined all"),
    ],
)
def test_proved(rows, proved) -> None:
    assert Found(rows).proved("bfloat16") == proved


# ---------------------------------------------------------------- a whole run


KEY = "conv_bn_act bfloat16 256x64x56x56 nhwc w64x64x3x3 s1x1 p1x1 d1x1 g1 bn relu"
CASE = "infer/resnet50/bf16/256"
MACHINE = {
    "name": "NVIDIA H200",
    "device": "cuda",
    "date": "2026-01-02T03:04:05+00:00",
    "commit": "abc1234567",
    "facts": {"torch": "2.11.0", "triton": "3.6.0", "driver": "580.1"},
}


def row(stage: str, case: str, status: str, **more) -> dict:
    """A row of a stage with one job."""
    return {"stage": stage, "job": stage, "case": case, "status": status, **more}


def timed(us: float, **over: float) -> dict:
    """A variant's timing."""
    return {"us": us, "low": us * 0.99, "high": us * 1.01, "rounds": 10, "over": over}


def network_row(provider: str, seconds: float, ours: bool = False, **over: float) -> dict:
    """A provider's row in the ledger's format."""
    return {
        "level": "model",
        "case": CASE,
        "provider": provider,
        "ours": ours,
        "dtype": "bf16",
        "batch": 256,
        "size": 224,
        "layout": "nchw",
        "seconds": seconds,
        "low": seconds,
        "high": seconds,
        "rounds": 9,
        "img_s": 256 / seconds,
        "roofline": 0.5,
        "peak_bytes": 2**30,
        "error": 3e-3,
        "eager_error": 4e-3,
        "speed_over": over,
    }


def environment_rows() -> list[dict]:
    known = {"copy": 4.3e12, "bfloat16": 790e12}
    return [
        row("environment", "machine", "here", machine=MACHINE, known=known),
        row("environment", "bfloat16", "measured", value=700e12, unit="FLOP/s"),
        row("environment", "copy", "measured", value=4.3e12, unit="B/s"),
        row("environment", "cache", "measured", value=6.5e12, unit="B/s"),
        row("environment", "int8", "failed", reason="unsupported"),
        row("inventory", "triton.idle", "here", reason=None),
        row("inventory", "native.conv", "absent", reason="it is not built"),
    ]


def check_rows() -> list[dict]:
    return [
        *WHOLE,
        check_row("aten.cudnn_fused 1/1 bfloat16", "nan conv_bn_act bfloat16 2x8", "wrong"),
        check_row(
            "triton.bad 1/1 bfloat16",
            "edge conv_bn_act bfloat16 2x63",
            "wrong",
            reason="max error 2",
            where="the last channel",
        ),
        check_row(FIRST, f"full {KEY}", "right", error=2e-3, eager_error=3e-3),
    ]


def layer_row() -> dict:
    times = {
        "folded": timed(100.0),
        "eager": timed(300.0),
        "triton.conv": timed(120.0, folded=0.83, eager=2.5),
    }
    return row(
        "layers",
        KEY,
        "measured",
        layer="layer1.0.conv2",
        count=3,
        batch=256,
        failed={},
        bytes=205_600_000,
        flops=59_190_000_000,
        floor_us=74.9,
        bound="compute",
        times=times,
    )


def headline_row() -> dict:
    providers = [
        network_row("eager", 0.02),
        network_row("folded", 0.01),
        network_row("ours", 0.008, True, eager=2.5, folded=1.25),
    ]
    return row(
        "headline", CASE, "measured", wrong={}, skipped={"ours-plan": "absent"}, rows=providers
    )


def a_whole_run() -> list[dict]:
    """The rows of a run with a wrong kernel, one layer and one network."""
    return [
        *environment_rows(),
        *check_rows(),
        layer_row(),
        headline_row(),
        row("stages", "check", "done", job="check", reason=None, seconds=93.0),
    ]


# ---------------------------------------------------------------- the table and the decisions


def test_summary_is_short() -> None:
    lines = summary(Found(a_whole_run())).splitlines()
    assert len(lines) < 60
    assert max(map(len, lines)) <= 260


@pytest.mark.parametrize(
    "words",
    [
        "NVIDIA H200, driver 580.1, torch 2.11.0, triton 3.6.0, commit abc1234567",
        "copy 4.3 TB/s",
        "int8 failed",
        "proved in bf16",
        "cannot run here: native.conv (it is not built)",
        "layer1.0.conv2",
        "geometric mean 0.83 over 1 layers, 1 slower by more than 2 %",
        "ours-plan",
        "32,000 img/s",
        "check 93 s",
    ],
)
def test_summary_says(words) -> None:
    assert words in summary(Found(a_whole_run()))


def test_a_wrong_kernel_comes_first() -> None:
    first, *_ = decisions(Found(a_whole_run()))
    assert first.startswith(
        "mend triton.bad before anything else: 1 bad, first wrong: edge conv_bn_act"
    )
    assert "the last channel" in first


@pytest.mark.parametrize(
    "words",
    [
        "does not keep NaN",
        "check again with more time: triton.idle, triton.bad",
        "roofline.py says 790 T/s for bfloat16 on this card, it did 700",
        "bound by it: load halos once",
        "loses to the prefolded bar; worst layer1.0.conv2 at batch 256: 0.83×",
        "work on layer1.0.conv2 at batch 256 next: 3 × 25 µs above",
        "ours falls short: 2.50× eager (goal 3×), 32,000 img/s (goal 50,000)",
    ],
)
def test_decisions_say(words) -> None:
    lines = decisions(Found(a_whole_run()))
    assert any(words in line for line in lines)


def test_a_ceiling_that_is_as_known_calls_for_no_decision() -> None:
    lines = decisions(Found(a_whole_run()))
    assert not any("for copy on this card" in line for line in lines)


def test_the_later_stage_with_more_peers_stands_for_a_network() -> None:
    rows = a_whole_run()
    providers = [network_row("compile", 0.01), network_row("ours", 0.008, True, compile=1.2)]
    peers = {**headline_row(), "stage": "peers", "rows": providers}
    assert Found([*rows, peers]).networks()[CASE]["rows"] == providers
    cut = {**peers, "rows": []}
    assert len(Found([*rows, cut]).networks()[CASE]["rows"]) == 3


def test_summary_of_a_peer_with_nan_for_an_answer() -> None:
    headline = headline_row()
    headline["rows"].append({**network_row("compile", 0.01), "error": None})
    text = summary(Found([*environment_rows(), headline]))
    assert "error NaN (eager 4.0e-03)" in text


def test_summary_of_tuned_plans() -> None:
    notes = ["across: a: used", "across: b: not used: not tried by itself: the time was up"]
    groups = [
        row("groups", CASE, "tuned", across=["conv_tail:layer1.1.conv2"], notes=notes),
        row("groups", "infer/resnet50/bf16/1", "tuned", across=[], notes=notes),
        row("groups", "infer/resnet50/bf16/8", "failed", reason="no memory"),
    ]
    text = summary(Found([*a_whole_run(), *groups]))
    assert f"{CASE}: conv_tail:layer1.1.conv2 (1 not tried" in text
    assert "infer/resnet50/bf16/1: none (" in text
    assert "bf16/8: failed: no memory" in text


# ---------------------------------------------------------------- files


@pytest.fixture
def files(tmp_path) -> list[Path]:
    """The files that a whole run writes."""
    return write(Found(a_whole_run()), tmp_path, tmp_path)


def test_the_summary_file_names_what_is_proved(files) -> None:
    record = json.loads(files[0].read_text())
    assert record["proved"]["bfloat16"] == ["triton.conv"]


def test_the_other_file_is_the_ledgers_own(files) -> None:
    path = files[1]
    run = read_run(path)
    assert path.name == "20260102030405-nvidia-h200-abc1234567.json"
    assert run.machine.commit == "abc1234567"
    assert {row.provider for row in run.rows} == {"eager", "folded", "ours", "triton.conv"}
    layer = next(row for row in run.rows if row.provider == "triton.conv")
    assert layer.level == "op"
    assert layer.ours
    assert layer.problem == KEY
    assert layer.seconds == pytest.approx(120e-6)
    assert layer.roofline == pytest.approx(74.9 / 120)
    assert (layer.error, layer.eager_error) == (2e-3, 3e-3)


def test_a_run_without_layers_has_no_rows_of_layers() -> None:
    assert list(layer_rows(Found([]))) == []
