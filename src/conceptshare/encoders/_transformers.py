"""Encoders of the transformers library: a folder with a configuration, weights, and a tokenizer or image processor."""

import inspect
import json
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import logging

from conceptshare.config.catalog import CHAT, PLACES, EncoderSpec, ModelSpec
from conceptshare.device import full_float32
from conceptshare.encoders._encoder import (
    Batch,
    Encoder,
    Samples,
    UnlikeImagesError,
    ensure_pad_token,
    find_blocks,
    has_class_token,
    preparing_images,
    samples_for_tests,
)
from conceptshare.encoders._selective_scan import supply_selective_scan
from conceptshare.io.errors import EncoderError
from conceptshare.io.progress import info

# Longest text in tokens if neither the study, the tokenizer nor the model sets a limit.
_MAX_TEXT_TOKENS = 512
# Names of the image and text towers in transformers.
_TOWERS = {
    "image": ("vision_model", "image_model", "vision_tower", "visual"),
    "text": ("text_model", "language_model"),
}
# Tokenizers without a limit return a number of thirty digits.
_NO_BOUND = 10**9
# Names of position embeddings in transformers.
_POSITIONS = re.compile(r"(position_embeddings?|embed_positions|wpe)$")
# Side of the image that a processor is tested on; no model uses this size.
_TEST_SIDE = 301
# Side of images if neither the study nor a preprocessor_config.json sets it.
_IMAGE_SIZE = 224


def load_transformers(spec: EncoderSpec, folder: Path, device: torch.device) -> Encoder:
    """Load the encoder in ``folder``; for a model with two towers, the tower for ``spec.modality``.

    With a template, it is the language model of a multimodal model, which runs as a whole.
    """
    model, missing = _from_remote_code(spec, folder) if spec.remote_code else _from_library(spec, folder)
    tower = _tower("text" if spec.template else spec.modality, spec, model)
    runs = (model if spec.template else tower).eval().to(device)
    takes = set(inspect.signature(runs.forward).parameters)
    config = getattr(tower, "config", model.config)  # towers of remote code may have none
    processor = _load_processor(spec, folder, config) if spec.template else None
    template = _template(spec, processor) if processor else ""
    if spec.modality == "text":
        tokenizer = processor.tokenizer if processor else _load_tokenizer(spec, folder, config)
        prepare, words = _prepare_texts(spec, tokenizer, tower, config, takes, template)
    elif processor:
        prepare, words = _prepare_prompts(template, processor, model.config, takes), None
    else:
        prepare, words = _prepare_images(spec, folder, model.config, takes), None
    options: dict[str, Any] = {"use_cache": False} if spec.template else {}
    if spec.image_size and "interpolate_pos_encoding" in takes:
        options = {"interpolate_pos_encoding": True}

    def forward(inputs: dict[str, Tensor], **more: Any) -> Any:
        if spec.modality == "image" and not spec.template:
            # Remote code may use any name for its first input.
            others = {name: x for name, x in inputs.items() if name != "pixel_values"}
            return tower(inputs["pixel_values"], **others, **options, **more)
        return runs(**inputs, **options, **more)

    blocks = find_blocks(tower, spec)
    _check_weights(spec, model, runs, blocks, missing)
    attends_to_padding = spec.modality == "text" and _attends_to_padding(config)
    batch_first = config.model_type != "xlnet"
    class_token = spec.remote_code or has_class_token(tower)  # remote code may use any name for it
    encoder = Encoder(spec, device, blocks, prepare, forward, batch_first, words, attends_to_padding, class_token)
    if not spec.remote_code:
        _check_residual_stream(encoder, forward)
    return encoder


def _tower(modality: str, spec: EncoderSpec, model: Any) -> Any:
    """The part of a model that encodes a modality."""
    if model.config.model_type == "vit_mae":
        raise EncoderError(f"{spec.model}: it masks random patches of its input; use a plain ViT with its weights")
    tower = next((getattr(model, name) for name in _TOWERS[modality] if hasattr(model, name)), model)
    has_decoder = tower is model and hasattr(model, "encoder") and hasattr(model, "decoder")
    return model.encoder if has_decoder and modality == "text" else tower


def _check_residual_stream(encoder: Encoder, forward: Callable[..., Any]) -> None:
    """Raise an EncoderError if the blocks' outputs are not among the hidden states that the library returns.

    The last layer is not checked, because many models return it normalised, nor are models without hidden states.
    """
    batch = encoder.prepare(samples_for_tests(encoder.spec)[:1])
    try:
        with torch.inference_mode(), full_float32():
            inputs = {name: value.to(encoder.device) for name, value in batch.inputs.items()}
            states = forward(inputs, output_hidden_states=True).hidden_states
    except Exception:  # models without hidden states raise many types
        return
    activations = replace(encoder, spec=encoder.spec.model_copy(update={"precision": "float32"})).read(batch)
    for layer, x in activations.tokens.items():
        known = [state for state in states or [] if isinstance(state, Tensor) and state.numel() == x.numel()]
        if layer == encoder.spec.layers - 1 or not known:
            continue
        # Those of stages are grids.
        known = [encoder.residual(layer, state, len(batch)) if state.ndim == 4 else state for state in known]
        if not any(
            torch.allclose(state.float().reshape(x.shape), x, rtol=1e-3, atol=1e-4, equal_nan=True) for state in known
        ):
            raise EncoderError(
                f"{encoder.spec.model}, layer {layer}: its block's output is none of the model's own hidden states; "
                f"set blocks to the module list that returns them"
            )


def _from_library(spec: EncoderSpec, folder: Path) -> tuple[Any, set[str]]:
    """Load the model with transformers' own class; also return the names of parameters that its files lack."""
    kind, _ = class_and_config(spec, folder)
    # transformers warns about every missing parameter; `_check_weights` only raises for those that matter.
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model, loading = kind.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, output_loading_info=True
        )
    finally:
        logging.set_verbosity(verbosity)
    return model, set(loading["missing_keys"])


def class_and_config(spec: ModelSpec, folder: Path) -> tuple[Any, Any]:
    """The class of transformers that loads the model in ``folder``, and its configuration."""
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "AutoModel" in settings.get("auto_map", {}) and settings.get("model_type") not in CONFIG_MAPPING:
        raise EncoderError(
            f"{spec.model}: it comes with its own Python code; read that code, and set remote_code: true to run it"
        )
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    kind: Any = AutoModel
    if type(config) not in MODEL_MAPPING:  # a part of a model that only its own class loads, such as FLAVA's for images
        kind = getattr(transformers, (config.architectures or [""])[0], None)
    if kind is None:
        raise EncoderError(
            f"{spec.model}: transformers has no encoder of model_type {config.model_type}; use another encoder"
        )
    return kind, config


def _from_remote_code(spec: EncoderSpec, folder: Path) -> tuple[Any, set[str]]:
    """Load the model with the code that comes with it: build it and load its state, with any transformers version.

    The requirements of transformers' from_pretrained have changed since such code was published: MambaVision's class
    neither calls post_init nor can be built on the meta device.
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
    loading = model.load_state_dict({name: x for part in parts for name, x in part.items()}, strict=False)
    return model.float(), set(loading.missing_keys)


def _check_weights(
    spec: EncoderSpec, model: nn.Module, tower: nn.Module, blocks: Sequence[nn.Module], missing: set[str]
) -> None:
    """Raise an EncoderError if the checkpoint lacks blocks or embeddings, which transformers initialises randomly."""
    named = list(model.named_parameters())
    own = set(tower.parameters())
    inner = {parameter for block in blocks for parameter in block.parameters()}
    # Modules are registered in the order in which they run: embeddings, blocks, then heads, which may be missing.
    end = max((n for n, (_, parameter) in enumerate(named) if parameter in inner), default=-1)
    lacking = [
        name
        for name, parameter in named[: end + 1]
        if name in missing and parameter in own and not name.endswith("mask_token")  # only used in training
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
    sizes = {} if spec.image_size is None else _sizes(spec, processor, spec.image_size)

    def prepare(samples: Samples) -> Batch:
        try:
            processed = processor(images=list(samples), return_tensors="pt", **sizes)
        except Exception:  # processors raise many types
            if len({_pixels(processor, sample, sizes).shape for sample in samples}) > 1:
                raise UnlikeImagesError(spec) from None
            raise
        inputs = {name: processed[name] for name in processed if name == "pixel_values" or name in takes}
        # Images that keep their aspect ratio have different numbers of patches.
        mask = processed["pixel_attention_mask"].bool() if "spatial_shapes" in inputs else None
        return Batch(inputs, mask)

    return prepare


def _prepare_images_as_timm(spec: EncoderSpec, config: Any) -> Any:
    """For models whose configuration holds the settings of timm's transform, such as MambaVision."""
    from timm.data import create_transform  # slow to import

    side = spec.image_size or _IMAGE_SIZE
    transform: Any = create_transform(
        input_size=(3, side, side),
        is_training=False,
        mean=config.mean,
        std=config.std,
        crop_mode=config.crop_mode,
        crop_pct=config.crop_pct,
        interpolation="bicubic",
    )
    return preparing_images(transform, spec)


def _sizes(spec: EncoderSpec, processor: Any, side: int) -> dict[str, dict[str, int]]:
    """Options that scale the processor's sizes so that it makes images of the given side; empty for its own side."""
    square = Image.new("RGB", (_TEST_SIDE, _TEST_SIDE))
    own = _pixels(processor, square, {})
    if own.ndim != 4:
        raise EncoderError(f"{spec.model}: image_size does not fit an image processor of patches; leave it out")
    if own.shape[-2:] == (side, side):
        return {}
    sizes = {name: getattr(processor, name, None) for name in ("size", "crop_size")}
    scaled = {
        name: {edge: round(pixels * side / own.shape[-1]) for edge, pixels in dict(size).items() if pixels is not None}
        for name, size in sizes.items()
        if size is not None
    }
    if _pixels(processor, square, scaled).shape[-2:] != (side, side):
        raise EncoderError(f"{spec.model}: its image processor cannot make images of image_size: {side}; leave it out")
    return scaled


def _pixels(processor: Any, image: Image.Image | str, sizes: dict[str, dict[str, int]]) -> Tensor:
    """``[1, ...]`` output of an image processor for one image."""
    pixels: Tensor = processor(images=[image], return_tensors="pt", **sizes)["pixel_values"]
    return pixels


def _load_processor(spec: EncoderSpec, folder: Path, config: Any) -> Any:
    """Load the processor of a multimodal model, which prepares images and texts together."""
    processor: Any = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if getattr(processor, "image_token", None) is None:
        raise EncoderError(
            f"{spec.model}: its processor has no token that stands for an image; template is for multimodal language "
            f"models such as LLaVA, leave it out"
        )
    ensure_pad_token(processor.tokenizer, getattr(config, "vocab_size", None))
    return processor


def _template(spec: EncoderSpec, processor: Any) -> str:
    """The prompt, with the place of a sample."""
    if spec.template == CHAT:
        return _chat_template(spec, processor)
    assert spec.template is not None
    token = processor.image_token
    if token in spec.template:
        remedy = f"write {PLACES['image']} in its place" if spec.modality == "image" else "leave it out"
        raise EncoderError(f"{spec.model}: template has {token}, which stands for an image in this model; {remedy}")
    return spec.template


def _chat_template(spec: EncoderSpec, processor: Any) -> str:
    """A sample as the message of a user, in the processor's own template."""
    remedy = "write the prompt as template"
    if processor.chat_template is None:
        raise EncoderError(f"{spec.model}: its processor has no chat template; {remedy}")
    place = PLACES[spec.modality]
    content = {"type": "image"} if spec.modality == "image" else {"type": "text", "text": place}
    messages = [{"role": "user", "content": [content]}]
    prompt: str = processor.apply_chat_template(messages, add_generation_prompt=True)
    if spec.modality == "image":
        prompt = prompt.replace(processor.image_token, place)
    if prompt.count(place) != 1:
        raise EncoderError(f"{spec.model}: its chat template has no place for the {place.strip('{}')}; {remedy}")
    info(f"{spec.model}: its chat template is {prompt!r}")
    return prompt


def _special_tokens(template: str, tokenizer: Any) -> dict[str, bool]:
    """The option not to add special tokens, for a prompt that begins with the start token; else none."""
    begun = tokenizer.bos_token is not None and template.startswith(tokenizer.bos_token)
    return {"add_special_tokens": False} if begun else {}


def _prepare_prompts(template: str, processor: Any, config: Any, takes: set[str]) -> Any:
    """Put images into the template; prompts with fewer tokens of their image are padded on the right."""
    prompt = template.replace(PLACES["image"], processor.image_token)
    special = _special_tokens(template, processor.tokenizer)
    tokenizing = Lock()  # tokenizers are not thread-safe

    def prepare(samples: Samples) -> Batch:
        with tokenizing:
            encoded = processor(
                images=[[image] for image in samples],
                text=[prompt] * len(samples),
                padding=True,
                padding_side="right",
                return_tensors="pt",
                **special,
            )
        mask = encoded["attention_mask"].bool()
        inputs = {name: encoded[name] for name in encoded if name in takes}
        return Batch(inputs, None if mask.all() else mask, encoded["input_ids"] == config.image_token_id)

    return prepare


def _load_tokenizer(spec: EncoderSpec, folder: Path, config: Any) -> Any:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=spec.remote_code)
    files = {"tokenizer.json", *tokenizer.vocab_files_names.values()}
    if tokenizer.vocab_files_names and not any((folder / name).is_file() for name in files):
        # transformers would continue without a vocabulary and read every word as unknown.
        raise EncoderError(f"{spec.model}: no tokenizer in {folder}; put {' or '.join(sorted(files))} there")
    ensure_pad_token(tokenizer, getattr(config, "vocab_size", None))
    return tokenizer


def _prepare_texts(
    spec: EncoderSpec, tokenizer: Any, tower: Any, config: Any, takes: set[str], template: str = ""
) -> Any:
    length, attends_to_padding = _length(spec, tokenizer, tower, config), _attends_to_padding(config)
    clean: Callable[[str], str] = str
    names = set(tokenizer.model_input_names) | (set() if attends_to_padding else {"attention_mask"})
    if "input_ids" in takes:
        names &= takes
    padding = "longest"
    options: dict[str, Any] = {"truncation": True, "max_length": length}
    if template:
        # Captions are cut before, so that the end of the template stays.
        clean, options = _filling(template, tokenizer, length), {**_special_tokens(template, tokenizer)}
        if "token_type_ids" in takes:  # by which some models tell the prompt from the answer
            names, options["return_token_type_ids"] = names | {"token_type_ids"}, True
    if spec.global_token != "reference":  # which reproduces the paper's code, even where it reads padding
        # Positions count from the left, so padding on that side would shift a caption's positions in every batch.
        tokenizer.padding_side = "right"
        if attends_to_padding:
            names, padding, clean = names - {"attention_mask"}, "max_length", _cleaning(tokenizer)

    def prepare(samples: Samples) -> Batch:
        encoded = tokenizer(
            [clean(str(sample)) for sample in samples],  # captions are strings already
            padding=padding,
            **options,
            return_attention_mask=True,
            return_tensors="pt",
        )
        mask = encoded["attention_mask"].bool()
        empty = (~mask.any(1)).nonzero()
        if len(empty):
            raise EncoderError(
                f"{spec.model}: its tokenizer returns no token for the caption {samples[int(empty[0])]!r}; remove that "
                f"sample"
            )
        return Batch({name: encoded[name] for name in encoded if name in names}, mask)

    return prepare, tokenizer.convert_ids_to_tokens


def _filling(template: str, tokenizer: Any, length: int) -> Callable[[str], str]:
    """Return a function that puts a caption, cut at ``length`` tokens, into a template."""

    def fill(caption: str) -> str:
        pieces = tokenizer(caption, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return template.replace(PLACES["text"], caption[: pieces[length - 1][1]] if len(pieces) > length else caption)

    return fill


def _attends_to_padding(config: Any) -> bool:
    """Whether texts are read with full, unmasked padding, as SigLIP was trained."""
    return str(config.model_type).startswith("siglip")


def _cleaning(tokenizer: Any) -> Callable[[str], str]:
    """Clean captions as in SigLIP's training, which the tokenizers of published checkpoints do not.

    SigLIP 1, which pads with its end of text, was trained on lower case without punctuation, SigLIP 2 on lower case.
    """
    if tokenizer.pad_token != tokenizer.eos_token:
        return str.lower
    no_punctuation = str.maketrans("", "", string.punctuation)
    return lambda text: " ".join(text.lower().translate(no_punctuation).split())


def _length(spec: EncoderSpec, tokenizer: Any, tower: Any, config: Any) -> int:
    """Maximum number of tokens per text."""
    positions = getattr(config, "max_position_embeddings", None)
    tables = {name: x for name, x in tower.named_modules() if isinstance(x, nn.Embedding) and _POSITIONS.search(name)}
    for table in tables.values():
        if table.padding_idx is not None:  # RoBERTa and similar models start counting after the padding token
            positions = table.num_embeddings - table.padding_idx - 1
    if spec.context_length is not None:
        if tables and positions and spec.context_length > positions:
            raise EncoderError(
                f"{spec.model}: context_length {spec.context_length} is more than the {positions} tokens it can read; "
                f"lower it"
            )
        return spec.context_length
    bounds = [n for n in (tokenizer.model_max_length, positions) if n is not None and 0 < n < _NO_BOUND]
    if not bounds:
        info(f"{spec.model}: has no maximum length; texts are cut at {_MAX_TEXT_TOKENS} tokens, or at context_length")
    return int(min(bounds, default=_MAX_TEXT_TOKENS))
