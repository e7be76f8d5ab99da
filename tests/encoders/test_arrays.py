"""Arrays in place of an encoder are stored as they are, if they are those of the data set's samples."""

import json

import numpy as np
import pytest
import torch
import zarr
from safetensors.torch import save_file
from typer.testing import CliRunner

from conceptshare.activations.extraction import extract_activations
from conceptshare.cli import app
from conceptshare.config.catalog import DatasetSpec, EncoderSpec
from conceptshare.config.settings import SAESettings
from conceptshare.data.dataset import Data, make_dataset
from conceptshare.encoders import Arrays, load_encoder
from conceptshare.io.errors import EncoderError, NumericsError
from conceptshare.io.store import open_store
from conceptshare.sae import train_stream
from tests.helpers import models
from tests.helpers.samples import contents, write_rows

SAMPLES, WIDTH, LAYERS = 70, 16, 2
ENTRY = {"library": "arrays", "modality": "text", "kind": "language", "layers": LAYERS, "width": WIDTH}


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder / "rows.parquet", SAMPLES, models.WORDS)
    make_dataset(DatasetSpec(source=str(folder / "rows.parquet")), folder / "made")
    return folder / "made"


@pytest.fixture(scope="module")
def data(data_folder):
    return Data(data_folder)


def write(path, array):
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".zarr":
        zarr.save_array(path, array)
    else:
        save_file({"any name": torch.as_tensor(array)}, path)


@pytest.fixture
def folder(tmp_path, data):
    """A folder of arrays of each format, with the ids of the data set."""
    made = tmp_path / "arrays"
    made.mkdir()
    for layer, ending in enumerate([".npy", ".safetensors"]):
        write(made / f"layer-{layer:02d}{ending}", values(layer))
    (made / "ids.json").write_text(json.dumps(data.ids()))
    return made


def values(layer, dtype=np.float32):
    return np.random.default_rng(layer).standard_normal((SAMPLES, WIDTH)).astype(dtype)


def entry(folder, **changes):
    return EncoderSpec(**{**ENTRY, "model": str(folder), **changes})


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("ending", [".npy", ".safetensors", ".zarr"])
def test_the_store_holds_the_arrays_in_float16(data, tmp_path, ending, dtype):
    folder = tmp_path / "arrays"
    folder.mkdir()
    for layer in range(LAYERS):
        write(folder / f"layer-{layer:02d}{ending}", values(layer, dtype))
    (folder / "ids.json").write_text(json.dumps(data.ids()))
    extract_activations(Arrays(entry(folder), folder, data), data, tmp_path / "mine.zarr")
    store = open_store(tmp_path / "mine.zarr", "activations")
    for layer in range(LAYERS):
        assert np.array_equal(store[f"layer-{layer:02d}/global"][:], values(layer, dtype).astype(np.float16))


def test_bfloat16_is_read_from_safetensors(data, folder):
    x = torch.from_numpy(values(1)).bfloat16()
    write(folder / "layer-01.safetensors", x)
    assert torch.equal(Arrays(entry(folder), folder, data).rows(1, 3, 9), x[3:9].float())


def test_only_the_recorded_layers_are_read(data, folder, tmp_path):
    extract_activations(Arrays(entry(folder, use_layers="last"), folder, data), data, tmp_path / "mine.zarr")
    assert list(open_store(tmp_path / "mine.zarr", "activations").group_keys()) == ["layer-01"]


def test_saes_are_trained_on_arrays_as_on_an_encoder_that_gives_the_same(data, folder, tmp_path):
    spec = models.bert(tmp_path / "bert").spec
    encoder = load_encoder(spec)
    settings = SAESettings(train_on="global", expansion=2, k=3, epochs=2, held_out=0.1)
    train_stream(encoder, data, settings, [0], tmp_path / "a/tiny", tmp_path / "a/tiny.zarr")
    store = open_store(tmp_path / "a/tiny.zarr", "activations")
    for path in folder.glob("layer-*"):
        path.unlink()
    for layer in range(spec.layers):
        write(folder / f"layer-{layer:02d}.npy", store[f"layer-{layer:02d}/global"][:])
    arrays = Arrays(entry(folder, layers=spec.layers), folder, data)
    train_stream(arrays, data, settings, [0], tmp_path / "b/tiny", tmp_path / "b/tiny.zarr")
    weights = [
        {name: x for name, x in contents(tmp_path / run / "tiny").items() if name.endswith((".safetensors", ".csv"))}
        for run in "ab"
    ]
    assert len(weights[0]) == 3 * spec.layers
    assert weights[0] == weights[1]


def change_ids(change):
    def apply(folder):
        file = folder / "ids.json"
        file.write_text(json.dumps(change(json.loads(file.read_text()))))

    return apply


def swapped(ids):
    return [*ids[:4], ids[5], ids[4], *ids[6:]]


def with_value(number):
    def apply(folder):
        x = values(1)
        x[42, 3] = number
        write(folder / "layer-01.safetensors", x)

    return apply


FAULTS = {
    "order": (change_ids(swapped), r"ids\.json: row 4 is sample '\d+', but the data set's is '\d+'; sort ids and rows"),
    "missing": (change_ids(lambda ids: ids[:-2]), r"lacks 2 of the data set's 70 samples, such as '\d+'; add them"),
    "more": (change_ids(lambda ids: [*ids, "x"]), "has 1 samples that the data set lacks, such as 'x'; leave out"),
    "twice": (change_ids(lambda ids: [*ids, ids[0]]), r"has '\d+' more than once; give each sample one row"),
    "numbers": (change_ids(lambda ids: list(range(len(ids)))), r"none of the data set's ids, such as '\d+'; write"),
    "no list": (change_ids(lambda ids: {"ids": ids}), "not a list of ids; write a JSON list"),
    "no ids": (lambda folder: (folder / "ids.json").unlink(), r"ids\.json: cannot be read .*; write the list"),
    "layers": (
        lambda folder: write(folder / "layer-02.npy", values(2)),
        "holds .*layer-02.npy, but .* layers: 2; name",
    ),
    "none": (lambda folder: (folder / "layer-00.npy").unlink(), r"holds layer-01\.safetensors, but .* layers: 2; name"),
    "both": (
        lambda folder: write(folder / "layer-00.zarr", values(0)),
        r"00\.npy: layer-00\.zarr is the same layer; re",
    ),
    "rows": (lambda folder: write(folder / "layer-00.npy", values(0)[1:]), "has 69 rows, but ids.json 70 ids"),
    "width": (lambda folder: write(folder / "layer-00.npy", values(0)[:, 1:]), "has the width 15, .*; set width: 15$"),
    "tokens": (
        lambda folder: write(folder / "layer-00.npy", values(0)[None]),
        r"the shape \[1, 70, 16\]; write one ve",
    ),
    "integers": (lambda folder: write(folder / "layer-00.npy", values(0).astype(int)), "type int64; write floating"),
    "objects": (lambda folder: np.save(folder / "layer-00.npy", [{}]), r"layer-00\.npy: cannot be read .*; write it a"),
    "two": (
        lambda folder: save_file({"a": torch.ones(2), "b": torch.ones(2)}, folder / "layer-01.safetensors"),
        "has 2",
    ),
    "nan": (with_value(np.nan), r"layer-01\.safetensors, sample \d{8}: a value that is not finite; correct"),
    "large": (with_value(1e5), r"sample \d{8}: 1e[+]05 is beyond float16's 65504; .* divide the whole array"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_weights_stage_reports_a_fault_in_one_line_and_leaves_no_record(folder, data_folder, tmp_path, fault):
    spoil, message = FAULTS[fault]
    spec = json.dumps(entry(folder).model_dump(mode="json", exclude_defaults=True))
    command = ["weights", "--encoder", spec, "--data", str(data_folder), "--out"]
    assert CliRunner().invoke(app, [*command, str(tmp_path / "right.json")]).exit_code == 0
    spoil(folder)
    ended = CliRunner().invoke(app, [*command, str(tmp_path / "wrong.json")])
    assert isinstance(ended.exception, EncoderError | NumericsError)
    assert "\n" not in str(ended.exception)
    with pytest.raises(type(ended.exception), match=message):
        raise ended.exception
    assert not (tmp_path / "wrong.json").exists()


def test_a_layer_of_equal_rows_is_a_warning(folder, data, capsys):
    arrays = Arrays(entry(folder), folder, data)
    arrays.check_values()
    assert not capsys.readouterr().err
    write(folder / "layer-00.npy", np.ones((SAMPLES, WIDTH), np.float32))
    Arrays(entry(folder), folder, data).check_values()
    assert "layer-00.npy: all rows are equal; unless intended" in capsys.readouterr().err


def test_arrays_read_no_samples(folder):
    with pytest.raises(EncoderError, match="arrays cannot read samples; name an encoder of a library"):
        load_encoder(entry(folder))


def test_checking_a_study_reads_its_arrays_and_their_ids_once_the_data_set_is_made(
    folder, data_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONCEPTSHARE_DEVICE", "cpu")
    spec = entry("arrays").model_dump(mode="json", exclude_defaults=True)
    study = {"study": "s", "datasets": {"mine": {"source": "hub/x"}}, "encoders": {"given": spec}}
    (tmp_path / "study.yaml").write_text(json.dumps(study | {"saes": {"small": {"preset": "global"}}}))
    change_ids(swapped)(folder)
    command = ["check", "--study", "study.yaml", "--load"]
    before = CliRunner().invoke(app, command)
    assert before.exit_code == 0
    assert "arrays: 70 samples, 2 layers of width 16; their ids are checked when the data set is made" in before.stderr
    (tmp_path / "results/mine").mkdir(parents=True)
    (tmp_path / "results/mine/data").symlink_to(data_folder)
    after = CliRunner().invoke(app, command)
    assert after.exit_code == 1
    assert "error: encoders.given: arrays/ids.json: row 4 is sample" in after.stderr
