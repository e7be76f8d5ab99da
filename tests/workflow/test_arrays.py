"""An image encoder compared with arrays: those that it computes."""

import json

import numpy as np
import pandas as pd
import pytest
import zarr

from conceptshare.data.dataset import Data
from tests.helpers.samples import contents

from .conftest import LAYERS, WIDTH

ENTRY = {"library": "arrays", "model": "./given", "modality": "image", "kind": "vision"}


@pytest.fixture(scope="module")
def before(finished, tmp_path_factory):
    """The study with arrays, before they are read."""
    project = finished.copy(tmp_path_factory.mktemp("arrays") / "clone")
    given = project.folder / "given"
    given.mkdir()
    store = zarr.open_group(project.folder / "results/squares/activations/viewer.zarr", mode="r")
    for layer in range(LAYERS):
        np.save(given / f"layer-{layer:02d}.npy", store[f"layer-{layer:02d}/global"][:].astype(np.float32))
    (given / "ids.json").write_text(json.dumps(Data(project.folder / "results/squares/data").ids()))
    config = project.config
    config["encoders"] = {"viewer": config["encoders"]["viewer"], "given": ENTRY | {"layers": LAYERS, "width": WIDTH}}
    config["saes"]["tiny"]["train_on"] = "global"
    config["analyses"] = {"matrices": {"all": None}}
    project.config = config
    return project


def test_arrays_are_a_member_like_any_other(before, tmp_path):
    project = before.copy(tmp_path / "clone")
    ended = project.run("--cores", "2", "--until", "metrics_matrix", "pages_member")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    results = project.folder / "results"
    given, viewer = (contents(results / f"squares/activations/{name}.zarr") for name in ("given", "viewer"))
    layers = [name for name in given if name.startswith("layer-")]
    assert len(layers) == 3 * LAYERS
    assert [given[name] for name in layers] == [viewer[name] for name in layers]
    matrix = pd.read_csv(results / "studies/miniature/squares/tiny/matrices/all.csv")
    pair = matrix[(matrix.source == "given@0") & (matrix.target == "viewer@0") & (matrix.reading == "last")]
    assert pair.cka.tolist() == pytest.approx([1])
    pages = contents(results / "studies/miniature/pages/data/squares/tiny/given@0")
    assert len([name for name in pages if name.endswith("/000.js")]) == LAYERS
    assert not [name for name in pages if "maps" in name]


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
