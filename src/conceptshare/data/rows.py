"""Rows of a data set's files, restricted to the columns that its catalog entry names; images are not decoded.

Cells of CSV and TSV files are unconverted text. Each file is read as a stream, so memory does not grow with the number
of rows.
"""

import csv
import hashlib
import io
import itertools
import json
import mmap
import os
import posixpath
import re
import stat
import tarfile
import zipfile
import zlib
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from conceptshare.config.catalog import DatasetSpec
from conceptshare.data.images import suffixes
from conceptshare.data.sources import METADATA, Source, files_below, form, locate, printable
from conceptshare.io.errors import DatasetError, reading

LISTED = 5000
"""Maximum number of images of a data set that are separate inputs for Snakemake."""

_BRACES = {"{", "}"}
_BATCH_BYTES = 2**23
_MAX_PATH_LENGTH = 4096
_BUFFER = 2**20
_MAX_HEADER_BYTES = 2**20  # of a tar's member: long names and extended headers, which tarfile reads in one piece
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")  # byte order marks

# Members of a WebDataset are named KEY.COLUMN, split at the first dot of the file name.
_MEMBER = re.compile(r"((?:.*/|)[^./]+)[.]([^/]*)")


@dataclass(frozen=True)
class Unusable:
    """Placeholder for a cell that was not read, with the reason."""

    reason: str


def columns_of(spec: DatasetSpec) -> dict[str, str | None]:
    """The column name for each key of the entry that names one."""
    image = {"image": spec.image} if spec.image_url is None else {"image_url": spec.image_url}
    return {"id": spec.id, **image, "caption": spec.caption}


def read_rows(spec: DatasetSpec, source: Source) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield each row of a source in order: the folder of its table, and its cells by key (``id``, ``image``, ...).

    Images in an image folder that no row names are added to ``source.not_read`` at the end.

    Raises:
        DatasetError: if a file cannot be read, or lacks a column.
    """
    yield from itertools.islice(_rows(spec, source, _named_columns(spec)), spec.limit)


def check_columns(spec: DatasetSpec) -> None:
    """Check that the files of a local data set have the named columns. Files are read no further than it takes.

    Raises:
        DatasetError: if a file cannot be read, or lacks a column.
    """
    source = locate(spec)
    seen_columns = _SeenColumns(source, _named_columns(spec))
    for file in source.files if spec.limit is None else source.files[:1]:  # the others may not be read
        for _ in _file_rows(spec, source, file, seen_columns):
            if not seen_columns.missing():
                break
    seen_columns.check()


def inputs(spec: DatasetSpec) -> tuple[list[str], str]:
    """The inputs of a local data set for Snakemake: a list of files, and a digest of the images that are not listed.

    Images are those below an image folder, or the existing ones that a table names. Up to LISTED images are listed, and
    the digest is empty. If there are more, or Snakemake cannot represent their names, their paths, sizes and times are
    hashed into the digest instead: Snakemake takes milliseconds per listed file.

    Raises:
        DatasetError: if the files cannot be listed.
    """
    source = locate(spec)
    files = [str(file) for file in [*source.files, source.folder / "README.md"] if file.is_file()]
    if spec.image_url is not None or source.kind == "tars":
        return files, ""
    digest = hashlib.sha256()
    images: set[str] = set()
    listed = True
    for path in _images_below(source) if source.kind == "images" else _named_images(spec, source):
        try:
            status = os.stat(path)  # noqa: PTH116 - Path takes five times as long, and there may be millions
        except (OSError, ValueError):
            continue
        if stat.S_ISREG(status.st_mode):
            digest.update(os.fsencode(f"{path}\n{status.st_size}\n{status.st_mtime_ns}\n"))
            if listed:
                images.add(path)
                listed = len(images) <= LISTED and path.isprintable() and not _BRACES.intersection(path)
    return ([*files, *sorted(images)], "") if listed else (files, digest.hexdigest())


def _images_below(source: Source) -> list[str]:
    endings = tuple(suffixes())
    names = sorted(name for name in files_below(source.folder) if name.lower().endswith(endings))
    return [f"{source.folder}/{name}" for name in names]


def _named_images(spec: DatasetSpec, source: Source) -> Iterator[str]:
    """Yield the image paths in the tables of a source."""
    for folder, row in itertools.islice(_rows(spec, source, {"image": spec.image}, paths_only=True), spec.limit):
        cell = row["image"].get("path") if isinstance(row["image"], dict) else row["image"]
        if isinstance(cell, str) and len(cell) < _MAX_PATH_LENGTH:
            yield image_path(cell, folder, source)


def count_rows(spec: DatasetSpec) -> int | None:
    """Number of rows of a local data set according to its tables; None for tars and zips."""
    source = locate(spec)
    if source.kind == "tars" or any(form(file.name) == "zip" for file in source.files):
        return None
    return sum(1 for _ in _rows(spec, source, {}))


def image_path(cell: str, folder: Path, source: Source) -> str:
    """Resolve a path relative to its table's folder, or, if no file is there, to the folder of the data set."""
    path = os.path.normpath(os.path.join(folder, cell))  # noqa: PTH118 - see inputs
    if source.kind == "tables" and folder != source.folder and not os.path.exists(path):  # noqa: PTH110
        other = os.path.normpath(os.path.join(source.folder, cell))  # noqa: PTH118
        return other if os.path.exists(other) else path  # noqa: PTH110
    return path


def cut(text: str, length: int = 60) -> str:
    """Truncate a text for a message."""
    return text if len(text) <= length else f"{text[:length]}..."


def too_large(size: int, longest: int) -> str:
    """The reason for not reading a file or member that is too large."""
    return f"{size / 1e6:,.1f} MB, more than max_mb = {longest / 1e6:g}"


def _named_columns(spec: DatasetSpec) -> dict[str, str]:
    return {key: column for key, column in columns_of(spec).items() if column is not None}


def _rows(
    spec: DatasetSpec, source: Source, columns: dict[str, str], paths_only: bool = False
) -> Iterator[tuple[Path, dict[str, Any]]]:
    seen_columns, seen = _SeenColumns(source, columns), array("Q")
    for file in source.files:
        for row in _file_rows(spec, source, file, seen_columns, paths_only):
            if source.kind == "images" and isinstance(row.get("image"), str):
                seen.append(hash_of(os.path.normpath(file.parent / row["image"])))
            yield file.parent if spec.image_folder is None else Path(spec.image_folder).expanduser(), row
    seen_columns.check()
    if source.kind == "images" and "image" in columns:
        _report_images_without_row(source, np.array(seen))


def _file_rows(
    spec: DatasetSpec, source: Source, file: Path, seen_columns: "_SeenColumns", paths_only: bool = False
) -> Iterator[dict[str, Any]]:
    """Yield the rows of one file."""
    columns, longest = seen_columns.columns, int(spec.max_mb * 1e6)
    where = source.name if len(source.files) == 1 else f"{source.name}: {_relative(file, source)}"
    hint = "check the file" if source.revision is None else "check the data set's files, split and revision"
    with reading(DatasetError, f"{where}: cannot be read", f"; {hint}"):
        if source.kind == "tars":
            yield from _tar_rows(file, columns, where, seen_columns, longest)
        elif form(file.name) == "zip":
            yield from _zip_rows(file, columns, where, seen_columns, longest, source)
        else:
            # Opened by Python, because Arrow only accepts file names in UTF-8.
            with file.open("rb") as stream:
                table = _Table(stream, form(file.name) or "", file.suffix.lower(), where, longest, source.separator)
                yield from _table_rows(table, columns, seen_columns, paths_only)


def _relative(file: Path, source: Source) -> str:
    return printable(file.relative_to(source.folder).as_posix())


def _in_metadata(column: str) -> str:
    """The column of an image folder's metadata that holds the file names for an image column."""
    if column.endswith("file_name"):
        return column
    return "file_name" if column == "image" else f"{column}_file_name"


def hash_of(text: str) -> int:
    """A 64-bit hash that is the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _report_images_without_row(source: Source, seen: "np.ndarray[Any, Any]") -> None:
    """Report images below the metadata's folders that no row names."""
    folders = {file.parent for file in source.files if form(file.name) != "zip"}
    seen.sort()
    images = suffixes()
    for name in files_below(source.folder) if folders else ():
        path = source.folder / name
        if path.suffix.lower() in images and not folders.isdisjoint(path.parents):
            hashed = hash_of(os.path.normpath(path))
            index = np.searchsorted(seen, np.uint64(hashed))
            if index == len(seen) or int(seen[index]) != hashed:
                source.not_read.add("image without a row", name)


class _SeenColumns:
    """Columns seen in any row so far, for formats whose rows may lack some columns."""

    def __init__(self, source: Source, columns: dict[str, str]) -> None:
        if source.kind == "images" and "image" in columns:
            columns = columns | {"image": _in_metadata(columns["image"])}
        self.columns = columns
        self._source = source
        self._there: set[str] = set()

    def add(self, names: Iterable[str]) -> None:
        self._there.update(names)

    def missing(self) -> list[tuple[str, str]]:
        """The key and name of each required column that was in no row."""
        if not self._there:
            return []
        in_tars = self._source.kind == "tars"
        return [
            (key, column)
            for key, column in self.columns.items()
            if column != "__key__" and self._there.isdisjoint(column.lower().split(";") if in_tars else [column])
        ]

    def check(self) -> None:
        """Raise a DatasetError if a required column was in no row."""
        for key, column in self.missing():
            what = "members' extensions" if self._source.kind == "tars" else "columns"
            raise _no_column(self._source.name, key, column, sorted(self._there), what)


def _no_column(where: str, key: str, column: str, there: Iterable[str], what: str = "columns") -> DatasetError:
    shown = ", ".join(map(cut, itertools.islice(there, 50)))
    remedy = f"set {key} to one of them"
    if key == "image" and column.endswith("file_name"):
        remedy = f"rename the column with the image paths to {cut(column)}"
    return DatasetError(f"{where}: no column {cut(column)!r}; the {what} are {shown}: {remedy}")


def _check_columns(where: str, columns: dict[str, str], there: list[str]) -> None:
    for key, column in columns.items():
        if column not in there:
            raise _no_column(where, key, column, there)
        if there.count(column) > 1:
            raise DatasetError(f"{where}: {there.count(column)} columns are called {cut(column)!r}; rename all but one")


# Tables


@dataclass(frozen=True)
class _Table:
    """An open file with a table."""

    stream: IO[bytes]
    form: str
    suffix: str
    where: str
    longest: int
    """Maximum number of characters per row of text."""
    separator: str | None = None


def _table_rows(
    table: _Table, columns: dict[str, str], seen_columns: _SeenColumns, paths_only: bool
) -> Iterator[dict[str, Any]]:
    match table.form:
        case "parquet":
            yield from _parquet_rows(table, columns, paths_only)
        case "arrow":
            yield from _arrow_rows(table, columns, paths_only)
        case "csv" | "tsv":
            yield from _csv_rows(table, columns)
        case _:
            objects = _json_lines(table) if table.form == "jsonl" else _json_objects(table, columns)
            for cells in objects:
                seen_columns.add(cells)
                yield {key: cells.get(column) for key, column in columns.items()}


def _parquet_rows(table: _Table, columns: dict[str, str], paths_only: bool) -> Iterator[dict[str, Any]]:
    # Without buffering ahead, a row group is read page by page; a group of images may be larger than memory.
    file = pq.ParquetFile(table.stream, pre_buffer=False, buffer_size=_BUFFER)
    _check_columns(table.where, columns, file.schema_arrow.names)
    names = _class_names(file.schema_arrow, columns)
    wanted = list(dict.fromkeys(columns.values()))
    if paths_only:  # skip images that are stored in the table itself
        wanted = [name for column in wanted for name in _path_of(file.schema_arrow.field(column))]
        if not wanted:
            return
    size = sum(file.metadata.row_group(n).total_byte_size for n in range(file.num_row_groups))
    rows = max(1, min(1024, _BATCH_BYTES * file.metadata.num_rows // max(1, size)))
    for batch in file.iter_batches(rows, columns=wanted):
        yield from _cells(batch, columns, names)


def _path_of(column: pa.Field) -> list[str]:
    """The part of an image column that may hold paths: the column or its field ``path``; empty if there is none."""
    if pa.types.is_struct(column.type):
        return [f"{column.name}.path"] if column.type.get_field_index("path") >= 0 else []
    return [] if "binary" in str(column.type) else [column.name]


def _arrow_rows(table: _Table, columns: dict[str, str], paths_only: bool) -> Iterator[dict[str, Any]]:
    whole = pa.py_buffer(mmap.mmap(table.stream.fileno(), 0, access=mmap.ACCESS_READ))
    try:
        reader: Any = pa.ipc.open_stream(whole)
        batches = iter(reader)
    except pa.ArrowInvalid:
        reader = pa.ipc.open_file(whole)
        batches = (reader.get_batch(n) for n in range(reader.num_record_batches))
    _check_columns(table.where, columns, reader.schema.names)
    if paths_only and not all(_path_of(reader.schema.field(column)) for column in columns.values()):
        return
    names = _class_names(reader.schema, columns)
    for batch in batches:
        rows = max(1, _BATCH_BYTES * batch.num_rows // max(1, batch.nbytes))
        for start in range(0, batch.num_rows, rows):
            yield from _cells(batch.slice(start, rows), columns, names)


def _class_names(schema: pa.Schema, columns: dict[str, str]) -> list[str]:
    """The names of the captions' classes, if the `datasets` library has noted that they are class labels."""
    noted = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    feature = noted.get("info", {}).get("features", {}).get(columns.get("caption"), {})
    # Older versions of the library note a list of texts as a list.
    return feature["names"] if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" else []


def _cells(batch: pa.RecordBatch, columns: dict[str, str], names: list[str]) -> Iterator[dict[str, Any]]:
    lists = {key: batch.column(column).to_pylist() for key, column in columns.items()}
    if names:  # -1 is an unknown class
        lists["caption"] = [names[n] if n is not None and 0 <= n < len(names) else None for n in lists["caption"]]
    for row in range(batch.num_rows):
        yield {key: cells[row] for key, cells in lists.items()}


@contextmanager
def _text(table: _Table) -> Iterator[TextIO]:
    """Open a file as text, decompressed and without byte order mark; invalid UTF-8 becomes surrogates."""
    stream: Any = table.stream
    if packing := {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}.get(table.suffix):
        stream = io.BufferedReader(pa.CompressedInputStream(stream, packing))
    encoding = "utf-16" if stream.peek(2)[:2] in _UTF_16 else "utf-8-sig"
    with io.TextIOWrapper(stream, encoding, errors="surrogateescape", newline="") as text:
        yield text


def _lines(text: TextIO, table: _Table) -> Iterator[str]:
    while line := text.readline(table.longest + 1):
        if len(line) > table.longest:
            raise _too_long(table)
        yield line


def _csv_rows(table: _Table, columns: dict[str, str]) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(table.longest)
    separator = table.separator or ("\t" if table.form == "tsv" else ",")
    with _text(table) as text:
        reader = csv.reader(_lines(text, table), delimiter=separator, strict=True)
        try:
            header = next(reader, None)
            if header is None:
                raise DatasetError(f"{table.where}: the file is empty")
            if len(header) == 1 and (other := next((c for c in ";\t|" if c in header[0]), None)):
                raise DatasetError(
                    f"{table.where}: its cells are separated by {other!r} instead of {separator!r}; save it with "
                    "commas, or with tabs as a .tsv file"
                )
            _check_columns(table.where, columns, header)
            places = {key: header.index(column) for key, column in columns.items()}
            for row in reader:
                if not row:
                    continue
                if len(row) != len(header):
                    remedy = f"complete the line, with a {separator!r} before empty cells, too"
                    if len(row) > len(header):
                        remedy = f"quote cells that contain {separator!r}, and remove separators at the end of the line"
                    found = f"line {reader.line_num} has {len(row)} cells, the header {len(header)}"
                    raise DatasetError(f"{table.where}: {found}; {remedy}")
                yield {key: row[n] for key, n in places.items()}
        except csv.Error as error:
            raise DatasetError(
                f"{table.where}: line {reader.line_num} is not valid CSV ({error}); correct it"
            ) from None


def _json_lines(table: _Table) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON Lines file.

    Arrow's parser is not used: it fails if a text holds a lone surrogate, or if a column changes its type.
    """
    with _text(table) as text:
        for number, line in enumerate(_lines(text, table), 1):
            if not line.strip():
                continue
            try:
                cells = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DatasetError(f"{table.where}: line {number} is not valid JSON ({error}); correct it") from None
            if not isinstance(cells, dict):
                raise DatasetError(f"{table.where}: line {number} is not an object of columns and cells; correct it")
            yield cells


def _json_objects(table: _Table, columns: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSON file: a list of objects, concatenated objects, one object of lists, or COCO's."""
    values = _json_values(table)
    first = list(itertools.islice(values, 2))
    alone = first[0] if len(first) == 1 and isinstance(first[0], dict) else {}
    if alone.keys() >= {"images", "annotations"}:
        first = _coco_rows(alone, table)
    lists: list[Any] = [alone.get(column) for column in columns.values()]
    if lists and all(isinstance(cells, list) for cells in lists):
        if len(set(map(len, lists))) > 1:
            raise DatasetError(f"{table.where}: its lists differ in length; correct them")
        first = [dict(zip(columns.values(), row, strict=True)) for row in zip(*lists, strict=True)]
    for number, value in enumerate(itertools.chain(first, values)):
        if not isinstance(value, dict):
            raise DatasetError(f"{table.where}: item {number} is not an object of columns and cells; correct it")
        yield value


def _coco_rows(content: dict[str, Any], table: _Table) -> list[dict[str, Any]]:
    """A row per image of COCO's `captions_*.json`: its own columns, ``image`` (its file name) and its captions."""
    captions: dict[Any, list[Any]] = {}
    try:
        for annotation in sorted(content["annotations"], key=lambda annotation: annotation["id"]):
            captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
        return [
            {**image, "image": image["file_name"], "caption": captions.get(image["id"], [])}
            for image in content["images"]
        ]
    except (KeyError, TypeError) as error:
        raise DatasetError(
            f"{table.where}: annotations without captions of images ({type(error).__name__}: {error}); name one of "
            "COCO's captions_*.json"
        ) from None


def _json_values(table: _Table) -> Iterator[Any]:
    """Yield the items of a JSON file's list, or its concatenated values, without reading the whole file."""
    decoder = json.JSONDecoder()
    with _text(table) as text:
        rest, place = text.read(_BUFFER).lstrip(), 0
        blanks = re.compile(r"[\s,\]]*" if rest.startswith("[") else r"\s*")
        rest = rest.removeprefix("[")
        while True:
            place = blanks.match(rest, place).end()  # type: ignore[union-attr]
            try:
                value, place = decoder.raw_decode(rest, place)
                yield value
            except (ValueError, RecursionError) as error:
                rest, place = rest[place:], 0
                if len(rest) > table.longest:
                    raise _too_long(table) from None
                more = text.read(max(_BUFFER, len(rest)))
                if not more and rest:
                    raise DatasetError(
                        f"{table.where}: not valid JSON ({error.__class__.__name__} at {cut(rest)!r}); correct it"
                    ) from None
                if not more:
                    return
                rest += more


def _too_long(table: _Table) -> DatasetError:
    return DatasetError(f"{table.where}: a row has more than max_mb = {table.longest / 1e6:g} MB of text; raise max_mb")


# Archives


class _Member(tarfile.TarInfo):
    """A tar member with stricter headers: a damaged one raises instead of ending the tar, a huge one is rejected."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Member":
        """Read a header of 512 bytes."""
        try:
            member = super().frombuf(buf, encoding, errors)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(f"damaged header: {error}") from None
        if member.type in _HEADERS and member.size > _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"an extended header of {member.size:,} bytes")
        return member


_HEADERS = {
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
}


def _tar_rows(
    file: Path, columns: dict[str, str], where: str, seen_columns: _SeenColumns, longest: int
) -> Iterator[dict[str, Any]]:
    """Yield the samples of a WebDataset tar; the cell of a missing column is None.

    Nothing is extracted to disk, so members' names are harmless.
    """
    wanted = {name for column in columns.values() for name in column.lower().split(";")}
    keys, lacking = array("Q"), {}
    for sample, members in itertools.groupby(_tar_members(file, wanted, longest), key=lambda member: member[0]):
        cells: dict[str, bytes | Unusable | None] = {}
        for _, name, content in members:
            if name in cells:
                raise DatasetError(f"{where}: the sample {cut(sample)!r} has two members {name!r}; rename one")
            cells[name] = content
        seen_columns.add(cells)
        row: dict[str, Any] = {}
        for key, column in columns.items():
            name = next((name for name in column.lower().split(";") if name in cells), "")
            cell = cells.get(name)
            row[key] = sample if column == "__key__" else cell if key == "image" else _text_of(name, cell)
        keys.append(hash_of(sample))
        if None in row.values():
            lacking[keys[-1]] = sample
        yield row
    _check_together(where, np.array(keys), lacking)


def _check_together(where: str, keys: "np.ndarray[Any, Any]", lacking: dict[int, str]) -> None:
    """Raise a DatasetError if a sample that lacks a member occurs more than once, so its members are not adjacent."""
    names, counts = np.unique(keys[np.isin(keys, np.array([*lacking], np.uint64))], return_counts=True)
    if (counts > 1).any():
        sample = lacking[int(names[counts > 1][0])]
        raise DatasetError(
            f"{where}: the members of a sample are not adjacent, such as those of {cut(sample)!r}; recreate the tar "
            "with its members in order, as with tar --sort=name"
        )


def _tar_members(file: Path, wanted: set[str], longest: int) -> Iterator[tuple[str, str, bytes | Unusable | None]]:
    """Yield sample, column and content of each member that is a file; content is only read for wanted columns."""
    with tarfile.open(file, tarinfo=_Member) as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # which would keep every header
            match = _MEMBER.fullmatch(member.name)
            if match is None or not member.isfile():
                continue
            column = match[2].lower()
            content: bytes | Unusable | None = None
            if column in wanted and member.size > longest:
                content = Unusable(too_large(member.size, longest))
            elif column in wanted:
                content = tar.extractfile(member).read()  # type: ignore[union-attr]
            yield match[1], column, content
        if tar.fileobj.read(_BUFFER).strip(b"\0"):
            raise DatasetError(f"{file}: there is data after the end of the tar; join tars with tar -A, not with cat")


def _text_of(name: str, content: bytes | Unusable | None) -> Any:
    """Decode a member that is not an image: JSON by its suffix, otherwise text; unchanged if that fails.

    A final line break is stripped from text.
    """
    if not isinstance(content, bytes):
        return content
    try:
        if name.split(".")[-1] == "json":
            return json.loads(content)
        text = content.decode("utf-16" if content[:2] in _UTF_16 else "utf-8-sig")
        return text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text
    except (ValueError, RecursionError):
        return content


def _zip_rows(
    file: Path, columns: dict[str, str], where: str, seen_columns: _SeenColumns, longest: int, source: Source
) -> Iterator[dict[str, Any]]:
    """Yield the rows of the metadata in a zip of images, with the images' bytes. Nothing is extracted to disk."""
    with zipfile.ZipFile(file) as packed:
        members = {
            info.filename: info for info in packed.infolist() if not info.is_dir() and not _hidden(info.filename)
        }
        tables = sorted(name for name in members if posixpath.basename(name) in METADATA)
        if not tables:
            raise DatasetError(
                f"{where}: a zip without a metadata.csv, .jsonl or .parquet; unpack it and name the folder"
            )
        left = {name for name in members if posixpath.splitext(name.lower())[1] in suffixes()}
        for name in tables:
            with packed.open(name) as stream:
                table = _Table(stream, form(name) or "", "", f"{where}: {printable(name)}", longest)
                for row in _table_rows(table, columns, seen_columns, paths_only=False):
                    if isinstance(row.get("image"), str):
                        image = posixpath.normpath(posixpath.join(posixpath.dirname(name), row["image"]))
                        left.discard(image)
                        row["image"] = _unzipped(packed, members.get(image), row["image"], longest)
                    yield row
        for name in sorted(left) if "image" in columns else ():
            source.not_read.add("image without a row", f"{_relative(file, source)}/{name}")


def _hidden(name: str) -> bool:
    *folders, file = name.split("/")
    return file.startswith(".") or any(folder.startswith((".", "__")) for folder in folders)


def _unzipped(packed: zipfile.ZipFile, info: zipfile.ZipInfo | None, name: str, longest: int) -> bytes | Unusable:
    if info is None:
        return Unusable(f"no {cut(name)!r} in the zip")
    if info.file_size > longest:
        return Unusable(too_large(info.file_size, longest))
    try:
        with packed.open(info) as stream:
            content = stream.read(longest + 1)  # the size in the zip's index may be wrong
    except (OSError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        return Unusable(f"{type(error).__name__}: {cut(str(error))}")
    return content if len(content) <= longest else Unusable(too_large(len(content), longest))
