"""The numbers that the paper printed, and how far a study's agree with them.

Beside this file, ``wmppc.csv`` has its Tables 6 to 21 and ``modality_averages.csv`` its Table 3 (arXiv 2507.18512).
"""

from pathlib import Path

import pandas as pd

from conceptshare.errors import StudyError
from conceptshare.metrics import correlation

# The readings that the paper has, by what it calls their layers.
_READINGS = {"all": "layer_mean", "last": "last"}
# Of the paper's names, those that do not end in their modality.
_TEXT_ENCODERS = ("bert", "deberta")
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
    members = list(dict.fromkeys([*table["source"], *table["target"]]))
    names: dict[str, str] = {}
    for member in members:
        name = _paper_name(member, size)
        if name not in names.values():
            names[member] = name
    ours = table[table.source.isin(names) & table.target.isin(names)]
    ours = ours.assign(source=ours.source.map(names), target=ours.target.map(names))
    both = ours.merge(printed, on=["reading", "source", "target"], suffixes=("", "_of_paper"))
    both = both[both.source != both.target]
    if both.empty:
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


def _paper_name(member: str, size: str) -> str:
    encoder = member.rpartition("@")[0]
    return encoder.removesuffix(".reference").removesuffix(f"-{size}")


def _beside(both: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    renamed = both.rename(columns={"wmppc": "ours", "wmppc_of_paper": "paper"}).reset_index(drop=True)
    renamed["difference"] = renamed.ours - renamed.paper
    return renamed[["reading", *keys, "ours", "low", "high", "paper", "difference"]]
