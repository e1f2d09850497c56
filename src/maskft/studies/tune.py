"""Finding a recipe's learning rate: a study of one variant on a slice of its own data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskft.errors import RunError, StudyError
from maskft.recipe import FilesData, MaskMethod, Recipe, load_recipe
from maskft.runs import write_atomically, write_json
from maskft.studies.results import Result
from maskft.studies.work import Progress, run_study
from maskft.yamlfile import dump_yaml, read_yaml

RELATIVE_STEPS = (2e-4, 1e-2)
"""Of gates that have a slope: the published gate's learning rates of 0.01 to 0.5."""
RATES = {
    "mask": (0.01, 0.5),
    "projector": (1e-4, 1e-2),
    "full": (2e-6, 2e-4),
    "unilora": (1e-4, 1e-1),
}
"""Learning rates that are tried, by method."""
OTHER_RATES = (5e-5, 5e-3)
FEWEST_STEPS = 20
HELD_OUT = 0.1
"""Of the training rows, where the recipe names no validation part."""


@dataclass(frozen=True)
class Found:
    """What tuning found.

    Attributes:
        key: "method.relative_step" or "training.learning_rate".
        value: the best one.
        tried: a result for each trial, by value.
        output: the new recipe.
    """

    key: str
    value: float
    tried: list[Result]
    output: Path


def searched(recipe: Recipe) -> tuple[str, float, float]:
    """The key that is tuned, and its range."""
    if isinstance(recipe.method, MaskMethod):
        try:
            recipe.method.config().learning_rate(1.0)
        except ValueError:  # a hard gate has no slope
            return "training.learning_rate", *RATES["mask"]
        return "method.relative_step", *RELATIVE_STEPS
    return "training.learning_rate", *RATES.get(recipe.method.name, OTHER_RATES)


def study_of(recipe: Recipe, *, trials: int, share: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """The recipe to start from, without its learning rate, and the study's file, as mappings.

    A run on a slice of the data has as much fewer steps. The learning rates tried are spaced by equal factors.
    """
    key, low, high = searched(recipe)
    start = recipe.model_dump(mode="json")
    start["training"].pop("learning_rate", None)
    start["data"]["share"] = share * recipe.data.share
    for name in ("max_steps", "warmup_steps"):
        steps = start["training"].get(name, 0)
        if isinstance(steps, int) and steps > 0:
            start["training"][name] = min(
                steps, max(FEWEST_STEPS if name == "max_steps" else 1, math.ceil(steps * share))
            )
    data = recipe.data
    if isinstance(data, FilesData) and data.validation is None and not data.split.validation:
        start["data"]["split"]["validation"] = HELD_OUT
    study = {
        "title": "Learning rate",
        "recipe": "recipe.yaml",
        "variants": {"recipe": {}},
        "seeds": [recipe.training.get("seed", 0)],
        "tune": {
            "parameters": {key: {"low": low, "high": high, "log": True}},
            "trials": trials,
            "seed": recipe.training.get("seed", 0),
        },
        "measure": {"test": "none"},
    }
    return start, study


def tune(
    path: Path,
    output: Path,
    *,
    trials: int,
    share: float,
    work: Path,
    force: bool = False,
    storage: str | None = None,
    progress: Progress = lambda stage, done, of: None,
) -> Found:
    """Find a recipe's learning rate on a slice of its data and write the recipe with it.

    Args:
        path: the recipe.
        output: the new recipe.
        trials: learning rates tried.
        share: of the training rows, and of the steps.
        work: folder for the runs; a repeated call goes on there.
        force: write over `output`.
        storage, progress: as `run_study`.

    Raises:
        RunError: `output` exists.
        StudyError: no trial came to its end.
        RecipeError: the recipe cannot be used.
    """
    if output.exists() and not force:
        raise RunError(f"{output} already exists. Give --output another name, or --force to write over it.")
    if not 0 < share <= 1:
        raise StudyError(f"--share is {share}; it must be above 0 and at most 1.")
    start, study = study_of(load_recipe(path), trials=trials, share=share)
    work.mkdir(parents=True, exist_ok=True)
    write_atomically(work / "recipe.yaml", dump_yaml(start))
    write_json(work / "study.yaml", study)
    outcome = run_study(work / "study.yaml", work, storage=storage, only_tune=True, progress=progress)
    ((key, value),) = outcome.tuned["recipe", ""].items()
    tried = sorted(outcome.results, key=lambda result: float(result.tuned[key]))
    found = Found(key, float(value), tried, output)
    write_atomically(output, with_rate(path, found, share))
    return found


def with_rate(path: Path, found: Found, share: float) -> str:
    """The recipe's text with the value found: its own keys alone, under a comment that says how it was found."""
    content = read_yaml(path)
    section, _, name = found.key.partition(".")
    content.setdefault("training", {}).pop("learning_rate", None)
    content.setdefault(section, {})[name] = found.value
    if not content["training"]:
        del content["training"]
    best = next(result for result in found.tried if float(result.tuned[found.key]) == found.value)
    score = best.parts["validation"].tuned
    values = ", ".join(f"{float(result.tuned[found.key]):.4g}" for result in found.tried)
    comment = [
        f"# {found.key} was found by: maskft tune {path.name} --trials {len(found.tried)} --share {share:g}",
        f"# Tried, on {best.training.examples} training rows in {best.training.steps} steps: {values}.",
        f"# {found.value:.4g} answered {score.correct} of {score.examples} validation questions right.",
    ]
    return "\n".join([*comment, *_head(path), dump_yaml(content)])


def _head(path: Path) -> list[str]:
    """The comment at the head of a file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    head = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return lines[:head]
