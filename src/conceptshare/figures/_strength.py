"""The strength of features, and whether strong features are the shared ones."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from conceptshare.analysis.formats import short_labels
from conceptshare.figures._style import (
    BLUE,
    COLOURS,
    FIXED_LAYOUT,
    PAGE,
    STYLE,
    above,
    annotate_empty,
    fitted,
    known,
    save,
    text_width,
)
from conceptshare.metrics import coefficient_of_variation, correlation

_BINS = 40
_LEFT, _GAP, _BETWEEN, _RIGHT = 0.6, 0.45, 0.06, 0.12
"""Room left of the first column, right of it, between the others, and right of the last, in inches."""
_ABOVE, _HEADER, _BOTTOM = 0.33, 0.52, 0.42
"""Room above each row, above the names of columns, and below the last row, in inches."""
_COLUMNS = ["strength", "rho"]


def draw_strength(
    pairs: Iterable[tuple[str, str, pd.DataFrame]], out: Path, max_fvu_global: float | None = None
) -> None:
    """A row per source: how S is distributed over its features, and S against rho, in a column per target.

    The strength S of a feature is its sum over the samples. Features that were never active have no place on a
    logarithmic axis; they count in the coefficient of variation and in the correlations, as they do in the tables.
    The figure is as wide as a page, however many targets there are.

    Args:
        pairs: source, target, and a table of the source's features with at least ``source, target, strength, rho,
            left_out``; rows of other pairs, and of layers that are left out, are ignored. A source's distribution is
            taken from its first pair. The tables need not be in memory together.
        out: the path of the PNG.
        max_fvu_global: the bound above which layers are left out.
    """
    chosen, left_out = {}, False
    for a, b, table in pairs:
        of_pair = table[(table.source == a) & (table.target == b)]
        chosen[a, b] = of_pair.loc[~of_pair.left_out, _COLUMNS]
        left_out |= bool(of_pair.left_out.any())
    sources, targets = (list(dict.fromkeys(pair[side] for pair in chosen)) for side in (0, 1))
    members = list(dict.fromkeys([*sources, *targets]))
    targets = [member for member in members if member in targets]
    label = dict(zip(members, short_labels(members), strict=True))
    with mpl.rc_context(STYLE | FIXED_LAYOUT | {"xtick.labelsize": 6.5, "ytick.labelsize": 6.5}):
        figure, axes, first = _grid(len(sources), [f"to {label[target]}" for target in targets])
        images = []
        edges = _edges(list(chosen.values()))
        for (ax, *others), source in zip(axes, sources, strict=True):
            ax.set_title(fitted(label[source], first + _GAP, 8, "bold"), loc="left", fontsize=8, pad=12)
            strength = next(features.strength for (a, _), features in chosen.items() if a == source)
            _distribution(ax, strength.to_numpy(np.float64), edges)
            for other, target in zip(others, targets, strict=True):
                if (source, target) in chosen:
                    images.append(_against_rho(other, chosen[source, target], edges))
                elif source == target:
                    other.set_facecolor("0.9")
                    other.spines[:].set_visible(False)
                else:
                    other.set_axis_off()
        note = f"all layers: without {above(max_fvu_global)}" if left_out else ""
        _finish(figure, axes, [image for image in images if image is not None], edges, note)
        save(figure, out)


def _grid(rows: int, heads: Sequence[str]) -> tuple[Figure, NDArray[Any], float]:
    """A column for distributions and one per target, under its name, and the width of the first in inches.

    Positions are computed here because matplotlib's own layout takes minutes for a hundred panels.
    """
    columns = len(heads)
    first = 1.4 if columns <= 6 else 1.1
    other = min(2.2, (PAGE - _LEFT - first - _GAP - _RIGHT - (columns - 1) * _BETWEEN) / columns)
    high = min(1.0, max(0.42, other))
    turned = max(text_width(head, 7) for head in heads) > other
    shown = [fitted(head, 1.3 if turned else other, 7) for head in heads]
    names = max(text_width(head, 7) for head in shown) + 0.05 if turned else 0.15
    height = _HEADER + names + rows * (_ABOVE + high) + _BOTTOM
    figure = Figure(figsize=(PAGE, height))
    axes = np.empty((rows, 1 + columns), dtype=object)
    left = [_LEFT, *(_LEFT + first + _GAP + n * (other + _BETWEEN) for n in range(columns))]
    for row, column in np.ndindex(axes.shape):
        y = _BOTTOM + (rows - 1 - row) * (_ABOVE + high)
        wide = first if column == 0 else other
        axes[row, column] = figure.add_axes((left[column] / PAGE, y / height, wide / PAGE, high / height))
    for x, head in zip(left[1:], shown, strict=True):
        at: Any = {"x": (x + other / 2) / PAGE, "ha": "center"} if turned else {"x": x / PAGE, "ha": "left"}
        y = height - _HEADER - names
        figure.text(y=y / height, s=head, va="bottom", rotation=90 if turned else 0, fontsize=7, **at)
    for x in (_LEFT + first / 2, (left[1] + left[-1] + other) / 2):
        figure.text(x / PAGE, 0.06 / height, "$\\log_{10}$ S", ha="center", fontsize=8)
    return figure, axes, first


def _edges(tables: Sequence[pd.DataFrame]) -> NDArray[np.float64]:
    """Edges of the bins of log10 S."""
    active = [table.strength[table.strength > 0] for table in tables]
    ends = np.log10([value for of in active if len(of) for value in (of.min(), of.max())])
    low, high = (ends.min(), ends.max()) if len(ends) else (0.0, 1.0)
    return np.linspace(low, max(high, low + 0.1), _BINS + 1)


def _distribution(ax: Axes, strength: NDArray[np.float64], edges: NDArray[np.float64]) -> None:
    active = strength[strength > 0]
    if len(active):
        ax.stairs(np.histogram(np.log10(active), edges)[0], edges, fill=True, color=BLUE, alpha=0.6)
        ax.set_ylim(bottom=0)
        ax.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    else:
        annotate_empty(ax, "no feature is active", 7)
        ax.set_yticks([])
    words = (
        f"CV {known(coefficient_of_variation(strength))}, {len(strength) - len(active):,} of {len(strength):,} silent"
    )
    _write_above(ax, words, 6.5)


def _write_above(ax: Axes, words: str, size: float) -> None:
    at: Any = {"xytext": (0, 4), "xycoords": "axes fraction", "textcoords": "offset points"}
    ax.annotate(words, (0, 1), **at, fontsize=size)


def _against_rho(ax: Axes, features: pd.DataFrame, edges: NDArray[np.float64]) -> Any:
    room = ax.get_position().width * PAGE + _BETWEEN / 2
    size = min(6.5, 6.5 * room / text_width("r −0.00", 6.5))
    r = correlation(features.strength, features.rho)
    _write_above(ax, "r –" if np.isnan(r) else f"r {r:.2f}", size)
    active = features[features.strength > 0]
    if active.empty:
        annotate_empty(ax, "none\nactive", size)
        return None
    counts = np.histogram2d(np.log10(active.strength), active.rho.clip(0, 1), (edges, np.linspace(0, 1, _BINS + 1)))[0]
    shown = np.ma.masked_equal(counts.T, 0)
    place = (edges[0], edges[-1], 0, 1)
    return ax.imshow(shown, cmap=COLOURS, extent=place, origin="lower", aspect="auto", interpolation="none")


def _finish(
    figure: Figure, axes: NDArray[Any], images: Sequence[Any], edges: NDArray[np.float64], left_out: str
) -> None:
    """Give all panels one colour scale, and only the outer ones labels; a note names what is left out, if anything."""
    norm = LogNorm(1, max([2.0, *(float(image.get_array().max()) for image in images)]))
    for image in images:
        image.set_norm(norm)
    for row in axes:
        row[0].set_ylabel("features", fontsize=7)
        outer = next(ax for ax in row[1:] if ax.axison)
        outer.set_ylabel("ρ", fontsize=8)
        # Ticks take matplotlib longest.
        for ax in row[1:]:
            ax.set_ylim(0, 1.02)
            ax.yaxis.set_visible(ax is outer)
            ax.set_yticks([0, 0.5, 1] if ax is outer else [], ["0", "0.5", "1"] if ax is outer else [])
    width, height = figure.get_size_inches()
    for ax in axes.flat:
        ax.set_xlim(edges[0], edges[-1])
        ticks = 4 if ax.get_position().width * width > 0.8 else 2
        ax.xaxis.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 5, 10], prune="both"))
        ax.xaxis.set_visible(ax in axes[-1])
    if images:
        bar = figure.add_axes(((width - 1.6) / width, 1 - 0.2 / height, 1.45 / width, 0.09 / height))
        figure.colorbar(images[0], cax=bar, orientation="horizontal")
        bar.tick_params(labelsize=6.5, pad=1)
        figure.text((width - 1.66) / width, 1 - 0.155 / height, "features", ha="right", va="center", fontsize=7)
    at: Any = {"x": 0.1 / width, "va": "top"}
    figure.text(y=1 - 0.08 / height, s="Strength S of features, and its correlation r with ρ", fontweight="bold", **at)
    note = "CV: coefficient of variation of S. r: over all features, silent ones too. Grey: an encoder with itself."
    figure.text(y=1 - 0.26 / height, s="\n".join(filter(None, (note, left_out))), fontsize=7, **at)
