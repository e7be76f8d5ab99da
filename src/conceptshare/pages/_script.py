"""Data as classic scripts: the one thing that a page opened from a folder may read."""

import base64
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

# Significant digits of numbers that are looked at.
_DIGITS = 4


def write_script(path: Path, key: str, value: Any, packed: bool = True) -> None:
    """Write ``conceptshare.add(key, value)``.

    Args:
        path: the file, which lies at ``f"{key}.js"`` in the site.
        key: the name that the page asks for it by.
        value: what JSON can hold.
        packed: whether to write base64 of the deflated JSON in place of JSON.
    """
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    # In ASCII, and without a way to end the script, whatever captions hold.
    told = json.dumps(base64.b64encode(zlib.compress(text.encode(), 9)).decode()) if packed else text
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"conceptshare.add({_script_text(json.dumps(key))}, {_script_text(told)});\n", encoding="ascii")


def _script_text(text: str) -> str:
    return text.replace("<", "\\u003c")


def numbers(values: Any) -> list[float | None]:
    """Numbers to look at, rounded; null for those that are not finite."""
    return [number(value) for value in np.asarray(values, np.float64).tolist()]


def number(value: float) -> float | None:
    """The same of one."""
    return float(f"{value:.{_DIGITS}g}") if np.isfinite(value) else None
