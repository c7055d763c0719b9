"""The ledger as tables: data first, then Markdown for README and HTML for the page."""

from __future__ import annotations

import html
from collections.abc import Iterable
from dataclasses import dataclass

from ..bench.ledger import Row, Run, newest, parse_case
from ..bench.providers import PROVIDERS
from ..util.text import counted
from .summary import BASE, BASELINES, best_ours, case_order, geometric_mean, in_main_size, regressions, speed_over

TITLES = {"vs_eager": "eager channels_last", "vs_compile": "the best torch.compile mode", "vs_cudnn": "folded + fused"}


@dataclass(frozen=True)
class Table:
    """A heading, a header, rows of text (``**bold**`` allowed), notes; ``words``: the columns that are not numbers."""

    heading: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    words: tuple[int, ...] = (0,)

    def markdown(self) -> str:
        lines = [
            f"**{self.heading}**",
            "",
            "| " + " | ".join(self.header) + " |",
            "|" + "|".join("---" if i in self.words else "---:" for i in range(len(self.header))) + "|",
        ]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes)])

    def html(self) -> str:
        def line(tag: str, cells: Iterable[str]) -> str:
            marked = (
                f"<{tag}{' class=words' if i in self.words else ''}>{_bold(cell)}</{tag}>"
                for i, cell in enumerate(cells)
            )
            return f"<tr>{''.join(marked)}</tr>"

        body = "\n".join(line("td", row) for row in self.rows)
        notes = "".join(f"<p class='note'>{_bold(note)}</p>" for note in self.notes)
        return (
            f"<h3>{_bold(self.heading)}</h3>\n<div class='wide'><table>\n<thead>{line('th', self.header)}</thead>\n"
            f"<tbody>\n{body}\n</tbody></table></div>{notes}"
        )


def _bold(text: str) -> str:
    parts = html.escape(text).split("**")
    return "".join(f"<b>{part}</b>" if i % 2 else part for i, part in enumerate(parts))


def title(provider: str) -> str:
    """A provider's or kernel's name for readers."""
    return PROVIDERS[provider].title if provider in PROVIDERS else provider


def machine_line(run: Run) -> str:
    """Where, when and with what a run was measured."""
    facts = run.machine.facts
    if run.machine.device == "cpu":
        detail = f"{counted(facts.get('threads', '?'), 'thread')}, {facts.get('cpu isa', '?')}"
    else:
        detail = f"driver {facts.get('driver', '?')}"
    return (
        f"{run.machine.name}, {detail}, torch {facts.get('torch', '?')}, commit {run.machine.commit}, "
        f"{run.machine.date[:10]}"
    )


def device_runs(runs: Iterable[Run], device: str) -> list[Run]:
    return [run for run in runs if run.machine.device == device]


# ---------------------------------------------------------------- networks


def model_tables(runs: list[Run], columns: int | None = None) -> list[Table]:
    """One table for each machine, mode, model and dtype: ways to run it down, batches across, the fastest in bold.

    Image sizes other than the one measured most follow in a table of their own. ``columns``: at most so many cases,
    evenly picked from first to last.
    """
    groups: dict[tuple, dict[str, tuple[Run, list[Row]]]] = {}
    for (machine, case), (run, rows) in newest(runs).items():
        if rows[0].level == "model":
            groups.setdefault((machine, *parse_case(case)[:3]), {})[case] = run, rows
    found = []
    for key in sorted(groups, key=lambda key: (key[:2], len(key[2]), key[2:])):
        main = in_main_size(groups[key])
        others = sorted(groups[key].keys() - set(main), key=case_order)
        found += [
            _model_table(*key[1:], {case: groups[key][case] for case in cases}, columns)
            for cases in (main, others)
            if cases
        ]
    return found


def _model_table(
    mode: str, model: str, dtype: str, cases: dict[str, tuple[Run, list[Row]]], columns: int | None
) -> Table:
    order = list(cases)
    if columns is not None and len(order) > columns:
        order = [order[round(i * (len(order) - 1) / (columns - 1))] for i in range(columns)]
    by_provider = {case: {row.provider: row for row in cases[case][1]} for case in order}
    known = list(PROVIDERS)
    ids = sorted(
        {id for found in by_provider.values() for id in found},
        key=lambda id: known.index(id) if id in known else len(known),
    )
    base = BASE[cases[order[0]][0].machine.device]
    sizes = {parse_case(case)[4] for case in order}
    header = [
        f"img/s (× {title(base)})",
        *(_column(case, len(sizes) > 1) for case in order),
        "error ÷ eager's",
        "peak memory",
    ]
    rows = []
    for id in ids:
        mine = [by_provider[case].get(id) for case in order]
        cells = [_cell(row, by_provider[case], base) for row, case in zip(mine, order, strict=True)]
        rows.append((title(id), *cells, _worst_error(mine), _largest([row and row.peak_bytes for row in mine])))
    if all(row[-1] == "–" for row in rows):  # on a CPU memory is measured by cold starts only
        header, rows = header[:-1], [row[:-1] for row in rows]
    places = dict.fromkeys(machine_line(cases[case][0]) for case in order)
    verb = {"infer": "inference", "train": "training step"}[mode]
    size = "" if len(sizes) > 1 else f", {sizes.pop()}²"
    return Table(f"{model}, {verb}, {dtype}{size}", tuple(header), tuple(rows), tuple(f"{place}." for place in places))


def _column(case: str, with_size: bool) -> str:
    *_, batch, size = parse_case(case)
    return f"batch {batch}" + (f", {size}²" if with_size else "")


def _cell(row: Row | None, others: dict[str, Row], base: str) -> str:
    if row is None:
        return "–"
    ratio = 1.0 if row.provider == base else row.speed_over.get(base)
    text = rate(row.img_s) + ("" if ratio is None else f" ({ratio:.2f}×)")
    return f"**{text}**" if row.seconds == min(other.seconds for other in others.values()) else text


def rate(img_s: float) -> str:
    """Images a second, with at least three digits."""
    return f"{img_s:,.0f}" if img_s >= 100 else f"{img_s:.1f}" if img_s >= 10 else f"{img_s:.2f}"


def _worst_error(rows: list[Row | None]) -> str:
    ratios = [row.error / row.eager_error for row in rows if row and row.error is not None and row.eager_error]
    return f"{max(ratios):.2f}" if ratios else "–"


def _largest(found: list[int | None]) -> str:
    present = [value for value in found if value is not None]
    return f"{max(present) / 2**30:.2f} GiB" if present else "–"


def mean_lines(runs: list[Run]) -> list[str]:
    """Geometric means of the fastest of ours over each baseline, one line for each machine."""
    best: dict[str, list[Row]] = {}
    for (machine, _), (_, rows) in sorted(newest(runs).items()):
        ours = best_ours(row for row in rows if row.level == "model")
        if ours is not None:
            best.setdefault(machine, []).append(ours)
    lines = []
    for machine, ours in best.items():
        means = {
            title: geometric_mean(speed_over(row, BASELINES[name]) for row in ours) for name, title in TITLES.items()
        }
        means = {"eager NCHW": geometric_mean(speed_over(row, ("eager-nchw",)) for row in ours), **means}
        parts = [f"{mean:.2f}× {title}" for title, mean in means.items() if mean is not None]
        cases = f"{len(ours)} case" + "s" * (len(ours) != 1)
        lines.append(f"{machine}, fastest of ours, geometric mean over {cases}: {', '.join(parts)}.")
    return lines


def regression_table(runs: list[Run]) -> Table:
    """Every case in which a peer is faster than the fastest of ours, one row each, worst first."""
    total = sum(best_ours(rows) is not None and rows[0].level == "model" for _, rows in newest(runs).values())
    worse: dict[tuple[str, str], list] = {}
    for r in regressions(runs):
        worse.setdefault((r.machine, r.case), []).append(r)
    rows = [
        (case, machine, f"{found[0].speed:.3f}×", ", ".join(title(r.peer) for r in found))
        for (machine, case), found in worse.items()
    ]
    return Table(
        f"Slower than a peer: {len(worse)} of {total} case{'s' * (total != 1)}",
        ("case", "machine", "ours over the fastest", "peers that are faster"),
        tuple(rows),
        words=(0, 1, 3),
    )


# ---------------------------------------------------------------- ops


def op_tables(runs: list[Run]) -> list[Table]:
    """One table for each machine: every problem with eager, the bar and the fastest of ours."""
    machines: dict[str, list[tuple[str, list[Row]]]] = {}
    for (machine, case), (_, rows) in newest(runs).items():
        if rows[0].level == "op":
            machines.setdefault(machine, []).append((case, rows))
    return [_op_table(machine, cases) for machine, cases in sorted(machines.items())]


def _op_table(machine: str, cases: list[tuple[str, list[Row]]]) -> Table:
    rows, worse = [], []
    for case, found in cases:
        by_id = {row.provider: row for row in found}
        best = best_ours(found) or by_id.get("aten.conv_bn_act")
        bar = by_id.get("folded") or by_id["eager"]
        if best is None:
            continue
        speed = best.speed_over.get(bar.provider)
        share = "–" if best.roofline is None else f"{best.roofline:.0%}"
        rows.append(
            (
                short_problem(found[0].problem),
                micro(by_id["eager"]),
                micro(bar),
                micro(best),
                best.provider,
                "–" if speed is None else f"{speed:.2f}×",
                share,
            )
        )
        worse += [case] if speed is not None and speed < 1 else []
    header = ("problem", "eager µs", "folded + fused µs", "ours µs", "kernel", "ours over folded", "roofline")
    note = f"Slower than folded + fused: {len(worse)} of {len(rows)}."
    return Table(f"Single ops, {machine}", header, tuple(rows), (note,), words=(0, 4))


def short_problem(key: str) -> str:
    """A problem's key for readers: "3×3/2 128→128 + residual, 56², batch 256, bf16" for a convolution of stride 2."""
    op, dtype, x, *rest = key.split()
    n, c, h, w = x.split("x")
    marks = {part[0]: part[1:] for part in rest if part[0] in "wsdg" and part[1:2].isdigit()}
    size = f"{h}²" if h == w else f"{h}×{w}"
    tail = f"{size}, batch {n}, {dtype.replace('bfloat', 'bf').replace('float', 'fp')}"
    residual = " + residual" if any(part.startswith("res-") for part in rest) and "add" not in op else ""
    if op != "conv_bn_act":
        return f"{op} {c}{residual}, {tail}"
    k, _, r, s = marks["w"].split("x")
    stride = marks["s"].split("x")[0]
    groups = f", {marks['g']} groups" if marks["g"] != "1" else ""
    return f"{r}×{s}{'' if stride == '1' else '/' + stride} {c}→{k}{residual}{groups}, {tail}"


def micro(row: Row) -> str:
    return f"{row.seconds * 1e6:,.1f}"
