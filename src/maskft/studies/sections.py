"""Sections of a study's file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Settings = dict[str, Any]
"""Values by dotted key of a recipe."""
INSTRUCTION_ROWS = 665_298
"""Of LLaVA-1.5's llava_v1_5_mix665k.json."""
Epochs = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def listed(value: Any) -> Any:
    """A plain list as the values of an axis or a parameter."""
    return {"values": value} if isinstance(value, list) else value


class Axis(Section):
    """Values of a key, for all variants or some; a plain list in the file means all."""

    values: Annotated[list[Any], Field(min_length=1)]
    variants: list[str] | None = None


class Parameter(Section):
    """What a tuned key may be: a list of values, or a range; a plain list in the file means values."""

    values: Annotated[list[Any], Field(min_length=1)] | None = None
    low: float | None = None
    high: float | None = None
    log: bool = False

    @model_validator(mode="after")
    def _one_of_both(self) -> Parameter:
        ranged = self.low is not None and self.high is not None
        if ranged == (self.values is not None) or (self.low is None) != (self.high is None):
            raise ValueError("give a list of values, or low and high")
        if (
            self.low is not None
            and self.high is not None
            and not (self.low < self.high and (self.low > 0 or not self.log))
        ):
            raise ValueError("low must be below high, and above 0 with log")
        return self

    def points(self, count: int) -> list[Any]:
        """The values, or `count` points of the range with equal steps (equal factors with log), ends included."""
        if self.values is not None:
            return list(self.values)
        assert self.low is not None
        assert self.high is not None
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        spaced = [low + (high - low) * n / (count - 1) for n in range(count)] if count > 1 else [(low + high) / 2]
        rounded = (float(f"{math.exp(point) if self.log else point:.4g}") for point in spaced)
        return [min(max(point, self.low), self.high) for point in rounded]


Parameters = dict[str, Annotated[Parameter, BeforeValidator(listed)]]


class Tune(Section):
    """The first stage: for each variant and data set, trials that are chosen from on the validation part."""

    parameters: Parameters
    by_variant: dict[str, Parameters] = {}
    """In place of `parameters` for a variant; {} leaves it as it is."""
    trials: Annotated[int, Field(gt=0)] = 4
    """For each variant and data set."""
    sampler: Literal["grid", "random", "tpe"] = "grid"
    pruner: Literal["none", "median"] = "none"
    """median stops a trial whose training loss is above the median of the earlier ones at the same step."""
    seed: int = 0
    data: str | None = None
    """Tune on this data set alone; what is chosen there serves all of them."""
    overrides: Settings = {}
    """Of tuning alone, for example fewer steps."""


class Measure(Section):
    """What is measured of a run, and what runs are chosen by."""

    choose: Literal["accuracy", "loss"] = "accuracy"
    """accuracy on the validation part, or the training loss of the last steps."""
    validation: bool = True
    test: Literal["all", "chosen", "none"] = "all"
    """Which runs answer the test part: all that were not for tuning, or of each variant and data set those with the
    axis values that are best on average over the seeds."""
    train_questions: Annotated[int, Field(ge=0)] = 0
    """So many training questions are answered too."""
    loss_every: Annotated[int, Field(ge=0)] = 0
    """The loss on validation rows is measured every so many steps of a run, to tell when it was lowest; 0 never."""
    loss_rows: Annotated[int, Field(gt=0)] = 100
    """So many validation rows, the first."""
    last_steps: Annotated[int, Field(gt=0)] = 50
    """The final loss is the mean over so many steps."""

    @model_validator(mode="after")
    def _can_choose(self) -> Measure:
        if self.test == "chosen" and self.choose == "accuracy" and not self.validation:
            raise ValueError("what is tested is chosen by accuracy on validation, so validation cannot be false")
        return self


def watching(every: int) -> list[str]:
    """What to override of a recipe for a loss on the validation part every so many steps; nothing for 0."""
    return ["training.eval_strategy=steps", f"training.eval_steps={every}"] if every else []


class Paper(Section):
    """The study with another recipe: its variants' methods on a model and on data of a paper's size."""

    recipe: Path
    """Relative to the study's file."""
    config: Path | None = None
    """Folder with the config.json of the recipe's base, relative likewise; None where the base itself is there."""
    gpus: Annotated[int, Field(gt=0)] = 8
    gpu: str = "80GB"
    """Memory of each."""
    rows: Annotated[int, Field(gt=0)] = INSTRUCTION_ROWS
    """Of an epoch."""
    epochs: Epochs | dict[str, Epochs] = 1.0
    """Of a run; by variant where they differ, and one for variants that are not named."""
