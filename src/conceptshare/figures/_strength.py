"""How strong features are, and whether the strong ones are the shared ones."""

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
from conceptshare.figures._style import BLUE, COLOURS, PLACED, STYLE, fitted, known, save, say_nothing
from conceptshare.metrics import coefficient_of_variation, correlation

_BINS = 40
_HEIGHT, _ABOVE = 1.25, 0.42
"""Of a row's panels and of the room above them, in inches."""
_FIRST, _GAP = 2.2, 0.75
"""Width of the first column, and the room right of it."""
_COLUMNS = ["strength", "rho"]
_SILENT = "no feature is active"


def draw_strength(pairs: Iterable[tuple[str, str, pd.DataFrame]], out: Path) -> None:
    """A row a source: how S is distributed over its features, and S against rho for each of its targets.

    The strength S of a feature is its sum over the samples. Features that were never active have no place on a
    logarithmic axis; they count in the coefficient of variation and in the correlations, as they do in the tables.

    Args:
        pairs: source, target, and a table of the source's features with at least ``source, target, strength, rho``, in
            which rows of other pairs are passed over. A source's distribution is taken from its first pair. The tables
            need not be in memory together.
        out: where the PNG goes; the PDF goes beside it.
    """
    chosen = [(a, b, table.loc[(table.source == a) & (table.target == b), _COLUMNS]) for a, b, table in pairs]
    of_sources: dict[str, list[tuple[str, pd.DataFrame]]] = {}
    for source, target, features in chosen:
        of_sources.setdefault(source, []).append((target, features))
    members = list(dict.fromkeys([*of_sources, *(target for _, target, _ in chosen)]))
    label = dict(zip(members, short_labels(members), strict=True))
    columns = max(len(targets) for targets in of_sources.values())
    with mpl.rc_context(STYLE | PLACED):
        figure, axes = _grid(len(of_sources), columns)
        images = []
        edges = _edges([features for _, _, features in chosen])
        for (ax, *others), (source, targets) in zip(axes, of_sources.items(), strict=True):
            ax.set_title(fitted(label[source], _FIRST + _GAP, 9.5, "bold"), loc="left", pad=16)
            _distribution(ax, targets[0][1].strength.to_numpy(np.float64), edges)
            for other, (target, features) in zip(others, targets, strict=False):
                images.append(_against_rho(other, features, edges))
                r = correlation(features.strength, features.rho)
                name = fitted(f"to {label[target]}", _other(columns), 7.5)
                other.set_title(f"{name}\nr {known(r)}", fontsize=7.5, fontweight="normal", loc="left")
            for other in others[len(targets) :]:
                other.remove()
        _finish(figure, axes, [image for image in images if image is not None], edges)
        save(figure, out)


def _other(columns: int) -> float:
    return 1.5 if columns > 2 else 2.2


def _grid(rows: int, columns: int) -> tuple[Figure, NDArray[Any]]:
    """A column for distributions, and apart from it ``columns`` for pairs, of the same size in every figure.

    Places are set by hand: matplotlib takes minutes to find them for a hundred panels.
    """
    left, other, between, right = 0.65, _other(columns), 0.12, 0.95
    top, bottom = 0.6, 0.5
    width = left + _FIRST + _GAP + columns * other + (columns - 1) * between + right
    height = top + rows * (_HEIGHT + _ABOVE) + bottom
    figure = Figure(figsize=(width, height))
    axes = np.empty((rows, 1 + columns), dtype=object)
    for row, column in np.ndindex(axes.shape):
        x = left if column == 0 else left + _FIRST + _GAP + (column - 1) * (other + between)
        y = bottom + (rows - 1 - row) * (_HEIGHT + _ABOVE)
        wide = _FIRST if column == 0 else other
        axes[row, column] = figure.add_axes((x / width, y / height, wide / width, _HEIGHT / height))
    return figure, axes


def _edges(tables: Sequence[pd.DataFrame]) -> NDArray[np.float64]:
    """Of the bins of log10 S."""
    active = [table.strength[table.strength > 0] for table in tables]
    ends = np.log10([value for of in active if len(of) for value in (of.min(), of.max())])
    low, high = (ends.min(), ends.max()) if len(ends) else (0.0, 1.0)
    return np.linspace(low, max(high, low + 0.1), _BINS + 1)


def _distribution(ax: Axes, strength: NDArray[np.float64], edges: NDArray[np.float64]) -> None:
    active = strength[strength > 0]
    if len(active):
        ax.stairs(np.histogram(np.log10(active), edges)[0], edges, fill=True, color=BLUE, alpha=0.6)
        ax.set_ylim(bottom=0)
        ax.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    else:
        say_nothing(ax, _SILENT)
        ax.set_yticks([])
    words = (
        f"CV {known(coefficient_of_variation(strength))}, {len(strength) - len(active):,} of {len(strength):,} silent"
    )
    at: Any = {"xytext": (0, 6), "xycoords": "axes fraction", "textcoords": "offset points"}
    ax.annotate(words, (0, 1), **at, fontsize=8)


def _against_rho(ax: Axes, features: pd.DataFrame, edges: NDArray[np.float64]) -> Any:
    active = features[features.strength > 0]
    if active.empty:
        say_nothing(ax, _SILENT)
        return None
    counts = np.histogram2d(np.log10(active.strength), active.rho.clip(0, 1), (edges, np.linspace(0, 1, _BINS + 1)))[0]
    shown = np.ma.masked_equal(counts.T, 0)
    place = (edges[0], edges[-1], 0, 1)
    return ax.imshow(shown, cmap=COLOURS, extent=place, origin="lower", aspect="auto", interpolation="none")


def _finish(figure: Figure, axes: NDArray[Any], images: Sequence[Any], edges: NDArray[np.float64]) -> None:
    """One colour scale for all panels, and labels on the outer ones alone."""
    norm = LogNorm(1, max([2.0, *(float(image.get_array().max()) for image in images)]))
    for image in images:
        image.set_norm(norm)
    for ax in axes[:, 0]:
        ax.set_ylabel("features")
    for ax in axes[:, 1]:
        ax.set_ylabel("ρ")
        ax.set_yticks([0, 0.5, 1])
    for ax in axes[-1]:
        ax.set_xlabel("$\\log_{10}$ S")
        ax.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10], prune="both"))
    # Ticks are what takes matplotlib longest.
    for ax in axes[:, 2:].flat:
        ax.yaxis.set_visible(False)
    for ax in axes[:-1].flat:
        ax.xaxis.set_visible(False)
    for ax in axes.flat:
        ax.set_xlim(edges[0], edges[-1])
    for ax in axes[:, 1:].flat:
        ax.set_ylim(0, 1.02)
    inch = 1 / figure.get_figwidth(), 1 / figure.get_figheight()
    if images:
        bar = figure.add_axes((1 - 0.8 * inch[0], 0.5 * inch[1], 0.12 * inch[0], _HEIGHT * inch[1]))
        figure.colorbar(images[0], cax=bar, label="features")
    at: Any = {"x": 0.1 * inch[0], "va": "top"}
    figure.text(y=1 - 0.1 * inch[1], s="Strength S of features, and its correlation r with ρ", fontweight="bold", **at)
    figure.text(y=1 - 0.27 * inch[1], s="in the paper, coefficient of variation (CV) 1.91, r 0.36", **at)
