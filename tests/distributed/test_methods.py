"""Other methods than masks on two processes: the losses are those of one, and the result loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from maskft.recipe import load_recipe
from maskft.runs import load_run
from maskft.training import train
from tests.distributed.launch import launch
from tests.distributed.test_command import MODULES, losses, recipe
from tests.test_methods import METHODS

__all__ = ["recipe"]  # a fixture
SHORT = ("training.max_steps=4", "training.learning_rate=0.01", "training.save_strategy=no")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("ddp", name) for name in ("lora", "unilora", "hira", "lora and projector", "full", "random mask")),
        *(("fsdp2", name) for name in ("lora", "hira", "lora and projector", "full", "random mask")),
    ],
)
def test_two_processes_train_as_one(kind: str, name: str, recipe: Path, tmp_path: Path) -> None:
    method = f"method={METHODS[name]}"
    train(load_recipe(recipe, [method, *SHORT]), tmp_path / "alone")
    halves = ("training.per_device_train_batch_size=2", f"training.use_cpu={str(kind == 'ddp').lower()}")
    run = tmp_path / "together"
    done = launch(kind, MODULES[kind], "train", recipe, method, *SHORT, *halves, "--output", run)
    assert done.returncode == 0, done.stderr[-4000:]
    steps = json.loads((run / "metrics.json").read_text())["train"]["steps"]
    assert steps == (0 if name == "random mask" else 4)
    if steps:
        torch.testing.assert_close(
            torch.tensor(losses(run)), torch.tensor(losses(tmp_path / "alone")), rtol=0, atol=1e-5
        )
    alone, together = (load_run(folder).model.state_dict() for folder in (tmp_path / "alone", run))
    for key, tensor in alone.items():
        torch.testing.assert_close(together[key], tensor, rtol=0, atol=1e-4)
