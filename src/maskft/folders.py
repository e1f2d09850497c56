"""Folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from maskft.errors import RunError


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A folder to write into that becomes `out` when the block ends, and vanishes when it fails.

    Raises:
        RunError: `out` exists and is not empty.
    """
    refuse_existing(out)
    staging = out.with_name(f".{out.name}.part")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        if out.exists():
            out.rmdir()
        os.replace(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def refuse_existing(out: Path) -> None:
    """Raise RunError where `out` would be overwritten."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out} already exists and is not empty. Give another folder, or remove it.")
