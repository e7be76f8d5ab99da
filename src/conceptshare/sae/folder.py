"""Metadata of an SAE's folder, read without torch so that `conceptshare sae info` starts quickly."""

import json
import math
import textwrap
from pathlib import Path
from typing import Any

from conceptshare.config.pretrained import other_meaning
from conceptshare.io.errors import StoreError
from conceptshare.io.layout import sae_place
from conceptshare.io.seals import MANIFEST, read_manifest, recorded_file

REMEDY = "delete it (for streamed SAEs, the folder of all the encoder's SAEs) and run the sae stage again"
"""Remedy for a damaged SAE folder."""
ELSEWHERE = "name a folder that the sae stage or `conceptshare sae import` wrote"
"""Remedy for a folder without an SAE."""

_KEY, _STAGE = "spec", "sae"

_QUALITY = {
    "tokens": ("tokens", ",d"),
    "fvu": ("FVU", ".4f"),
    "explained_variance": ("explained variance", ".4f"),
    "cosine": ("cosine", ".4f"),
    "l2_ratio": ("L2 ratio", ".4f"),
    "l0": ("L0", ".1f"),
    "dead": ("dead latents", ".1%"),
}
_LABEL, _COLUMN, _LINE = 20, 16, 100


def sae_of(saes: Path, layer: int, seed: int) -> tuple[Path, dict[str, Any]]:
    """Find the folder of an encoder's SAE by layer and seed, and read its record.

    The record holds its ``spec``, the fingerprints of its ``files``, and the ``digest``. The spec holds ``layer``,
    ``seed``, ``settings`` and ``made_from``, the spec of the activations that it was trained on; it is empty for an
    imported SAE.

    Args:
        saes: the folder with `layer-NN/seed-S/` for each layer and seed.
        layer: the layer.
        seed: S.

    Raises:
        StoreError: if there is no record, it was changed, or it is of another layer or seed.
    """
    folder = saes / sae_place(layer, seed)
    record = read_manifest(
        folder, _KEY, _STAGE, f"{REMEDY}, or import an SAE of another library with `conceptshare sae import`"
    )
    for key, wanted in (("layer", layer), ("seed", seed)):
        recorded = record["spec"].get(key, wanted)
        if recorded != wanted:
            raise StoreError(f"{folder}: an SAE of {key} {recorded}, but one of {key} {wanted} is needed; {REMEDY}")
    return folder, record


def origin_of(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the record of a folder that `import_sae` wrote, and in it, the source of the SAE with its commit and hashes.

    Raises:
        StoreError: if it is not such a folder, or its record was changed.
    """
    record = read_manifest(folder, _KEY, _STAGE, "delete it and import the SAE again")
    if "imported_from" not in record["spec"]:
        raise StoreError(f"{folder}: not an imported SAE; name a folder that `conceptshare sae import` wrote")
    return record, record["spec"]["imported_from"]


def sae_file(folder: Path, name: str, record: dict[str, Any] | None = None) -> Path:
    """Path of an SAE's file, checked against a record, by default the folder's own if it has one.

    Raises:
        StoreError: if the file does not match the record.
    """
    if record is None:
        if not (folder / MANIFEST).exists():
            return folder / name
        record = read_manifest(folder, _KEY, _STAGE, REMEDY)
    return recorded_file(folder, name, record, REMEDY)


def fvu_global(folder: Path, record: dict[str, Any]) -> float | None:
    """An SAE's FVU at global tokens; None if it is undefined, or the SAE has no metrics.

    Raises:
        StoreError: if its metrics do not match the record.
    """
    if "metrics.json" not in record["files"]:  # imported from a library that records none
        return None
    metrics = json.loads(sae_file(folder, "metrics.json", record).read_text(encoding="utf-8"))
    fvu = float(metrics["global_tokens"]["fvu"])
    return None if math.isnan(fvu) else fvu


def describe_sae(folder: Path | str) -> str:
    """Describe an SAE, its training and its quality in aligned lines.

    Raises:
        StoreError: if the folder holds no SAE.
    """
    folder = Path(folder)
    try:
        config = json.loads(sae_file(folder, "cfg.json").read_text(encoding="utf-8"))
        lines = _size(folder, config)
        if (folder / "metrics.json").is_file():
            lines += _training(json.loads(sae_file(folder, "metrics.json").read_text(encoding="utf-8")))
        if (folder / "loss.csv").is_file():
            _, *losses = sae_file(folder, "loss.csv").read_text(encoding="utf-8").splitlines()
            lines += [_line("last loss", loss.split(",")[-1]) for loss in losses[-1:]]
    except StoreError:
        raise
    except Exception as error:  # damaged files raise many types
        raise StoreError(f"{folder}: no readable SAE there ({type(error).__name__}: {error}); {ELSEWHERE}") from error
    return "\n".join(lines)


def _size(folder: Path, config: dict[str, Any]) -> list[str]:
    metadata = config.get("metadata", {})
    D, F = config["d_in"], config["d_sae"]
    lines = [
        _line("encoder", metadata.get("model_name", "unknown")),
        _line("layer", str(metadata.get("hook_name", "unknown")).removeprefix("layer ")),
        _line("D", f"{D:,}"),
        _line("F", f"{F:,}"),
        _line("k", f"{config['k']:,}") if "k" in config else _line("architecture", config["architecture"]),
        _line("expansion", f"{F / D:g}"),
        _line("encoder bias", "yes" if _has_encoder_bias(sae_file(folder, "sae_weights.safetensors")) else "no"),
        _line("size on disk", f"{sum(path.stat().st_size for path in folder.iterdir()) / 1e6:,.1f} MB"),
    ]
    if other := other_meaning(config):
        lines.append(_line("to be imported", ", ".join(f"{key}: {value}" for key, value in other.items())))
    return lines


def _has_encoder_bias(weights: Path) -> bool:
    """Whether any encoder bias is not 0, independent of its dtype."""
    with weights.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        start, end = json.loads(file.read(length))["b_enc"]["data_offsets"]
        file.seek(8 + length + start)
        return any(file.read(end - start))


def _training(metrics: dict[str, Any]) -> list[str]:
    settings = ", ".join(f"{key}: {_plain(value)}" for key, value in metrics["settings"].items())
    wrapped = textwrap.wrap(settings.replace(": ", ":\u00a0"), _LINE - _LABEL, break_on_hyphens=False)
    lines = [_line("" if i else "settings", line.replace("\u00a0", " ")) for i, line in enumerate(wrapped)]
    lines.append(_line("steps", f"{metrics['steps']:,}"))
    if metrics["settings"].get("max_norm") is not None:
        lines.append(_line("left out", f"{metrics['outlying']:.2%} of the training tokens"))
    if "measured_on" in metrics:
        lines.append(_line("measured on", metrics["measured_on"]))
    lines.append(_line("", f"{'all tokens':<{_COLUMN}}global tokens"))
    both = metrics["all_tokens"], metrics["global_tokens"]
    for key, (label, form) in _QUALITY.items():
        if key in both[0]:
            values = [format(quality[key], form) for quality in both]
            lines.append(_line(label, f"{values[0]:<{_COLUMN}}{values[1]}"))
    return lines


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _line(label: str, value: str) -> str:
    return f"{label:<{_LABEL}}{value}"
