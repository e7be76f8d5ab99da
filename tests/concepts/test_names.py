"""Names: the paper's log-odds, measures equal to scikit-learn's and SciPy's, and no names for noise."""

import io
import json
import shlex
import subprocess
import sys
import tracemalloc
from itertools import pairwise

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy.optimize import brentq
from scipy.sparse import csr_array
from scipy.stats import mannwhitneyu, norm
from sklearn.metrics import roc_auc_score

from conceptshare.concepts import names
from conceptshare.concepts.names import log_odds, lower_end, name_features
from conceptshare.config.catalog import DatasetSpec
from conceptshare.data.dataset import Data, make_dataset
from conceptshare.io.errors import StoreError, StudyError

MEMBER = "made_up@0"
# As objects, so that nulls stay None.
TYPES = {"name": object, "candidate": object}
FILLING = [f"word{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]


def filling(rng, count):
    """Captions of five words, some of them common."""
    share = 1 / np.arange(1, len(FILLING) + 1)
    return [" ".join(rng.choice(FILLING, 5, replace=False, p=share / share.sum())) for _ in range(count)]


def planted(rng, count=400, word="zebra", every=10):
    """The same, with an extra word in every tenth."""
    return [f"{word} {text}" if n % every == 0 else text for n, text in enumerate(filling(rng, count))]


@pytest.fixture
def make_data(tmp_path):
    """Writes a data set of captions and reads it."""

    def make(captions, name="data"):
        buffer = io.BytesIO()
        Image.new("RGB", (4, 4), "red").save(buffer, "PNG")
        source = tmp_path / f"{name}.parquet"
        pq.write_table(pa.table({"image": [buffer.getvalue()] * len(captions), "caption": captions}), source)
        make_dataset(DatasetSpec(source=str(source)), tmp_path / name)
        return tmp_path / name

    return make


def captions_of(data):
    """Captions in sample order."""
    found = Data(data)
    return [found.caption(row) for row in range(len(found))]


@pytest.fixture
def name(tmp_path, write_features_from):
    """Writes features ``[N, F]`` of a data set, or a dictionary of them by layer, and returns the table of names."""

    def run(data, layers, folder="features", command=None):
        layers = layers if isinstance(layers, dict) else {0: layers}
        made = tmp_path / f"made-{folder}"
        store = write_features_from(made, tmp_path / folder, MEMBER, layers, Data(data).content_hash)
        out = tmp_path / folder / "names.parquet"
        name_features(store, data, out, command)
        table = pq.read_table(out)
        return pd.DataFrame(
            {column: pd.Series(table[column].to_pylist(), dtype=TYPES.get(column)) for column in table.column_names}
        )

    return run


def on(captions, word, rng, strength=2.0):
    """``[N]`` a feature that is strong on captions with a word, and weak and often zero elsewhere."""
    noise = np.maximum(rng.normal(-0.5, 0.5, len(captions)), 0)
    return noise + strength * np.array([word in text.split() for text in captions])


def has_any(candidate, caption):
    """Whether a caption of plain words contains any of a candidate's words."""
    return any(f" {word} " in f" {caption} " for word in candidate.split(", "))


def paper(top, words):
    """z by the paper's formula, one word at a time."""
    z = np.zeros((len(top), words.shape[1]))
    V, totals = words.shape[1], words.sum(0)
    for f, chosen in enumerate(top.astype(bool)):
        y_i, y_j = words[chosen].sum(0), words[~chosen].sum(0)
        n_i, n_j = y_i.sum(), y_j.sum()
        for w in range(V):
            a = V * totals[w] / totals.sum()
            one = np.log((y_i[w] + a) / (n_i + V - y_i[w] - a))
            other = np.log((y_j[w] + a) / (n_j + V - y_j[w] - a))
            z[f, w] = (one - other) / np.sqrt(1 / (y_i[w] + a) + 1 / (y_j[w] + a))
    return z


def test_log_odds_equal_the_papers_formula(rng):
    words = (rng.random((60, 30)) < rng.uniform(0.02, 0.5, 30)).astype(float)
    words[0] = 1
    top = (rng.random((12, 60)) < 0.2).astype(float)
    top[0] = 0
    expected = paper(top, words)
    found = log_odds(csr_array(top), csr_array(words))
    has = top @ words > 0
    pattern = csr_array((np.ones(found.nnz), found.indices, found.indptr), shape=found.shape)
    np.testing.assert_array_equal(pattern.toarray(), has)
    np.testing.assert_allclose(found.toarray()[has], expected[has], rtol=1e-10, atol=1e-12)
    # Words that are skipped could not become a name.
    assert (expected[1:][~has[1:]] < 0).all()


@pytest.mark.parametrize("auc", [0.03, 0.5, 0.71, 0.98, 1.0])
@pytest.mark.parametrize(("p", "q"), [(1, 900), (2, 40), (30, 900), (500, 7)])
def test_lower_end_solves_hanley_and_mcneils_interval(auc, p, q):
    def beyond(theta):
        q1, q2 = theta / (2 - theta), 2 * theta**2 / (1 + theta)
        variance = theta * (1 - theta) + (p - 1) * (q1 - theta**2) + (q - 1) * (q2 - theta**2)
        return auc - theta - 1.959963984540054 * np.sqrt(variance / (p * q))

    expected = brentq(beyond, 1e-12, auc - 1e-9, xtol=1e-14)
    assert lower_end(*np.array([[auc], [p], [q]]))[0] == pytest.approx(expected, abs=1e-9)


def test_lower_end_is_seldom_above_the_truth(rng):
    truth, p, q, trials = norm.cdf(1 / np.sqrt(2)), 25, 150, 2000
    positive, negative = rng.normal(1, 1, (trials, p)), rng.normal(0, 1, (trials, q))
    auc = (positive[:, :, None] > negative[:, None, :]).mean((1, 2))
    above = (lower_end(auc, np.full(trials, p), np.full(trials, q)) > truth).mean()
    # At most 2.5%; for normal values, Hanley and McNeil's variance is slightly too large.
    assert 0.002 < above < 0.03


def test_a_single_top_caption_is_not_evidence():
    low = lower_end(np.ones(3), np.array([1, 2, 20]), np.full(3, 900))
    assert low[0] < 0.5
    assert low[1] < low[2] < 1
    assert np.isnan(lower_end(np.array([np.nan]), np.array([0]), np.array([9]))).all()


def test_names_a_planted_concept_by_its_word(rng, make_data, name):
    data = make_data(planted(rng))
    captions = captions_of(data)
    concept = on(captions, "zebra", rng)
    found = name(data, {1: np.stack([concept, rng.random(400)], 1), 3: concept[:, None]})
    assert found[["layer", "feature"]].to_numpy().tolist() == [[1, 0], [1, 1], [3, 0]]
    assert found.name.tolist() == ["zebra", None, "zebra"]
    assert found.source.tolist() == ["captions"] * 3
    zebras = sum("zebra" in text for text in captions[1::2])
    for row in (0, 2):
        assert found.auc[row] > 0.97
        assert found.auc_low[row] > 0.85
        assert found.held_out[row] == zebras
        assert found.density[row] == pytest.approx((concept.astype(np.float16) > 0).mean())
    assert found.score[1] < found.score[0]


def test_score_equals_the_papers_formula(rng, make_data, name):
    # A word counts once per caption, however often it occurs.
    data = make_data([f"{text} {text.split()[0]}" for text in planted(rng)])
    captions = captions_of(data)
    x = on(captions, "zebra", rng).astype(np.float16)
    top = [row for row in np.argsort(-x, kind="stable")[:100] if x[row] > 0 and row % 2 == 0][: names.top_count(400)]
    counts = {}
    for text in captions[::2]:
        words = text.split()
        for word in {*words, *(" ".join(pair) for pair in pairwise(words))}:
            counts[word] = counts.get(word, 0) + 1
    vocabulary = sorted(word for word, count in counts.items() if count >= 3)
    has = np.array([[f" {word} " in f" {text} " for word in vocabulary] for text in captions[::2]], float)
    chosen = np.zeros((1, 200))
    chosen[0, np.array(top) // 2] = 1
    z = paper(chosen, has)[0]
    found = name(data, x[:, None].astype(float)).iloc[0]
    assert found.candidate == vocabulary[z.argmax()] == "zebra"
    assert found.score == pytest.approx(z.max(), rel=1e-10)
    assert found.score > norm.isf(0.05 / len(vocabulary))


def test_measures_equal_scikit_learns_and_scipys(rng, make_data, name):
    data = make_data(planted(rng, 1200))
    captions = captions_of(data)
    strengths = [0.1, 0.4, 0.8, 2.0]
    features = [on(captions, word, rng, s) for word in ("zebra", "worda", "wordh") for s in strengths]
    features.append(np.round(on(captions, "zebra", rng), 0))
    features.append(on(captions, "zebra", rng) + 0.5)
    x = np.stack(features, 1)
    found = name(data, x)
    held_out = x.astype(np.float16)[1::2].astype(float)
    for row in found.itertuples():
        has = np.array([has_any(row.candidate, text) for text in captions[1::2]])
        values = held_out[:, row.feature]
        assert row.held_out == has.sum() > 0
        assert row.auc == pytest.approx(roc_auc_score(has, values), abs=1e-12)
        u = mannwhitneyu(values[has], values[~has]).statistic
        assert row.auc == pytest.approx(u / has.sum() / (~has).sum(), abs=1e-12)
        if (values > 0).all():
            assert np.isnan(row.auc_active)
        else:
            assert row.auc_active == pytest.approx(roc_auc_score(values > 0, has), abs=1e-12)
    assert (held_out > 0).all(0).sum() == 1
    clear = found.name.notna()
    assert (found.auc_low[clear] > 0.5).all()
    assert (found.name[clear] == found.candidate[clear]).all()
    assert 4 <= clear.sum() < len(found)


def test_noise_has_no_clear_name(rng, make_data, name):
    data = make_data(filling(rng, 600))
    sparse = np.maximum(rng.normal(-1.5, 1, (600, 300)), 0)
    found = name(data, {0: rng.random((600, 300)), 1: sparse})
    words = set()
    captions = captions_of(data)[::2]
    for text in captions:
        words.update(text.split())
    # Bigrams make the vocabulary larger than this, and the threshold higher.
    passed = found.score > norm.isf(0.05 / len(words))
    assert passed.mean() < 0.05
    assert found.name.notna().mean() < 0.01
    assert found.candidate.notna().all()
    assert (found.auc < 0.5).mean() > 0.3


def test_a_word_that_fails_on_held_out_captions_is_not_a_name(rng, make_data, name):
    data = make_data(planted(rng))
    captions = captions_of(data)
    x = on(captions, "zebra", rng)
    # Among held-out samples, other captions are strong.
    x[1::2] = rng.permutation(x[1::2] * ["zebra" not in text for text in captions[1::2]])
    found = name(data, x[:, None]).iloc[0]
    assert found.candidate == "zebra"
    assert found.score > 4
    assert found.auc_low < 0.5
    assert found["name"] is None


def test_held_out_captions_do_not_propose_names(rng, make_data, name):
    source = planted(rng)
    data = make_data(source)
    captions = captions_of(data)
    x = np.stack([on(captions, word, rng, s) for word in ("zebra", "worda", "wordh") for s in (0.3, 2.0)], 1)
    found = name(data, x)
    order = np.random.default_rng(0).permutation(len(source))
    other = list(source)
    for sample, row in enumerate(order):
        assert captions[sample] == source[row]
        if sample % 2:
            other[row] = f"quagga and {rng.choice(FILLING)}"
    changed = make_data(other, "changed")
    assert captions_of(changed)[::2] == captions[::2]
    again = name(changed, x, "again")
    for column in ("candidate", "score", "density"):
        assert again[column].equals(found[column])
    assert not again.auc.equals(found.auc)
    assert again.held_out[1] == 0
    assert np.isnan(again.auc[1])
    assert again.auc_active[1] == pytest.approx(0.5)
    assert again.name[1] is None


def test_dead_and_rare_features_have_no_candidate(rng, make_data, name):
    data = make_data(planted(rng))
    x = np.zeros((400, 4))
    x[8:16:2, 1] = [1, 2, 3, 4]
    x[1:100:2, 1] = 5.0
    x[8:18:2, 2] = [1, 2, 3, 4, 5]
    # The top samples are held out, so those of the naming half are not among the stored ones.
    x[:, 3] = np.where(np.arange(400) % 2, 2, 1)
    found = name(data, {0: x, 1: np.zeros((400, 3))})
    few = found[(found.layer == 1) | (found.feature != 2)]
    for column in ("name", "candidate"):
        assert few[column].isna().all()
    for column in ("score", "auc", "auc_low", "auc_active"):
        assert few[column].isna().all()
    assert (few.held_out == 0).all()
    assert found.density[:4].tolist() == [0, 54 / 400, 5 / 400, 1]
    assert isinstance(found.candidate[2], str)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("captions", [["the zebra", "of"], ["a", "the of 1"], ["unique{}", "single{}"]])
def test_a_vocabulary_of_one_word_or_none(captions, rng, make_data, name):
    data = make_data([captions[n % 2].format(n) for n in range(60)])
    found = name(data, rng.random((60, 3)))
    assert found.candidate.isna().all()
    assert found.score.isna().all()
    assert len(found) == 3


def test_two_samples_only(make_data, name):
    found = name(make_data(["a cat", "a dog"]), np.ones((2, 2)))
    assert found.name.tolist() == [None, None]


def test_captions_of_all_kinds(rng, make_data, name):
    odd = [
        "<b>Käfer</b> & <i>x</i> \\frac{1}{2} {x} %s",
        "Ka\u0308fer 🐞 über\x00dem \x1b[31mFluß\x07",
        "KÄFER\t猫が座っている \u202eabc",
        "_under_ ^hat^ 🐞🐞 \u200b käfer",
    ]
    data = make_data([odd[n % 4] if n % 80 < 4 else "nothing {} of %d that kind" for n in range(2400)])
    captions = captions_of(data)
    beetle = np.array([not text.startswith("nothing") for text in captions])
    cat = np.array(["猫" in text for text in captions])
    x = np.stack([beetle, cat], 1) * (1 + rng.random((2400, 2)))
    found = name(data, x)
    assert found.name[0].split(", ")[0] == "käfer"
    assert found.auc[0] == 1
    assert "猫が座っている" in found.name[1]
    for text in found.candidate:
        assert text.isprintable()


def test_bigrams_count_as_one_word(rng, make_data, name):
    texts = [
        f"{text}. {more}"
        for text, more in zip(
            filling(rng, 1800),
            ["a Red Square, flag", "the red circle", "square", "flag", "", "", "", "", "", ""] * 180,
            strict=True,
        )
    ]
    data = make_data(texts)
    captions = captions_of(data)
    x = np.array(["Red Square" in text for text in captions]) * (1 + rng.random(1800))
    found = name(data, x[:, None]).iloc[0]
    assert sorted(found["name"].split(", ")) == ["flag", "red square"]
    # The circle's colour is as frequent elsewhere, so its two words are not merged.
    x = np.array(["red" in text.lower() for text in captions]) * (1 + rng.random(1800))
    found = name(data, x[:, None], "reds").iloc[0]
    assert 1 <= len(found["name"].split(", ")) <= 3
    parts = found["name"].replace(",", "").split()
    assert len(parts) == len(set(parts))


def test_small_data_sets_use_fewer_top_samples(rng, make_data, name):
    # The strongest 24 samples are zebras; of the others, some 40 would be among the stored 100.
    data = make_data(planted(rng, 538, every=22))
    captions = captions_of(data)
    x = np.maximum(rng.normal(0, 0.5, 538), 0) + 3 * np.array(["zebra" in text for text in captions])
    # A feature that activates on zebras, but more strongly on nine other samples.
    other = x.copy()
    other[np.argsort(x)[:9]] = 9
    found = name(data, np.stack([x, other], 1))
    assert names.top_count(538) == 13
    assert found.name.tolist() == ["zebra", None]
    assert found.candidate.tolist() == ["zebra", "zebra"]
    assert (found.auc_low > 0.5).all()
    assert [names.top_count(n) for n in (2, 200, 1888, 2000, 10**6)] == [5, 5, 47, 50, 50]


def test_memory_grows_only_with_captions(rng, make_data, tmp_path, write_features_from, monkeypatch):
    monkeypatch.setattr(names, "MEASURED_SAMPLES", 300)
    monkeypatch.setattr(names, "_BINS", 2**16)
    peaks = []
    for samples in (100, 400, 1200):
        unique = [f"{text} {n}th x{n}y" for n, text in enumerate(filling(rng, samples))]
        data = make_data(unique, str(samples))
        features = rng.random((samples, 600))
        store = write_features_from(tmp_path / f"m{samples}", tmp_path, MEMBER, {0: features}, Data(data).content_hash)
        tracemalloc.start()
        name_features(store, data, tmp_path / "names.parquet")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[2] - peaks[1]) / 800 < 500  # bytes per sample; the first run imports modules


def test_refuses_samples_of_another_data_set(rng, make_data, tmp_path, write_features):
    data = make_data(planted(rng))
    store = write_features(tmp_path / "features", MEMBER, {0: rng.random((400, 2))}, "other samples")
    with pytest.raises(StoreError, match="different samples; make both from the same data set"):
        name_features(store, data, tmp_path / "names.parquet")
    assert not (tmp_path / "names.parquet").exists()


def test_results_do_not_depend_on_the_run_or_block_size(rng, make_data, tmp_path, write_features, monkeypatch):
    data = make_data(planted(rng))
    captions = captions_of(data)
    x = np.stack([on(captions, word, rng) for word in ("zebra", "worda", "wordb") * 4] + [np.zeros(400)] * 3, 1)
    store = write_features(tmp_path / "features", MEMBER, {0: x, 2: x[:, ::-1]}, Data(data).content_hash)
    outs = [tmp_path / str(n) / "names.parquet" for n in range(4)]
    name_features(store, data, outs[0])
    name_features(store, data, outs[1])
    monkeypatch.setattr(names, "_RANKED", 1)
    name_features(store, data, outs[2])
    monkeypatch.setattr(names, "FEATURE_COLUMNS", 4)
    name_features(store, data, outs[3])
    assert pd.read_parquet(outs[0]).name.notna().sum() >= 8
    assert len({out.read_bytes() for out in outs}) == 1
    assert (tmp_path / "0" / "names.provenance.json").is_file()


def test_lists_the_clearest_names_of_each_layer(rng, make_data, tmp_path, write_features, monkeypatch):
    monkeypatch.setattr(names, "CLEAREST_NAMES", 2)
    data = make_data(planted(rng))
    captions = captions_of(data)
    x = np.stack([on(captions, "zebra", rng, strength) for strength in (0.5, 8.0, 2.0)] + [np.zeros(400)], 1)
    store = write_features(tmp_path / "features", MEMBER, {0: x, 2: x[:, ::-1]}, Data(data).content_hash)
    name_features(store, data, tmp_path / "a.b@0.parquet")
    table = pd.read_parquet(tmp_path / "a.b@0.parquet").set_index(["layer", "feature"])
    listed = pd.read_csv(tmp_path / "a.b@0.clearest.csv").set_index(["layer", "feature"])
    for layer in (0, 2):
        named = table.loc[layer][table.loc[layer].name.notna()]
        assert len(named) > 2 or len(named) == len(listed.loc[layer])
        assert listed.loc[layer].index.tolist() == named.auc_low.nlargest(2).index.tolist()
    assert listed.name.tolist() == table.name[listed.index].tolist()
    np.testing.assert_allclose(listed.auc_low, table.auc_low[listed.index], rtol=1e-5)


def test_columns_keep_their_types_without_any_names(make_data, tmp_path, write_features):
    data = make_data(["a", "the"] * 10)
    store = write_features(tmp_path / "features", MEMBER, {0: np.zeros((20, 2))}, Data(data).content_hash)
    name_features(store, data, tmp_path / "names.parquet")
    schema = pq.read_schema(tmp_path / "names.parquet")
    assert {field.name: str(field.type) for field in schema} == {
        **{"layer": "int32", "feature": "int32", "name": "string", "candidate": "string", "score": "double"},
        **{"auc": "double", "auc_low": "double", "auc_active": "double", "held_out": "int32", "density": "double"},
        "source": "string",
    }


@pytest.fixture
def script(tmp_path):
    """Writes a program that has the lines of its stdin in ``asked``, and returns the command that runs it."""

    def write(body):
        path = tmp_path / "name them.py"
        path.write_text(f"import json, sys\nasked = [json.loads(line) for line in sys.stdin]\n{body}")
        return f"{shlex.quote(sys.executable)} {shlex.quote(str(path))} 'an argument'"

    return write


@pytest.fixture
def evident(rng, make_data):
    """A data set and its features: a concept, noise, a dead feature and a rare one."""
    data = make_data(planted(rng))
    captions = captions_of(data)
    x = np.stack([on(captions, "zebra", rng), rng.random(400), np.zeros(400), np.zeros(400)], 1)
    x[2:8:2, 3] = 1
    return data, x


def test_a_command_receives_features_and_names_them(evident, script, name, tmp_path, monkeypatch):
    data, x = evident
    captions = captions_of(data)
    log = tmp_path / "asked.json"
    answers = "[None, 'A  zebra,\\n\\x07\\u202eor WordZ \\ud800', 'q' * 100][each['layer'] + each['feature'] - 1]"
    command = script(
        f"open({str(log)!r}, 'w').write(json.dumps([asked, sys.argv]))\n"
        "print('thinking', file=sys.stderr)\n"
        "print()\n"
        "for each in reversed(asked):\n"
        f"    print(json.dumps({{'layer': each['layer'], 'feature': each['feature'], 'name': {answers}}}))\n"
    )
    found = name(data, {1: x, 2: x[:, :2]}, command=command)
    asked, arguments = json.loads(log.read_text())
    assert arguments[1:] == ["an argument"]
    assert [(each["layer"], each["feature"]) for each in asked] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert set(asked[0]) == {"member", "layer", "feature", "candidate", "top", "others"}
    assert asked[0]["member"] == MEMBER
    assert asked[0]["candidate"] == "zebra"
    # Strongest first, from the naming half only; the others are zero there.
    halves = x[::2].astype(np.float16)
    assert asked[0]["top"] == [captions[2 * row] for row in np.argsort(-halves[:, 0], kind="stable")[:20]]
    silent = [captions[2 * row] for row in np.flatnonzero(halves[:, 0] == 0)]
    assert len(asked[0]["others"]) == 20
    assert set(asked[0]["others"]) <= set(silent)
    # For a feature that is zero nowhere, the samples on which it is weakest.
    assert asked[1]["others"] == [captions[2 * row] for row in np.argsort(halves[:, 1], kind="stable")[:20]]

    assert found.candidate.tolist() == [None, "A zebra, or WordZ", None, None, "A zebra, or WordZ", "q" * 80]
    assert found.source.tolist() == ["command", "command", "captions", "captions", "command", "command"]
    assert found.name.tolist() == [None, None, None, None, "A zebra, or WordZ", None]
    assert found.auc[[0, 2, 3, 5]].isna().all()
    has = [bool({"zebra", "wordz"} & set(text.split())) for text in captions[1::2]]
    assert found.auc[4] == pytest.approx(roc_auc_score(has, x[1::2, 0].astype(np.float16)), abs=1e-12)
    assert found.held_out[4] == sum(has)
    assert found.score[4] == pytest.approx(name(data, x, "without").score[0])
    assert np.isnan(found.score[5])

    monkeypatch.setattr(names, "FEATURE_COLUMNS", 1)
    pd.testing.assert_frame_equal(name(data, {1: x, 2: x[:, :2]}, "narrow", command), found)


ANSWER = "print(json.dumps({'layer': each['layer'], 'feature': each['feature'], 'name': 'zebra'}))"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "sys.exit('first\\nno key for the model')",
            "ended with exit code 1; .*error: no key for the model; fix",
        ),
        ("sys.exit(3)", "ended with exit code 3; fix"),
        (f"print('why', file=sys.stderr)\nfor each in asked[:1]: {ANSWER}", "left out 1 of 2 .* 1 of layer 0.*: why;"),
        ("print('Sure, here are the names')", "printed b?'Sure, here are the names' as line 1 .JSONDecodeError"),
        ("print('[1, 2]')", "as line 1 .TypeError"),
        ('print(\'{"layer": 0, "feature": 0}\')', "as line 1 .KeyError"),
        ('print(\'{"layer": 0, "feature": 0, "name": 7}\')', "a string or null as the name"),
        ('print(\'{"layer": 0, "feature": 2, "name": "dead"}\')', "of a requested feature"),
        ('print(\'{"layer": [], "feature": 2, "name": "x"}\')', "as line 1 .TypeError"),
        ("sys.stdout.buffer.write(b'\\xff\\xfe{')", "as line 1 "),
    ],
)
def test_a_failing_command_is_one_error(body, message, evident, script, name, tmp_path):
    data, x = evident
    with pytest.raises(StudyError, match=f"(?s)name the features of {MEMBER}.*{message}") as error:
        name(data, x, command=script(body))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "features" / "names.parquet").exists()


@pytest.mark.parametrize("command", ["", "  ", "no-such-program-anywhere --now", "program 'unclosed"])
def test_a_command_that_cannot_run_is_one_error(command, evident, name):
    data, x = evident
    with pytest.raises(StudyError, match=r"cannot be run .*fix the command that names features"):
        name(data, x, command=command)


def test_a_command_may_ignore_its_input(evident, tmp_path, name):
    data, x = evident
    path = tmp_path / "deaf.py"
    path.write_text(f"import json\nfor n in (0, 1):\n    each = {{'layer': 0, 'feature': n}}\n    {ANSWER}\n")
    found = name(data, x, command=f"{sys.executable} {path}")
    assert found.name.tolist() == ["zebra", None, None, None]


def test_naming_does_not_load_torch():
    check = "import sys, conceptshare.concepts.names; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)
