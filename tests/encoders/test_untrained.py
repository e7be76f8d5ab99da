"""Untrained encoders have their library's own initial weights, and otherwise equal the trained ones."""

import json
from pathlib import Path

import open_clip
import pytest
import timm
import torch
import transformers
from open_clip.transform import PreprocessCfg, image_transform_v2
from safetensors.torch import load_file

from conceptshare.config.catalog import EncoderSpec
from conceptshare.encoders import load_encoder
from conceptshare.encoders.weights import fetch_weights, fingerprint
from conceptshare.io.errors import EncoderError
from tests.encoders.test_encoders import save_flava_image
from tests.helpers import models
from tests.helpers.hub import running, use


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("CONCEPTSHARE_DEVICE", "cpu")


def open_clip_of(folder):
    return open_clip.CLIP(**json.loads((folder / "open_clip_config.json").read_text())["model_cfg"])


def clip_of(folder):
    return transformers.CLIPModel(transformers.CLIPConfig.from_pretrained(folder))


# How each library builds the model from its configuration, and the tower that the encoder is.
CASES = {
    "bert": (models.bert, lambda folder: transformers.BertModel(models.bert_config())),
    "vit": (models.vit, lambda folder: transformers.ViTModel(transformers.ViTConfig.from_pretrained(folder))),
    "clip-image": (models.clip_image, clip_of),
    "clip-text": (models.clip_text, clip_of),
    "open_clip-image": (models.open_clip_image, open_clip_of),
    "open_clip-text": (models.open_clip_text, open_clip_of),
    "timm": (
        models.timm_vit,
        lambda folder: timm.create_model("test_vit", num_classes=models.EMBEDDING, global_pool="token"),
    ),
}
LIBRARIES = ["bert", "open_clip-image", "timm"]


def untrained(spec, seed=0, **more):
    return EncoderSpec(**{**spec.model_dump(), "untrained": True, "untrained_seed": seed, **more})


def record_of(spec, name="twin"):
    """Run the stage, and return the path of its record."""
    path = Path(f"results/weights/{name}.json")
    fetch_weights(spec, path)
    return path


def files_of(record):
    return json.loads(record.read_text())["files"]


def states(encoder):
    return [{name: x.clone() for name, x in block.state_dict().items()} for block in encoder.blocks]


def same(a, b):
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x) for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_with_which_the_library_builds_the_model(case, tmp_path):
    make, build = CASES[case]
    family = make(tmp_path / "base")
    spec = untrained(family.spec, 3)
    before = torch.random.get_rng_state()
    record = record_of(spec)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(3)
    model = build(tmp_path / "base")
    expected, twin = model.state_dict(), Path("results/weights/twin")
    if isinstance(model, transformers.PreTrainedModel):  # whose files may have other names for parameters
        found = type(model).from_pretrained(twin, dtype=torch.float32).state_dict()
    else:
        (file,) = twin.glob("*.safetensors")
        found = load_file(file)
    assert expected.keys() == found.keys()
    assert all(torch.equal(x, found[name]) and x.dtype == found[name].dtype for name, x in expected.items())
    encoder = load_encoder(spec, record)
    assert encoder.fingerprint == fingerprint(record)
    for layer, block in enumerate(states(encoder)):
        ends = [{n: x for n, x in expected.items() if n.endswith(name)} for name in block]
        assert all(any(torch.equal(x, y) for y in end.values()) for x, end in zip(block.values(), ends, strict=True))
        assert not same([block], [states(load_encoder(family.spec))[layer]])


@pytest.mark.parametrize("case", LIBRARIES)
def test_only_the_seed_and_the_configuration_determine_the_weights(case, tmp_path):
    spec = CASES[case][0](tmp_path / "base").spec
    records = {name: record_of(untrained(spec, seed), name) for name, seed in {"a": 1, "b": 1, "c": 2}.items()}
    torch.manual_seed(7)
    records["d"] = record_of(untrained(spec, 1), "d")
    a, b, c, d = (files_of(path) for path in records.values())
    assert a == b == d
    assert {name for name in a if a[name] != c[name]} == {name for name in a if name.endswith(".safetensors")}
    assert json.loads(records["c"].read_text())["settings"]["untrained_seed"] == 2
    trained = record_of(spec, "trained")
    assert len({fingerprint(path) for path in [*records.values(), trained]}) == 3
    shared = files_of(trained).keys() & a.keys()
    assert {name for name in shared if files_of(trained)[name] != a[name]} == {
        name for name in a if name.endswith(".safetensors")
    }


@pytest.mark.parametrize("case", CASES)
def test_inputs_are_prepared_as_for_the_trained_encoder(case, tmp_path):
    family = CASES[case][0](tmp_path / "base")
    batches = [load_encoder(spec).prepare(family.samples) for spec in (family.spec, untrained(family.spec))]
    assert batches[0].inputs.keys() == batches[1].inputs.keys()
    assert all(torch.equal(x, batches[1].inputs[name]) for name, x in batches[0].inputs.items())


def test_neither_needs_nor_keeps_trained_weights(tmp_path):
    for file in ("model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "README.md"):
        base = tmp_path / "base"
        models.save_bert(base)
        (base / "model.safetensors").unlink()
        (base / file).write_text("not read")
        found = files_of(record_of(untrained(models.entry(base, "text", "first", kind="language"))))
        assert found["model.safetensors"]["bytes"] > 1000
        assert not {"model.safetensors.index.json", "model-00001-of-00002.safetensors", "README.md"} & found.keys()


@pytest.mark.parametrize("library", ["transformers", "open_clip", "timm"])
def test_fetches_no_weights_from_a_hub(tmp_path, monkeypatch, library):
    make = {"transformers": models.bert, "open_clip": models.open_clip_siglip_text, "timm": models.timm_vit}[library]
    spec = make(tmp_path / "base").spec
    files = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    with running() as hub:
        use(monkeypatch, hub.endpoint, tmp_path / "cache")
        commit = hub.add("us/tiny", files)
        record = record_of(untrained(spec, model="us/tiny" if library == "transformers" else "hf-hub:us/tiny"))
        assert not hub.asked("GET", "safetensors")
        assert not hub.asked("HEAD", "safetensors")
    assert json.loads(record.read_text())["revision"] == commit
    local = record_of(untrained(spec), "local")
    assert files_of(record) == files_of(local)


def test_a_script_writes_the_configuration(tmp_path):
    models.save_bert(tmp_path / "base")
    Path("make.py").write_text(f"import sys, shutil; shutil.copytree({str(tmp_path / 'base')!r}, sys.argv[1])")
    spec = models.entry("script:make.py", "text", "first", kind="language")
    made, local = (untrained(spec, model=model) for model in ("script:make.py", str(tmp_path / "base")))
    assert files_of(record_of(made)) == files_of(record_of(local, "local"))


def test_a_part_of_a_model_that_only_its_own_class_loads(tmp_path):
    save_flava_image(tmp_path / "base")
    spec = untrained(models.entry(tmp_path / "base", "image", "first"))
    encoder = load_encoder(spec, record_of(spec))
    torch.manual_seed(0)
    own = transformers.FlavaImageModel(transformers.FlavaImageConfig.from_pretrained(tmp_path / "base"))
    assert same(states(encoder), [layer.state_dict() for layer in own.encoder.layer])


@pytest.fixture
def named(tmp_path, monkeypatch):
    """The entry of a model that is registered with open_clip by name, with a tag whose weights do not exist."""
    config = tmp_path / "conceptshare-untrained.json"
    config.write_text(json.dumps(models.open_clip_config()))
    open_clip.add_model_config(config)
    tag = {"file": "absent", "quick_gelu": True, "mean": (0.5,) * 3, "std": (0.2,) * 3, "resize_mode": "squash"}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, config.stem, {"squashed": tag})
    return models.entry(config.stem, "image", "first", library="open_clip")


@pytest.mark.parametrize("tag", [None, "squashed"])
def test_the_tag_of_an_open_clip_model_sets_its_preprocessing_and_activation(named, tag):
    settings = {} if tag is None else {"mean": (0.5,) * 3, "std": (0.2,) * 3, "resize_mode": "squash"}
    spec = untrained(named, weights=tag)
    found = load_encoder(spec, record_of(spec)).activations(models.noise_images())
    torch.manual_seed(0)
    own = open_clip.CLIP(**models.open_clip_config(quick_gelu=tag is not None)).eval()
    transform = image_transform_v2(PreprocessCfg(size=models.SIDE, **settings), is_train=False)
    expected = models.open_clip_image_truth(own, transform)(models.noise_images())
    assert all(models.close(found.tokens[layer], x) for layer, x in enumerate(expected.hidden))


def test_refuses_a_checkpoint_and_the_remedy_helps(named):
    with pytest.raises(
        EncoderError, match=r"reads no weights, but weights is the checkpoint \./a\.pt; set weights: null"
    ):
        record_of(untrained(named, weights="./a.pt"))
    assert not list(Path().rglob("twin*"))
    record_of(untrained(named, weights=None))


def test_a_tokenizer_that_comes_with_the_weights_needs_a_tag():
    spec = models.entry("ViT-B-16-SigLIP", "image", "mean", library="open_clip")
    with pytest.raises(EncoderError, match="its tokenizer comes with its weights; set weights to one of webli"):
        record_of(untrained(spec))
    with pytest.raises(EncoderError, match="ViT-B-99: open_clip has no weights for a model of that name"):
        record_of(untrained(spec, model="ViT-B-99"))


def test_refuses_a_configuration_of_absurd_size_before_building_it(tmp_path, monkeypatch):
    monkeypatch.setattr("conceptshare.encoders.untrained.free_memory", lambda: 2**20)
    models.save_bert(tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    own = json.loads(file.read_text())
    sizes = {
        "num_hidden_layers": (
            10**6,
            "1000000 is more than any model has; use the configuration that belongs to its weights",
        ),
        "vocab_size": (10**5, r"needs more than the 0\.0 GiB of free memory; use a machine with more"),
    }
    for key, (value, message) in sizes.items():
        file.write_text(json.dumps(own | {key: value}))
        with pytest.raises(EncoderError, match=f"{message}$"):
            record_of(untrained(models.entry(tmp_path / "base", "text", "first", kind="language")))
    assert not list(Path().rglob("twin*"))


def test_names_library_and_folder_if_the_model_cannot_be_built(tmp_path):
    models.save_bert(tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "bert", "num_attention_heads": 7}')
    with pytest.raises(EncoderError, match=r"transformers cannot build .*base: [^\n]*$"):
        record_of(untrained(models.entry(tmp_path / "base", "text", "first", kind="language")))
