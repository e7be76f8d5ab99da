"""SAEs of other libraries in a study: where its config finds them, whether they fit, and what depends on them."""

import json

import pytest

from conceptshare.config.pretrained import Source
from conceptshare.config.settings import SAESettings
from conceptshare.config.study import build_study
from conceptshare.io.errors import StoreError, StudyError
from conceptshare.preflight.plan import Rates, make_plan

D, LAYERS = 16, 3


def sae_lens(folder, **keys):
    """The settings of an SAE of SAELens, and no weights."""
    folder.mkdir(parents=True)
    config = {"architecture": "topk", "d_in": D, "d_sae": 80, "k": 4, "metadata": {"hook_name": None}}
    (folder / "cfg.json").write_text(json.dumps(config | keys))
    (folder / "sae_weights.safetensors").touch()


@pytest.fixture
def build(tmp_path, monkeypatch):
    """A study that imports SAEs of `lm`, of which its folder has some, and trains those of `vit`."""
    monkeypatch.chdir(tmp_path)
    for layer in range(LAYERS):
        sae_lens(tmp_path / f"theirs/of-{layer}", metadata={"hook_name": f"blocks.{layer}.hook_resid_post"})
        sae_lens(tmp_path / f"seeded/layer-{layer:02d}-7")
        sae_lens(tmp_path / f"seeded/layer-{layer:02d}-8")

    def built(lm="./theirs/of-{layer}", seeds=(7,), **changes):
        shared = {"library": "transformers", "layers": LAYERS, "width": D, "global_token": "first", "tokens": 5}
        return build_study(
            {
                "study": "test",
                "datasets": {"coco": {"source": "hub/coco", "samples": 1000}},
                "encoders": {
                    "lm": {**shared, "model": "us/lm", "modality": "text", "kind": "language", "seeds": list(seeds)},
                    "vit": {**shared, "model": "us/vit", "modality": "image", "kind": "vision"},
                },
                "saes": {"theirs": {"pretrained": {"lm": lm}}},
                "analyses": {"matrices": {"all": None}},
                **changes,
            },
            "study.yaml",
        )

    return built


@pytest.mark.parametrize(
    ("text", "source", "patterns"),
    [
        ("./a/b", Source("./a/b"), None),
        ("~/a", Source("~/a"), None),
        ("a/b/c", Source("a/b/c"), None),
        ("us/saes", Source("", "us/saes"), ["cfg.json", "sae_weights.safetensors|sae.safetensors|sae.pt"]),
        (
            "us/saes:x/y",
            Source("x/y", "us/saes"),
            ["x/y/cfg.json", "x/y/sae_weights.safetensors|x/y/sae.safetensors|x/y/sae.pt"],
        ),
        ("us/saes@v1.0:x/", Source("x", "us/saes", "v1.0"), None),
        ("us/saes:x/sae.pt", Source("x/sae.pt", "us/saes"), ["x/sae.pt"]),
    ],
)
def test_reads_paths_and_hub_ids(text, source, patterns):
    assert Source.parse(text) == source
    assert patterns is None or source.patterns() == patterns


def test_refuses_what_is_neither():
    with pytest.raises(StoreError, match="'gpt2' is neither a path nor a hub id such as OWNER/NAME:FOLDER"):
        Source.parse("gpt2")


def test_finds_the_sae_of_each_layer_and_seed(build):
    assert build().pretrained("theirs", "lm") == {(n, 7): f"./theirs/of-{n}" for n in range(LAYERS)}
    assert build().pretrained("theirs", "vit") == {}
    seeded = build("./seeded/layer-{layer:02d}-{seed}", seeds=(7, 8)).pretrained("theirs", "lm")
    assert seeded == {(n, seed): f"./seeded/layer-0{n}-{seed}" for n in range(LAYERS) for seed in (7, 8)}
    by_layer = build({n: f"./theirs/of-{n}" for n in range(LAYERS)} | {9: "./nowhere"})
    assert by_layer.pretrained("theirs", "lm") == build().pretrained("theirs", "lm")


@pytest.mark.parametrize(
    ("lm", "changes", "message"),
    [
        ("./theirs/of-{layr}", {}, "'./theirs/of-{layr}': braces can hold layer, layer:02d and seed"),
        (
            {0: "./theirs/of-0", 1: "./theirs/of-1"},
            {},
            "no SAE for layer 2; add it, or leave it out of encoders.lm.use_",
        ),
        ("./theirs/of-0", {}, r"the same SAE for several layers or seeds; write \{layer\}"),
        ("./theirs/of-{layer}", {"seeds": (7, 8)}, "the same SAE for several layers or seeds; .* or leave all but one"),
        ("gpt2-{layer}", {}, "'gpt2-0' is neither a path nor a hub id"),
        ("./theirs/no-{layer}", {}, "theirs/no-0: no such folder or file; paths are relative"),
        (
            {n: f"./theirs/of-{2 - n}" for n in range(LAYERS)},
            {},
            "theirs/of-2: an SAE of blocks.2.hook_resid_post, which is layer 2 and not 0, ",
        ),
    ],
)
def test_an_error_names_the_key_and_the_remedy(build, lm, changes, message):
    with pytest.raises(StudyError, match=rf"^study.yaml: saes\.theirs\.pretrained\.lm: {message}") as error:
        build(lm, **changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"d_in": 32}, "an SAE of width 32, but the encoder has width 16; name an SAE of this encoder"),
        (
            {"normalize_activations": "layer_norm"},
            "normalize_activations = 'layer_norm' is not supported; only SAELens's",
        ),
        ({"architecture": "gated"}, "architecture = 'gated' is not supported"),
        ({"metadata": {"hook_name": "blocks.2.hook_mlp_out"}}, "which is not the residual stream after a block"),
    ],
)
def test_an_sae_that_does_not_fit_is_an_error_of_the_config(build, tmp_path, keys, message):
    build({0: "./theirs/of-0", 1: "./theirs/of-1", 2: "us/saes:layer-2"})
    sae_lens(tmp_path / "other", **keys)
    with pytest.raises(StudyError, match=rf"^study.yaml: saes\.theirs\.pretrained\.lm: other: .*{message}"):
        build({0: "./theirs/of-0", 1: "./theirs/of-1", 2: "./other"})


def test_names_an_encoder_that_is_not_in_the_study(build):
    with pytest.raises(
        StudyError, match=r"saes\.theirs\.pretrained\.vt: the study has no such encoder; did you mean 'vit'"
    ):
        build(saes={"theirs": {"pretrained": {"vt": "./theirs/of-{layer}"}}})


def test_another_source_changes_the_keys_of_its_saes_alone(build):
    trained = build(saes={"theirs": None})
    one, other = build(), build({0: "./theirs/of-0", 1: "us/saes:layer-1", 2: "./theirs/of-2"})
    for study in (one, other):
        assert study.sae_key("theirs") == trained.sae_key("theirs") == "{}"
        assert study.sae_settings("theirs") == "{}"
    keys = [
        {place: study.sae_key("theirs", source) for place, source in study.pretrained("theirs", "lm").items()}
        for study in (one, other)
    ]
    assert [place for place in keys[0] if keys[0][place] != keys[1][place]] == [(1, 7)]
    held_out = build(saes={"theirs": {"pretrained": {"lm": "./theirs/of-{layer}"}, "held_out": 0.5}})
    assert held_out.sae_key("theirs", "./theirs/of-0") != keys[0][0, 7]
    assert SAESettings(k=4).of_training("a") == SAESettings(k=5).of_training("a")


@pytest.mark.parametrize("stream", [False, True])
def test_the_plan_counts_no_training_of_imported_saes(build, stream):
    settings = {"expansion": 5, "epochs": 100, "train_on": "global"}
    saes = {"theirs": {**settings, "pretrained": {"lm": "./theirs/of-{layer}"}}}
    rule = "stream" if stream else "sae"
    with_theirs, trained = (
        make_plan(build(stream=stream, saes=one), Rates()).costs[rule] for one in (saes, {"theirs": settings})
    )
    assert with_theirs.flops < 0.6 * trained.flops
    assert with_theirs.written == trained.written
    # F is that of the files, whatever the setting.
    other = {"theirs": {**saes["theirs"], "expansion": 50}}
    sizes = [make_plan(build(stream=stream, saes=one), Rates()).costs["features"].written for one in (saes, other)]
    assert sizes[1] == pytest.approx(sizes[0] * (1 + 10) / 2, rel=0.01)
