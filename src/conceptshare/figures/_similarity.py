"""Other measures of similarity between encoders, against wMPPC."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from conceptshare.figures._style import (
    BLUE,
    PAGE,
    RED,
    STYLE,
    annotate_empty,
    explain,
    known,
    marks_note,
    save,
)
from conceptshare.metrics import correlation

_MEASURES = {"cka": "Linear CKA", "mutual_knn": "Mutual nearest neighbours"}
_LOOKS: Any = {
    "layer_mean": {"label": "mean over layers", "color": BLUE, "marker": "o"},
    "last": {"label": "last layer", "color": RED, "marker": "s"},
}


def draw_similarity(table: pd.DataFrame, out: Path) -> None:
    """CKA and mutual nearest neighbours against wMPPC, a point per cell, with the rank correlation for each reading.

    The matrix table has at least ``reading, wmppc, cka, mutual_knn, unexplained, left_out``. Cells that lack either
    value are not drawn; those with unexplained layers are hollow.
    """
    with mpl.rc_context(STYLE | {"font.size": 8, "axes.titlesize": 8}):
        figure = Figure(figsize=(PAGE, 3.7), layout="constrained")
        for ax, (measure, name) in zip(figure.subplots(1, len(_MEASURES)), _MEASURES.items(), strict=True):
            _panel(ax, table[np.isfinite(table.wmppc) & np.isfinite(table[measure])], measure)
            ax.set_ylabel(f"{name} of global tokens")
            ax.set_xlabel("wMPPC")
        marks = [Line2D([], [], linestyle="none", **look) for look in _LOOKS.values()]
        if note := marks_note(table, "hollow:", "mean over layers:"):
            explain(figure, note)
        figure.legend(handles=marks, loc="outside upper center", ncols=2, frameon=False, handletextpad=0.1)
        save(figure, out)


def _panel(ax: Axes, cells: pd.DataFrame, measure: str) -> None:
    found = []
    for reading, look in _LOOKS.items():
        of_reading = cells[cells.reading == reading]
        if len(of_reading):
            for hollow, fill in ((False, look["color"]), (True, "none")):
                these = of_reading[(of_reading.unexplained > 0) == hollow]
                style: Any = {"marker": look["marker"], "facecolor": fill, "edgecolor": look["color"]}
                ax.scatter(these.wmppc, these[measure], s=16, alpha=0.75, linewidths=0.8, **style)
            ranks = correlation(of_reading.wmppc.rank(), of_reading[measure].rank())
            found.append(f"Spearman, {look['label']}: {known(ranks)} (n = {len(of_reading)})")
    if not found:
        annotate_empty(ax, "nothing to compare")
        return
    ax.set_title("\n".join([_MEASURES[measure], *found]))
    ax.set_xlim(left=min(0.0, ax.get_xlim()[0]))
    ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
    ax.grid(color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
