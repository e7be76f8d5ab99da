"""Encoders of the transformers library: a folder with configuration, weights, and a tokenizer or image processor."""

import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from conceptshare.catalog import EncoderSpec
from conceptshare.device import full_float32
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
    tower = _tower(spec, model).eval().to(device)
    takes = set(inspect.signature(tower.forward).parameters)
    if spec.modality == "image":
        prepare, words = _prepare_images(spec, folder, model.config, takes), None
    else:
        prepare, words = _prepare_texts(spec, folder, tower)
    options = {"interpolate_pos_encoding": True} if spec.image_size and "interpolate_pos_encoding" in takes else {}

    def forward(inputs: dict[str, Tensor], **more: Any) -> Any:
        if spec.modality == "image":
            # Model code of its own calls its first input as it likes.
            others = {name: x for name, x in inputs.items() if name != "pixel_values"}
            return tower(inputs["pixel_values"], **others, **options, **more)
        return tower(**inputs, **more)

    blocks = find_blocks(tower, spec)
    _check_weights(spec, model, tower, blocks, missing)
    encoder = Encoder(spec, device, blocks, prepare, forward, words=words)
    if not spec.remote_code:
        _check_residual_stream(encoder, forward)
    return encoder


def _tower(spec: EncoderSpec, model: Any) -> Any:
    """The part of a model that reads ``spec.modality``."""
    if getattr(model.config, "mask_ratio", 0):
        raise EncoderError(f"{spec.model}: it hides patches by chance while it reads; use a plain ViT with its weights")
    tower = getattr(model, "vision_model" if spec.modality == "image" else "text_model", model)
    writes = tower is model and hasattr(model, "encoder") and hasattr(model, "decoder")
    return model.encoder if writes and spec.modality == "text" else tower


def _check_residual_stream(encoder: Encoder, forward: Callable[..., Any]) -> None:
    """Refuse blocks whose outputs are not among the hidden states that the library itself gives.

    The last layer is left out, because many libraries give it normalised. Where a model gives none, nothing is checked.
    """
    noise = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    samples: Samples = (
        ["a dog", "a cat and a dog on a mat"] if encoder.spec.modality == "text" else [Image.fromarray(noise)]
    )
    batch = encoder.prepare(samples)
    try:
        with torch.inference_mode(), full_float32():
            inputs = {name: value.to(encoder.device) for name, value in batch.inputs.items()}
            states = forward(inputs, output_hidden_states=True).hidden_states
    except Exception:  # a model that does not give its hidden states says so in its own way
        return
    found = replace(encoder, spec=encoder.spec.model_copy(update={"precision": "float32"})).read(batch)
    for layer, x in found.tokens.items():
        known = [state for state in states or [] if isinstance(state, Tensor) and state.numel() == x.numel()]
        if layer == encoder.spec.layers - 1 or not known:
            continue
        if not any(
            torch.allclose(state.float().reshape(x.shape), x, rtol=1e-3, atol=1e-4, equal_nan=True) for state in known
        ):
            raise EncoderError(
                f"{encoder.spec.model}, layer {layer}: what its block gives is none of the model's own hidden states; "
                f"set blocks to the module list whose outputs they are"
            )


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


def _check_weights(
    spec: EncoderSpec, model: nn.Module, tower: nn.Module, blocks: Sequence[nn.Module], missing: set[str]
) -> None:
    """Refuse blocks and embeddings that the checkpoint lacks, which transformers fills with random ones."""
    named = list(model.named_parameters())
    own = set(tower.parameters())
    inner = {parameter for block in blocks for parameter in block.parameters()}
    # Modules are registered in the order in which they run: embeddings, then blocks, then heads, which may lack.
    end = max((n for n, (_, parameter) in enumerate(named) if parameter in inner), default=-1)
    lacking = [
        name
        for name, parameter in named[: end + 1]
        if name in missing and parameter in own and not name.endswith("mask_token")  # of no use outside training
    ]
    if lacking:
        raise EncoderError(
            f"{spec.model}: its weights lack {lacking[0]} and {len(lacking) - 1} more that its blocks need; "
            f"use weights that its config.json describes"
        )


def _prepare_images(spec: EncoderSpec, folder: Path, config: Any, takes: set[str]) -> Any:
    if not (folder / "preprocessor_config.json").is_file() and hasattr(config, "crop_pct"):
        return _prepare_images_as_timm(spec, config)
    processor: Any = AutoImageProcessor.from_pretrained(
        folder, local_files_only=True, trust_remote_code=spec.remote_code
    )
    sizes = {} if spec.image_size is None else _sizes(processor, spec.image_size)

    def prepare(samples: Samples) -> Batch:
        made = processor(images=list(samples), return_tensors="pt", **sizes)
        inputs = {name: made[name] for name in made if name == "pixel_values" or name in takes}
        # Of pictures in their own proportions, some have fewer patches than others.
        padded = made["pixel_attention_mask"].bool() if "spatial_shapes" in inputs else None
        return Batch(inputs, padded, eot=None)

    return prepare


def _prepare_images_as_timm(spec: EncoderSpec, config: Any) -> Any:
    """For models whose configuration holds what timm's transform takes, such as MambaVision's."""
    from timm.data import create_transform  # takes longer to import than a small encoder takes to read

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
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=spec.remote_code)
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

    return prepare, tokenizer.convert_ids_to_tokens
