"""Downloads and a study's names and texts cannot run code, leave their folder or reach a shell."""

import io
import json
import pickle
import re
import shutil
import tarfile
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import load_file

from conceptshare.cli import app
from conceptshare.config.catalog import DatasetSpec
from conceptshare.config.study import build_study
from conceptshare.correlations._store import _Progress
from conceptshare.data.dataset import Data, make_dataset
from conceptshare.encoders import load_encoder
from conceptshare.io.errors import DatasetError, EncoderError, OutputError, StoreError, StudyError
from conceptshare.sae import SAE, TopK, load_sae, save_sae
from conceptshare.sae.exchange import import_sae
from tests.helpers import models
from tests.helpers.samples import contents


class Payload:
    """Unpickling it writes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.fixture
def marker(tmp_path):
    """A file that exists only if a payload was executed; checked after each test that uses it."""
    marker = tmp_path / "it ran"
    yield marker
    assert not marker.exists()


def test_the_payload_works(tmp_path):
    torch.save(Payload(tmp_path / "it ran"), tmp_path / "a.pt")
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert (tmp_path / "it ran").exists()


def as_pickle(weights, path, marker, zipped):
    content = load_file(weights)
    weights.unlink()
    torch.save(content | {"more": Payload(marker)}, path, _use_new_zipfile_serialization=zipped)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("make", "weights", "pickled"),
    [
        (models.bert, "model.safetensors", "pytorch_model.bin"),
        (models.mambavision, "model.safetensors", "pytorch_model.bin"),
        (models.timm_vit, "model.safetensors", "pytorch_model.bin"),
        (models.open_clip_image, "open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
    ],
    ids=["transformers", "remote code", "timm", "open_clip"],
)
def test_does_not_run_code_in_pickled_weights(tmp_path, marker, make, weights, pickled, zipped):
    spec = make(tmp_path / "model").spec
    folder = Path(spec.model)
    as_pickle(folder / weights, folder / pickled, marker, zipped)
    with pytest.raises(EncoderError, match=r"cannot load .*model"):
        load_encoder(spec)


def test_does_not_run_code_in_a_named_open_clip_models_checkpoint(tmp_path, marker):
    torch.save({"state_dict": Payload(marker)}, tmp_path / "checkpoint.pt")
    spec = models.entry("RN50", "image", "first", library="open_clip", weights=str(tmp_path / "checkpoint.pt"))
    with pytest.raises(EncoderError, match=r"cannot load .*checkpoint\.pt"):
        load_encoder(spec)


CODE = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import {base} as Own
"""


def add_code(folder, marker, base):
    (folder / "own.py").write_text(CODE.format(marker=str(marker), base=base))


def edit(path, **keys):
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def with_a_tokenizers_code(folder, marker):
    spec = models.bert(folder).spec
    add_code(folder, marker, "BertTokenizer")
    edit(folder / "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", "own.Own"]})
    return spec


def with_an_image_processors_code(folder, marker):
    spec = models.vit(folder).spec
    add_code(folder, marker, "ViTImageProcessor")
    edit(folder / "preprocessor_config.json", image_processor_type="Own", auto_map={"AutoImageProcessor": "own.Own"})
    return spec


def with_a_models_code(folder, marker):
    spec = models.bert(folder).spec
    add_code(folder, marker, "BertModel")
    edit(folder / "config.json", model_type="own", auto_map={"AutoModel": "own.Own", "AutoConfig": "own.Own"})
    return spec


def with_a_known_models_code(folder, marker):
    spec = models.bert(folder).spec
    add_code(folder, marker, "BertModel")
    edit(folder / "config.json", auto_map={"AutoModel": "own.Own", "AutoConfig": "own.Own"})
    return spec


def with_a_configuration_that_lets_open_clip_run_code(folder, marker):
    spec = models.open_clip_eos_text(folder).spec
    add_code(folder, marker, "T5TokenizerFast")
    edit(folder / "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", "own.Own"]})
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": True}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return spec


@pytest.mark.parametrize(
    "make",
    [
        with_a_tokenizers_code,
        with_an_image_processors_code,
        with_a_models_code,
        with_a_known_models_code,
        with_a_configuration_that_lets_open_clip_run_code,
    ],
)
def test_does_not_run_a_models_code_in_any_other_way(tmp_path, marker, make, monkeypatch):
    # At a terminal, a user would be asked and might agree.
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    spec = make(tmp_path / "model", marker)
    with suppress(EncoderError):  # some then lack the class from the code
        load_encoder(spec)


def pickled_sae(folder, marker):
    """An SAE whose weights are a pickle under the name of safetensors."""
    save_sae(SAE(4, 8, TopK(2)), folder, "vit", "layer 0")
    (folder / "sae_weights.safetensors").write_bytes(pickle.dumps(Payload(marker)))


def test_does_not_run_code_in_sae_weights(tmp_path, marker):
    (tmp_path / "sae").mkdir()
    pickled_sae(tmp_path / "sae", marker)
    with pytest.raises(StoreError, match="sae"):
        load_sae(tmp_path / "sae")
    (tmp_path / "sae" / "manifest.json").unlink()  # otherwise the changed file is detected before it is read
    with pytest.raises(StoreError, match="do not match or are damaged"):
        import_sae(tmp_path / "sae", tmp_path / "imported")
    (tmp_path / "sae" / "sae_weights.safetensors").rename(tmp_path / "sae" / "sae.safetensors")
    with pytest.raises(StoreError, match="do not match or are damaged"):
        import_sae(tmp_path / "sae", tmp_path / "imported")


def test_does_not_run_code_in_unfinished_correlations(tmp_path, marker):
    payload = np.empty(1, dtype=object)
    payload[0] = Payload(marker)
    np.savez(tmp_path / "progress.npz", files=payload)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        _Progress(tmp_path / "progress.npz").read()


def png():
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "PNG")
    return file.getvalue()


def test_does_not_run_code_in_an_arrow_extension_type(tmp_path, marker):
    metadata = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(Payload(marker)),
    }
    fields = [pa.field("image", pa.binary(), metadata=metadata), pa.field("caption", pa.string())]
    table = pa.table([[png()] * 3, ["red"] * 3], pa.schema(fields))
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    make_dataset(DatasetSpec(source=str(tmp_path / "a.arrow")), tmp_path / "made")
    assert len(Data(tmp_path / "made")) == 3


@pytest.mark.parametrize("name", ["data.npy", "data.pkl", "data.pickle", "data.pt"])
def test_does_not_read_pickled_data(tmp_path, marker, name):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / name).write_bytes(pickle.dumps(Payload(marker)))
    with pytest.raises(DatasetError, match="cannot read"):
        make_dataset(DatasetSpec(source=str(folder / name)), tmp_path / "made")
    with pytest.raises(DatasetError, match="no file that can be read"):
        make_dataset(DatasetSpec(source=str(folder)), tmp_path / "made")


def test_does_not_run_a_data_sets_script(tmp_path, marker):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "folder.py").write_text(f"from pathlib import Path\nPath({str(marker)!r}).touch()\n")
    with pytest.raises(DatasetError, match="no file that can be read"):
        make_dataset(DatasetSpec(source=str(folder)), tmp_path / "made")


def test_does_not_read_pickles_in_a_tar(tmp_path, marker):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in (("a.png", png()), ("a.pyd", pickle.dumps(Payload(marker)))):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    with pytest.raises(DatasetError, match="unusable"):
        make_dataset(DatasetSpec(source=str(tmp_path / "a.tar"), image="png", caption="pyd"), tmp_path / "made")


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_ignores_links_and_devices_in_a_tar(tmp_path, kind):
    secret = tmp_path / "secret.png"
    secret.write_bytes(png())
    source = tmp_path / "set" / "a.tar"
    source.parent.mkdir()
    with tarfile.open(source, "w") as tar:
        kept = [(f"{name}.{suffix}", text) for name in ("a", "b") for suffix, text in (("png", png()), ("txt", b"red"))]
        for name, content in [*kept, ("taken.txt", b"red")]:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        special = tarfile.TarInfo("taken.png")
        special.type, special.linkname = kind, str(secret)
        tar.addfile(special)
    before = sorted(tmp_path.rglob("*"))
    spec = DatasetSpec(source=str(source), image="png", caption="txt", id="__key__", max_dropped=0.5, order_seed=1)
    make_dataset(spec, tmp_path / "made" / "data")
    assert Data(tmp_path / "made" / "data").ids() == ["a", "b"]
    assert [path for path in sorted(tmp_path.rglob("*")) if not path.is_relative_to(tmp_path / "made")] == before


def small_study():
    return {
        "study": "small",
        "datasets": {"data": {"source": "us/data"}},
        "encoders": {
            name: {
                "library": "transformers",
                "model": "us/model",
                "modality": "text",
                "kind": "language",
                "layers": 2,
                "width": 8,
                "global_token": "first",
                "seeds": [0, 1],
            }
            for name in ("one", "two", "three")
        },
        "saes": {"tiny": {"k": 4}},
        "analyses": {
            "matrices": {"all": None},
            "layerwise": {"pair": {"pairs": [["two", "three"]]}},
            "sharedness": {"ranked": {"source": "two", "shared_with": ["two@1"], "not_shared_with": ["three"]}},
        },
    }


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """`build_study` with an empty catalog, which is read quickly."""
    catalog = tmp_path_factory.mktemp("catalog")
    for what in ("datasets", "encoders"):
        (catalog / f"{what}.yaml").touch()
    return partial(build_study, origin="config.yaml", catalog=catalog)


def rename(config, where, name):
    """Rename the study, or the only or first entry at a place in it."""
    if where == "study":
        config["study"] = name
        return
    *above, last = where.split(".")
    for key in above:
        config = config[key]
    entries = config[last]
    first = next(iter(entries))
    config[last] = {name: entries.pop(first)} | entries


PLACES = [
    *("study", "datasets", "encoders", "saes", "analyses.matrices", "analyses.layerwise", "analyses.sharedness"),
]
NAMES = [
    *(
        "../x",
        "/x",
        "a/b",
        "..",
        ".",
        ".a",
        "a.",
        "",
        " ",
        "a b",
        "a;b",
        "a&b",
        "a|b",
        "a>b",
        "$(touch x)",
        "`touch x`",
    ),
    *("$HOME", "a'b", 'a"b', "a\\b", "a\nb", "a\n", "a\tb", "a\0b", "-a", "--out", "~", "~a", "*", "a?", "[a]", "{a}"),
    *("a@0", "a__b", "a:b", "a#b", "a%b", "a=b", "é", "ａ", "a\u202eb", "x" * 81),
]


@pytest.mark.parametrize("name", NAMES, ids=[ascii(name)[:20] for name in NAMES])
def test_refuses_names_that_are_paths_or_shell_syntax(build, name):
    for where in PLACES:
        config = small_study()
        rename(config, where, name)
        with pytest.raises(StudyError) as error:
            build(config)
        lines = [line for line in str(error.value).split("config.yaml: ") if line]
        assert any(line.startswith(where) for line in lines), (where, lines)
        assert repr(name) in str(error.value)


@pytest.mark.parametrize("name", ["x" * 80, "CON", "nul", "aux.txt", "0", "a.b-c_d"])
def test_accepts_other_names(build, name):
    for where in PLACES:
        config = small_study()
        rename(config, where, name)
        build(config)


@pytest.mark.parametrize("seed", ["0; touch x", "$(touch x)", "../x", -1, 1.5, "0\n1"])
def test_seeds_must_be_integers(build, seed):
    config = small_study()
    config["encoders"]["one"]["seeds"] = [seed]
    with pytest.raises(StudyError, match=r"encoders\.one\.seeds"):
        build(config)


def test_an_encoder_cannot_have_the_name_of_anothers_provenance_file(build):
    config = small_study()
    rename(config, "encoders", "two.provenance")
    with pytest.raises(StudyError, match=r"encoders\.two\.provenance: .* choose another name"):
        build(config)


def commands(group, *names):
    """Every subcommand, with the names that call it."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, *names, name)
        else:
            yield (*names, name), command


# Options for the outputs of a command; `--tokens`, `--saes` and `--activations` of others are inputs.
WRITTEN = {"out", "agreement"}
WRITTEN_HERE = {("activations",): {"tokens"}, ("join",): {"tokens"}, ("stream",): {"saes", "activations"}}


def test_commands_only_replace_results_of_their_kind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("In the beginning")
    (tmp_path / "letter.docx").write_text("Dear")
    (tmp_path / "link").symlink_to("thesis")
    for suffix in (".csv", ".png", ".json", ".parquet"):
        shutil.copytree("thesis", f"thesis{suffix}")
    places = [*(path.name for path in tmp_path.iterdir()), ".", "/", "letter.docx/new"]
    before, program, tried = contents(tmp_path), typer.main.get_command(app), set()
    for names, command in commands(program):
        for option in command.params:
            if option.name in WRITTEN | WRITTEN_HERE.get(names, set()):
                for place in places:
                    with pytest.raises(OutputError, match=rf"^{re.escape(place)}: .*; (name|choose) "):
                        program.main([*names, option.opts[0], place], standalone_mode=False)
                tried.add(names)
    assert {("dataset",), ("features",), ("similarity",), ("figures", "saes"), ("pages", "index")} < tried
    assert contents(tmp_path) == before
