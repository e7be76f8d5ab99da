"""Best matches, against numpy.corrcoef in float64 over the same numbers."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from conceptshare.correlations import correlate_stores, max_correlations, read_correlations
from conceptshare.errors import NumericsError, StoreError
from conceptshare.metrics import wmppc


def all_correlations(a, b):
    """``[F_A, F_B]`` Pearson correlations by NumPy in float64; NaN where a feature is constant."""
    with np.errstate(invalid="ignore", divide="ignore"):
        r = np.corrcoef(a.astype(np.float64), b.astype(np.float64), rowvar=False)[: a.shape[1], a.shape[1] :]
    # NumPy's own rounding may leave a constant column a variance of 1e-33.
    r[(a == a[0]).all(0)] = np.nan
    r[:, (b == b[0]).all(0)] = np.nan
    return r


def assert_best_matches(rho, match, a, b):
    """Every feature's rho is its largest correlation, and its match is a feature that has it."""
    r = np.where(np.isnan(all_correlations(a, b)), -np.inf, all_correlations(a, b))
    nothing = np.isinf(r).all(1)
    assert (rho[nothing] == 0).all()
    assert (match[nothing] == -1).all()
    found, largest = rho[~nothing], r.max(1)[~nothing]
    np.testing.assert_allclose(found, largest, rtol=0, atol=1e-5)
    np.testing.assert_allclose(r[~nothing][np.arange(len(found)), match[~nothing]], largest, rtol=0, atol=1e-5)


def example(name, rng, samples=50, width=9):
    if name == "random":
        return rng.standard_normal((samples, width)).astype(np.float32)
    if name == "float16":
        return rng.lognormal(0, 2, (samples, width)).astype(np.float16)
    if name == "constant":
        x = rng.standard_normal((samples, width)).astype(np.float32)
        x[:, 2], x[:, 3], x[:, 5] = 0.0, 0.1, -12345.678
        return x
    if name == "all constant":
        return np.full((samples, width), 0.1, np.float32)
    if name == "constant float64":
        return np.tile([0.1, 1e9 + 0.1, 0.3, 1e-9 / 3], (samples, 3))[:, :width]
    if name == "one-hot":
        x = np.zeros((samples, width), np.float16)
        x[rng.permutation(samples)[:width], np.arange(width)] = rng.uniform(1e-3, 100, width)
        return x
    if name == "near-duplicate":
        x = np.repeat(rng.standard_normal((samples, 1)), width, axis=1)
        return (x + 1e-4 * rng.standard_normal((samples, width))).astype(np.float32)
    if name == "large mean, small spread":
        return (1000 + 1e-2 * rng.standard_normal((samples, width))).astype(np.float32)
    if name == "low density":
        return (rng.lognormal(0, 1, (samples, width)) * (rng.random((samples, width)) < 0.05)).astype(np.float16)
    if name == "tiny":
        return (1e-30 * rng.standard_normal((samples, width))).astype(np.float32)
    raise ValueError(name)


EXAMPLES = [
    "random",
    "float16",
    "constant",
    "all constant",
    "constant float64",
    "one-hot",
    "near-duplicate",
    "large mean, small spread",
    "low density",
    "tiny",
]


@pytest.mark.parametrize("name_b", ["random", "constant", "low density", "large mean, small spread"])
@pytest.mark.parametrize("name_a", EXAMPLES)
def test_both_directions_equal_numpy(name_a, name_b, rng):
    a, b = example(name_a, rng), example(name_b, rng, width=6)
    found = max_correlations([a], [b])
    assert_best_matches(found.rho_ab[0], found.match_ab[0], a, b)
    assert_best_matches(found.rho_ba[0], found.match_ba[0], b, a)


@settings(max_examples=40)
@given(
    arrays(np.float16, (7, 4), elements=st.sampled_from([0, 0, 0, 0.5, 1, 2, 60000])),
    arrays(np.float16, (7, 3), elements=st.sampled_from([0, 0, 0, 0.5, 1, 2, 60000])),
)
def test_any_sparse_features_equal_numpy(a, b):
    found = max_correlations([a], [b])
    assert_best_matches(found.rho_ab[0], found.match_ab[0], a, b)
    assert_best_matches(found.rho_ba[0], found.match_ba[0], b, a)


def test_every_pair_of_layers_has_its_own_maxima(rng):
    a = [rng.standard_normal((40, width)).astype(np.float32) for width in (7, 5)]
    b = [rng.standard_normal((40, width)).astype(np.float32) for width in (4, 9, 6)]
    found = max_correlations(a, b)
    assert found.rho_ab.shape == found.match_ab.shape == (3, 12)
    assert found.rho_ba.shape == found.match_ba.shape == (2, 19)
    assert found.sizes_a.tolist() == [7, 5]
    assert found.sizes_b.tolist() == [4, 9, 6]
    starts_a, starts_b = [0, 7], [0, 4, 13]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            of_a = slice(starts_a[i], starts_a[i] + x.shape[1])
            of_b = slice(starts_b[j], starts_b[j] + y.shape[1])
            assert_best_matches(found.rho_ab[j, of_a], found.match_ab[j, of_a], x, y)
            assert_best_matches(found.rho_ba[i, of_b], found.match_ba[i, of_b], y, x)


def test_a_constant_feature_is_nobodys_match_even_where_all_others_are_anticorrelated():
    falling = np.array([[5], [4], [3], [2], [1], [0]], np.float32)
    rising = np.stack([np.full(6, 3.0), np.arange(6), np.zeros(6)], axis=1).astype(np.float32)
    found = max_correlations([falling], [rising])
    assert found.rho_ab[0] == pytest.approx([-1], abs=1e-6)
    assert found.match_ab[0].tolist() == [1]
    assert found.rho_ba[0] == pytest.approx([0, -1, 0], abs=1e-6)
    assert found.match_ba[0].tolist() == [-1, 0, -1]


def test_indices_point_at_the_right_feature(rng):
    a = rng.standard_normal((80, 30)).astype(np.float32)
    order = rng.permutation(30)
    found = max_correlations([a], [3 * a[:, order] + 1])
    assert (order[found.match_ab[0]] == np.arange(30)).all()
    assert (found.match_ba[0] == order).all()


@pytest.mark.parametrize("memory_bytes", [2**30, 10_000])
def test_exchanging_the_two_sides_exchanges_the_directions(memory_bytes, rng):
    a, b = [example("low density", rng), example("random", rng)], [example("constant", rng, width=11)]
    one = max_correlations(a, b, memory_bytes).reverse()
    other = max_correlations(b, a, memory_bytes)
    for name, values in vars(one).items():
        np.testing.assert_allclose(values, getattr(other, name), rtol=0, atol=1e-6, err_msg=name)


def test_a_feature_is_its_own_best_match(rng):
    a = [example("random", rng, width=40), example("random", rng, width=25)]
    found = max_correlations(a, a)
    for layer, (start, width) in enumerate([(0, 40), (40, 25)]):
        assert found.match_ab[layer, start : start + width].tolist() == list(range(width))
        assert found.rho_ab[layer, start : start + width] == pytest.approx(1, abs=1e-6)


def test_no_correlation_is_above_one_or_below_minus_one(rng):
    """Else artanh, and with it every significance, is NaN."""
    x = rng.standard_normal((500, 300)).astype(np.float32)
    found = max_correlations([x], [x])
    assert found.rho_ab.max() <= 1
    assert max_correlations([x[:, :1]], [-x[:, :1]]).rho_ab.min() >= -1


@pytest.mark.parametrize("memory_bytes", [1_500, 5_000, 20_000])
def test_a_small_memory_budget_changes_nothing(memory_bytes, rng):
    a = [example("random", rng, samples=50, width=33), example("low density", rng, samples=50, width=8)]
    b = [example("constant", rng, samples=50, width=21), example("one-hot", rng, samples=50, width=13)]
    large, small = max_correlations(a, b), max_correlations(a, b, memory_bytes)
    for name, values in vars(large).items():
        if name.startswith("rho"):
            np.testing.assert_allclose(values, getattr(small, name), rtol=0, atol=1e-6, err_msg=name)
    for layer_a in range(2):
        start = 33 * layer_a
        for layer_b in range(2):
            place = slice(start, start + a[layer_a].shape[1])
            args = (small.rho_ab[layer_b, place], small.match_ab[layer_b, place], a[layer_a], b[layer_b])
            assert_best_matches(*args)


@pytest.mark.parametrize("samples", [2, 50, 118_287])
def test_a_budget_too_small_says_how_much_is_enough(samples, rng):
    x = rng.standard_normal((samples, 2)).astype(np.float16)
    with pytest.raises(NumericsError, match=f"{samples} samples need [0-9,]+ bytes") as caught:
        max_correlations([x], [x], memory_bytes=samples)
    enough = int(str(caught.value).split(" need ")[1].split(" ")[0].replace(",", ""))
    with pytest.raises(NumericsError):
        max_correlations([x], [x], memory_bytes=enough - 1)
    assert max_correlations([x], [x], memory_bytes=enough).rho_ab == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("width", [1, 3, 8, 64])
def test_the_error_stays_below_1e_5_over_all_samples_of_coco(width, rng):
    """However wide a panel is: the last one of a layer can be as narrow as one feature."""
    samples = 118_287
    x = np.zeros((samples, width), np.float16)
    for column in x.T:
        active = rng.choice(samples, 350, replace=False)
        column[active] = rng.lognormal(0, 1, len(active))
    found = max_correlations([x], [x[:, ::-1].copy()])
    assert found.rho_ab[0] == pytest.approx(1, abs=1e-5)
    assert found.match_ab[0].tolist() == list(range(width))[::-1]


def test_memory_stays_within_reach_of_the_budget():
    """The whole correlation matrix would be 268 MB, and the standardised features of one side 6 MB."""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads Linux's peak memory")
    script = """if True:
        import resource
        import numpy as np, torch
        from conceptshare.correlations import max_correlations
        torch.set_num_threads(1)
        x = np.random.default_rng(0).standard_normal((192, 8192)).astype(np.float16)
        max_correlations([x[:, :64]], [x[:, :64]])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        max_correlations([x], [x], memory_bytes=16 * 2**20)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
    """
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 64


def test_different_numbers_of_samples_are_refused(rng):
    with pytest.raises(NumericsError, match=r"\[49, 50\]"):
        max_correlations([example("random", rng)], [example("random", rng, samples=49)])


def test_one_sample_is_refused(rng):
    x = example("random", rng, samples=1)
    with pytest.raises(NumericsError, match="at least 2"):
        max_correlations([x], [x])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["a", "b"])
def test_a_value_that_is_not_finite_is_refused_and_named(bad, side, rng):
    good, other = [example("random", rng), example("random", rng)], [example("random", rng), example("random", rng)]
    other[1][3, 4] = bad
    with pytest.raises(NumericsError, match=r"layer 1, feature 4\b"):
        max_correlations(*((other, good) if side == "a" else (good, other)))


def test_numpy_torch_and_zarr_arrays_give_the_same(rng, tmp_path):
    x, y = example("low density", rng), example("float16", rng)
    stored = zarr.create_array(tmp_path / "x.zarr", shape=x.shape, dtype=x.dtype, chunks=(7, 4))
    stored[...] = x
    expected = max_correlations([x], [y])
    for found in (max_correlations([stored], [y]), max_correlations([torch.from_numpy(x)], [torch.from_numpy(y)])):
        for name, values in vars(expected).items():
            np.testing.assert_array_equal(values, getattr(found, name), err_msg=name)


def expected_maximum(count, samples):
    """Mean of the largest of ``count`` correlations between unrelated Gaussian samples, by Fisher's z."""
    z = np.linspace(-8, 8, 20_001)
    density = np.exp(-z * z / 2) / np.sqrt(2 * np.pi)
    cumulative = np.cumsum(density) * (z[1] - z[0])
    of_largest = count * cumulative ** (count - 1) * density
    return float((np.tanh(z / np.sqrt(samples - 3)) * of_largest).sum() * (z[1] - z[0]))


def test_planted_features_are_found_and_shuffled_samples_give_the_noise_floor(rng):
    samples, F = 1000, 96
    a = np.exp(rng.standard_normal((samples, F)) * 0.1).astype(np.float32)
    order = rng.permutation(F)
    b = (a[:, order] * rng.uniform(0.1, 10, F) + 1e-3 * rng.standard_normal((samples, F))).astype(np.float32)
    S = a.sum(0)
    aligned = max_correlations([a], [b])
    assert wmppc(aligned.rho_ab[0], S) > 0.99
    assert (order[aligned.match_ab[0]] == np.arange(F)).all()
    shuffled = max_correlations([a], [b[rng.permutation(samples)]])
    assert wmppc(shuffled.rho_ab[0], S) == pytest.approx(expected_maximum(F, samples), rel=0.05)


@pytest.fixture
def two_stores(tmp_path, write_features, rng):
    """Two feature stores, of two layers and of one, and the features in them."""
    a = {0: example("low density", rng, width=5), 2: example("low density", rng, width=5)}
    b = {1: example("low density", rng, width=7)}
    for x in [*a.values(), *b.values()]:
        x[:, 1] = 0  # a feature that is never active
    return write_features(tmp_path, "vit@0", a), write_features(tmp_path, "bert@1", b), a, b


def test_stores_are_correlated_and_read_from_either_side(two_stores, tmp_path):
    path_a, path_b, a, b = two_stores
    out = tmp_path / "correlations" / "bert@1__vit@0.zarr"
    correlate_stores(path_b, path_a, out)
    from_vit, from_bert = read_correlations(out, "vit@0"), read_correlations(out, "bert@1")
    assert (from_vit.layers_a, from_vit.layers_b, from_vit.samples) == ([0, 2], [1], 50)
    assert (from_bert.layers_a, from_bert.layers_b, from_bert.samples) == ([1], [0, 2], 50)
    assert from_vit.found.sizes_a.tolist() == from_bert.found.sizes_b.tolist() == [5, 5]
    for pair, sides in ((from_vit, (a, b)), (from_bert, (b, a))):
        source, target = sides
        for row, y in enumerate(target.values()):
            for column, x in enumerate(source.values()):
                place = slice(column * x.shape[1], (column + 1) * x.shape[1])
                assert_best_matches(pair.found.rho_ab[row, place], pair.found.match_ab[row, place], x, y)


def test_the_type_of_each_array_is_as_documented(two_stores, tmp_path):
    path_a, path_b, _, _ = two_stores
    correlate_stores(path_a, path_b, tmp_path / "pair.zarr")
    found = read_correlations(tmp_path / "pair.zarr", "vit@0").found
    assert found.rho_ab.dtype == found.rho_ba.dtype == np.float32
    assert found.match_ab.dtype == found.match_ba.dtype == np.int32


def test_stores_of_different_samples_are_refused(two_stores, tmp_path, write_features, rng):
    path_a, *_ = two_stores
    other = write_features(tmp_path, "other@0", {0: example("low density", rng)}, content_hash="other samples")
    with pytest.raises(StoreError, match="different samples"):
        correlate_stores(path_a, other, tmp_path / "pair.zarr")
    assert not (tmp_path / "pair.zarr").exists()


def test_a_member_that_is_not_of_the_pair_is_refused(two_stores, tmp_path):
    path_a, path_b, _, _ = two_stores
    correlate_stores(path_a, path_b, tmp_path / "pair.zarr")
    with pytest.raises(StoreError, match=r"bert@1, without vit@1|vit@0 and bert@1"):
        read_correlations(tmp_path / "pair.zarr", "vit@1")


def test_a_missing_feature_store_is_named(two_stores, tmp_path):
    path_a, *_ = two_stores
    with pytest.raises(StoreError, match=r"absent@0\.zarr"):
        correlate_stores(path_a, tmp_path / "absent@0.zarr", tmp_path / "pair.zarr")


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_one_array_alone_is_one_layer(rng, kind):
    a, b = (rng.standard_normal((50, 4)).astype(np.float32) for _ in range(2))
    alone, listed = max_correlations(kind(a), kind(b)), max_correlations([a], [b])
    np.testing.assert_array_equal(alone.rho_ab, listed.rho_ab)
    np.testing.assert_array_equal(alone.match_ba, listed.match_ba)
