"""Training curves and quality of the SAEs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import (
    LogLocator,
    MaxNLocator,
    MultipleLocator,
    NullLocator,
    PercentFormatter,
)
from numpy.typing import NDArray

from conceptshare.figures._style import COLOURS, FIXED_LAYOUT, RED, STYLE, fitted, layer_ticks, save
from conceptshare.io.errors import StoreError
from conceptshare.io.files import SAE_FIGURES, atomic_output
from conceptshare.sae.folder import REMEDY, sae_file, sae_of


class _Look(NamedTuple):
    name: str
    colour: str
    face: str


# The kinds of tokens that SAEs are measured over.
_TOKENS = {"all": _Look("all tokens", "#1f6fb4", "#a9cbe8"), "global": _Look("global tokens", "#b84a00", "none")}
_SEED_LINES: Any = ("-", "--", ":", "-.")
_POINTS = 300
"""Points per curve; a panel is not many more pixels wide."""
_FEW_STEPS = 50
"""Curves of fewer steps are only shown smoothed."""
_RAW, _SMOOTH = "0.83", "0.15"
_MEMBER_DPI = 110
_SMALL: Any = {"xtick.labelsize": 7, "ytick.labelsize": 7, "axes.labelsize": 7, "axes.titlesize": 8.5}

_Points = NDArray[Any]


_BOUND: Any = {"color": RED, "linewidth": 0.7, "linestyle": (0, (4, 2))}


def draw_saes(table: pd.DataFrame, saes: Path, out: Path) -> None:
    """An overview of all SAEs at ``out``, and next to it a folder of the same name with a PNG per member.

    Raises:
        StoreError: if an SAE's loss curve or densities are missing or unreadable.
    """
    trainings = [_read_training(row, saes) for row in table.itertuples()]
    with mpl.rc_context(STYLE | FIXED_LAYOUT):
        save(_overview(trainings, table.attrs["max_fvu_global"]), out)
        with atomic_output(out.with_suffix(""), SAE_FIGURES) as folder:
            folder.mkdir()
            for member, of_member in _grouped(trainings, lambda sae: f"{sae.encoder}@{sae.seed}").items():
                with mpl.rc_context(_SMALL):
                    figure = _member_figure(member, of_member)
                    figure.savefig(folder / f"{member}.png", dpi=_MEMBER_DPI, metadata={"Software": None})


@dataclass(frozen=True)
class _Training:
    """What the figures show of one SAE: numbers, and points reduced to what a panel can resolve."""

    encoder: str
    seed: int
    layer: int
    steps: int
    fvu: dict[str, float]
    """Over ``all`` and over ``global`` tokens; NaN if the tokens do not vary. The same for the others."""
    l0: dict[str, float]
    dead: dict[str, float]
    losses: tuple[float, float]
    """At the first step, and at the end of the smoothed curve."""
    raw: tuple[_Points, _Points]
    """Steps, and losses relative to the first: positive or NaN, as a logarithmic axis needs."""
    smooth: tuple[_Points, _Points]
    edges: _Points
    """Of the bins of log10 density, one more than bins."""
    latents: dict[str, _Points]
    """In each bin."""
    never: dict[str, int]
    """Number of latents that are active on no token."""


def _read_training(row: Any, saes: Path) -> _Training:
    folder, record = sae_of(saes / str(row.encoder), int(row.layer), int(row.seed))
    losses = np.full(1, np.nan)  # an imported SAE took no steps
    if row.steps:
        losses = _read_csv(sae_file(folder, "loss.csv", record), ["step", "loss"]).loss.to_numpy(np.float64)
    densities = _read_csv(sae_file(folder, "density.csv", record), ["tokens", "kind", "log10_density", "latents"])
    counted = densities.groupby("tokens").latents.sum()
    if len(losses) != max(row.steps, 1) or any(counted.get(tokens) != row.latents for tokens in _TOKENS):
        raise StoreError(f"{folder}: loss.csv or density.csv is cut off, or not of this training; {REMEDY}")
    bins, never = densities[densities.kind == "bin"], densities[densities.kind == "never"]
    smoothed = _smoothed(losses)
    shown = np.unique(np.linspace(0, len(losses) - 1, min(len(losses), _POINTS)).astype(np.int64))
    return _Training(
        encoder=str(row.encoder),
        seed=int(row.seed),
        layer=int(row.layer),
        steps=int(row.steps),
        fvu={tokens: float(getattr(row, f"fvu_{tokens}")) for tokens in _TOKENS},
        l0={tokens: float(getattr(row, f"l0_{tokens}")) for tokens in _TOKENS},
        dead={tokens: float(getattr(row, f"dead_{tokens}")) for tokens in _TOKENS},
        losses=(losses[0], smoothed[-1]),
        raw=_relative(*_extremes(losses), losses[0]),
        smooth=_relative(shown, smoothed[shown], losses[0]),
        # The last bin ends where a latent is active on every token.
        edges=np.append(bins[bins.tokens == "all"].log10_density.to_numpy(np.float64), 0.0),
        latents={tokens: bins[bins.tokens == tokens].latents.to_numpy(np.float64) for tokens in _TOKENS},
        never={tokens: int(never[never.tokens == tokens].latents.sum()) for tokens in _TOKENS},
    )


def _read_csv(path: Path, columns: list[str]) -> pd.DataFrame:
    try:
        table = pd.read_csv(path, usecols=columns)
        if table.empty:
            raise ValueError("no rows")
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: unreadable ({error}); {REMEDY}") from None
    return table


def _smoothed(values: _Points) -> _Points:
    """A running mean over 2% of the steps on either side, over fewer at the start, where the curve is steepest."""
    at = np.arange(len(values))
    reach = np.minimum(at, len(values) // 50)
    first, last = at - reach, np.minimum(at + reach, len(values) - 1)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    mean: _Points = (sums[last + 1] - sums[first]) / (last + 1 - first)
    return mean


def _extremes(values: _Points) -> tuple[_Points, _Points]:
    """The steps and values, or if there are many, the smallest and largest value of each stretch."""
    if len(values) <= 2 * _POINTS:
        return np.arange(len(values)), values
    starts = np.linspace(0, len(values), _POINTS, endpoint=False).astype(np.int64)
    extremes = np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)
    return np.repeat(starts, 2), np.stack(extremes, axis=1).ravel()


def _relative(steps: _Points, losses: _Points, first: float) -> tuple[_Points, _Points]:
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = losses / first
    return steps, np.where(np.isfinite(shares) & (shares > 0), shares, np.nan)


def _grouped(trainings: Sequence[_Training], key: Callable[[_Training], str]) -> dict[str, list[_Training]]:
    """The SAEs grouped by ``key``, in the order of the table, and sorted by seed and layer within."""
    groups: dict[str, list[_Training]] = {}
    for training in trainings:
        groups.setdefault(key(training), []).append(training)
    return {name: sorted(group, key=lambda sae: (sae.seed, sae.layer)) for name, group in groups.items()}


def _panels(rows: int, widths: Sequence[float], height: float, above: float, gap: float) -> tuple[Figure, Any]:
    """A figure with panels of sizes in inches; matplotlib's own layout is slow for many panels.

    Each row has room ``above`` it. ``gap`` is the room between columns and left of the first.
    """
    top, bottom, right = 0.42, 0.42, 0.15
    width_all, height_all = gap + sum(widths) + gap * (len(widths) - 1) + right, top + rows * (height + above) + bottom
    figure = Figure(figsize=(width_all, height_all))
    axes = np.empty((rows, len(widths)), dtype=object)
    for row, column in np.ndindex(axes.shape):
        left = gap * (column + 1) + sum(widths[:column])
        low = bottom + (rows - 1 - row) * (height + above)
        place = (left / width_all, low / height_all, widths[column] / width_all, height / height_all)
        axes[row, column] = figure.add_axes(place)
    return figure, axes


def _from_top(figure: Figure, inches: float) -> float:
    return float(1 - inches / figure.get_figheight())


def _overview(trainings: Sequence[_Training], bound: float) -> Figure:
    """For each encoder, its loss curves, a colour per layer, and its FVU, with its bound, and dead latents by layer."""
    of_encoders = _grouped(trainings, lambda sae: sae.encoder)
    seeds = sorted({sae.seed for sae in trainings})
    lines = {seed: _SEED_LINES[n % len(_SEED_LINES)] for n, seed in enumerate(seeds)}
    figure, axes = _panels(len(of_encoders), [3.2, 2.6, 2.6], 1.7, 0.65, 1.1)
    for (curves, fvu, dead), (encoder, saes) in zip(axes, of_encoders.items(), strict=True):
        curves.sharey(axes[0, 0])
        fvu.sharey(axes[0, 1])
        curves.set_title(encoder, loc="left", pad=15)
        _overview_losses(curves, saes, lines)
        _by_layer(fvu, saes, lambda sae: sae.fvu, lines)
        _by_layer(dead, saes, lambda sae: sae.dead, lines)
        dead.set_ylim(-0.03, 1.03)
        curves.set_ylabel("loss / first loss (log)")
        fvu.set_ylabel("FVU (log)")
        dead.set_ylabel("dead latents")
        dead.yaxis.set_major_formatter(PercentFormatter(1))
        fvu.axhline(1, color="0.6", linewidth=0.7, zorder=0)
        fvu.axhline(bound, zorder=0, **_BOUND)
    for ax in axes[0, :2]:
        _logarithmic(ax)
    for ax in axes[:, 0]:
        ax.xaxis.set_major_locator(_whole_numbers(6))
    for ax, label in zip(axes[-1], ("step", "layer", "layer"), strict=True):
        ax.set_xlabel(label)
    handles = [
        Line2D([], [], color=_TOKENS[t].colour, marker="o", markersize=3, label=_TOKENS[t].name) for t in _TOKENS
    ]
    if len(seeds) > 1:
        handles += [Line2D([], [], color="0.3", linestyle=lines[seed], label=f"seed {seed}") for seed in seeds]
    handles.append(Line2D([], [], color="0.6", linewidth=0.7, label="FVU 1: predicting the mean"))
    handles.append(Line2D([], [], label=f"unexplained above {bound:g}", **_BOUND))
    at = (0.995, _from_top(figure, 0.05))
    figure.legend(handles=handles, loc="upper right", bbox_to_anchor=at, ncols=len(handles), frameon=False, fontsize=8)
    return figure


def _overview_losses(ax: Axes, saes: Sequence[_Training], lines: dict[int, Any]) -> None:
    layers = sorted({sae.layer for sae in saes})
    colours = mpl.colormaps[COLOURS](np.linspace(0, 0.9, len(layers)))
    for sae in saes:
        marker = "o" if sae.steps == 1 else None
        style: dict[str, Any] = {"linestyle": lines[sae.seed], "linewidth": 0.9, "marker": marker}
        ax.plot(*sae.smooth, color=colours[layers.index(sae.layer)], **style)
    if not any(sae.steps for sae in saes):
        ax.text(0.5, 0.6, "imported", ha="center", color="0.4", transform=ax.transAxes)
    bar = ax.inset_axes((1.02, 0, 0.03, 1))
    bar.imshow(colours[:, None], aspect="auto", origin="lower")
    bar.set_xticks([])
    bar.yaxis.tick_right()
    bar.tick_params(length=0, labelsize=7)
    bar.spines[:].set_visible(False)
    bar.set_title("layer", fontsize=7, fontweight="normal", pad=3)
    layer_ticks(bar.yaxis, layers, most=8)


def _by_layer(
    ax: Axes, saes: Sequence[_Training], quantity: Callable[[_Training], dict[str, float]], lines: dict[int, Any]
) -> None:
    """A quantity by layer, a line per seed and kind of tokens."""
    for seed in sorted({sae.seed for sae in saes}):
        of_seed = [sae for sae in saes if sae.seed == seed]
        for tokens, look in _TOKENS.items():
            values = [quantity(sae)[tokens] for sae in of_seed]
            style: dict[str, Any] = {"color": look.colour, "linestyle": lines[seed], "marker": "o", "markersize": 3}
            ax.plot([sae.layer for sae in of_seed], values, linewidth=1.2, **style)
    if np.isnan([quantity(sae)[tokens] for sae in saes for tokens in _TOKENS]).all():
        ax.text(0.5, 0.6, "undefined", ha="center", color="0.4", transform=ax.transAxes)
    layers = sorted({sae.layer for sae in saes})
    layer_ticks(ax.xaxis, layers, positions=layers)
    ax.set_xlim(layers[0] - 0.5, layers[-1] + 0.5)


def _whole_numbers(most: int) -> MaxNLocator:
    return MaxNLocator(most, integer=True, min_n_ticks=1)


def _logarithmic(ax: Axes) -> None:
    """Make the y axis of ``ax``, and of all that share it, logarithmic; call it after everything is drawn."""
    ax.set_yscale("log")
    low, high = (float(end) for end in ax.get_ylim())
    if low <= 0:  # nothing that a logarithmic axis could show
        low, high = 0.1, 1
        ax.set_ylim(low, high)
    if high < 5 * low:  # powers of ten, or 1, 2 and 5 times those, would give one tick at most
        ticks = np.asarray(MaxNLocator(4).tick_values(low, high))
    else:
        ticks = np.asarray(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,), numticks=6).tick_values(low, high))
    within = [float(tick) for tick in ticks if low <= tick <= high]
    # Fixed ticks are placed once, not by each panel.
    ax.set_yticks(within, [_short(tick) for tick in within])
    ax.yaxis.set_minor_locator(NullLocator())


def _short(number: float) -> str:
    """The shortest exact notation: ``0.2`` and ``5000``, but ``1e+06``."""
    plain, power = f"{number:g}", f"{number:.0e}"
    return power if len(power) < len(plain) and np.isclose(float(power), number, atol=0) else plain


def _member_figure(member: str, saes: Sequence[_Training]) -> Figure:
    """A cell per layer: its loss curve, the densities of its latents, and its FVU, L0 and dead latents."""
    columns = 1 if len(saes) <= 6 else 2
    figure, axes = _panels(-(-len(saes) // columns), [2.1, 2.7] * columns, 0.85, 0.5, 0.62)
    cells = axes.reshape(-1, 2)
    for n, (panels, sae) in enumerate(zip(cells, saes, strict=False)):
        lowest = n + columns >= len(saes)
        for ax, first in zip(panels, cells[0], strict=True):
            # All share their axes, and ticks take matplotlib longest.
            ax.xaxis.set_visible(lowest)
            if n:
                ax.sharex(first)
                ax.sharey(first)
        _loss_panel(panels[0], sae)
        _density_panel(panels[1], sae)
        if lowest:
            panels[0].set_xlabel("step")
            panels[1].set_xlabel("$\\log_{10}$ of the fraction of tokens that activate a latent")
    losses, densities = cells[0]
    losses.xaxis.set_major_locator(_whole_numbers(4))
    _logarithmic(losses)
    densities.set_xlim(saes[0].edges[0], 0)
    densities.xaxis.set_major_locator(MultipleLocator(2))
    densities.set_ylim(0)
    densities.yaxis.set_major_locator(_whole_numbers(3))
    for ax in cells[len(saes) :].flat:
        ax.remove()
    name = fitted(member, figure.get_figwidth() - 0.2, 11, "bold")
    figure.text(0.01, _from_top(figure, 0.06), name, va="top", fontsize=11, fontweight="bold")
    names: list[Any] = [Line2D([], [], color=_SMOOTH, label="loss, smoothed")]
    if any(sae.steps >= _FEW_STEPS for sae in saes):
        names.append(Line2D([], [], color=_RAW, label="each step"))
    names += [Patch(facecolor=look.face, edgecolor=look.colour, label=look.name) for look in _TOKENS.values()]
    place = (1 - 0.15 / figure.get_figwidth(), _from_top(figure, 0.22))
    figure.legend(handles=names, loc="upper right", bbox_to_anchor=place, ncols=len(names), frameon=False, fontsize=7.5)
    return figure


def _loss_panel(ax: Axes, sae: _Training) -> None:
    if sae.steps >= _FEW_STEPS:
        ax.plot(*sae.raw, color=_RAW, linewidth=0.6)
    ax.plot(*sae.smooth, color=_SMOOTH, linewidth=1.1, marker="o" if sae.steps == 1 else None, markersize=3)
    ax.set_title(f"layer {sae.layer}", loc="left")
    loss = f"loss {sae.losses[0]:.3g} → {sae.losses[1]:.3g}" if sae.steps else "imported"
    ax.set_title(loss, loc="right", fontsize=7, fontweight="normal")
    ax.set_ylabel("loss / first loss (log)")


def _density_panel(ax: Axes, sae: _Training) -> None:
    for n, (tokens, look) in enumerate(_TOKENS.items()):
        filled = look.face != "none"
        ax.stairs(sae.latents[tokens], sae.edges, color=look.face if filled else look.colour, fill=filled)
        at: Any = {"xytext": (0, 13 - 9.5 * n), "xycoords": "axes fraction", "textcoords": "offset points"}
        ax.annotate(_numbers(sae, tokens), (0, 1), **at, color=look.colour, fontsize=7, va="bottom")
    ax.set_ylabel("latents")


def _numbers(sae: _Training, tokens: str) -> str:
    fvu = "undefined" if np.isnan(sae.fvu[tokens]) else f"{sae.fvu[tokens]:.3g}"
    never = sae.never[tokens]
    latents = int(sae.latents[tokens].sum()) + never
    return f"FVU {fvu}, L0 {sae.l0[tokens]:.3g}, dead {sae.dead[tokens]:.1%}: {never:,} of {latents:,}"
