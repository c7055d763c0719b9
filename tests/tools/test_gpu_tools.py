"""The ground of `make gpu`: a GPU at all, the extension, the inventory, sanitizer, probe and sensors."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import host_gpu
import pytest
from gpu_runs import a_run, add_hopper, add_row, soon, watchdog

from tools.gpu import check, extension, probe, stages
from tools.gpu.run import Run
from tools.gpu.scale import Scale
from tools.gpu.sensors import Sensors
from tools.gpu.watchdog import ROOT, Watchdog


@pytest.fixture
def dog(tmp_path) -> Watchdog:
    return watchdog(tmp_path)


def test_without_a_gpu_one_sentence_and_exit_code_2(tmp_path) -> None:
    env = {**os.environ, "OUT": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tools.gpu"]
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("make gpu found no GPU to run on: torch")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- the extension


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A checkout with one kernel in csrc."""
    monkeypatch.setattr(extension, "ROOT", tmp_path)
    monkeypatch.setattr(stages, "ROOT", tmp_path)
    for folder in ("csrc", "resnet_fast"):
        (tmp_path / folder).mkdir()
    (tmp_path / "csrc" / "a.cu").write_text("kernel")
    return tmp_path


def on_hopper(folder: Path) -> Run:
    """A run on a Hopper GPU."""
    run = a_run(folder, rehearse=False)
    add_hopper(run)
    return run


@pytest.mark.parametrize(
    "setup, trouble",
    [
        pytest.param("", None, id="goes well"),
        pytest.param(
            "import sys; sys.exit('nvcc fatal: no')", "failed: nvcc fatal: no", id="fails"
        ),
        pytest.param(
            "import time; time.sleep(60)",
            "stopped at its deadline: the kernels of csrc are left out",
            id="takes too long",
        ),
    ],
)
def test_building_the_extension(checkout, setup, trouble) -> None:
    record = "import os; open('seen', 'w').write(os.environ['TORCH_CUDA_ARCH_LIST'])\n"
    (checkout / "setup.py").write_text(record + setup)
    assert stages.build_extension(on_hopper(checkout), soon(3)) == trouble
    assert (checkout / "seen").read_text() == "9.0a"


@pytest.fixture
def built(checkout, monkeypatch) -> Path:
    """The record of an extension that was built in the checkout; building it anew fails."""
    monkeypatch.setattr(extension.importlib.machinery, "EXTENSION_SUFFIXES", [".this.so"])
    (checkout / "resnet_fast" / "_C.this.so").touch()
    (checkout / "setup.py").write_text("raise SystemExit('built anew')")
    record = checkout / "resnet_fast" / "_build.json"
    record.write_text(json.dumps({"csrc": extension.sources(), "archs": "8.0+PTX 9.0a"}))
    return record


def test_a_prebuilt_extension_is_taken_if_it_is_of_these_sources(checkout, built) -> None:
    assert stages.build_extension(on_hopper(checkout), soon()) == "prebuilt"
    (checkout / "csrc" / "a.cu").write_text("another kernel")
    assert extension.prebuilt() != extension.sources()


def test_a_record_without_its_extension_is_none(checkout, built) -> None:
    (checkout / "resnet_fast" / "_C.this.so").unlink()
    assert extension.prebuilt() is None


def test_a_prebuilt_extension_without_code_for_this_gpu_is_built_anew(checkout, built) -> None:
    """It would run, without the kernels that only Hopper has."""
    built.write_text(json.dumps({"csrc": extension.sources(), "archs": "8.0+PTX"}))
    assert stages.build_extension(on_hopper(checkout), soon()) == "failed: built anew"
    log = (checkout / "log.txt").read_text()
    assert "==== build\nbuilt anew" in log


def test_sources_are_hashed_as_the_build_hashes_them() -> None:
    spec = importlib.util.spec_from_file_location("resnet_fast_setup", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = setup
    spec.loader.exec_module(setup)
    assert extension.sources() == setup.source_hash(without="cpu")


# ---------------------------------------------------------------- kernels that take part


def test_kernels_of_an_extension_made_of_other_sources_do_not_take_part(
    tmp_path, monkeypatch
) -> None:
    run = a_run(tmp_path, rehearse=False)
    for id in ("native.conv", "triton.conv"):
        add_row(run, "inventory", id, "here")
    monkeypatch.setattr(extension, "prebuilt", extension.sources)
    assert run.kernels() == ["native.conv", "triton.conv"]
    monkeypatch.setattr(extension, "prebuilt", lambda: "other")
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
        add_row(run, "inventory", id, "here", op=op)
    assert run.kernels() == [
        "triton.conv_tail",
        "native.conv",
        "native.bn_act",
        "triton.add_act_backward",
        "aten.conv_bn_act",
    ]


def test_a_child_is_ready_once_everything_is_imported() -> None:
    """After that it may be silent for seconds only, and so many children at once import slowly."""
    code = f"""if True:
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        from tools.gpu import child
        child.warm_up(child.REHEARSAL)
        before = set(sys.modules)
        from resnet_fast.dispatch import kernels
        kernels()
        print(sorted(set(sys.modules) - before))"""
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr


def test_a_processors_kernels_are_none_of_a_gpus() -> None:
    """Each would be a process that checks nothing, and seconds of the memory checker's."""
    rows = {case: work() for case, work in check.inventory(Scale(), print)}
    for_processors = [row for id, row in rows.items() if id.startswith("cpu.")]
    assert for_processors
    for row in for_processors:
        assert (row["status"], row["reason"]) == ("absent", "it is for processors")
    assert rows["aten.conv_bn_act"]["status"] == "here"


def test_an_inventory_after_a_build_counts(tmp_path) -> None:
    run = a_run(tmp_path)
    for job, status in (("inventory without extension", "absent"), ("inventory 1234", "here")):
        add_row(run, "inventory", "native.conv", status, job=job, op="conv_bn_act", reason=None)
    assert run.kernels() == ["native.conv"]


# ---------------------------------------------------------------- sanitizer


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
        (
            "========= Target application returned an error\n",
            "left out",
            "no verdict: ========= Target application returned an error",
        ),
    ],
    ids=["right", "wrong", "no verdict"],
)
def test_memory_verdict(text, status, reason) -> None:
    row = stages.memory_verdict(text)
    assert (row["status"], row.get("reason")) == (status, reason)


def fake_sanitizer(folder: Path, text: str) -> None:
    """Write a compute-sanitizer that runs its command, reports ``text`` and exits with an error."""
    tool = folder / "compute-sanitizer"
    tool.write_text(
        f"#!{sys.executable}\nimport subprocess, sys\ni = sys.argv.index('--log-file')\n"
        f"open(sys.argv[i + 1], 'w').write({text!r})\n"
        "sys.exit(subprocess.run(sys.argv[i + 2:]).returncode or 1)\n"
    )
    tool.chmod(0o755)


@pytest.mark.parametrize(
    "text, rows, said",
    [
        pytest.param(
            MEMORY_ERROR,
            [("experimental.mine", "a", "right"), ("experimental.mine", "memcheck", "wrong")],
            None,
            id="an error",
        ),
        pytest.param(
            "========= Error: Device not supported.\n",
            [("experimental.mine", "a", "right")],
            "left out: compute-sanitizer does not support this machine: ========= Error: Device not supported.",
            id="not supported",
        ),
    ],
)
def test_sanitizer_stage(dog, tmp_path, monkeypatch, text, rows, said) -> None:
    fake_sanitizer(tmp_path, text)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(Run, "args", lambda self, **more: {"cases": ["a"]})
    run = a_run(tmp_path, dog)
    for id in ("aten.add_act", "experimental.mine"):
        add_row(run, "inventory", id, "here")
    assert stages.sanitizer(run, soon()) == said
    found = [(row["job"], row["case"], row["status"]) for row in run.ledger.of("sanitizer")]
    assert found == rows


def test_sanitizer_absent(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(stages, "SANITIZER", "no-such-tool")
    assert stages.sanitizer(a_run(tmp_path), soon()) == "left out: no-such-tool is not installed"


# ---------------------------------------------------------------- probe


# Compilers, as shell scripts: $7 is the program to write, $8 the source.
EMULATED = f'exec g++ "$1" "$2" "$3" -I{host_gpu.EMULATION} -o "$7" -x c++ "$8"'
OTHERWISE = (
    'printf "#!/bin/sh\\necho operand a, stride 1024, base offset of the pattern: right from rows 0\\n" > "$7"; '
    'chmod +x "$7"'
)
SLOW = 'printf "#!/bin/sh\\nsleep 60\\n" > "$7"; chmod +x "$7"'
NEEDS_GCC = pytest.mark.skipif(
    host_gpu.compiler() is None, reason="needs a g++ that knows _Float16"
)
FOUND = "matrices that begin inside a pattern of rows are found"
NOT_FOUND = "MATRICES THAT BEGIN INSIDE A PATTERN OF ROWS ARE NOT FOUND: conv_hopper and conv_tail_hopper rest on that"


@pytest.mark.parametrize(
    "compiles, seconds, lines, said",
    [
        pytest.param(EMULATED, 60, 8, FOUND, marks=NEEDS_GCC, id="emulated"),
        pytest.param(OTHERWISE, 60, 1, NOT_FOUND, id="not found"),
        pytest.param(
            "echo no such architecture >&2; exit 1",
            60,
            0,
            "failed: no such architecture",
            id="fails",
        ),
        pytest.param(SLOW, 2, 0, "stopped at its deadline", id="too slow"),
    ],
)
def test_probe_stage(tmp_path, monkeypatch, compiles, seconds, lines, said) -> None:
    compiler = tmp_path / "nvcc"
    compiler.write_text(f"#!/bin/sh\n{compiles}\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(probe, "compiler", lambda: str(compiler))
    run = on_hopper(tmp_path)
    assert stages.probe(run, soon(seconds)) == said
    assert len(run.ledger.of("probe")) == lines
    assert not (tmp_path / "probe").exists()


# ---------------------------------------------------------------- sensors


def fake_smi(folder: Path) -> Path:
    """Write an nvidia-smi of an older driver, with clocks that rise and a throttle reason that comes and goes."""
    tool = folder / "smi"
    tool.write_text(
        "#!/bin/sh\ncase $1 in *clocks_event*) exit 2;; esac\n"
        f"n=$(cat {folder}/n 2>/dev/null || echo 0); echo $((n + 1)) > {folder}/n\n"
        'echo "$((1500 + n)), 3201, 412.5, 55, 0x000000000000000$((n % 2))"\n'
    )
    tool.chmod(0o755)
    return tool


def test_sensors_keep_ranges_and_reasons(tmp_path) -> None:
    tool = fake_smi(tmp_path)
    with Sensors(every=0.02, program=str(tool)) as sensors:
        while len(sensors.readings) < 4:
            time.sleep(0.02)
    seen = sensors.since(0)
    low, high = map(int, seen["clocks.sm"].split(".."))
    assert 1500 <= low < high
    assert seen["power.draw"] == "412.5..412.5"
    assert seen["throttle"] == "0x0000000000000000 0x0000000000000001"


def test_sensors_without_nvidia_smi_have_no_readings() -> None:
    with Sensors(program="absent") as absent:
        assert absent.query("driver_version") is None
    assert absent.since(0) == {}
