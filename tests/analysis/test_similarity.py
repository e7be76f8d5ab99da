"""CKA and mutual nearest neighbours against brute force in float64, and two stores compared layer by layer."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from conceptshare.analysis import similarity
from conceptshare.analysis.similarity import cka_null, compare_stores, linear_cka, mutual_knn
from conceptshare.io.errors import NumericsError, StoreError


def cka_by_kernels(x, y):
    """CKA as the alignment of centred kernel matrices, which Kornblith et al. show to be equivalent."""
    n = len(x)
    centring = np.eye(n) - np.full((n, n), 1 / n)
    k, m = (centring @ (z.astype(np.float64) @ z.T.astype(np.float64)) @ centring for z in (x, y))
    return (k * m).sum() / math.sqrt((k * k).sum() * (m * m).sum())


def neighbours_by_hand(x, k):
    """Each sample's neighbours, by sorting on (-cosine, sample)."""
    unit = np.array([row / math.sqrt((row**2).sum()) if row.any() else row for row in x.astype(np.float64)])
    found = []
    for i in range(len(x)):
        cosines = (unit * unit[i]).sum(axis=1).round(12).tolist()
        others = sorted((-cosine, j) for j, cosine in enumerate(cosines) if j != i)
        found.append({j for _, j in others[:k]})
    return found


def mutual_by_hand(x, y, k):
    of_x, of_y = neighbours_by_hand(x, k), neighbours_by_hand(y, k)
    return sum(len(a & b) / k for a, b in zip(of_x, of_y, strict=True)) / len(x)


@pytest.fixture
def related(rng):
    """Two representations of 700 samples (more than a block) that share three dimensions."""
    common = rng.standard_normal((700, 3))
    x, y = (common @ rng.standard_normal((3, width)) + rng.standard_normal((700, width)) for width in (12, 20))
    return x + rng.uniform(-1, 1, 12), y


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_cka_equals_the_alignment_of_centred_kernels(related, dtype):
    x, y = (z.astype(dtype) for z in related)
    expected = cka_by_kernels(x, y)
    assert 0.2 < expected < 0.9
    assert linear_cka(x, y) == pytest.approx(expected, abs=1e-6)
    assert linear_cka(torch.from_numpy(x), torch.from_numpy(y)) == linear_cka(x, y)


def test_cka_ignores_rotation_scale_translation_and_direction(related, rng):
    x, y = related
    rotation, _ = np.linalg.qr(rng.standard_normal((20, 20)))
    expected = linear_cka(x, y)
    assert linear_cka(y, x) == pytest.approx(expected, abs=1e-6)
    assert linear_cka(x, y @ rotation * 1e-30 + rng.standard_normal(20) * 1e-28) == pytest.approx(expected, abs=1e-6)
    # It depends on the scale of a single dimension.
    assert abs(linear_cka(x, y * np.r_[100.0, np.ones(19)]) - expected) > 0.05


def test_cka_keeps_precision_far_from_zero(related):
    x, y = related
    assert linear_cka(x + 1e8, y - 1e8) == pytest.approx(cka_by_kernels(x, y), abs=1e-6)


def test_cka_keeps_the_contribution_of_many_small_samples_next_to_a_large_one():
    """One sample aligns the two; 9,999 oppose it, each by less than the float32 precision near 1."""
    small = np.where(np.arange(10_000) % 2, 1.6e-4, -1.6e-4)[:, None] * [1.0, 0.5]
    x, y = small.copy(), -small
    x[0] = y[0] = 1
    a, b = x - x.mean(0), y - y.mean(0)
    expected = np.linalg.norm(a.T @ b) ** 2 / (np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b))
    assert expected < 0.9996
    assert linear_cka(x, y) == pytest.approx(expected, abs=1e-6)


def test_a_representation_has_similarity_one_with_itself(related):
    x, _ = related
    assert linear_cka(x, x) == pytest.approx(1, abs=1e-6)
    assert mutual_knn(x, x) == 1


def test_unrelated_representations_are_near_chance(rng):
    x, y = rng.standard_normal((2, 1500, 16))
    # The expected CKA of unrelated Gaussian representations is about D / n.
    assert linear_cka(x, y) < 0.03
    assert mutual_knn(x, y) == pytest.approx(10 / 1499, rel=0.25)


@pytest.mark.parametrize("k", [1, 10, 40])
@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_mutual_neighbours_equal_brute_force(related, k, dtype):
    x, y = (z[:530].astype(dtype) for z in related)
    expected = mutual_by_hand(x, y, k)
    assert k / 529 * 2 < expected < 0.9
    assert mutual_knn(x, y, k) == pytest.approx(expected, abs=1e-12)
    assert mutual_knn(torch.from_numpy(y), torch.from_numpy(x), k) == pytest.approx(expected, abs=1e-12)


def test_mutual_neighbours_ignore_rotation_and_the_length_of_a_row(related, rng):
    x, y = related
    rotation, _ = np.linalg.qr(rng.standard_normal((20, 20)))
    assert mutual_knn(x, y @ rotation * rng.uniform(0.1, 10, (700, 1))) == mutual_knn(x, y)


def test_ties_between_neighbours_go_to_the_earlier_sample(rng):
    """Many samples are equal, like captions, but products of equal rows can differ; zeros are equally near to all."""
    x = rng.standard_normal((20, 333))[rng.integers(20, size=700)]
    x[rng.integers(700, size=6)] = 0
    y = rng.standard_normal((700, 3))
    assert mutual_knn(x, y) == pytest.approx(mutual_by_hand(x, y, 10), abs=1e-12)
    directions = np.eye(4)[[0, 0, 0, 1]]  # the nearest are 1, 0, 0, 0
    angles = np.array([0, 0.1, 0.3, 0.15])
    others = np.stack([np.cos(angles), np.sin(angles)], axis=1)  # the nearest are 1, 3, 3, 1
    assert mutual_knn(directions, others, k=1) == pytest.approx(1 / 4)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [0.0, 0.1, -1e8])
def test_a_constant_representation_has_similarity_nan(related, value):
    x, _ = related
    constant = np.full((700, 4), value)
    for a, b in [(x, constant), (constant, x), (constant, constant)]:
        assert math.isnan(linear_cka(a, b))
        assert math.isnan(mutual_knn(a, b))


def test_refuses_representations_of_different_or_too_few_samples(related):
    x, y = related
    for compare in (linear_cka, mutual_knn):
        with pytest.raises(NumericsError, match="of 700 and 699 samples"):
            compare(x, y[:-1])
    with pytest.raises(NumericsError, match="1 samples, where CKA needs at least 2"):
        linear_cka(x[:1], y[:1])
    with pytest.raises(NumericsError, match="10 samples, where 10 neighbours need at least 11"):
        mutual_knn(x[:10], y[:10])
    assert mutual_knn(x[:11], y[:11]) == 1  # all others are neighbours


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_refuses_non_finite_values(related, value):
    x, y = related
    y[612, 3] = value
    for compare in (linear_cka, mutual_knn):
        with pytest.raises(NumericsError, match="the second representation: sample 612 "):
            compare(x, y)


@pytest.fixture
def two_stores(tmp_path, write_activations, related, rng):
    """Stores ``a`` of layers 1 and 11 and ``b`` of layers 0 and 2, and their values as float16."""
    x, y = related
    layers = {
        "a": {1: x, 11: rng.standard_normal((700, 12))},
        "b": {0: y, 2: x[:, ::-1] @ rng.standard_normal((12, 20))},
    }
    return [
        (write_activations(tmp_path / f"{name}.zarr", {n: list(z[:, None]) for n, z in of.items()}), of)
        for name, of in layers.items()
    ]


def as_stored(x):
    return x.astype(np.float16)


def test_compares_two_stores_layer_by_layer(two_stores, tmp_path):
    (path_a, a), (path_b, b) = two_stores
    out = tmp_path / "similarity" / "a__b.csv"
    compare_stores(path_a, path_b, out)
    table = pd.read_csv(out)
    assert list(table.columns) == [
        "source_layer",
        "target_layer",
        "cka",
        "mutual_knn",
        "samples",
        "cka_null",
        "mutual_knn_null",
    ]
    assert table[["source_layer", "target_layer"]].to_numpy().tolist() == [[1, 0], [1, 2], [11, 0], [11, 2]]
    assert (table["samples"] == 700).all()
    for row in table.itertuples():
        x, y = as_stored(a[row.source_layer]), as_stored(b[row.target_layer])
        assert row.cka == pytest.approx(cka_by_kernels(x, y), abs=2e-6)
        assert row.mutual_knn == pytest.approx(mutual_by_hand(x, y, 10), abs=1e-6)
    assert table["cka"].nunique() == table["mutual_knn"].nunique() == 4


def test_large_data_sets_are_compared_on_their_first_samples(two_stores, tmp_path, monkeypatch):
    (path_a, a), (path_b, b) = two_stores
    monkeypatch.setattr(similarity, "CKA_SAMPLES", 300)
    monkeypatch.setattr(similarity, "NEIGHBOUR_SAMPLES", 200)
    compare_stores(path_a, path_b, tmp_path / "out.csv")
    first = pd.read_csv(tmp_path / "out.csv").iloc[0]
    x, y = as_stored(a[1]), as_stored(b[0])
    assert first["samples"] == 300
    assert first["cka"] == pytest.approx(cka_by_kernels(x[:300], y[:300]), abs=2e-6)
    assert first["mutual_knn"] == pytest.approx(mutual_by_hand(x[:200], y[:200], 10), abs=1e-6)


def test_a_constant_layer_has_empty_fields(two_stores, tmp_path, write_activations, related):
    (path_a, _), _ = two_stores
    path = write_activations(tmp_path / "c.zarr", {0: list(np.ones((700, 1, 4))), 5: list(related[1][:, None])})
    compare_stores(path_a, path, tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_text().splitlines()[1] == "1,0,,,700,,"
    assert pd.read_csv(tmp_path / "out.csv")["cka"].isna().tolist() == [True, False, True, False]


def test_refuses_stores_of_different_samples(two_stores, tmp_path, write_activations, related):
    (path_a, _), _ = two_stores
    path = write_activations(tmp_path / "c.zarr", {0: list(related[0][:, None])}, content_hash="others")
    with pytest.raises(StoreError, match=r"a\.zarr and .*c\.zarr have different samples"):
        compare_stores(path_a, path, tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()


@pytest.mark.parametrize("samples", [1, 10])
def test_refuses_stores_of_too_few_samples(samples, tmp_path, write_activations, rng):
    paths = [
        write_activations(tmp_path / name, {0: list(rng.standard_normal((samples, 1, 4)))})
        for name in ("a.zarr", "b.zarr")
    ]
    with pytest.raises(NumericsError, match=rf"a\.zarr: {samples} samples; 10 nearest .* at least 11, so use more"):
        compare_stores(*paths, tmp_path / "out.csv")


def test_names_a_layer_with_non_finite_values(two_stores, tmp_path, write_activations, related):
    (path_a, _), _ = two_stores
    broken = related[1].copy()
    broken[640, 2] = np.nan
    path = write_activations(tmp_path / "c.zarr", {0: list(related[1][:, None]), 3: list(broken[:, None])})
    with pytest.raises(NumericsError, match=r"c\.zarr, layer 3: sample 640 "):
        compare_stores(path_a, path, tmp_path / "out.csv")
    assert list(tmp_path.glob("out.csv*")) == []


def test_refuses_a_store_of_another_kind(two_stores, tmp_path, write_features):
    (path_a, _), _ = two_stores
    path = write_features(tmp_path, "c@0", {0: np.ones((700, 4))})
    with pytest.raises(StoreError, match="but one of 'activations' is needed"):
        compare_stores(path_a, path, tmp_path / "out.csv")


def test_the_null_of_cka_is_its_mean_over_random_pairings(rng):
    x, y = rng.normal(size=(40, 5)) * [9, 3, 1, 1, 1], rng.normal(size=(40, 30))
    null = cka_null(*(similarity._centred(torch.from_numpy(values)) for values in (x, y)))
    values = [linear_cka(x[rng.permutation(40)], y) for _ in range(400)]
    assert null == pytest.approx(np.mean(values), abs=4 * np.std(values) / 20)
