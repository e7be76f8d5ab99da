"""Tables from real stores, against wMPPC and Comparative Sharedness computed directly from the features."""

import json
import re
import shutil
from itertools import combinations, product
from math import comb
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import zarr
from scipy.stats import false_discovery_control, norm, variation
from typer.testing import CliRunner

from conceptshare import metrics
from conceptshare.analysis import paper, tables
from conceptshare.analysis.seeds import seeds_table
from conceptshare.analysis.tables import (
    Stores,
    averages_table,
    check_ranking,
    check_saes,
    layerwise_table,
    matrix_table,
    overlap_table,
    pair_table,
    read_direction,
    read_table,
    sae_table,
    sharedness_table,
    write_table,
)
from conceptshare.cli import app
from conceptshare.cli.tables import _warn_without
from conceptshare.config.members import GroupedMember, Member, as_member, pair_name
from conceptshare.correlations import _store, correlate_stores
from conceptshare.io.errors import StoreError
from conceptshare.io.readers import source_of
from conceptshare.io.seals import seal
from conceptshare.io.sizes import REPAIRINGS
from conceptshare.io.store import open_store
from conceptshare.sae.features import record_features
from tests.helpers.studies import study_file

MEMBERS = [
    GroupedMember("vit@0", "image", "vision", ("vit@7",)),
    GroupedMember("clip-text@0", "text", "vlm"),
    GroupedMember("bert@1", "text", "language"),
]
SECOND_SEED = GroupedMember("vit@7", "image", "vision")
WIDTHS = {"vit@0": 6, "clip-text@0": 8, "bert@1": 5, "vit@7": 7}
FLOOR_FEATURES = 4
SIMILARITIES = {"bert__vit": 0.1, "bert__clip-text": 0.2, "clip-text__vit": 0.3}


@pytest.fixture(scope="module")
def made(tmp_path_factory, write_features_from):
    """Stores of four members with two layers each, the correlations of every pair, and the features."""
    folder, rng = tmp_path_factory.mktemp("made"), np.random.default_rng(0)
    features = {}
    common = rng.lognormal(0, 1, (60, 4))
    for member, width in WIDTHS.items():
        features[member] = {}
        for layer in (1, 3):
            x = rng.lognormal(0, 1, (60, width)) * (rng.random((60, width)) < 0.5)
            x[:, :4] = 0.7 * common[:, rng.permutation(4)] + rng.random() * x[:, :4]
            x[:, -1] = 0  # never active
            features[member][layer] = x.astype(np.float16).astype(np.float64)
        write_features_from(folder / "made", folder / "features", member, features[member])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_store, "FLOOR_FEATURES", FLOOR_FEATURES)
        correlate(stores_in(folder), WIDTHS)
    (folder / "similarity").mkdir()
    for name, first in SIMILARITIES.items():
        layers = [(1, 1), (1, 3), (3, 1), (3, 3)]
        rows = [(*pair, first + n / 100, first + n / 1000, 60, n / 10, 0.02) for n, pair in enumerate(layers)]
        columns = ["source_layer", "target_layer", "cka", "mutual_knn", "samples", "cka_null", "mutual_knn_null"]
        table = pd.DataFrame(rows, columns=columns)
        members = [next(member for member in WIDTHS if member.startswith(encoder)) for encoder in name.split("__")]
        table.attrs["activations"] = {as_member(member).encoder: activations_of(folder, member) for member in members}
        write_table(table, folder / f"similarity/{name}.csv")
    return folder, features


def activations_of(folder, member):
    """What the activations are of that a member's features come from."""
    return source_of(open_store(folder / f"features/{member}.zarr", "features").attrs["spec"])


@pytest.fixture
def study(made, tmp_path):
    """A copy of these stores that a test may change, and their features."""
    folder, features = made
    shutil.copytree(folder, tmp_path / "stores")
    return stores_in(tmp_path / "stores"), features


def stores_in(folder):
    return Stores(folder / "features", folder / "correlations", folder / "similarity")


def correlate(stores, members, leave_out_above=None):
    """Write the correlation store of every pair of members."""
    for pair in combinations(sorted(as_member(member) for member in members), 2):
        paths = [stores.features / f"{member}.zarr" for member in pair]
        out = stores.correlations / f"{pair_name(*pair)}.zarr"
        correlate_stores(*paths, out, leave_out_above=leave_out_above)


def rho(x, y):
    """Largest correlation of each feature of x with any of y; 0 for constant features."""
    with np.errstate(invalid="ignore", divide="ignore"):
        r = np.corrcoef(x, y, rowvar=False)[: x.shape[1], x.shape[1] :]
    r = np.where(np.isnan(r), -np.inf, r).max(1)
    return np.where(np.isinf(r), 0, r)


def weighted(r, S):
    return (r * S).sum() / S.sum()


def test_matrix_table(study):
    stores, features = study
    table = matrix_table(MEMBERS, stores)
    assert len(table) == 3 * 2 * 3
    assert (table.source != table.target).all()
    for source, *_ in MEMBERS:
        for target, *_ in MEMBERS:
            if source == target:
                continue
            a, b = features[source], features[target]
            best = {n: np.max([rho(x, y) for y in b.values()], axis=0) for n, x in a.items()}
            S = {n: x.sum(0) for n, x in a.items()}
            pooled = np.concatenate(list(best.values()))
            last = rho(a[3], b[3])
            expected = {
                "pooled": (weighted(pooled, np.concatenate(list(S.values()))), pooled.mean()),
                "layer_mean": (np.mean([weighted(best[n], S[n]) for n in a]), pooled.mean()),
                "last": (weighted(last, S[3]), last.mean()),
            }
            cells = table[(table.source == source) & (table.target == target)].set_index("reading")
            assert set(cells.index) == set(expected)
            for reading, (wmppc, mppc) in expected.items():
                assert cells.wmppc[reading] == pytest.approx(wmppc, abs=1e-5), (source, target, reading)
                assert cells.mppc[reading] == pytest.approx(mppc, abs=1e-5), (source, target, reading)


def test_matrix_table_has_the_groups_of_source_and_target(study):
    table = matrix_table(MEMBERS, study[0])
    groups = {member: (modality, kind) for member, modality, kind, _ in MEMBERS}
    for row in table.itertuples():
        assert (row.source_modality, row.source_kind) == groups[row.source]
        assert (row.target_modality, row.target_kind) == groups[row.target]


READINGS = ("pooled", "layer_mean", "last")


def by_reading(best, last, S):
    """The wMPPC of each reading, from best correlations by layer, over all layers and over the last layer."""
    return {
        "pooled": weighted(np.concatenate(best), np.concatenate(S)),
        "layer_mean": np.mean([weighted(r, s) for r, s in zip(best, S, strict=True)]),
        "last": weighted(last, S[-1]),
    }


def cells_of(table):
    return [((row.source, row.target, row.reading), row) for row in table.itertuples()]


def stored(stores, source, target, name):
    """An array of a pair's store, for the direction from the source."""
    a, b = as_member(source), as_member(target)
    store = zarr.open_group(stores.correlations / f"{pair_name(a, b)}.zarr", mode="r")
    direction = "ab" if a < b else "ba"
    return store[f"{name}_{direction}"][:].astype(np.float64)


def test_a_matrixs_floor_is_the_wmppc_with_shuffled_samples(study):
    stores, features = study
    for (source, target, reading), row in cells_of(matrix_table(MEMBERS, stores)):
        floor = stored(stores, source, target, "floor")
        assert floor.shape == (2, 2 * FLOOR_FEATURES)
        S = [x.sum(0)[:FLOOR_FEATURES] for x in features[source].values()]
        best = np.split(floor.max(axis=0), 2)
        expected = by_reading(best, floor[1, FLOOR_FEATURES:], S)[reading]
        assert row.floor == pytest.approx(expected, abs=1e-6), (source, target, reading)


def test_a_matrixs_ceiling_is_the_wmppc_with_another_seed_of_the_source(study):
    stores, features = study
    a, b = features["vit@0"], features["vit@7"]
    best = [np.max([rho(x, y) for y in b.values()], axis=0) for x in a.values()]
    expected = by_reading(best, rho(a[3], b[3]), [x.sum(0) for x in a.values()])
    for (source, _, reading), row in cells_of(matrix_table(MEMBERS, stores)):
        if source == "vit@0":
            assert row.ceiling == pytest.approx(expected[reading], abs=1e-5)
        else:
            assert np.isnan(row.ceiling)


def signed_roots(squares):
    return np.sign(squares) * np.sqrt(np.abs(squares))


def slope(value, influence):
    """The mean slope of the root within two standard errors of a value's square."""
    width = 2 * influence.std() / np.sqrt(len(influence))
    low, high = signed_roots(value * abs(value) + np.array([-width, width]))
    return (high - low) / (2 * width)


@pytest.mark.parametrize("at_once", [1, 7, 256])
def test_a_matrixs_intervals_come_from_the_samples_influences(study, monkeypatch, at_once):
    monkeypatch.setattr(tables, "_CELLS_PER_BLOCK", at_once)
    stores, _ = study
    for (source, target, reading), row in cells_of(matrix_table(MEMBERS, stores)):
        influence = stored(stores, source, target, "influence")[READINGS.index(reading)]
        (expected,) = metrics.bootstrap_intervals([row.wmppc], influence[None])
        assert (row.low, row.high) == pytest.approx(tuple(expected), abs=1e-5)
        assert row.low < row.wmppc < row.high
        crossed, influence = (
            stored(stores, source, target, f"cross_fitted_{name}")[READINGS.index(reading)]
            for name in ("readings", "influence")
        )
        (expected,) = signed_roots(metrics.bootstrap_intervals([crossed * abs(crossed)], influence[None]))
        found = row.cross_fitted, row.cross_fitted_low, row.cross_fitted_high
        assert found == pytest.approx((crossed, *expected), abs=1e-5)


def test_a_matrix_counts_features_shared_by_appendix_b_and_by_the_shuffled_baseline(study):
    stores, features = study
    counts = []
    for (source, target, reading), row in cells_of(matrix_table(MEMBERS, stores)):
        a, b = features[source], features[target]
        layers = [3] if reading == "last" else [1, 3]
        x, y = (np.concatenate([of[n] for n in layers], axis=1) for of in (a, b))
        assert row.features == x.shape[1]
        best = rho(x, y)
        assert row.strength_cv == pytest.approx(variation(x.sum(0)), rel=1e-6)
        assert row.strength_rho == pytest.approx(np.corrcoef(x.sum(0), best)[0, 1], abs=1e-4)
        varying, candidates = x.any(0), y.any(0).sum()
        p = 1 - norm.cdf(np.arctanh(best[varying]) * np.sqrt(60 - 3)) ** candidates
        assert row.significant == (false_discovery_control(p) <= 0.05).sum()
        floor = stored(stores, source, target, "floor")
        floor = floor[-1, FLOOR_FEATURES:] if reading == "last" else floor.max(axis=0)
        shuffled = np.concatenate([a[n][:, :FLOOR_FEATURES].any(0) for n in layers])
        first = np.concatenate([a[n][:, :FLOOR_FEATURES] for n in layers], axis=1)
        beyond = 0
        for low, high in ((1, 15), (16, 60)):
            ours, by_chance = (((z > 0).sum(0) >= low) & ((z > 0).sum(0) <= high) for z in (x, first))
            beyond += metrics.beyond_shuffled(best[varying & ours], floor[shuffled & by_chance]).sum()
        assert row.beyond_shuffled == beyond
        counts.append((row.significant, len(best) - varying.sum()))
    assert len({significant for significant, _ in counts}) > 1
    assert min(constant for _, constant in counts) > 0


def test_constant_features_are_neither_tested_nor_candidates(tmp_path, write_features, rng):
    """Correlations range from none to perfect, so the counts show which features are included."""
    N, mixed = 100, np.linspace(0, 0.6, 60)
    common = rng.random((N, 60))
    a, b = np.zeros((2, 2, N, 100))
    for layer in range(2):
        a[layer][:, :60] = rng.random((N, 60)) * (1 - mixed) + common * mixed
    b[0][:, :] = rng.random((N, 100))
    b[1][:, 20:80] = common
    for member, x in (("a@0", a), ("b@0", b)):
        write_features(tmp_path, member, dict(enumerate(x)))
    stores = Stores(tmp_path, tmp_path)
    correlate(stores, ["a@0", "b@0"])
    members = [GroupedMember(member, "image", "vision") for member in ("a@0", "b@0")]
    table = matrix_table(members, stores).set_index(["source", "reading"])
    a, b = (np.float64(np.float16(x)) for x in (a, b))
    floor = stored(stores, "a@0", "b@0", "floor")
    for reading, candidates in (("pooled", 160), ("last", 60)):
        x, y = (np.concatenate(of, axis=1) if reading == "pooled" else of[1] for of in (a, b))
        best, varying = rho(x, y), x.any(0)
        p = 1 - norm.cdf(np.arctanh(best) * np.sqrt(N - 3)) ** candidates
        significant = (false_discovery_control(p[varying]) <= 0.05).sum()
        assert table.significant["a@0", reading] == significant
        others = 1 - norm.cdf(np.arctanh(best[varying]) * np.sqrt(N - 3)) ** 200
        assert significant > (false_discovery_control(p) <= 0.05).sum()
        assert significant > (false_discovery_control(others) <= 0.05).sum()
        by_chance = floor.max(axis=0) if reading == "pooled" else floor[1, 100:]
        beyond = metrics.beyond_shuffled(best[varying], by_chance[varying]).sum()
        assert table.beyond_shuffled["a@0", reading] == beyond
        assert 0 < beyond < metrics.beyond_shuffled(best[varying], by_chance).sum()
    pairs = pair_table("a@0", "b@0", stores)
    beyond = pairs[pairs.beyond_shuffled & (pairs.source == "a@0")]
    assert len(beyond) == table.beyond_shuffled["a@0", "pooled"]
    assert beyond.rho.min() > pairs[~pairs.beyond_shuffled & (pairs.source == "a@0")].rho.max()


def test_a_matrix_takes_the_best_layers_of_the_encoders_own_similarities(study):
    stores, _ = study
    table = matrix_table(MEMBERS, stores).set_index(["source", "target", "reading"])
    # By layer of the first and second member: (1, 1) 0, (1, 3) 1, (3, 1) 2, (3, 3) 3.
    steps = {"last": 3, "pooled": 3}
    for name, first in SIMILARITIES.items():
        a, b = (next(m for m in WIDTHS if m.startswith(part)) for part in name.split("__"))
        for source, target in ((a, b), (b, a)):
            # The best target layer per source layer: 1 and 3 from the first member, 2 and 3 from the second.
            for reading, step in (steps | {"layer_mean": 2 if source == a else 2.5}).items():
                cell = table.loc[source, target, reading]
                assert cell.cka == pytest.approx(first + step / 100)
                assert cell.mutual_knn == pytest.approx(first + step / 1000)
                assert (cell.cka_null, cell.mutual_knn_null) == pytest.approx((step / 10, 0.02))


def test_layers_with_constant_tokens_have_no_similarity_and_are_ignored(study):
    stores, _ = study
    table = read_table(stores.similarity / "bert__vit.parquet", "similarity")
    table.loc[table.source_layer == 3, "cka"] = np.nan
    write_table(table, stores.similarity / "bert__vit.csv")
    found = matrix_table(MEMBERS, stores).set_index(["source", "target", "reading"]).cka
    assert found["bert@1", "vit@0", "pooled"] == found["bert@1", "vit@0", "layer_mean"] == pytest.approx(0.11)
    assert found["vit@0", "bert@1", "layer_mean"] == pytest.approx((0.1 + 0.11) / 2)
    assert np.isnan(found["vit@0", "bert@1", "last"])


def test_similarity_columns_are_empty_without_tables_and_between_seeds_of_one_encoder(study):
    stores, _ = study
    alone = matrix_table(MEMBERS[:2], stores._replace(similarity=None))
    assert alone[["cka", "mutual_knn"]].isna().all(axis=None)
    seeds = [GroupedMember("vit@0", "image", "vision"), GroupedMember("vit@7", "image", "vision")]
    assert matrix_table(seeds, stores)[["cka", "mutual_knn"]].isna().all(axis=None)


def test_refuses_correlations_and_similarities_of_other_features(study, write_features_from, rng):
    stores, _ = study
    shutil.rmtree(stores.features / "vit@0.zarr")
    other = {layer: rng.random((60, 6)) for layer in (1, 3)}
    write_features_from(stores.features.parent / "again", stores.features, "vit@0", other, "other samples")
    for table in (
        lambda: matrix_table(MEMBERS[:2], stores._replace(similarity=None)),
        lambda: layerwise_table([("bert@1", "vit@0")], stores),
        lambda: pair_table("bert@1", "vit@0", stores),
        lambda: sharedness_table("bert@1", ["vit@0"], ["clip-text@0"], stores),
    ):
        with pytest.raises(StoreError, match=r"zarr: made from other features of vit@0 .* correlations stage again"):
            table()
    with pytest.raises(StoreError, match=r"vit\.parquet: made from other activations .*run the similarity stage again"):
        stores.similar("bert@1", "vit@0")


def test_averages_come_from_the_same_correlations_as_the_matrix(study):
    stores, _ = study
    matrix = matrix_table(MEMBERS, stores)
    matrix.attrs["features"] = matrix.attrs["features"] | {"vit@0": "others"}
    with pytest.raises(StoreError, match="made from other features of vit@0"):
        averages_table(matrix, stores.correlations)


def test_names_a_missing_table_of_similarities(study):
    stores, _ = study
    (stores.similarity / "bert__vit.parquet").unlink()
    with pytest.raises(StoreError, match=r"bert__vit\.parquet: no such table; run the similarity stage"):
        matrix_table(MEMBERS, stores)


def test_a_matrix_is_compared_with_its_null(study):
    """The null is in the store; what tables make of it is computed here from its definition."""
    stores, features = study
    for (source, target, reading), row in cells_of(matrix_table(MEMBERS, stores)):
        null, error = (stored(stores, source, target, name) for name in ("null", "null_error"))
        assert (null.shape, error.shape) == ((REPAIRINGS, 2, 3), (2, 3))
        S = np.array([x.sum() for x in features[source].values()])
        F = np.array([x.shape[1] for x in features[source].values()])
        if reading == "last":
            nulls, expected_error = null[:, 1, 1], error[1, 1]
        else:
            shares = (S if reading == "pooled" else F) / (S if reading == "pooled" else F).sum()
            nulls, expected_error = null[:, :, 2] @ shares, np.sqrt((shares**2 * error[:, 2] ** 2).sum())
        assert row.null == pytest.approx(nulls.mean(), abs=1e-6)
        assert row.null_error == pytest.approx(expected_error, abs=1e-6)
        assert row.p == pytest.approx((1 + (nulls >= row.wmppc).sum()) / (1 + REPAIRINGS))
        assert row.excess == pytest.approx((row.wmppc - row.null) / (1 - row.null))
        if np.isnan(row.ceiling):
            assert np.isnan(row.relative)
        else:
            assert row.relative == pytest.approx((row.wmppc - row.null) / (row.ceiling - row.null))


def test_a_matrix_averages_the_companions_of_best_matches_by_strength(study):
    stores, features = study
    table = matrix_table(MEMBERS, stores)
    for (source, target, reading), row in cells_of(table):
        S = [x.sum(0) for x in features[source].values()]
        for name in ("iou", "one_to_one"):
            over_all, in_last = stored(stores, source, target, name)
            best = np.split(over_all, np.cumsum([len(s) for s in S])[:-1])
            expected = by_reading(best, in_last[-len(S[-1]) :], S)[reading]
            assert getattr(row, name) == pytest.approx(expected, abs=1e-6)
        assert 0 < row.one_to_one < row.wmppc + 1e-6
    assert table.iou.between(0.1, 1).all()


def test_a_matrix_has_the_documented_columns(study):
    assert list(matrix_table(MEMBERS, study[0]).columns) == [
        *("source", "target", "source_modality", "target_modality", "source_kind", "target_kind", "reading"),
        *("wmppc", "low", "high", "floor", "ceiling", "null", "null_error", "p", "excess", "relative"),
        *("cross_fitted", "cross_fitted_low", "cross_fitted_high"),
        *("mppc", "iou", "one_to_one", "features", "beyond_shuffled", "significant"),
        *("strength_cv", "strength_rho", "cka", "cka_null", "mutual_knn", "mutual_knn_null"),
        *("unexplained", "left_out", "code"),
    ]


def test_tables_count_layers_whose_sae_leaves_most_of_the_global_tokens_unexplained(tmp_path, write_features, rng):
    """The SAE of layer n has an FVU of 0.2 n at global tokens."""
    for member, layers in (("a@0", (1, 5, 6)), ("b@0", (4, 5)), ("c@0", (7, 4))):
        write_features(tmp_path, member, {n: rng.random((50, 4)) for n in sorted(layers)})
    stores = Stores(tmp_path, tmp_path)
    correlate(stores, ["a@0", "b@0", "c@0"])
    members = [GroupedMember(f"{name}@0", "image", "vision") for name in "abc"]
    matrix = matrix_table(members, stores)
    counts = {key: cell.unexplained for key, cell in cells_of(matrix)}
    assert {key: counts[key] for key in counts if key[0] == "a@0"} == {
        ("a@0", "b@0", "pooled"): 3,
        ("a@0", "b@0", "layer_mean"): 3,
        ("a@0", "b@0", "last"): 2,
        ("a@0", "c@0", "pooled"): 3,
        ("a@0", "c@0", "layer_mean"): 3,
        ("a@0", "c@0", "last"): 2,
    }
    assert averages_table(matrix, stores.correlations).unexplained.tolist() == [6, 6, 6]
    cells = layerwise_table([("a@0", "b@0")], stores)
    forth = cells[cells.source == "a@0"].pivot(index="source_layer", columns="target_layer", values="unexplained")
    assert forth.to_numpy().tolist() == [[0, 1], [1, 2], [1, 2]]
    ranking = sharedness_table("a@0", ["b@0"], ["c@0"], stores)
    assert set(ranking.unexplained) == {"a@0, b@0, c@0"}
    assert {table.attrs["max_fvu_global"] for table in (matrix, averages_table(matrix, tmp_path), cells, ranking)} == {
        0.9
    }
    other = stores._replace(max_fvu_global=1.1)
    assert set(sharedness_table("a@0", ["b@0"], ["c@0"], other).unexplained) == {"a@0, c@0"}
    matrix = matrix_table(members, other)
    assert matrix.attrs["max_fvu_global"] == 1.1
    assert {key: cell.unexplained for key, cell in cells_of(matrix)}["a@0", "b@0", "pooled"] == 1


# Layers from 5 on are unexplained: the SAE of layer n has an FVU of 0.2 n at global tokens.
PARTLY = {"a@0": (6, 1, 3), "a@1": (1, 2), "b@0": (2, 7, 4, 5), "c@0": (0, 6)}


@pytest.fixture(scope="module")
def partly(tmp_path_factory, write_features_from):
    """Stores of members with unexplained layers, correlated with and without them, and with the others alone."""
    folder, rng, found = tmp_path_factory.mktemp("partly"), np.random.default_rng(1), {}
    common, features = rng.lognormal(0, 1, (60, 4)), {}
    for member, layers in PARTLY.items():
        features[member] = {}
        for n in layers:
            x = rng.lognormal(0, 1, (60, 6)) * (rng.random((60, 6)) < 0.5)
            x[:, :4] = rng.uniform(0.2, 0.9) * common[:, rng.permutation(4)] + 0.6 * rng.random() * x[:, :4]
            features[member][n] = x.astype(np.float16).astype(np.float64)
        kept = {n: x for n, x in features[member].items() if n < 5}
        for name, of_layers in (("whole", features[member]), ("kept", kept)):
            write_features_from(folder / name / "made", folder / name / "features", member, of_layers)
    for name, (a, b) in product(("whole", "kept"), combinations(("a@0", "b@0", "c@0"), 2)):
        pairs = [pair for pair in product(PARTLY[a], PARTLY[b]) if name == "whole" or max(pair) < 5]
        rows = [(n, m, (10 * n + m) / 100, (n + 10 * m) / 100, 0.01, 0.02) for n, m in pairs]
        columns = ["source_layer", "target_layer", "cka", "mutual_knn", "cka_null", "mutual_knn_null"]
        table = pd.DataFrame(rows, columns=columns)
        table.attrs["activations"] = {member[0]: activations_of(folder / name, member) for member in (a, b)}
        (folder / name / "similarity").mkdir(exist_ok=True)
        write_table(table, folder / name / f"similarity/{a[0]}__{b[0]}.csv")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_store, "FLOOR_FEATURES", FLOOR_FEATURES)
        for name, of, setting in (
            ("mark", "whole", None),
            ("leave_out", "whole", 0.9),
            ("kept", "kept", None),
        ):
            found[name] = stores_in(folder / of)._replace(correlations=folder / f"correlations-{name}")
            correlate(found[name], PARTLY, setting)
    return found, features


PARTLY_MEMBERS = [
    GroupedMember("a@0", "image", "vision", ("a@1",)),
    GroupedMember("b@0", "text", "language"),
    GroupedMember("c@0", "text", "language"),
]
BY_CELL = ["source", "target", "reading"]


def test_layers_that_are_left_out_are_neither_source_nor_target(partly):
    """Against NumPy on the features; the null, which samples features, from all of them in the same orders."""
    stores, features = partly
    tables = {name: matrix_table(PARTLY_MEMBERS, stores[name]).set_index(BY_CELL) for name in ("mark", "leave_out")}
    found, marked = tables["leave_out"], tables["mark"]
    rng = np.random.default_rng(0)
    orders = [rng.permutation(60) for _ in range(REPAIRINGS)]
    for (source, target, reading), row in found.iterrows():
        if reading == "last":
            continue
        a, b = ({n: x for n, x in features[member].items() if n < 5} for member in (source, target))
        y = np.concatenate(list(b.values()), axis=1)
        S = [x.sum(0) for x in a.values()]
        assert row.left_out == len(PARTLY[source]) + len(PARTLY[target]) - len(a) - len(b)
        assert (row.unexplained, row.features) == (0, sum(len(s) for s in S))
        by_layer = [rho(x, y) for x in a.values()]
        wmppc = by_reading(by_layer, by_layer[-1], S)[reading]
        assert row.wmppc == pytest.approx(wmppc, abs=1e-5)
        by_layer = [rho(x[:, :FLOOR_FEATURES], np.roll(y, -30, axis=0)) for x in a.values()]
        floor = by_reading(by_layer, by_layer[-1], [s[:FLOOR_FEATURES] for s in S])[reading]
        assert row.floor == pytest.approx(floor, abs=1e-5)
        of_orders = [[rho(x[order], y) for x in a.values()] for order in orders]
        null = np.mean([by_reading(by_layer, by_layer[-1], S)[reading] for by_layer in of_orders])
        assert row.null == pytest.approx(null, abs=3e-3)
        assert row.excess == pytest.approx((wmppc - null) / (1 - null), abs=5e-3)
        other = marked.loc[source, target, reading]
        assert abs(other.excess - row.excess) > 0.01
        assert abs(other.floor - row.floor) > 1e-4


def test_leaving_layers_out_is_like_never_recording_them(partly):
    """For all columns over all layers; the last layers are compared as before."""
    stores, _ = partly
    tables = {name: matrix_table(PARTLY_MEMBERS, of).set_index(BY_CELL) for name, of in stores.items()}
    # The features that nulls are computed from are drawn layer by layer.
    drawn = ["null", "null_error", "p", "excess", "relative"]
    last = tables["leave_out"].index.get_level_values("reading") == "last"
    found, kept = (tables[name][~last].drop(columns=["left_out", *drawn]) for name in ("leave_out", "kept"))
    pd.testing.assert_frame_equal(found, kept, atol=1e-5)
    np.testing.assert_allclose(tables["leave_out"].null[~last], tables["kept"].null[~last], atol=0.01)
    pd.testing.assert_frame_equal(tables["leave_out"][last], tables["mark"][last])
    assert (tables["leave_out"].unexplained[last] > 0).any()
    compared = ["wmppc", "low", "ceiling", "floor", "cross_fitted", "cross_fitted_low", "iou", "one_to_one", "cka"]
    for column in compared:
        differ = abs(tables["mark"][column] - tables["leave_out"][column])[~last]
        assert (differ.dropna() > 1e-4).all(), column
    averages = [averages_table(matrix_table(PARTLY_MEMBERS, of), of.correlations) for of in stores.values()]
    assert [table.left_out.tolist() for table in averages] == [[0] * 9, [2, 2, 2] * 2 + [0] * 3, [0] * 9]
    columns = ["wmppc", "low", "high", "floor", "cross_fitted", "cross_fitted_low", "cross_fitted_high"]
    pd.testing.assert_frame_equal(averages[1][columns][:6], averages[2][columns][:6], atol=1e-5)


def test_features_of_layers_that_are_left_out_are_listed_and_not_tested(partly):
    stores, _ = partly
    found, marked, kept = (pair_table("a@0", "b@0", stores[name]) for name in ("leave_out", "mark", "kept"))
    assert found.left_out.tolist() == (found.layer >= 5).tolist()
    assert not marked.left_out.any()
    pd.testing.assert_frame_equal(found[~found.left_out].reset_index(drop=True), kept, atol=1e-5)
    out = found[found.left_out]
    assert out.log10_p.isna().all()
    assert not out[["beyond_shuffled", "significant"]].any(axis=None)
    assert (found.match_layer < 5).all()
    assert (marked.match_layer >= 5).any()


def test_seeds_leave_unexplained_layers_out_and_layerwise_tables_do_not(partly):
    stores, _ = partly
    members = PARTLY_MEMBERS[:1]
    found, marked, kept = (
        seeds_table(members, stores[name]).set_index("reading") for name in ("leave_out", "mark", "kept")
    )
    layers = ["pooled", "layer_mean"]
    np.testing.assert_allclose(found.wmppc[layers], kept.wmppc[layers], atol=1e-5)
    cells = matrix_table([members[0], GroupedMember("a@1", "image", "vision")], stores["leave_out"])
    np.testing.assert_allclose(found.null.sort_index(), cells.set_index("reading").null.sort_index(kind="stable"))
    assert (abs(found.wmppc[layers] - marked.wmppc[layers]) > 1e-3).any()
    pd.testing.assert_frame_equal(found.loc[["last"]], marked.loc[["last"]])
    cells = [layerwise_table([("a@0", "b@0")], stores[name]) for name in ("leave_out", "mark")]
    pd.testing.assert_frame_equal(*cells)


def test_refuses_to_leave_out_all_layers_of_a_member(tmp_path, write_features, rng):
    for member, layers in (("a@0", (1, 5)), ("b@0", (5, 6))):
        write_features(tmp_path, member, {n: rng.random((50, 4)) for n in layers})
    wanted = r"b@0\.zarr: the SAEs of all its layers .*; train better SAEs, raise max_fvu_global, remove the encoder"
    with pytest.raises(StoreError, match=wanted):
        correlate(Stores(tmp_path, tmp_path), ["a@0", "b@0"], 0.9)


def test_tables_have_the_code_of_their_features(tmp_path, write_features_from, rng):
    """SAEs with k = 1, so that each sample has one feature after TopK."""
    x = {member: rng.random((40, 6)) for member in ("a@0", "b@0")}
    for member, features in x.items():
        write_features_from(tmp_path / "made", tmp_path / "features", member, {0: features})
        made = tmp_path / "made" / member
        (tmp_path / "features+after_topk").mkdir(exist_ok=True)
        store = tmp_path / "features+after_topk" / f"{member}.zarr"
        record_features(made / f"{member[0]}.zarr", made, 0, store, code="after_topk")
    members = [GroupedMember(member, "image", "vision") for member in x]
    tables = {}
    for suffix, code in (("", "before_topk"), ("+after_topk", "after_topk")):
        stores = Stores(tmp_path / f"features{suffix}", tmp_path / f"correlations{suffix}")
        correlate(stores, x)
        tables[code] = matrix_table(members, stores)
        made = [tables[code], pair_table("a@0", "b@0", stores), layerwise_table([("a@0", "b@0")], stores)]
        made += [sharedness_table("a@0", ["b@0"], ["b@0"], stores), averages_table(tables[code], stores.correlations)]
        assert all((table["code"] == code).all() for table in made)
        assert tables[code].attrs["features"] == stores.digests(x)
    a, b = (np.where(f == f.max(1, keepdims=True), f, 0) for f in x.values())
    after = tables["after_topk"].set_index(["source", "reading"])
    assert after.wmppc["a@0", "last"] == pytest.approx(weighted(rho(a, b), a.sum(0)), abs=1e-3)
    match = np.corrcoef(a, b, rowvar=False)[:6, 6:].argmax(1)
    iou = ((a > 0) & (b[:, match] > 0)).sum(0) / ((a > 0) | (b[:, match] > 0)).sum(0)
    assert after.iou["a@0", "last"] == pytest.approx(weighted(iou, a.sum(0)), abs=1e-3)
    assert (tables["before_topk"].iou == 1).all()
    paths = tmp_path / "features" / "a@0.zarr", tmp_path / "features+after_topk" / "b@0.zarr"
    with pytest.raises(StoreError, match=r"a@0\.zarr has features before_topk, but .*b@0\.zarr after_topk; compare"):
        correlate_stores(*paths, tmp_path / "mixed.zarr")


def test_three_samples_give_no_significance(tmp_path, write_features, rng):
    for member in ("a@0", "b@0"):
        write_features(tmp_path, member, {0: rng.random((3, 4))})
    stores = Stores(tmp_path, tmp_path)
    correlate(stores, ["a@0", "b@0"])
    members = [GroupedMember(member, "image", "vision") for member in ("a@0", "b@0")]
    assert matrix_table(members, stores).significant.isna().all()
    pairs = pair_table("a@0", "b@0", stores)
    assert pairs.log10_p.isna().all()
    assert not pairs.significant.any()


def test_every_table_names_a_member_without_active_features(study, write_features):
    stores, _ = study
    write_features(stores.features, "silent@0", {n: np.zeros((60, 5)) for n in (1, 3)})
    silent = GroupedMember("silent@0", "text", "language")
    attempts = [
        lambda: matrix_table([*MEMBERS, silent], stores),
        lambda: matrix_table([MEMBERS[0]._replace(other_seeds=("silent@0",)), MEMBERS[1]], stores),
        lambda: layerwise_table([("vit@0", "silent@0")], stores),
        lambda: pair_table("silent@0", "vit@0", stores),
        lambda: sharedness_table("vit@0", ["clip-text@0"], ["silent@0"], stores),
        lambda: sharedness_table("silent@0", ["clip-text@0"], ["vit@0"], stores),
    ]
    for table in attempts:
        with pytest.raises(StoreError, match=r"silent@0\.zarr: no sample activates any of its features"):
            table()


def test_averages_are_the_means_over_the_cells_of_two_modalities(study):
    stores, _ = study
    matrix = matrix_table(MEMBERS, stores)
    table = averages_table(matrix, stores.correlations)
    assert list(table.columns) == [
        *("reading", "source_modality", "target_modality", "cells", "wmppc", "low", "high", "floor", "null", "excess"),
        *("cross_fitted", "cross_fitted_low", "cross_fitted_high"),
        *("unexplained", "left_out", "code"),
    ]
    directions = [("image", "text"), ("text", "image"), ("text", "text")]
    keys = [(reading, *direction) for reading in READINGS for direction in directions]
    assert list(table[["reading", "source_modality", "target_modality"]].itertuples(index=False, name=None)) == keys
    assert table.cells.tolist() == [2, 2, 2] * 3
    modality = {member: of for member, of, *_ in MEMBERS}
    for row in table.itertuples():
        cells = [
            cell
            for (source, target, reading), cell in cells_of(matrix)
            if (reading, modality[source], modality[target]) == (row.reading, row.source_modality, row.target_modality)
        ]
        assert row.wmppc == pytest.approx(np.mean([cell.wmppc for cell in cells]))
        for column in ("floor", "null", "excess", "cross_fitted"):
            assert getattr(row, column) == pytest.approx(np.mean([getattr(cell, column) for cell in cells]))
        for name, value, *ends in (
            ("influence", row.wmppc, row.low, row.high),
            ("cross_fitted_influence", row.cross_fitted, row.cross_fitted_low, row.cross_fitted_high),
        ):
            n = READINGS.index(row.reading)
            of_cells = [stored(stores, cell.source, cell.target, name)[n].astype(np.float64) for cell in cells]
            if name.startswith("cross_fitted"):
                of_cells = [psi * slope(cell.cross_fitted, psi) for cell, psi in zip(cells, of_cells, strict=True)]
            influence = np.mean(of_cells, axis=0)
            (expected,) = metrics.bootstrap_intervals([value], influence[None])
            assert ends == pytest.approx(list(expected), abs=1e-5)


def test_averages_exclude_untrained_encoders(study):
    stores, _ = study
    twin = MEMBERS[2]._replace(kind="untrained")
    with_twin = matrix_table([*MEMBERS[:2], twin], stores)
    assert set(with_twin.source) == {member.member for member in MEMBERS}
    expected = averages_table(matrix_table(MEMBERS[:2], stores), stores.correlations)
    pd.testing.assert_frame_equal(averages_table(with_twin, stores.correlations), expected)


def test_averages_exclude_two_seeds_of_one_encoder(study):
    stores = study[0]._replace(similarity=None)  # whose tables cover the activations of only one of them
    seeds = [GroupedMember("vit@0", "image", "vision"), GroupedMember("vit@7", "image", "vision")]
    three = averages_table(matrix_table([*seeds, MEMBERS[1]], stores), stores.correlations)
    assert set(three.source_modality + three.target_modality) == {"imagetext", "textimage"}
    two = averages_table(matrix_table(seeds, stores), stores.correlations)
    assert len(two) == 0
    assert list(two.columns) == list(three.columns)


def test_layerwise_table_has_both_directions_for_every_pair_of_layers(study):
    stores, features = study
    table = layerwise_table([("vit@0", "clip-text@0"), ("bert@1", "vit@0")], stores)
    assert len(table) == 2 * 2 * 4
    for row in table.itertuples():
        x, y = features[row.source][row.source_layer], features[row.target][row.target_layer]
        assert row.wmppc == pytest.approx(weighted(rho(x, y), x.sum(0)), abs=1e-5)
        assert row.mppc == pytest.approx(rho(x, y).mean(), abs=1e-5)
        place = [1, 3].index(row.source_layer), [1, 3].index(row.target_layer)
        nulls = stored(stores, row.source, row.target, "null")[:, *place]
        assert row.null == pytest.approx(nulls.mean(), abs=1e-6)
        assert row.p == pytest.approx((1 + (nulls >= row.wmppc).sum()) / (1 + REPAIRINGS))
        assert row.excess == pytest.approx((row.wmppc - row.null) / (1 - row.null))
        layers = stored(stores, row.source, row.target, "cross_fitted_layers")
        assert row.cross_fitted == pytest.approx(layers[place])
        floor = stored(stores, row.source, row.target, "floor")[[1, 3].index(row.target_layer)]
        floor = floor.reshape(2, FLOOR_FEATURES)[[1, 3].index(row.source_layer)]
        assert row.floor == pytest.approx(weighted(floor, x.sum(0)[:FLOOR_FEATURES]), abs=1e-6)
        first, second = sorted(as_member(member).encoder for member in (row.source, row.target))
        layers = (row.source_layer, row.target_layer)
        forward = row.source.startswith(first)
        step = [(1, 1), (1, 3), (3, 1), (3, 3)].index(layers if forward else layers[::-1])
        assert row.cka == pytest.approx(SIMILARITIES[f"{first}__{second}"] + step / 100)
        assert row.mutual_knn == pytest.approx(SIMILARITIES[f"{first}__{second}"] + step / 1000)
        assert (row.cka_null, row.mutual_knn_null) == pytest.approx((step / 10, 0.02))
    found = set(table[["source", "target"]].itertuples(index=False, name=None))
    assert found == {("vit@0", "clip-text@0"), ("clip-text@0", "vit@0"), ("bert@1", "vit@0"), ("vit@0", "bert@1")}


def test_layerwise_table_has_each_direction_once(study):
    stores, _ = study
    pairs = [("vit@0", "bert@1"), ("vit@0", "clip-text@0"), ("bert@1", "vit@0"), ("vit@0", "bert@1")]
    pd.testing.assert_frame_equal(layerwise_table(pairs, stores), layerwise_table(pairs[:2], stores))


def test_layerwise_table_of_two_seeds_of_one_encoder_has_no_similarity(study):
    table = layerwise_table([("vit@0", "vit@7")], study[0])
    assert table[["cka", "mutual_knn"]].isna().all(axis=None)
    assert table.wmppc.notna().all()


def test_pair_table_has_every_features_best_match_in_both_directions(study):
    stores, features = study
    table = pair_table("clip-text@0", "vit@0", stores)
    assert list(table.columns) == [
        *("source", "target", "layer", "feature", "strength", "density", "rho"),
        *("match_layer", "match_feature", "iou", "beyond_shuffled", "log10_p", "significant", "left_out"),
        "code",
    ]
    assert table.source.tolist() == ["clip-text@0"] * 16 + ["vit@0"] * 12
    for source, rows in table.groupby("source"):
        (target,) = set(rows.target)
        a, b = features[source], features[target]
        place = [(layer, feature) for layer, x in a.items() for feature in range(x.shape[1])]
        assert list(zip(rows.layer, rows.feature, strict=True)) == place
        x, y = (np.concatenate(list(of.values()), axis=1) for of in (a, b))
        varying = x.any(0)
        np.testing.assert_allclose(rows.strength, x.sum(0), rtol=1e-6)
        np.testing.assert_allclose(rows.density, (x > 0).mean(0))
        np.testing.assert_allclose(rows.rho, rho(x, y), atol=1e-5)
        for row in rows.itertuples():
            if (a[row.layer][:, row.feature] > 0).any():
                match = b[row.match_layer][:, row.match_feature]
                r = np.corrcoef(a[row.layer][:, row.feature], match)[0, 1]
                assert row.rho == pytest.approx(r, abs=1e-5)
                of_feature, of_match = a[row.layer][:, row.feature] > 0, match > 0
                assert row.iou == pytest.approx((of_feature & of_match).sum() / (of_feature | of_match).sum())
            else:
                assert (row.match_layer, row.match_feature, row.rho, row.iou) == (-1, -1, 0, 0)
        p = 1 - norm.cdf(np.arctanh(rho(x, y)[varying]) * np.sqrt(60 - 3)) ** y.any(0).sum()
        np.testing.assert_allclose(10 ** rows.log10_p[varying], p, rtol=1e-4, atol=1e-9)
        assert rows.log10_p[~varying].isna().all()
        assert rows.significant[varying].tolist() == (false_discovery_control(p) <= 0.05).tolist()
        assert not rows.significant[~varying].any()
        assert 0 < rows.significant.sum() < varying.sum()


def test_reads_one_direction_of_a_pair_table_by_its_source(study, tmp_path):
    table = pair_table("clip-text@0", "vit@0", study[0])
    write_table(table, tmp_path / "clip-text@0__vit@0.csv")
    for source, target in (("vit@0", "clip-text@0"), ("clip-text@0", "vit@0")):
        expected = table[table.source == source][["source", "target", "strength", "rho", "left_out"]]
        expected = expected.reset_index(drop=True)
        found = read_direction(tmp_path, source, target)
        pd.testing.assert_frame_equal(found, expected, check_dtype=False, check_categorical=False)


def test_sharedness_table_ranks_last_layer_features(study):
    stores, features = study
    table = sharedness_table("clip-text@0", ["bert@1"], ["vit@0"], stores)
    x = features["clip-text@0"][3]
    g, h, S = rho(x, features["bert@1"][3]), rho(x, features["vit@0"][3]), x.sum(0)
    delta = S * (g**2 - h**2)
    order = np.argsort(-delta, kind="stable")
    assert table["rank"].tolist() == list(range(1, 9))
    assert table.feature.tolist() == order.tolist()
    assert table.top.tolist() == [True] + [False] * 7
    assert (table.source == "clip-text@0").all()
    assert (table.layer == 3).all()
    assert (table.shared_with == "bert@1").all()
    assert (table.not_shared_with == "vit@0").all()
    expected = {"delta": delta, "strength": S, "density": (x > 0).mean(0), "rho_g": g, "rho_h": h}
    expected |= {"rho[bert@1]": g, "rho[vit@0]": h}
    for column, values in expected.items():
        np.testing.assert_allclose(table[column], values[order], rtol=1e-4, atol=1e-4, err_msg=column)


def test_calibrated_sharedness_measures_rho_from_the_null_of_each_feature(study):
    stores, features = study
    table = sharedness_table("clip-text@0", ["bert@1"], ["vit@0"], stores)
    x = features["clip-text@0"][3]
    excess = []
    for member in ("bert@1", "vit@0"):
        null = stored(stores, "clip-text@0", member, "null_features")
        excess.append(np.maximum(0, (rho(x, features[member][3]) - null) / (1 - null)))
    delta = x.sum(0) * (excess[0] ** 2 - excess[1] ** 2)
    for column, values in {"excess_g": excess[0], "excess_h": excess[1], "calibrated_delta": delta}.items():
        np.testing.assert_allclose(table[column], values[table.feature], rtol=1e-4, atol=1e-4, err_msg=column)
    calibrated = table.sort_values("calibrated_rank")
    assert calibrated.calibrated_rank.tolist() == list(range(1, 9))
    assert calibrated.feature.tolist() == np.argsort(-delta, kind="stable").tolist()
    assert calibrated.calibrated_top.tolist() == [True] + [False] * 7


def test_the_top_share_counts_resamples_of_samples_and_seeds(study):
    """With matches and nulls held fixed, from the features."""
    stores, features = study
    x, R = features["clip-text@0"][3], 200
    draws = [*metrics.resamples(60, R)]
    members = {"bert@1": ["bert@1"], "vit@0": ["vit@0", "vit@7"]}
    table = sharedness_table("clip-text@0", ["bert@1"], ["vit@0"], stores, members)
    seeds = np.random.default_rng(0)
    drawn = {member: seeds.integers(len(of), size=R) for member, of in members.items()}
    counts = np.zeros((2, x.shape[1]))
    for n, draw in enumerate(draws):
        rows = np.repeat(np.arange(60), draw)
        squares = []
        for member, of in members.items():
            seed = of[drawn[member][n]]
            y = features[seed][3]
            with np.errstate(invalid="ignore", divide="ignore"):
                r = np.nan_to_num(np.corrcoef(x, y, rowvar=False)[: x.shape[1], x.shape[1] :], nan=-np.inf)
                match = r.argmax(1)
                again = np.nan_to_num(
                    [np.corrcoef(f[rows], g[rows])[0, 1] for f, g in zip(x.T, y.T[match], strict=True)]
                )
            null = stored(stores, "clip-text@0", seed, "null_features")
            squares.append((again**2, np.maximum(0, (again - null) / (1 - null)) ** 2))
        for kind, delta in enumerate(x[rows].sum(0) * (g - h) for g, h in zip(*squares, strict=True)):
            counts[kind, delta.argmax()] += 1
    # Values in float16 may exchange the first two features in a few resamples.
    np.testing.assert_allclose(table.set_index("feature").top_share.sort_index(), counts[0] / R, atol=0.015)
    np.testing.assert_allclose(table.set_index("feature").calibrated_top_share.sort_index(), counts[1] / R, atol=0.015)
    alone = sharedness_table("clip-text@0", ["bert@1"], ["vit@0"], stores)
    assert (alone.top_share != table.top_share).any()
    assert {counts[kind].max() > 20 for kind in (0, 1)} == {True}


def test_calibrated_sharedness_does_not_count_the_width_of_a_group(tmp_path, write_features, rng):
    """Each of two encoders shares ten features; one has 2,000, of which all others are noise, the other 20."""
    N, shared, F = 100, 10, 200
    x, narrow, wide = (np.maximum(rng.standard_normal((N, width)), 0) for width in (F, 20, 2000))
    narrow[:, :shared] += 0.33 * x[:, :shared]
    wide[:, :shared] += 0.9 * x[:, -shared:]
    x[:, shared:-shared] *= 3
    for member, features in (("a@0", x), ("narrow@0", narrow), ("wide@0", wide)):
        write_features(tmp_path, member, {0: features})
    for other in ("narrow@0", "wide@0"):
        correlate_stores(tmp_path / "a@0.zarr", tmp_path / f"{other}.zarr", tmp_path / f"a@0__{other}.zarr")
    stores = Stores(tmp_path, tmp_path)
    # Of the features that the narrow encoder shares, most correlate more with noise of the wide one.
    planted = sharedness_table("a@0", ["narrow@0"], ["wide@0"], stores).query("feature < @shared")
    assert (planted.delta > 0).mean() <= 0.3
    assert (planted.calibrated_delta > 0).mean() >= 0.9
    # The wide encoder seems to share nearly all features, and strong ones of noise most.
    table = sharedness_table("a@0", ["wide@0"], ["narrow@0"], stores)
    assert (table.delta > 0).mean() > 0.9
    assert (table.calibrated_delta > 0).mean() < 0.5
    planted = table.query("feature >= @F - @shared")
    assert (planted["rank"] <= shared).sum() <= 4
    assert (planted.calibrated_rank <= shared).sum() >= 8


def test_sharedness_table_takes_the_minimum_over_g_and_the_maximum_over_h(study):
    stores, features = study
    x = features["vit@0"][3]
    r = {member: rho(x, features[member][3]) for member in ("bert@1", "clip-text@0")}
    both = sharedness_table("vit@0", ["bert@1", "clip-text@0"], ["bert@1"], stores).set_index("feature").sort_index()
    np.testing.assert_allclose(both.rho_g, np.minimum(*r.values()), atol=1e-5)
    both = sharedness_table("vit@0", ["bert@1"], ["bert@1", "clip-text@0"], stores).set_index("feature").sort_index()
    np.testing.assert_allclose(both.rho_h, np.maximum(*r.values()), atol=1e-5)


def test_ties_keep_their_order_and_one_percent_of_features_is_top(tmp_path, write_features, rng):
    x = np.zeros((10, 250))  # enough that an unstable sort would reorder them
    x[0, 17] = 5
    for member, features in (("a@0", x), ("b@0", x), ("c@0", rng.random((10, 3)))):
        write_features(tmp_path, member, {0: features})
    for other in ("b@0", "c@0"):
        correlate_stores(tmp_path / "a@0.zarr", tmp_path / f"{other}.zarr", tmp_path / f"a@0__{other}.zarr")
    table = sharedness_table("a@0", ["b@0"], ["c@0"], Stores(tmp_path, tmp_path))
    assert table.feature.tolist() == [17, *range(17), *range(18, 250)]
    assert table["rank"][table.top].tolist() == [1, 2]


def some_ranking(source, order, top, calibrated=None):
    """A ranking in this order of features, whose first ``top`` of the order ``calibrated`` are the calibrated top."""
    place = np.argsort(order if calibrated is None else calibrated)[order]
    at_top = {"top": np.arange(len(order)) < top, "calibrated_top": place < top}
    return pd.DataFrame({"source": source, "feature": order, **at_top})


def test_overlap_table_has_every_two_rankings_of_one_source(rng):
    orders = {name: [rng.permutation(40) for _ in range(2)] for name in "cab"}
    rankings = {name: some_ranking("vit@0", order, 9, calibrated) for name, (order, calibrated) in orders.items()}
    rankings["other"] = some_ranking("bert@0", orders["c"][0], 9)
    table = overlap_table(rankings)
    assert list(table.columns) == [
        *("source", "first", "second", "top", "overlap", "expected", "log10_p"),
        *("calibrated_overlap", "calibrated_log10_p"),
    ]
    assert list(zip(table["first"], table.second, strict=True)) == [("a", "b"), ("a", "c"), ("b", "c")]
    for row in table.itertuples():
        assert (row.source, row.top) == ("vit@0", 9)
        assert row.expected == pytest.approx(9 * 9 / 40)
        for n, (found, log10_p) in enumerate(
            [(row.overlap, row.log10_p), (row.calibrated_overlap, row.calibrated_log10_p)]
        ):
            a, b = (set(orders[name][n][:9]) for name in (row.first, row.second))
            assert found == len(a & b)
            # The chance that 9 of 40 include at least this many of 9 others.
            p = sum(comb(9, n) * comb(31, 9 - n) for n in range(len(a & b), 10)) / comb(40, 9)
            assert log10_p == pytest.approx(np.log10(p))
    assert (table.overlap != table.calibrated_overlap).any()


def test_identical_rankings_overlap_fully_without_underflow_of_the_chance():
    F, top = 8192, 81
    order = np.arange(F)
    (row,) = overlap_table({n: some_ranking("a@0", order, top) for n in "xy"}).itertuples()
    assert row.overlap == top
    assert row.log10_p == pytest.approx(-np.log10(float(comb(F, top))), rel=1e-6)


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output


def test_commands_without_similarities_warn_unless_there_are_none(study, tmp_path):
    stores, _ = study
    seeds = ["vit@0", "vit@7"]
    study_json = study_file(
        tmp_path / "study.json",
        [(*m[:3],) for m in (*MEMBERS, SECOND_SEED)],
        layerwise={"seeds": {"pairs": [seeds]}, "both": {"pairs": [seeds, ["bert@1", "vit@0"]]}},
        matrices={"all": None},
    )
    places = ["--study", study_json, "--features", stores.features, "--correlations", stores.correlations]
    warning = "warning: without --similarity, the columns of CKA and mutual nearest neighbours are empty"
    for table, name, warns in (("matrix", "all", True), ("layerwise", "both", True), ("layerwise", "seeds", False)):
        arguments = ["metrics", table, name, *places, "--out", tmp_path / f"{name}.csv"]
        assert (warning in CliRunner().invoke(app, [*map(str, arguments)]).stderr) is warns


def test_pairs_of_seeds_of_several_encoders_need_no_similarities(capsys):
    _warn_without(None, [("vit@0", "vit@7"), ("bert@0", "bert@1")])
    assert not capsys.readouterr().err


def test_commands_write_the_tables_and_figures_of_a_matrix(study, tmp_path):
    stores, _ = study
    places = ["--features", stores.features, "--correlations", stores.correlations]
    study_json = study_file(
        tmp_path / "study.json", [(*m[:3],) for m in (*MEMBERS, SECOND_SEED)], matrices={"all": None}
    )
    out = tmp_path / "study"
    matrix, averages = out / "all.csv", out / "all.averages.csv"
    run(
        "metrics",
        "matrix",
        "all",
        "--study",
        study_json,
        *places,
        "--similarity",
        stores.similarity,
        "--out",
        matrix,
    )
    expected = matrix_table(MEMBERS, stores)
    pd.testing.assert_frame_equal(pd.read_parquet(matrix.with_suffix(".parquet")), expected)
    tables = ["--table", matrix.with_suffix(".parquet")]
    run("metrics", "averages", *tables, "--correlations", stores.correlations, "--out", averages)
    pd.testing.assert_frame_equal(
        pd.read_parquet(averages.with_suffix(".parquet")),
        averages_table(expected, stores.correlations),
        check_dtype=False,
    )
    run("metrics", "formats", *tables, "--out", out / "all")
    assert {path.name for path in (out / "all").iterdir()} == {
        f"{stem}.{suffix}" for stem in (*READINGS, "averages") for suffix in ("csv", "md", "tex")
    }
    for a, b in (("bert@1", "clip-text@0"), ("bert@1", "vit@0"), ("clip-text@0", "vit@0")):
        run("metrics", "pair", a, b, *places, "--out", out / f"pairs/{a}__{b}.csv")
    pd.testing.assert_frame_equal(
        pd.read_parquet(out / "pairs/bert@1__vit@0.parquet"), pair_table("bert@1", "vit@0", stores)
    )
    run("figures", "averages", "--table", averages.with_suffix(".parquet"), "--out", out / "averages.png")
    for part in ("matrix", "intervals", "similarity"):
        run("figures", part, *tables, "--out", out / f"{part}.png")
    run("figures", "strength", *tables, "--pairs", out / "pairs", "--out", out / "strength.png")
    for part in ("averages", "matrix", "intervals", "similarity", "strength"):
        assert (out / f"{part}.png").stat().st_size > (out / f"{part}.pdf").stat().st_size / 100 > 0


def test_commands_compare_a_matrix_with_the_papers(study, tmp_path):
    table = matrix_table(MEMBERS, study[0])
    for member, name in (("vit@0", "vit-base@0"), ("clip-text@0", "clip-text-base@0"), ("bert@1", "bert-base@1")):
        table = table.replace(member, name)
    write_table(table, tmp_path / "all.csv")
    cells, agreement = tmp_path / "all.paper.csv", tmp_path / "all.paper-agreement.csv"
    study_of = ["--table", tmp_path / "all.parquet", "--dataset", "coco", "--size", "base"]
    run("metrics", "paper", *study_of, "--out", cells)
    run("metrics", "agreement", "--table", cells.with_suffix(".parquet"), "--out", agreement)
    expected = paper.compare(table, "coco", "base")
    pd.testing.assert_frame_equal(pd.read_parquet(cells.with_suffix(".parquet")), expected)
    assert set(expected.source) == set(expected.target) == {"vit", "clip-text", "bert"}
    assert set(expected.reading) == {"layer_mean", "last"}
    pd.testing.assert_frame_equal(pd.read_parquet(agreement.with_suffix(".parquet")), paper.agreement(expected))
    run("figures", "paper", "--table", cells.with_suffix(".parquet"), "--out", tmp_path / "all.paper.png")
    assert (tmp_path / "all.paper.png").stat().st_size > 0
    assert (tmp_path / "all.paper.pdf").stat().st_size > 0


def test_commands_compute_the_overlap_of_ranking_files(study, tmp_path):
    stores, _ = study
    rankings = {"text": (["bert@1"], ["vit@7"]), "image": (["vit@7"], ["bert@1"])}
    for name, groups in rankings.items():
        write_table(sharedness_table("vit@0", *groups, stores), tmp_path / f"{name}.csv")
    run("metrics", "overlaps", *(tmp_path / f"{name}.parquet" for name in rankings), "--out", tmp_path / "overlaps.csv")
    found = pd.read_parquet(tmp_path / "overlaps.parquet")
    tables = {name: sharedness_table("vit@0", *groups, stores) for name, groups in rankings.items()}
    pd.testing.assert_frame_equal(found, overlap_table(tables), check_dtype=False)
    assert found[["first", "second"]].to_numpy().tolist() == [["image", "text"]]


def test_a_matrix_of_two_seeds_of_one_encoder_omits_files_that_need_several_encoders(study, tmp_path):
    stores, _ = study
    seeds = [
        GroupedMember("vit@0", "image", "vision", ("vit@7",)),
        GroupedMember("vit@7", "image", "vision", ("vit@0",)),
    ]
    matrix = matrix_table(seeds, stores)
    np.testing.assert_allclose(matrix.ceiling, matrix.wmppc)
    write_table(matrix, tmp_path / "all.csv")
    averages = ["--table", tmp_path / "all.parquet", "--correlations", stores.correlations]
    run("metrics", "averages", *averages, "--out", tmp_path / "all.averages.csv")
    run("metrics", "formats", "--table", tmp_path / "all.parquet", "--out", tmp_path / "all")
    run("figures", "intervals", "--table", tmp_path / "all.parquet", "--out", tmp_path / "intervals.png")


@pytest.fixture
def saes(tmp_path, study):
    shutil.copytree(tmp_path / "stores" / "made" / "vit@0", tmp_path / "saes" / "vit")
    return tmp_path / "saes"


def test_sae_table(study, saes):
    stores, features = study
    table = sae_table([Member("vit", 0)], saes, stores)
    assert table.layer.tolist() == [1, 3]
    first, last = table.to_dict("records")
    silent = int((features["vit@0"][3] > 0).any(0).sum())
    assert last == {
        "encoder": "vit",
        "seed": 0,
        "layer": 3,
        "latents": 6,
        "steps": 30,
        "fvu_all": pytest.approx(0.3),
        "l0_all": 4.5,
        "dead_all": 0.25,
        "fvu_global": pytest.approx(0.6),
        "l0_global": 3.5,
        "dead_global": 0.75,
        "outlying": 0.125,
        "measured_on": "held-out samples",
        "unexplained": False,
        "silent_features": 6 - silent,
    }
    table = sae_table([Member("vit", 0)], saes, stores._replace(max_fvu_global=0.5))
    assert table.unexplained.tolist() == [False, True]
    assert table.attrs["max_fvu_global"] == 0.5
    assert last["silent_features"] >= 1
    assert first["steps"] == 10


def test_a_figure_of_saes_is_refused_the_table_of_other_saes_of_the_same_size(study, saes, tmp_path):
    write_table(sae_table([Member("vit", 0)], saes, study[0]), tmp_path / "saes.csv")
    path = tmp_path / "saes.parquet"
    check_saes(path, read_table(path, "saes"), saes)
    folder = saes / "vit" / "layer-03" / "seed-0"
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["global_tokens"]["fvu"] += 1e-4
    (folder / "metrics.json").write_text(json.dumps(metrics))
    seal(folder, {"spec": {"trained": "with another seed"}})
    with pytest.raises(StoreError, match=r"saes\.parquet: its row of vit@0, layer 3 is not of .*layer-03/seed-0; give"):
        run("figures", "saes", "--table", path, "--saes", saes, "--out", tmp_path / "drawn.png")
    assert not (tmp_path / "drawn.png").exists()


def test_refuses_an_sae_that_did_not_produce_the_features(study, saes):
    folder = saes / "vit" / "layer-03" / "seed-0"
    seal(folder, {"spec": {"trained": "again"}})
    with pytest.raises(StoreError, match=r"layer-03/seed-0: not the SAE that made the features of vit@0"):
        sae_table([Member("vit", 0)], saes, study[0])


@pytest.mark.parametrize("content", [None, "{"])
def test_names_missing_or_damaged_sae_metrics(study, saes, content):
    path = saes / "vit" / "layer-03" / "seed-0" / "metrics.json"
    path.unlink()
    if content:
        path.write_text(content)
    with pytest.raises(StoreError, match=r"layer-03/seed-0: metrics\.json .* run the sae stage again"):
        sae_table([Member("vit", 0)], saes, study[0])


def test_names_a_missing_pair(study):
    stores, _ = study
    shutil.rmtree(stores.correlations / "bert@1__vit@0.zarr")
    with pytest.raises(StoreError, match=r"bert@1__vit@0\.zarr: no correlations store"):
        stores.pair("vit@0", "bert@1")


def test_csv_and_parquet_hold_the_same_table(study, tmp_path):
    tables = {
        "matrix": matrix_table(MEMBERS, study[0]),
        "layerwise": layerwise_table([("vit@0", "bert@1")], study[0]),
        "sharedness": sharedness_table("vit@0", ["bert@1"], ["clip-text@0"], study[0]),
        "pair": pair_table("vit@0", "bert@1", study[0]),
    }
    tables["matrix"].loc[2, "wmppc"] = np.nan
    tables["sharedness"]["unexplained"] = "bert@1"
    for name, table in tables.items():
        write_table(table, tmp_path / "out" / f"{name}.csv")
        from_csv, from_parquet = (
            pd.read_csv(tmp_path / "out" / f"{name}.csv"),
            pd.read_parquet(tmp_path / "out" / f"{name}.parquet"),
        )
        pd.testing.assert_frame_equal(from_parquet, table)
        pd.testing.assert_frame_equal(from_csv, table, rtol=1e-5, atol=1e-9, check_dtype=False)
        assert list(from_csv.columns) == list(table.columns)
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir()) == [".csv"] * 4 + [".parquet"] * 4


def test_writing_again_gives_the_same_bytes(study, tmp_path):
    table = matrix_table(MEMBERS, study[0])
    written = []
    for name in ("one", "two"):
        write_table(table, tmp_path / name / "matrix.csv")
        written.append([(tmp_path / name / f"matrix.{kind}").read_bytes() for kind in ("csv", "parquet")])
    assert written[0] == written[1]


@pytest.mark.parametrize(("text", "encoder", "seed"), [("vit@0", "vit", 0), ("clip-vit.l-14@12", "clip-vit.l-14", 12)])
def test_parses_members(text, encoder, seed):
    assert as_member(text) == (encoder, seed)
    assert str(as_member(text)) == text


@pytest.fixture
def written(study, saes, tmp_path):
    """Every table that a command reads, and their folder."""
    stores, folder = study[0], tmp_path / "tables"
    matrix, groups = matrix_table(MEMBERS, stores), (["bert@1"], ["clip-text@0"])
    names = {"vit@0": "vit-base@0", "clip-text@0": "clip-text-base@0", "bert@1": "bert-base@1"}
    made = {
        "matrix": matrix,
        "averages": averages_table(matrix, stores.correlations),
        "layerwise": layerwise_table([("vit@0", "bert@1")], stores),
        "ranking": sharedness_table("vit@0", *groups, stores),
        "saes": sae_table([Member("vit", 0)], saes, stores),
        "paper": paper.compare(matrix.replace(names), "coco", "base"),
    }
    for name, table in made.items():
        write_table(table, folder / f"{name}.csv")
    members = [(*member[:3],) for member in MEMBERS]
    study_file(folder / "study.json", members, layerwise={"two": {"pairs": [["vit@0", "bert@1"]]}})
    return made, folder


COMMANDS = [
    "figures matrix --table matrix",
    "figures intervals --table matrix",
    "figures similarity --table matrix",
    "figures strength --table matrix --pairs .",
    "metrics formats --table matrix",
    "metrics averages --table matrix --correlations .",
    "metrics paper --table matrix --dataset coco --size base",
    "metrics agreement --table paper",
    "figures averages --table averages",
    "figures layerwise two --study study.json --table layerwise",
    "figures scatter --table ranking",
    "metrics overlaps ranking",
    "figures saes --table saes --saes .",
    "figures paper --table paper",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_table_of_the_wrong_kind_is_a_one_line_error_in_every_command(command, written, monkeypatch):
    made, folder = written
    monkeypatch.chdir(folder)
    _, _, *given = command.split()
    words = [*command.split()[:2], *(f"{word}.parquet" if word in made else word for word in given)]
    name = next(word for word in given if word in made)
    table, number = made[name], {"layerwise": "wmppc", "ranking": "delta", "saes": "fvu_all", "paper": "ours"}
    renamed = table.rename(columns={number.get(name, "wmppc"): "value"})
    out = {"figures": "out.png", "metrics": "out.csv"}[words[0]] if words[1] != "formats" else "out"
    for broken in (renamed, table[:0] if name != "averages" else renamed):
        write_table(broken, folder / f"{name}.csv")
        error = CliRunner().invoke(app, [*words, "--out", out]).exception
        assert isinstance(error, StoreError), error
        assert re.fullmatch(rf"{name}\.parquet: not a table of the kind .*; name another", str(error))
        assert not Path(out).exists()


def test_refuses_csv_and_names_the_parquet_file(written):
    with pytest.raises(StoreError, match=r"matrix\.csv: .*; name matrix\.parquet$"):
        read_table(written[1] / "matrix.csv", "matrix")


def test_refuses_rankings_of_two_studies(written, study, monkeypatch):
    made, folder = written
    monkeypatch.chdir(folder)
    other = made["ranking"].copy()
    other.attrs["features"] = other.attrs["features"] | {"vit@0": "other"}
    write_table(other, folder / "other.csv")
    error = CliRunner().invoke(app, ["metrics", "overlaps", "ranking.parquet", "other.parquet", "--out", "o.csv"])
    assert re.match(r"other\.parquet: ranks other features .* than ranking\.parquet;", str(error.exception))
    store = study[0].features / "vit@0.zarr"
    check_ranking(Path("ranking.parquet"), made["ranking"], store)
    with pytest.raises(StoreError, match=r"^other\.parquet: made from other features of vit@0 than the current ones;"):
        check_ranking(Path("other.parquet"), other, store)
