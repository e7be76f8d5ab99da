"""Decoding of image files for all encoders: RGB, upright, on a white background."""

import functools
import io
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# Left out on purpose: EPS, for which PIL runs Ghostscript, and ICO and ICNS, whose headers do not give the true size.
_FORMATS = {
    *("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "DIB", "AVIF", "JPEG2000"),
    *("PPM", "TGA", "PCX", "SGI", "SUN", "PSD", "IM", "SPIDER", "QOI", "XBM", "XPM"),
}

# The transpose that undoes each EXIF orientation.
_ORIENTATION = 0x0112
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_TEXTS = {b"tEXt", b"zTXt", b"iTXt", b"iCCP"}
_PNG_XMP = b"XML:com.adobe.xmp\0\0"  # including the flag for uncompressed text
_PNG_LONGEST_XMP = 2**16


def decode(image: bytes, max_pixels: int | None = None) -> Image.Image:
    """Decode an image file to RGB: the first frame, rotated by its EXIF orientation, composited on white.

    16-bit greyscale keeps the high byte. 32-bit greyscale (integer or float) has no defined white: black is 0, and
    white is the smallest of 1 (float only), 255 and 65535 that no value exceeds. If values are larger or negative, the
    largest is white and the smallest black.

    Args:
        image: the bytes of a file.
        max_pixels: the largest size to decode, checked against the file's header.

    Raises:
        OSError, ValueError, SyntaxError or Image.DecompressionBombError: if PIL cannot decode the image, or it is too
            large. PIL's decoders raise other types too.
    """
    try:
        return _decode(image, max_pixels)
    except ValueError:
        # PIL rejects PNG files whose text chunks or colour profile exceed its global limits. Pixels do not depend on
        # these chunks.
        bare = _without_texts(image)
        if bare == image:
            raise
        return _decode(bare, max_pixels)


def suffixes() -> set[str]:
    """File suffixes that `decode` supports, such as ``.png``."""
    known = set(formats())
    return {suffix for suffix, name in Image.registered_extensions().items() if name in known}


def _decode(image: bytes, max_pixels: int | None) -> Image.Image:
    # PIL's own limit is global: it warns at one size and fails at twice that size, independent of max_pixels.
    Image.MAX_IMAGE_PIXELS = None
    with Image.open(io.BytesIO(image), formats=formats()) as opened:
        width, height = opened.size
        if min(width, height) < 1:
            raise ValueError(f"{width} x {height} pixels")
        if max_pixels is not None and width * height > max_pixels:
            raise Image.DecompressionBombError(f"{width} x {height} pixels, more than max_pixels = {max_pixels}")
        opened.load()
        rgb = _upright(opened, _to_rgb(opened))
    # The file's metadata, such as its orientation, no longer applies.
    rgb.info.clear()
    return rgb


@functools.cache
def formats() -> tuple[str, ...]:
    """Those of _FORMATS that the installed PIL can read. Call this once before decoding in several threads."""
    Image.init()
    return tuple(name for name in Image.OPEN if name in _FORMATS)


def _without_texts(image: bytes) -> bytes:
    """A PNG file without its text chunks and colour profile, except XMP data, which may hold the orientation."""
    if not image.startswith(_PNG):
        return image
    kept, offset = [_PNG], len(_PNG)
    while offset + 8 <= len(image):
        length, kind = struct.unpack_from(">I4s", image, offset)
        chunk = image[offset : offset + length + 12]
        if kind not in _PNG_TEXTS or (length < _PNG_LONGEST_XMP and chunk.startswith(_PNG_XMP, 8)):
            kept.append(chunk)
        offset += length + 12
    return b"".join(kept)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        values = np.asarray(image)
        greys = (values >> 8).astype(np.uint8)
        if isinstance(image.info.get("transparency"), int):
            greys[values == image.info["transparency"]] = 255
        return Image.fromarray(greys).convert("RGB")
    if image.mode in {"I", "F"}:
        return Image.fromarray(_to_8_bits(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        layered = image.convert("RGBA")
        white = Image.new("RGBA", layered.size, "white")
        return Image.alpha_composite(white, layered).convert("RGB")
    return image.convert("RGB")


def _to_8_bits(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Convert 32-bit greys ``[height, width]`` (int32 or float32) to 0 to 255; see `decode`."""
    # min and max propagate NaN and inf, so they suffice to check finiteness.
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


def _upright(image: Image.Image, rgb: Image.Image) -> Image.Image:
    """Rotate ``rgb`` by the EXIF orientation of ``image``."""
    try:
        turn = _TRANSPOSES.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # PIL raises many types for damaged EXIF data; the pixels are usable
        return rgb
    return rgb if turn is None else rgb.transpose(turn)
