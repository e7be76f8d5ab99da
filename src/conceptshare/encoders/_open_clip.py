"""Encoders of the open_clip library: one tower of a contrastive image-text model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import torch
from tokenizers.models import BPE
from torch import Tensor, nn

from conceptshare.config.catalog import EncoderSpec
from conceptshare.encoders._encoder import (
    Batch,
    Encoder,
    Samples,
    ensure_pad_token,
    find_blocks,
    has_class_token,
    preparing_images,
)
from conceptshare.io.errors import EncoderError


def load_open_clip(spec: EncoderSpec, location: Path, device: torch.device) -> Encoder:
    """Load a tower from a folder in open_clip's layout, or from a checkpoint file of a model that open_clip knows."""
    if location.is_dir():
        name, pretrained = f"local-dir:{location}", None
    else:
        name, pretrained = spec.model, str(location)
    # A tag determines how its weights were trained, which open_clip cannot infer from the path of the checkpoint.
    trained: dict[str, Any] = {}
    if spec.weights is not None and not location.is_dir():
        trained = open_clip.get_pretrained_cfg(name, spec.weights)
    model: Any
    model, transform = open_clip.create_model_from_pretrained(
        name,
        pretrained,
        device=device,
        force_quick_gelu=trained.get("quick_gelu", False),
        force_image_size=spec.image_size,
        image_mean=trained.get("mean"),
        image_std=trained.get("std"),
        image_interpolation=trained.get("interpolation"),
        image_resize_mode=trained.get("resize_mode"),
        return_transform=True,
    )
    model.eval()
    if spec.modality == "image":
        tower = model.visual
        prepare, words, attends_to_padding = preparing_images(transform, spec), None, False
    else:
        tower = model.text if hasattr(model, "text") else model.transformer
        tokenizer = _speed_up(_tokenizer(name))
        prepare, words = _preparing_texts(model, tokenizer, spec), _words(tokenizer)
        attends_to_padding = _pool_type(_settings(model)) == "last"
    encode: Callable[[Tensor], object] = model.encode_image if spec.modality == "image" else model.encode_text

    def forward(inputs: dict[str, Tensor]) -> object:
        return encode(*inputs.values())

    batch_first = next((m.batch_first for m in tower.modules() if hasattr(m, "resblocks")), True)
    blocks, class_token = find_blocks(tower, spec), has_class_token(tower)
    return Encoder(spec, device, blocks, prepare, forward, batch_first, words, attends_to_padding, class_token)


def _tokenizer(name: str) -> Any:
    """Load the tokenizer of a model, without running code from the model's repository."""
    text = (open_clip.get_model_config(name) or {}).get("text_cfg", {})
    safe = {"trust_remote_code": False} if text.get("hf_tokenizer_name") else {}
    return open_clip.get_tokenizer(name, **safe)


def _speed_up(tokenizer: Any) -> Any:
    """Replace the merge loop of open_clip's own tokenizer with compiled code that applies the same merges.

    Its Python code takes quadratic time for a long word, such as a URL: 27 s for 40,000 letters.
    """
    if isinstance(tokenizer, open_clip.SimpleTokenizer):
        merges = [pair for pair in tokenizer.bpe_ranks if len(pair) == 2]
        pieces = BPE(vocab=tokenizer.encoder, merges=merges, end_of_word_suffix="</w>")
        special = tokenizer.cache  # special tokens are never split
        tokenizer.bpe = lambda word: special.get(word) or " ".join(piece.value for piece in pieces.tokenize(word))
    return tokenizer


def _words(tokenizer: Any) -> Callable[[list[int]], list[str]]:
    if hasattr(tokenizer, "decoder"):
        return lambda ids: [tokenizer.decoder[one] for one in ids]
    words: Callable[[list[int]], list[str]] = tokenizer.tokenizer.convert_ids_to_tokens
    return words


def _preparing_texts(model: Any, tokenizer: Any, spec: EncoderSpec) -> Callable[[Samples], Batch]:
    settings = _settings(model)
    own: int = tokenizer.context_length
    longest = spec.context_length or own
    if longest > own:
        raise EncoderError(
            f"{spec.model}: context_length {longest} is more than the {own} tokens it can read; lower it"
        )
    inner = getattr(tokenizer, "tokenizer", None)  # set if open_clip uses a tokenizer of transformers
    if inner is not None:
        ensure_pad_token(inner)
    padding = 0 if inner is None else inner.pad_token_id
    pads_with_end = inner is not None and padding == inner.eos_token_id

    def prepare(samples: Samples) -> Batch:
        # The towers only accept fully padded texts, even if context_length truncates them earlier.
        ids = nn.functional.pad(tokenizer(list(samples), longest), (0, own - longest), value=padding)
        # open_clip's own tokenizer pads with "!", which may also occur in the text; its end of text has the highest id.
        lengths = ids.argmax(1) + 1 if inner is None else ((ids != padding).sum(1) + pads_with_end).clamp(max=own)
        mask = torch.arange(own) < lengths[:, None]
        if getattr(settings, "cls_emb", None) is not None:
            mask = nn.functional.pad(mask, (0, 1), value=True)  # CoCa's class token follows the text
        return Batch({"text": ids}, mask)

    return prepare


def _settings(model: Any) -> Any:
    """The module with the settings of the text tower."""
    return model.text if hasattr(model, "text") else model


def _pool_type(settings: Any) -> str:
    return str(getattr(settings, "text_pool_type", getattr(settings, "pool_type", "argmax")))
