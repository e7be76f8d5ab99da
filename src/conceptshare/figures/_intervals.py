"""Each cell of a matrix with its interval, its null and its ceiling."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from conceptshare.analysis.formats import short_labels
from conceptshare.figures._style import (
    MARKERS,
    PAGE,
    READING_TITLES,
    STYLE,
    annotate_empty,
    explain,
    marks_note,
    save,
    text_width,
)

_ROW = 0.13
"""Height of a row, in inches."""
_LABELS = 1.7
"""Room for the names of rows, in inches, on a page. Longer names make the figure wider."""
_TALL = 40
"""With more rows than this, the axis is shown at the top too."""
_NULL: Any = {"color": "0.45", "marker": "x", "markersize": 3.5, "markeredgewidth": 0.9}
_CROSS: Any = {"color": "0.3", "marker": "d", "markersize": 2.8}
_BELOW = 0.3
"""How far below the wMPPC the cross-fitted one is, in rows."""
_CEILING: Any = {"color": "black", "marker": "|", "markersize": 7.5, "markeredgewidth": 1.1}


def draw_intervals(table: pd.DataFrame, out: Path) -> None:
    """Each wMPPC with its 95% interval: a panel per reading and a row per cell, in blocks of one source.

    The points of cells with unexplained layers are hollow. Below each is the cross-fitted wMPPC with its interval. Each
    row also shows the ``null`` (samples re-paired at random) and, if there is one, the ``ceiling`` (other seeds of the
    source). The matrix table has at least ``source, target, target_modality, reading, wmppc, low, high, cross_fitted,
    cross_fitted_low, cross_fitted_high, null, ceiling, unexplained, left_out``.
    """
    members = list(dict.fromkeys(table["source"]))
    label = dict(zip(members, short_labels(members), strict=True))
    targets = {source: list(dict.fromkeys(of.target)) for source, of in table.groupby("source", sort=False)}
    rows = [(source, target) for source in members for target in (None, *targets[source])]
    place = {row: n for n, row in enumerate(rows)}
    numbers = table[["wmppc", "low", "high", "cross_fitted_low", "cross_fitted_high", "null", "ceiling"]].to_numpy(
        np.float64
    )
    known = numbers[np.isfinite(numbers)]
    low, high = (known.min(initial=0), known.max()) if len(known) else (0, 1)
    with mpl.rc_context(STYLE | {"font.size": 7.5, "axes.titlesize": 8}):
        names = [f"from {label[source]}" if target is None else label[target] for source, target in rows]
        wider = max(0, max(text_width(name, 6.5, "bold") for name in names) - _LABELS)
        figure = Figure(figsize=(PAGE + wider, _ROW * len(rows) + 1.3), layout="constrained")
        axes = figure.subplots(1, len(READING_TITLES), sharey=True)
        for ax, (reading, title) in zip(axes, READING_TITLES.items(), strict=True):
            _panel(ax, table[table.reading == reading], place)
            for n, source in enumerate(members):
                if n % 2 == 0:
                    top = place[source, None]
                    ax.axhspan(top - 0.5, top + len(targets[source]) + 0.5, color="0.95", linewidth=0, zorder=0)
            ax.set_xlim(low, low + 1.04 * max(high - low, 1e-6))
            ax.set_title(title)
            ax.set_xlabel("wMPPC, 95% interval")
            ax.tick_params(axis="x", top=len(rows) > _TALL, labeltop=len(rows) > _TALL)
        axes[0].set_ylim(len(rows) - 0.4, -0.6)
        axes[0].set_yticks(range(len(rows)), names, fontsize=6.5)
        for (_, target), text in zip(rows, axes[0].get_yticklabels(), strict=True):
            text.set_fontweight("bold" if target is None else "normal")
        figure.legend(handles=_legend(table), loc="outside upper center", ncols=5, frameon=False)
        if note := marks_note(table, "hollow:", "all layers:"):
            explain(figure, note)
        save(figure, out)


def _panel(ax: Axes, cells: pd.DataFrame, place: dict[Any, int]) -> None:
    y = np.array([place[row] for row in zip(cells.source, cells.target, strict=True)])
    ax.plot(cells.null, y, linestyle="none", **_NULL)
    ax.plot(cells.ceiling, y, linestyle="none", **_CEILING)
    ax.hlines(y + _BELOW, cells.cross_fitted_low, cells.cross_fitted_high, color=_CROSS["color"], linewidth=0.9)
    ax.plot(cells.cross_fitted, y + _BELOW, linestyle="none", **_CROSS)
    for modality, look in MARKERS.items():
        of = (cells.target_modality == modality).to_numpy()
        ax.hlines(y[of], cells.low[of], cells.high[of], color=look["color"], linewidth=1.4)
        for hollow, fill in ((False, look["color"]), (True, "white")):
            these = of & ((cells.unexplained > 0) == hollow).to_numpy()
            ax.plot(cells.wmppc[these], y[these], linestyle="none", markersize=3.2, markerfacecolor=fill, **look)
    if cells.wmppc.isna().all():
        annotate_empty(ax, "no values")
    ax.grid(axis="x", color="0.85", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)


def _legend(table: pd.DataFrame) -> list[Line2D]:
    marks = [
        Line2D([], [], linewidth=1.4, markersize=3.2, label=f"to {article} {modality} encoder", **MARKERS[modality])
        for modality, article in (("image", "an"), ("text", "a"))
        if modality in set(table.target_modality)
    ]
    marks.append(Line2D([], [], linewidth=0.9, label="cross-fitted", **_CROSS))
    marks.append(Line2D([], [], linestyle="none", label="null: samples re-paired", **_NULL))
    if table.ceiling.notna().any():
        marks.append(Line2D([], [], linestyle="none", label="ceiling: other seeds", **_CEILING))
    return marks
