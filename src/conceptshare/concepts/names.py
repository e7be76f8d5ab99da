"""Stage `names`: names of features, from the captions of their strongest samples.

`name_features` writes a table with one row per feature. Even-numbered samples propose names, odd-numbered samples are
held out to evaluate them; the data set is shuffled, so both halves are random samples of it. Candidates are found by
the log-odds of Monroe, Colaresi and Quinn (2008) and must hold on the held-out captions; otherwise the feature has no
clear name.
"""

import json
import re
import shlex
import subprocess
import tempfile
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.stats import norm, rankdata
from sklearn.feature_extraction.text import CountVectorizer

from conceptshare.data.dataset import Data
from conceptshare.io import provenance
from conceptshare.io.errors import StudyError
from conceptshare.io.files import CSV, PARQUET, Unchanged, atomic_output
from conceptshare.io.parquet import write_parquet
from conceptshare.io.progress import info, progress
from conceptshare.io.readers import (
    FEATURES,
    FeatureStatistics,
    LayerFeatures,
    check_samples,
    read_kept_features,
    read_statistics,
)
from conceptshare.io.sizes import FEATURE_COLUMNS, MEASURED_SAMPLES, SHOWN_SAMPLES
from conceptshare.io.store import open_store

ERROR_RATE = 0.05
"""Maximum probability that any word of the vocabulary passes the threshold for a meaningless feature."""
MIN_SAMPLES = 5
"""Minimum number of naming samples that activate a feature for it to be named."""
MIN_CAPTIONS = 3
"""Minimum number of naming captions with a word of the vocabulary. Rarer words cannot pass, and would only raise the
threshold for all others."""
MAX_TOP_SAMPLES = 50
"""Maximum number of naming samples that a feature is named by, see `top_count`."""
MAX_WORDS = 3
"""Maximum number of terms in a name, each a word or a pair of adjacent words."""
CLEAREST_NAMES = 20
"""Number of names per layer in the list of the clearest names."""

_SCHEMA = pa.schema(
    [
        *(("layer", pa.int32()), ("feature", pa.int32()), ("name", pa.string()), ("candidate", pa.string())),
        *((measure, pa.float64()) for measure in ("score", "auc", "auc_low", "auc_active")),
        *(("held_out", pa.int32()), ("density", pa.float64()), ("source", pa.string())),
    ]
)
_LISTED = ["layer", "feature", "name", "auc", "auc_low", "score", "held_out", "density"]
# Number of values ranked at a time, at about 50 bytes each.
_RANKED = 2**22
# Words are first counted by hash in this many bins. A word whose bin has fewer than `MIN_CAPTIONS` is rare.
_BINS = 2**27
# Separators across which words are not adjacent: punctuation except apostrophes and hyphens within words.
_BREAKS = re.compile(r"[^\w\s'’-]+|\s-+\s")
_EVIDENCE = 20
_MAX_NAME_LENGTH = 80
_Z = float(norm.isf(0.025))

_Names = dict[tuple[int, int], str | None]
"""Names that a command gave, by layer and feature."""


@dataclass(frozen=True)
class _Words:
    """The vocabulary, and the words of each caption."""

    vocabulary: list[str]
    """``[V]`` sorted."""
    naming: csr_array
    """``[n, V]`` 1 if the caption of sample 2i has the word."""
    held_out: csr_array
    """``[m, V]`` 1 if the caption of sample 2i + 1 has the word, for the samples that names are evaluated on."""
    split: Callable[[str], list[str]]
    """Splits a text into words and pairs of adjacent words."""

    @cached_property
    def index(self) -> dict[str, int]:
        """Index of each word in the vocabulary."""
        return {word: place for place, word in enumerate(self.vocabulary)}

    @property
    def threshold(self) -> float:
        """Threshold on z: the normal quantile at `ERROR_RATE` with a Bonferroni correction for V words."""
        return float(norm.isf(ERROR_RATE / max(1, len(self.vocabulary))))


class _Candidate(NamedTuple):
    """A candidate name of a feature."""

    text: str | None
    words: list[int]
    """Indices of its words in the vocabulary."""
    score: float
    """z of its best word."""
    passed: bool
    """Whether it passed the threshold, so that the held-out captions decide."""
    source: str


_NONE = _Candidate(None, [], float("nan"), False, "captions")


class _Measures(NamedTuple):
    """How well captions with any of a name's words predict its feature on held-out samples, ``[F]`` each."""

    auc: NDArray[np.float64]
    auc_low: NDArray[np.float64]
    auc_active: NDArray[np.float64]
    held_out: NDArray[np.int64]


@dataclass(frozen=True)
class _Layer:
    """A layer of a feature store."""

    number: int
    statistics: FeatureStatistics
    values: LayerFeatures
    """``[N, F]``"""

    def top(self, block: slice) -> list[NDArray[np.int32]]:
        """Top naming samples of each feature of a block, numbered within the naming half, strongest first."""
        return [row[(row >= 0) & (row % 2 == 0)] // 2 for row in self.statistics.top_samples[block]]

    def blocks(self) -> list[slice]:
        """Blocks of features that are read at a time."""
        return [slice(start, start + FEATURE_COLUMNS) for start in range(0, self.values.shape[1], FEATURE_COLUMNS)]


def name_features(features: Path, data: Path, out: Path, command: str | None = None) -> None:
    """Name every feature of every layer of a feature store from captions; write the table ``out`` (.parquet).

    Columns: ``layer``, ``feature``; ``name``, null if there is no clear name; ``candidate``, the best words, null if
    there are none; ``score``, z of the best word; ``auc``, ``auc_low`` and ``auc_active`` on the held-out half;
    ``held_out``, the number of its captions with any of the words; ``density``; and ``source``, ``captions`` or
    ``command``.

    A name is clear if z is significant at `ERROR_RATE` after Bonferroni correction over the vocabulary, the 95%
    interval of the held-out AUC is above 0.5, and a third of the `SHOWN_SAMPLES` strongest samples have any of its
    words. The `CLEAREST_NAMES` names of each layer, those with the highest ``auc_low``, are also written to
    ``{name}.clearest.csv`` next to the table, clearest first.

    Args:
        features: the feature store.
        data: the folder of its data set.
        out: the table to write.
        command: a command line that reads each feature's evidence as JSON lines and prints names as JSON lines, which
            replace the candidates; then only the held-out captions decide. The command is not asked for features with
            fewer than `MIN_SAMPLES` samples.

    Raises:
        StoreError: if the store is incomplete or damaged, or was made from another data set.
        DatasetError: if the data set cannot be read.
        StudyError: if the command fails, or does not print a name for each feature.
    """
    inputs = Unchanged(features, data)
    store: Any = open_store(features, FEATURES)
    spec: Any = store.attrs["spec"]
    samples = Data(data)
    check_samples(features, data, samples.content_hash)
    words = _read_words(samples)
    stored = read_kept_features(features)
    if stored is None:
        from conceptshare.sae.features import read_features  # loads torch, which is not needed for kept features

        stored = read_features(features)
    layers = [_Layer(layer, statistics, stored[layer]) for layer, statistics in read_statistics(features).items()]
    member = f"{spec['name']}@{spec['seed']}"
    names = None if command is None else _ask(command, member, layers, words, samples)
    blocks = [(layer, block) for layer in layers for block in layer.blocks()]
    rows: list[tuple[Any, ...]] = []
    for layer, block in progress(blocks, len(blocks), f"names of {member}", "blocks"):
        rows += _rows(layer, block, words, samples, names)
    table = pa.Table.from_pylist([dict(zip(_SCHEMA.names, row, strict=True)) for row in rows], _SCHEMA)
    with atomic_output(out, PARQUET) as partial, inputs:
        write_parquet(table, partial, out.stem, {"features": {member: store.attrs["digest"]}})
        with atomic_output(out.with_name(f"{out.stem}.clearest.csv"), CSV) as clearest:
            _clearest(table.to_pandas()).to_csv(clearest, index=False, float_format="%.6g", lineterminator="\n")
        provenance.record(out)
    clear = len(rows) - table["name"].null_count
    info(
        f"names of {member}: {clear:,} of {len(rows):,} features have a clear name (vocabulary of "
        f"{len(words.vocabulary):,} words, z above {words.threshold:.2f})"
    )


def top_count(samples: int) -> int:
    """Number of naming samples that a feature is named by: the strongest 5%, at least 5 and at most 50.

    In a small data set, more would include ordinary samples; with fewer, common words could not pass the threshold.
    """
    return min(MAX_TOP_SAMPLES, max(MIN_SAMPLES, samples // 40))


def log_odds(top: csr_array, words: csr_array) -> csr_array:
    """z of the log-odds of each word in the top samples of each feature against the remaining samples.

    Monroe, Colaresi and Quinn (2008), "Fightin' Words", with an informative Dirichlet prior. With y the count of a
    word, n that of all words, and the prior ``a_w = a_0 y_w / n`` from the whole naming half,

        delta_w = log((y_w + a_w) / (n + a_0 - y_w - a_w)) of the top samples, minus the same of the rest
        z_w = delta_w / sqrt(1 / (y_w(top) + a_w) + 1 / (y_w(rest) + a_w))

    ``a_0`` is the number of words V, one count per word on average, so that the prior has the same weight for any size
    of vocabulary. Without a prior, a word in no other caption would have infinite odds; a much weaker prior would give
    it too large a variance, and a much stronger one odds of 0.

    Args:
        top: ``[F, n]`` 1 if a sample is among the feature's top samples.
        words: ``[n, V]`` 1 if its caption has the word.

    Returns:
        ``[F, V]`` float64, only with the values for words in top samples; z of all others is negative. Without any
        value for a vocabulary of one word, whose odds are always infinite.
    """
    V = words.shape[1]
    if V < 2:
        return csr_array((top.shape[0], V))
    y_top = _counts(top, words)
    y_all = words.sum(axis=0, dtype=np.float64)
    n_all = y_all.sum()
    n_top = np.repeat(y_top.sum(axis=1), np.diff(y_top.indptr))
    prior = V * y_all[y_top.indices] / n_all
    in_top = y_top.data + prior
    in_rest = y_all[y_top.indices] - y_top.data + prior
    delta = np.log(in_top / (n_top + V - in_top)) - np.log(in_rest / (n_all - n_top + V - in_rest))
    z = delta / np.sqrt(1 / in_top + 1 / in_rest)
    return csr_array((z, y_top.indices, y_top.indptr), shape=y_top.shape)


def lower_end(
    auc: NDArray[np.float64], positives: NDArray[np.int64], negatives: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Lower end of an AUC's 95% interval: the smallest theta with ``auc - theta <= 1.96 SE(theta)``.

    SE is that of Hanley and McNeil (1982), at theta instead of the AUC (a score interval, as in Newcombe 2006, part 2):
    at an AUC of 1 it would be 0, so a single caption that happens to rank first would count as certain.

        SE^2 = (theta (1 - theta) + (p - 1) (Q1 - theta^2) + (q - 1) (Q2 - theta^2)) / (p q)
        Q1 = theta / (2 - theta), Q2 = 2 theta^2 / (1 + theta), for p positives and q negatives

    Args:
        auc: ``[F]``
        positives: ``[F]`` p.
        negatives: ``[F]`` q.

    Returns:
        ``[F]``, NaN if the AUC is NaN.
    """
    p, q = positives.astype(np.float64), negatives.astype(np.float64)
    low, high = np.zeros_like(auc), auc.copy()
    # Bisection: after 60 steps the bracket is below float64 precision.
    with np.errstate(divide="ignore", invalid="ignore"):
        for _ in range(60):
            theta = (low + high) / 2
            of_positives, of_negatives = theta / (2 - theta) - theta**2, 2 * theta**2 / (1 + theta) - theta**2
            variance = (theta * (1 - theta) + (p - 1) * of_positives + (q - 1) * of_negatives) / (p * q)
            outside = auc - theta > _Z * np.sqrt(variance)
            low, high = np.where(outside, theta, low), np.where(outside, high, theta)
    return np.where(np.isnan(auc), np.nan, low)


def _clearest(table: pd.DataFrame) -> pd.DataFrame:
    """The clearest names of each layer, clearest first."""
    order = table[table.name.notna()].sort_values(["layer", "auc_low"], ascending=[True, False], kind="stable")
    return order.groupby("layer").head(CLEAREST_NAMES)[_LISTED]


def _counts(top: csr_array, words: csr_array) -> csr_array:
    """``[F, V]`` number of each feature's top samples with each word; see `log_odds`."""
    used = np.unique(top.indices)
    # Restricted to these samples, because a product copies both factors.
    counts = csr_array(top[:, used].astype(np.float64) @ words[used].astype(np.float64))
    counts.sort_indices()
    return counts


def splitter(longest: int) -> Callable[[str], list[str]]:
    """Returns a function that splits a text into words, and phrases of up to ``longest`` adjacent words."""
    phrases = CountVectorizer(stop_words="english", ngram_range=(1, longest)).build_analyzer()

    def split(text: str) -> list[str]:
        # Compose accented letters to one character, because combining characters would split words.
        clauses = _BREAKS.split(unicodedata.normalize("NFC", text))
        return [word for clause in clauses for word in phrases(clause)]

    return split


def _read_words(data: Data) -> _Words:
    split = splitter(2)
    naming, held_out = range(0, len(data), 2), range(1, min(len(data), MEASURED_SAMPLES), 2)
    bins = bytearray(_BINS)
    for row in naming:
        for place in {crc32(word.encode()) % _BINS for word in split(data.caption(row))}:
            bins[place] = min(bins[place] + 1, MIN_CAPTIONS)

    def common(text: str) -> list[str]:
        return [word for word in split(text) if bins[crc32(word.encode()) % _BINS] == MIN_CAPTIONS]

    counter = CountVectorizer(analyzer=common, binary=True, min_df=MIN_CAPTIONS, dtype=np.int32)
    try:
        naming_words = csr_array(counter.fit_transform(map(data.caption, naming)))
    except ValueError:  # no word is in enough captions
        return _Words([], csr_array((len(naming), 0)), csr_array((len(held_out), 0)), split)
    held_out_words = csr_array(counter.transform(map(data.caption, held_out)))
    return _Words(counter.get_feature_names_out().tolist(), naming_words, held_out_words, split)


def _candidates(layer: _Layer, block: slice, words: _Words, names: _Names | None = None) -> list[_Candidate]:
    """Candidate names of each feature of a block: from the command if it named the feature, else from captions."""
    count = top_count(layer.values.shape[0])
    rows = [row[:count] if len(row) >= MIN_SAMPLES else row[:0] for row in layer.top(block)]
    indices, ends = np.concatenate(rows), np.cumsum([0, *map(len, rows)])
    top = csr_array((np.ones(len(indices)), indices, ends), shape=(len(rows), words.naming.shape[0]))
    scores = log_odds(top, words.naming)
    counts = _counts(top, words.naming)
    candidates = []
    for feature, (start, stop) in enumerate(pairwise(scores.indptr.tolist()), block.start):
        places, z = scores.indices[start:stop], scores.data[start:stop]
        if names is not None and (layer.number, feature) in names:
            candidates.append(_named(names[layer.number, feature], places, z, words))
        else:
            candidates.append(_candidate(places, z, counts.data[start:stop], words))
    return candidates


def _candidate(
    places: NDArray[np.int32], z: NDArray[np.float64], counts: NDArray[np.float64], words: _Words
) -> _Candidate:
    """The best words of one feature, given the words of its top captions, their z and their counts."""
    order = np.lexsort((places, -z))
    order = order[z[order] > 0]
    if not len(order):
        return _NONE
    passing = order[z[order] > words.threshold]
    of_word = {words.vocabulary[places[i]]: i for i in passing}
    # Prefer "playing card" to "card" if at least half of the captions with "card" have the pair.
    inside = {
        word
        for pair, i in of_word.items()
        if " " in pair
        for word in pair.split()
        if word in of_word and 2 * counts[i] >= counts[of_word[word]]
    }
    chosen: dict[str, int] = {}
    used: set[str] = set()
    for word, i in of_word.items():
        if word not in inside and used.isdisjoint(word.split()) and len(chosen) < MAX_WORDS:
            chosen[word] = i
            used.update(word.split())
    best = list(chosen.values()) or [order[0]]
    return _Candidate(
        ", ".join(words.vocabulary[places[i]] for i in best),
        [int(places[i]) for i in best],
        float(z[best].max()),
        bool(chosen),
        "captions",
    )


def _named(text: str | None, places: NDArray[np.int32], z: NDArray[np.float64], words: _Words) -> _Candidate:
    """A name from the command, with z of its best word in the top captions."""
    known = sorted({words.index[word] for word in words.split(text or "") if word in words.index})
    z_of_known = z[np.isin(places, known)]
    score = float(z_of_known.max()) if len(z_of_known) else float("nan")
    return _Candidate(text, known, score, True, "command")


def _rows(layer: _Layer, block: slice, words: _Words, data: Data, names: _Names | None) -> Iterator[tuple[Any, ...]]:
    """The rows of the table for a block of features."""
    candidates = _candidates(layer, block, words, names)
    measured = _measures(layer.values, block, candidates, words.held_out)
    density, tops = layer.statistics.density[block].tolist(), layer.statistics.top_samples[block]
    for i, candidate in enumerate(candidates):
        auc, low, active, captions = (values[i].item() for values in measured)
        clear = candidate.passed and low > 0.5 and _is_shown(candidate, tops[i], words, data)
        yield (
            *(layer.number, block.start + i, candidate.text if clear else None, candidate.text, candidate.score),
            *(auc, low, active, captions, density[i], candidate.source),
        )


def _is_shown(candidate: _Candidate, top: NDArray[np.int32], words: _Words, data: Data) -> bool:
    """Whether a third of the strongest samples have any of a candidate's words; not required of a command's names."""
    strongest = top[top >= 0][:SHOWN_SAMPLES].tolist()
    own = {words.vocabulary[place] for place in candidate.words}
    having = sum(not own.isdisjoint(words.split(data.caption(sample))) for sample in strongest)
    return candidate.source == "command" or 3 * having >= len(strongest)


def _measures(stored: LayerFeatures, block: slice, candidates: Sequence[_Candidate], held_out: csr_array) -> _Measures:
    """Evaluate a block of features; NaN if there is nothing to compare."""
    (m, V), F = held_out.shape, len(candidates)
    counts = np.array([len(each.words) for each in candidates])
    places = [place for each in candidates for place in each.words]
    chosen = csr_array((np.ones(len(places), np.int32), places, [0, *np.cumsum(counts)]), shape=(F, V))
    hits = csr_array(chosen @ held_out.T)
    positives = np.diff(hits.indptr).astype(np.int64)
    rank_sums, active, active_hits = np.zeros(F), np.zeros(F), np.zeros(F)
    named = np.flatnonzero(positives)
    per_block = max(1, _RANKED // m)
    if len(places):
        values = stored[:MEASURED_SAMPLES, block][1::2]
        active = (values > 0).sum(axis=0)
    for columns in (named[start : start + per_block] for start in range(0, len(named), per_block)):
        ranks = rankdata(values[:, columns], axis=0)
        for column, rank in zip(columns, ranks.T, strict=True):
            rows = hits.indices[hits.indptr[column] : hits.indptr[column + 1]]
            # Ranks are multiples of 0.5, whose sum is exact in any order.
            rank_sums[column] = rank[rows].sum()
            active_hits[column] = (values[rows, column] > 0).sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        auc = (rank_sums - positives * (positives + 1) / 2) / (positives * (m - positives))
        auc_active = (1 + active_hits / active - (positives - active_hits) / (m - active)) / 2
    auc_active[counts == 0] = np.nan
    return _Measures(auc, lower_end(auc, positives, m - positives), auc_active, positives)


def _ask(command: str, member: str, layers: Sequence[_Layer], words: _Words, data: Data) -> _Names:
    """Run a command that names each feature with enough top samples, by layer and feature; see `name_features`.

    Args:
        command: the command line.
        member: the member's name.
        layers: its layers.
        words: the vocabulary.
        data: the samples.

    Raises:
        StudyError: if the command fails, or does not print a name for each feature.
    """
    with tempfile.TemporaryFile() as evidence:
        asked = set()
        blocks = [(layer, block) for layer in layers for block in layer.blocks()]
        for layer, block in progress(blocks, len(blocks), f"evidence of {member}", "blocks"):
            for feature, line in _evidence(layer, block, words, data):
                asked.add((layer.number, feature))
                evidence.write(
                    json.dumps({"member": member, "layer": layer.number, "feature": feature} | line).encode()
                )
                evidence.write(b"\n")
        evidence.seek(0)
        info(f"names of {member}: asking the command for {len(asked):,}")
        try:
            done = subprocess.run(shlex.split(command), stdin=evidence, capture_output=True, check=False)
        except (OSError, ValueError, IndexError) as error:  # missing program, unbalanced quotes, blank command
            raise StudyError(f"{command!r} cannot be run ({error}); fix the command that names features") from None
    messages = done.stderr.decode(errors="replace").strip().splitlines()

    def wrong(problem: str) -> StudyError:
        last = f"; its last line on standard error: {messages[-1].strip()}" if messages else ""
        return StudyError(
            f"{command!r}, called to name the features of {member}, {problem}{last}; fix it and run again"
        )

    if done.returncode != 0:
        raise wrong(f"ended with exit code {done.returncode}")
    names: _Names = {}
    for number, reply in enumerate(done.stdout.splitlines(), 1):
        if not reply.strip():
            continue
        try:
            answer = json.loads(reply)
            place, name = (answer["layer"], answer["feature"]), answer["name"]
            if not isinstance(name, str | None) or place not in asked:
                raise ValueError("not a string or null as the name of a requested feature")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            shown = reply[:80].decode(errors="replace")
            raise wrong(f"printed {shown!r} as line {number} ({type(error).__name__}: {error})") from None
        names[place] = _clean(name or "")
    if missing := sorted(asked - names.keys()):
        first = f"such as feature {missing[0][1]} of layer {missing[0][0]}"
        raise wrong(f"left out {len(missing)} of {len(asked)} features, {first}")
    return names


def _evidence(layer: _Layer, block: slice, words: _Words, data: Data) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the evidence for a command on each feature of a block with enough top samples.

    The ``others`` are drawn from samples that do not activate the feature or, if there are too few, activate it least.
    """
    tops = layer.top(block)
    if all(len(top) < MIN_SAMPLES for top in tops):
        return
    values = layer.values[:MEASURED_SAMPLES, block][::2]
    for i, (top, candidate) in enumerate(zip(tops, _candidates(layer, block, words), strict=True)):
        if len(top) < MIN_SAMPLES:
            continue
        feature = block.start + i
        order = np.random.default_rng([layer.number, feature]).permutation(len(values))
        order = order[np.argsort(values[order, i], kind="stable")]
        others = order[~np.isin(order, top)][:_EVIDENCE]
        yield (
            feature,
            {
                "candidate": candidate.text,
                "top": [data.caption(2 * row) for row in top[:_EVIDENCE].tolist()],
                "others": [data.caption(2 * row) for row in others.tolist()],
            },
        )


def _clean(name: str) -> str | None:
    """Put a name on one line, without invisible characters such as control characters; None if it is empty."""
    line = " ".join(name.split())
    shown = "".join(letter for letter in line if unicodedata.category(letter) not in ("Cc", "Cf", "Cs"))
    return shown[:_MAX_NAME_LENGTH].strip() or None
