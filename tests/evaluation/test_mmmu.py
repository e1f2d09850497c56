"""MMMU: scores, random choices, groups, and the flaws of the two files. `test_mmmu_text` has the reading of answers."""

from __future__ import annotations

import copy
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskft.errors import DataError
from maskft.evaluation.benchmarks import Answer, benchmark, mmmu
from maskft.evaluation.benchmarks.mmmu import DISCIPLINES, Annotations, Item, questions, read, score

ANY_TEXT = st.text(st.characters(exclude_categories=()))


def item(key: str, truth: str | tuple[str, ...], *, letters: str = "ABCD", image: bool = True) -> Item:
    truths = (truth,) if isinstance(truth, str) else truth
    return Item(key, tuple(letters), {name: f"option {name}" for name in letters}, truths, bool(letters), image)


ITEMS = (
    item("validation_Math_1", "A"),
    item("validation_Math_2", "12.5", letters=""),
    item("validation_Art_Theory_10", ("B", "C"), image=False),
    item("validation_Art_3", "D"),
    item("validation_Art_4", "B", letters="AB"),
)
TRUTH = Annotations(ITEMS)
TEXTS = {
    "validation_Math_1": "(A)",
    "validation_Math_2": "it is 12.499",
    "validation_Art_Theory_10": "C",
    "validation_Art_3": "?",
    "validation_Art_4": "",
}


def answers_of(texts: dict[str, str]) -> list[Answer]:
    return [Answer(key, "", text) for key, text in texts.items()]


def test_score_by_hand() -> None:
    generator = random.Random(42)  # two draws, in the order of the questions: "A" of four, "A" of two
    assert [generator.choice("ABCD"), generator.choice("AB")] == ["A", "A"]
    result = score(TRUTH, answers_of(TEXTS))
    assert result.score == 60.0
    assert result.details == {
        "accuracy": 60.0,
        "correct": 3,
        "questions": 5,
        "multiple_choice": {"accuracy": 50.0, "correct": 2, "questions": 4},
        "open": {"accuracy": 100.0, "correct": 1, "questions": 1},
        "without_image": {"accuracy": 100.0, "correct": 1, "questions": 1},
        "random_choices": 2,
        "random_choices_correct": 0,
        "disciplines": {
            "Art and Design": {"accuracy": 100 / 3, "correct": 1, "questions": 3},
            "Science": {"accuracy": 100.0, "correct": 2, "questions": 2},
        },
        "subjects": {
            "Art": {"accuracy": 0.0, "correct": 0, "questions": 2},
            "Art_Theory": {"accuracy": 100.0, "correct": 1, "questions": 1},
            "Math": {"accuracy": 100.0, "correct": 2, "questions": 2},
        },
    }
    json.dumps(result.to_dict())


def test_random_choices_are_those_of_a_generator_seeded_once() -> None:
    ids = [f"validation_Math_{number}" for number in range(200)]
    generator = random.Random(42)
    drawn = {key: generator.choice("ABCDEF") for key in ids}
    truth = Annotations(tuple(item(key, drawn[key], letters="ABCDEF") for key in ids))
    details = score(truth, answers_of(dict.fromkeys(reversed(ids), "?"))).details
    assert (details["random_choices"], details["random_choices_correct"], details["correct"]) == (200, 200, 200)


def test_drawing_leaves_the_shared_generator_alone() -> None:
    random.seed(7)
    before = random.getstate()
    score(TRUTH, answers_of(TEXTS))
    assert random.getstate() == before


def test_an_answer_read_as_a_choice_may_be_judged_as_open_and_the_reverse() -> None:
    read_as_choice = Item(
        "validation_Math_1", tuple("ABC"), dict(zip("ABC", "xyz", strict=True)), ("C",), by_choice=False, image=True
    )
    judged_as_choice = Item("validation_Math_2", (), {}, ("C",), by_choice=True, image=True)
    truth = Annotations((read_as_choice, judged_as_choice))
    texts = {"validation_Math_1": "(C) a barn", "validation_Math_2": "(C)"}
    details = score(truth, answers_of(texts)).details
    assert (details["open"]["correct"], details["multiple_choice"]["correct"]) == (1, 0)
    assert score(truth, answers_of(texts | {"validation_Math_2": "C"})).score == 100.0


@given(order=st.permutations(answers_of(TEXTS)))
def test_the_order_of_the_answers_does_not_matter(order: list[Answer]) -> None:
    assert score(TRUTH, order) == score(TRUTH, answers_of(TEXTS))


@given(texts=st.lists(ANY_TEXT | st.text("0123456789,.-+eE=\n is(AB)"), min_size=5, max_size=5))
def test_any_text_gives_a_score_in_range(texts: list[str]) -> None:
    result = score(TRUTH, answers_of(dict(zip(TEXTS, texts, strict=True))))
    assert 0 <= result.score <= 100
    assert math.isfinite(result.score)
    assert "NaN" not in json.dumps(result.details)


def test_disciplines_are_the_official_ones() -> None:
    assert [len(subjects) for subjects in DISCIPLINES.values()] == [4, 5, 5, 5, 4, 7]
    assert len({subject for subjects in DISCIPLINES.values() for subject in subjects}) == 30


KEYS = list(TEXTS)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (answers_of(TEXTS)[1:], rf"no answer \(1\):\n  - {KEYS[0]}"),
        ([*answers_of(TEXTS), Answer(KEYS[1], "", "")], rf"more than one answer \(1\):\n  - {KEYS[1]}"),
        ([*answers_of(TEXTS), Answer(5, "", "")], r"not a question of this benchmark \(1\):\n  - 5"),
        ([Answer(f"x{n}", "", "") for n in range(20)], r"benchmark \(20\)(.|\n)*x9\n  \.\.\. and 10 more"),
    ],
)
def test_missing_doubled_and_unknown_answers_are_errors(answers: list[Answer], message: str) -> None:
    with pytest.raises(DataError, match=message):
        score(TRUTH, answers)


# The files.

ROWS: list[dict[str, Any]] = [
    {
        "id": "validation_Accounting_1",
        "prompt": "<image> What?\nA. $6\nB. $7",
        "image": "validation_Accounting_1.png",
        "question_type": "multiple-choice",
        "all_choices": ["A", "B"],
        "index2ans": {"A": "$6", "B": "$7"},
    },
    {"id": "validation_Public_Health_2", "prompt": "<image 1> and <image 2>?", "question_type": "open"},
]
TRUTHS: dict[str, Any] = {
    "validation_Public_Health_2": {"question_type": "short-answer", "ground_truth": ["5", "five"]},
    "validation_Accounting_1": {"question_type": "multiple-choice", "ground_truth": "B"},
}


def write(data: Path, rows: Any = ROWS, truths: Any = TRUTHS, place: str = "answer_dict_val.json") -> Path:
    (data / "MMMU" / "eval").mkdir(parents=True, exist_ok=True)
    (data / "MMMU" / "anns_for_eval.json").write_text(json.dumps(rows))
    (data / "MMMU" / place).write_text(json.dumps(truths))
    return data


def changed(value: Any, *path: Any, to: Any) -> Any:
    """A copy of `value` with the entry at `path` replaced, or removed if `to` is ...."""
    value = copy.deepcopy(value)
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    if to is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = to
    return value


@pytest.mark.parametrize("place", ["answer_dict_val.json", "eval/answer_dict_val.json"])
def test_read(tmp_path: Path, place: str) -> None:
    truth = read(write(tmp_path, place=place))
    assert truth == Annotations(
        (
            Item("validation_Accounting_1", ("A", "B"), {"A": "$6", "B": "$7"}, ("B",), by_choice=True, image=True),
            Item("validation_Public_Health_2", (), {}, ("5", "five"), by_choice=False, image=False),
        )
    )
    assert [entry.subject for entry in truth.items] == ["Accounting", "Public_Health"]


def test_questions(tmp_path: Path) -> None:
    first, second = questions(write(tmp_path))
    assert first.text == "What?\nA. $6\nB. $7"
    assert first.image == tmp_path / "MMMU" / "all_images" / "validation_Accounting_1.png"
    assert (first.id, first.category) == ("validation_Accounting_1", "Accounting")
    assert (second.text, second.image, second.category) == ("<image 1> and <image 2>?", None, "Public_Health")
    assert benchmark("mmmu").MAX_NEW_TOKENS == mmmu.MAX_NEW_TOKENS == 1024


@pytest.mark.parametrize("name", ["../x.png", "/etc/x.png", "a/../../x.png", "."])
def test_an_image_outside_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="row 2"):
        questions(write(tmp_path, changed(ROWS, 1, "image", to=name)))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({}, "not a JSON list"),
        ([], "not a JSON list"),
        (["x"], "row 1: 'id'"),
        (changed(ROWS, 1, "id", to=5), "row 2: 'id'"),
        (changed(ROWS, 1, "prompt", to=...), "row 2: 'prompt'"),
        (changed(ROWS, 1, "question_type", to=None), "row 2: 'question_type'"),
        (changed(ROWS, 1, "image", to=["a", "b"]), "row 2: 'image' is not a path"),
        (changed(ROWS, 1, "image", to=""), "row 2: 'image' is not a path"),
        (changed(ROWS, 1, "id", to="validation_Accounting_1"), "row 2: id validation_Accounting_1 was there"),
        (changed(ROWS, 1, "id", to="validation_Alchemy_1"), "row 2: id validation_Alchemy_1 does not name"),
        (changed(ROWS, 1, "id", to=""), "row 2: id  does not name"),
        (changed(ROWS, 0, "all_choices", to=...), "row 1: 'all_choices'"),
        (changed(ROWS, 0, "all_choices", to=[]), "row 1: 'all_choices'"),
        (changed(ROWS, 0, "all_choices", to="AB"), "row 1: 'all_choices'"),
        (changed(ROWS, 0, "all_choices", to=["A", 2]), "row 1: 'all_choices'"),
        (changed(ROWS, 0, "index2ans", to=...), "row 1: 'index2ans'"),
        (changed(ROWS, 0, "index2ans", "A", to=6), "row 1: 'index2ans'"),
    ],
)
def test_flaws_of_the_question_file(tmp_path: Path, rows: Any, message: str) -> None:
    for load in (read, questions):
        with pytest.raises(DataError, match=rf"anns_for_eval\.json(.|\n)*{message}"):
            load(write(tmp_path, rows))


KEY = "validation_Accounting_1"


@pytest.mark.parametrize(
    ("truths", "message"),
    [
        ([], "not a JSON object"),
        (changed(TRUTHS, KEY, to=...), f"id {KEY} is only in anns_for_eval.json"),
        (TRUTHS | {"validation_Math_1": {}}, "id validation_Math_1 is only in answer_dict_val.json"),
        (changed(TRUTHS, KEY, to="B"), f"id {KEY}: 'question_type'"),
        (changed(TRUTHS, KEY, "question_type", to=...), f"id {KEY}: 'question_type'"),
        (changed(TRUTHS, KEY, "ground_truth", to=...), f"id {KEY}: 'ground_truth'"),
        (changed(TRUTHS, KEY, "ground_truth", to=5), f"id {KEY}: 'ground_truth'"),
        (changed(TRUTHS, KEY, "ground_truth", to=[]), f"id {KEY}: 'ground_truth'"),
        (changed(TRUTHS, KEY, "ground_truth", to=["B", 5]), f"id {KEY}: 'ground_truth'"),
    ],
)
def test_flaws_of_the_answers(tmp_path: Path, truths: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(write(tmp_path, truths=truths))


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    for load in (read, questions):
        with pytest.raises(DataError, match=r"missing(.|\n)*anns_for_eval\.json"):
            load(tmp_path)
    write(tmp_path)
    truths = tmp_path / "MMMU" / "answer_dict_val.json"
    truths.write_text("{")
    with pytest.raises(DataError, match=r"answer_dict_val\.json is not valid JSON"):
        read(tmp_path)
    truths.unlink()
    with pytest.raises(DataError, match=r"missing(.|\n)*MMMU/answer_dict_val\.json(.|\n)*eval/answer_dict_val\.json"):
        read(tmp_path)
