"""A disk that fills up while a checkpoint is written, and one that becomes read-only."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import maskft.trainer
from maskft.checkpoints import newest_sound
from maskft.errors import RunError
from maskft.recipe import load_recipe
from maskft.training import train

from .tiny_run import write_recipe

RESULT = "adapter_model.safetensors"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(place)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting needs rights that are not there; tests/test_guard.py fills up by a limit on file sizes")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The adapter of a run that nothing happened to."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    train(load_recipe(recipe), run)
    return (run / RESULT).read_bytes()


def fill(disk: Path, left: int) -> None:
    """Leave so many bytes."""
    status = os.statvfs(disk)
    free = status.f_bavail * status.f_frsize
    (disk / "filler").write_bytes(bytes(max(0, free - left)))


@pytest.mark.parametrize("left", [0, 24_000, 60_000])
def test_full_while_a_checkpoint_is_written(
    left: int, recipe: Path, disk: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = maskft.trainer.Watch.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        original(self, args, state, control, **kwargs)
        if state.global_step == 5:
            fill(disk, left)

    monkeypatch.setattr(maskft.trainer.Watch, "on_step_end", on_step_end)
    run = disk / "run"
    with pytest.raises(RunError) as caught:
        train(load_recipe(recipe), run)
    message = str(caught.value)
    assert "disk is full" in message
    assert f"The last sound checkpoint is {run / 'checkpoints' / 'checkpoint-4'}. Make room" in message
    monkeypatch.undo()
    (disk / "filler").unlink()
    assert newest_sound(run / "checkpoints")[0] == run / "checkpoints" / "checkpoint-4"
    said: list[str] = []
    train(load_recipe(recipe), run, say=said.append)
    assert f"resuming from {run / 'checkpoints' / 'checkpoint-4'}" in said
    assert (run / RESULT).read_bytes() == whole


def test_read_only(recipe: Path, disk: Path) -> None:
    run = disk / "run"
    train(load_recipe(recipe), run)
    before = (run / RESULT).read_bytes()
    (run / "metrics.json").unlink()  # as if it had been killed at the end
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for folder in (run, disk / "new"):
        with pytest.raises(RunError, match=f"the file system is read-only .* so the run {folder} stopped"):
            train(load_recipe(recipe), folder)
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    assert train(load_recipe(recipe), run)["train"]["resumed_from_step"] == 8
    assert (run / RESULT).read_bytes() == before
