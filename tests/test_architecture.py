"""The house keeps its shape: a wing imports only the wings that its row names, and importing starts nothing."""

from __future__ import annotations

import ast
import functools
import re
import sys
from pathlib import Path

import pytest
import torch
import torch._inductor

ROOT = Path(__file__).parents[1] / "resnet_fast"
FILES = sorted(ROOT.rglob("*.py"))

# Each wing and the wings that it may import, at load and inside functions alike. ``cli`` may import all.
MAY_IMPORT = {
    "util": "",
    "data": "",
    "dispatch": "util",
    "roofline": "dispatch",
    "ops": "dispatch",
    "graph": "dispatch util",
    "kernels": "dispatch roofline ops",
    "runtime": "kernels graph ops roofline dispatch util",
    "testing": "ops dispatch",
    "live": "runtime kernels graph ops dispatch util",
    "models": "live graph dispatch util",
    "tuning": "testing live runtime kernels graph dispatch util",
    "planning": "tuning testing runtime graph dispatch util",
    "analysis": "models testing live runtime kernels graph roofline dispatch util",
    "bench": "analysis planning models testing live runtime kernels roofline dispatch data util",
    "predict": "planning models data util",
    "report": "bench models testing roofline dispatch util",
    "cli": "analysis bench data dispatch graph kernels live models ops planning predict report roofline runtime "
    "testing tuning util",
}


def module(path: Path) -> str:
    """The dotted name of a file inside the package; "" for the package itself."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def wing(path: Path) -> str:
    """The first-level folder of a file; "" for the two files at the top."""
    folder = path.relative_to(ROOT).parent
    return folder.parts[0] if folder.parts else ""


def nodes_run_at_load(tree: ast.Module) -> list[ast.AST]:
    """Every node of a module except those inside functions and inside ``if TYPE_CHECKING``."""
    inside = set()
    for node in ast.walk(tree):
        for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if for_types or isinstance(node, (ast.FunctionDef, ast.Lambda)):
            inside |= {id(inner) for inner in ast.walk(node)} - {id(node)}
    return [node for node in ast.walk(tree) if id(node) not in inside]


@functools.cache
def imports(path: Path, *, at_load: bool) -> set[str]:
    """Absolute names of what a file imports; ``at_load`` leaves out imports inside functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = ("resnet_fast." + module(path)).rstrip(".").split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    found = set()
    for node in nodes_run_at_load(tree) if at_load else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1]
            base = ".".join([*above, *filter(None, [node.module])]) if node.level else node.module
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def file_of(name: str) -> Path | None:
    """The file of this package that a dotted name is, or None."""
    first, *rest = name.split(".")
    place = ROOT.joinpath(*rest)
    if first != "resnet_fast":
        return None
    if rest and place.with_suffix(".py").is_file():
        return place.with_suffix(".py")
    return place / "__init__.py" if rest and (place / "__init__.py").is_file() else None


def own_files(path: Path, *, at_load: bool) -> set[Path]:
    """The files of this package that a file imports; ``from ..ops import reference`` imports that file alone."""
    names = imports(path, at_load=at_load)
    files = {name: file for name in names if (file := file_of(name))}
    doors = {name for name, file in files.items() if file.name == "__init__.py"}
    passed = {
        door
        for door in doors
        if inner_names(names, door) and inner_names(names, door) <= files.keys()
    }
    return {file for name, file in files.items() if name not in passed}


def inner_names(names: set[str], door: str) -> set[str]:
    return {name for name in names if name.rpartition(".")[0] == door}


@pytest.mark.parametrize("path", [path for path in FILES if wing(path)], ids=module)
def test_a_wing_imports_only_the_wings_in_its_row(path) -> None:
    used = {wing(file) for file in own_files(path, at_load=False)} - {wing(path)}
    allowed = set(MAY_IMPORT[wing(path)].split())
    assert used <= allowed, (
        f"{module(path)} imports {used - allowed}; {wing(path)} may import {allowed or 'no wing'}"
    )


def test_the_table_names_every_wing() -> None:
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    files = {path.name for path in ROOT.glob("*.py")}
    assert folders == set(MAY_IMPORT)
    assert files == {"__init__.py", "__main__.py"}, "a file belongs in a wing"


def test_the_table_has_no_circle_and_few_levels() -> None:
    below = {name: set(row.split()) for name, row in MAY_IMPORT.items()}
    levels = 0
    while below:
        ready = {name for name, needs in below.items() if not needs & below.keys()}
        assert ready, f"circle among {sorted(below)}"
        below = {name: needs for name, needs in below.items() if name not in ready}
        levels += 1
    assert levels <= 11


def test_no_file_is_in_a_circle_at_load() -> None:
    below = {path: own_files(path, at_load=True) - {path} for path in FILES}
    while below:
        ready = {path for path, needs in below.items() if not needs & below.keys()}
        assert ready, f"circle among {sorted(map(module, below))}"
        below = {path: needs for path, needs in below.items() if path not in ready}


def test_a_wing_begins_with_its_sentence() -> None:
    for name in MAY_IMPORT:
        doc = ast.get_docstring(
            ast.parse((ROOT / name / "__init__.py").read_text(encoding="utf-8"))
        )
        assert doc and doc.splitlines()[0].endswith("."), (
            f"{name}/__init__.py: no sentence says what the wing holds"
        )


def users_of(prefix: str) -> set[str]:
    return {
        module(path)
        for path in FILES
        if any(
            name == prefix or name.startswith(prefix + ".") for name in imports(path, at_load=False)
        )
    }


def mentions(text: str) -> set[str]:
    """Files whose code (not prose) contains an attribute chain."""
    found = set()
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(
            isinstance(node, ast.Attribute) and ast.unparse(node) == text for node in ast.walk(tree)
        ):
            found.add(module(path))
    return found


def test_one_file_speaks_to_torch_library() -> None:
    assert users_of("torch.library") | mentions("torch.library") == {"ops.library"}


def test_one_file_imports_the_extension() -> None:
    assert users_of("resnet_fast._C") | users_of("resnet_fast._native") <= {"kernels.native"}


def test_the_reference_stands_on_torch_alone() -> None:
    roots = {name.split(".")[0] for name in imports(ROOT / "ops" / "reference.py", at_load=False)}
    assert roots <= {"__future__", "collections", "torch"}


def test_importing_the_package_needs_torch_alone() -> None:
    """Of what ``import resnet_fast`` loads, nothing imports more than torch and the standard library."""
    reached, waiting = set(), [ROOT / "__init__.py"]
    while waiting:
        path = waiting.pop()
        if path in reached:
            continue
        reached.add(path)
        waiting += own_files(path, at_load=True)
        roots = {name.split(".")[0] for name in imports(path, at_load=True)}
        assert roots <= {"torch", "resnet_fast", *sys.stdlib_module_names}, (
            f"{module(path)} imports {roots} at load"
        )
    assert ROOT / "ops" / "conv.py" in reached


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
        for node in nodes_run_at_load(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                starts_something = called.startswith(DEVICE_CALLS) or called == "print"
                assert not starts_something, f"{module(path)}:{node.lineno} calls {called} at load"


BESIDE_IT = [
    path
    for folder in ("benchmarks", "tools")
    for path in sorted((ROOT.parent / folder).rglob("*.py"))
]


@pytest.mark.parametrize(
    "path", [*FILES, *BESIDE_IT], ids=lambda path: str(path.relative_to(ROOT.parent))
)
def test_torch_has_what_is_asked_of_it(path) -> None:
    """Every torch.* name in the code exists: no other test without a GPU sees code that only a GPU runs."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
    if not any(alias.name.startswith("torch") for node in imports for alias in node.names):
        return
    chains = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for chain in chains:
        first, *names = chain.split(".")
        if (
            first == "torch"
            and all(map(str.isidentifier, names))
            and not chain.startswith("torch.ops.resnet_fast")
        ):
            owner = torch
            for name in names:
                assert hasattr(owner, name), f"torch {torch.__version__} has no {chain}"
                owner = getattr(owner, name)


@pytest.mark.parametrize("folder", ["dispatch", "ops", "live", "models", "kernels", "runtime"])
def test_no_exception_is_swallowed(folder) -> None:
    """No bare and no broad except in what runs a model: what a kernel raises, the caller sees."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler) and not raises_again(node):
                caught = None if node.type is None else ast.unparse(node.type)
                assert caught not in (None, "Exception", "BaseException"), (
                    f"{module(path)}:{node.lineno}"
                )


def raises_again(handler: ast.ExceptHandler) -> bool:
    return any(isinstance(node, ast.Raise) and node.exc is None for node in ast.walk(handler))


def test_the_cpu_library_that_was_built_runs() -> None:
    """Else all its tests would be skipped, and nothing be red."""
    from resnet_fast.cli.info import build
    from resnet_fast.kernels import cpu_library

    if build().get("cpu") == "built":
        assert cpu_library.available() is None or "processor" in cpu_library.available()


def test_the_cpu_library_has_the_ops_that_python_asks_for() -> None:
    """Else a good build would count as one of other sources, and every test of it would be skipped."""
    from resnet_fast.kernels import cpu_library

    source = (ROOT.parent / "csrc" / "cpu" / "library.cpp").read_text()
    defined = dict(re.findall(r'm\.def\(\s*"(\w+)(\([^"]*)"\)', source))
    assert defined == cpu_library.SCHEMAS
