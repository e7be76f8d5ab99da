"""Heatmaps of pairs of members, layer by layer."""

import json
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from conceptshare.config.members import as_member
from conceptshare.figures._style import ABOVE_CHANCE, STYLE, VALUES, explain, heatmap, layer_ticks, save, unexplained
from conceptshare.io.errors import StudyError

_PANEL = 2.15
"""Approximate side of a panel with its labels, in inches: three fit the width of a page."""
_LETTERS, _LINE = 32, 0.13
"""Characters on one line of a label, and the line's height in inches. A title, which is bold, has fewer."""
_SMALL: Any = {"font.size": 7, "axes.titlesize": 7.5}


def draw_layerwise(table: pd.DataFrame, pairs: Sequence[tuple[str, str]], out: Path) -> None:
    """Heatmaps of wMPPC from each layer of one member to each of another, a panel per pair, one colour scale (Fig. 1).

    Below them are those of the excess over chance. Cells that are not above their null are hatched, and those with
    unexplained layers have a marked corner. Layer 0 is at the
    bottom left.

    Raises:
        StudyError: if a pair is not in the table.
    """
    known = list(dict.fromkeys(zip(table.source, table.target, strict=True)))
    unknown = [list(pair) for pair in pairs if tuple(pair) not in known]
    if unknown:
        there = ", ".join(json.dumps(pair) for pair in known)
        raise StudyError(f"the table has no pair {json.dumps(unknown[0])}; give pairs that it has: {there}")
    chosen = [table[(table.source == a) & (table.target == b)] for a, b in pairs]
    columns = min(3, len(pairs))
    rows = -(-len(pairs) // columns)
    with mpl.rc_context(STYLE | _SMALL):
        titles = [_pair_title(a, b) for a, b in pairs]
        labels = [[fill(f"layer of {member}", _LETTERS) for member in pair] for pair in pairs]
        # Long names take more lines than a panel has room for.
        more = _LINE * max(words.count("\n") for pair in labels for words in pair)
        above = _LINE * (max(title.count("\n") for title in titles) - 1)
        size = (_PANEL + more) * columns + 0.7, (_PANEL + 0.25 + above + more) * rows * len(VALUES)
        figure = Figure(figsize=size, layout="constrained")
        every = figure.subplots(rows * len(VALUES), columns, squeeze=False)
        for (value, words), axes in zip(VALUES.items(), np.split(every, len(VALUES)), strict=True):
            top = float(np.nanmax([1e-6, *(panel[value].max() for panel in chosen)]))
            image = _draw_panels(axes, chosen, titles, labels, value, top)
            for ax in axes.flat[len(pairs) :]:
                ax.remove()
            figure.colorbar(image, ax=list(axes.flat[: len(pairs)]), label=words, shrink=0.85)
        notes = ["grey: no value"] if any(panel.wmppc.isna().any() for panel in chosen) else []
        if any((panel.p > ABOVE_CHANCE).any() for panel in chosen):
            notes.append("hatched: not above the level of samples that are re-paired at random")
        if any(panel.unexplained.any() for panel in chosen):
            notes.append(f"marked corner: with {unexplained(table)}")
        if notes:
            explain(figure, "; ".join(notes))
        save(figure, out)


def _draw_panels(
    axes: Any,
    chosen: Sequence[pd.DataFrame],
    titles: Sequence[str],
    labels: Sequence[Sequence[str]],
    value: str,
    top: float,
) -> Any:
    """Draw a column of the table for each pair, and return the last image."""
    for ax, title, (label_a, label_b), panel in zip(axes.flat, titles, labels, chosen, strict=False):
        cells, p, with_unexplained = (
            panel.pivot(index="source_layer", columns="target_layer", values=column)
            for column in (value, "p", "unexplained")
        )
        letters = 6 if max(cells.shape) <= 8 else None
        hatched, marked = p.to_numpy() > ABOVE_CHANCE, with_unexplained.to_numpy() > 0
        image = heatmap(ax, cells.to_numpy(), 0, top, letters, hatched, marked)
        # Panels have one size, so cells are oblong if the encoders differ in depth.
        ax.set_aspect("auto")
        ax.set_box_aspect(1)
        layer_ticks(ax.xaxis, list(cells.columns), most=9)
        layer_ticks(ax.yaxis, list(cells.index), most=9)
        ax.invert_yaxis()
        ax.set_title(title)
        ax.set_xlabel(label_b)
        ax.set_ylabel(label_a)
    return image


def _pair_title(a: str, b: str) -> str:
    first, second = as_member(a), as_member(b)
    if first.encoder == second.encoder:
        lines = f"{first.encoder},", f"seeds {first.seed} and {second.seed}"
    else:
        lines = a, f"and {b}"
    return "\n".join(fill(line, _LETTERS - 4) for line in lines)
