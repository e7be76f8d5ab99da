"""Stage `activations`: one forward pass over a data set records every layer of an encoder.

`results/{dataset}/activations/{encoder}.zarr` holds the global tokens, ``layer-NN/global [N, D]`` float16 for each
recorded layer. `results/{dataset}/tokens/{encoder}.zarr` holds the training tokens of SAEs, ``layer-NN/tokens [T, D]``
float16 (unpadded tokens and the global token), and, shared by all layers, ``offsets [N + 1]`` and ``global_rows [N]``:
the tokens of sample i are rows ``offsets[i]`` to ``offsets[i + 1]``, and its global token is row ``global_rows[i]``. If
the global token is a mean or maximum, it is the last row of its sample.
"""

import json
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from conceptshare.config.catalog import EncoderSpec
from conceptshare.data.dataset import Data
from conceptshare.encoders import Activations, Arrays, Batch, Encoder
from conceptshare.io import sizes
from conceptshare.io.ahead import in_order
from conceptshare.io.errors import EncoderError
from conceptshare.io.layout import layer_name
from conceptshare.io.progress import info, progress
from conceptshare.io.sizes import IN_MEMORY_BYTES
from conceptshare.io.store import (
    RowWriter,
    StoredArray,
    as_float16,
    layer_array,
    new_array,
    new_store,
    open_store,
    resuming,
)

KIND, TOKENS = "activations", "tokens"
"""Kinds of stores: global tokens, and all tokens."""

GLOBAL_SHARD_BYTES = 2**20
"""Shard size of global tokens. Smaller, because there are few, so that fewer are only held in memory."""
_INDEX_ROWS = 2**16
# Number of batches that may wait to be written.
_AHEAD = 2
# More rows than any store has.
_ALL = range(2**62)


def extract_activations(
    encoder: Encoder | Arrays, data: Data, out: Path, tokens: Path | None = None, threads: int = 1
) -> None:
    """Record the residual stream of every sample: global tokens in the store ``out``, all tokens in ``tokens``.

    Images are decoded, the encoder runs and shards are written concurrently. If an earlier attempt was interrupted, its
    finished shards are kept; the result is the same to the byte as that of an uninterrupted run.

    Args:
        encoder: the encoder, or the arrays in its place.
        data: the samples.
        out: the store of global tokens to write.
        tokens: the store of all tokens to write; without one, only global tokens are stored.
        threads: number of threads that decode and prepare images.

    Raises:
        NumericsError: if an activation is not finite or does not fit float16; the message names layer and sample.
        EncoderError: if the encoder does not match its catalog entry.
        StoreError: if the partial store of an earlier attempt is damaged.
    """
    described = describe(encoder, data, out.stem)
    with (
        new_store(out, KIND, described, resume=True) as store,
        new_store(tokens, TOKENS, described, resume=True) if tokens else nullcontext() as token_store,
    ):
        with resuming(tokens or out):
            recorder = Recorder(store, token_store, encoder.spec, len(data))
        record(encoder, data, recorder, threads, out.stem)


def record(encoder: Encoder | Arrays, data: Data, recorder: "Recorder", threads: int, name: str) -> None:
    """Pass the missing batches to a recorder, which writes while the next batches are computed."""
    started, starts = time.monotonic(), range(recorder.start, recorder.share.end, encoder.spec.batch_size)
    if recorder.start > recorder.share.first:
        info(f"{name}: resuming at sample {recorder.start:,} from an earlier attempt")
    writes: deque[Future[None]] = deque()
    with (
        ThreadPoolExecutor(1) as writing,
        closing(forward_pass(encoder, data, starts, threads, name)) as batches,
    ):
        for kept in progress(batches, len(starts), f"activations of {name}", "batches"):
            writes.append(writing.submit(recorder.append, kept))
            if len(writes) > _AHEAD:
                writes.popleft().result()
        for write in writes:
            write.result()
    recorder.close()
    seconds, made, layers = time.monotonic() - started, recorder.share.end - starts.start, encoder.spec.layer_numbers()
    info(f"{name}: {made:,} samples, {len(layers)} layers in {seconds:.1f} s ({made / seconds:.3g}/s)")


def describe(encoder: Encoder | Arrays, data: Data, name: str) -> dict[str, Any]:
    """The spec of a store of an encoder's activations: its inputs and settings."""
    spec = encoder.spec
    return {
        "name": name,
        "encoder": json.loads(spec.activations_key()),
        "weights": encoder.fingerprint,
        "content_hash": data.content_hash,
        "samples": len(data),
        "batch_size": spec.batch_size,
        "layers": spec.layer_numbers(),
        "width": spec.width,
    }


def forward_pass(
    encoder: Encoder | Arrays, data: Data, starts: Sequence[int], threads: int, name: str
) -> Generator["KeptRows", None, None]:
    """Yield the stored rows of the batches that begin at ``starts``, in order; the next batches are prefetched."""
    if isinstance(encoder, Arrays):
        yield from (_rows_of_arrays(encoder, start, name) for start in starts)
        return
    for start, batch in prepared(encoder, data, starts, threads):
        yield kept_rows(encoder.read(batch), encoder.spec, start, name)


@dataclass(frozen=True)
class KeptRows:
    """The rows of a batch that are stored."""

    start: int
    """The batch's first sample."""
    counts: NDArray[np.int64]
    """``[B]`` number of rows per sample."""
    places: NDArray[np.int64]
    """``[B]`` index of the global token among its sample's rows."""
    tokens: dict[int, Tensor]
    """``[rows, D]`` float16 training tokens by layer, sample by sample, on the encoder's device."""
    global_token: dict[int, Tensor]
    """``[B, D]`` float16 by layer."""

    def of(self, samples: NDArray[np.int64]) -> dict[int, Tensor]:
        """``[rows, D]`` training tokens of consecutive samples, by layer."""
        ends = self.counts.cumsum()
        first, last = samples[0] - self.start, samples[-1] - self.start
        return {layer: x[ends[first] - self.counts[first] : ends[last]] for layer, x in self.tokens.items()}


def rows_of_globals(counts: NDArray[np.int64], places: NDArray[np.int64]) -> NDArray[np.int64]:
    """``[n]`` rows of global tokens, from the number of rows per sample and their indices among these."""
    rows: NDArray[np.int64] = counts.cumsum() - counts + places
    return rows


def _rows_of_arrays(arrays: Arrays, start: int, name: str) -> KeptRows:
    """The rows of a batch of arrays: each sample has one token, its global token."""
    numbers = np.arange(start, min(start + arrays.spec.batch_size, len(arrays)))
    tokens = {
        layer: _to_float16(
            arrays.rows(layer, start, start + len(numbers)), arrays.spec, f"{name}, layer {layer}", numbers
        )
        for layer in arrays.spec.layer_numbers()
    }
    return KeptRows(start, np.ones_like(numbers), np.zeros_like(numbers), tokens, tokens)


def kept_rows(activations: Activations, spec: EncoderSpec, start: int, name: str) -> KeptRows:
    """Select the rows of a batch that are stored and trained on, as float16.

    Args:
        activations: the encoder's activations.
        spec: the encoder.
        start: number of the batch's first sample.
        name: the encoder's name, for messages.

    Raises:
        NumericsError: if an activation is not finite or does not fit float16.
    """
    numbers = np.arange(start, start + len(activations.training))
    chosen = activations.training
    if spec.max_tokens is not None:
        chosen = _draw_tokens(activations, spec, numbers)
    counts = chosen.sum(1)
    if activations.position is None:
        # A mean or maximum has no position: it is an additional row after the others.
        counts = counts + 1
        places = counts - 1
    else:
        places = chosen.cumsum(1).gather(1, activations.position[:, None])[:, 0] - 1
    counts_ = counts.cpu().numpy().astype(np.int64)
    global_token = {n: _to_float16(x, spec, f"{name}, layer {n}", numbers) for n, x in activations.global_token.items()}
    tokens = {}
    for layer, x in activations.tokens.items():
        kept = x[:, : chosen.shape[1]]  # of layers with several numbers of tokens, none but the global one
        mask = chosen
        if activations.position is None:
            kept = torch.cat([kept, activations.global_token[layer][:, None]], dim=1)
            mask = torch.cat([chosen, chosen.new_ones(len(chosen), 1)], dim=1)
        rows = kept.flatten(0, 1) if mask.all() else kept[mask]
        tokens[layer] = _to_float16(rows, spec, f"{name}, layer {layer}", np.repeat(numbers, counts_))
    return KeptRows(start, counts_, places.cpu().numpy().astype(np.int64), tokens, global_token)


def _draw_tokens(activations: Activations, spec: EncoderSpec, numbers: NDArray[np.int64]) -> Tensor:
    """``[B, T]`` bool: at most ``spec.max_tokens`` training positions per sample, including the global token.

    The draw only depends on the sample's number and the seed, not on the batch.
    """
    assert spec.max_tokens is not None
    training = activations.training.cpu().numpy()
    chosen = np.zeros_like(training)
    for row, (number, allowed) in enumerate(zip(numbers, training, strict=True)):
        if activations.position is not None:
            position = int(activations.position[row])
            chosen[row, position] = True
            allowed = allowed & ~chosen[row]
        others = np.flatnonzero(allowed)
        draw = np.random.default_rng([spec.token_seed, int(number)])
        # The global token, whether it has a position or not, counts as one of max_tokens.
        chosen[row, draw.permutation(others)[: spec.max_tokens - 1]] = True
    return torch.from_numpy(chosen).to(activations.training.device)


def _to_float16(x: Tensor, spec: EncoderSpec, where: str, numbers: NDArray[np.int64]) -> Tensor:
    converted = x.half()
    # min and max propagate NaN and inf, so one pass checks finiteness.
    if len(converted) and not torch.isfinite(torch.stack(converted.aminmax())).all():
        remedy = "leave the sample or the layer out"
        if spec.precision != "float32":
            remedy = f"set precision: float32 in place of {spec.precision}, or {remedy}"
        as_float16(x.cpu().numpy(), where, numbers, remedy)
    return converted


def prepared(encoder: Encoder, data: Data, starts: Sequence[int], threads: int) -> Iterator[tuple[int, Batch]]:
    """Yield the first sample and the inputs of the batches that begin at ``starts``, in order, with prefetching."""
    # Tokenizers of transformers are not thread-safe.
    workers = threads if encoder.spec.modality == "image" else 1
    with ThreadPoolExecutor(workers) as pool:
        batches = in_order((pool.submit(prepare, encoder, data, start).result for start in starts), workers)
        yield from zip(starts, batches, strict=True)


def prepare(encoder: Encoder, data: Data, start: int) -> Batch:
    """Prepare the inputs of the batch that begins at a sample."""
    spec = encoder.spec
    rows = range(start, min(start + spec.batch_size, len(data)))
    samples = [data.image(n) for n in rows] if spec.modality == "image" else [data.caption(n) for n in rows]
    try:
        return encoder.prepare(samples)
    except EncoderError:
        raise
    except Exception as error:  # processors and tokenizers raise many types
        raise EncoderError(
            f"{encoder.spec.model}: samples {start} to {start + len(samples) - 1} cannot be converted to inputs "
            f"({type(error).__name__}: {str(error).strip()}); check its image processor or tokenizer"
        ) from error


@dataclass(frozen=True)
class Share:
    """The share of an extraction that one job records: the shards that begin among the rows of its samples."""

    first: int
    """First sample."""
    stop: int
    """End of its samples (exclusive)."""
    end: int
    """End of the samples that it reads (exclusive), in order to fill its last shards."""
    row: int
    """Row of tokens at which its first sample begins."""
    stop_row: int | None
    """Row of tokens at which sample ``stop`` begins; None if unknown beforehand."""
    rows: range
    """Rows of tokens in its shards."""
    samples: range
    """Samples whose global tokens are in its shards."""

    @classmethod
    def whole(cls, samples: int) -> Self:
        """The share that is the whole data set."""
        return cls(0, samples, samples, 0, None, _ALL, _ALL)


def _within(rows: Tensor, first: int, own: range) -> Tensor:
    """Select the rows with numbers in ``own``; the first row has the number ``first``."""
    return rows[max(own.start - first, 0) : max(own.stop - first, 0)]


class Recorder:
    """Writes the arrays of both stores batch by batch, and records how much of them is on disk.

    The stores' attribute ``progress`` is updated whenever a shard of every layer is finished. It holds the number of
    ``rows`` of tokens in finished shards, and the number of ``samples`` whose ``offsets``, ``global_rows`` and global
    tokens are on disk. The store of global tokens is updated first; if it is lost, all samples are read again. Without
    a store of all tokens, ``progress`` is updated whenever a shard of global tokens is finished.

    Args:
        activations: the store of global tokens.
        tokens: the store of all tokens; none if only global tokens are recorded.
        spec: the encoder.
        samples: N.
        share: the share to record; by default the whole data set.
    """

    def __init__(
        self, activations: Any, tokens: Any | None, spec: EncoderSpec, samples: int, share: Share | None = None
    ) -> None:
        self.share = share or Share.whole(samples)
        self._activations, self._token_store = activations, tokens
        none = {"rows": self.share.rows.start, "samples": self.share.first}
        stored = activations.attrs.get("progress", none)["samples"]
        self._offsets = [self.share.row]
        self._global_rows: list[int] = []
        self._tokens: dict[int, RowWriter] = {}
        if tokens is not None:
            stored = self._resume_tokens(tokens, spec, samples, stored, tokens.attrs.get("progress", none))
        self.start = stored // spec.batch_size * spec.batch_size
        """First sample to read; batches are the same as in an uninterrupted run."""
        self._samples = self.start
        self._global = GlobalTokens(activations, spec, self.start, self.share.samples)

    def _resume_tokens(
        self, tokens: Any, spec: EncoderSpec, samples: int, stored: int, progress: dict[str, int]
    ) -> int:
        """Prepare the arrays of tokens, and return the number of samples that are complete in both stores."""
        first = self.share.first
        for name, length in [("offsets", samples + 1), ("global_rows", samples)]:
            if name not in tokens:
                save_index(tokens, name, np.zeros(length, np.int64))
        offsets = np.append(self.share.row, tokens["offsets"][first + 1 : progress["samples"] + 1])
        global_rows = tokens["global_rows"][first : progress["samples"]]
        if ((global_rows < offsets[:-1]) | (global_rows >= offsets[1:])).any():
            raise ValueError("offsets and global_rows do not match")
        complete = min(stored, first + int(np.searchsorted(offsets[1:], progress["rows"], side="right")))
        self._offsets = [int(offsets[complete // spec.batch_size * spec.batch_size - first])]
        self._own = range(progress["rows"], self.share.rows.stop)
        groups = {layer: tokens.require_group(layer_name(layer)) for layer in spec.layer_numbers()}
        self._tokens = {
            layer: RowWriter(
                group,
                "tokens",
                spec.width_of(layer),
                np.float16,
                sizes.SHARD_BYTES,
                self._own.start,
                self.share.rows.start,
            )
            for layer, group in groups.items()
        }
        return complete

    def append(self, kept: KeptRows) -> None:
        """Add a batch."""
        first_row = self._offsets[-1]
        ends = first_row + np.cumsum(kept.counts)
        self._global_rows += (ends - kept.counts + kept.places).tolist()
        self._offsets += ends.tolist()
        before = self._written()
        for layer, writer in self._tokens.items():
            writer.append(_within(kept.tokens[layer], first_row, self._own).cpu().numpy())
        self._global.append(kept)
        if self._written() > before:
            self._save_progress()

    def close(self) -> None:
        """Write the remaining rows."""
        for writer in self._tokens.values():
            writer.flush()
        self._save_progress()
        for store in self._stores():
            store.attrs.pop("progress", None)  # for a part, both are the same store

    def _stores(self) -> list[Any]:
        return [store for store in (self._activations, self._token_store) if store is not None]

    def _written(self) -> int:
        return min((writer.written for writer in self._tokens.values()), default=self._global.written)

    def _save_progress(self) -> None:
        end = self._samples + len(self._global_rows)
        if self._token_store is not None:
            self._token_store["offsets"][self._samples : end + 1] = self._offsets
            self._token_store["global_rows"][self._samples : end] = self._global_rows
        self._global.flush()
        for store in self._stores():
            store.attrs["progress"] = {"rows": self._written(), "samples": end}
        self._samples, self._offsets, self._global_rows = end, self._offsets[-1:], []


class GlobalTokens:
    """Writes the global tokens of an activation store batch by batch.

    Args:
        store: the store.
        spec: the encoder.
        keep: number of samples in the store from an earlier attempt.
        own: the samples to write, starting at a shard's start; by default all.
    """

    def __init__(self, store: Any, spec: EncoderSpec, keep: int, own: range = _ALL) -> None:
        self._own = range(min(max(keep, own.start), own.stop), own.stop)
        groups = {layer: store.require_group(layer_name(layer)) for layer in spec.layer_numbers()}
        self._writers = {
            layer: RowWriter(
                group, "global", spec.width_of(layer), np.float16, GLOBAL_SHARD_BYTES, self._own.start, own.start
            )
            for layer, group in groups.items()
        }
        self.samples = keep
        """Number of samples so far."""

    def append(self, kept: KeptRows) -> None:
        """Add a batch."""
        for layer, writer in self._writers.items():
            writer.append(_within(kept.global_token[layer], kept.start, self._own).cpu().numpy())
        self.samples += len(kept.counts)

    @property
    def written(self) -> int:
        """Number of samples in finished shards of every layer."""
        return min(writer.written for writer in self._writers.values())

    def flush(self) -> None:
        """Write all global tokens so far to disk."""
        for writer in self._writers.values():
            writer.flush()


class TokenReader:
    """The training tokens of one layer, by sample.

    Args:
        tokens: ``[T, D]``.
        offsets: ``[N + 1]`` start and end of each sample's tokens.
        global_rows: ``[N]`` row of each sample's global token.
        made_from: the spec of the store.
        block: the encoder's batch size.
    """

    def __init__(
        self,
        tokens: NDArray[np.float16] | StoredArray,
        offsets: NDArray[np.int64],
        global_rows: NDArray[np.int64],
        made_from: dict[str, Any] | None = None,
        block: int = 1,
    ) -> None:
        self._tokens = tokens
        self._offsets = offsets
        self._global_rows = global_rows
        self.made_from = made_from or {}
        self.block = block

    @classmethod
    def open(cls, path: Path, layer: int) -> Self:
        """Open a layer of a store of all tokens.

        Raises:
            StoreError: if the store is incomplete or damaged, only holds global tokens, or has no such layer.
        """
        store: Any = open_store(path, TOKENS, layer)
        offsets, global_rows = (StoredArray(store, name, path)[:] for name in ("offsets", "global_rows"))
        return cls._of(layer_array(store, layer, "tokens", path), offsets, global_rows, store)

    @classmethod
    def open_global(cls, path: Path, layer: int) -> Self:
        """Open a layer of an activation store, with one token per sample: its global token.

        Raises:
            StoreError: if the store is incomplete or damaged, or has no such layer.
        """
        store: Any = open_store(path, KIND, layer)
        tokens = layer_array(store, layer, "global", path)
        offsets = np.arange(tokens.shape[0] + 1)
        return cls._of(tokens, offsets, offsets[:-1], store)

    @classmethod
    def _of(cls, tokens: StoredArray, offsets: NDArray[np.int64], rows: NDArray[np.int64], store: Any) -> Self:
        spec = store.attrs["spec"]
        in_memory = tokens.nbytes <= IN_MEMORY_BYTES
        return cls(tokens[:] if in_memory else tokens, offsets, rows, spec, spec["batch_size"])

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @property
    def width(self) -> int:
        """D."""
        return int(self._tokens.shape[1])

    @property
    def modality(self) -> str:
        """Modality of the encoder that made them."""
        return str(self.made_from["encoder"]["modality"])

    def read(self, samples: NDArray[np.int64]) -> Tensor:
        """``[rows, D]`` float16 tokens of the given samples, in their order."""
        runs = np.split(samples, np.flatnonzero(np.diff(samples) != 1) + 1)
        parts = [self._tokens[self._offsets[run[0]] : self._offsets[run[-1] + 1]] for run in runs]
        return torch.from_numpy(np.concatenate(parts))

    def global_rows(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """``[n]`` rows of the samples' global tokens in `read`."""
        starts = self._offsets[samples]
        return rows_of_globals(self._offsets[samples + 1] - starts, self._global_rows[samples] - starts)

    def read_global(self, samples: NDArray[np.int64]) -> Tensor:
        """``[n, D]`` float16 global tokens of the given samples, in their order."""
        rows = [self._tokens[row] for row in self._global_rows[samples]]
        return torch.from_numpy(np.stack(rows))


def save_index(store: Any, name: str, numbers: NDArray[np.int64]) -> None:
    """Add ``offsets`` or ``global_rows`` to a store."""
    new_array(store, name, numbers.shape, np.int64, chunks=(min(len(numbers), _INDEX_ROWS),))[...] = numbers
