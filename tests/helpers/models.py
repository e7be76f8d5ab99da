"""Tiny encoders of every kind, written by their own libraries, whose results are the oracle."""

import json
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import timm
import torch
import transformers
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers import models as token_models
from torch import Tensor, nn
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from conceptshare.config.catalog import EncoderSpec
from conceptshare.encoders._selective_scan import supply_selective_scan

WIDTH, LAYERS = 16, 3
IMAGE_WIDTH, IMAGE_LAYERS = 24, 4
EMBEDDING = 8
SIDE, PATCH = 32, 8
CONTEXT = 12

# Lengths differ, so batches contain padding, and the longest exceeds CONTEXT, so it is truncated.
CAPTIONS = ["a dog", "a cat on a mat", "dog", "the cat and the dog in a hat on a mat and a cat too", "a hat and a mat"]
WORDS = sorted({word for caption in CAPTIONS for word in caption.split()})

# Largest error over the largest magnitude of a tensor. Both sides compute in float32 (epsilon 1.2e-7), but in batches
# of another size or padding, which changes the order of sums: that comes to at most 5e-7. Neighbouring layers differ by
# 0.3 or more, and the two captions that are most alike by 2e-3.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Truth:
    """The library's own results for some samples."""

    hidden: list[Tensor]
    """``[B, T, D]`` after each block."""
    mask: Tensor
    """``[B, T]`` bool: unpadded positions."""
    embedding: Tensor | None = None
    """``[B, E]`` the model's own embedding of each sample."""


@dataclass(frozen=True)
class Family:
    """A saved model, its entry, and its oracle."""

    spec: EncoderSpec
    samples: list[Any]
    truth: Callable[[list[Any]], Truth]
    head: Callable[[Tensor], Tensor] | None = None
    """From the global token after the last block, ``[B, D]``, to the model's own embedding."""


def randomise(model: nn.Module) -> Any:
    """Give every parameter, including norms and biases, a non-trivial value that is the same on every run."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            around = 0.5 if parameter.ndim == 1 else 0
            parameter.copy_(around + 0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def noise_images(count: int = 3) -> list[Image.Image]:
    """Images of noise, of several sizes and shapes."""
    rng = np.random.default_rng(0)
    return [
        Image.fromarray(rng.integers(0, 256, (40 + 7 * i, 60 - 5 * i, 3), dtype=np.uint8)).convert("RGB")
        for i in range(count)
    ]


def entry(folder: Path | str, modality: str, global_token: str, **more: Any) -> EncoderSpec:
    """A catalog entry with the sizes that all models here share."""
    sizes = {"text": (LAYERS, WIDTH), "image": (IMAGE_LAYERS, IMAGE_WIDTH)}[modality]
    values = {"library": "transformers", "kind": "vlm", "layers": sizes[0], "width": sizes[1], **more}
    return EncoderSpec(model=str(folder), modality=modality, global_token=global_token, **values)


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal up to the rounding of float32."""
    return a.shape == b.shape and bool((a - b).abs().max() <= TOLERANCE * b.abs().max())


# transformers


def bert_tokenizer(**more: Any) -> Any:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    return transformers.BertTokenizer(vocab=vocabulary, model_max_length=CONTEXT, **more)


def bert_config(**more: Any) -> Any:
    return transformers.BertConfig(
        vocab_size=5 + len(WORDS),
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=CONTEXT,
        **more,
    )


def save_bert(folder: Path, **tokenizer: Any) -> Any:
    """Write a BERT into ``folder`` and return it."""
    model = randomise(transformers.BertModel(bert_config()))
    model.save_pretrained(folder)
    bert_tokenizer(**tokenizer).save_pretrained(folder)
    return model


def bert(folder: Path) -> Family:
    model = save_bert(folder)
    truth = text_truth(model, bert_tokenizer(), lambda out: out.pooler_output)
    spec = entry(folder, "text", "first", kind="language")

    def head(token: Tensor) -> Tensor:
        return torch.tanh(model.pooler.dense(token))

    return Family(spec, CAPTIONS, truth, head)


def deberta(folder: Path) -> Family:
    """Like the paper's: disentangled attention of the first version, with a classifier on the first token."""
    config = transformers.DebertaConfig(
        **_deberta(), position_biased_input=False, relative_attention=True, pos_att_type=["c2p", "p2c"]
    )
    model = randomise(transformers.DebertaForSequenceClassification(config))
    model.save_pretrained(folder)
    bert_tokenizer().save_pretrained(folder)
    hidden = text_truth(model.deberta, bert_tokenizer())

    @torch.no_grad()
    def truth(captions: list[Any]) -> Truth:
        inputs = bert_tokenizer()(captions, padding=True, truncation=True, return_tensors="pt")
        found = hidden(captions)
        return Truth(found.hidden, found.mask, model(**inputs).logits)

    def head(token: Tensor) -> Tensor:
        return model.classifier(model.pooler(token[:, None]))

    return Family(entry(folder, "text", "first", kind="language"), CAPTIONS, truth, head)


def deberta_v2(folder: Path) -> Family:
    """Its blocks return tuples."""
    config = transformers.DebertaV2Config(
        **_deberta(), relative_attention=True, position_buckets=4, pos_att_type=["p2c", "c2p"]
    )
    model = randomise(transformers.DebertaV2Model(config))
    model.save_pretrained(folder)
    bert_tokenizer().save_pretrained(folder)
    return Family(entry(folder, "text", "mean", kind="language"), CAPTIONS, text_truth(model, bert_tokenizer()))


def _deberta() -> dict[str, Any]:
    return {
        "vocab_size": 5 + len(WORDS),
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": CONTEXT,
    }


def text_truth(model: Any, tokenizer: Any, embed: Any = None, **how: Any) -> Callable[[list[Any]], Truth]:
    how = {"padding": True, "truncation": True, "return_tensors": "pt"} | how

    @torch.no_grad()
    def truth(captions: list[Any]) -> Truth:
        out = model(**tokenizer(captions, **how), output_hidden_states=True)
        mask = tokenizer(captions, **how, return_attention_mask=True)["attention_mask"].bool()
        return Truth(list(out.hidden_states[1:]), mask, None if embed is None else embed(out))

    return truth


def image_truth(model: Any, processor: Any, embed: Any = None, **how: Any) -> Callable[[list[Any]], Truth]:
    @torch.no_grad()
    def truth(images: list[Any]) -> Truth:
        out = model(processor(images, return_tensors="pt")["pixel_values"], output_hidden_states=True, **how)
        hidden = list(out.hidden_states[1:])
        mask = torch.ones(hidden[0].shape[:2], dtype=torch.bool)
        return Truth(hidden, mask, None if embed is None else embed(out))

    return truth


def clip_tokenizer() -> Any:
    """Pads with the end-of-text token, as CLIP does."""
    vocabulary = {letter + end: i for i, (end, letter) in enumerate(_letters())}
    vocabulary |= {"<|startoftext|>": len(vocabulary), "<|endoftext|>": len(vocabulary) + 1}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=CONTEXT)


def _letters() -> list[tuple[str, str]]:
    return [(end, letter) for end in ("", "</w>") for letter in string.ascii_lowercase]


def save_clip(folder: Path) -> Any:
    """Write a CLIP with two towers into ``folder`` and return it."""
    end = 2 * 26 + 1
    config = transformers.CLIPConfig(
        text_config={
            "vocab_size": end + 1,
            "hidden_size": WIDTH,
            "intermediate_size": 32,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 2,
            "max_position_embeddings": CONTEXT,
            "bos_token_id": end - 1,
            "eos_token_id": end,
            "pad_token_id": end,
        },
        vision_config=_vision(),
        projection_dim=EMBEDDING,
    )
    model = randomise(transformers.CLIPModel(config))
    model.save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    clip_processor().save_pretrained(folder)
    return model


def _vision() -> dict[str, Any]:
    return {
        "hidden_size": IMAGE_WIDTH,
        "intermediate_size": 32,
        "num_hidden_layers": IMAGE_LAYERS,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": PATCH,
    }


def clip_processor(side: int = SIDE) -> Any:
    """Resizes to 9/8 of what it crops."""
    return transformers.CLIPImageProcessor(
        size={"shortest_edge": side * 9 // 8}, crop_size={"height": side, "width": side}
    )


def clip_image(folder: Path, side: int | None = None) -> Family:
    model = save_clip(folder)
    how = {} if side is None else {"interpolate_pos_encoding": True}
    processor = clip_processor(side or SIDE)
    hidden = image_truth(model.vision_model, processor, **how)

    @torch.no_grad()
    def truth(images: list[Any]) -> Truth:
        embedded = model.get_image_features(**processor(images, return_tensors="pt"), **how).pooler_output
        found = hidden(images)
        return Truth(found.hidden, found.mask, embedded)

    def head(token: Tensor) -> Tensor:
        return model.visual_projection(model.vision_model.post_layernorm(token))

    return Family(entry(folder, "image", "first", image_size=side), noise_images(), truth, head)


def clip_image_resized(folder: Path) -> Family:
    return clip_image(folder, side=48)


def clip_text(folder: Path) -> Family:
    model = save_clip(folder)
    hidden = text_truth(model.text_model, clip_tokenizer())

    @torch.no_grad()
    def truth(captions: list[Any]) -> Truth:
        inputs = clip_tokenizer()(captions, padding=True, truncation=True, return_tensors="pt")
        found = hidden(captions)
        return Truth(found.hidden, found.mask, model.get_text_features(**inputs).pooler_output)

    def head(token: Tensor) -> Tensor:
        return model.text_projection(model.text_model.final_layer_norm(token))

    return Family(entry(folder, "text", "last_token"), CAPTIONS, truth, head)


def siglip_tokenizer() -> Any:
    """Pads with the end-of-text token and returns no attention mask, like the tokenizers of published SigLIPs."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", "</s>", *WORDS])}
    backend = Tokenizer(token_models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        eos_token="</s>",
        pad_token="</s>",
        padding_side="right",
        model_max_length=CONTEXT,
        model_input_names=["input_ids"],
    )


def save_siglip2_tokenizer(folder: Path) -> None:
    """As in published SigLIP2s: Gemma's, with an end of text, right-padded with another token, without a mask."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    vocabulary = {token: i for i, token in enumerate([*special, "▁", *string.ascii_lowercase])}
    backend = Tokenizer(token_models.BPE(vocab=vocabulary, merges=[], fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    backend.save(str(folder / "tokenizer.json"))
    settings = {f"{token[1:-1]}_token": token for token in special} | {
        "tokenizer_class": "GemmaTokenizer",
        "processor_class": "SiglipProcessor",
        "add_bos_token": False,
        "add_eos_token": True,
        "padding_side": "right",
        "model_input_names": ["input_ids"],
        "model_max_length": 10**30,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def save_siglip(folder: Path) -> Any:
    config = transformers.SiglipConfig(
        text_config={
            "vocab_size": 40,
            "hidden_size": WIDTH,
            "intermediate_size": 32,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 2,
            "max_position_embeddings": CONTEXT,
            "projection_size": WIDTH,
            "eos_token_id": 1,
            "pad_token_id": 1,
        },
        vision_config=_vision(),
    )
    model = randomise(transformers.SiglipModel(config))
    model.save_pretrained(folder)
    siglip_tokenizer().save_pretrained(folder)
    square_processor(transformers.SiglipImageProcessor).save_pretrained(folder)
    return model


def square_processor(kind: Any, side: int = SIDE) -> Any:
    return kind(size={"height": side, "width": side})


def siglip_image(folder: Path) -> Family:
    """Its own embedding is an attention pool over all tokens, so the global token, a mean, has no head."""
    model = save_siglip(folder)
    processor = square_processor(transformers.SiglipImageProcessor)
    return Family(entry(folder, "image", "mean"), noise_images(), image_truth(model.vision_model, processor))


def siglip_text(folder: Path, tokenizer: Callable[[], Any] = siglip_tokenizer) -> Family:
    model = save_siglip(folder)
    how = {"padding": "max_length", "max_length": CONTEXT}
    hidden = text_truth(model.text_model, tokenizer(), **how)

    @torch.no_grad()
    def truth(captions: list[Any]) -> Truth:
        inputs = tokenizer()(captions, truncation=True, return_tensors="pt", **how)
        found = hidden(captions)
        return Truth(found.hidden, found.mask, model.get_text_features(**inputs).pooler_output)

    def head(token: Tensor) -> Tensor:
        return model.text_model.head(model.text_model.final_layer_norm(token))

    return Family(entry(folder, "text", "last_position"), CAPTIONS, truth, head)


def siglip2_text(folder: Path) -> Family:
    folder.mkdir(parents=True, exist_ok=True)

    def tokenizer() -> Any:
        save_siglip2_tokenizer(folder)
        return transformers.PreTrainedTokenizerFast.from_pretrained(folder)

    return siglip_text(folder, tokenizer)


def dinov2(folder: Path, side: int | None = None) -> Family:
    model = randomise(transformers.Dinov2Model(transformers.Dinov2Config(**_vision(), mlp_ratio=2)))
    model.save_pretrained(folder)
    # The processor of published DINOv2s.
    kind = transformers.BitImageProcessor
    made = [
        kind(size={"shortest_edge": n * 9 // 8}, crop_size={"height": n, "width": n}, do_center_crop=True)
        for n in (SIDE, side or SIDE)
    ]
    made[0].save_pretrained(folder)
    truth = image_truth(model, made[1], lambda out: out.pooler_output)
    return Family(
        entry(folder, "image", "first", kind="vision", image_size=side), noise_images(), truth, model.layernorm
    )


def dinov2_resized(folder: Path) -> Family:
    return dinov2(folder, side=48)


def vit(folder: Path, side: int | None = None) -> Family:
    model = randomise(transformers.ViTModel(transformers.ViTConfig(**_vision())))
    model.save_pretrained(folder)
    square_processor(transformers.ViTImageProcessor).save_pretrained(folder)
    processor = square_processor(transformers.ViTImageProcessor, side or SIDE)
    how = {} if side is None else {"interpolate_pos_encoding": True}
    truth = image_truth(model, processor, lambda out: out.pooler_output, **how)

    def head(token: Tensor) -> Tensor:
        return torch.tanh(model.pooler.dense(model.layernorm(token)))

    return Family(entry(folder, "image", "first", kind="vision", image_size=side), noise_images(), truth, head)


def vit_resized(folder: Path) -> Family:
    return vit(folder, side=48)


def fine_vit(folder: Path) -> EncoderSpec:
    """A ViT with many small tokens, whose activations are large but quick to compute."""
    sizes = {"layers": IMAGE_LAYERS, "width": IMAGE_WIDTH}
    model = transformers.ViTModel(transformers.ViTConfig(**_vision() | {"patch_size": 2}))
    model.save_pretrained(folder)
    square_processor(transformers.ViTImageProcessor).save_pretrained(folder)
    return entry(folder, "image", "first", kind="vision", **sizes)


def vit_classifier(folder: Path) -> Family:
    """Like Google's published ones: no pooler, and a classifier on the normalised first token."""
    model = randomise(transformers.ViTForImageClassification(transformers.ViTConfig(**_vision(), num_labels=EMBEDDING)))
    model.save_pretrained(folder)
    processor = square_processor(transformers.ViTImageProcessor)
    processor.save_pretrained(folder)
    hidden = image_truth(model.vit, processor)

    @torch.no_grad()
    def truth(images: list[Any]) -> Truth:
        found = hidden(images)
        return Truth(found.hidden, found.mask, model(**processor(images, return_tensors="pt")).logits)

    def head(token: Tensor) -> Tensor:
        return model.classifier(model.vit.layernorm(token))

    return Family(entry(folder, "image", "first", kind="vision", image_size=SIDE), noise_images(), truth, head)


# MambaVision: the real code of the package mambavision, in a folder like NVIDIA's

MAMBA_CONFIGURATION = """
from transformers import PretrainedConfig


class MambaVisionConfig(PretrainedConfig):
    model_type = "mambavision"

    def __init__(self, depths=[1, 1, 2, 2], dim=8, crop_pct=0.9, crop_mode="center", **more):
        super().__init__(**more)
        self.depths, self.dim, self.crop_pct, self.crop_mode = depths, dim, crop_pct, crop_mode
        self.mean, self.std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""

# Like the published class, this one neither calls post_init nor can be built without storage.
MAMBA_MODEL = """
from einops import rearrange
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from mambavision.models.mamba_vision import MambaVision
from transformers import PreTrainedModel

from .configuration_mambavision import MambaVisionConfig


class MambaVisionModel(PreTrainedModel):
    config_class = MambaVisionConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = MambaVision(
            dim=config.dim, in_dim=4, depths=config.depths, window_size=[8, 8, 14, 7], mlp_ratio=2,
            num_heads=[1, 2, 2, 4], num_classes=config.num_labels, layer_scale=0.5,
        )

    def forward(self, tensor):
        return self.model.forward_features(tensor)
"""


def save_mambavision(folder: Path) -> Any:
    """Write a MambaVision with its own code into ``folder`` and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "configuration_mambavision.py").write_text(MAMBA_CONFIGURATION)
    (folder / "modeling_mambavision.py").write_text(MAMBA_MODEL)
    settings = {
        "model_type": "mambavision",
        "num_labels": EMBEDDING,
        "auto_map": {
            "AutoConfig": "configuration_mambavision.MambaVisionConfig",
            "AutoModel": "modeling_mambavision.MambaVisionModel",
        },
    }
    (folder / "config.json").write_text(json.dumps(settings))
    supply_selective_scan()
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = randomise(get_class_from_dynamic_module(settings["auto_map"]["AutoModel"], str(folder))(config))
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    return model


def mambavision(folder: Path) -> Family:
    """Four levels of different widths, whose outputs are grids; the last is recorded. Its head reads the mean."""
    model = save_mambavision(folder).model
    side = 96
    transform = timm.data.create_transform((3, side, side), interpolation="bicubic", crop_pct=0.9)

    @torch.no_grad()
    def truth(images: list[Any]) -> Truth:
        pixels = torch.stack([transform(image) for image in images])
        x = model.patch_embed(pixels)
        for level in model.levels:
            x = level(x)
        hidden = x.flatten(2).transpose(1, 2)
        return Truth([hidden], torch.ones(hidden.shape[:2], dtype=torch.bool), model(pixels))

    def head(token: Tensor) -> Tensor:
        return model.head(model.norm(token[:, :, None, None])[:, :, 0, 0])

    how = {"layers": 4, "width": 64, "use_layers": "last", "blocks": "model.levels", "image_size": side}
    spec = entry(folder, "image", "mean", kind="vision", remote_code=True, **how)
    return Family(spec, noise_images(), truth, head)


# Language models, with left-padding tokenizers like those of decoders


def word_tokenizer(words: list[str] = WORDS, **more: Any) -> Any:
    """Words between a start and an end of text, padded on the left."""
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    vocabulary = {word: i for i, word in enumerate([*special.values(), *words])}
    backend = Tokenizer(token_models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special | {"padding_side": "left"} | more)


# With every kind of positions.
ENCODERS = (
    *("Bert", "Roberta", "XLMRoberta", "Camembert", "Deberta", "DebertaV2", "MPNet", "XLNet", "Electra", "DistilBert"),
    *("ModernBert", "NomicBert", "EuroBert", "BigBird", "RoFormer", "CLIPText"),
)
ENCODER_DECODERS = ("T5", "MT5", "UMT5", "Bart", "MBart", "Pegasus", "Marian")
DECODERS = (
    *("GPT2", "GPTNeo", "GPTNeoX", "GPTJ", "Llama", "Gemma", "Gemma2", "Gemma3Text", "Qwen2", "Qwen3", "Mistral"),
    *("Mixtral", "Phi", "Phi3", "Olmo2", "SmolLM3", "Granite", "Cohere", "StableLm", "Falcon", "OPT", "Bloom"),
    "OpenAIGPT",
)
LANGUAGE_MODELS = (*ENCODERS, *ENCODER_DECODERS, *DECODERS)


def language_model(kind: str, folder: Path, positions: int = CONTEXT, **tokenizer: Any) -> Any:
    """Write a language model of transformers' class ``kind`` into ``folder`` and return it."""
    # These count positions from after the padding token.
    from_0 = kind not in ("Roberta", "XLMRoberta", "Camembert", "MPNet")
    common = {
        "vocab_size": 4 + len(WORDS),
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "num_key_value_heads": 2,
        "pad_token_id": 0 if from_0 else 1,
        "bos_token_id": 2,
        "eos_token_id": 3,
    }
    if kind not in ("XLNet", *ENCODER_DECODERS[:3], "Bloom"):
        common["max_position_embeddings"] = positions if from_0 else positions + 2
    t5 = {"d_kv": 8, "d_ff": 32, "num_decoder_layers": 2, "decoder_start_token_id": 0}
    bart = {"encoder_layers": LAYERS, "encoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_layers": 1}
    own: dict[str, Any] = {
        **dict.fromkeys(("T5", "MT5", "UMT5"), t5),
        **{name: {"head_dim": 8} for name in ("Gemma", "Gemma2", "Qwen3")},
        **{name: {"embedding_size": WIDTH} for name in ("RoFormer", "SqueezeBert")},
        **dict.fromkeys(("Bart", "MBart", "Pegasus", "Marian"), bart),
        "Deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False},
        "DebertaV2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 4},
        "XLNet": {"d_inner": 32, "d_head": 8},
        "DistilBert": {"hidden_dim": 32},
        "OPT": {"ffn_dim": 32, "word_embed_proj_dim": WIDTH},
        "ModernBert": {"cls_token_id": 2, "sep_token_id": 3},
        "BigBird": {"attention_type": "original_full"},
        "GPTNeo": {"attention_types": [[["global", "local"], 1], [["global"], 1]], "window_size": 4},
        "GPTJ": {"rotary_dim": 4},
        "Gemma3Text": {"head_dim": 8, "sliding_window": 4, "sliding_window_pattern": 2},
        "Mixtral": {"num_local_experts": 2},
        "Falcon": {"alibi": True},
    }
    config = getattr(transformers, f"{kind}Config")(**common | own.get(kind, {}))
    model = randomise(getattr(transformers, f"{kind}Model")(config))
    model.save_pretrained(folder)
    word_tokenizer(**tokenizer).save_pretrained(folder)
    return model


# Hierarchical encoders, with several widths and numbers of tokens


def staged(kind: str, folder: Path) -> EncoderSpec:
    """Write a hierarchical encoder, and return an entry that treats its blocks as one stack."""
    widths, depths, heads = [8, 16, 24, 32], [1, 1, 7, 1], [1, 2, 2, 2]
    library = "transformers"
    match kind:
        case "ResNet":
            config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=widths, depths=depths, layer_type="basic")
        case "ConvNext":
            config = transformers.ConvNextConfig(hidden_sizes=widths, depths=depths)
        case "Swin" | "Swinv2":
            how = {"image_size": 64, "embed_dim": 8, "depths": depths, "num_heads": heads, "window_size": 2}
            config = getattr(transformers, f"{kind}Config")(**how)
        case "Pvt" | "PvtV2":
            how = {"image_size": 64, "hidden_sizes": widths, "depths": depths, "num_attention_heads": heads}
            config = getattr(transformers, f"{kind}Config")(**how)
        case "Hiera":  # its configuration has the ratio of its pretraining, in which it masked patches
            how = {"image_size": [64, 64], "embed_dim": 8, "depths": depths, "num_heads": heads}
            config = transformers.HieraConfig(**how)
        case "MobileViT":
            necks = [8, 8, 16, 24, 32, 40, 48]
            how = {"image_size": 64, "hidden_sizes": widths[1:], "neck_hidden_sizes": necks, "num_attention_heads": 2}
            config = transformers.MobileViTConfig(**how)
        case "open_clip":
            library = "open_clip"
            save_open_clip(folder, open_clip_config(vision_cfg={"layers": [1, 1, 3, 1], "width": 8, "image_size": 64}))
        case _:
            library = "timm"
            save_timm(folder, kind)
    if library == "transformers":
        randomise(getattr(transformers, f"{kind}Model")(config)).save_pretrained(folder)
        square_processor(transformers.ViTImageProcessor, 64).save_pretrained(folder)
    return entry(folder, "image", "mean", kind="vision", library=library, width=14)


# timm


def save_timm(folder: Path, name: str, **settings: Any) -> Any:
    """Write a model of timm into ``folder``, as timm itself saves one for the hub, and return it."""
    model = randomise(timm.create_model(name, num_classes=EMBEDDING, **settings))
    timm.models.save_for_hf(model, folder, model_args=settings, safe_serialization=True)
    return model


def timm_truth(model: Any, side: int, hidden: Callable[[Tensor], list[Tensor]]) -> Callable[[list[Any]], Truth]:
    transform = timm.data.create_transform(
        **timm.data.resolve_data_config({"input_size": (3, side, side)}, model=model)
    )

    @torch.no_grad()
    def truth(images: list[Any]) -> Truth:
        pixels = torch.stack([transform(image) for image in images])
        found = hidden(pixels)
        return Truth(found, torch.ones(found[0].shape[:2], dtype=torch.bool), model(pixels))

    return truth


def timm_vit(folder: Path, side: int | None = None) -> Family:
    model = save_timm(folder, "test_vit", global_pool="token")
    if side is not None:
        model.set_input_size((side, side))

    def hidden(pixels: Tensor) -> list[Tensor]:
        found = model.forward_intermediates(
            pixels, output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
        )
        return [torch.cat([prefix, x], dim=1) for x, prefix in found]

    how = {"library": "timm", "kind": "vision", "layers": 6, "width": 64, "image_size": side}
    truth = timm_truth(model, side or 160, hidden)
    return Family(
        entry(folder, "image", "first", **how), noise_images(), truth, lambda token: model.head(model.norm(token))
    )


def timm_vit_resized(folder: Path) -> Family:
    return timm_vit(folder, side=96)


def timm_convnext(folder: Path) -> Family:
    """Stages of different widths, whose outputs are grids ``[B, D, H, W]``."""
    model = save_timm(folder, "test_convnext")

    def hidden(pixels: Tensor) -> list[Tensor]:
        return [model.stages(model.stem(pixels)).flatten(2).transpose(1, 2)]

    how = {"library": "timm", "kind": "vision", "layers": 4, "width": 64, "blocks": "stages", "use_layers": "last"}

    def head(token: Tensor) -> Tensor:
        return model.head(token[:, :, None, None])

    return Family(entry(folder, "image", "mean", **how), noise_images(), timm_truth(model, 160, hidden), head)


def timm_swin(folder: Path) -> Family:
    """The same, with the width last."""
    settings = {"embed_dim": 8, "depths": (1, 1, 2), "num_heads": (1, 2, 2), "window_size": 4, "img_size": 64}
    model = save_timm(folder, "swin_tiny_patch4_window7_224", **settings)

    def hidden(pixels: Tensor) -> list[Tensor]:
        return [model.layers(model.patch_embed(pixels)).flatten(1, 2)]

    how = {"library": "timm", "kind": "vision", "layers": 3, "width": 32, "blocks": "layers", "use_layers": "last"}
    return Family(entry(folder, "image", "mean", image_size=64, **how), noise_images(), timm_truth(model, 64, hidden))


# open_clip


def open_clip_config(**more: Any) -> dict[str, Any]:
    vision = {"layers": IMAGE_LAYERS, "width": IMAGE_WIDTH, "head_width": 12, "patch_size": PATCH, "image_size": SIDE}
    vision["patch_dropout"] = 0.5  # which shows whether the model is in evaluation mode
    text = {"context_length": CONTEXT, "vocab_size": 49408, "width": WIDTH, "heads": 2, "layers": LAYERS}
    return {"embed_dim": EMBEDDING, "vision_cfg": vision, "text_cfg": text} | more


def save_open_clip(folder: Path, config: dict[str, Any]) -> Any:
    """Write a CLIP of open_clip into ``folder`` in open_clip's own layout and return it."""
    kind = open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP
    model = randomise(kind(**{key: value for key, value in config.items() if key != "custom_text"}))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return model


def open_clip_image_truth(model: Any, transform: Any) -> Callable[[list[Any]], Truth]:
    @torch.no_grad()
    def truth(images: list[Any]) -> Truth:
        pixels = torch.stack([transform(image) for image in images])
        out = model.visual.forward_intermediates(pixels, output_fmt="NLC", output_extra_tokens=True)
        parts = zip(out["image_intermediates_prefix"], out["image_intermediates"], strict=True)
        hidden = [torch.cat(part, dim=1) for part in parts]
        return Truth(hidden, torch.ones(hidden[0].shape[:2], dtype=torch.bool), model.encode_image(pixels))

    return truth


def open_clip_image_head(model: Any) -> Callable[[Tensor], Tensor]:
    return lambda token: model.visual.ln_post(token) @ model.visual.proj


def open_clip_image(folder: Path) -> Family:
    model = save_open_clip(folder, open_clip_config())
    truth = open_clip_image_truth(model, image_transform_v2(PreprocessCfg(size=SIDE), is_train=False))
    spec = entry(folder, "image", "first", library="open_clip")
    return Family(spec, noise_images(), truth, open_clip_image_head(model))


def open_clip_image_resized(folder: Path) -> Family:
    """As open_clip loads it for another image size."""
    save_open_clip(folder, open_clip_config())
    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}", force_image_size=48)
    truth = open_clip_image_truth(model.eval(), transform)
    spec = entry(folder, "image", "first", library="open_clip", image_size=48)
    return Family(spec, noise_images(), truth, open_clip_image_head(model))


def open_clip_timm_image(folder: Path) -> Family:
    """An image tower that open_clip takes from timm, as those of SigLIP."""
    side = 160
    vision = {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear", "image_size": side}
    model = save_open_clip(folder, open_clip_config(vision_cfg=vision))
    truth = open_clip_image_truth(model, image_transform_v2(PreprocessCfg(size=side), is_train=False))

    def head(token: Tensor) -> Tensor:
        return model.visual.head(model.visual.trunk.norm(token))

    return Family(entry(folder, "image", "first", library="open_clip", layers=6, width=64), noise_images(), truth, head)


def open_clip_text(folder: Path, context: int | None = None) -> Family:
    """A causal tower, whose embedding is at the end of text. It pads with 0, which is also the id of "!"."""
    model = save_open_clip(folder, open_clip_config())
    tokenizer = open_clip.SimpleTokenizer(context_length=context or CONTEXT)

    @torch.no_grad()
    def truth(captions: list[Any]) -> Truth:
        ids = nn.functional.pad(tokenizer(captions), (0, CONTEXT - (context or CONTEXT)))
        out = model.forward_intermediates(text=ids, normalize=False)
        mask = torch.arange(CONTEXT) <= ids.argmax(1)[:, None]
        return Truth(out["text_intermediates"], mask, model.encode_text(ids))

    def head(token: Tensor) -> Tensor:
        return model.ln_final(token) @ model.text_projection

    spec = entry(folder, "text", "last_token", library="open_clip", context_length=context)
    return Family(spec, [*CAPTIONS, "a dog !~ a cat"], truth, head)


def open_clip_short_text(folder: Path) -> Family:
    """Captions are truncated below the model's own context."""
    return open_clip_text(folder, context=7)


def open_clip_hf_text(folder: Path, global_token: str, custom_text: bool, **more: Any) -> Family:
    """A tower with a transformers tokenizer in its folder, which pads with the end of text."""
    text = {
        "context_length": CONTEXT,
        "vocab_size": 2 + len(WORDS),
        "hf_tokenizer_name": "tiny",
        "width": WIDTH,
        "heads": 2,
        "layers": LAYERS,
        "proj_bias": True,
    }
    model = save_open_clip(folder, open_clip_config(custom_text=custom_text, text_cfg=text | more))
    tower = model.text if custom_text else model
    siglip_tokenizer().save_pretrained(folder)

    @torch.no_grad()
    def truth(captions: list[Any]) -> Truth:
        encoded = siglip_tokenizer()(
            captions, padding="max_length", truncation=True, return_attention_mask=True, return_tensors="pt"
        )
        ids, mask = encoded["input_ids"], encoded["attention_mask"].bool()
        out = model.forward_intermediates(text=ids)
        return Truth(out["text_intermediates"], mask, model.encode_text(ids))

    def head(token: Tensor) -> Tensor:
        return tower.text_projection(tower.ln_final(token))

    return Family(entry(folder, "text", global_token, library="open_clip"), CAPTIONS, truth, head)


def open_clip_siglip_text(folder: Path) -> Family:
    """Like SigLIP in open_clip: it attends to padding, and the last position is the embedding."""
    return open_clip_hf_text(folder, "last_position", custom_text=True, no_causal_mask=True, pool_type="last")


def open_clip_eos_text(folder: Path) -> Family:
    """A causal tower whose end of text is not the highest id, as in models of many languages."""
    return open_clip_hf_text(folder, "last_token", custom_text=False, pool_type="eos", eos_id=1)


def open_clip_last_text(folder: Path) -> Family:
    """A tower with a tokenizer of transformers, read at the end of text, which is not the highest id."""
    return open_clip_hf_text(folder, "last_token", custom_text=True, no_causal_mask=True, pool_type="last")


def open_clip_coca_text(folder: Path) -> Family:
    """A tower whose class token follows the text and is its embedding."""
    text = {"context_length": CONTEXT, "vocab_size": 49408, "width": WIDTH, "heads": 2, "layers": LAYERS}
    text |= {"embed_cls": True, "output_tokens": False}
    model = save_open_clip(folder, open_clip_config(custom_text=True, text_cfg=text))
    tokenizer = open_clip.SimpleTokenizer(context_length=CONTEXT)

    @torch.no_grad()
    def truth(captions: list[Any]) -> Truth:
        ids = tokenizer(captions)
        out = model.text.forward_intermediates(ids, output_fmt="NLC", output_extra_tokens=True)
        parts = zip(out["text_intermediates"], out["text_intermediates_suffix"], strict=True)
        mask = torch.arange(CONTEXT + 1) <= ids.argmax(1)[:, None]
        mask[:, -1] = True
        return Truth([torch.cat(part, dim=1) for part in parts], mask, model.encode_text(ids))

    def head(token: Tensor) -> Tensor:
        return model.text.ln_final(token) @ model.text.text_projection

    return Family(entry(folder, "text", "last_token", library="open_clip"), CAPTIONS, truth, head)


TEXTS = [
    bert,
    deberta,
    deberta_v2,
    clip_text,
    siglip_text,
    siglip2_text,
    open_clip_text,
    open_clip_short_text,
    open_clip_siglip_text,
    open_clip_eos_text,
    open_clip_last_text,
    open_clip_coca_text,
]
IMAGES = [
    clip_image,
    clip_image_resized,
    siglip_image,
    dinov2,
    dinov2_resized,
    vit,
    vit_resized,
    vit_classifier,
    mambavision,
    timm_vit,
    timm_vit_resized,
    timm_convnext,
    timm_swin,
    open_clip_image,
    open_clip_image_resized,
    open_clip_timm_image,
]
FAMILIES = [*TEXTS, *IMAGES]
