"""Gradient checkpointing trains the same, and leaves a frozen encoder alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import testing
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from maskft.recipe import load_recipe
from maskft.training import train
from tests.faults.tiny_run import write_recipe


def run(folder: Path, **training: Any) -> tuple[list[float], dict[str, Any]]:
    """The losses of three steps, and what was learnt."""
    train(load_recipe(write_recipe(folder, max_steps=3, save_strategy="no", **training)), folder / "run")
    log = json.loads((folder / "run" / "log.json").read_text())
    return [entry["loss"] for entry in log if "loss" in entry], load_file(folder / "run" / "adapter_model.safetensors")


def test_a_frozen_encoder_is_run_once_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    forward = CLIPEncoderLayer.forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, *args, **kwargs)
        calls.append((out[0] if isinstance(out, tuple) else out).requires_grad)
        return out

    monkeypatch.setattr(CLIPEncoderLayer, "forward", counted)
    losses, scores = run(tmp_path / "plain")
    plain = calls.copy()
    calls.clear()
    again, others = run(tmp_path / "checkpointed", gradient_checkpointing=True)
    assert calls == plain
    assert not any(calls)
    assert again == losses
    testing.assert_close(others, scores)
