"""What the stages of `make gpu` stand on: a GPU at all, the extension, the inventory, sanitizer, probe and sensors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import host_gpu
import pytest
from gpu_runs import ROOT, a_run, soon, watchdog

from tools.gpu import __main__ as gpu
from tools.gpu import probe as gpu_probe
from tools.gpu.watchdog import Sensors, Watchdog


@pytest.fixture
def dog(tmp_path) -> Watchdog:
    return watchdog(tmp_path)


def test_without_a_gpu_one_sentence_and_exit_code_2(tmp_path) -> None:
    env = {**os.environ, "OUT": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-m", "tools.gpu"], cwd=ROOT, env=env, text=True, capture_output=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("make gpu found no GPU to run on: torch")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "setup, trouble",
    [
        ("", None),
        ("import sys; sys.exit('nvcc fatal: no')", "failed: nvcc fatal: no"),
        ("import time; time.sleep(60)", "stopped at its deadline: the kernels of csrc"),
    ],
)
def test_building_the_extension(tmp_path, monkeypatch, setup, trouble) -> None:
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "a.cu").write_text("kernel")
    record = "import os; open('seen', 'w').write(os.environ['TORCH_CUDA_ARCH_LIST'])\n"
    (tmp_path / "setup.py").write_text(record + setup)
    run = a_run(tmp_path)
    run.rehearse = False
    run.ledger.add({"stage": "environment", "job": "machine", "case": "machine", "capability": [9, 0]})
    said = gpu.extension(run, soon(3))
    assert said is None if trouble is None else said.startswith(trouble)
    assert (tmp_path / "seen").read_text() == "9.0a"


def test_a_prebuilt_extension_is_taken_if_it_is_of_these_sources(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu.importlib.machinery, "EXTENSION_SUFFIXES", [".this.so"])
    for folder in ("csrc", "resnet_fast"):
        (tmp_path / folder).mkdir()
    (tmp_path / "csrc" / "a.cu").write_text("kernel")
    record = tmp_path / "resnet_fast" / "_build.json"
    record.write_text(json.dumps({"csrc": gpu.sources(), "archs": "8.0+PTX 9.0a"}))
    assert gpu.prebuilt() is None
    (tmp_path / "resnet_fast" / "_C.this.so").touch()
    run = a_run(tmp_path)
    run.rehearse = False
    run.ledger.add({"stage": "environment", "job": "machine", "case": "machine", "capability": [9, 0]})
    assert gpu.extension(run, soon()) == "prebuilt"
    (tmp_path / "setup.py").write_text("raise SystemExit('built anew')")
    record.write_text(
        json.dumps({"csrc": gpu.sources(), "archs": "8.0+PTX"})
    )  # it would run, without what is Hopper's own
    assert (
        gpu.extension(run, soon()) == "failed: built anew"
        and "==== build\nbuilt anew" in (tmp_path / "log.txt").read_text()
    )
    (tmp_path / "csrc" / "a.cu").write_text("another kernel")
    assert gpu.prebuilt() != gpu.sources()


def test_kernels_of_an_extension_made_of_other_sources_do_not_take_part(tmp_path, monkeypatch) -> None:
    run = a_run(tmp_path)
    run.rehearse = False
    for id in ("native.conv", "triton.conv"):
        run.ledger.add({"stage": "inventory", "job": "inventory", "case": id, "status": "here"})
    monkeypatch.setattr(gpu, "prebuilt", gpu.sources)
    assert run.kernels() == ["native.conv", "triton.conv"]
    monkeypatch.setattr(gpu, "prebuilt", lambda: "other")
    assert run.kernels() == ["triton.conv"]


def test_what_may_win_is_checked_first(tmp_path) -> None:
    run = a_run(tmp_path)
    for id, op in (
        ("aten.conv_bn_act", "conv_bn_act"),
        ("native.bn_act", "bn_act"),
        ("triton.add_act_backward", "add_act_backward"),
        ("triton.conv_tail", "conv_tail"),
        ("native.conv", "conv_bn_act"),
    ):
        run.ledger.add({"stage": "inventory", "job": "inventory", "case": id, "status": "here", "op": op})
    assert run.kernels() == [
        "triton.conv_tail",
        "native.conv",
        "native.bn_act",
        "triton.add_act_backward",
        "aten.conv_bn_act",
    ]


def test_a_child_is_ready_once_everything_is_imported() -> None:
    """After that it may be silent for seconds only, and so many children at once import slowly."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tools.gpu import child; from tools.gpu.scale import REHEARSAL\n"
        "child.warm_up(REHEARSAL); before = set(sys.modules); from resnet_fast.dispatch import kernels; kernels()\n"
        "print(sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr


def test_sources_are_hashed_as_the_build_hashes_them() -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("resnet_fast_setup", gpu.ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = setup
    spec.loader.exec_module(setup)
    assert gpu.sources() == setup.source_hash(without="cpu")


def test_a_processors_kernels_are_none_of_a_gpus() -> None:
    """Each would be a process that checks nothing, and seconds of the memory checker's."""
    from tools.gpu import check as gpu_check
    from tools.gpu.scale import Scale

    said = {case: work() for case, work in gpu_check.inventory(Scale(), print)}
    mine = {id: row for id, row in said.items() if id.startswith("cpu.")}
    assert mine and {(row["status"], row["reason"]) for row in mine.values()} == {("absent", "it is for processors")}
    assert said["aten.conv_bn_act"]["status"] == "here"


def test_an_inventory_after_a_build_counts(tmp_path) -> None:
    run = a_run(tmp_path)
    for job, status in (("inventory without extension", "absent"), ("inventory 1234", "here")):
        run.ledger.add(
            {
                "stage": "inventory",
                "job": job,
                "case": "native.conv",
                "status": status,
                "op": "conv_bn_act",
                "reason": None,
            }
        )
    assert run.kernels() == ["native.conv"]


MEMORY_ERROR = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 16 bytes
=========     at conv_kernel+0x2a0
========= ERROR SUMMARY: 1 error
"""


@pytest.mark.parametrize(
    "text, status, reason",
    [
        ("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n", "right", None),
        (MEMORY_ERROR, "wrong", "Invalid __global__ read of size 16 bytes; ERROR SUMMARY: 1 error"),
        ("========= Target application returned an error\n", "left out", "no verdict: ========= Target application"),
    ],
)
def test_memory_verdict(text, status, reason) -> None:
    row = gpu.memory_verdict(text)
    assert row["status"] == status and (reason is None or row["reason"].startswith(reason))


@pytest.mark.parametrize(
    "text, rows, said",
    [
        (MEMORY_ERROR, [("experimental.mine", "a", "right"), ("experimental.mine", "memcheck", "wrong")], None),
        (
            "========= Error: Device not supported.\n",
            [("experimental.mine", "a", "right")],
            "left out: compute-sanitizer does not",
        ),
    ],
)
def test_sanitizer_stage(dog, tmp_path, monkeypatch, text, rows, said) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        f"#!{sys.executable}\nimport subprocess, sys\ni = sys.argv.index('--log-file')\n"
        f"open(sys.argv[i + 1], 'w').write({text!r})\n"
        "sys.exit(subprocess.run(sys.argv[i + 2:]).returncode or 1)\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(gpu.Run, "args", lambda self, **more: {"cases": ["a"]})
    run = a_run(tmp_path, dog)
    for id in ("aten.add_act", "experimental.mine"):
        run.ledger.add({"stage": "inventory", "job": "inventory", "case": id, "status": "here"})
    trouble = gpu.sanitizer(run, soon())
    assert trouble is None if said is None else trouble.startswith(said)
    assert [(r["job"], r["case"], r["status"]) for r in run.ledger.of("sanitizer")] == rows


def test_sanitizer_absent(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(gpu, "SANITIZER", "no-such-tool")
    assert gpu.sanitizer(a_run(tmp_path), soon()) == "left out: no-such-tool is not installed"


EMULATED = f'exec g++ "$1" "$2" "$3" -I{host_gpu.EMULATION} -o "$7" -x c++ "$8"'
OTHERWISE = 'printf "#!/bin/sh\\necho operand a, stride 1024, base offset of the pattern: right from rows 0\\n" > "$7"; chmod +x "$7"'


@pytest.mark.parametrize(
    "compiles, lines, said",
    [
        pytest.param(
            EMULATED,
            8,
            "matrices that begin inside a pattern of rows are found",
            marks=pytest.mark.skipif(host_gpu.compiler() is None, reason="needs a g++ that knows _Float16"),
        ),
        (
            OTHERWISE,
            1,
            "MATRICES THAT BEGIN INSIDE A PATTERN OF ROWS ARE NOT FOUND: conv_hopper and conv_tail_hopper rest on that",
        ),
        ("echo no such architecture >&2; exit 1", 0, "failed: no such architecture"),
        ('printf "#!/bin/sh\\nsleep 60\\n" > "$7"; chmod +x "$7"', 0, "stopped at its deadline"),
    ],
)
def test_probe_stage(tmp_path, monkeypatch, compiles, lines, said) -> None:
    compiler = tmp_path / "nvcc"
    compiler.write_text(f"#!/bin/sh\n{compiles}\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(gpu_probe, "compiler", lambda: str(compiler))
    run = replace(a_run(tmp_path), rehearse=False)
    run.ledger.add(
        {"stage": "environment", "job": "machine", "case": "machine", "status": "here", "capability": [9, 0]}
    )
    assert gpu.probe(run, soon(2 if "sleep" in compiles else 60)) == said
    assert len(run.ledger.of("probe")) == lines and not (tmp_path / "probe").exists()


def test_sensors_keep_ranges_and_reasons(tmp_path) -> None:
    tool = tmp_path / "smi"
    tool.write_text(
        "#!/bin/sh\ncase $1 in *clocks_event*) exit 2;; esac\n"
        f"n=$(cat {tmp_path}/n 2>/dev/null || echo 0); echo $((n + 1)) > {tmp_path}/n\n"
        'echo "$((1500 + n)), 3201, 412.5, 55, 0x000000000000000$((n % 2))"\n'
    )
    tool.chmod(0o755)
    with Sensors(every=0.02, program=str(tool)) as sensors:
        while len(sensors.readings) < 4:
            time.sleep(0.02)
    seen = sensors.since(0)
    low, high = map(int, seen["clocks.sm"].split(".."))
    assert 1500 <= low < high and seen["power.draw"] == "412.5..412.5"
    assert seen["throttle"] == "0x0000000000000000 0x0000000000000001"
    with Sensors(program="absent") as absent:
        assert absent.query("driver_version") is None
    assert absent.since(0) == {}
