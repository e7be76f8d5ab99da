"""Image files as every encoder sees them: RGB, upright, on white."""

import functools
import io
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# Left out on purpose: EPS, for which PIL runs Ghostscript, and ICO and ICNS, whose header does not tell the true size.
_FORMATS = {
    *("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "DIB", "AVIF", "JPEG2000"),
    *("PPM", "TGA", "PCX", "SGI", "SUN", "PSD", "IM", "SPIDER", "QOI", "XBM", "XPM"),
}

# What undoes each EXIF orientation.
_ORIENTATION = 0x0112
_TURNS = {
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
_PNG_XMP = b"XML:com.adobe.xmp\0\0"  # with the flag of uncompressed text
_PNG_LONGEST_XMP = 2**16


def decode(image: bytes, max_pixels: int | None = None) -> Image.Image:
    """Decode an image file to RGB: its first frame, upright by its EXIF orientation, transparency laid on white.

    Greys of 16 bits keep their high byte. Greys of 32 bits, whole or not, say nowhere which value is white: it is the
    smallest of 1 (where they are not whole), 255 and 65535 that none of them exceeds, with 0 for black; where there
    are larger or negative ones, the largest is white and the smallest black.

    Args:
        image: the bytes of a file.
        max_pixels: the largest size to decode, taken from the file's header.

    Raises:
        OSError, ValueError, SyntaxError or Image.DecompressionBombError: where PIL cannot decode it, or it is too
            large. PIL's decoders raise other types too.
    """
    try:
        return _decode(image, max_pixels)
    except ValueError:
        # PIL refuses a PNG file whose texts or colour profile exceed its global limits. No pixel depends on them.
        bare = _without_texts(image)
        if bare == image:
            raise
        return _decode(bare, max_pixels)


def suffixes() -> set[str]:
    """The suffixes of the files that `decode` reads, such as ``.png``."""
    known = set(formats())
    return {suffix for suffix, name in Image.registered_extensions().items() if name in known}


def _decode(image: bytes, max_pixels: int | None) -> Image.Image:
    # PIL's own guard, which is global, warns at one size and fails at twice that, whatever max_pixels says.
    Image.MAX_IMAGE_PIXELS = None
    with Image.open(io.BytesIO(image), formats=formats()) as picture:
        width, height = picture.size
        if min(width, height) < 1:
            raise ValueError(f"{width} x {height} pixels")
        if max_pixels is not None and width * height > max_pixels:
            raise Image.DecompressionBombError(f"{width} x {height} pixels, more than max_pixels = {max_pixels}")
        picture.load()
        rgb = _upright(picture, _to_rgb(picture))
    # What the file says of itself, such as its orientation, no longer holds.
    rgb.info.clear()
    return rgb


@functools.cache
def formats() -> tuple[str, ...]:
    """The formats of _FORMATS that this machine's PIL can read. Call it before several threads decode."""
    Image.init()
    return tuple(name for name in Image.OPEN if name in _FORMATS)


def _without_texts(image: bytes) -> bytes:
    """A PNG file without its texts and colour profile, but for XMP data, which may hold the orientation."""
    if not image.startswith(_PNG):
        return image
    kept, place = [_PNG], len(_PNG)
    while place + 8 <= len(image):
        length, kind = struct.unpack_from(">I4s", image, place)
        chunk = image[place : place + length + 12]
        if kind not in _PNG_TEXTS or (length < _PNG_LONGEST_XMP and chunk.startswith(_PNG_XMP, 8)):
            kept.append(chunk)
        place += length + 12
    return b"".join(kept)


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16"):
        values = np.asarray(picture)
        greys = (values >> 8).astype(np.uint8)
        if isinstance(picture.info.get("transparency"), int):
            greys[values == picture.info["transparency"]] = 255
        return Image.fromarray(greys).convert("RGB")
    if picture.mode in {"I", "F"}:
        return Image.fromarray(_to_8_bits(np.asarray(picture))).convert("RGB")
    if picture.has_transparency_data:
        layered = picture.convert("RGBA")
        white = Image.new("RGBA", layered.size, "white")
        return Image.alpha_composite(white, layered).convert("RGB")
    return picture.convert("RGB")


def _to_8_bits(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Greys ``[height, width]`` of 32 bits, int32 or float32, as 0 to 255; see `decode`."""
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


def _upright(picture: Image.Image, rgb: Image.Image) -> Image.Image:
    """``rgb`` turned as the EXIF data of ``picture`` say."""
    try:
        turn = _TURNS.get(picture.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF data, on which PIL raises many types, say nothing about the pixels
        return rgb
    return rgb if turn is None else rgb.transpose(turn)
