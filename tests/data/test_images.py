import hashlib
import io
from pathlib import Path

import pytest
from PIL import Image

from maskft.data import image_key, open_image
from maskft.data.images import missing_file
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


@pytest.mark.parametrize("limit", [1000, 3000])  # above twice the limit Pillow raises, above it only warns
def test_decompression_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    path = png(tmp_path / "big.png", size=(64, 64))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(DataError, match=r"big\.png has more pixels than Pillow decodes safely .*Scale"):
        open_image(entry(path))


def test_key_is_the_content_hash(tmp_path: Path) -> None:
    first, second = png(tmp_path / "a.png"), png(tmp_path / "b.png")
    expected = hashlib.sha256(first.read_bytes()).hexdigest()
    assert image_key(entry(first)) == image_key(entry(second)) == expected
    assert image_key({"path": None, "bytes": first.read_bytes()}) == expected
    assert image_key(entry(png(tmp_path / "c.png", "blue"))) != expected
    with pytest.raises(DataError, match="does not exist"):
        image_key(entry(tmp_path / "none.png"))
