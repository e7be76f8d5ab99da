"""A disk that fills while a stage writes: one clear message, and nothing that looks finished."""

import io
import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from conceptshare.catalog import DatasetSpec
from conceptshare.dataset import make_dataset
from conceptshare.sae import train_sae
from conceptshare.study import SAESettings
from tests import models

WIDTH, SAMPLES = 64, 600

# A private file system in memory, mounted in a name space that ends with the command.
MOUNT = 'mount -t tmpfs -o size=$1 full $2 && shift 2 && exec "$@"'


def on_a_disk_of(size, folder, command):
    inside = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", MOUNT, "sh", size, str(folder), *command]
    return subprocess.run(inside, capture_output=True, text=True, check=False)


@pytest.fixture
def disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    if on_a_disk_of("64k", folder, ["true"]).returncode:
        pytest.skip("this machine lets nobody mount a file system")
    return folder


def conceptshare(disk, size, *arguments):
    """Run a stage on a small disk, and list what it leaves there."""
    command = [sys.executable, "-m", "conceptshare", *map(str, arguments)]
    listed = ["sh", "-c", '"$@"; status=$?; ls "$0"; exit $status', str(disk), *command]
    result = on_a_disk_of(size, disk, listed)
    assert result.returncode == 1, result.stderr
    assert result.stderr.splitlines()[-1] == (
        "error: the disk is full; make room and run again, which goes on from what is there"
    )
    assert "Traceback" not in result.stderr
    return result.stdout.split()


@pytest.fixture
def layers():
    rng = np.random.default_rng(0)
    return {layer: list(rng.standard_normal((SAMPLES, 2, WIDTH)).astype(np.float16)) for layer in range(2)}


@pytest.fixture
def tokens(tmp_path, write_tokens, layers):
    return write_tokens(tmp_path / "tokens" / "vit.zarr", layers)


SETTINGS = json.dumps({"expansion": 16, "k": 4})


@pytest.mark.parametrize("size", ["4k", "400k"])  # nothing fits, or the weights do not
def test_an_sae(disk, tokens, size):
    options = ["--tokens", tokens, "--layer", "0", "--settings", SETTINGS, "--out", disk / "saes" / "seed-0"]
    assert "seed-0" not in conceptshare(disk, size, "sae", "train", *options)


def test_the_checkpoints_before_it_stay(disk, tokens, tmp_path):
    """The second state does not fit: the first is left, whole, and nothing that looks finished."""
    code = (
        "from conceptshare import cli; from conceptshare.sae import _train;"
        "_train._SECONDS_BETWEEN_CHECKPOINTS = 0; cli.main()"
    )
    settings = json.dumps({"expansion": 4, "k": 4})
    state = 3 * 4 * 2 * WIDTH * 4 * WIDTH  # weights and both moments
    options = ["--tokens", tokens, "--layer", "0", "--settings", settings, "--out", disk / "seed-0"]
    command = [sys.executable, "-c", code, "sae", "train", *map(str, options)]
    listed = ["sh", "-c", '"$@"; status=$?; cd "$0"; find . -type f; exit $status', str(disk), *command]
    result = on_a_disk_of(str(round(1.5 * state)), disk, listed)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: the disk is full")
    files = sorted(result.stdout.split())
    assert len(files) == 2
    assert files[0].startswith("./seed-0.checkpoints/000000001/vit-layer-0-seed-0-")
    assert files[1] == "./seed-0.checkpoints/of.json"


def test_features(disk, tokens, write_activations, layers, tmp_path):
    for layer in range(2):
        out = tmp_path / "saes" / f"layer-{layer:02d}" / "seed-0"
        train_sae(tokens, layer, SAESettings(expansion=8, k=4), 0, out)
    activations = write_activations(tmp_path / "activations" / "vit.zarr", layers)
    options = ["--activations", activations, "--saes", tmp_path / "saes", "--out", disk / "vit@0.zarr"]
    assert conceptshare(disk, "100k", "features", *options) == []


def test_correlations(disk, tmp_path, write_features):
    rng = np.random.default_rng(0)
    one, other = (write_features(tmp_path, f"{name}@0", {0: rng.random((20, 4096))}) for name in ("a", "b"))
    assert conceptshare(disk, "16k", "correlations", one, other, "--out", disk / "a@0__b@0.zarr") == [
        "a@0__b@0.zarr.partial"  # which the next attempt goes on from
    ]


@pytest.fixture
def table(tmp_path):
    cells = []
    for pixels in np.random.default_rng(0).integers(0, 256, (60, 24, 32, 3), dtype=np.uint8):
        png = io.BytesIO()
        Image.fromarray(pixels).save(png, "png")
        cells.append(png.getvalue())
    pq.write_table(pa.table({"image": cells, "caption": ["a dog"] * 60}), tmp_path / "rows.parquet")
    return DatasetSpec(source=str(tmp_path / "rows.parquet"))


@pytest.mark.parametrize("size", ["4k", "100k", "200k"])  # neither, half of the samples as read, or as shuffled
def test_a_data_set(disk, table, size):
    spec = table.model_dump_json(exclude_none=True)
    assert conceptshare(disk, size, "dataset", "--dataset", spec, "--out", disk / "data") == []


@pytest.mark.parametrize("stage", ["activations", "stream"])
def test_what_an_encoder_reads(disk, table, tmp_path, stage):
    make_dataset(table, tmp_path / "data")
    spec = models.vit(tmp_path / "model").spec.model_dump_json(exclude_none=True)
    run = [sys.executable, "-m", "conceptshare", "weights", "--encoder", spec, "--out", str(tmp_path / "w.json")]
    subprocess.run(run, check=True)
    options = ["--encoder", spec, "--weights", tmp_path / "w.json", "--data", tmp_path / "data"]
    if stage == "activations":
        left = conceptshare(disk, "24k", stage, *options, "--out", disk / "vit.zarr", "--tokens", disk / "all.zarr")
        assert left == ["all.zarr.partial", "vit.zarr.partial"]
    else:
        settings = ["--settings", json.dumps({"expansion": 4, "k": 2})]
        places = ["--saes", disk / "vit", "--activations", disk / "vit.zarr"]
        assert "vit" not in conceptshare(disk, "24k", stage, *options, *settings, *places)
