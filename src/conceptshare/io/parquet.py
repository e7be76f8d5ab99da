"""Parquet files that say what they are and what they were made from, and notice when they are damaged.

The record is in the file's key-value metadata, sealed with a SHA-256 of the whole file, in which that digest itself
counts as zeros. Parquet's own checksums are of pages alone: names of columns, statistics and places are in its footer.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from conceptshare.io.errors import StoreError

_KEY = "conceptshare"
_SEAL = b'"digest": "'
_BLANK = b"0" * 64


def write_parquet(table: pa.Table, path: Path, name: str, record: Mapping[str, Any] | None = None) -> None:
    """Write a table.

    Args:
        table: the table.
        path: where to write it now.
        name: its final name, without a suffix, by which it is asked for.
        record: what else to say of it, as JSON can hold it.
    """
    said = {key: value for key, value in (record or {}).items() if key not in ("name", "digest")}
    text = json.dumps({"name": name, **said, "digest": _BLANK.decode()})
    with pq.ParquetWriter(path, table.schema, write_page_checksum=True) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({_KEY: text})
    content = path.read_bytes()
    with path.open("r+b") as file:
        file.seek(content.rindex(_SEAL + _BLANK) + len(_SEAL))
        file.write(hashlib.sha256(content).hexdigest().encode())


def read_parquet(
    path: Path, stage: str, columns: Sequence[str] | None = None, filters: Any = None
) -> tuple[pa.Table, dict[str, Any]]:
    """A table that `write_parquet` wrote, and what it says of itself, its ``digest`` among it.

    Args:
        path: the file, whose name is part of what is asked for.
        stage: the stage that makes it, for messages.
        columns: those to read; all without it.
        filters: rows to read, as of `pyarrow.parquet.read_table`.

    Raises:
        StoreError: where there is none, it is damaged, of an older version, or was renamed, or lacks a column.
    """
    remedy = f"delete it and run the {stage} stage again"
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise StoreError(f"{path}: no such table; run the {stage} stage") from None
    if content.endswith(b"PAR1") and _KEY.encode() not in content:
        raise StoreError(f"{path}: no table of the {stage} stage; name another")
    place = content.rfind(_SEAL) + len(_SEAL)
    digest = content[place : place + len(_BLANK)]
    found = hashlib.sha256(content[:place] + _BLANK)
    found.update(memoryview(content)[place + len(_BLANK) :])
    if found.hexdigest().encode() != digest:
        raise StoreError(f"{path}: damaged, or not written by this version; {remedy}")
    try:
        table = pq.read_table(pa.BufferReader(content), columns=columns, filters=filters)
        record: dict[str, Any] = json.loads(pq.read_metadata(pa.BufferReader(content)).metadata[_KEY.encode()])
    except (KeyError, pa.ArrowException) as error:
        said = " ".join(str(error).split())
        raise StoreError(f"{path}: no table of the kind that is needed ({said}); {remedy}") from None
    if record["name"] != path.stem:
        raise StoreError(f"{path}: holds the table {record['name']!r}; give it its name back, or {remedy}")
    return table, record
