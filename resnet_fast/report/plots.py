"""Pictures drawn twice, for light and dark pages: themes, files, colours. Needs matplotlib (the extra ``report``)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from .tables import title


@dataclass(frozen=True)
class Theme:
    """Colours of one background; ``ours`` stands out, peers share quiet tones."""

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
    ("#8c959f", "#57606a", "#0969da", "#8250df", "#54aeff", "#1a7f37", "#bf8700", "#bf3989", "#0f766e"),
    ("#6e7781", "#0969da", "#1a7f37", "#bf8700", "#8250df"),
)
DARK = Theme(
    "dark",
    "#0d1117",
    "#e6edf3",
    "#30363d",
    "#ff8552",
    "#7d8590",
    ("#8b949e", "#b1bac4", "#58a6ff", "#bc8cff", "#a5d6ff", "#56d364", "#e3b341", "#ff7bb5", "#5eead4"),
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
    """One picture: a file stem, a caption, and a function that draws it on a figure."""

    name: str
    caption: str
    size: tuple[float, float]
    draw: Callable


def save(found: Iterable[Plot], folder: Path) -> list[Path]:
    """Draw each plot as NAME-light.png and NAME-dark.png; raises ImportError with what to install."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'resnet_fast[report]' (or --no-plots)") from error
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for plot in found:
        for theme in (LIGHT, DARK):
            with rc_context(_style(theme)):
                figure = Figure(figsize=plot.size, dpi=150, layout="constrained")
                plot.draw(figure, theme)
                written.append(folder / f"{plot.name}-{theme.name}.png")
                # No software version in the file: the same ledger gives the same bytes.
                figure.savefig(written[-1], metadata={"Software": None})
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
    return SHORT.get(provider, title(provider))


def colour(provider: str, theme: Theme) -> str:
    return theme.peers[PEERS.index(provider) % len(theme.peers)] if provider in PEERS else theme.ours


def slug(*parts: object) -> str:
    return "-".join("".join(c if c.isalnum() else "-" for c in str(part).lower()).strip("-") for part in parts)
