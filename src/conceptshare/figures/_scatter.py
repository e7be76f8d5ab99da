"""Comparative Sharedness: where a ranking's features lie between the two groups."""

from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator
from numpy.typing import NDArray

from conceptshare.figures._style import RED, STYLE, explain, number, save

_BINS = 40
"""Bins per axis, to count how many features are near each one."""
_NUMBERED = 5
"""Ranks that are labelled."""
_PANEL = 3.2
"""Approximate side of the panel, in inches."""
# Starts at a grey that is visible on white; the only colour is that of the top features.
_GREYS = LinearSegmentedColormap.from_list("greys", ["0.85", "0.4"])
_TOP: Any = {"marker": "D", "facecolor": RED, "edgecolor": "black", "linewidth": 0.5}


def draw_scatter(table: pd.DataFrame, out: Path) -> None:
    """Each feature of a ranking by rho_G and rho_H, darker in dense regions, the top 1% by Delta in colour.

    Above the diagonal are the features that group G shares more than group H does (Delta > 0). The title counts the
    features on either side; a feature that was never active lies on the diagonal, as both of its rho are 0.
    The ranking has at least ``rank, top, source, layer, rho_g, rho_h,
    unexplained``: rho_g is the smallest of a feature's best
    matches in the members of G, rho_h the largest of those in H.
    """
    points = table[["rho_g", "rho_h"]].to_numpy(np.float64)
    top = table.top.to_numpy(bool)
    low, high = min(0.0, points.min()), max(points.max(), 1e-3)
    limits = (float(low - 0.03 * (high - low)), float(high + 0.05 * (high - low)))
    more, less = (int((sign * (points[:, 0] - points[:, 1]) > 0).sum()) for sign in (1, -1))
    counts = [f"{more:,} with $\\rho_G > \\rho_H$", f"{less:,} with $\\rho_G < \\rho_H$"]
    zero = len(points) - int(points.any(axis=1).sum())
    equal = len(points) - more - less - zero
    counts += [f"{count:,} with both {what}" for count, what in ((zero, "0 (no match)"), (equal, "equal")) if count]
    with mpl.rc_context(STYLE | {"font.size": 8}):
        figure = Figure(figsize=(_PANEL + 1.2, _PANEL + 1.2), layout="constrained")
        ax = figure.subplots()
        ax.axline((0, 0), slope=1, color="black", linewidth=0.8, zorder=2)
        around = _neighbours(points, limits)
        order = np.argsort(around, kind="stable")
        # Thousands of points are one bitmap in the PDF.
        busiest = around[points.any(axis=1)].max(initial=2)  # those that were never active all lie at 0
        style: Any = {"s": 7, "linewidths": 0, "cmap": _GREYS, "norm": LogNorm(1, busiest)}
        dots = ax.scatter(points[order, 1], points[order, 0], c=around[order], rasterized=True, **style)
        ax.scatter(points[top, 1], points[top, 0], s=24, zorder=3, **_TOP)
        number(ax, points[top][:_NUMBERED, ::-1], points[top][:, ::-1], limits, _PANEL)
        ax.set(xlim=limits, ylim=limits, aspect="equal")
        ax.set_xlabel("$\\rho_H$: largest in the group that should not share it")
        ax.set_ylabel("$\\rho_G$: smallest in the group that should share it")
        title = f"{table.source[0]}, layer {table.layer[0]}: {len(table):,} features"
        ax.set_title(title, loc="left", pad=18)
        at: Any = {"xytext": (0, 6), "xycoords": "axes fraction", "textcoords": "offset points"}
        ax.annotate(", ".join(counts), (0, 1), **at, fontsize=7)
        look: Any = {"marker": "D", "color": RED, "markeredgecolor": "black", "markeredgewidth": 0.5, "markersize": 5}
        mark = Line2D([], [], linestyle="none", label=f"top 1% by $\\Delta$: {top.sum():,}", **look)
        if table.unexplained[0]:
            explain(figure, fill(f"SAEs leave most of the global tokens unexplained: {table.unexplained[0]}", 70))
        below: Any = {"loc": "upper left", "bbox_to_anchor": (-0.03, -0.13)}
        ax.legend(handles=[mark], **below, frameon=False, handletextpad=0.1)
        ticks = LogLocator(subs=(1, 2, 5))
        figure.colorbar(dots, ax=ax, label="features nearby", shrink=0.7, ticks=ticks, format="%d").minorticks_off()
        save(figure, out)


def _neighbours(points: NDArray[np.float64], limits: tuple[float, float]) -> NDArray[np.float64]:
    """``[N]`` how many points are in the bin of each."""
    low, high = limits
    bins = np.floor(_BINS * (points - low) / (high - low))
    _, place, counts = np.unique(bins, axis=0, return_inverse=True, return_counts=True)
    return counts[place].astype(np.float64)
