"""The samples whose image and caption fit worst and best."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from conceptshare.figures._cards import CELL, GAP, LINE, draw_images, fonts, one_warning_for_missing_letters, wrapped
from conceptshare.figures._style import BLUE, FIXED_LAYOUT, PAGE, STYLE, save

if TYPE_CHECKING:  # heavy, and other figures do not need it
    from conceptshare.data.dataset import Data

# In inches, unless they are numbers of cells or lines.
_COLUMNS, _ROWS, _LINES = 10, 3, 4
_PITCH = CELL + GAP, CELL + GAP + _LINES * LINE + GAP
_HISTOGRAM, _TITLE, _MARGIN = 1.9, 0.3, 0.08


def draw_samples(table: pd.DataFrame, data: "Data", out: Path) -> None:
    """A histogram of the fit of all samples, and below it those that fit worst and best, with their captions.

    Args:
        table: the table of `analysis.samples.fit_table`.
        data: the samples.
        out: where the PNG goes; the PDF goes next to it.
    """
    shown = min(_COLUMNS * _ROWS, max(1, len(table) // 5))
    grids = {"Worst fit": table[:shown], "Best fit": table[-shown:][::-1]}
    rows = -(-shown // _COLUMNS)
    height = _HISTOGRAM + len(grids) * (_TITLE + rows * _PITCH[1]) + _MARGIN
    with one_warning_for_missing_letters(out), mpl.rc_context(STYLE | FIXED_LAYOUT | {"font.family": fonts()}):
        figure = Figure(figsize=(PAGE, height))
        histogram = figure.add_axes((0.08, 1 - (_HISTOGRAM - 0.55) / height, 0.9, (_HISTOGRAM - 1) / height))
        histogram.hist(table.fit, bins=50, color=BLUE)
        histogram.set(xlabel="fit, in standard deviations", ylabel="samples")
        histogram.axvline(0, color="0.3", linewidth=0.8, linestyle=":")
        # One panel, in inches from the top: matplotlib is slow with a panel per sample.
        ax = figure.add_axes((0, 0, 1, 1))
        ax.axis("off")
        ax.text(_MARGIN, _MARGIN, _heading(table.attrs), va="top", fontsize=9, fontweight="bold", parse_math=False)
        show = draw_images(ax, data, _LINES)
        for n, (title, chosen) in enumerate(grids.items()):
            y = _HISTOGRAM + n * (_TITLE + rows * _PITCH[1])
            span = f"{title}: {chosen.fit.iloc[0]:.2f} to {chosen.fit.iloc[-1]:.2f}"
            ax.text(_MARGIN, y, span, va="top", fontsize=9, fontweight="bold")
            for k, sample in enumerate(chosen.row):
                show(int(sample), _MARGIN + k % _COLUMNS * _PITCH[0], y + _TITLE - 0.08 + k // _COLUMNS * _PITCH[1])
        ax.set(xlim=(0, PAGE), ylim=(height, 0), aspect="auto")
        save(figure, out)


def _heading(record: dict[str, Any]) -> str:
    """The members and layers that a table of `analysis.samples.fit_table` is by, and those that are not explained."""

    def in_words(layers: dict[str, list[int]]) -> str:
        return " and ".join(
            f"{member}, layer{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
            for member, numbers in layers.items()
            if numbers
        )

    heading = wrapped(f"Fit by features of {in_words(record['layers'])}", PAGE - 2 * _MARGIN, 1, 9, "bold")
    if marked := in_words(record["unexplained"]):
        note = f"SAEs with an FVU above {record['max_fvu_global']:g} at global tokens: {marked}"
        heading += f"\n{wrapped(note, PAGE - 2 * _MARGIN, 1, 9, 'bold')}"
    return heading
