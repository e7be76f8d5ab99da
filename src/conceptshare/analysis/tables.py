"""Stage `metrics`: tidy tables from the correlation and feature stores of a study, as CSV and Parquet.

They have one row per value, ready to pivot in pandas, R or a spreadsheet. The mathematics is in `metrics`.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from conceptshare import metrics
from conceptshare.config.members import GroupedMember, Member, as_member, pair_name
from conceptshare.config.settings import MAX_FVU_GLOBAL
from conceptshare.io.errors import StoreError, StudyError
from conceptshare.io.files import CSV, PARQUET, atomic_output
from conceptshare.io.parquet import read_parquet, write_parquet
from conceptshare.io.readers import (
    CORRELATIONS,
    FEATURES,
    FeatureStatistics,
    LastLayer,
    PairCorrelations,
    read_code,
    read_correlations,
    read_last_layer,
    read_spec,
    read_statistics,
    source_of,
    unexplained_layers,
)
from conceptshare.io.store import read_root
from conceptshare.sae.folder import REMEDY, sae_file, sae_of

SIMILARITIES = ("cka", "cka_null", "mutual_knn", "mutual_knn_null")
_CROSS_FITTED = ("cross_fitted", "cross_fitted_low", "cross_fitted_high")
MATRIX_COLUMNS = (
    *("source", "target", "source_modality", "target_modality", "source_kind", "target_kind", "reading"),
    *("wmppc", "low", "high", "floor", "ceiling", "null", "null_error", "p", "excess", "relative"),
    *_CROSS_FITTED,
    *("mppc", "iou", "one_to_one", "features", "beyond_shuffled", "significant"),
    *("strength_cv", "strength_rho", *SIMILARITIES, "unexplained", "left_out", "code"),
)

_CELL = ("source", "target", "reading")
_DIRECTION = ["reading", "source_modality", "target_modality"]
_QUALITY = tuple(f"{measure}_{tokens}" for tokens in ("all", "global") for measure in ("fvu", "l0", "dead"))
_COLUMNS: dict[str, tuple[str, ...]] = {
    "matrix": MATRIX_COLUMNS,
    "averages": (
        *(*_DIRECTION, "cells", "wmppc", "low", "high", "floor", "null", "excess", *_CROSS_FITTED),
        *("unexplained", "left_out", "code"),
    ),
    "layerwise": (
        *("source", "target", "source_layer", "target_layer"),
        *("wmppc", "floor", "null", "p", "excess", "cross_fitted", "unexplained"),
    ),
    "sharedness": (
        *("rank", "top", "source", "layer", "feature", "delta", "strength", "density", "rho_g", "rho_h"),
        *("excess_g", "excess_h", "calibrated_delta", "calibrated_rank", "calibrated_top"),
        *("top_share", "calibrated_top_share"),
    ),
    "overlaps": (
        *("source", "first", "second", "top", "overlap", "expected", "log10_p"),
        *("calibrated_overlap", "calibrated_log10_p"),
    ),
    "saes": ("encoder", "seed", "layer", "latents", "steps", *_QUALITY, "outlying", "measured_on", "unexplained"),
    "seeds": (*_CELL, "source_seed", "target_seed", "wmppc", "null", "excess", "pairs", "mean", "low", "high"),
    "paper": (*_CELL, "ours", "low", "high", "paper", "difference", "left_out"),
    "topics": ("calibrated", "word", "features", "top_share", "share", "p", "q"),
    "samples": ("row", "id", "caption", "fit"),
    "names": ("layer", "feature", "name", "candidate", "score", "auc", "source"),
    "similarity": ("source_layer", "target_layer", *SIMILARITIES),
}
"""Columns that tables of a kind have at least."""
_MAYBE_EMPTY = ("averages", "topics")
"""Kinds of tables that may have no rows: if all members are of one encoder, or no word is in several top features."""
# Kinds of tables that other stages than `metrics` write.
_STAGES = ("names", "similarity", "samples")

# Number of matrix cells whose intervals are computed together: 120 MB of influences for 118,287 samples.
_CELLS_PER_BLOCK = 256


class Stores(NamedTuple):
    """Folders of the stores of one data set and SAE setting."""

    features: Path
    correlations: Path
    similarity: Path | None = None
    """The tables of the `similarity` stage; without them, their columns are NaN."""
    max_fvu_global: float = MAX_FVU_GLOBAL
    """Layers whose SAE has a larger FVU at global tokens are marked as unexplained."""

    def active(self, member: str) -> dict[int, FeatureStatistics]:
        """A member's feature statistics by layer, see `active_statistics`."""
        return active_statistics(self.features / f"{member}.zarr")

    def unexplained(self, member: str) -> list[bool]:
        """For each layer of a member, whether it is unexplained; see `unexplained_layers`."""
        return unexplained_layers(self.features / f"{member}.zarr", self.max_fvu_global)

    def digests(self, members: Iterable[str]) -> dict[str, str]:
        """The digests of members' feature stores."""
        return {member: features_digest(self.features / f"{member}.zarr") for member in members}

    def pair(self, source: str, target: str) -> PairCorrelations:
        """The best matches of the source's features in the target; see `read_pair`."""
        return read_pair(self.correlations, source, target, self.digests((source, target)))

    def last_layer(self, source: str, target: str) -> LastLayer:
        """The best matches of the source's last layer in the target's last layer; raises as `read_pair`."""
        path = pair_path(self.correlations, source, target, self.digests((source, target)))
        return read_last_layer(path, source)

    def similar(self, source: str, target: str) -> dict[str, pd.DataFrame]:
        """CKA and mutual nearest neighbours of two members' encoders, ``[source layers, target layers]`` each.

        Empty for two seeds of one encoder, and without a folder of such tables.

        Raises:
            StoreError: if the encoders' table is missing, damaged, or of other activations than the features.
        """
        a, b = as_member(source).encoder, as_member(target).encoder
        if self.similarity is None or a == b:
            return {}
        first, second = sorted((a, b))
        path = self.similarity / f"{first}__{second}.parquet"
        table = read_table(path, "similarity")
        for member in (source, target):
            made_from = source_of(read_spec(self.features / f"{member}.zarr", FEATURES))
            if table.attrs["activations"].get(as_member(member).encoder) != made_from:
                raise StoreError(
                    f"{path}: made from other activations than the features of {member}; delete it and run the "
                    f"similarity stage again"
                )
        measures = {
            measure: table.pivot(index="source_layer", columns="target_layer", values=measure)
            for measure in SIMILARITIES
        }
        return measures if a == first else {measure: values.T for measure, values in measures.items()}


def read_pair(correlations: Path, source: str, target: str, features: Mapping[str, str]) -> PairCorrelations:
    """Read the best matches of the source's features in the target.

    Args:
        correlations: the folder of correlation stores.
        source: a member.
        target: another member.
        features: required digests of the feature stores, by member; members left out are not checked.

    Raises:
        StoreError: if the correlations are missing or damaged, or were made from other features.
    """
    return read_correlations(pair_path(correlations, source, target, features), source)


def pair_path(correlations: Path, source: str, target: str, features: Mapping[str, str]) -> Path:
    """The correlation store of two members, made from the given features; arguments and errors as in `read_pair`."""
    path = correlations / f"{pair_name(as_member(source), as_member(target))}.zarr"
    spec = read_spec(path, CORRELATIONS)
    made_from = {spec[side]: spec[f"features_{side}"] for side in ("a", "b")}
    wanted = {member: features[member] for member in made_from if member in features}
    check_features(path, made_from, wanted, "correlations")
    return path


def features_digest(features: Path) -> str:
    """The digest of a feature store, cached until the store changes."""
    return _digest_at(features, (features / "zarr.json").stat().st_mtime_ns if features.exists() else 0)


@lru_cache(1024)
def _digest_at(features: Path, _: int) -> str:
    return str(read_root(features, FEATURES)["digest"])


def check_features(path: Path, made_from: Mapping[str, str], wanted: Mapping[str, str], stage: str) -> None:
    """Make sure that a result was made from the given feature stores.

    Args:
        path: the result.
        made_from: its recorded digests of feature stores, by member.
        wanted: the required digests, by member.
        stage: the stage that makes it.

    Raises:
        StoreError: if it was made from other feature stores.
    """
    other = next((member for member in wanted if made_from.get(member) != wanted[member]), None)
    if other is not None and other not in made_from:
        raise StoreError(
            f"{path}: made from features of {', '.join(made_from)}, not of {other}; give the result for {other}"
        )
    if other is not None:
        raise StoreError(
            f"{path}: made from other features of {other} than the current ones; delete it and run the {stage} stage "
            f"again"
        )


def active_statistics(path: Path) -> dict[int, FeatureStatistics]:
    """Read the statistics of each layer of a feature store, and require an active feature.

    Raises:
        StoreError: if the store is incomplete or damaged, or no sample activates any of its features.
    """
    statistics = read_statistics(path)
    if not any((layer.density > 0).any() for layer in statistics.values()):
        raise StoreError(
            f"{path}: no sample activates any of its features, so there is nothing to compare; check its SAEs with "
            f"`conceptshare sae info`, and train them with other settings"
        )
    return statistics


def check_made_from(path: Path, table: pd.DataFrame, features: Path, stage: str) -> None:
    """Make sure that a table was made from a feature store; arguments as in `check_features`."""
    check_features(path, table.attrs.get("features", {}), {features.stem: features_digest(features)}, stage)


def check_ranking(path: Path, ranking: pd.DataFrame, features: Path) -> None:
    """Make sure that a ranking ranks the features of a feature store.

    Raises:
        StoreError: if it ranks the features of another member, or was made from another store.
    """
    source = ranking.source[0]
    if source != features.stem:
        raise StoreError(
            f"{path}: ranks the features of {source}, but {features} is of {features.stem}; give {source}.zarr"
        )
    check_made_from(path, ranking, features, "metrics")


def check_fit(fit: pd.DataFrame, ids: list[str]) -> None:
    """Make sure that a table of `samples.fit_table` is of these samples.

    Raises:
        StoreError: if it is of others.
    """
    if fit.sort_values("row")["id"].tolist() != ids:
        raise StoreError("the table of fits is of other samples than the data; name the data folder of its data set")


def check_rankings(rankings: Mapping[Path, pd.DataFrame]) -> None:
    """Make sure that rankings of one source rank the same features.

    Raises:
        StoreError: if two rank different features, such as rankings of two studies.
    """
    first: dict[str, tuple[Path, str]] = {}
    for path, ranking in rankings.items():
        source = ranking.source[0]
        digest = ranking.attrs["features"][source]
        other, of_other = first.setdefault(source, (path, digest))
        if digest != of_other:
            raise StoreError(
                f"{path}: ranks other features of {source} than {other}; give rankings of one study, or run the "
                f"metrics stage again"
            )


def matrix_table(members: Sequence[GroupedMember], stores: Stores) -> pd.DataFrame:
    """wMPPC between all members, with its interval, floor and ceiling and related measures, for three readings.

    The readings are ``pooled`` and ``layer_mean`` over all layers but those that the correlations leave out, and
    ``last``, between the last recorded layers only.

    Columns besides those that identify the cell:

    - ``wmppc``, with ``low`` and ``high``, its 95% bootstrap interval over samples;
    - ``floor``: the wMPPC with the target's samples shuffled; ``ceiling``: the mean wMPPC from the source to the other
      seeds of its encoder, NaN if there are none;
    - ``null``: the mean wMPPC with the samples re-paired at random, with its standard error ``null_error``; ``p``: the
      probability of such a wMPPC for re-paired samples; ``excess``: (wMPPC - null) / (1 - null); ``relative``:
      (wMPPC - null) / (ceiling - null), NaN if there is no ceiling;
    - ``cross_fitted``: the wMPPC corrected for the choice of the best of many matches, by measuring them on both halves
      of the samples, with ``cross_fitted_low`` and ``cross_fitted_high``, its 95% bootstrap interval over samples;
    - ``mppc``, and ``features``, the number of features that it averages; ``beyond_shuffled``: the number of features
      that match better than with shuffled samples, at a false discovery rate of 5%, compared with features of similar
      density; ``significant``: the number of features that count as shared by the paper's appendix B, at that rate by
      Benjamini and Hochberg (NaN for 3 samples or fewer). Appendix B assumes independent, normal features. SAE features
      are neither, and sparse ones coincide by chance, so it counts too many: see `metrics.significance`. Constant
      features are not tested;
    - ``iou``: the mean, weighted by S, of the intersection over union of the samples on which a feature and its best
      match are active; ``one_to_one``: that of the correlations if every feature has at most one partner, see
      `correlations`;
    - ``strength_cv``: the coefficient of variation of S; ``strength_rho``: the correlation of S with rho;
    - ``cka``, ``mutual_knn``: similarity of the encoders' global tokens; for ``last`` that of the last layers, for
      ``layer_mean`` the mean over the source's layers of the best layer of the target, for ``pooled`` that of the best
      pair of layers;
    - ``unexplained``: the number of layers that take part, of both members, whose SAE has an FVU above
      ``max_fvu_global`` at global tokens; ``left_out``: the number of such layers, of both members, that the reading
      leaves out;
    - ``code``: whether the features are ``before_topk`` or ``after_topk``, as in other tables.

    Its ``attrs`` record ``max_fvu_global``, like those of other tables with ``unexplained``.

    Raises:
        StoreError: if a store is missing, or no feature of a member is active.
    """
    statistics = {entry.member: stores.active(entry.member) for entry in members}
    marked = {entry: np.array(stores.unexplained(entry.member)) for entry in members}
    rows: list[dict[str, Any]] = []
    cells: list[dict[str, Any]] = []
    influences: list[NDArray[np.float32]] = []
    of_parts: list[NDArray[np.float32]] = []
    for source in members:
        S, density = side_by_side(statistics[source.member])
        ceilings = _ceilings(source, S, stores)
        for target in members:
            if source == target:
                continue
            described = {
                "source": source.member,
                "target": target.member,
                "source_modality": source.modality,
                "target_modality": target.modality,
                "source_kind": source.kind,
                "target_kind": target.kind,
            }
            pair = stores.pair(source.member, target.member)
            similar = stores.similar(source.member, target.member)
            influences.append(pair.influence)
            of_parts.append(pair.cross_fitted.influence)
            for cell in cells_of(pair, S, density, active_counts(statistics[target.member])):
                reading = cell["reading"]
                part = part_of(pair, reading)
                layers = np.array(pair.layers_a)[part.a], np.array(pair.layers_b)[part.b]
                of_tokens = {measure: _similarity(similar.get(measure), reading, *layers) for measure in SIMILARITIES}
                calibrated = {
                    "ceiling": ceilings[reading],
                    "relative": metrics.relative(cell["wmppc"], cell["null"], ceilings[reading]),
                    "unexplained": int(marked[source][part.a].sum() + marked[target][part.b].sum()),
                    "left_out": 0 if reading == "last" else int((~part.a).sum() + (~part.b).sum()),
                }
                cells.append(described | cell | calibrated | of_tokens)
        # Many cells at once, because drawing the samples takes the most time, but not all, which might not fit memory.
        if len(cells) >= _CELLS_PER_BLOCK or source == members[-1]:
            rows += with_intervals(cells, np.concatenate(influences), np.concatenate(of_parts))
            cells, influences, of_parts = [], [], []
    return _marked(stores, statistics, pd.DataFrame(rows))[list(MATRIX_COLUMNS)]


def _ceilings(source: GroupedMember, S: metrics.Array, stores: Stores) -> dict[str, float]:
    """The mean wMPPC from a member to the other seeds of its encoder by reading, NaN if there are none."""
    found = []
    for seed in source.other_seeds:
        stores.active(seed)
        found.append(wmppc_readings(stores.pair(source.member, seed), S))
    return {
        reading: float(np.mean([each[reading] for each in found])) if found else float("nan")
        for reading in metrics.READINGS
    }


def with_intervals(
    cells: Sequence[Mapping[str, Any]], influence: NDArray[np.float32], of_parts: NDArray[np.float32]
) -> list[dict[str, Any]]:
    """Cells with the intervals of wMPPC and of its cross-fitted form.

    The influences ``[C, N]`` are those on wMPPC, and on the square of the cross-fitted one.
    """
    ends = metrics.bootstrap_intervals([cell["wmppc"] for cell in cells], influence)
    of_crossed = metrics.root_intervals([cell["cross_fitted"] for cell in cells], of_parts)
    columns = ("low", "high", *_CROSS_FITTED[1:])
    return [
        dict(cell) | dict(zip(columns, (*one, *other), strict=True))
        for cell, one, other in zip(cells, ends, of_crossed, strict=True)
    ]


def _made_from(stores: Stores, members: Iterable[str], table: pd.DataFrame) -> pd.DataFrame:
    """Add a column with the code of the features, and record the feature stores in the table's ``attrs``."""
    digests = stores.digests(members)
    table["code"] = read_code(stores.features / f"{next(iter(digests))}.zarr")
    table.attrs["features"] = digests
    return table


def _marked(stores: Stores, members: Iterable[str], table: pd.DataFrame) -> pd.DataFrame:
    """The same as `_made_from`, with the bound by which the table marks layers in its ``attrs``."""
    table.attrs["max_fvu_global"] = stores.max_fvu_global
    return _made_from(stores, members, table)


def side_by_side(statistics: Mapping[int, FeatureStatistics]) -> tuple[metrics.Array, metrics.Array]:
    """``[F]`` S and density of the features of all layers, concatenated."""
    S, density = zip(*((layer.strength, layer.density) for layer in statistics.values()), strict=True)
    return np.concatenate(S), np.concatenate(density)


def cells_of(
    pair: PairCorrelations, S: metrics.Array, density: metrics.Array, active: Sequence[int]
) -> list[dict[str, Any]]:
    """The values of a cell for each reading; ``active`` is the number of active features per layer of the target."""
    nulls = metrics.null_readings(pair.null, pair.null_error, S, pair.best.sizes_a, pair.kept_a)
    of_chance = S[_shuffled(pair.best.sizes_a, pair.floor_sizes)]
    cells = []
    for reading, crossed in zip(metrics.READINGS, pair.cross_fitted.readings, strict=True):
        part, row = part_of(pair, reading), int(reading == "last")
        strength, sizes = S[part.features], pair.best.sizes_a[part.a]
        best, match = (_best(of, part.b, part.features) for of in (pair.best.rho_ab, pair.best.match_ab))
        by_chance = _best(pair.floor, part.b, part.by_chance)
        value = _mean(reading, best, strength, sizes)
        _, significant = _significance(best[match >= 0], pair.samples, int(np.array(active)[part.b].sum()))
        cells.append(
            {
                "reading": reading,
                "wmppc": value,
                "floor": _mean(reading, by_chance, of_chance[part.by_chance], pair.floor_sizes[part.a]),
                **_calibrated(value, nulls[reading][0]),
                "null_error": nulls[reading][1],
                "cross_fitted": float(crossed),
                "mppc": metrics.mppc(best),
                "iou": _mean(reading, pair.iou[row, part.features], strength, sizes),
                "one_to_one": _mean(reading, pair.one_to_one[row, part.features], strength, sizes),
                "features": len(best),
                "beyond_shuffled": int(_beyond_shuffled(pair, part, density).sum()),
                "significant": significant.sum() if pair.samples > 3 else float("nan"),
                "strength_cv": metrics.coefficient_of_variation(strength),
                "strength_rho": metrics.correlation(strength, best),
            }
        )
    return cells


def _calibrated(value: float, nulls: metrics.Array) -> dict[str, float]:
    """A wMPPC in relation to its ``[R]`` values for re-paired samples."""
    null = float(nulls.mean())
    return {"null": null, "p": metrics.p_value(value, nulls), "excess": metrics.excess(value, null)}


class _Part(NamedTuple):
    """What takes part in a reading of the wMPPC from A to B."""

    a: NDArray[np.bool_]
    """``[L_A]`` the layers of A."""
    b: NDArray[np.bool_]
    """``[L_B]`` the layers of B."""
    features: NDArray[np.bool_]
    """``[F_A]`` the features of A."""
    by_chance: NDArray[np.bool_]
    """``[f_A]`` those of them that are correlated with shuffled samples."""


def part_of(pair: PairCorrelations, reading: str) -> _Part:
    """The last layers for ``last``; for other readings, the layers that are not left out."""
    a, b = pair.kept_a, pair.kept_b
    if reading == "last":
        a, b = (np.arange(len(layers)) == len(layers) - 1 for layers in (a, b))
    return _Part(a, b, np.repeat(a, pair.best.sizes_a), np.repeat(a, pair.floor_sizes))


def _best(values: NDArray[Any], layers: NDArray[np.bool_], features: NDArray[np.bool_]) -> NDArray[Any]:
    """The maximum of ``[L_B, F]`` over some layers of B, for some features."""
    best: NDArray[Any] = values.compress(layers, axis=0).compress(features, axis=1).max(axis=0)
    return best


def _mean(reading: str, values: NDArray[Any], S: metrics.Array, sizes: NDArray[np.int64]) -> float:
    """The mean of the values ``[F]`` of a reading's features, weighted by S as the reading does."""
    if reading == "layer_mean":
        return metrics.wmppc_layer_mean(values[None], S, sizes)
    return metrics.wmppc(values, S)


def wmppc_readings(pair: PairCorrelations, S: metrics.Array) -> dict[str, float]:
    """The wMPPC of each of `metrics.READINGS`; ``S [F]`` are of the features of all layers of A."""
    parts = {reading: part_of(pair, reading) for reading in metrics.READINGS}
    best = {reading: _best(pair.best.rho_ab, part.b, part.features) for reading, part in parts.items()}
    return {
        reading: _mean(reading, best[reading], S[part.features], pair.best.sizes_a[part.a])
        for reading, part in parts.items()
    }


def _beyond_shuffled(pair: PairCorrelations, part: _Part, density: metrics.Array) -> NDArray[np.bool_]:
    """Which of a reading's features match better than with shuffled samples, among features of similar density."""
    shuffled = _shuffled(pair.best.sizes_a, pair.floor_sizes)
    strata = metrics.strata(density * pair.samples)
    best, match = (_best(of, part.b, part.features) for of in (pair.best.rho_ab, pair.best.match_ab))
    by_chance, match_by_chance = (
        _best(of, part.b, part.by_chance) for of in (pair.floor, pair.best.match_ab[:, shuffled])
    )
    stratum, stratum_by_chance = strata[part.features], strata[shuffled][part.by_chance]
    beyond = np.zeros(len(best), bool)
    for n in np.unique(stratum):
        alike, alike_by_chance = (match >= 0) & (stratum == n), (match_by_chance >= 0) & (stratum_by_chance == n)
        beyond[alike] = metrics.beyond_shuffled(best[alike], by_chance[alike_by_chance])
    return beyond


def _shuffled(sizes: NDArray[np.int64], floor_sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Indices, over all layers, of the features correlated with shuffled samples: the first of each layer."""
    starts = np.cumsum(sizes) - sizes
    return np.concatenate([start + np.arange(size) for start, size in zip(starts, floor_sizes, strict=True)])


def active_counts(statistics: Mapping[int, FeatureStatistics]) -> list[int]:
    """Number of features per layer that are active on any sample."""
    return [int((layer.density > 0).sum()) for layer in statistics.values()]


def _significance(rho: NDArray[Any], samples: int, candidates: int) -> tuple[metrics.Array, NDArray[np.bool_]]:
    """log10 p of each rho by appendix B, and which are significant: NaN and none for 3 samples or fewer."""
    if samples <= 3:
        return np.full(len(rho), np.nan), np.zeros(len(rho), bool)
    log10_p = metrics.significance(rho, samples, max(1, candidates))
    return log10_p, metrics.benjamini_hochberg(log10_p)


def _similarity(values: pd.DataFrame | None, reading: str, layers_a: NDArray[Any], layers_b: NDArray[Any]) -> float:
    """Reduce a measure of two encoders to one number, for some of their layers and without those of constant tokens."""
    if values is None:
        return float("nan")
    measure = values.loc[layers_a, layers_b].to_numpy(np.float64)
    best = np.fmax.reduce(measure, axis=1)
    best = best[~np.isnan(best)]
    if not len(best):
        return float("nan")
    return float(best.max() if reading == "pooled" else best.mean())


def averages_table(matrix: pd.DataFrame, correlations: Path) -> pd.DataFrame:
    """Mean wMPPC between modalities (Table 3), by reading, with its floor, null, excess and cross-fitted form.

    Intervals are 95% bootstrap intervals. All cells of a mean are resampled with the same samples: a sample's influence
    on the mean is the mean of its influences on the cells. Cells of two seeds of one encoder, and those of untrained
    encoders, are left out.
    ``unexplained`` is the number of cells with layers that are not explained, ``left_out`` of those that leave such
    layers out.

    Args:
        matrix: the table of `matrix_table`.
        correlations: the folder of its correlation stores.
    """
    table = _averaged(matrix)
    influences: dict[tuple[str, ...], metrics.Array] = {}  # [2, N], on wMPPC and on its cross-fitted form
    for pair, cells in table.groupby(["source", "target"]):
        source, target = pair
        found = read_pair(correlations, source, target, matrix.attrs.get("features", {}))
        of_crossed = metrics.root_influence(found.cross_fitted.readings, found.cross_fitted.influence)
        both = np.stack([found.influence.astype(np.float64), of_crossed], axis=1)
        of_pair = dict(zip(metrics.READINGS, both, strict=True))
        for group in cells[_DIRECTION].itertuples(index=False, name=None):
            influences[group] = influences.get(group, 0) + of_pair[group[0]]
    averages = modality_means(matrix).set_index(_DIRECTION)
    averages = averages.reindex(sorted(influences, key=lambda group: (metrics.READINGS.index(group[0]), *group)))
    means = [influences[group] / count for group, count in averages.cells.items()]
    for n, (column, low, high) in enumerate((("wmppc", "low", "high"), _CROSS_FITTED)):
        of_each = np.stack([mean[n] for mean in means]) if means else None
        ends = np.empty((0, 2)) if of_each is None else metrics.bootstrap_intervals(averages[column], of_each)
        place = averages.columns.get_loc(column)
        averages.insert(place + 1, low, ends[:, 0])
        averages.insert(place + 2, high, ends[:, 1])
    averages = averages.reset_index().assign(code=matrix.code.iloc[0])
    averages.attrs = {key: matrix.attrs[key] for key in ("features", "max_fvu_global") if key in matrix.attrs}
    return averages


def _averaged(matrix: pd.DataFrame) -> pd.DataFrame:
    """The cells of a matrix that count in its averages."""
    encoders = [matrix[side].map(lambda member: as_member(member).encoder) for side in ("source", "target")]
    trained = (matrix[["source_kind", "target_kind"]] != "untrained").all(axis=1)
    return matrix[matrix.wmppc.notna() & (encoders[0] != encoders[1]) & trained]


def modality_means(matrix: pd.DataFrame) -> pd.DataFrame:
    """The number of cells of a matrix per reading and direction, and the means of their columns."""
    cells = _averaged(matrix).groupby(_DIRECTION, as_index=False)
    means = {column: (column, "mean") for column in ("wmppc", "floor", "null", "excess", "cross_fitted")}
    marked = {column: (column, lambda counts: (counts > 0).sum()) for column in ("unexplained", "left_out")}
    return cells.agg(cells=("wmppc", "size"), **means, **marked)


def layerwise_table(pairs: Sequence[tuple[str, str]], stores: Stores) -> pd.DataFrame:
    """wMPPC and MPPC between all layers of two members, in both directions, each once if pairs are repeated.

    ``floor`` is the wMPPC with the target's samples shuffled; ``null``, ``p``, ``excess``, ``cross_fitted`` and
    ``unexplained`` are as in `matrix_table`; ``cka`` and ``mutual_knn`` compare the global tokens of the two layers,
    NaN for two seeds of one encoder.

    Raises:
        StoreError: if a store is missing, or no feature of a member is active.
    """
    rows = []
    members = {member for pair in pairs for member in pair}
    once: dict[frozenset[str], tuple[str, str]] = {}
    for each in pairs:
        once.setdefault(frozenset(each), each)
    for a, b in once.values():
        statistics = {member: stores.active(member) for member in (a, b)}
        unexplained = {member: stores.unexplained(member) for member in (a, b)}
        for source, target in ((a, b), (b, a)):
            pair, similar = stores.pair(source, target), stores.similar(source, target)
            ends, floor_ends = np.cumsum(pair.best.sizes_a), np.cumsum(pair.floor_sizes)
            for place, (layer, first, end, floor_first, floor_end) in enumerate(
                zip(
                    pair.layers_a,
                    ends - pair.best.sizes_a,
                    ends,
                    floor_ends - pair.floor_sizes,
                    floor_ends,
                    strict=True,
                )
            ):
                S = statistics[source][layer].strength
                for n, target_layer in enumerate(pair.layers_b):
                    rho, by_chance = pair.best.rho_ab[n, first:end], pair.floor[n, floor_first:floor_end]
                    value = metrics.wmppc(rho, S)
                    rows.append(
                        {
                            "source": source,
                            "target": target,
                            "source_layer": layer,
                            "target_layer": target_layer,
                            "wmppc": value,
                            "mppc": metrics.mppc(rho),
                            "floor": metrics.wmppc(by_chance, S[: len(by_chance)]),
                            **_calibrated(value, pair.null[:, place, n].astype(np.float64)),
                            "cross_fitted": float(pair.cross_fitted.layers[place, n]),
                            "unexplained": int(unexplained[source][place]) + unexplained[target][n],
                            **{
                                measure: float(similar[measure].loc[layer, target_layer]) if similar else float("nan")
                                for measure in SIMILARITIES
                            },
                        }
                    )
    return _marked(stores, sorted(members), pd.DataFrame(rows))


def pair_table(a: str, b: str, stores: Stores) -> pd.DataFrame:
    """Every feature of two members with its best match in the other: the features of ``a``, then those of ``b``.

    ``rho`` is the largest correlation with any feature of any layer of the target that is not left out, attained by
    ``match_feature`` of ``match_layer``; both are -1, and rho is 0, for a constant feature. ``iou``: the intersection
    over union of the samples on which both are active. ``beyond_shuffled``: whether rho is larger than with shuffled
    samples, as in `matrix_table`. ``log10_p``: the p-value of rho by the paper's appendix B, NaN for a
    constant feature and for 3 samples or fewer. ``significant``: whether the feature counts as shared by that p-value,
    by Benjamini and Hochberg at a false discovery rate of 5% over the features of one direction. These are too many:
    see `metrics.significance`. ``left_out``: whether the feature's own layer is left out of ``pooled`` and
    ``layer_mean``; such features are not tested.

    Raises:
        StoreError: if a store is missing, or no feature of a member is active.
    """
    statistics = {member: stores.active(member) for member in (a, b)}
    tables = []
    for source, target in ((a, b), (b, a)):
        pair, of_source = stores.pair(source, target), statistics[source]
        part = part_of(pair, "pooled")
        of_layers, matches = (of.compress(part.b, axis=0) for of in (pair.best.rho_ab, pair.best.match_ab))
        best = of_layers.argmax(axis=0)[None]
        rho, match = (np.take_along_axis(of, best, 0)[0] for of in (of_layers, matches))
        tested = (matches.max(axis=0) >= 0) & part.features
        log10_p, significant = np.full(len(rho), np.nan), np.zeros(len(rho), bool)
        candidates = int(np.array(active_counts(statistics[target]))[part.b].sum())
        log10_p[tested], significant[tested] = _significance(rho[tested], pair.samples, candidates)
        sizes, (S, density) = pair.best.sizes_a, side_by_side(of_source)
        beyond = np.zeros(len(rho), bool)
        beyond[part.features] = _beyond_shuffled(pair, part, density)
        tables.append(
            pd.DataFrame(
                {
                    "source": source,
                    "target": target,
                    "layer": np.repeat(pair.layers_a, sizes),
                    "feature": np.concatenate([np.arange(size) for size in sizes]),
                    "strength": S,
                    "density": density,
                    "rho": rho,
                    "match_layer": np.where(match < 0, -1, np.array(pair.layers_b)[part.b][best[0]]),
                    "match_feature": match,
                    "iou": pair.iou[0],
                    "beyond_shuffled": beyond,
                    "log10_p": log10_p,
                    "significant": significant,
                    "left_out": ~part.features,
                }
            )
        )
    return _made_from(stores, (a, b), pd.concat(tables, ignore_index=True))


def read_direction(folder: Path, source: str, target: str) -> pd.DataFrame:
    """Read the columns ``source, target, strength, rho, left_out`` of the source's features in a pair's table."""
    path = folder / f"{pair_name(as_member(source), as_member(target))}.parquet"
    columns = ["source", "target", "strength", "rho", "left_out"]
    table = read_table(path, "pairs", columns, [("source", "==", source)])
    return table.astype({"source": "category", "target": "category"})


def sharedness_table(
    source: str,
    shared_with: Sequence[str],
    not_shared_with: Sequence[str],
    stores: Stores,
    seeds: Mapping[str, Sequence[str]] | None = None,
) -> pd.DataFrame:
    """The source's last-layer features ranked by Comparative Sharedness: most shared with G and least with H first.

    A feature's rho with a member is that of its best match in the member's last layer. See `ranking` for the columns.

    Args:
        source: a member.
        shared_with: the group G.
        not_shared_with: the group H.
        stores: the folders of their stores.
        seeds: for members of both groups, the members that stand for them in resamples: the seeds of their encoder.

    Raises:
        StoreError: if a store is missing, or no feature of a member is active.
    """
    statistics = stores.active(source)
    drawn = {member: (seeds or {}).get(member, [member]) for member in (*shared_with, *not_shared_with)}
    members = sorted({*drawn, *(member for group in drawn.values() for member in group)})
    for member in members:
        stores.active(member)
    layer = max(statistics)
    pairs = {member: stores.last_layer(source, member) for member in members}
    unexplained = [member for member in (source, *drawn) if stores.unexplained(member)[-1]]
    table = ranking(source, layer, statistics[layer], pairs, shared_with, not_shared_with, drawn, unexplained)
    return _marked(stores, (source, *members), table)


def ranking(
    source: str,
    layer: int,
    statistics: FeatureStatistics,
    pairs: Mapping[str, LastLayer],
    shared_with: Sequence[str],
    not_shared_with: Sequence[str],
    drawn: Mapping[str, Sequence[str]],
    unexplained: Sequence[str],
) -> pd.DataFrame:
    """Rank the F features of a layer by Comparative Sharedness; ``top`` marks the first 1%, as in the paper.

    Ties keep the features' order. ``shared_with`` and ``not_shared_with`` list the groups, and ``unexplained`` the
    members whose layer is unexplained, separated by commas.
    ``excess_g`` and ``excess_h`` are the smallest excess of a feature over its null in G and the largest in H, and
    ``calibrated_delta``, ``calibrated_rank`` and ``calibrated_top`` are computed from these as ``delta``, ``rank`` and
    ``top`` are from rho. ``top_share`` and ``calibrated_top_share`` are the shares of bootstrap resamples, of samples
    and of the seeds of each member, in which the feature is in the first 1%.

    Args:
        source: the member of the features.
        layer: the layer.
        statistics: statistics of that layer.
        pairs: their best matches, by member.
        shared_with: the group G.
        not_shared_with: the group H.
        drawn: for each member of both groups the members of which each resample draws one in its place.
        unexplained: the members whose layer is unexplained.
    """
    S, F = statistics.strength, len(statistics.strength)
    groups = shared_with, not_shared_with
    rho = {member: pairs[member].rho.astype(np.float64) for group in groups for member in group}
    excess = {member: metrics.feature_excess(values, pairs[member].null) for member, values in rho.items()}
    (g, h), (excess_g, excess_h) = (
        [np.stack([values[member] for member in group]) for group in groups] for values in (rho, excess)
    )
    calibrated = metrics.comparative_sharedness(S, excess_g, excess_h)
    table = pd.DataFrame(
        {
            "source": source,
            "layer": layer,
            "feature": np.arange(F),
            "delta": metrics.comparative_sharedness(S, g, h),
            "strength": S,
            "density": statistics.density,
            "rho_g": g.min(axis=0),
            "rho_h": h.max(axis=0),
            "excess_g": excess_g.min(axis=0),
            "excess_h": excess_h.max(axis=0),
            "calibrated_delta": calibrated,
            "calibrated_rank": np.argsort(np.argsort(-calibrated, kind="stable"), kind="stable") + 1,
            **_top_shares(S, pairs, groups, drawn),
            "shared_with": ", ".join(shared_with),
            "not_shared_with": ", ".join(not_shared_with),
            "unexplained": ", ".join(unexplained),
            **{f"rho[{member}]": values for member, values in rho.items()},
        }
    )
    table = table.sort_values("delta", ascending=False, kind="stable", ignore_index=True)
    table.insert(0, "rank", np.arange(1, F + 1))
    table.insert(1, "top", np.arange(F) < top_count(F))
    place = table.columns.get_loc("calibrated_rank")
    table.insert(int(place) + 1, "calibrated_top", table.calibrated_rank <= top_count(F))
    return table


def _top_shares(
    S: metrics.Array,
    pairs: Mapping[str, LastLayer],
    groups: Sequence[Sequence[str]],
    drawn: Mapping[str, Sequence[str]],
) -> dict[str, metrics.Array]:
    """Shares of resamples in which each feature is in the first 1% of the published and of the calibrated ranking."""
    rng = np.random.default_rng(0)
    strength = S * next(iter(pairs.values())).resampled_strength.astype(np.float64)
    R = len(strength)
    rho: list[list[metrics.Array]] = [[], []]
    excess: list[list[metrics.Array]] = [[], []]
    for n, group in enumerate(groups):
        for member in group:
            of_seeds = [pairs[seed] for seed in drawn[member]]
            seed = rng.integers(len(of_seeds), size=R)
            values = np.stack([each.resampled_rho for each in of_seeds])[seed, np.arange(R)].astype(np.float64)
            rho[n].append(values)
            excess[n].append(metrics.feature_excess(values, np.stack([each.null for each in of_seeds])[seed]))
    return {
        name: metrics.top_shares(metrics.comparative_sharedness(strength, *both), top_count(len(S)))
        for name, both in (("top_share", rho), ("calibrated_top_share", excess))
    }


def top_count(features: int) -> int:
    """Number of top features in a ranking: 1%, at least one."""
    return max(1, features // 100)


def overlap_table(rankings: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Number of top features that every two rankings of one source have in common, and the number expected by chance.

    ``expected`` is top^2 / F, and ``log10_p`` the probability of this many or more in the hypergeometric distribution.
    ``calibrated_overlap`` and ``calibrated_log10_p`` are those of the top features of the calibrated rankings.

    Args:
        rankings: tables of `sharedness_table`, by name.
    """
    from scipy.stats import hypergeom  # slow to import

    rows = []
    for (first, a), (second, b) in combinations(sorted(rankings.items()), 2):
        if a.source[0] != b.source[0]:
            continue
        F, top = len(a), int(a.top.sum())
        row: dict[str, Any] = {"source": a.source[0], "first": first, "second": second, "top": top}
        for form, expected in (("", {"expected": top**2 / F}), ("calibrated_", {})):
            overlap = len({*a.feature[a[f"{form}top"]]} & {*b.feature[b[f"{form}top"]]})
            log10_p = float(hypergeom.logsf(overlap - 1, F, top, top) / np.log(10))
            row |= {f"{form}overlap": overlap, **expected, f"{form}log10_p": log10_p}
        rows.append(row)
    return pd.DataFrame(rows)


def named_features(
    ranking: pd.DataFrame, features: Sequence[int] = (), other: pd.DataFrame | None = None
) -> pd.DataFrame:
    """Select rows of a ranking: given features, or those that are also at the top of another ranking of its source.

    Args:
        ranking: a table of `sharedness_table`.
        features: the features to keep; by default all.
        other: another such table of the same features; only features at the top of both are kept.

    Raises:
        StudyError: if one of the features is not in the ranking, or if no feature is at the top of both.
    """
    if other is not None:
        ranking = ranking[ranking.top & ranking.feature.isin(other.feature[other.top])]
        if ranking.empty:
            raise StudyError("no feature is at the top of both rankings; leave the other one out, or name features")
    unknown = sorted(set(features) - set(ranking.feature))
    if unknown:
        raise StudyError(f"feature {unknown[0]} is not among the {len(ranking)} of the ranking; name one of them")
    return ranking[ranking.feature.isin(features) | (not features)].reset_index(drop=True)


def sae_table(members: Sequence[Member], saes: Path, stores: Stores) -> pd.DataFrame:
    """Size and quality of every SAE: FVU, L0 and dead latents over all tokens and over global tokens.

    ``measured_on`` says whether these are of held-out samples or of those that it was trained on. ``outlying`` is the
    fraction of training tokens that ``max_norm`` left out, ``unexplained`` whether the FVU at global tokens exceeds
    ``max_fvu_global``, which its ``attrs`` record.

    Raises:
        StoreError: if an SAE's metrics are missing or unreadable.
    """
    rows = []
    for member in members:
        store = stores.features / f"{member}.zarr"
        digests, unexplained = read_spec(store, FEATURES)["made_from"]["saes"], stores.unexplained(str(member))
        for (layer, statistics), marked in zip(read_statistics(store).items(), unexplained, strict=True):
            folder, record = sae_of(saes / member.encoder, layer, member.seed)
            if record["digest"] != digests[str(layer)]:
                raise StoreError(
                    f"{folder}: not the SAE that made the features of {member}; delete these and run the features "
                    f"stage again"
                )
            metrics = _metrics_of(folder, record)
            rows.append(
                {
                    "encoder": member.encoder,
                    "seed": member.seed,
                    "layer": layer,
                    "latents": len(statistics.strength),
                    **_training_of(metrics),
                    "measured_on": metrics.get("measured_on"),
                    "unexplained": marked,
                    "silent_features": int((statistics.density == 0).sum()),
                }
            )
    table = pd.DataFrame(rows)
    table.attrs["max_fvu_global"] = stores.max_fvu_global
    return table


def check_saes(path: Path, table: pd.DataFrame, saes: Path) -> None:
    """Make sure that a table of `sae_table` is of the SAEs in a folder, by their steps and quality.

    Raises:
        StoreError: if a row is not of its SAE, as in the table of another study.
    """
    for row in table.itertuples():
        folder, record = sae_of(saes / str(row.encoder), int(row.layer), int(row.seed))
        training = _training_of(_metrics_of(folder, record))
        written = [getattr(row, key) for key in training]
        if not np.array_equal(np.array(written, float), np.array([*training.values()], float), equal_nan=True):
            raise StoreError(
                f"{path}: its row of {row.encoder}@{row.seed}, layer {row.layer} is not of {folder}; give the folder "
                "of the SAEs that the table was made from, or run the metrics stage again"
            )


def _metrics_of(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    try:
        metrics: dict[str, Any] = json.loads(sae_file(folder, "metrics.json", record).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"{folder}: no readable metrics ({error}); {REMEDY}") from None
    return metrics


def _training_of(metrics: dict[str, Any]) -> dict[str, Any]:
    """Number of steps and quality of an SAE, by column of `sae_table`."""
    quality = {name: metrics[f"{name.rpartition('_')[2]}_tokens"][name.rpartition("_")[0]] for name in _QUALITY}
    return {"steps": metrics["steps"], **quality, "outlying": metrics.get("outlying", 0.0)}


def write_table(table: pd.DataFrame, out: Path) -> None:
    """Write a table as CSV to ``out`` and as Parquet next to it, which also records the table's ``attrs``."""
    attributes, table = table.attrs, table.copy(deep=False)
    table.attrs = {}
    with atomic_output(out.with_suffix(".parquet"), PARQUET) as partial:
        write_parquet(pa.Table.from_pandas(table, preserve_index=False), partial, out.stem, attributes)
    with atomic_output(out, CSV) as partial:
        table.to_csv(partial, index=False, float_format="%.6g", lineterminator="\n")


def read_table(
    path: Path, kind: str, columns: Sequence[str] | None = None, filters: Sequence[tuple[str, str, Any]] | None = None
) -> pd.DataFrame:
    """Read the Parquet file of a table of `write_table`, and check its seal.

    Args:
        path: the table.
        kind: kind of the table, such as ``"matrix"``.
        columns: columns to read; by default all.
        filters: rows to read.

    Returns:
        The table; its ``attrs`` are its record.

    Raises:
        StoreError: if the table is missing, damaged, of another kind, or has no rows.
    """
    stage = kind if kind in _STAGES else "metrics"
    if path.suffix == ".csv":
        raise StoreError(f"{path}: CSV files are for reading only; name {path.with_suffix('.parquet').name}")
    stored, record = read_parquet(path, stage, columns, filters)
    table = stored.to_pandas()
    table.attrs = record
    lacking = [f"column {name}" for name in columns or _COLUMNS[kind] if name not in table.columns]
    if table.empty and kind not in _MAYBE_EMPTY:
        lacking.append("rows")
    if lacking:
        raise StoreError(f"{path}: not a table of the kind {kind}: it has no {lacking[0]}; name another")
    return table
