"""Where composed models are kept: the first folder that has the model, or else that can be written."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from maskft.errors import ModelError


def cache_roots() -> list[Path]:
    """Folders for composed models: `$MASKFT_CACHE` alone where it is set; else `$XDG_CACHE_HOME/maskft` or
    `~/.cache/maskft`, and, for homes that cannot be written, a folder of the user's own among temporary files."""
    if root := os.environ.get("MASKFT_CACHE"):
        return [Path(root)]
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    own = Path(tempfile.gettempdir()) / f"maskft-{os.getuid() if hasattr(os, 'getuid') else 'cache'}"
    return [Path(cache) / "maskft", own] if _is_ours(own) else [Path(cache) / "maskft"]


def find_or_choose(name: str, roots: list[Path]) -> Path:
    """The folder `name` below the first root that holds a model of that name, or else below the first one that can be
    written, which is made.

    Raises:
        ModelError: none of them can.
    """
    for root in roots:
        if (root / name / "config.json").is_file():
            return root / name
    for root in roots:
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(root, os.W_OK | os.X_OK):
            return root / name
    tried = ", ".join(map(str, roots))
    raise ModelError(f"no folder for the composed model can be written; tried: {tried}. Set MASKFT_CACHE to one.")


def _is_ours(folder: Path) -> bool:
    """Whether nobody else can have put something into a folder with a name that anyone can foresee."""
    try:
        status = folder.lstat()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    ours = not hasattr(os, "getuid") or status.st_uid == os.getuid()
    return ours and stat.S_ISDIR(status.st_mode) and not status.st_mode & 0o022
