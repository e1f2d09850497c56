"""How runs end: paused, refused, stopped with words; and what is left of them."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import maskft.trainer
from maskft.checkpoints import flaw_of
from maskft.cli import main
from maskft.errors import DataError, Paused, RunError
from maskft.guard import LOCK, Guard, disk_problem
from maskft.recipe import load_recipe
from maskft.runs import read_metrics
from maskft.training import train
from tests.faults.tiny_run import write_recipe

RESULT = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    train(load_recipe(recipe), folder)
    return folder


@pytest.fixture
def after_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[Any], object]], None]:
    """Have something done at the end of a step, before a checkpoint is saved; it is given the model."""

    def arrange(step: int, act: Callable[[Any], object]) -> None:
        original = maskft.trainer.Watch.on_step_end

        def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            original(self, args, state, control, **kwargs)
            if state.global_step == step:
                act(kwargs["model"])

        monkeypatch.setattr(maskft.trainer.Watch, "on_step_end", on_step_end)

    return arrange


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir() if path.is_dir())


def check_goes_on(recipe: Path, run: Path, whole: Path) -> list[str]:
    """Called again, the run ends as if nothing had happened; returns what was said."""
    said: list[str] = []
    train(load_recipe(recipe), run, say=said.append)
    assert (run / RESULT).read_bytes() == (whole / RESULT).read_bytes()
    return said


class TestClaim:
    def test_one_process_a_folder(self, tmp_path: Path) -> None:
        with Guard(tmp_path / "run", pytest.fail) as first, Guard(tmp_path / "run", pytest.fail) as second:
            first.claim()
            with pytest.raises(RunError, match=rf"run is in use by process {os.getpid()} on .*Wait for it or end it"):
                second.claim()
        assert list((tmp_path / "run").iterdir()) == []

    def test_free_again(self, tmp_path: Path) -> None:
        for _ in range(2):
            with Guard(tmp_path, pytest.fail) as guard:
                guard.claim()
                assert (tmp_path / LOCK).exists()

    def test_a_killed_process_holds_nothing(self, tmp_path: Path) -> None:
        code = """
import sys
from pathlib import Path
from maskft.guard import Guard
guard = Guard(Path(sys.argv[1]), print)
guard.claim()
print("claimed", flush=True)
sys.stdin.read()
"""
        with subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "claimed\n"
            with pytest.raises(RunError, match=f"in use by process {process.pid} "), Guard(tmp_path, print) as guard:
                guard.claim()
            process.kill()
        said: list[str] = []
        with Guard(tmp_path, said.append) as guard:
            guard.claim()
        assert len(said) == 1
        assert said[0].startswith(f"taking over from process {process.pid} on ")

    def test_a_lock_that_vanishes_while_it_is_taken(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import fcntl

        flock, calls = fcntl.flock, []

        def vanish(file: Any, operation: int) -> None:
            flock(file, operation)
            calls.append(file)
            if len(calls) == 1:
                (tmp_path / LOCK).unlink()

        monkeypatch.setattr("fcntl.flock", vanish)
        with Guard(tmp_path, pytest.fail) as guard:
            guard.claim()
            assert len(calls) == 2

    def test_training_in_a_folder_in_use(self, recipe: Path, tmp_path: Path) -> None:
        with Guard(tmp_path / "run", pytest.fail) as guard:
            guard.claim()
            with pytest.raises(RunError, match="is in use by process"):
                train(load_recipe(recipe), tmp_path / "run")
            assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]


class TestSigterm:
    def test_saves_and_ends_with_zero(
        self, recipe: Path, whole: Path, tmp_path: Path, after_step: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        after_step(3, lambda model: os.kill(os.getpid(), signal.SIGTERM))
        run = tmp_path / "run"
        monkeypatch.setattr("sys.argv", ["maskft", "train", str(recipe), "--output", str(run), "--json"])
        before = signal.getsignal(signal.SIGTERM)
        main()  # does not exit, which is 0
        assert signal.getsignal(signal.SIGTERM) is before
        printed = capsys.readouterr()
        last = str(run / "checkpoints" / "checkpoint-3")
        assert json.loads(printed.out) == {"run": str(run), "paused": {"step": 3, "of": 8, "checkpoint": last}}
        assert f"paused after step 3 of 8, saved in {last}. The same command goes on from there." in printed.err
        assert checkpoints(run) == ["checkpoint-2", "checkpoint-3"]
        assert not (run / RESULT).exists()
        monkeypatch.undo()
        assert any(line.endswith("checkpoint-3") for line in check_goes_on(recipe, run, whole))

    def test_at_the_last_step_it_is_too_late(self, recipe: Path, whole: Path, tmp_path: Path, after_step: Any) -> None:
        after_step(8, lambda model: os.kill(os.getpid(), signal.SIGTERM))
        train(load_recipe(recipe), tmp_path / "run")
        assert (tmp_path / "run" / RESULT).read_bytes() == (whole / RESULT).read_bytes()

    def test_without_checkpoints_one_is_saved_all_the_same(
        self, recipe: Path, whole: Path, tmp_path: Path, after_step: Any
    ) -> None:
        after_step(5, lambda model: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Paused, match="after step 5 of 8"):
            train(load_recipe(recipe, ["training.save_strategy=no"]), tmp_path / "run")
        assert flaw_of(tmp_path / "run" / "checkpoints" / "checkpoint-5") is None


class TestLostValues:
    def test_a_loss_that_is_no_number(
        self, recipe: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after_step: Any
    ) -> None:
        original, kept = maskft.trainer.labelled_loss, {}

        def remember(model: Any) -> None:
            kept.update({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
            monkeypatch.setattr(maskft.trainer, "labelled_loss", lambda *a: original(*a) * math.nan)

        after_step(5, remember)
        run = tmp_path / "run"
        with pytest.raises(RunError) as caught:
            train(load_recipe(recipe), run)
        message = str(caught.value)
        assert message.startswith("the loss of step 6 is nan, so training stopped.")
        assert f"The adapter as it was after step 5 is in {run / 'last-good'}." in message
        assert f"The last sound checkpoint is {run / 'checkpoints' / 'checkpoint-4'}." in message
        assert "Lower training.learning_rate" in message
        saved = load_file(run / "last-good" / RESULT)
        assert len(saved) == len(kept)
        for name, scores in kept.items():
            assert torch.equal(saved[name.replace(".default", "")], scores)
        assert not (run / LOCK).exists()

    @pytest.mark.parametrize("strategy", ["steps", "no"])
    def test_values_that_are_no_numbers_are_never_saved(
        self, strategy: str, recipe: Path, tmp_path: Path, after_step: Any
    ) -> None:
        after_step(8, lambda model: next(p for p in model.parameters() if p.requires_grad).data.fill_(math.inf))
        run = tmp_path / "run"
        with pytest.raises(RunError, match="after step 8 the trained values are not all numbers") as caught:
            train(load_recipe(recipe, [f"training.save_strategy={strategy}"]), run)
        left = "checkpoint-6." if strategy == "steps" else "No checkpoint had been saved."
        assert left in str(caught.value)
        assert not (run / "last-good").exists()
        assert not (run / RESULT).exists()


class TestFullDisk:
    @pytest.mark.parametrize("limit", [8_000, 30_000])  # bytes; too few for the scores, and for Adam's moments
    def test_the_last_checkpoint_survives_and_is_used(
        self, limit: int, recipe: Path, whole: Path, tmp_path: Path, after_step: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        after_step(5, lambda model: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard)))
        run = tmp_path / "run"
        try:
            with pytest.raises(RunError) as caught:
                train(load_recipe(recipe), run)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert f"so the run {run} stopped. The last sound checkpoint is {run / 'checkpoints' / 'checkpoint-4'}" in str(
            caught.value
        )
        assert checkpoints(run) == ["checkpoint-2", "checkpoint-4"]
        monkeypatch.undo()
        assert any(line.endswith("checkpoint-4") for line in check_goes_on(recipe, run, whole))

    @pytest.mark.parametrize(
        ("error", "reason"),
        [
            (OSError(errno.ENOSPC, "No space", "/run/log.json"), "the disk is full (/run/log.json)"),
            (PermissionError(errno.EACCES, "x"), "there is no permission to write"),
            (OSError(errno.EROFS, "x"), "the file system is read-only"),
            (ValueError("Error: I/O error: No space left on device (os error 28)"), "the disk is full"),
            (RuntimeError("[enforce fail at inline_container.cc:1] . PytorchStreamWriter failed writing"), "perhaps"),
            (FileNotFoundError(errno.ENOENT, "x"), None),
            (RuntimeError("out of memory"), None),
            (None, None),
        ],
    )
    def test_reasons(self, error: Exception | None, reason: str | None) -> None:
        for one in (error, _behind(error)):
            found = disk_problem(one)
            assert found is None if reason is None else reason in str(found)

    def test_what_a_user_is_told_already_stays(self, tmp_path: Path) -> None:
        told = DataError("image file x cannot be read")
        with pytest.raises(DataError, match="image file x"), Guard(tmp_path, print):  # noqa: PT012
            try:
                raise PermissionError(errno.EACCES, "x")
            except OSError as error:
                raise told from error

    def test_a_folder_that_cannot_be_made(self, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(path: Path, **kwargs: Any) -> None:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))

        monkeypatch.setattr(Path, "mkdir", refuse)
        with pytest.raises(RunError, match=r"no permission to write \(.*run\), so the run .* No checkpoint had been"):
            train(load_recipe(recipe), tmp_path / "run")


def _behind(error: Exception | None) -> Exception:
    """Another error that it caused."""
    try:
        raise ValueError("something") from error
    except ValueError as caught:
        return caught


def test_damaged_and_unfinished_checkpoints_are_passed_over(recipe: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(load_recipe(recipe, ["training.save_total_limit=4"]), run)
    (run / "metrics.json").unlink()
    (run / "checkpoints" / "checkpoint-8" / "manifest.json").unlink()
    file = run / "checkpoints" / "checkpoint-6" / RESULT
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    said: list[str] = []
    train(load_recipe(recipe, ["training.save_total_limit=4"]), run, say=said.append)
    assert any("checkpoint-8: it was not finished: manifest.json is missing" in line for line in said)
    assert any(f"checkpoint-6: {RESULT} is not as it was written" in line for line in said)
    assert any(line == f"resuming from {run / 'checkpoints' / 'checkpoint-4'}" for line in said)
    assert (run / RESULT).read_bytes() == (whole / RESULT).read_bytes()
    expected = [*(f"checkpoint-{step}" for step in (2, 4, 6, 8)), "damaged-checkpoint-6"]
    assert checkpoints(run) == expected


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000, "\udcff"])
def test_damaged_metrics(content: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(RunError, match=r"metrics\.json .*Remove it"):
        read_metrics(tmp_path)
