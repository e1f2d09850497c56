"""Checkpoints that are whole: each has a manifest with the SHA-256 of its files, written last.

    checkpoints/checkpoint-N/               as Trainer writes it
    checkpoints/checkpoint-N/manifest.json  {"files": {name: {"bytes": size, "sha256": hash}}}

A checkpoint without manifest was not finished. One whose files are not those of its manifest is damaged.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_BLOCK = 1 << 22


def seal(checkpoint: Path) -> None:
    """Write the manifest of a checkpoint that is complete, once all its files are on the disk."""
    files = {}
    for path in _files(checkpoint):
        with path.open("rb") as file:
            digest, size = _digest(file.fileno())
            os.fsync(file.fileno())
        files[path.relative_to(checkpoint).as_posix()] = {"bytes": size, "sha256": digest}
    part = checkpoint / f"{MANIFEST}.part"
    with part.open("w", encoding="utf-8") as file:
        json.dump({"files": files}, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, checkpoint / MANIFEST)


def flaw_of(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be used, or None where every file is as its manifest says."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        listed = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except FileNotFoundError:
        return f"it was not finished: {MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    there = {path.relative_to(checkpoint).as_posix(): path for path in _files(checkpoint)}
    for name, (size, _) in listed.items():  # sizes first: they are told without reading
        if name not in there:
            return f"{name} is missing"
        if there[name].stat().st_size != size:
            return f"{name} has {there[name].stat().st_size} bytes, not {size}"
    for name, (_, digest) in listed.items():
        with there[name].open("rb") as file:
            if _digest(file.fileno())[0] != digest:
                return f"{name} is not as it was written (its SHA-256 differs)"
    return None


def newest_sound(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint in a folder that has no flaw, and newer ones that do, each with its flaw."""
    passed_over: dict[Path, str] = {}
    for path in sorted(_checkpoints(folder), key=step_of, reverse=True):
        flaw = flaw_of(path)
        if flaw is None:
            return path, passed_over
        passed_over[path] = flaw
    return None, passed_over


def clear_away(passed_over: dict[Path, str]) -> None:
    """Remove checkpoints that were not finished, and give damaged ones names under which nothing looks for them."""
    for path in passed_over:
        if (path / MANIFEST).exists():
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        else:
            shutil.rmtree(path)


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.rpartition("-")[2])


def _checkpoints(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]


def _files(checkpoint: Path) -> list[Path]:
    """All files but the manifest, links left out."""
    found = (Path(folder) / name for folder, _, names in os.walk(checkpoint) for name in names)
    outside = (checkpoint / MANIFEST, checkpoint / f"{MANIFEST}.part")
    return sorted(path for path in found if path not in outside and path.is_file() and not path.is_symlink())


def _digest(descriptor: int) -> tuple[str, int]:
    """SHA-256 and size in bytes of an open file."""
    digest, size = hashlib.sha256(), 0
    while block := os.pread(descriptor, _BLOCK, size):
        digest.update(block)
        size += len(block)
    return digest.hexdigest(), size
