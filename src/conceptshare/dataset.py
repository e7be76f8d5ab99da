"""Stage `dataset`: read image-caption pairs once, drop what no encoder could read, and shuffle the others once for all.

`results/{dataset}/data/` holds `samples.arrow`, an Arrow IPC file with the columns ``id`` (string), ``image`` (binary,
the bytes of the source's file) and ``caption`` (string), and `manifest.json`. Row i of every later array is
sample i. A sample that one encoder could not read is dropped here, for all, and listed in the manifest.

Samples are shuffled here and not where SAEs are trained: encoders then read, and SAEs learn, in one order from the
first row to the last, whether tokens are stored in between or not.

Where a data set holds the addresses of its images, they are downloaded into `results/{dataset}/downloads/`.
"""

import functools
import hashlib
import io
import itertools
import json
import os
import re
import tarfile
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from conceptshare import provenance
from conceptshare.ahead import in_order
from conceptshare.catalog import DatasetSpec, is_path
from conceptshare.download import HOPELESS, Downloads, Failure, UnusableError
from conceptshare.errors import ConceptshareError, DatasetError, refusal
from conceptshare.files import DATASET, written_aside
from conceptshare.hub import fetch_snapshot
from conceptshare.progress import progress, say

MAX_RATIO = 100
"""Largest ratio of an image's sides. Models resize one side to some 200 pixels: of a narrower image, the other side
would then have tens of thousands of pixels, or none."""

_SCHEMA = pa.schema([("id", pa.string()), ("image", pa.binary()), ("caption", pa.string())])
_BATCH_ROWS = 256
_READERS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".arrow": "arrow"}

# Left out on purpose: EPS, for which PIL runs Ghostscript, and ICO and ICNS, whose header does not tell the true size.
_FORMATS = {
    *("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "DIB", "AVIF", "JPEG2000"),
    *("PPM", "TGA", "PCX", "SGI", "SUN", "PSD", "IM", "SPIDER", "QOI", "XBM", "XPM"),
}

# What undoes each EXIF orientation.
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# A WebDataset's member is KEY.COLUMN, split at the first dot of its file name.
_MEMBER = re.compile(r"((?:.*/|)[^./]+)[.]([^/]*)")


@dataclass(frozen=True)
class Sample:
    """One usable row of a source."""

    id: str
    image: bytes
    caption: str


@dataclass(frozen=True)
class Dropped:
    """One unusable row of a source, and why."""

    row: int
    id: str
    reason: str
    address: str | None = None
    """Where its image was to be downloaded from."""


@dataclass(frozen=True)
class _Source:
    """Where a data set is on this machine."""

    path: Path
    """The file or folder."""
    revision: str | None
    """The commit of a hub data set; a local one is told by its content hash alone."""

    @property
    def folder(self) -> Path:
        """The folder that paths in a table are relative to."""
        return self.path if self.path.is_dir() else self.path.parent


class _UnusableRowError(Exception):
    """A row that cannot become a sample, and why."""


class Data:
    """The samples of a data set, in their one order, read lazily from `results/{dataset}/data/`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            self.manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            with pa.memory_map(str(folder / "samples.arrow")) as source:
                self._table: pa.Table = pa.ipc.open_file(source).read_all()
        except (OSError, ValueError, pa.ArrowException) as error:
            raise DatasetError(
                f"{folder}: no readable data set there ({error}); delete it and run the dataset stage again"
            ) from None
        if len(self) != self.manifest["rows"]:
            raise DatasetError(
                f"{folder}: {len(self)} rows, where the manifest says {self.manifest['rows']}; delete it and run the "
                f"dataset stage again"
            )

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @property
    def content_hash(self) -> str:
        """SHA-256 of all ids, image bytes and captions, in order."""
        return str(self.manifest["content_hash"])

    def ids(self) -> list[str]:
        """All sample ids."""
        ids: list[str] = self._table["id"].to_pylist()
        return ids

    def caption(self, row: int) -> str:
        """The caption of a sample."""
        return str(self._table["caption"][row].as_py())

    def image(self, row: int) -> Image.Image:
        """The picture of a sample, as RGB on white."""
        try:
            return decode(self._table["image"][row].as_py())
        except Exception as error:  # PIL's decoders raise many types; each of these pictures could be decoded once
            raise DatasetError(
                f"{self._folder}: the picture of sample {row} is damaged ({type(error).__name__}: {error}); delete the "
                f"folder and run the dataset stage again"
            ) from error


def make_dataset(spec: DatasetSpec, out: Path) -> None:
    """Read a source and write `samples.arrow` and `manifest.json` into the folder ``out``.

    Images that are downloaded are kept in the folder `downloads` beside ``out``.

    Raises:
        DatasetError: where the source cannot be read, lacks a column, has too few usable rows, has the same id
            twice, loses more than ``spec.max_dropped`` of its rows, or where no image can be downloaded.
        HubError: where the source is neither on this machine nor to be fetched from the hub.
    """
    source = _locate(spec)
    dropped: list[Dropped] = []
    seen: set[str] = set()
    rows_read = 0
    with written_aside(out, DATASET) as folder:
        folder.mkdir()
        as_read = folder / "as-read.arrow"
        with pa.ipc.new_file(str(as_read), _SCHEMA) as writer:
            batch: list[Sample] = []
            with closing(_outcomes(spec, source, out.parent / "downloads")) as outcomes:
                for outcome in progress(outcomes, spec.limit, f"rows of {spec.source}", "rows"):
                    rows_read += 1
                    if isinstance(outcome, Dropped):
                        dropped.append(outcome)
                        continue
                    if outcome.id in seen:
                        raise DatasetError(
                            f"{spec.source}: the id {outcome.id!r} occurs twice; name a column of unique ids"
                        )
                    seen.add(outcome.id)
                    batch.append(outcome)
                    if len(batch) == _BATCH_ROWS:
                        writer.write(_to_arrow(batch))
                        batch = []
            if batch:
                writer.write(_to_arrow(batch))
        _check_share(spec, rows_read, dropped)
        content_hash = _shuffle(as_read, folder / "samples.arrow", spec.order_seed)
        as_read.unlink()
        manifest = {
            "source": spec.source,
            "revision": source.revision,
            "split": spec.split,
            "columns": _columns(spec),
            "several_captions": spec.several_captions,
            "caption_seed": spec.caption_seed,
            "order_seed": spec.order_seed,
            "rows_read": rows_read,
            "rows": rows_read - len(dropped),
            "dropped": [{k: v for k, v in asdict(row).items() if v is not None} for row in dropped],
            "content_hash": content_hash,
        }
        text = json.dumps(manifest, indent=1, ensure_ascii=False)
        # A lone surrogate in a dropped row's id or address becomes \\udcXX, as JSON too would write it.
        (folder / "manifest.json").write_bytes(text.encode("utf-8", "backslashreplace"))
        provenance.record(folder)
    say(f"{spec.source}: {manifest['rows']:,} samples, {len(dropped)} dropped")


def decode(image: bytes, max_pixels: int | None = None) -> Image.Image:
    """Decode an image file to RGB: its first frame, upright by its EXIF orientation, transparency laid on white.

    Greys of 16 bits keep their high byte. Greys of 32 bits, whole or not, say nowhere which value is white: it is the
    smallest of 1 (where they are not whole), 255 and 65535 that none of them exceeds, with 0 for black; where there
    are larger or negative ones, the largest is white and the smallest black.

    Args:
        image: the bytes of a file.
        max_pixels: the largest size to decode, taken from the file's header.

    Raises:
        OSError, ValueError, SyntaxError or Image.DecompressionBombError: where PIL cannot decode it, or it is too
            large. PIL's decoders raise other types too.
    """
    # PIL's own guard, which is global, warns at one size and fails at twice that, whatever max_pixels says.
    Image.MAX_IMAGE_PIXELS = None
    with Image.open(io.BytesIO(image), formats=_formats()) as picture:
        width, height = picture.size
        if min(width, height) < 1:
            raise ValueError(f"{width} x {height} pixels")
        if max_pixels is not None and width * height > max_pixels:
            raise Image.DecompressionBombError(f"{width} x {height} pixels, more than max_pixels = {max_pixels}")
        picture.load()
        rgb = _upright(picture, _to_rgb(picture))
    # What the file says of itself, such as its orientation, no longer holds.
    rgb.info.clear()
    return rgb


@functools.cache
def _formats() -> tuple[str, ...]:
    """The formats of _FORMATS that this machine's PIL can read."""
    Image.init()
    return tuple(name for name in Image.OPEN if name in _FORMATS)


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16"):
        values = np.asarray(picture)
        greys = (values >> 8).astype(np.uint8)
        if isinstance(picture.info.get("transparency"), int):
            greys[values == picture.info["transparency"]] = 255
        return Image.fromarray(greys).convert("RGB")
    if picture.mode in {"I", "F"}:
        return Image.fromarray(_to_8_bits(np.asarray(picture))).convert("RGB")
    if picture.has_transparency_data:
        layered = picture.convert("RGBA")
        white = Image.new("RGBA", layered.size, "white")
        return Image.alpha_composite(white, layered).convert("RGB")
    return picture.convert("RGB")


def _to_8_bits(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Greys ``[height, width]`` of 32 bits, int32 or float32, as 0 to 255; see `decode`."""
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise ValueError("greys that are not finite")
    whites = [255, 65535] if values.dtype.kind == "i" else [1, 255, 65535]
    black, white = 0.0, next((float(white) for white in whites if high <= white), high)
    if low < 0 or high > whites[-1]:
        black, white = low, high
    if white == black:
        return np.zeros(values.shape, np.uint8)
    scaled: NDArray[np.float64] = (values.astype(np.float64) - black) * (255 / (white - black))
    return np.rint(scaled).astype(np.uint8)


def _upright(picture: Image.Image, rgb: Image.Image) -> Image.Image:
    """``rgb`` turned as the EXIF data of ``picture`` say."""
    try:
        turn = _TURNS.get(picture.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF data, on which PIL raises many types, say nothing about the pixels
        return rgb
    return rgb if turn is None else rgb.transpose(turn)


def _check_image(image: bytes, max_pixels: int) -> None:
    """Make sure that every encoder can read an image.

    Raises:
        UnusableError: where one could not.
    """
    try:
        width, height = decode(image, max_pixels).size
    except Image.DecompressionBombError as error:
        raise UnusableError(f"image is too large ({error})", max_pixels=max_pixels) from None
    except UnidentifiedImageError:  # whose message names an object in memory, another on every run
        raise UnusableError("image cannot be decoded (no file of a kind that is read here)") from None
    except Exception as error:  # PIL's decoders raise many types; whatever it is, the sample is unusable
        raise UnusableError(f"image cannot be decoded ({type(error).__name__}: {error})") from None
    if max(width, height) > MAX_RATIO * min(width, height):
        raise UnusableError(f"image of {width} x {height} pixels is too narrow; sides may differ {MAX_RATIO} fold")


def _outcomes(spec: DatasetSpec, source: _Source, downloads: Path) -> Generator[Sample | Dropped, None, None]:
    """Each row of the source in order, as a sample or as dropped; a bounded number of rows is worked on ahead."""
    _formats()  # finds PIL's plugins, which several threads had better not do at once
    cores = provenance.cores()
    rows = enumerate(_rows(spec, source))
    with ThreadPoolExecutor(cores, "decode") as pool:
        if spec.image_url is not None:
            yield from _downloaded(spec, spec.image_url, rows, downloads, pool)
        else:
            yield from in_order((pool.submit(_outcome, spec, source, *row).result for row in rows), 4 * cores)


def _downloaded(
    spec: DatasetSpec, column: str, rows: Iterable[tuple[int, dict[str, Any]]], folder: Path, pool: ThreadPoolExecutor
) -> Iterator[Sample | Dropped]:
    """Each row in order, with its image from the address in a column."""

    def check(image: bytes) -> None:
        _check_image(image, spec.max_pixels)

    # Far enough ahead that one address that is tried for a minute does not idle the others; rows are small.
    ahead = 256 * spec.download.parallel
    settings = {"max_pixels": spec.max_pixels}
    with Downloads(folder, spec.download, check, pool, settings, spec.source) as downloads:
        for outcome in in_order((_start_download(spec, column, *row, downloads) for row in rows), ahead):
            if downloads.counts.unreachable >= HOPELESS:
                _check_connection(spec, downloads)
            yield outcome
        _check_connection(spec, downloads)
        say(downloads.report())


def _check_connection(spec: DatasetSpec, downloads: Downloads) -> None:
    if downloads.all_unreachable():
        raise DatasetError(
            f"{spec.source}: none of the {downloads.counts.unreachable} image addresses asked could be reached, the "
            f"last for this reason: {downloads.last_failure}. Check this machine's connection to the internet and run "
            "again; nothing was noted as dead"
        )


def _start_download(
    spec: DatasetSpec, column: str, number: int, row: dict[str, Any], downloads: Downloads
) -> Callable[[], Sample | Dropped]:
    """Ask for a row's image; what is returned waits for it."""
    try:
        id_, caption = _id(spec, number, row), _caption(spec, number, row)
        address = _address(row[column])
    except _UnusableRowError as error:
        dropped = Dropped(number, _shown_id(spec, number, row), str(error))
        return lambda: dropped
    future = downloads.fetch(address)

    def finish() -> Sample | Dropped:
        found = future.result()
        if isinstance(found, Failure):
            return Dropped(number, id_, found.reason, address)
        return Sample(id_, found.read_bytes(), caption)

    return finish


def _locate(spec: DatasetSpec) -> _Source:
    """Where the source is on this machine, once it is there."""
    if not is_path(spec.source):
        folder = fetch_snapshot(spec.source, "dataset", spec.revision)
        return _Source(folder, folder.name)
    path = Path(spec.source).expanduser()
    if not path.exists():
        raise DatasetError(f"{spec.source}: no such file or folder")
    return _Source(path, None)


def _rows(spec: DatasetSpec, source: _Source) -> Iterator[dict[str, Any]]:
    """The source's rows, images as they are stored and not decoded."""
    import datasets
    from datasets.packaged_modules.webdataset.webdataset import WebDataset

    datasets.disable_progress_bars()
    path = source.path
    try:
        if path.is_file() and path.suffix.lower() in {".tar", ".jsonl"}:
            own = _tar_rows(spec, [path]) if path.suffix.lower() == ".tar" else _json_lines(spec, path)
            yield from itertools.islice(own, spec.limit)
            return
        if path.is_file():
            reader = _READERS.get(path.suffix.lower())
            if reader is None:
                kinds = ", ".join([*_READERS, ".jsonl", ".tar"])
                raise DatasetError(f"{spec.source}: cannot read {path.suffix!r} files; use {kinds}")
            # Else a caption such as "NA" or "null" would be none.
            options = {"keep_default_na": False} if reader == "csv" else {}
            rows = datasets.load_dataset(reader, data_files=str(path), split="train", streaming=True, **options)
        else:
            builder = datasets.load_dataset_builder(str(path))
            if isinstance(builder, WebDataset):
                yield from itertools.islice(_tar_rows(spec, _tar_files(spec, builder.config.data_files)), spec.limit)
                return
            rows = builder.as_streaming_dataset(split=spec.split)
        for column, feature in (rows.features or {}).items():
            if isinstance(feature, datasets.Image):
                rows = rows.cast_column(column, datasets.Image(decode=False))
        for number, row in enumerate(itertools.islice(rows, spec.limit)):
            if number == 0:
                _check_columns(spec, row)
            yield row
    except ConceptshareError:
        raise
    except Exception as error:  # the readers raise whatever their file formats raise
        if refusal(error) is not None:  # such as their cache in a home folder that is full
            raise
        hint = "check the file" if source.revision is None else "check the data set's files, split and revision"
        raise DatasetError(f"{spec.source}: cannot be read ({type(error).__name__}: {error}); {hint}") from error


def _tar_files(spec: DatasetSpec, splits: dict[str, list[str]]) -> list[Path]:
    if spec.split not in splits:
        raise DatasetError(
            f"{spec.source}: no split {spec.split!r}; it has {', '.join(map(str, splits))}: set split to one"
        )
    return [Path(file) for file in splits[spec.split]]


def _tar_rows(spec: DatasetSpec, files: list[Path]) -> Iterator[dict[str, Any]]:
    """The samples of WebDataset tar files, with the columns of ``spec``; None where a sample lacks one.

    Nothing is unpacked onto the disk, whatever the members' names.
    """
    columns = {key: column for key, column in _columns(spec).items() if column not in {None, "__key__"}}
    wanted = {name for column in columns.values() for name in column.lower().split(";")}
    met: set[str] = set()
    for file in files:
        for sample, members in itertools.groupby(_tar_members(file, wanted), key=lambda member: member[0]):
            cells: dict[str, bytes | None] = {}
            for _, name, content in members:
                if name in cells:
                    raise DatasetError(f"{file}: the sample {sample!r} has two members {name!r}; rename one")
                cells[name] = content
            met.update(cells)
            row: dict[str, Any] = {"__key__": sample}
            for key, column in columns.items():
                name = next((name for name in column.lower().split(";") if name in cells), "")
                row[column] = cells.get(name) if key == "image" else _text_of(name, cells.get(name))
            yield row
    for key, column in columns.items():
        if met and met.isdisjoint(column.lower().split(";")):
            raise _no_column(spec, key, column, sorted(met), "members' extensions")


def _json_lines(spec: DatasetSpec, file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSON lines file, with the columns of ``spec``; None where a row lacks one.

    The parser that `datasets` uses gives the whole file up where a text holds a lone surrogate, or where a column
    changes its type.
    """
    columns = {key: column for key, column in _columns(spec).items() if column is not None}
    met: set[str] = set()
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DatasetError(f"{spec.source}: line {number} is not valid JSON ({error}); mend it") from None
            if not isinstance(row, dict):
                raise DatasetError(f"{spec.source}: line {number} holds no object of columns and cells; mend it")
            met.update(row)
            yield {column: row.get(column) for column in columns.values()}
    for key, column in columns.items():
        if met and column not in met:
            raise _no_column(spec, key, column, sorted(met), "columns")


def _no_column(spec: DatasetSpec, key: str, column: str, there: Iterable[str], what: str) -> DatasetError:
    return DatasetError(
        f"{spec.source}: no column {column!r}; the {what} are {', '.join(there)}: set {key} to one of them"
    )


def _tar_members(file: Path, wanted: set[str]) -> Iterator[tuple[str, str, bytes | None]]:
    """Sample, column and content of each member that is a file, in order; contents of the wanted columns only."""
    with tarfile.open(file, "r|*") as tar:
        for member in tar:
            match = _MEMBER.fullmatch(member.name)
            if match is None or not member.isfile():
                continue
            column = match[2].lower()
            content = tar.extractfile(member) if column in wanted else None
            yield match[1], column, content.read() if content is not None else None


def _text_of(name: str, content: bytes | None) -> Any:
    """A member that is no image: JSON as what it holds, the rest as text; as it is where it is neither."""
    if content is None:
        return None
    try:
        return json.loads(content) if name.split(".")[-1] == "json" else content.decode("utf-8")
    except (ValueError, RecursionError):
        return content


def _outcome(spec: DatasetSpec, source: _Source, number: int, row: dict[str, Any]) -> Sample | Dropped:
    try:
        id_, caption = _id(spec, number, row), _caption(spec, number, row)
        image = _image_bytes(row[spec.image], source)
        _check_image(image, spec.max_pixels)
    except (_UnusableRowError, UnusableError) as error:
        return Dropped(number, _shown_id(spec, number, row), str(error))
    return Sample(id_, image, caption)


def _id(spec: DatasetSpec, number: int, row: dict[str, Any]) -> str:
    if spec.id is None:
        return f"{number:08d}"
    if row[spec.id] is None or row[spec.id] == "":
        raise _UnusableRowError("no id")
    return _encodable("id", str(row[spec.id]))


def _shown_id(spec: DatasetSpec, number: int, row: dict[str, Any]) -> str:
    """The id of a dropped row, be it usable or not."""
    return f"{number:08d}" if spec.id is None else str(row[spec.id])


def _caption(spec: DatasetSpec, number: int, row: dict[str, Any]) -> str:
    """The caption of a row, by the policy on several ones.

    A draw depends on seed and row number alone: rows that are dropped, or left out by ``limit``, change no other.
    """
    captions = _texts(row[spec.caption])
    if not captions:
        raise _UnusableRowError("no caption")
    if spec.several_captions == "joined":
        return _encodable("caption", " ".join(caption.strip() for caption in captions) if captions[1:] else captions[0])
    if spec.several_captions == "sampled":
        draw = int(np.random.default_rng([spec.caption_seed, number]).integers(len(captions)))
        return _encodable("caption", captions[draw])
    return _encodable("caption", captions[0])


def _texts(cell: Any) -> list[str]:
    """The texts in a caption cell that are not blank."""
    if isinstance(cell, pa.Scalar | pa.Array):
        cell = cell.as_py() if isinstance(cell, pa.Scalar) else cell.to_pylist()
    if isinstance(cell, np.ndarray | np.generic):
        cell = cell.tolist()
    items = cell if isinstance(cell, list | tuple) else [cell]
    for item in items:
        if item is not None and not isinstance(item, str):
            raise _UnusableRowError(f"caption is {type(item).__name__}, not text")
    return [item for item in items if item is not None and item.strip()]


def _encodable(what: str, text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _UnusableRowError(f"{what} cannot be encoded as UTF-8 ({error.reason} at {error.start})") from None
    return text


def _address(cell: Any) -> str:
    if cell is None or (isinstance(cell, str) and not cell.strip()):
        raise _UnusableRowError("no image address")
    if not isinstance(cell, str):
        raise _UnusableRowError(f"image address is {type(cell).__name__}, not text")
    return cell.strip()


def _image_bytes(value: Any, source: _Source) -> bytes:
    """The bytes of an image cell: an encoded image, bytes, or a path relative to the table's folder.

    Raises:
        _UnusableRowError: where there is none, or no file at that path.
    """
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        reason = "no image" if value is None else f"{type(value).__name__} is not an image"
        raise _UnusableRowError(f"image cannot be decoded ({reason})")
    path = Path(os.path.normpath(source.folder / value))
    if source.revision is not None and not path.is_relative_to(source.folder):
        raise _UnusableRowError(f"image's path leads out of the data set: {value}")
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:
        raise _UnusableRowError(f"image cannot be read ({type(error).__name__}: {error})") from None


def _columns(spec: DatasetSpec) -> dict[str, Any]:
    """The column of each key that names one."""
    image = {"image": spec.image} if spec.image_url is None else {"image_url": spec.image_url}
    return {"id": spec.id, **image, "caption": spec.caption}


def _check_columns(spec: DatasetSpec, row: dict[str, Any]) -> None:
    for key, column in _columns(spec).items():
        if column is not None and column not in row:
            raise _no_column(spec, key, column, row, "columns")


def _check_share(spec: DatasetSpec, rows_read: int, dropped: list[Dropped]) -> None:
    reasons = "; ".join(f"row {row.row} ({row.id}): {row.reason}" for row in dropped[:3])
    if rows_read and len(dropped) / rows_read > spec.max_dropped:
        again = ", or run again, which asks only for what failed for a reason that may pass" if spec.image_url else ""
        raise DatasetError(
            f"{spec.source}: {len(dropped)} of {rows_read} rows are unusable, more than max_dropped = "
            f"{spec.max_dropped:g} allows: {reasons}. Mend them or raise max_dropped{again}"
        )
    if rows_read - len(dropped) < 2:
        why = f" (dropped: {reasons})" if dropped else ""
        raise DatasetError(f"{spec.source}: {rows_read - len(dropped)} usable rows; correlations need at least 2{why}")


def _shuffle(source: Path, out: Path, seed: int) -> str:
    """Write the samples of ``source`` to ``out`` in the order that a seed draws, and return their content hash."""
    digest = hashlib.sha256()
    with pa.memory_map(str(source)) as file, pa.ipc.new_file(str(out), _SCHEMA) as writer:
        table = pa.ipc.open_file(file).read_all()
        order = np.random.default_rng(seed).permutation(table.num_rows).tolist()
        for start in range(0, len(order), _BATCH_ROWS):
            rows = order[start : start + _BATCH_ROWS]
            batch = [Sample(*(table[name][row].as_py() for name in _SCHEMA.names)) for row in rows]
            for sample in batch:
                for part in (sample.id.encode(), sample.image, sample.caption.encode()):
                    digest.update(len(part).to_bytes(8, "little") + part)
            writer.write(_to_arrow(batch))
    return digest.hexdigest()


def _to_arrow(batch: list[Sample]) -> pa.RecordBatch:
    return pa.record_batch(
        [
            pa.array([sample.id for sample in batch], pa.string()),
            pa.array([sample.image for sample in batch], pa.binary()),
            pa.array([sample.caption for sample in batch], pa.string()),
        ],
        schema=_SCHEMA,
    )
