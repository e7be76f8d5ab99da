"""Examples of features: where they activate, against the tokens that the `activations` stage stores, and NumPy."""

import io
from itertools import cycle, islice

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from conceptshare.activations.extraction import extract_activations
from conceptshare.concepts import examples
from conceptshare.concepts.examples import Frame, ranks_near, record_examples, spreads, with_blanks
from conceptshare.config.catalog import DatasetSpec
from conceptshare.data.dataset import Data, make_dataset
from conceptshare.encoders import load_encoder
from conceptshare.io.errors import StoreError
from conceptshare.io.layout import layer_name
from conceptshare.io.store import open_store
from conceptshare.sae import SAE, TopK, save_sae
from conceptshare.sae.features import record_features
from tests.helpers import models
from tests.helpers.samples import contents

SAMPLES, F, SEED = 60, 24, 3


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    cells = []
    for image in islice(cycle(models.noise_images(5)), SAMPLES):
        noise = np.random.default_rng(len(cells)).integers(0, 60, (*image.size[::-1], 3), np.uint8)
        png = io.BytesIO()
        Image.fromarray(np.asarray(image) // 2 + noise).save(png, "png")
        cells.append(png.getvalue())
    captions = [" ".join(np.random.default_rng(n).choice(models.WORDS, 1 + n % 7)) for n in range(SAMPLES)]
    pq.write_table(pa.table({"image": cells, "caption": captions}), folder / "rows.parquet")
    make_dataset(DatasetSpec(source=str(folder / "rows.parquet")), folder / "made")
    return Data(folder / "made")


class Stage:
    """An encoder, its stores, its SAEs with random weights, and its examples."""

    def __init__(self, make, data, folder, **values):
        spec = make(folder / "model").spec
        self.spec = spec.model_copy(update={"batch_size": 7, "use_layers": [0, 2], **values})
        self.encoder, self.data, self.folder = load_encoder(self.spec), data, folder
        extract_activations(self.encoder, data, folder / "a.zarr", folder / "tokens.zarr")
        self.saes = {}
        self.layers = self.spec.layer_numbers()
        for layer in self.layers:
            generator = torch.Generator().manual_seed(layer)
            self.saes[layer] = SAE(spec.width, F, TopK(4), generator)
            with torch.no_grad():
                self.saes[layer].b_dec.copy_(torch.randn(spec.width, generator=generator) / 10)
                self.saes[layer].W_enc_T[5] = 0  # a feature that never activates
            place = folder / "saes" / layer_name(layer) / f"seed-{SEED}"
            place.mkdir(parents=True)
            save_sae(self.saes[layer], place, "a", f"layer {layer}")
        record_features(folder / "a.zarr", folder / "saes", SEED, folder / "a@3.zarr")
        self.record("a@3")

    def record(self, name, **more):
        stage = {"features": self.folder / "a@3.zarr", "saes": self.folder / "saes", **more}
        record_examples(self.encoder, self.data, out=self.folder / name, **stage)

    def rows(self, layer):
        return pd.read_parquet(self.folder / "a@3" / f"{layer_name(layer)}.parquet").to_dict("records")

    @property
    def messages(self):
        rows = pd.read_parquet(self.folder / "a@3" / "samples.parquet").to_dict("records")
        return {row.pop("sample"): row for row in rows}

    def fires(self, layer, sample, feature):
        """Computed from the stored tokens, in float64."""
        store, sae = open_store(self.folder / "tokens.zarr", "tokens"), self.saes[layer]
        first, last = store["offsets"][sample : sample + 2]
        x = store[layer_name(layer)]["tokens"][first:last].astype(np.float64)
        weights, bias = sae.W_enc_T[feature].detach().double().numpy(), sae.b_dec.detach().double().numpy()
        places = x[:-1] if self.spec.global_token == "mean" else x  # the last token, which has no position in the image
        return np.maximum((places - bias) @ weights, 0)


@pytest.fixture(scope="module")
def stage_of(data, tmp_path_factory):
    made = {}

    def get(make, **values):
        key = make.__name__, *values.items()
        if key not in made:
            made[key] = Stage(make, data, tmp_path_factory.mktemp(make.__name__), **values)
        return made[key]

    return get


# Encoders of every library, and how many of an image's tokens precede its grid.
IMAGES = [
    (models.vit, 1, {}),
    (models.dinov2, 1, {}),
    (models.siglip_image, 0, {}),
    (models.open_clip_image, 1, {}),
    (models.timm_vit, 1, {}),
    (models.mambavision, 0, {"use_layers": "last"}),
]
TEXTS = [(models.bert, {}), (models.deberta_v2, {}), (models.clip_text, {}), (models.open_clip_text, {})]


@pytest.mark.parametrize(("make", "before", "values"), IMAGES, ids=lambda value: getattr(value, "__name__", ""))
def test_images_activate_where_their_stored_tokens_do(make, before, values, stage_of):
    stage = stage_of(make, **values)
    stored = open_store(stage.folder / "a@3.zarr", "features")
    for layer in stage.layers:
        group, messages = stored[layer_name(layer)], stage.messages
        for feature, row in enumerate(stage.rows(layer)):
            samples, values_ = group["top_samples"][feature, :9], group["top_values"][feature, :9]
            assert [one["sample"] for one in row["top"]] == list(samples[samples >= 0])
            assert [one["value"] for one in row["top"]] == list(values_[samples >= 0])
            for one in row["top"]:
                assert one["sample"] in messages
                fires = stage.fires(layer, one["sample"], feature)[before:]
                assert len(one["fires"]) == len(fires)
                assert one["fires_highest"] == pytest.approx(fires.max(), rel=1e-3, abs=1e-4)
                shares = np.frombuffer(one["fires"], np.uint8) / 255
                np.testing.assert_allclose(shares * one["fires_highest"], fires, atol=fires.max() / 250 + 1e-4)


@pytest.mark.parametrize(("make", "values"), TEXTS, ids=lambda value: getattr(value, "__name__", ""))
def test_captions_activate_at_the_tokenizers_pieces(make, values, stage_of):
    stage = stage_of(make, **values)
    for layer in stage.layers:
        messages = stage.messages
        for feature, row in enumerate(stage.rows(layer)):
            for one in row["top"]:
                pieces, fires = list(messages[one["sample"]]["tokens"]), stage.fires(layer, one["sample"], feature)
                assert len(pieces) == len(fires)
                shares = np.frombuffer(one["fires"], np.uint8) / 255
                np.testing.assert_allclose(shares * one["fires_highest"], fires, atol=fires.max() / 250 + 1e-4)
    for sample, found in stage.messages.items():
        shown_text = "".join(piece for piece in found["tokens"] if not piece.strip().startswith(("[", "<")))
        assert shown_text
        assert stage.data.caption(sample).startswith(shown_text.strip())  # some have a short context


@pytest.mark.parametrize(
    ("pieces", "expected_text"),
    [
        (["[CLS]", "north", "ame", "##rica", ".", "[SEP]"], ["[CLS]", " north", " ame", "rica", " .", " [SEP]"]),
        (["▁north", "▁ame", "rica", ".", "</s>"], ["north", " ame", "rica", ".", " </s>"]),
        (["▁", "north", "▁", "ame", "rica", "▁", ".", "</s>"], ["", "north", " ", "ame", "rica", " ", ".", " </s>"]),
        (["<s>", "Ġ", "north", "Ġ", "ĠĠ", "ame"], ["<s>", " ", "north", " ", " ", "ame"]),
        (["a", " ", "c", "a", "t"], ["a", " ", "c", "a", "t"]),
        (["▁a▁big", "▁cat"], ["a big", " cat"]),
        (["▁C##", "▁a"], ["C##", " a"]),
        (["<s>", "north", "Ġame", "rica", "</s>"], ["<s>", " north", " ame", "rica", " </s>"]),
        (
            ["<start_of_text>", "north</w>", "ame", "rica</w>", "!</w>", ""],
            ["<start_of_text>", " north", " ame", "rica", " !", ""],
        ),
        (["<s>", "caf", "Ã", "©", "Ġçº¢", "</s>"], ["<s>", " caf", "", "é", " 红", " </s>"]),
        (["caf", "Ã©</w>", "naÃ¯", "ve</w>"], ["caf", "é", " naï", "ve"]),
        (["naïve</w>", "é</w>"], ["naïve", " é"]),  # literal characters
        (["n", "\N{REPLACEMENT CHARACTER}"], ["n", " \N{REPLACEMENT CHARACTER}"]),
    ],
)
def test_joins_the_pieces_of_a_word(pieces, expected_text):
    assert with_blanks(pieces) == expected_text


@pytest.mark.parametrize(
    ("pieces", "of_another", "expected_text"),
    [
        (["un", "bel", "ief"], ["a", "Ġb"], ["un", "bel", "ief"]),
        (["<s>", "un", "bel", "</s>"], ["▁a", "▁b"], ["<s>", " un", "bel", " </s>"]),
        (["çĮ", "«"], ["a", "Ġb"], ["", "猫"]),
        (["un", "##bel"], ["a", "b"], ["un", "bel"]),
    ],
)
def test_joins_a_one_word_caption_by_its_tokenizers_markers(pieces, of_another, expected_text):
    assert with_blanks(pieces, of_another) == expected_text


def test_a_batch_has_the_products_of_its_samples():
    sae, x = SAE(8, F, TopK(4), torch.Generator().manual_seed(0)), torch.randn(3, 5, 8)
    shown = torch.tensor([[1, 2, 3], [2, -1, -1], [0, 4, -1]])
    entries = np.array([(0, 7, 0), (0, 9, 3), (1, 7, 1), (2, 2, 0), (2, 7, 2)])
    found = examples._encode(sae, x, shown, entries)
    for (row, latent, _), values in zip(entries, found, strict=True):
        tokens = x[row, shown[row][shown[row] >= 0]].half().double() - sae.b_dec.detach()
        expected = (tokens @ sae.W_enc_T[latent].detach().double()).clamp(min=0).numpy()
        np.testing.assert_allclose(values[: len(expected)], expected, rtol=1e-5, atol=1e-6)
        assert (values[len(expected) :] == -1).all()


def test_a_feature_that_is_never_active_has_no_samples(stage_of):
    row = stage_of(models.vit).rows(2)[5]
    assert len(row["top"]) == 0
    assert all(len(near["samples"]) == 0 for near in row["near"])
    assert list(row["histogram"]) == [0] * 20
    assert row["highest"] == 0


def test_weaker_samples_and_histograms_equal_numpys(rng, monkeypatch):
    x = np.maximum(rng.standard_normal((400, 30)) - rng.uniform(-1, 3, 30), 0).astype(np.float16)
    for block in (1, 2**28):
        monkeypatch.setattr(examples, "_BLOCK_BYTES", block)
        for column, row in zip(x.T, spreads(x), strict=True):
            order = np.argsort(-column.astype(np.float64), kind="stable")[: (column > 0).sum()]
            top, taken = set(order[:9]), set()
            for near, q in zip(row["near"], (0.9, 0.5, 0.1), strict=True):
                assert near["quantile"] == q
                assert list(column[near["samples"]]) == list(near["values"])
                assert not {*near["samples"]} & (top | taken)
                assert near["samples"].flags.owndata  # views would keep all samples' values in memory
                assert near["values"].flags.owndata
                taken |= {*near["samples"]}
                if len(order) > 100:
                    low, high = np.quantile(column[order], [max(q - 0.1, 0), min(q + 0.1, 1)])
                    assert len(near["samples"]) == 4
                    assert all(low <= value <= high for value in near["values"])
            assert row["histogram"].sum() == len(order)
            if len(order):
                np.testing.assert_array_equal(
                    row["histogram"], np.histogram(column[order].astype(np.float32), 20, (0, float(column.max())))[0]
                )


@pytest.mark.parametrize("active", [*range(31), 1000])
def test_no_sample_is_shown_twice(active):
    ranks = [rank for near in ranks_near(active) for rank in range(active)[near]]
    assert len(ranks) == len(set(ranks))
    assert all(9 <= rank < active for rank in ranks)
    assert len(ranks) == min(max(active - 9, 0), 12)


def crop_of(width, height):
    """The box of a centre crop of 7/8 of the shorter side, as fractions of the image."""
    side = min(width, height)
    x, y = 0.875 * side / width / 2, 0.875 * side / height / 2
    return [0.5 - x, 0.5 - y, 0.5 + x, 0.5 + y]


def padded(width, height):
    side = max(width, height)
    x, y = side / width / 2, side / height / 2
    return [0.5 - x, 0.5 - y, 0.5 + x, 0.5 + y]


class Seeing:
    """An encoder with its own image preprocessing."""

    def __init__(self, way):
        self.way = way

    def prepare(self, pictures):
        seen = np.stack(
            [np.asarray(self.way(picture).resize((56, 56), Image.Resampling.BICUBIC)) for picture in pictures]
        )
        pixels = torch.from_numpy(seen).permute(0, 3, 1, 2).float() / 255
        return models_batch((pixels - torch.tensor([0.4, 0.5, 0.6])[:, None, None]) / 0.25)


def models_batch(pixels):
    from conceptshare.encoders import Batch

    return Batch({"pixel_values": pixels}, mask=None)


def cut(picture):
    width, height = picture.size
    return picture.crop(
        [round(share * side) for share, side in zip(crop_of(*picture.size), (width, height) * 2, strict=True)]
    )


def pad(picture):
    side = max(picture.size)
    canvas = Image.new("RGB", (side, side), (124, 116, 104))
    canvas.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return canvas


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (300, 300), (1200, 400), (90, 240)])
@pytest.mark.parametrize(
    ("way", "expected"), [(cut, crop_of), (pad, padded), (lambda picture: picture, lambda *_: [0, 0, 1, 1])]
)
def test_finds_the_part_of_an_image_that_an_encoder_sees(way, expected, size):
    found = Frame(Seeing(way)).box(size)
    np.testing.assert_allclose(found, expected(*size), atol=0.04)


def test_finds_no_such_part_if_an_image_is_not_only_cropped_and_resized():
    assert Frame(Seeing(lambda picture: Image.new("RGB", picture.size, "red"))).box((64, 48)) is None


def test_results_do_not_depend_on_the_run_or_batch_size(stage_of):
    stage = stage_of(models.bert)
    stage.record("again")
    assert contents(stage.folder / "again") == contents(stage.folder / "a@3")


def test_refuses_features_of_other_samples_or_another_encoder(stage_of, tmp_path):
    stage = stage_of(models.vit)
    other = stage_of(models.dinov2)
    with pytest.raises(StoreError, match=r"a@3.zarr: features of other samples, another encoder .*; delete"):
        stage.record("refused", features=other.folder / "a@3.zarr")
    assert not (stage.folder / "refused").exists()
