"""What results say of themselves, so that a reader notices when it no longer holds.

A result carries a record of what it is, what it was made from, and a fingerprint of each of its files; the record is
sealed with a digest of its own content. That digest stands for the whole result: what is made from it records it.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zlib import crc32

Fingerprint = list[int]
"""Size of a file in bytes, and a CRC-32 of its content or its end."""

_BLOCK_BYTES = 2**20
_SEAL = "digest"


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


def is_whole(record: Mapping[str, Any]) -> bool:
    """Whether a record is sealed, and as it was when it was."""
    return bool(record.get(_SEAL) == sealed(record)[_SEAL])
