"""README and docs/: every example runs, every command parses, every link resolves."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import resnet_fast
from resnet_fast.__main__ import main, parser

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
OTHER_PAGES = [ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"]
LANGUAGES = {"python", "bash", "text"}
README_LINES = 110

FENCE = re.compile(r"^```(?P<language>\S*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
# `<!-- needs: cuda -->` or `<!-- needs: some_package -->` on the line before a block.
NEEDS = re.compile(r"<!-- needs: (\w+) -->\n\Z")
LINK = re.compile(r"\]\(([^)\s]+)\)")
PATH = re.compile(r"`((?:benchmarks|csrc|docs|examples|resnet_fast|tests|tools)/[\w./-]*)`")
QUICK = {"info", "new-kernel"}  # every line of these runs, and every line that begins as SMALL does
SMALL = ("explain", "resnet18", "--size", "64")


@dataclass(frozen=True)
class Block:
    """One fenced code block: its page, first line, language, code, and what it needs to run."""

    page: Path
    line: int
    language: str
    code: str
    needs: str | None

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def runnable(self) -> bool:
        if self.needs is None:
            return True
        if self.needs == "cuda":
            return torch.cuda.is_available()
        return importlib.util.find_spec(self.needs) is not None


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        needs = NEEDS.search(text[: match.start()])
        line = text.count("\n", 0, match.start("code")) + 1
        found.append(
            Block(page, line, match["language"], match["code"], needs[1] if needs else None)
        )
    return found


BLOCKS = [block for page in [*PAGES, *OTHER_PAGES] for block in blocks_of(page)]
PYTHON_PAGES = [
    page for page in PAGES if any(block.language == "python" for block in blocks_of(page))
]


def shell_commands() -> Iterator[tuple[str, list[str]]]:
    """Each command of each bash block as (where, words), without comments and environment variables."""
    for block in BLOCKS:
        if block.language != "bash":
            continue
        for line in block.code.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
            lexer.whitespace_split = True
            lexer.commenters = "#"
            yield from ((block.where, words) for words in split_at_operators(list(lexer)))


def split_at_operators(words: list[str]) -> Iterator[list[str]]:
    command: list[str] = []
    for word in [*words, ";"]:
        if set(word) <= set(";&|"):
            if command:
                yield command
            command = []
        elif command or not re.fullmatch(r"[A-Z_]+=.*", word):
            command.append(word)


COMMANDS = list(shell_commands())
OURS = [
    (where, words[words.index("resnet_fast") + 1 :])
    for where, words in COMMANDS
    if "resnet_fast" in words
]
TARGETS = [(where, words[1]) for where, words in COMMANDS if words[0] == "make"]


def ids(commands: list[tuple[str, list[str]]]) -> list[str]:
    return [f"{where} {' '.join(words)}" for where, words in commands]


# ---------------------------------------------------------------- Python


@pytest.mark.parametrize("page", PYTHON_PAGES, ids=lambda page: page.name)
def test_python_blocks_run_in_order(
    page: Path, registry: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks of one page share a namespace; a block whose need is absent here is compiled only."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "docs"}
    for block in blocks_of(page):
        if block.language != "python":
            continue
        code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
        if block.runnable:
            exec(code, namespace)


def test_an_optional_package_is_marked_and_no_other() -> None:
    assert {block.needs for block in BLOCKS} <= {None, "cuda", "timm", "torchvision", "safetensors"}


def test_every_block_has_a_known_language() -> None:
    unknown = [block.where for block in BLOCKS if block.language not in LANGUAGES]
    assert not unknown
    fences = sum(page.read_text(encoding="utf-8").count("\n```") for page in [*PAGES, *OTHER_PAGES])
    assert fences == 2 * len(BLOCKS)


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize(("where", "words"), OURS, ids=ids(OURS))
def test_command_line_parses(where: str, words: list[str]) -> None:
    assert parser().parse_args(words).command == words[0]


def is_quick(words: list[str]) -> bool:
    return words[0] in QUICK or tuple(words[: len(SMALL)]) == SMALL


QUICK_ONES = sorted({tuple(words) for _, words in OURS if is_quick(words)})


@pytest.mark.parametrize("words", QUICK_ONES, ids=" ".join)
def test_quick_command_runs(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(list(words)) == 0
    assert capsys.readouterr().out


def test_pages_show_every_command() -> None:
    commands = parser()._subparsers._group_actions[0].choices
    assert {words[0] for _, words in OURS} == set(commands)


def test_make_targets_exist() -> None:
    targets = sorted({target for _, target in TARGETS})
    assert {"test", "bench"} <= set(targets)
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    for target in targets:
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- pages


def test_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= README_LINES


def anchors(page: Path) -> set[str]:
    headings = re.findall(
        r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE
    )
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings
    }


@pytest.mark.parametrize(
    "page", [*PAGES, *OTHER_PAGES], ids=lambda page: str(page.relative_to(ROOT))
)
def test_relative_links_resolve(page: Path) -> None:
    for link in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in anchors(target), (
            f"{page.name} links to {link}: no such heading"
        )


@pytest.mark.parametrize(
    "page", [*PAGES, *OTHER_PAGES], ids=lambda page: str(page.relative_to(ROOT))
)
def test_named_paths_exist(page: Path) -> None:
    named = PATH.findall(FENCE.sub("", page.read_text(encoding="utf-8")))
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_site_lists_every_page() -> None:
    configuration = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r": ([\w-]+\.md)$", configuration, re.MULTILINE))
    assert listed == {page.name for page in PAGES if page != README}


def test_api_reference_lists_every_public_name() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    listed = re.findall(r"^(?:::: resnet_fast\.|- `)(\w+)`?$", text, re.MULTILINE)
    assert sorted(listed) == sorted(resnet_fast.__all__)


def test_docs_extra_and_makefile_agree() -> None:
    extra = re.search(
        r"^docs = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M | re.S
    )
    needed = re.findall(r'^\s*("[^"]+")', extra[1], re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert needed and all(requirement in makefile for requirement in needed)
