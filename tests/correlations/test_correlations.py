"""Best matches, against numpy.corrcoef in float64."""

import contextlib
import re
import shutil
import subprocess
import sys
import threading

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import linear_sum_assignment

from conceptshare.correlations import (
    _engine,
    _store,
    correlate_stores,
    max_correlations,
)
from conceptshare.correlations._null import drawn, repaired
from conceptshare.correlations._one_to_one import one_to_one
from conceptshare.correlations.blocks import plan_blocks
from conceptshare.device import DEVICE
from conceptshare.io.errors import NumericsError, StoreError
from conceptshare.io.readers import read_correlations
from conceptshare.io.sizes import REPAIRINGS
from conceptshare.io.store import open_store
from conceptshare.metrics import wmppc
from tests.helpers.forks import run_forked
from tests.helpers.samples import contents


def all_correlations(a, b):
    """``[F_A, F_B]`` Pearson correlations by NumPy in float64; NaN for constant features."""
    with np.errstate(invalid="ignore", divide="ignore"):
        r = np.corrcoef(a.astype(np.float64), b.astype(np.float64), rowvar=False)[: a.shape[1], a.shape[1] :]
    # Rounding in NumPy may give a constant column a variance of 1e-33.
    r[(a == a[0]).all(0)] = np.nan
    r[:, (b == b[0]).all(0)] = np.nan
    return r


def assert_best_matches(rho, match, a, b):
    """Every feature's rho is its largest correlation, and its match attains it."""
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
def test_random_sparse_features_equal_numpy(a, b):
    found = max_correlations([a], [b])
    assert_best_matches(found.rho_ab[0], found.match_ab[0], a, b)
    assert_best_matches(found.rho_ba[0], found.match_ba[0], b, a)


def test_maxima_are_per_pair_of_layers(rng):
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


def test_a_constant_feature_never_matches_even_if_all_others_are_anticorrelated():
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
def test_swapping_the_sides_swaps_the_directions(memory_bytes, rng):
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


def test_correlations_are_between_minus_one_and_one(rng):
    """Otherwise artanh, and with it every significance, is NaN."""
    x = rng.standard_normal((500, 300)).astype(np.float32)
    found = max_correlations([x], [x])
    assert found.rho_ab.max() <= 1
    assert max_correlations([x[:, :1]], [-x[:, :1]]).rho_ab.min() >= -1


@pytest.mark.parametrize("memory_bytes", [1_500, 5_000, 20_000])
def test_results_do_not_depend_on_the_memory_budget(memory_bytes, rng):
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
def test_reports_the_minimum_budget_if_too_small(samples, rng):
    x = rng.standard_normal((samples, 2)).astype(np.float16)
    with pytest.raises(NumericsError, match=f"{samples} samples need [0-9,]+ bytes") as caught:
        max_correlations([x], [x], memory_bytes=20)
    enough = int(str(caught.value).split(" need ")[1].split(" ")[0].replace(",", ""))
    with pytest.raises(NumericsError):
        max_correlations([x], [x], memory_bytes=enough - 1)
    assert max_correlations([x], [x], memory_bytes=enough).rho_ab == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("width", [1, 3, 8, 64])
def test_the_error_stays_below_1e_5_over_all_samples_of_coco(width, rng):
    """For every panel width: the last panel of a layer can have a single feature."""
    samples = 118_287
    x = np.zeros((samples, width), np.float16)
    for column in x.T:
        active = rng.choice(samples, 350, replace=False)
        column[active] = rng.lognormal(0, 1, len(active))
    found = max_correlations([x], [x[:, ::-1].copy()])
    assert found.rho_ab[0] == pytest.approx(1, abs=1e-5)
    assert found.match_ab[0].tolist() == list(range(width))[::-1]


def test_refuses_different_numbers_of_samples(rng):
    with pytest.raises(NumericsError, match=r"\[49, 50\]"):
        max_correlations([example("random", rng)], [example("random", rng, samples=49)])


def test_refuses_a_single_sample(rng):
    x = example("random", rng, samples=1)
    with pytest.raises(NumericsError, match="at least 2"):
        max_correlations([x], [x])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["a", "b"])
def test_names_a_non_finite_value(bad, side, rng):
    good, other = [example("random", rng), example("random", rng)], [example("random", rng), example("random", rng)]
    other[1][3, 4] = bad
    with pytest.raises(NumericsError, match=rf"^{side}\[1\]: row 3, column 4 is {bad}; replace it, or leave out"):
        max_correlations(*((other, good) if side == "a" else (good, other)))
    with pytest.raises(NumericsError, match=rf"^{side}: row 3, column 4 is {bad}; "):
        max_correlations(*((other[1], good[1]) if side == "a" else (good[1], other[1])))


def test_numpy_torch_and_zarr_arrays_give_the_same_result(rng, tmp_path):
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


def test_finds_planted_features_and_the_noise_floor_of_shuffled_samples(rng):
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


def adversarial(name, samples, width, rng):
    """Features on which correlations of rounded numbers fail in different ways."""
    if name == "activations":
        return np.maximum(rng.standard_normal((samples, width)) - 0.5, 0).astype(np.float16)
    if name == "constant":
        x = adversarial("activations", samples, width, rng)
        x[:, ::3] = 0.3
        return x
    if name == "one-hot":
        x = np.zeros((samples, width), np.float16)
        x[rng.integers(0, samples, width), np.arange(width)] = rng.uniform(1e-3, 100, width)
        return x
    if name == "near-duplicate":
        one = np.maximum(rng.standard_normal((samples, 1)), 0)
        return (one + 1e-3 * rng.standard_normal((samples, width))).astype(np.float32)
    if name == "rare near-duplicate":
        one = rng.lognormal(0, 1, (samples, 1)) * (rng.random((samples, 1)) < 0.05)
        return (one * (1 + 0.05 * rng.standard_normal((samples, width)))).astype(np.float16)
    if name == "huge mean":
        return (1000 + 1e-2 * rng.standard_normal((samples, width))).astype(np.float32)
    if name == "few values":
        return (1000 + 0.5 * rng.standard_normal((samples, width))).astype(np.float16)
    if name == "binary":
        return ((rng.random((samples, width)) < 0.04) * rng.uniform(0.1, 10, width)).astype(np.float16)
    if name == "rare":
        return (rng.lognormal(0, 1, (samples, width)) * (rng.random((samples, width)) < 1e-3)).astype(np.float16)
    raise ValueError(name)


ADVERSARIAL = [
    *("activations", "constant", "one-hot", "near-duplicate", "rare near-duplicate"),
    *("huge mean", "few values", "binary", "rare"),
]


def assert_exact(a, b):
    """Correlations and wMPPC are within the documented error of float64, and matches are as good as the best."""
    r = all_correlations(a, b)
    whole = np.full(r.shape, np.nan, np.float32)
    found = max_correlations(a, b, full={(0, 0): whole})
    np.testing.assert_allclose(whole, np.nan_to_num(r), rtol=0, atol=1e-5)
    S = np.abs(a.astype(np.float64)).sum(0)
    best = np.where(np.isnan(r), -np.inf, r).max(1)
    best[np.isinf(best)] = 0
    if S.any():
        assert wmppc(found.rho_ab[0], S) == pytest.approx(wmppc(best, S), abs=1e-5)


@pytest.mark.parametrize("samples", [300, 2000])
@pytest.mark.parametrize("name_a", ADVERSARIAL)
def test_correlations_are_within_the_documented_error(name_a, samples, rng):
    a = adversarial(name_a, samples, 130, rng)
    assert_exact(a, a)
    for name_b in ADVERSARIAL:
        assert_exact(a, adversarial(name_b, samples, 70, rng))


def test_the_cpu_uses_float32_in_place_of_float16(rng, monkeypatch):
    monkeypatch.setenv(DEVICE, "cpu")
    a, b = adversarial("activations", 500, 40, rng), adversarial("rare", 500, 24, rng)
    expected, found = max_correlations(a, b), max_correlations(a, b, precision="float16")
    for name, values in vars(expected).items():
        np.testing.assert_array_equal(values, getattr(found, name), err_msg=name)


@pytest.mark.parametrize("memory_bytes", [2**30, 400_000, 100_000])
def test_rows_and_columns_of_the_full_matrix_are_in_feature_order(memory_bytes, rng):
    """However the work is split, and whichever features are skipped or moved to the end internally."""
    a = [adversarial(name, 1500, 45, rng) for name in ("constant", "rare")]
    b = [adversarial(name, 1500, 37, rng) for name in ("rare", "activations", "binary")]
    b[1][:, ::4] = a[0][:, :40:4]
    full = {(i, j): np.full((45, 37), np.nan, np.float32) for i in range(2) for j in range(3)}
    found = max_correlations(a, b, memory_bytes, full=full)
    for (i, j), whole in full.items():
        np.testing.assert_allclose(whole, np.nan_to_num(all_correlations(a[i], b[j])), rtol=0, atol=1e-5)
        varies = (b[j] != b[j][0]).any(0)
        of_a = slice(45 * i, 45 * (i + 1))
        expected = np.where(varies, whole, -np.inf).max(1)
        matched = found.match_ab[j, of_a] >= 0
        assert (matched == (a[i] != a[i][0]).any(0)).all()
        np.testing.assert_array_equal(found.rho_ab[j, of_a][matched], expected[matched])
        at_match = whole[np.arange(45)[matched], found.match_ab[j, of_a][matched]]
        np.testing.assert_array_equal(at_match, expected[matched])


class Counting:
    """A layer that counts how often each of its values is read."""

    def __init__(self, x):
        self.x, self.shape, self.reads = x, x.shape, np.zeros(x.shape, int)

    def __getitem__(self, place):
        self.reads[place] += 1
        return self.x[place]


def test_reads_every_value_once_if_the_budget_allows(rng):
    a, b = ([Counting(adversarial("activations", 600, 40, rng)) for _ in range(3)] for _ in range(2))
    max_correlations(a, b)
    for layer in a + b:
        layer.reads[0, 0] -= 1  # for its dtype
        assert (layer.reads == 1).all()


@pytest.mark.parametrize(
    ("N", "sizes", "budget", "rows", "group", "times_b"),
    [
        (1_888, [1536] * 12, 2**30, 1_888, 12, 1),  # the default study
        (118_287, [8192] * 24, 2**30, 1_024, 0, 26),  # the paper's
        (118_287, [8192] * 24, 64 * 10**9, 118_287, 14, 2),  # on a GPU
        (118_287, [8192] * 24, 120 * 2**30, 118_287, 24, 1),  # on a large one
        (1_000, [64] * 2, 820_000, 1_000, 1, 2),
    ],
)
def test_blocks_fit_the_budget(N, sizes, budget, rows, group, times_b):
    blocks = plan_blocks(N, sizes, sizes, 2, budget)
    assert (blocks.rows, blocks.group, blocks.times_b) == (rows, group, times_b)
    assert blocks.bytes <= budget
    assert 1 <= blocks.width <= max(sizes)


@settings(max_examples=200)
@given(
    st.integers(2, 200_000),
    st.lists(st.integers(1, 10_000), min_size=1, max_size=30),
    st.lists(st.integers(1, 10_000), min_size=1, max_size=30),
    st.integers(10_000, 2**36),
    st.booleans(),
)
def test_no_plan_exceeds_the_budget_and_the_error_has_the_smallest_one(N, sizes_a, sizes_b, budget, gpu):
    try:
        blocks = plan_blocks(N, sizes_a, sizes_b, 2, budget, gpu=gpu)
    except NumericsError as error:
        needed = int(re.search(r"need ([\d,]+) bytes", str(error))[1].replace(",", ""))
        assert needed > budget
        assert plan_blocks(N, sizes_a, sizes_b, 2, needed, gpu=gpu).bytes <= needed
    else:
        assert blocks.bytes <= budget
        assert blocks.width >= 1


MEMORY = """if True:
    import resource, sys
    import numpy as np, torch
    from conceptshare.correlations import max_correlations
    torch.set_num_threads(1)
    samples, layers, width, budget = map(int, sys.argv[1:5])

    values = np.random.default_rng(0).standard_normal((1024, width), np.float32).astype(np.float16)

    class Layer:
        # Made as it is read, so that what is measured is what the product takes.
        shape = samples, width
        def __getitem__(self, place):
            rows, columns = place
            return values[np.arange(samples)[rows] * 7 % 1024, columns]

    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    small = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float16)
    max_correlations(small, small)
    before = peak()
    found = max_correlations([Layer()] * layers, [Layer()] * layers, budget)
    assert (found.match_ab >= 0).all()
    print(peak() - before)
"""


def memory_of(samples, layers, width, budget):
    arguments = [str(value) for value in (samples, layers, width, budget)]
    command = [sys.executable, "-c", MEMORY, *arguments]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's peak memory")
def test_memory_does_not_grow_with_the_number_of_samples():
    budget = 48 * 2**20
    few, many = (memory_of(samples, 1, 1024, budget) for samples in (4_000, 40_000))
    # One layer of the many, standardised, would be 164 MB.
    assert many < 1.25 * budget
    assert many == pytest.approx(few, rel=0.1)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's peak memory")
def test_keeps_to_a_budget_smaller_than_one_layer():
    """A layer's stored features are 40 MB, the matrix of two layers 16 MB."""
    assert memory_of(10_000, 2, 2048, 8 * 2**20) < 14 * 2**20


class KilledError(Exception):
    pass


@pytest.mark.parametrize("memory_bytes", [2_000_000, 400_000, 100_000])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_resumes_after_the_last_finished_step_with_the_same_result(steps, memory_bytes, rng, monkeypatch):
    monkeypatch.setattr(_engine, "_SECONDS_BETWEEN_SAVES", 0)
    a = [Counting(adversarial(name, 1500, 45, rng)) for name in ("constant", "rare")]
    b = [Counting(adversarial(name, 1500, 37, rng)) for name in ("rare", "activations")]
    whole = max_correlations(a, b, memory_bytes)
    last = []

    def keep(kept):
        last.append(kept)
        if kept.steps == steps:
            raise KilledError

    with contextlib.suppress(KilledError):
        max_correlations(a, b, memory_bytes, keep=keep)
    for layer in b:
        layer.reads[:] = 0
    found = max_correlations(a, b, memory_bytes, kept=last[-1])
    for name, values in vars(whole).items():
        np.testing.assert_array_equal(values, getattr(found, name), err_msg=name)
    if memory_bytes == 2_000_000:
        assert (b[0].reads[1:] == 0).all()  # it was already finished


def test_a_failure_ends_the_prefetch_thread(rng, monkeypatch):
    """Garbage collection during the start of another thread could otherwise deadlock."""
    monkeypatch.setattr(_engine, "_SECONDS_BETWEEN_SAVES", 0)
    a, b = ([adversarial(name, 1500, 45, rng) for name in ("constant", "rare")] for _ in range(2))
    before = set(threading.enumerate())

    def keep(_):
        raise KilledError

    with pytest.raises(KilledError) as caught:
        max_correlations(a, b, 100_000, keep=keep)
    left = set(threading.enumerate()) - before
    assert not [thread for thread in left if thread.name.startswith("ThreadPoolExecutor")], (
        caught
    )  # keeps the traceback


@pytest.fixture
def two_stores(tmp_path, write_features, rng):
    """Two feature stores, with two layers and one layer, and their features."""
    a = {0: example("low density", rng, width=5), 2: example("low density", rng, width=5)}
    b = {1: example("low density", rng, width=7)}
    for x in [*a.values(), *b.values()]:
        x[:, 1] = 0  # a feature that is never active
    return write_features(tmp_path, "vit@0", a), write_features(tmp_path, "bert@1", b), a, b


def test_correlates_stores_and_reads_them_from_either_side(two_stores, tmp_path):
    path_a, path_b, a, b = two_stores
    out = tmp_path / "correlations" / "bert@1__vit@0.zarr"
    correlate_stores(path_b, path_a, out)
    from_vit, from_bert = read_correlations(out, "vit@0"), read_correlations(out, "bert@1")
    assert (from_vit.layers_a, from_vit.layers_b, from_vit.samples) == ([0, 2], [1], 50)
    assert (from_bert.layers_a, from_bert.layers_b, from_bert.samples) == ([1], [0, 2], 50)
    assert from_vit.best.sizes_a.tolist() == from_bert.best.sizes_b.tolist() == [5, 5]
    for pair, sides in ((from_vit, (a, b)), (from_bert, (b, a))):
        source, target = sides
        for row, y in enumerate(target.values()):
            for column, x in enumerate(source.values()):
                place = slice(column * x.shape[1], (column + 1) * x.shape[1])
                assert_best_matches(pair.best.rho_ab[row, place], pair.best.match_ab[row, place], x, y)


def test_arrays_have_the_documented_types(two_stores, tmp_path):
    path_a, path_b, _, _ = two_stores
    correlate_stores(path_a, path_b, tmp_path / "pair.zarr")
    found = read_correlations(tmp_path / "pair.zarr", "vit@0").best
    assert found.rho_ab.dtype == found.rho_ba.dtype == np.float32
    assert found.match_ab.dtype == found.match_ba.dtype == np.int32


def test_refuses_stores_of_different_samples(two_stores, tmp_path, write_features, rng):
    path_a, *_ = two_stores
    other = write_features(tmp_path, "other@0", {0: example("low density", rng)}, content_hash="other samples")
    with pytest.raises(StoreError, match="different samples"):
        correlate_stores(path_a, other, tmp_path / "pair.zarr")
    assert not (tmp_path / "pair.zarr").exists()


def test_refuses_a_member_outside_the_pair(two_stores, tmp_path):
    path_a, path_b, _, _ = two_stores
    correlate_stores(path_a, path_b, tmp_path / "pair.zarr")
    with pytest.raises(StoreError, match=r"bert@1, without vit@1|vit@0 and bert@1"):
        read_correlations(tmp_path / "pair.zarr", "vit@1")


def test_names_a_missing_feature_store(two_stores, tmp_path):
    path_a, *_ = two_stores
    with pytest.raises(StoreError, match=r"absent@0\.zarr"):
        correlate_stores(path_a, tmp_path / "absent@0.zarr", tmp_path / "pair.zarr")


def features_of(rng, samples, widths):
    """Features of an encoder's layers; those made from the same generator state share some of them."""
    return {n: adversarial("activations", samples, width, rng) for n, width in widths.items()}


@pytest.fixture
def larger_stores(tmp_path, write_features, rng):
    """Stores of 300 samples, with layers wider and narrower than the number of features in a floor."""
    a = features_of(rng, 300, {0: 300, 3: 40})
    b = features_of(rng, 300, {1: 30, 2: 280})
    b[2][:, 5:25] = a[0][:, 30:50] + 0.3 * b[2][:, 5:25]
    a[3][:, 7] = 0
    return write_features(tmp_path, "vit@0", a), write_features(tmp_path, "bert@1", b), a, b


def test_the_floor_comes_from_shuffled_samples(larger_stores, tmp_path, monkeypatch):
    path_a, path_b, a, b = larger_stores
    monkeypatch.setattr(_store, "FLOOR_FEATURES", 200)
    out = tmp_path / "pair.zarr"
    correlate_stores(path_b, path_a, out)
    for source, sides in (("vit@0", (a, b)), ("bert@1", (b, a))):
        pair = read_correlations(out, source)
        ours, others = (list(side.values()) for side in sides)
        assert pair.floor_sizes.tolist() == [min(200, x.shape[1]) for x in ours]
        start = 0
        for x, size in zip(ours, pair.floor_sizes, strict=True):
            for row, y in enumerate(others):
                r = np.nan_to_num(all_correlations(x[:, :size], np.roll(y, -150, axis=0)), nan=-np.inf)
                expected = np.where(np.isinf(r.max(1)), 0, r.max(1))
                np.testing.assert_allclose(pair.floor[row, start : start + size], expected, rtol=0, atol=1e-5)
            start += size
    planted = read_correlations(out, "vit@0")
    assert planted.best.rho_ab[1, 30:50].min() > 0.6
    assert planted.floor.max() < 0.4  # for 310 best matches among 310 features over 300 samples


def weighted_best(a, b, S):
    """wMPPC of features without constant ones, by NumPy."""
    return (all_correlations(a, b).max(axis=1) * S).sum() / S.sum()


@pytest.mark.parametrize(("memory_bytes", "kept"), [(None, [True, True]), (300_000, [True, False])])
def test_the_null_is_the_wmppc_of_samples_paired_at_random(memory_bytes, kept, rng):
    """From a sample of features: within its error of all features, for other pairings."""
    N, kept = 400, np.array(kept)

    # Features of very different S, whose null depends on S: rare ones meet by chance.
    def layer(width):
        density = rng.uniform(3 / N, 0.7, width)
        x = rng.lognormal(size=(N, width)) * (rng.random((N, width)) < density)
        x[:3] += 1e-3  # none is constant
        return x

    a, b = [layer(150), layer(90)], [layer(120), layer(600)]
    strengths = [x.sum(0) for x in a]
    null = repaired(a, strengths, b, memory_bytes, "float32", "null", kept)
    assert null.values.shape == (REPAIRINGS, 2, 3)
    assert (null.error < 0.004).all()
    pairings = [rng.permutation(N) for _ in range(30)]
    for n, (x, S) in enumerate(zip(a, strengths, strict=True)):
        for m, y in enumerate([*b, np.concatenate([b[n] for n in np.flatnonzero(kept)], axis=1)]):
            values = [weighted_best(x[order], y, S) for order in pairings]
            error = np.hypot(null.error[n, m], np.std(values) * (1 / len(values) + 1 / REPAIRINGS) ** 0.5)
            assert null.values[:, n, m].mean() == pytest.approx(np.mean(values), abs=4 * error)
    # Each of the pairings is another, and the samples are re-paired indeed.
    assert len(np.unique(null.values[:, 0, 0])) == REPAIRINGS
    assert repaired(a, strengths, a, None, "float32", "null", np.ones(2, bool)).values.max() < 0.6


def test_features_are_drawn_with_a_probability_proportional_to_their_strength(rng):
    S = np.array([0, 1, 0, 3, 8, 4, 0], float)
    counts = sum(np.bincount(drawn(S, 4, rng), minlength=7) for _ in range(2000))
    np.testing.assert_allclose(counts / counts.sum(), S / S.sum(), atol=0.01)
    assert set(drawn(np.zeros(5), 5, rng)) == set(range(5))


def test_influence_is_the_derivative_of_wmppc_by_a_samples_weight(larger_stores, tmp_path):
    """By finite differences in float64 with fixed matches."""
    path_a, path_b, a, b = larger_stores
    out = tmp_path / "pair.zarr"
    correlate_stores(path_a, path_b, out)
    for source, sides in (("vit@0", (a, b)), ("bert@1", (b, a))):
        pair = read_correlations(out, source)
        ours, others = ([x.astype(np.float64) for x in side.values()] for side in sides)
        found, N = pair.best, 300
        everything = np.concatenate(others, axis=1)
        starts = np.cumsum([0, *(y.shape[1] for y in others)])
        layer = found.rho_ab.argmax(0)
        best = starts[layer] + np.take_along_axis(found.match_ab, layer[None], 0)[0]
        last = starts[-2] + found.match_ab[-1, -ours[-1].shape[1] :]

        def readings(weights, ours=ours, everything=everything, best=best, last=last, N=N):
            """The wMPPC of each reading with these sample weights."""

            def rho(x, y):
                x, y = (z - weights @ z / N for z in (x, y))
                with np.errstate(invalid="ignore", divide="ignore"):
                    return np.nan_to_num((weights @ (x * y)) / np.sqrt((weights @ x**2) * (weights @ y**2)))

            x = np.concatenate(ours, axis=1)
            rhos, S = rho(x, everything[:, best]), weights @ x
            ends = np.cumsum([z.shape[1] for z in ours])
            layers = [slice(end - z.shape[1], end) for z, end in zip(ours, ends, strict=True)]
            pooled = S @ rhos / S.sum()
            mean = sum((S[at] @ rhos[at]) / S[at].sum() * len(S[at]) / len(S) for at in layers)
            return np.array([pooled, mean, S[layers[-1]] @ rho(ours[-1], everything[:, last]) / S[layers[-1]].sum()])

        assert pair.influence.shape == (3, N)
        np.testing.assert_allclose(pair.influence.sum(1), 0, atol=1e-3)
        for sample in (0, 17, 299):
            step = 1e-4
            weights = np.ones(N)
            weights[sample] += step
            changed = (readings(weights) - readings(np.ones(N))) / step * N
            np.testing.assert_allclose(pair.influence[:, sample], changed, rtol=2e-3, atol=2e-3)


def test_the_iou_is_that_of_the_samples_that_activate_a_feature_and_its_best_match(tmp_path, write_features, rng):
    layers = [features_of(rng, 300, {0: 40, 3: 20}), features_of(rng, 300, {1: 30, 2: 25})]
    for side in layers:
        for x in side.values():  # some are stored with an offset: nearly constant, with and without zeros
            x[:, :4] = 30 + rng.random((300, 4))
            x[rng.random(300) < 0.2, 2:4] = 0
            x[:, 4] = 0
    layers[1][2][:, 5] = layers[0][3][:, 5]
    paths = [write_features(tmp_path, member, side) for member, side in zip(("vit@0", "bert@1"), layers, strict=True)]
    assert all((store.encoder().offset > 0).any() for store in map(_store.FeatureStore, paths))
    out = tmp_path / "pair.zarr"
    correlate_stores(*paths, out, memory_bytes=300_000)
    for source, sides in (("vit@0", layers), ("bert@1", layers[::-1])):
        pair = read_correlations(out, source)
        ours, others = (list(side.values()) for side in sides)
        found, F, last = pair.best, len(pair.iou[0]), ours[-1].shape[1]
        for row, first in ((0, 0), (1, F - last)):
            for n, x in enumerate(np.concatenate(ours, axis=1).T[first:], first):
                layer = found.rho_ab[:, n].argmax() if row == 0 else len(others) - 1
                y, match = others[layer], found.match_ab[layer, n]
                both, either = ((x > 0) & (y[:, match] > 0)).sum(), ((x > 0) | (y[:, match] > 0)).sum()
                assert pair.iou[row, n] == pytest.approx(0 if match < 0 else both / either, rel=1e-6)
        assert not pair.iou[1, : F - last].any()
        assert (pair.iou[0] == 1).any()
        assert ((pair.iou[0] > 0) & (pair.iou[0] < 1)).any()


def test_partners_have_the_largest_sum_of_correlations_among_best_matches(rng):
    """Against the assignment problem on the dense matrix of candidates."""
    common = rng.standard_normal((60, 12))  # features of few kinds compete for the same match
    a, b = (
        [common[:, rng.integers(12, size=width)] + rng.standard_normal((60, width)) for width in widths]
        for widths in ((30, 20), (25, 15, 18))
    )
    a[1][:, 3] = 0
    found = max_correlations(a, b)
    r = np.nan_to_num(all_correlations(np.concatenate(a, axis=1), np.concatenate(b, axis=1)))
    candidates = np.zeros_like(r)
    for one, of_one, values in ((0, b, r), (1, a, r.T)):
        at = candidates.T if one else candidates
        for end, width in zip(np.cumsum([x.shape[1] for x in of_one]), [x.shape[1] for x in of_one], strict=True):
            best = end - width + values[:, end - width : end].argmax(1)
            at[np.arange(len(at)), best] = values[np.arange(len(at)), best]
    of_a, of_b = one_to_one(found, np.ones(2, bool), np.ones(3, bool))
    for row, (first_a, first_b) in enumerate(((0, 0), (30, 40))):
        rows, columns = linear_sum_assignment(candidates[first_a:, first_b:], maximize=True)
        expected = candidates[first_a + rows, first_b + columns].clip(0)
        assert expected.sum() - 1e-4 * len(expected) - 1e-5 <= of_a[row].sum() <= expected.sum() + 1e-4
        np.testing.assert_array_equal(np.sort(of_a[row][of_a[row] > 0]), np.sort(of_b[row][of_b[row] > 0]))
        assert not of_a[row, :first_a].any()
        assert not of_b[row, :first_b].any()
        for values, best in ((of_a[row], found.rho_ab), (of_b[row], found.rho_ba)):
            assert (values <= best.max(0) + 1e-6).all()
        assert of_a[row].sum() < 0.9 * found.rho_ab.max(0)[first_a:].sum()  # the best matches are not one to one


def test_without_best_matches_there_are_no_partners():
    found = max_correlations([np.zeros((9, 3))], [np.random.default_rng(0).random((9, 4))])
    assert not any(values.any() for values in one_to_one(found, np.ones(1, bool), np.ones(1, bool)))


def test_stores_full_matrices_of_selected_layers(larger_stores, tmp_path):
    path_a, path_b, a, b = larger_stores
    correlate_stores(path_a, path_b, tmp_path / "pair.zarr", full=[(3, 2), (0, 1)])
    store = open_store(tmp_path / "pair.zarr", "correlations")
    assert sorted(store["full"].array_keys()) == ["layer-00__layer-01", "layer-03__layer-02"]
    for layer_a, layer_b in ((3, 2), (0, 1)):
        r = store[f"full/layer-{layer_a:02d}__layer-{layer_b:02d}"][:]
        np.testing.assert_allclose(r, np.nan_to_num(all_correlations(a[layer_a], b[layer_b])), rtol=0, atol=1e-5)


def test_refuses_a_full_matrix_of_a_missing_layer(larger_stores, tmp_path):
    path_a, path_b, _, _ = larger_stores
    with pytest.raises(StoreError, match=r"bert@1\.zarr: no layer 7; it has 1, 2"):
        correlate_stores(path_a, path_b, tmp_path / "pair.zarr", full=[(0, 7)])
    assert not list(tmp_path.glob("pair*"))


KILLED = """if True:
    import os, sys
    from pathlib import Path
    import torch
    from conceptshare.correlations import _engine, _store
    torch.set_num_threads(1)
    _engine._SECONDS_BETWEEN_SAVES = 0
    stop, name = int(sys.argv[1]), sys.argv[2]
    done = 0

    def until(function):
        def counted(*arguments, **named):
            global done
            done += 1
            if done > stop:
                os._exit(9)
            return function(*arguments, **named)
        return counted

    if name == "panel":
        _store._Progress.write = until(_store._Progress.write)
    else:
        setattr(_store, name, until(getattr(_store, name)))
    a, b, out = map(Path, sys.argv[3:6])
    _store.correlate_stores(a, b, out, 700_000, full=[(0, 2)])
"""


def test_a_killed_job_resumes_with_the_same_bytes(larger_stores, tmp_path, monkeypatch):
    path_a, path_b, *_ = larger_stores
    blocks = []
    monkeypatch.setattr(_engine, "progress", lambda steps, count, what, unit: blocks.append(count) or steps)
    correlate_stores(path_a, path_b, tmp_path / "whole/pair.zarr", 700_000, full=[(0, 2)])
    undisturbed, all_blocks = contents(tmp_path / "whole/pair.zarr"), blocks[0]
    for name, stop in (
        *(("panel", 1), ("panel", 3), ("shuffled_floor", 1)),
        *(("influences", 0), ("save_array", 0), ("save_array", 5)),
    ):
        out = tmp_path / f"{name}-{stop}/pair.zarr"
        assert run_forked(KILLED, stop, name, path_a, path_b, out).returncode == 9
        assert not out.exists()
        blocks.clear()
        correlate_stores(path_a, path_b, out, 700_000, full=[(0, 2)])
        assert contents(out) == undisturbed, out
        assert [path.name for path in out.parent.iterdir()] == ["pair.zarr"]
        assert blocks[0] < all_blocks, out
        if name != "panel":
            assert blocks[0] == 0, out  # all matches were already found


def test_does_not_resume_a_job_on_other_features(larger_stores, tmp_path, write_features, rng):
    path_a, path_b, *_ = larger_stores
    out = tmp_path / "pair.zarr"
    arguments = ["2", "panel", *map(str, (path_a, path_b, out))]
    assert run_forked(KILLED, *arguments).returncode == 9
    shutil.rmtree(tmp_path / "made" / "bert@1")
    other = write_features(tmp_path / "other", "bert@1", features_of(rng, 300, {1: 30, 2: 280}))
    correlate_stores(path_a, other, out, 700_000, full=[(0, 2)])
    correlate_stores(path_a, other, tmp_path / "whole" / "pair.zarr", 700_000, full=[(0, 2)])
    assert contents(out) == contents(tmp_path / "whole" / "pair.zarr")


@pytest.mark.parametrize("damage", ["torn", "garbled", "empty"])
def test_a_damaged_progress_file_is_one_error_and_deleted(damage, larger_stores, tmp_path):
    path_a, path_b, *_ = larger_stores
    out = tmp_path / "pair.zarr"
    arguments = ["2", "panel", *map(str, (path_a, path_b, out))]
    run_forked(KILLED, *arguments)
    progress = tmp_path / "pair.zarr.partial" / "progress.npz"
    whole = progress.read_bytes()
    progress.write_bytes({"torn": whole[: len(whole) // 2], "garbled": b"x" * len(whole), "empty": b""}[damage])
    with pytest.raises(StoreError, match=r"pair\.zarr: the partial store of an earlier attempt is damaged"):
        correlate_stores(path_a, path_b, out, 700_000, full=[(0, 2)])
    correlate_stores(path_a, path_b, out, 700_000, full=[(0, 2)])
    assert out.exists()


def test_a_member_can_be_paired_with_itself(larger_stores, tmp_path):
    path_a, _, a, _ = larger_stores
    correlate_stores(path_a, path_a, tmp_path / "pair.zarr")
    pair = read_correlations(tmp_path / "pair.zarr", "vit@0")
    x = np.concatenate([*a.values()], axis=1)
    best = pair.best.rho_ab.max(0)
    varies = (x != x[0]).any(0)
    assert best[varies] == pytest.approx(1, abs=1e-5)
    assert (best[~varies] == 0).all()
    np.testing.assert_array_equal(pair.best.rho_ab, pair.best.rho_ba)


def test_both_orders_of_a_pair_give_the_same_result(larger_stores, tmp_path):
    path_a, path_b, *_ = larger_stores
    correlate_stores(path_a, path_b, tmp_path / "one.zarr")
    correlate_stores(path_b, path_a, tmp_path / "other.zarr")
    for source in ("vit@0", "bert@1"):
        one, other = (read_correlations(tmp_path / f"{name}.zarr", source) for name in ("one", "other"))
        np.testing.assert_allclose(one.best.rho_ab, other.best.rho_ab, rtol=0, atol=1e-6)
        np.testing.assert_allclose(one.floor, other.floor, rtol=0, atol=1e-6)
        np.testing.assert_allclose(one.influence, other.influence, rtol=1e-3, atol=1e-4)


def test_refuses_stores_without_active_features_or_with_one_sample(larger_stores, tmp_path, write_features, rng):
    path_a, *_ = larger_stores
    silent = write_features(tmp_path, "silent@0", {0: np.zeros((300, 5), np.float16)})
    with pytest.raises(StoreError, match=r"silent@0\.zarr: no sample activates any"):
        correlate_stores(path_a, silent, tmp_path / "pair.zarr")
    one = write_features(tmp_path, "one@0", {0: adversarial("activations", 1, 5, rng)})
    with pytest.raises(NumericsError, match="at least 2"):
        correlate_stores(one, one, tmp_path / "pair.zarr")
    assert not list(tmp_path.glob("pair*"))


def test_names_a_missing_or_truncated_chunk_of_features_and_writes_nothing(larger_stores, tmp_path):
    path_a, path_b, *_ = larger_stores
    chunk = next(path for path in sorted((path_a / "layer-00" / "features").rglob("*")) if path.parent.name == "0")
    whole = chunk.read_bytes()
    for content in (None, whole[:-5]):
        chunk.unlink() if content is None else chunk.write_bytes(content)
        with pytest.raises(StoreError, match=r"vit@0\.zarr: .*layer-00/features"):
            correlate_stores(path_a, path_b, tmp_path / "pair.zarr")
        chunk.write_bytes(whole)
    assert not list(tmp_path.glob("pair*"))


def test_refuses_features_of_an_older_version(larger_stores, tmp_path):
    path_a, path_b, *_ = larger_stores
    root = path_a / "zarr.json"
    root.write_text(root.read_text().replace('"version": 6', '"version": 5'))
    with pytest.raises(StoreError, match=r"format version 5, but 6 is needed; .* run the features stage again"):
        correlate_stores(path_a, path_b, tmp_path / "pair.zarr")


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_a_single_array_is_one_layer(rng, kind):
    a, b = (rng.standard_normal((50, 4)).astype(np.float32) for _ in range(2))
    alone, listed = max_correlations(kind(a), kind(b)), max_correlations([a], [b])
    np.testing.assert_array_equal(alone.rho_ab, listed.rho_ab)
    np.testing.assert_array_equal(alone.match_ba, listed.match_ba)


def test_does_not_resume_with_another_memory_budget(larger_stores, tmp_path):
    path_a, path_b, *_ = larger_stores
    out = tmp_path / "pair.zarr"
    arguments = ["3", "panel", *map(str, (path_a, path_b, out))]
    assert run_forked(KILLED, *arguments).returncode == 9
    correlate_stores(path_a, path_b, out, full=[(0, 2)])
    correlate_stores(path_a, path_b, tmp_path / "whole" / "pair.zarr", full=[(0, 2)])
    assert contents(out) == contents(tmp_path / "whole" / "pair.zarr")


def test_detects_a_missing_chunk_of_an_unfinished_full_matrix(larger_stores, tmp_path):
    path_a, path_b, *_ = larger_stores
    out = tmp_path / "pair.zarr"
    arguments = ["0", "influences", *map(str, (path_a, path_b, out))]
    assert run_forked(KILLED, *arguments).returncode == 9
    (tmp_path / "pair.zarr.partial/full/layer-00__layer-02/c/0/0").unlink()
    with pytest.raises(StoreError, match=r"layer-00__layer-02/c/0/0 is lost\) and was removed; run again"):
        correlate_stores(path_a, path_b, out, 700_000, full=[(0, 2)])
    assert not list(tmp_path.glob("pair*"))


@pytest.mark.parametrize("name", ["features", "strength", "deviation"])
def test_names_a_changed_chunk_of_features_or_statistics(name, larger_stores, tmp_path):
    path_a, path_b, *_ = larger_stores
    chunk = max((path_a / "layer-00" / name / "c").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    content = bytearray(chunk.read_bytes())
    content[len(content) // 3] ^= 255
    chunk.write_bytes(content)
    with pytest.raises(StoreError, match=r"vit@0\.zarr.*(damaged|cannot be read).*run the features stage again"):
        correlate_stores(path_a, path_b, tmp_path / "pair.zarr")
    assert not list(tmp_path.glob("pair*"))


@pytest.mark.parametrize(("old", "new"), [('"float16"', '"floatX6"'), ('"layer', '"layex'), ('"shape"', '"shapx"')])
def test_names_changed_metadata_of_features(old, new, larger_stores, tmp_path):
    path_a, path_b, *_ = larger_stores
    metadata = path_a / "layer-00" / "features" / "zarr.json"
    text = metadata.read_text()
    if old not in text:
        metadata = path_a / "layer-00" / "zarr.json"
    metadata.write_text(text.replace(old, new) if old in text else "{" * metadata.stat().st_size)
    with pytest.raises(StoreError, match=r"vit@0\.zarr"):
        correlate_stores(path_a, path_b, tmp_path / "pair.zarr")


@pytest.mark.parametrize("key", ["content_hash", "layers", "samples"])
def test_refuses_a_store_with_changed_root_metadata(key, larger_stores, tmp_path):
    path_a, path_b, *_ = larger_stores
    root = path_a / "zarr.json"
    root.write_text(root.read_text().replace(f'"{key}"', f'"{key[::-1]}"'))
    with pytest.raises(StoreError, match=r"vit@0\.zarr: zarr\.json was changed or damaged"):
        correlate_stores(path_a, path_b, tmp_path / "pair.zarr")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: [], "^[ab] has no layers; give dense"),
        (lambda x: x[:, :0], "^[ab] has the shape"),
        (lambda x: x[:, 0], "^[ab] has the shape"),
        (lambda x: x.tolist(), r"\[0\] has the shape \(3,\); give dense"),
        (lambda x: None, "has no layers; give dense"),
        (lambda x: x.astype(complex), "values of type complex128: give real numbers"),
        (lambda x: x.astype(str), "give real numbers"),
        (lambda x: x.astype(object), "values of type object: give real numbers"),
        (lambda x: x * 1e200, "beyond float64"),
        (lambda x: [[[1, 2], [3]]], r"\[0\], a builtins.list, cannot be read as an array"),
        (lambda x: np.ma.array(x, mask=x > 0.5), "masked values; fill them"),
        (lambda x: pd.DataFrame(x).replace(x[0, 0], np.nan), "row 0, column 0 is nan; replace it"),
        (lambda x: pd.DataFrame(x).assign(name="x"), "values of type object: give real numbers"),
        *(
            (lambda x, kind=kind: kind(x), "is sparse; give a dense array")
            for kind in (scipy.sparse.csr_array, scipy.sparse.coo_matrix, lambda x: torch.tensor(x).to_sparse())
        ),
        (lambda x: torch.tensor(x).to("meta"), "a torch.Tensor, cannot be read as an array"),
    ],
)
def test_refuses_invalid_arrays_in_one_line(change, message, rng):
    x = rng.random((20, 3))
    for sides in ((change(x), x), (x, change(x))):
        with pytest.raises(NumericsError, match=message) as raised:
            max_correlations(*sides)
        assert "\n" not in str(raised.value)


def test_refuses_an_unknown_precision(rng):
    with pytest.raises(NumericsError, match="precision 'bfloat16': use one of float32, float16"):
        max_correlations(rng.random((20, 3)), rng.random((20, 3)), precision="bfloat16")


class OnlyItsValues:
    """An array of another library, with only `__array__`."""

    def __init__(self, values):
        self._values = values

    def __array__(self, dtype=None, copy=None):
        return self._values


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "change",
    [
        lambda x: np.ascontiguousarray(x[::-1])[::-1],
        lambda x: np.ascontiguousarray(x[::-1, ::-1])[::-1, ::-1],
        lambda x: np.rec.fromarrays([x, x[:, 0] > 0.5], dtype=[("x", "f4", 3), ("y", "?")])["x"],
        lambda x: np.ma.array(x),
        lambda x: pd.DataFrame(x, columns=list("xyz")).set_index(x[:, 0]),
        lambda x: [x.tolist()],
        lambda x: (layer for layer in [x]),
        lambda x: OnlyItsValues(x),
        lambda x: np.asfortranarray(x),
        lambda x: x.astype(">f4"),
        lambda x: torch.from_numpy(x).requires_grad_(),
        lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
    ],
)
def test_reads_arrays_of_any_kind_and_order(change, rng):
    x, y = (rng.random((20, 3)).astype(np.float32) for _ in range(2))
    expected = max_correlations(x, y)
    np.testing.assert_array_equal(max_correlations(change(x), y).rho_ab, expected.rho_ab)
    np.testing.assert_array_equal(max_correlations(y, change(x)).rho_ba, expected.rho_ab)


@pytest.mark.parametrize("kind", ["?", "i1", "u2", "u8", "i8", "f8"])
def test_reads_numbers_of_any_type(kind, rng):
    x, y = (rng.integers(0, 2 if kind == "?" else 100, (20, 3)).astype(kind) for _ in range(2))
    expected = max_correlations(x.astype(float), y.astype(float))
    np.testing.assert_array_equal(max_correlations(x, y).rho_ab, expected.rho_ab)


def test_reads_bfloat16_torch_tensors(rng):
    x, y = (torch.from_numpy(rng.random((20, 3))).bfloat16() for _ in range(2))
    expected = max_correlations(x.float(), y.float())
    np.testing.assert_allclose(max_correlations(x, y).rho_ab, expected.rho_ab, atol=1e-6)
