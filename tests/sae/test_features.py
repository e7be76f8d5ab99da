"""The recorded features and statistics, against NumPy over the same float16 activations."""

import json
import math
import shutil
from dataclasses import asdict
from itertools import product

import numpy as np
import pytest
import torch

from conceptshare.correlations import correlate_stores
from conceptshare.io.errors import NumericsError, StoreError
from conceptshare.io.layout import layer_name
from conceptshare.io.readers import read_correlations, read_statistics, unexplained_layers
from conceptshare.io.seals import seal
from conceptshare.io.store import open_store
from conceptshare.sae import SAE, JumpReLU, TopK, features, load_sae, save_sae
from conceptshare.sae.exchange import import_sae
from conceptshare.sae.features import read_features, record_features
from conceptshare.sae.folder import sae_of

# More rows and columns than are encoded at once or stored in a chunk.
SAMPLES, D, F = 1100, 6, 600


def write_sae(saes, layer, seed, W_enc, b_dec, activation=None, **spec):
    folder = saes / layer_name(layer) / f"seed-{seed}"
    folder.mkdir(parents=True)
    sae = SAE(*W_enc.shape, activation or TopK(2))
    with torch.no_grad():
        sae.W_enc_T.copy_(torch.from_numpy(W_enc.T))
        sae.W_dec.copy_(torch.from_numpy(W_enc.T))
        sae.b_dec.copy_(torch.from_numpy(b_dec))
    save_sae(sae, folder, "vit", f"layer {layer}", {"layer": layer, "seed": seed, **spec})


@pytest.fixture
def stage(tmp_path, write_activations, rng):
    """Two layers of activations and their SAEs, in multiples of 1/8 on which float32 arithmetic is exact."""
    tokens, weights = {}, {}
    for layer in (0, 2):
        x = rng.integers(-40, 40, (SAMPLES, 2, D)) / 8
        W_enc, b_dec = rng.integers(-8, 8, (D, F)) / 8, rng.integers(-8, 8, D) / 8
        W_enc[:, :10] = 0  # never active features
        W_enc[:, 10:20] = np.array([1, 0, 0, 0, 0, 0])[:, None]  # few distinct values, so many ties
        W_enc[:, 20:30] = np.array([1e-3] * D)[:, None] * np.arange(10)  # inexact
        x[:, 0, 1] = np.where(rng.random(SAMPLES) < 0.9, -50, x[:, 0, 1])
        W_enc[:, 30:40] = np.array([0, 1, 0, 0, 0, 0])[:, None]  # active on few samples
        tokens[layer], weights[layer] = x, (W_enc.astype(np.float32), b_dec.astype(np.float32))
        write_sae(tmp_path / "saes", layer, 7, *weights[layer])
    store = write_activations(tmp_path / "vit.zarr", {layer: list(x) for layer, x in tokens.items()})
    return store, tokens, weights


@pytest.fixture
def recorded(stage, tmp_path):
    store, tokens, weights = stage
    record_features(store, tmp_path / "saes", 7, tmp_path / "vit@7.zarr")
    return open_store(tmp_path / "vit@7.zarr", "features"), tokens, weights


def restored(group):
    """The stored values plus the offset, in float64."""
    return group["features"][:].astype(np.float64) + group["offset"][:].astype(np.float64)


def test_features_are_the_global_tokens_latents_after_relu_and_before_top_k(recorded):
    store, tokens, weights = recorded
    for layer in (0, 2):
        W_enc, b_dec = (w.astype(np.float64) for w in weights[layer])
        x = tokens[layer][:, 0].astype(np.float16).astype(np.float64)
        expected = np.maximum((x - b_dec) @ W_enc, 0)
        group = store[layer_name(layer)]
        assert (group["features"].dtype, group["offset"].dtype) == (np.float16, np.float32)
        plain = group["offset"][:] == 0
        plain[20:30] = False  # inexact
        assert plain[:20].all()
        assert plain.sum() < F - 10
        np.testing.assert_array_equal(group["features"][:][:, plain], expected[:, plain].astype(np.float16))
        rounding = 2**-11 * np.abs(expected - group["offset"][:].astype(np.float64)).max()
        np.testing.assert_allclose(restored(group), expected, rtol=1e-5, atol=rounding)
        assert (expected[:, 40:] > 0).sum(1).min() > 2  # more than k, the most that TopK would keep


def test_statistics_equal_those_of_the_stored_features(recorded):
    store, _, _ = recorded
    for layer in (0, 2):
        group = store[layer_name(layer)]
        f = restored(group)
        np.testing.assert_allclose(group["strength"][:], f.sum(0), rtol=1e-12)
        np.testing.assert_array_equal(group["density"][:], (f > 0).mean(0))
        np.testing.assert_allclose(group["deviation"][:], f.astype(np.float64).std(0), rtol=1e-9, atol=1e-12)
        assert (group["deviation"][:][(f == f[0]).all(0)] == 0).all()
        assert group["strength"].dtype == group["density"].dtype == np.float64
        assert (group["density"][:10] == 0).all()


def test_top_samples_are_the_strongest_with_ties_to_the_earlier(recorded):
    store, _, _ = recorded
    for layer in (0, 2):
        group = store[layer_name(layer)]
        f = restored(group)
        order = np.argsort(-f, axis=0, kind="stable")[:100]
        values = np.take_along_axis(f, order, axis=0)
        np.testing.assert_array_equal(group["top_values"][:], values.T)
        np.testing.assert_array_equal(group["top_samples"][:], np.where(values > 0, order, -1).T)
        assert group["top_samples"].dtype == np.int32
        # The example contains ties and inactive features.
        assert (np.diff(values[:, 10:20], axis=0) == 0).any()
        few = group["top_samples"][30:40]
        assert (few == -1).any()
        assert (few >= 0).any()
        assert few.max() >= 1024  # in the second block


def test_reads_statistics_by_layer(recorded, tmp_path):
    store, _, _ = recorded
    statistics = read_statistics(tmp_path / "vit@7.zarr")
    assert list(statistics) == [0, 2]
    for layer, found in statistics.items():
        for name in ("strength", "density", "top_samples"):
            np.testing.assert_array_equal(getattr(found, name), store[layer_name(layer)][name][:])


def test_the_spec_records_the_inputs_of_the_features(recorded, tmp_path):
    spec = recorded[0].attrs["spec"]
    assert {**spec, "encoder": None} == {
        "name": "vit",
        "encoder": None,
        "content_hash": "the same samples",
        "samples": SAMPLES,
        "layers": [0, 2],
        "seed": 7,
        "code": "before_topk",
        "weights": None,
        "made_from": {
            "activations": open_store(tmp_path / "vit.zarr", "activations").attrs["digest"],
            "saes": {str(layer): sae_of(tmp_path / "saes", layer, 7)[1]["digest"] for layer in (0, 2)},
        },
        "fvu_global": [None, None],  # these SAEs have no metrics
    }


def test_layers_whose_sae_is_above_a_bound_are_unexplained(tmp_path, write_features, rng):
    store = write_features(tmp_path, "a@0", {layer: rng.random((9, 3)) for layer in (1, 2, 5)})  # FVU of 0.2 per layer
    assert unexplained_layers(store, 0.9) == [False, False, True]
    assert unexplained_layers(store, 0.3) == [False, True, True]
    assert unexplained_layers(store, 1) == [False] * 3
    constant = tmp_path / "made/a@0/layer-05/seed-0"  # global tokens without variance
    metrics = json.loads((constant / "metrics.json").read_text())
    metrics["global_tokens"]["fvu"] = math.nan
    (constant / "metrics.json").write_text(json.dumps(metrics))
    seal(constant, {"spec": sae_of(constant.parents[1], 5, 0)[1]["spec"]})
    record_features(tmp_path / "made/a@0/a.zarr", constant.parents[1], 0, tmp_path / "again.zarr")
    assert unexplained_layers(tmp_path / "again.zarr", 0.3) == [False, True, False]


@pytest.fixture
def after_topk(tmp_path, write_activations, rng):
    """A store of features after TopK, and these by NumPy: sparse, nearly constant, never active."""
    k, N = 40, 1100  # an SAE's k latents are more than the active ones of some samples
    expected = {}
    for layer in (1, 4):
        x = rng.permuted(np.tile(np.arange(200) / 64, (N, 1)), axis=1)  # no ties
        x[x < rng.integers(120, 190, (N, 1)) / 64] = 0
        x[:, :3] = 20 + 0.1 * rng.standard_normal((N, 3))
        x[rng.random(N) < 0.2, 2] = 0
        x[:, 3] = 0
        expected[layer] = x.astype(np.float16)
    store = write_activations(tmp_path / "vit.zarr", {n: list(x[:, None]) for n, x in expected.items()})
    for layer in expected:
        write_sae(tmp_path / "saes", layer, 7, np.eye(200, dtype=np.float32), np.zeros(200, np.float32), TopK(k))
    record_features(store, tmp_path / "saes", 7, tmp_path / "vit@7.zarr", keep=False, code="after_topk")
    for x in expected.values():
        x[x < np.sort(x, axis=1)[:, [-k]]] = 0
    return tmp_path / "vit@7.zarr", expected


def test_features_after_topk_are_a_samples_k_largest_and_0(after_topk):
    path, expected = after_topk
    store = open_store(path, "features")
    assert store.attrs["spec"]["code"] == "after_topk"
    for layer, stored in read_features(path).items():
        group, f = store[layer_name(layer)], expected[layer]
        assert {name: (each.shape, each.dtype) for name, each in group.arrays() if name in {"values", "places"}} == {
            "values": ((SAMPLES, 40), np.float16),
            "places": ((SAMPLES, 40), np.int32),
        }
        assert "features" not in group
        found = stored[:]
        np.testing.assert_array_equal(found > 0, f > 0)
        np.testing.assert_allclose(found, f, rtol=2**-11, atol=2**-11)
        assert (group["offset"][:3] > 0).all()
        np.testing.assert_array_equal((group["places"][:] >= 0).sum(1), (f > 0).sum(1))
        assert len({*(f > 0).sum(1)}) > 1
        for block in product([slice(0, None), slice(3, 1030)], [slice(0, 7), slice(150, 260), slice(60, 61)]):
            np.testing.assert_array_equal(stored[block], found[block])


def test_statistics_after_topk_are_those_of_the_code(after_topk):
    path, expected = after_topk
    for layer, statistics in read_statistics(path).items():
        f = read_features(path)[layer][:].astype(np.float64)
        np.testing.assert_allclose(statistics.strength, f.sum(0), rtol=1e-6)
        np.testing.assert_array_equal(statistics.density, (expected[layer] > 0).mean(0))
        np.testing.assert_allclose(statistics.deviation, f.std(0), rtol=1e-4, atol=1e-12)
        order = np.argsort(-f, axis=0, kind="stable")[:100]
        values = np.take_along_axis(f, order, axis=0)
        np.testing.assert_array_equal(statistics.top_samples, np.where(values > 0, order, -1).T)


def test_features_that_reach_the_decoder_are_those_above_their_thresholds(tmp_path, write_activations, rng):
    """Without TopK, their number varies between samples, and may be 0."""
    x = rng.integers(-60, 60, (SAMPLES, 200)) / 8
    x[:5] = -1
    thresholds = rng.integers(-20, 60, 200) / 8  # some pre-activations equal their threshold
    activation = JumpReLU(torch.from_numpy(thresholds).float())
    store = write_activations(tmp_path / "vit.zarr", {0: list(x[:, None])})
    write_sae(tmp_path / "saes", 0, 7, np.eye(200, dtype=np.float32), np.zeros(200, np.float32), activation)
    record_features(store, tmp_path / "saes", 7, tmp_path / "vit@7.zarr", code="after_topk")
    expected = np.where(x > thresholds, x, 0).clip(min=0)
    most = (expected > 0).sum(1).max()
    assert most < (np.maximum(x, 0) > 0).sum(1).max()
    assert open_store(tmp_path / "vit@7.zarr", "features")["layer-00/places"].shape == (SAMPLES, most)
    np.testing.assert_array_equal(read_features(tmp_path / "vit@7.zarr")[0][:], expected)


@pytest.mark.parametrize("memory_bytes", [None, 2**20])
def test_features_after_topk_are_correlated_like_others(memory_bytes, after_topk, tmp_path):
    path, expected = after_topk
    correlate_stores(path, path, tmp_path / "pair.zarr", memory_bytes)
    pair, f = read_correlations(tmp_path / "pair.zarr", "vit@7"), read_features(path)
    everything = np.concatenate([f[layer][:].astype(np.float64) for layer in expected], axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        r = np.nan_to_num(np.corrcoef(everything[:, :200].T, everything[:, 200:].T)[:200, 200:], nan=-1)
    np.testing.assert_allclose(pair.best.rho_ab[1, :200], np.where(r.max(1) == -1, 0, r.max(1)), atol=1e-5)
    np.testing.assert_allclose(pair.best.rho_ba[0, 200:], np.where(r.max(0) == -1, 0, r.max(0)), atol=1e-5)
    assert pair.best.rho_ab.min() < 0.2  # the example has features that do not match
    assert pair.null.mean() < 0.3


def test_fewer_samples_than_top_samples(tmp_path, write_features):
    x = np.array([[0, 1, 2], [0, 3, 2], [0, 0, 2]])
    write_features(tmp_path, "vit@0", {0: x})
    group = open_store(tmp_path / "vit@0.zarr", "features")["layer-00"]
    assert group["top_samples"][:].tolist() == [[-1, -1, -1], [1, 0, -1], [0, 1, 2]]
    assert group["top_values"][:].tolist() == [[0, 0, 0], [3, 1, 0], [2, 2, 2]]


def nothing_written(tmp_path):
    return not [path for path in tmp_path.iterdir() if path.name.startswith("vit@")]


def test_names_a_missing_sae_and_writes_nothing(stage, tmp_path):
    with pytest.raises(StoreError, match=r"saes/layer-00/seed-8: no such folder; run the sae stage"):
        record_features(stage[0], tmp_path / "saes", 8, tmp_path / "vit@8.zarr")
    assert nothing_written(tmp_path)


def test_refuses_an_sae_of_another_width_and_writes_nothing(stage, tmp_path):
    for layer in (0, 2):
        write_sae(tmp_path / "saes", layer, 9, np.zeros((D + 1, F), np.float32), np.zeros(D + 1, np.float32))
    with pytest.raises(StoreError, match=r"layer-00/seed-9: an SAE for width 7, but the activations have 6"):
        record_features(stage[0], tmp_path / "saes", 9, tmp_path / "vit@9.zarr")
    assert nothing_written(tmp_path)


@pytest.mark.parametrize(
    ("one", "other"),
    [("layer-00/seed-7", "layer-02/seed-7"), ("layer-02/seed-7", "layer-02/seed-8")],
    ids=["layers", "seeds"],
)
def test_detects_swapped_saes(stage, tmp_path, one, other):
    store, _, weights = stage
    write_sae(tmp_path / "saes", 2, 8, weights[2][0] * 2, weights[2][1])
    for name, place in ((one, "aside"), (other, one), ("aside", other)):
        (tmp_path / "saes" / name).rename(tmp_path / "saes" / place)
    with pytest.raises(StoreError, match=rf"{one}: an SAE of (layer 2|seed 8), but one of .* run the sae stage again"):
        record_features(store, tmp_path / "saes", 7, tmp_path / "vit@7.zarr")
    assert nothing_written(tmp_path)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("weights", r"layer-02/seed-7: an SAE trained on other activations \(weights is 'others', not None\)"),
        ("settings", r"layer-02/seed-7: an SAE trained with other settings \(k is 3, not 2\)"),
    ],
)
def test_refuses_an_sae_of_other_activations_or_settings(stage, tmp_path, key, message):
    store, _, weights = stage
    spec = {"made_from": open_store(store, "activations").attrs["spec"] | {"weights": None}, "settings": {"k": 2}}
    shutil.rmtree(tmp_path / "saes")
    write_sae(tmp_path / "saes", 0, 7, *weights[0], **spec)
    other = {"weights": {"made_from": spec["made_from"] | {"weights": "others"}}, "settings": {"settings": {"k": 3}}}
    write_sae(tmp_path / "saes", 2, 7, *weights[2], **(spec | other[key]))
    with pytest.raises(StoreError, match=message):
        record_features(store, tmp_path / "saes", 7, tmp_path / "vit@7.zarr")


def test_accepts_an_imported_sae(stage, tmp_path):
    store, *_ = stage
    folder = tmp_path / "saes" / "layer-02" / "seed-7"
    (folder / "manifest.json").unlink()
    with pytest.raises(StoreError, match=r"seed-7: manifest\.json is missing; .* `conceptshare sae import`"):
        record_features(store, tmp_path / "saes", 7, tmp_path / "vit@7.zarr")
    folder.rename(tmp_path / "elsewhere")
    import_sae(tmp_path / "elsewhere", folder)
    record_features(store, tmp_path / "saes", 7, tmp_path / "vit@7.zarr")


def test_names_missing_activations(tmp_path):
    with pytest.raises(StoreError, match=r"vit\.zarr: no activations store"):
        record_features(tmp_path / "vit.zarr", tmp_path / "saes", 0, tmp_path / "vit@0.zarr")


def test_a_float16_overflow_names_layer_and_sample_and_writes_nothing(tmp_path, write_activations):
    x = np.zeros((1100, 1, 2))
    x[1050, 0] = 300
    store = write_activations(tmp_path / "vit.zarr", {4: list(x)})
    write_sae(tmp_path / "saes", 4, 0, np.full((2, 3), 200, np.float32), np.zeros(2, np.float32))
    with pytest.raises(NumericsError, match=r"vit@0, layer 4, sample 1050: 1\.2e\+05 is beyond float16's 65504"):
        record_features(store, tmp_path / "saes", 0, tmp_path / "vit@0.zarr")
    assert nothing_written(tmp_path)


def float32_features(sae, x):
    """Features as the stage computes them, before rounding."""
    with torch.no_grad():
        return sae.encode(torch.from_numpy(x.astype(np.float16).astype(np.float32))).numpy()


@pytest.fixture
def near_constant(tmp_path, write_activations, rng):
    """Layers that plain float16 would store poorly, and their features in float32."""
    D, F, N = 32, 48, 1500
    base, noise = rng.uniform(0.5, 2, D), rng.standard_normal((N, D))
    ordinary = base + noise
    rare = np.tile(base, (N, 1))
    rare[1234] = base + 3
    off = base + noise / 500
    off[::40] = -4
    few = np.tile(base, (N, 1))
    few[:, :3] += rng.integers(0, 3, (N, 3)) / 250  # 27 different tokens
    faint = np.tile(base, (N, 1))
    faint[:, 0] = noise[:, 0] / 1e4
    layers = dict(enumerate([ordinary, base + noise / 250, rare, off, few, faint]))
    features = {}
    for layer, x in layers.items():
        W_enc = (rng.standard_normal((D, F)) / 6 + 0.1).astype(np.float32)
        write_sae(tmp_path / "saes", layer, 0, W_enc, np.zeros(D, np.float32))
        features[layer] = float32_features(load_sae(tmp_path / "saes" / layer_name(layer) / "seed-0"), x)
    store = write_activations(tmp_path / "bert.zarr", {layer: list(x[:, None]) for layer, x in layers.items()})
    record_features(store, tmp_path / "saes", 0, tmp_path / "bert@0.zarr")
    return tmp_path / "bert@0.zarr", features


def test_correlations_of_nearly_constant_features_have_float32_precision(near_constant, tmp_path):
    path, features = near_constant
    deviations = {layer: f.astype(np.float64).std(axis=0) for layer, f in features.items()}
    errors = {}
    for layer, f in features.items():
        moved = f.astype(np.float64).mean(axis=0) / np.where((f > 0).all(axis=0), 2**24, 2**11)
        with np.errstate(divide="ignore"):
            errors[layer] = 2**-10 * np.hypot(1, moved / deviations[layer]) + 2**-25 / deviations[layer]
    correlate_stores(path, path, tmp_path / "found.zarr", full=list(product(features, features)))
    found = open_store(tmp_path / "found.zarr", "correlations")["full"]
    for a, b in product(features, features):
        varying = np.ix_(deviations[a] > 0, deviations[b] > 0)
        with np.errstate(invalid="ignore"):
            r = np.corrcoef(features[a].T, features[b].T, dtype=np.float64)
        expected = r[: len(deviations[a]), len(deviations[a]) :][varying]
        error = np.abs(found[f"{layer_name(a)}__{layer_name(b)}"][:][varying] - expected)
        assert (error <= (errors[a][:, None] + errors[b])[varying] + 1e-5).all()
        assert error.max() < 3e-4
    # With plain rounding, some would be off by more than 0.1.
    with np.errstate(invalid="ignore"):
        r = np.corrcoef(features[4].T, features[4].astype(np.float16).T, dtype=np.float64)
    assert np.nanmin(r[48:, :48].diagonal()) < 0.9


def test_stored_features_are_positive_exactly_where_activations_are(near_constant):
    path, features = near_constant
    statistics = read_statistics(path)
    for layer, stored in read_features(path).items():
        f = features[layer]
        np.testing.assert_array_equal(stored[:] > 0, f > 0)
        np.testing.assert_array_equal(statistics[layer].density, (f > 0).mean(0))
        assert (np.abs(stored[:] - f) <= 2**-10 * np.abs(f - stored.offset) + 2**-24 * (1 + f)).all()
        np.testing.assert_allclose(statistics[layer].strength, f.sum(0, dtype=np.float64), rtol=2**-11)
        np.testing.assert_allclose(stored[3:7, 5:9], stored[:][3:7, 5:9], rtol=0)
    assert ((features[3] == 0).any(0) & (read_features(path)[3].offset > 0)).any()


def test_a_constant_token_has_constant_features(tmp_path, write_activations, rng):
    # The last block has one sample, and a one-row product sums in another order.
    x = np.tile(rng.standard_normal(384), (1025, 1, 1))
    store = write_activations(tmp_path / "clip.zarr", {0: list(x)})
    write_sae(tmp_path / "saes", 0, 0, rng.standard_normal((384, 600)).astype(np.float32), np.zeros(384, np.float32))
    record_features(store, tmp_path / "saes", 0, tmp_path / "clip@0.zarr")
    assert (read_statistics(tmp_path / "clip@0.zarr")[0].deviation == 0).all()


@pytest.fixture
def not_kept(stage, tmp_path):
    """The feature stores of the same SAEs, with and without the features."""
    for name, keep in (("kept", True), ("not-kept", False)):
        (tmp_path / name).mkdir()
        record_features(stage[0], tmp_path / "saes", 7, tmp_path / name / "vit@7.zarr", keep)
    return tmp_path / "kept" / "vit@7.zarr", tmp_path / "not-kept" / "vit@7.zarr"


@pytest.mark.parametrize("slab_bytes", [2**30, SAMPLES * 2 * 70])
def test_features_that_were_not_kept_are_recomputed_to_the_byte(slab_bytes, not_kept, monkeypatch):
    monkeypatch.setattr(features, "SLAB_BYTES", slab_bytes)
    monkeypatch.setattr(features, "IN_MEMORY_BYTES", slab_bytes // 100)  # of tokens
    whole, without = (read_features(path) for path in not_kept)
    assert "features" in open_store(not_kept[0], "features")["layer-00"]
    assert "features" not in open_store(not_kept[1], "features")["layer-00"]
    blocks = [
        *product([slice(0, None), slice(1000, 1100), slice(3, 1030)], [slice(0, None), slice(550, None)]),
        *((slice(0, 1030), slice(start, start + 50)) for start in (0, 50, 100, 30, 560)),
    ]
    for layer, stored in whole.items():
        assert without[layer].shape == stored.shape == (SAMPLES, F)
        for block in blocks:
            np.testing.assert_array_equal(stored[block], without[layer][block])
    for name in ("offset", "strength", "density", "deviation", "top_samples", "top_values"):
        one, other = (open_store(path, "features")[f"layer-02/{name}"][:] for path in not_kept)
        np.testing.assert_array_equal(one, other)


def test_features_that_were_not_kept_have_the_same_correlations(not_kept, tmp_path):
    for path in not_kept:
        correlate_stores(path, path, path.with_name("pair.zarr"), 2**22)
    one, other = (asdict(read_correlations(path.with_name("pair.zarr"), "vit@7")) for path in not_kept)
    np.testing.assert_equal(one, other)


def test_features_that_were_not_kept_need_what_they_were_computed_from(not_kept, stage, write_activations, tmp_path):
    _, path = not_kept
    shutil.rmtree(tmp_path / "saes" / "layer-02")
    with pytest.raises(
        StoreError, match=r"vit@7\.zarr: its features were not kept, and cannot be .*layer-02.*keep_features"
    ):
        read_features(path)
    shutil.rmtree(stage[0])
    write_activations(stage[0], {layer: list(x + 1) for layer, x in stage[1].items()})
    with pytest.raises(StoreError, match=r"vit\.zarr has changed since\); run the features stage again"):
        read_features(path)
