"""What is kept of one run of a study: a typed record, one JSON file a run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from maskft.errors import StudyError
from maskft.runs import write_json
from maskft.studies.definition import Cell
from maskft.studies.sections import Settings


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Score(_Record):
    """Mean score of answers with its 95 % intervals, as `maskft.evaluation.metrics.Accuracy`."""

    accuracy: float
    low: float
    high: float
    correct: int
    examples: int
    by_image_low: float | None = None
    by_image_high: float | None = None


class Part(_Record):
    """One part of the data, answered."""

    tuned: Score
    base: Score
    blind: Score
    outcomes: str
    """Score of each question's tuned answer, in order: digits where all are 0 or 1, else numbers with spaces."""
    answer_types: str | None = None
    """The type of each question's truth, in the same order, where it is known: "y" yes or no, "n" number, "o" other."""

    def scores(self) -> list[float]:
        """`outcomes` as numbers."""
        return [float(piece) for piece in (self.outcomes.split() if " " in self.outcomes else self.outcomes)]


class Training(_Record):
    """As `train` of a run's metrics.json, with the time of a step."""

    steps: int
    epochs: float
    examples: int
    loss: float | None
    """None where nothing was trained."""
    final_loss: float | None
    """Mean over the study's last steps; None where nothing was logged."""
    trainable_parameters: int
    base_parameters: int
    seconds: float
    step_seconds: float | None
    resumed_from_step: int | None
    peak_memory: int
    """Bytes: of the accelerator where there is one, else of the process."""


class Result(_Record):
    """A finished run.

    Attributes:
        study, stage, variant, data, settings, tuned, seed: which cell of which study it is.
        overrides: the settings applied to the study's recipe.
        environment: variables of the process.
        recipe: as resolved, without the machine's paths.
        metric: how answers are scored.
        parts: scores by "train" (a slice), "validation" and "test", of those that were answered.
        log: the training log.
        after: what analyses found, by name.
        wall_seconds: training, answering and analyses; of the last process, where several worked on the run.
        data_fingerprint: SHA-256 over the rows' texts and images; of images in files over their sizes.
        base_fingerprint: SHA-256 over the base's weights.
    """

    format: Literal[1] = 1
    study: str
    stage: Literal["tune", "run"]
    variant: str
    data: str
    settings: dict[str, Any]
    tuned: dict[str, Any]
    seed: int
    overrides: list[str]
    environment: dict[str, str]
    recipe: dict[str, Any]
    metric: str
    parts: dict[str, Part]
    training: Training
    log: list[dict[str, Any]]
    after: dict[str, Any]
    wall_seconds: float
    packages: dict[str, str]
    python: str
    machine: dict[str, Any]
    commit: str | None
    data_fingerprint: str
    base_fingerprint: str

    def best_epoch(self) -> float | None:
        """Epochs until the loss on the validation part was lowest; None where it was not measured."""
        seen = [(entry["eval_loss"], entry["epoch"]) for entry in self.log if "eval_loss" in entry]
        return min(seen)[1] if seen else None

    def value(self, choose: str) -> float:
        """What runs are chosen by, the larger the better: "accuracy" on validation, or minus the final "loss".

        Raises:
            StudyError: it was not measured.
        """
        if choose == "accuracy":
            if "validation" not in self.parts:
                raise StudyError("runs are chosen by accuracy on the validation part, but the data has none.")
            return self.parts["validation"].tuned.accuracy
        losses = (self.training.final_loss, self.training.loss)
        return next((-loss for loss in losses if loss is not None), -math.inf)


def final_loss(log: Sequence[Mapping[str, Any]], last: int) -> float | None:
    """Mean of the logged training losses of the last so many steps, each the mean since the entry before it."""
    logged = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry and "step" in entry]
    if not logged:
        return None
    losses = [loss for step, loss in logged if step > logged[-1][0] - last]
    return math.fsum(losses) / len(losses)


def packed_outcomes(scores: Sequence[float]) -> str:
    """Scores as `Part.outcomes` holds them."""
    if all(score in (0, 1) for score in scores):
        return "".join(str(int(score)) for score in scores)
    return " ".join(f"{score:.4g}" for score in scores) + (" " if len(scores) == 1 else "")


def best(trials: Sequence[Result], choose: str) -> int:
    """Which trial of tuning is chosen; between equals the smallest final loss decides.

    Equal are those whose accuracy on n validation questions is within a standard error, sqrt(p (1 - p) / n), of the
    best, p: what so few questions cannot tell apart, the loss over many training rows may.

    Raises:
        StudyError: as `Result.value`.
    """
    values = [trial.value(choose) for trial in trials]
    least = max(values)
    if choose == "accuracy":
        least -= math.sqrt(least * (1 - least) / trials[values.index(least)].parts["validation"].tuned.examples)
    equals = [i for i, value in enumerate(values) if value >= least]
    return max(equals, key=lambda i: trials[i].value("loss"))


def chosen_settings(results: Sequence[Result], choose: str) -> dict[tuple[str, str], list[Settings]]:
    """By variant and data set, the axis values whose mean over the seeds is best; ties are all kept."""
    by_group: dict[tuple[str, str], dict[str, list[Result]]] = {}
    for result in results:
        settings = json.dumps(result.settings, sort_keys=True)
        by_group.setdefault((result.variant, result.data), {}).setdefault(settings, []).append(result)
    chosen = {}
    for group, found in by_group.items():
        means = {key: sum(r.value(choose) for r in same) / len(same) for key, same in found.items()}
        chosen[group] = [found[key][0].settings for key, mean in means.items() if mean == max(means.values())]
    return chosen


def result_name(result: Result) -> str:
    """Name of a result's file, without its ending."""
    tried = {key: value for key, value in result.tuned.items() if result.stage == "tune"}
    settings = {**result.settings, **tried}
    name = Cell(result.stage, result.variant, result.data, result.seed, (), settings=settings).name
    return f"tune.{name}" if result.stage == "tune" else name


def identity(result: Result) -> str:
    """What tells the runs of a stage apart."""
    return json.dumps([result.variant, result.data, result.settings, result.seed], sort_keys=True)


def write_result(path: Path, result: Result) -> None:
    """Write a result as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result.model_dump(mode="json"))


def write_named(folder: Path, result: Result) -> None:
    """Write a result into a folder, by its name."""
    write_result(folder / f"{result_name(result)}.json", result)


def read_result(path: Path) -> Result:
    """Read a result.

    Raises:
        StudyError: it cannot be read or is none.
    """
    try:
        return Result.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError, ValidationError) as error:
        raise StudyError(f"{path} is not a study's result: {error}") from error


def read_results(folder: Path) -> list[Result]:
    """All results in a folder, by file name."""
    return [read_result(path) for path in sorted(folder.glob("*.json"))]
