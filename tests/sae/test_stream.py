"""Streaming trains exactly the SAEs of stored tokens, to the byte."""

import itertools
import json
import re
import signal
from dataclasses import asdict
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from conceptshare.activations.extraction import TokenReader, extract_activations
from conceptshare.config.catalog import DatasetSpec, EncoderSpec
from conceptshare.config.settings import SAESettings
from conceptshare.data.dataset import Data, make_dataset
from conceptshare.encoders import load_encoder
from conceptshare.io.errors import NumericsError, StoreError, StudyError
from conceptshare.io.layout import layer_name
from conceptshare.io.store import open_store
from conceptshare.sae import SAE, ReLU, TopK, _order, evaluate, load_sae, save_sae, train_sae, train_stream
from conceptshare.sae._checkpoints import PREEMPTED
from conceptshare.sae.exchange import import_sae
from conceptshare.sae.features import record_features
from tests.helpers import models
from tests.helpers.forks import run_forked
from tests.helpers.samples import contents, write_rows

SAMPLES = 47
BLOCK = 5
SEEDS = [0, 3]
SETTINGS = {"expansion": 2, "k": 3, "learning_rate": 1e-2, "batch_samples": 7, "batch_captions": 7}


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder / "rows.parquet", SAMPLES, models.WORDS)
    make_dataset(DatasetSpec(source=str(folder / "rows.parquet")), folder / "made")
    return folder / "made"


@pytest.fixture(scope="module")
def encoder_of(tmp_path_factory):
    """An encoder of a family; its files are written once."""
    made = {}

    def get(make, **values):
        if make not in made:
            made[make] = make(tmp_path_factory.mktemp("models") / make.__name__).spec
        return load_encoder(EncoderSpec(**{**made[make].model_dump(), "batch_size": BLOCK, **values}))

    return get


def stored(encoder, data, settings, folder, seeds=SEEDS):
    """Run the stages `activations` and `sae`."""
    extract_activations(encoder, data, folder / "tiny.zarr", folder / "tokens" / "tiny.zarr")
    for layer, seed in itertools.product(encoder.spec.layer_numbers(), seeds):
        out = folder / "tiny" / layer_name(layer) / f"seed-{seed}"
        train_sae(folder / "tokens" / "tiny.zarr", layer, settings, seed, out)
    return folder


def streamed(encoder, data, settings, folder, seeds=SEEDS, **how):
    train_stream(encoder, data, settings, seeds, folder / "tiny", folder / "tiny.zarr", **how)
    return folder


def assert_the_same(one, other):
    saes = contents(one / "tiny")
    assert saes == contents(other / "tiny")
    assert len(saes) == 6 * len(list((one / "tiny").glob("*/*")))
    assert contents(one / "tiny.zarr") == contents(other / "tiny.zarr")
    assert open_store(one / "tiny.zarr", "activations").attrs["spec"]["samples"] == SAMPLES


FAMILIES = [models.bert, models.clip_text, models.siglip_text, models.vit, models.mambavision, models.timm_convnext]


@pytest.mark.parametrize("make", FAMILIES, ids=lambda make: make.__name__)
def test_streaming_equals_storing_for_every_kind_of_encoder(make, encoder_of, data_folder, tmp_path):
    settings = SAESettings(**SETTINGS, epochs=2, held_out=0.2, global_weight=3)
    encoder, data = encoder_of(make), Data(data_folder)
    streamed(encoder, data, settings, tmp_path / "streamed", workers=2)
    assert_the_same(stored(encoder, data, settings, tmp_path / "stored"), tmp_path / "streamed")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"epochs": 3},
        {"held_out": 0.5, "epochs": 2},
        {"batch_captions": 1},
        {"batch_captions": 100},
        {"preset": "gao", "dead_after": 30, "epochs": 4},
        {"scale_inputs": True, "encoder_bias": True, "clip_norm": 1e-3, "warmup_steps": 3, "decay_share": 0.5},
        {"precision": "bfloat16"},
        {"global_weight": 3, "standardise": True, "epochs": 2},
        {"activation": "batchtopk", "matryoshka": [4, 16]},
    ],
    ids=str,
)
def test_streaming_equals_storing_with_every_option(options, encoder_of, data_folder, tmp_path):
    settings = SAESettings(**{**SETTINGS, **options})
    encoder, data = encoder_of(models.bert), Data(data_folder)
    streamed(encoder, data, settings, tmp_path / "streamed")
    assert_the_same(stored(encoder, data, settings, tmp_path / "stored"), tmp_path / "streamed")


@pytest.mark.parametrize(
    "values", [{"max_tokens": 2}, {"use_layers": "last"}, {"batch_size": 64}, {"batch_size": 1}], ids=str
)
def test_streaming_equals_storing_for_every_choice_of_layers_and_tokens(values, encoder_of, data_folder, tmp_path):
    settings = SAESettings(**SETTINGS, epochs=2, global_weight=3)
    encoder, data = encoder_of(models.bert, **values), Data(data_folder)
    streamed(encoder, data, settings, tmp_path / "streamed", seeds=[1])
    assert_the_same(stored(encoder, data, settings, tmp_path / "stored", seeds=[1]), tmp_path / "streamed")


def test_streaming_leaves_out_the_same_tokens(encoder_of, data_folder, tmp_path):
    settings = SAESettings(**SETTINGS, epochs=2, global_weight=3, max_norm=1.02)
    encoder, data = encoder_of(models.vit), Data(data_folder)
    streamed(encoder, data, settings, tmp_path / "streamed", workers=2)
    assert_the_same(stored(encoder, data, settings, tmp_path / "stored"), tmp_path / "streamed")
    shares = [
        json.loads(path.read_text())["outlying"] for path in (tmp_path / "streamed").glob("tiny/*/*/metrics.json")
    ]
    assert len(set(shares)) > 1
    assert all(0 < share < 0.5 for share in shares)


@pytest.mark.parametrize(("held_out", "epochs", "passes"), [(0.2, 1, 1.0), (0.0, 1, 2.0), (0.2, 3, 2.6)])
def test_each_epoch_is_one_forward_pass_and_held_out_samples_are_read_once(
    held_out, epochs, passes, encoder_of, data_folder, tmp_path, monkeypatch
):
    encoder, read = encoder_of(models.bert), []
    monkeypatch.setattr(Data, "caption", lambda self, row, caption=Data.caption: read.append(row) or caption(self, row))
    settings = SAESettings(**SETTINGS, held_out=held_out, epochs=epochs)
    streamed(encoder, Data(data_folder), settings, tmp_path)
    # A block with both kinds of samples is read for each.
    assert passes * SAMPLES <= len(read) <= passes * SAMPLES + (epochs + 1) * BLOCK
    assert set(read) == set(range(SAMPLES))


def test_reads_the_global_tokens_of_unused_held_out_samples(encoder_of, data_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(_order, "EVALUATED_SAMPLES", 6)
    encoder, data, settings = encoder_of(models.bert), Data(data_folder), SAESettings(**SETTINGS, held_out=0.5)
    streamed(encoder, data, settings, tmp_path / "streamed")
    assert_the_same(stored(encoder, data, settings, tmp_path / "stored"), tmp_path / "streamed")


def test_features_need_only_the_outputs_of_a_stream(encoder_of, data_folder, tmp_path):
    encoder, data, settings = encoder_of(models.bert), Data(data_folder), SAESettings(**SETTINGS)
    for make in (stored, streamed):
        folder = make(encoder, data, settings, tmp_path / make.__name__)
        record_features(folder / "tiny.zarr", folder / "tiny", 3, folder / "tiny@3.zarr")
    assert contents(tmp_path / "stored" / "tiny@3.zarr") == contents(tmp_path / "streamed" / "tiny@3.zarr")
    with pytest.raises(StoreError, match=r"tiny.zarr: a store of 'activations', but one of 'tokens' is needed"):
        TokenReader.open(tmp_path / "streamed" / "tiny.zarr", 0)


STREAM = """
import os, signal, sys
from pathlib import Path
import torch
from conceptshare.config.catalog import EncoderSpec
from conceptshare.data.dataset import Data
from conceptshare.encoders import load_encoder
from conceptshare.sae import _stream, _train, train_stream
from conceptshare.config.settings import SAESettings

torch.set_num_threads(1)
spec, settings = EncoderSpec.model_validate_json(sys.argv[1]), SAESettings.model_validate_json(sys.argv[2])
data, folder, seeds = Data(Path(sys.argv[3])), Path(sys.argv[4]), [0, 3]
sent, last = signal.Signals(int(sys.argv[5])), int(sys.argv[6])
_train._SECONDS_BETWEEN_CHECKPOINTS = 0
calls = 0

def counted(method):
    def call(*arguments):
        global calls
        calls += 1
        if calls == last:
            os.kill(os.getpid(), sent)
        return method(*arguments)
    return call

# Each sample that is kept, each step of the team, each state that is written, each SAE that is measured.
_stream._SAEGroup.train_on = counted(_stream._SAEGroup.train_on)
_stream._SAEGroup.evaluate_on = counted(_stream._SAEGroup.evaluate_on)
_stream.GlobalTokens.append = counted(_stream.GlobalTokens.append)
_stream.GlobalTokens.flush = counted(_stream.GlobalTokens.flush)
_train.Trainer.state = counted(_train.Trainer.state)
_stream.write_sae = counted(_stream.write_sae)
train_stream(load_encoder(spec), data, settings, seeds, folder / "tiny", folder / "tiny.zarr")
"""


def run_stream(encoder, data_folder, settings, folder, sent=signal.SIGKILL, last=0):
    """Stream in a separate process, which sends itself a signal at a given event."""
    spec, chosen = encoder.spec.model_dump_json(), settings.model_dump_json()
    return run_forked(STREAM, spec, chosen, data_folder, folder, int(sent), last)


def test_a_stream_killed_at_any_moment_resumes_with_the_same_bytes(encoder_of, data_folder, tmp_path):
    encoder, settings = encoder_of(models.bert), SAESettings(**SETTINGS, epochs=2, held_out=0.2)
    streamed(encoder, Data(data_folder), settings, tmp_path / "whole")
    # Before the first checkpoint, while one is written, and in both epochs.
    for last in (4, 17, 40, 30):
        killed = run_stream(encoder, data_folder, settings, tmp_path / "killed", last=last)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert not (tmp_path / "killed" / "tiny").exists()
        assert not (tmp_path / "killed" / "tiny.zarr").exists()
    finished = run_stream(encoder, data_folder, settings, tmp_path / "killed")
    assert finished.returncode == 0, finished.stderr
    assert "tiny: resuming at step" in finished.stderr
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_stream_saves_on_sigterm_and_exits_with_its_own_code(encoder_of, data_folder, tmp_path, monkeypatch):
    encoder, settings, read = encoder_of(models.bert), SAESettings(**SETTINGS, epochs=2, held_out=0.2), []
    streamed(encoder, Data(data_folder), settings, tmp_path / "whole")
    stopped = run_stream(encoder, data_folder, settings, tmp_path / "stopped", signal.SIGTERM, last=30)
    assert stopped.returncode == PREEMPTED
    assert "tiny: stopped by SIGTERM at step" in stopped.stderr
    assert not (tmp_path / "stopped" / "tiny").exists()
    step = int(re.search(r"stopped by SIGTERM at step (\d+) of 12;", stopped.stderr)[1])
    assert 0 < step < 6
    monkeypatch.setattr(Data, "caption", lambda self, row, caption=Data.caption: read.append(row) or caption(self, row))
    streamed(encoder, Data(data_folder), settings, tmp_path / "stopped")
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")
    # The rest of the first epoch, the second and the held-out samples; nothing is read again.
    assert len(read) <= (38 - 7 * step) + 38 + 9 + 4 * BLOCK


def test_a_truncated_state_of_one_sae_returns_all_to_the_previous_checkpoint(encoder_of, data_folder, tmp_path, capsys):
    encoder, settings = encoder_of(models.bert), SAESettings(**SETTINGS, epochs=2)
    streamed(encoder, Data(data_folder), settings, tmp_path / "whole")
    assert run_stream(encoder, data_folder, settings, tmp_path / "torn", last=70).returncode == -signal.SIGKILL
    newest = max(path for path in (tmp_path / "torn" / "tiny.checkpoints").iterdir() if path.name.isdecimal())
    state = sorted(newest.glob("*.safetensors"))[1]
    state.write_bytes(state.read_bytes()[:-1] + b"x")
    capsys.readouterr()
    streamed(encoder, Data(data_folder), settings, tmp_path / "torn")
    log = capsys.readouterr().err
    assert f"{newest}: damaged; using the checkpoint before it" in log
    assert f"tiny: resuming at step {int(newest.name) - 1} of 14" in log
    assert contents(tmp_path / "torn") == contents(tmp_path / "whole")


def lose_a_chunk(store):
    (store / "layer-01/global/c/0/0").unlink()


def cut_a_chunk(store):
    chunk = store / "layer-01/global/c/0/0"
    chunk.write_bytes(chunk.read_bytes()[:50])


def cut_an_arrays_metadata(store):
    metadata = store / "layer-01/global/zarr.json"
    metadata.write_text(metadata.read_text()[:50])


@pytest.mark.parametrize("damage", [lose_a_chunk, cut_a_chunk, cut_an_arrays_metadata])
def test_a_damaged_unfinished_store_is_an_error_and_then_rewritten(damage, encoder_of, data_folder, tmp_path):
    encoder, settings = encoder_of(models.bert), SAESettings(**SETTINGS, held_out=0.2)
    streamed(encoder, Data(data_folder), settings, tmp_path / "whole")
    assert run_stream(encoder, data_folder, settings, tmp_path / "k", last=40).returncode == -signal.SIGKILL
    damage(tmp_path / "k" / "tiny.zarr.partial")
    with pytest.raises(StoreError, match=r"tiny.zarr: the partial store of an earlier attempt is damaged .* run again"):
        streamed(encoder, Data(data_folder), settings, tmp_path / "k")
    streamed(encoder, Data(data_folder), settings, tmp_path / "k")
    assert contents(tmp_path / "k") == contents(tmp_path / "whole")


def test_refuses_precisions_that_would_affect_the_encoder(encoder_of, data_folder, tmp_path):
    with pytest.raises(StudyError, match=r"precision: tf32 would also round the products of the encoder"):
        streamed(encoder_of(models.bert), Data(data_folder), SAESettings(precision="tf32"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_saes_of_global_tokens_take_one_pass_and_equal_those_of_stored_ones(encoder_of, data_folder, tmp_path):
    encoder, settings = encoder_of(models.bert), SAESettings(preset="global", **SETTINGS | {"k": 2, "epochs": 2})
    streamed(encoder, Data(data_folder), settings, tmp_path / "one")
    extract_activations(encoder, Data(data_folder), tmp_path / "two" / "tiny.zarr")
    for layer, seed in itertools.product(encoder.spec.layer_numbers(), SEEDS):
        out = tmp_path / "two" / "tiny" / layer_name(layer) / f"seed-{seed}"
        train_sae(tmp_path / "two" / "tiny.zarr", layer, settings, seed, out)
    assert_the_same(tmp_path / "one", tmp_path / "two")


def test_an_interrupted_training_on_global_tokens_keeps_its_finished_saes(
    encoder_of, data_folder, tmp_path, monkeypatch
):
    encoder, settings = encoder_of(models.bert), SAESettings(preset="global", **SETTINGS | {"epochs": 2})
    made = []

    def interrupted(*arguments):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(arguments[4])
        train_sae(*arguments)

    monkeypatch.setattr("conceptshare.sae._stream.train_sae", interrupted)
    with pytest.raises(KeyboardInterrupt):
        streamed(encoder, Data(data_folder), settings, tmp_path / "one")
    monkeypatch.setattr("conceptshare.sae._stream.train_sae", lambda *of: made.append(of[4]) or train_sae(*of))
    streamed(encoder, Data(data_folder), settings, tmp_path / "one")
    monkeypatch.undo()
    assert len(made) == len(set(made)) == len(SEEDS) * len(encoder.spec.layer_numbers())
    streamed(encoder, Data(data_folder), settings, tmp_path / "two")
    assert_the_same(tmp_path / "one", tmp_path / "two")


def test_does_not_resume_checkpoints_of_other_settings(encoder_of, data_folder, tmp_path, capsys):
    encoder, settings = encoder_of(models.bert), SAESettings(**SETTINGS)
    other = settings.model_copy(update={"learning_rate": 1e-3})
    assert run_stream(encoder, data_folder, other, tmp_path / "new", last=40).returncode == -signal.SIGKILL
    streamed(encoder, Data(data_folder), settings, tmp_path / "new")
    assert "resuming" not in capsys.readouterr().err
    streamed(encoder, Data(data_folder), settings, tmp_path / "fresh")
    assert contents(tmp_path / "new") == contents(tmp_path / "fresh")


def test_a_non_finite_activation_is_an_error_and_leaves_nothing(encoder_of, data_folder, tmp_path):
    spec = models.bert(tmp_path / "model").spec
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["encoder.layer.1.output.LayerNorm.bias"][0] = torch.nan
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    broken = load_encoder(spec)
    with pytest.raises(NumericsError, match=r"tiny, layer 1, sample 0: a value that is not finite"):
        streamed(broken, Data(data_folder), SAESettings(**SETTINGS), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_divergence_is_an_error_that_names_layer_and_seed(encoder_of, data_folder, tmp_path):
    settings = SAESettings(**SETTINGS).model_copy(update={"learning_rate": 1e30})  # more than a study allows
    with pytest.raises(NumericsError, match=r"tiny layer 0 seed 0: the loss is not finite from step \d on"):
        streamed(encoder_of(models.bert), Data(data_folder), settings, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_streams_from_the_command_line(encoder_of, data_folder, tmp_path):
    spec = encoder_of(models.bert).spec
    cli = partial(run_forked, "from conceptshare.cli import main; main()")
    text = json.dumps(json.loads(spec.model_dump_json(exclude_none=True)))
    assert cli("weights", "--encoder", text, "--out", tmp_path / "weights.json").returncode == 0
    options = [
        "--data",
        data_folder,
        "--settings",
        json.dumps(SETTINGS),
        "--seed",
        "0",
        "--seed",
        "3",
        "--workers",
        "2",
    ]
    where = ["--saes", tmp_path / "tiny", "--activations", tmp_path / "tiny.zarr"]
    whole = cli("stream", "--encoder", text, "--weights", tmp_path / "weights.json", *options, *where)
    assert whole.returncode == 0, whole.stderr
    refused = cli("stream", "--seed", "a", *where)
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr
    assert sorted(path.name for path in (tmp_path / "tiny").glob("*/*")) == sorted(["seed-0", "seed-3"] * spec.layers)


@pytest.mark.parametrize("train_on", ["all", "global"])
def test_imported_saes_are_measured_in_place_of_a_training(train_on, encoder_of, data_folder, tmp_path):
    """With stored and with streamed tokens, they keep their weights, and get the quality that `evaluate` finds."""
    encoder, data = encoder_of(models.bert), Data(data_folder)
    settings = SAESettings(**SETTINGS, held_out=0.2, train_on=train_on)
    width, places = encoder.spec.width, list(itertools.product(encoder.spec.layer_numbers(), SEEDS))
    for n, (layer, seed) in enumerate(places):
        sae = SAE(width, 20, TopK(3) if layer else ReLU(), torch.Generator().manual_seed(n))
        (tmp_path / f"theirs-{n}").mkdir()
        save_sae(sae, tmp_path / f"theirs-{n}", "theirs", f"layer {layer}")
        import_sae(tmp_path / f"theirs-{n}", tmp_path / "imported" / layer_name(layer) / f"seed-{seed}", width, layer)
    streamed(encoder, data, settings, tmp_path / "streamed", pretrained=tmp_path / "imported")
    extract_activations(encoder, data, tmp_path / "stored" / "tiny.zarr", tmp_path / "tokens" / "tiny.zarr")
    store = tmp_path / ("tokens" if train_on == "all" else "stored") / "tiny.zarr"
    tokens = TokenReader.open if train_on == "all" else TokenReader.open_global
    held_out = range(SAMPLES - settings.held_out_samples(SAMPLES), SAMPLES)
    for layer, seed in places:
        place = f"{layer_name(layer)}/seed-{seed}"
        out = tmp_path / "stored" / "tiny" / place
        train_sae(store, layer, settings, seed, out, tmp_path / "imported" / place)
        imported = load_sae(tmp_path / "imported" / place)
        weights = zip(load_sae(out).parameters(), imported.parameters(), strict=True)
        assert all(torch.equal(*pair) for pair in weights)
        metrics = json.loads((out / "metrics.json").read_text())
        assert (metrics["steps"], metrics["settings"]["train_on"]) == (0, train_on)
        quality = evaluate(imported, [tokens(store, layer).read(torch.tensor(held_out).numpy())]).quality
        assert metrics["all_tokens"] == pytest.approx(asdict(quality))
    assert_the_same(tmp_path / "stored", tmp_path / "streamed")
    record_features(tmp_path / "streamed" / "tiny.zarr", tmp_path / "streamed" / "tiny", 0, tmp_path / "tiny@0.zarr")
    with pytest.raises(StoreError, match=r"theirs-0: not an imported SAE; name a folder that"):
        train_sae(store, 0, settings, 0, tmp_path / "other", tmp_path / "theirs-0")
