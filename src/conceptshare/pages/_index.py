"""The site's frame: its page, its code, and the data of its overview."""

from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd

from conceptshare.analysis.tables import read_table
from conceptshare.data.dataset import Data
from conceptshare.io import layout
from conceptshare.io.files import FILE, SITE, check_replaceable, unlocked_output
from conceptshare.io.readers import read_statistics
from conceptshare.metrics import READINGS
from conceptshare.pages._script import number, numbers, write_script

_ASSETS = files("conceptshare.pages") / "assets"
# Joined into one script in this order: a page opened from a folder cannot load modules.
_APP = (
    "data",
    "elements",
    "hints",
    "tables",
    "samples",
    "heatmaps",
    "overview",
    "layers",
    "feature",
    "ranking",
    "fit",
    "marks",
    "search",
    "page",
)


def write_frame(out: Path) -> None:
    """Write the page, its style, and its code as one script.

    Args:
        out: the site's folder.
    """
    out.mkdir(parents=True, exist_ok=True)
    code = [(_ASSETS / "app" / f"{name}.js").read_text("utf-8") for name in _APP]
    for name, text in {
        "index.html": (_ASSETS / "index.html").read_text("utf-8"),
        "style.css": (_ASSETS / "style.css").read_text("utf-8"),
        "app.js": "\n".join(['"use strict";\n', "(() => {", *code, "})();\n"]),
    }.items():
        with unlocked_output(out / name, FILE) as partial:
            partial.write_text(text, "utf-8", newline="\n")


def write_index(study: dict[str, Any], results: Path, out: Path) -> None:
    """Write the page, its style and code, and `study.js`.

    Args:
        study: what `Study.shown_on_pages` returns.
        results: the folder of all results.
        out: the site's folder.

    Raises:
        StoreError: if a table is missing or damaged.
    """
    check_replaceable(out, SITE)
    write_frame(out)
    parts = ("study", "saes", "members", "codes", "unexplained_layers", "max_fvu_global")
    shown: dict[str, Any] = {name: study[name] for name in parts}
    shown["members"] = [_with_sizes(member, study, results) for member in study["members"]]
    shown["datasets"] = [
        {"name": name, "samples": len(Data(layout.path(layout.DATA, results, dataset=name)))}
        for name in study["datasets"]
    ]
    analyses: dict[str, Any] = {kind: [] for kind in ("matrices", "layerwise", "sharedness", "samples", "overlaps")}
    shown |= {"version": version("conceptshare"), **analyses}
    for dataset in study["datasets"]:
        for sae in study["saes"]:
            where = {"dataset": dataset, "sae": sae}
            place = layout.path(layout.ANALYSES, results, study=study["study"], **where)
            for name, members in study["matrices"].items():
                table = read_table(place / "matrices" / f"{name}.parquet", "matrix")
                shown["matrices"].append(
                    {
                        **where,
                        "name": name,
                        "members": members,
                        **{column: _readings(table, members, column) for column in (*_CELL_COLUMNS, "left_out")},
                    }
                )
            for name, pairs in study["layerwise"].items():
                table = read_table(place / "layerwise" / f"{name}.parquet", "layerwise")
                shown["layerwise"].append({**where, "name": name, "pairs": [_heatmap(table, a, b) for a, b in pairs]})
            for name, analysis in study["sharedness"].items():
                table = read_table(place / "sharedness" / f"{name}.parquet", "sharedness")
                topics = read_table(place / "sharedness" / f"{name}.topics.parquet", "topics")
                shown["sharedness"].append({**where, "name": name, **analysis, **_ranking(table, topics)})
            for name, sides in study["samples"].items():
                table = read_table(place / "samples" / f"{name}.parquet", "samples")
                shown["samples"].append({**where, "name": name, **sides, **_extremes(table)})
            if study["overlapping"]:
                shown["overlaps"] += [
                    {**where, **row} for row in _rows(read_table(place / "overlaps.parquet", "overlaps"))
                ]
    with unlocked_output(out / "study.js", FILE) as partial:
        write_script(partial, "study", shown)


def _with_sizes(member: dict[str, Any], study: dict[str, Any], results: Path) -> dict[str, Any]:
    """A member with the number of features per layer of imported SAEs, which the study does not have: the largest."""
    features = dict(member["features"])
    for sae in [sae for sae, count in features.items() if count is None]:
        place = {"dataset": study["datasets"][0], "sae": sae, "member": member["name"]}
        layers = read_statistics(layout.path(layout.FEATURES, results, **place))
        features[sae] = max(len(layer.strength) for layer in layers.values())
    return {**member, "features": features}


_FALSE_DISCOVERIES = 0.05
_SHOWN = 60
"""Samples of the worst and of the best fit."""
# Numbers that figures show too are rounded once, not to four digits and then to two.
_EXACT = 8
_CELL_COLUMNS = ("wmppc", "excess", "null", "p", "unexplained")
"""Columns of a cell of a matrix or heatmap."""


def _readings(table: pd.DataFrame, members: list[str], values: str) -> dict[str, Any]:
    squares = {
        reading: table[table.reading == reading].pivot(index="source", columns="target", values=values)
        for reading in READINGS
    }
    return {
        reading: [numbers(row, _EXACT) for row in square.reindex(index=members, columns=members).to_numpy()]
        for reading, square in squares.items()
    }


def _heatmap(table: pd.DataFrame, a: str, b: str) -> dict[str, Any]:
    of_pair = table[(table.source == a) & (table.target == b)]
    squares = {
        column: of_pair.pivot(index="source_layer", columns="target_layer", values=column) for column in _CELL_COLUMNS
    }
    return {
        "a": a,
        "b": b,
        "layers_a": squares["wmppc"].index.tolist(),
        "layers_b": squares["wmppc"].columns.tolist(),
        **{column: [numbers(row, _EXACT) for row in square.to_numpy()] for column, square in squares.items()},
    }


def _ranking(table: pd.DataFrame, topics: pd.DataFrame) -> dict[str, Any]:
    calibrated: dict[str, Any] = _ranked(
        table.sort_values("calibrated_rank"), "calibrated_delta", "excess_g", "excess_h", "calibrated_top_share"
    )
    calibrated["topics"] = _topics(topics[topics.calibrated])
    return {
        "layer": int(table.layer.iloc[0]),
        "top": int(table.top.sum()),
        "unexplained": table.unexplained.iloc[0],
        **_ranked(table, "delta", "rho_g", "rho_h", "top_share"),
        "topics": _topics(topics[~topics.calibrated]),
        "calibrated": calibrated,
    }


def _topics(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The words that count at a false discovery rate of 5%."""
    shown = table[table.q <= _FALSE_DISCOVERIES]
    columns = {name: numbers(shown[name]) for name in ("top_share", "share", "q")}
    rows = zip(shown.word, shown.features.tolist(), *columns.values(), strict=True)
    return [dict(zip(("word", "features", *columns), row, strict=True)) for row in rows]


def _ranked(table: pd.DataFrame, delta: str, g: str, h: str, share: str) -> dict[str, Any]:
    """Columns of a ranking, in its order."""
    columns = {"delta": delta, "rho_g": g, "rho_h": h, "share": share}
    return {"features": table.feature.tolist(), **{name: numbers(table[column]) for name, column in columns.items()}}


def _extremes(table: pd.DataFrame) -> dict[str, Any]:
    """The samples that fit worst and best, each with its fit, from the extreme on."""
    shown = min(_SHOWN, len(table) // 5)
    pairs = list(zip(table.row.tolist(), numbers(table.fit), strict=True))
    return {"worst": pairs[:shown], "best": pairs[-shown:][::-1], "unexplained": table.attrs["unexplained"]}


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = table.drop(columns="source").to_dict("records")
    return [row | {name: number(row[name]) for name in ("expected", "log10_p", "calibrated_log10_p")} for row in rows]
