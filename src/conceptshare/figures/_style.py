"""Shared by all figures: the style, the colours, saving, and heatmaps."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Polygon, Rectangle
from matplotlib.patheffects import withStroke
from numpy.typing import ArrayLike

from conceptshare.io.files import PDF, PNG, atomic_output

STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.dpi": 200,
    "savefig.bbox": "tight",
    "savefig.facecolor": "white",
    "pdf.fonttype": 42,
    "hatch.linewidth": 0.6,
}
# For figures placed in inches: no search for the bounding box, nor for titles that overlap.
FIXED_LAYOUT: Any = {"savefig.bbox": None, "axes.titley": 1.0}
PAGE = 7.2
"""Width of a printed page in inches. Figures are drawn for it, so font sizes are those in print."""
_RULER_DPI = 200
COLOURS = "viridis"
# Okabe and Ito's colours, with markers that differ in grey too.
BLUE, LIGHT_BLUE, ORANGE, RED = "#0072B2", "#56B4E9", "#E69F00", "#D55E00"
MARKERS: Any = {"image": {"color": BLUE, "marker": "o"}, "text": {"color": RED, "marker": "s"}}
READING_TITLES = {
    "pooled": "All layers, pooled (Eq. 6)",
    "layer_mean": "All layers, mean over layers",
    "last": "Last layer",
}


def save(figure: Figure, out: Path) -> None:
    """Write a figure as PNG at ``out`` and as PDF next to it, without dates, so that equal data give equal files."""
    for kind, metadata in ((PDF, {"CreationDate": None}), (PNG, {"Software": None})):
        with atomic_output(out.with_suffix(kind.suffix), kind) as partial:
            figure.savefig(partial, format=kind.suffix[1:], metadata=metadata)


VALUES = {"wmppc": "wMPPC", "excess": "excess"}
"""The columns that heatmaps of wMPPC show, and the labels of their colour bars."""
ABOVE_CHANCE = 0.05
"""Largest p of a cell that counts as above its null."""


def unexplained(table: pd.DataFrame) -> str:
    """The layers that the columns ``unexplained`` and ``left_out`` of a table count, by the bound that it records."""
    return above(table.attrs.get("max_fvu_global"))


def marks_note(table: pd.DataFrame, marked: str, left_out: str) -> str:
    """What is said of cells with unexplained layers, and of those that leave them out; empty if there are neither."""
    notes = [f"{marked} with {unexplained(table)}"] if table.unexplained.any() else []
    if table.left_out.any():
        notes.append(f"{left_out} without {'them' if notes else unexplained(table)}")
    return "; ".join(notes)


def above(max_fvu_global: float | None) -> str:
    """The layers of an FVU above a bound, or above that of the study if it is unknown."""
    bound = "max_fvu_global" if max_fvu_global is None else f"{max_fvu_global:g}"
    return f"layers whose SAE has an FVU above {bound} at global tokens"


def heatmap(
    ax: Axes,
    cells: np.ndarray[Any, Any],
    low: float,
    high: float,
    letters: float | None,
    hatched: np.ndarray[Any, Any] | None = None,
    marked: np.ndarray[Any, Any] | None = None,
    left_out: np.ndarray[Any, Any] | None = None,
) -> Any:
    """A heatmap of cells, grey for NaN, with their numbers at a font size of ``letters``, if any.

    Cells can be hatched, marked with a triangle in their upper right corner, or in their lower left corner.
    """
    image = ax.imshow(cells, cmap=COLOURS, vmin=low, vmax=high, aspect="equal")
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    ax.set_facecolor("0.9")
    for i, j in [] if hatched is None else np.argwhere(hatched):
        lines: Any = {"hatch": "////", "edgecolor": letters_on(image, cells[i, j]), "linewidth": 0}
        ax.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, **lines))
    for mask, side in ((marked, 1), (left_out, -1)):
        for i, j in [] if mask is None else np.argwhere(mask & np.isfinite(cells)):
            corner = [(j + side * x, i - side * y) for x, y in ((0.5, 0.5), (0.22, 0.5), (0.5, 0.22))]
            ax.add_patch(Polygon(corner, color=letters_on(image, cells[i, j]), linewidth=0))
    if letters:
        for (i, j), value in np.ndenumerate(cells):
            if np.isfinite(value):
                colour = image.cmap(image.norm(value))
                around = withStroke(linewidth=2, foreground=colour)
                ink: Any = {"color": letters_on(image, value), "path_effects": [around]}
                if hatched is not None and hatched[i, j]:
                    ink["bbox"] = {"facecolor": colour, "edgecolor": "none", "pad": 1}
                ax.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=letters, **ink)
    return image


def letters_on(image: Any, value: float) -> str:
    """Black or white, whichever has more contrast with the colour of a value by WCAG's relative luminance."""
    rgb = np.array(image.cmap(image.norm(value))[:3])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return "white" if linear @ (0.2126, 0.7152, 0.0722) < 0.179 else "black"


def text_width(words: str, size: float, weight: str = "normal") -> float:
    """Width of a line in inches, in the current style's font."""
    font = FontProperties(family=mpl.rcParams["font.family"], size=size, weight=weight)
    return float(_ruler().get_text_width_height_descent(words, font, ismath=False)[0] / _RULER_DPI)


def fitted(name: str, width: float, size: float, weight: str = "normal") -> str:
    """A name no wider than ``width`` inches; longer names lose their middle, as their ends differ most."""
    short, kept = name, len(name)
    while kept > 2 and text_width(short, size, weight) > width:
        kept -= 1
        short = f"{name[: kept // 2]}…{name[kept // 2 - kept :]}"
    return short


@cache
def _ruler() -> Any:
    canvas: Any = FigureCanvasAgg(Figure(figsize=(1, 1), dpi=_RULER_DPI))
    return canvas.get_renderer()


def explain(figure: Figure, words: str) -> None:
    """Write a note below the panels of a figure with matplotlib's layout."""
    figure.supxlabel(words, x=0.01, ha="left", fontsize=7)


def annotate_empty(ax: Axes, words: str, size: float | None = None) -> None:
    """Write on a panel why it is empty, in letters of ``size`` points or of the style's size."""
    ax.text(0.5, 0.5, words, ha="center", va="center", color="0.4", fontsize=size, transform=ax.transAxes)


def known(number: float, digits: int = 2) -> str:
    """A number as text, or ``undefined`` for NaN."""
    return "undefined" if np.isnan(number) else f"{number:.{digits}f}"


def layer_ticks(axis: Any, layers: Sequence[int], positions: Sequence[int] | None = None, most: int = 12) -> None:
    step = -(-len(layers) // most)
    places = range(len(layers)) if positions is None else positions
    axis.set_ticks(list(places)[::step], [str(layer) for layer in layers[::step]])


def number(ax: Axes, points: ArrayLike, others: ArrayLike, limits: tuple[float, float], side: float) -> None:
    """Number points 1, 2 and so on, where there is most room between all points and the diagonal.

    Args:
        ax: a square panel, with both axes from and to ``limits``.
        points: ``[P, 2]`` x and y.
        others: ``[N, 2]`` everything drawn, the points included.
        limits: the ends of both axes.
        side: approximate side of the panel, in inches.
    """
    low, high = limits
    scale = side * 72 / (high - low)
    diagonal = np.repeat(np.linspace(low, high, 100)[:, None], 2, axis=1)
    taken = scale * (np.concatenate([np.asarray(others, np.float64), diagonal]) - low)
    angles = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    around = np.concatenate([radius * np.stack([np.cos(angles), np.sin(angles)], axis=1) for radius in (9, 15, 21)])
    for n, (x, y) in enumerate(np.asarray(points, np.float64), 1):
        places = scale * (np.array([x, y]) - low) + around
        room = np.linalg.norm(places[:, None] - taken, axis=2).min(axis=1)
        # A position farther away is preferred only with clearly more room, and never outside the panel.
        room -= np.linalg.norm(around, axis=1) / 3
        room[((places < 6) | (places > side * 72 - 6)).any(axis=1)] -= 100
        best = int(room.argmax())
        taken = np.append(taken, places[best : best + 1], axis=0)
        line: Any = {"arrowstyle": "-", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 2}
        at: Any = {"xytext": tuple(around[best]), "textcoords": "offset points", "ha": "center", "va": "center"}
        text = ax.annotate(str(n), (x, y), **at, fontsize=7.5, fontweight="bold", arrowprops=line)
        text.set_path_effects([withStroke(linewidth=2, foreground="white")])
