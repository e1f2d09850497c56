"""Training the embedded base: what is written, what stays frozen, what is learnt."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from maskft.errors import RunError
from maskft.recipe import load_recipe
from maskft.training import train

from .conftest import QUICKSTART, FrozenWatch, short_recipe


def test_the_run_folder_holds_recipe_environment_adapter_log_and_metrics(run: Path) -> None:
    assert load_recipe(run / "recipe.yaml") == short_recipe()
    environment = json.loads((run / "environment.json").read_text())
    assert environment["packages"]["torch"] == version("torch")  # which may lack the build that torch tells, "+cu130"
    trained = json.loads((run / "metrics.json").read_text())["train"]
    assert trained["steps"] == 8
    assert trained["seconds"] > 0
    scores = load_file(run / "adapter_model.safetensors")
    assert trained["trainable_parameters"] == sum(t.numel() for t in scores.values())
    assert json.loads((run / "adapter_config.json").read_text())["peft_type"] == "MASK"
    assert not (run / ".adapter").exists()


def test_the_loss_falls(run: Path) -> None:
    losses = [entry["loss"] for entry in json.loads((run / "log.json").read_text()) if "loss" in entry]
    assert len(losses) == 8
    assert sum(losses[-3:]) < sum(losses[:3])


def test_frozen_means_frozen(run: Path, frozen: FrozenWatch) -> None:
    assert len(frozen.tensors) > 400
    assert frozen.after() == frozen.before


def test_every_score_moved_and_is_fp32(run: Path) -> None:
    scores = load_file(run / "adapter_model.safetensors")
    assert len(scores) == 212  # 7 projections of 30 layers and 2 of the projector
    assert all(t.dtype == torch.float32 for t in scores.values())
    unmoved = [name for name, t in scores.items() if not t.any()]
    assert unmoved == []


def test_a_repeated_call_leaves_a_finished_run_alone(run: Path) -> None:
    before = (run / "adapter_model.safetensors").stat().st_mtime_ns
    said: list[str] = []
    metrics = train(short_recipe(), run, say=said.append)
    assert metrics["train"]["steps"] == 8
    assert "finished" in said[0]
    assert (run / "adapter_model.safetensors").stat().st_mtime_ns == before


def test_a_run_of_another_recipe_is_not_overwritten(run: Path) -> None:
    with pytest.raises(RunError, match=r"method\.gate: 'soft' there, 'normalized' now"):
        train(short_recipe("method.gate=normalized"), run)


def test_a_folder_that_is_no_run_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match="not a run folder"):
        train(short_recipe(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("gate", ["normalized", "centered", "topk", "threshold"])
def test_the_other_gates_train(gate: str, tmp_path: Path) -> None:
    overrides = [f"method.gate={gate}", "method.layers=0-1", "training.max_steps=2"]
    if gate == "topk":
        overrides.append("method.init_weights=random")
    metrics = train(short_recipe(*overrides), tmp_path / "run")
    assert metrics["train"]["steps"] == 2
    assert 0 < metrics["train"]["loss"] < 20
    moved = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert all(t.any() for t in moved.values())


def _command(folder: Path) -> list[str]:
    overrides = ["max_steps=8", "per_device_train_batch_size=2", "save_steps=2", "logging_steps=1"]
    return [
        *(sys.executable, "-m", "maskft.cli", "train", str(QUICKSTART), "--output", str(folder)),
        *(f"training.{override}" for override in overrides),
        *("method.modules=attn", "method.layers=0-3", "data.limits={train: 32, validation: 8, test: 8}"),
    ]


def test_a_killed_run_resumes_and_ends_with_the_same_adapter(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(_command(whole), check=True, capture_output=True, env=environment)

    with subprocess.Popen(_command(killed), stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        for _ in iter(lambda: process.stderr.read(1), ""):  # the bar redraws after every step
            if (killed / "checkpoints" / "checkpoint-4" / "manifest.json").is_file():
                break
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (killed / "adapter_model.safetensors").exists()

    resumed = subprocess.run(_command(killed), check=True, capture_output=True, text=True, env=environment)
    assert "resuming from" in resumed.stderr
    trained = json.loads((killed / "metrics.json").read_text())["train"]
    assert trained["resumed_from_step"] >= 4
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    assert yaml.safe_load((killed / "recipe.yaml").read_text()) == yaml.safe_load((whole / "recipe.yaml").read_text())
