"""An image encoder compared with arrays, those that it computes, and with an encoder whose layers differ in width.

A decoder's two modalities are compared with each other.
"""

import json

import numpy as np
import pandas as pd
import pytest
import zarr

from conceptshare.data.dataset import Data
from tests.helpers import decoders, models
from tests.helpers.samples import contents

from .conftest import LAYERS, WIDTH, WORDS, encoder_entry

ENTRY = {"library": "arrays", "model": "./given", "modality": "image", "kind": "vision"}


@pytest.fixture(scope="module")
def before(finished, tmp_path_factory):
    """The study with arrays and a decoder, before they are read."""
    project = finished.copy(tmp_path_factory.mktemp("arrays") / "clone")
    given = project.folder / "given"
    given.mkdir()
    store = zarr.open_group(project.folder / "results/squares/activations/viewer.zarr", mode="r")
    for layer in range(LAYERS):
        np.save(given / f"layer-{layer:02d}.npy", store[f"layer-{layer:02d}/global"][:].astype(np.float32))
    (given / "ids.json").write_text(json.dumps(Data(project.folder / "results/squares/data").ids()))
    config = project.config
    config["encoders"] = {"viewer": config["encoders"]["viewer"], "given": ENTRY | {"layers": LAYERS, "width": WIDTH}}
    decoders.decoder("Llava", project.folder / "models/decoder", WORDS)
    for name, modality in (("seeing", "image"), ("reading", "text")):
        entry = decoders.decoder_entry("Llava", "./models/decoder", modality)
        config["encoders"][name] = entry.model_dump(exclude_defaults=True)
    models.save_timm(project.folder / "models/stages", "test_convnext")
    stages = {"library": "timm", "blocks": "stages", "layers": 4, "width": [24, 32, 48, 64], "global_token": "mean"}
    config["encoders"]["stages"] = encoder_entry("./models/stages", "image", "vision", **stages)
    del config["saes"]["tiny"]["expansion"]
    config["saes"]["tiny"] |= {"train_on": "global", "features": 32}
    config["analyses"] = {
        "matrices": {"all": {"members": ["viewer", "given", "stages"]}},
        "layerwise": {"modalities": {"pairs": [["seeing", "reading"]]}},
    }
    project.config = config
    return project


@pytest.fixture(scope="module")
def after(before, tmp_path_factory):
    """The study after its run."""
    project = before.copy(tmp_path_factory.mktemp("after") / "clone")
    ended = project.run("--cores", "2", "--until", "metrics_matrix", "metrics_layerwise", "pages_member")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return project


def test_arrays_are_a_member_like_any_other(after):
    results = after.folder / "results"
    given, viewer = (contents(results / f"squares/activations/{name}.zarr") for name in ("given", "viewer"))
    layers = [name for name in given if name.startswith("layer-")]
    assert len(layers) == 3 * LAYERS
    assert [given[name] for name in layers] == [viewer[name] for name in layers]
    matrix = pd.read_csv(results / "studies/miniature/squares/tiny/matrices/all.csv")
    pair = matrix[(matrix.source == "given@0") & (matrix.target == "viewer@0") & (matrix.reading == "last")]
    assert pair.cka.tolist() == pytest.approx([1])
    pages = contents(results / "studies/miniature/pages/data/squares/tiny/given@0")
    assert len([name for name in pages if name.startswith("layer-") and name.endswith("/000.js")]) == LAYERS
    assert not [name for name in pages if "maps" in name]


def test_layers_of_several_widths_are_compared_like_any_others(after):
    results = after.folder / "results"
    matrix = pd.read_csv(results / "studies/miniature/squares/tiny/matrices/all.csv")
    cells = matrix[(matrix.source == "stages@0") & (matrix.target == "viewer@0")]
    assert cells.wmppc.between(0.01, 1).all()
    pages = contents(results / "studies/miniature/pages/data/squares/tiny/stages@0")
    assert len([name for name in pages if name.startswith("layer-") and name.endswith("/000.js")]) == 4


def test_a_decoders_modalities_are_compared_layer_by_layer(after):
    results = after.folder / "results"
    table = pd.read_csv(results / "studies/miniature/squares/tiny/layerwise/modalities.csv")
    assert len(table) == 2 * decoders.LAYERS**2
    assert table.wmppc.between(0.01, 1).all()
    layers = [contents(results / f"squares/activations/{name}.zarr/layer-00") for name in ("seeing", "reading")]
    assert layers[0] != layers[1]


def test_only_encoders_need_a_gpu(before):
    for encoder, gpus in (("given", 0), ("viewer", 1)):
        planned = before.run("-n", "--forcerun", "activations", "--", f"results/squares/activations/{encoder}.zarr")
        assert f"gpu={gpus}" in planned.stdout + planned.stderr


def test_arrays_in_another_order_are_refused_before_other_jobs(before, tmp_path):
    project = before.copy(tmp_path / "clone")
    file = project.folder / "given/ids.json"
    first, second, *rest = json.loads(file.read_text())
    file.write_text(json.dumps([second, first, *rest]))
    ended = project.run("--cores", "2", "results/squares/activations/given.zarr")
    assert ended.returncode != 0
    log = (project.folder / "results/logs/weights/given.log").read_text()
    assert "error: given/ids.json: row 0 is sample" in log
    assert not (project.folder / "results/squares/activations/given.zarr").exists()
