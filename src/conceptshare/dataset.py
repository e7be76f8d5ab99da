"""Stage `dataset`: read image-caption pairs once, drop what no encoder could read, and fix their order.

`results/{dataset}/data/` holds `samples.arrow`, an Arrow IPC file with the columns ``id`` (string), ``image`` (binary,
the bytes of the source's file) and ``caption`` (string), and `manifest.json`. Row i of every later array is
sample i. A sample that one encoder could not read is dropped here, for all, and listed in the manifest.
"""

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from conceptshare.catalog import DatasetSpec, is_path
from conceptshare.errors import DatasetError
from conceptshare.progress import progress, say
from conceptshare.store import written_aside

_SCHEMA = pa.schema([("id", pa.string()), ("image", pa.binary()), ("caption", pa.string())])
_BATCH_ROWS = 256
_READERS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json", ".arrow": "arrow"}


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


class Data:
    """The samples of a data set, in their one order, read lazily from `results/{dataset}/data/`."""

    def __init__(self, folder: Path) -> None:
        try:
            self.manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            with pa.memory_map(str(folder / "samples.arrow")) as source:
                self._table: pa.Table = pa.ipc.open_file(source).read_all()
        except (OSError, ValueError, pa.ArrowException) as error:
            raise DatasetError(f"{folder}: no readable data set there ({error}); run the dataset stage") from None
        if len(self) != self.manifest["rows"]:
            raise DatasetError(f"{folder}: {len(self)} rows, where the manifest says {self.manifest['rows']}")

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
        return decode(self._table["image"][row].as_py())


def make_dataset(spec: DatasetSpec, out: Path) -> None:
    """Read a source and write `samples.arrow` and `manifest.json` into the folder ``out``.

    Raises:
        DatasetError: where the source cannot be read, lacks a column, has too few usable rows, has the same id
            twice, or loses more than ``spec.max_dropped`` of its rows.
    """
    digest = hashlib.sha256()
    dropped: list[Dropped] = []
    seen: set[str] = set()
    rows_read = 0
    with written_aside(out) as folder:
        folder.mkdir()
        with pa.ipc.new_file(str(folder / "samples.arrow"), _SCHEMA) as writer:
            batch: list[Sample] = []
            for outcome in _outcomes(spec):
                rows_read += 1
                if isinstance(outcome, Dropped):
                    dropped.append(outcome)
                    continue
                if outcome.id in seen:
                    raise DatasetError(
                        f"{spec.source}: the id {outcome.id!r} occurs twice; name a column of unique ids"
                    )
                seen.add(outcome.id)
                for part in (outcome.id.encode(), outcome.image, outcome.caption.encode()):
                    digest.update(len(part).to_bytes(8, "little") + part)
                batch.append(outcome)
                if len(batch) == _BATCH_ROWS:
                    writer.write(_to_arrow(batch))
                    batch = []
            if batch:
                writer.write(_to_arrow(batch))
        _check_share(spec, rows_read, dropped)
        manifest = {
            "source": spec.source,
            "revision": _revision(spec),
            "split": spec.split,
            "columns": {"id": spec.id, "image": spec.image, "caption": spec.caption},
            "rows_read": rows_read,
            "rows": rows_read - len(dropped),
            "dropped": [asdict(row) for row in dropped],
            "content_hash": digest.hexdigest(),
        }
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False), encoding="utf-8")
    say(f"{spec.source}: {manifest['rows']:,} samples, {len(dropped)} dropped")


def decode(image: bytes) -> Image.Image:
    """Decode an image file to RGB, transparency laid on white.

    Raises:
        OSError, ValueError, SyntaxError or Image.DecompressionBombError: where PIL cannot decode it.
    """
    with Image.open(io.BytesIO(image)) as picture:
        picture.load()
        if picture.has_transparency_data:
            layered = picture.convert("RGBA")
            white = Image.new("RGBA", layered.size, "white")
            return Image.alpha_composite(white, layered).convert("RGB")
        if picture.mode.startswith("I"):
            # PIL would cut 16-bit greys off at 255.
            return Image.fromarray((np.asarray(picture) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
        return picture.convert("RGB")


def _outcomes(spec: DatasetSpec) -> Iterator[Sample | Dropped]:
    """Each row of the source, as a sample or as dropped, with progress."""
    rows = _rows(spec)
    for number, row in enumerate(progress(rows, spec.limit, f"rows of {spec.source}", "rows")):
        if number == 0:
            _check_columns(spec, row)
        yield _outcome(spec, number, row)


def _rows(spec: DatasetSpec) -> Iterator[dict[str, Any]]:
    """The source's rows, images as they are stored and not decoded."""
    import datasets

    datasets.disable_progress_bars()
    path = Path(spec.source).expanduser()
    local = is_path(spec.source)
    if local and not path.exists():
        raise DatasetError(f"{spec.source}: no such file or folder")
    try:
        if local and path.is_file():
            reader = _READERS.get(path.suffix.lower())
            if reader is None:
                raise DatasetError(f"{spec.source}: cannot read {path.suffix!r} files; use {', '.join(_READERS)}")
            rows = datasets.load_dataset(reader, data_files=str(path), split="train", streaming=True)
        elif local:
            rows = datasets.load_dataset(str(path), split=spec.split, streaming=True)
        else:
            rows = datasets.load_dataset(spec.source, split=spec.split, revision=spec.revision)
        for column, feature in (rows.features or {}).items():
            if isinstance(feature, datasets.Image):
                rows = rows.cast_column(column, datasets.Image(decode=False))
        yield from rows.take(spec.limit) if spec.limit else rows
    except DatasetError:
        raise
    except Exception as error:  # the readers raise whatever their file formats raise
        hint = "check the file" if local else "check the name, the revision and the connection, or use a local copy"
        raise DatasetError(f"{spec.source}: cannot be read ({type(error).__name__}: {error}); {hint}") from error


def _outcome(spec: DatasetSpec, number: int, row: dict[str, Any]) -> Sample | Dropped:
    id_ = str(row[spec.id]) if spec.id else f"{number:08d}"
    if spec.id and row[spec.id] is None:
        return Dropped(number, id_, "no id")
    caption = row[spec.caption]
    if caption is None or (isinstance(caption, str) and not caption.strip()):
        return Dropped(number, id_, "no caption")
    if not isinstance(caption, str):
        return Dropped(number, id_, f"caption is {type(caption).__name__}, not text")
    try:
        image = _image_bytes(row[spec.image], Path(spec.source).expanduser().parent)
        decode(image)
    except Exception as error:  # PIL's decoders raise many types; whatever it is, the sample is unusable
        return Dropped(number, id_, f"image cannot be decoded ({type(error).__name__}: {error})")
    return Sample(id_, image, caption)


def _image_bytes(value: Any, folder: Path) -> bytes:
    """The bytes of an image cell: an encoded image, bytes, or a path relative to the table's folder."""
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return (folder / value).read_bytes()
    raise ValueError("no image" if value is None else f"{type(value).__name__} is not an image")


def _check_columns(spec: DatasetSpec, row: dict[str, Any]) -> None:
    for key, column in (("image", spec.image), ("caption", spec.caption), ("id", spec.id)):
        if column is not None and column not in row:
            raise DatasetError(
                f"{spec.source}: no column {column!r}; the columns are {', '.join(row)}: set {key} to one of them"
            )


def _check_share(spec: DatasetSpec, rows_read: int, dropped: list[Dropped]) -> None:
    if rows_read and len(dropped) / rows_read > spec.max_dropped:
        reasons = "; ".join(f"row {row.row} ({row.id}): {row.reason}" for row in dropped[:3])
        raise DatasetError(
            f"{spec.source}: {len(dropped)} of {rows_read} rows are unusable, more than max_dropped = "
            f"{spec.max_dropped:g} allows: {reasons}. Mend them or raise max_dropped"
        )
    if rows_read - len(dropped) < 2:
        raise DatasetError(f"{spec.source}: {rows_read - len(dropped)} usable rows; correlations need at least 2")


def _revision(spec: DatasetSpec) -> str | None:
    """The exact revision of a hub data set; a local one is told by its content hash alone."""
    if is_path(spec.source):
        return None
    from huggingface_hub import HfApi

    return HfApi().dataset_info(spec.source, revision=spec.revision).sha


def _to_arrow(batch: list[Sample]) -> pa.RecordBatch:
    return pa.record_batch(
        [
            pa.array([sample.id for sample in batch], pa.string()),
            pa.array([sample.image for sample in batch], pa.binary()),
            pa.array([sample.caption for sample in batch], pa.string()),
        ],
        schema=_SCHEMA,
    )
