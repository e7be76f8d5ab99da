"""Zarr stores that notice when they are incomplete, damaged, or not the store that was asked for.

A store is a Zarr v3 group. Its root attributes hold the ``kind`` and ``version`` of its format, its ``name``, the
``spec`` it was made from, a fingerprint of each file in it (``files``), ``complete: true``, and a ``digest`` of all
these. The last three are written last. Zarr silently reads a missing chunk as zeros, and cannot know that two chunks or
layers were exchanged, so `open_store` compares the files with that list first. A changed byte inside a chunk shows when
the chunk is read: every chunk has a checksum.
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
from conceptshare.io.errors import ConceptshareError, NumericsError, StoreError, refusal
from conceptshare.io.files import remove, store_kind, written_aside
from conceptshare.io.layout import layer_name
from conceptshare.io.seals import change, fingerprint, is_whole, sealed

VERSIONS = {"activations": 3, "tokens": 2, "part": 2, "features": 4, "correlations": 3}
"""Version of a kind's format, where it is not 1; what old readers would misread, or new ones need, raises it."""

_ROOT = "zarr.json"
_BEGUN = "begun_by"
_EVERY_CHUNK: Any = {"write_empty_chunks": True}
# The stages that make stores of a kind, where they are not named as the kind is.
_STAGES = {"activations": "activations (or stream)", "tokens": "activations", "part": "activations"}
# The end of a chunk or shard holds the checksums of its last chunk and of its index: it differs wherever contents do.
_TAIL_BYTES = 4096


@contextmanager
def new_store(path: Path, kind: str, spec: dict[str, Any], resume: bool = False) -> Iterator[zarr.Group]:
    """Give a Zarr group to fill; it becomes the store at ``path`` if all went well.

    Args:
        path: the store's final path.
        kind: the format, such as ``"activations"``.
        spec: what the store was made from, kept in its attributes.
        resume: give what an attempt of this version that was cut off left of the same store, where there is such; else
            an empty group.

    Raises:
        MadeMeanwhileError: where another process made the same store while this one waited for it.
    """
    described: dict[str, Any] = {
        "kind": kind,
        "version": VERSIONS.get(kind, 1),
        "name": path.absolute().stem,
        "spec": spec,
        "complete": False,
    }
    with written_aside(path, store_kind(kind), resume, json.dumps(described, sort_keys=True)) as partial:
        # Half of a store is not of one version, and half of another.
        begun = described | {_BEGUN: version("conceptshare")}
        group = _left_over(partial, begun)
        if group is None:
            remove(partial)
            group = zarr.open_group(partial, mode="w", zarr_format=3)
            group.attrs.update(begun)
        yield group
        provenance.record(partial)
        found = {name: fingerprint(partial / name, _tail(name)) for name in _files(partial)}
        whole = {key: value for key, value in group.attrs.asdict().items() if key != _BEGUN}
        group.attrs.put(sealed({**whole, "files": found, "complete": True}))


def _left_over(partial: Path, described: dict[str, Any]) -> zarr.Group | None:
    """The store at ``partial``, if it can be gone on with: its description is the same, and it can be read."""
    try:
        group = zarr.open_group(partial, mode="r+", zarr_format=3)
        if any(group.attrs[key] != json.loads(json.dumps(value)) for key, value in described.items()):
            return None
    except Exception:  # there is none, or its metadata was cut off, which shows in many ways
        return None
    for torn in partial.rglob("*.partial"):
        torn.unlink()  # Zarr writes aside too
    return group


def open_store(path: Path, kind: str, layer: int | None = None) -> zarr.Group:
    """Open a store for reading.

    Args:
        path: the store. Its name is part of what is asked for: a store that was renamed is not opened.
        kind: its format.
        layer: the one layer that will be read; files of others are then not looked at.

    Raises:
        StoreError: where there is none, it is of another kind, version or name, it was never completed, or it is not
            as it was when it was completed: a file in it is missing, of another size, or exchanged with another.
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
    """What a store says of itself, without a look at its files.

    Raises:
        StoreError: where there is none, it is of another kind, version or name, it was never completed, or what it
            says is not as it was written.
    """
    if not path.exists():
        raise StoreError(f"{path}: no {kind} store there; run the {_stage(kind)} stage")
    if not (path / _ROOT).is_file():
        damaged = any(path.glob(f"*/{_ROOT}"))
        remedy = _remedy(kind) if damaged else f"name one that the {_stage(kind)} stage made"
        raise StoreError(f"{path}: {_ROOT} is missing, so that this is no {kind} store; {remedy}")
    with _named(f"{path}: {_ROOT} cannot be read", f"; {_remedy(kind)}"):
        # Of format 3, as Zarr warns where there are files of format 2 as well.
        attributes: dict[str, Any] = zarr.open_group(path, mode="r", zarr_format=3).attrs.asdict()
    if attributes.get("kind") != kind:
        raise StoreError(
            f"{path}: a store of {attributes.get('kind')!r}, where one of {kind!r} is needed; name "
            f"another, or move it away and run the {_stage(kind)} stage"
        )
    needed = VERSIONS.get(kind, 1)
    if attributes.get("version") != needed:
        raise StoreError(
            f"{path}: format version {attributes.get('version')}, where {needed} is needed; {_remedy(kind)}"
        )
    if attributes.get("complete") is not True:
        raise StoreError(f"{path}: incomplete, the job that wrote it did not finish; {_remedy(kind)}")
    if not is_whole(attributes):
        raise StoreError(f"{path}: {_ROOT} is not as it was written; {_remedy(kind)}")
    if attributes["name"] != path.absolute().stem:
        raise StoreError(
            f"{path}: holds the store {attributes['name']!r}; give it its name back, or delete it and run the "
            f"{_stage(kind)} stage again"
        )
    return attributes


def _tail(name: str) -> int | None:
    """How much of a file's end its fingerprint is of: all of metadata."""
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
    """Add an array to a store, every chunk of which will be written, zeros too; chunks default to the whole array.

    Every chunk has a checksum, so that one that was changed on disk cannot be read.
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
    """Add a small array to a store in one chunk."""
    new_array(group, name, values.shape, values.dtype)[...] = values


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
        said = " ".join(str(error).split())
        raise StoreError(f"{before} ({type(error).__name__}: {said}){after}") from error


def readable(path: Path, kind: str) -> AbstractContextManager[None]:
    """Where the store at ``path``, or an array in it, turns out damaged as it is read, raise a StoreError of it."""
    return _named(f"{path}: cannot be read", f"; {_remedy(kind)}")


class StoredArray:
    """An array of a store, read as a NumPy array; where a chunk cannot be decoded, the error says which store.

    Args:
        store: as `open_store` gives it.
        name: the array's.
        path: where the store is.
    """

    def __init__(self, store: zarr.Group, name: str, path: Path) -> None:
        self._path, self._kind = path / name, str(store.attrs["kind"])
        with readable(self._path, self._kind):
            array: Any = store[name]
            self.shape: tuple[int, ...] = tuple(array.shape)
            self.nbytes: int = array.nbytes
        self._array = array

    def __str__(self) -> str:
        """Which array of which store it is."""
        return str(self._path)

    def __getitem__(self, place: Any) -> NDArray[Any]:
        """Read a part.

        Raises:
            StoreError: where that cannot be.
        """
        with readable(self._path, self._kind):
            values: NDArray[Any] = self._array[place]
        return values


def layer_array(store: zarr.Group, layer: int, name: str, path: Path) -> StoredArray:
    """An array of a layer of a store.

    Raises:
        StoreError: where the store has no such layer.
    """
    if layer_name(layer) not in store:
        # Listed from disk: Zarr warns of every other file there.
        there = ", ".join(sorted(folder.name for folder in path.glob("layer-*")))
        raise StoreError(f"{path}: no layer {layer}; it has {there}")
    return StoredArray(store, f"{layer_name(layer)}/{name}", path)


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
        # Rows as they are and each chunk's checksum, then place and length of each chunk, and a checksum of those.
        whole = self._buffer.nbytes + (4 + 16) * (self._shard // self._chunk) + 4
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


def _files(folder: Path) -> list[str]:
    """The files of a store by relative path, but for its root.

    Left out are the record of how it came about, and hidden files: Snakemake's time stamp, and what NFS keeps of a file
    that was removed while it was open.
    """
    paths = (Path(place, name).relative_to(folder).as_posix() for place, _, names in os.walk(folder) for name in names)
    return sorted(path for path in paths if path not in (_ROOT, provenance.FILE) and "/." not in f"/{path}")
