"""The stores hold the encoder's activations, rounded to float16, at the rows given by their offsets."""

import errno
import io
import os
import re
import shutil
import signal
import threading
from unittest.mock import Mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from conceptshare.activations import extraction
from conceptshare.activations.extraction import TokenReader, extract_activations
from conceptshare.config.catalog import DatasetSpec, EncoderSpec
from conceptshare.data.dataset import Data, make_dataset
from conceptshare.encoders import load_encoder
from conceptshare.io import sizes, store
from conceptshare.io.errors import EncoderError, NumericsError, StoreError
from tests.helpers import models
from tests.helpers.forks import run_forked
from tests.helpers.models import CAPTIONS, LAYERS
from tests.helpers.samples import contents

# The last batch has only one sample.
BATCH = 3
ROWS = [*CAPTIONS, "a mat", "zebra"]
FAMILIES = [
    models.bert,
    models.deberta_v2,
    models.clip_text,
    models.siglip_text,
    models.clip_image,
    models.siglip_image,
    models.mambavision,
]
by_name = {"ids": lambda make: make.__name__}


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    cells = []
    for image in models.noise_images(len(ROWS)):
        png = io.BytesIO()
        image.save(png, "png")
        cells.append(png.getvalue())
    # Written so that the shuffled samples are ROWS.
    places = np.argsort(np.random.default_rng(0).permutation(len(ROWS)))
    table = pa.table({"image": [cells[i] for i in places], "caption": [ROWS[i] for i in places]})
    pq.write_table(table, folder / "rows.parquet")
    make_dataset(DatasetSpec(source=str(folder / "rows.parquet")), folder / "made")
    return folder / "made"


@pytest.fixture(scope="module")
def data(data_folder):
    return Data(data_folder)


@pytest.fixture(scope="module")
def extracted(data, tmp_path_factory):
    """For each model family, computed once: its entry, the folder of its stores, and its activations per batch."""
    made = {}

    def get(make):
        if make not in made:
            folder = tmp_path_factory.mktemp(make.__name__)
            spec = batched(make(folder / "model").spec)
            encoder = load_encoder(spec)
            extract(encoder, data, folder)
            samples = ROWS if spec.modality == "text" else models.noise_images(len(ROWS))
            batches = [encoder.activations(samples[i : i + BATCH]) for i in range(0, len(ROWS), BATCH)]
            made[make] = spec, folder, batches
        return made[make]

    return get


def extract(encoder, data, folder):
    extract_activations(encoder, data, folder / "activations" / "tiny.zarr", folder / "tokens" / "tiny.zarr")


def open_both(folder):
    return [store.open_store(folder / kind / "tiny.zarr", kind) for kind in ("activations", "tokens")]


def open_reader(folder, layer):
    return TokenReader.open(folder / "tokens" / "tiny.zarr", layer)


def batched(spec, **values):
    return EncoderSpec(**{**spec.model_dump(), "batch_size": BATCH, **values})


def expected(spec, batches, layer):
    """``[rows, D]`` training tokens of each sample and its global token, one sample at a time."""
    tokens, global_tokens = [], []
    for batch in batches:
        for x, chosen, whole in zip(batch.tokens[layer], batch.training, batch.global_token[layer], strict=True):
            rows = [row.cpu().numpy() for row, kept in zip(x, chosen, strict=True) if kept]
            if spec.global_token == "mean":
                rows.append(whole.cpu().numpy())
            tokens.append(np.stack(rows).astype(np.float16))
            global_tokens.append(whole.cpu().numpy().astype(np.float16))
    return tokens, global_tokens


def poison(folder, name, change):
    """Change one tensor of a saved model."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors[name])
    save_file(tensors, file, metadata={"format": "pt"})


def assert_nothing_written(folder):
    assert [path.name for path in folder.rglob("*.zarr*")] == []


@pytest.mark.parametrize("make", FAMILIES, **by_name)
def test_stores_activations_as_float16(extracted, make):
    spec, folder, batches = extracted(make)
    of_globals, of_all = open_both(folder)
    for layer in spec.layer_numbers():
        tokens, global_tokens = expected(spec, batches, layer)
        stored, global_ = of_all[f"layer-{layer:02d}/tokens"], of_globals[f"layer-{layer:02d}/global"]
        assert stored.dtype == global_.dtype == np.float16
        assert np.array_equal(stored[:], np.concatenate(tokens))
        assert np.array_equal(global_[:], np.stack(global_tokens))
        assert np.array_equal(of_all["offsets"][:], np.cumsum([0, *map(len, tokens)]))
    names = [f"layer-{layer:02d}" for layer in spec.layer_numbers()]
    for opened, kept, once in ((of_globals, "global", []), (of_all, "tokens", ["global_rows", "offsets"])):
        assert sorted(opened) == sorted([*names, *once])
        assert {name for layer in names for name in opened[layer]} == {kept}


@pytest.mark.parametrize("make", FAMILIES, **by_name)
def test_global_token_is_one_of_the_training_rows(extracted, make):
    spec, folder, _ = extracted(make)
    layer = spec.layer_numbers()[-1]
    reader = open_reader(folder, layer)
    of_globals, of_all = open_both(folder)
    global_tokens = of_globals[f"layer-{layer:02d}/global"][:].astype(np.float32)
    assert np.array_equal(reader.read_global(np.arange(len(ROWS))).numpy(), global_tokens)
    for sample, token in enumerate(global_tokens):
        rows = reader.read(np.array([sample])).numpy()
        assert (rows == token).all(axis=1).any()
        assert of_all["offsets"][sample] <= of_all["global_rows"][sample] < of_all["offsets"][sample + 1]
        if spec.global_token == "mean":
            assert np.array_equal(rows[-1], token)


@pytest.mark.parametrize("make", [models.deberta_v2, models.siglip_image], **by_name)
def test_mean_is_stored_as_the_last_training_row(extracted, make):
    reader = open_reader(extracted(make)[1], layer=2)
    for sample, token in enumerate(reader.read_global(np.arange(len(ROWS))).numpy()):
        rows = reader.read(np.array([sample])).numpy()
        # Each float16 is off by at most 2^-11 of the largest value.
        assert np.allclose(rows[:-1].mean(0), token, rtol=0, atol=2**-10 * np.abs(rows).max())


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("samples", [[4, 0, 4, 6], [6], [0, 1, 2, 3, 4, 5, 6]])
def test_reader_returns_rows_in_the_order_of_the_requested_samples(extracted, monkeypatch, samples, in_memory):
    spec, folder, batches = extracted(models.bert)
    if not in_memory:
        monkeypatch.setattr(extraction, "IN_MEMORY_BYTES", 0)
    reader = open_reader(folder, layer=1)
    tokens, global_tokens = expected(spec, batches, 1)
    rows, of_global = reader.read(np.array(samples)), reader.read_global(np.array(samples))
    assert rows.dtype == of_global.dtype == torch.float16
    assert np.array_equal(rows.numpy(), np.concatenate([tokens[i] for i in samples]))
    assert np.array_equal(of_global.numpy(), np.stack([global_tokens[i] for i in samples]))
    assert len(reader) == len(ROWS)
    assert reader.width == spec.width


def test_many_small_shards_store_the_same_values(extracted, data, tmp_path, monkeypatch):
    spec, _, batches = extracted(models.bert)
    monkeypatch.setattr(store, "CHUNK_BYTES", 2 * spec.width * 3)
    monkeypatch.setattr(sizes, "SHARD_BYTES", 2 * spec.width * 6)
    monkeypatch.setattr(extraction, "GLOBAL_SHARD_BYTES", 2 * spec.width * 3)
    extract(load_encoder(spec), data, tmp_path)
    of_globals, of_all = open_both(tmp_path)
    tokens, global_tokens = expected(spec, batches, 2)
    assert np.array_equal(of_all["layer-02/tokens"][:], np.concatenate(tokens))
    assert np.array_equal(of_globals["layer-02/global"][:], np.stack(global_tokens))


def test_store_records_its_inputs(extracted, data):
    spec, folder, _ = extracted(models.bert)
    described, of_all = (opened.attrs["spec"] for opened in open_both(folder))
    assert described == of_all
    assert described["name"] == "tiny"
    assert described["content_hash"] == data.content_hash
    assert (described["samples"], described["layers"], described["width"]) == (len(ROWS), [0, 1, 2], spec.width)
    assert described["encoder"]["model"] == spec.model
    assert described["encoder"]["global_token"] == "first"


def test_stores_only_the_selected_layers_and_lists_them_in_the_error(extracted, data, tmp_path):
    spec, folder, _ = extracted(models.bert)
    extract(load_encoder(batched(spec, use_layers=[0, 2])), data, tmp_path)
    whole, everything = open_reader(folder, layer=2), np.arange(len(ROWS))
    assert torch.equal(open_reader(tmp_path, layer=2).read(everything), whole.read(everything))
    with pytest.raises(StoreError, match=r"tokens.tiny\.zarr: no layer 1; it has layer-00, layer-02"):
        open_reader(tmp_path, layer=1)


def test_a_store_of_global_tokens_only_cannot_be_trained_on(extracted):
    _, folder, _ = extracted(models.bert)
    with pytest.raises(StoreError, match=r"tiny\.zarr: a store of 'activations', but one of 'tokens' is needed"):
        TokenReader.open(folder / "activations" / "tiny.zarr", layer=0)


def test_a_non_finite_activation_names_encoder_layer_and_sample(data, tmp_path):
    models.save_bert(tmp_path / "model")
    word = models.bert_tokenizer().convert_tokens_to_ids("hat")
    poison(tmp_path / "model", "embeddings.word_embeddings.weight", lambda x: x[word].fill_(torch.nan))
    encoder = load_encoder(batched(models.entry(tmp_path / "model", "text", "first", kind="language")))
    sample = next(i for i, caption in enumerate(ROWS) if "hat" in caption)
    assert sample >= BATCH
    with pytest.raises(NumericsError, match=f"^tiny, layer 0, sample {sample}: a value that is not finite"):
        extract(encoder, data, tmp_path)
    assert_nothing_written(tmp_path)


def test_a_write_that_fails_leaves_no_thread_that_prepares_batches(data, tmp_path, monkeypatch):
    """Garbage collection during the start of another thread could otherwise deadlock."""
    models.save_bert(tmp_path / "model")
    encoder = load_encoder(batched(models.entry(tmp_path / "model", "text", "first", kind="language", batch_size=1)))
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(extraction.Recorder, "append", Mock(side_effect=full))
    before = set(threading.enumerate())
    with pytest.raises(OSError, match="No space left") as caught:
        extract(encoder, data, tmp_path)
    left = set(threading.enumerate()) - before
    assert not [thread for thread in left if thread.name.startswith("ThreadPoolExecutor")], caught  # keeps the frames


def test_a_float16_overflow_names_encoder_layer_and_sample(data, tmp_path):
    models.save_bert(tmp_path / "model")
    poison(tmp_path / "model", "encoder.layer.1.output.LayerNorm.bias", lambda x: x[3:4].fill_(1e5))
    encoder = load_encoder(batched(models.entry(tmp_path / "model", "text", "first", kind="language")))
    with pytest.raises(NumericsError, match=r"^tiny, layer 1, sample 0: 1e\+05 is beyond float16's 65504"):
        extract(encoder, data, tmp_path)
    assert_nothing_written(tmp_path)


def test_a_float16_overflow_at_any_token_names_its_sample(data, tmp_path):
    model = models.save_clip(tmp_path / "model")
    # The z of the last caption only; attention is causal, so its first token, here the global one, is unaffected.
    letter = models.clip_tokenizer().convert_tokens_to_ids("z")
    poison(tmp_path / "model", "text_model.embeddings.token_embedding.weight", lambda x: x[letter].fill_(1e6))
    encoder = load_encoder(batched(models.entry(tmp_path / "model", "text", "first")))
    assert "".join(ROWS).count("z") == 1
    assert model.config.text_config.num_hidden_layers == LAYERS
    with pytest.raises(NumericsError, match=r"^tiny, layer 0, sample 6: 1e\+06 is beyond float16's 65504"):
        extract(encoder, data, tmp_path)
    assert_nothing_written(tmp_path)


def test_an_encoder_with_an_unexpected_width_leaves_no_store(data, tmp_path):
    models.save_bert(tmp_path / "model")
    spec = batched(models.entry(tmp_path / "model", "text", "first", kind="language"), width=20)
    with pytest.raises(EncoderError, match="set width: 16"):
        extract(load_encoder(spec), data, tmp_path)
    assert_nothing_written(tmp_path)


def test_an_overflow_at_low_precision_suggests_float32(data, tmp_path):
    models.save_bert(tmp_path / "model")
    poison(tmp_path / "model", "encoder.layer.1.output.dense.bias", lambda x: x[3:4].fill_(1e5))
    poison(tmp_path / "model", "encoder.layer.1.output.LayerNorm.weight", lambda x: x.fill_(1e6))
    entry = models.entry(tmp_path / "model", "text", "first", kind="language", precision="float16")
    with pytest.raises(
        NumericsError, match=r"^tiny, layer 1, sample 0: .*; set precision: float32 in place of float16"
    ):
        extract(load_encoder(batched(entry)), data, tmp_path)


@pytest.mark.parametrize("make", [models.bert, models.siglip_text, models.siglip_image, models.clip_text], **by_name)
def test_max_tokens_limits_the_tokens_per_sample_and_keeps_the_global_token(extracted, data, tmp_path, make):
    spec, folder, _ = extracted(make)
    extract(load_encoder(batched(spec, max_tokens=4)), data, tmp_path)
    for layer in spec.layer_numbers():
        whole, some = open_reader(folder, layer), open_reader(tmp_path, layer)
        global_tokens = some.read_global(np.arange(len(ROWS))).numpy()
        assert np.array_equal(global_tokens, whole.read_global(np.arange(len(ROWS))).numpy())
        for sample in range(len(ROWS)):
            there, kept = (reader.read(np.array([sample])).numpy() for reader in (whole, some))
            assert len(kept) == min(4, len(there))
            # In their original order, and each is an existing token.
            places = [int(np.flatnonzero((there == row).all(axis=1))[0]) for row in kept]
            assert places == sorted(set(places))
            assert (kept == global_tokens[sample]).all(axis=1).any()


def test_max_tokens_samples_by_seed_and_sample_but_not_batch(extracted, data, tmp_path):
    spec, _, _ = extracted(models.clip_image)

    def drawn(name, **values):
        extract(load_encoder(batched(spec, max_tokens=5, **values)), data, tmp_path / name)
        return open_reader(tmp_path / name, layer=0).read(np.arange(len(ROWS)))

    first = drawn("first")
    assert torch.equal(drawn("again"), first)
    assert torch.allclose(drawn("batched", batch_size=2), first, rtol=0, atol=1e-2)
    assert not torch.allclose(drawn("seeded", token_seed=1), first, rtol=0, atol=1e-2)


def test_max_tokens_samples_tokens_uniformly(extracted):
    spec, _, batches = extracted(models.clip_image)
    found, capped = batches[0], batched(spec, max_tokens=5)
    tokens = found.training.shape[1]
    seen = np.zeros(tokens)
    for start in range(0, 6000, BATCH):
        seen += extraction._draw_tokens(found, capped, np.arange(start, start + BATCH)).cpu().numpy().sum(0)
    assert seen[0] == 6000
    # Each draw keeps 4 of the 16 others: 1500 expected, with a standard deviation of 34.
    assert np.abs(seen[1:] - 6000 * 4 / (tokens - 1)).max() < 5 * 34


EXTRACT = """
import os, signal, sys
from pathlib import Path
import torch
import zarr.storage._local as local
from conceptshare.activations import extraction
from conceptshare.io import sizes, store
from conceptshare.config.catalog import EncoderSpec
from conceptshare.data.dataset import Data
from conceptshare.encoders import load_encoder
from conceptshare.encoders.weights import fetch_weights

torch.set_num_threads(1)
store.CHUNK_BYTES, sizes.SHARD_BYTES, extraction.GLOBAL_SHARD_BYTES = 128, 512, 128
spec = EncoderSpec.model_validate_json(sys.argv[1])
data, folder, last = Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
writes = 0

def counted(function):
    def call(*arguments, **options):
        global writes
        writes += 1
        if writes == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)

    return call

local._put, os.rename, os.replace = counted(local._put), counted(os.rename), counted(os.replace)
fetch_weights(spec, folder / "weights.json")
encoder = load_encoder(spec, folder / "weights.json")
writes = 0
out, tokens = folder / "activations" / "tiny.zarr", folder / "tokens" / "tiny.zarr"
tokens = None if len(sys.argv) > 5 else tokens
extraction.extract_activations(encoder, Data(data), out, tokens)
print(writes)
"""


def run_extraction(spec, data, folder, last=0, *without_tokens):
    """Extract in a separate process, which kills itself before its ``last``-th write to a store or rename."""
    folder.mkdir(exist_ok=True)
    return run_forked(EXTRACT, spec.model_dump_json(), data, folder, last, *without_tokens)


def resumed_at(result):
    """The sample at which a run reported that it resumed, if it did."""
    return [int(number) for number in re.findall(r"resuming at sample (\d+)", result.stderr)]


def test_global_tokens_alone_are_the_same_bytes_and_resume_at_a_finished_shard(data_folder, tmp_path):
    spec = batched(models.bert(tmp_path / "model").spec, use_layers=[0, 2], batch_size=2)
    assert run_extraction(spec, data_folder, tmp_path / "both").returncode == 0
    whole = run_extraction(spec, data_folder, tmp_path / "alone", 0, "without tokens")
    assert whole.returncode == 0, whole.stderr
    killed = run_extraction(spec, data_folder, tmp_path / "killed", round(0.85 * int(whole.stdout)), "without tokens")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (start,) = resumed_at(run_extraction(spec, data_folder, tmp_path / "killed", 0, "without tokens"))
    assert start > 0
    expected = contents(tmp_path / "both" / "activations")
    for name in ("alone", "killed"):
        assert contents(tmp_path / name / "activations") == expected
        assert not (tmp_path / name / "tokens").exists()


@pytest.mark.parametrize(("make", "moments"), [(models.bert, [0.6, 0.3, 0.15]), (models.siglip_image, [0.85])])
def test_a_killed_extraction_resumes_at_its_last_finished_shard_with_the_same_bytes(
    data_folder, tmp_path, make, moments
):
    spec = batched(make(tmp_path / "model").spec, use_layers=[0, 2], batch_size=2)
    whole = run_extraction(spec, data_folder, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    out = tmp_path / "killed"
    starts = [0]
    for moment in [*moments, 0]:
        result = run_extraction(spec, data_folder, out, round(moment * int(whole.stdout)))
        starts += resumed_at(result)
        if result.returncode == 0:  # fewer writes were left than that
            break
        assert result.returncode == -signal.SIGKILL, result.stderr
        assert not list(out.glob("*/tiny.zarr"))
    assert len(starts) > 1
    assert starts == sorted(starts)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_kill_between_the_two_renames_still_gives_the_same_bytes_in_both(data_folder, tmp_path):
    spec = batched(models.bert(tmp_path / "model").spec, batch_size=2)
    whole = run_extraction(spec, data_folder, tmp_path / "whole")
    out = tmp_path / "killed"
    assert run_extraction(spec, data_folder, out, int(whole.stdout)).returncode == -signal.SIGKILL
    left = ["activations/tiny.zarr.partial", "tokens/tiny.zarr"]
    assert sorted(path.relative_to(out).as_posix() for path in out.glob("*/tiny*")) == left
    assert run_extraction(spec, data_folder, out).returncode == 0
    assert contents(out) == contents(tmp_path / "whole")
    shutil.rmtree(out / "tokens")  # Snakemake deletes the outputs of a killed job
    (out / "activations" / "tiny.zarr").rename(out / "activations" / "tiny.zarr.partial")
    assert run_extraction(spec, data_folder, out).returncode == 0
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("kind", "lost"),
    [
        ("tokens", "layer-02/tokens/c/0/0"),
        ("activations", "layer-00/global/c/0/0"),
        ("tokens", "offsets/c/0"),
        ("tokens", "global_rows/c/0"),
    ],
)
def test_a_chunk_missing_from_an_unfinished_store_is_an_error_and_then_rewritten(data_folder, tmp_path, kind, lost):
    spec = batched(models.bert(tmp_path / "model").spec, batch_size=2)
    out = tmp_path / "out"
    whole = run_extraction(spec, data_folder, out)
    expected = contents(out)
    shutil.rmtree(out)
    assert run_extraction(spec, data_folder, out, int(whole.stdout) - 21).returncode == -signal.SIGKILL
    (out / kind / "tiny.zarr.partial" / lost).unlink()
    damaged = run_extraction(spec, data_folder, out)
    assert damaged.returncode == 1
    assert "tiny.zarr: the partial store of an earlier attempt is damaged" in damaged.stderr
    assert run_extraction(spec, data_folder, out).returncode == 0
    assert contents(out) == expected


@pytest.mark.parametrize("change", ["spec", "weights"])
def test_does_not_resume_another_extraction(data_folder, tmp_path, change):
    spec = batched(models.bert(tmp_path / "model").spec, batch_size=2)
    out = tmp_path / "out"
    whole = run_extraction(spec, data_folder, out)
    shutil.rmtree(out)
    killed = run_extraction(spec, data_folder, out, int(whole.stdout) - 21)
    assert killed.returncode == -signal.SIGKILL
    if change == "spec":
        spec = batched(spec, batch_size=2, context_length=6)
    else:
        poison(tmp_path / "model", "embeddings.word_embeddings.weight", lambda x: x.mul_(2))
    again = run_extraction(spec, data_folder, out)
    assert again.returncode == 0, again.stderr
    assert "resuming" not in again.stderr
    extract(load_encoder(spec), Data(data_folder), tmp_path / "fresh")
    found, fresh = (open_reader(folder, layer=2).read(np.arange(len(ROWS))) for folder in (out, tmp_path / "fresh"))
    assert torch.equal(found, fresh)


PEAK = """
import sys
from pathlib import Path
import torch
from conceptshare.activations import extraction
from conceptshare.config.catalog import EncoderSpec
from conceptshare.data.dataset import Data
from conceptshare.encoders import load_encoder
from conceptshare.io import sizes

torch.set_num_threads(1)
sizes.SHARD_BYTES = 2**21
encoder = load_encoder(EncoderSpec.model_validate_json(sys.argv[1]))
for folder in map(Path, sys.argv[2:]):
    extraction.extract_activations(encoder, Data(folder), folder / "activations.zarr", folder / "tokens.zarr")
    status = Path("/proc/self/status").read_text()  # getrusage tells the largest of the parent's and one's own
    print(int(status.split("VmHWM:")[1].split()[0]) / 1024)
"""


def test_memory_does_not_grow_with_the_number_of_samples(tmp_path):
    spec = models.fine_vit(tmp_path / "model")
    noise = np.random.default_rng(0).integers(0, 256, (1600, 32, 32, 3), dtype=np.uint8)
    folders = [tmp_path / "400", tmp_path / "1600"]
    for folder in folders:
        cells = []
        for pixels in noise[: int(folder.name)]:
            picture = io.BytesIO()
            Image.fromarray(pixels).save(picture, "bmp")
            cells.append(picture.getvalue())
        rows = {"image": cells, "caption": ["noise"] * len(cells)}
        pq.write_table(pa.table(rows), folder.with_suffix(".parquet"))
        make_dataset(DatasetSpec(source=str(folder.with_suffix(".parquet"))), folder)
    result = run_forked(PEAK, spec.model_dump_json(), *folders)
    assert result.returncode == 0, result.stderr
    few, many = map(float, result.stdout.split())
    held = sum(path.stat().st_size for path in (folders[1] / "tokens.zarr").rglob("*") if path.is_file()) / 2**20
    assert held > 60
    assert many - few < held / 3
