"""What the folder of an SAE says, read without torch, so that `conceptshare sae info` answers at once."""

import json
import textwrap
from pathlib import Path
from typing import Any

from conceptshare.errors import StoreError

REMEDY = "delete it, or the folder of all the encoder's SAEs where they were streamed, and run the sae stage again"
"""What to do about the folder of an SAE that is damaged."""

# What SAELens's keys must say for the weights to mean what they mean here. But for the first, these are its defaults.
_MEANING: dict[str, Any] = {
    "architecture": "topk",
    "apply_b_dec_to_input": True,
    "rescale_acts_by_decoder_norm": False,
    "normalize_activations": "none",
    "reshape_activations": "none",
}
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


def other_meaning(config: dict[str, Any]) -> dict[str, Any]:
    """The keys of SAELens's `cfg.json` that give the weights another meaning than they have here."""
    said = _MEANING | {"architecture": None} | config
    return {key: said[key] for key, expected in _MEANING.items() if said[key] != expected}


def describe_sae(folder: Path | str) -> str:
    """What an SAE is, how it was trained and how good it is, in aligned lines.

    Raises:
        StoreError: where the folder holds no TopK SAE.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "cfg.json").read_text(encoding="utf-8"))
        lines = _size(folder, config)
        if (folder / "metrics.json").is_file():
            lines += _training(json.loads((folder / "metrics.json").read_text(encoding="utf-8")))
        if (folder / "loss.csv").is_file():
            lines.append(_line("last loss", (folder / "loss.csv").read_text(encoding="utf-8").split(",")[-1].strip()))
    except Exception as error:  # a damaged file fails in as many ways as there are bytes in it
        raise StoreError(
            f"{folder}: no readable SAE there ({type(error).__name__}: {error}); name a folder that the sae stage "
            "or `conceptshare sae import` wrote"
        ) from error
    return "\n".join(lines)


def _size(folder: Path, config: dict[str, Any]) -> list[str]:
    metadata = config.get("metadata", {})
    D, F, k = config["d_in"], config["d_sae"], config["k"]
    lines = [
        _line("encoder", metadata.get("model_name", "unknown")),
        _line("layer", str(metadata.get("hook_name", "unknown")).removeprefix("layer ")),
        _line("D", f"{D:,}"),
        _line("F", f"{F:,}"),
        _line("k", f"{k:,}"),
        _line("expansion", f"{F / D:g}"),
        _line("encoder bias", "yes" if _has_encoder_bias(folder / "sae_weights.safetensors") else "no"),
        _line("size on disk", f"{sum(path.stat().st_size for path in folder.iterdir()) / 1e6:,.1f} MB"),
    ]
    if other := other_meaning(config):
        lines.append(_line("to be imported", ", ".join(f"{key}: {value}" for key, value in other.items())))
    return lines


def _has_encoder_bias(weights: Path) -> bool:
    """Whether any encoder bias is not 0, of whatever type it is."""
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
    if "measured_on" in metrics:
        lines.append(_line("measured on", metrics["measured_on"]))
    lines.append(_line("", f"{'all tokens':<{_COLUMN}}global tokens"))
    both = metrics["all_tokens"], metrics["global_tokens"]
    for key, (label, form) in _QUALITY.items():
        if key in both[0]:
            found = [format(quality[key], form) for quality in both]
            lines.append(_line(label, f"{found[0]:<{_COLUMN}}{found[1]}"))
    return lines


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _line(label: str, value: str) -> str:
    return f"{label:<{_LABEL}}{value}"
