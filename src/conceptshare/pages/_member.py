"""The features of one member: a table for each layer, and their details in chunks."""

import base64
from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from conceptshare.analysis.tables import check_features, check_made_from, check_ranking, read_table
from conceptshare.config.members import as_member, pair_name
from conceptshare.io.files import MEMBER_PAGES, atomic_output
from conceptshare.io.layout import layer_name
from conceptshare.io.progress import progress
from conceptshare.io.readers import FEATURES, FeatureStatistics, read_spec, read_statistics
from conceptshare.io.seals import read_manifest, recorded_file
from conceptshare.io.store import read_root
from conceptshare.pages._samples import TOGETHER
from conceptshare.pages._script import number, numbers, write_script

CHUNK = 64
"""Features whose details are in one file."""


def write_member(
    features: Path,
    examples: Path,
    names: Path,
    pairs: Path,
    others: Sequence[str],
    rankings: Mapping[str, Path],
    place: str,
    out: Path,
) -> None:
    """Write a member's features for the pages.

    Args:
        features: the member's feature store.
        examples: its folder of examples.
        names: its table of names.
        pairs: the folder of the tables of pairs.
        others: the members that it is compared with.
        rankings: tables of Comparative Sharedness with this member as source, by name.
        place: the path of ``out`` in the site.
        out: the folder to write.

    Raises:
        StoreError: if something is missing or damaged.
    """
    member, statistics, named = features.stem, read_statistics(features), read_table(names, "names")
    remedy = "delete it and run the examples stage again"
    shown = read_manifest(examples, "features", "examples", remedy)
    check_made_from(names, named, features, "names")
    check_features(examples, shown["features"], {member: str(read_root(features, FEATURES)["digest"])}, "examples")
    best = {other: _matches(pairs, features, other) for other in others}
    ranked = {name: read_table(path, "sharedness") for name, path in rankings.items()}
    for name, ranking in ranked.items():
        check_ranking(rankings[name], ranking, features)

    def read(name: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = pq.read_table(recorded_file(examples, name, shown, remedy)).to_pylist()
        return rows

    samples = {row.pop("sample"): row for row in read("samples.parquet")}
    fvu = dict(zip(statistics, read_spec(features, FEATURES)["fvu_global"], strict=True))
    with atomic_output(out, MEMBER_PAGES) as partial:
        partial.mkdir()
        for layer, found in progress(statistics.items(), len(statistics), f"pages of {member}", "layers"):
            key = layer_name(layer)
            table = _columns(found, _of_layer(named, layer)) | {
                "fvu": None if fvu[layer] is None else number(fvu[layer])
            }
            table["best"] = {other: _best(_of_layer(matches, layer)) for other, matches in best.items()}
            deltas = {name: _deltas(_of_layer(ranking, layer), len(found.strength)) for name, ranking in ranked.items()}
            table["delta"] = {name: values for name, values in deltas.items() if values is not None}
            write_script(partial / f"{key}.js", f"{place}/{key}", table)
            (partial / key).mkdir()
            rows = read(f"{key}.parquet")
            for n, first in enumerate(range(0, len(rows), CHUNK)):
                chunk = rows[first : first + CHUNK]
                details = [_detail(row, table, samples) for row in chunk]
                write_script(
                    partial / key / f"{n:03d}.js",
                    f"{place}/{key}/{n:03d}",
                    {"first": first, "features": details},
                )
                # In files of their own: they are most of the data, and few of them are looked at.
                if any(detail["mapped"] for detail in details):
                    write_script(
                        partial / key / f"maps-{n:03d}.js",
                        f"{place}/{key}/maps-{n:03d}",
                        {"first": first, "maps": [_maps(row, samples) for row in chunk]},
                    )
        last = statistics[max(statistics)]
        fired = _fired(last, read_spec(features, FEATURES)["samples"])
        for first in range(0, len(fired), TOGETHER):
            key = f"samples/{first // TOGETHER:03d}"
            write_script(partial / f"{key}.js", f"{place}/{key}", fired[first : first + TOGETHER])
        write_script(partial / "samples.js", f"{place}/samples", (last.top_samples >= 0).sum(axis=1).tolist())


def _fired(layer: FeatureStatistics, samples: int) -> list[list[tuple[int, int]]]:
    """For each sample the features among whose strongest samples it is, each with its place there, from 0.

    Features with an earlier place are first, and of equal ones stronger features.
    """
    features, places = np.nonzero(layer.top_samples >= 0)
    of_sample = layer.top_samples[features, places]
    order = np.lexsort((features, -layer.strength[features], places, of_sample))
    ends = np.searchsorted(of_sample[order], np.arange(samples + 1))
    pairs = list(zip(features[order].tolist(), places[order].tolist(), strict=True))
    return [pairs[start:stop] for start, stop in pairwise(ends.tolist())]


def _matches(pairs: Path, features: Path, other: str) -> pd.DataFrame:
    """The best match of each of a member's features over all layers of another member."""
    member = features.stem
    path = pairs / f"{pair_name(as_member(member), as_member(other))}.parquet"
    columns = ["source", "layer", "feature", "rho", "match_layer", "match_feature"]
    table = read_table(path, "pairs", columns, [("source", "==", member)])
    check_made_from(path, table, features, "metrics")
    return table


def _of_layer(table: pd.DataFrame, layer: int) -> pd.DataFrame:
    return table[table.layer == layer].sort_values("feature")


def _columns(found: FeatureStatistics, named: pd.DataFrame) -> dict[str, Any]:
    return {
        "strength": numbers(found.strength),
        "density": numbers(found.density),
        "name": _texts(named.name),
        # Shown only in place of a name.
        "candidate": [
            None if name else text for name, text in zip(*map(_texts, (named.name, named.candidate)), strict=True)
        ],
        "score": numbers(named.score),
        "auc": numbers(named.auc),
        "by_command": bool((named.source == "command").any()),
    }


def _texts(values: pd.Series) -> list[str | None]:
    return [value if isinstance(value, str) else None for value in values]


def _best(matches: pd.DataFrame) -> dict[str, Any]:
    return {
        "rho": numbers(matches.rho),
        "layer": matches.match_layer.tolist(),
        "feature": matches.match_feature.tolist(),
    }


def _deltas(ranking: pd.DataFrame, features: int) -> list[float | None] | None:
    if not len(ranking):
        return None
    deltas = np.full(features, np.nan)
    deltas[ranking.feature] = ranking.delta
    return numbers(deltas)


def _detail(row: dict[str, Any], table: dict[str, Any], samples: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """The data of one feature's page, except maps: only whether there are any."""
    top = row["top"]
    shown = [(one, samples[one["sample"]]) for one in top]
    detail: dict[str, Any] = {
        **{column: table[column][row["feature"]] for column in ("name", "candidate")},
        "top": [[one["sample"], number(one["value"])] for one in top],
        "bands": [
            {
                "at": number(near["quantile"]),
                "samples": list(map(list, zip(near["samples"], numbers(near["values"]), strict=True))),
            }
            for near in row["near"]
        ],
        "histogram": {"max": number(row["highest"]), "counts": row["histogram"]},
        "mapped": any(_has_map(one, sample) for one, sample in shown),
    }
    if any("tokens" in sample for _, sample in shown):
        detail["tokens"] = [_marked(one, sample["tokens"]) for one, sample in shown]
    return detail


def _marked(one: dict[str, Any], tokens: list[str]) -> dict[str, Any] | None:
    """The pieces of a caption with the feature's activation at each; None if there are no pieces."""
    if one["fires"] is None:
        return None
    shares = np.frombuffer(one["fires"], np.uint8) / 255
    return {"text": tokens, "values": numbers(shares * one["fires_highest"])}


def _has_map(one: dict[str, Any], sample: dict[str, Any]) -> bool:
    """Whether it is known where in an image the feature fires."""
    return one["fires"] is not None and sample.get("box") is not None


def _maps(row: dict[str, Any], samples: dict[int, dict[str, Any]]) -> list[dict[str, Any] | None]:
    """A feature's activation at each place of each of its strongest images, if known."""
    shown = [(one, samples[one["sample"]]) for one in row["top"]]
    return [_map(one, sample) if _has_map(one, sample) else None for one, sample in shown]


def _map(one: dict[str, Any], sample: dict[str, Any]) -> dict[str, Any]:
    side = isqrt(len(one["fires"]))
    return {
        "box": numbers(sample["box"]),
        "rows": side,
        "columns": side,
        "max": number(one["fires_highest"]),
        "values": base64.b64encode(one["fires"]).decode(),
    }
