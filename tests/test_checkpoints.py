"""A checkpoint is used only if every file is as its manifest says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from maskft.checkpoints import MANIFEST, clear_away, flaw_of, newest_sound, seal


def checkpoint(folder: Path, step: int, *, sealed: bool = True) -> Path:
    path = folder / f"checkpoint-{step}"
    (path / "inner").mkdir(parents=True)
    (path / "weights").write_bytes(bytes(range(256)) * step)
    (path / "inner" / "state.json").write_text(f"{step}")
    if sealed:
        seal(path)
    return path


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_sealed_is_sound(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 3)
    assert flaw_of(path) is None
    files = json.loads((path / MANIFEST).read_text())["files"]
    assert {name: entry["bytes"] for name, entry in files.items()} == {"weights": 768, "inner/state.json": 1}
    seal(path)  # once more, over the old manifest
    assert flaw_of(path) is None


@pytest.mark.parametrize(
    ("content", "flaw"),
    [
        (None, "it was not finished: manifest.json is missing"),
        ("", "its manifest.json cannot be read"),
        ("[]", "its manifest.json cannot be read"),
        ('{"files": {"weights": 3}}', "its manifest.json cannot be read"),
        ("[" * 100_000, "its manifest.json cannot be read"),
        ('{"files": {"other": {"bytes": 1, "sha256": "x"}}}', "other is missing"),
        ('{"files": {"../checkpoint-1/weights": {"bytes": 256, "sha256": "x"}}}', "../checkpoint-1/weights is missing"),
        ('{"files": {"weights": {"bytes": 1, "sha256": "x"}}}', "weights has 256 bytes, not 1"),
        ('{"files": {"weights": {"bytes": 256, "sha256": "x"}}}', "weights is not as it was written"),
    ],
)
def test_flaws_of_manifests(content: str | None, flaw: str, tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 1, sealed=False)
    if content is not None:
        (path / MANIFEST).write_text(content)
    assert flaw in str(flaw_of(path))


def test_flaws_of_files(tmp_path: Path) -> None:
    flip(checkpoint(tmp_path, 1) / "weights")
    assert flaw_of(tmp_path / "checkpoint-1") == "weights is not as it was written (its SHA-256 differs)"
    (checkpoint(tmp_path, 2) / "inner" / "state.json").unlink()
    assert flaw_of(tmp_path / "checkpoint-2") == "inner/state.json is missing"


def test_the_newest_sound_one_is_taken(tmp_path: Path) -> None:
    assert newest_sound(tmp_path / "none") == (None, {})
    sound = checkpoint(tmp_path, 9)
    damaged, unfinished = checkpoint(tmp_path, 10), checkpoint(tmp_path, 100, sealed=False)
    flip(damaged / "weights")
    checkpoint(tmp_path, 8, sealed=False)  # older ones don't matter
    (tmp_path / "checkpoint-x").mkdir()
    found, passed_over = newest_sound(tmp_path)
    assert found == sound
    assert list(passed_over) == [unfinished, damaged]
    clear_away(passed_over)
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoint-8",
        "checkpoint-9",
        "checkpoint-x",
        "damaged-checkpoint-10",
    }
    assert newest_sound(tmp_path) == (sound, {})
