"""A base that no process may hold trains on four of them."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from maskft.recipe import load_recipe
from maskft.runs import load_run
from maskft.training import train
from tests.data.helpers import llava, png, write_json
from tests.distributed.big import big_base
from tests.distributed.launch import ROOT, launch
from tests.distributed.script import WORDS
from tests.distributed.test_command import losses

PROCESSES = 4
STEPS = 1
ROWS = 16
pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA and /proc are Linux's")]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A folder and the bytes of its weights."""
    folder = tmp_path_factory.mktemp("big")
    return folder, big_base(folder, layers=32)


def write_recipe(base: Path, folder: Path) -> Path:
    draw = random.Random(0)
    rows = []
    for i in range(ROWS):
        colour = draw.choice(["red", "blue", "lime"])
        png(folder / f"{i}.png", colour)
        rows.append(llava(f"<image>\n{' '.join(draw.choices(WORDS, k=2))}?", colour, image=f"{i}.png"))
    content: dict[str, Any] = {
        "model": {"base": str(base), "dtype": "float32"},
        "data": {"kind": "files", "train": str(write_json(folder / "train.json", rows))},
        "method": {"name": "mask", "scope": ["language"], "layers": "0-1"},
        "training": {
            "max_steps": STEPS,
            "per_device_train_batch_size": PROCESSES,
            "learning_rate": 0.05,
            "adam_epsilon": 1e-8,  # next to which the rounding of most gradients is nothing
            "logging_steps": 1,
            "save_strategy": "no",
        },
    }
    return write_json(folder / "recipe.yaml", content)  # YAML reads JSON


def test_a_base_larger_than_any_process(base: tuple[Path, int], tmp_path: Path) -> None:
    folder, size = base
    limit = int(0.95 * size)
    recipe = write_recipe(folder, tmp_path)
    peaks = tmp_path / "peaks"
    peaks.mkdir()

    # one process alone cannot load it under this bound
    whole = subprocess.run(
        [sys.executable, "-m", "tests.distributed.limited", str(limit), str(peaks), "whole", str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert whole.returncode != 0
    assert "memory" in whole.stderr.splitlines()[-1].lower(), whole.stderr[-2000:]

    # four can train on it
    arguments = ["train", recipe, "training.per_device_train_batch_size=1", "training.use_cpu=false"]
    run = tmp_path / "pieces"
    options = ("--num_processes", str(PROCESSES))
    done = launch("fsdp2", "tests.distributed.limited", limit, peaks, *arguments, "--output", run, options=options)
    assert done.returncode == 0, done.stderr[:4000]  # the launcher's own traceback comes after
    found = {path.name: int(path.read_text()) for path in peaks.iterdir()}
    assert len(found) == PROCESSES
    assert max(found.values()) < limit, found

    # and learn what one does that is free to hold it
    alone = tmp_path / "alone"
    train(load_recipe(recipe), alone)
    measured = {"base": size, "limit": limit, "peaks": found, "pieces": losses(run), "alone": losses(alone)}
    write_json(tmp_path / "measured.json", measured)
    torch.testing.assert_close(torch.tensor(losses(run)), torch.tensor(losses(alone)), rtol=0, atol=1e-5)
    pieces, expected = (load_file(path / "adapter_model.safetensors") for path in (run, alone))
    assert pieces.keys() == expected.keys()
    moved = max(tensor.abs().max().item() for tensor in expected.values())
    assert moved > 0.01
    for name, tensor in expected.items():
        torch.testing.assert_close(pieces[name], tensor, rtol=0, atol=1e-4)  # a few gradients are as small as epsilon
    fingerprints = [json.loads((path / "adapter_config.json").read_text())["base_fingerprint"] for path in (run, alone)]
    assert fingerprints[0] == fingerprints[1] is not None
    assert load_run(run).folder == run  # on one process, where the base is checked
