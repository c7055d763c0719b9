"""Where the report goes: README between its markers, and one HTML file that holds everything."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Callable
from pathlib import Path

from ..bench.ledger import Run, newest
from .plots import Plot
from .tables import Table, device_runs, mean_lines, model_tables, op_tables, regression_table

COLUMNS = 6  # as many cases side by side as a README page shows without scrolling
README_PLOTS = ("bars", "layers", "roofline", "curve")


def fill(text: str, sections: dict[str, Callable[[], str]]) -> str:
    """Replace what stands between ``<!-- report:begin NAME -->`` and ``<!-- report:end NAME -->``, for each such pair.

    Raises ValueError for a NAME that there is no section for, and for a begin without its end.
    """
    begins, ends = (re.findall(rf"<!-- report:{edge} (\S+) -->", text) for edge in ("begin", "end"))
    if begins != ends:
        raise ValueError(f"report markers do not pair: begin {', '.join(begins)}; end {', '.join(ends)}")
    for name in begins:
        if name not in sections:
            raise ValueError(f"report marker {name!r} is unknown; known: {', '.join(sections)}")
        begin, end = (f"<!-- report:{edge} {name} -->" for edge in ("begin", "end"))
        start = text.index(begin) + len(begin)
        text = f"{text[:start]}\n{sections[name]()}\n{text[text.index(end) :]}"
    return text


def sections(runs: list[Run], pictures: list[Plot], folder: str) -> dict[str, Callable[[], str]]:
    """What README's markers can ask for: ``cpu``, ``gpu``, ``ops`` and ``plots`` (pictures in ``folder``)."""
    return {
        "cpu": lambda: _networks(device_runs(runs, "cpu"), "No CPU measurement is in the ledger yet."),
        "gpu": lambda: _networks(device_runs(runs, "cuda"), "No GPU measurement is in the ledger yet."),
        "ops": lambda: _tables(op_tables(runs)) or "No measurement of single ops is in the ledger yet.",
        "plots": lambda: "\n".join(_picture(plot, folder) for plot in pictures if plot.name.startswith(README_PLOTS)),
    }


def _networks(runs: list[Run], nothing: str) -> str:
    tables = model_tables(runs, COLUMNS)
    if not tables:
        return nothing
    worse = regression_table(runs)
    parts = [_tables(tables), *mean_lines(runs), worse.markdown() if worse.rows else f"{worse.heading}."]
    shown = dict.fromkeys(
        run.machine.facts.get("command") for run, rows in newest(runs).values() if rows[0].level == "model"
    )
    return "\n\n".join(
        [*parts, *(f"Regenerate: `{command} && python -m resnet_fast report`." for command in shown if command)]
    )


def _tables(tables: list[Table]) -> str:
    return "\n\n".join(table.markdown() for table in tables)


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
    """One HTML file with every table and picture inside, for light and dark."""
    worse = regression_table(runs)
    means = "".join(f"<p>{html.escape(line)}</p>" for line in mean_lines(runs))
    parts = {
        "Summary": means + (worse.html() if worse.rows else f"<p>{html.escape(worse.heading)}.</p>"),
        "Networks": "\n".join(table.html() for table in model_tables(runs)),
        "Single ops": "\n".join(table.html() for table in op_tables(runs)),
        "Plots": "\n".join(_figure(plot, folder) for plot in pictures),
    }
    filled = {name: body for name, body in parts.items() if body}
    links = "".join(f'<a href="#{name.split()[0].lower()}">{name}</a>' for name in filled)
    body = "\n".join(f'<h2 id="{name.split()[0].lower()}">{name}</h2>\n{part}' for name, part in filled.items())
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>resnet_fast: measurements</title>\n'
        f'<meta name="viewport" content="width=device-width">\n<style>{STYLE}</style></head>\n'
        f"<body><h1>resnet_fast: measurements</h1>\n<nav>{links}</nav>\n{body}\n</body></html>\n"
    )


def _figure(plot: Plot, folder: Path) -> str:
    def data(theme: str) -> str:
        encoded = base64.b64encode((folder / f"{plot.name}-{theme}.png").read_bytes()).decode()
        return f"data:image/png;base64,{encoded}"

    caption = html.escape(plot.caption)
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{data("dark")}">'
        f'<img alt="{caption}" src="{data("light")}" loading="lazy"></picture>'
        f"<figcaption>{caption}</figcaption></figure>"
    )
