"""A study with SAEs of SAELens, sparsify and saev in place of its own."""

import json

import numpy as np
import pandas as pd
import pytest
import zarr
from safetensors.numpy import load_file

from tests.helpers.browser import read_data
from tests.helpers.elsewhere import run_elsewhere
from tests.sae import test_exchange

from .conftest import LAYERS, WIDTH, change

SAE_LENS = """
import itertools
from pathlib import Path
import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig, TopKSAE, TopKSAEConfig
from sparsify import SparseCoder, SparseCoderConfig

def filled(sae, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return sae

folder, size = Path(sys.argv[1]), {"d_in": 16, "d_sae": 40}
for seed in (0, 1):
    for layer, sae in enumerate((JumpReLUSAE(JumpReLUSAEConfig(**size)), TopKSAE(TopKSAEConfig(**size, k=4)))):
        sae.cfg.metadata.model_name, sae.cfg.metadata.hook_name = "bert", f"blocks.{layer}.hook_resid_post"
        filled(sae, seed).save_model(folder / f"reader/{layer}-{seed}")
filled(SparseCoder(16, SparseCoderConfig(k=4, num_latents=48)), 3).save_to_disk(folder / "viewer/layers.0")
"""


@pytest.fixture
def theirs(study, rng, monkeypatch):
    """The finished study with imported SAEs, which have not been read yet."""
    made = study.folder / "theirs"
    made.mkdir()
    run_elsewhere(["sae_lens", "transformer_lens", "sparsify", "simple_parsing", "natsort"], SAE_LENS, made)
    monkeypatch.setattr(test_exchange, "D", WIDTH)
    activation = test_exchange.saev_activation("BatchTopK", top_k=4, momentum=0.1)
    arrays = test_exchange.saev_arrays(rng)
    test_exchange.saev_file(made / "viewer/last/sae.pt", activation, threshold=0.5, **arrays)
    pretrained = {
        "reader": "./theirs/reader/{layer}-{seed}",
        "viewer": {0: "./theirs/viewer/layers.0", 1: "./theirs/viewer/last"},
    }
    assert LAYERS == 2
    config = study.config
    change("saes", to={"theirs": {"pretrained": pretrained, "train_on": "global"}})(config)
    study.config = config
    return study


def test_a_study_of_imported_saes(theirs):
    results = theirs.folder / "results"
    assert theirs.plan()["pretrained"] == theirs.plan()["sae"] == 3 * LAYERS
    wanted = ["results/studies/miniature/squares/theirs/saes.png", "results/studies/miniature/pages/index.html"]
    ended = theirs.run("--cores", "2", *wanted)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "from ./theirs/viewer/last" in (results / "logs/squares/saes/theirs/viewer/layer-01/seed-0.log").read_text()

    def features(member, layer):
        group = zarr.open_group(results / f"squares/features/theirs/{member}.zarr", mode="r")[f"layer-{layer:02d}"]
        return group["features"][:].astype(np.float64) + group["offset"][:]

    def tokens(encoder, layer):
        group = zarr.open_group(results / f"squares/activations/{encoder}.zarr", mode="r")
        return group[f"layer-{layer:02d}/global"][:].astype(np.float64)

    def latents(x, W_enc, b_enc, b_dec):
        return np.maximum((x - b_dec) @ W_enc + b_enc, 0)

    for layer in range(LAYERS):
        for seed in (0, 1):
            sae = load_file(theirs.folder / f"theirs/reader/{layer}-{seed}/sae_weights.safetensors")
            expected = latents(tokens("reader", layer), sae["W_enc"], sae["b_enc"], sae["b_dec"])
            np.testing.assert_allclose(features(f"reader@{seed}", layer), expected, rtol=2e-3, atol=2e-3)
    sparsify = load_file(theirs.folder / "theirs/viewer/layers.0/sae.safetensors")
    names = ("encoder.weight", "encoder.bias", "b_dec")
    weight, b_enc, b_dec = (sparsify[name] for name in names)
    expected = latents(tokens("viewer", 0), weight.T, b_enc, b_dec)
    np.testing.assert_allclose(features("viewer@0", 0), expected, rtol=2e-3, atol=2e-3)
    table = pd.read_csv(results / "studies/miniature/squares/theirs/saes.csv")
    assert (table.steps == 0).all()
    assert set(table.latents[table.encoder == "viewer"]) == {48, test_exchange.F}
    shown = read_data(results / "studies/miniature/pages", "study")
    assert [member["features"] for member in shown["members"]] == [{"theirs": 48}, {"theirs": 40}, {"theirs": 40}]
    assert theirs.plan(*wanted) == {}
    # Another file reruns the SAE that is read from it; another id, those that it is for.
    saev = theirs.folder / "theirs/viewer/last/sae.pt"
    saev.write_bytes(saev.read_bytes().replace(b'"lib":"0.1.0"', b'"lib":"0.1.1"'))
    changed = theirs.plan(*wanted)
    assert (changed["pretrained"], changed["sae"], changed["features"]) == (1, 1, 1)
    config = theirs.config
    change("saes", "theirs", "pretrained", "viewer", 0, to="us/saes:layers.0")(config)
    theirs.config = config
    changed = theirs.plan(*wanted)
    assert (changed["pretrained"], changed["sae"], changed["features"]) == (2, 2, 1)
    theirs.config = config | {"stream": True}
    streamed = theirs.plan("results/studies/miniature/squares/theirs/saes.png")
    assert (streamed["pretrained"], streamed["stream"], "sae" in streamed) == (2, 2, False)
    theirs.config = config
    # Without Snakemake's records, results say themselves what they were made from.
    (theirs.folder / ".snakemake").rename(theirs.folder / "moved")
    ended = theirs.run("-n", *wanted)
    assert ended.returncode == 1
    text = ended.stdout + ended.stderr
    assert "viewer/layer-00/seed-0: made with pretrained: ./theirs/viewer/layers.0, not us/saes:layers.0" in text


def test_a_wrong_width_is_an_error_before_any_job(theirs):
    config = theirs.config
    change("saes", "theirs", "pretrained", "viewer", 1, to="./theirs/wide")(config)
    theirs.config = config
    folder = theirs.folder / "theirs/wide"
    folder.mkdir()
    (folder / "cfg.json").write_text(json.dumps({"architecture": "topk", "d_in": 32, "d_sae": 64, "k": 4}))
    (folder / "sae_weights.safetensors").touch()
    ended = theirs.run("-n")
    assert ended.returncode == 1
    assert "saes.theirs.pretrained.viewer: theirs/wide: an SAE of width 32, but the encoder has width 16" in (
        ended.stdout + ended.stderr
    )
