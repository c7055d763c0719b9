"""The report's outputs: README sections between markers, and one self-contained HTML page."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Callable
from pathlib import Path

from ..bench.ledger import Run, newest
from .plots import Plot
from .tables import Table, device_runs, mean_lines, model_tables, op_tables, regression_table

COLUMNS = 6  # cases that fit side by side into a README without scrolling
README_PLOTS = ("bars", "layers", "roofline", "curve")


def fill(text: str, sections: dict[str, Callable[[], str]]) -> str:
    """Replace the text between each ``<!-- report:begin NAME -->`` and ``<!-- report:end NAME -->`` by section NAME.

    Raises ValueError for an unknown NAME and for markers that do not pair.
    """
    begins = re.findall(r"<!-- report:begin (\S+) -->", text)
    ends = re.findall(r"<!-- report:end (\S+) -->", text)
    if begins != ends:
        raise ValueError(
            f"report markers do not pair: begin {', '.join(begins)}; end {', '.join(ends)}"
        )
    for name in begins:
        if name not in sections:
            raise ValueError(f"report marker {name!r} is unknown; known: {', '.join(sections)}")
        before, begin, rest = text.partition(f"<!-- report:begin {name} -->")
        _, end, after = rest.partition(f"<!-- report:end {name} -->")
        text = f"{before}{begin}\n{sections[name]()}\n{end}{after}"
    return text


def sections(runs: list[Run], pictures: list[Plot], folder: str) -> dict[str, Callable[[], str]]:
    """Return the sections for README's markers: ``cpu``, ``gpu``, ``ops`` and ``plots`` (pictures in ``folder``)."""
    cpu_runs = device_runs(runs, "cpu")
    gpu_runs = device_runs(runs, "cuda")
    shown = [plot for plot in pictures if plot.name.startswith(README_PLOTS)]
    return {
        "cpu": lambda: _networks(cpu_runs, "No CPU measurement is in the ledger yet."),
        "gpu": lambda: _networks(gpu_runs, "No GPU measurement is in the ledger yet."),
        "ops": lambda: (
            _tables(op_tables(runs)) or "No measurement of single ops is in the ledger yet."
        ),
        "plots": lambda: "\n".join(_picture(plot, folder) for plot in shown),
    }


def _networks(runs: list[Run], if_none: str) -> str:
    """Return the tables of networks, means, regressions and the commands that measured them; ``if_none`` if empty."""
    tables = model_tables(runs, COLUMNS)
    if not tables:
        return if_none
    worse = regression_table(runs)
    if worse.rows:
        regressions = worse.markdown()
    else:
        regressions = f"{worse.heading}."
    paragraphs = [_tables(tables), *mean_lines(runs), regressions]
    for command in _commands(runs):
        paragraphs.append(f"Regenerate: `{command} && python -m resnet_fast report`.")
    return "\n\n".join(paragraphs)


def _commands(runs: list[Run]) -> list[str]:
    """Return the distinct commands that measured the newest networks, where they are known."""
    commands: dict[str, None] = {}
    for run, rows in newest(runs).values():
        command = run.machine.facts.get("command")
        if rows[0].level == "model" and command:
            commands[command] = None
    return list(commands)


def _tables(tables: list[Table]) -> str:
    """Return the tables in Markdown."""
    texts = [table.markdown() for table in tables]
    return "\n\n".join(texts)


def _picture(plot: Plot, folder: str) -> str:
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{folder}/{plot.name}-dark.png">'
        f'<img alt="{html.escape(plot.caption)}" src="{folder}/{plot.name}-light.png"></picture>'
    )


# ---------------------------------------------------------------- the page

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --paper: #fff; --line: #d0d7de; --soft: #57606a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --paper: #0d1117; --line: #30363d; --soft: #8b949e; } }
body { margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: var(--ink); background: var(--paper);
       font: 15px/1.5 system-ui, sans-serif; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
.words { text-align: left; }
.wide { overflow-x: auto; } .note { color: var(--soft); font-size: 13px; margin: .4rem 0 1.5rem; }
img { max-width: 100%; } figure { margin: 1.5rem 0; } figcaption { color: var(--soft); font-size: 13px; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); } h3 { margin: 1.5rem 0 .5rem; font-size: 1rem; }
nav a { margin-right: 1rem; color: inherit; }
"""


def page(runs: list[Run], pictures: list[Plot], folder: Path) -> str:
    """Return one HTML file with every table, and the plots in ``folder`` embedded, for light and dark."""
    worse = regression_table(runs)
    means = "".join(_paragraph(line) for line in mean_lines(runs))
    if worse.rows:
        regressions = worse.html()
    else:
        regressions = _paragraph(f"{worse.heading}.")
    parts = {
        "Summary": means + regressions,
        "Networks": "\n".join(table.html() for table in model_tables(runs)),
        "Single ops": "\n".join(table.html() for table in op_tables(runs)),
        "Plots": "\n".join(_figure(plot, folder) for plot in pictures),
    }
    links = []
    body = []
    for name, content in parts.items():
        if content:
            anchor = name.split()[0].lower()
            links.append(f'<a href="#{anchor}">{name}</a>')
            body.append(f'<h2 id="{anchor}">{name}</h2>\n{content}')
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>resnet_fast: measurements</title>\n'
        f'<meta name="viewport" content="width=device-width">\n<style>{STYLE}</style></head>\n'
        f"<body><h1>resnet_fast: measurements</h1>\n<nav>{''.join(links)}</nav>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _paragraph(text: str) -> str:
    escaped = html.escape(text)
    return f"<p>{escaped}</p>"


def _figure(plot: Plot, folder: Path) -> str:
    light = _data_url(folder / f"{plot.name}-light.png")
    dark = _data_url(folder / f"{plot.name}-dark.png")
    caption = html.escape(plot.caption)
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img alt="{caption}" src="{light}" loading="lazy"></picture>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _data_url(path: Path) -> str:
    content = path.read_bytes()
    encoded = base64.b64encode(content).decode()
    return f"data:image/png;base64,{encoded}"
