"""A study of encoders and data on a hub: a few lines of YAML each, and no network after fetching."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from conceptshare.sae import SAE, TopK, save_sae
from tests.helpers import models
from tests.helpers.forks import forked_python
from tests.helpers.hub import environment, fetching_python, running

from .conftest import new_clone, write_dataset

pytestmark = pytest.mark.xdist_group("hub")

# Name: the model as it is on the hub, and its id in a study.
ENCODERS = {
    "reader": (models.bert, "{}"),
    "pairs-image": (models.open_clip_image, "hf-hub:{}"),
    "viewer": (models.timm_vit, "hf-hub:{}"),
    "scanner": (models.mambavision, "{}"),
}
PAIRS = [["reader", "pairs-image"], ["scanner", "viewer"]]
# Settings of an entry, other than the location of its model.
KEYS = {"library", "modality", "kind", "layers", "width", "global_token", "blocks", "remote_code"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study's clone after its run, the hub, and the number of its requests before any extraction."""
    project = new_clone(tmp_path_factory.mktemp("hub") / "clone")
    made = tmp_path_factory.mktemp("repositories")
    write_dataset(made / "squares.parquet")
    table = pd.read_parquet(made / "squares.parquet")
    table["words"] = [[caption, "a picture", "it is small"] for caption in table["words"]]
    with running() as hub:
        entries = {}
        for name, (make, written) in ENCODERS.items():
            spec = make(made / name).spec
            hub.add(f"us/{name}", made / name)
            entries[name] = {key: value for key, value in spec.model_dump(exclude_defaults=True).items() if key in KEYS}
            entries[name] |= {"library": spec.library, "model": written.format(f"us/{name}"), "use_layers": "last"}
        reader = entries["reader"]
        for layer in range(reader["layers"]):
            sae = SAE(reader["width"], 24, TopK(3), torch.Generator().manual_seed(layer))
            (made / "saes" / f"layer-{layer}").mkdir(parents=True)
            save_sae(sae, made / "saes" / f"layer-{layer}", "reader", f"layer {layer}")
        hub.add("us/saes", made / "saes", revision="v1")
        commit = hub.add("us/squares", {"data/train.parquet": table.to_parquet()}, kind="dataset")
        project.config = {
            "study": "from-a-hub",
            "datasets": {
                "squares": {
                    "source": "us/squares",
                    "image": "picture",
                    "caption": "words",
                    "several_captions": "joined",
                }
            },
            "encoders": entries,
            "saes": {
                "tiny": {
                    **{"expansion": 2, "k": 4, "learning_rate": 1e-2, "batch_captions": 16},
                    "pretrained": {"reader": "us/saes@v1:layer-{layer}"},
                }
            },
            "analyses": {"layerwise": {"all": {"pairs": PAIRS}}},
        }
        surroundings = environment(hub.endpoint, made / "cache") | {"PYTHONPATH": str(project.folder / "src")}
        surroundings.pop("HF_HUB_OFFLINE", None)

        def run(*arguments):
            command = [str(Path(sys.executable).parent / "snakemake"), "--cores", "2", *arguments]
            return subprocess.run(
                command, cwd=project.folder, env=surroundings, capture_output=True, text=True, check=False
            )

        # That users' jobs fetch from the endpoint in their environment is tested in test_safety.py.
        project.python = fetching_python(made, hub.endpoint, made / "cache/hub")
        fetched = project.run("--cores", "2", "--until", "dataset", "weights", "pretrained")
        assert fetched.returncode == 0, fetched.stdout + fetched.stderr
        before = len(hub.log), len(hub.other_requests)
        # Jobs that read encoders run as for users, to record their requests to the hub; the others do not use the hub.
        extracted = run("--until", "activations")
        assert extracted.returncode == 0, extracted.stdout + extracted.stderr
        project.python = str(forked_python())
        rest = project.run("--cores", "2", "--until", "metrics_layerwise")
        assert rest.returncode == 0, rest.stdout + rest.stderr
        return project, hub, before, commit


def test_compares_encoders_of_every_library_and_with_custom_code(finished):
    project, _, _, _ = finished
    table = pd.read_csv(project.folder / "results/studies/from-a-hub/squares/tiny/layerwise/all.csv")
    assert set(table.source) == {f"{name}@0" for name in ENCODERS}
    assert table.wmppc.between(0, 1.0001).all()


def test_only_data_and_weights_are_requested_from_the_hub(finished):
    _, hub, before, _ = finished
    assert before[0] > 0
    assert (len(hub.log), len(hub.other_requests)) == before


def test_fetches_code_only_for_models_that_may_run_it(finished):
    _, hub, _, _ = finished
    code = {request.path.split("/")[2] for request in hub.log if request.path.endswith(".py")}
    assert code == {"scanner"}


def test_records_the_commits_that_were_read(finished):
    project, hub, _, commit = finished
    (imported,) = (project.folder / "results/pretrained/tiny/reader").glob("*/seed-0/manifest.json")
    origin = json.loads(imported.read_text())["spec"]["imported_from"]
    assert origin["source"] == f"us/saes@v1:layer-{int(imported.parts[-3][-2:])}"
    assert origin["revision"] == hub.commit("us/saes", "v1")
    assert not list((project.folder / "results/pretrained/tiny").glob("[!r]*"))
    manifest = json.loads((project.folder / "results/squares/data/manifest.json").read_text())
    assert manifest["revision"] == commit
    assert manifest["several_captions"] == "joined"
    assert manifest["rows"] == 40
    for name in ENCODERS:
        record = json.loads((project.folder / f"results/weights/{name}.json").read_text())
        assert len(record["revision"]) == 40
        assert os.path.basename(record["location"]) == record["revision"]  # noqa: PTH119 - a location is text
