"""One way in for every library."""

from pathlib import Path
from tempfile import mkdtemp

import torch

from conceptshare.catalog import EncoderSpec
from conceptshare.encoders._encoder import Encoder
from conceptshare.errors import EncoderError
from conceptshare.weights import locate, recorded_location


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
        # Only the library that is needed: each takes a second and hundreds of megabytes to import.
        if spec.library == "open_clip":
            from conceptshare.encoders._open_clip import load_open_clip

            return load_open_clip(spec, location, device)
        from conceptshare.encoders._transformers import load_transformers

        return load_transformers(spec, location, device)
    except EncoderError:
        raise
    except Exception as error:  # the libraries raise whatever their formats raise
        raise EncoderError(f"{spec.model}: {spec.library} cannot load {location}: {error}") from error
