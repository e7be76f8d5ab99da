"""The paper's printed values, and a study's agreement with them.

In this folder, ``wmppc.csv`` holds its Tables 6 to 21 and ``modality_averages.csv`` its Table 3 (arXiv 2507.18512).
"""

from pathlib import Path

import pandas as pd

from conceptshare.config.members import as_member
from conceptshare.io.errors import StudyError
from conceptshare.metrics import correlation, modality_averages

# The paper's readings, by its name for their layers.
_READINGS = {"all": "layer_mean", "last": "last"}
# Text encoders whose names in the paper do not end in the modality.
_TEXT_ENCODERS = ("bert", "deberta")
_DIRECTIONS = ("image to image", "image to text", "text to image", "text to text")
_FOLDER = Path(__file__).parent


def compare(table: pd.DataFrame, dataset: str, size: str) -> pd.DataFrame:
    """The cells of a wMPPC matrix that are also in the paper, next to the paper's values.

    A member's name without the seed, ``.reference`` and the size is that of the paper's encoder: ``clip-image-large@0``
    is compared with the large ``clip-image``. If several members are the same encoder of the paper, the first one in
    the table is used. The paper's values for all layers are ``layer_mean``. Cells of an encoder with itself are left
    out.

    Args:
        table: the tidy matrix table, with at least ``source, target, reading, wmppc, low, high, left_out``.
        dataset: ``coco``, ``laion`` or ``flowers``.
        size: size of the encoders, ``large`` or ``base``.

    Returns:
        ``reading, source, target, ours, low, high, paper, difference, left_out``, one row per cell in the table's
        order. Source and target have the paper's names, the difference is ours minus the paper's, and ``left_out`` is
        the number of layers that ours leaves out, where the paper's has all.

    Raises:
        StudyError: if the paper has no such data set and size, or no cell of the table.
    """
    printed = _printed("wmppc.csv", dataset, size)
    both = _with_paper_names(table, size).merge(printed, on=["reading", "source", "target"], suffixes=("", "_of_paper"))
    both = both[both.source != both.target]
    if both.empty:
        members = dict.fromkeys([*table["source"], *table["target"]])
        raise StudyError(
            f"no two of the encoders {', '.join(members)} are among the paper's {size} encoders on {dataset}; use "
            f"{', '.join(dict.fromkeys(printed.source))}, with or without -{size} at the end of the name"
        )
    cells = both.rename(columns={"wmppc": "ours", "wmppc_of_paper": "paper"}).reset_index(drop=True)
    cells["difference"] = cells.ours - cells.paper
    cells = cells[["reading", "source", "target", "ours", "low", "high", "paper", "difference", "left_out"]]
    cells.attrs = {key: value for key, value in table.attrs.items() if key == "max_fvu_global"}
    return cells


def agreement(cells: pd.DataFrame) -> pd.DataFrame:
    """Agreement of a study's values with the paper's, per reading.

    Args:
        cells: the result of `compare`. Cells without a value of ours are left out.

    Returns:
        ``reading, cells, spearman, pearson, mean_absolute_difference``: the number of cells, the correlation of their
        ranks (ties have their mean rank) and of their values, NaN if one side is constant, and the mean absolute
        difference.
    """
    rows = []
    for reading, of_reading in cells.groupby("reading", sort=False):
        known = of_reading[of_reading.ours.notna()]
        ours, paper = known.ours, known.paper
        rows.append(
            {
                "reading": reading,
                "cells": len(known),
                "spearman": correlation(ours.rank(), paper.rank()),
                "pearson": correlation(ours, paper),
                "mean_absolute_difference": known.difference.abs().mean(),
            }
        )
    return pd.DataFrame(rows)


def table_3(table: pd.DataFrame, dataset: str, size: str) -> pd.DataFrame:
    """The mean wMPPC between modalities as in the paper's Table 3, next to the printed values.

    The means are over the pairs of the paper's ten encoders of that size that are in the table, without MambaVision,
    for which the paper only has the last layer.

    Args:
        table: as in `compare`.
        dataset: as in `compare`.
        size: as in `compare`.

    Returns:
        The columns ``image to image``, ``image to text``, ``text to image`` and ``text to text``, and the rows
        ``layer_mean`` and ``last``, each followed by the paper's row, such as ``last (paper)``, which is NaN if one of
        the ten encoders is missing.

    Raises:
        StudyError: if the paper has no such data set and size.
    """
    cells = _printed("wmppc.csv", dataset, size)
    encoders = set(cells.source[cells.layers == "all"])
    ours = _with_paper_names(table, size)
    ours = ours[ours.source.isin(encoders) & ours.target.isin(encoders)]
    rows: dict[str, dict[str, float]] = {}
    for printed in _printed("modality_averages.csv", dataset, size).to_dict("records"):
        of_reading = ours[(ours.reading == printed["reading"]) & ours.wmppc.notna()].set_index(["source", "target"])
        means = modality_averages(of_reading.wmppc.to_dict(), {name: modality(name) for name in encoders})
        rows[printed["reading"]] = {f"{a} to {b}": mean for (a, b), mean in means.items()}
        complete = set(of_reading.index.get_level_values("source")) == encoders
        rows[f"{printed['reading']} (paper)"] = {
            direction: printed[direction.replace(" ", "_")] if complete else float("nan") for direction in _DIRECTIONS
        }
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(_DIRECTIONS))


def modality(name: str) -> str:
    """The modality of an encoder, ``image`` or ``text``, from the paper's name for it."""
    return "text" if name.endswith("-text") or name in _TEXT_ENCODERS else "image"


def _printed(name: str, dataset: str, size: str) -> pd.DataFrame:
    """The paper's printed values for a data set and a size, with our names of the readings."""
    table = pd.read_csv(_FOLDER / name)
    chosen = table[(table.dataset == dataset) & (table["size"] == size)]
    if chosen.empty:
        known = table[["size", "dataset"]].drop_duplicates().itertuples(index=False)
        available = ", ".join(f"{of_size} encoders on {data}" for of_size, data in known)
        raise StudyError(f"the paper has no {size} encoders on {dataset}; it has {available}")
    return chosen.assign(reading=chosen.layers.map(_READINGS))


def _with_paper_names(table: pd.DataFrame, size: str) -> pd.DataFrame:
    """A matrix table with the paper's names of its encoders, restricted to the first member of each."""
    names: dict[str, str] = {}
    for member in dict.fromkeys([*table["source"], *table["target"]]):
        name = as_member(member).encoder.removesuffix(".reference").removesuffix(f"-{size}")
        if name not in names.values():
            names[member] = name
    chosen = table[table.source.isin(names) & table.target.isin(names)]
    return chosen.assign(source=chosen.source.map(names), target=chosen.target.map(names))
