"""Loading of encoders from all supported libraries."""

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_parameter_registration_hook

from conceptshare.config.catalog import EncoderSpec, ModelSpec
from conceptshare.data.dataset import Data
from conceptshare.device import default_device
from conceptshare.encoders._arrays import Arrays
from conceptshare.encoders._encoder import Encoder, check_reading, in_one_line
from conceptshare.encoders.weights import check_record, find, fingerprint, recorded_location
from conceptshare.io.errors import ConceptshareError, EncoderError
from conceptshare.io.progress import info, warn

# Far more than any published model has, by the end of the key's name.
_MAX_COUNTS = {"layers?|depths?|blocks?": 10_000, "num_labels": 1_000_000}
_FITTING = "use the configuration that belongs to its weights"


def load_encoder(spec: EncoderSpec, weights: Path | None = None) -> Encoder:
    """Load an encoder, in evaluation mode, on the GPU if there is one.

    Args:
        spec: the encoder.
        weights: the record of the `weights` stage. Without it, the files are located or fetched.

    Raises:
        DeviceError: if the requested GPU cannot be used.
        EncoderError: if its files are missing, cannot be loaded, or do not match ``spec``.
    """
    if weights:
        check_record(weights, spec)
    location = recorded_location(weights) if weights else find(spec, made=Path(mkdtemp()) / "model").location
    encoder = load_at(spec, location)
    return replace(encoder, fingerprint=fingerprint(weights)) if weights else encoder


def load_source(spec: EncoderSpec, weights: Path, data: Data) -> Encoder | Arrays:
    """Load an encoder, or the arrays in its place, from the record of the `weights` stage.

    Args:
        spec: the encoder.
        weights: the record.
        data: the samples, whose ids those of arrays must be.

    Raises:
        DeviceError, EncoderError: as in `load_encoder` and `Arrays`.
    """
    if spec.library != "arrays":
        return load_encoder(spec, weights)
    check_record(weights, spec)
    return Arrays(spec, recorded_location(weights), data, fingerprint(weights))


def try_encoder(spec: EncoderSpec, location: Path, data: Data | None = None) -> None:
    """Load an encoder, check that it encodes two samples as its entry describes, and report the outcome.

    An encoder that may exceed this machine's free memory is not loaded, which is reported too. Arrays are read as a
    whole.

    Args:
        spec: the encoder.
        location: its folder or checkpoint.
        data: the samples, if they are known, whose ids those of arrays must be.

    Raises:
        EncoderError: as in `load_encoder` and `Arrays`.
        NumericsError: if an array has a value that cannot be stored.
    """
    if spec.library == "arrays":
        arrays = Arrays(spec, location, data)
        arrays.check_values()
        checked = "" if data else "; their ids are checked when the data set is made"
        info(
            f"{spec.model}: {len(arrays):,} samples, {len(spec.layer_numbers())} layers of width {spec.width}{checked}"
        )
        return
    # 16-bit weights take twice their size when loaded as float32, and the library needs memory too.
    needed, free = 2**30 + 2 * sum(path.stat().st_size for path in _files_of(location)), free_memory()
    if needed > free:
        warn(
            f"{spec.model}: not loaded for a test, because it may need {needed / 2**30:.1f} GiB of memory and "
            f"{free / 2**30:.1f} GiB are free; run conceptshare check --load on a machine with more"
        )
        return
    info(f"{spec.model}: loading it to test it on two {spec.modality}s")
    started = time.monotonic()
    load_at(spec, location)
    layers = len(spec.layer_numbers())
    info(f"{spec.model}: it works: {layers} layers of width {spec.width} ({time.monotonic() - started:.1f} s)")


def free_memory() -> int:
    """Available memory in bytes on Linux; elsewhere the total memory."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _files_of(location: Path) -> list[Path]:
    return [path for path in location.rglob("*") if path.is_file()] if location.is_dir() else [location]


def load_at(spec: EncoderSpec, location: Path) -> Encoder:
    """Load an encoder from its folder or checkpoint, and test it on two samples, see `check_reading`.

    Raises:
        EncoderError: as in `load_encoder`.
    """
    device = default_device()
    try:
        with _limit_size(spec, location):
            encoder = _load(spec, location, device)
        check_reading(encoder)
    except ConceptshareError:
        raise
    except Exception as error:  # the libraries raise many types
        raise EncoderError(
            f"{spec.model}: {spec.library} cannot load {location} ({type(error).__name__}: {in_one_line(error)}); "
            f"check its library, modality and image_size, and that its files are complete"
        ) from error
    return encoder


@contextmanager
def _limit_size(spec: EncoderSpec, location: Path) -> Iterator[None]:
    """Reject a configuration that describes a far larger model than its weights, before the model is fully built."""
    if location.is_file():  # the checkpoint of a model that its library knows by name
        yield
        return
    # Weights take at least one byte each, and some parameters are in no file, such as tied ones or heads.
    most = 2**24 + 8 * sum(path.stat().st_size for path in _files_of(location))
    with limit_parameters(
        spec, location, most, f"its configuration describes a far larger model than its weights; {_FITTING}"
    ):
        yield


@contextmanager
def limit_parameters(spec: ModelSpec, folder: Path, most: int, fault: str) -> Iterator[None]:
    """Stop building a model from the configuration in ``folder`` once it has more parameters than ``most``.

    Raises:
        EncoderError: with the message ``fault``.
    """
    for path in _files_of(folder):
        if path.name in ("config.json", "open_clip_config.json"):
            for name, count in _excessive_counts(json.loads(path.read_text(encoding="utf-8"))):
                raise EncoderError(f"{path}: {name}: {count} is more than any model has; {_FITTING}")
    built = 0

    def count_parameters(_module: object, _name: str, parameter: Tensor | None) -> None:
        nonlocal built
        built += 0 if parameter is None else parameter.numel()
        if built > most:
            raise EncoderError(f"{spec.model}: {fault}")

    hook = register_module_parameter_registration_hook(count_parameters)
    try:
        yield
    finally:
        hook.remove()


def _excessive_counts(settings: Any) -> Iterator[tuple[str, int]]:
    """Yield the keys and values of a configuration that exceed `_MAX_COUNTS`, at any depth."""
    for name, value in settings.items() if isinstance(settings, dict) else ():
        most = next((n for end, n in _MAX_COUNTS.items() if re.search(f"({end})$", str(name))), None)
        counts = value if isinstance(value, list) else [value]
        yield from ((name, count) for count in counts if most is not None and isinstance(count, int) and count > most)
        yield from _excessive_counts(value)


def _load(spec: EncoderSpec, location: Path, device: torch.device) -> Encoder:
    # Import only the required library: each takes a second and hundreds of megabytes.
    match spec.library:
        case "arrays":
            raise EncoderError(f"{spec.model}: arrays cannot read samples; name an encoder of a library")
        case "open_clip":
            from conceptshare.encoders._open_clip import load_open_clip

            return load_open_clip(spec, location, device)
        case "timm":
            from conceptshare.encoders._timm import load_timm

            return load_timm(spec, location, device)
        case "transformers":
            from conceptshare.encoders._transformers import load_transformers

            return load_transformers(spec, location, device)
