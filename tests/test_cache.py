"""The composed model is kept where it can be, and never taken from where others can write."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from maskft.errors import ModelError
from maskft.vlm.cache import cache_roots, find_or_choose


@pytest.fixture(autouse=True)
def _places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASKFT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()


def own(tmp_path: Path) -> Path:
    return tmp_path / "temporary" / f"maskft-{os.getuid()}"


def test_in_this_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_roots() == [tmp_path / "home" / ".cache" / "maskft", own(tmp_path)]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_roots() == [tmp_path / "xdg" / "maskft", own(tmp_path)]
    monkeypatch.setenv("MASKFT_CACHE", str(tmp_path / "set"))
    assert cache_roots() == [tmp_path / "set"]


def test_what_others_may_have_written_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own(tmp_path).mkdir(mode=0o700)
    assert own(tmp_path) in cache_roots()
    own(tmp_path).chmod(0o777)
    assert own(tmp_path) not in cache_roots()
    own(tmp_path).chmod(0o700)
    monkeypatch.setattr("os.getuid", lambda: 12345)
    (tmp_path / "temporary" / "maskft-12345").mkdir(mode=0o700)
    assert len(cache_roots()) == 1
    (tmp_path / "temporary" / "maskft-12345").rmdir()
    (tmp_path / "temporary" / "maskft-12345").symlink_to(tmp_path)
    assert len(cache_roots()) == 1


def test_the_first_that_has_it_then_the_first_that_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    roots = [tmp_path / "file" / "a", tmp_path / "b", tmp_path / "c"]
    assert find_or_choose("model", roots) == tmp_path / "b" / "model"
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o700
    (tmp_path / "c" / "model").mkdir(parents=True)
    (tmp_path / "c" / "model" / "config.json").touch()
    assert find_or_choose("model", roots) == tmp_path / "c" / "model"
    with pytest.raises(ModelError, match=r"tried: .*/file/a\. Set MASKFT_CACHE"):
        find_or_choose("model", roots[:1])
