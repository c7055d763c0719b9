"""Budgets that keep the code readable: lines in a file, comprehensions in an expression, syntax in a line.

``make lint`` holds the others: code wrapped at 100 characters, at most 120 in any line (E501), at most 25 statements
in a function (PLR0915).
"""

from __future__ import annotations

import ast
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "resnet_fast").rglob("*.py"))
SOURCES = [
    *PACKAGE,
    *sorted((ROOT / "tools").rglob("*.py")),
    *sorted((ROOT / "benchmarks").glob("*.py")),
    ROOT / "setup.py",
]

LINES_IN_A_FILE = 500
# It was 14.0 when this was first counted; timm has 7.4 by the same measure. The aim is 9: lower it with the code.
NODES_IN_A_LINE = 10.5
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def in_repository(source: Path) -> str:
    return source.relative_to(ROOT).as_posix()


def comprehensions(tree: ast.AST, inside: bool = False) -> Iterator[tuple[ast.expr, bool]]:
    """Every comprehension below ``tree``, and whether another one contains it."""
    for child in ast.iter_child_nodes(tree):
        is_comprehension = isinstance(child, COMPREHENSIONS)
        if is_comprehension:
            yield child, inside
        yield from comprehensions(child, inside or is_comprehension)


def too_dense(tree: ast.AST) -> Iterator[str]:
    """The comprehensions that need names for intermediate results, by line.

    An outermost comprehension may contain one other: two are too many, side by side or nested. Each comprehension has
    one ``for`` and at most one ``if``.
    """
    for found, inside in comprehensions(tree):
        line = found.lineno
        if len(found.generators) > 1:
            yield f"line {line}: {len(found.generators)} for in one comprehension"
        if any(len(generator.ifs) > 1 for generator in found.generators):
            yield f"line {line}: more than one if in one comprehension"
        nested = 0 if inside else sum(1 for _ in comprehensions(found))
        if nested > 1:
            yield f"line {line}: {nested} comprehensions inside another"


def nodes_in_a_line(tree: ast.AST) -> list[float]:
    """For each function, nested ones too: the nodes of its syntax tree over the lines from ``def`` to its end.

    Everything ``ast.walk`` finds counts (names and their contexts, operators, arguments, the docstring), and
    so does every line (the docstring's, comments and blank lines).
    """
    functions = [
        node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    return [
        sum(1 for _ in ast.walk(function)) / (function.end_lineno - function.lineno + 1)
        for function in functions
    ]


@pytest.mark.parametrize("source", SOURCES, ids=in_repository)
def test_file_is_short_and_its_comprehensions_are_plain(source):
    text = source.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LINES_IN_A_FILE
    assert not list(too_dense(ast.parse(text)))


def test_median_function_has_one_thought_in_a_line():
    measured = [
        nodes_in_a_line(ast.parse(source.read_text(encoding="utf-8"))) for source in PACKAGE
    ]
    assert statistics.median(sum(measured, [])) <= NODES_IN_A_LINE


@pytest.mark.parametrize(
    ("expression", "faults"),
    [
        ("[a for a in b if a]", 0),
        ("{a: [c for c in a] for a in b}", 0),
        ("[c for a in b for c in a]", 1),
        ("[a for a in b if a if b]", 1),
        ("[[c for c in a] + [c for c in a] for a in b]", 1),
        ("[[[d for d in c] for c in a] for a in b]", 1),
        ("f([a for a in b], [a for a in b])", 0),
    ],
)
def test_a_comprehension_that_is_too_dense_is_found(expression, faults):
    assert len(list(too_dense(ast.parse(expression)))) == faults
