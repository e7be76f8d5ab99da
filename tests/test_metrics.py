"""The mathematics, against hand computation, independent loops and the paper's own tables."""

import csv
import math
from importlib.resources import files
from statistics import NormalDist

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import false_discovery_control

from conceptshare import metrics
from conceptshare.correlations._influence import influence_weights
from conceptshare.io.errors import NumericsError

correlation = st.floats(-1, 1, width=32)
weight = st.floats(0, 1000, width=32)
# Features as (rho, S), at least one of them active.
features = st.lists(st.tuples(correlation, weight), min_size=1, max_size=20).filter(lambda f: sum(w for _, w in f) > 0)


def test_mppc_is_the_mean():
    assert metrics.mppc([0.2, 0.4, 0.9]) == pytest.approx(0.5)


def test_wmppc_weights_features_by_strength():
    assert metrics.wmppc([0.2, 0.8], [1, 3]) == pytest.approx((0.2 + 3 * 0.8) / 4)


def test_wmppc_of_never_active_features_is_nan():
    assert math.isnan(metrics.wmppc([0.3, 0.4], [0, 0]))


def test_wmppc_keeps_float64_precision_over_many_float32_features():
    rho = np.full(1_000_000, 0.1, np.float32)
    assert metrics.wmppc(rho, np.ones(len(rho), np.float32)) == pytest.approx(float(np.float32(0.1)), abs=1e-12)


@given(features)
def test_wmppc_is_between_the_smallest_and_the_largest_rho(given_features):
    rho, S = zip(*given_features, strict=True)
    assert min(rho) - 1e-9 <= metrics.wmppc(rho, S) <= max(rho) + 1e-9


@given(features, st.integers(-20, 20))
def test_wmppc_ignores_the_scale_of_the_weights(given_features, exponent):
    rho, S = map(np.array, zip(*given_features, strict=True))
    assert metrics.wmppc(rho, S * 2.0**exponent) == pytest.approx(metrics.wmppc(rho, S), abs=1e-9)


@given(features, st.randoms(use_true_random=False))
def test_wmppc_ignores_feature_order_and_never_active_features(given_features, random):
    rho, S = zip(*given_features, strict=True)
    others = [*given_features, (1.0, 0.0), (-1.0, 0.0)]
    random.shuffle(others)
    assert metrics.wmppc(*zip(*others, strict=True)) == pytest.approx(metrics.wmppc(rho, S), abs=1e-9)


@given(st.lists(correlation, min_size=1, max_size=20))
def test_wmppc_with_equal_weights_is_mppc(rho):
    assert metrics.wmppc(rho, np.full(len(rho), 7.0)) == pytest.approx(metrics.mppc(rho), abs=1e-9)


@pytest.fixture
def two_layers(rng):
    """rho [3 layers of B, 4 + 2 features of A], and S, with one layer of A far stronger than the other."""
    rho = rng.uniform(-0.2, 1, (3, 6))
    return rho, np.array([1.0, 2, 3, 4, 500, 600]), [4, 2]


def test_pooled_wmppc_is_equation_6(two_layers):
    rho, S, _ = two_layers
    above = below = 0.0
    for i in range(6):
        best = max(rho[layer][i] for layer in range(3))
        above += S[i] * best
        below += S[i]
    assert metrics.wmppc_pooled(rho, S) == pytest.approx(above / below)


def test_layer_mean_wmppc_weights_layers_by_their_number_of_features(two_layers):
    rho, S, sizes = two_layers
    total, i = 0.0, 0
    for size in sizes:
        above = below = 0.0
        for _ in range(size):
            above += S[i] * max(rho[layer][i] for layer in range(3))
            below += S[i]
            i += 1
        total += size * above / below
    assert metrics.wmppc_layer_mean(rho, S, sizes) == pytest.approx(total / sum(sizes))


def test_the_two_readings_of_all_layers_differ(two_layers):
    rho, S, sizes = two_layers
    assert abs(metrics.wmppc_pooled(rho, S) - metrics.wmppc_layer_mean(rho, S, sizes)) > 0.01


def test_the_mean_over_layers_excludes_never_active_layers():
    rho, S = [[0.1, 0.3, 0.9, 0.9]], [1, 1, 0, 0]
    assert metrics.wmppc_layer_mean(rho, S, [2, 2]) == pytest.approx(0.2)
    assert math.isnan(metrics.wmppc_layer_mean(rho, np.zeros(4), [2, 2]))


def test_comparative_sharedness_of_one_model_per_side_is_equation_7():
    delta = metrics.comparative_sharedness([2.0, 3.0], [0.5, 0.1], [0.1, 0.4])
    assert delta == pytest.approx([2 * (0.25 - 0.01), 3 * (0.01 - 0.16)])


def test_comparative_sharedness_takes_the_minimum_over_g_and_the_maximum_over_h():
    g = [[0.9, 0.2], [0.5, 0.8]]
    h = [[0.1, 0.3], [0.4, 0.2], [0.0, 0.1]]
    delta = metrics.comparative_sharedness([1.0, 10.0], g, h)
    assert delta == pytest.approx([0.5**2 - 0.4**2, 10 * (0.2**2 - 0.3**2)])


def test_the_minimum_does_not_start_at_zero():
    """Without G, Delta is -S rho_H^2, which would rank the feature least shared by H first, even if G lacks it."""
    S, g, h = np.ones(2), np.array([[0.9, 0.1], [0.8, 0.1]]), np.array([0.3, 0.0])
    without_g = -S * h**2
    assert without_g.argmax() == 1
    assert metrics.comparative_sharedness(S, g, h).argmax() == 0


@given(st.lists(st.tuples(weight, correlation, correlation), min_size=1, max_size=10))
def test_swapping_single_g_and_h_flips_the_sign(rows):
    S, g, h = zip(*rows, strict=True)
    forth, back = metrics.comparative_sharedness(S, g, h), metrics.comparative_sharedness(S, h, g)
    assert forth == pytest.approx(-back)


@given(
    st.lists(st.lists(correlation, min_size=3, max_size=3), min_size=1, max_size=4),
    st.lists(st.lists(correlation, min_size=3, max_size=3), min_size=1, max_size=4),
)
def test_order_and_duplicates_within_a_group_do_not_matter(g, h):
    S = [1.0, 2.0, 3.0]
    expected = metrics.comparative_sharedness(S, g, h)
    assert metrics.comparative_sharedness(S, [*g[::-1], g[0]], [*h[::-1], h[0]]) == pytest.approx(expected)


def log10_upper_tail(z):
    """log10 of Q(z) for z > 3, independent of libraries: the normal density over a continued fraction."""
    fraction = z
    for n in range(200, 0, -1):
        fraction = z + n / fraction
    return (-z * z / 2 - math.log(math.sqrt(2 * math.pi) * fraction)) / math.log(10)


def test_significance_far_below_the_smallest_float():
    found = float(metrics.significance(0.3, samples=10_000, candidates=8192))
    z = math.atanh(0.3) * math.sqrt(9_997)
    assert found == pytest.approx(log10_upper_tail(z) + math.log10(8192), abs=1e-9)
    assert round(found) == -206  # "about 1e-206"
    # Here the tail of a single candidate, 1e-55,600, is also far below the smallest float.
    found = float(metrics.significance(0.9, samples=118_287, candidates=8192))
    z = math.atanh(0.9) * math.sqrt(118_284)
    assert found == pytest.approx(log10_upper_tail(z) + math.log10(8192), rel=1e-12)


@pytest.mark.parametrize("samples", [10, 200])
@pytest.mark.parametrize("candidates", [1, 8, 500])
def test_significance_equals_the_formula_within_float_range(samples, candidates):
    rho = np.tanh(np.linspace(-2, 3.5, 23) / math.sqrt(samples - 3))
    direct = [1 - NormalDist().cdf(math.atanh(x) * math.sqrt(samples - 3)) ** candidates for x in rho]
    assert 10 ** metrics.significance(rho, samples, candidates) == pytest.approx(direct, rel=1e-9)


@pytest.mark.parametrize(("samples", "candidates"), [(5, 1), (100, 8192), (118_287, 196_608)])
def test_significance_decreases_smoothly_with_rho(samples, candidates):
    rho = np.concatenate([np.linspace(-1 + 1e-12, 1, 20_001), np.linspace(0.0, 0.05, 20_001)])
    rho.sort()
    found = metrics.significance(rho, samples, candidates)
    assert not np.isnan(found).any()
    assert (found <= 0).all()
    assert (np.diff(found[np.isfinite(found)]) <= 1e-9).all()
    assert found[-1] == -np.inf


def test_significance_is_continuous_where_the_computation_changes():
    z = np.linspace(5.9, 8.5, 400)
    rho = np.tanh(z / math.sqrt(997))
    expected = [log10_upper_tail(x) + math.log10(1000) for x in z]
    assert metrics.significance(rho, samples=1000, candidates=1000) == pytest.approx(expected, abs=1e-6)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("samples", [4, 50, 10_000, 118_287])
@pytest.mark.parametrize("candidates", [1, 40, 8192, 196_608])
def test_significance_equals_the_formula_in_fifty_digits(samples, candidates):
    rho = np.array([-1, -0.9, -0.02, 0, 1e-9, 0.004, 0.01, 0.02, 0.03, 0.1, 0.3, 0.7, 0.99, 1 - 1e-12])
    with mpmath.workdps(50):
        expected = []
        for x in rho:
            upper = mpmath.erfc(mpmath.atanh(mpmath.mpf(x)) * mpmath.sqrt(samples - 3) / mpmath.sqrt(2)) / 2
            none_larger = mpmath.exp(candidates * mpmath.log1p(-upper)) if upper < 1 else mpmath.mpf(0)
            # 1 - (1 - Q)^N loses all of its fifty digits for the smallest values, where it equals N Q.
            chance = candidates * upper if upper * candidates < mpmath.mpf(10) ** -30 else 1 - none_larger
            expected.append(float(mpmath.log10(chance)))
    assert metrics.significance(rho, samples, candidates) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.filterwarnings("error")
def test_a_perfect_correlation_has_chance_zero_and_none_has_chance_one():
    assert metrics.significance(1.0, 10_000, 8192) == -np.inf
    assert metrics.significance([0.0, -0.5, -1.0], 10_000, 8192) == pytest.approx([0, 0, 0], abs=1e-12)


@pytest.mark.parametrize("samples", [3, 0])
def test_significance_refuses_too_few_samples(samples):
    with pytest.raises(NumericsError, match=f"{samples} samples: .* at least 4"):
        metrics.significance([0.1], samples, candidates=5)


def test_significance_refuses_zero_candidates():
    with pytest.raises(NumericsError, match="0 candidates"):
        metrics.significance([0.1], samples=100, candidates=0)


@pytest.mark.parametrize("level", [0.001, 0.05, 0.5])
def test_benjamini_hochberg_agrees_with_scipy(level, rng):
    rejected = 0
    for _ in range(200):
        p = rng.uniform(size=rng.integers(1, 60)) ** rng.integers(1, 9)
        p = np.where(rng.uniform(size=len(p)) < 0.3, p.round(2).clip(1e-12), p)  # some are equal, some are 1
        found = metrics.benjamini_hochberg(np.log10(p), level)
        assert found.tolist() == (false_discovery_control(p) <= level).tolist()
        rejected += found.sum()
    assert rejected > 100


def test_benjamini_hochberg_rejects_up_to_the_last_value_below_its_bound():
    """Only the last value is below its bound (0.0125, 0.025, 0.0375, 0.05), so all four are rejected."""
    assert metrics.benjamini_hochberg(np.log10([0.049, 0.03, 0.04, 0.045])).all()
    assert not metrics.benjamini_hochberg(np.log10([0.051, 0.03, 0.04, 0.045])).any()


def test_benjamini_hochberg_accepts_chances_below_float_range():
    found = metrics.benjamini_hochberg([-400.0, -np.inf, -55_600.0, math.log10(0.6), 0.0, 0.0])
    assert found.tolist() == [True, True, True, False, False, False]
    assert metrics.benjamini_hochberg([-400.0, 0.0], level=1e-300).tolist() == [True, False]
    assert metrics.benjamini_hochberg([-290.0, 0.0], level=1e-300).tolist() == [False, False]


def test_benjamini_hochberg_treats_ties_alike_and_never_rejects_one():
    assert metrics.benjamini_hochberg(np.log10([0.02, 0.9, 0.02, 0.02, 1])).tolist() == [True, False, True, True, False]
    assert not metrics.benjamini_hochberg(np.zeros(4)).any()
    assert not metrics.benjamini_hochberg([]).any()


@pytest.mark.filterwarnings("error")
def test_benjamini_hochberg_does_not_count_nan_as_a_test():
    assert metrics.benjamini_hochberg([math.nan, math.log10(0.04), math.nan]).tolist() == [False, True, False]
    assert not metrics.benjamini_hochberg([math.nan]).any()


def beyond_by_hand(rho, shuffled, level):
    """The definition, with a threshold between all adjacent values and below all of them."""
    values = np.unique(np.concatenate([rho, shuffled]))
    gaps = [values[0] - 1, *((values[:-1] + values[1:]) / 2)]
    for t in gaps:
        found = rho > t
        if found.any() and (1 + (shuffled > t).sum()) * (len(rho) / len(shuffled)) / found.sum() <= level:
            return found
    return np.zeros(len(rho), bool)


@pytest.mark.parametrize("digits", [1, 2, 12])
def test_beyond_shuffled_follows_its_definition(digits, rng):
    found = 0
    for _ in range(200):
        rho = np.concatenate([rng.normal(0.1, 0.05, 60), rng.normal(0.4, 0.1, 80)]).round(digits)
        shuffled = rng.normal(0.1, 0.05, rng.integers(20, 140)).round(digits)
        level = rng.choice([0.05, 0.2, 0.5])
        expected = beyond_by_hand(rho, shuffled, level)
        assert metrics.beyond_shuffled(rho, shuffled, level).tolist() == expected.tolist()
        found += expected.any()
    assert found > 20


def test_almost_no_chance_correlations_are_beyond_shuffled(rng):
    F = 2000
    found = [metrics.beyond_shuffled(rng.gumbel(size=F), rng.gumbel(size=F)).sum() for _ in range(200)]
    assert np.mean(np.array(found) > 0) < 0.1
    assert np.mean(found) < 0.005 * F


def test_beyond_shuffled_finds_planted_correlations_and_controls_the_false_discovery_rate(rng):
    chance, planted, level = 1500, 500, 0.1
    found, false_share = [], []
    for _ in range(200):
        rho = np.concatenate([rng.normal(0, 1, chance), rng.normal(4, 1, planted)])
        beyond = metrics.beyond_shuffled(rho, rng.normal(0, 1, 1000), level)
        found.append(beyond[chance:].mean())
        false_share.append(beyond[:chance].sum() / max(1, beyond.sum()))
    assert np.mean(found) > 0.9
    # 1,500 of 2,000 features are unrelated, so the actual level is slightly below the nominal one.
    assert 0.5 * level < np.mean(false_share) < level


def test_beyond_shuffled_finds_nothing_without_shuffled_values():
    assert not metrics.beyond_shuffled([0.9, 0.8], []).any()
    assert metrics.beyond_shuffled([], [0.1]).shape == (0,)


def test_coefficient_of_variation_is_the_deviation_over_the_mean():
    assert metrics.coefficient_of_variation([1, 3]) == pytest.approx(0.5)
    assert metrics.coefficient_of_variation(np.float32([7, 7, 7])) == 0
    assert math.isnan(metrics.coefficient_of_variation([0, 0]))


def test_correlation_is_pearsons(rng):
    x, y = rng.standard_normal((2, 50))
    assert metrics.correlation(x, x + 2 * y) == pytest.approx(np.corrcoef(x, x + 2 * y)[0, 1])
    assert metrics.correlation(x, -3 * x + 1e3) == pytest.approx(-1)
    assert metrics.correlation(x * 1e-200, y * 1e200) == pytest.approx(np.corrcoef(x, y)[0, 1])


@pytest.mark.filterwarnings("error")
def test_constants_have_no_correlation():
    # The mean of three times 0.1 is not 0.1 in floats.
    assert math.isnan(metrics.correlation([0.1, 0.1, 0.1], [1, 2, 4]))
    assert math.isnan(metrics.correlation([1, 2, 4], [0.1, 0.1, 0.1]))
    assert math.isnan(metrics.correlation([1.0], [2.0]))


def standardised(x):
    """Columns of mean 0 and population variance 1; zeros for constant columns."""
    deviation = x.std(0)
    return (x - x.mean(0)) / np.where(deviation > 0, deviation, np.inf)


class Matched:
    """Features of layers of 12, 7 and 5 with their best matches, and separate matches for the last layer."""

    sizes = (12, 7, 5)

    def __init__(self, rng, samples, silent=()):
        F = sum(self.sizes)
        self.samples = samples
        self.a = np.maximum(rng.standard_normal((samples, F)) + rng.uniform(-0.5, 1, F), 0) * rng.uniform(0.2, 5, F)
        self.a[:, list(silent)] = 0
        noise = rng.standard_normal((2, samples, F))
        self.best = self.a + rng.uniform(0.1, 4, F) * noise[0]
        self.last = (self.a + rng.uniform(1, 8, F) * noise[1])[:, -self.sizes[-1] :]

    def readings(self, counts):
        """The wMPPC of each reading with these sample weights."""
        share = np.asarray(counts) / np.sum(counts)
        S = share @ self.a
        best, last = self._rho(self.best, share), self._rho(self.last, share)
        return np.array(
            [
                metrics.wmppc(best, S),
                metrics.wmppc_layer_mean([best], S, self.sizes),
                metrics.wmppc(last, S[-self.sizes[-1] :]),
            ]
        )

    def _rho(self, b, share):
        a = self.a[:, -b.shape[1] :]
        a, b = a - share @ a, b - share @ b
        variances = (share @ a**2) * (share @ b**2)
        return np.where(variances > 0, (share @ (a * b)) / np.sqrt(variances + (variances == 0)), 0)

    def influence(self):
        """``[3, N]`` from the sums documented in `influence_weights`."""
        share = np.full(self.samples, 1 / self.samples)
        best, last = self._rho(self.best, share), self._rho(self.last, share)
        c1, c2 = influence_weights(best, last, self.a.sum(0), self.sizes, self.samples)
        z_a, z_best, z_last = (standardised(x) for x in (self.a, self.best, self.last))
        with_last = np.zeros_like(z_best)
        with_last[:, -self.sizes[-1] :] = z_last
        rho_last = np.zeros(len(best))
        rho_last[-self.sizes[-1] :] = last
        psi = []
        for reading, (z_b, rho) in enumerate([(z_best, best), (z_best, best), (with_last, rho_last)]):
            on_weights = (self.a - self.a.mean(0)) @ c1[reading]
            psi.append(on_weights + (z_a * z_b - rho / 2 * (z_a**2 + z_b**2)) @ c2[reading])
        return np.array(psi)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("silent", [(), (3, 20), (12, 13, 14, 15, 16, 17, 18), (19, 20, 21, 22, 23)])
def test_influence_is_the_derivative_of_a_reading_by_a_samples_weight(silent, rng):
    """Also if a feature, a middle layer or the last layer was never active."""
    matched = Matched(rng, samples=40, silent=silent)
    expected = []
    for s in range(40):
        step = 1e-4 * (np.arange(40) == s)
        # A weight of 1 + 40 e makes a sample's share of the sum 1/40 + e, to first order.
        slope = (matched.readings(1 + 40 * step) - matched.readings(1 - 40 * step)) / 2e-4
        expected.append(slope)
    # If the last layer was never active, its wMPPC is NaN and its influence 0.
    assert matched.influence() == pytest.approx(np.nan_to_num(np.array(expected)).T, abs=2e-5)
    assert matched.influence().sum(axis=1) == pytest.approx(0, abs=1e-9)


def test_influence_weights_of_excluded_features_are_zero():
    c1, c2 = influence_weights([0.5, 0.2, 0.4, 0.8, 0.1], [0.3, 0.1], [2, 4, 0, 3, 0], [2, 1, 2], samples=10)
    assert c1.shape == c2.shape == (3, 5)
    assert c1.dtype == c2.dtype == np.float64
    assert c2[0] == pytest.approx(np.array([2, 4, 0, 3, 0]) / 9)
    # Layers of two, one and two features; the middle one was never active
    assert c2[1] == pytest.approx(np.array([2 / 6, 4 / 6, 0, 3 / 3, 0]) / 2)
    assert c2[2] == pytest.approx([0, 0, 0, 1, 0])
    assert c1[1, 2] == c1[2, 0] == c1[2, 1] == c1[2, 2] == 0


@pytest.mark.filterwarnings("error")
def test_influence_weights_of_a_never_active_encoder_are_zero():
    c1, c2 = influence_weights([0.5, 0.2], [0.2], [0, 0], [1, 1], samples=10)
    assert not c1.any()
    assert not c2.any()


def test_bootstrap_intervals_agree_with_recomputing_wmppc_for_every_resample(rng):
    matched = Matched(rng, samples=400)
    values = matched.readings(np.ones(400))
    found = metrics.bootstrap_intervals(values, matched.influence(), replicates=4000)
    recomputed = [matched.readings(rng.multinomial(400, np.full(400, 1 / 400))) for _ in range(4000)]
    low, high = np.quantile(recomputed, [0.025, 0.975], axis=0)
    width = high - low
    assert (np.abs(found[:, 0] - low) < 0.07 * width).all()
    assert (np.abs(found[:, 1] - high) < 0.07 * width).all()


def test_the_95_percent_interval_covers_the_wmppc_of_the_population(rng):
    F, N, repetitions = 20, 300, 300
    rho, mean = rng.uniform(0.05, 0.9, F), rng.uniform(0.5, 3, F)
    population = (rho * mean).sum() / mean.sum()
    covered = 0
    for repetition in range(repetitions):
        # Features of one encoder are correlated, so the error of their mean does not shrink with their number.
        common, own, noise = (rng.standard_normal((N, n)) for n in (1, F, F))
        x = 0.6 * common + 0.8 * own
        b = rho * x + np.sqrt(1 - rho**2) * noise
        a = mean + x
        found = np.array([np.corrcoef(a[:, i], b[:, i])[0, 1] for i in range(F)])
        c1, c2 = (c[0] for c in influence_weights(found, found, a.sum(0), [F], N))
        z_a, z_b = standardised(a), standardised(b)
        psi = (a - a.mean(0)) @ c1 + (z_a * z_b - found / 2 * (z_a**2 + z_b**2)) @ c2
        value = [metrics.wmppc(found, a.sum(0))]
        ((low, high),) = metrics.bootstrap_intervals(value, psi[None], replicates=500, seed=repetition)
        covered += low <= population <= high
    assert 0.9 <= covered / repetitions <= 0.98


def test_feature_excess_is_zero_below_the_null_and_one_at_a_perfect_match():
    found = metrics.feature_excess([[0.1, 0.6, 1.0], [0.3, 0.2, 1.0]], [0.2, 0.2, 1.0])
    np.testing.assert_allclose(found, [[0, 0.5, 0], [0.125, 0, 0]])
    assert metrics.feature_excess(1.0, 0.3) == 1


def test_top_shares_count_resamples_and_ties_keep_their_order():
    delta = [[3, 1, 2, 0], [0, 0, 0, 0], [-1, -2, -3, 5], [1, 3, 3, 3]]
    assert metrics.top_shares(delta, 2).tolist() == [3 / 4, 2 / 4, 2 / 4, 1 / 4]


def test_resamples_are_those_of_the_intervals(rng):
    """The first ones of another number, too."""
    psi = rng.standard_normal((1, 50))
    means = np.stack([*metrics.resamples(50, 400)]) @ psi[0] / 50
    expected = 0.4 + np.quantile(means, [0.025, 0.975])
    assert metrics.bootstrap_intervals([0.4], psi, replicates=400)[0] == pytest.approx(expected)
    for one, other in zip(metrics.resamples(50, 3), metrics.resamples(50, 9), strict=False):
        assert (one == other).all()
        assert one.sum() == 50


def test_bootstrap_intervals_depend_only_on_the_seed(rng):
    psi = rng.standard_normal((3, 100))
    alone = metrics.bootstrap_intervals([0.4], psi[1:2], replicates=300)
    among = metrics.bootstrap_intervals([0.1, 0.4, 0.9], psi, replicates=300)
    assert alone == pytest.approx(among[1:2], abs=1e-12)
    assert (metrics.bootstrap_intervals([0.4], psi[1:2], replicates=300, seed=1) != alone).all()


def test_bootstrap_intervals_have_the_expected_width(rng):
    psi = rng.standard_normal(5000)
    for level, deviations in [(0.95, 1.96), (0.5, 0.674)]:
        ((low, high),) = metrics.bootstrap_intervals([2.0], psi[None], level, replicates=5000)
        expected = psi.std() / math.sqrt(5000) * deviations
        assert (low - 2 - psi.mean(), high - 2 - psi.mean()) == pytest.approx((-expected, expected), rel=0.06)


def test_bootstrapping_float32_influences_equals_float64(rng):
    psi = rng.standard_normal((2, 20_000)).astype(np.float32) ** 3
    exact = metrics.bootstrap_intervals([0.5, 0.5], psi.astype(np.float64), replicates=100)
    found = metrics.bootstrap_intervals([0.5, 0.5], psi, replicates=100)
    assert found == pytest.approx(exact, abs=1e-3 * (exact[:, 1] - exact[:, 0]).min())


@pytest.mark.filterwarnings("error")
def test_the_bootstrap_interval_of_nan_is_nan():
    assert np.isnan(metrics.bootstrap_intervals([math.nan], np.zeros((1, 10)))).all()


def test_modality_averages_exclude_the_diagonal():
    matrix = {("a", "a"): 1.0, ("a", "b"): 0.4, ("b", "a"): 0.2, ("b", "b"): 1.0, ("a", "t"): 0.1, ("t", "t"): 1.0}
    averages = metrics.modality_averages(matrix, {"a": "image", "b": "image", "t": "text"})
    assert averages == {("image", "image"): pytest.approx(0.3), ("image", "text"): 0.1}


def read_paper(name):
    with files("conceptshare.analysis").joinpath("paper", name).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def paper_matrix(row):
    """The wMPPC matrix of the paper's Tables 6 to 21 that a row of its Table 3 averages."""
    keys = ("layers", "dataset", "size")
    matrix = {
        (cell["source"], cell["target"]): float(cell["wmppc"])
        for cell in read_paper("wmppc.csv")
        if all(cell[key] == row[key] for key in keys)
    }
    # MambaVision is only in the tables of one row, and the paper's average excludes it.
    return {pair: value for pair, value in matrix.items() if "mambavision" not in pair}


def paper_averages(row):
    matrix = paper_matrix(row)
    names = {name for pair in matrix for name in pair}
    texts = {name for name in names if name.endswith("-text") or name in ("bert", "deberta")}
    assert (len(names), len(texts)) == (10, 5)
    return metrics.modality_averages(matrix, {name: "text" if name in texts else "image" for name in names})


def test_table_3_implies_the_cell_missing_from_table_10():
    (row,) = [r for r in read_paper("modality_averages.csv") if (r["layers"], r["size"]) == ("all", "base")]
    matrix = paper_matrix(row)
    names = {name for pair in matrix for name in pair}
    assert {(a, b) for a in names for b in names} - set(matrix) == {("clip-text", "vit")}
    implied = 25 * float(row["text_to_image"]) - 24 * paper_averages(row)["text", "image"]
    others = [matrix["clip-text", target] for target in ("clip-image", "dfn-image", "dinov2", "siglip2-image")]
    # 25 times the rounding of the published mean, plus that of the cells
    assert min(others) - 0.025 <= implied <= max(others) + 0.025


def test_table_3_distinguishes_the_two_directions():
    """Swapping source and target does not reproduce the paper's numbers, so the direction matters."""
    (row,) = [r for r in read_paper("modality_averages.csv") if (r["layers"], r["size"]) == ("all", "base")]
    averages = paper_averages(row)
    assert abs(averages["text", "image"] - float(row["image_to_text"])) > 0.04


def test_strata_group_features_by_number_of_active_samples():
    active = [0, 1, 15, 16, 255, 256, 4095, 118_287]
    assert metrics.strata(active).tolist() == [0, 0, 0, 1, 1, 2, 2, 4]
    assert metrics.strata([14.9999999, 15.9999999]).tolist() == [0, 1]  # densities times samples


def test_chance_matches_of_rare_features_do_not_hide_shared_frequent_ones(rng):
    """Overall, shuffled features reach 1 too often for any threshold, but not among frequent features."""
    active = np.repeat([1, 1000], [300, 1700])
    rho = np.where(active == 1, rng.choice([0.03, 1.0], 2000), rng.uniform(0.4, 0.8, 2000))
    shuffled = np.where(active == 1, rng.choice([0.03, 1.0], 2000), rng.uniform(0.05, 0.15, 2000))
    assert not metrics.beyond_shuffled(rho, shuffled).any()
    frequent = metrics.strata(active) == metrics.strata([1000])[0]
    assert metrics.beyond_shuffled(rho[frequent], shuffled[frequent]).all()
    assert not metrics.beyond_shuffled(rho[~frequent], shuffled[~frequent]).any()
