from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskft.errors import DataError
from maskft.evaluation.benchmarks import mme
from maskft.evaluation.benchmarks.common import Answer

POST_PROMPT = "\nAnswer the question using a single word or phrase."
WITH_IMAGES = ("artwork", "celebrity", "landmark", "posters", "scene")
ANY_TEXT = st.text(st.characters(exclude_categories=()))


def picture_file(root: Path, subtask: str, name: str) -> Path:
    return root / subtask / ("questions_answers_YN" if subtask in WITH_IMAGES else "") / f"{name}.txt"


def write_mme(data: Path, pictures: int = 2) -> None:
    """In every subtask so many pictures, each with a question answered yes and one answered no."""
    root = data / "MME" / "MME_Benchmark_release_version"
    asked = []
    for subtask in mme.SUBTASKS:
        images = f"{subtask}/images" if subtask in WITH_IMAGES else subtask
        (root / images).mkdir(parents=True)
        for number in range(pictures):
            file = picture_file(root, subtask, f"{number}")
            file.parent.mkdir(exist_ok=True)
            file.write_text(
                f"Is it {number}? Please answer yes or no.\tYes\nIs it not?  Please answer yes or no.\tNo\n"
            )
            asked += [
                {"question_id": f"{images}/{number}.jpg", "image": f"{images}/{number}.jpg", "text": text + POST_PROMPT}
                for text in (f"Is it {number}?", "Is it not?")
            ]
    (data / "MME" / "llava_mme.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_mme(tmp_path)
    return tmp_path


@pytest.fixture
def root(data: Path) -> Path:
    return data / "MME" / "MME_Benchmark_release_version"


def respond(data: Path, reply: Callable[[str, str], str]) -> list[Answer]:
    """Answers to every question, given its id and text."""
    return [Answer(q.id, q.text, reply(str(q.id), q.text)) for q in mme.questions(data)]


def right(id_: str, text: str) -> str:
    return "No" if text.startswith("Is it not") else "Yes"


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("Yes", "yes"),
        ("YES.", "yes"),
        ("no", "no"),
        ("No, it is not", "no"),
        (" no", "no"),
        ("\nyes", "yes"),
        ("Eyes", "yes"),
        ("know", "no"),
        ("None", "no"),
        ("noyes", "no"),  # "yes" is not within the first four characters
        ("nyes", "yes"),
        ("  yes", "neither"),
        ("It is", "neither"),
        ("", "neither"),
        ("n o", "neither"),
        ("\ud800no", "no"),
        ("\uff2e\uff2f", "neither"),
        ("İno", "no"),  # the lower case of İ is two characters
        ("İİno", "neither"),
    ],
)
def test_how_an_answer_is_read(text: str, read: str) -> None:
    assert mme.says(text) == read


def test_all_right_gives_the_maximum(data: Path) -> None:
    result = mme.score(mme.read(data), respond(data, right))
    assert result.score == result.details["perception"] == 2000
    assert result.details["cognition"] == 800
    assert result.details["neither_yes_nor_no"] == 0
    assert result.details["OCR"] == {
        "score": 200.0,
        "accuracy": 100.0,
        "accuracy_plus": 100.0,
        "questions": 4,
        "pictures": 2,
        "neither_yes_nor_no": 0,
    }


def test_hand_worked_score(data: Path) -> None:
    """Yes to everything is 50 points a subtask. Two subtasks differ."""

    def reply(id_: str, text: str) -> str:
        if id_ == "count/0.jpg":
            return right(id_, text)  # accuracy 3/4, accuracy+ 1/2
        if id_ == "code_reasoning/1.jpg":
            return "perhaps"  # accuracy 1/4
        return "Yes"

    result = mme.score(mme.read(data), respond(data, reply))
    assert result.details["count"]["score"] == 75 + 50
    assert result.details["code_reasoning"]["accuracy"] == 25
    assert result.details["code_reasoning"]["accuracy_plus"] == 0
    assert result.details["code_reasoning"]["neither_yes_nor_no"] == result.details["neither_yes_nor_no"] == 2
    assert result.score == 9 * 50 + 125
    assert result.details["cognition"] == 3 * 50 + 25


PUBLISHED = {
    "existence": (51, 22, 30, 158.33333333333331),
    "count": (48, 21, 30, 150.0),
    "position": (43, 17, 30, 128.33333333333334),
    "color": (52, 25, 30, 170.0),
    "posters": (267, 129, 147, 178.57142857142856),
    "celebrity": (228, 91, 170, 120.58823529411764),
    "scene": (319, 145, 200, 152.25),
    "landmark": (340, 158, 200, 164.0),
    "artwork": (276, 113, 200, 125.5),
    "OCR": (30, 13, 20, 140.0),
    "commonsense_reasoning": (107, 38, 70, 130.7142857142857),
    "numerical_calculation": (12, 2, 20, 40.0),
    "text_translation": (31, 14, 20, 147.5),
    "code_reasoning": (13, 2, 20, 42.5),
}
"""Right answers, pictures with both right, pictures, and the points that the official script printed for Qwen-VL-Chat;
the counts are ones that give these points."""


def test_sums_have_the_digits_that_were_published() -> None:
    truths, answers = {}, []
    for subtask, (questions_right, pictures_right, pictures, _) in PUBLISHED.items():
        for picture in range(pictures):
            once = pictures_right <= picture < questions_right - pictures_right
            for number in range(2):
                question = f"{number}? Please answer yes or no."
                truths[subtask, str(picture), question] = "no"
                said = "No" if picture < pictures_right or (once and number) else "Yes"
                answers.append(Answer(f"{subtask}/{picture}.jpg", question, said))
    result = mme.score(mme.Annotations(truths, dict.fromkeys(truths, 1)), answers)
    assert {name: result.details[name]["score"] for name in PUBLISHED} == {
        name: row[3] for name, row in PUBLISHED.items()
    }
    assert result.score == 1487.576330532213
    assert result.details["cognition"] == 360.71428571428567
    assert sum(result.details[name]["pictures"] for name in mme.SUBTASKS) == 1187


def test_the_two_questions_of_a_picture_need_not_follow_each_other(data: Path) -> None:
    answers = respond(data, lambda id_, text: right(id_, text) if "/0." in id_ else "Yes")
    apart = sorted(answers, key=lambda answer: answer.prompt)
    assert mme.score(mme.read(data), apart) == mme.score(mme.read(data), answers)
    assert mme.score(mme.read(data), answers).score == 10 * (75 + 50)


@pytest.mark.parametrize(
    ("id_", "prompt", "found"),
    [
        ("artwork/images/7.jpg", "Is it?" + POST_PROMPT, ("artwork", "7", "Is it? Please answer yes or no.")),
        ("artwork/7.jpg", "Is it?" + POST_PROMPT, ("artwork", "7", "Is it? Please answer yes or no.")),
        ("color/7.b.png", "Is it?", ("color", "7", "Is it? Please answer yes or no.")),
        ("color", "Is it?", ("color", "color", "Is it? Please answer yes or no.")),
        ("color/7.png", "Two?" + POST_PROMPT, ("color", "7", "Two?  Please answer yes or no.")),
        ("color/7.png", "Three?", ("color", "7", "Three?  Please answer yes or no.")),  # there is none: two spaces
        ("color/7.png", " Is it? Please answer yes or no.", ("color", "7", " Is it? Please answer yes or no.")),
        (
            "color/7.png",
            " Please answer yes or no. Is it?" + POST_PROMPT,
            ("color", "7", "Please answer yes or no. Is it?"),
        ),
        (3, "Is it?", ("3", "3", "Is it?  Please answer yes or no.")),
    ],
)
def test_which_question_an_answer_belongs_to(id_: str | int, prompt: str, found: tuple[str, str, str]) -> None:
    known = [
        ("artwork", "7", "Is it? Please answer yes or no."),
        ("color", "7", "Is it? Please answer yes or no."),
        ("color", "color", "Is it? Please answer yes or no."),
        ("color", "7", "Two?  Please answer yes or no."),
    ]
    annotations = mme.Annotations(dict.fromkeys(known, "yes"), dict.fromkeys(known, 1))
    assert mme.asked(Answer(id_, prompt, "Yes"), annotations) == found


def labelled(pictures: int) -> mme.Annotations:
    truths = {
        (subtask, str(number), f"{truth}? Please answer yes or no."): truth
        for subtask in mme.SUBTASKS
        for number in range(pictures)
        for truth in ("yes", "no")
    }
    return mme.Annotations(truths, dict.fromkeys(truths, 1))


@given(texts=st.lists(ANY_TEXT | st.sampled_from(["Yes", "No", "know"]), min_size=56, max_size=56), seed=st.integers())
def test_any_text_in_any_order_gives_one_finite_score(texts: list[str], seed: int) -> None:
    annotations = labelled(2)
    answers = [
        Answer(f"{subtask}/{picture}.jpg", question, text)
        for (subtask, picture, question), text in zip(annotations.truths, texts, strict=True)
    ]
    result = mme.score(annotations, answers)
    assert 0 <= result.score <= 2000
    assert 0 <= result.details["cognition"] <= 800
    assert all(math.isfinite(value) for name in mme.SUBTASKS for value in result.details[name].values())
    random.Random(seed).shuffle(answers)
    assert mme.score(annotations, answers) == result
    json.dumps(result.to_dict(), allow_nan=False)


def test_missing_doubled_and_unknown_answers_are_named() -> None:
    annotations = labelled(12)
    answers = [Answer(f"{subtask}/{picture}.jpg", q, "Yes") for subtask, picture, q in annotations.truths]
    wrong = [*answers[24:], *answers[24:36], *(Answer(f"color/x{n}.jpg", "Is it?", "Yes") for n in range(13))]
    with pytest.raises(DataError) as caught:
        mme.score(annotations, wrong)
    message = str(caught.value)
    for part in ("no answer (24)", "more than one answer (12)", "not a question of this benchmark (13)", "MME"):
        assert part in message
    assert "- existence/0 'yes? Please answer yes or no.'\n" in message
    assert "- existence/4 'no? Please answer yes or no.'\n" in message
    assert "- existence/5 " not in message
    assert "- color/x9 'Is it?  Please answer yes or no.'\n" in message
    assert "- color/x10 " not in message
    assert "... and 14 more" in message


def test_questions(data: Path, root: Path) -> None:
    asked = mme.questions(data)
    assert len(asked) == 2 * 2 * 14
    by_subtask = {question.category: question for question in asked}
    assert tuple(by_subtask) == mme.SUBTASKS
    assert by_subtask["scene"].id == "scene/images/1.jpg"
    assert by_subtask["scene"].image == root / "scene" / "images" / "1.jpg"
    assert by_subtask["color"].text == "Is it not?" + POST_PROMPT
    assert mme.MAX_NEW_TOKENS == 128


def test_read_takes_both_layouts_and_passes_hidden_files(root: Path, data: Path) -> None:
    (root / "color" / "._0.txt").write_bytes(b"\x00\xff")
    file = picture_file(root, "scene", "0")
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
    annotations = mme.read(data)
    assert len(annotations.truths) == 56
    assert set(annotations.counts.values()) == {1}
    assert annotations.truths["scene", "0", "Is it 0? Please answer yes or no."] == "yes"
    assert annotations.truths["color", "1", "Is it not?  Please answer yes or no."] == "no"


def test_one_question_twice_about_a_picture(data: Path, root: Path) -> None:
    """Asked twice, the later answer holds for both, and two answers are wanted."""
    (root / "OCR" / "0.txt").write_text(
        "Is it not? Please answer yes or no.\tYes\nIs it not? Please answer yes or no.\tNo\n"
    )
    annotations = mme.read(data)
    key = ("OCR", "0", "Is it not? Please answer yes or no.")
    assert (annotations.truths[key], annotations.counts[key]) == ("no", 2)
    answers = respond(data, right)
    twice = [Answer(a.question_id, "Is it not?", "No") if a.question_id == "OCR/0.jpg" else a for a in answers]
    assert mme.score(annotations, twice).score == 2000
    with pytest.raises(DataError, match=r"(?s)no answer \(1\):.*OCR/0 '.*' \(2\)"):
        mme.score(annotations, [answer for n, answer in enumerate(twice) if answer.prompt != "Is it not?" or n % 2])
    with pytest.raises(DataError, match=r"more than one answer \(1\)"):
        mme.score(annotations, [*twice, Answer("OCR/0.jpg", "Is it not?", "No")])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Is it? Please answer yes or no.\tYes\n", "0.txt: 1 questions instead of 2"),
        ("A?\tYes\nB?\tNo\nC?\tNo\n", "0.txt: 3 questions instead of 2"),
        ("A?\tYes\nB? No\n", "0.txt line 2: not a question, a tab and Yes or No"),
        ("A?\tYes\nB?\tNo\tNo\n", "0.txt line 2"),
        ("A?\tperhaps\nB?\tNo\n", "0.txt line 1"),
        ("", "0.txt: 0 questions"),
    ],
)
def test_flawed_answer_files(data: Path, root: Path, text: str, expected: str) -> None:
    (root / "position" / "0.txt").write_text(text)
    with pytest.raises(DataError) as caught:
        mme.read(data)
    assert expected in str(caught.value)
    assert "position" in str(caught.value)


def test_missing_subtasks_and_files(data: Path, root: Path) -> None:
    for file in (root / "color").glob("*.txt"):
        file.unlink()
    with pytest.raises(DataError, match=r"color: no \.txt file"):
        mme.read(data)
    (root / "color").rmdir()
    with pytest.raises(DataError, match="lacks the folders of color"):
        mme.read(data)
    with pytest.raises(DataError, match="MME_Benchmark_release_version"):
        mme.read(data / "elsewhere")
    with pytest.raises(DataError, match=r"llava_mme\.jsonl"):
        mme.questions(data / "elsewhere")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"question_id": 1, "image": "a.png", "text": "Is it?"}', "row 1: 'question_id'"),
        ('{"question_id": "color/1.png", "text": "Is it?"}', "row 1: 'image'"),
        ('{"question_id": "color/1.png", "image": "../1.png", "text": "Is it?"}', "row 1: '../1.png'"),
        ('{"question_id"', "line 1"),
        ("[]", "line 1: not a JSON object"),
        ("", "holds no questions"),
    ],
)
def test_flawed_question_files(data: Path, line: str, expected: str) -> None:
    (data / "MME" / "llava_mme.jsonl").write_text(line + "\n")
    with pytest.raises(DataError) as caught:
        mme.questions(data)
    assert expected in str(caught.value)
    assert "llava_mme.jsonl" in str(caught.value)
