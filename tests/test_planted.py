"""Encoders with planted features: what is planted, and what the scores find of it with SAEs that recover it exactly."""

import numpy as np
import pytest
from benchmarks.planted import ENCODERS, World, compare, encoders, found_by, make_saes, planted, reported


def test_features_have_their_densities_and_correlations():
    world = World("", correlation=0.8, densities=(0.1, 0.3), samples=5000)
    features = planted(40, world, np.random.default_rng(0))
    density = (features > 0).mean(0)
    assert density.min() > 0.0999
    assert density.max() < 0.3001
    r = np.corrcoef(features > 0, rowvar=False)
    same = np.equal.outer(np.arange(40) // 4, np.arange(40) // 4) & ~np.eye(40, dtype=bool)
    assert r[same].min() > 0.3
    assert np.abs(r[~same & ~np.eye(40, dtype=bool)]).max() < 0.1


def test_encoders_share_the_features_of_common_blocks_alone():
    made = encoders(World("", crowding=2, noise=0.5, samples=2000))
    for name, (width, blocks) in ENCODERS.items():
        tokens, features, directions, names = made[name]
        assert features.shape == (2000, 2 * sum(blocks.values()))
        assert directions.shape == (2 * width, width)
        signal = features @ directions
        assert (tokens - signal).std() == pytest.approx(0.5 * signal.std(), rel=0.02)
        other = made["b" if name == "a" else "a"]
        r = np.corrcoef(features, other.features, rowvar=False)[: len(names), len(names) :]
        same = names[:, None] == other.names
        assert same.sum() == (48 if name == "c" else 64)
        assert (r[same] > 0.999).all()
        assert r[~same].max() < 0.5


def test_oracles_find_the_planted_share_whatever_the_width_of_the_target(tmp_path):
    made = encoders(World("sparse", samples=2048))
    make_saes(made, None, tmp_path)
    saes, scores = reported(made, compare(made, tmp_path), {})
    assert (saes.recovered == 1).all()
    assert saes["S of found"].min() > 0.99
    np.testing.assert_allclose(scores.excess, scores.planted, atol=0.02)
    assert (scores.wmppc > scores.excess + 0.02).all()
    by_pair = scores.set_index("pair")
    assert by_pair.excess["a to b"] == pytest.approx(by_pair.excess["a to b-wide"], abs=0.01)
    assert (scores[["matched", "counted"]] == 1).all(axis=None)
    assert scores.precision.min() > 0.9
    assert (by_pair.loc["a to b", ["rank", "calibrated_rank"]] == 1).all()


def test_a_latent_has_found_the_feature_that_it_correlates_with():
    encoder = encoders(World("sparse", samples=500))["b"]
    latents = np.stack([encoder.features[:, 5], 3 * encoder.features[:, 40] + 1, np.zeros(500)], axis=1)
    names, r = found_by(encoder, latents)
    assert names.tolist() == ["ab 5", "b 8", ""]
    assert np.flatnonzero(r > 0.999).tolist() == [5, 40]
