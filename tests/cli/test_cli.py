"""The command line as a user meets it: help everywhere, one sentence for mistakes, exit codes, JSON that parses."""

import dataclasses
import json
import os
import re
import sys
from dataclasses import replace

import pytest
import torch

import resnet_fast
from resnet_fast import kernel
from resnet_fast.__main__ import COMMANDS, main, parser
from resnet_fast.bench.providers import PROVIDERS
from resnet_fast.cli import bench, check, info
from resnet_fast.dispatch import Kernel, find, rejected, select, tables
from resnet_fast.dispatch import registry as dispatch
from resnet_fast.dispatch.problem import ACROSS, Problem
from resnet_fast.graph import network
from resnet_fast.kernels import aten
from resnet_fast.models.problems import conv_layers, problem_after
from resnet_fast.runtime.explanation import Explanation, Line, timed
from resnet_fast.util import machine
from resnet_fast.util import text as console


def test_every_command_explains_itself(capsys):
    names = parser()._subparsers._group_actions[0].choices
    assert len(names) == len(COMMANDS)
    for name in names:
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        assert stop.value.code == 0
        assert len(capsys.readouterr().out.splitlines()) >= 4


@pytest.mark.parametrize(
    "argv, words",
    [
        (["explain", "resnet51"], "expected one of resnet18"),
        (["check", "--kernel", "nobody.knows"], "unknown"),
        (["check", "--kernel", "absent.py"], "does not exist"),
        (["bench", "--providers", "nothing"], "unknown"),
        (
            ["bench", "--providers", "kernel:nobody.knows"],
            "bench: kernel 'nobody.knows' is unknown",
        ),
        (["bench", "resnet51"], "bench: got 'resnet51', expected one of resnet18"),
        (["report", "--compare", "a.json", "b.json"], "a.json is not a file"),
        (["explain", "resnet18", "--device", "cuda"], "no CUDA device"),
        (["explain", "resnet18", "--device", "tpu"], "--device: got tpu, expected cpu or cuda"),
        (["explain", "resnet51", "--diff"], "expected one of resnet18"),
        (
            ["explain", "resnet18", "--diff", "--rejected"],
            "--rejected goes with the plain table only",
        ),
        (["report", "--json"], "--json needs --headline"),
    ],
)
def test_a_mistake_is_one_sentence(argv, words, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said


@pytest.mark.parametrize("value", ["0", "-1", "x"])
def test_sizes_are_whole_numbers_above_zero(value, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["explain", "resnet18", "--batch", value])
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        f"resnet_fast explain: argument --batch: got {value}, expected a whole number above 0 "
        "(see `python -m resnet_fast explain --help`)\n"
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seconds", "0"], "--seconds: got 0, expected seconds above 0"),
        (["--seconds", "-1"], "--seconds: got -1, expected seconds"),
        (["--seconds", "nan"], "--seconds: got nan, expected seconds"),
        (["--save", "."], "--save: got ., a folder, expected a file"),
        (
            ["--save", "file/below.json"],
            "--save: got file/below.json, but .*file cannot be written into",
        ),
    ],
)
def test_what_a_long_run_would_refuse_at_its_end_is_refused_before(
    words, said, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stop:
        main(["bench", "resnet18", *words])
    assert stop.value.code == 2
    assert re.match(f"resnet_fast bench: argument {said} ", capsys.readouterr().err)


def test_a_folder_that_cannot_be_written_is_a_sentence(capsys, tmp_path):
    (tmp_path / "file").touch()
    assert (
        main(["new-kernel", "mine", "--triton", "--folder", str(tmp_path / "file" / "below")]) == 2
    )
    assert re.fullmatch("new-kernel: .*Not a directory: .*below'\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("target", "code", "said"),
    [("closed", 1, ""), ("/dev/full", 2, "list: .* No space left on device\n")],
)
@pytest.mark.skipif(sys.platform != "linux", reason="has no /dev/full")
def test_output_that_nobody_takes_ends_the_command_quietly(target, code, said, capsys, monkeypatch):
    """``| head`` closes the pipe; and what is still held back then must not make the interpreter complain at exit."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") if target == "closed" else open(target, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(["list"]) == code
    assert re.fullmatch(said, capsys.readouterr().err)


def test_interrupted_while_the_commands_are_read_is_no_traceback(capsys, monkeypatch):
    def stop():
        raise KeyboardInterrupt

    monkeypatch.setattr("resnet_fast.__main__.parser", stop)
    assert main(["list"]) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("\ndef (\n", "line 2: SyntaxError: invalid syntax\n"),
        ("x = 1\n1 / 0\n", "line 2: ZeroDivisionError: division by zero\n"),
        (
            "import nobody_has_this",
            "line 1: ModuleNotFoundError: No module named 'nobody_has_this'\n",
        ),
        (
            "import resnet_fast\n\n"
            "@resnet_fast.kernel('experimental.mine', op='convolve', supports=None)\ndef f(): pass",
            "line 3: ValueError: kernel ",
        ),
    ],
)
@pytest.mark.parametrize(
    "command",
    [
        ["check", "--kernel", "mine.py"],
        ["bench", "--kernel", "mine.py"],
        ["bench", "--providers", "kernel:mine.py"],
    ],
    ids=["check", "bench", "provider"],
)
def test_what_is_wrong_in_a_kernels_file_is_told_with_its_line(
    command, text, words, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(text)
    assert main(command) == 2
    assert capsys.readouterr().err.startswith(f"{command[0]}: kernel file mine.py, {words}")


def test_help_of_bench_fits_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    assert all(id in said.split("providers:")[1] for id in PROVIDERS)


def test_list(capsys):
    assert main(["list", "--names"]) == 0
    assert capsys.readouterr().out.split() == resnet_fast.list_models()
    assert main(["list"]) == 0
    assert "resnet50          Bottleneck  3-4-6-3     25.6   8.18" in capsys.readouterr().out


def test_info(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["machine"]["torch"] == torch.__version__
    assert ["aten.conv_bn_act", "conv_bn_act", "ready"] in facts["kernels"]
    assert main(["info"]) == 0
    assert "missing" in capsys.readouterr().out


def test_info_says_what_the_cpu_kernels_run_with_or_why_they_do_not(monkeypatch):
    from resnet_fast.kernels import cpu_library

    monkeypatch.setattr(cpu_library, "instructions", lambda: "AVX2")
    for why_not, amx, said in (
        (None, False, "run with AVX2"),
        ("the CPU kernels are not built", True, "the CPU kernels are not built"),
        (None, True, "run with AVX2; bfloat16 convolutions are left to oneDNN, which has AMX here"),
    ):
        monkeypatch.setattr(cpu_library, "available", lambda why_not=why_not: why_not)
        monkeypatch.setattr(cpu_library, "onednn_has_amx", lambda amx=amx: amx)
        assert info.build()["cpu kernels"] == said


def test_missing_names_the_command(monkeypatch):
    monkeypatch.setattr(info, "version", lambda package: "none")
    assert "timm: pip install 'resnet_fast[timm]'" in info.missing()


def test_check_passes_what_is_right(capsys):
    assert main(["check", "--kernel", "aten.add_act", "--dtype", "float32"]) == 0
    assert "0 wrong" in capsys.readouterr().out


def test_check_of_a_kernel_that_cannot_run_is_no_success(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    absent = Kernel(
        "test.absent",
        "add_act",
        aten.add_act,
        lambda p: None,
        lambda: "it needs a machine of a kind that nobody has, and a long sentence",
    )
    monkeypatch.setattr(check, "requested_kernels", lambda names: [absent])
    assert main(["check", "--kernel", "test.absent"]) == 2
    said = capsys.readouterr()
    assert (
        "cannot run here: test.absent: it needs a machine of a kind that nobody has, and a long sentence"
        in " ".join(said.out.split())
    )
    assert max(map(len, said.out.splitlines())) <= 60
    assert said.err == "check: nothing was checked of what --kernel named\n"
    assert main(["check"]) == 0


def test_check_fails_what_is_wrong(capsys, monkeypatch):
    def swapped(x, y, gate, act):
        return aten.add_act(x, -y, gate, act)

    bad = Kernel("test.bad", "add_act", swapped, lambda p: None, lambda: None)
    monkeypatch.setattr(check, "requested_kernels", lambda names: [bad])
    monkeypatch.setattr(check, "find", lambda id: bad)
    assert main(["check", "--dtype", "float32"]) == 1
    assert "WRONG test.bad" in capsys.readouterr().out


def test_explain_says_fused_and_plain(capsys):
    model = resnet_fast.resnet18().eval()
    model.layer2[0].relu.register_forward_hook(lambda *a: None)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = resnet_fast.explain(model, torch.randn(1, 3, 32, 32))
    by_module = {line.module: line for line in found}
    assert by_module["conv1"].kernel == "aten.conv_bn_act"
    assert by_module["layer1.0.conv1"].op == "conv_bn_act"
    assert by_module["layer2.0"].op == "plain"
    assert "hooks" in by_module["layer2.0"].why
    assert "layer2.0.conv1" not in by_module
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_explain_of_training_leaves_the_statistics_alone():
    model = resnet_fast.resnet18().train()
    found = resnet_fast.explain(model, torch.randn(2, 3, 32, 32))
    assert {line.op for line in found} == {"bn_act"}
    assert model.bn1.num_batches_tracked.item() == 0
    assert not model.bn1.running_mean.any()


def test_explain_across(capsys, monkeypatch):
    """The plan's groups with their kernel, beside the unfused steps too; not where there is no plan."""
    monkeypatch.setenv("COLUMNS", "200")  # a narrow terminal would cut the reason
    assert (
        main(["explain", "resnet50", "--size", "32", "--across", "pointwise_pair", "conv_pool"])
        == 0
    )
    said = capsys.readouterr().out
    assert said.count("pointwise_pair") == 4
    assert said.count("conv_pool") == 1
    assert "one by one" in said
    assert (
        main(["explain", "resnet18", "--size", "32", "--diff", "--across", "conv_pool", "--json"])
        == 0
    )
    rows = json.loads(capsys.readouterr().out)["rows"]
    # conv, batch norm, ReLU, pool
    assert sum(row["steps"] for row in rows) == 23 and rows[0]["other_steps"] == 4
    assert capsys.readouterr().err == ""
    for how in ([], ["--json"], ["--diff"]):
        assert (
            main(
                [
                    "explain",
                    "resnet18",
                    "--size",
                    "32",
                    "--across",
                    "conv_tail",
                    "conv_pool:layer9",
                    *how,
                ]
            )
            == 0
        )
        said = capsys.readouterr().err
        assert (
            said
            == "explain: across: this network has no conv_tail\nexplain: across: this network has no conv_pool:layer9\n"
        )
    assert (
        main(["explain", "resnet18", "--across", "conv_tail", "conv_pool", "--model-gpu", "h200"])
        == 0
    )
    said = capsys.readouterr().out
    assert "across: this network has no conv_tail\n" in said
    assert "no conv_pool" not in said
    for wrong in (
        ["--across", "conv_pools"],
        ["--across", "conv_pool", "--train"],
        ["--across", "conv_pools", "--model-gpu", "h200"],
    ):
        assert main(["explain", "resnet18", "--size", "32", *wrong]) == 2
        assert "across" in capsys.readouterr().err


def test_explain_rejected(capsys):
    assert main(["explain", "resnet18", "--size", "32", "--rejected"]) == 0
    said = capsys.readouterr().out
    assert "triton.conv" in said
    assert "native.conv" in said
    assert "aten.cudnn_fused" in said


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_explain_diff(capsys, monkeypatch, dtype):
    monkeypatch.setenv("COLUMNS", "100")
    assert (
        main(["explain", "resnet50", "--diff", "--batch", "3", "--size", "33", "--dtype", dtype])
        == 0
    )
    said = capsys.readouterr().out.splitlines()
    assert (
        said[0] == f"resnet50, {dtype}, 3×3×33×33 on cpu: 57 fused steps, other: 175 unfused ones"
    )
    assert max(map(len, said)) <= 100
    assert not any("…" in line for line in said)
    total = next(line.split() for line in said if line.startswith("total"))
    assert total[1:3] == ["57", "175"]
    assert float(total[3]) > 0
    assert float(total[4]) > 0


def test_explain_diff_as_json(capsys):
    assert main(["explain", "resnet18", "--diff", "--batch", "2", "--size", "32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == "resnet18"
    assert found["batch"] == 2
    assert len(found["rows"]) == 24
    assert all(
        0 <= row["error"] < 1e-4 and row["ms"] > 0 and row["broken"] is None
        for row in found["rows"]
    )


def test_explain_diff_exits_1_when_the_fused_schedule_is_wrong(capsys, monkeypatch):

    fold = network._folded

    def off(conv, bn, dtype, device):
        found = fold(conv, bn, dtype, device)
        found.bias.mul_(1.01)
        return found

    monkeypatch.setattr(network, "_folded", off)
    assert main(["explain", "resnet18", "--diff", "--size", "32"]) == 1
    said = capsys.readouterr()
    assert "WRONG conv1: rms error" in said.err
    assert "WRONG" in said.out


def test_explain_as_json(capsys):
    assert main(["explain", "resnet18", "--size", "32", "--json"]) == 0
    lines = json.loads(capsys.readouterr().out)
    assert lines[0]["layer"] == "conv1"
    assert lines[0]["kernel"] in ("aten.conv_bn_act", "cpu.conv")
    assert lines[0]["problem"].startswith("conv_bn_act")


def test_explain_for_a_gpu_that_is_not_here_tells_every_fused_step_s_floor(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert (
        main(
            [
                "explain",
                "resnet50",
                "--batch",
                "256",
                "--dtype",
                "bfloat16",
                "--model-gpu",
                "h200",
                "--across",
                *ACROSS,
            ]
        )
        == 0
    )
    said = capsys.readouterr().out.splitlines()
    assert max(map(len, said)) <= 120
    assert not any("…" in line for line in said)
    rows = {line.split()[0]: line.split()[1:] for line in said if line}
    assert rows["layer1.1.conv2"] == ["conv_tail", "1027.74", "111.80", "239.01", "memory"]
    assert rows["layer2.0.conv3"][0] == "pointwise_pair"
    assert "layer2.1.conv3" not in rows
    assert "layer1.0.downsample.0" not in rows
    kernels, _, _, img_s = next(
        line.split()[-4:] for line in said if line.startswith("infer  with ")
    )
    assert (kernels, img_s) == ("26", "88,223")


def test_explain_tells_times_of_this_gpu(monkeypatch):
    """The kernel's measured time, in a graph its own, beside the floor and the share of it; what lost, and by what."""
    monkeypatch.setenv("COLUMNS", "160")
    problem = Problem(
        "conv_tail",
        "cuda",
        torch.bfloat16,
        (256, 64, 56, 56),
        "nhwc",
        (64, 64, 3, 3),
        padding=(1, 1),
        residual="nhwc",
        chain=((256, 64, 1, 1), (), (64, 256, 1, 1)),
        act="relu",
        capability=(9, 0),
    )
    here = {
        "source": tables.source_hash(find("triton.conv_tail").sources),
        "versions": tables.versions(),
        "error": 1e-3,
        "eager_error": 2e-3,
    }
    aten_ = {**here, "source": tables.source_hash(find("aten.conv_tail").sources)}
    records = {
        "triton.conv_tail": {**here, "status": "right", "time_us": 500.0, "device_us": 478.0},
        "aten.conv_tail": {**aten_, "status": "right", "time_us": 900.0},
    }
    monkeypatch.setattr(tables, "gpu_name", lambda device=None: "NVIDIA H200")
    monkeypatch.setattr(
        tables,
        "load",
        lambda gpu: (
            {"entries": {}, "graph": {}, "measured": {problem.key: records}},
            {"entries": {}, "graph": {}, "measured": {problem.key: {"aten.conv_tail": {}}}},
        ),
    )
    line = Line("layer1.1.conv2", "conv_tail", "triton.conv_tail", "measured", problem)
    row = str(
        Explanation([timed(line, graph=True), Line("fc", "function", "torch", "why")])
    ).splitlines()
    assert row[0].split()[-4:] == ["µs", "floor", "%", "why"]
    assert row[2].split("  ")[-1].split() == ["measured"]
    assert row[2].split()[-4:-1] == ["478.0", "239.0", "50"]
    assert "256×64×56×56 → 64 → 256 → 64" in row[2]
    assert row[3].split() == ["fc", "function", "torch", "why"]
    assert timed(line).time_us == 500.0
    assert timed(replace(line, kernel="aten"), graph=True).time_us is None
    # a plan's word for the op's composition
    assert timed(replace(line, kernel="aten")).time_us == 900.0
    monkeypatch.setattr(Kernel, "reason", lambda self, problem: None)
    lost = rejected(problem)["triton.conv_tail"]
    assert lost == "500.0 µs a call, 478.0 in a graph; error 0.001, eager's 0.002"
    records["triton.conv_tail"] |= {"status": "wrong", "reason": "rms error 1 of 2"}
    assert rejected(problem)["triton.conv_tail"] == "WRONG: rms error 1 of 2"
    records["triton.conv_tail"]["source"] = "another"
    assert rejected(problem)["triton.conv_tail"].startswith("no measurement")
    assert timed(line).time_us is None
    monkeypatch.setattr(tables, "gpu_name", lambda device=None: "Imaginary 1")
    assert timed(line).floor_us is None


def test_explain_lines_print():
    assert str(Explanation([Line("a", "plain", "torch", "why")])).splitlines()[-1].split() == [
        "a",
        "plain",
        "torch",
        "why",
    ]


def test_tables_fit_the_terminal():
    text = console.table(("name", "ms"), [("x" * 50, 1), ("y", 22)], right=(1,), width=40)
    assert all(len(line) <= 40 for line in text.splitlines())
    assert "…" in text


def test_an_optional_column_without_values_is_left_out():
    columns = [
        console.Column("name", lambda row: row[0]),
        console.Column("ms", lambda row: row[1]),
        console.Column("cold", lambda row: row[2], optional=True),
    ]
    assert (
        console.column_table(columns, [("a", "1", ""), ("b", "2", "")]).splitlines()[0]
        == "name  ms"
    )
    assert (
        console.column_table(columns, [("a", "1", ""), ("b", "2", "9")]).splitlines()[0]
        == "name  ms  cold"
    )


def test_bench_prints_json_with_errors(capsys):
    assert (
        main(
            [
                "bench",
                "resnet18",
                "--batch",
                "1",
                "--size",
                "32",
                "--providers",
                "ours",
                "--seconds",
                "0.1",
                "--json",
            ]
        )
        == 0
    )
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["provider"] for row in rows} == {"eager-nchw", "ours"}
    assert all(row["error"] < 1e-4 and row["seconds"] > 0 for row in rows)
    assert "eager-nchw" in next(row for row in rows if row["provider"] == "ours")["speed_over"]


def test_a_kernel_from_the_environment_that_cannot_run_is_one_sentence(
    capsys, monkeypatch, registry
):
    kernel(
        "experimental.absent",
        op="conv_bn_act",
        supports=lambda problem: None,
        available=lambda: "it needs a GPU",
    )(aten.conv_bn_act)
    monkeypatch.setenv(select.ENV, "experimental.absent")
    assert main(["explain", "resnet18", "--size", "32"]) == 2
    assert (
        capsys.readouterr().err
        == f"explain: kernel 'experimental.absent' from {select.ENV} cannot run here: it needs a GPU\n"
    )


def test_bench_takes_what_people_run_on_a_device():
    assert bench.defaults("cpu", "infer") == bench.defaults("cpu", "train") == ("fp32", (1, 16))
    assert bench.defaults("cuda", "infer") == ("bf16", (256, 1))
    assert bench.defaults("cuda", "train") == ("bf16", (32,))


@pytest.mark.parametrize(
    "case, command",
    [
        (bench.Case("infer", "resnet50", "bf16", 256, 224, "cuda"), "tune resnet50 --batch 256 1`"),
        (
            bench.Case("train", "resnet18", "fp16", 256, 64, "cuda"),
            "tune resnet18 --batch 256 1 --size 64 --dtype float16 --train`",
        ),
    ],
)
def test_bench_says_that_a_gpu_was_not_tuned(monkeypatch, tmp_path, case, command):
    """Pretended: a GPU without a table, then with one of this case."""
    monkeypatch.setenv("RESNET_FAST_TABLES", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(tables, "gpu_name", lambda device=None: "Pretended GPU")
    tables.load.cache_clear()
    said = bench.untuned(case, (256, 1))
    assert "no kernel of ours was measured for this on Pretended GPU yet" in said
    assert f"`python -m resnet_fast {command}" in said
    conv = conv_layers(
        case.model, 256, case.size, machine.SHORT_DTYPES[case.dtype], "cuda", (9, 0)
    )[3].problem
    problem = (
        replace(conv, bn=False) if case.mode == "infer" else problem_after(conv, "bn_act_backward")
    )
    kernel = "aten.conv_bn_act" if case.mode == "infer" else "aten.bn_act_backward"
    record = {
        "status": "right",
        "source": tables.source_hash(dispatch.find(kernel).sources),
        "versions": tables.versions(),
    }
    tables.update(
        "Pretended GPU",
        lambda sections: sections["measured"].update({problem.key: {kernel: record}}),
    )
    assert bench.untuned(case) is None
    assert bench.untuned(replace(case, batch=1)) is not None
    tables.load.cache_clear()


def test_bench_skips_a_kernel_that_takes_no_layer(capsys):
    words = [
        "bench",
        "resnet18",
        "--batch",
        "1",
        "--size",
        "32",
        "--providers",
        "eager-nchw",
        "kernel:aten.cudnn_fused",
        "--seconds",
        "0.1",
    ]
    assert main(words) == 0
    said = capsys.readouterr()
    assert (
        "kernel:aten.cudnn_fused: skipped: kernel 'aten.cudnn_fused' claimed no problem: cuDNN needs a CUDA tensor"
        in said.out
    )
    assert "Traceback" not in said.err
    assert "WRONG" not in said.out


def test_bench_refuses_a_time_for_what_is_wrong(capsys, monkeypatch):
    off = dataclasses.replace(
        PROVIDERS["ours"], build=lambda model, x, dtype: lambda x: torch.zeros(x.shape[0], 1000)
    )
    monkeypatch.setattr(bench, "provider", lambda id: off if id == "ours" else PROVIDERS[id])
    assert (
        main(
            [
                "bench",
                "resnet18",
                "--batch",
                "1",
                "--size",
                "32",
                "--providers",
                "ours",
                "--seconds",
                "0.1",
            ]
        )
        == 1
    )
    assert "WRONG" in capsys.readouterr().out


def test_ctrl_c_is_said_and_coded(capsys, monkeypatch):
    def interrupted(names):
        raise KeyboardInterrupt

    monkeypatch.setattr(check, "requested_kernels", interrupted)
    assert main(["check"]) == 130
    assert "interrupted" in capsys.readouterr().err
