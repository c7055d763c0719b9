"""The house keeps its shape: imports point down, each boundary has one file, importing starts nothing."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest
import torch
import torch._inductor

ROOT = Path(__file__).parents[1] / "resnet_fast"
FILES = sorted(ROOT.rglob("*.py"))

# What the files of the core may import from the package when they are loaded (design: user → accelerate → blocks ← models;
# blocks → path → ops → dispatch; kernels register themselves). Everything else stands above them and must not be in a circle.
ONLY = {
    "reference": set(),
    "atomic": set(),
    "problem": set(),
    "_library": set(),
    "fold": {"reference"},
    "dispatch": {"problem"},
    "tables": {"atomic", "problem"},
    "ops": {"reference", "_library", "dispatch"},
    "convolution": {"dispatch", "problem"},
    "path": {"ops", "convolution"},
    "blocks": {"path"},
    "whole": {"dispatch", "fold"},
    "models": {"blocks", "path", "whole"},
    "layers": {"models", "problem"},
    "checkpoint": {"atomic"},
    "testing": {"reference", "dispatch", "layers", "problem"},
    "kernels": {"dispatch", "problem", "fold", "reference"},
}


def module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports(path: Path, *, at_load: bool) -> set[str]:
    """Absolute names of what a file imports; ``at_load`` leaves out what its functions import when they are called."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.Lambda))
        for inner in ast.walk(node)
    }
    package = ("resnet_fast." + module(path)).rstrip(".").split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    found = set()
    for node in ast.walk(tree):
        if at_load and id(node) in inside:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = (
                ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
                if node.level
                else node.module
            )
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def own(path: Path, *, at_load: bool) -> set[str]:
    """The first-level modules of this package among a file's imports."""
    names = {name.split(".")[1] for name in imports(path, at_load=at_load) if name.startswith("resnet_fast.")}
    return {name for name in names if (ROOT / f"{name}.py").is_file() or (ROOT / name).is_dir()}


@pytest.mark.parametrize("path", [path for path in FILES if module(path).split(".")[0] in ONLY], ids=module)
def test_the_core_imports_down(path) -> None:
    name = module(path).split(".")[0]
    used = own(path, at_load=True) - {name}
    assert used <= ONLY[name], (
        f"{module(path)} may import {ONLY[name] or 'nothing of the package'}, not {used - ONLY[name]}"
    )


def test_no_circles() -> None:
    """Modules of the first level form a tree of floors: take away what stands on nothing that is left, until all are gone."""
    stands_on: dict[str, set[str]] = {}
    for path in FILES:
        name = module(path).split(".")[0]
        if name not in ("", "__main__"):
            stands_on.setdefault(name, set()).update(own(path, at_load=True) - {name})
    while stands_on:
        ready = [name for name, below in stands_on.items() if not below & stands_on.keys()]
        assert ready, f"imports in a circle among {sorted(stands_on)}"
        for name in ready:
            del stands_on[name]


def users_of(prefix: str) -> set[str]:
    return {
        module(path)
        for path in FILES
        if any(name == prefix or name.startswith(prefix + ".") for name in imports(path, at_load=False))
    }


def mentions(text: str) -> set[str]:
    """Files whose code (not prose) contains an attribute chain."""
    found = set()
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.Attribute) and ast.unparse(node) == text for node in ast.walk(tree)):
            found.add(module(path))
    return found


def test_one_file_speaks_to_torch_library() -> None:
    assert users_of("torch.library") | mentions("torch.library") == {"_library"}


def test_one_file_imports_the_extension() -> None:
    assert users_of("resnet_fast._C") | users_of("resnet_fast._native") <= {"kernels.native"}


def test_the_reference_stands_on_torch_alone() -> None:
    roots = {name.split(".")[0] for name in imports(ROOT / "reference.py", at_load=False)}
    assert roots == {"__future__", "torch"}


def test_importing_the_package_needs_torch_alone() -> None:
    """Of what ``import resnet_fast`` loads, nothing imports more than torch and the standard library."""
    reached, waiting = set(), [ROOT / "__init__.py"]
    while waiting:
        path = waiting.pop()
        if path in reached:
            continue
        reached.add(path)
        for name in own(path, at_load=True):
            waiting.append(ROOT / f"{name}.py" if (ROOT / f"{name}.py").is_file() else ROOT / name / "__init__.py")
        roots = {name.split(".")[0] for name in imports(path, at_load=True)}
        assert roots <= {"torch", "resnet_fast", *sys.stdlib_module_names}, f"{module(path)} imports {roots} at load"
    assert ROOT / "ops.py" in reached


DEVICE_CALLS = (
    "torch.cuda",
    "torch.accelerator",
    "torch.set_",
    "torch.backends",
    "torch.use_deterministic",
    "torch.manual_seed",
)


def test_nothing_happens_at_load() -> None:
    """No CUDA call, no global flag, nothing printed by a statement that importing runs."""
    for path in FILES:
        if path.name == "__main__.py":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        inside = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, (ast.FunctionDef, ast.Lambda))
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and id(node) not in inside:
                called = ast.unparse(node.func)
                assert not called.startswith(DEVICE_CALLS) and called != "print", (
                    f"{module(path)}:{node.lineno} calls {called} at load"
                )


BESIDE_IT = [path for folder in ("benchmarks", "tools") for path in sorted((ROOT.parent / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", [*FILES, *BESIDE_IT], ids=lambda path: str(path.relative_to(ROOT.parent)))
def test_torch_has_what_is_asked_of_it(path) -> None:
    """Without a GPU nothing else would tell of a name that only a GPU's code asks for. Ops of our own come with their libraries."""
    chains = {
        ast.unparse(node)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
    }
    for chain in chains:
        first, *names = chain.split(".")
        if first == "torch" and all(map(str.isidentifier, names)) and not chain.startswith("torch.ops.resnet_fast"):
            owner = torch
            for name in names:
                assert hasattr(owner, name), f"torch {torch.__version__} has no {chain}"
                owner = getattr(owner, name)


def test_no_exception_is_swallowed() -> None:
    """No bare and no broad except in what runs a model: what a kernel raises, the caller sees."""
    for name in (
        "reference",
        "problem",
        "dispatch",
        "_library",
        "ops",
        "fold",
        "path",
        "blocks",
        "models",
        "kernels/aten",
    ):
        tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None and ast.unparse(node.type) not in ("Exception", "BaseException"), (
                    f"{name}:{node.lineno}"
                )


def test_the_cpu_library_that_was_built_runs() -> None:
    """Else all its tests would be skipped, and nothing be red."""
    from resnet_fast.info import build
    from resnet_fast.kernels import cpu

    if build().get("cpu") == "built":
        assert cpu.available() is None or "processor" in cpu.available()


def test_the_cpu_library_has_the_ops_that_python_asks_for() -> None:
    """Else a good build would count as one of other sources, and every test of it would be skipped."""
    from resnet_fast.kernels import cpu

    source = (ROOT.parent / "csrc" / "cpu" / "library.cpp").read_text()
    defined = dict(re.findall(r'm\.def\(\s*"(\w+)(\([^"]*)"\)', source))
    assert defined == cpu.SCHEMAS
