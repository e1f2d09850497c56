"""Run folders made up, with everything that a report shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from maskft.analysis import saved_masks, statistics
from maskft.runs import write_json
from tests.adapters.helpers import saved

STEPS = (0, 10, 20, 30)
HOSTILE = "</title></script><script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{ 7 * 7 }}&amp;"


def score(right: int, of: int = 12) -> dict[str, Any]:
    return {
        "accuracy": right / of,
        "low": right / of / 2,
        "high": min(1.0, right / of + 0.2),
        "correct": right,
        "examples": of,
    }


def make_run(folder: Path, seed: int = 0, text: str = "", **fields: Any) -> Path:
    """A finished and evaluated run; `text` is put into every string that a user can choose."""
    saved(folder, seed=seed + 1, **fields)
    method = f"{{gate: {fields.get('gate', 'soft')}, storage: {'bits' if fields.get('bits') else 'float32'}}}"
    recipe = (
        f"method: {method}\ndata: {{kind: files, train: {json.dumps('/data/' + text)}}}\ntraining: {{seed: {seed}}}\n"
    )
    (folder / "recipe.yaml").write_text(recipe)
    write_json(folder / "metrics.json", metrics(seed))
    write_json(
        folder / "environment.json", {"packages": {"torch": "2.13.0" + text}, "machine": {"cores": 2}, "commit": None}
    )
    log = [
        {"loss": 1.5 / (1 + step) + 0.01 * seed, "mean_token_accuracy": 0.5 + step / 100, "step": step}
        for step in STEPS[1:]
    ]
    write_json(folder / "log.json", [*log, {"eval_loss": 0.4, "step": 30}, {"train_loss": 0.4, "step": 30}])
    write_json(folder / "mask_stats.json", records(folder))
    colours = ("red", "green", "blue", "gold")
    lines = []
    for number in range(12):
        path = folder / f"{number}.png"
        Image.new("RGB", (300, 200), colours[number % 4]).save(path)
        base = "yes" if number % 3 == 0 else f"no {number}{text}"
        tuned = "yes" if number % 2 == 0 else "no"
        question = f"Question {number}?{text}\nAnswer shortly."
        image = {0: str(path), 1: str(folder / "gone.png"), 2: None}.get(number % 5, str(path))
        lines.append({"id": number, "question": question, "image": image, "truth": "yes", "base": base, "tuned": tuned})
    (folder / "answers-test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def metrics(seed: int) -> dict[str, Any]:
    train = {"seconds": 12.5 + seed, "steps": 30, "loss": 0.4, "trainable_parameters": 1000, "peak_memory_bytes": 10**9}
    tuned = {**score(6), "by_image_low": 0.3, "by_image_high": 0.7}
    return {
        "train": {**train, "best_step": None},
        "metric": "exact",
        "base": score(4),
        "blind": score(5),
        "tuned": tuned,
    }


def records(folder: Path) -> dict[str, Any]:
    masks = {mask.name.removeprefix("base_model.model."): statistics(mask) for mask in saved_masks(folder)}
    far = [found.distance or 0.0 for found in masks.values()]

    def at(step: int) -> dict[str, Any]:
        overall = {"mean": 0.9, "distance": step / 100, "moved": step / 30, "change": step / 200}
        return {"step": step, "overall": overall, "modules": {"distance": [value * step / 30 for value in far]}}

    gates = [found.gates for found in masks.values()]
    return {
        "sampled": 1024,
        "modules": list(masks),
        "gates": gates,
        "hard": False,
        "records": [at(step) for step in STEPS],
    }
