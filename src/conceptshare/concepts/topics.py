"""What a ranking's top features are about: caption words that are more frequent among them than among all features."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.stats import false_discovery_control
from sklearn.feature_extraction.text import CountVectorizer

from conceptshare.analysis.tables import top_count
from conceptshare.concepts.names import splitter
from conceptshare.data.dataset import Data
from conceptshare.io.readers import FeatureStatistics
from conceptshare.io.sizes import SHOWN_SAMPLES

PERMUTATIONS = 100_000
"""Number of random sets of features that p-values are from."""
MIN_FEATURES = 2
"""Minimum number of features with a word that is tested, of all and not of the top ones, for q to be valid."""
_TOGETHER = 500
"""Random sets counted at a time."""


def topics_table(ranking: pd.DataFrame, statistics: dict[int, FeatureStatistics], data: Data) -> pd.DataFrame:
    """Caption words by how frequent they are among a ranking's top features, the least probable by chance first.

    A feature's share of a word is the fraction of its strongest samples, at most 9, whose captions have the word.
    ``top_share`` is the mean over the top 1% of the ranking, ``share`` over all features that are ever active. ``p`` is
    the probability that as many random ones of these have as large a mean, and ``q`` the false discovery rate at which
    it counts (Benjamini and Hochberg, 1995), among the words that at least as many of all features have as the top has.
    ``features`` is the number of top features with the word.

    Args:
        ranking: a table of `analysis.tables.ranking`.
        statistics: the statistics of the source's features, by layer.
        data: the samples.

    Returns:
        ``calibrated, word, features, top_share, share, p, q``: first the words of the published ranking's top 1%, then
        those of the calibrated one's.
    """
    top_samples = statistics[int(ranking.layer[0])].top_samples[:, :SHOWN_SAMPLES]
    words, shares = _shares(top_samples, data)
    tables = []
    for calibrated, column in ((False, "rank"), (True, "calibrated_rank")):
        order = ranking.sort_values(column).feature.to_numpy()
        active = order[(top_samples[order] >= 0).any(axis=1)]
        top = order[: top_count(len(order))]
        top = top[np.isin(top, active)]
        table = _enriched(words, shares, top, active)
        tables.append(table.assign(calibrated=calibrated))
    return pd.concat(tables, ignore_index=True)[["calibrated", "word", "features", "top_share", "share", "p", "q"]]


def _shares(top_samples: NDArray[np.int32], data: Data) -> tuple[NDArray[np.object_], csr_array]:
    """Words, and ``[F, V]`` each feature's share of each."""
    rows, columns = np.nonzero(top_samples >= 0)
    samples, places = np.unique(top_samples[rows, columns], return_inverse=True)
    counter = CountVectorizer(analyzer=splitter(1), binary=True)
    try:
        in_captions = csr_array(counter.fit_transform([data.caption(int(sample)) for sample in samples]))
    except ValueError:  # no caption has a word
        return np.empty(0, object), csr_array((len(top_samples), 0))
    each = 1 / np.bincount(rows, minlength=len(top_samples))[rows]
    of_features = csr_array((each, (rows, places)), shape=(len(top_samples), len(samples)))
    return counter.get_feature_names_out(), of_features @ in_captions


def _enriched(
    words: NDArray[np.object_], shares: csr_array, top: NDArray[np.int64], active: NDArray[np.int64]
) -> pd.DataFrame:
    """Words by how frequent they are among the top features; those of few features are not tested."""
    tested = np.asarray((shares[active] > 0).sum(axis=0)).ravel() >= max(MIN_FEATURES, len(top))
    words, shares = words[tested], csr_array(shares.tocsc()[:, tested])
    observed = np.asarray(shares[top].sum(axis=0)).ravel()
    as_large = np.ones(len(words))
    for sets in _random_sets(len(top), active, shares.shape[0]):
        # Sums of equal shares in another order may differ in the last digit.
        as_large += ((sets @ shares).toarray() >= observed - 1e-9).sum(axis=0)
    p = as_large / (PERMUTATIONS + 1)
    table = pd.DataFrame(
        {
            "word": words,
            "features": np.asarray((shares[top] > 0).sum(axis=0)).ravel(),
            "top_share": observed / max(1, len(top)),
            "share": np.asarray(shares[active].mean(axis=0)).ravel(),
            "p": p,
            "q": false_discovery_control(p) if len(p) else p,
        }
    )
    shown = table[table.features > 0]
    return shown.sort_values(["p", "top_share"], ascending=[True, False], kind="stable", ignore_index=True)


def _random_sets(size: int, active: NDArray[np.int64], count: int) -> Iterator[Any]:
    """``[n, F]`` 1 for each feature of a random set, for `PERMUTATIONS` sets in all."""
    rng = np.random.default_rng(0)
    for start in range(0, PERMUTATIONS, _TOGETHER):
        n = min(_TOGETHER, PERMUTATIONS - start)
        chosen = [rng.choice(active, size, replace=False, shuffle=False) for _ in range(n)]
        ends = np.arange(0, n * size + 1, size)
        yield csr_array((np.ones(n * size), np.concatenate(chosen), ends), shape=(n, count))
