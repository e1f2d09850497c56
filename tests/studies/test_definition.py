"""What a study's file may say, and the runs that come of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from maskft.errors import StudyError
from maskft.recipe import load_recipe
from maskft.studies.definition import (
    Study,
    cells,
    grid_points,
    load_study,
    tuned_parameters,
    tuning_cell,
)
from maskft.studies.sections import Parameter

ROOT = Path(__file__).parents[2]
STUDIES = sorted((ROOT / "studies").glob("*.yaml"))


def study(**content: Any) -> Study:
    return Study.model_validate(
        {"title": "t", "recipe": "r.yaml", "variants": {"a": {}, "b": {"method.gate": "soft"}}, **content}
    )


def refused(tmp_path: Path, **content: Any) -> str:
    path = tmp_path / "s.yaml"
    path.write_text(json.dumps({"title": "t", "recipe": "r.yaml", "variants": {"a": {}}, **content}))
    with pytest.raises(StudyError) as caught:
        load_study(path)
    return str(caught.value)


def test_cells_are_all_combinations() -> None:
    found = cells(study(vary={"method.init_gate": [0.9, 0.98]}, data={"x": {}, "y": {}}, seeds=[0, 1, 2]), {})
    assert len(found) == len({cell.name for cell in found}) == 2 * 2 * 2 * 3
    assert found[0].name == "a.x.init_gate=0.9.seed0"


def test_later_settings_win() -> None:
    made = study(
        overrides={"training.max_steps": 5},
        data={"x": {"data": {"kind": "easy-vqa"}}},
        tune={"parameters": {"training.learning_rate": [0.1]}, "overrides": {"training.max_steps": 3}},
        toy={"training.max_steps": 1},
    )
    (cell, *_) = cells(made, {("b", "x"): {"training.learning_rate": 0.1}})
    tuning = tuning_cell(made, ("b", "x"), {"training.learning_rate": 0.2})
    tuned = next(cell for cell in cells(made, {("b", "x"): {"training.learning_rate": 0.1}}) if cell.variant == "b")
    assert cell.overrides == ("training.max_steps=5", 'data={"kind": "easy-vqa"}', "training.seed=0")
    assert tuned.overrides[-2:] == ("training.learning_rate=0.1", "training.seed=0")
    assert tuning.overrides[2:] == (
        'method.gate="soft"',
        "training.max_steps=3",
        "training.learning_rate=0.2",
        "training.seed=0",
    )
    assert cells(made, {}, toy=True)[0].overrides[-1] == "training.max_steps=1"


def test_an_axis_may_be_for_some_variants() -> None:
    found = cells(study(vary={"method.rank": {"values": [4, 8], "variants": ["b"]}}), {})
    assert [cell.name for cell in found] == ["a.seed0", "b.rank=4.seed0", "b.rank=8.seed0"]


def test_a_toy_study_shows_every_value_once() -> None:
    big = study(vary={"x.y": [1, 2, 3], "x.z": [1, 2]}, data={"d": {}, "e": {}}, seeds=[0, 1])
    found = cells(big, {}, toy=True)
    assert len(found) < 10
    assert {cell.data for cell in found} == {"d", "e"}
    assert {cell.settings["x.y"] for cell in found} == {1, 2, 3}
    assert {cell.seed for cell in found} == {0}


def test_keys_tell_definitions_apart() -> None:
    before, after = (cells(study(overrides={"training.max_steps": n}), {})[0] for n in (1, 2))
    assert before.name == after.name
    assert before.key("recipe") != after.key("recipe")
    assert before.key("recipe") != before.key("another")
    assert before.key("recipe") == cells(study(overrides={"training.max_steps": 1}), {})[0].key("recipe")


def test_points_of_a_range() -> None:
    assert Parameter(low=0.001, high=0.1, log=True).points(3) == [0.001, 0.01, 0.1]
    assert Parameter(low=0.0, high=1.0).points(3) == [0.0, 0.5, 1.0]
    assert Parameter(low=0.0, high=1.0).points(1) == [0.5]
    assert grid_points({"a": Parameter(values=[1, 2]), "b": Parameter(values=[3])}, 9) == [
        {"a": 1, "b": 3},
        {"a": 2, "b": 3},
    ]


def test_tuning_by_variant() -> None:
    made = study(tune={"parameters": {"x": [1]}, "by_variant": {"a": {}}})
    assert tuned_parameters(made, "a") == {}
    assert list(tuned_parameters(made, "b")) == ["x"]
    assert tuned_parameters(study(), "b") == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"seed": [1]}, "unknown key 'seed'. Did you mean 'seeds'?"),
        ({"measure": {"tests": "all"}}, "unknown key 'measure.tests'. Did you mean 'test'?"),
        ({"variants": {}}, "'variants' is {}"),
        ({"environment": {"c": {}}}, "there is no variant 'c'"),
        ({"vary": {"x": {"values": [1], "variants": ["c"]}}}, "there is no variant 'c'"),
        ({"vary": {"training.seed": [1]}}, "seeds belong under seeds"),
        ({"seeds": [1, 1]}, "a seed is given twice"),
        ({"measure": {"test": "chosen", "validation": False}}, "validation cannot be false"),
        ({"keep_weights": False, "across": ["agreement"]}, "keep_weights is false, but across"),
        ({"tune": {"parameters": {"x": [1]}, "data": "c"}, "data": {"d": {}}}, "there is no data set 'c'"),
        ({"tune": {}}, "'tune.parameters' is missing"),
        ({"tune": {"parameters": {"x": {"low": 1.0}}}}, "give a list of values, or low and high"),
        ({"tune": {"parameters": {"x": {"low": 1.0, "high": 0.5}}}}, "low must be below high"),
        ({"tune": {"parameters": {"x": {"low": 0.0, "high": 0.5, "log": True}}}}, "above 0 with log"),
    ],
)
def test_mistakes_are_explained(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    assert message in refused(tmp_path, **content)


def test_files_that_are_no_study(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="cannot read the study"):
        load_study(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("[1]")
    with pytest.raises(StudyError, match="must hold a mapping with the keys title"):
        load_study(tmp_path / "list.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(StudyError, match="is not valid YAML"):
        load_study(tmp_path / "bad.yaml")


@pytest.mark.parametrize("path", STUDIES, ids=[path.stem for path in STUDIES])
def test_the_recipe_of_every_run_is_valid(path: Path) -> None:
    made = load_study(path)
    for cell in [*cells(made, {}), *cells(made, {}, toy=True)]:
        if cell.seed == made.seeds[0]:
            load_recipe(made.recipe, cell.overrides)
    for variant in made.variants:
        if parameters := tuned_parameters(made, variant):
            for tried in grid_points(parameters, 2):
                load_recipe(made.recipe, tuning_cell(made, (variant, next(iter(made.data), "")), tried).overrides)
