"""Killed at random moments, a run ends with the adapter of one that was left alone, byte for byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.embedded.conftest import QUICKSTART
from tests.test_methods import METHODS

from .tiny_run import write_recipe

ROOT = Path(__file__).parents[2]
RESULT = ("adapter_model.safetensors", "adapter_config.json")


def killed(recipe: Path, output: Path, kills: int, events: int, overrides: tuple[str, ...] = ()) -> list[int]:
    command = [sys.executable, "-m", "tests.faults.killed", recipe, output, kills, events, *overrides]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr[-4000:]
    deaths: list[int] = json.loads(done.stdout.splitlines()[-1])
    return deaths


def check_same(whole: Path, mended: Path, files: tuple[str, ...] = (*RESULT, "recipe.yaml")) -> None:
    for name in files:
        assert (mended / name).read_bytes() == (whole / name).read_bytes()
    assert json.loads((mended / "metrics.json").read_text())["train"]["steps"] > 0
    assert not (mended / ".lock").exists()


def test_killed_three_times(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe")
    killed(recipe, tmp_path / "whole", kills=0, events=1)  # in a process as young: compiled code may round otherwise
    assert len(killed(recipe, tmp_path / "killed", kills=3, events=40)) == 3
    check_same(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize(
    "names",
    [
        ("lora", "full attention"),
        pytest.param(("dora", "lora and projector", "unilora", "hira", "full"), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_other_methods_killed_once(names: tuple[str, ...], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe", max_steps=4)
    methods = [METHODS[name] for name in names]
    command = [sys.executable, "-m", "tests.faults.killed_methods", str(recipe), str(tmp_path), *methods]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr[-4000:]
    assert all(json.loads(done.stdout.splitlines()[-1]))
    for n, name in enumerate(names):
        files = ("trained_weights.safetensors",) if name.startswith("full") else RESULT
        check_same(tmp_path / f"{n}-whole", tmp_path / f"{n}-killed", (*files, "recipe.yaml"))


@pytest.mark.slow
def test_the_embedded_base_killed_twenty_times(tmp_path: Path) -> None:
    short = ["max_steps=40", "per_device_train_batch_size=2", "save_steps=2", "logging_steps=1"]
    limits = ("method.modules=attn", "method.layers=0-3", "data.limits={train: 80, validation: 8, test: 8}")
    overrides = (*(f"training.{one}" for one in short), *limits)
    killed(QUICKSTART, tmp_path / "whole", kills=0, events=1, overrides=overrides)
    assert len(killed(QUICKSTART, tmp_path / "killed", kills=20, events=40, overrides=overrides)) == 20
    check_same(tmp_path / "whole", tmp_path / "killed")
