"""Recipes by name: the command that lists them, the one that prints them, and every command that reads one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from maskft import shipped
from maskft.errors import RecipeError
from maskft.recipe import load_recipe
from maskft.shipped import find_recipe, shipped_recipes, summary
from tests.test_cli import QUICKSTART, call


def test_names_are_paths_below_the_folder() -> None:
    recipes = shipped_recipes()
    assert recipes["quickstart"].samefile(QUICKSTART)
    assert {"quickstart-nf4", "stage1-projector", "distributed/fsdp2"} <= set(recipes)


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_one_says_what_it_is(name: str) -> None:
    sentence = summary(shipped_recipes()[name])
    assert 10 < len(sentence) <= 160
    assert sentence[0].isupper()


def test_a_name_is_read_like_its_file() -> None:
    assert load_recipe(Path("quickstart"), ["training.seed=3"]) == load_recipe(QUICKSTART, ["training.seed=3"])


def test_a_file_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("quickstart").write_text("data: {kind: easy-vqa, part: captions}\n")
    assert find_recipe(Path("quickstart")) == Path("quickstart")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("quickstrat", "Did you mean 'quickstart'?"),
        ("nothing-like-it", "`maskft recipes` lists"),
        ("quickstart.yaml", "cannot read the recipe quickstart.yaml: No such file"),  # a suffix means a file
    ],
)
def test_neither_file_nor_name(given: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as error:
        load_recipe(Path(given))
    assert expected in str(error.value)


def test_no_folder_of_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "FOLDERS", (tmp_path / "a", tmp_path / "b"))
    assert shipped_recipes() == {}


def test_the_command_lists_and_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "recipes") == 0
    assert "quickstart" in capsys.readouterr().out
    assert call(monkeypatch, "recipes", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["quickstart"].startswith("The quick start")
    assert call(monkeypatch, "recipes", "quickstart") == 0
    assert capsys.readouterr().out == QUICKSTART.read_text()
    assert call(monkeypatch, "recipes", "quickstart", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"name": "quickstart", "text": QUICKSTART.read_text()}
    assert call(monkeypatch, "recipes", "quickstat") == 2
    assert "Did you mean 'quickstart'?" in capsys.readouterr().err
