"""Sealed records of results, which let a reader detect that a result was changed or damaged.

A result carries a record of its kind, its inputs and a fingerprint of each of its files. The record is sealed with a
digest of its own content. This digest identifies the whole result, and results made from it store the digest. The
record of a Zarr store is in the attributes of its root, that of any other folder in its `manifest.json`.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zlib import crc32

from conceptshare.io import provenance
from conceptshare.io.errors import StoreError

MANIFEST = "manifest.json"

Fingerprint = list[int]
"""Size of a file in bytes, and the CRC-32 of its content or of its last bytes."""

_BLOCK_BYTES = 2**20
_SEAL = "digest"
_UNRECORDED = {MANIFEST, provenance.FILE}


def fingerprint(path: Path, tail: int | None = None) -> Fingerprint:
    """Size of a file, and the CRC-32 of its content or of its last ``tail`` bytes."""
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if tail is not None and tail < size:
            file.seek(size - tail)
        value = 0
        while block := file.read(_BLOCK_BYTES):
            value = crc32(block, value)
    return [size, value]


def digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of a record as JSON, independent of the order of its keys."""
    as_read = json.loads(json.dumps(content))  # numeric keys become strings, which sort differently
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record with the digest of its content added."""
    content = {key: value for key, value in record.items() if key != _SEAL}
    return content | {_SEAL: digest(content)}


def is_intact(record: Any) -> bool:
    """Whether a record is sealed and unchanged since."""
    return isinstance(record, dict) and bool(record.get(_SEAL) == sealed(record)[_SEAL])


def seal(folder: Path, record: Mapping[str, Any]) -> None:
    """Write the `manifest.json` of a folder: the record, with the fingerprints of the folder's files as ``files``."""
    files = {path.name: fingerprint(path) for path in sorted(folder.iterdir()) if path.name not in _UNRECORDED}
    text = json.dumps(sealed({**record, "files": files}), indent=1)
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def read_manifest(folder: Path, key: str, stage: str, remedy: str) -> dict[str, Any]:
    """Read the record of a folder.

    Args:
        folder: the folder.
        key: a key that only the records of this stage's folders have.
        stage: the stage that makes such folders.
        remedy: for the error message, what to do if the folder is damaged.

    Raises:
        StoreError: if the folder does not exist, is of another kind, or its record was changed.
    """
    if not folder.exists():
        raise StoreError(f"{folder}: no such folder; run the {stage} stage, or name another folder")
    try:
        record: Any = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(f"{folder}: {MANIFEST} is missing; {remedy}") from None
    except ValueError as error:
        raise StoreError(f"{folder}: {MANIFEST} cannot be read ({error}); {remedy}") from None
    if isinstance(record, dict) and key not in record and (is_intact(record) or "files" not in record):
        raise StoreError(f"{folder}: not a {stage} folder according to its {MANIFEST}; name another folder")
    if not is_intact(record):
        raise StoreError(f"{folder}: {MANIFEST} was changed or damaged; {remedy}")
    intact: dict[str, Any] = record
    return intact


def recorded_file(folder: Path, name: str, record: Mapping[str, Any], remedy: str) -> Path:
    """Path of a file in a folder, after checking the file against the folder's record.

    Raises:
        StoreError: if the file does not match the record; the message ends with the ``remedy``.
    """
    changed = change(folder / name, record["files"].get(name, []))
    if changed is not None:
        raise StoreError(f"{folder}: {name} {changed}; {remedy}")
    return folder / name


def change(path: Path, recorded: Fingerprint, tail: int | None = None) -> str | None:
    """How a file differs from its recorded fingerprint, as text for a message; None if it does not."""
    try:
        current = fingerprint(path, tail)
    except FileNotFoundError:
        return "is missing"
    if current[:1] != recorded[:1]:
        return f"has {current[0]} bytes, not {recorded[0]}" if recorded else "was not there when the folder was written"
    return None if current == recorded else "is damaged, or was swapped with another file"
