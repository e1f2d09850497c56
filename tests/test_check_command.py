"""`maskft check`: from bad data to the message a user reads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from maskft.cli import main
from tests.data.helpers import llava, png, write_json
from tests.evaluation.tiny import tiny_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with images, good ones and bad."""
    folder = tmp_path / "data"
    whole = png(folder / "red.png", size=(64, 64)).read_bytes()
    (folder / "cut.png").write_bytes(whole[:60])
    (folder / "zero.png").touch()
    (folder / "page.png").write_text("<html>not found</html>")
    png(folder / "photo.jpg", "blue")
    Image.new("F", (8, 8), 0.5).save(folder / "float.tiff")
    return folder


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def recipe(base: Path, data: Path, rows: list[Any], **training: Any) -> Path:
    content = {
        "model": {"base": str(base), "dtype": "float32"},
        "data": {"kind": "files", "train": str(write_json(data / "train.json", rows)), "image_root": str(data)},
        "training": training,
    }
    return write_json(data.parent / "recipe.yaml", content)


def check(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["maskft", "check", *map(str, arguments)])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


GOOD = llava(image="red.png")
ODD = [*turns("<image>\nA?", "B.")[:1], *turns("C?", "D.")]
COMPLAINTS: dict[str, tuple[dict[str, Any], str]] = {
    "other suffix": (llava(image="photo.gif"), "photo.gif does not exist, but photo.jpg does. Name that file"),
    "missing file": (llava(image="none.jpg"), "none.jpg does not exist. Check image_root"),
    "truncated image": (llava(image="cut.png"), "cut.png cannot be decoded as an image (image file is truncated"),
    "empty image": (llava(image="zero.png"), "zero.png is empty (0 bytes). Fetch the file again"),
    "no image": (llava(image="page.png"), "page.png cannot be decoded as an image (unknown format)"),
    "pixels without range": (llava(image="float.tiff"), "float.tiff has floating-point pixels"),
    "image without token": (llava("A?", image="red.png"), "has 1 image(s) but no <image> token. Put <image> into"),
    "token without image": (llava(), "has 1 <image> token(s) but no image. Name the image file or remove"),
    "other number": (llava("<image><image>A?", image="red.png"), "has 1 image(s) but 2 <image> token(s). Make"),
    "odd turns": ({"image": "red.png", "conversations": turns("<image>A?", "B.", "C?")}, "the last turn is not the"),
    "misordered turns": ({"image": "red.png", "conversations": ODD}, "turn 2 is by user, but assistant is expected"),
    "image tokens cut": (
        llava("x" * 200 + "<image>", "y" * 200, image="red.png"),
        "but max_length is 200: image tokens would be cut off and all answer labels would be cut off. Set max_length",
    ),
    "all labels masked": (llava(gpt="", image="red.png"), "is empty, all its labels would be masked. Fill it in"),
    "path outside": (llava(image="../recipe.yaml"), "outside the image root"),
}


@pytest.mark.parametrize("name", COMPLAINTS)
def test_every_complaint_reaches_the_user(
    name: str, base: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad, message = COMPLAINTS[name]
    assert check(monkeypatch, recipe(base, data, [GOOD, bad], max_length=200)) == 2
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("train item")]
    assert line.startswith("train item 1: ")
    assert message in line


def test_what_a_terminal_would_obey_is_escaped(
    base: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = recipe(base, data, [GOOD, llava(image="\x1b[2Jred.png")])
    assert check(monkeypatch, file) == 2
    assert check(monkeypatch, file, f"data.train={data}/\x1b]0;x.json") == 2
    printed = capsys.readouterr()
    assert "\x1b" not in printed.out + printed.err
    assert "\\x1b[2Jred.png does not exist" in printed.out
    assert "\\x1b]0;x.json" in printed.err


def test_all_at_once_and_a_clean_copy(
    base: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row for bad, _ in COMPLAINTS.values() for row in (GOOD, bad)]
    file, fixed = recipe(base, data, rows, max_length=200), data.parent / "fixed"
    assert check(monkeypatch, file, "--json") == 2
    seen = json.loads(capsys.readouterr().out)
    assert seen["max_length"] == 200
    assert seen["parts"]["train"]["flawed_rows"] == len(COMPLAINTS)
    assert [flaw["place"] for flaw in seen["parts"]["train"]["flaws"]] == [f"item {2 * i + 1}" for i in range(14)]

    assert check(monkeypatch, file, "--fix", fixed, "--json") == 0
    use = json.loads(capsys.readouterr().out)["use"]
    assert {path.name for path in fixed.iterdir()} == {"train.json", "dropped.jsonl"}
    assert json.loads((fixed / "train.json").read_text()) == [GOOD] * len(COMPLAINTS)
    dropped = [json.loads(line) for line in (fixed / "dropped.jsonl").read_text().splitlines()]
    assert [row["place"] for row in dropped] == [f"item {2 * i + 1}" for i in range(14)]
    assert check(monkeypatch, file, *use) == 0
    assert check(monkeypatch, file, "--fix", fixed) == 2
    assert "already exists" in capsys.readouterr().err


def test_nothing_is_written_where_no_row_is_good(
    base: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(monkeypatch, recipe(base, data, [llava()]), "--fix", data.parent / "fixed") == 2
    assert "every row of" in capsys.readouterr().err
    assert sorted(path.name for path in data.parent.iterdir()) == ["data", "recipe.yaml"]


def test_shared_images_are_told(
    base: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = recipe(base, data, [GOOD])
    held_out = f"data.test={write_json(data / 'test.json', [llava(image='red.png')])}"
    assert check(monkeypatch, file, held_out) == 2
    assert "1 images of the train part appear in the test part too" in capsys.readouterr().out
    assert check(monkeypatch, file, f"data.test={data / 'none.json'}") == 2
    assert "none.json does not exist" in capsys.readouterr().err
    assert check(monkeypatch, file, f"data.train={write_json(data / 'no.json', [])}") == 2
    assert "holds no rows" in capsys.readouterr().err


def test_the_demos_data(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"kind": "easy-vqa", "limits": {"train": 3, "validation": 2, "test": 2}}
    file = write_json(tmp_path / "recipe.yaml", {"model": {"base": str(base)}, "data": data})
    assert check(monkeypatch, file) == 0
    assert "test data" in capsys.readouterr().out
    assert check(monkeypatch, file, "--fix", tmp_path / "fixed") == 2
    assert "the data of this recipe is the demo's" in capsys.readouterr().err


MEASURE = """
import resource, sys
from maskft.cli import main
sys.argv = ["maskft", *sys.argv[1:]]
try:
    main()
finally:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
"""


@pytest.mark.slow
def test_a_hundred_thousand_rows_stay_below_a_gigabyte(
    base: Path, data: Path, record_testsuite_property: Callable[[str, object], None]
) -> None:
    for i in range(50):
        png(data / f"{i}.png", (i, 0, 0), size=(64, 48 + i % 4))
    rows = [
        llava("<image>\n" + "what color shape " * 20, "red circle " * 20, image=f"{i % 50}.png", id=str(i))
        for i in range(100_000)
    ]
    rows[70_000] = llava("no token", image="1.png")
    file = recipe(base, data, rows)
    del rows
    command = [sys.executable, "-c", MEASURE, "check", str(file), "--images", "20", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 2, done.stderr
    part = json.loads(done.stdout)["parts"]["train"]
    assert (part["rows"], part["flawed_rows"], part["distinct_images"]) == (100_000, 1, 50)
    assert part["seconds_for_665000_rows"] > 0
    peak = int(done.stderr.split()[-1]) * 1024
    record_testsuite_property("peak_bytes", peak)
    record_testsuite_property("seconds", part["seconds"])
    assert peak < 1e9
