"""One way in for every library."""

from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp

import torch

from conceptshare.catalog import EncoderSpec
from conceptshare.encoders._encoder import Encoder
from conceptshare.errors import EncoderError
from conceptshare.weights import fingerprint, locate, recorded_location


def load_encoder(spec: EncoderSpec, weights: Path | None = None) -> Encoder:
    """Load an encoder, in evaluation mode, on the GPU if there is one.

    Args:
        spec: the encoder.
        weights: the record of the `weights` stage. Without it, the files are found or fetched anew.

    Raises:
        EncoderError: where its files are absent, cannot be loaded, or are not what ``spec`` says.
    """
    location = recorded_location(weights) if weights else locate(spec, made=Path(mkdtemp()) / "model")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        encoder = _load(spec, location, device)
    except EncoderError:
        raise
    except Exception as error:  # the libraries raise whatever their formats raise
        raise EncoderError(f"{spec.model}: {spec.library} cannot load {location}: {error}") from error
    return replace(encoder, fingerprint=fingerprint(weights)) if weights else encoder


def _load(spec: EncoderSpec, location: Path, device: torch.device) -> Encoder:
    # Only the library that is needed: each takes a second and hundreds of megabytes to import.
    match spec.library:
        case "open_clip":
            from conceptshare.encoders._open_clip import load_open_clip

            return load_open_clip(spec, location, device)
        case "timm":
            from conceptshare.encoders._timm import load_timm

            return load_timm(spec, location, device)
        case "transformers":
            from conceptshare.encoders._transformers import load_transformers

            return load_transformers(spec, location, device)
