"""What all figures share: the style, the colours, how they are saved, and heatmaps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from conceptshare.files import written_aside

STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.dpi": 150,
    "savefig.bbox": "tight",
    "savefig.facecolor": "white",
    "pdf.fonttype": 42,
}
# What is placed in inches needs no second look at what the figure holds, nor at where titles would hit something.
PLACED: Any = {"savefig.bbox": None, "axes.titley": 1.0}
COLOURS = "viridis"
# Okabe and Ito's colours, and forms for who prints in grey.
BLUE, LIGHT_BLUE, ORANGE, RED = "#0072B2", "#56B4E9", "#E69F00", "#D55E00"
MARKERS: Any = {"image": {"color": BLUE, "marker": "o"}, "text": {"color": RED, "marker": "s"}}
READING_TITLES = {
    "pooled": "All layers, pooled (Eq. 6)",
    "layer_mean": "All layers, mean over layers",
    "last": "Last layer",
}


def save(figure: Figure, out: Path) -> None:
    """Write a figure as PNG at ``out`` and as PDF beside it, without dates, so that equal data give equal files."""
    for path, metadata in ((out.with_suffix(".pdf"), {"CreationDate": None}), (out, {"Software": None})):
        with written_aside(path) as partial:
            figure.savefig(partial, format=path.suffix[1:], metadata=metadata)


def heatmap(ax: Axes, cells: np.ndarray[Any, Any], low: float, high: float, annotate: bool) -> Any:
    image = ax.imshow(cells, cmap=COLOURS, vmin=low, vmax=high, aspect="equal")
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    ax.set_facecolor("0.9")
    if annotate:
        for (i, j), value in np.ndenumerate(cells):
            if np.isfinite(value):
                dark = value < low + 0.6 * (high - low)
                colour = "white" if dark else "black"
                ax.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=7.5)
    return image


def say_nothing(ax: Axes, words: str) -> None:
    """Write on a panel why it is empty."""
    ax.text(0.5, 0.5, words, ha="center", va="center", color="0.4", transform=ax.transAxes)


def known(number: float, digits: int = 2) -> str:
    """A number as text, or ``undefined`` for NaN."""
    return "undefined" if np.isnan(number) else f"{number:.{digits}f}"


def layer_ticks(axis: Any, layers: Sequence[int], positions: Sequence[int] | None = None, most: int = 12) -> None:
    step = -(-len(layers) // most)
    places = range(len(layers)) if positions is None else positions
    axis.set_ticks(list(places)[::step], [str(layer) for layer in layers[::step]])
