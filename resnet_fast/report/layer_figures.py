"""The plots of single convolutions: their times end to end, and each under the GPU's roofline."""

from __future__ import annotations

import itertools
import math
from functools import partial

import torch

from ..bench.ledger import Row, Run, newest
from ..bench.providers import DTYPES
from ..models.family import list_models
from ..models.problems import conv_layers
from ..roofline.chips import Ceilings, ceilings
from ..roofline.floor import problem_floor
from .plots import Plot, Theme, log_scale, slug
from .summary import best_ours

# ---------------------------------------------------------------- layers


def conv_rows(runs: list[Run]) -> dict[str, dict[str, list[Row]]]:
    """Return machine → problem key → rows of the single convolutions measured against folded + fused."""
    found: dict[str, dict[str, list[Row]]] = {}
    for (machine, case), (_, rows) in newest(runs).items():
        providers = {row.provider for row in rows}
        if rows[0].level == "op" and "folded" in providers:
            by_key = found.setdefault(machine, {})
            by_key[case.removeprefix("op/")] = rows
    return found


def measured_networks(
    by_key: dict[str, list[Row]], device: str
) -> dict[tuple[str, str, int], list[tuple]]:
    """Return (model, dtype, batch) → (layer, rows) of each layer, for networks whose convolutions were all measured."""
    found = {}
    seen = set()
    all_rows = itertools.chain.from_iterable(by_key.values())
    measured = {(row.dtype, row.batch) for row in all_rows}
    for (dtype, batch), model in itertools.product(sorted(measured), list_models()):
        each = conv_layers(model, batch, 224, DTYPES[dtype], device)
        keys = frozenset(layer.problem.key for layer in each)
        # A deeper network of the same convolutions says nothing new.
        if keys <= by_key.keys() and keys not in seen:
            seen.add(keys)
            network = model, dtype, batch
            found[network] = [(layer, by_key[layer.problem.key]) for layer in each]
    return found


def layer_times(runs: list[Run]) -> list[Plot]:
    """Return the time of every convolution, end to end: ours, folded + fused, and the floor where it is known."""
    devices = {run.machine.name: run.machine.device for run in runs}
    found = []
    for machine, by_key in conv_rows(runs).items():
        networks = measured_networks(by_key, devices[machine])
        for network, each in networks.items():
            model, dtype, batch = network
            title = f"{model}, {dtype}, batch {batch} · {machine}"
            plot = Plot(
                slug("layers", machine, *network),
                f"Convolutions one after the other: {title}",
                (9, 3.0),
                partial(_draw_layers, title, each, limits_of(machine)),
            )
            found.append(plot)
    return found


def limits_of(machine: str) -> Ceilings | None:
    """Return the machine's rates and bandwidth, or None if they are unknown."""
    try:
        return ceilings(machine)
    except LookupError:
        return None


def _draw_layers(
    title: str, each: list[tuple], limits: Ceilings | None, figure, theme: Theme
) -> None:
    axis = figure.subplots()
    axis.set_title(f"Time of all convolutions, one after the other: {title}")
    folded = [_row_of(rows, "folded") for _, rows in each]
    ours = [best_ours(rows) or _row_of(rows, "aten.conv_bn_act") for _, rows in each]
    lanes = {
        "folded + fused": [row.seconds for row in folded],
        "ours": [row.seconds for row in ours],
    }
    if limits is not None:
        lanes["floor"] = [problem_floor(layer.problem, limits).seconds for layer, _ in each]
    stages = [layer.name.split(".")[0] for layer, _ in each]
    total = max(map(sum, lanes.values()))
    for y, seconds in enumerate(lanes.values()):
        _draw_lane(axis, y, stages, seconds, total, theme)
    axis.set_yticks(range(len(lanes)), list(lanes))
    axis.set_ylim(len(lanes) - 0.6, -0.75)
    axis.set_xlim(0, total * 1e3 * 1.1)
    axis.set_xlabel("milliseconds")
    axis.grid(axis="x")


def _draw_lane(
    axis, y: int, stages: list[str], seconds: list[float], total: float, theme: Theme
) -> None:
    """Draw the layers' times one after the other, coloured by stage, with each stage's sum above."""
    names = list(dict.fromkeys(stages))
    sums = dict.fromkeys(names, 0.0)
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
        sums[stage] += value
    axis.text((left + 0.008 * total) * 1e3, y, f"{left * 1e3:.2f} ms", va="center")
    start = 0.0
    for stage, value in sums.items():
        if value > 0.06 * total:
            middle = start + value / 2
            axis.text(
                middle * 1e3,
                y - 0.4,
                f"{stage} {value * 1e3:.2f}",
                ha="center",
                fontsize=7,
            )
        start += value


def _row_of(rows: list[Row], id: str) -> Row:
    """Return a provider's row of one case."""
    return next(row for row in rows if row.provider == id)


# ---------------------------------------------------------------- roofline


def rooflines(runs: list[Run]) -> list[Plot]:
    """Return rooflines of the GPUs with known ceilings: every convolution as a point, ours and folded + fused."""
    found = []
    for machine, by_key in conv_rows(runs).items():
        limits = limits_of(machine)
        if limits is None:
            continue
        all_rows = itertools.chain.from_iterable(by_key.values())
        dtypes = {row.dtype for row in all_rows}
        for dtype in sorted(dtypes):
            problems = [rows for rows in by_key.values() if rows[0].dtype == dtype]
            title = f"{dtype} · {machine}"
            plot = Plot(
                slug("roofline", machine, dtype),
                f"Roofline: {title}",
                (7.5, 4.6),
                partial(_draw_roofline, title, problems, limits, DTYPES[dtype]),
            )
            found.append(plot)
    return found


def _draw_roofline(
    title: str,
    problems: list[list[Row]],
    limits: Ceilings,
    dtype: torch.dtype,
    figure,
    theme: Theme,
) -> None:
    axis = figure.subplots()
    axis.set_title(f"Every convolution under its roof: {title}")
    peak = limits.rates[dtype] / 1e12
    copy = limits.copy / 1e12
    bar = [_row_of(rows, "folded") for rows in problems]
    ours = [row for row in map(best_ours, problems) if row is not None]
    shown = bar + ours
    intensities = [_intensity(row) for row in shown]
    low = min(intensities) / 1.6
    high = max(*intensities, peak / copy) * 1.6
    _draw_roof(axis, low, high, peak, copy, theme)
    _scatter(axis, bar, "o", "folded + fused", theme.peer, theme)
    _scatter(axis, ours, "D", "ours, fastest kernel", theme.ours, theme)
    log_scale(axis.xaxis)
    log_scale(axis.yaxis)
    axis.set_xlim(low, high)
    lowest = min(row.tflops for row in shown)
    axis.set_ylim(lowest / 1.6, peak * 1.8)
    axis.set_xlabel("FLOP for each byte that must be moved")
    axis.set_ylabel("TFLOP/s")
    axis.grid(which="major")
    axis.legend(loc="upper left")  # above the roof, where no point can be


def _intensity(row: Row) -> float:
    """Return the arithmetic intensity: FLOP for each byte."""
    return row.tflops * 1e3 / row.gb_s


def _draw_roof(axis, low: float, high: float, peak: float, copy: float, theme: Theme) -> None:
    """Draw the roof over intensities ``low`` to ``high``: bandwidth ``copy`` in TB/s, then ``peak`` in TFLOP/s."""
    ridge = peak / copy
    x = [low, ridge, high]
    y = [low * copy, peak, peak]
    axis.plot(x, y, color=theme.ink, linewidth=1.4)
    above = [peak * 3] * 3
    axis.fill_between(x, y, above, color=theme.faint, alpha=0.35, lw=0)
    middle = math.sqrt(low * ridge)
    style = {"textcoords": "offset points", "ha": "right", "fontsize": 8}
    axis.annotate(f"{copy:g} TB/s", (middle, middle * copy), (-8, 2), **style)
    axis.annotate(f"{peak:g} TFLOP/s", (high, peak), (-4, 5), **style)


def _scatter(axis, rows: list[Row], marker: str, label: str, color: str, theme: Theme) -> None:
    axis.scatter(
        [_intensity(row) for row in rows],
        [row.tflops for row in rows],
        s=26,
        marker=marker,
        label=label,
        color=color,
        edgecolor=theme.paper,
        linewidth=0.5,
        zorder=2,
    )
