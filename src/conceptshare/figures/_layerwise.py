"""Heatmaps of pairs of members, layer by layer."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from conceptshare.figures._style import STYLE, heatmap, layer_ticks, save
from conceptshare.study import as_member


def draw_layerwise(table: pd.DataFrame, pairs: Sequence[tuple[str, str]], out: Path) -> None:
    """WMPPC from each layer of one member to each layer of another, a panel a pair, with one colour scale (Fig. 1)."""
    chosen = [table[(table.source == a) & (table.target == b)] for a, b in pairs]
    top = float(np.nanmax([1e-6, *(panel.wmppc.max() for panel in chosen)]))
    columns = min(3, len(pairs))
    rows = -(-len(pairs) // columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.5 * columns + 0.8, 3.4 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
        for ax, (a, b), panel in zip(axes.flat, pairs, chosen, strict=False):
            cells = panel.pivot(index="source_layer", columns="target_layer", values="wmppc")
            image = heatmap(ax, cells.to_numpy(), 0, top, annotate=cells.size <= 64)
            layer_ticks(ax.xaxis, list(cells.columns))
            layer_ticks(ax.yaxis, list(cells.index))
            ax.invert_yaxis()
            ax.set_title(_pair_title(a, b))
            ax.set_xlabel(f"layer of {b}")
            ax.set_ylabel(f"layer of {a}")
        for ax in axes.flat[len(pairs) :]:
            ax.remove()
        figure.colorbar(image, ax=list(axes.flat[: len(pairs)]), label="wMPPC", shrink=0.85)
        save(figure, out)


def _pair_title(a: str, b: str) -> str:
    first, second = as_member(a), as_member(b)
    if first.encoder == second.encoder:
        return f"{first.encoder}, seeds {first.seed} and {second.seed}"
    return f"{a} and {b}"
