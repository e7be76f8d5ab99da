"""What results say of themselves, so that a reader notices when it no longer holds.

A result carries a record of what it is, what it was made from, and a fingerprint of each of its files; the record is
sealed with a digest of its own content. That digest stands for the whole result: what is made from it records it. The
record of a Zarr store is in its root's attributes, that of a folder of other files in its `manifest.json`.
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
"""Size of a file in bytes, and a CRC-32 of its content or its end."""

_BLOCK_BYTES = 2**20
_SEAL = "digest"
_END = b"\n}"
_UNRECORDED = {MANIFEST, provenance.FILE}


def fingerprint(path: Path, tail: int | None = None) -> Fingerprint:
    """The size of a file, and the CRC-32 of all of it, or of its last ``tail`` bytes."""
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if tail is not None and tail < size:
            file.seek(size - tail)
        value = 0
        while block := file.read(_BLOCK_BYTES):
            value = crc32(block, value)
    return [size, value]


def digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of what JSON holds of a record, in whatever order its keys are."""
    as_read = json.loads(json.dumps(content))  # keys that are numbers become strings, which sort otherwise
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record with the digest of its content."""
    content = {key: value for key, value in record.items() if key != _SEAL}
    return content | {_SEAL: digest(content)}


def is_whole(record: Any) -> bool:
    """Whether a record is sealed, and as it was when it was."""
    return isinstance(record, dict) and bool(record.get(_SEAL) == sealed(record)[_SEAL])


def seal(folder: Path, record: Mapping[str, Any]) -> None:
    """Write the `manifest.json` of a folder: a record, and the fingerprints of the files there as its ``files``."""
    files = {path.name: fingerprint(path) for path in sorted(folder.iterdir()) if path.name not in _UNRECORDED}
    text = json.dumps(sealed({**record, "files": files}), indent=1)
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def seal_text(path: Path) -> None:
    """Add the digest of all that a JSON file of an indented object holds to it, without reading it into memory."""
    with path.open("r+b") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(-len(_END), os.SEEK_END)
        file.write(_text_seal(digest))


def is_text_whole(text: bytes) -> bool:
    """Whether a JSON file was sealed by `seal_text`, and is as it was then."""
    length = len(_text_seal("0" * 64))
    digest = hashlib.sha256(text[:-length] + _END).hexdigest()
    return text[-length:] == _text_seal(digest)


def _text_seal(digest: str) -> bytes:
    return f',\n "{_SEAL}": "{digest}"'.encode() + _END


def read_manifest(folder: Path, key: str, stage: str, remedy: str) -> dict[str, Any]:
    """The record of a folder.

    Args:
        folder: the folder.
        key: a key that the records of the stage's folders have, and those of others do not.
        stage: the stage that makes such folders.
        remedy: what to do about one that is damaged.

    Raises:
        StoreError: if there is none, it is another kind of folder, or its record is not as it was written.
    """
    if not folder.exists():
        raise StoreError(f"{folder}: no such folder; run the {stage} stage, or name another folder")
    try:
        record: Any = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(f"{folder}: {MANIFEST} is missing; {remedy}") from None
    except ValueError as error:
        raise StoreError(f"{folder}: {MANIFEST} cannot be read ({error}); {remedy}") from None
    if isinstance(record, dict) and key not in record and (is_whole(record) or "files" not in record):
        raise StoreError(f"{folder}: no {stage} folder, by its {MANIFEST}; name another folder")
    if not is_whole(record):
        raise StoreError(f"{folder}: {MANIFEST} is not as it was written; {remedy}")
    found: dict[str, Any] = record
    return found


def recorded_file(folder: Path, name: str, record: Mapping[str, Any], remedy: str) -> Path:
    """A file of a folder, once it is seen to be as the folder's record says.

    Raises:
        StoreError: where it is not; it ends with the ``remedy``.
    """
    changed = change(folder / name, record["files"].get(name, []))
    if changed is not None:
        raise StoreError(f"{folder}: {name} {changed}; {remedy}")
    return folder / name


def change(path: Path, recorded: Fingerprint, tail: int | None = None) -> str | None:
    """What happened to a file since its fingerprint was recorded; None where it is the same."""
    try:
        found = fingerprint(path, tail)
    except FileNotFoundError:
        return "is missing"
    if found[:1] != recorded[:1]:
        return f"has {found[0]} bytes, not {recorded[0]}" if recorded else "was not there when the folder was written"
    return None if found == recorded else "is damaged, or was exchanged with another file"
