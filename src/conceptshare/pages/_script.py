"""Data as classic scripts: the one thing that a page opened from a folder may read."""

import base64
import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np

# Significant digits of numbers that are looked at.
_DIGITS = 4


def write_script(path: Path, key: str, value: Any) -> None:
    """Write ``conceptshare.add(key, value)``, where ``value`` is base64 of its deflated JSON.

    Args:
        path: the file, which lies at ``f"{key}.js"`` in the site.
        key: the name that the page asks for it by.
        value: what JSON can hold.
    """
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    # In base64, so that no caption can end the script, at a level that takes an eighth of the highest's time.
    packed = base64.b64encode(zlib.compress(text.encode(), 6)).decode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'conceptshare.add({json.dumps(key)}, "{packed}");\n', encoding="ascii")


def numbers(values: Any, digits: int = _DIGITS) -> list[float | None]:
    """Numbers to look at, rounded to so many significant digits; null for those that are not finite."""
    return [number(value, digits) for value in np.asarray(values, np.float64).tolist()]


def number(value: float, digits: int = _DIGITS) -> float | None:
    """The same of one."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None
