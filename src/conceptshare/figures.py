"""Stage `figures`: pictures of a study's tables, each as PNG to look at and PDF to print.

Colours are perceptually uniform and readable by the colour-blind and in grey; the style is set in one place.
"""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from conceptshare.dataset import Data
from conceptshare.features import FeatureStatistics
from conceptshare.store import layer_name, written_aside
from conceptshare.tables import as_member

_STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.dpi": 150,
    "savefig.bbox": "tight",
    "savefig.facecolor": "white",
    "pdf.fonttype": 42,
}
_COLOURS = "viridis"
_READINGS = {
    "pooled": "All layers, pooled (Eq. 6)",
    "layer_mean": "All layers, mean over layers",
    "last": "Last layer",
}
_GRID_SAMPLES = 8


def draw_matrix(table: pd.DataFrame, out: Path) -> None:
    """The wMPPC matrix of each reading, annotated, with one colour scale and lines between groups."""
    members = list(dict.fromkeys(table["source"]))
    labels = short_labels(members)
    of_member = table.drop_duplicates("source").set_index("source")
    groups = [f"{of_member.source_modality[m]} {of_member.source_kind[m]}" for m in members]
    side = 1.5 + 0.55 * len(members)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(3 * side + 0.8, side + 0.6), layout="constrained")
        axes = figure.subplots(1, len(_READINGS), sharey=True)
        for ax, (reading, title) in zip(axes, _READINGS.items(), strict=True):
            of_reading = table[table.reading == reading]
            cells = of_reading.pivot(index="source", columns="target", values="wmppc").loc[members, members]
            image = _heatmap(ax, cells.to_numpy(), 0, max(table.wmppc.max(), 1e-6), annotate=True)
            ax.set_title(title)
            ax.set_xticks(range(len(members)), labels, rotation=45, ha="right", rotation_mode="anchor")
            ax.set_yticks(range(len(members)), labels)
            for n in range(1, len(members)):
                if groups[n] != groups[n - 1]:
                    ax.axhline(n - 0.5, color="white", linewidth=2)
                    ax.axvline(n - 0.5, color="white", linewidth=2)
            ax.set_xlabel("to")
        axes[0].set_ylabel("from")
        figure.colorbar(image, ax=axes, label="wMPPC", shrink=0.85)
        save(figure, out)


def draw_layerwise(table: pd.DataFrame, pairs: Sequence[tuple[str, str]], out: Path) -> None:
    """WMPPC from each layer of one member to each layer of another, a panel a pair, with one colour scale (Fig. 1)."""
    chosen = [table[(table.source == a) & (table.target == b)] for a, b in pairs]
    top = float(np.nanmax([1e-6, *(panel.wmppc.max() for panel in chosen)]))
    columns = min(3, len(pairs))
    rows = -(-len(pairs) // columns)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(3.5 * columns + 0.8, 3.4 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
        for ax, (a, b), panel in zip(axes.flat, pairs, chosen, strict=False):
            cells = panel.pivot(index="source_layer", columns="target_layer", values="wmppc")
            image = _heatmap(ax, cells.to_numpy(), 0, top, annotate=cells.size <= 64)
            _layer_ticks(ax.xaxis, list(cells.columns))
            _layer_ticks(ax.yaxis, list(cells.index))
            ax.invert_yaxis()
            ax.set_title(_pair_title(a, b))
            ax.set_xlabel(f"layer of {b}")
            ax.set_ylabel(f"layer of {a}")
        for ax in axes.flat[len(pairs) :]:
            ax.remove()
        figure.colorbar(image, ax=list(axes.flat[: len(pairs)]), label="wMPPC", shrink=0.85)
        save(figure, out)


def draw_sharedness(
    table: pd.DataFrame, statistics: dict[int, FeatureStatistics], data: Data, pictured: int, out: Path
) -> None:
    """The top features of a ranking, a row each, by the samples on which they are strongest."""
    top = table.head(pictured)
    captioned_rows = 1.62
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(1.25 * (_GRID_SAMPLES + 1.2), captioned_rows * len(top) + 0.5), layout="constrained")
        grid = figure.subplots(
            len(top), _GRID_SAMPLES + 1, squeeze=False, gridspec_kw={"width_ratios": [1.25] + [1] * _GRID_SAMPLES}
        )
        for axes, row in zip(grid, top.itertuples(), strict=True):
            for ax in axes:
                ax.axis("off")
            text = f"#{row.rank}  feature {row.feature}\n$\\Delta$ = {row.delta:.3g}\n"
            text += f"$\\rho_G$ = {row.rho_g:.2f}\n$\\rho_H$ = {row.rho_h:.2f}\nactive on {row.density:.1%}"
            axes[0].text(0, 0.5, text, va="center", transform=axes[0].transAxes, fontsize=8)
            samples = statistics[int(row.layer)].top_samples[int(row.feature)][:_GRID_SAMPLES]
            for ax, sample in zip(axes[1:], samples, strict=False):
                if sample >= 0:
                    _picture(ax, data, int(sample))
        figure.suptitle(f"Top features of {table.source[0]}, layer {table.layer[0]}, by Comparative Sharedness")
        save(figure, out)


def draw_saes(saes: pd.DataFrame, folder: Path, out: Path) -> None:
    """For each encoder, the loss curves of its SAEs, and their FVU and dead share by layer."""
    encoders = list(dict.fromkeys(saes.encoder))
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(3.1 * len(encoders) + 0.6, 5.2), layout="constrained")
        axes = figure.subplots(2, len(encoders), squeeze=False)
        for column, encoder in enumerate(encoders):
            of_encoder = saes[saes.encoder == encoder]
            curves, quality = axes[:, column]
            _loss_curves(curves, of_encoder, folder)
            curves.set_title(encoder)
            for seed, of_seed in of_encoder.groupby("seed"):
                style: dict[str, Any] = {"linestyle": "-" if seed == of_encoder.seed.min() else "--", "marker": "o"}
                style["markersize"] = 3
                quality.plot(of_seed.layer, of_seed.fvu_all, color="C0", label=f"FVU, seed {seed}", **style)
                quality.plot(of_seed.layer, of_seed.dead_all, color="C1", label=f"dead, seed {seed}", **style)
            quality.set_ylim(0, 1)
            quality.set_xlabel("layer")
            _layer_ticks(quality.xaxis, sorted(set(of_encoder.layer)), positions=sorted(set(of_encoder.layer)))
            quality.legend(frameon=False, fontsize=7)
        axes[0, 0].set_ylabel("loss / loss of the first step")
        axes[1, 0].set_ylabel("share")
        save(figure, out)


def short_labels(members: Sequence[str]) -> list[str]:
    """Members without their seed where each encoder occurs once."""
    encoders = [as_member(member).encoder for member in members]
    return [e if encoders.count(e) == 1 else m for e, m in zip(encoders, members, strict=True)]


def save(figure: Figure, out: Path) -> None:
    """Write a figure as PNG at ``out`` and as PDF beside it, without dates, so that equal data give equal files."""
    for path, metadata in ((out.with_suffix(".pdf"), {"CreationDate": None}), (out, {"Software": None})):
        with written_aside(path) as partial:
            figure.savefig(partial, format=path.suffix[1:], metadata=metadata)


def _heatmap(ax: Axes, cells: np.ndarray[Any, Any], low: float, high: float, annotate: bool) -> Any:
    image = ax.imshow(cells, cmap=_COLOURS, vmin=low, vmax=high, aspect="equal")
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    ax.set_facecolor("0.9")
    if annotate:
        for (i, j), value in np.ndenumerate(cells):
            if np.isfinite(value):
                dark = value < low + 0.6 * (high - low)
                colour = "white" if dark else "black"
                ax.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=7.5)
    return image


def _layer_ticks(axis: Any, layers: Sequence[int], positions: Sequence[int] | None = None) -> None:
    step = -(-len(layers) // 12)
    places = range(len(layers)) if positions is None else positions
    axis.set_ticks(list(places)[::step], [str(layer) for layer in layers[::step]])


def _pair_title(a: str, b: str) -> str:
    first, second = as_member(a), as_member(b)
    if first.encoder == second.encoder:
        return f"{first.encoder}, seeds {first.seed} and {second.seed}"
    return f"{a} and {b}"


def _picture(ax: Axes, data: Data, sample: int) -> None:
    picture = data.image(sample)
    picture.thumbnail((160, 160))
    ax.imshow(np.asarray(picture), interpolation="lanczos")
    words = data.caption(sample)
    short = words if len(words) <= 44 else words[:43].rsplit(" ", 1)[0] + "…"
    # A caption is the user's text: a dollar sign in it is no formula.
    ax.set_anchor("S")
    ax.text(0.5, -0.06, fill(short, 22), fontsize=5.5, ha="center", va="top", transform=ax.transAxes, parse_math=False)


def _loss_curves(ax: Axes, saes: pd.DataFrame, folder: Path) -> None:
    layers = sorted(set(saes.layer))
    colours = mpl.colormaps[_COLOURS](np.linspace(0, 0.9, len(layers)))
    for row in saes.itertuples():
        path = folder / str(row.encoder) / layer_name(int(row.layer)) / f"seed-{row.seed}" / "loss.csv"
        curve = pd.read_csv(path)
        label = f"layer {row.layer}" if row.layer in (layers[0], layers[-1]) and row.seed == saes.seed.min() else None
        colour = colours[layers.index(row.layer)]
        ax.plot(curve.step, curve.loss / curve.loss.iloc[0], color=colour, linewidth=0.9, label=label)
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("step")
    ax.legend(frameon=False, fontsize=7)
