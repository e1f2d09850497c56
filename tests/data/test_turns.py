"""Rows of one question about an image become conversations."""

from __future__ import annotations

from pathlib import Path

import pytest

from maskft.data import Collator
from maskft.data.easy_vqa import COLORS, INSTRUCTION, load_easy_vqa, questions_of
from maskft.data.schema import text_of
from maskft.data.turns import join_turns
from maskft.recipe import load_recipe
from maskft.runs import load_data, training_questions
from tests.data.helpers import MARKED, llava, make_processor, png, row, write_json


def test_questions_about_one_image_are_joined(tmp_path: Path) -> None:
    red, blue = (png(tmp_path / f"{colour}.png", colour) for colour in ("red", "blue"))
    rows = [row(f"r{i}?", str(i), images=[red]) for i in range(5)]
    rows.insert(2, row("b?", "one", images=[blue]))
    joined = join_turns(rows, 2)
    assert [len(one["messages"]) for one in joined] == [4, 4, 2, 2]
    assert [one["images"] for one in joined] == [rows[0]["images"]] * 3 + [rows[2]["images"]]
    texts = [message["content"] for one in joined[:3] for message in one["messages"] if message["role"] == "user"]
    assert sorted(parts[-1]["text"] for parts in texts) == [f"r{i}?" for i in range(5)]
    assert [[part["type"] for part in parts] for parts in texts[:2]] == [["image", "text"], ["text"]]
    assert join_turns(rows, 2) == join_turns(rows, 2)
    assert join_turns(rows, 2, seed=1) != join_turns(rows, 2)
    batch = Collator(make_processor(MARKED))(joined[:1])
    assert (batch["labels"] >= 0).sum() == 4  # two answers, an end of turn each


def test_other_rows_stay_as_they_are(tmp_path: Path) -> None:
    red = png(tmp_path / "red.png", "red")
    rows = [
        row("a?", "1", "b?", "2", images=[red]),
        row("c?", "3", images=[]),
        row("d?", "4", images=[]),
        row("e?", "5", images=[red, red]),
        row("f?", "6", images=[red]),
    ]
    assert join_turns(rows, 4) == rows


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_recipe_joins_its_training_part_alone(tmp_path: Path, share: float) -> None:
    for colour in ("red", "blue", "lime", "navy"):
        png(tmp_path / f"{colour}.png", colour)
    held_out = [llava(f"<image>\n{i}?", "navy", image="navy.png") for i in range(3)]
    asked = [llava(f"<image>\n{i}?", f"{i}", image=f"{c}.png") for i in range(4) for c in ("red", "blue", "lime")]
    content = {
        "data": {
            "kind": "files",
            "train": str(write_json(tmp_path / "train.json", asked)),
            "test": str(write_json(tmp_path / "test.json", held_out)),
            "turns": 4,
            "share": share,
        }
    }
    recipe = load_recipe(write_json(tmp_path / "recipe.yaml", content))
    parts = load_data(recipe)
    assert [len(one["messages"]) for one in parts["test"]] == [2, 2, 2]
    single = training_questions(recipe, parts["train"])
    assert {len(one["messages"]) for one in single} == {2}
    images = {one["images"][0]["path"] for one in parts["train"]}
    assert {one["images"][0]["path"] for one in single} == images
    assert len(images) == (3 if share == 1 else 2)
    assert sum(len(one["messages"]) for one in parts["train"]) == 2 * len(single) == 8 * len(images)


def test_training_questions_are_those_that_were_trained_on(tmp_path: Path) -> None:
    asked = [llava(f"<image>\nQ{n}", f"A{n}", image="a.png") for n in range(6)]
    png(tmp_path / "a.png", "red")
    data = {"kind": "files", "train": str(write_json(tmp_path / "train.json", asked)), "turns": 2, "share": 0.4}
    recipe = load_recipe(write_json(tmp_path / "recipe.yaml", {"data": data}))
    train = load_data(recipe)["train"]
    trained = {text_of(message) for row in train for message in row["messages"] if message["role"] == "user"}
    assert len(trained) == 2
    assert {text_of(row["messages"][0]) for row in training_questions(recipe, train)} == trained


def test_training_questions_of_the_demos_data(tmp_path: Path) -> None:
    data = {"kind": "easy-vqa", "turns": 4, "share": 0.5, "limits": {"train": 40, "validation": 1, "test": 1}}
    recipe = load_recipe(write_json(tmp_path / "recipe.yaml", {"data": data}))
    train = load_data(recipe)["train"]
    asked = sum(len(row["messages"]) // 2 for row in train)
    assert len(training_questions(recipe, train)) == asked > len(train) == 20


@pytest.mark.parametrize("turns", [1, 4])
def test_questions_are_the_same_in_rows_and_in_conversations(turns: int) -> None:
    rows = load_easy_vqa("vqa", limits={"validation": 1, "test": 1}, turns=turns)["train"]
    asked = [one for row in rows for one in questions_of(row)]
    assert len(asked) == sum(len(row["messages"]) for row in rows) / 2 > 1000
    assert not any(INSTRUCTION in text for one in asked for text in one)
    assert {answer for question, answer in asked if question == "What color is the shape?"} == set(COLORS)
    assert sum(text_of(row["messages"][0]).endswith(INSTRUCTION) for row in rows) == len(rows)
