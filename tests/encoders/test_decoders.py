"""Activations of multimodal language models equal the hidden states of transformers, for images and captions."""

from dataclasses import replace
from shutil import copytree

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from conceptshare.concepts.examples import _grid
from conceptshare.config.catalog import EncoderSpec
from conceptshare.encoders import load_encoder
from conceptshare.io.errors import EncoderError
from tests.helpers import decoders, models
from tests.helpers.decoders import KINDS, VARYING
from tests.helpers.models import CAPTIONS, LAYERS, close

# The last one has more tiles or patches than the others.
IMAGES = [*models.noise_images(2), models.noise_images(1)[0].resize((120, 30))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of each kind of model, written once."""
    made = {}

    def get(kind):
        if kind == "SmolVLM":
            pytest.importorskip("num2words")  # in tests/requirements.txt
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            decoders.decoder(kind, made[kind])
        return made[kind]

    return get


def change(spec, **values):
    return EncoderSpec(**{**spec.model_dump(), **values})


def inputs_of(processor, spec, sample):
    """As transformers prepares one sample, without padding."""
    if spec.modality == "image":
        prompt = spec.template.replace("{image}", processor.image_token)
        return processor(images=sample, text=prompt, return_tensors="pt")
    prompt = spec.template.replace("{caption}", sample)
    if type(processor).__name__ == "PaliGemmaProcessor":  # it takes no prompt without an image
        return processor.tokenizer([prompt], return_token_type_ids=True, return_tensors="pt")
    return processor(text=[prompt], return_tensors="pt")


@pytest.mark.parametrize("modality", ["image", "text"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_in_a_batch_has_the_hidden_states_that_transformers_gives_it_alone(folder, kind, modality):
    spec = decoders.decoder_entry(kind, folder(kind), modality)
    samples = IMAGES if modality == "image" else CAPTIONS
    model = AutoModelForImageTextToText.from_pretrained(folder(kind), dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder(kind))
    norm = (model.model.text_model if kind in {"Idefics3", "SmolVLM"} else model.model.language_model).norm
    encoder = load_encoder(spec)
    found = {
        token: replace(encoder, spec=change(spec, global_token=token)).activations(samples)
        for token in ("last_token", "mean", "max")
    }
    tokens, training = found["last_token"].tokens, found["last_token"].training.cpu()
    assert training[:, 0].all()
    assert training.all() == (modality == "image" and kind not in VARYING)
    for row, sample in enumerate(samples):
        with torch.no_grad():
            inputs = inputs_of(processor, spec, sample)
            *states, last = model(**inputs, output_hidden_states=True).hidden_states[1:]
            assert close(norm(tokens[LAYERS - 1][row][training[row]].cpu()), last[0])
        for layer in range(LAYERS - 1):
            (own,) = states[layer]
            assert close(tokens[layer][row][training[row]].cpu(), own), layer
            for token, expected in zip(found, (own[-1], own.mean(0), own.amax(0)), strict=True):
                assert close(found[token].global_token[layer][row].cpu(), expected), (layer, token)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_images_are_known_and_a_grid_if_there_is_one(folder, kind):
    encoder = load_encoder(decoders.decoder_entry(kind, folder(kind), "image"))
    processor = AutoProcessor.from_pretrained(folder(kind))
    batch = encoder.prepare(IMAGES)
    for row, image in enumerate(IMAGES):
        (ids,) = inputs_of(processor, encoder.spec, image)["input_ids"]
        token = AutoConfig.from_pretrained(folder(kind)).image_token_id
        own = (ids == token).nonzero()[:, 0].tolist()
        assert batch.image_tokens[row].nonzero()[:, 0].tolist() == own
    positions = _grid(batch, encoder.read(batch), 0).tolist()
    if kind in VARYING:
        assert positions == []
    else:
        assert positions == own
        assert len(own) == (4 if kind == "Gemma3" else 16)


@pytest.mark.parametrize("modality", ["image", "text"])
def test_a_chat_template_gives_the_tokens_that_transformers_makes_with_it(folder, modality):
    spec = decoders.decoder_entry("Llava", folder("Llava"), modality, template="chat")
    processor = AutoProcessor.from_pretrained(folder("Llava"))
    samples, key = (IMAGES, "image") if modality == "image" else (CAPTIONS, "text")
    batch = load_encoder(spec).prepare(samples)
    for row, sample in enumerate(samples):
        messages = [{"role": "user", "content": [{"type": key, key: sample}]}]
        own = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_tensors="pt")
        ids = batch.ids[row] if batch.mask is None else batch.ids[row][batch.mask[row]]
        assert ids.tolist() == own.flatten().tolist()


@pytest.mark.parametrize(
    ("modality", "template", "fault"),
    [
        ("image", "a <image> {image}", r"template has <image>, .*in this model; write \{image\} in its place"),
        ("text", "<image> {caption}", "template has <image>, which stands for an image in this model; leave it out"),
    ],
)
def test_refuses_the_models_own_token_of_an_image_in_a_template(folder, modality, template, fault):
    spec = decoders.decoder_entry("Llava", folder("Llava"), modality, template=template)
    with pytest.raises(EncoderError, match=fault):
        load_encoder(spec)


@pytest.mark.parametrize(
    ("own", "fault"),
    [(None, "its processor has no chat template"), ("{{ bos_token }}", "its chat template has no place for the image")],
)
def test_refuses_a_chat_template_that_is_none_for_images(folder, tmp_path, own, fault):
    copytree(folder("Llava"), tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").unlink()
    if own:
        (tmp_path / "chat_template.jinja").write_text(own)
    spec = decoders.decoder_entry("Llava", tmp_path, "image", template="chat")
    with pytest.raises(EncoderError, match=f"{fault}; write the prompt as template"):
        load_encoder(spec)


def test_a_long_caption_is_cut_but_not_its_template(folder):
    spec = decoders.decoder_entry("Llava", folder("Llava"), "text", context_length=3)
    encoder, unlimited = load_encoder(spec), load_encoder(change(spec, context_length=None))
    assert torch.equal(encoder.prepare(["a cat on a mat"]).ids, unlimited.prepare(["a cat on"]).ids)
    assert torch.equal(encoder.prepare(["a cat on"]).ids, unlimited.prepare(["a cat on"]).ids)


def test_refuses_the_first_token_of_a_prompt_with_an_image(folder):
    spec = decoders.decoder_entry("PaliGemma", folder("PaliGemma"), "image", "first")
    with pytest.raises(
        EncoderError, match=r"its first token is none for the whole image, .*; set global_token: last_token"
    ):
        load_encoder(spec)


def test_refuses_a_template_for_a_model_that_reads_no_prompts_with_images(tmp_path):
    models.save_clip(tmp_path)
    spec = models.entry(tmp_path, "image", "first", layers=models.LAYERS, width=models.WIDTH, template="{image} a dog")
    with pytest.raises(EncoderError, match=r"its processor has no token that stands for an image; .*leave it out"):
        load_encoder(spec)
