"""Import from and export to other libraries, against their real code; and `sae info`."""

import json
import os
import subprocess
import sys
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from conceptshare.cli import app
from conceptshare.config.settings import SAESettings
from conceptshare.io import seals
from conceptshare.io.errors import HubError, StoreError
from conceptshare.sae import SAE, JumpReLU, TopK, load_sae, save_sae
from conceptshare.sae._trainer import Trainer
from conceptshare.sae.exchange import export_to_sparsify, import_sae
from conceptshare.sae.folder import describe_sae
from tests.helpers import hub
from tests.helpers.elsewhere import run_elsewhere

D, F, K = 8, 24, 4
STEPS = 40
TRAINED = {
    "topk": {},
    "batchtopk": {"activation": "batchtopk"},
    "matryoshka": {"activation": "batchtopk", "matryoshka": [3, 10]},
}
# float32 results of two libraries differ only by rounding; latents and reconstructions are of size 1 to 20.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def some_sae():
    """An SAE none of whose parameters is zero, with decoder rows of many lengths."""
    generator = torch.Generator().manual_seed(0)
    sae = SAE(D, F, TopK(K), generator)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_(generator=generator)
    return sae


def tokens():
    return torch.randn(200, D, generator=torch.Generator().manual_seed(1)) + 1


def trainer(name):
    """With the settings of SAELens's training below, whose loss is a sum over dimensions, and its clipped norm 1."""
    options = {"expansion": F // D, "k": K, "learning_rate": 1e-2, "clip_norm": 1 / D, "encoder_bias": True}
    return Trainer(D, SAESettings(**options, **TRAINED[name]), 0, STEPS, torch.device("cpu"))


def batches():
    """``[steps, T, D]`` tokens of varying length, so that BatchTopK keeps more latents of some."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(STEPS, 50, D, generator=generator) * torch.rand(STEPS, 50, 1, generator=generator) + 1


def saved_tensors(sae):
    """Copies of the weights, as SAELens names them."""
    return {name: getattr(sae, name).detach().clone().contiguous() for name in ("W_enc", "W_dec", "b_enc", "b_dec")}


@pytest.fixture
def sealed(tmp_path):
    """An SAE's folder as `save_sae` writes it."""
    (tmp_path / "own").mkdir()
    save_sae(some_sae(), tmp_path / "own", "vit", "layer 3")
    return tmp_path / "own"


@pytest.fixture
def own(sealed):
    """The same as SAELens would write it: without checksums, so that tests can change it."""
    (sealed / "manifest.json").unlink()
    return sealed


def contents(folder):
    """The files that other libraries read."""
    ours = {"manifest.json", "provenance.json"}
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in ours}


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors", "manifest.json"])
def test_names_a_changed_file_of_a_sealed_folder(sealed, tmp_path, name, rng):
    whole = (sealed / name).read_bytes()
    uses = (
        load_sae,
        describe_sae,
        partial(import_sae, out=tmp_path / "out"),
        partial(export_to_sparsify, out=tmp_path),
    )
    for place in rng.choice(len(whole), 20, replace=False):
        changed = bytearray(whole)
        changed[place] ^= 1 << rng.integers(8)
        (sealed / name).write_bytes(changed)
        for use in uses:
            with pytest.raises(StoreError, match=rf"^{sealed}: {name} [^\n]*run the sae stage again$"):
                use(sealed)
    (sealed / name).write_bytes(whole)
    load_sae(sealed)


def new_folder(folder):
    folder.mkdir()
    return folder


def edit(folder, **keys):
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**config, **keys}))


def edit_tensors(folder, **tensors):
    (path,) = folder.glob("*.safetensors")
    save_file({name: x.contiguous() for name, x in {**load_file(path), **tensors}.items()}, path)


@torch.no_grad()
def latents_and_reconstruction(folder, x):
    """``[T, F]`` latents that reach the decoder and ``[T, D]`` reconstructions."""
    sae = load_sae(folder)
    active = sae.active(x)
    return {"latents": active.dense(F), "reconstruction": sae.decode(active)}


def assert_same(found, expected, **tolerance):
    assert expected["latents"].count_nonzero() > 100 * K
    for name in ("latents", "reconstruction"):
        torch.testing.assert_close(found[name], expected[name], **(tolerance or CLOSE), msg=lambda m, n=name: n + m)


# --- SAELens ---

SAE_LENS = """
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from sae_lens import SAE, GatedSAE, GatedSAEConfig, JumpReLUSAE, JumpReLUSAEConfig
from sae_lens import StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig
from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens import MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

folder = Path(sys.argv[1])
x = load_file(folder / "x.safetensors")["x"]

def record(sae, name):
    with torch.no_grad():
        save_file({"latents": sae.encode(x), "reconstruction": sae(x)}, folder / f"{name}.safetensors")

def filled(sae):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return sae

for name in ("own", "own-topk", "own-batchtopk", "own-matryoshka"):
    record(SAE.load_from_disk(folder / name), name)
def centred(sae):
    sae.cfg.metadata.model_from_pretrained_kwargs = {"center_writing_weights": True}
    sae.save_model(folder / "centred")
    with torch.no_grad():
        latents = sae.encode(x - x.mean(1, keepdim=True))
        save_file({"latents": latents, "reconstruction": sae.decode(latents)}, folder / "centred.safetensors")
size = {"d_in": 8, "d_sae": 24}
variants = {
    "plain": {},
    "not-subtracted": {"apply_b_dec_to_input": False},
    "rescaled": {"rescale_acts_by_decoder_norm": True},
    "both": {"apply_b_dec_to_input": False, "rescale_acts_by_decoder_norm": True},
    "bfloat16": {"dtype": "bfloat16"},
    "layer_norm": {"normalize_activations": "layer_norm"},
    "constant_norm_rescale": {"normalize_activations": "constant_norm_rescale"},
    "expected_average_only_in": {"normalize_activations": "expected_average_only_in"},
    "covariance_whitening": {"normalize_activations": "covariance_whitening"},
}
centred(filled(TopKSAE(TopKSAEConfig(**size, k=4))))
for name, keys in variants.items():
    sae = filled(TopKSAE(TopKSAEConfig(**size, k=4, **keys)))
    sae.cfg.metadata.model_name, sae.cfg.metadata.hook_name = "gpt2", "blocks.5.hook_resid_post"
    sae.save_model(folder / name)
    record(sae.to(dtype=torch.float32), name)
sae = TopKSAE(TopKSAEConfig(**size, k=4, reshape_activations="hook_z"))
sae.save_model(folder / "hook_z")
for name, rescaled in (("training", True), ("training-plain", False)):
    sae = filled(TopKTrainingSAE(TopKTrainingSAEConfig(**size, k=4, rescale_acts_by_decoder_norm=rescaled)))
    sae.save_model(folder / name)
    sae.save_inference_model(folder / f"{name}-inference")
    record(sae, name)
    record(SAE.load_from_disk(folder / f"{name}-inference"), f"{name}-inference")
for name, kind, config in (("standard", StandardSAE, StandardSAEConfig), ("jumprelu", JumpReLUSAE, JumpReLUSAEConfig)):
    for suffix, keys in (("", {}), ("-not-subtracted", {"apply_b_dec_to_input": False})):
        sae = filled(kind(config(**size, **keys)))
        sae.save_model(folder / (name + suffix))
        record(sae, name + suffix)

batches = load_file(folder / "batches.safetensors")["batches"]
settings = SAETrainerConfig(batches[..., 0].numel(), len(batches[0]), lr=1e-2, lr_end=1e-2)
for name, kind, config, keys in (
    ("topk", TopKTrainingSAE, TopKTrainingSAEConfig, {}),
    ("batchtopk", BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, {}),
    (
        "matryoshka",
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
        {"matryoshka_widths": [3, 10, 24]},
    ),
):
    sae = kind(config(**size, k=4, rescale_acts_by_decoder_norm=False, **keys))
    sae.load_state_dict(load_file(folder / "start.safetensors"), strict=False)
    trainer = SAETrainer(settings, sae, iter(batches))
    outputs = [trainer.step(batch) for batch in batches]
    first = {key: getattr(outputs[0], key).detach() for key in ("hidden_pre", "feature_acts", "sae_out")}
    losses = {key: torch.tensor([float(each.losses[key]) for each in outputs]) for key in outputs[0].losses}
    save_file({**first, **losses, **sae.state_dict()}, folder / f"{name}-steps.safetensors")
    sae.save_model(folder / f"{name}-trained")
    sae.save_inference_model(folder / f"{name}-trained-inference")
    for saved in (f"{name}-trained", f"{name}-trained-inference"):
        record(SAE.load_from_disk(folder / f"{name}-trained-inference"), saved)
sae = filled(BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**size, k=4)))
sae.topk_threshold += 3
sae.save_model(folder / "batchtopk-rescaled")
sae.save_inference_model(folder / "batchtopk-rescaled-inference")
record(SAE.load_from_disk(folder / "batchtopk-rescaled-inference"), "batchtopk-rescaled")

gated = filled(GatedSAE(GatedSAEConfig(**size)))
gated.save_model(folder / "gated")
"""


@pytest.fixture(scope="module")
def sae_lens(tmp_path_factory):
    """Folders saved by SAELens, each with its results; the same for one of our folders."""
    folder = tmp_path_factory.mktemp("sae-lens")
    (folder / "own").mkdir()
    save_sae(some_sae(), folder / "own", "vit", "layer 3")
    save_file({"x": tokens()}, folder / "x.safetensors")
    save_file({"batches": batches()}, folder / "batches.safetensors")
    save_file(saved_tensors(trainer("topk").sae), folder / "start.safetensors")
    for name in TRAINED:
        training = trainer(name)
        for batch in batches():
            training.train_on(batch)
        save_sae(training.finish(), new_folder(folder / f"own-{name}"), "vit", "layer 3")
    run_elsewhere(["sae_lens", "transformer_lens"], SAE_LENS, folder)
    return folder


@pytest.mark.xdist_group("sae_lens")
@pytest.mark.parametrize("name", ["own", *(f"own-{name}" for name in TRAINED)])
def test_sae_lens_reads_our_folder(sae_lens, name):
    expected = load_file(sae_lens / f"{name}.safetensors")
    assert_same(latents_and_reconstruction(sae_lens / name, tokens()), expected)


@pytest.mark.xdist_group("sae_lens")
@pytest.mark.parametrize("name", TRAINED)
def test_trains_like_sae_lens_step_by_step(sae_lens, name):
    expected, training = load_file(sae_lens / f"{name}-steps.safetensors"), trainer(name)
    first, sae = batches()[0], training.sae
    with torch.no_grad():
        torch.testing.assert_close(sae.encode(first), expected["hidden_pre"].relu(), **CLOSE)
        active = sae.active(first)
        torch.testing.assert_close(active.dense(F), expected["feature_acts"], **CLOSE)
        torch.testing.assert_close(sae.decode(active), expected["sae_out"], **CLOSE)
    assert name == "topk" or len({*(active.dense(F) > 0).sum(1).tolist()}) > 5
    for batch in batches():
        training.train_on(batch)
    np.testing.assert_allclose(D * training.losses, expected["mse_loss"], rtol=1e-3)
    assert expected["mse_loss"][-1] < 0.5 * expected["mse_loss"][0]
    for tensor, own in saved_tensors(sae).items():
        # Adam divides by gradients; of one that is nearly 0, it magnifies rounding.
        torch.testing.assert_close(own, expected[tensor], rtol=0, atol=5e-3, msg=tensor)
        start = load_file(sae_lens / "start.safetensors")[tensor]
        assert (own - start).abs().max() > 0.1
    if name != "topk":
        # SAELens's moving average starts at 0; ours is divided by the sum of its weights.
        average = expected["topk_threshold"].item()
        assert sae.activation.average.item() == pytest.approx(average, rel=1e-4)
        threshold = training.finish().activation.threshold
        torch.testing.assert_close(threshold, torch.full((F,), average / (1 - 0.99**STEPS)), rtol=1e-4, atol=0)


@pytest.mark.xdist_group("sae_lens")
@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "not-subtracted",
        "rescaled",
        "both",
        "centred",
        "bfloat16",
        "training",
        "training-inference",
        "training-plain",
        "training-plain-inference",
        "standard",
        "standard-not-subtracted",
        "jumprelu",
        "jumprelu-not-subtracted",
        "batchtopk-trained",
        "batchtopk-trained-inference",
        "batchtopk-rescaled",
        "matryoshka-trained",
    ],
)
def test_imported_sae_lens_saes_compute_the_same(sae_lens, tmp_path, name):
    import_sae(sae_lens / name, tmp_path / "imported")
    expected = load_file(sae_lens / f"{name}.safetensors")
    assert_same(latents_and_reconstruction(tmp_path / "imported", tokens()), expected)
    assert all(x.dtype == torch.float32 for x in load_file(tmp_path / "imported" / "sae_weights.safetensors").values())


@pytest.mark.xdist_group("sae_lens")
def test_an_import_records_its_source(sae_lens, tmp_path):
    import_sae(sae_lens / "rescaled", tmp_path / "imported")
    lines = describe_sae(tmp_path / "imported").splitlines()
    assert lines[:2] == ["encoder             gpt2", "layer               blocks.5.hook_resid_post"]
    assert not any(line.startswith("to be imported") for line in lines)
    assert "to be imported      rescale_acts_by_decoder_norm: True" in describe_sae(sae_lens / "rescaled")


@pytest.mark.xdist_group("sae_lens")
@pytest.mark.parametrize(
    "name", ["plain", "bfloat16", "training-plain", "training-plain-inference", "standard", "jumprelu"]
)
def test_loads_equivalent_sae_lens_saes_directly(sae_lens, name):
    expected = load_file(sae_lens / f"{name}.safetensors")
    assert_same(latents_and_reconstruction(sae_lens / name, tokens()), expected)


@pytest.mark.xdist_group("sae_lens")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("layer_norm", "normalize_activations = 'layer_norm'"),
        ("constant_norm_rescale", "normalize_activations = 'constant_norm_rescale'"),
        ("expected_average_only_in", "normalize_activations = 'expected_average_only_in'"),
        ("covariance_whitening", "normalize_activations = 'covariance_whitening'"),
        ("hook_z", "reshape_activations = 'hook_z'"),
        ("gated", "architecture = 'gated'"),
    ],
)
def test_refuses_sae_lens_saes_that_compute_something_else(sae_lens, tmp_path, name, message):
    with pytest.raises(
        StoreError, match=f"{name}: {message} is not supported; only SAELens's TopK, JumpReLU and standard SAEs"
    ):
        import_sae(sae_lens / name, tmp_path / "imported")
    with pytest.raises(StoreError, match=f"{name}: cfg.json has {message}, .*`conceptshare sae import .*{name} --out"):
        load_sae(sae_lens / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.xdist_group("sae_lens")
@pytest.mark.parametrize("name", ["not-subtracted", "rescaled", "both", "training", "training-inference"])
def test_refuses_to_load_saes_that_need_folding(sae_lens, name):
    with pytest.raises(StoreError, match=rf"{name}: cfg.json has .*`conceptshare sae import .*{name} --out FOLDER`"):
        load_sae(sae_lens / name)


# --- sparsify ---

SPARSIFY = """
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from sparsify import SparseCoder, SparseCoderConfig

folder = Path(sys.argv[1])
x = load_file(folder / "x.safetensors")["x"]

def record(sae, name):
    with torch.no_grad():
        values, indices, _ = sae.encode(x)
        latents = torch.zeros(len(x), sae.num_latents).scatter(1, indices, values)
        # With multi_topk, forward gives the reconstruction from four times as many latents, for its loss.
        reconstruction = sae.decode(values, indices) if sae.cfg.multi_topk else sae(x).sae_out
        save_file({"latents": latents, "reconstruction": reconstruction}, folder / f"{name}.safetensors")

record(SparseCoder.load_from_disk(folder / "exported"), "exported")
variants = {
    "layers.5": {},
    "by-expansion": {"num_latents": 0, "expansion_factor": 3},
    "multi_topk": {"multi_topk": True},
    "bfloat16": {},
    "groupmax": {"activation": "groupmax"},
    "transcode": {"transcode": True},
    "skip_connection": {"skip_connection": True},
}
generator = torch.Generator().manual_seed(2)
for name, keys in variants.items():
    sae = SparseCoder(8, SparseCoderConfig(**{"k": 4, "num_latents": 24, **keys}))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    if name == "bfloat16":
        sae = sae.bfloat16()
    sae.save_to_disk(folder / name)
    record(sae.float(), name)
"""


@pytest.fixture(scope="module")
def sparsify(tmp_path_factory):
    """Folders saved by sparsify, each with its results; the same for one of our exports."""
    folder = tmp_path_factory.mktemp("sparsify")
    (folder / "own").mkdir()
    save_sae(some_sae(), folder / "own", "vit", "layer 3")
    export_to_sparsify(folder / "own", folder / "exported")
    save_file({"x": tokens()}, folder / "x.safetensors")
    run_elsewhere(["sparsify", "simple_parsing", "natsort"], SPARSIFY, folder)
    return folder


@pytest.mark.xdist_group("sparsify")
def test_sparsify_reads_our_export(sparsify):
    assert_same(latents_and_reconstruction(sparsify / "own", tokens()), load_file(sparsify / "exported.safetensors"))


@pytest.mark.xdist_group("sparsify")
@pytest.mark.parametrize("name", ["layers.5", "by-expansion", "multi_topk", "bfloat16"])
def test_imported_sparsify_saes_compute_the_same(sparsify, tmp_path, name):
    import_sae(sparsify / name, tmp_path / "imported")
    expected = load_file(sparsify / f"{name}.safetensors")
    assert_same(latents_and_reconstruction(tmp_path / "imported", tokens()), expected)
    assert f"layer               {name}" in describe_sae(tmp_path / "imported")


@pytest.mark.xdist_group("sparsify")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("groupmax", "activation = 'groupmax'"),
        ("transcode", "transcode = True"),
        ("skip_connection", "skip_connection = True"),
    ],
)
def test_refuses_sparsify_saes_that_compute_something_else(sparsify, tmp_path, name, message):
    with pytest.raises(
        StoreError,
        match=f"{name}: {message} is not supported; only sparsify's TopK SAEs, without transcoding",
    ):
        import_sae(sparsify / name, tmp_path / "imported")
    assert not list(tmp_path.iterdir())


# --- saev ---


def saev_file(path, activation, schema=5, threshold=None, pickled=None, **arrays):
    """Write an SAE as saev does: a line of JSON, then its tensors by `torch.save`.

    As `dump` of src/saev/nn/modeling.py in github.com/OSU-NLP-Group/saev at 3d73f1f7122738563404e4c50a98d897aa18a7d0.
    """
    config = {
        "d_model": D,
        "d_sae": F,
        "activation": activation,
        "reinit_blend": 0.8,
        "reinit_enc_dec_tranpose": True,
        "remove_parallel_grads": True,
        "normalize_w_dec": True,
    }
    header = {"schema": schema, "cfg": config, "commit": "3d73f1f", "lib": "0.1.0"}
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    if threshold is not None:
        tensors["activation.threshold"] = torch.tensor(threshold)
    path.parent.mkdir(exist_ok=True, parents=True)
    with path.open("wb") as file:
        file.write(json.dumps(header, separators=(",", ":")).encode() + b"\n")
        torch.save(tensors if pickled is None else pickled, file)


def saev_activation(name, **params):
    """An activation as saev writes it, with its penalties."""
    aux = {"cls": "AuxK", "params": {"key": "auxk", "k_aux": 512, "alpha": 0.03125}}
    sparsity = {"cls": "NoSparsity", "params": {"key": "no-sparsity"}}
    return {"cls": name, "params": {"key": name.lower(), **params, "sparsity": sparsity, "aux": aux}}


def saev_arrays(rng):
    shapes = {"W_dec": (F, D), "b_dec": (D,), "W_enc": (D, F), "b_enc": (F,)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


SAEV = {
    "top-k": (saev_activation("TopK", top_k=K), None),
    "relu": (saev_activation("Relu"), None),
    "batch-top-k": (saev_activation("BatchTopK", top_k=K, momentum=0.1), 1.5),
    "batch-top-k-untrained": (saev_activation("BatchTopK", top_k=K, momentum=0.1), 0.0),
}


@pytest.mark.parametrize("schema", [3, 4, 5])
@pytest.mark.parametrize("name", SAEV)
def test_imported_saev_saes_compute_the_same(tmp_path, rng, name, schema):
    """As its `encode` and `decode` in eval mode, in NumPy and float64."""
    arrays, (activation, threshold) = saev_arrays(rng), SAEV[name]
    saev_file(tmp_path / "sae.pt", activation, schema, threshold, **arrays)
    W_enc, b_enc, W_dec, b_dec = (arrays[key].astype(np.float64) for key in ("W_enc", "b_enc", "W_dec", "b_dec"))
    h = tokens().double().numpy() @ W_enc + b_enc
    if name == "top-k":
        lowest = np.sort(h, axis=1)[:, -K]
        assert (lowest > 0).all()
        f = np.where(h >= lowest[:, None], h, 0)
    else:
        f = np.where(h > (threshold or 0), h, 0)
    expected = {"latents": torch.from_numpy(f), "reconstruction": torch.from_numpy(f @ W_dec + b_dec)}
    for n, source in enumerate((tmp_path, tmp_path / "sae.pt", str(tmp_path))):
        import_sae(source, tmp_path / f"imported-{n}")
        found = latents_and_reconstruction(tmp_path / f"imported-{n}", tokens())
        assert_same({key: x.double() for key, x in found.items()}, expected)


@pytest.mark.parametrize("schema", [None, 1, 2, 6])
def test_refuses_saev_saes_of_another_schema(tmp_path, rng, schema):
    """Those before 3 subtracted b_dec from the input, or did not: the schema does not say."""
    saev_file(tmp_path / "sae.pt", SAEV["relu"][0], schema, **saev_arrays(rng))
    with pytest.raises(StoreError, match=rf"sae.pt: its schema {schema} is not supported; load it with a newer"):
        import_sae(tmp_path, tmp_path / "imported")


@pytest.mark.parametrize(
    ("activation", "more", "message"),
    [
        (saev_activation("BatchTopK", top_k=K), {}, "BatchTopK without a threshold"),
        (saev_activation("Gated"), {}, "activation = 'Gated' is not supported; only saev's TopK, BatchTopK, Relu SAEs"),
        (saev_activation("TopK"), {}, "do not match or are damaged .*'top_k'"),
        (saev_activation("Relu"), {"W_dec": np.zeros((F, D + 1), np.float32)}, "do not match or are damaged .*W_dec"),
        (saev_activation("Relu"), {"pickled": Path("/tmp")}, "do not match or are damaged .*Weights only load failed"),
    ],
)
def test_refuses_other_and_damaged_saev_saes(tmp_path, rng, activation, more, message):
    saev_file(tmp_path / "sae.pt", activation, **saev_arrays(rng) | more)
    with pytest.raises(StoreError, match=message) as error:
        import_sae(tmp_path, tmp_path / "imported")
    assert "\n" not in str(error.value)
    (tmp_path / "sae.pt").write_bytes(b"no JSON\n" + (tmp_path / "sae.pt").read_bytes())
    with pytest.raises(StoreError, match="not a file of saev"):
        import_sae(tmp_path, tmp_path / "imported")


# --- fit ---


@pytest.mark.parametrize(
    ("hook", "layer"),
    [
        ("layer 3", 3),
        ("blocks.3.hook_resid_post", 3),
        ("blocks.4.hook_resid_pre", 3),
        ("layers.3", 3),
        ("transformer.h.3", 3),
        ("gpt_neox.layers.3", 3),
        ("vision_model.encoder.layers.3", 3),
        ("encoder.layer.13", 13),
        ("visual.transformer.resblocks.3", 3),
        ("unknown", 3),
    ],
)
def test_knows_the_layer_of_hooks(own, tmp_path, hook, layer):
    edit(own, metadata={"hook_name": hook})
    import_sae(own, tmp_path / "imported", D, layer)
    assert seals.read_manifest(tmp_path / "imported", "spec", "sae", "")["spec"]["imported_from"]["source"] == str(own)
    if hook != "unknown":
        with pytest.raises(StoreError, match=rf"own: an SAE of {hook}, which is layer {layer} and not {layer + 1}"):
            import_sae(own, tmp_path / "other", D, layer + 1)


@pytest.mark.parametrize("hook", ["blocks.3.hook_mlp_out", "blocks.3.attn.hook_z", "layers.3.mlp", "embed_tokens"])
def test_refuses_saes_of_something_else_than_the_residual_stream_after_a_block(own, tmp_path, hook):
    edit(own, metadata={"hook_name": hook})
    with pytest.raises(StoreError, match=rf"own: an SAE of {hook}, which is not the residual stream after a block"):
        import_sae(own, tmp_path / "imported", D, 3)
    import_sae(own, tmp_path / "imported")


def test_refuses_saes_of_another_width(own, tmp_path):
    with pytest.raises(StoreError, match=rf"own: an SAE of width {D}, but the encoder has width 9; name an SAE"):
        import_sae(own, tmp_path / "imported", 9, 3)


# --- from a hub ---


def test_fetches_an_sae_from_a_folder_of_a_repository(sealed, tmp_path, monkeypatch):
    with hub.running() as running:
        hub.use(monkeypatch, running.endpoint, tmp_path / "cache")
        files = {f"layer-3/{name}": content for name, content in contents(sealed).items()}
        running.add("us/saes", files | {"layer-3/loss.csv": b"", "README.md": b"", "layer-4/sae.pt": b"{}"})
        import_sae("us/saes:layer-3", tmp_path / "imported", D, 3)
        assert contents(tmp_path / "imported") == contents(sealed)
        got = {request.path.split("/main/")[-1] for request in running.asked("GET", "/resolve/")}
        assert {name.rpartition("/")[2] for name in got} == {"cfg.json", "sae_weights.safetensors"}
        origin = seals.read_manifest(tmp_path / "imported", "spec", "sae", "")["spec"]["imported_from"]
        assert origin["source"] == "us/saes:layer-3"
        assert origin["revision"] == running.commit("us/saes", "main")
        assert origin["sha256"] == {name: sha256(text).hexdigest() for name, text in contents(sealed).items()}
        absent = (
            "us/saes: layer-5/cfg.json, .* the repository has no such files; it has README.md, layer-3/, layer-4/; or"
        )
        with pytest.raises(HubError, match=absent):
            import_sae("us/saes:layer-5", tmp_path / "other")
        with pytest.raises(StoreError, match="layer-3: an SAE of width 8, but the encoder has width 9"):
            import_sae("us/saes:layer-3", tmp_path / "other", 9, 3)


@pytest.mark.parametrize(("command", "offline"), [("info", "1"), ("import", None)])
def test_only_an_import_may_access_a_hub(sealed, tmp_path, monkeypatch, command, offline):
    monkeypatch.setenv("HF_HUB_OFFLINE", "restored afterwards")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    out = ["--out", str(tmp_path / "imported")] if command == "import" else []
    assert CliRunner().invoke(app, ["sae", command, str(sealed), *out]).exit_code == 0
    assert os.environ.get("HF_HUB_OFFLINE") == offline


# --- our own code ---


def test_other_activations_are_described_and_not_exported_to_sparsify(tmp_path):
    save_sae(SAE(D, F, JumpReLU(torch.ones(F)), torch.Generator()), new_folder(tmp_path / "own"), "vit", "layer 3")
    assert "architecture        jumprelu" in describe_sae(tmp_path / "own").splitlines()
    config = json.loads((tmp_path / "own/cfg.json").read_text())
    assert config["architecture"] == "jumprelu"
    assert not {"k", "rescale_acts_by_decoder_norm"} & config.keys()
    with pytest.raises(StoreError, match="own: its architecture is jumprelu, but sparsify has only TopK SAEs"):
        export_to_sparsify(tmp_path / "own", tmp_path / "exported")


def test_an_export_survives_a_round_trip(own, tmp_path):
    export_to_sparsify(own, tmp_path / "exported")
    assert set(contents(tmp_path / "exported")) == {"cfg.json", "sae.safetensors"}
    import_sae(tmp_path / "exported", tmp_path / "imported")
    assert contents(tmp_path / "imported") == contents(own)
    before, after = (latents_and_reconstruction(folder, tokens()) for folder in (own, tmp_path / "imported"))
    assert_same(before, after, rtol=0, atol=0)


def test_importing_our_own_folder_changes_nothing(own, tmp_path):
    import_sae(own, tmp_path / "imported")
    assert contents(tmp_path / "imported") == contents(own)


def test_exports_any_number_of_latents(tmp_path):
    """Including F that is not a multiple of D."""
    (tmp_path / "own").mkdir()
    save_sae(SAE(D, 19, TopK(K), torch.Generator().manual_seed(0)), tmp_path / "own", "vit", "layer 3")
    export_to_sparsify(tmp_path / "own", tmp_path / "exported")
    config = json.loads((tmp_path / "exported" / "cfg.json").read_text())
    assert (config["num_latents"], config["d_in"], config["k"]) == (19, D, K)
    import_sae(tmp_path / "exported", tmp_path / "imported")
    assert contents(tmp_path / "imported") == contents(tmp_path / "own")


def make_sparsify(own, tmp_path):
    export_to_sparsify(own, tmp_path / "sparsify")
    return tmp_path / "sparsify"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"architecture": "gated"}, r"architecture = 'gated'"),
        ({"activation_fn_kwargs": {"k": 4}}, r"activation_fn_kwargs = {'k': 4}"),
        ({"architecture": None}, r"architecture = None"),
        ({"apply_b_dec_to_input": False}, r"apply_b_dec_to_input = False"),
        ({"rescale_acts_by_decoder_norm": True}, r"rescale_acts_by_decoder_norm = True"),
        ({"normalize_activations": "layer_norm"}, r"normalize_activations = 'layer_norm'"),
        ({"reshape_activations": "hook_z"}, r"reshape_activations = 'hook_z'"),
    ],
)
def test_load_sae_refuses_incompatible_settings(own, keys, message):
    edit(own, **keys)
    with pytest.raises(
        StoreError, match=rf"own: cfg.json has {message}, .*`conceptshare sae import .*own --out FOLDER`"
    ):
        load_sae(own)


def test_load_sae_uses_defaults_for_missing_keys_except_architecture(own):
    config = json.loads((own / "cfg.json").read_text())
    needed = {key: config[key] for key in ("architecture", "d_in", "d_sae", "k")}
    (own / "cfg.json").write_text(json.dumps(needed))
    load_sae(own)
    needed.pop("architecture")
    (own / "cfg.json").write_text(json.dumps(needed))
    with pytest.raises(StoreError, match="architecture = None"):
        load_sae(own)


@pytest.mark.parametrize(
    "tensors", [{"scaling_factor": torch.full((F,), 2.0)}, {"b_dec": torch.ones(1)}, {"b_enc": torch.ones(1)}]
)
def test_load_sae_refuses_unknown_tensors_and_unexpected_shapes(own, tensors):
    edit_tensors(own, **tensors)
    with pytest.raises(StoreError, match=f"own: no readable SAE there .*{next(iter(tensors))}"):
        load_sae(own)


def test_import_drops_a_scaling_factor_of_ones_and_refuses_another(own, tmp_path):
    before = contents(own)
    edit_tensors(own, scaling_factor=torch.ones(F))
    import_sae(own, tmp_path / "imported")
    assert contents(tmp_path / "imported") == before
    edit_tensors(own, scaling_factor=torch.full((F,), 2.0))
    with pytest.raises(StoreError, match="own: its scaling_factor is not 1"):
        import_sae(own, tmp_path / "other")


def test_import_refuses_a_decoder_row_of_length_0(own, tmp_path):
    edit(own, rescale_acts_by_decoder_norm=True)
    W_dec = load_file(own / "sae_weights.safetensors")["W_dec"]
    W_dec[[3, 5]] = 0
    edit_tensors(own, W_dec=W_dec)
    with pytest.raises(StoreError, match=r"own: cfg.json has rescale_acts_by_decoder_norm, but 2 decoder rows"):
        import_sae(own, tmp_path / "imported")


def test_import_refuses_a_folder_of_sae_lens_before_version_6(own, tmp_path):
    edit(own, activation_fn_str="topk", activation_fn_kwargs={"k": 4})
    with pytest.raises(StoreError, match=r"own: cfg.json is from SAELens before version 6; load it with a newer"):
        import_sae(own, tmp_path / "imported")


def test_import_refuses_signed_latents_of_older_versions_of_sparsify(own, tmp_path):
    folder = make_sparsify(own, tmp_path)
    edit(folder, signed=True)
    with pytest.raises(StoreError, match="sparsify: signed = True is not supported"):
        import_sae(folder, tmp_path / "imported")


def without_weights(folder):
    next(folder.glob("*.safetensors")).unlink()


def without_config(folder):
    (folder / "cfg.json").unlink()


def cut_weights(folder):
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-10])


def without_k(folder):
    config = json.loads((folder / "cfg.json").read_text())
    config.pop("k")
    (folder / "cfg.json").write_text(json.dumps(config))


def of_another_width(folder):
    edit(folder, d_in=D + 1)


def with_a_short_bias(folder):
    edit_tensors(folder, b_dec=torch.ones(1))


def with_a_strange_tensor(folder):
    edit_tensors(folder, log_scale=torch.ones(F))


@pytest.mark.parametrize("library", ["SAELens", "sparsify"])
@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (without_weights, "contains none of sae_weights.safetensors"),
        (without_config, "do not match or are damaged .*cfg.json.*; fetch or save the folder again"),
        (cut_weights, "do not match or are damaged"),
        (without_k, "do not match or are damaged .*'k'"),
        (of_another_width, "do not match or are damaged"),
        (with_a_short_bias, "do not match or are damaged .*b_dec"),
        (with_a_strange_tensor, "do not match or are damaged .*log_scale"),
    ],
)
def test_import_refuses_a_damaged_folder(own, tmp_path, library, break_it, message):
    folder = own if library == "SAELens" else make_sparsify(own, tmp_path)
    break_it(folder)
    with pytest.raises(StoreError, match=rf"(?s){folder.name}: .*{message}"):
        import_sae(folder, tmp_path / "imported")
    assert not list(tmp_path.glob("imported*"))


def test_never_overwrites_files(own, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes.txt").touch()
    for write in (export_to_sparsify, import_sae):
        with pytest.raises(StoreError, match=r"there: exists already; name another folder"):
            write(own, tmp_path / "there")
        with pytest.raises(StoreError, match=r"own: exists already"):
            write(own, own)
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["notes.txt"]


def test_refuses_to_export_a_folder_without_an_sae(tmp_path):
    with pytest.raises(StoreError, match=r"nowhere: no readable SAE there"):
        export_to_sparsify(tmp_path / "nowhere", tmp_path / "exported")


# --- description of an SAE ---

METRICS = {
    "all_tokens": {
        "tokens": 22523,
        "fvu": 0.31066,
        "explained_variance": 0.68934,
        "cosine": 0.93217,
        "l2_ratio": 0.90001,
        "l0": 16.0,
        "dead": 0.0013,
    },
    "global_tokens": {
        "tokens": 1888,
        "fvu": 0.67025,
        "explained_variance": 0.32975,
        "cosine": 0.81,
        "l2_ratio": 0.7,
        "l0": 15.96,
        "dead": 0.78125,
    },
    "measured_on": "held-out samples",
    "steps": 12354,
    "settings": {"preset": "paper", "expansion": 3, "k": 4, "learning_rate": None, "encoder_bias": True}
    | {f"setting_{i}": 0.5 for i in range(4)},
}
DESCRIBED = """\
encoder             vit
layer               3
D                   8
F                   24
k                   4
expansion           3
encoder bias        yes
size on disk        0.0 MB
settings            preset: paper, expansion: 3, k: 4, learning_rate: null, encoder_bias: true,
                    setting_0: 0.5, setting_1: 0.5, setting_2: 0.5, setting_3: 0.5
steps               12,354
measured on         held-out samples
                    all tokens      global tokens
tokens              22,523          1,888
FVU                 0.3107          0.6703
explained variance  0.6893          0.3297
cosine              0.9322          0.8100
L2 ratio            0.9000          0.7000
L0                  16.0            16.0
dead latents        0.1%            78.1%
last loss           0.25"""


@pytest.fixture
def measured(own):
    (own / "metrics.json").write_text(json.dumps(METRICS))
    (own / "loss.csv").write_text("step,loss\n0,1.5\n1,0.25\n")
    return own


def test_describes_an_sae(measured):
    assert describe_sae(measured) == DESCRIBED


def test_the_description_of_an_imported_sae_has_no_training(own):
    assert describe_sae(own) == "\n".join(DESCRIBED.splitlines()[:8])


def test_the_description_omits_metrics_missing_from_older_versions(measured):
    older = {key: value for key, value in METRICS.items() if key != "measured_on"}
    for tokens_of in ("all_tokens", "global_tokens"):
        older[tokens_of] = {key: METRICS[tokens_of][key] for key in ("tokens", "fvu", "l0", "dead")}
    (measured / "metrics.json").write_text(json.dumps(older))
    gone = ("measured on", "explained", "cosine", "L2")
    assert describe_sae(measured).splitlines() == [s for s in DESCRIBED.splitlines() if not s.startswith(gone)]


def test_size_and_bias_come_from_the_files(tmp_path):
    sae = SAE(64, 512, TopK(4), torch.Generator().manual_seed(0))
    save_sae(sae, tmp_path, "vit", "layer 3")
    (tmp_path / "more").write_bytes(bytes(2_000_000))
    lines = describe_sae(tmp_path).splitlines()
    assert "encoder bias        no" in lines
    assert "size on disk        2.3 MB" in lines
    with torch.no_grad():
        sae.b_enc[-1] = 1e-30
    save_sae(sae, tmp_path, "vit", "layer 3")
    assert "encoder bias        yes" in describe_sae(tmp_path)


@pytest.mark.parametrize("broken", ["cfg.json", "sae_weights.safetensors", "metrics.json", "loss.csv"])
def test_refuses_to_describe_an_unreadable_sae(measured, broken):
    (measured / broken).write_bytes(b"\xff")
    with pytest.raises(StoreError, match=r"own: no readable SAE there .*name a folder that the sae stage"):
        describe_sae(measured)


def test_info_of_a_folder_without_an_sae_is_one_error(tmp_path):
    command = [sys.executable, "-m", "conceptshare", "sae", "info", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith(f"error: {tmp_path}: no readable SAE there")
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "record", ['{"content_hash": "of a data set"}', seals.sealed({"files": {}, "features": {}}), None]
)
@pytest.mark.parametrize("read", [describe_sae, load_sae])
def test_the_error_for_a_folder_without_an_sae_does_not_advise_deleting_it(tmp_path, record, read):
    if record is not None:
        (tmp_path / "manifest.json").write_text(record if isinstance(record, str) else json.dumps(record))
    with pytest.raises(StoreError, match=r"; name (a|another) folder") as refused:
        read(tmp_path)
    assert "delete" not in str(refused.value)


def test_info_does_not_import_torch(measured):
    code = "import sys; from typer.testing import CliRunner; from conceptshare.cli import app; " + (
        "result = CliRunner().invoke(app, ['sae', 'info', sys.argv[1]]); print(result.output, 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(measured)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == f"{DESCRIBED}\n False\n"


# --- the command line ---


def command(*arguments):
    result = CliRunner().invoke(app, ["sae", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command_line_trains_describes_exports_and_imports(tmp_path, write_tokens, rng):
    store = write_tokens(tmp_path / "vit.zarr", {3: [rng.standard_normal((5, D)) for _ in range(40)]})
    settings = '{"expansion": 3, "k": 4, "encoder_bias": true}'
    command("train", "--tokens", store, "--layer", 3, "--settings", settings, "--out", tmp_path / "sae")
    assert command("info", tmp_path / "sae") == describe_sae(tmp_path / "sae") + "\n"
    described = describe_sae(tmp_path / "sae").splitlines()
    metrics = json.loads((tmp_path / "sae" / "metrics.json").read_text())
    assert described[:6] == [*DESCRIBED.splitlines()[:6]]
    assert (
        f"FVU                 {metrics['all_tokens']['fvu']:<16.4f}{metrics['global_tokens']['fvu']:.4f}" in described
    )
    losses = np.loadtxt(tmp_path / "sae" / "loss.csv", delimiter=",", skiprows=1)
    assert float(described[-1].removeprefix("last loss ")) == losses[-1, 1]
    command("export", tmp_path / "sae", "--to", "sparsify", "--out", tmp_path / "exported")
    command("import", tmp_path / "exported", "--out", tmp_path / "imported")
    for file in ("cfg.json", "sae_weights.safetensors"):
        assert (tmp_path / "imported" / file).read_bytes() == (tmp_path / "sae" / file).read_bytes()


def test_the_command_line_refuses_unknown_layouts(own, tmp_path):
    result = CliRunner().invoke(app, ["sae", "export", str(own), "--to", "other", "--out", str(tmp_path / "exported")])
    assert result.exit_code == 2
    assert "'other' is not one of 'sparsify'" in result.output
