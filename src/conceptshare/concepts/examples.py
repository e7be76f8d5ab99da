"""Stage `examples`: what shows a feature beside the samples on which it is strongest.

`results/{dataset}/examples/{sae}/{encoder}@{seed}/` holds a table for each layer, `layer-NN.parquet`, with a row for
each feature: its strongest samples; samples around lower quantiles of its activations, as the strongest alone mislead;
a histogram; and where in the strongest samples it fires. `samples.parquet` tells what the tokens of those samples are:
a grid on the part of the picture that the encoder saw, or pieces of the caption.

Where a feature fires comes from another forward pass over those samples, so that it is there whether tokens are stored
or not. It is what the SAE's encoder gives at each token, before TopK and after ReLU, as features are at the global one.
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

from conceptshare.data.dataset import Data
from conceptshare.device import default_device, full_float32
from conceptshare.encoders import Batch, Encoder
from conceptshare.io import provenance
from conceptshare.io.ahead import in_order
from conceptshare.io.errors import StoreError
from conceptshare.io.files import EXAMPLES, Unchanged, atomic_output
from conceptshare.io.layout import layer_name
from conceptshare.io.progress import progress
from conceptshare.io.readers import FEATURES, read_features
from conceptshare.io.seals import seal
from conceptshare.io.sizes import HISTOGRAM_BINS, NEAR, QUANTILES, SHOWN_SAMPLES
from conceptshare.io.store import layer_array, open_store
from conceptshare.sae import TopKSAE, load_sae
from conceptshare.sae.folder import sae_of

# Working memory for the activations of a block of features.
_BLOCK_BYTES = 2**28
# How tokenizers mark a piece that begins a word, ends one, or goes on with one; and pieces that are no text.
_BEGINS, _ENDS, _GOES_ON = ("▁", "Ġ", " "), "</w>", "##"
_SPECIAL = re.compile(r"<.+>|\[.+\]")
# The letters that byte-level tokenizers, such as GPT-2's and CLIP's, write for bytes.
_PRINTED = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTES = {chr(byte): byte for byte in _PRINTED}
_BYTES |= {chr(0x100 + n): byte for n, byte in enumerate(byte for byte in range(0x100) if byte not in _PRINTED)}
# Tokens before those of a picture's grid: one for the class, and registers.
_MOST_BEFORE = 16

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
_IMAGES = pa.schema({"sample": pa.int32(), "box": pa.list_(pa.float32(), 4), "rows": pa.int32(), "columns": pa.int32()})
_TEXTS = pa.schema({"sample": pa.int32(), "tokens": pa.list_(pa.string())})


@full_float32()
def record_examples(encoder: Encoder, data: Data, features: Path, saes: Path, out: Path, threads: int = 1) -> None:
    """Write the folder ``out``.

    Args:
        encoder: the encoder that the features are of.
        data: the samples.
        features: the feature store.
        saes: the folder with `layer-NN/seed-S/` for each layer.
        out: the folder to write.
        threads: threads that decode and prepare pictures.

    Raises:
        StoreError: where the features are missing, damaged, of other samples or of another encoder, or where an SAE is
            missing.
        EncoderError: where the encoder is not what its entry says.
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
        told = find_where_they_fire(encoder, data, loaded, tops, out.name, threads)
        schema = _IMAGES if encoder.spec.modality == "image" else _TEXTS
        pq.write_table(pa.Table.from_pylist(told, schema), partial / "samples.parquet", compression="zstd")
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
    """The strongest samples of a layer's features, and where in them each fires.

    Args:
        samples: ``[F, K]`` int32, strongest first, -1 where a feature is active on fewer.
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
        """Those that are among the strongest of any feature, in order."""
        return np.unique(self._of_sample)

    def entries(self, sample: int) -> NDArray[np.int64]:
        """``[n, 2]``: the features that a sample is among the strongest of, and its rank there."""
        first, last = np.searchsorted(self._of_sample, [sample, sample + 1])
        return self._entries[first:last]

    def add(self, entries: NDArray[np.int64], values: Tensor) -> None:
        """Take ``values [T, n]``, the activation at each token of a sample for each of its entries."""
        highest = values.amax(0)
        shares = (255 * values / highest.clamp(min=1e-30)).round().to(torch.uint8).T.cpu().numpy()
        for (feature, rank), share, value in zip(entries.tolist(), shares, highest.tolist(), strict=True):
            self._fires[feature, rank] = share.tobytes(), value

    def rows(self) -> Iterator[list[dict[str, Any]]]:
        """For each feature its samples, strongest first."""
        for feature, (samples, values) in enumerate(zip(self._samples, self._values, strict=True)):
            row = []
            for rank in np.flatnonzero(samples >= 0).tolist():
                fires, highest = self._fires.get((feature, rank), (None, None))
                told = {"sample": samples[rank], "value": values[rank], "fires": fires, "fires_highest": highest}
                row.append(told)
            yield row


def spreads(features: Any) -> Iterator[dict[str, Any]]:
    """For each column of ``features [N, F]``: its histogram, and samples around lower quantiles."""
    N, F = features.shape
    width = max(1, _BLOCK_BYTES // (16 * N))
    for first in range(0, F, width):
        # Not in this loop: a block would stay in memory while the next one is sorted.
        yield from _spreads_of_block(features[:, first : first + width])


def _spreads_of_block(block: NDArray[Any]) -> list[dict[str, Any]]:
    device = default_device()
    ordered = torch.from_numpy(block).to(device).float().sort(dim=0, descending=True, stable=True)
    return [_spread(*column) for column in zip(*(x.cpu().numpy().T for x in ordered), strict=True)]


def _spread(values: NDArray[np.float32], samples: NDArray[np.int64]) -> dict[str, Any]:
    """Of a feature's values ``[N]``, strongest first, and the samples they are of."""
    active = values[values > 0]
    highest = float(active[0]) if len(active) else 0.0
    near = zip(QUANTILES, ranks_near(len(active)), strict=True)
    return {
        # Copies, as views would keep the values of all samples in memory.
        "near": [
            {"quantile": q, "samples": samples[ranks].copy(), "values": active[ranks].copy()} for q, ranks in near
        ],
        "histogram": np.histogram(active, HISTOGRAM_BINS, (0.0, highest or 1.0))[0],
        "highest": highest,
    }


def ranks_near(active: int) -> list[slice]:
    """Of so many samples, strongest first, those around each quantile: none of the top ones, and none twice."""
    ranks, taken = [], SHOWN_SAMPLES
    for q in QUANTILES:
        first = max(taken, round((1 - q) * (active - 1)) - NEAR // 2)
        taken = max(taken, min(first + NEAR, active))
        ranks.append(slice(first, taken))
    return ranks


def find_where_they_fire(
    encoder: Encoder, data: Data, saes: dict[int, TopKSAE], tops: dict[int, Tops], name: str, threads: int
) -> list[dict[str, Any]]:
    """Add to ``tops`` where in its strongest samples each feature fires.

    Args:
        encoder: the encoder.
        data: the samples.
        saes: by layer.
        tops: by layer.
        name: the member's, for progress.
        threads: threads that decode and prepare pictures.

    Returns:
        for each of these samples: the ``box`` of a picture that the encoder saw and the grid of its tokens, or the
        ``tokens`` of a caption.
    """
    saes = {layer: sae.to(encoder.device) for layer, sae in saes.items()}
    samples = np.unique(np.concatenate([top.samples() for top in tops.values()]))
    frame, told = Frame(encoder) if encoder.spec.modality == "image" else None, []
    two_words = [] if frame is not None else _pieces(encoder, encoder.prepare(["a dog"]), 0)
    for chosen, pictures, batch in _batches(encoder, data, samples, threads, name):
        found = encoder.read(batch)
        for row, sample in enumerate(chosen.tolist()):
            if frame is not None:
                place, side = _grid(batch, found.training.shape[1])
                told.append({"sample": sample, "box": frame.box(pictures[row]), "rows": side, "columns": side})
            else:
                assert batch.mask is not None
                place = batch.mask[row].nonzero()[:, 0]
                told.append({"sample": sample, "tokens": with_blanks(_pieces(encoder, batch, row), two_words)})
            if not len(place):
                continue
            place = place.to(encoder.device)
            for layer, x in found.tokens.items():
                entries = tops[layer].entries(sample)
                if len(entries):
                    tops[layer].add(entries, _encoded(saes[layer], x[row, place], entries[:, 0]))
    return told


def _batches(
    encoder: Encoder, data: Data, samples: NDArray[np.int32], threads: int, name: str
) -> Iterator[tuple[NDArray[np.int32], list[Any], Batch]]:
    """Samples with their pictures or captions and inputs, a batch at a time, a few prepared ahead."""
    read: Any = data.image if encoder.spec.modality == "image" else data.caption

    def prepare(chosen: NDArray[np.int32]) -> tuple[NDArray[np.int32], list[Any], Batch]:
        read_ = [read(sample) for sample in chosen.tolist()]
        return chosen, [getattr(one, "size", None) for one in read_], encoder.prepare(read_)

    starts = range(0, len(samples), encoder.spec.batch_size)
    workers = threads if encoder.spec.modality == "image" else 1  # tokenizers cannot be used by two threads at once
    with ThreadPoolExecutor(workers) as pool:
        jobs = (pool.submit(prepare, samples[start : start + encoder.spec.batch_size]).result for start in starts)
        yield from progress(in_order(jobs, workers), len(starts), f"where features of {name} fire", "batches")


@torch.inference_mode()
def _encoded(sae: TopKSAE, x: Tensor, latents: NDArray[np.int64]) -> Tensor:
    """``[T, n]`` some latents of ``x [T, D]``, of which float16 is stored and trained on."""
    chosen = torch.from_numpy(latents).to(x.device)
    return torch.relu(torch.addmm(sae.b_enc[chosen], x.half().float() - sae.b_dec, sae.W_enc_T[chosen].T))


def _grid(batch: Batch, tokens: int) -> tuple[Tensor, int]:
    """The positions of a picture's square grid, which is what comes last, and its side; none where there is no such."""
    side = isqrt(tokens)
    before = tokens - side**2
    if batch.mask is not None or before > _MOST_BEFORE:  # patches in the picture's own proportions
        return torch.empty(0, dtype=torch.long), 0
    return torch.arange(before, tokens), side


def _pieces(encoder: Encoder, batch: Batch, row: int) -> list[str]:
    """The pieces of a caption at its unpadded positions, as the tokenizer has them; empty where one is no text."""
    assert batch.mask is not None
    assert encoder.words is not None
    mask, ids = batch.mask[row], batch.ids[row]
    # Some tokenizers give bytes.
    pieces: list[Any] = encoder.words(ids.tolist()) + [""] * (len(mask) - len(ids))
    return [
        piece.decode("utf-8", "replace") if isinstance(piece, bytes) else str(piece)
        for piece, real in zip(pieces, mask.tolist(), strict=True)
        if real
    ]


def with_blanks(pieces: Sequence[str], others: Sequence[str] = ()) -> list[str]:
    """A tokenizer's pieces without its marks, with a blank before each that begins a word.

    Tokenizers mark the pieces that begin a word, those that end one, or those that go on with one. A mark that is a
    piece of its own is a blank.

    Args:
        pieces: of a caption.
        others: pieces of another text by the same tokenizer, as a caption of one word may hold no mark.
    """
    marked = [*pieces, *others]
    texts = _as_texts(pieces, marked)
    ended = any(_ENDS in piece for piece in marked)
    begun = not ended and any(mark in piece for piece in marked for mark in _BEGINS)
    said: list[str] = []
    before = ""
    for text in texts:
        if ended:
            begins, plain = before.endswith(_ENDS), text.removesuffix(_ENDS)
        elif begun:
            spaced = re.sub("|".join(_BEGINS), " ", text)
            begins, plain = spaced.startswith(" "), spaced.lstrip(" ")
        else:
            begins, plain = not text.startswith(_GOES_ON), text.removeprefix(_GOES_ON)
        special = _SPECIAL.fullmatch(text) or _SPECIAL.fullmatch(before)
        blank = (special or begins) if plain else (begun and begins)
        said.append(" " * bool(said and blank) + plain)
        before = text
    return said


def _as_texts(pieces: Sequence[str], marked: Sequence[str]) -> list[str]:
    """Pieces as they are, or, of a byte-level tokenizer, what their bytes say: a letter is where its last byte is."""
    if not any(mark in piece for piece in marked for mark in ("Ġ", _ENDS)):
        return [*pieces]
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        return [decoder.decode(bytes(_BYTES[letter] for letter in piece)) for piece in pieces]
    except (KeyError, UnicodeDecodeError):
        return [*pieces]


class Frame:
    """Tells which part of a picture an encoder sees.

    It is found by showing the encoder's preparation pictures whose colours tell their place.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._boxes: dict[tuple[int, int], list[float] | None] = {}
        dark, bright = (Image.new("RGB", (64, 64), (level,) * 3) for level in (0, 255))
        self._dark, self._bright = (self._seen(picture)[:, -1, -1] for picture in (dark, bright))

    def box(self, size: tuple[int, int]) -> list[float] | None:
        """Left, top, right and bottom of what is seen of a picture, in shares of its width and height.

        They lie beyond 0 and 1 where it is padded. None where the picture is seen in another way than cut and resized.
        """
        if size not in self._boxes:
            self._boxes[size] = self._find(*size)
        return self._boxes[size]

    def _find(self, width: int, height: int) -> list[float] | None:
        across = np.linspace(0, 255, 2 * width + 1)[1::2]
        down = np.linspace(0, 255, 2 * height + 1)[1::2]
        places = np.zeros((height, width, 3), np.uint8)
        places[..., 0], places[..., 1] = across.round(), down.round()[:, None]
        seen = self._seen(Image.fromarray(places))
        with np.errstate(divide="ignore", invalid="ignore"):
            shares = (seen - self._dark[:, None, None]) / (self._bright - self._dark)[:, None, None]
        rows, columns = shares.shape[1:]
        # Through the centre, which is never padding.
        x, y = _line(shares[0, rows // 2]), _line(shares[1, :, columns // 2])
        return None if x is None or y is None else [x[0], y[0], x[1], y[1]]

    def _seen(self, picture: Image.Image) -> NDArray[np.float64]:
        pixels = self._encoder.prepare([picture]).pixels
        if pixels.ndim != 4:
            return np.full((3, 2, 2), np.nan)
        seen: NDArray[np.float64] = pixels[0].double().numpy()
        return seen


def _line(shares: NDArray[np.float64]) -> tuple[float, float] | None:
    """Where the line through the places of a row of pixels begins and ends; padding, where it is level, left out."""
    n, step = len(shares), max(1, len(shares) // 16)
    rises = shares[step:] - shares[:-step]
    steep = np.flatnonzero(rises > 0.7 * rises.max())
    if not np.isfinite(shares).all() or rises.max() <= 0:
        return None
    inner = np.arange(steep[0], steep[-1] + step + 1)
    slope, start = np.polyfit((inner + 0.5) / n, shares[inner], 1)
    return float(start), float(start + slope)
