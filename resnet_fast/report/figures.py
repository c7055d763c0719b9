"""What is drawn of a ledger: img/s against peers, throughput over batch, time by layer, rooflines, errors."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial

import torch

from ..bench.ledger import Row, Run, newest, parse_case
from ..bench.providers import DTYPES, PROVIDERS
from ..models.family import list_models
from ..models.problems import layers
from ..roofline.chips import Ceilings, ceilings
from ..roofline.floor import problem_floor
from ..testing.rule import FACTOR, GRADIENT_FACTOR
from .plots import Plot, Theme, colour, short, slug
from .summary import BASE, best_ours, case_order, in_main_size
from .tables import rate

Group = dict[str, tuple[Run, list[Row]]]
PANELS = 4


def plots(runs: list[Run]) -> list[Plot]:
    """Every plot that this ledger has the data for."""
    return [*bars(runs), *curves(runs), *depths(runs), *layer_times(runs), *rooflines(runs), *errors(runs)]


def groups(runs: list[Run]) -> dict[tuple[str, str, str, str], Group]:
    """(machine, mode, model, dtype) → the newest rows of each of its cases, in order."""
    found: dict[tuple[str, str, str, str], Group] = {}
    for (machine, case), (run, rows) in newest(runs).items():
        if rows[0].level == "model":
            found.setdefault((machine, *parse_case(case)[:3]), {})[case] = run, rows
    return {key: dict(sorted(found[key].items(), key=lambda item: case_order(item[0]))) for key in sorted(found)}


def heading(machine: str, mode: str, model: str, dtype: str) -> str:
    return f"{model}, {'inference' if mode == 'infer' else 'training'}, {dtype} · {machine}"


def in_order(ids: Iterable[str]) -> list[str]:
    known = list(PROVIDERS)
    return sorted(set(ids), key=lambda id: (known.index(id) if id in known else len(known), id))


# ---------------------------------------------------------------- img/s against peers


def bars(runs: list[Run]) -> list[Plot]:
    """One picture for each network on each machine: a panel for each of up to four batches, at the size measured most."""
    found = []
    for key, group in groups(runs).items():
        cases = in_main_size(group)
        if len(cases) > PANELS:
            cases = [cases[round(i * (len(cases) - 1) / (PANELS - 1))] for i in range(PANELS)]
        ids = in_order(row.provider for case in cases for row in group[case][1])
        size = (2.4 + 2.7 * len(cases), 1.0 + 0.3 * len(ids))
        draw = partial(
            _draw_bars, heading(*key), {case: group[case][1] for case in cases}, ids, group[cases[0]][0].machine.device
        )
        found.append(Plot(slug("bars", *key), f"Images a second: {heading(*key)}", size, draw))
    return found


def _draw_bars(title: str, cases: dict[str, list[Row]], ids: list[str], device: str, figure, theme: Theme) -> None:
    base = BASE[device]
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    for axis, (case, rows) in zip(
        figure.subplots(1, len(cases), sharey=True, squeeze=False)[0], cases.items(), strict=True
    ):
        by_id = {row.provider: row for row in rows}
        *_, batch, size = parse_case(case)
        axis.set_title(f"batch {batch}" + ("" if size == 224 else f", {size}²"), fontweight="normal")
        for i, id in enumerate(ids):
            row = by_id.get(id)
            if row is None:
                continue
            axis.barh(i, row.img_s, 0.7, color=theme.ours if row.ours else theme.peer)
            error = [[row.img_s - row.batch / row.high], [row.batch / row.low - row.img_s]]
            axis.errorbar(row.img_s, i, xerr=error, color=theme.ink, linewidth=0.8)
            ratio = 1.0 if id == base else row.speed_over.get(base)
            label = rate(row.img_s) + ("" if ratio is None else f" · {ratio:.2f}×")
            axis.annotate(label, (row.batch / row.low, i), (4, 0), textcoords="offset points", va="center", fontsize=8)
        axis.set_yticks(range(len(ids)), [short(id) for id in ids])
        axis.set_xlim(0, max(row.batch / row.low for row in rows) * 1.75)  # a label beside the longest bar
        axis.invert_yaxis() if axis is figure.axes[0] else None
        axis.set_xticks([])
        axis.spines["bottom"].set_visible(False)
    figure.supxlabel(f"images a second · times {short(base)}; whiskers: quartiles", fontsize=8)


# ---------------------------------------------------------------- curves


def curves(runs: list[Run]) -> list[Plot]:
    """Throughput over batch or over image size, wherever there are at least three."""
    found = []
    for key, group in groups(runs).items():
        parsed = {case: parse_case(case) for case in group}
        for name, index, fixed in (("batch", 3, 4), ("image size", 4, 3)):
            for value in sorted({p[fixed] for p in parsed.values()}):
                chosen = {p[index]: group[case][1] for case, p in parsed.items() if p[fixed] == value}
                if len(chosen) >= 3:
                    held = f"{value}²" if fixed == 4 else f"batch {value}"
                    draw = partial(_draw_curve, f"{heading(*key)}, {held}", name, chosen)
                    caption = f"Throughput over {name}: {heading(*key)}, {held}"
                    found.append(Plot(slug("curve", name, value, *key), caption, (7.5, 4.2), draw))
    return found


def depths(runs: list[Run]) -> list[Plot]:
    """Throughput over depth, wherever at least three of the plain ResNets were measured alike."""
    alike: dict[tuple, dict[int, list[Row]]] = {}
    for (machine, mode, model, dtype), group in groups(runs).items():
        if model.removeprefix("resnet").isdigit():
            for case, (_, rows) in group.items():
                key = machine, mode, dtype, *parse_case(case)[3:]
                alike.setdefault(key, {})[int(model.removeprefix("resnet"))] = rows
    found = []
    for (machine, mode, dtype, batch, size), rows in alike.items():
        if len(rows) >= 3:
            title = heading(machine, mode, f"ResNets, batch {batch}, {size}²", dtype)
            name = slug("curve", "depth", machine, mode, dtype, batch, size)
            draw = partial(_draw_curve, title, "layers", rows)
            found.append(Plot(name, f"Throughput over depth: {title}", (7.5, 4.2), draw))
    return found


def _draw_curve(title: str, name: str, rows: dict[int, list[Row]], figure, theme: Theme) -> None:
    axis = figure.subplots()
    axis.set_title(title)
    ends = []
    for id in in_order(row.provider for found in rows.values() for row in found):
        line = [(at, row.img_s) for at, found in sorted(rows.items()) for row in found if row.provider == id]
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
        ends.append((line[-1], id))
    axis.set_xscale("log", base=2)
    axis.set_xticks(sorted(rows), [str(at) for at in sorted(rows)])
    speeds = [row.img_s for found in rows.values() for row in found]
    if max(speeds) > LOG_FROM * min(speeds):
        log_scale(axis.yaxis)
        axis.set_ylim(min(speeds) / 1.3, max(speeds) * 1.3)
    else:
        axis.set_ylim(0, max(speeds) * 1.05)
    axis.set_xlabel({"image size": "height and width, pixels"}.get(name, name))
    axis.set_ylabel("images a second")
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.grid(axis="y")
    label_ends(axis, ends, theme)


LOG_FROM = 10  # a linear axis hides what is less than a tenth of the largest
LINES = {"ours": "-", "ours-accelerate": (0, (4, 1.5)), "ours-plan": "-", "eager-nchw": (0, (1, 1))}


def log_scale(axis) -> None:
    """A logarithmic axis (``axes.xaxis`` or ``.yaxis``) with plain numbers at 1, 2 and 5 of each decade."""
    from matplotlib.ticker import LogLocator, NullLocator

    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")


def label_ends(axis, ends: list[tuple[tuple[float, float], str]], theme: Theme) -> None:
    """Names at the right ends of the lines, moved apart where they would overlap, within the height of the axes."""
    ends = sorted(ends, key=lambda end: end[0][1])
    axis.autoscale(False)
    height = (axis.transData + axis.transAxes.inverted()).transform
    wanted = [height(end)[1] for end, _ in ends]
    gap = min(0.054, 1 / max(len(ends) - 1, 1))
    places = spread(wanted, gap)
    # Where many lines end low or high, the names nevertheless stay beside the picture.
    shift = max(0.0, -places[0]) or min(0.0, 1 - places[-1])
    for ((x, y), id), at in zip(ends, places, strict=True):
        line = {
            "arrowstyle": "-",
            "color": colour(id, theme),
            "linewidth": 0.5,
            "relpos": (0, 0.5),
            "shrinkA": 1,
            "shrinkB": 3,
        }
        axis.annotate(
            short(id),
            (x, y),
            (1.04, at + shift),
            textcoords="axes fraction",
            va="center",
            fontsize=8,
            color=colour(id, theme),
            annotation_clip=False,
            arrowprops=line,
        )


def spread(wanted: list[float], gap: float) -> list[float]:
    """The places nearest to the sorted ``wanted`` that are ``gap`` apart: isotonic regression of wanted − i·gap."""
    blocks: list[tuple[float, int]] = []
    for i, y in enumerate(wanted):
        mean, n = y - i * gap, 1
        while blocks and blocks[-1][0] >= mean:
            before, m = blocks.pop()
            mean, n = (before * m + mean * n) / (m + n), m + n
        blocks.append((mean, n))
    flat = [mean for mean, n in blocks for _ in range(n)]
    return [mean + i * gap for i, mean in enumerate(flat)]


# ---------------------------------------------------------------- layers


def conv_rows(runs: list[Run]) -> dict[str, dict[str, list[Row]]]:
    """Machine → problem key → rows, of the single convolutions that were measured against the bar."""
    found: dict[str, dict[str, list[Row]]] = {}
    for (machine, case), (_, rows) in newest(runs).items():
        if rows[0].level == "op" and any(row.provider == "folded" for row in rows):
            found.setdefault(machine, {})[case.removeprefix("op/")] = rows
    return found


def measured_networks(by_key: dict[str, list[Row]], device: str) -> dict[tuple[str, str, int], list[tuple]]:
    """(model, dtype, batch) → its layers and their rows, of every network whose convolutions were all measured."""
    found, seen = {}, set()
    for dtype, batch in sorted({(row.dtype, row.batch) for rows in by_key.values() for row in rows}):
        for model in list_models():
            each = layers(model, batch, 224, DTYPES[dtype], device)
            keys = frozenset(layer.problem.key for layer in each)
            # A deeper network made of the same convolutions says nothing new.
            if keys <= by_key.keys() and keys not in seen:
                seen.add(keys)
                found[model, dtype, batch] = [(layer, by_key[layer.problem.key]) for layer in each]
    return found


def layer_times(runs: list[Run]) -> list[Plot]:
    """Where the time goes: every convolution end to end, ours over the bar, and the floor where it is known."""
    devices = {run.machine.name: run.machine.device for run in runs}
    found = []
    for machine, by_key in conv_rows(runs).items():
        for (model, dtype, batch), each in measured_networks(by_key, devices[machine]).items():
            title = f"{model}, {dtype}, batch {batch} · {machine}"
            draw = partial(_draw_layers, title, each, limits_of(machine))
            caption = f"Convolutions one after the other: {title}"
            found.append(Plot(slug("layers", machine, model, dtype, batch), caption, (9, 3.0), draw))
    return found


def limits_of(machine: str) -> Ceilings | None:
    try:
        return ceilings(machine)
    except LookupError:
        return None


def _draw_layers(title: str, each: list[tuple], limits: Ceilings | None, figure, theme: Theme) -> None:
    axis = figure.subplots()
    axis.set_title(f"Time of all convolutions, one after the other: {title}")
    lanes = {
        "folded + fused": [_by_id(rows, "folded").seconds for _, rows in each],
        "ours": [(best_ours(rows) or _by_id(rows, "aten.conv_bn_act")).seconds for _, rows in each],
    }
    if limits is not None:
        lanes["floor"] = [problem_floor(layer.problem, limits).seconds for layer, _ in each]
    stages = [layer.name.split(".")[0] for layer, _ in each]
    names = list(dict.fromkeys(stages))
    total = max(map(sum, lanes.values()))
    for y, seconds in enumerate(lanes.values()):
        left = 0.0
        for stage, value in zip(stages, seconds, strict=True):
            axis.barh(
                y,
                value * 1e3,
                0.62,
                left * 1e3,
                color=theme.stages[names.index(stage)],
                edgecolor=theme.paper,
                linewidth=0.5,
            )
            left += value
        axis.text((left + 0.008 * total) * 1e3, y, f"{left * 1e3:.2f} ms", va="center")
        start = 0.0
        for stage in names:
            part = sum(value for at, value in zip(stages, seconds, strict=True) if at == stage)
            if part > 0.06 * total:
                axis.text((start + part / 2) * 1e3, y - 0.4, f"{stage} {part * 1e3:.2f}", ha="center", fontsize=7)
            start += part
    axis.set_yticks(range(len(lanes)), list(lanes))
    axis.set_ylim(len(lanes) - 0.6, -0.75)
    axis.set_xlim(0, total * 1e3 * 1.1)
    axis.set_xlabel("milliseconds")
    axis.grid(axis="x")


def _by_id(rows: list[Row], id: str) -> Row:
    return next(row for row in rows if row.provider == id)


# ---------------------------------------------------------------- roofline


def rooflines(runs: list[Run]) -> list[Plot]:
    """Every convolution as a point under the roof of a GPU whose ceilings are known: ours and the bar."""
    found = []
    for machine, by_key in conv_rows(runs).items():
        limits = limits_of(machine)
        for dtype in sorted({row.dtype for rows in by_key.values() for row in rows}) if limits else ():
            chosen = [rows for rows in by_key.values() if rows[0].dtype == dtype]
            title = f"{dtype} · {machine}"
            draw = partial(_draw_roofline, title, chosen, limits, DTYPES[dtype])
            found.append(Plot(slug("roofline", machine, dtype), f"Roofline: {title}", (7.5, 4.6), draw))
    return found


def _draw_roofline(
    title: str, problems: list[list[Row]], limits: Ceilings, dtype: torch.dtype, figure, theme: Theme
) -> None:
    axis = figure.subplots()
    axis.set_title(f"Every convolution under its roof: {title}")
    peak, copy = limits.rates[dtype] / 1e12, limits.copy / 1e12
    shown = {
        "folded + fused": [_by_id(rows, "folded") for rows in problems],
        "ours, fastest kernel": [row for row in map(best_ours, problems) if row is not None],
    }
    drawn = [row for rows in shown.values() for row in rows]
    intensity = [row.tflops * 1e3 / row.gb_s for row in drawn]
    low, high = min(intensity) / 1.6, max(*intensity, peak / copy) * 1.6
    ridge = peak / copy
    axis.plot([low, ridge, high], [low * copy, peak, peak], color=theme.ink, linewidth=1.4)
    axis.fill_between([low, ridge, high], [low * copy, peak, peak], [peak * 3] * 3, color=theme.faint, alpha=0.35, lw=0)
    for (name, rows), marker, tone in zip(shown.items(), "oD", (theme.peer, theme.ours), strict=True):
        axis.scatter(
            [row.tflops * 1e3 / row.gb_s for row in rows],
            [row.tflops for row in rows],
            s=26,
            marker=marker,
            label=name,
            color=tone,
            edgecolor=theme.paper,
            linewidth=0.5,
            zorder=2,
        )
    for scale in (axis.xaxis, axis.yaxis):
        log_scale(scale)
    axis.set_xlim(low, high)
    axis.set_ylim(min(row.tflops for row in drawn) / 1.6, peak * 1.8)
    middle = math.sqrt(low * ridge)
    labels = {f"{copy:g} TB/s": ((middle, middle * copy), (-8, 2)), f"{peak:g} TFLOP/s": ((high, peak), (-4, 5))}
    for text, (at, offset) in labels.items():
        axis.annotate(text, at, offset, textcoords="offset points", ha="right", fontsize=8)
    axis.set_xlabel("FLOP for each byte that must be moved")
    axis.set_ylabel("TFLOP/s")
    axis.grid(which="major")
    axis.legend(loc="upper left")  # above the roof, where no point can be


# ---------------------------------------------------------------- errors


def errors(runs: list[Run]) -> list[Plot]:
    """Error of every row as a multiple of eager's own in the same case, over eager's, with the line that the rule draws."""
    found = []
    for machine in sorted({run.machine.name for run in runs}):
        rows = [
            row
            for (name, _), (_, rows) in newest(runs).items()
            if name == machine
            for row in rows
            if row.error and row.eager_error
        ]
        if rows:
            found.append(
                Plot(
                    slug("errors", machine),
                    f"Error against float64: {machine}",
                    (7.5, 3.8),
                    partial(_draw_errors, machine, rows),
                )
            )
    return found


def _draw_errors(machine: str, rows: list[Row], figure, theme: Theme) -> None:
    axis = figure.subplots()
    axis.set_title(f"Error against float64 · {machine}")
    limits = {"allowed: 2× eager's": FACTOR}
    if any(row.case.startswith("train/") for row in rows):
        limits["gradients: 3×"] = GRADIENT_FACTOR
    for ours, name in ((False, "peers"), (True, "ours")):
        chosen = [row for row in rows if row.ours is ours]
        axis.scatter(
            [row.eager_error for row in chosen],
            [row.error / row.eager_error for row in chosen],
            s=20,
            label=name,
            alpha=0.75,
            color=theme.ours if ours else theme.peer,
            linewidth=0,
            zorder=3 if ours else 2,
        )
    values = [row.eager_error for row in rows]
    axis.set_xscale("log")
    axis.set_xlim(min(values) / 2, max(values) * 2)
    ticks = [10.0**e * m for e in range(-20, 3) for m in (1, 2, 5) if min(values) / 2 <= 10.0**e * m <= max(values) * 2]
    axis.set_xticks(ticks, [f"{tick:.0e}".replace("e-0", "e-") for tick in ticks], minor=False)
    axis.minorticks_off()
    axis.set_ylim(0, max(*limits.values(), *(row.error / row.eager_error for row in rows)) * 1.1)
    axis.axhline(1, color=theme.ink, linewidth=0.8)
    for text, at in limits.items():
        axis.axhline(at, color=theme.ink, linewidth=1, linestyle=(0, (4, 3)))
        axis.annotate(
            text,
            (1, at),
            (-2, 3),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            fontsize=8,
        )
    axis.set_xlabel("eager's own relative error (RMS) in the same case")
    axis.set_ylabel("error ÷ eager's error")
    axis.grid(axis="x")
    axis.legend(loc="upper left", ncols=2, bbox_to_anchor=(0, -0.16), borderaxespad=0)
