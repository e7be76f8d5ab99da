"""A complete miniature study through real Snakemake: its numbers, repeatability and handling of bad input."""

import json
import re
from importlib.metadata import version

import numpy as np
import pandas as pd
import pytest
import torch
import zarr
from safetensors.torch import load_file, save_file

from tests.helpers.samples import contents

from .conftest import LAYERS, change, write_dataset

TABLES = "results/studies/miniature/squares/tiny"


def best_correlations(a, b):
    """For each column of ``a``, its largest correlation with a column of ``b``; 0 for a constant column."""
    with np.errstate(invalid="ignore", divide="ignore"):
        r = np.corrcoef(a.T.astype(np.float64), b.T.astype(np.float64))[: a.shape[1], a.shape[1] :]
    return np.nan_to_num(np.fmax.reduce(r, axis=1))


def stored_features(study, member):
    store = zarr.open_group(study.folder / f"results/squares/features/tiny/{member}.zarr", mode="r")
    groups = [store[f"layer-{layer:02d}"] for layer in range(LAYERS)]
    return [group["features"][:].astype(np.float64) + group["offset"][:].astype(np.float64) for group in groups]


def weighted_mean(values, weights):
    return (values * weights).sum() / weights.sum()


def test_writes_every_table_and_figure_and_a_log_per_job(finished):
    tables = {"overlaps", "pairs/reader@0__reader@1", "pairs/reader@0__viewer@0"}
    tables |= {"matrices/all.seeds", "matrices/all.retrieval", "sharedness/seen.topics", "sharedness/own.topics"}
    both = {"matrices/all", "matrices/all.averages", "layerwise/seeds", "sharedness/seen", "sharedness/own", "saes"}
    both.add("samples/captions")
    figures = {f"matrices/all.{part}" for part in ("intervals", "similarity", "strength")}
    figures |= {f"sharedness/{name}.{part}" for name in ("seen", "own") for part in ("top", "scatter")}
    expected = {f"{stem}.{suffix}" for stem in tables | both for suffix in ("csv", "parquet")}
    expected |= {f"{stem}.{suffix}" for stem in figures | both for suffix in ("png", "pdf")}
    readings = ("pooled", "layer_mean", "last", "averages")
    expected |= {f"matrices/all/{reading}.{suffix}" for reading in readings for suffix in ("csv", "md", "tex")}
    expected |= {f"saes/{member}.png" for member in ("reader@0", "reader@1", "viewer@0")}
    files = [path for path in (finished.folder / TABLES).rglob("*") if path.is_file()]
    found = {str(path.relative_to(finished.folder / TABLES)) for path in files if path.stat().st_size > 0}
    assert found == expected
    logs = [path for path in (finished.folder / "results/logs").rglob("*.log") if path.stat().st_size >= 0]
    # From the data set to similarities; tables; figures; names, examples and pages; the study.
    stages = (1 + 2 + 2 + 3 * LAYERS + 3 + 2 + 1) + (5 + 1 + 2 + 2 + 2 + 1 + 1 + 1)
    assert len(logs) == stages + (5 + 1 + 3 * 2 + 1 + 1) + (3 + 3 + 1 + 3 + 2 + 1) + 1


def test_compute_jobs_log_their_device_in_one_line(finished):
    places = ("activations", "saes", "features", "correlations", "similarity", "examples")
    logs = [path for place in places for path in (finished.folder / "results/logs/squares" / place).rglob("*.log")]
    for name in ("all.retrieval.log", "captions.log"):
        logs += (finished.folder / "results/logs").rglob(name)
    assert len(logs) == 2 + 3 * LAYERS + 3 + 2 + 1 + 3 + 2
    assert {len(re.findall(r"^device: ", path.read_text(), re.MULTILINE)) for path in logs} == {1}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_on_a_cluster_a_job_whose_rule_asked_for_a_gpu_fails_without_one(study):
    target = "results/squares/similarity/reader__viewer.csv"
    node = ("--mode", "remote", "--cores", "1", "--force", "--nolock", target)  # as executors start it on nodes
    assert study.run(*node).returncode == 1
    (line,) = (study.folder / "results/logs/squares/similarity/reader__viewer.log").read_text().splitlines()
    assert line.startswith("error: a GPU was requested (CONCEPTSHARE_DEVICE=cuda), but torch")
    on_cpu = study.run(*node, "--set-resources", "similarity:gpu=0")
    assert on_cpu.returncode == 0, on_cpu.stdout + on_cpu.stderr


def test_a_second_run_finds_nothing_to_do(finished):
    result = finished.run("--cores", "2")
    assert result.returncode == 0
    assert "Nothing to be done" in result.stdout + result.stderr


def test_matrix_equals_a_direct_computation_from_the_features(finished):
    table = pd.read_csv(finished.folder / TABLES / "matrices/all.csv").set_index(["source", "target", "reading"])
    for source, target in [("reader@0", "viewer@0"), ("viewer@0", "reader@0")]:
        a, b = stored_features(finished, source), stored_features(finished, target)
        S = [layer.sum(0) for layer in a]
        rho = [best_correlations(layer, np.concatenate(b, axis=1)) for layer in a]
        pooled = weighted_mean(np.concatenate(rho), np.concatenate(S))
        layer_mean = np.mean([weighted_mean(r, s) for r, s in zip(rho, S, strict=True)])  # layers are of equal size
        last = weighted_mean(best_correlations(a[-1], b[-1]), S[-1])
        for reading, expected in [("pooled", pooled), ("layer_mean", layer_mean), ("last", last)]:
            assert table.loc[(source, target, reading), "wmppc"] == pytest.approx(expected, abs=1e-5)
        assert table.loc[(source, target, "pooled"), "mppc"] == pytest.approx(np.concatenate(rho).mean(), abs=1e-5)


def test_layerwise_and_sharedness_equal_a_direct_computation_from_the_features(finished):
    reader, other = stored_features(finished, "reader@0"), stored_features(finished, "reader@1")
    viewer = stored_features(finished, "viewer@0")
    layerwise = pd.read_csv(finished.folder / TABLES / "layerwise/seeds.csv")
    cell = layerwise.query("source == 'reader@0' and source_layer == 1 and target_layer == 0").wmppc.item()
    assert cell == pytest.approx(weighted_mean(best_correlations(reader[1], other[0]), reader[1].sum(0)), abs=1e-5)
    ranking = pd.read_csv(finished.folder / TABLES / "sharedness/seen.csv").set_index("feature").sort_index()
    g, h = best_correlations(reader[-1], viewer[-1]), best_correlations(reader[-1], other[-1])
    np.testing.assert_allclose(ranking.delta, reader[-1].sum(0) * (g**2 - h**2), atol=1e-3)


def test_pairs_averages_and_overlaps_equal_a_direct_computation_from_the_features(finished):
    reader, other, viewer = (stored_features(finished, member) for member in ("reader@0", "reader@1", "viewer@0"))
    pairs = pd.read_parquet(finished.folder / TABLES / "pairs/reader@0__viewer@0.parquet")
    rho = [best_correlations(layer, np.concatenate(viewer, axis=1)) for layer in reader]
    np.testing.assert_allclose(pairs[pairs.source == "reader@0"].rho, np.concatenate(rho), atol=1e-5)
    matrix = pd.read_csv(finished.folder / TABLES / "matrices/all.csv").set_index(["source", "reading"])
    S = [layer.sum(0) for layer in reader]
    ceiling = weighted_mean(best_correlations(reader[-1], other[-1]), S[-1])
    assert matrix.ceiling["reader@0", "last"] == pytest.approx(ceiling, abs=1e-5)
    assert np.isnan(matrix.ceiling["viewer@0", "last"])
    averages = pd.read_csv(finished.folder / TABLES / "matrices/all.averages.csv").set_index(
        ["source_modality", "reading"]
    )
    for modality, source in (("text", "reader@0"), ("image", "viewer@0")):
        for reading in ("pooled", "layer_mean", "last"):
            assert averages.wmppc[modality, reading] == pytest.approx(matrix.wmppc[source, reading], abs=1e-5)
    rankings = [pd.read_csv(finished.folder / TABLES / f"sharedness/{name}.csv") for name in ("own", "seen")]
    (overlap,) = pd.read_csv(finished.folder / TABLES / "overlaps.csv").itertuples()
    assert (overlap.first, overlap.second, overlap.top) == ("own", "seen", 1)
    assert overlap.overlap == (rankings[0].feature[0] == rankings[1].feature[0])


def test_similarity_equals_a_direct_computation_from_the_activations(finished):
    stores = (
        zarr.open_group(finished.folder / f"results/squares/activations/{name}.zarr", mode="r")
        for name in ("reader", "viewer")
    )
    x, y = (store["layer-01/global"][:].astype(np.float64) for store in stores)
    x, y = x - x.mean(0), y - y.mean(0)
    cka = np.linalg.norm(y.T @ x) ** 2 / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))
    matrix = pd.read_csv(finished.folder / TABLES / "matrices/all.csv")
    assert matrix[matrix.reading == "last"].cka.tolist() == pytest.approx([cka, cka], abs=1e-4)


def test_saes_learn(finished):
    for path in (finished.folder / "results/squares/saes/tiny").rglob("loss.csv"):
        losses = pd.read_csv(path).loss
        assert losses.iloc[-1] < losses.iloc[0]


def results_of(study):
    """The bytes of every file that must be equal in two runs: all except logs and provenance."""
    folder = study.folder / "results"
    logs = folder / "logs"
    return {path: content for path, content in contents(folder).items() if not (folder / path).is_relative_to(logs)}


SAE = "results/squares/saes/tiny/viewer/layer-00/seed-0"


def test_results_do_not_depend_on_cores_parts_or_keep_tokens(finished, new_study):
    config = new_study.config | {"keep_tokens": False}
    config["encoders"]["reader"]["parts"] = 2
    new_study.config = config
    # Tables, figures and pages are compared in the tests of the streamed study.
    expected = {
        path: file
        for path, file in results_of(finished).items()
        if not path.startswith(("studies/", "squares/tokens/"))
    }
    for result in (
        new_study.run("--cores", "1", "--until", "activations", "activations_join"),
        # A separate Python for a job, as for users.
        new_study.start("snakemake", "--cores", "1", f"{SAE}/sae_weights.safetensors"),
        new_study.run("--cores", "1", "--until", "names", "examples", "correlations", "similarity"),
    ):
        assert result.returncode == 0, result.stdout + result.stderr
    found = results_of(new_study)
    stamps = {path for path in expected if path.endswith(".snakemake_timestamp")}
    assert expected.keys() - stamps <= found.keys() <= expected.keys()
    assert [path for path in found if found[path] != expected[path]] == []


def test_the_provenance_of_a_study_has_its_settings_and_versions(finished):
    record = json.loads((finished.folder / "results/studies/miniature/provenance.json").read_text())
    assert record["study"]["encoders"]["reader"]["seeds"] == [0, 1]
    assert record["study"]["encoders"]["reader"]["batch_size"] == 32  # a default
    assert record["study"]["datasets"]["squares"]["order_seed"] == 0
    assert "note" not in record["study"]["encoders"]["reader"]
    assert record["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert record["conceptshare"] == {"version": version("conceptshare"), "commit": None, "dirty": None}  # no git clone
    sae = json.loads((finished.folder / "results/squares/saes/tiny/reader/layer-01/seed-1/provenance.json").read_text())
    arguments = sae["job"]["arguments"]
    assert arguments[:2] == ["sae", "train"]
    assert arguments[arguments.index("--seed") + 1] == "1"
    assert json.loads(arguments[arguments.index("--settings") + 1])["k"] == 4


@pytest.mark.parametrize(
    ("change_config", "message"),
    [
        (
            change("saes", "tiny", "lerning_rate", to=1),
            "saes.tiny.lerning_rate: unknown key; did you mean 'learning_rate'?",
        ),
        (change("encoders", "minlm", to=None), "'minlm' is not in the catalog of encoders; did you mean 'minilm'?"),
        (change("datasets", "openclip", to=None), "'openclip' is not in the catalog of datasets"),
        (
            change("encoders", "viewer", "use_layers", to=[0, 2]),
            "layer 2, which the encoder lacks: it has layers 0 to 1",
        ),
        (change("analyses", "sharedness", "seen", "source", to="speaker"), "the study has no encoder 'speaker'"),
        (change("analyses", "matrices", "all", to={"members": ["viewer@7"]}), "viewer has the seeds [0]"),
        (change("encoders", "viewer", "model", to="./models/none"), "./models/none does not exist"),
    ],
)
def test_a_wrong_config_is_one_clear_message_before_any_job(new_study, change_config, message):
    config = new_study.config
    change_config(config)
    new_study.config = config
    result = new_study.run("--cores", "1")
    output = result.stdout + result.stderr
    assert result.returncode != 0
    assert message in output
    assert "config.yaml" in output
    assert "Traceback" not in output
    assert not (new_study.folder / "results").exists()


def spoil_captions(study):
    write_dataset(study.folder / "squares.parquet", columns=("picture", "text"))


def spoil_images(study):
    table = pd.read_parquet(study.folder / "squares.parquet")
    table["picture"] = [
        {"bytes": b"no image", "path": None} if row < 3 else image for row, image in enumerate(table.picture)
    ]
    table.to_parquet(study.folder / "squares.parquet")


def spoil_weights(study):
    path = study.folder / "models/reader/model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if "layer.1" in name and name.endswith("output.dense.bias"))
    weights[name][0] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "target", "message"),
    [
        (spoil_captions, "results/squares/data/manifest.json", "no column 'words'; the columns are picture, text"),
        (spoil_images, "results/squares/data/manifest.json", "3 of 40 rows are unusable, more than max_dropped = 0.01"),
    ],
)
def test_bad_input_fails_its_job_with_a_clear_message_and_no_output(new_study, spoil, target, message):
    spoil(new_study)
    result = new_study.run("--cores", "1", target)
    assert result.returncode != 0
    assert message in result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert not (new_study.folder / target).exists()
    assert not list(new_study.folder.rglob("*.partial"))


def test_encoders_that_do_not_fit_their_entries_fail_with_specific_messages(new_study):
    spoil_weights(new_study)
    config = new_study.config
    reader, second = config["encoders"]["reader"], {"model": "./models/second-reader"}
    config["encoders"] |= {"deep": reader | second | {"layers": 4}, "wide": reader | second | {"width": 17}}
    new_study.config = config
    stores = [f"results/squares/activations/{name}.zarr" for name in ("reader", "deep", "wide")]
    result = new_study.run("--cores", "2", "--keep-going", *stores)
    assert result.returncode != 0
    for message in (
        "reader, layer 1, sample 0: a value that is not finite",
        "2 blocks found at encoder.layer, but its entry has layers: 4",
        "width 16, but its entry has 17",
    ):
        assert message in result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert not any((new_study.folder / store).exists() for store in stores)
    assert not list(new_study.folder.rglob("*.partial"))


def test_drops_and_lists_a_few_undecodable_images_for_all_encoders(new_study):
    spoil_images(new_study)
    config = new_study.config
    config["datasets"]["squares"]["max_dropped"] = 0.1
    new_study.config = config
    stores = [f"results/squares/activations/{name}.zarr" for name in ("reader", "viewer")]
    result = new_study.run("--cores", "2", *stores)
    assert result.returncode == 0, result.stdout + result.stderr
    dropped = (new_study.folder / "results/squares/data/dropped.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in dropped] == [0, 1, 2]
    for store in stores:
        assert zarr.open_group(new_study.folder / store, mode="r")["layer-00/global"].shape[0] == 37
    (warning,) = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert warning.startswith(
        "warning: ./squares.parquet: 3 of 40 rows dropped, such as row 0: image cannot be decoded"
    )
    assert warning.endswith("results/squares/data/dropped.jsonl lists them [results/logs/squares/dataset.log]")
    again = new_study.run("--cores", "1", "results/squares/saes/tiny/reader/layer-00/seed-0/cfg.json")
    assert "rows dropped" not in again.stderr  # only jobs of this run are reported
