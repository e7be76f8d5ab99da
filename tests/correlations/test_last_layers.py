"""What Comparative Sharedness needs of last layers, against NumPy in float64."""

import numpy as np
import pytest

from conceptshare import metrics
from conceptshare.correlations import correlate_stores
from conceptshare.correlations._null import repaired_features
from conceptshare.io.readers import read_correlations, read_last_layer
from conceptshare.io.sizes import FEATURE_REPAIRINGS

N, R = 300, 200
RARE = slice(20, 40)


@pytest.fixture
def layers(rng):
    """Last layers of two encoders, of sparse features: some shared, some active on few samples or on none."""
    a, b = (np.maximum(rng.standard_normal((N, width)) - 0.5, 0) for width in (40, 25))
    b[:, 3:9] = a[:, 7:13] + 0.4 * b[:, 3:9]
    a[:, 2], b[:, 1], a[2:, RARE] = 0, 0, 0
    a[:2, RARE] = rng.uniform(0.5, 2, (2, 20))
    b[:, 0] += 50  # its mean is subtracted before it is stored
    return a.astype(np.float16).astype(np.float64), b.astype(np.float16).astype(np.float64)


@pytest.fixture
def pair(layers, tmp_path, write_features, rng):
    first = np.maximum(rng.standard_normal((N, 9)), 0)
    stores = [
        write_features(tmp_path, member, {0: first, 2: layer})
        for member, layer in zip(("vit@0", "bert@1"), layers, strict=True)
    ]
    correlate_stores(*stores, tmp_path / "pair.zarr")
    return tmp_path / "pair.zarr"


def correlations(x, y):
    """``[F_x, F_y]``; -inf for constant features."""
    with np.errstate(invalid="ignore", divide="ignore"):
        r = np.corrcoef(x, y, rowvar=False)[: x.shape[1], x.shape[1] :]
    r[(x == x[0]).all(0)] = -np.inf
    r[:, (y == y[0]).all(0)] = -np.inf
    return r


def test_the_null_of_a_feature_is_its_mean_best_correlation_for_re_paired_samples(layers, pair, rng):
    a, b = layers
    best = {"vit@0": [], "bert@1": []}
    for _ in range(200):
        r = correlations(a[rng.permutation(N)], b)
        best["vit@0"].append(r.max(1))
        best["bert@1"].append(r.max(0))
    for source, values in best.items():
        null, values = read_last_layer(pair, source).null, np.maximum(values, 0)
        assert null.dtype == np.float32
        error = np.std(values, axis=0) * (1 / FEATURE_REPAIRINGS + 1 / len(values)) ** 0.5
        assert (np.abs(null - np.mean(values, axis=0)) <= 4.5 * error + 1e-6).all()
    assert read_last_layer(pair, "vit@0").null[2] == 0
    # Orders differ: the best correlations of single ones vary far more than their mean.
    again, _ = repaired_features(a, a, None, "float32", "null")
    assert again.max() < 0.6


def test_resamples_recompute_correlations_with_the_same_matches_and_strengths(layers, pair):
    draws = [np.repeat(np.arange(N), draw) for draw in metrics.resamples(N, R)]
    for source, (x, y) in (("vit@0", layers), ("bert@1", layers[::-1])):
        found = read_last_layer(pair, source)
        assert found.resampled_rho.shape == found.resampled_strength.shape == (R, x.shape[1])
        r = correlations(x, y)
        constant, match = np.isinf(r).all(1), r.argmax(1)
        np.testing.assert_allclose(found.rho, np.where(constant, 0, r.max(1)), rtol=0, atol=1e-4)
        np.testing.assert_array_equal(found.rho, read_correlations(pair, source).best.rho_ab[-1, -x.shape[1] :])
        with np.errstate(invalid="ignore", divide="ignore"):
            strength = np.nan_to_num([x[rows].sum(0) / x.sum(0) for rows in draws])
        np.testing.assert_allclose(found.resampled_strength, strength, rtol=1e-3)
        for n in (0, 7, 199):
            again = np.maximum(correlations(x[draws[n]], y[draws[n]]), -2)
            expected = np.where(constant, 0, again[np.arange(len(match)), match])
            expected[expected == -2] = 0
            np.testing.assert_allclose(found.resampled_rho[n], expected, rtol=0, atol=1e-3)
    without = [n for n, rows in enumerate(draws) if not np.isin([0, 1], rows).any()]
    assert len(without) > 10
    assert (read_last_layer(pair, "vit@0").resampled_rho[without, RARE] == 0).all()
