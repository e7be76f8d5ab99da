"""Encoders of the open_clip library: one tower of a contrastive image-text model."""

from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor

from conceptshare.catalog import EncoderSpec
from conceptshare.encoders._encoder import Batch, Encoder, Samples, find_blocks


def load_open_clip(spec: EncoderSpec, location: Path, device: torch.device) -> Encoder:
    """Load a tower from a folder in open_clip's own layout, or of a named model with a checkpoint file."""
    if location.is_dir():
        name, pretrained = f"local-dir:{location}", None
    else:
        name, pretrained = spec.model, str(location)
    model: Any
    model, transform = open_clip.create_model_from_pretrained(
        name, pretrained, device=device, force_image_size=spec.image_size, return_transform=True
    )
    model.eval()
    if spec.modality == "image":
        tower = model.visual
        prepare, forward = _images(model, transform)
    else:
        tower = model.text if hasattr(model, "text") else model.transformer
        prepare, forward = _texts(model, open_clip.get_tokenizer(name, context_length=spec.context_length), spec)
    batch_first = next((m.batch_first for m in tower.modules() if hasattr(m, "resblocks")), True)
    return Encoder(spec, device, find_blocks(tower, spec), prepare, forward, batch_first)


def _images(model: Any, transform: Any) -> Any:  # noqa: ANN401 - open_clip has no types
    def prepare(samples: Samples) -> Batch:
        return Batch({"image": torch.stack([transform(sample) for sample in samples])}, mask=None, eot=None)

    def forward(inputs: dict[str, Tensor]) -> object:
        return model.encode_image(inputs["image"])

    return prepare, forward


def _texts(model: Any, tokenizer: Any, spec: EncoderSpec) -> Any:  # noqa: ANN401 - open_clip has no types
    settings = model.text if hasattr(model, "text") else model

    def prepare(samples: Samples) -> Batch:
        ids = tokenizer(list(samples))
        eot = _end_of_text(ids, settings)
        # A causal tower never looks past the end of text, and pads with a token that also stands for itself.
        causal = spec.global_token == "eot"
        mask = torch.arange(ids.shape[1]) <= eot[:, None] if causal else ids != getattr(settings, "pad_id", 0)
        return Batch({"text": ids}, mask, eot)

    def forward(inputs: dict[str, Tensor]) -> object:
        return model.encode_text(inputs["text"])

    return prepare, forward


def _end_of_text(ids: Tensor, settings: Any) -> Tensor:  # noqa: ANN401 - open_clip has no types
    """``[B]`` positions that open_clip's own pooling reads: the end-of-text id, by default the highest of all."""
    pool = getattr(settings, "text_pool_type", getattr(settings, "pool_type", "argmax"))
    if pool == "eos":
        end: int = getattr(settings, "text_eos_id", getattr(settings, "eos_id", 0))
        return torch.eq(ids, end).int().argmax(1)
    return ids.argmax(1)
