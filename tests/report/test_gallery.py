"""Which questions are shown, and their pictures."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image

from maskft.report.gallery import data_uri, examples


def record(base: str, tuned: str, image: str | None = None, truth: str = "yes") -> dict:
    return {"question": "Sure?", "base": base, "tuned": tuned, "truth": truth, "image": image}


def test_kinds_worst_first() -> None:
    records = [
        record("no", "yes"),
        record("yes", "no"),
        record("no", "no"),
        record("Yes", "yes."),
        record("yes", "yes"),
        record("maybe", "no"),
    ]
    found = examples(records, "exact")
    assert [(one.kind, one.before, one.after) for one in found] == [
        ("lost", "yes", "no"),
        ("wrong", "no", "no"),
        ("wrong", "maybe", "no"),
        ("gained", "no", "yes"),
        ("changed", "Yes", "yes."),
    ]
    assert {one.missing for one in found} == {"no image"}
    assert examples([], "exact") == []


def test_a_few_are_spread_over_all() -> None:
    records = [record("yes", f"no {n}") for n in range(100)]
    assert [one.after for one in examples(records, "exact", each=4)] == ["no 0", "no 25", "no 50", "no 75"]


def test_pictures(tmp_path: Path) -> None:
    path = tmp_path / "wide.png"
    Image.new("RGB", (640, 320), "teal").save(path)
    (one,) = examples([record("no", "yes", str(path))], "exact")
    assert one.picture is not None
    head, _, content = one.picture.partition(",")
    assert head == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(content))) as image:
        assert (image.format, image.size) == ("JPEG", (160, 80))
    (gone,) = examples([record("no", "yes", str(tmp_path / "gone.png"))], "exact")
    assert gone.picture is None
    assert "gone.png does not exist" in gone.missing
    assert len(data_uri(Image.new("RGB", (20, 20)))) < 2000
