"""Images of a row: opening them as RGB and telling their contents apart."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from maskft.errors import DataError

_SUFFIXES = tuple(
    case
    for name in ("bmp", "gif", "jpeg", "jpg", "png", "tif", "tiff", "webp")
    for case in (f".{name}", f".{name.upper()}")
)


def image_key(image: Mapping[str, Any]) -> str:
    """Return the SHA-256 (64 hex digits) of the encoded image, so that equal files have equal keys.

    `image` is an entry of the column `images`: {"path": str or None, "bytes": bytes or None}.
    Raises DataError if the file cannot be read.
    """
    return hashlib.sha256(_content(image)).hexdigest()


def open_image(image: Mapping[str, Any]) -> Image.Image:
    """Decode an image fully and return it as RGB.

    The EXIF orientation is applied, transparency is composited on white, 16-bit grey is scaled to 8 bits, and
    of an animation the first frame is taken. `image` is {"path": str or None, "bytes": bytes or None}.
    Raises DataError if the file is missing, empty, truncated, no image, or above Pillow's pixel limit.
    """
    content = _content(image)
    name = _name(image)
    if not content:
        raise DataError(f"{name} is empty (0 bytes). Fetch the file again or remove its row.")
    try:
        with Image.open(io.BytesIO(content)) as opened:
            opened.load()
            return _rgb(_upright(opened))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(
            f"{name} has more pixels than Pillow decodes safely ({error}). Scale the image down, or remove its row."
        ) from error
    except Exception as error:  # decoders raise anything on broken files
        raise DataError(
            f"{name} cannot be decoded as an image ({error or type(error).__name__}): the file is truncated, damaged "
            "or of an unknown type. Fetch or convert it again, or remove its row."
        ) from error


def missing_file(path: str) -> str:
    """Return the message for a missing image file; it names images with the same stem and another suffix."""
    given = Path(path)
    if not os.path.isdir(given.parent):
        return f"image file {path} does not exist, nor does its folder. Check image_root."
    candidates = (given.with_suffix(suffix) for suffix in _SUFFIXES)  # listing a large folder per row would be slow
    others = [other.name for other in candidates if os.path.isfile(other)]
    if others:
        return f"image file {path} does not exist, but {', '.join(others)} does. Name that file in the row."
    return f"image file {path} does not exist. Check image_root and the row's path, or fetch the file."


def _name(image: Mapping[str, Any]) -> str:
    return f"image file {image['path']}" if image.get("path") else "embedded image"


def _content(image: Mapping[str, Any]) -> bytes:
    content, path = image.get("bytes"), image.get("path")
    if content is not None:
        return bytes(content)
    if not path:
        raise DataError("image has neither a path nor bytes. Give one of them.")
    try:
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise DataError(missing_file(path)) from error
    except (OSError, ValueError) as error:
        raise DataError(f"image file {path} cannot be read ({error}). Check the path and its permissions.") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged metadata does not make the picture unusable
        return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # convert("RGB") would clip 16-bit values at 255
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if "A" in image.getbands() or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")
