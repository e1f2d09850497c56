"""A study that trains in seconds: the tiny random model on pictures of one colour, each image another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.data.helpers import llava, write_json
from tests.evaluation.tiny import tiny_base

COLOURS = ("red", "blue", "lime")


def write_study(folder: Path, **content: Any) -> Path:
    """Write base, data, recipe and study into a folder; two variants and two seeds where nothing else is said."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    tiny_base(folder / "base")
    rows = []
    for i in range(12):
        colour = COLOURS[i % 3]
        image = Image.new("RGB", (28, 28), colour)
        image.putpixel((i, 0), (0, 0, 0))
        image.save(folder / f"{i}.png")
        rows.append(llava("<image>\nshape ?", colour, image=f"{i}.png", id=str(i)))
    recipe = {
        "model": {"base": str(folder / "base"), "dtype": "float32"},
        "data": {
            "kind": "files",
            "train": str(write_json(folder / "train.json", rows)),
            "split": {"validation": 0.25, "test": 0.25},
        },
        "training": {"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "save_strategy": "no"},
        "evaluation": {"max_new_tokens": 2},
    }
    write_json(folder / "recipe.yaml", recipe)
    study = {
        "title": "Colours",
        "recipe": "recipe.yaml",
        "variants": {"soft": {"method.gate": "soft"}, "centered": {"method.gate": "centered"}},
        "seeds": [0, 1],
        "environment": {name: {"TORCHDYNAMO_DISABLE": "1"} for name in content.get("variants", ("soft", "centered"))},
        "toy": {"model.base": str(folder / "base")},
        **content,
    }
    return write_json(folder / "colours.yaml", json.loads(json.dumps(study)))
