"""Commands that query feature stores, against numbers computed directly from the features."""

import json
import re
import sys

import numpy as np
import pandas as pd
import pytest
import zarr

from conceptshare.analysis.ask import COLUMNS, sharedness_of, wmppc_between
from conceptshare.analysis.tables import Stores, matrix_table, sharedness_table, write_table
from conceptshare.cli import main
from conceptshare.config.members import GroupedMember
from conceptshare.correlations import correlate_stores
from conceptshare.io.store import StoredArray, new_store
from tests.helpers.studies import study_file

WIDTHS = {"vit@0": 6, "clip-text@0": 8, "bert@1": 5}
N = 60


@pytest.fixture
def features(rng):
    """Features of three members with two layers each."""
    common = rng.lognormal(0, 1, (N, 4))
    found = {}
    for member, width in WIDTHS.items():
        found[member] = {}
        for layer in (1, 3):
            x = rng.lognormal(0, 1, (N, width)) * (rng.random((N, width)) < 0.5)
            x[:, :4] = 0.7 * common[:, rng.permutation(4)] + rng.random() * x[:, :4]
            x[:, -1] = 0
            found[member][layer] = x.astype(np.float16).astype(np.float64)
    return found


@pytest.fixture
def stores(tmp_path, features, write_features):
    """Feature stores by member."""
    return {member: write_features(tmp_path / "features", member, layers) for member, layers in features.items()}


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command as a shell would and returns its exit status, stdout and stderr."""

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["conceptshare", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return ended.value.code or 0, printed.out, printed.err

    return command


def rho(x, y):
    with np.errstate(invalid="ignore", divide="ignore"):
        r = np.corrcoef(x, y, rowvar=False)[: x.shape[1], x.shape[1] :]
    return np.nan_to_num(np.fmax.reduce(r, axis=1))


def expected_wmppc(a, b):
    """The wMPPC of each reading and the MPPC from a to b."""
    best = [np.max([rho(x, y) for y in b.values()], axis=0) for x in a.values()]
    S = [x.sum(0) for x in a.values()]
    last = rho(a[3], b[3])
    of_all = np.concatenate(best)
    return {
        "pooled": (np.average(of_all, weights=np.concatenate(S)), of_all.mean()),
        "layer_mean": (np.mean([np.average(r, weights=s) for r, s in zip(best, S, strict=True)]), of_all.mean()),
        "last": (np.average(last, weights=S[-1]), last.mean()),
    }


def test_wmppc_is_printed_for_both_directions_as_a_table(run, stores, features):
    status, output, _ = run("wmppc", stores["vit@0"], stores["bert@1"])
    assert status == 0
    lines = output.rstrip("\n").splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split() == list(COLUMNS)
    rows = iter(lines[1:])
    for a, b in [("vit@0", "bert@1"), ("bert@1", "vit@0")]:
        for reading, (wmppc, mppc) in expected_wmppc(features[a], features[b]).items():
            row = dict(zip(COLUMNS, next(rows).split(), strict=True))
            assert (row["source"], row["target"], row["reading"]) == (a, b, reading)
            assert [float(row["wmppc"]), float(row["mppc"])] == pytest.approx([wmppc, mppc], abs=1e-4)
            assert float(row["low"]) < wmppc < float(row["high"])
    assert next(rows, None) is None


def test_wmppc_equals_that_of_a_study(run, stores, tmp_path):
    """In JSON with all digits: also the interval, the floor, and the features beyond shuffled samples."""
    for name in ("bert@1__vit@0", "bert@1__clip-text@0", "clip-text@0__vit@0"):
        a, b = name.split("__")
        correlate_stores(stores[a], stores[b], tmp_path / f"correlations/{name}.zarr")
    members = [GroupedMember(member, "text", "language") for member in WIDTHS]
    of_study = matrix_table(members, Stores(tmp_path / "features", tmp_path / "correlations"))
    of_study = of_study.set_index(["source", "target"])[list(COLUMNS[2:])]
    for a, b in (("vit@0", "bert@1"), ("clip-text@0", "vit@0")):
        _, output, _ = run("wmppc", stores[a], stores[b], "--json", "--memory-mb", 10, "--threads", 1)
        found = pd.DataFrame(json.loads(output)).set_index(["source", "target"])
        expected = pd.concat([of_study.loc[[(a, b)]], of_study.loc[[(b, a)]]])
        pd.testing.assert_frame_equal(found, expected, check_dtype=False, check_names=False, atol=1e-5)


def test_wmppc_leaves_unexplained_layers_out(run, tmp_path, rng, write_features):
    """The SAE of layer n has an FVU of 0.2 n; the reading over all layers is then that of layers 1 and 2, or 1."""
    a, b = rng.random((2, 3, N, 4)).astype(np.float16).astype(np.float64)
    paths = [
        write_features(tmp_path, name, dict(zip((1, 2, 6), x, strict=True))) for name, x in (("a@0", a), ("b@0", b))
    ]
    for bound, kept in (([], 2), (["--max-fvu-global", 0.3], 1)):
        _, output, _ = run("wmppc", *paths, "--unexplained-layers", "leave_out", *bound, "--json")
        best = [np.max([rho(x, y) for y in b[:kept]], axis=0) for x in a[:kept]]
        expected = np.average(np.concatenate(best), weights=np.concatenate([x.sum(0) for x in a[:kept]]))
        assert json.loads(output)[0]["wmppc"] == pytest.approx(expected, abs=1e-5)


def test_a_store_shares_all_concepts_with_itself(stores):
    own = wmppc_between(stores["vit@0"], stores["vit@0"])
    np.testing.assert_allclose(own.wmppc, 1, atol=1e-6)


def test_stores_with_the_same_name_are_labelled_by_their_paths(stores, features, tmp_path, write_features_from):
    other = write_features_from(tmp_path / "other", tmp_path / "elsewhere", "vit@0", features["bert@1"])
    table = wmppc_between(stores["vit@0"], other)
    assert table.source.unique().tolist() == [str(stores["vit@0"]), str(other)]


@pytest.fixture
def groups(stores):
    source, shared, unshared = (stores[member] for member in ("clip-text@0", "bert@1", "vit@0"))
    return ["--source", source, "--shared-with", shared, "--not-shared-with", unshared]


def test_sharedness_equals_that_of_a_study(stores, tmp_path):
    for a, b in (("bert@1", "clip-text@0"), ("clip-text@0", "vit@0")):
        correlate_stores(stores[a], stores[b], tmp_path / f"correlations/{a}__{b}.zarr")
    found = sharedness_of(stores["clip-text@0"], [stores["bert@1"]], [stores["vit@0"]])
    of_study = Stores(tmp_path / "features", tmp_path / "correlations")
    expected = sharedness_table("clip-text@0", ["bert@1"], ["vit@0"], of_study)
    pd.testing.assert_frame_equal(found, expected, atol=1e-5)


def test_sharedness_reads_only_the_last_layers(stores, features, monkeypatch):
    read, get = [], StoredArray.__getitem__
    monkeypatch.setattr(StoredArray, "__getitem__", lambda array, place: read.append(str(array)) or get(array, place))
    table = sharedness_of(stores["clip-text@0"], [stores["bert@1"]], [stores["vit@0"]])
    x = features["clip-text@0"][3]
    np.testing.assert_allclose(table.sort_values("feature").rho_g, rho(x, features["bert@1"][3]), atol=1e-5)
    assert {path.split("/")[-2] for path in read if path.endswith("/features")} == {"layer-03"}


def test_prints_the_top_of_a_ranking_and_writes_all_of_it(run, groups, tmp_path):
    status, output, _ = run("sharedness", *groups, "--top", 3, "--out", tmp_path / "table.csv")
    assert status == 0
    table = pd.read_csv(tmp_path / "table.csv")
    assert len(table) == len(pd.read_parquet(tmp_path / "table.parquet")) == 8
    lines = output.rstrip("\n").splitlines()
    columns = ["rank", "feature", "delta", "strength", "density", "rho_g", "rho_h"]
    assert lines[0].split() == columns
    for line, row in zip(lines[1:], table[columns].head(3).to_numpy(), strict=True):
        assert [float(number) for number in line.split()] == pytest.approx(list(row), rel=1e-3)


def test_prints_one_percent_of_a_ranking_by_default(run, groups):
    _, output, _ = run("sharedness", *groups)
    assert len(output.splitlines()) == 1 + 1


def test_sharedness_takes_the_minimum_over_one_group_and_the_maximum_over_the_other(
    stores, features, tmp_path, write_features
):
    x = {1: features["vit@0"][3], 3: features["vit@0"][1]}
    other = write_features(tmp_path / "features", "dinov2@0", x)
    last = {member: rho(features["clip-text@0"][3], of[3]) for member, of in (features | {"dinov2@0": x}).items()}
    source, image, text = stores["clip-text@0"], stores["vit@0"], stores["bert@1"]
    g = sharedness_of(source, [image, other], [text]).sort_values("feature").rho_g
    h = sharedness_of(source, [text], [image, other]).sort_values("feature").rho_h
    np.testing.assert_allclose(g, np.minimum(last["vit@0"], last["dinov2@0"]), atol=1e-5)
    np.testing.assert_allclose(h, np.maximum(last["vit@0"], last["dinov2@0"]), atol=1e-5)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda g, s: [*g[:1], s["bert@1"], *g[2:]], "bert@1.zarr: the source is also in a group it is compared with"),
        (lambda g, s: [*g[:1], s["vit@0"], *g[2:]], "vit@0.zarr: the source is also in a group it is compared with"),
        (lambda g, s: [*g, "--shared-with", s["vit@0"]], "vit@0.zarr is in both groups"),
        (lambda g, s: [*g[:-1], "absent.zarr"], "absent.zarr: no features store there"),
    ],
    ids=["source in G", "source in H", "both groups", "absent"],
)
def test_refuses_invalid_groups_in_one_line(run, groups, stores, spoil, message):
    status, output, errors = run("sharedness", *spoil(groups, stores))
    assert status == 1
    assert output == ""
    assert message in errors
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1


def test_refuses_stores_of_different_samples_in_one_line(run, stores, features, groups, tmp_path, write_features):
    other = write_features(tmp_path / "elsewhere", "bert@2", features["bert@1"], content_hash="other samples")
    for arguments in (["wmppc", stores["vit@0"], other], ["sharedness", *groups, "--shared-with", other]):
        status, _, errors = run(*arguments)
        assert status == 1
        assert errors.count("\n") == 1
        assert "bert@2.zarr have different samples, or another order; make both from the same data set" in errors


def test_refuses_a_store_without_active_features_in_one_line(run, stores, groups, tmp_path, write_features):
    silent = write_features(tmp_path / "elsewhere", "silent@0", {3: np.zeros((N, 4))})
    for arguments in (["wmppc", stores["vit@0"], silent], ["sharedness", *groups, "--shared-with", silent]):
        status, _, errors = run(*arguments)
        assert status == 1
        assert errors.count("\n") == 1
        assert "silent@0.zarr: no sample activates any of its features" in errors


def test_a_missing_path_is_a_one_line_error(run, stores):
    assert run("wmppc", stores["vit@0"], "absent.zarr")[::2] == (
        1,
        "error: absent.zarr: no features store there; run the features stage\n",
    )
    _, _, errors = run("figures", "matrix", "--table", "absent.parquet", "--out", "absent.png")
    assert errors == "error: absent.parquet: no such table; run the metrics stage\n"


@pytest.mark.parametrize(
    "command", [["metrics", "matrix"], ["metrics", "layerwise"], ["metrics", "sharedness"], ["figures", "layerwise"]]
)
def test_an_unknown_analysis_is_a_one_line_error(run, tmp_path, command):
    study = study_file(tmp_path / "study.json", [("deit@0", "image", "vision"), ("gpt@0", "text", "language")])
    places = ["--features", "none", "--correlations", "none"] if command[0] == "metrics" else ["--table", "none.csv"]
    out = tmp_path / ("out.csv" if command[0] == "metrics" else "out.png")
    status, _, errors = run(*command, "absent", "--study", study, *places, "--out", out)
    assert (status, errors.count("\n")) == (1, 1)
    assert "the study has no 'absent'" in errors or "none.csv" in errors


def test_a_missing_or_invalid_study_is_a_one_line_error(run, tmp_path):
    (tmp_path / "other.json").write_text('{"study": "x"}')
    for name, expected in (("absent.json", "no such file"), ("other.json", "datasets")):
        status, _, errors = run(
            "pages", "index", "--results", "none", "--study", tmp_path / name, "--out", tmp_path / "o"
        )
        assert status == 1
        assert expected in errors
        assert "Traceback" not in errors


def test_the_error_for_a_table_of_another_kind_does_not_advise_deleting_it(run, tmp_path):
    foreign = pd.DataFrame({"url": ["https://example.org/cat.jpg"]})
    foreign.to_parquet(tmp_path / "coco.parquet")
    write_table(foreign, tmp_path / "pairs.csv")
    for name in ("coco.parquet", "pairs.parquet"):
        status, _, errors = run("figures", "matrix", "--table", tmp_path / name, "--out", tmp_path / "drawn.png")
        assert (status, errors.count("\n")) == (1, 1)
        assert "; name another" in errors
        assert "delete" not in errors


@pytest.mark.parametrize("command", ["wmppc", "correlations"])
def test_the_error_for_a_folder_that_is_not_a_feature_store_does_not_advise_deleting_it(run, stores, tmp_path, command):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"")
    activations = tmp_path / "vit.zarr"
    with new_store(activations, "activations", {}):
        pass
    out = ["--out", tmp_path / "out.zarr"] if command == "correlations" else []
    for path in (tmp_path / "photos", activations):
        status, _, errors = run(command, path, stores["vit@0"], *out)
        assert status == 1
        assert re.search("error: .*; name ", errors)
        assert "delete" not in errors


def test_correlations_have_options_for_precision_and_full_matrices(run, stores, tmp_path, features):
    out = tmp_path / "bert@1__vit@0.zarr"
    options = ["--precision", "float16", "--full", "3:1", "--full", "1:1", "--memory-mb", "10"]
    status, _, _ = run("correlations", stores["bert@1"], stores["vit@0"], "--out", out, *options)
    assert status == 0
    store = zarr.open_group(out, mode="r")
    assert store.attrs["spec"]["precision"] == "float16"
    assert set(store["full"].array_keys()) == {"layer-03__layer-01", "layer-01__layer-01"}
    with np.errstate(invalid="ignore", divide="ignore"):
        r = np.corrcoef(features["bert@1"][3], features["vit@0"][1], rowvar=False)[:5, 5:]
    np.testing.assert_allclose(store["full/layer-03__layer-01"][:], np.nan_to_num(r), atol=2e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--full", "3"], "--full 3: write LAYER_A:LAYER_B"),
        (["--full", "3:x"], "--full 3:x: write LAYER_A:LAYER_B"),
        (["--full", "2:1"], "no layer 2"),
    ],
)
def test_invalid_correlation_settings_are_a_one_line_error(run, stores, tmp_path, arguments, message):
    out = tmp_path / "out.zarr"
    status, _, errors = run("correlations", stores["bert@1"], stores["vit@0"], "--out", out, *arguments)
    assert status == 1
    assert message in errors
    assert "Traceback" not in errors
    assert not out.exists()
