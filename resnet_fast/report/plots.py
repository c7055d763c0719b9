"""Plot files: each picture drawn for light and for dark pages. Needs matplotlib (the extra ``report``)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .tables import title


@dataclass(frozen=True)
class Theme:
    """Colours on one background; ``ours`` stands out, the peers are muted."""

    name: str
    paper: str
    ink: str
    faint: str
    ours: str
    peer: str
    peers: tuple[str, ...]
    stages: tuple[str, ...]


LIGHT = Theme(
    "light",
    "#ffffff",
    "#1f2328",
    "#d0d7de",
    "#d1480f",
    "#8c959f",
    (
        "#8c959f",
        "#57606a",
        "#0969da",
        "#8250df",
        "#54aeff",
        "#1a7f37",
        "#bf8700",
        "#bf3989",
        "#0f766e",
    ),
    ("#6e7781", "#0969da", "#1a7f37", "#bf8700", "#8250df"),
)
DARK = Theme(
    "dark",
    "#0d1117",
    "#e6edf3",
    "#30363d",
    "#ff8552",
    "#7d8590",
    (
        "#8b949e",
        "#b1bac4",
        "#58a6ff",
        "#bc8cff",
        "#a5d6ff",
        "#56d364",
        "#e3b341",
        "#ff7bb5",
        "#5eead4",
    ),
    ("#8b949e", "#58a6ff", "#56d364", "#e3b341", "#bc8cff"),
)
PEERS = (
    "eager-nchw",
    "eager",
    "folded",
    "compile",
    "compile-best",
    "openvino",
    "onnxruntime",
    "tensorrt",
    "cudnn-frontend",
)
SHORT = {
    "eager-nchw": "eager NCHW",
    "eager": "eager channels_last",
    "folded": "folded + fused",
    "compile": "torch.compile",
    "compile-best": "torch.compile best",
    "ours": "ours, drop-in",
    "ours-accelerate": "ours, accelerate()",
    "ours-plan": "ours, plan()",
    "onnxruntime": "ONNX Runtime",
    "tensorrt": "TensorRT",
    "cudnn-frontend": "cudnn-frontend",
}


@dataclass(frozen=True)
class Plot:
    """One picture: file stem, caption, size in inches, and a function of (figure, theme) that draws it."""

    name: str
    caption: str
    size: tuple[float, float]
    draw: Callable


def save(plots: Iterable[Plot], folder: Path) -> list[Path]:
    """Write each plot as NAME-light.png and NAME-dark.png; raises ImportError with what to install."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plots need matplotlib: pip install 'resnet_fast[report]' (or --no-plots)"
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for plot, theme in itertools.product(plots, (LIGHT, DARK)):
        path = folder / f"{plot.name}-{theme.name}.png"
        with rc_context(_style(theme)):
            figure = Figure(figsize=plot.size, dpi=150, layout="constrained")
            plot.draw(figure, theme)
            # Without matplotlib's version in the file, the same ledger gives the same bytes.
            figure.savefig(path, metadata={"Software": None})
        written.append(path)
    return written


def _style(theme: Theme) -> dict:
    return {
        "figure.facecolor": theme.paper,
        "axes.facecolor": theme.paper,
        "savefig.facecolor": theme.paper,
        "text.color": theme.ink,
        "axes.labelcolor": theme.ink,
        "axes.edgecolor": theme.faint,
        "xtick.color": theme.ink,
        "ytick.color": theme.ink,
        "grid.color": theme.faint,
        "grid.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "legend.frameon": False,
        "axes.axisbelow": True,
        "figure.constrained_layout.w_pad": 0.1,
        "figure.constrained_layout.h_pad": 0.1,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "xtick.minor.size": 0,
    }


def short(provider: str) -> str:
    """Return a provider's name for a label in a plot."""
    return SHORT.get(provider, title(provider))


def colour(provider: str, theme: Theme) -> str:
    """Return a provider's colour: a peer's is fixed by its place in PEERS, all others have ``ours``."""
    if provider not in PEERS:
        return theme.ours
    index = PEERS.index(provider) % len(theme.peers)
    return theme.peers[index]


def slug(*parts: object) -> str:
    """Return the parts as a file stem: lower case, "-" for everything but letters and digits."""
    words = []
    for part in parts:
        characters = [c if c.isalnum() else "-" for c in str(part).lower()]
        word = "".join(characters).strip("-")
        words.append(word)
    return "-".join(words)


# ---------------------------------------------------------------- axes


def log_scale(axis) -> None:
    """Set a logarithmic scale on ``axes.xaxis`` or ``.yaxis``, with plain numbers at 1, 2 and 5 of each decade."""
    from matplotlib.ticker import LogLocator, NullLocator

    def plain(value: float, _: int) -> str:
        return f"{value:,.0f}" if value >= 1 else f"{value:g}"

    set_scale = getattr(axis.axes, f"set_{axis.axis_name}scale")
    set_scale("log")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(plain)


def scientific_scale(axes, low: float, high: float) -> None:
    """Set a logarithmic x axis from ``low`` to ``high``, labelled as "5e-4" at 1, 2 and 5 of each decade."""
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    values = itertools.product(range(-20, 3), (1, 2, 5))
    ticks = [10.0**exponent * factor for exponent, factor in values]
    ticks = [tick for tick in ticks if low <= tick <= high]
    labels = [f"{tick:.0e}" for tick in ticks]
    labels = [label.replace("e-0", "e-") for label in labels]
    axes.set_xticks(ticks, labels, minor=False)
    axes.minorticks_off()


def label_ends(axis, ends: Sequence[tuple[tuple[float, float], str]], theme: Theme) -> None:
    """Write names at the right ends of the lines, moved apart where they would overlap, within the axes' height."""
    ends = sorted(ends, key=lambda end: end[0][1])
    axis.autoscale(False)
    to_axes_fraction = (axis.transData + axis.transAxes.inverted()).transform
    heights = [to_axes_fraction(point)[1] for point, _ in ends]
    gap = min(0.054, 1 / max(len(ends) - 1, 1))
    places = spread(heights, gap)
    # Where many lines end low or high, shift all names so that they stay beside the axes.
    shift = max(0.0, -places[0]) or min(0.0, 1 - places[-1])
    for (point, id), place in zip(ends, places, strict=True):
        color = colour(id, theme)
        connector = {
            "arrowstyle": "-",
            "color": color,
            "linewidth": 0.5,
            "relpos": (0, 0.5),
            "shrinkA": 1,
            "shrinkB": 3,
        }
        axis.annotate(
            short(id),
            point,
            (1.04, place + shift),
            textcoords="axes fraction",
            va="center",
            fontsize=8,
            color=color,
            annotation_clip=False,
            arrowprops=connector,
        )


def spread(positions: list[float], gap: float) -> list[float]:
    """Return the places nearest to the sorted positions that are at least ``gap`` apart.

    Isotonic regression of positions − i·gap by pooling adjacent violators: each block is (mean, number of positions).
    """
    blocks: list[tuple[float, int]] = []
    for i, position in enumerate(positions):
        mean, n = position - i * gap, 1
        while blocks and blocks[-1][0] >= mean:
            previous_mean, m = blocks.pop()
            total = previous_mean * m + mean * n
            n += m
            mean = total / n
        blocks.append((mean, n))
    places: list[float] = []
    for mean, n in blocks:
        places += [mean + i * gap for i in range(len(places), len(places) + n)]
    return places
