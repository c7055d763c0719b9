"""The kit: what ``new-kernel`` writes works as it is, and a broken file says what is wrong."""

import importlib.util
import itertools
import os
import re
import subprocess
import sys
import sysconfig
from dataclasses import replace

import host_gpu
import pytest
import torch

from resnet_fast import use
from resnet_fast.__main__ import main
from resnet_fast.cli import new_kernel
from resnet_fast.dispatch.problem import Problem
from resnet_fast.dispatch.registry import named
from resnet_fast.kernels import jit
from resnet_fast.testing.check import check_kernel
from resnet_fast.testing.grids import nasty_problems

ENV = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}


def command(*args, env=ENV):
    return subprocess.run(
        [sys.executable, "-m", "resnet_fast", *args], env=env, capture_output=True, text=True
    )


@pytest.fixture
def written(tmp_path):
    pytest.importorskip("triton", reason="no Triton on this platform")
    return new_kernel.write("mine", "triton", tmp_path)


def test_the_triton_template_is_right(written):
    done = command("check", "--kernel", str(written), "--dtype", "float32")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "experimental.mine" in done.stdout and "right" in done.stdout


def test_a_mistake_in_it_is_found_and_named(written):
    text = written.read_text()
    assert text.count("(k < K)[None, :]\n") == 1
    # drops the remainder of K
    written.write_text(text.replace("TRIPS=triton.cdiv(c, 32)", "TRIPS=c // 32"))
    done = command("check", "--kernel", str(written), "--dtype", "float32")
    assert done.returncode == 1
    assert "WRONG experimental.mine" in done.stdout and "remainder of K" in done.stdout


def test_nothing_is_overwritten(tmp_path, capsys):
    assert main(["new-kernel", "mine", "--cuda", "--folder", str(tmp_path)]) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["mine.cu"]
    assert main(["new-kernel", "mine", "--cuda", "--folder", str(tmp_path)]) == 2
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["Mine", "a-b", "1st", ""])
def test_a_bad_name_is_refused(name, capsys):
    assert main(["new-kernel", name, "--cuda"]) == 2
    assert "expected lower-case" in capsys.readouterr().err


NVCC = pytest.mark.skipif(jit.missing() is not None, reason=f"{jit.missing()}")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of builds for one test."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))


@NVCC
def test_a_cu_file_is_a_kernel_by_itself(tmp_path, cache, registry, monkeypatch, capsys):
    """Built, named, asked what it takes, its code read; without a GPU it is not run, and that is said."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    file = new_kernel.write("built", "cuda", tmp_path)
    (kernel,) = named(str(file))
    assert (
        kernel.id == "experimental.built"
        and kernel.available() == "it builds, but there is no CUDA device"
    )
    one = Problem(
        "conv_bn_act",
        "cuda",
        torch.bfloat16,
        (2, 8, 5, 5),
        "nhwc",
        weight=(16, 8, 1, 1),
        act="relu",
        capability=(9, 0),
    )
    assert kernel.supports(one) is None
    assert "stride 1" in kernel.supports(replace(one, stride=(2, 2)))
    assert "NHWC" in kernel.supports(replace(one, layout="nchw"))
    assert "empty" in kernel.supports(replace(one, x=(0, 8, 5, 5)))
    assert main(["check", "--kernel", str(file)]) == 2
    assert "it builds, but there is no CUDA device" in capsys.readouterr().out
    assert main(["bench", "--kernel", str(file)]) == 0
    said = capsys.readouterr().out
    assert (
        re.search(r"^built<__nv_bfloat16> +\d+ ", said, re.MULTILINE) and "No time is given" in said
    )
    with pytest.raises(RuntimeError, match="cannot run here: it builds"):
        use(str(file))


@NVCC
def test_the_compiler_is_heard_with_the_users_line(tmp_path, cache, capsys):
    file = new_kernel.write("broken", "cuda", tmp_path)
    file.write_text(file.read_text().replace("float acc = 0;", "float acc = oops;"))
    assert main(["check", "--kernel", str(file)]) == 2
    said = capsys.readouterr().err
    assert re.search(
        r"broken\.cu\(\d+\): error: identifier \"oops\" is undefined\n +float acc = oops;", said
    ), said
    assert "Traceback" not in said and "ninja" not in said and "-gencode" not in said


def test_without_a_compiler_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jit, "search_path", lambda: "")
    file = new_kernel.write("unbuilt", "cuda", tmp_path)
    assert main(["check", "--kernel", str(file)]) == 2
    assert "nvcc and ninja not on PATH" in capsys.readouterr().err


@pytest.mark.skipif(
    host_gpu.compiler() is None, reason="needs a g++ that knows _Float16 (12 or later)"
)
def test_the_cuda_template_is_right(tmp_path, registry):
    """The template, its header and its binding, compiled for the CPU: threads one after the other, against float64."""
    from torch.utils import cpp_extension

    file = new_kernel.write("on_cpu", "cuda", tmp_path)
    library = tmp_path / f"on_cpu{sysconfig.get_config_var('EXT_SUFFIX')}"
    includes = [
        jit.INCLUDE,
        host_gpu.EMULATION,
        sysconfig.get_path("include"),
        *cpp_extension.include_paths(),
    ]
    binding = ["-DTORCH_EXTENSION_NAME=on_cpu", "-shared", *(f"-I{folder}" for folder in includes)]
    source = ["-x", "c++", file, "-o", library]
    subprocess.run([host_gpu.compiler(), *host_gpu.FLAGS, *binding, *source], check=True)
    spec = importlib.util.spec_from_file_location("on_cpu", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kernel = jit.register(module, file, lambda: None, device="cpu")
    problems = itertools.chain.from_iterable(
        nasty_problems("conv_bn_act", dtype) for dtype in jit.DTYPES
    )
    grid = [problem for problem in problems if kernel.reason(problem) is None]
    assert len(grid) == 33
    for problem in grid:
        assert check_kernel(kernel, problem).ok, problem.key
