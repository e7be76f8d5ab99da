"""Picture grids of the features that head a ranking."""

from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any
from unicodedata import east_asian_width

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from conceptshare.figures._style import STYLE, save

if TYPE_CHECKING:  # other figures start without them
    from conceptshare.dataset import Data
    from conceptshare.reading import FeatureStatistics

_GRID_SAMPLES = 8
# matplotlib's own font has no Chinese, Japanese or Korean; systems have these.
_WIDE_FONTS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "Noto Sans SC", "Noto Sans JP", "Noto Sans KR"),
    *("Source Han Sans SC", "Source Han Sans", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Droid Sans Fallback"),
    *("IPAexGothic", "IPAGothic", "NanumGothic", "Unifont"),
    *("PingFang SC", "Hiragino Sans", "Apple SD Gothic Neo", "Arial Unicode MS"),
    *("Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "SimHei", "MS Gothic"),
)


def draw_sharedness(
    table: pd.DataFrame, statistics: "dict[int, FeatureStatistics]", data: "Data", pictured: int, out: Path
) -> None:
    """The top features of a ranking, a row each, by the samples on which they are strongest."""
    top = table.head(pictured)
    captioned_rows = 1.62
    with mpl.rc_context(STYLE):
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
            for ax, sample in zip(axes[1:], samples[samples >= 0], strict=False):
                _picture(ax, data, int(sample))
            if (samples < 0).all():
                axes[1].text(0, 0.5, "active on no sample", va="center", transform=axes[1].transAxes, fontsize=8)
        figure.suptitle(f"Top features of {table.source[0]}, layer {table.layer[0]}, by Comparative Sharedness")
        save(figure, out)


def _picture(ax: Axes, data: "Data", sample: int) -> None:
    picture = data.image(sample)
    picture.thumbnail((160, 160))
    ax.imshow(np.asarray(picture), interpolation="lanczos")
    words = data.caption(sample)
    # Chinese, Japanese and Korean letters are twice as wide as others.
    line = 11 if any(east_asian_width(letter) in "WF" for letter in words) else 22
    short = words if len(words) <= 2 * line else words[: 2 * line - 1].rsplit(" ", 1)[0] + "…"
    ax.set_anchor("S")
    style: Any = {"fontsize": 5.5, "fontfamily": _caption_fonts(), "ha": "center", "va": "top"}
    # A caption is the user's text: a dollar sign in it is no formula.
    ax.text(0.5, -0.06, fill(short, line), transform=ax.transAxes, parse_math=False, **style)


def _caption_fonts() -> list[str]:
    """The usual font, and for what it lacks, such as Chinese, Japanese or Korean, those of `_WIDE_FONTS` there are."""
    installed = set(font_manager.get_font_names())
    return [*mpl.rcParams["font.family"], *(name for name in _WIDE_FONTS if name in installed)]
