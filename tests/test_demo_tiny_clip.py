"""The committed tiny-clip, loaded by open_clip from its folder."""

import importlib.util
from pathlib import Path

import pytest
import torch

from conceptshare.config.catalog import EncoderSpec, complete, parse, read_catalog
from conceptshare.encoders import load_encoder

DEMO = Path(__file__).parents[1] / "demo"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_tiny_clip", DEMO / "train_tiny_clip.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def held_out(script):
    settings = script.Settings()
    _, held_out = script.split(script.load_pairs(DEMO / "openclipart.parquet"), settings.held_out, settings.seed)
    return held_out


def test_retrieval_of_held_out_pairs_is_ten_times_chance(script, held_out):
    found = script.evaluate(DEMO / "tiny-clip", held_out)
    for direction in ("image to text", "text to image"):
        assert found[f"{direction} R@5"] >= 10 * 5 / len(held_out.ids)


def test_the_catalog_describes_both_towers(held_out, monkeypatch):
    monkeypatch.chdir(DEMO.parent)
    entries = read_catalog("encoders")
    for name, samples in (("tiny-clip-image", held_out.images[:2]), ("tiny-clip-text", held_out.captions[:2])):
        spec = parse(EncoderSpec, complete(name, None, entries, "encoders"), name)
        found = load_encoder(spec).activations(samples)
        assert torch.isfinite(found.global_token[spec.layers - 1]).all()
