"""The plots of a ledger: img/s against peers, throughput curves and errors; those of layers are in layer_figures."""

from __future__ import annotations

import itertools
from functools import partial

from ..bench.ledger import Row, Run, newest, parse_case
from ..bench.providers import PROVIDERS
from ..testing.rule import FACTOR, GRADIENT_FACTOR
from .layer_figures import layer_times, rooflines
from .plots import Plot, Theme, colour, label_ends, log_scale, scientific_scale, short, slug
from .summary import BASE, Key, groups, in_main_size
from .tables import in_order, rate, spaced

PANELS = 4


def plots(runs: list[Run]) -> list[Plot]:
    """Return every plot that the ledger has data for."""
    return [
        *bars(runs),
        *curves(runs),
        *depths(runs),
        *layer_times(runs),
        *rooflines(runs),
        *errors(runs),
    ]


def heading(machine: str, mode: str, model: str, dtype: str) -> str:
    """Return a plot's title, as "resnet50, inference, bf16 · NVIDIA H200"."""
    verb = "inference" if mode == "infer" else "training"
    return f"{model}, {verb}, {dtype} · {machine}"


# ---------------------------------------------------------------- img/s against peers


def bars(runs: list[Run]) -> list[Plot]:
    """Return a plot for each network on each machine: a panel a batch, at most four, at the size measured most."""
    found = []
    for key, group in sorted(groups(runs).items()):
        cases = spaced(in_main_size(group), PANELS)
        rows = {case: group[case][1] for case in cases}
        all_rows = itertools.chain.from_iterable(rows.values())
        ids = in_order(row.provider for row in all_rows)
        run, _ = group[cases[0]]
        title = heading(*key)
        width = 2.4 + 2.7 * len(cases)
        height = 1.0 + 0.3 * len(ids)
        plot = Plot(
            slug("bars", *key),
            f"Images a second: {title}",
            (width, height),
            partial(_draw_bars, title, rows, ids, run.machine.device),
        )
        found.append(plot)
    return found


def _draw_bars(
    title: str, cases: dict[str, list[Row]], ids: list[str], device: str, figure, theme: Theme
) -> None:
    base = BASE[device]
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    axes = figure.subplots(1, len(cases), sharey=True, squeeze=False)[0]
    names = [short(id) for id in ids]
    for axis, (case, rows) in zip(axes, cases.items(), strict=True):
        axis.set_title(_panel_title(case), fontweight="normal")
        for row in rows:
            y = ids.index(row.provider)
            _draw_bar(axis, y, row, base, theme)
        axis.set_yticks(range(len(names)), names)
        fastest = max(row.batch / row.low for row in rows)
        axis.set_xlim(0, fastest * 1.75)  # room for a label beside the longest bar
        if axis is axes[0]:
            axis.invert_yaxis()
        axis.set_xticks([])
        axis.spines["bottom"].set_visible(False)
    figure.supxlabel(f"images a second · times {short(base)}; whiskers: quartiles", fontsize=8)


def _panel_title(case: str) -> str:
    *_, batch, size = parse_case(case)
    if size == 224:
        return f"batch {batch}"
    return f"batch {batch}, {size}²"


def _draw_bar(axis, y: int, row: Row, base: str, theme: Theme) -> None:
    """Draw a row's img/s with its quartiles and its ratio to the provider ``base``."""
    axis.barh(
        y,
        row.img_s,
        height=0.7,
        color=theme.ours if row.ours else theme.peer,
    )
    slow = row.batch / row.high
    fast = row.batch / row.low
    whiskers = [[row.img_s - slow], [fast - row.img_s]]
    axis.errorbar(row.img_s, y, xerr=whiskers, color=theme.ink, linewidth=0.8)
    ratio = 1.0 if row.provider == base else row.speed_over.get(base)
    label = rate(row.img_s)
    if ratio is not None:
        label += f" · {ratio:.2f}×"
    axis.annotate(
        label,
        (fast, y),
        (4, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
    )


# ---------------------------------------------------------------- curves

LOG_FROM = 10  # a linear axis hides values below a tenth of the largest
LINES = {"ours": "-", "ours-accelerate": (0, (4, 1.5)), "ours-plan": "-", "eager-nchw": (0, (1, 1))}
CURVE_SIZE = (7.5, 4.2)


def curves(runs: list[Run]) -> list[Plot]:
    """Return throughput over batch and over image size, wherever at least three values were measured."""
    found = []
    for key, group in sorted(groups(runs).items()):
        by_size: dict[int, dict[int, list[Row]]] = {}
        by_batch: dict[int, dict[int, list[Row]]] = {}
        for case, (_, rows) in group.items():
            *_, batch, size = parse_case(case)
            by_size.setdefault(size, {})[batch] = rows
            by_batch.setdefault(batch, {})[size] = rows
        for size in sorted(by_size):
            found += _curve("batch", by_size[size], key, size, f"{size}²")
        for batch in sorted(by_batch):
            found += _curve("image size", by_batch[batch], key, batch, f"batch {batch}")
    return found


def _curve(
    name: str, rows: dict[int, list[Row]], key: Key, fixed: int, fixed_text: str
) -> list[Plot]:
    """Return a plot of throughput over ``name``, or none for fewer than three values.

    ``fixed`` and ``fixed_text`` are the value that all rows share, for the file name and for the title.
    """
    if len(rows) < 3:
        return []
    title = f"{heading(*key)}, {fixed_text}"
    plot = Plot(
        slug("curve", name, fixed, *key),
        f"Throughput over {name}: {title}",
        CURVE_SIZE,
        partial(_draw_curve, title, name, rows),
    )
    return [plot]


def depths(runs: list[Run]) -> list[Plot]:
    """Return throughput over depth, wherever at least three of the plain ResNets were measured alike."""
    series: dict[tuple, dict[int, list[Row]]] = {}
    for (machine, mode, model, dtype), group in sorted(groups(runs).items()):
        depth = model.removeprefix("resnet")
        if not depth.isdigit():
            continue
        for case, (_, rows) in group.items():
            *_, batch, size = parse_case(case)
            key = machine, mode, dtype, batch, size
            by_depth = series.setdefault(key, {})
            by_depth[int(depth)] = rows
    found = []
    for (machine, mode, dtype, batch, size), by_depth in series.items():
        if len(by_depth) >= 3:
            title = heading(machine, mode, f"ResNets, batch {batch}, {size}²", dtype)
            plot = Plot(
                slug("curve", "depth", machine, mode, dtype, batch, size),
                f"Throughput over depth: {title}",
                CURVE_SIZE,
                partial(_draw_curve, title, "layers", by_depth),
            )
            found.append(plot)
    return found


def _draw_curve(title: str, name: str, rows: dict[int, list[Row]], figure, theme: Theme) -> None:
    axis = figure.subplots()
    axis.set_title(title)
    ticks = sorted(rows)
    points = []
    for at in ticks:
        points += [(at, row) for row in rows[at]]
    ends = []
    for id in in_order(row.provider for _, row in points):
        line = [(at, row.img_s) for at, row in points if row.provider == id]
        _draw_line(axis, line, id, theme)
        ends.append((line[-1], id))
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [str(at) for at in ticks])
    _scale_speeds(axis, [row.img_s for _, row in points])
    axis.set_xlabel({"image size": "height and width, pixels"}.get(name, name))
    axis.set_ylabel("images a second")
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.grid(axis="y")
    label_ends(axis, ends, theme)


def _draw_line(axis, line: list[tuple[int, float]], id: str, theme: Theme) -> None:
    ours = id not in PROVIDERS or PROVIDERS[id].ours
    axis.plot(
        *zip(*line, strict=True),
        color=colour(id, theme),
        linewidth=2.2 if ours else 1.3,
        marker="o",
        markersize=3.5,
        zorder=3 if ours else 2,
        linestyle=LINES.get(id, "-"),
    )


def _scale_speeds(axis, speeds: list[float]) -> None:
    """Scale the y axis, logarithmically if the speeds are far apart."""
    low = min(speeds)
    high = max(speeds)
    if high > LOG_FROM * low:
        log_scale(axis.yaxis)
        axis.set_ylim(low / 1.3, high * 1.3)
    else:
        axis.set_ylim(0, high * 1.05)


# ---------------------------------------------------------------- errors


def errors(runs: list[Run]) -> list[Plot]:
    """Return each machine's errors as multiples of eager's error in the same case, with the limits of the rule."""
    by_machine: dict[str, list[Row]] = {}
    for (machine, _), (_, rows) in newest(runs).items():
        with_error = [row for row in rows if row.error and row.eager_error]
        if with_error:
            all_rows = by_machine.setdefault(machine, [])
            all_rows += with_error
    found = []
    for machine, rows in sorted(by_machine.items()):
        plot = Plot(
            slug("errors", machine),
            f"Error against float64: {machine}",
            (7.5, 3.8),
            partial(_draw_errors, machine, rows),
        )
        found.append(plot)
    return found


def _draw_errors(machine: str, rows: list[Row], figure, theme: Theme) -> None:
    axis = figure.subplots()
    axis.set_title(f"Error against float64 · {machine}")
    limits = {"allowed: 2× eager's": FACTOR}
    if any(row.case.startswith("train/") for row in rows):
        limits["gradients: 3×"] = GRADIENT_FACTOR
    peers = [row for row in rows if not row.ours]
    ours = [row for row in rows if row.ours]
    _scatter_errors(axis, peers, "peers", theme.peer, zorder=2)
    _scatter_errors(axis, ours, "ours", theme.ours, zorder=3)
    eager_errors = [row.eager_error for row in rows]
    scientific_scale(axis, min(eager_errors) / 2, max(eager_errors) * 2)
    highest = max(row.error / row.eager_error for row in rows)
    axis.set_ylim(0, max(highest, *limits.values()) * 1.1)
    axis.axhline(1, color=theme.ink, linewidth=0.8)
    for text, limit in limits.items():
        _draw_limit(axis, text, limit, theme)
    axis.set_xlabel("eager's own relative error (RMS) in the same case")
    axis.set_ylabel("error ÷ eager's error")
    axis.grid(axis="x")
    axis.legend(loc="upper left", ncols=2, bbox_to_anchor=(0, -0.16), borderaxespad=0)


def _scatter_errors(axis, rows: list[Row], label: str, color: str, zorder: int) -> None:
    axis.scatter(
        [row.eager_error for row in rows],
        [row.error / row.eager_error for row in rows],
        s=20,
        label=label,
        alpha=0.75,
        color=color,
        linewidth=0,
        zorder=zorder,
    )


def _draw_limit(axis, text: str, limit: float, theme: Theme) -> None:
    axis.axhline(limit, color=theme.ink, linewidth=1, linestyle=(0, (4, 3)))
    axis.annotate(
        text,
        (1, limit),
        (-2, 3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        fontsize=8,
    )
