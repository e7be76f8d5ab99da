"""Stage `activations`: one forward pass over a data set records every layer of an encoder.

`results/{dataset}/activations/{encoder}.zarr` holds the global tokens, ``layer-NN/global [N, D]`` float16 for each
recorded layer. `results/{dataset}/tokens/{encoder}.zarr` holds what SAEs train on, ``layer-NN/tokens [T, D]`` float16
(unpadded tokens and the global one), and once for all layers ``offsets [N + 1]``: the tokens of sample i are rows
``offsets[i]`` to ``offsets[i + 1]``, of which row ``global_rows[i]`` is its global token. Where that is a mean, it is
the last of its sample's rows.
"""

import json
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from conceptshare.config.catalog import EncoderSpec
from conceptshare.data.dataset import Data
from conceptshare.encoders import Activations, Batch, Encoder
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
"""Kinds of stores: of global tokens, and of all tokens."""

GLOBAL_SHARD_BYTES = 2**20
"""Of global tokens, which are few: smaller shards let less of them be held in memory only."""
_INDEX_ROWS = 2**16
# Batches that wait to be written.
_AHEAD = 2
# More rows than any store has.
_ALL = range(2**62)


def extract_activations(encoder: Encoder, data: Data, out: Path, tokens: Path, threads: int = 1) -> None:
    """Record the residual stream of every sample: global tokens in the store ``out``, all tokens in ``tokens``.

    Pictures are decoded, the encoder computes and shards are written at the same time. Where an earlier attempt was
    cut off, its finished shards are kept and the rest is made, with the same bytes as in one go.

    Args:
        encoder: the encoder.
        data: the samples.
        out: the store of global tokens to write.
        tokens: the store of all tokens to write.
        threads: threads that decode and prepare pictures.

    Raises:
        NumericsError: where an activation is not finite or does not fit float16; it names layer and sample.
        EncoderError: where the encoder is not what its entry says.
        StoreError: where what an earlier attempt left is damaged.
    """
    described = describe(encoder, data, out.stem)
    with (
        new_store(out, KIND, described, resume=True) as store,
        new_store(tokens, TOKENS, described, resume=True) as token_store,
    ):
        with resuming(tokens):
            recorder = Recorder(store, token_store, encoder.spec, len(data))
        record(encoder, data, recorder, threads, out.stem)


def record(encoder: Encoder, data: Data, recorder: "Recorder", threads: int, name: str) -> None:
    """Let a recorder have all batches that it lacks, and write while the next ones are computed."""
    started, starts = time.monotonic(), range(recorder.start, recorder.share.end, encoder.spec.batch_size)
    if recorder.start > recorder.share.first:
        info(f"{name}: going on at sample {recorder.start:,}, from what an earlier attempt left")
    writes: deque[Future[None]] = deque()
    with ThreadPoolExecutor(1) as writing:
        batches = forward_pass(encoder, data, starts, threads, name)
        for kept in progress(batches, len(starts), f"activations of {name}", "batches"):
            writes.append(writing.submit(recorder.append, kept))
            if len(writes) > _AHEAD:
                writes.popleft().result()
        for write in writes:
            write.result()
    recorder.close()
    seconds, made, layers = time.monotonic() - started, recorder.share.end - starts.start, encoder.spec.layer_numbers()
    info(f"{name}: {made:,} samples, {len(layers)} layers in {seconds:.1f} s ({made / seconds:.3g}/s)")


def describe(encoder: Encoder, data: Data, name: str) -> dict[str, Any]:
    """What a store of an encoder's activations is made from."""
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
    encoder: Encoder, data: Data, starts: Sequence[int], threads: int, name: str
) -> Generator["KeptRows", None, None]:
    """What is kept of the batches that begin at ``starts``, in their order, while the next ones are prepared."""
    for start, batch in prepared(encoder, data, starts, threads):
        yield kept_rows(encoder.read(batch), encoder.spec, start, name)


@dataclass(frozen=True)
class KeptRows:
    """What is kept of a batch, as it is stored."""

    start: int
    """The batch's first sample."""
    counts: NDArray[np.int64]
    """``[B]`` rows of each sample."""
    places: NDArray[np.int64]
    """``[B]`` which of its sample's rows is the global token."""
    tokens: dict[int, Tensor]
    """``[rows, D]`` float16 training tokens by layer, sample after sample, where the encoder is."""
    global_token: dict[int, Tensor]
    """``[B, D]`` float16 by layer."""

    def of(self, samples: NDArray[np.int64]) -> dict[int, Tensor]:
        """``[rows, D]`` training tokens of samples that follow one another, by layer."""
        ends = self.counts.cumsum()
        first, last = samples[0] - self.start, samples[-1] - self.start
        return {layer: x[ends[first] - self.counts[first] : ends[last]] for layer, x in self.tokens.items()}


def kept_rows(found: Activations, spec: EncoderSpec, start: int, name: str) -> KeptRows:
    """The rows of a batch that are stored and trained on, as float16.

    Args:
        found: the encoder's activations.
        spec: the encoder.
        start: number of the batch's first sample.
        name: the encoder's name, for messages.

    Raises:
        NumericsError: where an activation is not finite or does not fit float16.
    """
    numbers = np.arange(start, start + len(found.training))
    chosen = found.training
    if spec.max_tokens is not None:
        chosen = _drawn(found, spec, numbers)
    counts = chosen.sum(1)
    if found.position is None:
        # The mean stands for no position: it is a row of its own, behind the others.
        counts = counts + 1
        places = counts - 1
    else:
        places = chosen.cumsum(1).gather(1, found.position[:, None])[:, 0] - 1
    counts_ = counts.cpu().numpy().astype(np.int64)
    global_token = {n: _halves(x, spec, f"{name}, layer {n}", numbers) for n, x in found.global_token.items()}
    tokens = {}
    for layer, x in found.tokens.items():
        kept = x
        mask = chosen
        if found.position is None:
            kept = torch.cat([x, found.global_token[layer][:, None]], dim=1)
            mask = torch.cat([chosen, chosen.new_ones(len(chosen), 1)], dim=1)
        rows = kept.flatten(0, 1) if mask.all() else kept[mask]
        tokens[layer] = _halves(rows, spec, f"{name}, layer {layer}", np.repeat(numbers, counts_))
    return KeptRows(start, counts_, places.cpu().numpy().astype(np.int64), tokens, global_token)


def _drawn(found: Activations, spec: EncoderSpec, numbers: NDArray[np.int64]) -> Tensor:
    """``[B, T]`` bool: at most ``spec.max_tokens`` training positions a sample, the global token among them.

    A sample's draw depends on its number and the seed alone, and not on the batch it is in.
    """
    assert spec.max_tokens is not None
    training = found.training.cpu().numpy()
    chosen = np.zeros_like(training)
    for row, (number, allowed) in enumerate(zip(numbers, training, strict=True)):
        if found.position is not None:
            position = int(found.position[row])
            chosen[row, position] = True
            allowed = allowed & ~chosen[row]
        others = np.flatnonzero(allowed)
        draw = np.random.default_rng([spec.token_seed, int(number)])
        # The global token takes one place, be it a position or the mean.
        chosen[row, draw.permutation(others)[: spec.max_tokens - 1]] = True
    return torch.from_numpy(chosen).to(found.training.device)


def _halves(x: Tensor, spec: EncoderSpec, where: str, numbers: NDArray[np.int64]) -> Tensor:
    halves = x.half()
    # The extremes of what is not finite are not, and one pass finds both.
    if len(halves) and not torch.isfinite(torch.stack(halves.aminmax())).all():
        remedy = "leave the sample or the layer out"
        if spec.precision != "float32":
            remedy = f"set precision: float32 in place of {spec.precision}, or {remedy}"
        as_float16(x.cpu().numpy(), where, numbers, remedy)
    return halves


def prepared(encoder: Encoder, data: Data, starts: Sequence[int], threads: int) -> Iterator[tuple[int, Batch]]:
    """The first sample and the inputs of the batches that begin at ``starts``, in order, a few prepared ahead."""
    # Tokenizers of transformers cannot be used by two threads at once.
    workers = threads if encoder.spec.modality == "image" else 1
    with ThreadPoolExecutor(workers) as pool:
        batches = in_order((pool.submit(prepare, encoder, data, start).result for start in starts), workers)
        yield from zip(starts, batches, strict=True)


def prepare(encoder: Encoder, data: Data, start: int) -> Batch:
    """The inputs of the batch that begins at a sample."""
    samples = _samples(data, encoder.spec, start)
    try:
        return encoder.prepare(samples)
    except EncoderError:
        raise
    except Exception as error:  # processors and tokenizers raise many types
        raise EncoderError(
            f"{encoder.spec.model}: samples {start} to {start + len(samples) - 1} cannot be made into its inputs "
            f"({type(error).__name__}: {str(error).strip()}); check its image processor or tokenizer"
        ) from error


@dataclass(frozen=True)
class Share:
    """What one job records of an extraction: the shards that begin among the rows of its samples."""

    first: int
    """Its first sample."""
    stop: int
    """The sample after its last one."""
    end: int
    """The sample that it reads up to, to finish the shards that it began."""
    row: int
    """The row of tokens that its first sample begins at."""
    stop_row: int | None
    """The one that sample ``stop`` begins at; none where that is not known beforehand."""
    rows: range
    """Rows of tokens in its shards."""
    samples: range
    """Samples whose global tokens are in its shards."""

    @classmethod
    def whole(cls, samples: int) -> Self:
        """All of a data set."""
        return cls(0, samples, samples, 0, None, _ALL, _ALL)


def _within(rows: Tensor, first: int, own: range) -> Tensor:
    """Those of some rows, of which the first has the number ``first``, that are in ``own``."""
    return rows[max(own.start - first, 0) : max(own.stop - first, 0)]


class Recorder:
    """The arrays of both stores, filled batch after batch, and how much of them is safely on disk.

    The stores' attribute ``progress`` is renewed whenever a shard of every layer is finished: so many ``rows`` of
    tokens are in finished shards, and the ``offsets``, ``global_rows`` and global tokens of so many ``samples`` are
    there. The store of global tokens is renewed first; where it is lost, all samples are read again.

    Args:
        activations: the store of global tokens.
        tokens: the store of all tokens.
        spec: the encoder.
        samples: N.
        share: what to record; all without it.
    """

    def __init__(
        self, activations: Any, tokens: Any, spec: EncoderSpec, samples: int, share: Share | None = None
    ) -> None:
        self.share = share or Share.whole(samples)
        self._stores = activations, tokens
        first, nothing = self.share.first, {"rows": self.share.rows.start, "samples": self.share.first}
        global_progress, progress = (store.attrs.get("progress", nothing) for store in self._stores)
        for name, length in [("offsets", samples + 1), ("global_rows", samples)]:
            if name not in tokens:
                save_index(tokens, name, np.zeros(length, np.int64))
        offsets = np.append(self.share.row, tokens["offsets"][first + 1 : progress["samples"] + 1])
        global_rows = tokens["global_rows"][first : progress["samples"]]
        if ((global_rows < offsets[:-1]) | (global_rows >= offsets[1:])).any():
            raise ValueError("offsets and global_rows do not fit one another")
        whole = first + int(np.searchsorted(offsets[1:], progress["rows"], side="right"))
        self.start = min(whole, global_progress["samples"]) // spec.batch_size * spec.batch_size
        """The first sample that has to be read again; batches are the same as in one go."""
        self._samples = self.start
        self._offsets = [int(offsets[self.start - first])]
        self._global_rows: list[int] = []
        self._own = range(progress["rows"], self.share.rows.stop)
        groups = {layer: tokens.require_group(layer_name(layer)) for layer in spec.layer_numbers()}
        self._tokens = {
            layer: RowWriter(
                group, "tokens", spec.width, np.float16, sizes.SHARD_BYTES, self._own.start, self.share.rows.start
            )
            for layer, group in groups.items()
        }
        self._global = GlobalTokens(activations, spec, self.start, self.share.samples)

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
            self._note()

    def close(self) -> None:
        """Write what is left."""
        for writer in self._tokens.values():
            writer.flush()
        self._note()
        for store in self._stores:
            store.attrs.pop("progress", None)  # both are one store where it is a part's

    def _written(self) -> int:
        return min(writer.written for writer in self._tokens.values())

    def _note(self) -> None:
        end = self._samples + len(self._global_rows)
        _, tokens = self._stores
        tokens["offsets"][self._samples : end + 1] = self._offsets
        tokens["global_rows"][self._samples : end] = self._global_rows
        self._global.flush()
        for store in self._stores:
            store.attrs["progress"] = {"rows": self._written(), "samples": end}
        self._samples, self._offsets, self._global_rows = end, self._offsets[-1:], []


class GlobalTokens:
    """The global tokens of an activation store, filled batch after batch.

    Args:
        store: the store.
        spec: the encoder.
        keep: how many samples are there from an earlier attempt.
        own: the samples to write, which begin where a shard does; all without it.
    """

    def __init__(self, store: Any, spec: EncoderSpec, keep: int, own: range = _ALL) -> None:
        self._own = range(min(max(keep, own.start), own.stop), own.stop)
        groups = {layer: store.require_group(layer_name(layer)) for layer in spec.layer_numbers()}
        self._writers = {
            layer: RowWriter(group, "global", spec.width, np.float16, GLOBAL_SHARD_BYTES, self._own.start, own.start)
            for layer, group in groups.items()
        }
        self.samples = keep
        """Samples that are there."""

    def append(self, kept: KeptRows) -> None:
        """Add a batch."""
        for layer, writer in self._writers.items():
            writer.append(_within(kept.global_token[layer], kept.start, self._own).cpu().numpy())
        self.samples += len(kept.counts)

    def flush(self) -> None:
        """Let the store hold all that was added."""
        for writer in self._writers.values():
            writer.flush()


class TokenReader:
    """The training tokens of one layer, sample by sample.

    Args:
        tokens: ``[T, D]``.
        offsets: ``[N + 1]`` where each sample's tokens begin and end.
        global_rows: ``[N]`` which row is each sample's global token.
        made_from: what the store was made from.
        block: samples that the encoder read at once.
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
            StoreError: where the store is not whole, is of global tokens only, or has no such layer.
        """
        store: Any = open_store(path, TOKENS, layer)
        tokens, spec = layer_array(store, layer, "tokens", path), store.attrs["spec"]
        offsets, global_rows = (StoredArray(store, name, path)[:] for name in ("offsets", "global_rows"))
        return cls(
            tokens[:] if tokens.nbytes <= IN_MEMORY_BYTES else tokens,
            offsets,
            global_rows,
            spec,
            spec["batch_size"],
        )

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @property
    def width(self) -> int:
        """D."""
        return int(self._tokens.shape[1])

    @property
    def modality(self) -> str:
        """What the encoder that made them reads."""
        return str(self.made_from["encoder"]["modality"])

    def read(self, samples: NDArray[np.int64]) -> Tensor:
        """``[rows, D]`` float32 tokens of the given samples, in their order."""
        runs = np.split(samples, np.flatnonzero(np.diff(samples) != 1) + 1)
        parts = [self._tokens[self._offsets[run[0]] : self._offsets[run[-1] + 1]] for run in runs]
        return torch.from_numpy(np.concatenate(parts).astype(np.float32))

    def read_global(self, samples: NDArray[np.int64]) -> Tensor:
        """``[n, D]`` float32 global tokens of the given samples, in their order."""
        rows = [self._tokens[row] for row in self._global_rows[samples]]
        return torch.from_numpy(np.stack(rows).astype(np.float32))


def save_index(store: Any, name: str, numbers: NDArray[np.int64]) -> None:
    """Add ``offsets`` or ``global_rows`` to a store."""
    new_array(store, name, numbers.shape, np.int64, chunks=(min(len(numbers), _INDEX_ROWS),))[...] = numbers


def _samples(data: Data, spec: EncoderSpec, start: int) -> list[Image.Image] | list[str]:
    rows = range(start, min(start + spec.batch_size, len(data)))
    return [data.image(i) for i in rows] if spec.modality == "image" else [data.caption(i) for i in rows]
