"""What a report shows of a run, read from its folder. Only the recipe is needed; what is missing is left out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maskft.analysis import LayerMask, Statistics, by_place, histogram, saved_masks, statistics
from maskft.errors import AdapterError, RunError
from maskft.measures import Place
from maskft.recipe import MaskMethod, Recipe
from maskft.runs import read_metrics, run_recipe

SAMPLE = 4096
"""Gates of each matrix that are looked at."""


@dataclass(frozen=True)
class RunView:
    """A run, as a report sees it.

    Attributes:
        folder: where it is.
        name: short, and another for each run of a report.
        recipe: as resolved.
        metrics: content of metrics.json; empty before training has finished.
        log: the training log.
        environment: versions and machine.
        records: of mask_stats.json.
        answers: test records, or validation's where there are no others.
        split: which of the two.
        masks: a sample of the gates of each matrix; empty where there is none, or where it depends on the base.
        places: statistics of that sample by place.
        remark: why there are no masks.
    """

    folder: Path
    name: str
    recipe: Recipe
    metrics: dict[str, Any]
    log: list[dict[str, Any]]
    environment: dict[str, Any]
    records: list[dict[str, Any]]
    answers: list[dict[str, Any]]
    split: str
    masks: list[LayerMask]
    places: dict[Place, Statistics]
    remark: str = ""
    bins: tuple[list[int], float] = field(default=([], 1.0))

    @property
    def start(self) -> float | None:
        """The gate at offset 0 where it is one number."""
        known = self.masks[0].start if self.masks else None
        return None if known is None else float(known.flatten()[0])


def gather(folders: Sequence[Path]) -> list[RunView]:
    """Read runs.

    Raises:
        RunError: a folder is not a run, or a file in it cannot be read.
        RecipeError: a recipe cannot be read.
    """
    names = short_names(folders)
    return [_view(folder, name) for folder, name in zip(folders, names, strict=True)]


def short_names(folders: Sequence[Path]) -> list[str]:
    """The last pieces of each path, as many as tell all of them apart; numbered where nothing does."""
    paths = [folder.absolute().parts for folder in folders]
    for length in range(1, max(map(len, paths)) + 1):
        names = ["/".join(parts[-length:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{folder.name} ({number})" for number, folder in enumerate(folders, 1)]


def _view(folder: Path, name: str) -> RunView:
    recipe = run_recipe(folder)
    split = next((s for s in ("test", "validation") if (folder / f"answers-{s}.jsonl").is_file()), "test")
    masks, remark = _masks(folder, recipe)
    return RunView(
        folder=folder,
        name=name,
        recipe=recipe,
        metrics=_guarded(folder / "metrics.json", lambda: read_metrics(folder)),
        log=_json(folder / "log.json", list),
        environment=_json(folder / "environment.json", dict),
        records=_json(folder / "mask_stats.json", dict).get("records", []),
        answers=_lines(folder / f"answers-{split}.jsonl"),
        split=split,
        masks=masks,
        places=by_place({mask.name: statistics(mask) for mask in masks}),
        remark=remark,
        bins=histogram(masks),
    )


def _masks(folder: Path, recipe: Recipe) -> tuple[list[LayerMask], str]:
    if not isinstance(recipe.method, MaskMethod):
        return [], f"This run's method is '{recipe.method.name}'; it has no mask."
    if not (folder / "adapter_model.safetensors").is_file():
        return [], "The run has not finished, so there is no mask yet."
    try:
        return list(saved_masks(folder, sample=SAMPLE)), ""
    except AdapterError as error:
        return [], f"The mask cannot be shown: {error}"


def _json(path: Path, kind: type) -> Any:
    """Content of a JSON file, empty where there is none."""
    if not path.is_file():
        return kind()
    content = _guarded(path, lambda: json.loads(path.read_text(encoding="utf-8")))
    if not isinstance(content, kind):
        raise RunError(f"{path} is not what a run writes there. Restore it, or remove it to leave that part out.")
    return content


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    lines = _guarded(path, lambda: path.read_text(encoding="utf-8")).splitlines()
    found: list[dict[str, Any]] = _guarded(path, lambda: [json.loads(line) for line in lines if line])
    return found


def _guarded(path: Path, read: Any) -> Any:
    try:
        return read()
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}. Restore it, or remove it to leave that part out.") from error


def curve(log: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) of every entry of a training log that has the key."""
    return [(entry["step"], entry[key]) for entry in log if _is_number(entry.get(key)) and "step" in entry]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value and abs(value) < 1e300


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        inner = isinstance(value, Mapping) and value
        found.update(flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value})
    return found


def settings(runs: Sequence[RunView]) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """What all recipes have in common, and by dotted key what differs, a value for each run."""
    trees = [flat(run.recipe.model_dump(mode="json")) for run in runs]
    keys = list(dict.fromkeys(key for tree in trees for key in tree))
    common, differing = {}, {}
    for key in keys:
        values = [tree.get(key) for tree in trees]
        if all(value == values[0] for value in values):
            common[key] = values[0]
        else:
            differing[key] = values
    return common, differing
