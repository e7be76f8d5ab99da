"""Small inputs shared by the tests of several stages. No test uses the network."""

import json
import os
import shutil
import subprocess
from contextlib import contextmanager
from functools import partial
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
# Also for processes that tests start: several test processes share the machine.
os.environ["OMP_NUM_THREADS"] = "1"
# Without bytecode, each process would compile the library again.
os.environ["PYTHONDONTWRITEBYTECODE"] = ""

import numpy as np
import pytest
import torch
from hypothesis import settings

from conceptshare.io.layout import layer_name
from conceptshare.io.store import RowWriter, new_store, save_array
from conceptshare.sae import SAE, TopK, save_sae
from conceptshare.sae.features import record_features
from tests.helpers.browser import browser, open_tab  # noqa: F401 - fixtures
from tests.helpers.forks import forked_python

# The same examples on every run, so failures are reproducible on any machine.
settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("repeatable")

# Tests write tens of thousands of small files, which takes less time in memory.
MEMORY = Path("/dev/shm")
if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 4e9 and not os.statvfs(MEMORY).f_flag & os.ST_NOEXEC:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))

# Folders whose tests share expensive fixtures: a Slurm, the miniature study's run, a browser.
SAME_PROCESS = ("slurm", "workflow", "pages")
# The longest tests start first. The tests on Slurm mostly wait for it.
FIRST = ("slurm", "workflow", "test_figures", "test_correlations", "test_stream", "test_encoders", "test_broken", "hub")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(specs):
    """Fork the test processes too, so that slow imports are done once."""
    for spec in specs:
        spec.python = str(forked_python())


@pytest.hookimpl(tryfirst=True)  # before xdist reads the markers
def pytest_collection_modifyitems(items):
    """Run the tests of a file or folder in one process, so their fixtures are made once."""
    places = {}
    for item in items:
        group = item.get_closest_marker("xdist_group")
        if group is None:
            folder = item.path.relative_to(Path(__file__).parent).parts[0]
            group = pytest.mark.xdist_group(folder if folder in SAME_PROCESS else item.path.stem)
            item.add_marker(group)
        (name,) = group.args
        places[item] = FIRST.index(name) if name in FIRST else len(FIRST)
    items.sort(key=places.get)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no GPU")


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_device(monkeypatch):
    """Commands choose the device of their process by this variable; those that run in a test do for it alone."""
    monkeypatch.setitem(os.environ, "CONCEPTSHARE_DEVICE", os.getenv("CONCEPTSHARE_DEVICE", ""))
    if not os.environ["CONCEPTSHARE_DEVICE"]:
        del os.environ["CONCEPTSHARE_DEVICE"]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@contextmanager
def _store_of(path, kind, layers, content_hash, modality):
    """An empty store and a function that adds rows to it."""
    samples = next(iter(layers.values()))
    spec = {
        "name": path.stem,
        "encoder": {"model": "made up", "modality": modality},
        "content_hash": content_hash,
        "samples": len(samples),
        "batch_size": 8,
        "layers": list(layers),
        "width": samples[0].shape[1],
    }
    with new_store(path, kind, spec) as store:

        def add(layer, name, rows):
            group = store.create_group(layer_name(layer))
            writer = RowWriter(group, name, rows.shape[1], np.float16, shard_bytes=2**20)
            writer.append(rows.astype(np.float16))
            writer.flush()

        yield store, add


@pytest.fixture(scope="session")
def write_activations():
    """Writes a store of global tokens from ``{layer: [tokens of each sample]}``; the first token is global."""

    def write(path, layers, content_hash="the same samples", modality="image"):
        with _store_of(path, "activations", layers, content_hash, modality) as (_, add):
            for layer, tokens in layers.items():
                add(layer, "global", np.stack([sample[0] for sample in tokens]))
        return path

    return write


@pytest.fixture(scope="session")
def write_tokens():
    """Writes a store of all tokens from ``{layer: [tokens of each sample]}``; the first token is global."""

    def write(path, layers, content_hash="the same samples", modality="image"):
        with _store_of(path, "tokens", layers, content_hash, modality) as (store, add):
            for layer, tokens in layers.items():
                add(layer, "tokens", np.concatenate(tokens))
            counts = [len(sample) for sample in next(iter(layers.values()))]
            offsets = np.cumsum([0, *counts]).astype(np.int64)
            save_array(store, "offsets", offsets)
            save_array(store, "global_rows", offsets[:-1])
        return path

    return write


@pytest.fixture(scope="session")
def write_features_from(write_activations):
    """Writes ``{member}.zarr`` in a folder with the given non-negative features, ``{layer: [N, F]}``.

    They go through the real stage: SAEs whose encoders are the identity turn activations into equal features. Both are
    written to ``source / member``.
    """

    def write(source, folder, member, layers, content_hash="the same samples", keep=True, modality="image"):
        made = source / member
        encoder, _, seed = member.rpartition("@")
        store = made / f"{encoder}.zarr"
        write_activations(store, {n: list(x[:, None, :]) for n, x in layers.items()}, content_hash, modality)
        for layer, x in layers.items():
            width = x.shape[1]
            sae = SAE(width, width, TopK(1))
            with torch.no_grad():
                sae.W_enc_T.copy_(torch.eye(width))
                sae.W_dec.copy_(torch.eye(width))
            saes = made / layer_name(layer) / f"seed-{seed}"
            saes.mkdir(parents=True)
            metrics = {
                "steps": 10 * layer,
                "outlying": 0.125,
                "measured_on": "held-out samples",
                "all_tokens": {"tokens": 9, "fvu": 0.1 * layer, "l0": 4.5, "dead": 0.25},
                "global_tokens": {"tokens": 3, "fvu": 0.2 * layer, "l0": 3.5, "dead": 0.75},
                "settings": {},
            }
            (saes / "metrics.json").write_text(json.dumps(metrics))
            save_sae(sae, saes, encoder, f"layer {layer}", {"layer": layer, "seed": int(seed)})
        record_features(store, made, int(seed), folder / f"{member}.zarr", keep)
        return folder / f"{member}.zarr"

    return write


@pytest.fixture
def write_features(tmp_path, write_features_from):
    """The same, with activations and SAEs in ``tmp_path / "made"``."""
    return partial(write_features_from, tmp_path / "made")


@pytest.fixture(scope="session")
def own_disks(tmp_path_factory):
    """Skip if a test cannot mount disks in a private namespace."""
    folder = tmp_path_factory.mktemp("disk")
    command = ["unshare", "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "disk", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount a file system")
