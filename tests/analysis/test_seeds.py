"""Tables of seeds against means, jackknives and counts computed directly from the features."""

from itertools import combinations, permutations, product

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from typer.testing import CliRunner

from conceptshare import metrics
from conceptshare.analysis.seeds import seeds_table, with_stability
from conceptshare.analysis.tables import Stores, matrix_table, read_table
from conceptshare.cli import app
from conceptshare.config.members import GroupedMember, Member, as_member, pair_name
from conceptshare.correlations import correlate_stores
from tests.helpers.studies import study_file

SAMPLES = 50
MEMBERS = ("bert@0", "bert@1", "vit@0", "vit@1", "vit@4")
KINDS = {"bert": ("text", "language"), "vit": ("image", "vision")}


@pytest.fixture(scope="module")
def made(tmp_path_factory, write_features_from):
    """Stores of two encoders with several seeds and two layers each, and their features."""
    folder, rng = tmp_path_factory.mktemp("seeds"), np.random.default_rng(1)
    common, features = rng.lognormal(0, 1, (SAMPLES, 6)), {}
    for member in MEMBERS:
        features[member] = {}
        for layer in (0, 2):
            x = rng.lognormal(0, 1, (SAMPLES, 7)) * rng.uniform(0, 1.5, 7)
            x[:, :6] += common
            x[:, 6] = 3.0  # never varies
            features[member][layer] = x.astype(np.float16).astype(np.float64)
        write_features_from(folder / "made", folder / "features", member, features[member])
    stores = Stores(folder / "features", folder / "correlations")
    for pair in combinations(map(as_member, MEMBERS), 2):
        paths = [stores.features / f"{member}.zarr" for member in pair]
        correlate_stores(*paths, stores.correlations / f"{pair_name(*pair)}.zarr")
    return stores, features


def grouped(*members):
    def others(member):
        return tuple(other for other in MEMBERS if other != member and other.split("@")[0] == member.split("@")[0])

    return [GroupedMember(member, *KINDS[member.split("@")[0]], others(member)) for member in members]


def rho(x, y):
    with np.errstate(invalid="ignore", divide="ignore"):
        r = np.corrcoef(x, y, rowvar=False)[: x.shape[1], x.shape[1] :]
    best = np.nan_to_num(r, nan=-np.inf).max(1)
    return np.where(np.isinf(best), 0, best)


def last(features, source, target):
    """wMPPC between the last layers."""
    x = features[source][2]
    return (rho(x, features[target][2]) * x.sum(0)).sum() / x.sum()


def influence(stores, source, target):
    return stores.pair(source, target).influence[metrics.READINGS.index("last")].astype(np.float64)


def test_a_ceiling_is_the_mean_over_all_other_seeds(made):
    stores, features = made
    table = matrix_table(grouped("vit@1", "bert@0"), stores).set_index(["source", "reading"])
    expected = np.mean([last(features, "vit@1", other) for other in ("vit@0", "vit@4")])
    assert table.ceiling["vit@1", "last"] == pytest.approx(expected, abs=1e-5)
    assert table.ceiling["bert@0", "last"] == pytest.approx(last(features, "bert@0", "bert@1"), abs=1e-5)


def test_the_table_of_seeds_has_every_pair_and_an_interval_over_seeds_and_samples(made):
    stores, features = made
    table = seeds_table(grouped(*MEMBERS), stores)
    assert (table.code == "before_topk").all()
    for (source, target), rows in table[table.reading == "last"].groupby(["source", "target"]):
        seeds = {one: [int(m.split("@")[1]) for m in MEMBERS if m.startswith(one)] for one in (source, target)}
        pairs = list(permutations(seeds[source], 2) if source == target else product(seeds[source], seeds[target]))
        assert list(zip(rows.source_seed, rows.target_seed, strict=True)) == pairs
        values = [last(features, f"{source}@{s}", f"{target}@{t}") for s, t in pairs]
        np.testing.assert_allclose(rows.wmppc, values, atol=1e-5)
        np.testing.assert_allclose(rows.excess, (rows.wmppc - rows.null) / (1 - rows.null))
        assert (rows.pairs == len(pairs)).all()
        np.testing.assert_allclose(rows["mean"], np.mean(values), atol=1e-5)
        np.testing.assert_allclose(rows.mean_excess, rows.excess.mean())
        if source == target and len(seeds[source]) == 2:
            assert rows.low.isna().all()
            assert rows.high.isna().all()
            continue
        psi = np.mean([influence(stores, f"{source}@{s}", f"{target}@{t}") for s, t in pairs], axis=0)
        variances, freedom = [np.mean(psi**2) / SAMPLES], [SAMPLES - 1]
        by_pair = pd.Series(values, pd.MultiIndex.from_tuples(pairs))
        if source == target:
            n = len(seeds[source])
            without = [by_pair[[s not in pair for pair in pairs]].mean() for s in seeds[source]]
            variances.append((n - 1) / n * np.sum((np.array(without) - np.mean(without)) ** 2))
            freedom.append(n - 1)
        else:
            for means in (by_pair.groupby(level=level).mean() for level in (0, 1)):
                variances.append(means.var(ddof=1) / len(means))
                freedom.append(len(means) - 1)
        V = np.sum(variances)
        half = stats.t.ppf(0.975, V**2 / np.sum(np.square(variances) / freedom)) * V**0.5
        np.testing.assert_allclose(rows.low, np.mean(values) - half, atol=1e-4)
        np.testing.assert_allclose(rows.high, np.mean(values) + half, atol=1e-4)


def test_the_interval_covers_the_mean_over_seeds_about_as_often_as_it_states():
    rng, covered, trials = np.random.default_rng(0), 0, 2000
    uses = [np.repeat(np.eye(3, dtype=bool), 4, axis=1), np.tile(np.eye(4, dtype=bool), 3)]
    for _ in range(trials):
        psi = rng.standard_normal(100)
        values = rng.normal(0, 0.1, 3)[:, None] + rng.normal(0, 0.2, 4) + psi.mean()
        low, high = metrics.seed_interval(values.ravel(), uses, psi - psi.mean())
        covered += low < 0 < high
    assert 0.93 < covered / trials < 0.99


def test_a_table_of_first_seeds_has_the_pairs_of_each_encoders_own_seeds(made):
    table = seeds_table(grouped("vit@0", "bert@0"), made[0])
    assert set(zip(table.source, table.target, strict=True)) == {("bert", "bert"), ("vit", "vit")}
    assert len(table) == 3 * (2 + 6)


def test_stability_is_the_share_of_features_with_a_match_in_the_same_layer_of_other_seeds(made):
    stores, features = made
    saes = [(*as_member(member), layer) for member in (*MEMBERS, "new@3") for layer in (0, 2)]
    table = pd.DataFrame(saes, columns=["encoder", "seed", "layer"])
    pairs = [pair for pair in combinations(map(as_member, MEMBERS), 2) if pair[0].encoder == pair[1].encoder]
    stable = with_stability(table, pairs, stores).set_index(["encoder", "seed", "layer"]).stable
    for (encoder, seed, layer), value in stable.items():
        others = [m for m in map(as_member, MEMBERS) if m.encoder == encoder and m.seed != seed]
        own = features.get(str(Member(encoder, seed)))
        shares = [np.mean(rho(own[layer][:, :6], features[str(other)][layer]) > 0.7) for other in others]
        assert value == pytest.approx(np.mean(shares)) if shares else np.isnan(value)
    assert 0 < stable.mean() < 1


def test_the_command_writes_the_table_of_seeds(made, tmp_path):
    stores, _ = made
    described = [(member, *KINDS[member.split("@")[0]]) for member in MEMBERS]
    study = study_file(tmp_path / "study.json", described, matrices={"all": {"seeds": "all"}})
    folders = ["--features", stores.features, "--correlations", stores.correlations]
    command = ["metrics", "seeds", "all", "--study", study, *folders, "--out", tmp_path / "all.seeds.csv"]
    result = CliRunner().invoke(app, list(map(str, command)))
    assert result.exit_code == 0, result.output
    written = read_table(tmp_path / "all.seeds.parquet", "seeds")
    pd.testing.assert_frame_equal(written, seeds_table(grouped(*MEMBERS), stores), check_exact=True)
    assert written.attrs["features"] == stores.digests(MEMBERS)
