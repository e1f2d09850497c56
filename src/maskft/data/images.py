"""Images of a row: opening them as RGB and telling their contents apart."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import os
import stat
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, ImageOps, UnidentifiedImageError

from maskft.errors import DataError

MAX_PIXELS = 89_478_485
"""Width times height of the largest image that is decoded: a quarter GiB as RGB, where Pillow begins to warn."""
MAX_BYTES = 1 << 28
"""Size of the largest image file that is read."""
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
"""What is read, by Pillow's names. Its other decoders are rarely used, and that for EPS runs Ghostscript."""
_ORIENTATION = 0x0112
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


def image_names(row: Mapping[str, Any]) -> tuple[tuple[Any, Any], ...]:
    """Path and bytes of each of a row's images: equal for rows that name the same images, without a look at files."""
    return tuple((image["path"], image["bytes"]) for image in row["images"])


def open_image(image: Mapping[str, Any]) -> Image.Image:
    """Decode an image fully and return it as RGB.

    The EXIF orientation is applied, transparency is composited on white, 16-bit grey is scaled to 8 bits, and
    of an animation the first frame is taken. `image` is {"path": str or None, "bytes": bytes or None}.
    Raises DataError if the file is missing, no regular file, empty, truncated, of a format that is not in FORMATS,
    above MAX_BYTES or MAX_PIXELS, or has pixels that say nothing about their range (floating point, 32 bits).
    """
    with _opened(image) as opened:
        opened.load()
        return _rgb(_upright(opened))


def image_size(image: Mapping[str, Any]) -> tuple[int, int]:
    """Return width and height in pixels of the upright image, from its header alone; errors as `open_image`."""
    with _opened(image, whole=False) as opened:
        width, height = opened.size
        try:
            lying = opened.getexif().get(_ORIENTATION, 1) >= 5
        except Exception:  # damaged metadata does not make the picture unusable
            lying = False
        return (height, width) if lying else (width, height)


@contextlib.contextmanager
def _opened(image: Mapping[str, Any], *, whole: bool = True) -> Iterator[Image.Image]:
    """The image with nothing but its header decoded; whatever fails in the block becomes a DataError.

    `whole` reads the file at once, which is faster where all of it is needed.
    """
    name = _name(image)
    too_large = f"{name} has more than {MAX_PIXELS:,} pixels. Scale the image down, or remove its row."
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow's about sizes and damaged metadata
            source = io.BytesIO(_content(image)) if whole or image.get("bytes") is not None else _file(image)
            with source, Image.open(source, formats=_known()) as opened:
                if opened.width * opened.height > MAX_PIXELS:
                    raise DataError(too_large)
                yield opened
    except DataError as error:
        if str(error).startswith(("image", "embedded")):
            raise
        raise DataError(f"{name} {error}") from error
    except Image.DecompressionBombError as error:  # above twice Pillow's own limit
        raise DataError(too_large) from error
    except Exception as error:  # decoders raise anything on broken files
        raise DataError(
            f"{name} cannot be decoded as an image ({_reason(error)}): the file is truncated, damaged or of an unknown "
            f"type. Fetch or convert it again, or remove its row. Read are {', '.join(FORMATS)}."
        ) from error


@functools.cache
def _known() -> tuple[str, ...]:
    """FORMATS, as far as this build of Pillow has them."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "unknown format"  # Pillow's message names an object in memory
    return str(error) or type(error).__name__


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
    content = image.get("bytes")
    if content is None:
        with _file(image) as file:
            return file.read()
    _check_size(_name(image), len(content))
    return bytes(content)


def _file(image: Mapping[str, Any]) -> BinaryIO:
    """The open image file, which is a regular one; opening a pipe would wait for its other end."""
    path = image.get("path")
    if not path:
        raise DataError("image has neither a path nor bytes. Give one of them.")
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"image file {path} cannot be read (it is no regular file). Name an image file.")
        _check_size(_name(image), status.st_size)
        return open(path, "rb")
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(missing_file(path)) from error
    except (OSError, ValueError) as error:
        raise DataError(f"image file {path} cannot be read ({error}). Check the path and its permissions.") from error


def _check_size(name: str, size: int) -> None:
    if not size:
        raise DataError(f"{name} is empty (0 bytes). Fetch the file again or remove its row.")
    if size > MAX_BYTES:
        raise DataError(f"{name} has more than {MAX_BYTES:,} bytes. Compress the image, or remove its row.")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged metadata does not make the picture unusable
        return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise DataError("has floating-point pixels, whose range is not known. Save it with 8 bits a channel.")
    if image.mode.startswith("I"):  # convert("RGB") would clip 16-bit values at 255
        highest: Any = image.getextrema()[1]
        if image.mode == "I" and highest > 65535:
            raise DataError("has 32-bit pixels, whose range is not known. Save it with 8 bits a channel.")
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if "A" in image.getbands() or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")
