"""The tables of the ledger: as data, as Markdown for README and as HTML for the page."""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..bench.ledger import Row, Run, newest, parse_case
from ..bench.providers import PROVIDERS
from ..util.text import counted
from .summary import (
    BASE,
    BASELINES,
    Group,
    Key,
    best_ours,
    geometric_mean,
    groups,
    in_main_size,
    regressions,
    speed_over,
)

TITLES = {
    "vs_eager": "eager channels_last",
    "vs_compile": "the best torch.compile mode",
    "vs_cudnn": "folded + fused",
}
NOTHING = "–"


@dataclass(frozen=True)
class Table:
    """A heading, a header, rows of text (``**bold**`` allowed) and notes; ``words`` are the columns of text."""

    heading: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    words: tuple[int, ...] = (0,)

    def markdown(self) -> str:
        """Return the table in Markdown."""
        columns = range(len(self.header))
        rules = ["---" if column in self.words else "---:" for column in columns]
        lines = [f"**{self.heading}**", "", _markdown_row(self.header)]
        lines.append(f"|{'|'.join(rules)}|")
        lines += [_markdown_row(row) for row in self.rows]
        lines += [f"\n{note}" for note in self.notes]
        return "\n".join(lines)

    def html(self) -> str:
        """Return the table in HTML."""
        header = self._html_row("th", self.header)
        body = "\n".join(self._html_row("td", row) for row in self.rows)
        notes = "".join(f"<p class='note'>{_bold(note)}</p>" for note in self.notes)
        return (
            f"<h3>{_bold(self.heading)}</h3>\n"
            f"<div class='wide'><table>\n"
            f"<thead>{header}</thead>\n"
            f"<tbody>\n{body}\n</tbody>"
            f"</table></div>{notes}"
        )

    def _html_row(self, tag: str, cells: Iterable[str]) -> str:
        row = ""
        for i, cell in enumerate(cells):
            style = " class=words" if i in self.words else ""
            row += f"<{tag}{style}>{_bold(cell)}</{tag}>"
        return f"<tr>{row}</tr>"


def _markdown_row(cells: Iterable[str]) -> str:
    joined = " | ".join(cells)
    return f"| {joined} |"


def _bold(text: str) -> str:
    """Return the text escaped for HTML, with ``**bold**`` as an element."""
    html_text = ""
    for i, part in enumerate(html.escape(text).split("**")):
        is_bold = i % 2 == 1
        html_text += f"<b>{part}</b>" if is_bold else part
    return html_text


def title(provider: str) -> str:
    """Return a provider's or kernel's name for readers."""
    if provider not in PROVIDERS:
        return provider
    return PROVIDERS[provider].title


def machine_line(run: Run) -> str:
    """Return where, when and with what a run was measured."""
    machine = run.machine
    facts = machine.facts
    if machine.device == "cpu":
        threads = counted(facts.get("threads", "?"), "thread")
        detail = f"{threads}, {facts.get('cpu isa', '?')}"
    else:
        detail = f"driver {facts.get('driver', '?')}"
    parts = [
        machine.name,
        detail,
        f"torch {facts.get('torch', '?')}",
        f"commit {machine.commit}",
        machine.date[:10],
    ]
    return ", ".join(parts)


def device_runs(runs: Iterable[Run], device: str) -> list[Run]:
    """Return the runs on "cpu" or "cuda"."""
    return [run for run in runs if run.machine.device == device]


# ---------------------------------------------------------------- networks


def model_tables(runs: list[Run], columns: int | None = None) -> list[Table]:
    """Return a table for each machine, mode, model and dtype: a row a provider, a column a batch, the fastest in bold.

    Image sizes other than the one measured most are in a table of their own. ``columns`` limits the cases of a table;
    they are evenly spaced from first to last.
    """
    found = []
    by_network = groups(runs)
    for key in sorted(by_network, key=_by_depth):
        group = by_network[key]
        main = in_main_size(group)
        others = [case for case in group if case not in main]
        _, mode, model, dtype = key
        for cases in (main, others):
            if cases:
                shown = {case: group[case] for case in spaced(cases, columns)}
                table = _model_table(mode, model, dtype, shown)
                found.append(table)
    return found


def _by_depth(key: Key) -> tuple:
    """Return a sort key that puts resnet101 after resnet18."""
    machine, mode, model, dtype = key
    return machine, mode, len(model), model, dtype


def spaced(cases: list[str], count: int | None) -> list[str]:
    """Return at most ``count`` cases, evenly spaced from first to last; all if it is None."""
    if count is None or len(cases) <= count:
        return cases
    last = len(cases) - 1
    indices = [round(i * last / (count - 1)) for i in range(count)]
    return [cases[index] for index in indices]


def _model_table(mode: str, model: str, dtype: str, cases: Group) -> Table:
    runs = [run for run, _ in cases.values()]
    by_provider = [_by_provider(rows) for _, rows in cases.values()]
    base = BASE[runs[0].machine.device]
    sizes = {parse_case(case)[4] for case in cases}
    several_sizes = len(sizes) > 1
    header = [f"img/s (× {title(base)})"]
    header += [_column(case, several_sizes) for case in cases]
    header += ["error ÷ eager's", "peak memory"]
    ids = in_order(itertools.chain.from_iterable(by_provider))
    rows = [_model_row(id, by_provider, base) for id in ids]
    if all(row[-1] == NOTHING for row in rows):  # on a CPU only cold starts measure memory
        header = header[:-1]
        rows = [row[:-1] for row in rows]
    places = dict.fromkeys(machine_line(run) for run in runs)
    verb = {"infer": "inference", "train": "training step"}[mode]
    size = "" if several_sizes else f", {sizes.pop()}²"
    return Table(
        f"{model}, {verb}, {dtype}{size}",
        tuple(header),
        tuple(rows),
        tuple(f"{place}." for place in places),
    )


def _by_provider(rows: Iterable[Row]) -> dict[str, Row]:
    """Return the rows of one case by provider id."""
    return {row.provider: row for row in rows}


def _model_row(id: str, cases: list[dict[str, Row]], base: str) -> tuple[str, ...]:
    """Return a provider's cells: its name, a cell for each case, its worst error and its peak memory."""
    rows = [of_case.get(id) for of_case in cases]
    cells = [_cell(of_case.get(id), of_case, base) for of_case in cases]
    measured = [row for row in rows if row is not None]
    return title(id), *cells, _worst_error(measured), _peak_memory(measured)


def in_order(ids: Iterable[str]) -> list[str]:
    """Return distinct provider ids in the order of PROVIDERS, others after them by name."""
    distinct = set(ids)
    known = [id for id in PROVIDERS if id in distinct]
    others = sorted(distinct.difference(known))
    return known + others


def _column(case: str, with_size: bool) -> str:
    """Return the header of a case's column."""
    *_, batch, size = parse_case(case)
    if with_size:
        return f"batch {batch}, {size}²"
    return f"batch {batch}"


def _cell(row: Row | None, of_case: dict[str, Row], base: str) -> str:
    """Return a row's img/s and its ratio to ``base``, bold if it is the fastest of its case."""
    if row is None:
        return NOTHING
    text = rate(row.img_s)
    ratio = 1.0 if row.provider == base else row.speed_over.get(base)
    if ratio is not None:
        text += f" ({ratio:.2f}×)"
    fastest = min(other.seconds for other in of_case.values())
    return f"**{text}**" if row.seconds == fastest else text


def rate(img_s: float) -> str:
    """Return images a second with at least three digits."""
    if img_s >= 100:
        return f"{img_s:,.0f}"
    if img_s >= 10:
        return f"{img_s:.1f}"
    return f"{img_s:.2f}"


def _worst_error(rows: list[Row]) -> str:
    """Return the largest error as a multiple of eager's, as text."""
    ratios = []
    for row in rows:
        if row.error is not None and row.eager_error:
            ratios.append(row.error / row.eager_error)
    if not ratios:
        return NOTHING
    return f"{max(ratios):.2f}"


def _peak_memory(rows: list[Row]) -> str:
    """Return the largest peak memory of the rows, as text."""
    peaks = [row.peak_bytes for row in rows]
    known = [peak for peak in peaks if peak is not None]
    if not known:
        return NOTHING
    gibibytes = max(known) / 2**30
    return f"{gibibytes:.2f} GiB"


def mean_lines(runs: list[Run]) -> list[str]:
    """Return the geometric means of the fastest of ours over each baseline, a line for each machine."""
    best: dict[str, list[Row]] = {}
    for (machine, _), (_, rows) in sorted(newest(runs).items()):
        fastest = best_ours(row for row in rows if row.level == "model")
        if fastest is not None:
            best.setdefault(machine, []).append(fastest)
    lines = []
    for machine, ours in best.items():
        baselines: dict[str, Sequence[str]] = {"eager NCHW": ("eager-nchw",)}
        baselines |= {title: BASELINES[name] for name, title in TITLES.items()}
        parts = []
        for title, ids in baselines.items():
            mean = geometric_mean(speed_over(row, ids) for row in ours)
            if mean is not None:
                parts.append(f"{mean:.2f}× {title}")
        cases = counted(len(ours), "case")
        lines.append(
            f"{machine}, fastest of ours, geometric mean over {cases}: {', '.join(parts)}."
        )
    return lines


def regression_table(runs: list[Run]) -> Table:
    """Return every case in which a peer is faster than the fastest of ours, a row each, worst first."""
    cases = [rows for _, rows in newest(runs).values() if rows[0].level == "model"]
    total = sum(best_ours(rows) is not None for rows in cases)
    worse: dict[tuple[str, str], list] = {}
    for regression in regressions(runs):
        worse.setdefault((regression.machine, regression.case), []).append(regression)
    rows = []
    for (machine, case), found in worse.items():
        peers = ", ".join(title(regression.peer) for regression in found)
        rows.append((case, machine, f"{found[0].speed:.3f}×", peers))
    return Table(
        f"Slower than a peer: {len(worse)} of {counted(total, 'case')}",
        ("case", "machine", "ours over the fastest", "peers that are faster"),
        tuple(rows),
        words=(0, 1, 3),
    )


# ---------------------------------------------------------------- ops


def op_tables(runs: list[Run]) -> list[Table]:
    """Return a table for each machine: every problem with eager, folded + fused and the fastest of ours."""
    machines: dict[str, list[list[Row]]] = {}
    for (machine, _), (_, rows) in newest(runs).items():
        if rows[0].level == "op":
            cases = machines.setdefault(machine, [])
            cases.append(rows)
    return [_op_table(machine, cases) for machine, cases in sorted(machines.items())]


def _op_table(machine: str, cases: list[list[Row]]) -> Table:
    rows = []
    slower = 0
    for of_case in cases:
        by_id = _by_provider(of_case)
        eager = by_id["eager"]
        bar = by_id.get("folded") or eager
        best = best_ours(of_case) or by_id.get("aten.conv_bn_act")
        if best is None:
            continue
        speed = best.speed_over.get(bar.provider)
        is_slower = speed is not None and speed < 1
        if is_slower:
            slower += 1
        cells = (
            short_problem(eager.problem),
            micro(eager),
            micro(bar),
            micro(best),
            best.provider,
            f"{speed:.2f}×" if speed is not None else NOTHING,
            f"{best.roofline:.0%}" if best.roofline is not None else NOTHING,
        )
        rows.append(cells)
    header = (
        "problem",
        "eager µs",
        "folded + fused µs",
        "ours µs",
        "kernel",
        "ours over folded",
        "roofline",
    )
    note = f"Slower than folded + fused: {slower} of {len(rows)}."
    return Table(
        f"Single ops, {machine}",
        header,
        tuple(rows),
        notes=(note,),
        words=(0, 4),
    )


def short_problem(key: str) -> str:
    """Return a problem's key for readers: "3×3/2 128→128 + residual, 56², batch 256, bf16" is a stride of 2."""
    op, dtype, x, *rest = key.split()
    n, c, h, w = x.split("x")
    size = f"{h}²" if h == w else f"{h}×{w}"
    short_dtype = dtype.replace("bfloat", "bf").replace("float", "fp")
    tail = f"{size}, batch {n}, {short_dtype}"
    has_residual = any(part.startswith("res-") for part in rest)
    residual = " + residual" if has_residual and "add" not in op else ""
    if op != "conv_bn_act":
        return f"{op} {c}{residual}, {tail}"
    fields = _conv_fields(rest)
    k, _, r, s = fields["w"].split("x")
    stride = fields["s"].split("x")[0]
    by_stride = "" if stride == "1" else f"/{stride}"
    groups = "" if fields["g"] == "1" else f", {fields['g']} groups"
    return f"{r}×{s}{by_stride} {c}→{k}{residual}{groups}, {tail}"


def _conv_fields(parts: Iterable[str]) -> dict[str, str]:
    """Return weight, stride, dilation and groups of a key's parts: {"w": "64x3x7x7", "s": "2x2", …}."""
    fields = {}
    for part in parts:
        letter = part[0]
        value = part[1:]
        if letter in "wsdg" and value[:1].isdigit():
            fields[letter] = value
    return fields


def micro(row: Row) -> str:
    """Return a row's time in microseconds."""
    return f"{row.seconds * 1e6:,.1f}"
