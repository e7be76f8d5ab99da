"""Matrices in the layout of the paper's tables, as CSV, Markdown and LaTeX.

Tidy tables have one row per value. These have one row per source and one column per target, and omit seeds from names
if each encoder has only one seed.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from conceptshare.config.members import as_member
from conceptshare.io.files import MATRICES, atomic_output
from conceptshare.metrics import READINGS

_MODALITIES = ("image", "text")
_DIAGONAL = "-"
"""Shown instead of the wMPPC of a member with itself, which is not a measurement."""


def write_matrices(
    table: pd.DataFrame, averages: pd.DataFrame, folder: Path, table_3: pd.DataFrame | None = None
) -> None:
    """Write a study's matrices and their averages by modality to ``folder``, which is replaced as a whole.

    For each reading, ``{reading}.csv``, ``.md`` and ``.tex`` hold the wMPPC with one row per source and one column per
    target, in the order of the table's sources; ``averages.csv``, ``.md`` and ``.tex`` hold the modality averages in
    the layout of the paper's Table 3, with one row per reading. CSV has six digits and empty diagonal cells; the others
    have three decimals, like the paper, and ``-`` on the diagonal. Other missing values are ``nan``. LaTeX needs the
    package booktabs.

    Args:
        table: the tidy matrix table, with at least ``source, target, reading, wmppc``.
        averages: the tidy modality averages, with at least ``reading, source_modality, target_modality, wmppc``.
        folder: the folder to write.
        table_3: the result of `paper.table_3`, to be written as ``table-3.csv``, ``.md`` and ``.tex``.
    """
    members = list(dict.fromkeys(table["source"]))
    labels = short_labels(members)
    with atomic_output(folder, MATRICES) as partial:
        partial.mkdir()
        for reading in READINGS:
            cells = table[table.reading == reading].pivot(index="source", columns="target", values="wmppc")
            cells = cells.reindex(index=members, columns=members).set_axis(labels, axis=0).set_axis(labels, axis=1)
            _write(cells, "source", np.eye(len(members), dtype=bool), partial / reading)
        wide = _averages(averages)
        _write(wide, "reading", np.zeros(wide.shape, bool), partial / "averages")
        if table_3 is not None:
            _write(table_3, "reading", np.zeros(table_3.shape, bool), partial / "table-3")


def short_labels(members: Sequence[str]) -> list[str]:
    """Names of members, without the seed if their encoder occurs once."""
    encoders = [as_member(member).encoder for member in members]
    return [e if encoders.count(e) == 1 else m for e, m in zip(encoders, members, strict=True)]


def _averages(averages: pd.DataFrame) -> pd.DataFrame:
    """Pivot averages to one row per reading and one column per direction between modalities."""
    named = averages.assign(direction=averages.source_modality + " to " + averages.target_modality)
    wide = named.pivot(index="reading", columns="direction", values="wmppc")
    directions = [f"{source} to {target}" for source in _MODALITIES for target in _MODALITIES]
    return wide.reindex(index=list(READINGS), columns=[name for name in directions if name in wide.columns])


def _write(cells: pd.DataFrame, corner: str, itself: NDArray[np.bool_], out: Path) -> None:
    """Write a table as CSV, Markdown and LaTeX; CSV and Markdown have ``corner`` as the header of the row names."""
    exact = cells.map("{:.6g}".format).mask(itself, "")
    exact.to_csv(out.with_suffix(".csv"), index_label=corner, lineterminator="\n")
    printed = cells.map("{:.3f}".format).mask(itself, _DIAGONAL)
    numbers = printed.shape[1]
    # Keep the numbers' formatting: tabulate would print 0.100 as 0.1.
    as_text: Any = {"disable_numparse": True, "colalign": ("left", *["right"] * numbers)}
    markdown = printed.rename(index=_in_markdown, columns=_in_markdown).rename_axis(corner).to_markdown(**as_text)
    out.with_suffix(".md").write_text(markdown + "\n", encoding="utf-8", newline="\n")
    latex = printed.rename_axis(index=None, columns=None).to_latex(escape=True, column_format="l" + "r" * numbers)
    out.with_suffix(".tex").write_text(latex, encoding="utf-8", newline="\n")


def _in_markdown(name: str) -> str:
    return name.replace("|", r"\|")
