"""Building and installing: what setup.py decides, what the package declares, and what importing it costs."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
import torch

import resnet_fast
from resnet_fast.cli import info
from resnet_fast.dispatch import tables
from resnet_fast.kernels import cpu_library
from tools import toolchain

ROOT = Path(__file__).parents[1]


def load_setup():
    spec = importlib.util.spec_from_file_location("resnet_fast_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


setup = load_setup()
KNOWN = frozenset("7.5 8.0 8.6 8.7 8.9 9.0 10.0 10.3 12.0 12.1".split())  # as nvcc 13.0 lists them
NVCC = toolchain.Compiler(("/opt/nvcc",), "13.0", None, KNOWN)
CXX = toolchain.Compiler(("ccache", "g++"), "g++ 12.2.0", None)
TORCH = toolchain.Torch(Path("/opt/torch"), "2.15.0+cu132", "13.2")


def decide(
    mode: str = "auto",
    system: str = "Linux",
    machine: str = "x86_64",
    torch=TORCH,
    nvcc=NVCC,
    cxx=CXX,
    arch_list=None,
):
    return toolchain.decide(mode, system, machine, torch, nvcc, cxx, arch_list)


def run_python(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**toolchain.os.environ, **env},
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---------------------------------------------------------------- the decision

# What is missing, and part of the sentence that says why there are no CUDA and no CPU kernels; None: they are built.
LACKING = {
    "nothing": ({}, None, None),
    "all wanted": ({"mode": "none"}, "RESNET_FAST_BUILD=none", "RESNET_FAST_BUILD=none"),
    "Linux": (
        {"system": "Darwin", "torch": None},
        "Linux only, this is Darwin",
        "Linux only, this is Darwin",
    ),
    "torch": ({"torch": None}, "torch is not installed", "torch is not installed"),
    "new torch": (
        {"torch": toolchain.Torch(Path("/t"), "2.10.1+cu128", "12.8")},
        "older than 2.11",
        "older than 2.11",
    ),
    "CUDA build of torch": (
        {"torch": toolchain.Torch(Path("/t"), "2.15.0+cpu", None)},
        "not a CUDA build",
        None,
    ),
    "nvcc": ({"nvcc": None}, "nvcc was not found", None),
    "a host compiler for nvcc": (
        {"nvcc": toolchain.Compiler(("/opt/nvcc",), "13.0", "no g++", KNOWN)},
        "/opt/nvcc cannot build .*no g",
        None,
    ),
    "x86-64": ({"machine": "aarch64"}, None, "for x86-64, this is aarch64"),
    "C++ compiler": ({"cxx": None}, None, "no C.. compiler was found"),
    "new C++ compiler": (
        {"cxx": toolchain.Compiler(("cc", "g++"), "g++ 8", "no builtin")},
        None,
        "cc g.. cannot build .* can: no builtin",
    ),
    "both compilers": (
        {"nvcc": None, "cxx": None},
        "nvcc was not found",
        "no C.. compiler was found",
    ),
}


@pytest.mark.parametrize("lack", LACKING)
def test_each_extension_is_built_where_its_toolchain_is_or_says_what_is_missing(lack):
    found, no_cuda, no_cpu = LACKING[lack]
    plan = decide(**found)
    assert plan.extensions == ["_C"] * (no_cuda is None) + ["_cpu"] * (no_cpu is None)
    record = setup.facts(plan)
    for why, sentence, state, told in (
        (plan.no_cuda, no_cuda, "extension", "why"),
        (plan.no_cpu, no_cpu, "cpu", "cpu_why"),
    ):
        assert (
            (record[state], why) == ("built", None)
            if sentence is None
            else re.search(sentence, why)
        )
        assert record[state] == "built" or (record[state], record[told]) == ("not built", why)
    if no_cuda is None:
        assert decide(**found, mode="cuda") == plan
    elif "mode" not in found:
        with pytest.raises(toolchain.BuildError, match=f"^RESNET_FAST_BUILD=cuda: .*{no_cuda}"):
            decide(**found, mode="cuda")
    with pytest.raises(toolchain.BuildError, match="expected auto, cuda or none"):
        decide(**{**found, "mode": "gpu"})


def test_torch_is_found_by_path_and_not_imported():
    found = run_python(
        "import sys; from tools import toolchain; t = toolchain.find_torch(); "
        "print(t.version, t.cuda, t.root); assert 'torch' not in sys.modules"
    ).split()
    assert found == [torch.__version__, str(torch.version.cuda), str(Path(torch.__file__).parent)]


def fake_compiler(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script plays nvcc")
def test_an_nvcc_that_cannot_build_is_seen(tmp_path, monkeypatch):
    nvcc = fake_compiler(
        tmp_path / "bin" / "nvcc",
        """case $1 in
        --version) echo "Cuda compilation tools, release 12.8, V12.8.61";;
        --list-gpu-arch) echo compute_80; echo compute_90;;
        *) echo "nvcc fatal   : unsupported host compiler, an error" >&2; exit 1;;
    esac""",
    )
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    found = toolchain.find_nvcc()
    assert (found.command, found.version, found.archs) == ((str(nvcc),), "12.8", {"8.0", "9.0"})
    assert "unsupported host compiler" in decide(nvcc=found).no_cuda


@pytest.mark.skipif(sys.platform == "win32", reason="shell scripts play compilers")
def test_the_first_cxx_that_works_is_taken_and_one_that_is_named_is_not_replaced(
    tmp_path, monkeypatch
):
    monkeypatch.delenv("CXX", raising=False)
    assert (
        toolchain.platform.machine() != "x86_64"
        or not toolchain.shutil.which("g++")
        or toolchain.find_cxx().fault is None
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    assert toolchain.find_cxx() is None
    old = fake_compiler(
        tmp_path / "c++",
        """case $1 in
        --version) echo "c++ 8.3.0"; echo "Copyright";;
        *) echo "In file included" >&2; echo "probe.cpp:5:1: error: no __builtin_convertvector" >&2; exit 1;;
    esac""",
    )
    assert toolchain.find_cxx() == toolchain.Compiler(
        ("c++",), "c++ 8.3.0", "probe.cpp:5:1: error: no __builtin_convertvector"
    )
    fake_compiler(
        tmp_path / "clang++", """case $1 in --version) echo "clang version 22.1.8";; esac"""
    )
    assert toolchain.find_cxx() == toolchain.Compiler(("clang++",), "clang version 22.1.8", None)
    monkeypatch.setenv("CXX", f"{old} -m64")
    assert toolchain.find_cxx().command == (str(old), "-m64")
    assert toolchain.find_cxx().fault


# ---------------------------------------------------------------- architectures and jobs


def test_default_architectures_are_those_the_compiler_knows():
    defaults = (["8.0+PTX", "8.6", "8.9", "9.0a", "10.0", "12.0"], [])
    assert toolchain.choose_archs(None, KNOWN) == defaults
    older = frozenset({"8.0", "8.6", "9.0"})
    assert toolchain.choose_archs("", older) == (["8.0+PTX", "8.6", "9.0a"], [])


@pytest.mark.parametrize(
    "wanted, archs, sentences",
    [
        ("9.0a", ["9.0a"], []),
        ("8.0;9.0+PTX", ["8.0", "9.0+PTX"], []),
        ("7.5 8.0, 12.0", ["8.0", "12.0"], ["7.5 is left out: the kernels need 8.0 or newer"]),
        ("12.3", ["12.1+PTX"], ["12.3 is unknown to this nvcc: PTX of 12.1 stands in"]),
        ("12.1 12.3", ["12.1+PTX"], ["12.3 is unknown to this nvcc: PTX of 12.1 stands in"]),
        ("Hopper 8.6", ["8.6"], ["Hopper is left out: expected numbers such as"]),
        ("7.0 7.5", [], ["7.0 is left out", "7.5 is left out"]),
    ],
)
def test_an_architecture_that_cannot_be_built_is_left_out_with_a_sentence(wanted, archs, sentences):
    found, left_out = toolchain.choose_archs(wanted, KNOWN)
    assert found == archs
    for sentence, beginning in zip(left_out, sentences, strict=True):
        assert sentence.startswith(beginning)


@pytest.mark.parametrize("wanted", ("7.5", "12.3", "Hopper", "7.5;12.3"))
def test_no_list_of_architectures_stops_an_automatic_build(wanted, tmp_path):
    """Containers set such lists for all packages at once, and GPUs are older or newer than nvcc."""
    plan = decide(arch_list=wanted)
    assert plan.no_cpu is None
    assert bool(plan.archs) == (plan.no_cuda is None) == ("12.3" in wanted)
    if plan.no_cuda:
        assert plan.no_cuda == f"TORCH_CUDA_ARCH_LIST={wanted} names nothing from 8.0 on"
    setup.finish(plan, tmp_path)
    with pytest.raises(toolchain.BuildError, match="^RESNET_FAST_BUILD=cuda: "):
        decide("cuda", arch_list=wanted)


def test_gencode():
    assert toolchain.gencode(["8.0+PTX", "9.0a"]) == [
        "-gencode",
        "arch=compute_80,code=[sm_80,compute_80]",
        "-gencode",
        "arch=compute_90a,code=sm_90a",
    ]


@pytest.mark.parametrize(
    "cores, free, limit, jobs",
    [
        (16, 64.0, None, 16),
        (64, 4.5, None, 4),
        (8, 0.2, None, 1),
        (16, 64.0, "3", 3),
        (2, 0.5, "8", 8),
        (2, 64.0, "0", 1),
    ],
)
def test_jobs_are_what_cores_and_memory_allow_or_the_user_says(cores, free, limit, jobs):
    assert toolchain.choose_jobs(cores, free, limit) == jobs


# ---------------------------------------------------------------- compiling


def test_only_the_host_files_see_torch():
    commands = setup.cuda_commands(TORCH, NVCC, ["8.0"], jobs=4) | setup.cpu_commands(TORCH, CXX)
    names = {
        source: source.relative_to(setup.CSRC).as_posix()
        for source in setup.CSRC.rglob("*")
        if source.is_file()
    }
    sees_torch = {
        names[source]
        for source, command in commands.items()
        if str(TORCH.root / "include") in command
    }
    assert sees_torch == {"library.cpp", "bindings.cpp", "cpu/library.cpp"}
    includes = {
        name: set(re.findall(r'#include [<"](torch|ATen|c10|(?:../)?checks.h)', s.read_text()))
        for s, name in names.items()
    }
    assert {name for name, found in includes.items() if found} == {
        "checks.h",
        "library.cpp",
        "cpu/library.cpp",
    }
    assert {source for source in names if source.suffix in (".cpp", ".cu")} == set(commands)


def test_cpu_kernels_are_compiled_for_their_processors_and_what_asks_the_processor_for_all():
    commands = {source.stem: command for source, command in setup.cpu_commands(TORCH, CXX).items()}
    assert all(command[:3] == ["ccache", "g++", "-c"] for command in commands.values())
    machine = {
        name: {flag for flag in command if flag.startswith("-m")}
        for name, command in commands.items()
    }
    assert machine.pop("library") == set()
    assert {"-mavx512vl", "-mfma"} < machine["avx512"]
    assert machine["avx2"] == {"-mavx2", "-mfma"}
    assert any("TORCH_TARGET_VERSION=0x020b" in flag for flag in commands["library"])


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script plays nvcc")
def test_only_what_changed_is_compiled_again(tmp_path, monkeypatch):
    # A compiler that writes object and dependencies, and counts how often it ran.
    nvcc = fake_compiler(
        tmp_path / "bin" / "nvcc",
        'shift; echo run >> "$(dirname "$0")/runs"; touch "$3"; echo "$3: $1 $(dirname "$1")/header.h" > "$6"',
    )
    source, header = tmp_path / "kernel.cu", tmp_path / "header.h"
    source.touch(), header.touch()
    monkeypatch.setattr(setup, "OBJECTS", tmp_path)

    def compiles(flag: str = "-c") -> bool:
        before = (
            (nvcc.parent / "runs").read_text().count("run")
            if (nvcc.parent / "runs").exists()
            else 0
        )
        setup.compile_one(source, [str(nvcc), flag])
        return (nvcc.parent / "runs").read_text().count("run") > before

    assert compiles()
    assert not compiles()
    made = tmp_path / f"{tmp_path.name}-kernel.cu.o"
    later = made.stat().st_mtime + 10
    toolchain.os.utime(header, (later, later))
    assert compiles()
    toolchain.os.utime(made, (later + 10, later + 10))
    assert not compiles() and compiles("-g"), "another command means another object"


def test_files_of_one_name_have_objects_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "OBJECTS", tmp_path)
    monkeypatch.setattr(setup, "run", lambda command: None)
    sources = [*setup.cuda_commands(TORCH, NVCC, ["8.0"], jobs=4), *setup.cpu_commands(TORCH, CXX)]
    assert len({setup.compile_one(source, ["c++"]) for source in sources}) == len(sources)


# ---------------------------------------------------------------- the record


def test_a_change_of_the_cpu_kernels_leaves_a_gpus_measurements_alone(tmp_path, monkeypatch):
    for name in ("checks.h", "cuda/conv.cu", "cpu/avx2.cpp"):
        (tmp_path / "csrc" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "csrc" / name).write_text(name)
    monkeypatch.setattr(setup, "CSRC", tmp_path / "csrc")

    def measured_with(cxx: toolchain.Compiler, folder: Path) -> tuple[str, str]:
        (folder / "resnet_fast").mkdir(parents=True)
        setup.finish(decide(cxx=cxx), folder)
        record = folder / "resnet_fast" / "_build.json"
        return tables.source_hash((str(record),)), json.loads(record.read_text()).get("cpu_csrc")

    gpu, cpu = measured_with(CXX, tmp_path / "1")
    assert measured_with(None, tmp_path / "2") == (gpu, None)
    (tmp_path / "csrc" / "cpu" / "avx2.cpp").write_text("edited")
    edited = measured_with(CXX, tmp_path / "3")
    assert edited[0] == gpu
    assert edited[1] not in (cpu, None)
    (tmp_path / "csrc" / "cuda" / "conv.cu").write_text("edited")
    after = measured_with(CXX, tmp_path / "4")
    assert after[0] != gpu
    assert after[1] == edited[1]
    (tmp_path / "csrc" / "checks.h").write_text("edited")
    assert measured_with(CXX, tmp_path / "5")[1] != edited[1]


def test_an_extension_of_an_earlier_build_does_not_outlive_the_record(tmp_path):
    package = tmp_path / "resnet_fast"
    package.mkdir()
    for plan, left in (
        (decide(), {"_C.x.so", "_cpu.x.so"}),
        (decide(cxx=None), {"_C.x.so"}),
        (decide(nvcc=None), {"_cpu.x.so"}),
        (decide("none"), set()),
    ):
        (package / "_C.x.so").touch(), (package / "_cpu.x.so").touch()
        setup.finish(plan, tmp_path)
        assert {file.name for file in package.iterdir()} == {*left, "_build.json"}


# ---------------------------------------------------------------- the package


def installed() -> bool:
    return any(importlib.metadata.distributions(name="resnet_fast"))


@pytest.mark.skipif(not installed(), reason="runs from a checkout that is not installed")
def test_metadata():
    found = importlib.metadata.metadata("resnet_fast")
    assert found["Version"] == resnet_fast.__version__
    assert found["Requires-Python"] == ">=3.10"
    required = importlib.metadata.requires("resnet_fast")
    assert [r for r in required if "extra ==" not in r] == ["torch>=2.11"]
    extras = {"vision", "timm", "io", "bench", "report", "docs", "test", "dev"}
    assert set(found.get_all("Provides-Extra")) == extras


def test_the_wheel_holds_the_marker_of_inline_types_and_all_package_data(tmp_path):
    """What ``build_py`` copies is what a wheel holds; ``py.typed`` makes type checkers read our annotations."""
    build = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(
        build,
        cwd=ROOT,
        env={**os.environ, "RESNET_FAST_BUILD": "none"},
        check=True,
        capture_output=True,
    )
    copied = {
        file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*") if file.is_file()
    }
    assert "resnet_fast/py.typed" in copied
    for folder in ("templates", "include"):
        sources = (ROOT / "resnet_fast" / "kernels" / folder).iterdir()
        wanted = {file.relative_to(ROOT).as_posix() for file in sources if file.is_file()}
        assert wanted <= copied


def test_ci_checks_style_and_types_before_it_runs_the_tests():
    commands = [
        line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith("make ")
    ]
    assert commands == ["make lint", "make test"]


def test_lint_checks_style_format_and_types(tmp_path):
    """Asked of make itself: with the stamp there already, it prints what it would run."""
    for stamp in (".python", ".torch", ".lint"):
        (tmp_path / ".venv").mkdir(exist_ok=True)
        (tmp_path / ".venv" / stamp).touch()
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "csrc").mkdir()
    dry = subprocess.run(
        ["make", "-n", "lint"], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    tools = [line.split("/")[-1] for line in dry.splitlines() if line.startswith(".venv/bin/")]
    assert tools == ["ruff check .", "ruff format --check .", "mypy"]


def test_the_version_can_be_read_without_importing_torch():
    tree = ast.parse((ROOT / "resnet_fast" / "__init__.py").read_text())
    literal = {
        node.targets[0].id: node.value for node in tree.body if isinstance(node, ast.Assign)
    }["__version__"]
    assert ast.literal_eval(literal) == resnet_fast.__version__


def test_importing_is_clean_and_brings_only_what_a_first_model_needs():
    """The import prints nothing, does not start CUDA and loads few files, ours and torch's.

    Plans, kernels, measuring and commands are imported when they are first needed, and Triton, torchvision and timm
    only by the code that uses them.
    """
    loaded = json.loads(
        run_python(
            """
import sys, torch
before = set(sys.modules)
import resnet_fast, json
assert not torch.cuda.is_initialized()
print(json.dumps(sorted(name for name in set(sys.modules) - before)))
""",
            PYTHONWARNINGS="error::ImportWarning",
        )
    )
    assert {name.split(".")[0] for name in loaded} <= {"resnet_fast", "torch"}
    ours = [name for name in loaded if name.startswith("resnet_fast")]
    assert len(ours) <= 49, "one more makes every import dearer: can it wait until it is needed?"
    assert len(loaded) - len(ours) <= 3, loaded
    wings = {name.split(".")[1] for name in ours[1:]}
    assert not wings & {"_C", "bench", "cli", "predict", "report", "testing", "tuning"}
    kernel_files = {name.split(".")[2] for name in ours if name.startswith("resnet_fast.kernels.")}
    assert kernel_files <= {"cpu_library", "prepack", "vendor"}  # no family of kernels


def test_info_counts_cpu_kernels_that_do_not_run_among_what_is_missing(monkeypatch):
    why = "the CPU kernels are not built (c++ failed: no such intrinsic): pip install"
    monkeypatch.setattr(cpu_library, "available", lambda: why)
    assert any(
        "oneDNN runs: the CPU kernels are not built (c++ failed: no such intrinsic): pip install"
        in line
        for line in info.missing()
    )


# ---------------------------------------------------------------- a whole build


def test_an_interrupted_link_leaves_no_half_a_library(monkeypatch, tmp_path):
    """Loading one is a bus error, which no sentence can explain."""

    def killed(command):
        Path(command[command.index("-o") + 1]).write_text("half")
        raise KeyboardInterrupt

    builder = object.__new__(setup.BuildExtensions)
    builder.jobs, target = 1, tmp_path / "_cpu.x.so"
    target.write_text("whole")
    monkeypatch.setattr(setup, "OBJECTS", tmp_path)
    monkeypatch.setattr(setup, "plan", lambda: toolchain.Plan(TORCH, None, CXX, "no", None))
    monkeypatch.setattr(setup, "compile_one", lambda source, command: source)
    monkeypatch.setattr(setup, "run", killed)
    builder.get_ext_fullpath = lambda name: str(target)
    with pytest.raises(KeyboardInterrupt):
        builder.build_extension(setup.Extension("resnet_fast._cpu", sources=[]))
    assert target.read_text() == "whole"


def build_here(folder: Path, monkeypatch, plan: toolchain.Plan, mode: str, *failing: str) -> dict:
    """The record of ``setup.py build_ext --inplace`` where an older build is and the compilers fail on ``failing``."""

    def compiler(command: list[str]) -> None:
        target = command[command.index("-o") + 1]
        if any(f"{name}." in target for name in failing):
            raise toolchain.BuildError("c++ failed: avx2.cpp:7:1: error: no such intrinsic")
        Path(target).write_text("new")

    package = folder / "resnet_fast"
    package.mkdir()
    for name in ("__init__.py", "_C.x.so", "_cpu.x.so", "_build.json"):
        (package / name).write_text("old")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("RESNET_FAST_BUILD", mode)
    for name, value in {
        "ROOT": folder,
        "OBJECTS": folder,
        "plan": lambda: plan,
        "compile_one": lambda source, _: source,
        "run": compiler,
    }.items():
        monkeypatch.setattr(setup, name, value)
    extensions = [setup.Extension(f"resnet_fast.{name}", sources=[]) for name in plan.extensions]
    building = setuptools.Distribution(
        {
            "name": "p",
            "packages": ["resnet_fast"],
            "ext_modules": extensions,
            "cmdclass": {"build_ext": setup.BuildExtensions},
        }
    )
    building.get_command_obj("build_ext").inplace = True
    building.run_command("build_ext")
    return json.loads((package / "_build.json").read_text())


def libraries(folder: Path) -> set[str]:
    return {
        f"{file.name.split('.')[0]} {file.read_text()}"
        for file in (folder / "resnet_fast").glob("*.so")
        if ".x." not in file.name
    }


def test_a_build_of_nothing_leaves_neither_the_old_record_nor_old_libraries(tmp_path, monkeypatch):
    record = build_here(tmp_path, monkeypatch, decide("none"), "none")
    assert [record[key] for key in ("extension", "why", "cpu", "cpu_why")] == [
        "not built",
        "RESNET_FAST_BUILD=none",
    ] * 2
    assert not list((tmp_path / "resnet_fast").glob("*.so"))


@pytest.mark.parametrize(
    ("mode", "failing", "built"),
    [
        ("auto", ["_cpu"], {"_C new"}),
        ("auto", ["_C"], {"_cpu new"}),
        ("auto", ["_C", "_cpu"], set()),
        ("cuda", ["_cpu"], {"_C new"}),
    ],
)
def test_what_cannot_be_compiled_after_all_is_left_out_and_the_record_says_so(
    mode, failing, built, tmp_path, monkeypatch, capsys
):
    record = build_here(tmp_path, monkeypatch, decide(), mode, *failing)
    assert libraries(tmp_path) == built
    for name, state, why in (("_C", "extension", "why"), ("_cpu", "cpu", "cpu_why")):
        assert record[state] == ("not built" if name in failing else "built")
        assert ("avx2.cpp:7:1: error: no such intrinsic" in record[why]) == (name in failing)
        assert not (tmp_path / "resnet_fast" / f"{name}.x.so").exists() or name not in failing
    assert capsys.readouterr().out.count("not built: c++ failed: avx2.cpp:7:1") == len(failing)


def test_an_extension_that_was_insisted_on_stops_the_build(tmp_path, monkeypatch):
    with pytest.raises(
        toolchain.BuildError,
        match="^RESNET_FAST_BUILD=cuda: c.. failed: avx2.cpp:7:1: error: no such intrinsic .auto does without",
    ):
        build_here(tmp_path, monkeypatch, decide(), "cuda", "_C")


def fake_python(tmp_path: Path, gpu: str | None, tune: int = 0) -> dict[str, str]:
    """Put a python into ``tmp_path/bin`` that notes its arguments; the environment to find it in.

    ``gpu`` is what torch sees there; ``tune`` is the exit code of tuning.
    """
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text(
        f"""#!/bin/sh
case "$*" in
*visible_gpus*) {f"echo {gpu}" if gpu else "exit 1"}; exit;;
*pip*) echo "$TORCH_CUDA_ARCH_LIST" >> {tmp_path}/archs; exit 1;;
esac
echo "$@" >> {tmp_path}/ran
case "$*" in *tune*) exit {tune};; esac
"""
    )
    python.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    env.pop("TORCH_CUDA_ARCH_LIST", None)
    return env


def make(target: str, tmp_path: Path, env: dict[str, str], *done: str):
    """Run make with that python; what is ``done`` is not made again."""
    made = []
    for name in done:
        made += ["-o", f".venv/{name}"]
    return subprocess.run(
        ["make", target, f"BIN={tmp_path}/bin", *made],
        cwd=ROOT,
        env=env,
        text=True,
        capture_output=True,
    )


COMPARE, TUNE = "-m resnet_fast bench --photos", "-m resnet_fast tune resnet50 --batch 256 1"


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@needs_make
@pytest.mark.parametrize(
    "gpu, tune, ran",
    [
        (None, 0, [COMPARE]),
        ("9.0a", 0, [TUNE, COMPARE]),
        ("8.6", 1, [TUNE, COMPARE]),
        ("9.0a", 3, [*5 * [TUNE], COMPARE]),
    ],
)
def test_a_gpu_is_tuned_before_it_is_compared(tmp_path, gpu, tune, ran) -> None:
    """Again if a kernel broke the device; whatever comes of it, the comparison follows."""
    done = make("bench", tmp_path, fake_python(tmp_path, gpu, tune), ".bench")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ran").read_text().splitlines() == ran


@needs_make
@pytest.mark.parametrize(
    "gpu, wanted, archs",
    [(None, None, "8.0+PTX"), ("7.5 9.0a", None, "7.5 9.0a"), ("9.0a", "8.9", "8.9")],
)
def test_make_builds_for_the_gpus_that_torch_sees_and_without_a_network_says_what_to_do(
    tmp_path, gpu, wanted, archs
) -> None:
    env = fake_python(tmp_path, gpu)
    if wanted:
        env["TORCH_CUDA_ARCH_LIST"] = wanted
    done = make("bench", tmp_path, env, ".torch")
    if "installing" not in done.stdout:
        pytest.skip("this checkout's environment is already made")
    assert done.returncode != 0
    assert (tmp_path / "archs").read_text().split() == archs.split()
    assert "-m resnet_fast bench --photos" in done.stdout
