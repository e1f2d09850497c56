"""Processes for trials that several studies share, so that imports are waited for once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from maskft.studies import work
from maskft.studies.process import Processes


@pytest.fixture(scope="session", autouse=True)
def _shared_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    errors = tmp_path_factory.mktemp("processes") / "errors.txt"
    with Processes(errors) as shared, pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "Processes", lambda _: contextlib.nullcontext(shared))
        yield
