"""Encoders of the transformers library: a folder with configuration, weights, and a tokenizer or image processor."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from conceptshare.catalog import EncoderSpec
from conceptshare.encoders._encoder import Batch, Encoder, Samples, find_blocks
from conceptshare.errors import EncoderError

# Longest text where neither the study, the tokenizer nor the model sets a bound.
_LONGEST_TEXT = 512


def load_transformers(spec: EncoderSpec, folder: Path, device: torch.device) -> Encoder:
    """Load the encoder in ``folder``; of a model with two towers, the one that reads ``spec.modality``."""
    model: Any
    model, found = AutoModel.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    tower: nn.Module = getattr(model, "vision_model" if spec.modality == "image" else "text_model", model)
    tower = tower.eval().to(device)
    prepare = _prepare_images(spec, folder) if spec.modality == "image" else _prepare_texts(spec, folder, tower)
    resized = spec.image_size is not None and "interpolate_pos_encoding" in inspect.signature(tower.forward).parameters
    options = {"interpolate_pos_encoding": True} if resized else {}

    def forward(inputs: dict[str, Tensor]) -> object:
        return tower(**inputs, **options)

    blocks = find_blocks(tower, spec)
    _check_blocks(spec, model, blocks, set(found["missing_keys"]))
    return Encoder(spec, device, blocks, prepare, forward)


def _check_blocks(spec: EncoderSpec, model: nn.Module, blocks: Sequence[nn.Module], missing: set[str]) -> None:
    """Refuse blocks that the checkpoint has no weights for, which transformers fills with random ones."""
    needed = {parameter for block in blocks for parameter in block.parameters()}
    lacking = [name for name, parameter in model.named_parameters() if name in missing and parameter in needed]
    if lacking:
        raise EncoderError(
            f"{spec.model}: its weights lack {lacking[0]} and {len(lacking) - 1} more of its blocks; "
            f"use weights that its config.json describes"
        )


def _prepare_images(spec: EncoderSpec, folder: Path) -> Any:
    processor: Any = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    sizes = {} if spec.image_size is None else _sizes(processor, spec.image_size)

    def prepare(samples: Samples) -> Batch:
        pixels = processor(images=list(samples), return_tensors="pt", **sizes)["pixel_values"]
        return Batch({"pixel_values": pixels}, mask=None, eot=None)

    return prepare


def _sizes(processor: Any, side: int) -> dict[str, dict[str, int]]:
    """Sizes for pictures of another side, in the processor's own proportion of resized to cropped."""
    square = {"height": side, "width": side}
    edge, cropped = processor.size.get("shortest_edge"), getattr(processor, "do_center_crop", False)
    if edge is None:
        return {"size": square} | ({"crop_size": square} if cropped else {})
    if not cropped:
        return {"size": {"shortest_edge": side}}
    return {"size": {"shortest_edge": round(edge * side / processor.crop_size["height"])}, "crop_size": square}


def _prepare_texts(spec: EncoderSpec, folder: Path, tower: Any) -> Any:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    files = {"tokenizer.json", *tokenizer.vocab_files_names.values()}
    if tokenizer.vocab_files_names and not any((folder / name).is_file() for name in files):
        # transformers would go on without a vocabulary, and read every caption as unknown words.
        raise EncoderError(f"{spec.model}: no tokenizer in {folder}; put {' or '.join(sorted(files))} there")
    positions = getattr(tower.config, "max_position_embeddings", _LONGEST_TEXT)
    length = spec.context_length or min(tokenizer.model_max_length, positions, _LONGEST_TEXT)
    # The last of all positions, padding included, is the global token of models that always see full padding.
    padding = "max_length" if spec.global_token == "last" else "longest"

    def prepare(samples: Samples) -> Batch:
        encoded = tokenizer(
            list(samples),
            padding=padding,
            truncation=True,
            max_length=length,
            return_attention_mask=True,
            return_tensors="pt",
        )
        mask = encoded["attention_mask"].bool()
        eot = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
        # Tokenizers say what their models take; those of SigLIP name no mask, because SigLIP sees its padding.
        return Batch({name: encoded[name] for name in tokenizer.model_input_names if name in encoded}, mask, eot)

    return prepare
