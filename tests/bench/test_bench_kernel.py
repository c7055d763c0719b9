"""``bench --kernel``: occupancy and causes, and the command without a GPU: checked, compiled, timed on a CPU."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

from resnet_fast.__main__ import main
from resnet_fast.analysis.bottlenecks import Facts, causes
from resnet_fast.analysis.launches import Launch, launches_of
from resnet_fast.bench import kernel_report
from resnet_fast.bench.kernel_report import CallCode
from resnet_fast.cli import bench_kernel, new_kernel
from resnet_fast.dispatch.problem import ACROSS, Problem
from resnet_fast.dispatch.registry import find
from resnet_fast.kernels import aten
from resnet_fast.models.problems import model_problems
from resnet_fast.roofline import chips, floor
from resnet_fast.roofline.occupancy import occupancy
from resnet_fast.testing.eager import eager
from resnet_fast.testing.samples import make_args

TRITON = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="no Triton on this platform"
)
WIDE = Counter({"LDG.E.128": 10, "HGMMA.64x128x16.F32.BF16": 8, "STG.E.128": 4})


# ---------------------------------------------------------------- occupancy


@pytest.mark.parametrize(
    "registers, shared, threads, capability, blocks, limit",
    [
        (32, 0, 256, (8, 0), 8, "warps"),  # 8 × 8 warps of 64
        (128, 0, 256, (9, 0), 2, "registers"),  # 16 warps of 4096 registers each
        (255, 0, 1024, (9, 0), 0, "registers"),  # more registers than an SM has: it does not launch
        (
            33,
            0,
            64,
            (8, 0),
            24,
            "registers",
        ),  # 40 registers a thread are 1280 a warp: 51 warps, 48 by fours
        (16, 0, 32, (9, 0), 32, "blocks"),
        (32, 65536, 128, (9, 0), 3, "shared memory"),  # 65 KiB with the reserved one: three in 228
        (32, 0, 256, (8, 9), 6, "warps"),  # 48 warps
        (32, 0, 256, (10, 3), 8, "warps"),  # unlisted: as the older one
    ],
)
def test_occupancy(
    registers: int, shared: int, threads: int, capability: tuple, blocks: int, limit: str
) -> None:
    found = occupancy(registers, shared, threads, capability)
    assert (found.blocks, found.limit) == (blocks, limit)
    warps = 48 if capability in ((8, 9), (12, 0)) else 64
    assert found.share == blocks * threads / 32 / warps


def test_occupancy_before_its_tables() -> None:
    with pytest.raises(LookupError, match="7.5, expected 8.0"):
        occupancy(32, 0, 128, (7, 5))


def test_chips_of_one_capability_agree_in_what_an_sm_holds() -> None:
    for chip in chips.CHIPS.values():
        listed = chips.BY_CAPABILITY[chip.capability]
        assert (chip.warps, chip.blocks, chip.shared) == (
            listed.warps,
            listed.blocks,
            listed.shared,
        )


# ---------------------------------------------------------------- causes

PROBLEM = Problem(
    "conv_bn_act",
    "cuda",
    torch.bfloat16,
    (256, 64, 56, 56),
    "nhwc",
    weight=(256, 64, 1, 1),
    act="relu",
    capability=(9, 0),
)
GOOD = Launch("good", 96, 0, 48 << 10, 256, 132 * 4 * 20, WIDE)


def facts(
    problem: Problem = PROBLEM, torch_bytes: int = 0, torch_ops: tuple = (), **changes
) -> Facts:
    limits = chips.ceilings("h200")
    return Facts(
        floor.problem_floor(problem, limits),
        problem.dtype,
        (replace(GOOD, **changes),),
        limits,
        (9, 0),
        132,
        torch_bytes,
        torch_ops,
    )


def test_a_good_kernel_has_no_causes() -> None:
    assert causes(facts()) == []
    floor = facts().floor.seconds
    # near its ceiling, whatever the code looks like
    assert causes(facts(stack=64), floor / 0.7) == []
    (unseen,) = causes(facts(), floor / 0.3)
    assert "ncu" in unseen


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"instructions": Counter({"LDG.E.128": 10, "FFMA": 999})}, "no matrix instructions"),
        ({"stack": 64}, "64 bytes a thread in local memory"),
        ({"blocks": 33}, "grid of 33 blocks leaves 99 of 132 SMs idle"),
        ({"blocks": 132 + 1}, "some have 2, others 1"),
        ({"blocks": 132 * 2 * 2 + 24}, "2.1 waves of 264: the last is 9% full"),
        (
            {"instructions": Counter({"LDG.E.U16": 80, "LDG.E.128": 1, "HGMMA": 8})},
            "2.2 bytes each on average",
        ),
        (
            {"registers": 255, "shared": 0, "threads": 128},
            "too little is under way: 2 blocks an SM (by registers)",
        ),
        (
            {"torch_bytes": 10**9, "torch_ops": ("mul", "add", "relu", "add")},
            "torch's own mul, add, relu around the kernel move 1000.0 MB",
        ),
    ],
)
def test_each_cause_is_seen_and_named(changes: dict, words: str) -> None:
    found = causes(facts(**changes))
    assert words in found[0]
    assert "estimated" in found[0]


def test_a_small_problem_is_launches() -> None:
    small = replace(PROBLEM, x=(1, 64, 14, 14))
    assert "1 launch for a floor of" in causes(facts(small))[0]


def test_the_worst_three_come_first() -> None:
    found = causes(
        facts(
            instructions=Counter({"LDG.E.U16": 80, "FFMA": 9}),
            stack=4000,
            blocks=3,
            torch_bytes=10**9,
            torch_ops=("mul",),
        )
    )
    assert len(found) == 3
    assert "129 of 132 SMs idle" in found[0]
    shares = [float(text.rpartition("about ")[2].split("×")[0]) for text in found]
    assert shares == sorted(shares, reverse=True)


def test_narrow_loads_of_an_epilogue_are_no_cause() -> None:
    assert causes(facts(instructions=WIDE + Counter({"LDG.E": 4}))) == []
    # the tensors come by TMA
    assert causes(facts(instructions=Counter({"UTMALDG.4D": 4, "LDG.E": 16, "HGMMA": 8}))) == []


def test_the_profilers_trace_is_read() -> None:
    numbers = {
        "registers per thread": 168,
        "shared memory": 1024,
        "grid": [4, 3, 1],
        "block": [128, 2, 1],
    }
    kernel = {"cat": "kernel", "name": "gemm", "ts": 2, "args": numbers}
    first = {**kernel, "ts": 1, "name": "fold"}
    found = launches_of(
        {"traceEvents": [kernel, first, {"cat": "cpu_op", "name": "aten::conv2d", "ts": 0}]}
    )
    assert [one.name for one in found] == ["fold", "gemm"]
    assert (found[1].registers, found[1].shared, found[1].threads, found[1].blocks) == (
        168,
        1024,
        256,
        12,
    )


def test_how_far_and_why() -> None:
    f = facts(stack=64)
    said = bench_kernel.why("mine", f, f.floor.seconds / 0.25)
    assert said.startswith(
        "mine: 25% of the memory ceiling, 7% of the matrix units'. Likely causes:\n  - good keeps 64 bytes"
    )
    assert "near the memory ceiling" in bench_kernel.why("mine", f, f.floor.seconds / 0.9)


# ---------------------------------------------------------------- the command


@pytest.fixture
def mine(tmp_path):
    file = new_kernel.write("mine", "triton", tmp_path)
    return file


@TRITON
def test_triton_without_a_gpu_is_checked_and_compiled(mine, capsys, registry, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # a narrow terminal would cut the reason
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["bench", "--kernel", str(mine), "--layers", "layer3.0.conv1", "conv1"]) == 0
    said = capsys.readouterr().out
    assert "experimental.mine is right on 12 problems in Triton's interpreter" in said
    line = next(line for line in said.splitlines() if line.startswith("layer3.0.conv1"))
    assert "1×1 512→256" in line
    assert "12544×128" in line
    assert "%" in line
    assert "conv1: it takes only 1×1 convolutions of stride 1" in said
    assert "6 launches (5 of torch's own: add, rsqrt, mul, sub)" in said
    assert "No time is given" in said
    assert "NVIDIA H200" in said


@pytest.mark.parametrize("op", ["conv_bn_act", *ACROSS])
def test_what_the_interpreter_is_given_fits_together(op) -> None:
    for problem in model_problems("resnet50", 256, op=op):
        small = kernel_report.interpreted(problem)
        assert small.x[0] == 1
        assert max(small.x[2:]) <= kernel_report.INTERPRETED_SIZE
        assert small.weight == problem.weight
        assert find(f"aten.{op}").reason(small) is None
        assert all(out.numel() for out in eager(op, make_args(small)))


@TRITON
def test_numbers_are_not_cut_by_the_terminal(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    found = {"a layer": CallCode((replace(GOOD, stack=648),), 0, ())}
    said = bench_kernel.show_code(
        "mine", found, {"a layer": PROBLEM}, kernel_report.gpu_model("h200", torch.device("cpu"))
    )
    header, line = (
        next(text for text in said.splitlines() if text.startswith(start))
        for start in ("layer ", "a layer ")
    )
    assert "648" in line.split()
    assert header.split()[-2:] == ["spilled", "occupancy"]


@TRITON
def test_a_wrong_kernel_gets_no_numbers(mine, capsys, registry, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    mine.write_text(mine.read_text().replace("TRIPS=triton.cdiv(c, 32)", "TRIPS=c // 32"))
    assert main(["bench", "--kernel", str(mine), "--layers", "layer1.0.conv1"]) == 1
    said = capsys.readouterr().out
    assert "WRONG experimental.mine" in said
    assert "gets no time" in said
    assert "registers" not in said


def test_a_cpu_kernel_is_timed_beside_its_rivals(capsys, registry) -> None:
    call = [
        "bench",
        "resnet18",
        "--kernel",
        "aten.conv_bn_act",
        "--layers",
        "layer4.1.conv?",
        "--size",
        "32",
        "--seconds",
        "0.1",
        "--device",
        "cpu",
    ]
    assert main(call) == 0
    said = capsys.readouterr().out
    assert "→ aten.conv_bn_act" in said
    assert "folded" in said
    assert "× aten" in said
    assert "No roofline on a CPU" in said
    assert main([*call, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["provider"] for row in rows if not row["provider"].startswith("cpu.")} == {
        "eager",
        "folded",
        "aten.conv_bn_act",
    }
    assert len({row["case"] for row in rows}) == 2


def test_a_wrong_cpu_kernel_is_not_timed(capsys, registry, monkeypatch) -> None:
    wrong = replace(
        find("aten.add_act"),
        id="test.wrong",
        fn=lambda x, y, gate, act: aten.add_act(x, -y, gate, act),
    )
    monkeypatch.setattr(bench_kernel, "requested_kernels", lambda names: [wrong])
    assert (
        main(["bench", "resnet18", "--kernel", "test.wrong", "--size", "32", "--device", "cpu"])
        == 1
    )
    said = capsys.readouterr().out
    assert "WRONG test.wrong" in said
    assert "µs" not in said


def test_layers_that_are_not_there(capsys) -> None:
    assert (
        main(
            [
                "bench",
                "resnet18",
                "--kernel",
                "aten.conv_bn_act",
                "--layers",
                "layer9.*",
                "--device",
                "cpu",
            ]
        )
        == 2
    )
    assert "layer9.*" in capsys.readouterr().err
