"""An extraction in parts gives the same bytes as a single one."""

import io
import re
import shutil
import signal
from itertools import cycle, islice

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import Siglip2ImageProcessor, Siglip2VisionConfig, Siglip2VisionModel
from typer.testing import CliRunner

from conceptshare.activations import extraction, parts
from conceptshare.activations.extraction import extract_activations
from conceptshare.activations.parts import extract_part, join_parts
from conceptshare.cli import app
from conceptshare.config.catalog import DatasetSpec, EncoderSpec
from conceptshare.data.dataset import Data, make_dataset
from conceptshare.encoders import load_encoder
from conceptshare.encoders.weights import fetch_weights
from conceptshare.io import sizes, store
from conceptshare.io.errors import StoreError, StudyError
from tests.helpers import decoders, models
from tests.helpers.forks import run_forked
from tests.helpers.models import CAPTIONS
from tests.helpers.samples import contents

SAMPLES, BATCH = 23, 2  # the last batch has only one


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    captions = [f"{' '.join(CAPTIONS[n % len(CAPTIONS)].split()[: 1 + n % 5])}" for n in range(SAMPLES)]
    cells = []
    for image in islice(cycle(models.noise_images(7)), SAMPLES):
        png = io.BytesIO()
        image.save(png, "png")
        cells.append(png.getvalue())
    pq.write_table(pa.table({"image": cells, "caption": captions}), folder / "rows.parquet")
    make_dataset(DatasetSpec(source=str(folder / "rows.parquet")), folder / "made")
    return folder / "made"


@pytest.fixture(scope="module")
def spec_of(tmp_path_factory):
    """An encoder's entry; its files are written once."""
    made = {}

    def get(make, **values):
        if make not in made:
            made[make] = make(tmp_path_factory.mktemp("models") / make.__name__).spec
        return EncoderSpec(**{**made[make].model_dump(), "batch_size": BATCH, "use_layers": [0, 2], **values})

    return get


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of few rows, so that several straddle a boundary between parts in either store."""

    def shrink(rows, samples, width=16):
        monkeypatch.setattr(store, "CHUNK_BYTES", 2 * width)
        monkeypatch.setattr(sizes, "SHARD_BYTES", 2 * width * rows)
        monkeypatch.setattr(extraction, "GLOBAL_SHARD_BYTES", 2 * width * samples)

    return shrink


def in_one_go(encoder, data, folder):
    extract_activations(encoder, data, folder / "activations" / "tiny.zarr", folder / "tokens" / "tiny.zarr")
    return stores_in(folder)


def in_parts(encoder, data, folder, parts):
    paths = [folder / "parts" / f"tiny.{n}-of-{parts}.zarr" for n in range(1, parts + 1)]
    for n, path in enumerate(paths, start=1):
        extract_part(encoder, data, path, n, parts)
    return join(folder, paths)


def stores_in(folder):
    """Every file of both stores, and any other file next to them."""
    return {
        f"{kind}/{name}": content
        for kind in ("activations", "tokens")
        for name, content in contents(folder / kind).items()
    }


def test_parts_can_be_joined_without_tokens(spec_of, data_folder, tmp_path, small_shards):
    encoder, data = load_encoder(spec_of(models.bert)), Data(data_folder)
    small_shards(7, 3, encoder.spec.width)
    expected = in_parts(encoder, data, tmp_path, 2)
    joined = tmp_path / "alone" / "tiny.zarr"
    join_parts([tmp_path / "parts" / f"tiny.{n}-of-2.zarr" for n in (1, 2)], joined)
    found = {f"activations/tiny.zarr/{name}": content for name, content in contents(joined).items()}
    assert found == {name: content for name, content in expected.items() if name.startswith("activations/")}


@pytest.mark.parametrize("make", [models.bert, models.clip_image], ids=lambda make: make.__name__)
def test_parts_with_global_tokens_alone_join_to_the_same_store(make, spec_of, data_folder, tmp_path, small_shards):
    encoder, data = load_encoder(spec_of(make)), Data(data_folder)
    small_shards(7, 3, encoder.spec.width)
    extract_activations(encoder, data, tmp_path / "whole" / "tiny.zarr")
    for count in (1, 2, 5, 30):
        paths = [tmp_path / f"{count}" / f"{n}.zarr" for n in range(1, count + 1)]
        for n, path in enumerate(paths, start=1):
            extract_part(encoder, data, path, n, count, tokens=False)
            assert not [name for name in contents(path) if re.search("tokens|offsets|global_rows", name)]
        join_parts(paths, tmp_path / f"{count}" / "joined" / "tiny.zarr")
        assert contents(tmp_path / f"{count}" / "joined") == contents(tmp_path / "whole")
    extract_part(encoder, data, tmp_path / "2" / "1.zarr", 1, 2)
    both = [tmp_path / "2" / f"{n}.zarr" for n in (1, 2)]
    join_parts(both, tmp_path / "mixed" / "tiny.zarr")
    assert contents(tmp_path / "mixed") == contents(tmp_path / "whole")
    with pytest.raises(StoreError, match=r"2\.zarr: only global tokens, but all are wanted"):
        join(tmp_path / "all", both)


def join(folder, paths):
    join_parts(paths, folder / "activations" / "tiny.zarr", folder / "tokens" / "tiny.zarr")
    return stores_in(folder)


@pytest.mark.parametrize(
    ("make", "values"),
    [
        (models.bert, {}),
        (models.bert, {"max_tokens": 3}),
        (models.bert, {"global_token": "reference"}),
        (models.deberta_v2, {}),
        (models.deberta_v2, {"max_tokens": 2}),
        (models.siglip_text, {}),
        (models.clip_image, {}),
        (models.siglip_image, {"max_tokens": 4}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_both_stores_equal_those_of_a_single_extraction(make, values, spec_of, data_folder, tmp_path, small_shards):
    encoder, data = load_encoder(spec_of(make, **values)), Data(data_folder)
    for rows, samples, numbers in ((7, 3, (1, 5)), (40, 5, (2, 3))):
        small_shards(rows, samples, encoder.spec.width)
        whole = in_one_go(encoder, data, tmp_path / f"whole-{rows}")
        assert len(whole) > 20
        for count in numbers:
            assert in_parts(encoder, data, tmp_path / f"{rows}-{count}", count) == whole, (rows, count)


@pytest.mark.parametrize("parts", [12, 30])
def test_surplus_parts_are_empty(parts, spec_of, data_folder, tmp_path, small_shards):
    encoder, data = load_encoder(spec_of(models.bert)), Data(data_folder)
    small_shards(50, 9)
    assert in_parts(encoder, data, tmp_path / "parts", parts) == in_one_go(encoder, data, tmp_path / "whole")


def test_no_shard_is_in_two_parts_and_few_samples_are_read_twice(
    spec_of, data_folder, tmp_path, small_shards, monkeypatch
):
    encoder, data, read = load_encoder(spec_of(models.clip_image)), Data(data_folder), []
    small_shards(20, 4, encoder.spec.width)
    monkeypatch.setattr(Data, "image", lambda self, row, image=Data.image: read.append(row) or image(self, row))
    in_parts(encoder, data, tmp_path, 3)
    shards = [
        path.relative_to(part).as_posix() for part in (tmp_path / "parts").iterdir() for path in part.rglob("c/*/0")
    ]
    assert len(shards) == len(set(shards))
    # Each part reads the first image to get the number of tokens; a shard across a boundary is at most 4 samples.
    assert set(read) == set(range(SAMPLES))
    assert len(read) <= SAMPLES + 3 + 2 * (4 + BATCH)


def test_joined_stores_hard_link_or_copy_the_files_of_the_parts(spec_of, data_folder, tmp_path, monkeypatch):
    encoder, data = load_encoder(spec_of(models.bert)), Data(data_folder)
    linked = in_parts(encoder, data, tmp_path, 1)
    shard = "layer-00/tokens/c/0/0"
    part = tmp_path / "parts" / "tiny.1-of-1.zarr"
    assert (tmp_path / "tokens" / "tiny.zarr" / shard).samefile(part / shard)

    def refused(*_):
        raise OSError("no links here")

    monkeypatch.setattr(parts.Path, "hardlink_to", refused)
    assert join(tmp_path, [part]) == linked
    assert not (tmp_path / "tokens" / "tiny.zarr" / shard).samefile(part / shard)


def test_refuses_parts_of_another_extraction_or_missing_parts(spec_of, data_folder, tmp_path):
    data = Data(data_folder)
    for name, values in (("one", {}), ("other", {"context_length": 6})):
        encoder = load_encoder(spec_of(models.bert, **values))
        for n in (1, 2):
            extract_part(encoder, data, tmp_path / name / f"{n}.zarr", n, 2)
    for paths in (["one/1"], ["one/1", "one/1"], ["one/1", "other/2"]):
        with pytest.raises(StoreError, match=r"1\.zarr.*: not all parts of one extraction"):
            join(tmp_path, [tmp_path / f"{path}.zarr" for path in paths])
    assert stores_in(tmp_path) == {}
    assert join(tmp_path, [tmp_path / "one/2.zarr", tmp_path / "one/1.zarr"])


def test_refuses_images_with_different_numbers_of_tokens(data_folder, tmp_path):
    """SigLIP2 NaFlex reads each image at its own aspect ratio."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    Siglip2VisionModel(Siglip2VisionConfig(**sizes, patch_size=8, num_patches=16)).save_pretrained(tmp_path / "model")
    Siglip2ImageProcessor(patch_size=8, max_num_patches=16).save_pretrained(tmp_path / "model")
    encoder = load_encoder(models.entry(tmp_path / "model", "image", "mean", layers=3, width=16))
    with pytest.raises(StudyError, match=r"different numbers of tokens.*; set parts: 1"):
        extract_part(encoder, Data(data_folder), tmp_path / "parts" / "tiny.2-of-2.zarr", 2, 2)
    assert not (tmp_path / "parts").exists()
    extract_part(encoder, Data(data_folder), tmp_path / "tiny.2-of-2.zarr", 2, 2, tokens=False)


def test_refuses_prompts_with_different_numbers_of_tokens_before_the_forward_pass(data_folder, tmp_path, monkeypatch):
    decoders.decoder("Qwen2VL", tmp_path / "model")
    encoder = load_encoder(decoders.decoder_entry("Qwen2VL", tmp_path / "model", "image", batch_size=4))
    monkeypatch.setattr(type(encoder), "read", None)
    with pytest.raises(StudyError, match=r"different numbers of tokens.*; set parts: 1"):
        extract_part(encoder, Data(data_folder), tmp_path / "parts" / "tiny.1-of-2.zarr", 1, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--part", "3/2"], "--part 3/2: write PART/PARTS, such as 2/4"),
        (["--part", "0/2"], "--part 0/2: write PART/PARTS, such as 2/4"),
        (["--part", "2"], "--part 2: write PART/PARTS, such as 2/4"),
        (["--part", "1/2", "--tokens", "t.zarr"], "give either --tokens, for all samples, or --part, for some"),
        (["--tokens", "t.zarr", "--global-only"], "give either --tokens or --global-only"),
    ],
    ids=str,
)
def test_the_command_explains_how_to_specify_a_part(options, message):
    command = ["activations", "--encoder", "minilm", "--weights", "w.json", "--data", "data", "--out", "a.zarr"]
    result = CliRunner().invoke(app, [*command, *options])
    assert isinstance(result.exception, StudyError)
    assert message in str(result.exception)


def test_the_commands_write_the_stores_of_a_single_extraction(spec_of, data_folder, tmp_path):
    spec = spec_of(models.bert)
    fetch_weights(spec, tmp_path / "w.json")

    def command(*arguments):
        result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
        assert result.exit_code == 0, result.output

    extract = ["activations", "--encoder", spec.model_dump_json(exclude_none=True)]
    extract += ["--weights", tmp_path / "w.json", "--data", data_folder]
    whole, joined = ([tmp_path / name / kind / "tiny.zarr" for kind in ("activations", "tokens")] for name in "ab")
    command(*extract, "--out", whole[0], "--tokens", whole[1])
    for part in (1, 2):
        command(*extract, "--part", f"{part}/2", "--out", tmp_path / f"{part}.zarr")
    command("join", tmp_path / "1.zarr", tmp_path / "2.zarr", "--out", joined[0], "--tokens", joined[1])
    assert stores_in(tmp_path / "a") == stores_in(tmp_path / "b")


EXTRACT = """
import os, signal, sys
from pathlib import Path
import torch
import zarr.storage._local as local
from conceptshare.activations import extraction
from conceptshare.io import sizes, store
from conceptshare.activations.parts import extract_part
from conceptshare.config.catalog import EncoderSpec
from conceptshare.data.dataset import Data
from conceptshare.encoders import load_encoder

torch.set_num_threads(1)
store.CHUNK_BYTES, sizes.SHARD_BYTES, extraction.GLOBAL_SHARD_BYTES = 32, 7 * 32, 3 * 32
encoder, data = load_encoder(EncoderSpec.model_validate_json(sys.argv[1])), Data(Path(sys.argv[2]))
last, writes, put = int(sys.argv[4]), 0, local._put

def counted(*arguments, **options):
    global writes
    writes += 1
    if writes == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return put(*arguments, **options)

local._put = counted
extract_part(encoder, data, Path(sys.argv[3]), 2, 3)
print(writes)
"""


def test_a_killed_part_resumes_at_its_last_finished_shard(spec_of, data_folder, tmp_path, small_shards):
    spec = spec_of(models.bert)

    def run(last=0):
        return run_forked(EXTRACT, spec.model_dump_json(), data_folder, tmp_path / "parts" / "tiny.2-of-3.zarr", last)

    small_shards(7, 3)
    encoder, data = load_encoder(spec), Data(data_folder)
    whole = in_one_go(encoder, data, tmp_path / "whole")
    writes = int(run().stdout)
    shutil.rmtree(tmp_path / "parts")
    for moment in (0.4, 0.5):
        killed = run(round(moment * writes))
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    finished = run()
    assert finished.returncode == 0, finished.stderr
    (start,) = re.findall(r"resuming at sample (\d+)", finished.stderr)
    assert int(start) > SAMPLES // 3
    paths = [tmp_path / "parts" / f"tiny.{n}-of-3.zarr" for n in (1, 2, 3)]
    for n in (1, 3):
        extract_part(encoder, data, paths[n - 1], n, 3)
    assert join(tmp_path, paths) == whole
