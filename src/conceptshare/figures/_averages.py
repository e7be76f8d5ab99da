"""Modality averages, the paper's Table 3."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from conceptshare.figures._style import (
    READING_TITLES,
    STYLE,
    annotate_empty,
    explain,
    heatmap,
    letters_on,
    marks_note,
    save,
)


def draw_averages(averages: pd.DataFrame, out: Path) -> None:
    """The mean wMPPC from each modality to each: a heatmap per reading, annotated with intervals.

    A star marks averages of cells with unexplained layers, a dagger those of cells that leave such layers out. The
    modality averages have at least ``reading, source_modality, target_modality, wmppc, low, high, unexplained,
    left_out``. There are none if all members belong to one encoder.
    """
    modalities = list(dict.fromkeys([*averages.source_modality, *averages.target_modality]))
    top = averages.wmppc.max()
    top = float(top) if top > 0 else 1.0
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 2.9), layout="constrained")
        axes = figure.subplots(1, len(READING_TITLES), sharey=True)
        images = []
        for ax, (reading, title) in zip(axes, READING_TITLES.items(), strict=True):
            ax.set_title(title)
            ax.set_xticks(range(len(modalities)), modalities)
            ax.set_yticks(range(len(modalities)), modalities)
            if averages.empty:
                annotate_empty(ax, "nothing to average")
                continue
            cells = averages[averages.reading == reading]
            square = cells.pivot(index="source_modality", columns="target_modality", values="wmppc")
            square = square.reindex(index=modalities, columns=modalities)
            images.append(heatmap(ax, square.to_numpy(), 0, top, letters=None))
            for cell in cells[np.isfinite(cells.wmppc)].itertuples():
                style: Any = {"ha": "center", "color": letters_on(images[-1], cell.wmppc)}
                row, column = modalities.index(cell.source_modality), modalities.index(cell.target_modality)
                signs = "*" * bool(cell.unexplained) + "†" * bool(cell.left_out)
                ax.text(column, row, f"{cell.wmppc:.3f}{signs}", va="bottom", fontsize=9.5, **style)
                ax.text(column, row + 0.06, f"{cell.low:.3f} to {cell.high:.3f}", va="top", fontsize=6.5, **style)
            ax.set_xlabel("to")
        axes[0].set_ylabel("from")
        notes = [*filter(None, [marks_note(averages, "* cells", "† cells")])]
        if any(np.ma.getmaskarray(image.get_array()).any() for image in images):
            notes.insert(0, "grey: no pair of different encoders")
        if notes:
            explain(figure, "; ".join(notes))
        if images:
            figure.colorbar(images[0], ax=axes, label="mean wMPPC")
        save(figure, out)
