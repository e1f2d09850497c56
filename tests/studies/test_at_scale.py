"""What a study would take at the size of a paper: planned on a config, kept as JSON, shown on the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from maskft.errors import StudyError
from maskft.report.study_pages import made
from maskft.studies import at_scale
from maskft.studies.definition import load_study
from tests.studies.made import write_study
from tests.studies.test_pages import line
from tests.tuner.models import tiny_llava

STUDIES = sorted((Path(__file__).parents[2] / "studies").glob("*.yaml"))


def test_hours_are_counted_by_hand() -> None:
    operations = 10 * (1024 * (6 * 100 + 2 * 7) + 729 * 2 * 1000)
    expected = operations / (312e12 * 0.3) / 3600
    assert at_scale.gpu_hours(10, language=100, vision=1000, gradients=7) == pytest.approx(expected)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scale")
    path = write_study(
        folder,
        variants={
            "soft": {"method.gate": "soft", "training.max_steps": 3},
            "lora": {"method": {"name": "lora", "rank": 4}},
            "fixed": {"method": {"name": "mask", "fixed": "random"}},
        },
        vary={"data.share": [0.5, 1.0]},
        overrides={"training.max_steps": 8},
        tune={
            "parameters": {"training.learning_rate": [0.1, 0.2]},
            "trials": 2,
            "by_variant": {"fixed": {}},
            "overrides": {"data.share": 1.0, "training.max_steps": 2},
        },
        paper={
            "recipe": "recipe.yaml",
            "config": "config",
            "gpus": 2,
            "gpu": "1MB",
            "rows": 10**9,
            "epochs": {"lora": 0.5},
        },
    )
    tiny_llava().config.save_pretrained(folder / "config")
    at_scale.main([str(path)])
    return path


def test_variants_and_all_runs_are_planned(file: Path) -> None:
    plan = json.loads((file.with_suffix("") / "plan.json").read_text())
    soft, lora, fixed = (plan["variants"][name] for name in ("soft", "lora", "fixed"))
    assert soft["trainable_parameters"] > lora["trainable_parameters"] > 0
    assert soft["bytes_of_copies"] == soft["bytes"] + 6 * soft["trainable_parameters"]
    assert lora["bytes_of_copies"] == lora["bytes"] + 4 * lora["trainable_parameters"]
    assert (soft["epochs"], lora["epochs"]) == (1.0, 0.5)
    assert lora["hours"] < soft["hours"]
    assert fixed is None
    assert not soft["fits"]
    assert (plan["runs"], plan["trials"]) == (3 * 2 * 2, 2 * 2)
    runs = 2 * 1.5 * (soft["hours"] + lora["hours"])  # two seeds, half and all of the data
    trials = 2 * (soft["hours"] * 2 / 3 + lora["hours"] * 2 / 8)  # so much of the steps
    assert plan["gpu_hours"] == pytest.approx(runs + trials, abs=0.06)


def test_the_page_is_made_of_the_kept_plan(file: Path, tmp_path: Path) -> None:
    (page,) = made(file, tmp_path).values()
    section = page.partition("## At the size of a paper")[2]
    assert line(section, "| variant")[2:6] == ["memory: one GPU", "each of 2 copies", "fits 1MB", "epochs"]
    assert line(section, "| lora ")[4:6] == ["no", "0.5"]
    assert line(section, "| fixed ")[1] == "nothing"
    assert "12 runs and 4 of tuning: " in section


def test_what_cannot_be_planned(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="has no section paper"):
        at_scale.plan_study(load_study(write_study(tmp_path)))
    wrong: dict[str, Any] = {"variants": {"a": {"method.gat": 1}}, "paper": {"recipe": "recipe.yaml"}}
    with pytest.raises(StudyError, match="the variant a cannot be made of"):
        at_scale.plan_study(load_study(write_study(tmp_path, **wrong)))
    wrong = {"paper": {"recipe": "recipe.yaml", "epochs": {"c": 1}}}
    with pytest.raises(StudyError, match="there is no variant 'c'"):
        load_study(write_study(tmp_path, **wrong))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_has_a_recipe_at_that_size(path: Path) -> None:
    study = load_study(path)
    assert study.paper is not None
    assert study.paper.recipe.parent.name == "paper"
    for variant in study.variants:
        at_scale.paper_recipe(study, study.paper, variant)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_kept_plans_are_of_the_studies(path: Path) -> None:
    study = load_study(path)
    plan = json.loads((path.with_suffix("") / at_scale.PLAN).read_text())
    assert list(plan["variants"]) == list(study.variants)
    assert plan["runs"] == len(at_scale.cells(study, {}))


@pytest.mark.slow
@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_plans_are_up_to_date(path: Path) -> None:
    """To mend it: python -m maskft.studies.at_scale studies/*.yaml"""
    kept = json.loads((path.with_suffix("") / at_scale.PLAN).read_text())
    now = at_scale.plan_study(load_study(path))
    assert {**now, "packages": 0} == {**kept, "packages": 0}
