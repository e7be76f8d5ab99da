"""Encoders of the timm library: a folder with config.json and weights in timm's hub format."""

from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_transform, resolve_data_config
from torch import Tensor

from conceptshare.config.catalog import EncoderSpec
from conceptshare.encoders._encoder import Encoder, find_blocks, has_class_token, preparing_images


def load_timm(spec: EncoderSpec, folder: Path, device: torch.device) -> Encoder:
    """Load the image encoder in ``folder``, with the image transform of its configuration."""
    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True)
    seen: dict[str, Any] = {}
    own = resolve_data_config(seen, model=model)["input_size"]
    if spec.image_size is not None and own[1:] != (spec.image_size, spec.image_size):
        seen["input_size"] = (3, spec.image_size, spec.image_size)
        # Models without this method accept images of any size.
        if hasattr(model, "set_input_size"):
            model.set_input_size(seen["input_size"][1:])
    prepare = preparing_images(create_transform(**resolve_data_config(seen, model=model), is_training=False), spec)
    model = model.eval().to(device)

    def forward(inputs: dict[str, Tensor]) -> object:
        return model.forward_features(inputs["pixel_values"])

    blocks = find_blocks(model, spec)
    return Encoder(spec, device, blocks, prepare, forward, class_token=has_class_token(model))
