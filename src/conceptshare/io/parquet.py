"""Parquet files that record their contents and inputs, and detect damage when they are read.

The record is in the file's key-value metadata, sealed with a SHA-256 of the whole file, in which the digest itself
counts as zeros. Parquet's own checksums only cover pages, not the column names, statistics and offsets of the footer.
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
        name: the stem of its final name, which is checked when it is read.
        record: further metadata, serializable as JSON.
    """
    metadata = {key: value for key, value in (record or {}).items() if key not in ("name", "digest")}
    text = json.dumps({"name": name, **metadata, "digest": _BLANK.decode()})
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
    """Read a table that `write_parquet` wrote, and its record including the ``digest``.

    Args:
        path: the file; its stem must equal the recorded name.
        stage: the stage that makes it, for messages.
        columns: columns to read; all by default.
        filters: rows to read, see `pyarrow.parquet.read_table`.

    Raises:
        StoreError: if the file is missing, damaged, of an older version, renamed, or lacks a column.
    """
    remedy = f"delete it and run the {stage} stage again"
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise StoreError(f"{path}: no such table; run the {stage} stage") from None
    if content.endswith(b"PAR1") and _KEY.encode() not in content:
        raise StoreError(f"{path}: not a table of the {stage} stage; name another")
    start = content.rfind(_SEAL) + len(_SEAL)
    digest = content[start : start + len(_BLANK)]
    actual = hashlib.sha256(content[:start] + _BLANK)
    actual.update(memoryview(content)[start + len(_BLANK) :])
    if actual.hexdigest().encode() != digest:
        raise StoreError(f"{path}: damaged, or not written by this version; {remedy}")
    try:
        table = pq.read_table(pa.BufferReader(content), columns=columns, filters=filters)
        record: dict[str, Any] = json.loads(pq.read_metadata(pa.BufferReader(content)).metadata[_KEY.encode()])
    except (KeyError, pa.ArrowException) as error:
        message = " ".join(str(error).split())
        raise StoreError(f"{path}: not a table of the required kind ({message}); {remedy}") from None
    if record["name"] != path.stem:
        raise StoreError(f"{path}: holds the table {record['name']!r}; rename it back, or {remedy}")
    return table, record
