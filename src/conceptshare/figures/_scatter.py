"""Comparative Sharedness: where a ranking's features lie between the two groups."""

from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator
from numpy.typing import NDArray

from conceptshare.figures._style import PAGE, RED, STYLE, number, save, unexplained

_BINS = 40
"""Bins per axis, to count how many features are near each one."""
_NUMBERED = 5
"""Ranks that are labelled."""
_PANEL = 2.3
"""Approximate side of a panel, in inches."""
_COLUMNS = (
    ("\\rho", "As published", "rho_g", "rho_h", "rank", "top"),
    ("e", "Calibrated", "excess_g", "excess_h", "calibrated_rank", "calibrated_top"),
)
# Starts at a grey that is visible on white; the only colour is that of the top features.
_GREYS = LinearSegmentedColormap.from_list("greys", ["0.85", "0.4"])
_TOP: Any = {"marker": "D", "facecolor": RED, "edgecolor": "black", "linewidth": 0.5}


def draw_scatter(table: pd.DataFrame, out: Path) -> None:
    """Each feature of a ranking by its match in both groups, as published and calibrated, with the top 1% of each.

    The first panel shows rho_G and rho_H, the second the excess of each over the feature's null. Points are darker in
    dense regions, the top 1% by Delta is in colour. Above the diagonal are the features that group G shares more than
    group H does (Delta > 0). Above a panel are the numbers of features on either side; a feature that was never active
    lies on the diagonal, as both of its values are 0. The ranking has the columns of `tables.ranking`.
    """
    with mpl.rc_context(STYLE | {"font.size": 8}):
        figure = Figure(figsize=(PAGE, _PANEL + 1.9), layout="constrained")
        axes = figure.subplots(1, 2)
        shown = [_Panel(table, *columns) for columns in _COLUMNS]
        norm = LogNorm(1, max(panel.busiest for panel in shown))
        for ax, panel in zip(axes, shown, strict=True):
            dots = panel.draw(ax, norm)
        figure.suptitle(f"{table.source[0]}, layer {table.layer[0]}: {len(table):,} features", x=0.01, ha="left")
        look: Any = {"marker": "D", "color": RED, "markeredgecolor": "black", "markeredgewidth": 0.5, "markersize": 5}
        mark = Line2D([], [], linestyle="none", label=f"top 1% by $\\Delta$: {table.top.sum():,}", **look)
        note = fill(f"last {unexplained(table)}: {table.unexplained[0]}", 110) if table.unexplained[0] else ""
        words: Any = {"title": note, "title_fontsize": 7, "alignment": "left"}
        figure.legend(handles=[mark], loc="outside lower left", frameon=False, handletextpad=0.1, **words)
        ticks = LogLocator(subs=(1, 2, 5))
        figure.colorbar(dots, ax=axes, label="features nearby", shrink=0.7, ticks=ticks, format="%d").minorticks_off()
        save(figure, out)


class _Panel:
    """A panel of two columns of a ranking, with the first features by a third."""

    def __init__(self, table: pd.DataFrame, symbol: str, title: str, g: str, h: str, rank: str, top: str) -> None:
        self._symbol, self._title = symbol, title
        self._points = table[[g, h]].to_numpy(np.float64)
        self._top = table[table[top]].sort_values(rank)[[g, h]].to_numpy(np.float64)
        low, high = min(0.0, self._points.min()), max(self._points.max(), 1e-3)
        self._limits = (float(low - 0.03 * (high - low)), float(high + 0.05 * (high - low)))
        self._around = _neighbours(self._points, self._limits)
        # Those that were never active all lie at 0.
        self.busiest = self._around[self._points.any(axis=1)].max(initial=2)

    def draw(self, ax: Axes, norm: LogNorm) -> Any:
        """Draw it, and return the points."""
        points, symbol = self._points, self._symbol
        ax.axline((0, 0), slope=1, color="black", linewidth=0.8, zorder=2)
        order = np.argsort(self._around, kind="stable")
        # Thousands of points are one bitmap in the PDF.
        style: Any = {"s": 7, "linewidths": 0, "cmap": _GREYS, "norm": norm, "rasterized": True}
        dots = ax.scatter(points[order, 1], points[order, 0], c=self._around[order], **style)
        ax.scatter(self._top[:, 1], self._top[:, 0], s=24, zorder=3, **_TOP)
        number(ax, self._top[:_NUMBERED, ::-1], points[:, ::-1], self._limits, _PANEL)
        ax.set(xlim=self._limits, ylim=self._limits, aspect="equal")
        ax.set_xlabel(f"${symbol}_H$: largest in the group\nthat should not share it")
        ax.set_ylabel(f"${symbol}_G$: smallest in the group\nthat should share it")
        ax.set_title(self._title, loc="left", pad=28)
        at: Any = {"xytext": (0, 6), "xycoords": "axes fraction", "textcoords": "offset points"}
        ax.annotate(self._counts(), (0, 1), **at, fontsize=7)
        return dots

    def _counts(self) -> str:
        points, symbol = self._points, self._symbol
        more, less = (int((sign * (points[:, 0] - points[:, 1]) > 0).sum()) for sign in (1, -1))
        counts = [f"{more:,} with ${symbol}_G > {symbol}_H$", f"{less:,} with ${symbol}_G < {symbol}_H$"]
        zero = len(points) - int(points.any(axis=1).sum())
        equal = len(points) - more - less - zero
        on_it = [f"{count:,} with both {what}" for count, what in ((zero, "0"), (equal, "equal")) if count]
        return "\n".join(filter(None, (", ".join(counts), ", ".join(on_it))))


def _neighbours(points: NDArray[np.float64], limits: tuple[float, float]) -> NDArray[np.float64]:
    """``[N]`` how many points are in the bin of each."""
    low, high = limits
    bins = np.floor(_BINS * (points - low) / (high - low))
    _, place, counts = np.unique(bins, axis=0, return_inverse=True, return_counts=True)
    return counts[place].astype(np.float64)
