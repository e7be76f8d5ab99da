"""Zarr stores with checks that they are complete, undamaged and the requested store.

A store is a Zarr v3 group. Its root attributes hold the ``kind`` and ``version`` of its format, its ``name``, the
``spec`` it was made from, a fingerprint of each file in it (``files``), ``complete: true``, and a ``digest`` of all
these. The last three are written last. Zarr silently reads a missing chunk as zeros and cannot detect that two chunks
or layers were swapped, so `open_store` first compares the files with that list. A changed byte inside a chunk is
detected when the chunk is read, because every chunk has a checksum.
"""

import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import DTypeLike, NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec

from conceptshare.io import provenance
from conceptshare.io.errors import NumericsError, StoreError, reading
from conceptshare.io.files import atomic_output, remove, store_kind
from conceptshare.io.layout import layer_name
from conceptshare.io.seals import change, fingerprint, is_intact, sealed
from conceptshare.io.sizes import CHUNK_BYTES

VERSIONS = {"activations": 3, "tokens": 2, "part": 3, "features": 6, "correlations": 6}
"""Format version of each kind, if not 1. Raise it if old readers would misread new stores, or the reverse."""

_ROOT = "zarr.json"
_BEGUN = "begun_by"
_EVERY_CHUNK: Any = {"write_empty_chunks": True}
# The stage that makes each kind of store, if its name differs from that of the kind.
_STAGES = {"activations": "activations (or stream)", "tokens": "activations", "part": "activations"}
# A chunk or shard ends with the checksums of its last chunk and of its index, so its last bytes differ if contents do.
_TAIL_BYTES = 4096


@contextmanager
def new_store(path: Path, kind: str, spec: dict[str, Any], resume: bool = False) -> Iterator[zarr.Group]:
    """Yield a Zarr group to fill, which becomes the store at ``path`` on success.

    Args:
        path: the store's final path.
        kind: the format, such as ``"activations"``.
        spec: the inputs and settings of the store, kept in its attributes.
        resume: yield the partial store that an interrupted attempt of this version left, if there is one; otherwise
            an empty group.

    Raises:
        AlreadyMadeError: if another process made the same store while this one waited for the lock.
    """
    described: dict[str, Any] = {
        "kind": kind,
        "version": VERSIONS.get(kind, 1),
        "name": path.absolute().stem,
        "spec": spec,
        "complete": False,
    }
    with atomic_output(path, store_kind(kind), resume, json.dumps(described, sort_keys=True)) as partial:
        # A store is never written partly by one version and partly by another.
        begun = described | {_BEGUN: version("conceptshare")}
        group = _open_partial(partial, begun)
        if group is None:
            remove(partial)
            group = zarr.open_group(partial, mode="w", zarr_format=3)
            group.attrs.update(begun)
        yield group
        provenance.record(partial)
        files = {name: fingerprint(partial / name, _tail(name)) for name in _files(partial)}
        attributes = {key: value for key, value in group.attrs.asdict().items() if key != _BEGUN}
        group.attrs.put(sealed({**attributes, "files": files, "complete": True}))


def _open_partial(partial: Path, described: dict[str, Any]) -> zarr.Group | None:
    """The store at ``partial`` if it can be resumed: it can be read and its description is the same."""
    try:
        group = zarr.open_group(partial, mode="r+", zarr_format=3)
        if any(group.attrs[key] != json.loads(json.dumps(value)) for key, value in described.items()):
            return None
    except Exception:  # there is none, or its metadata was cut off, which raises many types
        return None
    for torn in partial.rglob("*.partial"):
        torn.unlink()  # Zarr's own temporary files
    return group


def open_store(path: Path, kind: str, layer: int | None = None) -> zarr.Group:
    """Open a store for reading.

    Args:
        path: the store. Its name must equal the recorded one: a renamed store is not opened.
        kind: its format.
        layer: if only one layer will be read, that layer; files of others are then not checked.

    Raises:
        StoreError: if the store is missing, of another kind, version or name, incomplete, or changed since it was
            completed: a file in it is missing, of another size, or swapped with another.
    """
    attributes = read_root(path, kind)
    for name, recorded in attributes["files"].items():
        if layer is None or not name.startswith("layer-") or name.startswith(f"{layer_name(layer)}/"):
            changed = change(path / name, recorded, _tail(name))
            if changed is not None:
                raise StoreError(f"{path}: {name} {changed}; {_remedy(kind)}")
    with readable(path, kind):
        return zarr.open_group(path, mode="r", zarr_format=3)


def read_root(path: Path, kind: str) -> dict[str, Any]:
    """Read and check the root attributes of a store, without checking its files.

    Raises:
        StoreError: if the store is missing, of another kind, version or name, incomplete, or its attributes were
            changed.
    """
    if not path.exists():
        raise StoreError(f"{path}: no {kind} store there; run the {_stage(kind)} stage")
    if not (path / _ROOT).is_file():
        damaged = any(path.glob(f"*/{_ROOT}"))
        remedy = _remedy(kind) if damaged else f"name one that the {_stage(kind)} stage made"
        raise StoreError(f"{path}: {_ROOT} is missing, so this is not a {kind} store; {remedy}")
    with reading(StoreError, f"{path}: {_ROOT} cannot be read", f"; {_remedy(kind)}"):
        # Format 3 is set because Zarr warns if there are files of format 2 as well.
        attributes: dict[str, Any] = zarr.open_group(path, mode="r", zarr_format=3).attrs.asdict()
    if attributes.get("kind") != kind:
        raise StoreError(
            f"{path}: a store of {attributes.get('kind')!r}, but one of {kind!r} is needed; name "
            f"another, or move it away and run the {_stage(kind)} stage"
        )
    needed = VERSIONS.get(kind, 1)
    if attributes.get("version") != needed:
        raise StoreError(f"{path}: format version {attributes.get('version')}, but {needed} is needed; {_remedy(kind)}")
    if attributes.get("complete") is not True:
        raise StoreError(f"{path}: incomplete, the job that wrote it did not finish; {_remedy(kind)}")
    if not is_intact(attributes):
        raise StoreError(f"{path}: {_ROOT} was changed or damaged; {_remedy(kind)}")
    if attributes["name"] != path.absolute().stem:
        raise StoreError(
            f"{path}: holds the store {attributes['name']!r}; rename it back, or delete it and run the "
            f"{_stage(kind)} stage again"
        )
    return attributes


def _tail(name: str) -> int | None:
    """Number of bytes at the end of a file that its fingerprint covers; None, for metadata, covers the whole file."""
    return None if name.endswith(_ROOT) else _TAIL_BYTES


def _stage(kind: str) -> str:
    return _STAGES.get(kind, kind)


def _remedy(kind: str) -> str:
    return f"delete the store and run the {_stage(kind)} stage again"


def new_array(
    group: zarr.Group,
    name: str,
    shape: tuple[int, ...],
    dtype: DTypeLike,
    chunks: tuple[int, ...] | None = None,
    shards: tuple[int, ...] | None = None,
    compress: bool = True,
) -> zarr.Array[Any]:
    """Add an array to a store. Chunks default to the whole array, and chunks of zeros are written too.

    Every chunk has a checksum, so reading a chunk that was changed on disk fails.
    """
    whole = tuple(max(1, n) for n in shape)
    return group.create_array(
        name,
        shape=shape,
        dtype=dtype,
        chunks=chunks or whole,
        shards=shards,
        compressors=ZstdCodec(checksum=True) if compress else Crc32cCodec(),
        config=_EVERY_CHUNK,
    )


def save_array(group: zarr.Group, name: str, values: NDArray[Any]) -> None:
    """Add a small array to a store as one chunk."""
    new_array(group, name, values.shape, values.dtype)[...] = values


def readable(path: Path, kind: str) -> AbstractContextManager[None]:
    """Raise a StoreError if the store at ``path``, or an array in it, turns out to be damaged as it is read."""
    return reading(StoreError, f"{path}: cannot be read", f"; {_remedy(kind)}")


class StoredArray:
    """An array of a store, read as NumPy arrays; if a chunk cannot be decoded, the error names the store.

    Args:
        store: the group that `open_store` returned.
        name: the array's name in it.
        path: path of the store.
    """

    def __init__(self, store: zarr.Group, name: str, path: Path) -> None:
        self._path, self._kind = path / name, str(store.attrs["kind"])
        with readable(self._path, self._kind):
            array: Any = store[name]
            self.shape: tuple[int, ...] = tuple(array.shape)
            self.nbytes: int = array.nbytes
        self._array = array

    def __str__(self) -> str:
        """Path of the store and the array."""
        return str(self._path)

    def __getitem__(self, index: Any) -> NDArray[Any]:
        """Read a part of the array.

        Raises:
            StoreError: if it cannot be read.
        """
        with readable(self._path, self._kind):
            values: NDArray[Any] = self._array[index]
        return values


def layer_array(store: zarr.Group, layer: int, name: str, path: Path) -> StoredArray:
    """An array of one layer of a store.

    Raises:
        StoreError: if the store has no such layer.
    """
    if layer_name(layer) not in store:
        # Listed from disk, because Zarr warns about every other file there.
        there = ", ".join(sorted(folder.name for folder in path.glob("layer-*")))
        raise StoreError(f"{path}: no layer {layer}; it has {there}")
    return StoredArray(store, f"{layer_name(layer)}/{name}", path)


def resuming(path: Path) -> AbstractContextManager[None]:
    """Raise a StoreError if the partial store that an earlier attempt left for ``path`` turns out to be damaged."""
    what = f"{path}: the partial store of an earlier attempt is damaged"
    return reading(StoreError, what, " and was removed; run again")


def rows_of(width: int, dtype: DTypeLike, shard_bytes: int) -> tuple[int, int]:
    """Number of rows per chunk and per shard of an array of rows."""
    row_bytes = width * np.dtype(dtype).itemsize
    chunk = max(1, CHUNK_BYTES // row_bytes)
    return chunk, chunk * max(1, shard_bytes // (chunk * row_bytes))


def new_rows(group: zarr.Group, name: str, rows: int, width: int, dtype: DTypeLike, shard_bytes: int) -> None:
    """Add an array ``[rows, width]`` to a store, in shards."""
    chunk, shard = rows_of(width, dtype, shard_bytes)
    # Activations hardly compress: a compressor would save a few percent and take longer than writing them.
    new_array(group, name, (rows, width), dtype, (chunk, width), (shard, width), compress=False)


class RowWriter:
    """Appends rows to a two-dimensional array of unknown length, one shard at a time.

    If the array exists already, its rows before ``keep`` are kept and new rows follow them. If any of these rows is
    lost, many types of errors are raised, which `resuming` converts to one. Rows before ``first``, the start of a
    shard, are written by another writer.
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
        """Number of rows in whole shards, which are on disk."""
        # One buffer instead of a list of appended rows, which would fragment memory more and more.
        self._buffer = np.empty((self._shard, width), dtype)
        self._check(first, keep)
        self._filled = keep - self.written
        self._buffer[: self._filled] = self._array[self.written : keep]
        self._array.resize((keep, width))

    def _check(self, first: int, keep: int) -> None:
        """Make sure that the shards of the rows from ``first`` to ``keep`` exist: Zarr would read zeros instead."""
        folder = Path(self._array.store.root) / self._array.path / "c"
        numbers = range(first // self._shard, -(-keep // self._shard))
        sizes = {n: (folder / str(n) / "0").stat().st_size for n in numbers}
        # Uncompressed rows and one checksum per chunk, then offset and length of each chunk, and a checksum of these.
        whole = self._buffer.nbytes + (4 + 16) * (self._shard // self._chunk) + 4
        short = [n for n, size in sizes.items() if size != whole and n < keep // self._shard]
        if short:
            raise ValueError(f"shard {short[0]} of {self._array.path} has {sizes[short[0]]} bytes, not {whole}")

    def append(self, rows: NDArray[Any]) -> None:
        """Append rows ``[n, width]`` of the array's dtype."""
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
        """Write all rows so far to disk."""
        end = self.written + self._filled
        self._array.resize((end, self._array.shape[1]))
        if self._filled:
            self._array[self.written : end] = self._buffer[: self._filled]


def as_float16(
    values: NDArray[np.float32],
    where: str,
    samples: NDArray[Any],
    remedy: str = "leave the sample or the layer out",
) -> NDArray[np.float16]:
    """Convert values ``[n, ...]`` to float16, the dtype of stored activations and features.

    Args:
        values: the values.
        where: encoder and layer, for the error message.
        samples: ``[n]`` the number or id of each row's sample, for the error message.
        remedy: how to fix the error, for the error message.

    Raises:
        NumericsError: if a value is not finite, or too large for float16.
    """
    with np.errstate(over="ignore"):
        converted = values.astype(np.float16)
    finite = np.isfinite(converted).reshape(len(converted), -1).all(axis=1)
    if not finite.all():
        row = int(np.argmin(finite))
        largest = float(np.abs(values[row]).max())
        problem = f"{largest:.3g} is beyond float16's 65504" if np.isfinite(largest) else "a value that is not finite"
        raise NumericsError(f"{where}, sample {samples[row]}: {problem}; {remedy}")
    return converted


def _files(folder: Path) -> list[str]:
    """Relative paths of the files of a store, without the metadata of its root.

    Provenance and hidden files are left out: Snakemake's time stamp, and files that NFS keeps because they were removed
    while open.
    """
    paths = (Path(place, name).relative_to(folder).as_posix() for place, _, names in os.walk(folder) for name in names)
    return sorted(path for path in paths if path not in (_ROOT, provenance.FILE) and "/." not in f"/{path}")
