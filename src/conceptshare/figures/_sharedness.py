"""Grids of the samples that activate a ranking's top features most."""

import re
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from conceptshare.figures._style import FIXED_LAYOUT, PAGE, STYLE, save, text_width, unexplained
from conceptshare.io.progress import warn

if TYPE_CHECKING:  # heavy, and other figures do not need them
    from conceptshare.data.dataset import Data
    from conceptshare.io.readers import FeatureStatistics

# Fonts that systems have for Chinese, Japanese, Korean, Indian and other scripts, which matplotlib's own lacks.
_WIDE_FONTS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "Noto Sans SC", "Noto Sans JP", "Noto Sans KR"),
    *("Source Han Sans SC", "Source Han Sans", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Droid Sans Fallback"),
    *("IPAexGothic", "IPAGothic", "NanumGothic", "Unifont"),
    *("PingFang SC", "Hiragino Sans", "Apple SD Gothic Neo", "Arial Unicode MS"),
    *("Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "SimHei", "MS Gothic"),
    *("Noto Sans Devanagari", "Noto Sans Bengali", "Noto Sans Tamil", "Noto Sans Telugu", "Noto Sans Gujarati"),
    *("Noto Sans Thai", "Noto Sans Ethiopic", "Noto Sans Hebrew", "Noto Sans Arabic", "Lohit Devanagari", "FreeSans"),
    *("Nirmala UI", "Leelawadee UI", "Kohinoor Devanagari", "Thonburi", "Noto Emoji", "Symbola"),
)
_MISSING = re.compile(r"Glyph (\d+) .*missing from font", re.DOTALL)
# In inches.
_CELL, _GAP, _BETWEEN = 0.66, 0.05, 0.28
"""Side of a cell, room between two of them, and room between two grids."""
_ABOVE, _UNDER = 0.63, 0.1
"""Room above a grid, for its feature's name and numbers, and below it."""
_MARGIN = 0.06
_LETTERS, _LINE = 5, 0.086
"""Font size of captions in points, and the height of their lines."""
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
    pitch = _CELL + _GAP, _CELL + _GAP + captioned * (_BELOW * _LINE + _GAP)
    grid = side * pitch[0] - _GAP, rows * pitch[1] + _ABOVE + _UNDER
    columns = min(len(top), max(1, int((PAGE + _BETWEEN) / (grid[0] + _BETWEEN))))
    width = columns * (grid[0] + _BETWEEN) - _BETWEEN + 2 * _MARGIN
    title = f"Features of {table.source[0]}, layer {table.layer[0]}, by Comparative Sharedness"
    with _one_warning_for_missing_letters(out), mpl.rc_context(STYLE | FIXED_LAYOUT | {"font.family": _fonts()}):
        heading = _wrapped(title, width - 2 * _MARGIN, 4, 9, "bold").splitlines()
        groups = [
            line
            for words, column in (
                ("shared with (G)", "shared_with"),
                ("more than with (H)", "not_shared_with"),
                (f"last {unexplained(table)}", "unexplained"),
            )
            if column in table and table[column][0]
            for line in _wrapped(f"{words}: {table[column][0]}", width - 2 * _MARGIN, 6, 7.5).splitlines()
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
        show = (lambda *at: _caption(ax, data, *at)) if modality == "text" else _images(ax, data, captioned)
        for n, (row, of_feature) in enumerate(zip(top.itertuples(), found, strict=True)):
            x = _MARGIN + n % columns * (grid[0] + _BETWEEN)
            y = above + n // columns * grid[1]
            place = f"#{row.rank}  layer {row.layer}, feature {row.feature}"
            ax.text(x, y, place, va="top", fontsize=7.5, fontweight="bold")
            if names is not None:
                words, colour = _name_and_colour(names, int(row.layer), int(row.feature))
                line = _wrapped(words, grid[0], 1, 7)
                ax.text(x, y + 0.25, line, va="baseline", fontsize=7, color=colour, parse_math=False)
            numbers = f"$\\Delta$ {row.delta:.3g}, $\\rho_G$ {row.rho_g:.2f}, $\\rho_H$ {row.rho_h:.2f}"
            ax.text(x, y + 0.4, numbers, va="baseline", fontsize=6.5)
            share = f"active on {row.density:.1%}"
            ax.text(x + grid[0], y + 0.4, share, ha="right", va="baseline", fontsize=6.5)
            shares = f"top share {row.top_share:.0%}, calibrated {row.calibrated_top_share:.0%}"
            line = _wrapped(f"calibrated #{row.calibrated_rank}; {shares}", grid[0], 1, 6.5)
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


def _images(ax: Axes, data: "Data", captioned: bool) -> Callable[[int, float, float], None]:
    """A function that draws a sample's image, uncropped, centred in its cell, or at the bottom above a caption."""

    def show(sample: int, x: float, y: float) -> None:
        image = data.image(sample)
        image.thumbnail((160, 160))
        longer = max(image.size)
        wide, high = (_CELL * length / longer for length in image.size)
        left, foot = x + (_CELL - wide) / 2, y + (_CELL if captioned else (_CELL + high) / 2)
        place = (left, left + wide, foot, foot - high)
        ax.imshow(np.asarray(image), extent=place, interpolation="lanczos")
        ax.add_patch(Rectangle((left, foot - high), wide, high, fill=False, edgecolor="0.8", linewidth=0.3))
        if captioned:
            words = _wrapped(data.caption(sample), _CELL, _BELOW, _LETTERS)
            _write(ax, words, x + _CELL / 2, foot + _GAP / 2, ha="center")

    return show


def _caption(ax: Axes, data: "Data", sample: int, x: float, y: float) -> None:
    """A sample's caption on a card, cut to fit."""
    ax.add_patch(Rectangle((x, y), _CELL, _CELL, facecolor="0.95", edgecolor="0.8", linewidth=0.3))
    words = _wrapped(data.caption(sample), _CELL - _GAP, int((_CELL - _GAP) / _LINE), _LETTERS)
    _write(ax, words, x + _GAP / 2, y + _GAP / 2, ha="left")


def _write(ax: Axes, words: str, x: float, y: float, ha: str) -> None:
    # Captions are the user's text, so a dollar sign starts no formula. Lines are placed one by one, as fonts with
    # tall letters would spread them.
    for n, line in enumerate(words.splitlines()):
        ax.text(x, y + (n + 0.78) * _LINE, line, ha=ha, va="baseline", fontsize=_LETTERS, parse_math=False)


def _wrapped(words: str, width: float, lines: int, size: float, weight: str = "normal") -> str:
    """A text wrapped to at most ``lines`` lines of ``width`` inches, with an ellipsis if it is cut.

    It breaks at spaces, and inside words longer than a line, as scripts without spaces need.
    """

    def fits(line: str) -> bool:
        return text_width(line, size, weight) <= width

    broken = [""]
    for word in _drawable(words).split():
        if broken[-1] and not fits(f"{broken[-1]} {word}"):
            broken.append("")
        broken[-1] += f" {word}" if broken[-1] else word
        while len(broken[-1]) > 1 and not fits(broken[-1]):
            long = broken.pop()
            # From the short end, as the word may have thousands of letters.
            end = next((n for n in range(1, len(long)) if not fits(long[: n + 1])), len(long))
            broken += [long[:end], long[end:]]
            if len(broken) > lines:
                break
        if len(broken) > lines:
            last = broken[lines - 1]
            while last and not fits(f"{last}…"):
                last = last[:-1]
            return "\n".join([*broken[: lines - 1], f"{last.rstrip()}…"])
    return "\n".join(broken)


def _drawable(words: str) -> str:
    """A text without invisible characters: matplotlib draws boxes for them, and fails at U+FEFF."""
    blank = {"Cc": " ", "Cf": "", "Cs": "", "Co": "", "Cn": ""}
    return "".join(blank.get(unicodedata.category(character), character) for character in words)


@contextmanager
def _one_warning_for_missing_letters(out: Path) -> Iterator[None]:
    """Report letters that no font has in one line, in place of matplotlib's warning for each."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    letters: set[str] = set()
    for warning in caught:
        if match := _MISSING.match(str(warning.message)):
            letters.add(chr(int(match[1])))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if letters:
        some, more = "".join(sorted(letters)[:20]), len(letters) - 20
        shown = f"{some} and {more} more" if more > 0 else some
        warn(
            f"{out}: no font here has {shown}, drawn as boxes; install one, such as Noto Sans CJK or Noto Emoji, "
            f"delete fontlist-*.json in {mpl.get_cachedir()}, where matplotlib lists fonts, and draw the figure again"
        )


def _fonts() -> list[str]:
    """The usual font, then the installed ones of `_WIDE_FONTS` for scripts that it lacks."""
    installed = set(font_manager.get_font_names())
    return [*mpl.rcParams["font.family"], *(name for name in _WIDE_FONTS if name in installed)]
