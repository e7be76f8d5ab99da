"""The fit of samples against a direct computation, on exchanged samples, and the data set of the best."""

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from conceptshare.analysis import samples
from conceptshare.analysis.samples import fits
from conceptshare.cli import app
from conceptshare.config.catalog import DatasetSpec
from conceptshare.data.dataset import Data, make_dataset
from conceptshare.io.errors import NumericsError, StoreError
from tests.analysis.test_retrieval import related
from tests.helpers.models import WORDS
from tests.helpers.samples import write_rows

N = 60


def directly(a, b, given, scored):
    """Fits of some samples, with matches from others."""
    x, y = a[given], b[given]
    with np.errstate(invalid="ignore", divide="ignore"):
        r = np.nan_to_num(np.corrcoef(x, y, rowvar=False)[: a.shape[1], a.shape[1] :], nan=-1)
    pairs = {*enumerate(r.argmax(1)), *((i, j) for j, i in enumerate(r.argmax(0)))}
    i, j = np.array([pair for pair in pairs if r[pair] > 0]).T
    u, v = (
        r[i, j] ** 0.5 * (side[scored][:, c] - side[given][:, c].mean(0)) / side[given][:, c].std(0)
        for side, c in ((a, i), (b, j))
    )
    cosine = (u / np.linalg.norm(u, axis=1, keepdims=True)) @ (v / np.linalg.norm(v, axis=1, keepdims=True)).T
    own, others = np.diag(cosine), np.where(np.eye(len(cosine)) > 0, np.nan, cosine)
    z = [(own - np.nanmean(table, axis=1)) / np.nanstd(table, axis=1) for table in (others, others.T)]
    return (z[0] + z[1]) / 2


@pytest.mark.parametrize("values", [2**24, 100])
def test_fits_equal_a_direct_computation(rng, monkeypatch, values):
    monkeypatch.setattr(samples, "_VALUES", values)
    monkeypatch.setattr(samples, "FEATURE_ROWS", 1)
    a, b = related(rng, N + 1)
    halves = np.arange(N // 2), np.arange(N // 2, N + 1)
    expected = [directly(a, b, given, scored) for given, scored in (halves[::-1], halves)]
    np.testing.assert_allclose(fits([a], [b]), np.concatenate(expected), atol=1e-5)
    np.testing.assert_allclose(fits([a[:, :3], a[:, 3:]], [b[:, :5], b[:, 5:]]), np.concatenate(expected), atol=1e-5)


def test_samples_are_compared_with_some_of_the_others(rng, monkeypatch):
    a, b = related(rng, 400)
    whole = fits([a], [b])
    monkeypatch.setattr(samples, "FIT_SAMPLES", 50)
    assert np.corrcoef(whole, fits([a], [b]))[0, 1] > 0.9


def test_exchanged_samples_fit_worst(rng):
    a, b = related(rng, 1000)
    exchanged = rng.permutation(1000)[:200]
    b[exchanged] = b[np.roll(exchanged, 1)]
    worst = np.argsort(fits([a], [b]))[:200]
    assert np.isin(worst, exchanged).mean() > 0.8  # by chance, a fifth


def test_needs_samples_and_matches(rng):
    with pytest.raises(NumericsError, match="3 samples"):
        fits([np.ones((3, 2))], [np.ones((3, 2))])
    with pytest.raises(NumericsError, match="nothing to score by"):
        fits([np.ones((8, 2))], [rng.random((8, 2))])


@pytest.fixture
def scored(tmp_path, monkeypatch, rng, write_features):
    """The folder of a data set, and the table of its fits."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.parquet", N, WORDS)
    make_dataset(DatasetSpec(source="./rows.parquet"), tmp_path / "data")
    content_hash = Data(tmp_path / "data").content_hash
    a, b = related(rng, N)
    layers = {"vit": {3: a}, "bert": {2: b[:, :6], 5: b[:, 6:], 7: rng.random((N, 4))}}
    for (name, values), modality in zip(layers.items(), ("image", "text"), strict=True):
        write_features(tmp_path, f"{name}@0", values, content_hash, modality=modality)
    command = ["samples", "vit@0.zarr", "bert@0.zarr", "--data", "data", "--out", "fit.csv"]
    command += ["--text-layer", "2", "--text-layer", "5"]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    table = pd.read_csv("fit.csv", dtype={"id": str})
    assert table.fit.is_monotonic_increasing
    assert table.caption[0][:30] in done.output
    np.testing.assert_allclose(table.sort_values("row").fit, fits([a], [b]), atol=1e-4)
    return tmp_path / "data", table


def test_the_best_samples_are_a_data_set(scored, tmp_path):
    folder, table = scored
    command = ["filter", "fit.parquet", "--data", "data", "--keep", "0.8", "--out", "kept.parquet"]
    assert CliRunner().invoke(app, command, catch_exceptions=False).output == "kept.parquet: 48 samples\n"
    make_dataset(DatasetSpec(source="./kept.parquet", id="id"), tmp_path / "kept")
    with pytest.raises(NumericsError, match=r"keep = 0\.01 of 60 samples leaves fewer than the 2"):
        CliRunner().invoke(app, [*command[:5], "0.01", *command[6:]], catch_exceptions=False)
    before, after = Data(folder), Data(tmp_path / "kept")
    assert sorted(after.ids()) == sorted(table["id"][12:])
    place = {sample: row for row, sample in enumerate(before.ids())}
    for row, sample in enumerate(after.ids()):
        assert after.image_bytes(row) == before.image_bytes(place[sample])
        assert after.caption(row) == before.caption(place[sample])


def test_other_stores_and_layers_are_refused(scored):
    for stores, options, words in (
        (["bert@0.zarr", "vit@0.zarr"], [], "bert@0.zarr: its encoder reads text; name an image encoder, then a text"),
        (["vit@0.zarr", "bert@0.zarr"], ["--text-layer", "4"], "bert@0.zarr: no layer 4; it has 2, 5, 7"),
    ):
        command = ["samples", *stores, "--data", "data", "--out", "other.csv", *options]
        with pytest.raises(StoreError, match=words):
            CliRunner().invoke(app, command, catch_exceptions=False)


def test_other_data_are_refused(scored, tmp_path):
    write_rows(tmp_path / "others.parquet", N, WORDS[:3])
    make_dataset(DatasetSpec(source="./others.parquet", limit=N - 1), tmp_path / "others")
    for command in (
        ["samples", "vit@0.zarr", "bert@0.zarr", "--data", "others", "--out", "other.csv"],
        ["filter", "fit.parquet", "--data", "others", "--keep", "0.8", "--out", "kept.parquet"],
    ):
        with pytest.raises(StoreError, match=r"different samples|other samples than the data"):
            CliRunner().invoke(app, command, catch_exceptions=False)
