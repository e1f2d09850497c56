"""Damaged rows, images and answers: two thousand, one thousand and one thousand."""

from __future__ import annotations

import io
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from maskft.data import check, open_image, read
from maskft.data.images import image_size
from maskft.evaluation.benchmarks.common import read_answers
from tests.data.helpers import llava, png

from .mutate import as_text, damaged_bytes, damaged_value
from .watch import COUNTS, Watch

SYSTEM = {"from": "system", "value": "Be brief."}
ROWS: tuple[dict[str, Any], ...] = (
    llava(image="a.png"),
    llava("<image>\nAnd <image>?", image=["a.png", "sub/b.png"]),
    {"id": 3, "conversations": [SYSTEM, *llava("Hi")["conversations"]], "answers": ["a", "b"]},
    {"messages": [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."}], "images": ["a.png"]},
    {
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "A."}]},
        ],
        "image": {"path": "a.png"},
    },
)


@pytest.mark.parametrize("every", COUNTS)
def test_damaged_rows(every: bool, tmp_path: Path) -> None:
    draw, folder = random.Random(0), tmp_path / "data"
    png(folder / "a.png")
    png(folder / "sub" / "b.png")
    (folder / "out.png").symlink_to(png(tmp_path / "secret.png"))
    watch = Watch(folder)
    for _ in range(2000 if every else 150):
        kind = draw.choice((ROWS[:3], ROWS[3:]))
        rows: Any = [draw.choice(kind) for _ in range(draw.randrange(1, 3))]
        if draw.random() < 0.7:
            rows = damaged_value(draw, rows)
        if draw.random() < 0.1 and isinstance(rows, list) and rows and isinstance(rows[0], dict):
            rows[0]["image"] = draw.choice(("out.png", "../secret.png", "/etc/passwd", "sub", "/dev/zero", "a.png/x"))
        if draw.random() < 0.5:
            path, content = folder / "rows.json", as_text(rows)
        else:
            listed = rows if isinstance(rows, list) else [rows]
            path, content = folder / "rows.jsonl", b"\n".join(map(as_text, listed))
        if draw.random() < 0.3:
            content = damaged_bytes(draw, content)
        path.write_bytes(content)
        format = draw.choice(("auto", "auto", "auto", "auto", "llava", "messages"))
        dataset = watch.attempt(lambda: _checked(path, format))  # noqa: B023
        if dataset is not None:
            paths = [image["path"] for row in dataset for image in row["images"]]
            assert all(one.startswith(f"{folder}/") and "secret" not in one for one in paths)
        path.unlink()
    watch.finish(accepted=10, refused=20)


def _checked(path: Path, format: Any) -> Any:
    dataset = read(path, format=format)
    check(dataset)
    return dataset


def pictures() -> list[bytes]:
    """Small sound images of many formats and modes."""
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [Image.effect_noise((24, 18), 90).convert("P") for _ in range(3)]
    modes = {
        "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
        "JPEG": ("L", "RGB", "CMYK"),
        "TIFF": ("1", "L", "RGB", "CMYK", "I;16", "F", "I"),
        "BMP": ("1", "L", "RGB"),
        "WEBP": ("RGB", "RGBA"),
        "PPM": ("L", "RGB"),
        "GIF": ("P",),
        "JPEG2000": ("RGB",),
    }
    found = []
    for kind, names in modes.items():
        for mode in names:
            noise = Image.effect_noise((24, 18), 90)
            buffer = io.BytesIO()
            noise.convert(mode).save(buffer, kind)
            found.append(buffer.getvalue())
    for kind, options in (
        ("GIF", {"save_all": True, "append_images": frames}),
        ("WEBP", {"save_all": True, "append_images": frames}),
        ("PNG", {"save_all": True, "append_images": frames}),
        ("TIFF", {"save_all": True, "append_images": frames, "compression": "tiff_deflate"}),
        ("JPEG", {"exif": exif, "progressive": True}),
    ):
        buffer = io.BytesIO()
        Image.effect_noise((24, 18), 90).save(buffer, kind, **options)
        found.append(buffer.getvalue())
    return found


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes whose header declares a picture of that size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(bytes(100_000), 9))
    return b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b"")


@pytest.mark.parametrize("every", COUNTS)
def test_damaged_images(every: bool, tmp_path: Path) -> None:
    draw, watch = random.Random(0), Watch(tmp_path)
    sound = pictures()
    for _ in range(1000 if every else 150):
        content = draw.choice(sound)
        if draw.random() < 0.95:
            content = damaged_bytes(draw, content)
        if draw.random() < 0.05:
            content = bomb(draw.choice((1, 9000, 2**31 - 1)), draw.choice((1, 9000, 10**6, 2**31 - 1)))
        image = {"path": None, "bytes": content}
        opened = watch.attempt(lambda: open_image(image))  # noqa: B023
        assert opened is None or opened.mode == "RGB"
        watch.attempt(lambda: image_size(image))  # noqa: B023
    watch.finish(accepted=20, refused=20)


@pytest.mark.parametrize("every", COUNTS)
def test_damaged_answers(every: bool, tmp_path: Path) -> None:
    draw, watch = random.Random(0), Watch(tmp_path)
    path = tmp_path / "answers.jsonl"
    sound: Any = [{"question_id": i, "prompt": "Q?", "text": "yes", "metadata": {}} for i in range(3)]
    for _ in range(1000 if every else 100):
        rows = damaged_value(draw, sound)
        content = b"\n".join(map(as_text, rows if isinstance(rows, list) else [rows]))
        path.write_bytes(damaged_bytes(draw, content) if draw.random() < 0.5 else content)
        for answer in watch.attempt(lambda: read_answers(path)) or ():
            assert isinstance(answer.text, str)
    watch.finish(accepted=10, refused=20)
