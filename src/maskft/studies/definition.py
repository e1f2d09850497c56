"""A study's file: one typed, strict schema, and the runs that it spells out.

Settings are dotted keys of a recipe with their values, as in `maskft train RECIPE key=value`. They are applied in this
order: `overrides`, data set, variant, axes, tuned values, seed, and `toy` in a toy run.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from maskft.errors import StudyError, did_you_mean, gathered
from maskft.studies.sections import Axis, Measure, Paper, Parameter, Parameters, Settings, Tune, listed
from maskft.yamlfile import read_yaml

SEED = "training.seed"


def _by_name(value: Any) -> Any:
    return {key: {} for key in map(str, value)} if isinstance(value, list) else value


def _or_none(value: Any) -> Any:
    return {} if value is None else value


class Study(BaseModel):
    """What varies between runs, and what is measured."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    question: str = ""
    recipe: Path
    """Relative to the study's file."""
    overrides: Settings = {}
    variants: Annotated[dict[str, Settings], Field(min_length=1)]
    environment: dict[str, dict[str, str]] = {}
    """Environment variables of a variant's processes."""
    data: dict[str, Settings] = {}
    vary: dict[str, Annotated[Axis, BeforeValidator(listed)]] = {}
    seeds: Annotated[list[int], Field(min_length=1)] = [0]
    tune: Tune | None = None
    measure: Measure = Measure()
    after: Annotated[dict[str, Annotated[Settings, BeforeValidator(_or_none)]], BeforeValidator(_by_name)] = {}
    """Analyses of each finished run, by their names in maskft.studies.after, with their settings; a plain list in the
    file leaves all settings as they are."""
    across: list[str] = []
    """Analyses of runs that differ in their seeds, likewise."""
    keep_weights: bool | Literal["final"] = True
    """False removes what a run has learnt once its result is there, "final" its checkpoints alone; of tuning both are
    always removed."""
    plot: str | None = None
    """What the page draws: accuracy with its intervals against a key of `vary` or against `rho`; training loss against
    `step`; `gap`, accuracy lost from training to test questions, against training loss; `drift`, the mask's correlation
    with the last one, against steps. Default: accuracy with its intervals."""
    toy: Settings = {}
    paper: Paper | None = None
    paper_scale: str = ""
    """What the study takes at the size of a paper, in words."""

    @model_validator(mode="after")
    def _names_exist(self) -> Study:
        named = [*self.environment, *(self.tune.by_variant if self.tune else ())]
        named += self.paper.epochs if self.paper and isinstance(self.paper.epochs, dict) else ()
        for key, axis in self.vary.items():
            named += axis.variants or []
            if key == SEED:
                raise ValueError("seeds belong under seeds, not under vary")
        for name in named:
            if name not in self.variants:
                raise ValueError(f"there is no variant {name!r}.{did_you_mean(name, self.variants)}")
        if self.tune is not None and self.tune.data is not None and self.tune.data not in self.data:
            raise ValueError(f"there is no data set {self.tune.data!r}.{did_you_mean(self.tune.data, self.data)}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("a seed is given twice")
        if not self.keep_weights and (self.across or self.measure.test == "chosen"):
            raise ValueError("keep_weights is false, but across and measure.test: chosen need weights of finished runs")
        return self


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        stage: "tune" or "run".
        variant, data: names; data is "" where the study names no data sets.
        settings: values of the axes.
        seed: of the training.
        tuned: values that were chosen, or in the stage "tune" are tried.
        overrides: all of it for `load_recipe`.
        environment: variables of the process.
    """

    stage: str
    variant: str
    data: str
    seed: int
    overrides: tuple[str, ...]
    settings: Settings = field(default_factory=dict)
    tuned: Settings = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def group(self) -> tuple[str, str]:
        """Variant and data set: what is tuned together."""
        return self.variant, self.data

    @property
    def name(self) -> str:
        """Readable, and another for each run of a stage."""
        axes = [f"{key.rpartition('.')[2]}={_short(value)}" for key, value in self.settings.items()]
        pieces = [self.variant, self.data, *axes, f"seed{self.seed}"]
        return ".".join(_plain(piece) for piece in pieces if piece)

    def key(self, recipe: str) -> str:
        """Name and a hash of all that the run depends on; `recipe` is the content of the recipe's file."""
        content = json.dumps([recipe, self.stage, self.overrides, dict(self.environment)])
        return f"{self.name}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"


def load_study(path: Path) -> Study:
    """Read a study's file.

    Raises:
        StudyError: no such file, not YAML, an unknown key, a wrong value.
    """
    try:
        content = read_yaml(path)
    except OSError as error:
        raise StudyError(f"cannot read the study {path}: {error.strerror}.") from error
    except ValueError as error:
        raise StudyError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise StudyError(f"{path} must hold a mapping with the keys {', '.join(Study.model_fields)}.")
    try:
        study = Study.model_validate(content)
    except ValidationError as error:
        raise StudyError(f"{path}:\n{gathered([_explain(e) for e in error.errors()])}") from error
    found: dict[str, Any] = {"recipe": (path.parent / study.recipe).resolve()}
    if (paper := study.paper) is not None:
        config = paper.config and (path.parent / paper.config).resolve()
        found["paper"] = paper.model_copy(update={"recipe": (path.parent / paper.recipe).resolve(), "config": config})
    return study.model_copy(update=found)


def cells(study: Study, tuned: Mapping[tuple[str, str], Settings], *, toy: bool = False) -> list[Cell]:
    """The runs after tuning, in order; `tuned` holds what was chosen by variant and data set.

    A toy study has so few that each variant, data set and value of an axis occurs in one of them.
    """
    found = []
    for variant, data in groups(study):
        axes = {key: axis.values for key, axis in study.vary.items() if variant in (axis.variants or study.variants)}
        for values in itertools.product(*axes.values()):
            settings = dict(zip(axes, values, strict=True))
            found += [
                _cell(study, "run", variant, data, settings, tuned.get((variant, data), {}), seed, toy=toy)
                for seed in (study.seeds[:1] if toy else study.seeds)
            ]
    return _covering(found) if toy else found


def groups(study: Study) -> list[tuple[str, str]]:
    """Every variant with every data set."""
    return list(itertools.product(study.variants, study.data or [""]))


def tuned_groups(study: Study) -> list[tuple[str, str]]:
    """Those that have trials of tuning, one data set after the other."""
    found = [group for group in groups(study) if tuned_parameters(study, group[0])]
    only = study.tune.data if study.tune else None
    data = list(study.data or [""])
    return sorted((g for g in found if only in (None, g[1])), key=lambda group: data.index(group[1]))


def tuning_cell(study: Study, group: tuple[str, str], tried: Settings, *, toy: bool = False) -> Cell:
    """The run that tries these values: first values of the axes, the seed of tuning."""
    assert study.tune is not None
    variant, data = group
    axes = {k: axis.values[0] for k, axis in study.vary.items() if variant in (axis.variants or study.variants)}
    return _cell(study, "tune", variant, data, axes, tried, study.tune.seed, toy=toy)


def tuned_parameters(study: Study, variant: str) -> Parameters:
    """What is tuned of a variant; empty for nothing."""
    return {} if study.tune is None else study.tune.by_variant.get(variant, study.tune.parameters)


def grid_points(parameters: Parameters, trials: int) -> list[Settings]:
    """All combinations of the parameters' points; a range has `trials` of them, or where there are several parameters
    so many that about `trials` combinations come of it."""
    each = max(1, round(trials ** (1 / max(1, len(parameters)))))
    lists = [parameter.points(each) for parameter in parameters.values()]
    return [dict(zip(parameters, values, strict=True)) for values in itertools.product(*lists)]


def as_overrides(settings: Mapping[str, Any]) -> list[str]:
    """Settings as `load_recipe` takes them."""
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in settings.items()]


def _cell(
    study: Study, stage: str, variant: str, data: str, settings: Settings, tuned: Settings, seed: int, *, toy: bool
) -> Cell:
    assert stage == "run" or study.tune is not None
    layers = [
        study.overrides,
        study.data.get(data, {}),
        study.variants[variant],
        settings,
        study.tune.overrides if stage == "tune" and study.tune else {},
        tuned,
        {SEED: seed},
        study.toy if toy else {},
    ]
    overrides = tuple(override for layer in layers for override in as_overrides(layer))
    return Cell(
        stage,
        variant,
        data,
        seed,
        overrides,
        settings=settings,
        tuned=tuned,
        environment=study.environment.get(variant, {}),
    )


def _covering(found: Sequence[Cell]) -> list[Cell]:
    """Few cells that show every variant, data set and value: each is the first of those that show most that is new."""
    shown = {
        cell.name: {f"variant {cell.variant}", f"data {cell.data}", *as_overrides(cell.settings)} for cell in found
    }
    left = set[str]().union(*shown.values())
    kept = set()
    while left:
        best = max(shown, key=lambda name: len(shown[name] & left))
        kept.add(best)
        left -= shown[best]
    return [cell for cell in found if cell.name in kept]


def _short(value: Any) -> str:
    if isinstance(value, list):
        return "-".join(map(_short, value))
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def _plain(text: str) -> str:
    """The text as part of a file's name."""
    return "".join(c if c.isalnum() or c in "-_=." else "_" for c in text)


def _explain(error: Any) -> str:
    """One line for one of pydantic's errors."""
    loc: Iterable[Any] = error["loc"]
    key = ".".join(str(piece) for piece in loc) or "the file"
    if error["type"] == "extra_forbidden":
        sections: dict[str, type[BaseModel]] = {
            "tune": Tune,
            "measure": Measure,
            "paper": Paper,
            "vary": Axis,
            "parameters": Parameter,
            "by_variant": Parameter,
        }
        places = [piece for piece in list(loc)[:-1] if piece in sections]
        allowed = list((sections[places[-1]] if places else Study).model_fields)
        return f"unknown key '{key}'.{did_you_mean(str(list(loc)[-1]), allowed)} Allowed there: {', '.join(allowed)}."
    if error["type"] == "missing":
        return f"'{key}' is missing."
    return (
        f"'{key}' is {error['input']!r}: {error['msg'].removeprefix('Value error, ')}."
        if error["loc"]
        else error["msg"].removeprefix("Value error, ")
    )
