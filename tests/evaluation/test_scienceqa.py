"""ScienceQA: the letter of an answer, the image flag, the groups, and the flaws of the three files."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskft.errors import DataError
from maskft.evaluation.benchmarks import Answer, benchmark, scienceqa
from maskft.evaluation.benchmarks.scienceqa import Annotations, Problem, letter, questions, read, score

WITH, WITHOUT = "<image>\nWhich?", "Which?"
PROBLEMS = (
    Problem("1", 0, 2, True, ("NAT", "IMG", "G1-6"), "biology"),
    Problem("2", 1, 3, True, ("SOC", "TXT", "IMG", "G7-12"), "geography"),
    Problem("3", 2, 4, False, ("LAN", "TXT", "G1-6"), "figurative-language"),
    Problem("4", 1, 2, True, ("NAT", "IMG", "G7-12"), "biology"),
    Problem("5", 0, 2, False, ("SOC", "NO", "G1-6"), "geography"),
)
TRUTH = Annotations(PROBLEMS, "problems.json")
TEXTS = {"1": "A", "2": "C", "3": "C. because", "4": "The answer is B.", "5": "none of them"}


def answers_of(texts: dict[str, str], *, marked: bool = True) -> list[Answer]:
    images = {problem.id for problem in PROBLEMS if problem.image}
    return [Answer(key, WITH if marked and key in images else WITHOUT, text) for key, text in texts.items()]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A", "A"),
        ("E", "E"),
        ("F", None),  # only five letters stand for themselves
        ("a", None),
        (" A", None),
        ("A ", None),
        ("A.", None),  # needs the space
        ("A. ", "A"),
        ("B. The answer is C.", "B"),  # the start goes before the sentence
        ("F. x", None),
        ("A) x", None),
        ("(A)", None),
        ("AB", None),
        ("", None),
        (". ", None),
        ("The answer is D.", "D"),
        ("I think. The answer is D. So D.", "D"),
        ("The answer is D", None),  # a character must follow
        ("The answer is D)", "D"),  # whichever it is,
        ("The answer is D\n", None),  # but for a line break
        ("The answer is D\nThe answer is C.", "C"),
        ("The answer is A. The answer is A.", None),  # twice
        ("The answer is Z.", "Z"),
        ("the answer is A.", None),
        ("The answer is  A.", None),
        ("\ud800", None),
    ],
)
def test_letter(text: str, expected: str | None) -> None:
    assert letter(text) == expected


def test_score_by_hand() -> None:
    result = score(TRUTH, answers_of(TEXTS))
    assert result.score == 2 / 3 * 100  # 1 and 4 of 1, 2, 4
    assert result.details == {
        "accuracy": 3 / 5 * 100,
        "image_accuracy": 2 / 3 * 100,
        "text_accuracy": 50.0,
        "questions": 5,
        "image_questions": 3,
        "answered": "all questions",
        "correct": 3,
        "image_correct": 2,
        "unparsed": 1,
        "beyond_choices": 0,
        "groups": {
            "NAT": {"accuracy": 100.0, "correct": 2, "questions": 2},
            "SOC": {"accuracy": 0.0, "correct": 0, "questions": 2},
            "LAN": {"accuracy": 100.0, "correct": 1, "questions": 1},
            "TXT": {"accuracy": 50.0, "correct": 1, "questions": 2},
            "IMG": {"accuracy": 2 / 3 * 100, "correct": 2, "questions": 3},
            "NO": {"accuracy": 0.0, "correct": 0, "questions": 1},
            "G1-6": {"accuracy": 2 / 3 * 100, "correct": 2, "questions": 3},
            "G7-12": {"accuracy": 50.0, "correct": 1, "questions": 2},
        },
        "topics": {
            "biology": {"accuracy": 100.0, "correct": 2, "questions": 2},
            "figurative-language": {"accuracy": 100.0, "correct": 1, "questions": 1},
            "geography": {"accuracy": 0.0, "correct": 0, "questions": 2},
        },
        "image_flag_from": "prompts",
        "truth_from": "problems.json",
    }
    json.dumps(result.to_dict())


def test_a_letter_beyond_the_choices_is_wrong_and_counted() -> None:
    texts = TEXTS | {"1": "C", "4": "The answer is Z.", "5": "B"}
    details = score(TRUTH, answers_of(texts)).details
    assert (details["beyond_choices"], details["unparsed"], details["image_correct"]) == (2, 0, 0)


def test_answers_to_the_questions_with_an_image_alone() -> None:
    texts = {key: TEXTS[key] for key in ("1", "2", "4")}
    whole, part = score(TRUTH, answers_of(TEXTS)), score(TRUTH, answers_of(texts))
    assert part.score == whole.score
    assert part.details["answered"] == "questions with an image"
    assert part.details["image_questions"] == 3
    assert part.details["questions"] == 5
    for name in ("accuracy", "text_accuracy", "groups", "topics"):
        assert part.details[name] is None


def test_a_file_of_questions_with_an_image_only_is_answered_as_a_whole() -> None:
    truth = Annotations(tuple(problem for problem in PROBLEMS if problem.image), "problems.json")
    details = score(truth, answers_of({key: TEXTS[key] for key in ("1", "2", "4")})).details
    assert (details["answered"], details["accuracy"]) == ("all questions", 2 / 3 * 100)
    assert details["text_accuracy"] is None
    assert set(details["groups"]) == {"NAT", "SOC", "TXT", "IMG", "G1-6", "G7-12"}


def test_prompts_without_any_image_token_leave_the_flag_to_the_question_file() -> None:
    marked, plain = score(TRUTH, answers_of(TEXTS)), score(TRUTH, answers_of(TEXTS, marked=False))
    assert plain.details == marked.details | {"image_flag_from": "question file"}


@pytest.mark.parametrize(("key", "prompt"), [("3", WITH), ("4", WITHOUT)])
def test_prompts_that_flag_other_questions_are_refused(key: str, prompt: str) -> None:
    answers = [Answer(a.question_id, prompt if a.question_id == key else a.prompt, a.text) for a in answers_of(TEXTS)]
    with pytest.raises(DataError, match=rf"prompts of 1 answers(.|\n)*- {key}$"):
        score(TRUTH, answers)


def test_ids_may_be_numbers() -> None:
    answers = [Answer(int(str(a.question_id)), a.prompt, a.text) for a in answers_of(TEXTS)]
    assert score(TRUTH, answers) == score(TRUTH, answers_of(TEXTS))


@given(order=st.permutations(answers_of(TEXTS)))
def test_the_order_of_the_answers_does_not_matter(order: list[Answer]) -> None:
    assert score(TRUTH, order) == score(TRUTH, answers_of(TEXTS))


@given(texts=st.lists(st.text(st.characters(exclude_categories=())), min_size=5, max_size=5), marked=st.booleans())
def test_any_text_gives_a_score_in_range(texts: list[str], marked: bool) -> None:
    result = score(TRUTH, answers_of(dict(zip(TEXTS, texts, strict=True)), marked=marked))
    assert 0 <= result.score <= 100
    assert math.isfinite(result.score)
    assert "NaN" not in json.dumps(result.details)


@given(text=st.text())
def test_the_letter_is_one_in_the_text(text: str) -> None:
    found = letter(text)
    assert found is None or found in text


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([*answers_of(TEXTS), Answer("1", WITH, "A")], r"more than one answer \(1\):\n  - 1"),
        (answers_of(TEXTS)[1:], r"no answer \(1\):\n  - 1"),
        ([*answers_of(TEXTS), Answer("99", WITH, "A")], r"not a question of this benchmark \(1\):\n  - 99"),
        (answers_of({"1": "A", "2": "A"}), r"no answer \(1\):\n  - 4"),  # of the questions with an image
        (answers_of({"1": "A", "2": "A", "4": "A", "5": "A"}), r"no answer \(1\):\n  - 3"),  # of all
        ([], r"no answer \(3\)"),
        ([Answer(f"x{n}", "", "") for n in range(20)], r"benchmark \(20\)(.|\n)*x9\n  \.\.\. and 10 more"),
    ],
)
def test_missing_doubled_and_unknown_answers_are_errors(answers: list[Answer], message: str) -> None:
    with pytest.raises(DataError, match=message):
        score(TRUTH, answers)


# The files.

ASKED = "Context: N/A\nQuestion: Which?\nOptions: "
ROWS: list[dict[str, Any]] = [
    {
        "id": "1",
        "image": "1/image.png",
        "conversations": [
            {"from": "human", "value": f"<image>\n{ASKED}(A) a cat (B) a dog"},
            {"from": "gpt", "value": "B"},
        ],
    },
    {
        "id": "7",
        "conversations": [
            {"from": "human", "value": "Options: (A) no\n" + ASKED + "(A) a (B) b (C) (B) c\n"},
            {"from": "gpt", "value": "The answer is C."},
        ],
    },
]
COMMON = {"hint": "", "subject": "natural science", "grade": "grade7", "topic": "biology"}
TRUTHS: dict[str, Any] = {
    "1": {**COMMON, "choices": ["a cat", "a dog"], "answer": 1, "image": "image.png"},
    "7": {**COMMON, "choices": ["a", "b", "c"], "answer": 2, "image": None, "subject": "art", "grade": "grade6"},
    "8": {"choices": "of the train split"},
}


def write(data: Path, rows: Any = ROWS, truths: Any = TRUTHS, split: Any = None) -> Path:
    folder = data / "scienceqa"
    folder.mkdir(exist_ok=True)
    (folder / "llava_test_CQM-A.json").write_text(json.dumps(rows))
    if truths is not None:
        (folder / "problems.json").write_text(json.dumps(truths))
    split = {"test": ["1", "7"], "train": ["8"]} if split is None else split
    (folder / "pid_splits.json").write_text(json.dumps(split))
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


def test_read_with_problems(tmp_path: Path) -> None:
    assert read(write(tmp_path)) == Annotations(
        (
            Problem("1", 1, 2, True, ("NAT", "G7-12", "IMG"), "biology"),
            Problem("7", 2, 3, False, ("G1-6", "NO"), "biology"),  # art is none of the three subjects
        ),
        "problems.json",
    )


def test_read_from_the_question_file_alone(tmp_path: Path) -> None:
    truth = read(write(tmp_path, truths=None))
    assert truth == Annotations((Problem("1", 1, 2, True), Problem("7", 2, 3, False)), "llava_test_CQM-A.json")
    details = score(truth, [Answer("1", "", "B"), Answer("7", "", "E")]).details
    assert (details["groups"], details["topics"], details["truth_from"]) == (None, None, "llava_test_CQM-A.json")
    assert (details["accuracy"], details["beyond_choices"]) == (50.0, 1)


def test_five_options(tmp_path: Path) -> None:
    rows = changed(ROWS, 0, "conversations", 0, "value", to="Options: (A) 1 (B) 2 (C) 3 (D) 4 (E) 5")
    assert read(write(tmp_path, rows, truths=None)).problems[0].choices == 5


def test_a_hint_is_a_text_context_and_grade_13_in_no_group(tmp_path: Path) -> None:
    truths = changed(changed(TRUTHS, "1", "hint", to="x"), "1", "grade", to="grade13")
    assert read(write(tmp_path, truths=truths)).problems[0].groups == ("NAT", "TXT", "IMG")


def test_questions(tmp_path: Path) -> None:
    first, second = questions(write(tmp_path))
    post = "\nAnswer with the option's letter from the given choices directly."
    assert first.text == f"{ASKED}(A) a cat (B) a dog{post}"
    assert first.image == tmp_path / "scienceqa" / "images" / "test" / "1" / "image.png"
    assert (first.id, first.category) == ("1", None)
    assert second.text == "Options: (A) no\n" + ASKED + f"(A) a (B) b (C) (B) c{post}"
    assert second.image is None
    assert benchmark("scienceqa").MAX_NEW_TOKENS == scienceqa.MAX_NEW_TOKENS == 1024


@pytest.mark.parametrize("name", ["../2/image.png", "/etc/image.png", "1/../../image.png", "."])
def test_an_image_outside_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="row 2"):
        questions(write(tmp_path, changed(ROWS, 1, "image", to=name)))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({}, "not a JSON list"),
        ([], "no question has an 'image'"),
        ([1], "row 1: 'id'"),
        (changed(ROWS, 1, "id", to=1.5), "row 2: 'id'"),
        (changed(ROWS, 1, "id", to=...), "row 2: 'id'"),
        (changed(ROWS, 1, "id", to=1), "row 2: id 1 was there before"),
        (changed(ROWS, 1, "image", to=3), "row 2: 'image' is not a path"),
        (changed(ROWS, 1, "image", to=""), "row 2: 'image' is not a path"),
        (changed(ROWS, 0, "image", to=None), "no question has an 'image'"),
        (changed(ROWS, 0, "conversations", to="x"), "row 1: 'conversations'"),
        (changed(ROWS, 0, "conversations", to=[]), "row 1: 'conversations' does not start"),
        (changed(ROWS, 0, "conversations", 1, to=...), "row 1: 'conversations' does not start"),
        (changed(ROWS, 0, "conversations", 1, to="B"), "row 1: 'conversations' does not start"),
        (changed(ROWS, 0, "conversations", 0, "from", to="gpt"), "row 1: 'conversations' does not start"),
        (changed(ROWS, 0, "conversations", 0, "value", to=2), "row 1: 'conversations' does not start"),
    ],
)
def test_flaws_of_the_question_file(tmp_path: Path, rows: Any, message: str) -> None:
    for load in (read, questions):
        with pytest.raises(DataError, match=rf"llava_test_CQM-A\.json(.|\n)*{message}"):
            load(write(tmp_path, rows))


@pytest.mark.parametrize("value", ["C", "D", "", "b", "The answer is B"])
def test_a_gpt_turn_that_is_no_option_is_refused_without_problems(tmp_path: Path, value: str) -> None:
    rows = changed(ROWS, 0, "conversations", 1, "value", to=value)
    with pytest.raises(DataError, match="row 1: the gpt turn is not the letter of one of the 2 options"):
        read(write(tmp_path, rows, truths=None))


@pytest.mark.parametrize(
    ("truths", "split", "message"),
    [
        (TRUTHS, [], "no list of ids"),
        (TRUTHS, {"test": "1"}, "no list of ids"),
        ([], None, "not a JSON object"),
        (TRUTHS, {"test": ["1"]}, "id 7 is not in the test split"),
        (TRUTHS, {"test": ["1", "7", "8"]}, "id 8 of the test split is not in llava_test_CQM-A.json"),
        (changed(TRUTHS, "7", to=...), None, "id 7 is not in problems.json"),
        (changed(TRUTHS, "7", to=3), None, "id 7: 'choices'"),
        (changed(TRUTHS, "7", "choices", to="abc"), None, "id 7: 'choices'"),
        (changed(TRUTHS, "7", "answer", to=3), None, "id 7: 'answer' is not the number of one of the 3 choices"),
        (changed(TRUTHS, "7", "answer", to=-1), None, "id 7: 'answer'"),
        (changed(TRUTHS, "7", "answer", to=True), None, "id 7: 'answer'"),
        (changed(TRUTHS, "7", "answer", to="C"), None, "id 7: 'answer'"),
        (changed(TRUTHS, "7", "topic", to=...), None, "id 7: 'topic' is not text"),
        (changed(changed(TRUTHS, "7", "choices", to=["x"] * 6), "7", "answer", to=5), None, "of the 5 choices"),
    ],
)
def test_flaws_of_the_truth(tmp_path: Path, truths: Any, split: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(write(tmp_path, truths=truths, split=split))


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    for load in (read, questions):
        with pytest.raises(DataError, match=r"missing(.|\n)*llava_test_CQM-A\.json"):
            load(tmp_path)
    write(tmp_path)
    path = tmp_path / "scienceqa" / "problems.json"
    path.write_text("{")
    with pytest.raises(DataError, match=r"problems\.json is not valid JSON"):
        read(tmp_path)
