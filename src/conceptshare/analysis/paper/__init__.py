"""The numbers that the paper printed, and how far a study's agree with them.

Beside this file, ``wmppc.csv`` has its Tables 6 to 21 and ``modality_averages.csv`` its Table 3 (arXiv 2507.18512).
"""

from pathlib import Path

import pandas as pd

from conceptshare.io.errors import StudyError
from conceptshare.metrics import correlation, modality_averages

# The readings that the paper has, by what it calls their layers.
_READINGS = {"all": "layer_mean", "last": "last"}
# Of the paper's names, those that do not end in their modality.
_TEXT_ENCODERS = ("bert", "deberta")
_DIRECTIONS = ("image to image", "image to text", "text to image", "text to text")
_FOLDER = Path(__file__).parent


def compare(table: pd.DataFrame, dataset: str, size: str) -> pd.DataFrame:
    """Each cell of a wMPPC matrix that the paper has too, beside the paper's number.

    A member is the paper's encoder of its name without the seed, without ``.reference`` and without the size: it is
    ``clip-image-large@0`` that is compared with the large ``clip-image``. Where several members are the same encoder of
    the paper, the first of the table counts. ``layer_mean`` is what the paper has for all layers. Cells of an encoder
    with itself are left out.

    Args:
        table: the tidy matrix table, with at least ``source, target, reading, wmppc, low, high``.
        dataset: ``coco``, ``laion`` or ``flowers``.
        size: of the encoders, ``large`` or ``base``.

    Returns:
        ``reading, source, target, ours, low, high, paper, difference``, a row a cell in the table's order. Source and
        target have the paper's names, and the difference is ours less the paper's.

    Raises:
        StudyError: where the paper has no such data set and size, or no cell of the table.
    """
    printed = _printed("wmppc.csv", dataset, size)
    both = _renamed(table, size).merge(printed, on=["reading", "source", "target"], suffixes=("", "_of_paper"))
    both = both[both.source != both.target]
    if both.empty:
        members = dict.fromkeys([*table["source"], *table["target"]])
        raise StudyError(
            f"no two of the encoders {', '.join(members)} are among the paper's {size} ones on {dataset}; it has "
            f"{', '.join(dict.fromkeys(printed.source))}, which are compared under these names and with -{size} added"
        )
    return _beside(both, ["source", "target"])


def agreement(cells: pd.DataFrame) -> pd.DataFrame:
    """How far a study's numbers agree with the paper's, for each reading.

    Args:
        cells: what `compare` gives. Cells without a number of ours are left out.

    Returns:
        ``reading, cells, spearman, pearson, mean_absolute_difference``, which are how many cells, the correlation of
        their ranks (ties have their mean rank) and of their values, NaN where one side does not vary, and the mean of
        the absolute differences.
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
    """The mean wMPPC from each modality to each in the way of the paper's Table 3, next to what it printed.

    The means are over the paper's ten encoders of the size that are in the table, each paired with the others. Without
    MambaVision, that is, of which the paper has the last layer alone.

    Args:
        table: as for `compare`.
        dataset: as for `compare`.
        size: as for `compare`.

    Returns:
        The columns ``image to image``, ``image to text``, ``text to image`` and ``text to text``, and the rows
        ``layer_mean`` and ``last``, each followed by the paper's, such as ``last (paper)``, which is NaN if one of the
        ten encoders is missing.

    Raises:
        StudyError: if the paper has no such data set and size.
    """
    cells = _printed("wmppc.csv", dataset, size)
    encoders = set(cells.source[cells.layers == "all"])
    ours = _renamed(table, size)
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
    """What an encoder of the paper reads, ``image`` or ``text``, by the paper's name of it."""
    return "text" if name.endswith("-text") or name in _TEXT_ENCODERS else "image"


def _read(name: str) -> pd.DataFrame:
    return pd.read_csv(_FOLDER / name)


def _printed(name: str, dataset: str, size: str) -> pd.DataFrame:
    """What the paper printed for a data set and a size, with our names of the readings."""
    table = _read(name)
    chosen = table[(table.dataset == dataset) & (table["size"] == size)]
    if chosen.empty:
        known = table[["size", "dataset"]].drop_duplicates().itertuples(index=False)
        has = ", ".join(f"{of_size} ones on {data}" for of_size, data in known)
        raise StudyError(f"the paper has no {size} encoders on {dataset}; it has {has}")
    return chosen.assign(reading=chosen.layers.map(_READINGS))


def _renamed(table: pd.DataFrame, size: str) -> pd.DataFrame:
    """A matrix table under the paper's names of its encoders, with the first member of each."""
    names: dict[str, str] = {}
    for member in dict.fromkeys([*table["source"], *table["target"]]):
        name = _paper_name(member, size)
        if name not in names.values():
            names[member] = name
    chosen = table[table.source.isin(names) & table.target.isin(names)]
    return chosen.assign(source=chosen.source.map(names), target=chosen.target.map(names))


def _paper_name(member: str, size: str) -> str:
    encoder = member.rpartition("@")[0]
    return encoder.removesuffix(".reference").removesuffix(f"-{size}")


def _beside(both: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    renamed = both.rename(columns={"wmppc": "ours", "wmppc_of_paper": "paper"}).reset_index(drop=True)
    renamed["difference"] = renamed.ours - renamed.paper
    return renamed[["reading", *keys, "ours", "low", "high", "paper", "difference"]]
