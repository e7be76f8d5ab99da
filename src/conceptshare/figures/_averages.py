"""Modality averages, the paper's Table 3."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from conceptshare.figures._style import READING_TITLES, STYLE, annotate_empty, explain_grey, heatmap, letters_on, save


def draw_averages(averages: pd.DataFrame, out: Path) -> None:
    """The mean wMPPC from each modality to each: a heatmap per reading, annotated with intervals.

    Args:
        averages: the tidy modality averages, with at least ``reading, source_modality, target_modality, wmppc, low,
            high``. It is empty if all members belong to one encoder.
        out: where the PNG goes; the PDF goes next to it.
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
            cells = averages[averages.reading == reading].set_index(["source_modality", "target_modality"])
            cells = cells.reindex(pd.MultiIndex.from_product([modalities, modalities]))
            images.append(heatmap(ax, _square(cells.wmppc), 0, top, letters=None))
            _annotate(ax, cells, images[-1])
            ax.set_xlabel("to")
        axes[0].set_ylabel("from")
        if any(np.ma.getmaskarray(image.get_array()).any() for image in images):
            explain_grey(figure, "no pair of different encoders")
        if images:
            figure.colorbar(images[0], ax=axes, label="mean wMPPC")
        save(figure, out)


def _square(values: pd.Series) -> NDArray[np.float64]:
    side = round(len(values) ** 0.5)
    return np.asarray(values, np.float64).reshape(side, side)


def _annotate(ax: Axes, cells: pd.DataFrame, image: Any) -> None:
    side = round(len(cells) ** 0.5)
    for n, cell in enumerate(cells.itertuples()):
        if np.isfinite(cell.wmppc):
            style: Any = {"ha": "center", "color": letters_on(image, cell.wmppc)}
            row, column = divmod(n, side)
            ax.text(column, row, f"{cell.wmppc:.3f}", va="bottom", fontsize=9.5, **style)
            ax.text(column, row + 0.06, f"{cell.low:.3f} to {cell.high:.3f}", va="top", fontsize=6.5, **style)
