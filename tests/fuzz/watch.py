"""Trying many inputs: each is accepted or refused with words, soon, in little memory, and touching one folder alone."""

from __future__ import annotations

import os
import resource
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from maskft.errors import UserError

LONGEST = 10
"""Seconds of processor time for one input."""
MOST = 2 << 30
"""Bytes by which the process may grow."""
COUNTS = [pytest.param(False, id="some"), pytest.param(True, id="all", marks=pytest.mark.slow)]
_CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "os.link", "os.symlink", "os.truncate")
_watching: list[Watch] = []


class Watch:
    """Tries inputs.

    Attributes:
        folder: where files may be changed.
        accepted, refused: how many inputs were.
        outside: changes elsewhere.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.accepted = self.refused = 0
        self.outside: list[str] = []
        self._before = _peak()

    def attempt(self, action: Callable[[], Any]) -> Any:
        """What the action returns; None where it raises UserError. Any other exception is a finding."""
        started = time.process_time()  # which stands still while a busy machine pauses the tests
        _watching.append(self)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = action()
            self.accepted += 1
        except UserError as error:
            assert len(str(error)) > 10  # noqa: PT017
            self.refused += 1
            result = None
        finally:
            _watching.pop()
        assert time.process_time() - started < LONGEST
        assert self.outside == []
        return result

    def finish(self, *, accepted: int = 1, refused: int = 1) -> None:
        """Check that there were inputs of both kinds, and that memory stayed small."""
        assert self.accepted >= accepted
        assert self.refused >= refused
        assert _peak() - self._before < MOST


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching:
        return
    writes = event == "open" and bool(int(arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    if writes or event in _CHANGES:
        place = os.path.abspath(os.fsdecode(arguments[0])) if isinstance(arguments[0], str | bytes | Path) else ""
        inside = place.startswith(f"{_watching[-1].folder}{os.sep}")
        if place and not inside and place != os.devnull and "__pycache__" not in place:
            _watching[-1].outside.append(f"{event} {place}")


sys.addaudithook(_hook)
