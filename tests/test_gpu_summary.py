"""What a run on a GPU says: what is proved, the table, the decisions, the files."""

from __future__ import annotations

import json

import pytest
from gpu_summary import Found, decisions, layer_rows, summary, write

from resnet_fast.bench.ledger import read_run


def rows_of(job: str, *cases: tuple[str, str]) -> list[dict]:
    return [
        {"stage": "check", "job": job, "case": case, "status": status, "reason": None, "shares": 2}
        for case, status in cases
    ]


ENDS = [(f"bfloat16 complete {share}/2", "complete") for share in (1, 2)]
WHOLE = [
    *rows_of("triton.conv 1/2 bfloat16", ("edge conv_bn_act bfloat16 2x8", "right"), ENDS[0]),
    *rows_of("triton.conv 2/2 bfloat16", ("full conv_bn_act bfloat16 256x8", "right"), ENDS[1]),
]


@pytest.mark.parametrize(
    "rows, proved",
    [
        (WHOLE, ["triton.conv"]),
        (WHOLE[:-1], []),
        ([*WHOLE, *rows_of("triton.conv 1/2 bfloat16", ("nan conv_bn_act bfloat16 2x8", "wrong"))], []),
        ([*WHOLE, *rows_of("triton.conv 1/2 bfloat16", ("graph conv_bn_act bfloat16 2x8", "hung"))], []),
        ([*WHOLE, *rows_of("triton.conv 1/2 float16", ("edge conv_bn_act float16 2x8", "wrong"))], ["triton.conv"]),
        (rows_of("aten.cudnn_fused 1/2 bfloat16", *ENDS), []),
    ],
    ids=["all right", "a share missing", "loses NaN", "hung", "wrong in another dtype", "declined all"],
)
def test_proved(rows, proved) -> None:
    assert Found(rows).proved("bfloat16") == proved


def timed(us: float, **over: float) -> dict:
    return {"us": us, "low": us * 0.99, "high": us * 1.01, "rounds": 10, "over": over}


KEY = "conv_bn_act bfloat16 256x64x56x56 nhwc w64x64x3x3 s1x1 p1x1 d1x1 g1 bn relu"
MACHINE = {
    "name": "NVIDIA H200",
    "device": "cuda",
    "date": "2026-01-02T03:04:05+00:00",
    "commit": "abc1234567",
    "facts": {"torch": "2.11.0", "triton": "3.6.0", "driver": "580.1"},
}


def network_row(provider: str, seconds: float, ours: bool = False, **over: float) -> dict:
    return {
        "level": "model",
        "case": "infer/resnet50/bf16/256",
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


def a_whole_run() -> list[dict]:
    case = "infer/resnet50/bf16/256"
    return [
        {
            "stage": "environment",
            "job": "machine",
            "case": "machine",
            "status": "here",
            "machine": MACHINE,
            "known": {"copy": 4.3e12, "bfloat16": 790e12},
        },
        {
            "stage": "environment",
            "job": "machine",
            "case": "bfloat16",
            "status": "measured",
            "value": 700e12,
            "unit": "FLOP/s",
        },
        {"stage": "inventory", "job": "inventory", "case": "triton.idle", "status": "here", "reason": None},
        {
            "stage": "environment",
            "job": "machine",
            "case": "copy",
            "status": "measured",
            "value": 4.3e12,
            "unit": "B/s",
        },
        {
            "stage": "environment",
            "job": "machine",
            "case": "cache",
            "status": "measured",
            "value": 6.5e12,
            "unit": "B/s",
        },
        {"stage": "environment", "job": "machine", "case": "int8", "status": "failed", "reason": "unsupported"},
        {"stage": "inventory", "job": "i", "case": "native.conv", "status": "absent", "reason": "it is not built"},
        *WHOLE,
        *rows_of("aten.cudnn_fused 1/1 bfloat16", ("nan conv_bn_act bfloat16 2x8", "wrong")),
        {
            "stage": "check",
            "job": "triton.bad 1/1 bfloat16",
            "case": "edge conv_bn_act bfloat16 2x63",
            "status": "wrong",
            "reason": "max error 2",
            "where": "the last channel",
        },
        {
            "stage": "check",
            "job": "triton.conv 1/2 bfloat16",
            "case": f"full {KEY}",
            "status": "right",
            "error": 2e-3,
            "eager_error": 3e-3,
        },
        {
            "stage": "layers",
            "job": "l",
            "case": KEY,
            "status": "measured",
            "layer": "layer1.0.conv2",
            "count": 3,
            "batch": 256,
            "failed": {},
            "bytes": 205_600_000,
            "flops": 59_190_000_000,
            "floor_us": 74.9,
            "bound": "compute",
            "times": {
                "folded": timed(100.0),
                "eager": timed(300.0),
                "triton.conv": timed(120.0, folded=0.83, eager=2.5),
            },
        },
        {
            "stage": "headline",
            "job": "h",
            "case": case,
            "status": "measured",
            "wrong": {},
            "skipped": {"ours-plan": "absent"},
            "rows": [
                network_row("eager", 0.02),
                network_row("folded", 0.01),
                network_row("ours", 0.008, True, eager=2.5, folded=1.25),
            ],
        },
        {"stage": "stages", "job": "check", "case": "check", "status": "done", "reason": None, "seconds": 93.0},
    ]


def test_summary_is_short_and_says_what_to_do_next() -> None:
    text = summary(Found(a_whole_run()))
    assert len(text.splitlines()) < 60 and max(map(len, text.splitlines())) <= 260
    for words in (
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
    ):
        assert words in text, words
    advice = decisions(Found(a_whole_run()))
    assert advice[0].startswith("mend triton.bad before anything else: 1 bad, first wrong: edge conv_bn_act")
    assert "the last channel" in advice[0]
    assert any("does not keep NaN" in line for line in advice)
    assert any(line.startswith("check again with more time: triton.idle, triton.bad") for line in advice)
    assert any(line.startswith("roofline.py says 790 T/s for bfloat16 on this card, it did 700") for line in advice)
    assert not any("for copy on this card" in line for line in advice)
    assert any("bound by it: load halos once" in line for line in advice)
    assert any("loses to the prefolded bar; worst layer1.0.conv2 at batch 256: 0.83×" in line for line in advice)
    assert any("work on layer1.0.conv2 at batch 256 next: 3 × 25 µs above" in line for line in advice)
    assert any("ours falls short: 2.50× eager (goal 3×), 32,000 img/s (goal 50,000)" in line for line in advice)


def test_the_later_stage_with_more_peers_stands_for_a_network() -> None:
    rows = a_whole_run()
    peers = [network_row("compile", 0.01), network_row("ours", 0.008, True, compile=1.2)]
    more = {**rows[-2], "stage": "peers", "rows": peers}
    assert Found([*rows, more]).networks()["infer/resnet50/bf16/256"]["rows"] == peers
    cut = {**more, "rows": []}
    assert len(Found([*rows, cut]).networks()["infer/resnet50/bf16/256"]["rows"]) == 3


def test_summary_of_a_peer_whose_answer_is_nan_and_of_tuned_plans() -> None:
    rows = a_whole_run()
    rows[-2]["rows"].append({**network_row("compile", 0.01), "error": None})
    tuned = {
        "stage": "groups",
        "job": "plans",
        "case": "infer/resnet50/bf16/256",
        "status": "tuned",
        "across": ["conv_tail:layer1.1.conv2"],
        "notes": ["across: a: used", "across: b: not used: not tried by itself: the time was up"],
    }
    text = summary(
        Found(
            [
                *rows,
                tuned,
                {**tuned, "case": "infer/resnet50/bf16/1", "across": []},
                {**tuned, "case": "infer/resnet50/bf16/8", "status": "failed", "reason": "no memory"},
            ]
        )
    )
    assert "error NaN (eager 4.0e-03)" in text
    for line in (
        "infer/resnet50/bf16/256: conv_tail:layer1.1.conv2 (1 not tried",
        "infer/resnet50/bf16/1: none (",
        "bf16/8: failed: no memory",
    ):
        assert line in text


def test_files_are_the_ledgers_own(tmp_path) -> None:
    summary_file, ledger_file = write(Found(a_whole_run()), tmp_path, tmp_path)
    assert json.loads(summary_file.read_text())["proved"]["bfloat16"] == ["triton.conv"]
    run = read_run(ledger_file)
    assert ledger_file.name == "20260102030405-nvidia-h200-abc1234567.json" and run.machine.commit == "abc1234567"
    assert {row.provider for row in run.rows} == {"eager", "folded", "ours", "triton.conv"}
    layer = next(row for row in run.rows if row.provider == "triton.conv")
    assert layer.level == "op" and layer.problem == KEY and layer.seconds == pytest.approx(120e-6) and layer.ours
    assert (layer.error, layer.eager_error) == (2e-3, 3e-3) and layer.roofline == pytest.approx(74.9 / 120)
    assert list(layer_rows(Found([]))) == []
