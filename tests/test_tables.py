"""Tables from real stores, against wMPPC and Comparative Sharedness worked out from the features themselves."""

import json

import numpy as np
import pandas as pd
import pytest

from conceptshare.correlations import correlate_stores
from conceptshare.errors import StoreError
from conceptshare.study import pair_name
from conceptshare.tables import (
    GroupedMember,
    Stores,
    as_member,
    layerwise_table,
    matrix_table,
    sae_table,
    sharedness_table,
    write_table,
)

MEMBERS = [
    GroupedMember("vit@0", "image", "vision"),
    GroupedMember("clip-text@0", "text", "vlm"),
    GroupedMember("bert@1", "text", "language"),
]
WIDTHS = {"vit@0": 6, "clip-text@0": 8, "bert@1": 5}


@pytest.fixture
def study(tmp_path, write_features, rng):
    """Stores of three members with two layers each, every pair of them, and the features in them."""
    features = {}
    common = rng.lognormal(0, 1, (60, 4))
    for member, width in WIDTHS.items():
        features[member] = {}
        for layer in (1, 3):
            x = rng.lognormal(0, 1, (60, width)) * (rng.random((60, width)) < 0.5)
            x[:, :4] = 0.7 * common[:, rng.permutation(4)] + rng.random() * x[:, :4]
            x[:, -1] = 0  # never active
            features[member][layer] = x.astype(np.float16).astype(np.float64)
        write_features(tmp_path / "features", member, features[member])
    stores = Stores(tmp_path / "features", tmp_path / "correlations")
    names = list(WIDTHS)
    for i, a in enumerate(names):
        for b in names[:i]:
            pair = sorted([as_member(a), as_member(b)])
            paths = [tmp_path / "features" / f"{member}.zarr" for member in pair]
            correlate_stores(*paths, tmp_path / "correlations" / f"{pair_name(*pair)}.zarr")
    return stores, features


def rho(x, y):
    """Largest correlation of each feature of x with one of y; 0 for a constant one."""
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


def test_matrix_table_tells_the_group_of_source_and_target(study):
    table = matrix_table(MEMBERS, study[0])
    groups = {member: (modality, kind) for member, modality, kind in MEMBERS}
    for row in table.itertuples():
        assert (row.source_modality, row.source_kind) == groups[row.source]
        assert (row.target_modality, row.target_kind) == groups[row.target]


def test_layerwise_table_has_both_directions_of_every_pair_of_layers(study):
    stores, features = study
    table = layerwise_table([("vit@0", "clip-text@0"), ("bert@1", "vit@0")], stores)
    assert len(table) == 2 * 2 * 4
    for row in table.itertuples():
        x, y = features[row.source][row.source_layer], features[row.target][row.target_layer]
        assert row.wmppc == pytest.approx(weighted(rho(x, y), x.sum(0)), abs=1e-5)
        assert row.mppc == pytest.approx(rho(x, y).mean(), abs=1e-5)
    found = set(table[["source", "target"]].itertuples(index=False, name=None))
    assert found == {("vit@0", "clip-text@0"), ("clip-text@0", "vit@0"), ("bert@1", "vit@0"), ("vit@0", "bert@1")}


def test_sharedness_table_ranks_last_layer_features(study):
    stores, features = study
    table = sharedness_table("clip-text@0", ["bert@1"], ["vit@0"], stores)
    x = features["clip-text@0"][3]
    g, h, S = rho(x, features["bert@1"][3]), rho(x, features["vit@0"][3]), x.sum(0)
    delta = S * (g**2 - h**2)
    order = np.argsort(-delta, kind="stable")
    assert table["rank"].tolist() == list(range(1, 9))
    assert table.feature.tolist() == order.tolist()
    assert (table.source == "clip-text@0").all()
    assert (table.layer == 3).all()
    expected = {"delta": delta, "strength": S, "density": (x > 0).mean(0), "rho_g": g, "rho_h": h}
    expected |= {"rho[bert@1]": g, "rho[vit@0]": h}
    for column, values in expected.items():
        np.testing.assert_allclose(table[column], values[order], rtol=1e-4, atol=1e-4, err_msg=column)


def test_sharedness_table_takes_the_least_over_g_and_the_largest_over_h(study):
    stores, features = study
    x = features["vit@0"][3]
    r = {member: rho(x, features[member][3]) for member in ("bert@1", "clip-text@0")}
    both = sharedness_table("vit@0", ["bert@1", "clip-text@0"], ["bert@1"], stores).set_index("feature").sort_index()
    np.testing.assert_allclose(both.rho_g, np.minimum(*r.values()), atol=1e-5)
    both = sharedness_table("vit@0", ["bert@1"], ["bert@1", "clip-text@0"], stores).set_index("feature").sort_index()
    np.testing.assert_allclose(both.rho_h, np.maximum(*r.values()), atol=1e-5)


def test_features_that_tie_keep_their_order(tmp_path, write_features):
    x = np.zeros((10, 100))  # so many that an unstable sort would mix them
    x[0, 17] = 5
    for member, features in (("a@0", x), ("b@0", x), ("c@0", np.zeros((10, 3)))):
        write_features(tmp_path, member, {0: features})
    for other in ("b@0", "c@0"):
        correlate_stores(tmp_path / "a@0.zarr", tmp_path / f"{other}.zarr", tmp_path / f"a@0__{other}.zarr")
    table = sharedness_table("a@0", ["b@0"], ["c@0"], Stores(tmp_path, tmp_path))
    assert table.feature.tolist() == [17, *range(17), *range(18, 100)]


@pytest.fixture
def saes(tmp_path):
    for layer in (1, 3):
        folder = tmp_path / "saes" / "vit" / f"layer-{layer:02d}" / "seed-0"
        folder.mkdir(parents=True)
        metrics = {
            "steps": 10 * layer,
            "all_tokens": {"tokens": 9, "fvu": 0.1 * layer, "l0": 4.5, "dead": 0.25},
            "global_tokens": {"tokens": 3, "fvu": 0.2 * layer, "l0": 3.5, "dead": 0.75},
            "settings": {},
        }
        (folder / "metrics.json").write_text(json.dumps(metrics))
    return tmp_path / "saes"


def test_sae_table(study, saes):
    stores, features = study
    table = sae_table(["vit@0"], saes, stores)
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
        "silent_features": 6 - silent,
    }
    assert last["silent_features"] >= 1
    assert first["steps"] == 10


@pytest.mark.parametrize("content", [None, "{"])
def test_missing_or_damaged_metrics_of_an_sae_are_named(study, saes, content):
    path = saes / "vit" / "layer-03" / "seed-0" / "metrics.json"
    path.unlink()
    if content:
        path.write_text(content)
    with pytest.raises(StoreError, match=r"layer-03/seed-0: no readable metrics"):
        sae_table(["vit@0"], saes, study[0])


def test_a_missing_pair_is_named(study):
    stores, _ = study
    with pytest.raises(StoreError, match=r"absent@0__vit@0\.zarr: no correlations store"):
        stores.pair("vit@0", "absent@0")


def test_csv_and_parquet_hold_the_same_table(study, tmp_path):
    tables = {
        "matrix": matrix_table(MEMBERS, study[0]),
        "layerwise": layerwise_table([("vit@0", "bert@1")], study[0]),
        "sharedness": sharedness_table("vit@0", ["bert@1"], ["clip-text@0"], study[0]),
    }
    tables["matrix"].loc[2, "wmppc"] = np.nan
    for name, table in tables.items():
        write_table(table, tmp_path / "out" / f"{name}.csv")
        from_csv, from_parquet = (
            pd.read_csv(tmp_path / "out" / f"{name}.csv"),
            pd.read_parquet(tmp_path / "out" / f"{name}.parquet"),
        )
        pd.testing.assert_frame_equal(from_parquet, table)
        pd.testing.assert_frame_equal(from_csv, table, rtol=1e-5, atol=1e-9, check_dtype=False)
        assert list(from_csv.columns) == list(table.columns)
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir()) == [".csv"] * 3 + [".parquet"] * 3


def test_writing_again_gives_the_same_bytes(study, tmp_path):
    table = matrix_table(MEMBERS, study[0])
    written = []
    for name in ("one", "two"):
        write_table(table, tmp_path / name / "matrix.csv")
        written.append([(tmp_path / name / f"matrix.{kind}").read_bytes() for kind in ("csv", "parquet")])
    assert written[0] == written[1]


@pytest.mark.parametrize(("text", "encoder", "seed"), [("vit@0", "vit", 0), ("clip-vit.l-14@12", "clip-vit.l-14", 12)])
def test_members_are_read_from_their_names(text, encoder, seed):
    assert as_member(text) == (encoder, seed)
    assert str(as_member(text)) == text
