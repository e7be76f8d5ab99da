"""A study's wMPPC against the paper's."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from conceptshare.analysis.paper import agreement, modality
from conceptshare.figures._style import (
    BLUE,
    LIGHT_BLUE,
    ORANGE,
    READING_TITLES,
    RED,
    STYLE,
    annotate_empty,
    known,
    number,
    save,
    unexplained,
)

_DIRECTIONS: Any = {
    ("image", "image"): {"color": BLUE, "marker": "o"},
    ("image", "text"): {"color": LIGHT_BLUE, "marker": "^"},
    ("text", "image"): {"color": ORANGE, "marker": "v"},
    ("text", "text"): {"color": RED, "marker": "s"},
}
_NAMED = 4
"""How many cells are named: those farthest from the paper."""
_PANEL = 3.3
"""Approximate side of a panel, in inches."""


def draw_paper(cells: pd.DataFrame, out: Path) -> None:
    """This study's wMPPC with its 95% interval against the paper's, a panel per reading; the farthest cells are named.

    The table is that of `conceptshare.analysis.paper.compare`.
    """
    directions = [(modality(a), modality(b)) for a, b in zip(cells.source, cells.target, strict=True)]
    numbers = cells[["ours", "low", "high", "paper"]].to_numpy(np.float64)
    top = 1.06 * float(np.nanmax(numbers))
    measures = agreement(cells)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(0.4 + 4.3 * len(measures), 5.4), layout="constrained")
        axes = figure.subplots(1, len(measures), squeeze=False)
        for ax, measured in zip(axes.flat, measures.itertuples(), strict=True):
            here = (cells.reading == measured.reading).to_numpy()
            _panel(ax, cells[here], [d for d, is_here in zip(directions, here, strict=True) if is_here], top)
            numbers_of = (
                f"Spearman {known(measured.spearman)}, Pearson {known(measured.pearson)} (n = {measured.cells})"
            )
            far = f"mean absolute difference {known(measured.mean_absolute_difference, 3)}"
            ax.set_title(f"{READING_TITLES[measured.reading]}\n{numbers_of}\n{far}")
            ax.set(
                xlim=(0, top), ylim=(0, top), aspect="equal", xlabel="wMPPC in the paper", ylabel="wMPPC in this study"
            )
        there = [direction for direction in _DIRECTIONS if direction in directions]
        marks = [Line2D([], [], linestyle="none", label=f"{a} to {b}", **_DIRECTIONS[a, b]) for a, b in there]
        if cells.left_out.any():
            figure.supxlabel(f"all layers: without {unexplained(cells)}", fontsize=7)
        figure.legend(handles=marks, loc="outside upper center", ncols=4, frameon=False, handletextpad=0.1)
        save(figure, out)


def _panel(ax: Axes, cells: pd.DataFrame, directions: list[tuple[str, str]], top: float) -> None:
    if cells.ours.isna().all():
        annotate_empty(ax, "nothing to compare")
        return
    ax.axline((0, 0), slope=1, color="0.6", linewidth=0.8, zorder=0)
    for direction, look in _DIRECTIONS.items():
        of = np.array([other == direction for other in directions])
        ax.vlines(cells.paper[of], cells.low[of], cells.high[of], color=look["color"], linewidth=0.8, alpha=0.6)
        ax.scatter(cells.paper[of], cells.ours[of], s=18, linewidths=0, zorder=2, **look)
    known_cells = cells[cells.ours.notna()]
    order = known_cells.difference.abs().sort_values(ascending=False, kind="stable").index
    farthest = known_cells.loc[order[:_NAMED]]
    number(ax, farthest[["paper", "ours"]].to_numpy(np.float64), known_cells[["paper", "ours"]], (0, top), _PANEL)
    lines = [
        f"{n}  {cell.source} to {cell.target}: {cell.ours:.3f}, paper {cell.paper:.3f}"
        for n, cell in enumerate(farthest.itertuples(), 1)
    ]
    words: Any = {"fontsize": 7.5, "va": "top", "linespacing": 1.3}
    ax.text(0, -0.16, "\n".join(["farthest from the paper:", *lines]), transform=ax.transAxes, **words)
