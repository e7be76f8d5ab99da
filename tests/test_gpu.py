"""On a GPU, every stage agrees with the CPU up to rounding and is deterministic."""

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from torch.utils._python_dispatch import TorchDispatchMode

from conceptshare import device
from conceptshare.activations.extraction import extract_activations
from conceptshare.analysis.similarity import compare_stores
from conceptshare.concepts.examples import record_examples
from conceptshare.config.catalog import DatasetSpec, EncoderSpec
from conceptshare.config.settings import SAESettings
from conceptshare.correlations import correlate_stores, max_correlations
from conceptshare.correlations._arrays import Array
from conceptshare.correlations._standardise import Panel, standard_of
from conceptshare.data.dataset import Data, make_dataset
from conceptshare.encoders import load_encoder
from conceptshare.io.layout import layer_name
from conceptshare.sae import train_sae, train_stream
from conceptshare.sae._trainer import Trainer
from conceptshare.sae.features import record_features
from tests.helpers import decoders, models
from tests.helpers.samples import contents
from tests.helpers.stages import write_inputs

pytestmark = pytest.mark.gpu

SETTINGS = SAESettings(expansion=4, k=3, batch_samples=8, batch_captions=8, learning_rate=1e-3, encoder_bias=True)
LAYERS = (0, 1, 2)
# Activations and features are stored as float16, and rounding can go either way.
FLOAT16 = {"rtol": 2e-3, "atol": 2e-3}


@pytest.fixture
def on(monkeypatch):
    """Computes on a device."""
    for name in device._ALLOCATED:
        monkeypatch.delenv(name, raising=False)

    def run(place, work):
        monkeypatch.setenv(device.DEVICE, place)
        assert device.default_device().type == place
        return work()

    return run


class Stages:
    """Every stage, from the ``inputs`` and the results in ``made`` to those in another folder."""

    def __init__(self, inputs, made):
        self.inputs, self.made, self.data = inputs, made, Data(inputs / "data")

    def encoder(self, name):
        return load_encoder(EncoderSpec.model_validate_json((self.inputs / f"{name}.entry").read_text()))

    def activations(self, out):
        for name in ("vit", "bert"):
            extract_activations(self.encoder(name), self.data, out / f"{name}.zarr", out / "tokens" / f"{name}.zarr")

    def sae(self, out):
        for layer in LAYERS:
            saved = out / "bert" / layer_name(layer) / "seed-0"
            train_sae(self.made / "tokens" / "bert.zarr", layer, SETTINGS, 0, saved)

    def stream(self, out):
        train_stream(self.encoder("bert"), self.data, SETTINGS, [0], out / "bert", out / "streamed.zarr")

    def features(self, out):
        record_features(self.made / "bert.zarr", self.made / "bert", 0, out / "bert@0.zarr")

    def correlations(self, out):
        store = self.made / "bert@0.zarr"
        correlate_stores(store, store, out / "whole.zarr", 2**20, full=[(0, 2)])
        correlate_stores(store, store, out / "cut.zarr", 180_000)  # two of three panels fit on a GPU

    def similarity(self, out):
        compare_stores(self.made / "bert.zarr", self.made / "vit.zarr", out / "bert__vit.csv")

    def examples(self, out):
        features, saes = self.made / "bert@0.zarr", self.made / "bert"
        record_examples(self.encoder("bert"), self.data, features, saes, out / "bert@0")


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    made = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(device.DEVICE, "cpu")
        write_inputs(made)
        make_dataset(DatasetSpec(source=str(made / "rows.parquet")), made / "data")
        on_cpu = Stages(made, made)
        for stage in (on_cpu.activations, on_cpu.sae, on_cpu.features):
            stage(made)
    return on_cpu


def arrays(folder):
    """Every array of every store below a folder."""
    found = {}
    for store in sorted(folder.rglob("*.zarr")):
        for name, array in zarr.open_group(store, mode="r").members(max_depth=None):
            if isinstance(array, zarr.Array):
                found[f"{store.name}/{name}"] = array[:]
    return found


def top_samples(table):
    """For each feature and top sample: the shares of its highest activation at tokens, and the highest activation."""
    return {
        (row["feature"], one["sample"]): (np.frombuffer(one["fires"], np.uint8) / 255, one["fires_highest"])
        for row in pq.read_table(table).to_pylist()
        for one in row["top"]
    }


@pytest.mark.parametrize(
    "stage", ["activations", "sae", "stream", "features", "correlations", "similarity", "examples"]
)
def test_a_stage_is_deterministic_and_agrees_with_the_cpu(stage, stages, on, tmp_path):
    outs = {name: tmp_path / name for name in ("cpu", "gpu", "again")}
    for name, out in outs.items():
        out.mkdir()
        on("cpu" if name == "cpu" else "cuda", lambda out=out: getattr(stages, stage)(out))
    one = contents(outs["gpu"])
    assert one
    assert one == contents(outs["again"])
    expected, found = arrays(outs["cpu"]), arrays(outs["gpu"])
    assert expected.keys() == found.keys()
    for name, values in expected.items():
        if name.partition("/")[2].startswith(("match", "floor_sizes")) or "top_samples" in name:
            # Rounding may choose another of nearly equal candidates.
            assert (values == found[name]).mean() > 0.95, name
        else:
            np.testing.assert_allclose(
                found[name].astype(np.float64), values.astype(np.float64), **FLOAT16, err_msg=name
            )
    for path in outs["cpu"].rglob("*.csv"):
        other = outs["gpu"] / path.relative_to(outs["cpu"])
        skipped = {"latents"}  # a value may be just above or below a bin's edge
        a, b = (pd.read_csv(file).drop(columns=skipped, errors="ignore") for file in (path, other))
        pd.testing.assert_frame_equal(a, b, rtol=1e-2, atol=1e-4)
    for path in outs["cpu"].rglob("layer-*.parquet"):
        a, b = (top_samples(file) for file in (path, outs["gpu"] / path.relative_to(outs["cpu"])))
        assert a.keys() == b.keys()
        for key, (shares, highest) in a.items():
            assert b[key][1] == pytest.approx(highest, rel=2e-3, abs=2e-3), key
            np.testing.assert_allclose(b[key][0] * b[key][1], shares * highest, atol=0.005 * highest + 2e-3)


def test_a_stream_trains_the_same_saes_as_stored_tokens(stages, on, tmp_path):
    on_gpu = Stages(stages.inputs, tmp_path)
    for stage, out in ((on_gpu.activations, tmp_path), (on_gpu.sae, tmp_path), (on_gpu.stream, tmp_path / "streamed")):
        out.mkdir(exist_ok=True)
        on("cuda", lambda stage=stage, out=out: stage(out))
    assert contents(tmp_path / "bert") == contents(tmp_path / "streamed" / "bert")


def llava(folder):
    decoders.decoder("Llava", folder)
    return models.Family(decoders.decoder_entry("Llava", folder, "image"), models.noise_images(), models.image_truth)


FAMILIES = [
    *(models.vit, models.dinov2, models.clip_image, models.siglip_image, models.mambavision),
    *(models.timm_vit, models.timm_convnext, models.open_clip_image),
    *(models.bert, models.clip_text, models.siglip2_text, models.open_clip_text, llava),
]


@pytest.mark.parametrize("make", FAMILIES, ids=lambda make: make.__name__)
def test_an_encoder_is_deterministic_and_agrees_with_the_cpu(make, on, tmp_path):
    family = make(tmp_path / "model")
    expected = on("cpu", lambda: load_encoder(family.spec).activations(family.samples))
    encoder = on("cuda", lambda: load_encoder(family.spec))
    found, again = encoder.activations(family.samples), encoder.activations(family.samples)
    assert torch.equal(found.training.cpu(), expected.training)
    for layer, x in expected.tokens.items():
        assert models.close(found.tokens[layer].cpu(), x)
        assert models.close(found.global_token[layer].cpu(), expected.global_token[layer])
        assert torch.equal(found.tokens[layer], again.tokens[layer])
        assert torch.equal(found.global_token[layer], again.global_token[layer])


OPTIONS = [
    {},
    {"encoder_bias": True},
    {"precision": "bfloat16"},
    {"precision": "tf32"},
    {"clip_norm": 1.0, "unit_norm_decoder": True, "scale_inputs": True, "initial_b_dec": "mean", "encoder_bias": True},
    {"auxk": 0.1, "auxk_latents": 16, "dead_after": 1},
    {"auxk": 0.1, "auxk_latents": 16, "dead_after": 1, "global_weight": 4, "max_norm": 1.2},
    {"activation": "batchtopk"},
    {"matryoshka": [8, 32]},
    {"activation": "batchtopk", "matryoshka": [8, 32], "auxk": 0.1, "auxk_latents": 16, "dead_after": 1},
]


def trained(settings, place, steps=60, width=16, tokens=200, resumed_at=None):
    """The full state of a training."""

    def new():
        return Trainer(width, settings, 0, steps, torch.device(place))

    trainer, generator = new(), torch.Generator().manual_seed(1)
    for step in range(steps):
        if step == resumed_at:
            state, trainer = trainer.state(), new()
            trainer.restore(state)
        trainer.train_on(torch.randn(tokens, width, generator=generator).to(place), np.arange(0, tokens, 20))
    return trainer.state()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_training_is_deterministic_even_if_resumed_and_its_losses_agree_with_the_cpu(options):
    settings = SAESettings(expansion=4, k=4, learning_rate=1e-3, **options)
    one, again = trained(settings, "cuda"), trained(settings, "cuda", resumed_at=30)
    assert all(torch.equal(x, again[name]) for name, x in one.items())
    # Rounded products occasionally select other latents.
    rtol = 1e-4 if settings.precision == "float32" else 2e-2
    torch.testing.assert_close(one["losses"], trained(settings, "cpu")["losses"], rtol=rtol, atol=0)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_at_the_papers_size_is_deterministic(precision):
    settings = SAESettings(encoder_bias=True, clip_norm=1.0, precision=precision)
    one, again = (trained(settings, "cuda", steps=3, width=1024, tokens=4112) for _ in range(2))
    assert all(torch.equal(x, again[name]) for name, x in one.items())


class Operations(TorchDispatchMode):
    """Records the names of torch operations."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


# Operations in torch's use_deterministic_algorithms list for GPUs that sum floats in arbitrary order.
IN_ANY_ORDER = {"index_add", "scatter_add", "bincount", "embedding_dense_backward", "cumsum", "put", "histc"}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_training_uses_no_nondeterministic_sums(options):
    with Operations() as done:
        trained(SAESettings(expansion=4, k=4, **options), "cuda", steps=3)
    assert {name.rstrip("_") for name in done.names} & IN_ANY_ORDER == set()


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("megabytes", [20, 60, 400])
def test_correlations_keep_within_their_budget(megabytes, dtype, precision, rng):
    layers = [rng.normal(size=(4000, 600)).clip(0).astype(dtype) for _ in range(4)]
    for layer in layers:
        layer[:, ::7] = 1  # dropping constant features takes a copy
    a, b = layers[:2], layers[2:]
    max_correlations([x[:, :8] for x in a], b, precision=precision)  # CUDA libraries allocate their own memory once
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    max_correlations(a, b, megabytes * 2**20, precision)
    assert torch.cuda.max_memory_allocated() - before <= megabytes * 2**20


@pytest.mark.parametrize("megabytes", [2, 60])
def test_float16_correlations_are_within_their_error_and_deterministic(megabytes, on, rng):
    samples, width = 2000, 60
    dense = rng.normal(size=(samples, width)).clip(0)
    rare = rng.lognormal(size=(samples, width)) * (rng.random((samples, width)) < 1e-3)
    binary = (rng.random((samples, width)) < 0.04) * rng.uniform(0.1, 10, width)
    x = np.concatenate([dense, rare, binary, np.ones((samples, 4))], axis=1)
    wholes = []
    for _ in range(2):
        wholes.append(np.full((x.shape[1], x.shape[1]), np.nan, np.float32))
        on("cuda", lambda: max_correlations(x, x, megabytes * 2**20, "float16", {(0, 0): wholes[-1]}))
    np.testing.assert_array_equal(*wholes)
    varies = x.std(0) > 0
    np.testing.assert_allclose(wholes[0][np.ix_(varies, varies)], np.corrcoef(x[:, varies].T), rtol=0, atol=2e-3)
    assert (wholes[0][~varies] == 0).all()
    np.testing.assert_allclose(wholes[0].diagonal()[varies], 1, atol=1e-5)  # rounding preserves the features' lengths


def test_sums_of_a_panel_are_float64(rng):
    # Far from zero, and with a first sample far from the mean, float32 sums would lose the third digit.
    x = np.full((200_000, 2), 2000.0)
    x[0] = 0
    x[1:, 1] += rng.integers(0, 2, len(x) - 1)
    x = x.astype(np.float16)
    panel, values = Panel(0, 0, 2, 0, Array("x", "", 2)), torch.from_numpy(x).to("cuda")
    standard = standard_of(lambda: iter([values]), panel)
    centre, scale, bias = (part.double().cpu().numpy() for part in (standard.centre, standard.scale, standard.bias))
    exact = x.astype(np.float64)
    np.testing.assert_allclose(centre - bias / scale, exact.mean(0), rtol=1e-9)
    np.testing.assert_allclose(scale**-2, ((exact - exact.mean(0)) ** 2).sum(0), rtol=1e-6)


def test_the_log_names_the_gpu(on, capsys):
    on("cuda", device.log_device)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"device: cuda:0, {torch.cuda.get_device_name(0)}; torch {torch.__version__}")
