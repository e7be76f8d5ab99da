"""The data files of one member, from tables and stores like those of the previous stages."""

import base64

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conceptshare.analysis.tables import write_table
from conceptshare.io.readers import FeatureStatistics
from conceptshare.io.seals import read_manifest, seal
from conceptshare.io.store import new_store, read_root, save_array
from conceptshare.pages import write_member
from conceptshare.pages._member import _fired
from tests.helpers.browser import read_data

FEATURES = 70  # two files of details
PLACE = "data/set/sae/mine@0"


def write_inputs(folder, samples, tops):
    """A member of one layer, whose features all have the same strongest samples, and its matches in another."""
    with new_store(folder / "mine@0.zarr", "features", {"layers": [3], "samples": 3, "fvu_global": [0.3]}) as store:
        group = store.create_group("layer-03")
        save_array(group, "strength", np.arange(FEATURES, dtype=float))
        save_array(group, "density", np.full(FEATURES, 0.25))
        save_array(group, "deviation", np.ones(FEATURES))
        save_array(group, "top_samples", np.zeros((FEATURES, 1), np.int32))
    (folder / "examples").mkdir()
    pq.write_table(pa.Table.from_pylist(samples), folder / "examples" / "samples.parquet")
    near = [{"quantile": 0.5, "samples": [1], "values": [0.5]}]
    rows = [
        {"feature": n, "top": tops, "near": near, "histogram": [2] + [0] * 19, "highest": 1.5} for n in range(FEATURES)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "examples" / "layer-03.parquet")
    names = [None if n % 2 else f"name {n}" for n in range(FEATURES)]
    table = {"layer": 3, "feature": range(FEATURES), "name": names, "score": np.nan, "auc": 0.75, "source": "command"}
    table["candidate"] = [f"candidate {n}" if n % 3 else None for n in range(FEATURES)]
    made_from = {"features": {"mine@0": read_root(folder / "mine@0.zarr", "features")["digest"]}}
    seal(folder / "examples", made_from)
    names = pd.DataFrame(table)
    names.attrs = made_from
    write_table(names, folder / "names.csv")
    table = {"source": "mine@0", "layer": 3, "feature": range(FEATURES), "rho": 0.123456}
    pairs = pd.DataFrame(table | {"match_layer": 1, "match_feature": range(FEATURES)})
    pairs.attrs = made_from
    write_table(pairs, folder / "pairs" / "mine@0__other@0.csv")


def write(folder):
    inputs = [folder / name for name in ("mine@0.zarr", "examples", "names.parquet", "pairs")]
    write_member(*inputs, ["other@0"], {}, PLACE, folder / "site" / PLACE)
    return folder / "site"


def test_writes_an_image_member(tmp_path):
    """Tables, details in files of 64, and separate maps of images with known positions."""
    box = [-0.5, 0.0, 1.5, 1.0]
    samples = [{"sample": 0, "box": box}, {"sample": 1, "box": None}]
    tops = [
        {"sample": 0, "value": 1.5, "fires": b"\x00\xff\x00\x00", "fires_highest": 2.0},
        {"sample": 1, "value": 0.5, "fires": b"\xff\x00\x00\x00", "fires_highest": 1.0},
    ]
    write_inputs(tmp_path, samples, tops)
    site = write(tmp_path)
    table = read_data(site, f"{PLACE}/layer-03")
    assert table["strength"] == list(range(FEATURES))
    assert table["score"] == [None] * FEATURES
    assert table["by_command"] is True
    assert table["fvu"] == 0.3
    assert table["name"][:4] == ["name 0", None, "name 2", None]
    assert table["candidate"][:4] == [None, "candidate 1", None, None]
    assert table["best"]["other@0"]["rho"] == [0.1235] * FEATURES
    assert read_data(site, f"{PLACE}/samples/000") == [[[FEATURES - 1 - n, 0] for n in range(FEATURES)], [], []]
    assert read_data(site, f"{PLACE}/samples") == [1] * FEATURES
    details = read_data(site, f"{PLACE}/layer-03/001")
    assert (details["first"], len(details["features"])) == (64, FEATURES - 64)
    one = details["features"][0]
    assert (one["name"], one["candidate"]) == ("name 64", None)
    other = details["features"][1]
    assert (other["name"], other["candidate"]) == (None, "candidate 65")
    assert one["top"] == [[0, 1.5], [1, 0.5]]
    assert one["bands"] == [{"at": 0.5, "samples": [[1, 0.5]]}]
    assert one["mapped"] is True
    assert "tokens" not in one
    maps = read_data(site, f"{PLACE}/layer-03/maps-001")
    assert maps["first"] == 64
    shown, unknown = maps["maps"][0]
    assert (shown["box"], shown["rows"], shown["columns"], shown["max"]) == (box, 2, 2, 2.0)
    assert base64.b64decode(shown["values"]) == b"\x00\xff\x00\x00"
    assert unknown is None


@pytest.mark.parametrize(("box", "fires"), [([0, 0, 1, 1], None), (None, b"\xff")], ids=["no grid", "no box"])
def test_images_without_known_positions_have_no_maps(tmp_path, box, fires):
    samples = pa.Table.from_pylist(
        [{"sample": 0, "box": box}], pa.schema({"sample": pa.int32(), "box": pa.list_(pa.float32(), 4)})
    )
    write_inputs(tmp_path, [], [{"sample": 0, "value": 1.5, "fires": fires, "fires_highest": 1.0}])
    pq.write_table(samples, tmp_path / "examples" / "samples.parquet")
    seal(tmp_path / "examples", read_manifest(tmp_path / "examples", "features", "", ""))
    site = write(tmp_path)
    assert not read_data(site, f"{PLACE}/layer-03/000")["features"][0]["mapped"]
    assert not list((site / PLACE / "layer-03").glob("maps-*"))


def test_writes_a_text_member(tmp_path):
    """The tokens of each caption with their values, and none for a caption without tokens."""
    samples = [{"sample": 0, "tokens": ["a", "cat"]}, {"sample": 1, "tokens": []}]
    tops = [
        {"sample": 0, "value": 1.5, "fires": b"\x00\xff", "fires_highest": 2.0},
        {"sample": 1, "value": 0.5, "fires": None, "fires_highest": None},
    ]
    write_inputs(tmp_path, samples, tops)
    site = write(tmp_path)
    one = read_data(site, f"{PLACE}/layer-03/000")["features"][0]
    assert one["tokens"] == [{"text": ["a", "cat"], "values": [0.0, 2.0]}, None]
    assert one["mapped"] is False


def test_a_samples_features_are_those_it_is_strongest_for(rng):
    strength = rng.permutation(40).astype(float)
    top = np.stack([rng.permutation(30)[:12] for _ in range(40)]).astype(np.int32)
    top[3] = -1
    top[4, 5:] = -1
    found = _fired(FeatureStatistics(strength, strength, strength, top), 31)
    for sample in range(31):
        places = [
            (int(np.flatnonzero(row == sample)[0]), -strength[n], n) for n, row in enumerate(top) if sample in row
        ]
        assert found[sample] == [(n, place) for place, _, n in sorted(places)]
