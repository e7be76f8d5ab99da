"""Data as classic scripts, the only files that a page opened from a folder may read."""

import base64
import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np

# Significant digits of numbers on pages.
_DIGITS = 4


def write_script(path: Path, key: str, value: Any) -> None:
    """Write ``conceptshare.add(key, value)``, where ``value`` is base64 of its deflated JSON.

    Args:
        path: the file, at ``f"{key}.js"`` in the site.
        key: the name by which the page loads it.
        value: anything JSON can hold.
    """
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    # Base64, so that no caption can end the script; level 6 takes an eighth of the time of level 9.
    packed = base64.b64encode(zlib.compress(text.encode(), 6)).decode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'conceptshare.add({json.dumps(key)}, "{packed}");\n', encoding="ascii")


def numbers(values: Any, digits: int = _DIGITS) -> list[float | None]:
    """Numbers for pages, rounded to ``digits`` significant digits; null if not finite."""
    return [number(value, digits) for value in np.asarray(values, np.float64).tolist()]


def number(value: float, digits: int = _DIGITS) -> float | None:
    """One number for pages, rounded to ``digits`` significant digits; None if not finite."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None
