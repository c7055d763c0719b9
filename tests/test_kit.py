"""The kit: what ``new-kernel`` writes works as it is, and a broken file says what is wrong."""

import os
import shutil
import subprocess
import sys

import pytest

from resnet_fast import new_kernel
from resnet_fast.__main__ import main
from resnet_fast.dispatch import find, load_file
from resnet_fast.kernels import runtime

ENV = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}


def command(*args, env=ENV):
    return subprocess.run([sys.executable, "-m", "resnet_fast", *args], env=env, capture_output=True, text=True)


@pytest.fixture
def written(tmp_path):
    pytest.importorskip("triton", reason="no Triton on this platform")
    return new_kernel.write("mine", "triton", tmp_path)[0]


def test_the_triton_template_is_right(written):
    done = command("check", "--kernel", str(written), "--dtype", "float32")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "experimental.mine" in done.stdout and "right" in done.stdout


def test_a_mistake_in_it_is_found_and_named(written):
    text = written.read_text()
    assert text.count("(k < K)[None, :]\n") == 1
    written.write_text(text.replace("TRIPS=triton.cdiv(c, 32)", "TRIPS=c // 32"))  # drops the remainder of K
    done = command("check", "--kernel", str(written), "--dtype", "float32")
    assert done.returncode == 1
    assert "WRONG experimental.mine" in done.stdout and "remainder of K" in done.stdout


def test_nothing_is_overwritten(tmp_path, capsys):
    assert main(["new-kernel", "mine", "--cuda", "--folder", str(tmp_path)]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"mine.cu", "mine.py"}
    assert main(["new-kernel", "mine", "--triton", "--folder", str(tmp_path)]) == 2
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["Mine", "a-b", "1st", ""])
def test_a_bad_name_is_refused(name, capsys):
    assert main(["new-kernel", name, "--cuda"]) == 2
    assert "expected lower-case" in capsys.readouterr().err


def test_the_cuda_template_registers(tmp_path):
    new_kernel.write("registered", "cuda", tmp_path)
    load_file(tmp_path / "registered.py")
    assert find("experimental.registered").op == "conv_bn_act"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
def test_the_cuda_template_builds_and_a_broken_one_names_its_line(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"])
    source = next(p for p in new_kernel.write("built", "cuda", tmp_path) if p.suffix == ".cu")
    assert callable(runtime.build(source).launch)
    broken = next(p for p in new_kernel.write("broken", "cuda", tmp_path) if p.suffix == ".cu")
    broken.write_text(broken.read_text().replace("float acc = 0;", "float acc = oops;"))
    with pytest.raises(RuntimeError, match=r"broken\.cu\(\d+\): error: identifier \"oops\" is undefined"):
        runtime.build(broken)
