"""The shipped projector loads, and stage 1 makes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from maskft.evaluation import evaluate_run
from maskft.recipe import load_recipe
from maskft.training import train
from maskft.vlm.embedded import ASSETS, PROJECTOR, embedded_base
from maskft.vlm.load import load_model

RECIPE = Path(__file__).parents[2] / "recipes" / "stage1-projector.yaml"


def shipped(name: str):
    return json.loads((ASSETS / name).read_text())


def test_the_embedded_base_holds_the_shipped_projector() -> None:
    model = load_model(str(embedded_base()), dtype="bfloat16")
    projector = model.model.multi_modal_projector.state_dict()
    expected = load_file(PROJECTOR)
    assert projector.keys() == expected.keys()
    assert all(torch.equal(projector[name], expected[name]) for name in expected)
    assert PROJECTOR.stat().st_size < 1.5e6


def test_its_record_is_of_the_recipe_as_it_stands() -> None:
    assert load_recipe(ASSETS / "recipe.yaml") == load_recipe(RECIPE)
    assert shipped("metrics.json")["validation"]["tuned"]["accuracy"] > 0.8
    assert shipped("metrics.json")["validation"]["base"]["accuracy"] < 0.1


def test_the_recipe_begins_as_the_record_says(tmp_path: Path) -> None:
    """The first ten steps are warm-up, so they don't depend on the number of steps. Processors round bf16 products
    differently, hence the tolerance."""
    train(load_recipe(RECIPE, ["training.max_steps=10"]), tmp_path / "run")
    log = json.loads((tmp_path / "run" / "log.json").read_text())
    recorded = shipped("log.json")
    assert log[0]["step"] == recorded[0]["step"] == 10
    assert log[0]["loss"] == pytest.approx(recorded[0]["loss"], rel=0.02)


@pytest.mark.slow
def test_the_recipe_reproduces_the_shipped_projector(tmp_path: Path) -> None:
    train(load_recipe(RECIPE), tmp_path / "run")
    scores, _ = evaluate_run(tmp_path / "run", split="validation")
    recorded = shipped("metrics.json")
    assert scores["tuned"]["accuracy"] == pytest.approx(recorded["validation"]["tuned"]["accuracy"], abs=0.03)
    for name, tensor in load_file(tmp_path / "run" / "projector.safetensors").items():
        similarity = torch.cosine_similarity(tensor.float().flatten(), load_file(PROJECTOR)[name].float().flatten(), 0)
        assert similarity > 0.98
