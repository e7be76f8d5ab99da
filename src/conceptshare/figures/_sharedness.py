"""Grids of the samples that activate a ranking's top features most."""

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from conceptshare.figures._cards import (
    CELL,
    GAP,
    LINE,
    draw_caption,
    draw_images,
    fonts,
    one_warning_for_missing_letters,
    wrapped,
)
from conceptshare.figures._style import FIXED_LAYOUT, PAGE, STYLE, save, unexplained

if TYPE_CHECKING:  # heavy, and other figures do not need them
    from conceptshare.data.dataset import Data
    from conceptshare.io.readers import FeatureStatistics

# In inches.
_BETWEEN = 0.28
"""Room between two grids."""
_ABOVE, _UNDER = 0.63, 0.1
"""Room above a grid, for its feature's name and numbers, and below it."""
_MARGIN = 0.06
_BELOW = 2
"""Lines of a caption below its image."""
_CAPTIONED = 25
"""Grids with more images than this have no captions, for lack of room."""


def draw_sharedness(
    table: pd.DataFrame,
    statistics: "dict[int, FeatureStatistics]",
    data: "Data",
    features_shown: int,
    out: Path,
    samples: int = 9,
    modality: str = "image",
    names: pd.DataFrame | None = None,
) -> None:
    """The top features of a ranking: a square grid each of the samples that activate it most, strongest first.

    For image encoders, images are shown, with captions cut to fit if there are few. For text encoders, captions are
    shown. Above are the groups, and for each feature its name, or in grey the best candidate if no name is clear, and
    its calibrated rank with both top shares.

    Args:
        table: the ranking.
        statistics: the statistics of the source's features, by layer.
        data: the samples.
        features_shown: how many features are shown, if the ranking has that many.
        out: where the PNG goes; the PDF goes next to it.
        samples: how many per feature: 9 are 3 x 3 (the paper's Figure 2), 100 are 10 x 10 (its Figure 4). Fewer if the
            feature is active on fewer or the store keeps fewer.
        modality: the source's, ``image`` or ``text``.
        names: the source's table of names; without it, features have none.
    """
    top = table.head(features_shown)
    found = [statistics[int(row.layer)].top_samples[int(row.feature)][:samples] for row in top.itertuples()]
    found = [of_feature[of_feature >= 0] for of_feature in found]
    side = int(np.ceil(np.sqrt(samples)))
    rows = max(1, *(-(-len(of_feature) // side) for of_feature in found))
    captioned = modality == "image" and samples <= _CAPTIONED
    pitch = CELL + GAP, CELL + GAP + captioned * (_BELOW * LINE + GAP)
    grid = side * pitch[0] - GAP, rows * pitch[1] + _ABOVE + _UNDER
    columns = min(len(top), max(1, int((PAGE + _BETWEEN) / (grid[0] + _BETWEEN))))
    width = columns * (grid[0] + _BETWEEN) - _BETWEEN + 2 * _MARGIN
    title = f"Features of {table.source[0]}, layer {table.layer[0]}, by Comparative Sharedness"
    with one_warning_for_missing_letters(out), mpl.rc_context(STYLE | FIXED_LAYOUT | {"font.family": fonts()}):
        heading = wrapped(title, width - 2 * _MARGIN, 4, 9, "bold").splitlines()
        groups = [
            line
            for words, column in (
                ("shared with (G)", "shared_with"),
                ("more than with (H)", "not_shared_with"),
                (f"last {unexplained(table)}", "unexplained"),
            )
            if column in table and table[column][0]
            for line in wrapped(f"{words}: {table[column][0]}", width - 2 * _MARGIN, 6, 7.5).splitlines()
        ]
        above = 0.16 * len(heading) + 0.13 * len(groups) + 0.14
        height = above + -(-len(top) // columns) * grid[1] + _MARGIN
        figure = Figure(figsize=(width, height))
        # One panel, in inches from the top: matplotlib is slow with a panel per sample.
        ax = figure.add_axes((0, 0, 1, 1))
        ax.axis("off")
        ax.text(_MARGIN, _MARGIN, "\n".join(heading), va="top", fontsize=9, fontweight="bold", parse_math=False)
        for n, line in enumerate(groups):
            y = _MARGIN + 0.16 * len(heading) + 0.13 * n
            ax.text(_MARGIN, y, line, va="top", fontsize=7.5, parse_math=False)
        images = draw_images(ax, data, _BELOW * captioned)
        show = (lambda *at: draw_caption(ax, data, *at)) if modality == "text" else images
        for n, (row, of_feature) in enumerate(zip(top.itertuples(), found, strict=True)):
            x = _MARGIN + n % columns * (grid[0] + _BETWEEN)
            y = above + n // columns * grid[1]
            place = f"#{row.rank}  layer {row.layer}, feature {row.feature}"
            ax.text(x, y, place, va="top", fontsize=7.5, fontweight="bold")
            if names is not None:
                words, colour = _name_and_colour(names, int(row.layer), int(row.feature))
                line = wrapped(words, grid[0], 1, 7)
                ax.text(x, y + 0.25, line, va="baseline", fontsize=7, color=colour, parse_math=False)
            numbers = f"$\\Delta$ {row.delta:.3g}, $\\rho_G$ {row.rho_g:.2f}, $\\rho_H$ {row.rho_h:.2f}"
            ax.text(x, y + 0.4, numbers, va="baseline", fontsize=6.5)
            share = f"active on {row.density:.1%}"
            ax.text(x + grid[0], y + 0.4, share, ha="right", va="baseline", fontsize=6.5)
            shares = f"top share {row.top_share:.0%}, calibrated {row.calibrated_top_share:.0%}"
            line = wrapped(f"calibrated #{row.calibrated_rank}; {shares}", grid[0], 1, 6.5)
            ax.text(x, y + 0.53, line, va="baseline", fontsize=6.5)
            if not len(of_feature):
                ax.text(x, y + _ABOVE, "active on no sample", va="top", fontsize=6.5)
            for k, sample in enumerate(of_feature):
                show(int(sample), x + k % side * pitch[0], y + _ABOVE + k // side * pitch[1])
        ax.set(xlim=(0, width), ylim=(height, 0), aspect="auto")
        save(figure, out)


def _name_and_colour(names: pd.DataFrame, layer: int, feature: int) -> tuple[str, str]:
    """A feature's name or best candidate, and its colour."""
    row = names[(names.layer == layer) & (names.feature == feature)].iloc[0]
    if isinstance(row["name"], str):
        return row["name"], "black"
    return f"perhaps {row.candidate}" if isinstance(row.candidate, str) else "no clear name", "0.45"
