"""Encoders whose layers differ in width: each is a grid of tokens, and its mean is the global token."""

import numpy as np
import pandas as pd
import pytest
import timm
import torch

from conceptshare.activations.extraction import TokenReader, extract_activations
from conceptshare.concepts.examples import _grid, record_examples
from conceptshare.config.catalog import DatasetSpec, EncoderSpec
from conceptshare.config.settings import SAESettings
from conceptshare.data.dataset import Data, make_dataset
from conceptshare.encoders import load_encoder
from conceptshare.io.errors import EncoderError
from conceptshare.io.store import open_store
from conceptshare.sae import load_sae, train_sae
from conceptshare.sae.features import read_features, record_features
from tests.helpers import models
from tests.helpers.models import close
from tests.helpers.samples import write_rows

# Each model of timm with its settings, the paths of its layers, and their widths.
SMALL = {"img_size": 64, "embed_dim": 8, "num_heads": (1, 2, 2)}
KINDS = {
    "swin": ("swin_tiny_patch4_window7_224", SMALL | {"depths": (1, 1, 2), "window_size": 4}, "layers", [8, 16, 32]),
    "convnext": ("test_convnext", {}, "stages", [24, 32, 48, 64]),
    "resnet": ("test_resnet", {}, [f"layer{n}" for n in (1, 2, 3, 4)], [32, 48, 192, 96]),
    "hiera": (
        "hiera_tiny_224",
        {"img_size": 64, "embed_dim": 8, "num_heads": 1, "stages": (1, 2, 2, 1)},
        None,
        [8, 16, 16, 32, 32, 64],
    ),
}


def hierarchy(kind, folder, **more):
    """Write a model into ``folder``; return it and its entry."""
    name, settings, blocks, widths = KINDS[kind]
    model = models.save_timm(folder, name, **settings)
    values = {"library": "timm", "kind": "vision", "layers": len(widths), "width": widths, "blocks": blocks}
    values |= {"image_size": 64}
    return model, models.entry(folder, "image", "mean", **values | {"batch_size": 2} | more)


def change(spec, **values):
    return EncoderSpec(**{**spec.model_dump(), **values})


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_has_the_librarys_grid_and_its_mean(tmp_path, kind):
    model, spec = hierarchy(kind, tmp_path)
    images = models.noise_images()
    transform = timm.data.create_transform(**timm.data.resolve_data_config({"input_size": (3, 64, 64)}, model=model))
    with torch.no_grad():
        pixels = torch.stack([transform(image) for image in images])
        how = {"coarse": False} if kind == "hiera" else {}
        grids = model.forward_intermediates(pixels, intermediates_only=True, **how)[-spec.layers :]
    found = load_encoder(spec).activations(images)
    largest = load_encoder(change(spec, global_token="max")).activations(images)
    assert len({grid.shape[1:] for grid in grids}) > 2
    for layer, grid in enumerate(grids):
        own = grid.flatten(2).transpose(1, 2)
        assert found.tokens[layer].shape == own.shape
        if kind != "hiera":  # whose blocks return the positions in another order
            assert close(found.tokens[layer], own)
        assert close(found.global_token[layer].double(), own.double().mean(1))
        assert close(largest.global_token[layer], own.amax(1))


@pytest.mark.parametrize("kind", ["ConvNext", "Swin", "ResNet", "Hiera"])
def test_reads_the_stages_of_transformers(tmp_path, kind):
    """Their widths are those that the error names."""
    spec = models.staged(kind, tmp_path)
    spec = change(spec, blocks="encoder.stages" if kind != "Swin" else "encoder.layers", layers=4)
    with pytest.raises(EncoderError, match=r"not one residual stream; .* global_token: mean, width: \[") as caught:
        load_encoder(spec)
    widths = [int(width) for width in str(caught.value).rpartition("[")[2].rstrip("]").split(", ")]
    found = load_encoder(change(spec, width=widths)).activations(models.noise_images())
    assert [x.shape[1] for x in found.global_token.values()] == widths
    tokens = [x.shape[1] for x in found.tokens.values()]
    assert tokens == sorted(tokens, reverse=True)
    assert tokens[0] > tokens[-1]


def test_names_all_widths_if_one_is_wrong(tmp_path):
    _, spec = hierarchy("swin", tmp_path)
    with pytest.raises(EncoderError, match=r"other widths than its entry; set width: \[8, 16, 32\]$"):
        load_encoder(change(spec, width=[8, 16, 16]))
    with pytest.raises(EncoderError, match=r"other widths than its entry; set width: \[7, 16, 32\]$"):
        load_encoder(change(spec, width=[7, 16, 16], use_layers=[1, 2]))


def test_lists_the_parts_of_a_model_if_a_block_is_missing(tmp_path):
    _, spec = hierarchy("resnet", tmp_path)
    blocks = ["layer1", "layer2", "layer3"]
    with pytest.raises(EncoderError, match=r"no module at blocks: layer5; its parts are: conv1, .*layer4"):
        load_encoder(change(spec, blocks=[*blocks, "layer5"]))
    with pytest.raises(EncoderError, match="blocks has 3 paths, but its entry has layers: 4; set layers: 3"):
        load_encoder(change(spec, blocks=blocks))


def test_layers_of_several_widths_have_saes_with_one_number_of_features(tmp_path):
    write_rows(tmp_path / "rows.parquet", 9, models.WORDS)
    make_dataset(DatasetSpec(source=str(tmp_path / "rows.parquet")), tmp_path / "data")
    data = Data(tmp_path / "data")
    _, spec = hierarchy("convnext", tmp_path / "model")
    encoder, store = load_encoder(spec), tmp_path / "activations.zarr"
    extract_activations(encoder, data, store)
    own = encoder.activations([data.image(n) for n in range(len(data))])
    for layer, width in enumerate(spec.width):
        stored = TokenReader.open_global(store, layer)
        assert stored.width == width
        assert np.allclose(stored.read(np.arange(9)), own.global_token[layer].half(), rtol=2e-3, atol=1e-3)
        saes = tmp_path / "saes" / f"layer-{layer:02d}" / "seed-0"
        train_sae(store, layer, SAESettings(preset="global", features=20, k=4, epochs=1), 0, saes)
    record_features(store, tmp_path / "saes", 0, tmp_path / "features.zarr", True)
    assert {x.shape for x in read_features(tmp_path / "features.zarr").values()} == {(9, 20)}
    assert open_store(store, "activations").attrs["spec"]["width"] == spec.width
    record_examples(encoder, data, tmp_path / "features.zarr", tmp_path / "saes", tmp_path / "examples")
    assert {box.tolist() == [0, 0, 1, 1] for box in pd.read_parquet(tmp_path / "examples/samples.parquet").box}
    for layer in range(4):
        sae = load_sae(tmp_path / "saes" / f"layer-{layer:02d}" / "seed-0")
        with torch.no_grad():
            latents = sae.encode(own.tokens[layer].half().float().flatten(0, 1)).unflatten(0, (9, -1)).numpy()
        for row in pd.read_parquet(tmp_path / f"examples/layer-{layer:02d}.parquet").itertuples():
            for one in row.top:
                shares = np.frombuffer(one["fires"], np.uint8) / 255
                assert len(shares) == (16, 8, 4, 2)[layer] ** 2
                expected = latents[one["sample"], :, row.feature]
                np.testing.assert_allclose(shares * one["fires_highest"], expected, atol=expected.max() / 250 + 1e-4)


def test_no_place_in_an_image_is_named_for_tokens_in_another_order(tmp_path):
    """Blocks of Hiera return the positions of a window one after the other."""
    _, spec = hierarchy("hiera", tmp_path)
    encoder = load_encoder(spec)
    batch = encoder.prepare(models.noise_images(1))
    activations = encoder.read(batch)
    assert activations.tokens[0].shape[1] == 16**2
    assert not len(_grid(batch, activations, 0))
