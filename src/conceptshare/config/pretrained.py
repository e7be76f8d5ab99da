"""SAEs of other libraries: where they are, and whether they fit an encoder, by their settings and without torch.

`conceptshare.sae.exchange` reads their weights.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from conceptshare.config.catalog import is_path
from conceptshare.io.errors import StoreError, reading

SAE_LENS, SPARSIFY, SAEV = "sae_weights.safetensors", "sae.safetensors", "sae.pt"
"""Files with the weights of an SAE of SAELens, sparsify or saev; `cfg.json` next to the first two has the settings."""

_LIBRARIES = {SAE_LENS: "SAELens", SPARSIFY: "sparsify", SAEV: "saev"}
_AGAIN = "; fetch or save the folder again"
_HUB_ID = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[^:]+))?(:(?P<place>.+))?")

BATCH_TOPK = ("batchtopk", "matryoshka_batchtopk")
"""Architectures of SAELens in training, whose SAEs are JumpReLU at inference."""
# Architectures of SAELens that are read; `standard` is ReLU.
_ARCHITECTURES = ("topk", "jumprelu", "standard")
# SAELens's defaults of keys, with which its weights mean the same as ours.
_SAE_LENS_MEANING: dict[str, Any] = {
    "apply_b_dec_to_input": True,
    "rescale_acts_by_decoder_norm": False,
    "normalize_activations": "none",
    "reshape_activations": "none",
    "activation_fn_kwargs": None,  # of versions before 6, where the architecture does not set the activation
}
# Those of sparsify. Older versions have `signed`.
_SPARSIFY_MEANING = {"activation": "topk", "transcode": False, "skip_connection": False, "signed": False}
# With older schemas, some versions of saev subtract b_dec from the input, and others do not.
_SAEV_SCHEMAS = (3, 4, 5)
_SAEV_ACTIVATIONS = ("TopK", "BatchTopK", "Relu")
_MAX_HEADER_BYTES = 2**20

# Hooks and modules that give the residual stream after block N, those that give it before, and others.
_AFTER = re.compile(r"layer (\d+)|blocks\.(\d+)\.hook_resid_post|(?:.+\.)?(?:layers?|h|blocks?|resblocks)\.(\d+)")
_BEFORE = re.compile(r"blocks\.(\d+)\.hook_resid_pre")
_ELSEWHERE = re.compile(r"hook_|\.\d+\.|^embed")


class Source(NamedTuple):
    """An SAE's folder, or saev's file, on this machine or in a repository of a hub."""

    place: str
    """Its path; in a repository, empty for the repository itself."""
    repository: str | None = None
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Source":
        """Read a path, or a hub id ``OWNER/NAME`` with or without ``@REVISION`` and ``:FOLDER``.

        Raises:
            StoreError: if it is neither.
        """
        if is_path(text):
            return cls(text)
        if (match := _HUB_ID.fullmatch(text)) is None:
            raise StoreError(f"{text!r} is neither a path nor a hub id such as OWNER/NAME:FOLDER")
        return cls((match["place"] or "").strip("/"), match["repository"], match["revision"])

    def patterns(self) -> list[str]:
        """Its files in the repository, as patterns of `conceptshare.io.hub.chosen`."""
        if self.place.endswith(".pt"):
            return [self.place]
        start = f"{self.place}/" if self.place else ""
        return [f"{start}cfg.json", "|".join(start + name for name in _LIBRARIES)]


def filled(text: str, layer: int, seed: int) -> str:
    """Replace ``{layer}``, ``{layer:02d}`` and ``{seed}`` in a source by numbers.

    Raises:
        ValueError: if anything else is in braces.
    """
    try:
        return text.format(layer=layer, seed=seed)
    except (LookupError, ValueError, AttributeError):
        raise ValueError(f"{text!r}: braces can hold layer, layer:02d and seed; correct them") from None


class ForeignSAE(NamedTuple):
    """Settings of an SAE of another library."""

    library: str
    """`SAE_LENS`, `SPARSIFY` or `SAEV`."""
    weights: Path
    """The file with its weights."""
    config: dict[str, Any]
    """Its settings, as the library writes them."""
    width: int
    """D."""
    latents: int
    """F."""
    model_name: str = "unknown"
    hook_name: str = "unknown"
    """The hook or module whose output it reads."""


def read_foreign(place: Path) -> ForeignSAE:
    """Read the settings of the SAE in a folder, or in a file of saev.

    Raises:
        StoreError: if there is no SAE, or one that computes what `conceptshare.sae.SAE` cannot.
    """
    if not place.exists():
        raise StoreError(f"{place}: no such folder or file; paths are relative to the working directory")
    files = [place] if place.suffix == ".pt" else [place / name for name in _LIBRARIES]
    weights = next((file for file in files if file.is_file()), None)
    if weights is None:
        names = ", ".join(f"{name} ({library})" for name, library in _LIBRARIES.items())
        raise StoreError(f"{place}: contains none of {names}; name the folder of one SAE")
    if weights.suffix == ".pt":
        with reading(StoreError, f"{weights}: not a file of saev, or damaged", _AGAIN):
            return _of_saev(weights)
    with reading(StoreError, f"{place}: cfg.json and {weights.name} do not match or are damaged", _AGAIN):
        config = json.loads((weights.parent / "cfg.json").read_text(encoding="utf-8"))
        return (_of_sparsify if weights.name == SPARSIFY else _of_sae_lens)(weights, config)


def check_fit(place: Path, sae: ForeignSAE, width: int, layer: int) -> None:
    """Make sure that an SAE reads an encoder's residual stream after a block, as far as its settings say.

    Args:
        place: the SAE, for messages.
        sae: its settings.
        width: D of the encoder.
        layer: the block, from 0.

    Raises:
        StoreError: if it has another width, or is of another layer or of something else.
    """
    if sae.width != width:
        raise StoreError(
            f"{place}: an SAE of width {sae.width}, but the encoder has width {width}; name an SAE of this encoder"
        )
    if match := _AFTER.fullmatch(sae.hook_name):
        found = int(next(filter(None, match.groups())))
    elif match := _BEFORE.fullmatch(sae.hook_name):
        found = int(match[1]) - 1
    elif _ELSEWHERE.search(sae.hook_name):
        raise StoreError(
            f"{place}: an SAE of {sae.hook_name}, which is not the residual stream after a block; name one of that"
        )
    else:
        return
    if found != layer:
        raise StoreError(
            f"{place}: an SAE of {sae.hook_name}, which is layer {found} and not {layer}, counted from 0; name it for "
            f"that layer"
        )


def other_meaning(config: dict[str, Any]) -> dict[str, Any]:
    """The keys of SAELens's `cfg.json` with which its weights have another meaning than ours."""
    settings = _SAE_LENS_MEANING | config
    architecture = config.get("architecture")
    other = {} if architecture in _ARCHITECTURES else {"architecture": architecture}
    return other | {key: settings[key] for key, expected in _SAE_LENS_MEANING.items() if settings[key] != expected}


def _of_sae_lens(weights: Path, config: dict[str, Any]) -> ForeignSAE:
    if "activation_fn_kwargs" in config:
        raise StoreError(
            f"{weights.parent}: cfg.json is from SAELens before version 6; load it with a newer version "
            "(SAE.load_from_disk) and save it again (save_model)"
        )
    architecture = "jumprelu" if config.get("architecture") in BATCH_TOPK else config.get("architecture")
    other = other_meaning({**config, "architecture": architecture})
    for folded in ("apply_b_dec_to_input", "rescale_acts_by_decoder_norm"):
        other.pop(folded, None)
    _reject(weights.parent, other, "SAELens's TopK, JumpReLU and standard SAEs on unnormalised activations")
    metadata = config.get("metadata", {})
    names = {key: metadata.get(key) or "unknown" for key in ("model_name", "hook_name")}
    return ForeignSAE(SAE_LENS, weights, config, config["d_in"], config["d_sae"], **names)


def _of_sparsify(weights: Path, config: dict[str, Any]) -> ForeignSAE:
    settings = _SPARSIFY_MEANING | config
    other = {key: settings[key] for key, expected in _SPARSIFY_MEANING.items() if settings[key] != expected}
    _reject(weights.parent, other, "sparsify's TopK SAEs, without transcoding, skips, groups or signs,")
    # sparsify names a folder after the module that its SAE was trained on.
    hook = config.get("hook_name", weights.parent.resolve().name)
    width = config["d_in"]
    latents = config["num_latents"] or config["expansion_factor"] * width
    return ForeignSAE(SPARSIFY, weights, config, width, latents, config.get("model_name", "unknown"), hook)


def _of_saev(weights: Path) -> ForeignSAE:
    with weights.open("rb") as file:
        header = json.loads(file.readline(_MAX_HEADER_BYTES))
    if header.get("schema") not in _SAEV_SCHEMAS:
        raise StoreError(
            f"{weights}: its schema {header.get('schema')} is not supported; load it with a newer version of saev "
            "(saev.nn.load) and save it again (saev.nn.dump)"
        )
    config = header["cfg"]
    if config["activation"]["cls"] not in _SAEV_ACTIVATIONS:
        _reject(weights, {"activation": config["activation"]["cls"]}, f"saev's {', '.join(_SAEV_ACTIVATIONS)} SAEs")
    width = config["d_model"]
    return ForeignSAE(SAEV, weights, config, width, config.get("d_sae") or config["exp_factor"] * width)


def _reject(place: Path, other: dict[str, Any], importable: str) -> None:
    if other:
        settings = ", ".join(f"{key} = {value!r}" for key, value in other.items())
        raise StoreError(f"{place}: {settings} is not supported; only {importable} can be imported")
