"""A run folder: what training writes and everything after reads.

recipe.yaml                 the resolved recipe, written before the first step
environment.json            package versions, machine, commit
checkpoints/checkpoint-N/   for resuming
adapter_model.safetensors   the result (others after stage 1 and full fine-tuning: maskft.learnt)
adapter_config.json
log.json                    the training log, one entry a logging step
metrics.json                train, and after `maskft evaluate`: metric, base, tuned, blind, test_examples,
                                by_answer_type (those of another split under its name)
answers-<split>.jsonl       every test question with both answers
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import subprocess
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from maskft.data import leaked_images, load_easy_vqa, read, split_by_image, to_dataset
from maskft.data.easy_vqa import questions_of
from maskft.data.images import image_names
from maskft.data.turns import join_turns
from maskft.errors import DataError, RecipeError, RunError
from maskft.learnt import before_training, put_on, result_name
from maskft.recipe import EasyVqaData, Recipe, load_recipe
from maskft.vlm.load import load_model, load_processor

RECIPE = "recipe.yaml"
METRICS = "metrics.json"
_PACKAGES = ("maskft", "torch", "transformers", "peft", "trl", "accelerate", "datasets", "safetensors")


def write_atomically(path: Path, text: str) -> None:
    """Replace the file's content in one step, so that a reader or a crash never sees half of it."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON atomically."""
    write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_metrics(run: Path) -> dict[str, Any]:
    """The run's metrics, empty before training has finished.

    Raises:
        RunError: the file is damaged.
    """
    path = run / METRICS
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is not valid JSON: {error}. Remove it and repeat the command that wrote it.") from error
    if not isinstance(content, dict):
        raise RunError(f"{path} holds no object. Remove it and repeat the command that wrote it.")
    return content


def update_metrics(run: Path, new: Mapping[str, Any]) -> dict[str, Any]:
    """Merge top-level entries into metrics.json and return the whole."""
    metrics = {**read_metrics(run), **new}
    write_json(run / METRICS, metrics)
    return metrics


def environment() -> dict[str, Any]:
    """Package versions, machine and source commit, for the record of a run."""
    try:
        here = Path(__file__).parent
        commit = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    return {
        "packages": {name: metadata.version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "machine": {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count()},
        "commit": commit or None,
    }


def run_recipe(run: Path) -> Recipe:
    """The recipe a run was made with.

    Raises:
        RunError: the folder is not a run.
    """
    if not (run / RECIPE).is_file():
        raise RunError(
            f"{run} is not a run folder: {RECIPE} is missing. Make one with: maskft train RECIPE --output DIR"
        )
    return load_recipe(run / RECIPE)


def load_data(recipe: Recipe) -> dict[str, Any]:
    """The recipe's data sets by split: "train", and "validation" and "test" where there are any.

    Raises:
        DataError: a file has a flaw, or two parts share images.
        RecipeError: a part is given twice.
    """
    parts = _whole_data(recipe)
    if recipe.data.share < 1:
        rows = np.random.default_rng(recipe.data.share_seed).permutation(len(parts["train"]))
        kept = sorted(rows[: max(1, round(recipe.data.share * len(rows)))].tolist())
        parts["train"] = parts["train"].select(kept)
    return parts


def training_questions(recipe: Recipe, train: Any) -> Any:
    """The rows of the training part as they are asked in an evaluation: one question each, where `turns` joined them.

    Args:
        recipe: whose data it is.
        train: its training part by `load_data`.
    """
    if recipe.data.turns == 1:
        return train
    data = recipe.data.model_copy(update={"turns": 1, **_all(recipe)})
    rows = _whole_data(recipe.model_copy(update={"data": data}))["train"]
    seen = {question for row in train for question in _asked(row)}
    return rows.select([i for i, row in enumerate(rows) if _asked(row) <= seen])


def _asked(row: Mapping[str, Any]) -> set[Hashable]:
    """Each question of a row with the images it is asked about."""
    images = image_names(row)
    return {(images, question) for question, _ in questions_of(row)}


def _all(recipe: Recipe) -> dict[str, Any]:
    """Settings of the data section with which every training row is loaded."""
    if not isinstance(recipe.data, EasyVqaData):
        return {}
    return {"limits": {name: rows for name, rows in recipe.data.limits.items() if name != "train"}}


def _whole_data(recipe: Recipe) -> dict[str, Any]:
    data = recipe.data
    if isinstance(data, EasyVqaData):
        return load_easy_vqa(data.part, limits=data.limits, seed=data.seed, turns=data.turns, balanced=data.balanced)
    split = data.split
    for name in ("validation", "test"):
        if getattr(data, name) is not None and getattr(split, name) > 0:
            raise RecipeError(f"data.{name} and data.split.{name} are both set; keep one.")
    parts = {"train": read(data.train, format=data.format, image_root=data.image_root)}
    if split.validation or split.test:
        parts = split_by_image(parts["train"], validation=split.validation, test=split.test, seed=split.seed)
    for name in ("validation", "test"):
        path = getattr(data, name)
        if path is not None:
            parts[name] = read(path, format=data.format, image_root=data.image_root)
    _refuse_leaks(parts)
    if data.turns > 1:
        parts["train"] = to_dataset(join_turns(parts["train"], data.turns))
    return {name: part for name, part in parts.items() if len(part)}


def _refuse_leaks(parts: Mapping[str, Any]) -> None:
    for first, second in (("train", "validation"), ("train", "test"), ("validation", "test")):
        if first in parts and second in parts and (shared := leaked_images(parts[first], parts[second])):
            raise DataError(
                f"{shared} images of the {first} part appear in the {second} part too; held-out parts must hold other "
                "images. Remove them, or let data.split hold out parts of the training file by image."
            )


@dataclass(frozen=True)
class LoadedRun:
    """A finished run in memory: the tuned model, with the way back to its base."""

    folder: Path
    recipe: Recipe
    model: Any
    processor: Any
    _base_state: Mapping[str, Any] | None = None
    _parts: Mapping[str, Any] | None = None

    @functools.cached_property
    def parts(self) -> Mapping[str, Any]:
        """The recipe's data sets by split; errors as `load_data`."""
        return load_data(self.recipe) if self._parts is None else self._parts

    @functools.cached_property
    def asked(self) -> Mapping[str, Any]:
        """These data sets with one question in each training row, also where `turns` joined several."""
        return {**self.parts, "train": training_questions(self.recipe, self.parts["train"])}

    @contextlib.contextmanager
    def base(self) -> Iterator[Any]:
        """The model as it was before training, for the duration of the block."""
        with before_training(self.model, self._base_state, result_name(self.recipe.method)) as model:
            yield model


def load_run(run: Path, parts: Mapping[str, Any] | None = None) -> LoadedRun:
    """Load base, processor and what the run learnt.

    Args:
        run: a finished run's folder.
        parts: the recipe's data sets, where they are loaded already.

    Raises:
        RunError: not a run folder, or training has not finished.
        AdapterError: the adapter is damaged or belongs to another base.
    """
    recipe = run_recipe(run)
    result = result_name(recipe.method)
    if not (run / result).is_file():
        raise RunError(f"the run {run} has not finished: {result} is missing. Resume it with the same train command.")
    section = recipe.model
    processor = load_processor(section.base, trust_remote_code=section.trust_remote_code)
    model = load_model(
        section.base,
        dtype=section.dtype,
        attention=section.attention,
        trust_remote_code=section.trust_remote_code,
        quantization=section.quantization,
    )
    tuned, before = put_on(model, run, result)
    return LoadedRun(run, recipe, tuned, processor, before, parts)
