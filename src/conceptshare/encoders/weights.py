"""Stage `weights`: find or fetch an encoder's files, and record exactly which files a run uses.

Runs on the submitting host, because compute nodes often have no internet. `results/weights/{encoder}.json` holds the
``location`` (a folder, or an open_clip checkpoint file), the hub ``revision`` if there is one, and the size and
SHA-256 of each file. A model that a script writes, or one with random weights, is next to it, in
`results/weights/{encoder}/`.
"""

import difflib
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory
from typing import Any

from conceptshare.config.catalog import ModelSpec, local_path
from conceptshare.io import provenance
from conceptshare.io.errors import EncoderError, HubError
from conceptshare.io.files import MODEL, WEIGHTS, atomic_output
from conceptshare.io.hub import chosen, fetch_files
from conceptshare.io.progress import info

# Files that each library reads from a hub repository, as patterns of `conceptshare.io.hub.chosen`. The same weights in
# other formats, and in subfolders for other libraries, are not fetched.
_CONFIGURATION = {"transformers": "config.json", "open_clip": "open_clip_config.json", "timm": "config.json"}
_WEIGHTS = {
    "transformers": "model.safetensors|model-*.safetensors|pytorch_model.bin|pytorch_model-*.bin",
    "open_clip": "open_clip_model.safetensors|open_clip_pytorch_model.bin",
    "timm": "model.safetensors|pytorch_model.bin",
}
_TOKENIZER_AND_SETTINGS = ["*.json", "*.txt", "*.model"]
_TOKENIZER = "tokenizer.json|*.model|vocab.txt|vocab.json"


@dataclass(frozen=True)
class EncoderFiles:
    """An encoder's files on this machine."""

    location: Path
    """Their folder, or a checkpoint file."""
    files: Sequence[Path]
    revision: str | None = None
    """The commit, if they are from the hub."""


def fetch_weights(spec: ModelSpec, out: Path, check: Callable[[Path], object] | None = None) -> None:
    """Find or fetch the files of ``spec`` and write the record ``out``.

    Args:
        spec: the encoder.
        out: the record.
        check: called with the location of the files before they are recorded; if it raises, no record is written.

    Raises:
        EncoderError: if the files are missing, or the encoder's library cannot read them.
        HubError: if they cannot be fetched; the message names the hub.
    """
    try:
        found = find(spec, made=out.with_suffix(""))
    except HubError as error:
        if spec.model.removeprefix("hf-hub:") in str(error):
            raise
        # A library's name for a model may differ from that of its repository.
        raise HubError(f"{spec.model}: {error}") from error
    if check is not None:
        check(found.location)
    folder = found.location if found.location.is_dir() else found.location.parent
    digests = _digests(found.files)
    here = found.location.is_relative_to(Path.cwd())
    record = {
        "settings": json.loads(spec.model_key()),
        "location": os.path.relpath(found.location) if here else str(found.location),
        "revision": found.revision,
        "files": {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digests[path]}
            for path in found.files
        },
    }
    with atomic_output(out, WEIGHTS) as partial:
        partial.write_text(json.dumps(record, indent=1), encoding="utf-8")
        provenance.record(out)
    size = sum(path.stat().st_size for path in found.files)
    info(f"{spec.model}: {len(found.files)} files, {size:,} bytes at {found.location}")


def check_record(record: Path, spec: ModelSpec) -> None:
    """Make sure that a record is that of an encoder's files.

    Raises:
        EncoderError: if the record is missing, or of another model.
    """
    recorded, wanted = _read(record)["settings"], json.loads(spec.model_key())
    for key in sorted({*recorded, *wanted}):
        if recorded.get(key) != wanted.get(key):
            raise EncoderError(
                f"{record}: records the files of {key}: {recorded.get(key)}, not {wanted.get(key)}; name the encoder's "
                f"own record, or delete this one and run the weights stage again"
            )


def recorded_location(record: Path) -> Path:
    """Return the location in a record, after checking its files by size and SHA-256.

    Raises:
        EncoderError: if the record or a file is missing, a file has changed, or a folder has another file.
    """
    content = _read(record)
    location = Path(content["location"])
    folder = location.parent if location.is_file() else location
    files: dict[Path, Any] = {folder / name: expected for name, expected in content["files"].items()}
    remedy = "delete the record and run the weights stage again"
    for path, expected in files.items():
        if not path.is_file() or path.stat().st_size != expected["bytes"]:
            raise EncoderError(f"{path}: missing, or not the file that {record} records; {remedy}")
    for path, digest in _digests(list(files)).items():
        if digest != files[path]["sha256"]:
            raise EncoderError(f"{path}: not the file that {record} records, its SHA-256 differs; {remedy}")
    # An added file might be read too. The hub's cache may hold files that other tools fetched.
    if location.is_dir() and content["revision"] is None:
        added = [path for path in _files_below(folder) if path not in files]
        if added:
            raise EncoderError(f"{added[0]}: {record} does not record this file; {remedy}")
    return location


def fingerprint(record: Path) -> str:
    """SHA-256 of the names and digests of all files in a record, independent of their location.

    Raises:
        EncoderError: if the record is missing.
    """
    digests = [[name, file["sha256"]] for name, file in sorted(_read(record)["files"].items())]
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def find(spec: ModelSpec, made: Path) -> EncoderFiles:
    """Find the folder or checkpoint of an encoder; fetch it if needed.

    Args:
        spec: the encoder.
        made: the folder of a model that a ``script:`` writes, or of one that is untrained.
    """
    if not spec.untrained:
        return _find(spec, made)
    from conceptshare.encoders.untrained import write_untrained

    with TemporaryDirectory() as temporary:
        base = _find(spec, Path(temporary) / "model")
        settings = chosen((path.relative_to(base.location).as_posix() for path in base.files), _TOKENIZER_AND_SETTINGS)
        with atomic_output(made, MODEL) as partial:
            partial.mkdir()
            write_untrained(spec, base.location, partial)
            for name in settings:
                if not name.endswith(".index.json"):  # of the weights that are not read
                    copyfile(base.location / name, partial / name)
    return EncoderFiles(made, _files_below(made), base.revision)


def _find(spec: ModelSpec, made: Path) -> EncoderFiles:
    """Find the files of an encoder; if it is untrained, a folder with at least its settings and tokenizer."""
    if spec.model.startswith("script:"):
        return _in_folder(spec, _make(spec.model.removeprefix("script:"), made))
    if spec.model.startswith("package:"):
        return _in_folder(spec, _in_package(spec.model.removeprefix("package:")))
    path = Path(spec.model).expanduser() if spec.library == "arrays" else local_path(spec.model)
    if path is not None:
        if not path.is_dir():
            raise EncoderError(f"{spec.model}: no such folder")
        return _in_folder(spec, path)
    if spec.model.startswith("hf-hub:"):
        return _in_hub(spec, spec.model.removeprefix("hf-hub:"))
    if spec.library == "open_clip":
        return _open_clip_model(spec, made)
    if spec.library == "timm" and "/" not in spec.model:
        return _in_hub(spec, _timm_repository(spec.model))
    return _in_hub(spec, spec.model)


def _read(record: Path) -> Any:
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EncoderError(f"{record}: not readable ({error}); delete it and run the weights stage again") from None
    if not isinstance(content, dict) or not {"settings", "location", "files", "revision"} <= content.keys():
        raise EncoderError(f"{record}: not a record of this version's weights stage; run that stage again")
    return content


def _in_folder(spec: ModelSpec, folder: Path) -> EncoderFiles:
    files = _files_below(folder)
    if not files:
        raise EncoderError(f"{spec.model}: {folder} is empty; expected a model's configuration and weights there")
    if spec.library == "open_clip" and (folder / _CONFIGURATION["open_clip"]).is_file():
        _reject_external_tower(spec, _open_clip_text(folder))
    if spec.library == "timm" and (folder / _CONFIGURATION["timm"]).is_file():
        _check_timm(spec.model, folder)
    return EncoderFiles(folder, files)


def _make(script: str, folder: Path) -> Path:
    with atomic_output(folder, MODEL) as partial:
        result = subprocess.run([sys.executable, script, str(partial)], capture_output=True, text=True, check=False)
        if result.returncode != 0 or not partial.is_dir():
            raise EncoderError(f"{script}: failed to write {partial}:\n{(result.stderr or result.stdout).strip()}")
    return folder


def _in_package(place: str) -> Path:
    package, _, rest = place.partition("/")
    try:
        module = importlib.util.find_spec(package)
    except ModuleNotFoundError:  # the parent of a dotted package
        module = None
    if module is None or not module.submodule_search_locations:
        raise EncoderError(f"package:{place}: the Python package {package} is not installed; pip install it")
    folder = Path(module.submodule_search_locations[0]) / rest
    if not folder.is_dir():
        raise EncoderError(f"package:{place}: the package is installed, but has no folder {rest!r}")
    return folder


def _in_hub(spec: ModelSpec, repository: str) -> EncoderFiles:
    """Fetch the files that ``spec.library`` reads from a repository.

    Code in the repository is only fetched if the study sets ``remote_code``.
    """
    needed = [_CONFIGURATION[spec.library]] + [_WEIGHTS[spec.library]] * (not spec.untrained)
    code = ["*.py"] if spec.remote_code else []
    snapshot = fetch_files(repository, "model", spec.revision, [*_TOKENIZER_AND_SETTINGS, *needed, *code])
    for pattern in needed:
        if not chosen(snapshot.files, [pattern]):
            raise EncoderError(
                f"{repository}: has no {pattern.replace('|', ' or ')}, which {spec.library} needs; it has "
                f"{', '.join(snapshot.files)}; name another library or repository"
            )
    if spec.library == "timm":
        _check_timm(repository, snapshot.folder)
    if spec.library == "open_clip":
        text = _open_clip_text(snapshot.folder)
        _reject_external_tower(spec, text)
        if text.get("hf_tokenizer_name") and not chosen(snapshot.files, [_TOKENIZER]):
            info(f"{spec.model}: {repository} has no tokenizer, so only its image encoder can be used")
    return EncoderFiles(snapshot.folder, [snapshot.folder / name for name in snapshot.files], snapshot.folder.name)


def _open_clip_model(spec: ModelSpec, made: Path) -> EncoderFiles:
    """Find a model that open_clip knows by name, with a checkpoint file or the weights of a tag."""
    import open_clip

    if spec.weights is None and not spec.untrained:
        raise EncoderError(f"{spec.model}: no pretrained weights chosen; set weights to a tag or a checkpoint file")
    config = open_clip.get_model_config(spec.model) or {}
    text = config.get("text_cfg", {})
    tags = open_clip.list_pretrained_tags_by_model(spec.model)
    path = None if spec.weights is None or spec.weights in tags else local_path(spec.weights)
    if path is not None:
        if spec.untrained:
            raise EncoderError(
                f"{spec.model}: untrained: true reads no weights, but weights is the checkpoint {spec.weights}; set "
                f"weights: null, or a tag for its preprocessing: {', '.join(tags)}"
            )
        if not path.is_file():
            raise EncoderError(f"{spec.weights}: no such checkpoint file")
        _reject_external_tower(spec, text)
        if text.get("hf_tokenizer_name"):
            raise EncoderError(
                f"{spec.model}: its tokenizer is not in {spec.weights}; set model to a folder with that checkpoint, "
                f"open_clip_config.json, and the files of the tokenizer {text['hf_tokenizer_name']}, or to a hub "
                f"repository that has them, as in model: hf-hub:OWNER/NAME"
            )
        return EncoderFiles(path, [path])
    if not tags and not (spec.untrained and config):
        raise EncoderError(
            f"{spec.model}: open_clip has no weights for a model of that name; check the name, or write a hub id as "
            f"hf-hub:OWNER/NAME"
        )
    if spec.weights not in [*tags, None]:
        raise EncoderError(f"{spec.model}: open_clip has no weights {spec.weights!r}; it has {', '.join(tags)}")
    _reject_external_tower(spec, text)
    if spec.weights is None and text.get("hf_tokenizer_name"):
        raise EncoderError(
            f"{spec.model}: its tokenizer comes with its weights; set weights to one of {', '.join(tags)}"
        )
    tag = open_clip.get_pretrained_cfg(spec.model, spec.weights) if spec.weights is not None else {}
    repository, _, name = tag.get("hf_hub", "").rpartition("/")
    if repository and text.get("hf_tokenizer_name"):
        return _in_hub(spec, repository)  # which also has the tokenizer
    if spec.untrained:
        return _open_clip_settings(config, tag, made)
    return _open_clip_weights(spec, repository, name) if repository else _open_clip_download(spec, tag)


def _open_clip_settings(config: dict[str, Any], tag: dict[str, Any], folder: Path) -> EncoderFiles:
    """Write the configuration of a model that open_clip knows by name, with the settings of a tag, if any."""
    config |= {"quick_gelu": True} if tag.get("quick_gelu") else {}
    preprocessing = {key: tag[key] for key in ("mean", "std", "interpolation", "resize_mode") if key in tag}
    folder.mkdir()
    file = folder / _CONFIGURATION["open_clip"]
    file.write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocessing}), encoding="utf-8")
    return EncoderFiles(folder, [file])


def _configuration(library: str, folder: Path) -> dict[str, Any]:
    path = folder / _CONFIGURATION[library]
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EncoderError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise EncoderError(f"{path}: expected a mapping of keys to values, got {type(content).__name__}")
    return content


def _open_clip_text(folder: Path) -> dict[str, Any]:
    """Settings of a model's text encoder in open_clip's configuration."""
    text: dict[str, Any] = _configuration("open_clip", folder).get("model_cfg", {}).get("text_cfg", {})
    return text


def _check_timm(name: str, folder: Path) -> None:
    if "architecture" not in _configuration("timm", folder):
        raise EncoderError(f"{name}: its config.json is not in timm's format; use another library")


def _reject_external_tower(spec: ModelSpec, text: dict[str, Any]) -> None:
    if text.get("hf_model_name") and not Path(text["hf_model_name"]).is_dir():
        raise EncoderError(
            f"{spec.model}: open_clip would build its text encoder from {text['hf_model_name']}, which it fetches "
            f"when it loads the model, at an unknown revision; use another model"
        )


def _open_clip_weights(spec: ModelSpec, repository: str, name: str) -> EncoderFiles:
    """Fetch the file that open_clip uses for a tag: safetensors if there are any."""
    own = name in ("", "open_clip_pytorch_model.bin")
    wanted = _WEIGHTS["open_clip"] if own else f"{name.rpartition('.')[0]}.safetensors|{name}"
    remedy = f"weights: ./{wanted.partition('|')[0]}"
    snapshot = fetch_files(repository, "model", spec.revision, [wanted], remedy)
    path = snapshot.folder / snapshot.files[0]
    return EncoderFiles(path, [path], snapshot.folder.name)


def _open_clip_download(spec: ModelSpec, tag: dict[str, Any]) -> EncoderFiles:
    import open_clip

    try:
        path = Path(open_clip.download_pretrained(tag))
    except Exception as error:  # the downloader raises many types
        raise EncoderError(
            f"{spec.model}: its weights {spec.weights} cannot be fetched from {tag.get('url')} "
            f"({type(error).__name__}: {error}); check the connection, or set weights to the path of a local copy"
        ) from error
    return EncoderFiles(path, [path])


def _timm_repository(name: str) -> str:
    """Hub repository of a model that timm knows by name and tag."""
    import timm

    known = timm.list_models(pretrained=True, include_tags=True)
    plain = {tagged.partition(".")[0] for tagged in known}
    if name not in known and name not in plain:
        near = difflib.get_close_matches(name, [*known, *plain], n=3) or ["vit_base_patch16_224"]
        raise EncoderError(
            f"{name}: timm has no weights for a model of that name; similar names are {', '.join(near)}; or write "
            f"a hub id as hf-hub:OWNER/NAME"
        )
    repository: str | None = timm.get_pretrained_cfg(name).hf_hub_id
    if repository is None:
        raise EncoderError(f"{name}: timm has no hub repository for its weights; set model to a folder with them")
    return repository


def _files_below(folder: Path) -> list[Path]:
    """Files in a model's folder, except hidden files and Python caches, which no library reads."""
    paths = (path for path in folder.rglob("*") if not path.name.startswith(".") and path.suffix != ".pyc")
    return sorted(path for path in paths if path.is_file())


def _digests(paths: Sequence[Path]) -> dict[Path, str]:
    """SHA-256 of files, computed in threads: hashing releases the GIL."""
    with ThreadPoolExecutor() as pool:
        return dict(zip(paths, pool.map(_sha256, paths), strict=True))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
