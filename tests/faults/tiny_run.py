"""A recipe that trains in seconds: a tiny random model on pictures of one colour."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.data.helpers import llava, png, write_json
from tests.evaluation.tiny import tiny_base

COLOURS = ("red", "blue", "lime")


def write_recipe(folder: Path, **training: Any) -> Path:
    """Write base, data and recipe into a new folder; checkpoints after every second of eight steps."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_base(folder / "base")
    rows = []
    for i in range(12):
        colour = COLOURS[i % 3]
        png(folder / f"{i}.png", colour)
        rows.append(llava(f"<image>\n{'shape ' * (i % 4)}?", colour, image=f"{i}.png"))
    arguments = {
        "max_steps": 8,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.05,
        "logging_steps": 1,
        "save_steps": 2,
        **training,
    }
    content = {
        "model": {"base": str(folder / "base"), "dtype": "float32"},
        "data": {"kind": "files", "train": str(write_json(folder / "train.json", rows))},
        "training": arguments,
    }
    return write_json(folder / "recipe.yaml", content)
