"""Stage `dataset`: read image-caption pairs, drop unreadable ones and shuffle the rest once.

`results/{dataset}/data/` holds `samples.arrow`, an Arrow IPC file with the columns ``id`` (string), ``image`` (binary,
the bytes of the source's file), ``caption`` (string) and their checksums, and `manifest.json`. Row i of every later
array is sample i. Samples that some encoder could not read are dropped for all encoders and listed in `dropped.jsonl`.

Samples are shuffled here instead of during SAE training, so that encoders and SAEs read them in the same order from
first to last, whether or not tokens are stored in between.

If a data set has URLs of its images, they are downloaded to `results/{dataset}/downloads/`.
"""

import hashlib
import json
import re
import stat
from array import array
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO
from zlib import crc32

import numpy as np
import pyarrow as pa
from PIL import Image, UnidentifiedImageError

from conceptshare.config.catalog import INFORMATIVE_KEYS, DatasetSpec, canonical
from conceptshare.data.download import MAX_UNREACHABLE, Downloads, Failure, UnusableError
from conceptshare.data.images import decode, formats
from conceptshare.data.rows import Unusable, columns_of, cut, hash_of, image_path, read_rows, too_large
from conceptshare.data.sources import Source, locate, printable
from conceptshare.io import provenance
from conceptshare.io.ahead import in_order
from conceptshare.io.errors import DatasetError
from conceptshare.io.files import DATASET, atomic_output, read_object
from conceptshare.io.progress import info, progress, warn
from conceptshare.io.seals import is_intact, sealed

MAX_RATIO = 100
"""Largest ratio of an image's sides. Models resize one side to about 200 pixels; the other side of a narrower image
would then have tens of thousands of pixels, or none."""

_SCHEMA = pa.schema(
    [
        *(("id", pa.string()), ("image", pa.binary()), ("caption", pa.string())),
        *(("text_crc32", pa.uint32()), ("image_crc32", pa.uint32())),
    ]
)
_REMEDY = "delete the folder and run the dataset stage again"
_ELSEWHERE = "name a folder that the dataset stage made"
_BATCH_ROWS = 256
_MAX_ID_LENGTH = 200  # characters of a dropped row's id in a manifest
_MAX_URL_LENGTH = 8000
_BASE64 = re.compile(r"(data:[^,]{0,100},)?[A-Za-z0-9+/_\s-]{50,}={0,2}")


@dataclass(frozen=True)
class Sample:
    """One usable row of a source."""

    id: str
    image: bytes
    caption: str


@dataclass(frozen=True)
class Dropped:
    """An unusable row of a source, with the reason."""

    row: int
    id: str
    reason: str
    address: str | None = None
    """URL of its image, if it was to be downloaded."""


class Data:
    """The samples of a data set in their fixed order, read lazily from `results/{dataset}/data/`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.manifest = read_object(folder / "manifest.json")
            if not is_intact(self.manifest):
                raise ValueError("manifest.json is missing, or was changed or written by another version")
            with pa.memory_map(str(folder / "samples.arrow")) as source:
                self._table: pa.Table = pa.ipc.open_file(source).read_all()
            if not self._table.schema.equals(_SCHEMA):
                raise ValueError("its columns are not those of a data set")
            checksums = _checksums_digest(self._table.to_batches())
        except (OSError, ValueError, pa.ArrowException) as error:
            message = " ".join(str(error).split())
            remedy = _REMEDY if (folder / "samples.arrow").exists() or DATASET.is_valid(folder) else _ELSEWHERE
            raise DatasetError(f"{folder}: no readable data set there ({message}); {remedy}") from None
        if checksums != self.manifest["checksums"]:
            raise DatasetError(f"{folder}: samples.arrow is damaged, or does not belong to manifest.json; {_REMEDY}")
        self._starts = np.cumsum([0, *(len(chunk) for chunk in self._table["id"].chunks)])
        self._checked: set[tuple[str, int]] = set()

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @property
    def content_hash(self) -> str:
        """SHA-256 of all ids, image bytes and captions, in order."""
        return str(self.manifest["content_hash"])

    def ids(self) -> list[str]:
        """All sample ids."""
        return [self._text(row)[0] for row in range(len(self))]

    def caption(self, row: int) -> str:
        """The caption of a sample."""
        return self._text(row)[1]

    def image(self, row: int) -> Image.Image:
        """The image of a sample, as RGB on white."""
        image = self.image_bytes(row)
        try:
            return decode(image)
        except Exception as error:  # PIL's decoders raise many types; every stored image was decodable once
            raise DatasetError(
                f"{self.folder}: the image of sample {row} cannot be decoded here ({type(error).__name__}: {error}); "
                f"run with the same version of Pillow as the dataset stage"
            ) from error

    def image_bytes(self, row: int) -> bytes:
        """The image file of a sample."""
        image: bytes = self._cell("image", row)
        if crc32(image) != self._cell("image_crc32", row):
            raise self._damaged(row)
        return image

    def _text(self, row: int) -> tuple[str, str]:
        """The id and the caption of a sample."""
        texts: tuple[str, str] = self._cell("id", row), self._cell("caption", row)
        if _text_crc32(*texts) != self._cell("text_crc32", row):
            raise self._damaged(row)
        return texts

    def _cell(self, column: str, row: int) -> Any:
        """One value of a sample. Arrow trusts the offsets in a file, so each batch is validated before use."""
        n = int(np.searchsorted(self._starts, row, side="right")) - 1
        chunk = self._table[column].chunk(n)
        if (column, n) not in self._checked:
            try:
                chunk.validate(full=True)
            except pa.ArrowException:
                raise self._damaged(row) from None
            self._checked.add((column, n))
        return chunk[row - int(self._starts[n])].as_py()

    def _damaged(self, row: int) -> DatasetError:
        return DatasetError(f"{self.folder}: sample {row} in samples.arrow is damaged; {_REMEDY}")


def make_dataset(spec: DatasetSpec, out: Path) -> None:
    """Read a source and write `samples.arrow` and `manifest.json` into the folder ``out``.

    Downloaded images are kept in the folder `downloads` next to ``out``.

    Raises:
        DatasetError: if the source cannot be read, lacks a column, has too few usable rows, has duplicate ids, loses
            more than ``spec.max_dropped`` of its rows, or if no image can be downloaded.
        HubError: if the source is not on this machine and cannot be fetched from the hub.
    """
    source = locate(spec)
    for line in source.not_read.lines():
        info(f"{spec.source}: {line}")
    reported = len(source.not_read.counts)
    with atomic_output(out, DATASET) as folder:
        folder.mkdir()
        with (
            (folder / "as-read").open("w+b") as as_read,
            (folder / "dropped.jsonl").open("w", encoding="utf-8", errors="backslashreplace") as listed,
            closing(_outcomes(spec, source, out.parent / "downloads")) as outcomes,
        ):
            samples, dropped = _SampleFile(as_read), _DroppedRows(listed)
            for outcome in progress(outcomes, spec.limit, f"rows of {spec.source}", "rows"):
                if isinstance(outcome, Dropped):
                    dropped.add(outcome)
                    continue
                samples.add(outcome)
                if spec.id is not None and len(samples) & (len(samples) - 1) == 0:  # at powers of two
                    samples.check_ids(spec)
            if spec.id is not None:
                samples.check_ids(spec)
            _check_share(spec, len(samples), dropped)
            content_hash, checksums = samples.shuffle(folder / "samples.arrow", spec.order_seed)
        manifest = {
            "settings": json.loads(canonical(spec, set(DatasetSpec.model_fields) - INFORMATIVE_KEYS)),
            "source": spec.source,
            "revision": source.revision,
            **({} if source.configuration is None else {"configuration": source.configuration}),
            "split": source.split,
            "columns": columns_of(spec),
            "several_captions": spec.several_captions,
            "caption_seed": spec.caption_seed,
            "order_seed": spec.order_seed,
            "rows_read": len(samples) + dropped.count,
            "rows": len(samples),
            **({"not_read": source.not_read.entries()} if source.not_read.counts else {}),
            "content_hash": content_hash,
            "checksums": checksums,
        }
        text = json.dumps(sealed(manifest), indent=1, ensure_ascii=False)
        (folder / "manifest.json").write_text(text, encoding="utf-8", errors="backslashreplace")
        (folder / "as-read").unlink()
        provenance.record(folder)
    for line in source.not_read.lines()[reported:]:
        info(f"{spec.source}: {line}")
    info(f"{spec.source}: {manifest['rows']:,} samples, {dropped.count:,} dropped")
    if dropped.count:
        first = printable(f"row {dropped.first[0].row}: {dropped.first[0].reason}")
        rows = f"{dropped.count:,} of {manifest['rows_read']:,} rows"
        warn(f"{spec.source}: {rows} dropped, such as {first}; {out / 'dropped.jsonl'} lists them")


class _SampleFile:
    """The samples in source order, in a file; memory only holds the offset and a hash of the id of each sample."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._offsets = array("Q", [0])
        self._ids = array("Q")

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, sample: Sample) -> None:
        """Append a sample: its id, image and caption, each preceded by its length."""
        parts = (sample.id.encode(), sample.image, sample.caption.encode())
        size = self._file.write(b"".join(len(part).to_bytes(8, "little") + part for part in parts))
        self._offsets.append(self._offsets[-1] + size)
        self._ids.append(hash_of(sample.id))

    def check_ids(self, spec: DatasetSpec) -> None:
        """Make sure that no two samples have the same id."""
        hashes = np.array(self._ids)
        order = np.argsort(hashes, kind="stable")
        same = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
        self._file.flush()
        for one, other in zip(order[same].tolist(), order[same + 1].tolist(), strict=True):
            id_ = _unpacked(self._record(one)).id
            if id_ == _unpacked(self._record(other)).id:  # not a hash collision
                raise DatasetError(f"{spec.source}: the id {cut(id_)!r} occurs twice; name a column of unique ids")

    def shuffle(self, out: Path, seed: int) -> tuple[str, str]:
        """Write the samples to ``out`` in an order drawn from ``seed``.

        Returns:
            the content hash of the samples, and a digest of their checksums.
        """
        self._file.flush()
        digest, checksums = hashlib.sha256(), hashlib.sha256()
        order = np.random.default_rng(seed).permutation(len(self))
        with pa.ipc.new_file(str(out), _SCHEMA) as writer:
            for start in range(0, len(order), _BATCH_ROWS):
                records = [self._record(row) for row in order[start : start + _BATCH_ROWS].tolist()]
                for record in records:
                    digest.update(record)
                batch = _to_arrow([_unpacked(record) for record in records])
                _add_checksums(checksums, batch)
                writer.write(batch)
        return digest.hexdigest(), checksums.hexdigest()

    def _record(self, row: int) -> bytes:
        start, end = self._offsets[row], self._offsets[row + 1]
        self._file.seek(start)
        return self._file.read(end - start)


def _unpacked(record: bytes) -> Sample:
    parts, start = [], 0
    for _ in range(3):
        end = start + 8 + int.from_bytes(record[start : start + 8], "little")
        parts.append(record[start + 8 : end])
        start = end
    return Sample(parts[0].decode(), parts[1], parts[2].decode())


class _DroppedRows:
    """The dropped rows, in a file of JSON lines; memory only holds the first few."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self.count = 0
        self.first: list[Dropped] = []

    def add(self, row: Dropped) -> None:
        r"""Append a row. A lone surrogate in its id or URL is escaped as \udcXX, as in JSON."""
        self.first += [row] if self.count < 3 else []
        entry = {key: value for key, value in asdict(row).items() if value is not None}
        self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self.count += 1


def _check_image(image: bytes, max_pixels: int) -> None:
    """Make sure that every encoder can read an image.

    Raises:
        UnusableError: if an encoder could not read it.
    """
    try:
        width, height = decode(image, max_pixels).size
    except Image.DecompressionBombError as error:
        raise UnusableError(f"image is too large ({error})", permanent=False) from None
    except UnidentifiedImageError:  # whose message contains a memory address, which differs between runs
        raise UnusableError("image cannot be decoded (no file of a kind that is read here)") from None
    except Exception as error:  # PIL's decoders raise many types; the sample is unusable in any case
        raise UnusableError(f"image cannot be decoded ({type(error).__name__}: {error})") from None
    if max(width, height) > MAX_RATIO * min(width, height):
        raise UnusableError(f"image of {width} x {height} pixels is too narrow; sides may differ {MAX_RATIO} fold")


def _outcomes(spec: DatasetSpec, source: Source, downloads: Path) -> Generator[Sample | Dropped, None, None]:
    """Yield each row of the source in order, as a sample or as dropped; a bounded number of rows is prefetched."""
    formats()  # loads PIL's plugins, which is not thread-safe
    cores = provenance.cores()
    rows = enumerate(read_rows(spec, source))
    with ThreadPoolExecutor(cores, "decode") as pool:
        if spec.image_url is not None:
            yield from _downloaded(spec, rows, downloads, pool)
        else:
            yield from in_order((pool.submit(_outcome, spec, source, *row).result for row in rows), 4 * cores)


def _downloaded(
    spec: DatasetSpec, rows: Iterable[tuple[int, tuple[Path, dict[str, Any]]]], folder: Path, pool: ThreadPoolExecutor
) -> Iterator[Sample | Dropped]:
    """Yield each row in order, with its image downloaded from the URL in a column."""

    def check(image: bytes) -> None:
        _check_image(image, spec.max_pixels)

    # Enough prefetching that one URL retried for a minute does not stall the others; rows are small.
    ahead = 256 * spec.download.parallel
    with Downloads(folder, spec.download, check, pool, spec.source) as downloads:
        started = (_start_download(spec, number, row, downloads) for number, (_, row) in rows)
        for outcome in in_order(started, ahead):
            if downloads.counts.unreachable >= MAX_UNREACHABLE:
                _check_connection(spec, downloads)
            yield outcome
        _check_connection(spec, downloads)
        info(downloads.report())


def _check_connection(spec: DatasetSpec, downloads: Downloads) -> None:
    if downloads.all_unreachable():
        raise DatasetError(
            f"{spec.source}: none of the {downloads.counts.unreachable} image URLs tried could be reached; the last "
            f"failed with: {downloads.last_failure}. Check this machine's internet connection and run again; no URL "
            "was recorded as dead"
        )


def _start_download(
    spec: DatasetSpec, number: int, row: dict[str, Any], downloads: Downloads
) -> Callable[[], Sample | Dropped]:
    """Start the download of a row's image, and return a function that waits for it."""
    try:
        _check_read(row)
        id_, caption = _id(spec, number, row), _caption(spec, number, row)
        address = _address(row["image_url"])
    except UnusableError as error:
        dropped = Dropped(number, _shown_id(spec, number, row), str(error))
        return lambda: dropped
    future = downloads.fetch(address)

    def finish() -> Sample | Dropped:
        result = future.result()
        if isinstance(result, Failure):
            return Dropped(number, cut(id_, _MAX_ID_LENGTH), result.reason, cut(address, _MAX_ID_LENGTH * 5))
        return Sample(id_, result.read_bytes(), caption)

    return finish


def _outcome(spec: DatasetSpec, source: Source, number: int, place: tuple[Path, dict[str, Any]]) -> Sample | Dropped:
    folder, row = place
    try:
        _check_read(row)
        id_, caption = _id(spec, number, row), _caption(spec, number, row)
        image = _image_bytes(row["image"], folder, source, int(spec.max_mb * 1e6))
        _check_image(image, spec.max_pixels)
    except UnusableError as error:
        return Dropped(number, _shown_id(spec, number, row), str(error))
    return Sample(id_, image, caption)


def _check_read(row: dict[str, Any]) -> None:
    for key, cell in row.items():
        if isinstance(cell, Unusable):
            raise UnusableError(f"{key} cannot be read ({cell.reason})")


def _id(spec: DatasetSpec, number: int, row: dict[str, Any]) -> str:
    if spec.id is None:
        return f"{number:08d}"
    if row["id"] is None or row["id"] == "":
        raise UnusableError("no id")
    return _encodable("id", str(row["id"]))


def _shown_id(spec: DatasetSpec, number: int, row: dict[str, Any]) -> str:
    """The id of a dropped row, shortened, even if it is not usable as an id."""
    return f"{number:08d}" if spec.id is None else cut(str(row["id"]), _MAX_ID_LENGTH)


def _caption(spec: DatasetSpec, number: int, row: dict[str, Any]) -> str:
    """The caption of a row; ``several_captions`` decides if there are several.

    The draw only depends on the seed and the row number, so dropped rows and ``limit`` do not affect other rows.
    """
    captions = _texts(row["caption"])
    if not captions:
        raise UnusableError("no caption")
    if spec.several_captions == "joined":
        return _encodable("caption", " ".join(caption.strip() for caption in captions) if captions[1:] else captions[0])
    if spec.several_captions == "sampled":
        draw = int(np.random.default_rng([spec.caption_seed, number]).integers(len(captions)))
        return _encodable("caption", captions[draw])
    return _encodable("caption", captions[0])


def _texts(cell: Any) -> list[str]:
    """The non-blank texts in a caption cell."""
    items = cell if isinstance(cell, list | tuple) else [cell]
    for item in items:
        if item is not None and not isinstance(item, str):
            raise UnusableError(f"caption is {type(item).__name__}, not text")
    return [item for item in items if item is not None and item.strip()]


def _encodable(what: str, text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UnusableError(f"{what} cannot be encoded as UTF-8 ({error.reason} at {error.start})") from None
    return text


def _address(cell: Any) -> str:
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        raise UnusableError("no image address")
    if not isinstance(cell, str):
        raise UnusableError(f"image address is {type(cell).__name__}, not text")
    if len(cell) > _MAX_URL_LENGTH:
        raise UnusableError(f"image address of {len(cell):,} letters: {cut(cell)}")
    return cell.strip()


def _image_bytes(value: Any, folder: Path, source: Source, longest: int) -> bytes:
    """The bytes of an image cell: a dict of the `datasets` library, bytes, or the path of a regular file.

    Raises:
        UnusableError: if the cell is empty, the file is missing, or it has more than ``longest`` bytes.
    """
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, bytes):
        if len(value) > longest:
            raise UnusableError(f"image cannot be read ({too_large(len(value), longest)})")
        return value
    if not isinstance(value, str):
        reason = "no image" if value is None else f"{type(value).__name__} is not an image"
        raise UnusableError(f"image cannot be decoded ({reason})")
    try:
        path = Path(image_path(value, folder, source))
        if source.revision is not None and not path.is_relative_to(source.folder):
            raise UnusableError(f"image's path leads out of the data set: {cut(value, _MAX_ID_LENGTH)}")
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a device may never end, and a pipe may block
            raise UnusableError(f"image cannot be read (no regular file: {cut(value, _MAX_ID_LENGTH)})")
        if status.st_size > longest:
            raise UnusableError(f"image cannot be read ({too_large(status.st_size, longest)})")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise UnusableError(_why_unreadable(value, error)) from None


def _why_unreadable(cell: str, error: OSError | ValueError) -> str:
    if cell.startswith(("http://", "https://")):
        return f"image cannot be read ({cut(cell)} is an address; name its column in image_url)"
    if _BASE64.fullmatch(cell[:4096].rstrip()):
        return f"image cannot be read ({len(cell):,} letters that look like base64, {cut(cell)}; decode them to bytes)"
    message = error.strerror if isinstance(error, OSError) else str(error)
    remedy = "; image_folder names the folder it is in" if isinstance(error, FileNotFoundError) else ""
    return f"image cannot be read ({type(error).__name__}: {message}: {cut(cell, _MAX_ID_LENGTH)!r}{remedy})"


def _check_share(spec: DatasetSpec, samples: int, dropped: _DroppedRows) -> None:
    rows = samples + dropped.count
    reasons = "; ".join(f"row {row.row} ({cut(row.id)}): {row.reason}" for row in dropped.first)
    if rows and dropped.count / rows > spec.max_dropped:
        again = ", or run again to retry the transient failures" if spec.image_url else ""
        raise DatasetError(
            f"{spec.source}: {dropped.count} of {rows} rows are unusable, more than max_dropped = "
            f"{spec.max_dropped:g} allows: {reasons}. Correct them or raise max_dropped{again}"
        )
    if samples < 2:
        why = f" (dropped: {reasons})" if dropped.count else ""
        raise DatasetError(f"{spec.source}: {samples} usable rows; correlations need at least 2{why}")


def _to_arrow(batch: list[Sample]) -> pa.RecordBatch:
    rows = [
        vars(sample) | {"text_crc32": _text_crc32(sample.id, sample.caption), "image_crc32": crc32(sample.image)}
        for sample in batch
    ]
    return pa.RecordBatch.from_pylist(rows, schema=_SCHEMA)


def _text_crc32(id_: str, caption: str) -> int:
    return crc32(caption.encode(), crc32(id_.encode()))


def _checksums_digest(batches: Iterable[pa.RecordBatch]) -> str:
    """SHA-256 of the checksums of all samples in order, which links a manifest to its samples."""
    digest = hashlib.sha256()
    for batch in batches:
        _add_checksums(digest, batch)
    return digest.hexdigest()


def _add_checksums(digest: Any, batch: pa.RecordBatch) -> None:
    for name in ("text_crc32", "image_crc32"):
        digest.update(batch[name].to_numpy(zero_copy_only=False).astype("<u4").tobytes())
