"""Stage `examples`: example samples of each feature, and its activation at each token of the strongest samples.

`results/{dataset}/examples/{sae}/{encoder}@{seed}/` holds a table per layer, `layer-NN.parquet`, with one row per
feature: its strongest samples; samples around lower quantiles of its activations, because the strongest alone can
mislead; a histogram; and its activation at each token of the strongest samples. `samples.parquet` describes the tokens
of these samples: a grid on the part of the image that the encoder sees, or pieces of the caption.

Activations at tokens are computed in another forward pass over these samples, so they do not depend on stored tokens.
They are the output of the SAE's encoder, before TopK and after ReLU, as for features at the global token.
"""

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from conceptshare.data.dataset import Data
from conceptshare.device import default_device, full_float32
from conceptshare.encoders import Activations, Arrays, Batch, Encoder
from conceptshare.io import provenance
from conceptshare.io.ahead import in_order
from conceptshare.io.errors import StoreError
from conceptshare.io.files import EXAMPLES, Unchanged, atomic_output
from conceptshare.io.layout import layer_name
from conceptshare.io.progress import progress
from conceptshare.io.readers import FEATURES
from conceptshare.io.seals import seal
from conceptshare.io.sizes import FEATURE_COLUMNS, HISTOGRAM_BINS, NEAR, QUANTILES, SHOWN_SAMPLES
from conceptshare.io.store import layer_array, open_store
from conceptshare.sae import SAE, load_sae
from conceptshare.sae.features import read_features
from conceptshare.sae.folder import sae_of

# Working memory for the activations that are read at a time, and for those of a block of features that is sorted.
_READ_BYTES, _BLOCK_BYTES = 2**29, 2**28
# Marks of tokenizers for pieces that begin, end or continue a word, and pieces that are not text.
_WORD_STARTS, _WORD_END, _CONTINUATION = ("▁", "Ġ", " "), "</w>", "##"
_SPECIAL = re.compile(r"<.+>|\[.+\]")
# Letters that stand for bytes in byte-level tokenizers, such as those of GPT-2 and CLIP.
_PRINTED = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTES = {chr(byte): byte for byte in _PRINTED}
_BYTES |= {chr(0x100 + n): byte for n, byte in enumerate(byte for byte in range(0x100) if byte not in _PRINTED)}
# Maximum number of tokens before those of an image's grid: a class token and registers.
_MAX_TOKENS_BEFORE = 16

_SPREAD = {
    "near": pa.list_(
        pa.struct({"quantile": pa.float32(), "samples": pa.list_(pa.int32()), "values": pa.list_(pa.float32())})
    ),
    "histogram": pa.list_(pa.int32()),
    "highest": pa.float32(),
}
_TOP_SAMPLE = pa.struct(
    {"sample": pa.int32(), "value": pa.float32(), "fires": pa.binary(), "fires_highest": pa.float32()}
)
_LAYER = pa.schema({"feature": pa.int32(), "top": pa.list_(_TOP_SAMPLE), **_SPREAD})
_IMAGES = pa.schema({"sample": pa.int32(), "box": pa.list_(pa.float32(), 4)})
_TEXTS = pa.schema({"sample": pa.int32(), "tokens": pa.list_(pa.string())})


@full_float32()
def record_examples(
    encoder: Encoder | Arrays, data: Data, features: Path, saes: Path, out: Path, threads: int = 1
) -> None:
    """Write the folder ``out`` of examples.

    Args:
        encoder: the encoder of the features, or the arrays in its place, whose features have no activations at tokens.
        data: the samples.
        features: the feature store.
        saes: the folder with `layer-NN/seed-S/` for each layer.
        out: the folder to write.
        threads: number of threads that decode and prepare images.

    Raises:
        StoreError: if the features are missing, damaged, or of other samples or another encoder, or an SAE is missing.
        EncoderError: if the encoder does not match its catalog entry.
    """
    inputs = Unchanged(features)
    store: Any = open_store(features, FEATURES)
    spec: Any = store.attrs["spec"]
    wanted = {
        "content_hash": data.content_hash,
        "encoder": json.loads(encoder.spec.activations_key()),
        "weights": encoder.fingerprint,
    }
    other = next((key for key in wanted if spec[key] != wanted[key]), None)
    if other is not None:
        raise StoreError(
            f"{features}: features of other samples, another encoder or other weights ({other}); delete the store and "
            f"run the activations (or stream) and features stages again"
        )
    tops = {
        layer: Tops(
            *(layer_array(store, layer, name, features)[:, :SHOWN_SAMPLES] for name in ("top_samples", "top_values"))
        )
        for layer in spec["layers"]
    }
    loaded = {}
    for layer in tops:
        folder, record = sae_of(saes, layer, spec["seed"])
        if record["digest"] != spec["made_from"]["saes"][str(layer)]:
            raise StoreError(f"{folder}: not the SAE of the features in {features}; run the features stage again")
        loaded[layer] = load_sae(folder, record)
    with atomic_output(out, EXAMPLES) as partial, inputs:
        partial.mkdir()
        described = (
            [{"sample": sample} for sample in _strongest(tops).tolist()]
            if isinstance(encoder, Arrays)
            else locate_activations(encoder, data, loaded, tops, out.name, threads)
        )
        schema = _IMAGES if encoder.spec.modality == "image" else _TEXTS
        pq.write_table(pa.Table.from_pylist(described, schema), partial / "samples.parquet", compression="zstd")
        stored = read_features(features)
        for layer in progress(tops, len(tops), f"examples of {out.name}", "layers"):
            rows = [
                {"feature": feature, "top": top, **spread}
                for feature, (top, spread) in enumerate(zip(tops[layer].rows(), spreads(stored[layer]), strict=True))
            ]
            pq.write_table(
                pa.Table.from_pylist(rows, _LAYER), partial / f"{layer_name(layer)}.parquet", compression="zstd"
            )
        seal(partial, {"features": {features.stem: store.attrs["digest"]}})
        provenance.record(partial)


class Tops:
    """The strongest samples of a layer's features, with the activations at their tokens.

    Args:
        samples: ``[F, K]`` int32, strongest first, padded with -1.
        values: ``[F, K]`` float32.
    """

    def __init__(self, samples: NDArray[np.int32], values: NDArray[np.float32]) -> None:
        self._samples, self._values = samples, values
        features, ranks = np.nonzero(samples >= 0)
        self._fires: dict[tuple[int, int], tuple[bytes, float]] = {}
        order = np.argsort(samples[features, ranks], kind="stable")
        self._entries = np.stack([features, ranks], axis=1)[order]
        self._of_sample = samples[features, ranks][order]

    def samples(self) -> NDArray[np.int32]:
        """All samples that are among the strongest of any feature, in order."""
        return np.unique(self._of_sample)

    def entries(self, samples: NDArray[np.int32]) -> NDArray[np.int64]:
        """``[n, 3]``: index of a sample, a feature that has it among its strongest, and its rank there.

        Args:
            samples: in order, and without gaps among the samples of this layer.
        """
        first, last = np.searchsorted(self._of_sample, [samples[0], samples[-1] + 1])
        rows = np.searchsorted(samples, self._of_sample[first:last])
        return np.column_stack([rows, self._entries[first:last]])

    def add(self, entries: NDArray[np.int64], values: Tensor) -> None:
        """Add ``values [n, P]``, the activation at each token for each of the entries, negative at padding."""
        highest = values.amax(1, keepdim=True)
        shares = (255 * values / highest.clamp(min=1e-30)).round().clamp(min=0).to(torch.uint8).numpy()
        rows = zip(entries[:, 1:].tolist(), shares, (values >= 0).numpy(), highest[:, 0].tolist(), strict=True)
        for (feature, rank), share, shown, value in rows:
            self._fires[feature, rank] = share[shown].tobytes(), value

    def rows(self) -> Iterator[list[dict[str, Any]]]:
        """Yield the samples of each feature, strongest first."""
        for feature, (samples, values) in enumerate(zip(self._samples, self._values, strict=True)):
            row = []
            for rank in np.flatnonzero(samples >= 0).tolist():
                fires, highest = self._fires.get((feature, rank), (None, None))
                row.append({"sample": samples[rank], "value": values[rank], "fires": fires, "fires_highest": highest})
            yield row


def spreads(features: Any) -> Iterator[dict[str, Any]]:
    """Yield the histogram and the samples around lower quantiles for each column of ``features [N, F]``."""
    N, F = features.shape
    read, width = min(FEATURE_COLUMNS, max(1, _READ_BYTES // (6 * N))), max(1, _BLOCK_BYTES // (16 * N))
    for first in range(0, F, read):
        values = features[:, first : first + read]
        for start in range(0, values.shape[1], width):
            # In a function of its own, so that a block is freed before the next one is sorted.
            yield from _spreads_of_block(values[:, start : start + width])


def _spreads_of_block(block: NDArray[Any]) -> list[dict[str, Any]]:
    device = default_device()
    ordered = torch.from_numpy(block).to(device).float().sort(dim=0, descending=True, stable=True)
    return [_spread(*column) for column in zip(*(x.cpu().numpy().T for x in ordered), strict=True)]


def _spread(values: NDArray[np.float32], samples: NDArray[np.int64]) -> dict[str, Any]:
    """The histogram and samples of one feature, from its values ``[N]`` in decreasing order and their samples."""
    active = values[values > 0]
    highest = float(active[0]) if len(active) else 0.0
    near = zip(QUANTILES, ranks_near(len(active)), strict=True)
    return {
        # Copies, because views would keep the values of all samples in memory.
        "near": [
            {"quantile": q, "samples": samples[ranks].copy(), "values": active[ranks].copy()} for q, ranks in near
        ],
        "histogram": np.histogram(active, HISTOGRAM_BINS, (0.0, highest or 1.0))[0],
        "highest": highest,
    }


def ranks_near(active: int) -> list[slice]:
    """Ranks of the samples around each quantile of active samples, strongest first; without top ones and repeats."""
    ranks, taken = [], SHOWN_SAMPLES
    for q in QUANTILES:
        first = max(taken, round((1 - q) * (active - 1)) - NEAR // 2)
        taken = max(taken, min(first + NEAR, active))
        ranks.append(slice(first, taken))
    return ranks


def locate_activations(
    encoder: Encoder, data: Data, saes: dict[int, SAE], tops: dict[int, Tops], name: str, threads: int
) -> list[dict[str, Any]]:
    """Compute each feature's activation at the tokens of its strongest samples, and add it to ``tops``.

    Args:
        encoder: the encoder.
        data: the samples.
        saes: SAEs by layer.
        tops: strongest samples by layer.
        name: the member's name, for progress.
        threads: number of threads that decode and prepare images.

    Returns:
        for each of these samples: the ``box`` of the image that the encoder sees, or the ``tokens`` of a caption.
    """
    saes = {layer: sae.to(encoder.device) for layer, sae in saes.items()}
    samples = _strongest(tops)
    frame, described = Frame(encoder) if encoder.spec.modality == "image" else None, []
    two_words = [] if frame is not None else _pieces(encoder, encoder.prepare(["a dog"]), 0)
    # A CPU multiplies each sample with its own latents only. On a GPU, a launch per sample would cost more.
    step = 1 if encoder.device.type == "cpu" else encoder.spec.batch_size
    for chosen, sizes, batch in _batches(encoder, data, samples, threads, name):
        activations = encoder.read(batch)
        if frame is not None:
            positions = {layer: [_grid(batch, activations, layer)] * len(chosen) for layer in tops}
            places: list[dict[str, Any]] = [{"box": frame.box(size)} for size in sizes]
        else:
            assert batch.mask is not None
            of_texts = [row.nonzero()[:, 0] for row in batch.mask]
            positions = dict.fromkeys(tops, of_texts)
            places = [{"tokens": with_blanks(_pieces(encoder, batch, row), two_words)} for row in range(len(chosen))]
        described += [{"sample": sample, **place} for sample, place in zip(chosen.tolist(), places, strict=True)]
        located = {layer: top for layer, top in tops.items() if len(positions[layer][0])}
        for first in range(0, len(chosen), step):
            part = slice(first, first + step)
            entries = {layer: top.entries(chosen[part]) for layer, top in located.items()}
            values = {
                layer: _encode(saes[layer], activations.tokens[layer][part], positions[layer][part], of_layer)
                for layer, of_layer in entries.items()
                if len(of_layer)
            }
            for layer, of_layer in values.items():
                tops[layer].add(entries[layer], of_layer.cpu())
    return described


def _strongest(tops: dict[int, Tops]) -> NDArray[np.int32]:
    """All samples that are among the strongest of any feature of any layer, in order."""
    return np.unique(np.concatenate([top.samples() for top in tops.values()]))


def _batches(
    encoder: Encoder, data: Data, samples: NDArray[np.int32], threads: int, name: str
) -> Iterator[tuple[NDArray[np.int32], list[Any], Batch]]:
    """Yield batches of samples, their image sizes and their inputs, with prefetching."""
    read: Any = data.image if encoder.spec.modality == "image" else data.caption

    def prepare(chosen: NDArray[np.int32]) -> tuple[NDArray[np.int32], list[Any], Batch]:
        contents = [read(sample) for sample in chosen.tolist()]
        return chosen, [getattr(content, "size", None) for content in contents], encoder.prepare(contents)

    starts = range(0, len(samples), encoder.spec.batch_size)
    workers = threads if encoder.spec.modality == "image" else 1  # tokenizers are not thread-safe
    with ThreadPoolExecutor(workers) as pool:
        jobs = (pool.submit(prepare, samples[start : start + encoder.spec.batch_size]).result for start in starts)
        yield from progress(in_order(jobs, workers), len(starts), f"where features of {name} fire", "batches")


@torch.inference_mode()
def _encode(sae: SAE, x: Tensor, positions: list[Tensor], entries: NDArray[np.int64]) -> Tensor:
    """Selected latents at the tokens that are shown, which are rounded to float16 as in stored and training tokens.

    Args:
        sae: the SAE.
        x: ``[B, T, D]`` tokens of samples.
        positions: those of the tokens to show, for each sample.
        entries: ``[n, 3]`` the sample and latent of each row of the result, and its rank.

    Returns:
        ``[n, P]`` latents, -1 beyond a sample's positions.
    """
    shown = pad_sequence(positions, batch_first=True, padding_value=-1).to(x.device)
    rows, latents, _ = torch.from_numpy(entries.T.copy()).to(x.device)
    tokens = x.take_along_dim(shown.clamp(min=0)[..., None], 1).half().float() - sae.b_dec
    products = torch.addmm(sae.b_enc[latents], tokens.flatten(0, 1), sae.W_enc_T[latents].T)
    of_entries = products.view(*shown.shape, -1)[rows, :, torch.arange(len(rows), device=x.device)]
    return torch.relu(of_entries).masked_fill(shown[rows] < 0, -1)


def _grid(batch: Batch, activations: Activations, layer: int) -> Tensor:
    """Positions of an image's square grid, row by row; empty if there is no such grid.

    In a prompt, they are the tokens of the image, and otherwise the last tokens.
    """
    tokens, none = activations.tokens[layer].shape[1], torch.empty(0, dtype=torch.long)
    if layer in activations.grids:
        return torch.arange(tokens)
    if not activations.training.shape[1]:  # layers of several widths may have their tokens in any order
        return none
    if batch.image_tokens is not None:
        positions = batch.image_tokens[0].nonzero()[:, 0]
        side = isqrt(len(positions))
        whole = batch.mask is None and batch.pixels.ndim == 4 and len(batch.pixels) == len(batch)  # not in tiles
        return positions if whole and side**2 == len(positions) else none
    side = isqrt(tokens)
    before = tokens - side**2
    if batch.mask is not None or before > _MAX_TOKENS_BEFORE:  # the patches keep the image's aspect ratio
        return none
    return torch.arange(before, tokens)


def _pieces(encoder: Encoder, batch: Batch, row: int) -> list[str]:
    """The tokenizer's pieces of a caption at its unpadded positions; empty strings for positions without a token id."""
    assert batch.mask is not None
    assert encoder.words is not None
    mask, ids = batch.mask[row], batch.ids[row]
    # Some tokenizers return bytes.
    pieces: list[Any] = encoder.words(ids.tolist()) + [""] * (len(mask) - len(ids))
    return [
        piece.decode("utf-8", "replace") if isinstance(piece, bytes) else str(piece)
        for piece, real in zip(pieces, mask.tolist(), strict=True)
        if real
    ]


def with_blanks(pieces: Sequence[str], others: Sequence[str] = ()) -> list[str]:
    """Remove a tokenizer's marks from its pieces, and put a space before each piece that begins a word.

    Tokenizers either mark the pieces that begin a word, that end one, or that continue one. A mark that is a piece by
    itself becomes a space.

    Args:
        pieces: pieces of a caption.
        others: pieces of another text by the same tokenizer, because a caption of one word may contain no mark.
    """
    marked = [*pieces, *others]
    texts = _as_texts(pieces, marked)
    ended = any(_WORD_END in piece for piece in marked)
    begun = not ended and any(mark in piece for piece in marked for mark in _WORD_STARTS)
    result: list[str] = []
    before = ""
    for text in texts:
        if ended:
            begins, plain = before.endswith(_WORD_END), text.removesuffix(_WORD_END)
        elif begun:
            spaced = re.sub("|".join(_WORD_STARTS), " ", text)
            begins, plain = spaced.startswith(" "), spaced.lstrip(" ")
        else:
            begins, plain = not text.startswith(_CONTINUATION), text.removeprefix(_CONTINUATION)
        special = _SPECIAL.fullmatch(text) or _SPECIAL.fullmatch(before)
        blank = (special or begins) if plain else (begun and begins)
        result.append(" " * bool(result and blank) + plain)
        before = text
    return result


def _as_texts(pieces: Sequence[str], marked: Sequence[str]) -> list[str]:
    """Decode the pieces of a byte-level tokenizer, with each letter at its last byte; other pieces are unchanged."""
    if not any(mark in piece for piece in marked for mark in ("Ġ", _WORD_END)):
        return [*pieces]
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        return [decoder.decode(bytes(_BYTES[letter] for letter in piece)) for piece in pieces]
    except (KeyError, UnicodeDecodeError):
        return [*pieces]


class Frame:
    """Determines which part of an image an encoder sees, by preparing images whose colours encode positions."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._boxes: dict[tuple[int, int], list[float] | None] = {}
        dark, bright = (Image.new("RGB", (64, 64), (level,) * 3) for level in (0, 255))
        self._dark, self._bright = (self._pixels(image)[:, -1, -1] for image in (dark, bright))

    def box(self, size: tuple[int, int]) -> list[float] | None:
        """Left, top, right and bottom of the visible part of an image, as fractions of its width and height.

        Values are outside 0 to 1 if the image is padded. None if the image is not just cropped and resized.
        """
        if size not in self._boxes:
            self._boxes[size] = self._find(*size)
        return self._boxes[size]

    def _find(self, width: int, height: int) -> list[float] | None:
        across = np.linspace(0, 255, 2 * width + 1)[1::2]
        down = np.linspace(0, 255, 2 * height + 1)[1::2]
        positions = np.zeros((height, width, 3), np.uint8)
        positions[..., 0], positions[..., 1] = across.round(), down.round()[:, None]
        pixels = self._pixels(Image.fromarray(positions))
        with np.errstate(divide="ignore", invalid="ignore"):
            shares = (pixels - self._dark[:, None, None]) / (self._bright - self._dark)[:, None, None]
        rows, columns = shares.shape[1:]
        # Lines through the centre, which is never padding.
        x, y = _line(shares[0, rows // 2]), _line(shares[1, :, columns // 2])
        return None if x is None or y is None else [x[0], y[0], x[1], y[1]]

    def _pixels(self, image: Image.Image) -> NDArray[np.float64]:
        pixels = self._encoder.prepare([image]).pixels
        if pixels.ndim != 4:
            return np.full((3, 2, 2), np.nan)
        values: NDArray[np.float64] = pixels[0].double().numpy()
        return values


def _line(shares: NDArray[np.float64]) -> tuple[float, float] | None:
    """Start and end of the line fitted to the positions along a row of pixels, without the constant padding."""
    n, step = len(shares), max(1, len(shares) // 16)
    rises = shares[step:] - shares[:-step]
    steep = np.flatnonzero(rises > 0.7 * rises.max())
    if not np.isfinite(shares).all() or rises.max() <= 0:
        return None
    inner = np.arange(steep[0], steep[-1] + step + 1)
    slope, start = np.polyfit((inner + 0.5) / n, shares[inner], 1)
    return float(start), float(start + slope)
