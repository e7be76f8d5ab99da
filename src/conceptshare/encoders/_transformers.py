"""Encoders of the transformers library: a folder with configuration, weights, and a tokenizer or image processor."""

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.data import create_transform
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from conceptshare.catalog import EncoderSpec
from conceptshare.encoders._encoder import Batch, Encoder, Samples, find_blocks
from conceptshare.encoders._selective_scan import supply_selective_scan
from conceptshare.errors import EncoderError

# Longest text where neither the study, the tokenizer nor the model sets a bound.
_LONGEST_TEXT = 512
# Side of pictures where neither the study nor a preprocessor_config.json says.
_IMAGE_SIZE = 224


def load_transformers(spec: EncoderSpec, folder: Path, device: torch.device) -> Encoder:
    """Load the encoder in ``folder``; of a model with two towers, the one that reads ``spec.modality``."""
    model, missing = _own_code(spec, folder) if spec.remote_code else _library_code(spec, folder)
    tower: Any = getattr(model, "vision_model" if spec.modality == "image" else "text_model", model)
    tower = tower.eval().to(device)
    if spec.modality == "image":
        prepare = _prepare_images(spec, folder, model.config)
    else:
        prepare = _prepare_texts(spec, folder, tower)
    resized = spec.image_size is not None and "interpolate_pos_encoding" in inspect.signature(tower.forward).parameters
    options = {"interpolate_pos_encoding": True} if resized else {}

    def forward(inputs: dict[str, Tensor]) -> object:
        if spec.modality == "image":
            # Model code of its own calls its one input as it likes.
            return tower(inputs["pixel_values"], **options)
        return tower(**inputs)

    blocks = find_blocks(tower, spec)
    _check_blocks(spec, model, blocks, missing)
    return Encoder(spec, device, blocks, prepare, forward)


def _library_code(spec: EncoderSpec, folder: Path) -> tuple[Any, set[str]]:
    """The model by transformers' own class, and the names of parameters that its files lack."""
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "AutoModel" in settings.get("auto_map", {}) and settings.get("model_type") not in CONFIG_MAPPING:
        raise EncoderError(
            f"{spec.model}: it comes with Python code of its own; read that code, and set remote_code: true to run it"
        )
    model, found = AutoModel.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, output_loading_info=True
    )
    return model, set(found["missing_keys"])


def _own_code(spec: EncoderSpec, folder: Path) -> tuple[Any, set[str]]:
    """The model by the code that comes with it, built and filled plainly, as transformers of any age allow.

    What transformers' from_pretrained asks of a class has changed since such code was published: MambaVision's neither
    calls post_init nor can be built without storage.
    """
    supply_selective_scan()
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=True)
    reference = getattr(config, "auto_map", {}).get("AutoModel")
    if reference is None:
        raise EncoderError(f"{spec.model}: its config.json names no class for AutoModel; leave remote_code out")
    model: Any = get_class_from_dynamic_module(reference, str(folder), local_files_only=True)(config)
    files = sorted(folder.glob("*.safetensors"))
    parts = [load_file(file) for file in files] or [
        torch.load(file, map_location="cpu", weights_only=True) for file in sorted(folder.glob("pytorch_model*.bin"))
    ]
    found = model.load_state_dict({name: x for part in parts for name, x in part.items()}, strict=False)
    return model.float(), set(found.missing_keys)


def _check_blocks(spec: EncoderSpec, model: nn.Module, blocks: Sequence[nn.Module], missing: set[str]) -> None:
    """Refuse blocks that the checkpoint has no weights for, which transformers fills with random ones."""
    needed = {parameter for block in blocks for parameter in block.parameters()}
    lacking = [name for name, parameter in model.named_parameters() if name in missing and parameter in needed]
    if lacking:
        raise EncoderError(
            f"{spec.model}: its weights lack {lacking[0]} and {len(lacking) - 1} more of its blocks; "
            f"use weights that its config.json describes"
        )


def _prepare_images(spec: EncoderSpec, folder: Path, config: Any) -> Any:
    if not (folder / "preprocessor_config.json").is_file() and hasattr(config, "crop_pct"):
        return _prepare_images_as_timm(spec, config)
    processor: Any = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    sizes = {} if spec.image_size is None else _sizes(processor, spec.image_size)

    def prepare(samples: Samples) -> Batch:
        pixels = processor(images=list(samples), return_tensors="pt", **sizes)["pixel_values"]
        return Batch({"pixel_values": pixels}, mask=None, eot=None)

    return prepare


def _prepare_images_as_timm(spec: EncoderSpec, config: Any) -> Any:
    """For models whose configuration holds what timm's transform takes, such as MambaVision's."""
    transform: Any = create_transform(
        input_size=(3, spec.image_size or _IMAGE_SIZE, spec.image_size or _IMAGE_SIZE),
        is_training=False,
        mean=config.mean,
        std=config.std,
        crop_mode=config.crop_mode,
        crop_pct=config.crop_pct,
        interpolation="bicubic",
    )

    def prepare(samples: Samples) -> Batch:
        pixels = torch.stack([transform(sample) for sample in samples])
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
