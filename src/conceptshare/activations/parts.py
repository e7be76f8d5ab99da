"""Stage `activations` split into several jobs: each records some of the shards, and a final job joins them.

A part is a store with the shards that begin among the rows of its samples, with the same names as in the finished
stores, and with its samples' ``offsets`` and ``global_rows``, or with global tokens alone. So that every shard is
written by one part, a part reads past its last sample until its last shard is full, and skips the rows that belong to
the last shard of the previous part. Parts begin at batch boundaries, so all values are the same to the bit as without
parts.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import islice, pairwise, repeat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from conceptshare.activations import extraction
from conceptshare.activations.extraction import (
    KIND,
    TOKENS,
    Recorder,
    Share,
    describe,
    kept_rows,
    prepare,
    record,
    save_index,
)
from conceptshare.data.dataset import Data
from conceptshare.encoders import Encoder
from conceptshare.io import sizes
from conceptshare.io.errors import StoreError, StudyError
from conceptshare.io.files import Unchanged, link
from conceptshare.io.layout import layer_name
from conceptshare.io.store import StoredArray, new_rows, new_store, open_store, resuming, rows_of

PART = "part"
"""Kind of store."""


def extract_part(
    encoder: Encoder, data: Data, out: Path, part: int, parts: int, threads: int = 1, tokens: bool = True
) -> None:
    """Record one part of an extraction in the store ``out``.

    An interrupted extraction resumes from its last finished shards.

    Args:
        encoder: the encoder.
        data: the samples.
        out: the store to write.
        part: number of the part, from 1.
        parts: number of parts. Parts beyond the number of batches are empty.
        threads: number of threads that decode and prepare images.
        tokens: whether all tokens are stored, or only global ones.

    Raises:
        StudyError: if the rows of a part's tokens cannot be determined without reading all samples before it.
        NumericsError: if an activation is not finite or does not fit float16; the message names layer and sample.
        EncoderError: if the encoder does not match its catalog entry.
        StoreError: if the partial store of an earlier attempt is damaged.
    """
    share = _share(encoder, data, part, parts, tokens)
    described = {key: value for key, value in describe(encoder, data, "").items() if key != "name"}
    described |= {"part": part, "parts": parts, "first": share.first, "stop": share.stop, "tokens": tokens}
    with new_store(out, PART, described, resume=True) as group:
        store: Any = group
        with resuming(out):
            recorder = Recorder(store, store if tokens else None, encoder.spec, len(data), share)
        record(encoder, data, recorder, threads, out.stem)
        if tokens and share.stop > share.first and store["offsets"][share.stop] != share.stop_row:
            raise _varying_token_counts(out.stem)


def join_parts(parts: Sequence[Path], out: Path, tokens: Path | None = None) -> None:
    """Join the parts of an extraction to its stores without reading tokens: shards are hard-linked or copied.

    Args:
        parts: the stores of all parts.
        out: the store of global tokens to write.
        tokens: the store of all tokens to write, if wanted.

    Raises:
        StoreError: if a part is missing, incomplete or damaged, has only global tokens although all are wanted, or the
            parts are not of one extraction.
    """
    inputs = Unchanged(*parts)
    opened: list[tuple[Path, Any]] = [(path, open_store(path, PART)) for path in parts]
    opened.sort(key=lambda part: part[1].attrs["spec"]["part"])
    specs = [dict(store.attrs["spec"]) for _, store in opened]
    bounds = [(spec.pop("first"), spec.pop("stop"), spec.pop("part")) for spec in specs]
    without = [path for (path, _), spec in zip(opened, specs, strict=True) if not spec.pop("tokens")]
    if tokens and without:
        raise StoreError(
            f"{', '.join(map(str, without))}: only global tokens, but all are wanted; delete these parts and run again"
        )
    if [part for _, _, part in bounds] != list(range(1, specs[0]["parts"] + 1)) or specs != specs[:1] * len(specs):
        raise StoreError(
            f"{', '.join(map(str, parts))}: not all parts of one extraction; make every part from the same encoder and "
            f"samples"
        )
    spans = [(path, store, first, stop) for (path, store), (first, stop, _) in zip(opened, bounds, strict=True)]
    described = {"name": out.stem, **{key: value for key, value in specs[0].items() if key != "parts"}}
    N, D = described["samples"], described["width"]
    with (
        new_store(out, KIND, described) as store,
        new_store(tokens, TOKENS, described) if tokens else nullcontext() as token_store,
        inputs,
    ):
        rows = {"global": (store, N, extraction.GLOBAL_SHARD_BYTES)}
        if token_store is not None:
            offsets, global_rows = _joined_index(spans)
            save_index(token_store, "offsets", offsets)
            save_index(token_store, "global_rows", global_rows)
            rows["tokens"] = token_store, int(offsets[-1]), sizes.SHARD_BYTES
        for layer in map(layer_name, described["layers"]):
            for name, (joined, length, shard_bytes) in rows.items():
                group = joined.create_group(layer)
                new_rows(group, name, length, D, np.float16, shard_bytes)
                for path, _ in opened:
                    _link_all(path / layer / name, group[name])


def _joined_index(spans: Sequence[tuple[Path, Any, int, int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """``offsets`` and ``global_rows`` of all samples, from parts with their first samples and ends."""
    offsets = [StoredArray(store, "offsets", path)[first : stop + 1] for path, store, first, stop in spans]
    offsets = [rows for rows in offsets if len(rows) > 1]
    if any(one[-1] != next_one[0] for one, next_one in pairwise(offsets)):
        parts = ", ".join(str(path) for path, *_ in spans)
        raise StoreError(f"{parts}: their rows of tokens are not contiguous; make the parts again")
    global_rows = [StoredArray(store, "global_rows", path)[first:stop] for path, store, first, stop in spans]
    return np.concatenate([[0], *(rows[1:] for rows in offsets)]), np.concatenate(global_rows)


def _share(encoder: Encoder, data: Data, part: int, parts: int, tokens: bool) -> Share:
    spec, N = encoder.spec, len(data)
    batches = -(-N // spec.batch_size)
    begin, until = ((n * batches) // parts for n in (part - 1, part))
    first, stop = (min(batch * spec.batch_size, N) for batch in (begin, until))
    in_batches = _rows_of_batches(encoder, data) if tokens else repeat(0)
    row = sum(islice(in_batches, begin))
    stop_row = row + sum(islice(in_batches, until - begin))
    rows = _rows_of_shards(row, stop_row, rows_of(spec.width_of(0), np.float16, sizes.SHARD_BYTES)[1])
    samples = _rows_of_shards(first, stop, rows_of(spec.width_of(0), np.float16, extraction.GLOBAL_SHARD_BYTES)[1])
    end, end_row = stop, stop_row
    while end < N and ((rows and end_row < rows.stop) or (samples and end < samples.stop)):
        end, end_row = min(end + spec.batch_size, N), end_row + next(in_batches)
    return Share(first, stop, end, row, stop_row, rows, samples)


def _rows_of_shards(first: int, stop: int, shard: int) -> range:
    """Rows of the shards whose first row is in ``first`` to ``stop`` (exclusive)."""
    return range(-(-first // shard) * shard, -(-stop // shard) * shard)


def _rows_of_batches(encoder: Encoder, data: Data) -> Iterator[int]:
    """Yield the number of token rows per batch without running the model on all of them.

    Captions are tokenized; images all have the same number of tokens.
    """
    spec = encoder.spec
    starts = range(0, len(data), spec.batch_size)
    if spec.modality == "text":
        for start in starts:
            yield int(kept_rows(encoder.outline(prepare(encoder, data, start)), spec, start, spec.model).counts.sum())
        return
    some = prepare(encoder, data, 0)
    if some.mask is not None:
        raise _varying_token_counts(spec.model)
    rows, *_ = kept_rows(encoder.read(some), spec, 0, spec.model).counts
    for start in starts:
        yield int(rows) * (min(start + spec.batch_size, len(data)) - start)


def _varying_token_counts(name: str) -> StudyError:
    return StudyError(
        f"{name}: its images have different numbers of tokens, so a part cannot determine where its tokens begin; set "
        f"parts: 1"
    )


def _link_all(source: Path, array: Any) -> None:
    """Hard-link every shard of a part's array into the joined array, or copy it if links are not supported."""
    for file in (source / "c").rglob("*"):
        if file.is_file():
            link(file, Path(array.store.root) / array.path / file.relative_to(source))
