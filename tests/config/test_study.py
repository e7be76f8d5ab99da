"""The settings of a study, its error messages, and the keys of its jobs."""

import json
import random
import re
from itertools import combinations
from pathlib import Path

import open_clip
import pytest
import yaml

from conceptshare.config.catalog import EncoderSpec, local_path, parse_yaml, read_catalog
from conceptshare.config.members import Member, pair_name
from conceptshare.config.settings import SAESettings, paper_encoders
from conceptshare.config.study import build_study, load_study, study_of, write_study
from conceptshare.io.errors import StudyError
from conceptshare.io.layout import uncoded

ROOT = Path(__file__).parents[2]

DATASETS = {"coco": {"source": "hub/coco", "id": "key"}, "laion": {"source": "hub/laion"}}
ENCODERS = {
    "vit": {"modality": "image", "kind": "vision"},
    "dinov2": {"modality": "image", "kind": "vision"},
    "clip-image": {"modality": "image", "kind": "vlm"},
    "clip-text": {"modality": "text", "kind": "vlm"},
    "bert": {"modality": "text", "kind": "language"},
}


@pytest.fixture
def catalog(tmp_path):
    folder = tmp_path / "workflow" / "catalog"
    folder.mkdir(parents=True)
    common = {"library": "transformers", "model": "hub/model", "layers": 12, "width": 768, "global_token": "first"}
    encoders = {name: {**common, **entry} for name, entry in ENCODERS.items()}
    (folder / "encoders.yaml").write_text(yaml.safe_dump(encoders))
    (folder / "datasets.yaml").write_text(yaml.safe_dump(DATASETS))
    return folder


def config(**changes):
    return {
        "study": "test",
        "datasets": {"coco": None},
        "encoders": {name: {"seeds": [0, 1]} if name == "vit" else None for name in ENCODERS},
        "saes": {"paper": None},
    } | changes


@pytest.fixture
def build(catalog):
    def built(**changes):
        return build_study(config(**changes), "study.yaml", catalog)

    return built


@pytest.fixture
def fault(build):
    """The error message that a config produces."""

    def message(**changes):
        with pytest.raises(StudyError) as caught:
            build(**changes)
        return str(caught.value)

    return message


def test_the_default_study_is_valid(monkeypatch):
    monkeypatch.chdir(ROOT)
    study = load_study("config.yaml")
    assert study.pairs()


def test_completes_a_study_from_the_catalog(build):
    study = build(encoders={"vit": {"batch_size": 7}}, saes={"paper": {"k": 16}})
    assert study.encoders["vit"].width == 768
    assert study.encoders["vit"].batch_size == 7
    assert study.datasets["coco"].source == "hub/coco"
    assert study.saes["paper"].k == 16
    assert study.saes["paper"].expansion == 8


@pytest.mark.parametrize(
    ("changes", "place", "suggestion"),
    [
        ({"analysis": {}}, "analysis", "analyses"),
        ({"datasets": {"coco": {"captoin": "x"}}}, "datasets.coco.captoin", "caption"),
        ({"encoders": {"vit": {"seed": [1]}}}, "encoders.vit.seed", "seeds"),
        ({"saes": {"paper": {"expantion": 4}}}, "saes.paper.expantion", "expansion"),
        ({"analyses": {"matrix": {}}}, "analyses.matrix", "matrices"),
        ({"analyses": {"matrices": {"m": {"member": []}}}}, "analyses.matrices.m.member", "members"),
        ({"correlations": {"precison": "float32"}}, "correlations.precison", "precision"),
        ({"analyses": {"matrices": {"m": {"papers": "large"}}}}, "analyses.matrices.m.papers", "paper"),
        (
            {"analyses": {"layerwise": {"l": {"pairs": [["vit", "bert"]], "pair": 1}}}},
            "analyses.layerwise.l.pair",
            "pairs",
        ),
        (
            {
                "analyses": {
                    "sharedness": {
                        "s": {
                            "source": "vit",
                            "shared_with": ["bert"],
                            "not_shared_with": ["dinov2"],
                            "feature_shown": 3,
                        }
                    }
                }
            },
            "analyses.sharedness.s.feature_shown",
            "features_shown",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_names_the_path_of_an_unknown_key_and_suggests_the_nearest(fault, changes, place, suggestion):
    assert fault(**changes) == f"study.yaml: {place}: unknown key; did you mean {suggestion!r}?"


def test_names_a_missing_key(fault, build, catalog):
    given = config()
    del given["saes"]
    with pytest.raises(StudyError, match=r"^study\.yaml: saes: missing"):
        build_study(given, "study.yaml", catalog)
    own = {"mine": {"model": "hub/mine", "library": "transformers", "modality": "text", "kind": "language"}}
    lines = fault(encoders=own).splitlines()
    assert {line.split(": ")[1] for line in lines} == {
        f"encoders.mine.{k}" for k in ("layers", "width", "global_token")
    }


@pytest.mark.parametrize(
    ("former", "remedy"), [("eot", "last_token"), ("last", "last_position for SigLIP.*last_token")]
)
def test_names_what_a_choice_of_token_is_now_called(fault, former, remedy):
    message = fault(encoders={"vit": {"global_token": former}})
    assert re.fullmatch(
        rf"study\.yaml: encoders\.vit\.global_token: {former} is now called {remedy}.* \(found .*\)", message
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"encoders": {"vitt": None}}, "encoders.vitt: 'vitt' is not in the catalog of encoders; did you mean 'vit'?"),
        (
            {"encoders": {"x": {"base": "brt"}}},
            "encoders.x.base: 'brt' is not in the catalog of encoders; did you mean",
        ),
        ({"datasets": {"coko": None}}, "datasets.coko: 'coko' is not in the catalog of datasets; did you mean 'coco'?"),
        ({"datasets": {"zzz": None}}, "there are: coco, laion"),
    ],
)
def test_suggests_the_nearest_known_name_or_lists_all(fault, changes, words):
    assert words in fault(**changes)


def analyses_naming(text):
    """Every place in a study that can name a member, with ``text`` there."""
    return {
        "matrices.a.members": {"matrices": {"a": {"members": ["vit", text]}}},
        "layerwise.a.pairs": {"layerwise": {"a": {"pairs": [["vit", text]]}}},
        "sharedness.a.source": {
            "sharedness": {"a": {"source": text, "shared_with": ["vit"], "not_shared_with": ["vit"]}}
        },
        "sharedness.a.shared_with": {
            "sharedness": {"a": {"source": "vit", "shared_with": [text], "not_shared_with": ["bert"]}}
        },
        "sharedness.a.not_shared_with": {
            "sharedness": {"a": {"source": "vit", "shared_with": ["bert"], "not_shared_with": [text]}}
        },
    }


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"precision": "bfloat16"}, "precision"),
        ({"memory_mb": 0}, "memory_mb"),
    ],
)
def test_refuses_invalid_correlation_settings(fault, values, key):
    assert fault(correlations=values).startswith(f"study.yaml: correlations.{key}")


@pytest.mark.parametrize("place", analyses_naming(""))
def test_suggests_the_nearest_encoder_for_an_unknown_one_in_an_analysis(fault, place):
    message = fault(analyses=analyses_naming("dinov1")[place])
    assert f"analyses.{place}: 'dinov1': the study has no encoder 'dinov1'; did you mean 'dinov2'?" in message


@pytest.mark.parametrize("place", analyses_naming(""))
@pytest.mark.parametrize("seed", ["7", "x", "-1"])
def test_lists_the_seeds_for_an_unknown_one_in_an_analysis(fault, place, seed):
    message = fault(analyses=analyses_naming(f"bert@{seed}")[place])
    assert f"analyses.{place}: 'bert@{seed}': bert has the seeds [0]" in message


@pytest.mark.parametrize(
    "analyses", [analyses_naming("dinov1")["matrices.a.members"], {"layerwise": {"a": {"pairs": [["vit", "vit"]]}}}]
)
def test_an_error_is_one_line_that_names_the_key(fault, analyses):
    message = fault(analyses=analyses)
    assert message.startswith("study.yaml: analyses.")
    assert "hub/model" not in message
    assert len(message) < 300


@pytest.mark.parametrize("layers", [[12], [-1], [0, 3, 99]])
def test_refuses_a_layer_the_encoder_lacks(fault, layers):
    message = fault(encoders={"vit": {"use_layers": layers}})
    assert message.startswith("study.yaml: encoders.vit")
    assert "it has layers 0 to 11" in message


def test_refuses_an_empty_list_of_layers(fault):
    assert "use_layers is empty" in fault(encoders={"vit": {"use_layers": []}})


def test_layers_are_all_the_last_or_a_list(build):
    encoders = {
        "vit": None,
        "bert": {"use_layers": "last"},
        "dinov2": {"use_layers": [5, 1, 5]},
    }
    study = build(encoders=encoders)
    assert study.encoders["vit"].layer_numbers() == list(range(12))
    assert study.encoders["bert"].layer_numbers() == [11]
    assert study.encoders["dinov2"].layer_numbers() == [1, 5]


def test_refuses_a_duplicate_seed(fault):
    assert "seeds names a seed twice: [0, 1, 0]" in fault(encoders={"vit": {"seeds": [0, 1, 0]}})


@pytest.mark.parametrize("seeds", [[], [-1], ["a"], 3])
def test_refuses_invalid_seeds(fault, seeds):
    assert "encoders.vit.seeds" in fault(encoders={"vit": {"seeds": seeds}})


@pytest.mark.parametrize(
    "values",
    [
        *({"k": 0}, {"expansion": 0}, {"learning_rate": 0}, {"epochs": 0}, {"batch_samples": 0}, {"k": "many"}),
        *({"k": 1.5}, {"k": True}, {"learning_rate": True}, {"expansion": 10**15}, {"epochs": 10**12}),
        *({"learning_rate": float("inf")}, {"clip_norm": float("inf")}, {"held_out": float("nan")}, {"k": 10**5000}),
    ],
)
def test_refuses_invalid_sae_settings(fault, values):
    (key,) = values
    assert fault(saes={"paper": values}).startswith(f"study.yaml: saes.paper.{key}: ")


@pytest.mark.parametrize(
    "values",
    [
        *({"layers": 10**9}, {"parts": 10**7}, {"width": 10**12}, {"image_size": 10**9}, {"batch_size": 10**12}),
        *({"layers": True}, {"use_layers": [False]}, {"seeds": [True]}, {"seeds": [2**64]}, {"revision": False}),
    ],
)
def test_refuses_invalid_encoders(fault, values):
    (key,) = values
    message = fault(encoders={"vit": values})
    assert message.startswith(f"study.yaml: encoders.vit.{key}")
    assert len(message) < 400


def test_refuses_more_latents_than_int32_can_hold(fault):
    assert "saes.paper.expansion: 9000 gives vit" in fault(
        saes={"paper": {"expansion": 9000}}, encoders={"vit": {"width": 300_000}}
    )


def test_the_number_of_latents_is_a_multiple_of_the_width_or_given(build, fault, tmp_path):
    study = build(saes={"wide": {"expansion": 3}, "same": {"features": 4096, "preset": "gao"}})
    assert [study.saes[name].latents(width) for name in ("wide", "same") for width in (10, 768)] == [
        30,
        2304,
        4096,
        4096,
    ]
    write_study(study, tmp_path / "study.json")
    assert load_study(tmp_path / "study.json") == study
    assert "saes.x: features and expansion both give the number of latents; leave one of both out" in fault(
        saes={"x": {"features": 4096, "expansion": 4}}
    )
    assert fault(saes={"x": {"features": 0}}).startswith("study.yaml: saes.x.features: ")
    message = fault(saes={"x": {"features": 16, "k": 17}})
    assert "17 is more than the 16 latents that" in message
    assert message.endswith("lower k, or raise expansion or features")


def test_sae_settings_without_a_number_of_latents_are_recorded_as_before():
    assert "features" not in SAESettings().of_training()
    given = SAESettings(features=48).of_training()
    assert given["features"] == 48
    assert SAESettings(**given) == SAESettings(features=48)


def test_truncates_a_long_wrong_value(fault):
    assert len(fault(encoders={"vit": {"layers": "x" * 10**6}})) < 400


@pytest.mark.parametrize("name", ["weights", "studies", "logs", "Logs", "pages", "README.md"])
def test_a_data_set_cannot_use_a_reserved_folder_name(fault, name):
    assert f"datasets.{name}: results/ has something else of that name" in fault(datasets={name: {"source": "hub/x"}})


def test_refuses_names_that_are_too_long_together(build, fault):
    """Slurm's logs are in a folder whose name joins all names of a job."""
    matrices = {"matrices": {"all": None}}
    encoders = {letter * 70: {"base": "vit"} for letter in "ab"}
    build(encoders=encoders, analyses=matrices)
    message = fault(
        encoders=encoders, analyses=matrices, datasets={"d" * 80: {"source": "hub/x"}}, saes={"s" * 50: None}
    )
    assert "letters together" in message
    assert "shorten one" in message
    assert "letters together" in fault(
        datasets={"d" * 80: {"source": "hub/x"}},
        saes={"s" * 80: None},
        analyses={"matrices": {"m" * 80: None}},
        study="t" * 80,
    )


def test_accepts_a_learning_rate_that_yaml_reads_as_text(build):
    assert yaml.safe_load("5e-5") == "5e-5"
    assert build(saes={"paper": {"learning_rate": "5e-5"}}).saes["paper"].learning_rate == 5e-5


def test_base_derives_a_variant_with_overrides(build):
    study = build(encoders={"vit": None, "vit-mean": {"base": "vit", "global_token": "mean"}})
    assert study.encoders["vit"].global_token == "first"
    variant = study.encoders["vit-mean"]
    assert (variant.global_token, variant.model, variant.width) == ("mean", "hub/model", 768)
    assert variant.activations_key() != study.encoders["vit"].activations_key()


def test_base_can_be_another_entry_of_the_study(build, fault):
    described = {
        key: value for key, value in build(encoders={"vit": None}).encoders["vit"].model_dump().items() if value
    }
    encoders = {"twin": {"base": "mean", "untrained": True}, "mean": {"base": "mine", "global_token": "mean"}}
    study = build(encoders={**encoders, "mine": described | {"width": 96}})
    assert [study.encoders[name].width for name in ("twin", "mean", "mine")] == [96] * 3
    assert (study.encoders["twin"].global_token, study.encoders["twin"].untrained) == ("mean", True)
    circle = fault(encoders={"a": {"base": "b"}, "b": {"base": "a"}})
    assert "encoders.b.base: 'a' is not in the catalog of encoders" in circle


def test_bounds_of_warnings_change_no_sae(build):
    studies = [build(saes={"small": {"k": 4, **bounds}}) for bounds in ({}, {"max_dead": 0.1, "max_fvu_global": 0.2})]
    assert len({study.sae_key("small") for study in studies}) == 1
    assert json.loads(studies[1].sae_settings("small")) == {"k": 4, "max_dead": 0.1, "max_fvu_global": 0.2}
    assert [study.features_options("small") for study in studies] == ["--keep"] * 2
    assert [study.unexplained_options("small") for study in studies] == ["--unexplained-layers mark"] * 2


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"template": "a dog"}, "template has no place for the image; write {image} once, where it belongs"),
        ({"template": "{caption} {image}"}, "template has {caption}, which nothing replaces; {image} is the only"),
        ({"template": ""}, "template has no place for the image; write {image} once"),
        (
            {"template": "USER: <image>\nASSISTANT:"},
            "write {image} once, where it belongs in the prompt, in place of the model's own token of an image",
        ),
        ({"template": "{image} {image}"}, "template has more than one place for the image; write {image} once"),
        (
            {"template": "{image}", "modality": "text", "kind": "vlm"},
            "template has no place for the caption; write {caption} once, where it belongs in the prompt",
        ),
        ({"template": "{image}", "library": "timm"}, "template is for library: transformers without remote_code"),
        ({"template": "{image}", "remote_code": True}, "without remote_code; leave it out"),
        ({"template": "{image}", "global_token": "reference"}, "is not for prompts; set last_token, mean or max"),
        ({"template": "{image}", "image_size": 64}, "image_size is for image encoders without a template; leave it"),
    ],
    ids=str,
)
def test_refuses_a_template_that_cannot_be_read(fault, values, words):
    message = fault(encoders={"vit": values})
    assert message.startswith("study.yaml: encoders.vit: ")
    assert words in message
    assert "\n" not in message


WIDTHS = {"layers": 2, "width": [8, 16], "global_token": "mean"}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"width": [8, 16, 32]}, "width has 3 numbers, but there are 2 layers; write one for each"),
        ({"global_token": "first"}, "have no token in common; set global_token: mean or max"),
        ({"modality": "text", "kind": "vlm"}, "are for image encoders; set width to one number"),
        ({"template": "{image}"}, "are for image encoders; set width to one number"),
        ({"parts": 2}, "parts is for layers of one width; leave it out"),
        ({"width": [8, 0]}, "width: expected a whole number from 1 to 1,000,000, or a list with one for each layer"),
        ({"width": "wide"}, "width: expected a whole number from 1 to 1,000,000, or a list with one for each layer"),
        ({"width": []}, "width has 0 numbers, but there are 2 layers; write one for each"),
        ({"blocks": 3}, "blocks: expected the path of a module list, or a list of paths"),
    ],
    ids=str,
)
def test_refuses_layers_of_several_widths_that_cannot_be_read(fault, values, words):
    message = fault(encoders={"vit": WIDTHS | values})
    assert message.startswith("study.yaml: encoders.vit")
    assert "\n" not in message
    assert words in message


def test_layers_of_several_widths_need_saes_of_global_tokens_with_a_number_of_features(build, fault):
    encoders = {"vit": WIDTHS}
    message = fault(encoders=encoders, saes={"all": {"features": 32}})
    assert "only global tokens are stored, but saes.all trains on all tokens; set saes.all.train_on: global" in message
    message = fault(encoders=encoders, saes={"wide": {"preset": "global"}})
    assert message.endswith("set saes.wide.features in place of expansion")
    study = build(encoders=encoders, saes={"same": {"preset": "global", "features": 40}})
    assert [study.encoders["vit"].width_of(layer) for layer in (0, 1)] == [8, 16]


@pytest.mark.parametrize("token", ["cls", "Mean", "", None, 5])
def test_lists_the_choices_of_token_for_an_encoder(fault, token):
    message = fault(encoders={"vit": {"global_token": token}})
    assert "vit.global_token: expected first (the class token of most models), last_token, last_position" in message
    assert "given" not in message


def test_an_untrained_variant_is_another_encoder_in_a_group_of_its_own(build):
    entries = {"random": {"base": "vit", "untrained": True}, "other": {"base": "bert", "untrained": True}}
    again = {"again": {"base": "vit", "untrained": True, "untrained_seed": 1}}
    study = build(encoders={"vit": None, "bert": None, **entries, **again}, analyses={"matrices": {"m": None}})
    common = '"layers": 12, "library": "transformers", "modality": "image", "model": "hub/model"'
    plain = f'{{"global_token": "first", "kind": "vision", {common}, "width": 768}}'
    assert study.encoders["vit"].activations_key() == plain
    assert study.encoders["random"].activations_key() == plain.replace('"width"', '"untrained": true, "width"')
    assert study.encoders["again"].activations_key() != study.encoders["random"].activations_key()
    keys = [json.loads(study.encoders[name].model_key()) for name in ("vit", "random", "again")]
    assert keys[0] == {"library": "transformers", "model": "hub/model"}
    assert keys[1:] == [keys[0] | {"untrained": True}, keys[0] | {"untrained": True, "untrained_seed": 1}]
    assert json.loads(study.table_key("matrix", "m")) == [
        ["vit@0", "image", "vision", []],
        ["bert@0", "text", "language", []],
        ["again@0", "image", "untrained", []],
        ["random@0", "image", "untrained", []],
        ["other@0", "text", "untrained", []],
    ]
    assert [member["kind"] for member in study.shown_on_pages()["members"]][-3:] == ["untrained"] * 3


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"untrained": True, "remote_code": True}, "leave untrained out, or use one without remote_code"),
        ({"untrained_seed": 3}, "untrained_seed is for untrained: true; set that too, or leave untrained_seed out"),
    ],
)
def test_refuses_untrained_where_it_has_no_meaning(fault, entry, message):
    found = fault(encoders={"vit": entry})
    assert message in found
    assert "\n" not in found
    assert "encoders.vit" in found


def test_an_encoder_can_be_described_in_full(build):
    entry = {
        "library": "transformers",
        "model": "hub/mine",
        "modality": "text",
        "kind": "language",
        "layers": 2,
        "width": 8,
        "global_token": "mean",
    }
    assert build(encoders={"mine": entry}).encoders["mine"].layers == 2


@pytest.mark.parametrize(
    ("modality", "kind", "sound"),
    [("image", "language", False), ("text", "vision", False), ("image", "vlm", True), ("text", "vlm", True)],
)
def test_an_encoders_modality_must_fit_its_kind(build, modality, kind, sound):
    entry = {"base": "vit", "modality": modality, "kind": kind}
    if sound:
        build(encoders={"mine": entry})
    else:
        with pytest.raises(StudyError, match=rf"a {kind} encoder does not read {modality}s"):
            build(encoders={"mine": entry})


def test_a_studys_key_depends_on_exactly_the_settings_that_affect_results(build):
    encoders = {"vit": None, "bert": {"seeds": [0, 1]}}
    key = build(encoders=encoders).study_key()
    assert json.loads(key)["encoders"]["bert"]["seeds"] == [0, 1]
    assert json.loads(key)["saes"] != {}
    assert build(encoders=dict(reversed(encoders.items()))).study_key() == key
    assert build(encoders=encoders | {"vit": {"note": "a note", "trained_on": "x", "tokens": 3}}).study_key() == key
    for changed in ({"batch_size": 7}, {"seeds": [2]}):
        assert build(encoders=encoders | {"vit": changed}).study_key() != key


def test_refuses_a_layerwise_pair_with_itself(fault, build):
    message = fault(analyses={"layerwise": {"a": {"pairs": [["vit", "vit@0"]]}}})
    assert "analyses.layerwise.a: vit is paired with itself" in message
    build(analyses={"layerwise": {"a": {"pairs": [["vit@0", "vit@1"]]}}})


@pytest.mark.parametrize("group", ["shared_with", "not_shared_with"])
def test_refuses_a_sharedness_source_in_its_own_group(fault, build, group):
    analysis = {"source": "vit", "shared_with": ["bert"], "not_shared_with": ["dinov2"]}
    assert "analyses.sharedness.a: the source vit is also in a group" in fault(
        analyses={"sharedness": {"a": analysis | {group: ["clip-text", "vit@0"]}}}
    )
    build(analyses={"sharedness": {"a": analysis | {group: ["clip-text", "vit@1"]}}})


@pytest.mark.parametrize("name", ["vit", "vit@0"])
def test_refuses_a_sharedness_member_in_both_groups(fault, name):
    """Its rho would count for and against each feature."""
    analysis = {"source": "bert", "shared_with": ["clip-text", "vit@0"], "not_shared_with": ["dinov2", name]}
    message = fault(analyses={"sharedness": {"a": analysis}})
    assert message.startswith("study.yaml: analyses.sharedness.a: vit@0 is in both groups")


def test_an_analysis_of_samples_has_an_image_and_a_text_member_and_layers_of_both(build, fault):
    def samples(**changed):
        return {"samples": {"fit": {"image": "vit@1", "text": "bert"} | changed}}

    study = build(analyses=samples(image_layers="all", text_layers=[3, 1, 3]))
    assert study.samples_sides("fit") == {
        "image": "vit@1",
        "image_layers": study.encoders["vit"].layer_numbers(),
        "text": "bert@0",
        "text_layers": [1, 3],
    }
    assert study.table_key("samples", "fit") != build(analyses=samples()).table_key("samples", "fit")
    assert study.members() == [Member("bert", 0), Member("vit", 1)]
    assert study.pairs() == []
    for changed, words in (
        ({"text": "clip-image"}, "analyses.samples.fit.text: clip-image reads images; name an encoder that reads text"),
        ({"image": "bert"}, "analyses.samples.fit.image: bert reads text; name an encoder that reads images"),
        ({"text": "brt"}, "analyses.samples.fit.text: 'brt': the study has no encoder 'brt'"),
        ({"text_layers": [99]}, "analyses.samples.fit.text_layers: bert has no recorded layer 99; it has 0, 1"),
        ({"text_layers": []}, "analyses.samples.fit.text_layers"),
        ({"text_layers": "first"}, "analyses.samples.fit.text_layers"),
    ):
        assert words in fault(analyses=samples(**changed))


def test_two_seeds_of_one_encoder_can_be_in_the_two_groups(build):
    analysis = {"source": "bert", "shared_with": ["vit@1"], "not_shared_with": ["vit@0"]}
    assert build(analyses={"sharedness": {"a": analysis}}).pairs()


@pytest.mark.parametrize(("k", "sound"), [(1536, True), (1537, False)])
def test_refuses_k_larger_than_the_number_of_latents(build, fault, k, sound):
    changes = {
        "encoders": {"vit": None, "narrow": {"base": "vit", "width": 192}},
        "saes": {"paper": None, "wide": {"k": k}},
    }
    if sound:
        build(**changes)
    else:
        message = fault(**changes)
        assert message.startswith("study.yaml: saes.wide.k: ")
        assert "1537 is more than the 1536 latents" in message
        assert "narrow" in message


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"matryoshka": [64, 1536]}, None),
        (
            {"matryoshka": [64, 1537]},
            "saes.nested.matryoshka: 1537 is more than the 1536 latents that narrow has; leave",
        ),
        ({"matryoshka": [64, 64]}, "saes.nested: matryoshka: [64, 64] do not increase; list each size once, smallest"),
        ({"matryoshka": [128, 64]}, "saes.nested: matryoshka: [128, 64] do not increase"),
        ({"matryoshka": [0, 64]}, "saes.nested.matryoshka.0: Input should be greater than or equal to 1 (found 0)"),
        ({"matryoshka": 64}, "saes.nested.matryoshka: "),
        ({"activation": "batchtopk", "k": 1536}, None),
        ({"activation": "batchtopk", "k": 1537}, "saes.nested.k: 1537 is more than the 1536 latents"),
        (
            {"activation": "jumprelu"},
            "saes.nested.activation: Input should be 'topk' or 'batchtopk' (found 'jumprelu')",
        ),
    ],
    ids=str,
)
def test_activations_and_nested_sizes_must_fit_every_encoder(build, fault, setting, message):
    changes = {
        "encoders": {"vit": None, "narrow": {"base": "vit", "width": 192}},
        "saes": {"paper": None, "nested": setting},
    }
    if message:
        assert fault(**changes).startswith(f"study.yaml: {message}")
    else:
        study = build(**changes)
        assert json.loads(study.sae_key("nested")) == setting
        assert study.sae_key("paper") == "{}"


@pytest.mark.parametrize("place", analyses_naming(""))
def test_refuses_an_empty_seed(fault, place):
    message = fault(analyses=analyses_naming("bert@")[place])
    assert f"analyses.{place}: 'bert@': no seed after '@'; write bert, or bert@0" in message


ARRAYS = {"library": "arrays", "model": "given", "modality": "text", "kind": "language", "layers": 1, "width": 8}


@pytest.fixture
def given(monkeypatch, tmp_path):
    """An entry of arrays in an existing folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "given").mkdir()
    return {"encoders": {"mine": ARRAYS}, "saes": {"own": {"train_on": "global"}}}


def test_arrays_have_a_token_of_their_own(build, given):
    study = build(**given)
    assert study.encoders["mine"].global_token == "given"
    assert study_of(json.loads(study.study_key())).encoders == study.encoders


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"saes": {"own": None}},
            "one vector per sample, but saes.own trains on all tokens; set saes.own.train_on: gl",
        ),
        ({"datasets": {"coco": None, "laion": None}}, "has one data set, but the study 2; make a study of each"),
        ({"preset": "reference"}, "has no token at position 0; leave preset: reference out"),
        (
            {"encoders": {"mine": ARRAYS | {"batch_size": 8}}},
            "batch_size is for encoders that read samples; library: a",
        ),
        (
            {"encoders": {"mine": ARRAYS | {"global_token": "mean"}}},
            "global_token: given is for library: arrays, which",
        ),
        ({"encoders": {"mine": ARRAYS | {"library": "timm", "global_token": "given"}}}, "global_token: given is for"),
        ({"encoders": {"mine": ARRAYS | {"model": "absent"}}}, "encoders.mine.model: absent does not exist; paths"),
    ],
)
def test_refuses_what_arrays_do_not_have(fault, given, changes, message):
    assert message in fault(**given | changes)


PRESET = {
    "encoders": {"clip-text": {"global_token": "last_token"}, "vit": {"seeds": [0, 1]}, "bert": None},
    "analyses": {
        "matrices": {"all": None, "few": {"members": ["vit@1", "clip-text"]}},
        "layerwise": {"l": {"pairs": [["vit", "vit@1"]]}},
        "sharedness": {"s": {"source": "vit", "shared_with": ["clip-text@0"], "not_shared_with": ["bert"]}},
    },
}


def test_the_reference_preset_renames_encoders_and_reads_position_0(build):
    own, reference = build(**PRESET), build(preset="reference", **PRESET)
    assert build(preset="own", **PRESET) == own
    assert list(own.encoders) == ["clip-text", "vit", "bert"]
    assert list(reference.encoders) == ["clip-text.reference", "vit.reference", "bert.reference"]
    assert {spec.global_token for spec in reference.encoders.values()} == {"reference"}
    assert [spec.global_token for spec in own.encoders.values()] == ["last_token", "first", "first"]
    for name, spec in own.encoders.items():
        changed = reference.encoders[f"{name}.reference"]
        assert changed.model == spec.model
        assert changed.activations_key() != spec.activations_key()


def test_analyses_use_the_same_encoder_names_under_both_presets(build):
    def renamed(members):
        return [Member(f"{encoder}.reference", seed) for encoder, seed in members]

    own, reference = build(**PRESET), build(preset="reference", **PRESET)
    assert reference.members() == renamed(own.members())
    assert reference.pairs() == [tuple(renamed(pair)) for pair in own.pairs()]
    for name in PRESET["analyses"]["matrices"]:
        assert reference.matrix_members(name) == renamed(own.matrix_members(name))
    assert json.loads(reference.table_key("sharedness", "s"))["source"] == "vit.reference@0"


def test_an_analysis_can_use_the_encoder_names_of_paths_and_tables(build):
    suffixed = {"layerwise": {"l": {"pairs": [["vit.reference@1", "bert.reference"]]}}}
    plain = {"layerwise": {"l": {"pairs": [["vit@1", "bert"]]}}}
    given = {"preset": "reference", "encoders": PRESET["encoders"]}
    assert build(analyses=suffixed, **given).pairs() == build(analyses=plain, **given).pairs()


def test_the_configs_names_take_precedence_under_the_reference_preset(build):
    encoders = {"vit": None, "vit.reference": {"base": "vit", "image_size": 98}}
    study = build(preset="reference", encoders=encoders)
    assert study.encoders[study.member("vit.reference").encoder].image_size == 98
    assert study.encoders[study.member("vit").encoder].image_size is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"encoders": {"vit": {"width": 0}}}, "encoders.vit.width: "),
        ({"encoders": {"vit": {"model": "/absent"}}}, "encoders.vit.model: /absent does not exist"),
        ({"saes": {"wide": {"k": 9999}}}, "latents that vit has"),
        (
            {"analyses": {"matrices": {"m": {"members": ["vit", "bart"]}}}},
            "'bart': the study has no encoder 'bart'; did you mean 'bert'?",
        ),
        ({"analyses": {"matrices": {"m": {"members": ["vit", "bert@7"]}}}}, "add 7 to encoders.bert.seeds"),
        ({"analyses": {"matrices": {"m": {"members": ["vit", "bert.reference@7"]}}}}, "add 7 to encoders.bert.seeds"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors_use_the_configs_names_under_the_reference_preset(fault, changes, words):
    given = {"encoders": {"vit": None, "bert": None}} | changes
    assert words in fault(preset="reference", **given)


def test_refuses_an_unknown_preset(fault):
    assert fault(preset="papers").startswith("study.yaml: preset: ")


def test_refuses_an_unknown_choice_of_training_tokens(fault):
    message = fault(saes={"small": {"train_on": "mean"}})
    assert message.startswith("study.yaml: saes.small.train_on: ")
    assert "'all' or 'global'" in message
    assert "\n" not in message


@pytest.mark.parametrize("members", [[], ["vit"], ["vit", "vit@0"]])
def test_refuses_a_matrix_of_fewer_than_two_members(fault, members):
    """There would be nothing to correlate, so the job that draws the matrix would fail."""
    assert "analyses.matrices.a" in fault(analyses={"matrices": {"a": {"members": members}}})


@pytest.mark.parametrize("name", ["a@b", "a__b", "a/b", "", "-a", "a b", ".", "..", "a.", "ä"])
@pytest.mark.parametrize("place", ["study", "datasets", "encoders", "saes", "matrices", "layerwise", "sharedness"])
def test_refuses_a_name_that_would_break_a_path(fault, place, name):
    sound = {
        "datasets": {"source": "hub/x"},
        "encoders": {"base": "vit"},
        "saes": None,
        "matrices": None,
        "layerwise": {"pairs": [["vit", "bert"]]},
        "sharedness": {"source": "vit", "shared_with": ["bert"], "not_shared_with": ["dinov2"]},
    }
    if place == "study":
        message = fault(study=name)
    elif place in ("datasets", "encoders", "saes"):
        message = fault(**{place: {name: sound[place]}})
    else:
        message = fault(analyses={place: {name: sound[place]}})
    assert f"{name!r} is not a name" in message


@pytest.mark.parametrize("name", ["vit-l-14", "CLIP_ViT.L14", "a", "7b"])
def test_accepts_names_like_those_of_models(build, name):
    assert name in build(encoders={name: {"base": "vit"}}).encoders


@pytest.mark.parametrize(
    "changes",
    [
        {"encoders": {1: None}},
        {"datasets": {True: None}},
        {"encoders": {"x": {"base": 5}}},
        {"encoders": {"x": {"base": ["vit"]}}},
        {"saes": {3: None}},
        {"encoders": {"vit": 3}},
        {"encoders": ["vit"]},
        {"datasets": None},
        {"saes": {}},
        {"analyses": [1]},
        {"study": None},
    ],
    ids=str,
)
def test_values_of_the_wrong_type_are_study_errors(fault, changes):
    """YAML reads ``1:`` as a number and ``on:`` as true; the user always gets a message."""
    place = next(iter(changes))
    assert f"study.yaml: {place}" in fault(**changes)


def test_refuses_a_missing_path(fault, build, tmp_path):
    assert "datasets.mine.source: ./absent.csv does not exist" in fault(datasets={"mine": {"source": "./absent.csv"}})
    assert "encoders.vit.model: /absent does not exist" in fault(encoders={"vit": {"model": "/absent"}})
    assert "script:absent.py does not exist" in fault(encoders={"vit": {"model": "script:absent.py"}})
    (tmp_path / "there.csv").touch()
    build(datasets={"mine": {"source": str(tmp_path / "there.csv")}})


def test_catalog_paths_are_relative_to_the_clone(catalog, tmp_path, monkeypatch):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "pairs.csv").touch()
    (catalog / "datasets.yaml").write_text("pairs: {source: ./demo/pairs.csv}")
    (tmp_path / "elsewhere").mkdir()
    for here in (tmp_path, tmp_path / "elsewhere"):
        monkeypatch.chdir(here)
        study = build_study(config(datasets={"pairs": None}), "study.yaml", catalog)
        assert Path(study.datasets["pairs"].source).resolve() == tmp_path / "demo" / "pairs.csv"


def aliases(form, first="[x]"):
    """A short YAML text whose aliases expand to 10^9 values or more."""
    lines = [f"a0: &a0 {first}"]
    for n in range(1, 40):
        lines.append(f"a{n}: &a{n} " + form.format(f"*a{n - 1}, *a{n - 1}" if "0" not in form else f"*a{n - 1}"))
    return "\n".join(lines).encode()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file"),
        (b"a: [", "not valid YAML: line 1"),
        (b"study: a\0b", "not valid YAML: .*special characters are not allowed"),
        (b"a: " + b"[" * 5000 + b"]" * 5000, "nested more than"),
        (b"a: &a [*a]", "nested more than"),
        (b"a: " + b"9" * 5000, "not valid YAML: line 1, column 4"),
        (b"a: 2026-02-31", "not valid YAML: line 1, column 4"),
        (aliases("[{}]"), "more than 1,000,000 values"),
        (aliases("{{a: {0}, b: {0}}}"), "more than 1,000,000 values"),
        (aliases("{{<<: [{}]}}", "{a: 1}"), "more than 1,000,000 values"),
        (b"# " + b"x" * 11 * 2**20, "larger than 10 MiB"),
        (b"- a", "expected a mapping"),
        (b"", "study: missing"),
        (b"study: \xff\xfe", ""),
        (b"? [a, b]\n: 1", ""),
    ],
)
def test_names_a_file_that_is_not_a_study(tmp_path, catalog, content, words):
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StudyError, match=rf"mine\.yaml: .*{words}"):
        load_study(path, catalog)


def test_refuses_a_folder_in_place_of_a_study(tmp_path, catalog):
    with pytest.raises(StudyError, match=str(tmp_path)):
        load_study(tmp_path, catalog)


def test_refuses_a_duplicate_key(tmp_path, catalog):
    """YAML's reader would silently keep the last value."""
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config()) + "saes:\n  other:\n")
    with pytest.raises(StudyError, match=r"mine\.yaml: .*saes"):
        load_study(tmp_path / "mine.yaml", catalog)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        *(("010", "8"), ("-017", "-15"), ("1_000", "1000"), ("1:30", "90"), ("190:20:30.15", "685230.15")),
        *(("0x10", "16"), ("0b11", "3"), ("1_0.5", "10.5"), ("2020-01-01", "datetime.date(2020, 1, 1)")),
        *(("!!int 010", "8"), ("0x" + "f" * 5000, "a number of very many digits")),
    ],
)
def test_what_yaml_reads_otherwise_than_it_looks_is_refused(text, read):
    with pytest.raises(StudyError) as caught:
        parse_yaml(f"a:\n- {text}\n", "mine.yaml")
    (line,) = str(caught.value).splitlines()
    assert line.startswith("mine.yaml: not valid YAML: line 2, column 3: YAML reads '")
    assert f" as {read}; write a decimal number, or quote text" in line


def test_numbers_that_everyone_reads_alike_and_quoted_text_are_kept():
    text = "[0, 10, -3, +5, 0.5, .5, 5., 1.5e+3, 1.0e-4, .inf, '010', \"1:30\", 1e3, 1.2.3, v1_0, 08, '2020-01-01']"
    kept = [0, 10, -3, 5, 0.5, 0.5, 5.0, 1500.0, 1e-4, float("inf"), "010", "1:30", "1e3", "1.2.3", "v1_0", "08"]
    assert parse_yaml(f"a: {text}", "")["a"] == [*kept, "2020-01-01"]


ANALYSES = {
    "matrices": {"all": None, "few": {"members": ["vit@1", "bert", "clip-image"]}},
    "layerwise": {"seeds": {"pairs": [["vit@1", "vit@0"], ["bert", "dinov2"]]}},
    "sharedness": {
        "seen": {"source": "vit@1", "shared_with": ["clip-text", "bert"], "not_shared_with": ["dinov2"]},
    },
    "samples": {"fit": {"image": "vit@1", "text": "bert"}},
}


def shuffled(value, order):
    """The same mapping with its keys, at every level, in another order."""
    if not isinstance(value, dict):
        return value
    keys = list(value)
    order.shuffle(keys)
    return {key: shuffled(value[key], order) for key in keys}


def keys_of(study):
    """Everything that the workflow passes to its jobs."""
    return {
        "members": study.table_key("saes"),
        "pairs": study.pairs(),
        "matrices": {name: study.table_key("matrix", name) for name in study.analyses.matrices},
        "layerwise": {name: study.table_key("layerwise", name) for name in study.analyses.layerwise},
        "sharedness": {name: study.table_key("sharedness", name) for name in study.analyses.sharedness},
        "samples": {name: study.table_key("samples", name) for name in study.analyses.samples},
        "similarity": study.similarity_pairs(),
        "overlapping": study.overlapping(),
        "saes": {name: study.sae_key(name) for name in study.saes},
        "datasets": {name: study.dataset_key(name) for name in study.datasets},
        "activations": {name: spec.activations_key() for name, spec in study.encoders.items()},
    }


def test_features_have_one_code_or_several(build):
    assert build().features == ["before_topk"]
    assert build(features="after_topk").coded() == {"paper+after_topk": "paper"}
    both = build(features=["before_topk", "after_topk"], saes={"small": None, "large": None})
    assert both.coded() == {"small": "small", "large": "large"} | {
        f"{name}+after_topk": name for name in ("small", "large")
    }
    assert both.coded("after_topk").keys() == {"small+after_topk", "large+after_topk"}
    assert [uncoded(name) for name in ("small", "small+after_topk")] == [
        ("small", "before_topk"),
        ("small", "after_topk"),
    ]


def test_rejects_unknown_and_repeated_codes(fault):
    for features, words in (
        ("after", "features.0: Input should be 'before_topk' or 'after_topk' (found 'after')"),
        (["after_topk"] * 2, "features: after_topk is listed twice; leave one out"),
        ([], "features"),
    ):
        assert words in fault(features=features)


def test_a_second_code_changes_only_what_pages_say_of_it(build):
    one, both = build(analyses=ANALYSES), build(analyses=ANALYSES, features=["before_topk", "after_topk"])
    assert keys_of(both) == keys_of(one)
    assert both.shown_on_pages() == one.shown_on_pages() | {"codes": ["before_topk", "after_topk"]}
    after = build(analyses=ANALYSES, features=["after_topk"])
    assert json.loads(after.table_key("pages"))["saes"] == ["paper+after_topk"]


@pytest.mark.parametrize("seed", range(5))
def test_pairs_and_keys_do_not_depend_on_the_order_of_the_config(catalog, seed):
    given = config(analyses=ANALYSES, datasets={"coco": {"limit": 10}, "laion": None})
    expected = keys_of(build_study(given, "study.yaml", catalog))
    other = shuffled(given, random.Random(seed))
    other["analyses"]["matrices"]["few"]["members"].reverse()
    other["analyses"]["sharedness"]["seen"]["shared_with"].reverse()
    assert keys_of(build_study(other, "study.yaml", catalog)) == expected


def test_pairs_are_those_the_analyses_need_sorted_and_unique(build):
    first_seeds = [Member(name, 0) for name in ENCODERS]
    needed = {tuple(sorted(pair)) for pair in combinations(first_seeds, 2)}
    vit1 = Member("vit", 1)
    others = [Member("bert", 0), Member("clip-image", 0), Member("vit", 0), Member("clip-text", 0), Member("dinov2", 0)]
    needed |= {tuple(sorted((vit1, other))) for other in others}
    found = build(analyses=ANALYSES).pairs()
    assert set(found) == needed
    assert found == sorted(found)
    assert len(found) == len(needed)
    members = {member for pair in needed for member in pair}
    partners = {m: sorted(other for pair in needed if m in pair for other in pair if other != m) for m in members}
    assert build(analyses=ANALYSES).comparisons() == partners


def test_a_members_other_seeds_are_those_of_its_encoder(build):
    study = build(encoders={"vit": {"seeds": [7, 3, 5]}, "bert": None})
    assert study.other_seeds(Member("vit", 7)) == [Member("vit", 3), Member("vit", 5)]
    assert study.other_seeds(Member("vit", 3)) == [Member("vit", 5), Member("vit", 7)]
    assert study.other_seeds(Member("bert", 0)) == []


def test_a_matrix_of_all_seeds_compares_them_where_none_is_named(build):
    encoders = {"vit": {"seeds": [5, 1]}, "bert": {"seeds": [0, 2]}, "dinov2": None}

    def members(**matrix):
        return [str(member) for member in build(encoders=encoders, analyses={"matrices": {"m": matrix}}).members()]

    assert members(seeds="all") == ["bert@0", "bert@2", "dinov2@0", "vit@1", "vit@5"]
    study = build(encoders=encoders, analyses={"matrices": {"m": {"seeds": "all", "members": ["vit", "bert@2"]}}})
    assert [str(member) for member in study.matrix_members("m")] == ["vit@1", "vit@5", "bert@2"]
    assert study.seed_pairs() == [
        (Member("bert", 0), Member("bert", 2)),
        (Member("vit", 1), Member("vit", 5)),
    ]
    assert len(study.pairs()) == 2 + 2


def test_one_seed_per_encoder_makes_no_table_of_seeds(build):
    def tables(seeds):
        study = build(encoders={"vit": {"seeds": seeds}, "bert": None}, analyses={"matrices": {"m": {"seeds": "all"}}})
        return {path for _, path in study.products("coco")}, len(study.pairs())

    one, several = tables([3]), tables([3, 4])
    assert several[0] - one[0] == {"matrices/m.seeds"}
    assert (one[1], several[1]) == (1, 3)


def test_only_matrices_need_ceilings(build):
    encoders = {"vit": {"seeds": [0, 1, 2]}, "bert": None, "dinov2": {"seeds": [4, 3]}}
    matrix = build(encoders=encoders, analyses={"matrices": {"m": {"members": ["vit@2", "bert", "dinov2"]}}})
    assert matrix.ceiling_pairs("m") == [
        (Member("dinov2", 3), Member("dinov2", 4)),
        *((Member("vit", a), Member("vit", b)) for a, b in ((0, 1), (0, 2), (1, 2))),
    ]
    assert set(matrix.ceiling_pairs("m")) <= set(matrix.pairs())
    assert matrix.seed_pairs() == matrix.ceiling_pairs("m")
    assert [str(member) for member in matrix.members()] == [
        *("bert@0", "dinov2@3", "dinov2@4", "vit@0", "vit@1", "vit@2")
    ]
    assert len(matrix.pairs()) == 3 + 4
    assert json.loads(matrix.table_key("matrix", "m")) == [
        ["dinov2@4", "image", "vision", ["dinov2@3"]],
        ["vit@2", "image", "vision", ["vit@0", "vit@1"]],
        ["bert@0", "text", "language", []],
    ]
    layerwise = build(encoders=encoders, analyses={"layerwise": {"l": {"pairs": [["vit", "bert"]]}}})
    assert layerwise.pairs() == [(Member("bert", 0), Member("vit", 0))]


def test_rankings_need_every_seed_of_the_encoders_in_their_groups_except_the_source(build):
    encoders = {"vit": {"seeds": [0, 1]}, "bert": {"seeds": [2, 0]}, "dinov2": None}
    analysis = {"source": "vit@1", "shared_with": ["bert", "vit@0", "bert@2"], "not_shared_with": ["dinov2"]}
    study = build(encoders=encoders, analyses={"sharedness": {"s": analysis}})
    seeds = {"bert@2": ["bert@2", "bert@0"], "dinov2@0": ["dinov2@0"], "vit@0": ["vit@0"]}
    assert study.sharedness_seeds("s") == json.loads(study.table_key("sharedness", "s"))["seeds"] == seeds
    vit = Member("vit", 1)
    others = [Member("bert", 0), Member("bert", 2), Member("dinov2", 0), Member("vit", 0)]
    assert study.pairs() == sorted(tuple(sorted((vit, other))) for other in others)
    assert study.sharedness_groups("s")["shared_with"] == ["bert@2", "vit@0"]


def test_similarity_compares_different_encoders_of_matrix_and_layerwise_analyses(build):
    analyses = {
        "matrices": {"m": {"members": ["vit@0", "vit@1", "dinov2"]}},
        "layerwise": {"l": {"pairs": [["vit@1", "vit@0"], ["vit", "bert"], ["bert", "vit@1"]]}},
        "sharedness": {"s": {"source": "bert", "shared_with": ["clip-text"], "not_shared_with": ["dinov2"]}},
    }
    assert build(analyses=analyses).similarity_pairs() == [("bert", "vit"), ("dinov2", "vit")]
    assert build(analyses={"sharedness": analyses["sharedness"]}).similarity_pairs() == []


def test_rankings_with_the_same_source_have_an_overlap(build):
    def ranking(source):
        return {"source": source, "shared_with": ["clip-text"], "not_shared_with": ["dinov2"]}

    rankings = {"z": ranking("vit"), "one": ranking("vit@1"), "a": ranking("vit@0"), "b": ranking("bert")}
    assert build(analyses={"sharedness": rankings}).overlapping() == ["a", "z"]
    del rankings["a"]
    assert build(analyses={"sharedness": rankings}).overlapping() == []


PAPER_ENCODERS = {"bert-large": {"base": "bert"}, "dinov2-large": {"base": "dinov2"}, "bert-base": {"base": "bert"}}


def test_compares_a_matrix_with_the_paper_on_the_papers_data_sets(build):
    def datasets(size, names=("coco", "laion")):
        members = ["bert-large", "dinov2-large"] if size != "base" else ["bert-base", "dinov2-base"]
        encoders = PAPER_ENCODERS | {"dinov2-base": {"base": "dinov2"}}
        study = build(
            encoders=encoders,
            datasets=dict.fromkeys(names),
            analyses={"matrices": {"m": {"members": members, **({"paper": size} if size else {})}}},
        )
        return study.paper_datasets("m")

    assert datasets("large") == ["coco", "laion"]
    assert datasets("base") == ["coco"]
    assert datasets(None) == []


def test_the_papers_data_sets_and_encoders_match_its_published_numbers():
    for size, expected in {"large": ("coco", "laion", "flowers"), "base": ("coco",)}.items():
        assert tuple(data for data, of_size in paper_encoders() if of_size == size) == expected
    assert len(paper_encoders()["coco", "large"]) == 11
    assert "mambavision" not in paper_encoders()["coco", "base"]


@pytest.mark.parametrize(
    ("size", "datasets", "message"),
    [
        (
            "base",
            ["laion"],
            "the paper has base encoders on coco, and none of them is a data set of this study; add one",
        ),
        (
            "base",
            ["coco"],
            "fewer than two members are among the paper's base encoders on coco, which are clip-image-base, ",
        ),
    ],
)
def test_refuses_a_comparison_absent_from_the_paper(fault, size, datasets, message):
    analyses = {"matrices": {"m": {"paper": size}}}
    found = fault(encoders=PAPER_ENCODERS, datasets=dict.fromkeys(datasets), analyses=analyses)
    assert found.startswith(f"study.yaml: analyses.matrices.m.paper: {message}")


def test_refuses_a_size_absent_from_the_paper(fault):
    assert fault(analyses={"matrices": {"m": {"paper": "huge"}}}).startswith("study.yaml: analyses.matrices.m.paper: ")


def test_the_papers_encoders_keep_their_names_under_the_reference_preset(build):
    analyses = {"matrices": {"m": {"paper": "large"}}}
    study = build(preset="reference", encoders=PAPER_ENCODERS, analyses=analyses)
    assert study.paper_datasets("m") == ["coco"]


@pytest.mark.parametrize("part", ["averages", "intervals", "similarity", "strength", "paper", "paper-agreement"])
def test_refuses_a_matrix_whose_files_collide_with_anothers(fault, build, part):
    message = fault(analyses={"matrices": {"all": None, f"all.{part}": None}})
    assert f"analyses.matrices.all.{part}: a file of all has that name" in message
    build(analyses={"matrices": {f"all.{part}": None}})


def test_members_are_those_the_analyses_need(build):
    study = build(analyses={"layerwise": {"a": {"pairs": [["vit@1", "bert"]]}}})
    assert study.members() == [Member("bert", 0), Member("vit", 1)]
    assert build().members() == []


def test_a_member_without_a_seed_uses_the_encoders_first(build):
    pairs = {"layerwise": {"l": {"pairs": [["vit", "bert"]]}}}
    study = build(encoders={"vit": {"seeds": [7, 3]}, "bert": None}, analyses=pairs)
    assert study.pairs() == [(Member("bert", 0), Member("vit", 7))]
    assert study.member("vit@3") == Member("vit", 3)


def test_a_matrix_is_grouped_like_the_papers_tables(build):
    members = build(analyses=ANALYSES).matrix_members("all")
    assert [str(member) for member in members] == ["clip-image@0", "dinov2@0", "vit@0", "clip-text@0", "bert@0"]


def test_a_pairs_name_does_not_depend_on_the_order():
    a, b = Member("vit", 0), Member("bert", 10)
    assert pair_name(a, b) == pair_name(b, a) == "bert@10__vit@0"
    assert pair_name(Member("vit", 10), Member("vit", 9)) == "vit@9__vit@10"


def test_keys_omit_defaults_and_irrelevant_settings(build):
    plain = build(encoders={"vit": None})
    same = build(
        encoders={"vit": {"seeds": [3, 4], "note": "mine", "batch_size": 32, "use_layers": "all", "parts": 3}},
        saes={"paper": {"k": 32, "learning_rate": 5e-5}},
        datasets={"coco": {"note": "a note", "samples": 118_287, "max_dropped": 0.01}},
    )
    assert plain.sae_key("paper") == same.sae_key("paper") == "{}"
    assert plain.dataset_key("coco") == same.dataset_key("coco") == '{"id": "key", "source": "hub/coco"}'
    assert plain.encoders["vit"].activations_key() == same.encoders["vit"].activations_key()
    assert not {"weights", "revision", "seeds", "note"} & json.loads(same.encoders["vit"].activations_key()).keys()


def test_a_stream_cannot_be_split_into_parts(build):
    assert build(encoders={"vit": {"parts": 2}}).parted_encoders() == ["vit"]
    with pytest.raises(
        StudyError, match=r"encoders\.vit\.parts: a stream is one job.*; leave parts out, or set stream"
    ):
        build(encoders={"vit": {"parts": 2}}, stream=True)


@pytest.mark.parametrize(
    "change", [{"batch_size": 8}, {"use_layers": "last"}, {"global_token": "mean"}, {"image_size": 98}]
)
def test_the_key_of_activations_has_every_setting_they_depend_on(build, change):
    plain, changed = build(encoders={"vit": None}), build(encoders={"vit": change})
    assert plain.encoders["vit"].activations_key() != changed.encoders["vit"].activations_key()


@pytest.mark.parametrize("preset", ["own", "reference"])
def test_a_study_survives_a_round_trip_through_its_file(build, tmp_path, preset):
    study = build(analyses=ANALYSES, preset=preset)
    write_study(study, tmp_path / "study.json")
    read = load_study(tmp_path / "study.json")
    assert read.study_key() == study.study_key()
    assert (read.pairs(), read.shown_on_pages()) == (study.pairs(), study.shown_on_pages())


def test_keys_are_json_with_sorted_keys(build):
    study = build(analyses=ANALYSES, saes={"small": {"k": 4, "expansion": 2, "epochs": 3}})
    for text in (study.sae_key("small"), study.dataset_key("coco"), study.table_key("sharedness", "seen")):
        assert text == json.dumps(json.loads(text), sort_keys=True)
    assert json.loads(study.sae_key("small")) == {"k": 4, "expansion": 2, "epochs": 3}
    assert json.loads(study.table_key("sharedness", "seen")) == {
        "source": "vit@1",
        "shared_with": ["bert@0", "clip-text@0"],
        "not_shared_with": ["dinov2@0"],
        "seeds": {"bert@0": ["bert@0"], "clip-text@0": ["clip-text@0"], "dinov2@0": ["dinov2@0"]},
    }
    assert json.loads(study.table_key("layerwise", "seeds")) == [["vit@1", "vit@0"], ["bert@0", "dinov2@0"]]
    assert ["clip-text@0", "text", "vlm", []] in json.loads(study.table_key("matrix", "all"))


PAPER = {
    "clip-image-base": ("open_clip", "ViT-B-32-quickgelu", "image", 12, 768, "first"),
    "clip-text-base": ("open_clip", "ViT-B-32-quickgelu", "text", 12, 512, "last_token"),
    "clip-image-large": ("open_clip", "ViT-L-14-quickgelu", "image", 24, 1024, "first"),
    "clip-text-large": ("open_clip", "ViT-L-14-quickgelu", "text", 12, 768, "last_token"),
    "dfn-image-base": ("open_clip", "hf-hub:apple/DFN2B-CLIP-ViT-B-16", "image", 12, 768, "first"),
    "dfn-text-base": ("open_clip", "hf-hub:apple/DFN2B-CLIP-ViT-B-16", "text", 12, 512, "last_token"),
    "dfn-image-large": ("open_clip", "hf-hub:apple/DFN2B-CLIP-ViT-L-14", "image", 24, 1024, "first"),
    "dfn-text-large": ("open_clip", "hf-hub:apple/DFN2B-CLIP-ViT-L-14", "text", 12, 768, "last_token"),
    "siglip2-image-base": ("transformers", "google/siglip2-base-patch16-224", "image", 12, 768, "mean"),
    "siglip2-text-base": ("transformers", "google/siglip2-base-patch16-224", "text", 12, 768, "last_position"),
    "siglip2-image-large": ("transformers", "google/siglip2-large-patch16-384", "image", 24, 1024, "mean"),
    "siglip2-text-large": ("transformers", "google/siglip2-large-patch16-384", "text", 24, 1024, "last_position"),
    "dinov2-base": ("transformers", "facebook/dinov2-base", "image", 12, 768, "first"),
    "dinov2-large": ("transformers", "facebook/dinov2-large", "image", 24, 1024, "first"),
    "vit-base": ("transformers", "google/vit-base-patch16-224", "image", 12, 768, "first"),
    "vit-large": ("transformers", "google/vit-large-patch16-384", "image", 24, 1024, "first"),
    "mambavision-base": ("transformers", "nvidia/MambaVision-B-1K", "image", 4, 1024, "mean"),
    "mambavision-large": ("transformers", "nvidia/MambaVision-L-1K", "image", 4, 1568, "mean"),
    "bert-base": ("transformers", "bert-base-uncased", "text", 12, 768, "first"),
    "bert-large": ("transformers", "bert-large-uncased", "text", 24, 1024, "first"),
    "deberta-base": ("transformers", "microsoft/deberta-base", "text", 12, 768, "first"),
    "deberta-large": ("transformers", "microsoft/deberta-large", "text", 24, 1024, "first"),
}


@pytest.mark.parametrize("name", PAPER)
def test_the_catalog_describes_each_encoder_of_the_paper(name):
    entry = EncoderSpec(**read_catalog("encoders")[name])
    found = (entry.library, entry.model, entry.modality, entry.layers, entry.width, entry.global_token)
    assert found == PAPER[name]
    assert entry.trained_on
    assert entry.tokens
    assert (entry.image_size if entry.modality == "image" else entry.context_length) is not None
    assert entry.revision is None or re.fullmatch("[0-9a-f]{40}", entry.revision)
    assert entry.remote_code == name.startswith("mambavision")


@pytest.mark.parametrize("name", [name for name, row in PAPER.items() if row[0] == "open_clip"])
def test_catalog_sizes_of_open_clip_encoders_equal_open_clips(name):
    entry = EncoderSpec(**read_catalog("encoders")[name])
    known = {"hf-hub:apple/DFN2B-CLIP-ViT-B-16": "ViT-B-16", "hf-hub:apple/DFN2B-CLIP-ViT-L-14": "ViT-L-14"}
    config = open_clip.get_model_config(known.get(entry.model, entry.model))
    tower = config["vision_cfg" if entry.modality == "image" else "text_cfg"]
    assert (entry.layers, entry.width) == (tower["layers"], tower["width"])
    if entry.modality == "image":
        assert entry.image_size == tower["image_size"]
        assert entry.tokens == (tower["image_size"] // tower["patch_size"]) ** 2 + 1
    else:
        assert entry.context_length == tower["context_length"]
    assert entry.weights is None or entry.weights in open_clip.list_pretrained_tags_by_model(entry.model)


def test_recognises_an_existing_or_deep_path_without_a_leading_dot(fault, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert local_path("models/vit") is None
    (tmp_path / "models/vit").mkdir(parents=True)
    assert local_path("models/vit") == Path("models/vit")
    assert "encoders.vit.model: models/vit/tiny does not exist" in fault(encoders={"vit": {"model": "models/vit/tiny"}})
    for text in ("", "hf-hub:owner/name", "package:name/folder/inner", "x" * 5000):
        assert local_path(text) is None
