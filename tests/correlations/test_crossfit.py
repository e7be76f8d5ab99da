"""Cross-fitted wMPPC, against NumPy in float64."""

import numpy as np
import pytest

from conceptshare import metrics
from conceptshare.correlations import FeatureStore, correlate_stores, max_correlations
from conceptshare.correlations._crossfit import cross_fitted
from conceptshare.correlations._influence import Encoder
from conceptshare.io.readers import read_correlations

N = 301


@pytest.fixture
def features(rng):
    """Sparse features of two encoders that share some, with features that are constant on one half or on both."""
    common = np.maximum(rng.standard_normal((N, 12)) - 0.5, 0)

    def layer(width, shared):
        x = np.maximum(rng.standard_normal((N, width)) - 0.5, 0)
        x[:, shared] = common[:, shared] + rng.uniform(0.1, 1) * x[:, shared]
        return x.astype(np.float16)

    a = {0: layer(30, [2, 3]), 2: layer(20, [4, 5, 6, 7])}
    b = {1: layer(25, [2, 4, 9]), 2: layer(14, []), 5: layer(16, [3, 5, 6, 7])}
    a[0][:, 5], a[0][: N // 2, 6], a[2][N // 2 :, 7], b[5][N // 2 :, 3], b[2][:, 3] = 0, 0, 0, 0, 0
    a[2][:, 4] += 100  # its mean is subtracted before it is stored
    return a, b


@pytest.fixture
def stores(features, tmp_path, write_features):
    names = ("vit@0", "bert@1")
    return [write_features(tmp_path, name, layers) for name, layers in zip(names, features, strict=True)]


def correlation(x, y, weights):
    """``[F]`` correlations of columns with these sample weights; 0 if one is constant."""
    x, y = (z - weights @ z / weights.sum() for z in (x, y))
    with np.errstate(invalid="ignore", divide="ignore"):
        r = (weights @ (x * y)) / np.sqrt((weights @ x**2) * (weights @ y**2))
    constant = [(z[weights > 0] == z[weights > 0][0]).all(0) for z in (x, y)]
    return np.where(constant[0] | constant[1], 0, r)


def chosen(a, b, rows):
    """Which feature of ``b`` correlates most with each of ``a`` on these samples, and how much; -1 and 0 for none."""
    with np.errstate(invalid="ignore", divide="ignore"):
        r = np.corrcoef(a[rows], b[rows], rowvar=False)[: a.shape[1], a.shape[1] :]
    r[:, (b[rows] == b[rows][0]).all(0)] = -np.inf
    constant = (a[rows] == a[rows][0]).all(0)
    return np.where(constant, -1, r.argmax(1)), np.where(constant, 0, r.max(1))


class Expected:
    """The cross-fitted wMPPC from one encoder to another, with matches that are chosen once."""

    def __init__(self, a, b):
        self.a, self.b = ([x.astype(np.float64) for x in side.values()] for side in (a, b))
        first = np.arange(N) < N // 2
        self.halves = first, ~first
        self.chosen = [[[chosen(x, y, half) for y in self.b] for x in self.a] for half in self.halves]

    def __call__(self, weights):
        """``[L_A, L_B + 1]`` by layer and ``[3]`` by reading, with these sample weights."""
        return [geometric_mean(*both) for both in zip(*self.means(weights), strict=True)]

    def means(self, weights):
        """The same of matches that are measured on the other half, and on that which chose them."""
        for order in (self.chosen[::-1], self.chosen):
            parts = [self.measured(weights * half, matches) for half, matches in zip(self.halves, order, strict=True)]
            yield [np.mean(both, axis=0) for both in zip(*parts, strict=True)]

    def measured(self, weights, matches):
        """Values by layer and by reading for given matches."""
        S = [weights @ x for x in self.a]
        best, layers = [], []
        for x, of_layer, s in zip(self.a, matches, S, strict=True):
            rho = [
                np.where(match < 0, 0, correlation(x, y[:, match], weights))
                for y, (match, _) in zip(self.b, of_layer, strict=True)
            ]
            layer = np.argmax([value for _, value in of_layer], axis=0)
            best.append(np.take_along_axis(np.array(rho), layer[None], 0)[0])
            layers.append([(r * s).sum() / s.sum() for r in (*rho, best[-1])])
        pooled = np.average(np.concatenate(best), weights=np.concatenate(S))
        of_layers = np.average([values[-1] for values in layers], weights=[x.shape[1] for x in self.a])
        return np.array(layers), np.array([pooled, of_layers, layers[-1][-2]])


def geometric_mean(crossed, own):
    return np.sign(crossed) * np.sqrt(np.abs(crossed) * own)


@pytest.mark.parametrize("memory_bytes", [None, 200_000])
def test_is_the_geometric_mean_of_wmppc_measured_on_the_half_that_chose_matches_and_on_the_other(
    features, stores, memory_bytes
):
    a, b = (FeatureStore(path).encoder() for path in stores)
    directions = cross_fitted(a, b, memory_bytes, "float32", "cross-fit")
    for found, sides in zip(directions, (features, features[::-1]), strict=True):
        layers, readings = Expected(*sides)(np.ones(N))
        # One feature is rounded when its mean is subtracted. A square root at 0 is steep.
        np.testing.assert_allclose(found.layers * np.abs(found.layers), layers * np.abs(layers), rtol=0, atol=5e-5)
        np.testing.assert_allclose(found.readings, readings, rtol=0, atol=1e-4)


def test_influences_are_derivatives_by_a_samples_weight_and_count_the_choice_of_matches(features, stores, tmp_path):
    """By finite differences of C and W."""
    correlate_stores(*stores, tmp_path / "vit@0__bert@1.zarr")
    for source, sides in (("vit@0", features), ("bert@1", features[::-1])):
        found = read_correlations(tmp_path / "vit@0__bert@1.zarr", source).cross_fitted.influence
        np.testing.assert_allclose(found.sum(1), 0, atol=4e-3)
        expected, step = Expected(*sides), 1e-4

        def readings(weights, expected=expected):
            return np.array([readings for _, readings in expected.means(weights)])

        c, w = readings(np.ones(N))
        slopes = [(readings(1 + step * one) - [c, w]) / step * N for one in np.eye(N)]
        of_c, of_w = np.moveaxis(slopes, 0, -1)  # [3, N]
        fixed, choice = w[:, None] * of_c + c[:, None] * of_w, w[:, None] * of_c - c[:, None] * of_w
        factor = np.sqrt(1 + (choice**2).sum(1) / (fixed**2).sum(1))
        assert factor.max() > 1.05
        np.testing.assert_allclose(found, factor[:, None] * fixed, rtol=3e-3, atol=3e-3)


def crossed(x, y):
    """The cross-fitted wMPPC from features x to features y, with its interval, and the wMPPC."""
    a, b = (
        Encoder([z.astype(np.float32)], z.sum(0), z.mean(0), z.std(0), np.zeros(z.shape[1]), np.array([True]))
        for z in (x - x.min(), y - y.min())
    )
    found, _ = cross_fitted(a, b, None, "float32", "cross-fit")
    (ends,) = metrics.root_intervals(found.readings[:1], found.influence[:1])
    return found.readings[0], ends, metrics.wmppc(max_correlations(x, y).rho_ab[0], a.strength)


def test_is_the_correlation_of_planted_features_and_near_zero_for_re_paired_samples(rng):
    """The wMPPC of re-paired samples is far from 0."""
    samples, F, rho = 600, 40, 0.6
    x = rng.standard_normal((samples, F))
    y = rho * x + np.sqrt(1 - rho**2) * rng.standard_normal((samples, F))
    y = np.concatenate([y, rng.standard_normal((samples, 200))], axis=1)
    value, (low, high), _ = crossed(x, y)
    planted = np.mean([np.corrcoef(x[:, n], y[:, n])[0, 1] for n in range(F)])
    assert value == pytest.approx(planted, abs=0.002)
    assert 0.01 < high - low < 0.02
    value, (low, high), published = crossed(x, y[rng.permutation(samples)])
    assert published > 0.1
    assert abs(value) < 0.04
    assert low < 0 < high


@pytest.mark.parametrize("common", [0, 10])
def test_intervals_of_unrelated_features_cover_zero(rng, common):
    """Also if few directions make all features of an encoder, so that both halves choose the same matches by chance."""
    covered = 0
    for _ in range(50):
        x, y = (
            rng.standard_normal((300, common)) @ rng.standard_normal((common, F)) + rng.standard_normal((300, F))
            for F in (60, 120)
        )
        _, (low, high), _ = crossed(x, y)
        covered += low <= 0 <= high
    assert covered >= 45


def test_is_the_wmppc_of_infinitely_many_samples(rng):
    """For features that correlate a little with all others: from few samples, wMPPC is far above it."""
    mixed, noise = rng.standard_normal((60, 160)), np.repeat([4, 12], 80)
    hidden = rng.standard_normal((1600, 60))
    z = hidden @ mixed + noise * rng.standard_normal((1600, 160))
    covariance = mixed.T @ mixed
    deviation = np.sqrt(np.diag(covariance) + noise**2)
    truth = (covariance / np.outer(deviation, deviation))[:80, 80:].max(axis=1).mean()
    for samples in (400, 1600):
        _, (low, high), published = crossed(z[:samples, :80], z[:samples, 80:])
        assert low < truth < high, samples
        assert high - low < 0.027
        assert published > truth + (0.03 if samples == 400 else 0.005)


@pytest.mark.parametrize("samples", [39, 40])
def test_has_no_value_with_fewer_than_20_samples_in_a_half(samples, rng, tmp_path, write_features):
    a, b = (write_features(tmp_path, name, {0: rng.random((samples, 9))}) for name in ("a@0", "b@0"))
    correlate_stores(a, b, tmp_path / "a@0__b@0.zarr")
    found = read_correlations(tmp_path / "a@0__b@0.zarr", "b@0").cross_fitted
    assert np.isnan(found.readings).all() == np.isnan(found.layers).all() == (samples < 40)
    (ends,) = metrics.root_intervals(found.readings[:1], found.influence[:1])
    assert np.isnan(ends).all() == (samples < 40)
