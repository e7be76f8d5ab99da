"""The wMPPC matrices."""

from collections.abc import Sequence
from itertools import groupby, pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from conceptshare.analysis.formats import short_labels
from conceptshare.figures._style import (
    ABOVE_CHANCE,
    FIXED_LAYOUT,
    PAGE,
    READING_TITLES,
    STYLE,
    VALUES,
    fitted,
    heatmap,
    marks_note,
    save,
    text_width,
)

# In inches.
_WORD, _GAP, _TITLE, _BAR, _NOTE = 0.2, 0.14, 0.36, 0.68, 0.16
"""Room for the words "from" and "to", between panels, for a panel's title, for the colour bar, and for a note."""
_MAX_CELL, _MIN_CELL = 0.6, 0.21
"""Sides of a cell. If one row of panels needs smaller cells, there are two rows."""
_LABEL = 2.0
"""Longer names of members are shortened."""
_MODALITIES = {"image": "images", "text": "text"}
_KINDS = {"vlm": "vision-language", "vision": "vision", "language": "language", "untrained": "untrained"}
_HEADING = "input, kind of model"
_SHORT = {"pooled": "pooled", "layer_mean": "mean over layers", "last": "last layer"}
_CODES = {"before_topk": "before TopK", "after_topk": "after TopK"}


class _Group(NamedTuple):
    modality: str
    kind: str
    first: int
    last: int


def draw_matrix(table: pd.DataFrame, out: Path) -> None:
    """The wMPPC matrix of each reading, and below it the excess over chance, with members in groups of one kind.

    Cells that are not above their null are hatched. Those with unexplained layers have a marked upper corner, and
    those that leave such layers out a marked lower corner. It fits the width of a printed page. Cells show their
    numbers if these are large enough to read. The matrix table has at least ``source, target, source_modality,
    source_kind, reading, wmppc, excess, p, unexplained, left_out, code``; features before and after TopK have panels
    of their own, with the same colours.
    """
    members, codes = (list(dict.fromkeys(table[column])) for column in ("source", "code"))
    blocks = list(product(codes, VALUES))
    groups = _groups(table.drop_duplicates("source"))
    notes = _notes(table)
    with mpl.rc_context(STYLE | FIXED_LAYOUT):
        figure, axes, bars, cell = _panels(short_labels(members), groups, len(blocks), len(notes))
        letters = min(7.0, 72 * cell / 2.7)  # a number is 2.3 times as wide as high, and lines take some of a cell
        for n, (ax, ((code, value), reading)) in enumerate(zip(axes, product(blocks, READING_TITLES), strict=True)):
            cells, p, with_unexplained, left_out = (
                table[(table.reading == reading) & (table.code == code)]
                .pivot(index="source", columns="target", values=column)
                .reindex(index=members, columns=members)
                .to_numpy()
                for column in (value, "p", "unexplained", "left_out")
            )
            top = float(table[value].max()) if table[value].max() > 0 else 1.0
            marks = (p > ABOVE_CHANCE, with_unexplained > 0, left_out > 0)
            image = heatmap(ax, cells, 0, top, letters if letters >= 4.5 else None, *marks)
            ax.set_title(_title(value, reading, code if len(codes) > 1 else None), fontsize=8)
            for before, group in pairwise(groups):
                line: Any = {"color": "white", "linewidth": 1.5 if before.modality == group.modality else 3}
                ax.axhline(group.first - 0.5, **line)
                ax.axvline(group.first - 0.5, **line)
            bar_ticks: Any = {"ticks": MaxNLocator(4), "format": lambda tick, _: f"{tick:.3g}"}
            figure.colorbar(image, cax=bars[n // len(READING_TITLES)], label=VALUES[value], **bar_ticks)
        place = 0.04 / figure.get_figwidth(), 0.04 / figure.get_figheight()
        figure.text(*place, "\n".join(notes), va="bottom", fontsize=6.5, color="0.3")
        for bar in bars:
            bar.tick_params(labelsize=7)
        save(figure, out)


def _notes(table: pd.DataFrame) -> list[str]:
    """What the marks of cells mean, in lines."""
    note = "grey: an encoder with itself" + (", or no value" if table.wmppc.isna().any() else "")
    if (table.p > ABOVE_CHANCE).any():
        note += "; hatched: not above the level of samples that are re-paired at random"
    return [*filter(None, (note, marks_note(table, "marked upper corner:", "marked lower corner:")))]


def _title(value: str, reading: str, code: str | None) -> str:
    """Two lines; with a code, if the figure shows several."""
    if code is None:
        return READING_TITLES[reading].replace(", ", ",\n") if value == "wmppc" else f"Excess:\n{_SHORT[reading]}"
    words = _CODES[code] if value == "wmppc" else f"excess {_CODES[code]}"
    return f"{words[0].upper()}{words[1:]}:\n{_SHORT[reading]}"


def _groups(members: pd.DataFrame) -> list[_Group]:
    """Consecutive members of one modality and kind."""
    kinds = list(zip(members.source_modality, members.source_kind, strict=True))
    runs = [[n for n, _ in run] for _, run in groupby(enumerate(kinds), key=lambda numbered: numbered[1])]
    return [_Group(*kinds[places[0]], first=places[0], last=places[-1]) for places in runs]


def _panels(
    labels: Sequence[str], groups: Sequence[_Group], blocks: int, notes: int
) -> tuple[Figure, list[Axes], list[Axes], float]:
    """Three square panels for each block, an axis for each block's colour bar, and the side of a cell in inches.

    There is room for some notes below.

    Positions are computed here because the font size depends on the size of cells.
    """
    names = [f"{_MODALITIES[group.modality]}, {_KINDS[group.kind]}" for group in groups]
    labels = [fitted(label, _LABEL, 6.5) for label in labels]
    for columns in (3, 2):
        cell, letters = _MAX_CELL, 6.5
        for _ in range(3):  # smaller letters leave more room, which makes larger cells
            label = max(text_width(words, letters) for words in labels)
            left = _WORD + max(text_width(words, letters) for words in (*names, _HEADING)) + 0.2 + label
            cell = min(_MAX_CELL, (PAGE - left - _BAR - (columns - 1) * _GAP) / columns / len(labels))
            letters = min(6.5, 0.85 * 72 * cell)
        if cell >= _MIN_CELL:
            break
    slanted = 72 * cell >= 12
    below = _WORD + 0.08 + label * (0.75 if slanted else 1)
    side, rows = cell * len(labels), -(-3 // columns)
    width, row_height = left + columns * side + (columns - 1) * _GAP + _BAR, _TITLE + side + below
    height = blocks * rows * row_height + notes * _NOTE
    figure = Figure(figsize=(width, height))
    axes, bars = [], []
    for block, n in product(range(blocks), range(3)):
        x = left + n % columns * (side + _GAP)
        y = height - (block * rows + n // columns) * row_height - _TITLE - side
        ax = figure.add_axes((x / width, y / height, side / width, side / height))
        turned: Any = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if slanted else {"rotation": 90}
        ax.set_xticks(range(len(labels)), labels, fontsize=letters, **turned)
        ax.set_yticks(range(len(labels)), labels if n % columns == 0 else [], fontsize=letters)
        figure.text((x + side / 2) / width, (y - below + 0.04) / height, "to", ha="center", va="bottom", fontsize=8)
        if n % columns == 0:
            figure.text(0.04 / width, (y + side / 2) / height, "from", rotation=90, va="center", fontsize=8)
            _bracket(ax, groups, names, (label + 0.11) / side, letters)
        axes.append(ax)
    for block in range(blocks):
        y = height - block * rows * row_height - _TITLE - side
        bars.append(figure.add_axes(((width - _BAR + 0.08) / width, y / height, 0.1 / width, side / height)))
    return figure, axes, bars, cell


def _bracket(ax: Axes, groups: Sequence[_Group], names: Sequence[str], away: float, letters: float) -> None:
    """A line and a name left of the labels of each group, under a heading, ``away`` from the panel in its widths."""
    along = ax.get_yaxis_transform()
    at: Any = {"xytext": (-4, 0), "xycoords": along, "textcoords": "offset points"}
    for group, name in zip(groups, names, strict=True):
        ends = group.first - 0.4, group.last + 0.4
        ax.plot([-away] * 2, ends, color="0.3", linewidth=1, clip_on=False, transform=along)
        ax.annotate(name, (-away, sum(ends) / 2), **at, ha="right", va="center", fontsize=letters)
    ax.annotate(_HEADING, (-away, -0.5), **at, ha="right", va="bottom", fontsize=letters, color="0.3")
