"""Tiny multimodal language models of transformers, with their processors."""

from pathlib import Path
from typing import Any

import transformers

from conceptshare.config.catalog import EncoderSpec
from tests.helpers import models
from tests.helpers.models import IMAGE_WIDTH, LAYERS, PATCH, SIDE, WIDTH

# Special tokens of each kind. The tokenizers of Gemma 3 and InternVL name theirs.
_QWEN = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
_TILES = [f"<row_{row}_col_{column}>" for row in (1, 2, 3) for column in (1, 2, 3)]
_IDEFICS = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *_TILES]
_NAMED = {
    "Gemma3": {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<image>"},
    "InternVL": {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<image>"}
    | {"video_token": "<video>"},
}
_SPECIAL = {
    "Llava": ["<image>"],
    "LlavaNext": ["<image>"],
    "LlavaOnevision": ["<image>", "<video>"],
    "Qwen2VL": _QWEN,
    "Qwen2_5_VL": _QWEN,
    "Idefics3": _IDEFICS,
    "SmolVLM": _IDEFICS,
    "PaliGemma": ["<image>"],
    "Gemma3": [*_NAMED["Gemma3"].values()],
    "InternVL": [*_NAMED["InternVL"].values()],
}
# The message of a user, between the start token and words.
_CHAT = (
    "{{{{ bos_token }}}}a {{% for part in messages[0]['content'] %}}{{% if part['type'] == 'image' %}}{image}"
    "{{% else %}}{{{{ part['text'] }}}}{{% endif %}}{{% endfor %}}{{% if add_generation_prompt %}} dog{{% endif %}}"
)
KINDS = tuple(_SPECIAL)
VARYING = {*KINDS} - {"Llava", "PaliGemma", "Gemma3"}
"""Kinds whose images differ in their numbers of tokens."""


def decoder(kind: str, folder: Path, words: list[str] = models.WORDS) -> Any:
    """Write a multimodal language model into ``folder``, with its processor, and return it."""
    named = {"extra_special_tokens": _NAMED[kind]} if kind in _NAMED else {}
    tokenizer = models.word_tokenizer(words, bos_token="[CLS]", **named)
    tokenizer.add_special_tokens({"additional_special_tokens": _SPECIAL[kind]}, replace_extra_special_tokens=False)
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in _SPECIAL[kind]}
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
    }
    vision = models._vision()
    square, tall = {"height": SIDE, "width": SIDE}, [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    siglip = vision | {"vision_use_head": False, "model_type": "siglip_vision_model"}
    llava = {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    parts: dict[str, Any] = {"vision_config": vision, "text_config": text}
    library: Any = transformers
    match kind:
        case "Llava":
            parts = {
                "vision_config": vision | {"model_type": "clip_vision_model"},
                "text_config": text | {"model_type": "llama"},
            }
            parts |= {"image_token_index": ids["<image>"]}
            processor = library.LlavaProcessor(models.clip_processor(), tokenizer, **llava)
        case "LlavaNext":
            parts = {
                "vision_config": vision | {"model_type": "clip_vision_model"},
                "text_config": text | {"model_type": "llama"},
            }
            parts |= {"image_token_index": ids["<image>"], "image_grid_pinpoints": tall}
            images = library.LlavaNextImageProcessor(
                size={"shortest_edge": SIDE}, crop_size=square, image_grid_pinpoints=tall
            )
            processor = library.LlavaNextProcessor(images, tokenizer, **llava)
        case "LlavaOnevision":
            parts = {"vision_config": siglip, "text_config": text | {"model_type": "qwen2"}}
            parts |= {"image_token_index": ids["<image>"], "video_token_index": ids["<video>"]}
            parts |= {"image_grid_pinpoints": tall}
            images = library.LlavaOnevisionImageProcessor(size=square, image_grid_pinpoints=tall)
            videos = library.LlavaOnevisionVideoProcessor(size=square)
            how = {"num_image_tokens": (SIDE // PATCH) ** 2, "vision_feature_select_strategy": "full"}
            processor = library.LlavaOnevisionProcessor(images, tokenizer, videos, **how)
        case "Qwen2VL" | "Qwen2_5_VL":
            text["rope_parameters"] = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [1, 1, 2]}
            vision = {"depth": 2, "num_heads": 2, "patch_size": PATCH}
            if kind == "Qwen2VL":
                vision |= {"embed_dim": IMAGE_WIDTH, "hidden_size": WIDTH, "mlp_ratio": 2}
            else:
                vision |= {"hidden_size": IMAGE_WIDTH, "out_hidden_size": WIDTH, "intermediate_size": 32}
                vision |= {"window_size": SIDE, "fullatt_block_indexes": [1]}
            parts["vision_config"] = vision
            parts |= {"image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"]}
            pixels = {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
            images = library.Qwen2VLImageProcessor(patch_size=PATCH, size=pixels)
            videos = library.Qwen2VLVideoProcessor(patch_size=PATCH, size=pixels)
            processor = getattr(library, f"{kind}Processor")(images, tokenizer, videos)
        case "Idefics3" | "SmolVLM":
            parts |= {"text_config": text | {"model_type": "llama"}, "scale_factor": 2}
            parts |= {"image_token_id": ids["<image>"], "pad_token_id": 0}
            sizes = {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}}
            images = getattr(library, f"{kind}ImageProcessor")(**sizes)
            videos = [library.SmolVLMVideoProcessor(**sizes)] if kind == "SmolVLM" else []
            processor = getattr(library, f"{kind}Processor")(images, tokenizer, *videos, image_seq_len=4)
        case "PaliGemma":
            parts = {"vision_config": siglip, "text_config": text | {"head_dim": 8, "model_type": "gemma"}}
            parts |= {"projection_dim": WIDTH, "image_token_index": ids["<image>"]}
            images = library.SiglipImageProcessor(size=square)
            images.image_seq_length = (SIDE // PATCH) ** 2
            processor = library.PaliGemmaProcessor(images, tokenizer)
        case "Gemma3":
            parts = {"vision_config": siglip, "text_config": text | {"head_dim": 8, "sliding_window": 4}}
            parts |= {f"{name}_token_index": ids[f"<{name}>"] for name in ("boi", "eoi", "image")}
            parts |= {"mm_tokens_per_image": 4}
            processor = library.Gemma3Processor(
                library.Gemma3ImageProcessor(size=square), tokenizer, image_seq_length=4
            )
        case "InternVL":
            sides = {"image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]}
            parts = {"vision_config": vision | sides, "text_config": text | {"model_type": "qwen2"}}
            parts |= {"image_token_id": ids["<image>"]}
            images = library.GotOcr2ImageProcessor(size=square, crop_to_patches=True, min_patches=1, max_patches=3)
            videos = library.InternVLVideoProcessor(size=square)
            processor = library.InternVLProcessor(images, tokenizer, videos, image_seq_length=4)
    model = models.randomise(
        getattr(library, f"{kind}ForConditionalGeneration")(getattr(library, f"{kind}Config")(**parts))
    )
    model.save_pretrained(folder)
    processor.chat_template = _CHAT.format(image=processor.image_token)
    processor.save_pretrained(folder)
    return model


def decoder_entry(kind: str, folder: Path, modality: str, global_token: str = "last_token", **more: Any) -> EncoderSpec:
    """An entry that reads samples through `decoder`, with words before and after them."""
    place = {"image": "<|vision_start|>{image}<|vision_end|>" if "Qwen" in kind else "{image}", "text": "{caption}"}
    sizes = {"layers": LAYERS, "width": WIDTH, "template": f"a {place[modality]} and a dog"}
    return models.entry(folder, modality, global_token, **sizes | more)
