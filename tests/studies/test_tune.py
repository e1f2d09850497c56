"""Finding a recipe's learning rate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from maskft.errors import StudyError
from maskft.recipe import Recipe, load_recipe
from maskft.runs import load_data
from maskft.studies.tune import searched, study_of, tune
from tests.studies.made import write_study
from tests.test_cli import call

DATA = {"kind": "easy-vqa"}


def recipe(**content: Any) -> Recipe:
    return Recipe.model_validate({"data": DATA, **content})


def test_what_is_searched() -> None:
    assert searched(recipe()) == ("method.relative_step", 2e-4, 1e-2)
    assert searched(recipe(method={"name": "mask", "gate": "topk"})) == ("training.learning_rate", 0.01, 0.5)
    assert searched(recipe(method={"name": "projector"})) == ("training.learning_rate", 1e-4, 1e-2)


def test_a_slice_of_the_data_has_fewer_steps(tmp_path: Path) -> None:
    long = recipe(training={"max_steps": 1000, "warmup_steps": 50, "learning_rate": 0.1, "seed": 3})
    start, study = study_of(long, trials=5, share=0.1)
    assert start["training"] == {"max_steps": 100, "warmup_steps": 5, "seed": 3}
    assert start["data"]["share"] == 0.1
    assert study["seeds"] == [3]
    assert study["tune"]["trials"] == 5
    assert study_of(recipe(training={"max_steps": 30}), trials=1, share=0.1)[0]["training"] == {"max_steps": 20}
    files = recipe(data={"kind": "files", "train": str(tmp_path / "t.json")})
    assert study_of(files, trials=1, share=1.0)[0]["data"]["split"]["validation"] == 0.1
    held = recipe(data={"kind": "files", "train": str(tmp_path / "t.json"), "split": {"validation": 0.3}})
    assert study_of(held, trials=1, share=1.0)[0]["data"]["split"]["validation"] == 0.3


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    write_study(tmp_path)
    given, new = tmp_path / "recipe.yaml", tmp_path / "new.yaml"
    content = json.loads(given.read_text())
    content["training"]["learning_rate"] = 0.3
    given.write_text("# Mine.\n#\n" + json.dumps(content))
    command = ("tune", given, "--output", new, "--trials", 2, "--share", 1, "--work", tmp_path / "work")
    assert call(monkeypatch, *command, "--json") == 0
    told = json.loads(capfd.readouterr().out)
    assert told["key"] == "method.relative_step"
    assert [trial["tuned"][told["key"]] for trial in told["trials"]] == [2e-4, 1e-2]
    assert told["value"] in (2e-4, 1e-2)

    text = new.read_text()
    assert text.startswith("# method.relative_step was found by: maskft tune recipe.yaml --trials 2 --share 1\n")
    assert "# Tried, on 6 training rows in 2 steps: 0.0002, 0.01.\n" in text
    assert "\n# Mine.\n#\n" in text
    found, before = load_recipe(new), load_recipe(given)
    assert found.method.relative_step == told["value"]  # type: ignore[union-attr]
    assert "learning_rate" not in found.training
    assert found.data == before.data

    assert call(monkeypatch, *command) == 2
    assert "--force to write over it" in capfd.readouterr().err
    assert call(monkeypatch, *command, "--force") == 0
    assert "chosen" in capfd.readouterr().out
    assert new.read_text() == text
    with pytest.raises(StudyError, match=r"--share is 1\.5"):
        tune(given, tmp_path / "x.yaml", trials=1, share=1.5, work=tmp_path / "w")


def test_a_share_of_the_training_rows(tmp_path: Path) -> None:
    write_study(tmp_path)
    whole = load_data(load_recipe(tmp_path / "recipe.yaml"))
    half, same, other = (
        load_data(load_recipe(tmp_path / "recipe.yaml", ["data.share=0.5", f"data.share_seed={seed}"]))
        for seed in (0, 0, 1)
    )
    assert half["train"]["id"] == same["train"]["id"] != other["train"]["id"]
    assert len(half["train"]) == len(whole["train"]) // 2
    assert set(half["train"]["id"]) < set(whole["train"]["id"])
    assert half["validation"]["id"] == whole["validation"]["id"]
    assert len(load_data(load_recipe(tmp_path / "recipe.yaml", ["data.share=0.001"]))["train"]) == 1
