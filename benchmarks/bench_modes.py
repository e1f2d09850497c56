"""Does a memory mode cost quality? Short runs of the quick start in each mode, beside the plain fp32 version.

    python benchmarks/bench_modes.py [--steps 200] [--seeds 0 1 2] [--runs DIR] [--out FILE]

`plain` is one line of autograd for the masked layer and torch's AdamW on fp32 scores. All modes of one seed see the
same batches. Rows are appended to a CSV file; those already in it are not run again.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from common import append, one_mask, provenance

import maskft.training
import maskft.tuner.layer
from maskft.data import answer
from maskft.evaluation.generation import generate_answers
from maskft.evaluation.metrics import METRICS
from maskft.memory import MODES
from maskft.recipe import load_recipe
from maskft.runs import load_data, load_run
from maskft.trainer import make_trainer

QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
WAYS = ("plain", *MODES)
LAST = 50
"""Steps over which the final loss is averaged."""


def run(way: str, seed: int, steps: int, folder: Path) -> dict[str, Any]:
    """Train one run, or go on with it, and answer the test questions."""
    plain = way == "plain"
    overrides = {
        "method.memory": "fast" if plain else way,
        "training.max_steps": steps,
        "training.per_device_train_batch_size": 2,
        "training.logging_steps": 1,
        "training.save_steps": steps,
        "training.seed": seed,
        **({"training.optim": "adamw_torch"} if plain else {}),
    }
    recipe = load_recipe(QUICKSTART, [f"{key}={value}" for key, value in overrides.items()])

    def without_memory_mode(*args: Any, **kwargs: Any) -> Any:
        return make_trainer(*args, **{**kwargs, "memory": None})

    with (
        mock.patch.object(maskft.training, "make_trainer", without_memory_mode) if plain else nullcontext(),
        mock.patch.object(maskft.tuner.layer, "masked_linear", one_mask) if plain else nullcontext(),
    ):
        train = maskft.training.train(recipe, folder, say=partial(print, file=sys.stderr))["train"]
    losses = [entry["loss"] for entry in json.loads((folder / "log.json").read_text()) if "loss" in entry]
    assert len(losses) == steps
    loaded = load_run(folder)
    rows = list(load_data(recipe)["test"])
    limits = {"batch_size": recipe.evaluation.batch_size, "max_new_tokens": recipe.evaluation.max_new_tokens}
    answers = generate_answers(loaded.model, loaded.processor, rows, **limits)
    exact = METRICS[recipe.evaluation.metric]
    right = sum(exact(said, [answer(row)]) for said, row in zip(answers, rows, strict=True))
    return {
        "final_loss": f"{statistics.fmean(losses[-LAST:]):.4f}",
        "right": int(right),
        "questions": len(rows),
        "train_seconds": train["seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/modes"))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("modes.csv"))
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        way, seed = arguments.one
        print(json.dumps(run(way, int(seed), arguments.steps, arguments.runs / f"{way}-{seed}")))
        return
    done = set()
    if arguments.out.exists():
        with arguments.out.open(newline="") as file:
            done = {(row["mode"], int(row["seed"]), int(row["steps"])) for row in csv.DictReader(file)}
    for seed in arguments.seeds:
        for way in WAYS:
            if (way, seed, arguments.steps) in done:
                continue
            command = [
                sys.executable,
                __file__,
                "--steps",
                arguments.steps,
                "--runs",
                arguments.runs,
                "--one",
                way,
                seed,
            ]
            made = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(made.stdout.splitlines()[-1])
            append(arguments.out, [{**provenance(), "mode": way, "seed": seed, "steps": arguments.steps, **found}])
            print(way, seed, *(f"{key} {value}" for key, value in found.items()), flush=True)


if __name__ == "__main__":
    main()
