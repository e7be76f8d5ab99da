"""Results on disk: written aside and renamed when complete; Zarr stores that can tell when they are not whole.

A store is a Zarr v3 group. Its root attributes hold the ``kind`` and ``version`` of its format, the ``spec`` it was
made from, the size of each file in it (``files``), and ``complete: true``. The last two are written last. Zarr reads
a missing chunk as zeros without a word, so `open_store` compares the files with that list first.
"""

import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import DTypeLike, NDArray
from zarr.codecs import ZstdCodec

from conceptshare import provenance
from conceptshare.errors import ConceptshareError, NumericsError, StoreError, refusal
from conceptshare.files import layer_name, remove, written_aside

VERSIONS = {"activations": 2, "features": 2, "correlations": 2}
"""Version of a kind's format, where it is not 1; what old readers would misread, or new ones need, raises it."""

_ROOT = "zarr.json"
_EVERY_CHUNK: Any = {"write_empty_chunks": True}
# Files in a store's folder that are no part of it: how it came about, and Snakemake's time stamp.
_BESIDE = {provenance.FILE, ".snakemake_timestamp"}


@contextmanager
def new_store(path: Path, kind: str, spec: dict[str, Any], resume: bool = False) -> Iterator[zarr.Group]:
    """Give a Zarr group to fill; it becomes the store at ``path`` if all went well.

    Args:
        path: the store's final path.
        kind: the format, such as ``"activations"``.
        spec: what the store was made from, kept in its attributes.
        resume: give what an attempt that was cut off left of the same store, where there is such; else an empty group.

    Raises:
        MadeMeanwhileError: where another process made the same store while this one waited for it.
    """
    described: dict[str, Any] = {"kind": kind, "version": VERSIONS.get(kind, 1), "spec": spec, "complete": False}
    with written_aside(path, resume, json.dumps(described, sort_keys=True)) as partial:
        group = _left_over(partial, described)
        if group is None:
            remove(partial)
            group = zarr.open_group(partial, mode="w", zarr_format=3)
            group.attrs.update(described)
        yield group
        provenance.record(partial)
        group.attrs["files"] = {name: size for name, size in _files(partial).items() if name != _ROOT}
        group.attrs["complete"] = True


def _left_over(partial: Path, described: dict[str, Any]) -> zarr.Group | None:
    """The store at ``partial``, if it can be gone on with: its description is the same, and it can be read."""
    try:
        group = zarr.open_group(partial, mode="r+")
        if any(group.attrs[key] != json.loads(json.dumps(value)) for key, value in described.items()):
            return None
    except Exception:  # there is none, or its metadata was cut off, which shows in many ways
        return None
    for torn in partial.rglob("*.partial"):
        torn.unlink()  # Zarr writes aside too
    return group


def open_store(path: Path, kind: str) -> zarr.Group:
    """Open a store for reading.

    Raises:
        StoreError: where there is none, it is of another kind or version, it was never completed, or a file in it
            is missing or has another size than when it was completed.
    """
    if not path.exists():
        raise StoreError(f"{path}: no {kind} store there; run the stage that makes it")
    if not (path / _ROOT).is_file():
        raise StoreError(f"{path}: {_ROOT} is missing, so that this is no {kind} store; delete it and run again")
    try:
        group = zarr.open_group(path, mode="r")
    except Exception as error:  # damaged metadata fails in many ways
        raise StoreError(f"{path}: {_ROOT} cannot be read ({error}); delete the store and run again") from error
    attributes: Any = dict(group.attrs)
    if attributes.get("kind") != kind:
        raise StoreError(f"{path}: a store of {attributes.get('kind')!r}, where one of {kind!r} is needed")
    needed = VERSIONS.get(kind, 1)
    if attributes.get("version") != needed:
        raise StoreError(
            f"{path}: format version {attributes.get('version')}, where {needed} is needed; delete it and run again"
        )
    if attributes.get("complete") is not True:
        raise StoreError(f"{path}: incomplete, the job that wrote it did not finish; delete it and run again")
    found = _files(path)
    for name, size in attributes["files"].items():
        if name not in found:
            raise StoreError(f"{path}: chunk {name} is missing; delete the store and run again")
        if found[name] != size:
            raise StoreError(f"{path}: {name} has {found[name]} bytes, not {size}; delete the store and run again")
    return group


def new_array(
    group: zarr.Group,
    name: str,
    shape: tuple[int, ...],
    dtype: DTypeLike,
    chunks: tuple[int, ...] | None = None,
    shards: tuple[int, ...] | None = None,
    compress: bool = True,
) -> zarr.Array[Any]:
    """Add an array to a store, every chunk of which will be written, zeros too; chunks default to the whole array.

    What is compressed has a checksum, so that a chunk that was changed on disk cannot be read.
    """
    whole = tuple(max(1, n) for n in shape)
    return group.create_array(
        name,
        shape=shape,
        dtype=dtype,
        chunks=chunks or whole,
        shards=shards,
        compressors=ZstdCodec(checksum=True) if compress else None,
        config=_EVERY_CHUNK,
    )


def save_array(group: zarr.Group, name: str, values: NDArray[Any]) -> None:
    """Add a small array to a store in one chunk."""
    new_array(group, name, values.shape, values.dtype)[...] = values


def layer_group(store: zarr.Group, layer: int, path: Path) -> Any:
    """A layer's group in a store.

    Raises:
        StoreError: where the store has no such layer.
    """
    if layer_name(layer) not in store:
        raise StoreError(f"{path}: no layer {layer}; it has {', '.join(sorted(store.group_keys()))}")
    return store[layer_name(layer)]


@contextmanager
def _named(before: str, after: str) -> Iterator[None]:
    """Make any error of the libraries a StoreError, but for the system's: what is damaged fails in many ways."""
    try:
        yield
    except ConceptshareError:
        raise
    except Exception as error:
        if refusal(error) is not None:
            raise
        raise StoreError(f"{before} ({type(error).__name__}: {error}){after}") from error


def readable(path: Path) -> AbstractContextManager[None]:
    """Where the store at ``path`` turns out damaged as it is read, raise a StoreError that says so."""
    return _named(f"{path}: cannot be read", "; delete the store and run again")


class StoredArray:
    """An array of a store, read as a NumPy array; where a chunk cannot be decoded, the error says which store."""

    def __init__(self, store: zarr.Group, name: str, path: Path) -> None:
        array: Any = store[name]
        self._array = array
        self._name, self._path = name, path
        self.shape: tuple[int, ...] = tuple(self._array.shape)

    def __str__(self) -> str:
        """Which array of which store it is."""
        return str(self._path / self._name)

    def __getitem__(self, place: Any) -> NDArray[Any]:
        """Read a part.

        Raises:
            StoreError: where that cannot be.
        """
        with readable(self._path / self._name):
            values: NDArray[Any] = self._array[place]
        return values


def gone_on_with(path: Path) -> AbstractContextManager[None]:
    """Where what an earlier attempt left of the store at ``path`` turns out damaged, raise a StoreError of it."""
    return _named(f"{path}: what an earlier attempt left of it is damaged", " and was removed; run again")


def rows_of(width: int, dtype: DTypeLike, shard_bytes: int) -> tuple[int, int]:
    """How many rows a chunk and a shard of an array of rows have."""
    row_bytes = width * np.dtype(dtype).itemsize
    chunk = max(1, _CHUNK_BYTES // row_bytes)
    return chunk, chunk * max(1, shard_bytes // (chunk * row_bytes))


def new_rows(group: zarr.Group, name: str, rows: int, width: int, dtype: DTypeLike, shard_bytes: int) -> None:
    """Add an array ``[rows, width]`` to a store, in shards."""
    chunk, shard = rows_of(width, dtype, shard_bytes)
    # Activations are noise to a compressor: it would save some percent, and take longer than writing them.
    new_array(group, name, (rows, width), dtype, (chunk, width), (shard, width), compress=False)


class RowWriter:
    """Appends rows to a two-dimensional array of unknown length, a whole shard at a time.

    Where the array is there already, its rows before ``keep`` are kept, and rows go on from there. Where one is lost,
    it raises errors of many types: `gone_on_with` makes one of them. Rows before ``first``, where a shard begins, are
    another's to write.
    """

    def __init__(
        self,
        group: zarr.Group,
        name: str,
        width: int,
        dtype: DTypeLike,
        shard_bytes: int,
        keep: int = 0,
        first: int = 0,
    ) -> None:
        self._chunk, self._shard = rows_of(width, dtype, shard_bytes)
        if name not in group:
            new_rows(group, name, 0, width, dtype, shard_bytes)
        array: Any = group[name]
        self._array = array.with_config(_EVERY_CHUNK)
        self.written = keep // self._shard * self._shard
        """Rows in whole shards, which are on disk."""
        # One buffer, and not a list of what was appended: that would leave holes in memory that grow with time.
        self._buffer = np.empty((self._shard, width), dtype)
        self._check(first, keep)
        self._filled = keep - self.written
        self._buffer[: self._filled] = self._array[self.written : keep]
        self._array.resize((keep, width))

    def _check(self, first: int, keep: int) -> None:
        """Make sure that the shards of the rows from ``first`` to ``keep`` are there: Zarr would read zeros."""
        place = Path(self._array.store.root) / self._array.path / "c"
        numbers = range(first // self._shard, -(-keep // self._shard))
        sizes = {n: (place / str(n) / "0").stat().st_size for n in numbers}
        # Rows as they are, then place and length of each chunk, and a checksum of those.
        whole = self._buffer.nbytes + 16 * (self._shard // self._chunk) + 4
        short = [n for n, size in sizes.items() if size != whole and n < keep // self._shard]
        if short:
            raise ValueError(f"shard {short[0]} of {self._array.path} has {sizes[short[0]]} bytes, not {whole}")

    def append(self, rows: NDArray[Any]) -> None:
        """Add rows ``[n, width]`` of the array's type."""
        while len(rows):
            taken = rows[: self._shard - self._filled]
            self._buffer[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            rows = rows[len(taken) :]
            if self._filled == self._shard:
                self.flush()
                self.written += self._shard
                self._filled = 0

    def flush(self) -> None:
        """Let the array on disk hold all rows so far."""
        end = self.written + self._filled
        self._array.resize((end, self._array.shape[1]))
        if self._filled:
            self._array[self.written : end] = self._buffer[: self._filled]


# Small enough to read one sample of a large encoder without its neighbours, large enough to read them all quickly.
_CHUNK_BYTES = 2**18


def as_float16(
    values: NDArray[np.float32],
    where: str,
    samples: NDArray[np.int64],
    remedy: str = "leave the sample or the layer out",
) -> NDArray[np.float16]:
    """Values ``[n, ...]`` as float16, the type of stored activations and features.

    Args:
        values: what to convert.
        where: the encoder and layer, for the message.
        samples: ``[n]`` the sample that each row belongs to, for the message.
        remedy: what to do about it, for the message.

    Raises:
        NumericsError: where a value is not finite, or too large for float16.
    """
    with np.errstate(over="ignore"):
        halves = values.astype(np.float16)
    finite = np.isfinite(halves).reshape(len(halves), -1).all(axis=1)
    if not finite.all():
        row = int(np.argmin(finite))
        largest = float(np.abs(values[row]).max())
        what = f"{largest:.3g} is beyond float16's 65504" if np.isfinite(largest) else "a value that is not finite"
        raise NumericsError(f"{where}, sample {samples[row]}: {what}; {remedy}")
    return halves


def _files(folder: Path) -> dict[str, int]:
    """Size in bytes of every file below a folder, by relative path, but for those of `_BESIDE`."""
    paths = (Path(place) / name for place, _, names in os.walk(folder) for name in names)
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(paths) if path.name not in _BESIDE
    }
