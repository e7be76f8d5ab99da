"""Samples in figures: images and captions, with text cut to fit."""

import re
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from conceptshare.figures._style import text_width
from conceptshare.io.progress import warn

if TYPE_CHECKING:  # heavy, and other figures do not need it
    from conceptshare.data.dataset import Data

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
CELL, GAP = 0.66, 0.05
"""Side of a cell, and room between two of them."""
LETTERS, LINE = 5, 0.086
"""Font size of captions in points, and the height of their lines."""


def draw_images(ax: Axes, data: "Data", lines: int = 0) -> Callable[[int, float, float], None]:
    """A function that draws a sample's image, uncropped, centred in its cell.

    With ``lines``, it is at the bottom of the cell, and below it its caption in at most so many lines.
    """

    def show(sample: int, x: float, y: float) -> None:
        image = data.image(sample)
        image.thumbnail((160, 160))
        longer = max(image.size)
        wide, high = (CELL * length / longer for length in image.size)
        left, foot = x + (CELL - wide) / 2, y + (CELL if lines else (CELL + high) / 2)
        place = (left, left + wide, foot, foot - high)
        ax.imshow(np.asarray(image), extent=place, interpolation="lanczos")
        ax.add_patch(Rectangle((left, foot - high), wide, high, fill=False, edgecolor="0.8", linewidth=0.3))
        if lines:
            words = wrapped(data.caption(sample), CELL, lines, LETTERS)
            _write(ax, words, x + CELL / 2, foot + GAP / 2, ha="center")

    return show


def draw_caption(ax: Axes, data: "Data", sample: int, x: float, y: float) -> None:
    """A sample's caption on a card, cut to fit."""
    ax.add_patch(Rectangle((x, y), CELL, CELL, facecolor="0.95", edgecolor="0.8", linewidth=0.3))
    words = wrapped(data.caption(sample), CELL - GAP, int((CELL - GAP) / LINE), LETTERS)
    _write(ax, words, x + GAP / 2, y + GAP / 2, ha="left")


def _write(ax: Axes, words: str, x: float, y: float, ha: str) -> None:
    # Captions are the user's text, so a dollar sign starts no formula. Lines are placed one by one, as fonts with
    # tall letters would spread them.
    for n, line in enumerate(words.splitlines()):
        ax.text(x, y + (n + 0.78) * LINE, line, ha=ha, va="baseline", fontsize=LETTERS, parse_math=False)


def wrapped(words: str, width: float, lines: int, size: float, weight: str = "normal") -> str:
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
def one_warning_for_missing_letters(out: Path) -> Iterator[None]:
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


def fonts() -> list[str]:
    """The usual font, then the installed ones of `_WIDE_FONTS` for scripts that it lacks."""
    installed = set(font_manager.get_font_names())
    return [*mpl.rcParams["font.family"], *(name for name in _WIDE_FONTS if name in installed)]
