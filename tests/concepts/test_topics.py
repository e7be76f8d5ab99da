"""Words of top features: planted ones are found, and p-values are those of random sets."""

import numpy as np
import pandas as pd
import pytest

from conceptshare.concepts import topics
from conceptshare.concepts.topics import topics_table
from conceptshare.io.readers import FeatureStatistics

FEATURES, TOP, SAMPLES = 600, 6, 900
COMMON = ["red", "blue", "green", "small", "large"]


class Captions:
    """A data set with nothing but captions."""

    def __init__(self, captions):
        self.captions = captions

    def caption(self, row):
        return self.captions[row]


@pytest.fixture
def planted(rng):
    """Top features whose samples show tea pots, among others that show anything; the last is never active."""
    captions = [" ".join(rng.choice(COMMON, 2, replace=False)) for _ in range(SAMPLES)]
    captions[:60] = [f"tea pot, {caption}" for caption in captions[:60]]
    top_samples = rng.integers(0, SAMPLES, (FEATURES, 20)).astype(np.int32)
    top_samples[:TOP, :9] = rng.integers(0, 60, (TOP, 9))
    top_samples[:TOP, 6:9] = -1  # active on six samples
    top_samples[-1] = -1
    order = rng.permutation(np.arange(TOP, FEATURES))
    calibrated = np.argsort(rng.permutation(FEATURES)) + 1
    ranking = pd.DataFrame({"layer": 4, "feature": [*range(TOP), *order], "rank": range(1, FEATURES + 1)})
    statistics = {4: FeatureStatistics(*np.ones((3, FEATURES)), top_samples)}
    return ranking.assign(calibrated_rank=calibrated), statistics, Captions(captions)


def test_planted_words_are_those_of_the_top_features(planted):
    table = topics_table(*planted)
    published = table[~table.calibrated].set_index("word")
    assert set(published.index[published.q <= 0.05]) == {"tea", "pot"}
    assert published.features["tea"] == TOP
    assert published.top_share["tea"] == pytest.approx(1)
    assert published.p["tea"] == pytest.approx(1 / 100_001)
    assert not (table[table.calibrated].q <= 0.05).any()


def test_shares_and_p_values_equal_a_direct_computation(planted, monkeypatch):
    monkeypatch.setattr(topics, "PERMUTATIONS", 2000)
    ranking, statistics, data = planted
    table = topics_table(ranking, statistics, data)
    rows = table[~table.calibrated].set_index("word")
    rng = np.random.default_rng(5)
    for word in COMMON[:2]:
        shares = np.array(
            [
                np.mean([word in data.caption(n).split() for n in row[:9] if n >= 0])
                for row in statistics[4].top_samples[:-1]
            ]
        )
        assert rows.share[word] == pytest.approx(shares.mean())
        observed = shares[:TOP].mean()
        assert rows.top_share[word] == pytest.approx(observed)
        random = [rng.choice(shares, TOP, replace=False).mean() for _ in range(4000)]
        assert rows.p[word] == pytest.approx(np.mean(np.array(random) >= observed - 1e-9), abs=0.04)


def test_random_tops_rarely_have_a_word_at_a_false_discovery_rate_of_5_percent(rng, monkeypatch):
    """Rare words, of which thousands are in a few features each, are where a wrong choice of tests would show."""
    monkeypatch.setattr(topics, "PERMUTATIONS", 5000)
    frequency = 1 / np.arange(1, 2001)
    captions = [" ".join(f"w{n}" for n in rng.choice(2000, 8, p=frequency / frequency.sum())) for _ in range(800)]
    top_samples = rng.integers(0, 800, (500, 9)).astype(np.int32)
    statistics = {4: FeatureStatistics(*np.ones((3, 500)), top_samples)}
    found = 0
    for _ in range(12):
        ranks = [np.argsort(rng.permutation(500)) + 1 for _ in range(2)]
        ranking = pd.DataFrame({"layer": 4, "feature": range(500), "rank": ranks[0], "calibrated_rank": ranks[1]})
        table = topics_table(ranking, statistics, Captions(captions))
        found += len(set(table.calibrated[table.q <= 0.05]))
    assert found <= 4  # of 24; 1.2 are expected


def test_captions_without_words_have_no_topics(planted):
    ranking, statistics, _ = planted
    table = topics_table(ranking, statistics, Captions(["!"] * SAMPLES))
    assert table.empty
    assert list(table.columns) == ["calibrated", "word", "features", "top_share", "share", "p", "q"]
