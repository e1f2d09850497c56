import hashlib
import io
import os
from pathlib import Path

import pytest
from PIL import Image

from maskft.data import image_key, images, open_image
from maskft.data.images import image_size, missing_file
from maskft.errors import DataError

from .helpers import png


def entry(path: Path) -> dict[str, object]:
    return {"path": str(path), "bytes": None}


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> dict[str, object]:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return {"path": None, "bytes": buffer.getvalue()}


def test_opens_path_and_bytes_as_rgb(tmp_path: Path) -> None:
    path = png(tmp_path / "a.png", "red")
    for image in (entry(path), {"path": None, "bytes": path.read_bytes()}):
        opened = open_image(image)
        assert (opened.mode, opened.size, opened.getpixel((0, 0))) == ("RGB", (8, 6), (255, 0, 0))


@pytest.mark.parametrize(("mode", "clear"), [("RGBA", (255, 0, 0, 0)), ("LA", (0, 0)), ("PA", (0, 0))])
def test_transparency_is_white(mode: str, clear: tuple[int, ...]) -> None:
    kind = "TIFF" if mode == "PA" else "PNG"
    assert open_image(encoded(Image.new(mode, (2, 2), clear), kind)).getpixel((0, 0)) == (255, 255, 255)


def test_half_transparency_mixes_with_white() -> None:
    pixel = open_image(encoded(Image.new("RGBA", (1, 1), (0, 0, 0, 128)))).getpixel((0, 0))
    assert pixel == (127, 127, 127)


def test_palette_transparency_is_white() -> None:
    image = Image.new("P", (2, 2), 0)
    image.putpalette([255, 0, 0, 0, 255, 0])
    assert open_image(encoded(image, transparency=0)).getpixel((0, 0)) == (255, 255, 255)
    assert open_image(encoded(image)).getpixel((0, 0)) == (255, 0, 0)


def test_sixteen_bit_grey_is_scaled() -> None:
    assert open_image(encoded(Image.new("I;16", (1, 1), 32768))).getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize(("mode", "color", "kind"), [("L", 7, "PNG"), ("1", 0, "PNG"), ("CMYK", (0, 0, 0, 0), "JPEG")])
def test_other_modes_become_rgb(mode: str, color: object, kind: str) -> None:
    assert open_image(encoded(Image.new(mode, (1, 1), color), kind)).mode == "RGB"


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert open_image(encoded(Image.new("RGB", (8, 6)), "JPEG", exif=exif)).size == (6, 8)


def test_damaged_exif_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_image(encoded(Image.new("RGB", (8, 6)), "JPEG", exif=b"Exif\0\0MMbroken")).size == (8, 6)

    def refuse(image: Image.Image) -> Image.Image:
        raise SyntaxError("not a TIFF file")

    monkeypatch.setattr("PIL.ImageOps.exif_transpose", refuse)
    assert open_image(encoded(Image.new("RGB", (8, 6)))).size == (8, 6)


def test_name_too_long_for_the_file_system(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        open_image(entry(tmp_path / ("a" * 300 + ".png")))
    assert "does not exist. Check image_root" in missing_file(str(tmp_path / ("a" * 300 + ".png")))


def test_first_frame_of_animation() -> None:
    frames = [Image.new("RGB", (2, 2), color) for color in ("red", "blue")]
    image = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_image(image).getpixel((0, 0)) == (255, 0, 0)


def test_missing_file_names_the_other_suffix(tmp_path: Path) -> None:
    png(tmp_path / "a.jpg")
    with pytest.raises(DataError, match=r"a\.gif does not exist, but a\.jpg does\. Name that file"):
        open_image(entry(tmp_path / "a.gif"))
    with pytest.raises(DataError, match=r"b\.png does not exist\. Check image_root"):
        open_image(entry(tmp_path / "b.png"))
    with pytest.raises(DataError, match="nor does its folder"):
        open_image(entry(tmp_path / "no" / "b.png"))


def test_empty_truncated_and_foreign_files(tmp_path: Path) -> None:
    whole = png(tmp_path / "a.png", size=(64, 64)).read_bytes()
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"empty\.png is empty \(0 bytes\)\. Fetch"):
        open_image(entry(tmp_path / "empty.png"))
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut\.png cannot be decoded as an image .*truncated"):
        open_image(entry(tmp_path / "cut.png"))
    with pytest.raises(DataError, match="embedded image cannot be decoded"):
        open_image({"path": None, "bytes": b"<html>"})
    with pytest.raises(DataError, match="neither a path nor bytes"):
        open_image({"path": None, "bytes": None})
    with pytest.raises(DataError, match="cannot be read"):
        open_image(entry(tmp_path))


def test_too_many_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = png(tmp_path / "big.png", size=(64, 64))
    monkeypatch.setattr(images, "MAX_PIXELS", 4096)
    assert open_image(entry(path)).size == (64, 64)
    monkeypatch.setattr(images, "MAX_PIXELS", 4095)
    for look in (open_image, image_size):
        with pytest.raises(DataError, match=r"big\.png has more than 4,095 pixels\. Scale"):
            look(entry(path))


@pytest.mark.parametrize("limit", [1000, 3000])  # above twice the limit Pillow raises, above it warns
def test_pillows_own_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    path = png(tmp_path / "big.png", size=(64, 64))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    if limit == 1000:
        with pytest.raises(DataError, match=r"big\.png has more than 89,478,485 pixels"):
            open_image(entry(path))
    else:
        assert open_image(entry(path)).size == (64, 64)


def test_files_that_are_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = png(tmp_path / "a.png")
    monkeypatch.setattr(images, "MAX_BYTES", 20)
    for image in (entry(path), {"path": None, "bytes": path.read_bytes()}):
        with pytest.raises(DataError, match=r"has more than 20 bytes\. Compress"):
            open_image(image)


def test_pipes_and_devices_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", Path("/dev/zero"), tmp_path):
        for look in (open_image, image_size, image_key):
            with pytest.raises(DataError, match=r"cannot be read \(it is no regular file\)"):
                look(entry(path))


def test_formats_that_run_programs_are_refused() -> None:
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n"
    with pytest.raises(DataError, match=r"cannot be decoded as an image \(unknown format\).*Read are AVIF, BMP"):
        open_image({"path": None, "bytes": postscript})


def test_pixels_without_a_range() -> None:
    with pytest.raises(DataError, match="embedded image has floating-point pixels"):
        open_image(encoded(Image.new("F", (2, 2), 0.5), "TIFF"))
    with pytest.raises(DataError, match="embedded image has 32-bit pixels"):
        open_image(encoded(Image.new("I", (2, 2), 70_000), "TIFF"))
    assert open_image(encoded(Image.new("I", (2, 2), 65_535), "TIFF")).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bit_colour() -> None:
    import struct
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    pixel = b"\0" + struct.pack(">HHH", 65535, 32768, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixel)) + chunk(b"IEND", b"")
    assert open_image({"path": None, "bytes": content}).getpixel((0, 0)) == (255, 128, 0)


def test_sizes_from_headers(tmp_path: Path) -> None:
    assert image_size(entry(png(tmp_path / "a.png", size=(8, 6)))) == (8, 6)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(Image.new("RGB", (8, 6)), "JPEG", exif=exif)
    assert image_size(turned) == open_image(turned).size == (6, 8)
    assert image_size(encoded(Image.new("RGB", (8, 6)), "JPEG", exif=b"Exif\0\0MMbroken")) == (8, 6)
    with pytest.raises(DataError, match="does not exist"):
        image_size(entry(tmp_path / "none.png"))
    (tmp_path / "zero.png").touch()
    with pytest.raises(DataError, match="is empty"):
        image_size(entry(tmp_path / "zero.png"))


def test_key_is_the_content_hash(tmp_path: Path) -> None:
    first, second = png(tmp_path / "a.png"), png(tmp_path / "b.png")
    expected = hashlib.sha256(first.read_bytes()).hexdigest()
    assert image_key(entry(first)) == image_key(entry(second)) == expected
    assert image_key({"path": None, "bytes": first.read_bytes()}) == expected
    assert image_key(entry(png(tmp_path / "c.png", "blue"))) != expected
    with pytest.raises(DataError, match="does not exist"):
        image_key(entry(tmp_path / "none.png"))
