"""GQA: the comparison, every grouping, the distribution, flawed files."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskft.errors import DataError
from maskft.evaluation.benchmarks import gqa
from maskft.evaluation.benchmarks.common import Answer
from maskft.evaluation.benchmarks.gqa import Annotation, Annotations, normalise, score

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=60)  # lone surrogates too


def annotation(id: str, answer: str = "yes", **changes: Any) -> Annotation:
    values = {"structural": "query", "semantic": "rel", "steps": 2, "words": 5, "group": None, **changes}
    return Annotation(id=id, answer=answer, **values)


def said(**texts: str) -> list[Answer]:
    """Answers to the questions of these ids."""
    return [Answer(id, "", text) for id, text in texts.items()]


def row(answer: Any, **changes: Any) -> dict[str, Any]:
    """A question as the annotation file has it."""
    return {
        "question": "What is it?",
        "answer": answer,
        "imageId": "n1",
        "isBalanced": True,
        "groups": {"global": "thing", "local": "10q-thing"},
        "types": {"structural": "query", "semantic": "rel", "detailed": "relS"},
        "semantic": [{"operation": "select", "dependencies": [], "argument": "dog (12)"}],
        "entailed": [],
        **changes,
    }


# --- the comparison


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("Yes", "yes"),
        ("yes.", "yes"),
        ("YES...", "yes"),
        ("...", ""),
        ("", ""),
        ("yes. ", "yes. "),  # a full stop before white space stays, and so does the white space
        (" yes", " yes"),
        ("yes\n", "yes\n"),
        (".5.", ".5"),
        ("t.v.", "t.v"),
    ],
)
def test_normalise(text: str, normal: str) -> None:
    assert normalise(text) == normal


def test_only_equality_is_right() -> None:
    annotated = Annotations(tuple(annotation(id, "dog") for id in "abcd"))
    assert score(annotated, said(a="Dog.", b="dogs", c="a dog", d="dog ")).score == 25


def test_an_answer_with_capitals_or_a_final_full_stop_is_never_right() -> None:
    annotated = Annotations((annotation("a", "Dog"), annotation("b", "t.v.")))
    assert score(annotated, said(a="Dog", b="t.v.")).score == 0


# --- the groups


def test_accuracy_by_group() -> None:
    annotated = Annotations(
        (
            annotation("a", structural="query", semantic="rel", steps=2, words=10),
            annotation("b", structural="query", semantic="attr", steps=2, words=9),
            annotation("c", structural="verify", semantic="attr", steps=10, words=9),
            annotation("d", structural="logical", semantic="obj", steps=1, words=9),
            annotation("e", structural="choose", semantic="global", steps=1, words=9),
            annotation("f", structural="compare", semantic="cat", steps=1, words=9),
        )
    )
    result = score(annotated, said(a="yes", b="no", c="yes", d="yes", e="yes", f="no"))
    assert result.score == 4 / 6 * 100
    assert result.details == {
        "accuracy": 4 / 6 * 100,
        "binary": 75.0,
        "open": 50.0,
        "distribution": 0.0,
        "questions": {"all": 6, "binary": 4, "open": 2},
        "structural": {
            "choose": {"accuracy": 100.0, "questions": 1},
            "compare": {"accuracy": 0.0, "questions": 1},
            "logical": {"accuracy": 100.0, "questions": 1},
            "query": {"accuracy": 50.0, "questions": 2},
            "verify": {"accuracy": 100.0, "questions": 1},
        },
        "semantic": {
            "attr": {"accuracy": 50.0, "questions": 2},
            "cat": {"accuracy": 0.0, "questions": 1},
            "global": {"accuracy": 100.0, "questions": 1},
            "obj": {"accuracy": 100.0, "questions": 1},
            "rel": {"accuracy": 100.0, "questions": 1},
        },
        "steps": {
            "1": {"accuracy": 2 / 3 * 100, "questions": 3},
            "2": {"accuracy": 50.0, "questions": 2},
            "10": {"accuracy": 100.0, "questions": 1},
        },
        "words": {"9": {"accuracy": 3 / 5 * 100, "questions": 5}, "10": {"accuracy": 100.0, "questions": 1}},
    }
    assert list(result.details["steps"]) == ["1", "2", "10"]


def test_a_kind_without_questions_scores_zero() -> None:
    details = score(Annotations((annotation("a"),)), said(a="yes")).details
    assert (details["open"], details["binary"], details["questions"]["binary"]) == (100.0, 0.0, 0)
    assert score(Annotations(()), []).score == 0


def test_distribution() -> None:
    annotated = Annotations(
        (
            annotation("a", "red", group="color"),
            annotation("b", "red", group="color"),
            annotation("c", "blue", group="color"),
            annotation("d", "dog", group="animal"),
            annotation("e", "cat", group=None),
        )
    )
    # color: red 2 annotated, 0 given: 4/2; blue 1 annotated, 2 given: 1/1. Three questions of four. animal: 0.
    result = score(annotated, said(a="Blue.", b="blue", c="green", d="dog", e="dog"))
    assert result.details["distribution"] == 3.0 * 3 / 4 / 100
    assert score(annotated, said(a="blue", b="red", c="red", d="dog", e="")).details["distribution"] == 0


# --- properties


@given(st.randoms(use_true_random=False), st.lists(st.sampled_from(["yes", "no", "Red."]), min_size=1, max_size=30))
def test_order_of_answers_never_matters(random: random.Random, texts: list[str]) -> None:
    annotated = Annotations(tuple(annotation(str(i), "red", group=str(i % 3)) for i in range(len(texts))))
    answers = [Answer(str(i), "", text) for i, text in enumerate(texts)]
    before = score(annotated, answers)
    random.shuffle(answers)
    assert score(annotated, answers) == before


@given(st.lists(ANY_TEXT, min_size=1, max_size=8))
def test_any_text_gives_a_score_in_range(texts: list[str]) -> None:
    annotated = Annotations(tuple(annotation(str(i), "red", group="g") for i in range(len(texts))))
    result = score(annotated, [Answer(str(i), "", text) for i, text in enumerate(texts)])
    assert 0 <= result.score <= 100
    assert math.isfinite(result.details["distribution"])
    assert json.loads(json.dumps(result.to_dict())) == result.to_dict()


def test_huge_texts_are_scored() -> None:
    assert score(Annotations((annotation("a"),)), said(a="Yes" + "." * 1_000_000)).score == 100


@pytest.mark.parametrize("count", [1, 3, 15])
def test_missing_doubled_and_unknown_answers_are_named(count: int) -> None:
    annotated = Annotations(tuple(annotation(f"q{i:02}") for i in range(20)))
    answers = [Answer(f"q{i:02}", "", "yes") for i in range(20)]
    unknown = [Answer(f"u{i:02}", "", "yes") for i in range(count)]
    for given_, kind, letter in [
        (answers[count:], "no answer", "q"),
        (answers + answers[:count], "more than one answer", "q"),
        (answers + unknown, "not a question of this benchmark", "u"),
    ]:
        with pytest.raises(DataError) as caught:
            score(annotated, given_)
        message = str(caught.value)
        assert f"{kind} ({count})" in message
        assert message.count(f"  - {letter}") == min(count, 10)
        assert all(f"  - {letter}{i:02}" in message for i in range(min(count, 10)))


def test_numbers_stand_for_ids() -> None:
    assert score(Annotations((annotation("201307251"),)), [Answer(201307251, "", "yes")]).score == 100


# --- files


def write(folder: Path, content: Any) -> None:
    (folder / "testdev_balanced_questions.json").write_text(json.dumps(content))


def lines(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "llava_gqa_testdev_balanced.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small gqa folder without pictures."""
    folder = tmp_path / "gqa"
    folder.mkdir()
    write(folder, {"1": row("dog"), "2": row("cat")})
    lines(
        folder,
        [
            {"question_id": id, "image": f"n{id}.jpg", "text": "What is it?\nAnswer.", "category": "default"}
            for id in "21"
        ],
    )
    return folder


def test_read_and_questions(folder: Path) -> None:
    annotated, asked = gqa.read(folder.parent), gqa.questions(folder.parent)
    assert annotated.questions == (
        Annotation("1", "dog", "query", "rel", steps=1, words=3, group="thing"),
        Annotation("2", "cat", "query", "rel", steps=1, words=3, group="thing"),
    )
    assert [(question.id, question.text) for question in asked] == [(id, "What is it?\nAnswer.") for id in "21"]
    assert asked[0].image == folder / "images" / "n2.jpg"
    assert score(annotated, [Answer(question.id, question.text, "Cat") for question in asked]).score == 50


def test_the_data_folder_of_llava(folder: Path) -> None:
    (folder / "data" / "images").mkdir(parents=True)
    (folder / "testdev_balanced_questions.json").unlink()
    write(folder / "data", {"1": row("dog")})
    assert [question.id for question in gqa.read(folder.parent).questions] == ["1"]
    assert gqa.questions(folder.parent)[0].image == folder / "data" / "images" / "n2.jpg"


def test_unbalanced_questions_do_not_count(folder: Path) -> None:
    write(folder, {"1": row("dog", isBalanced=False), "2": row("cat")})
    assert score(gqa.read(folder.parent), said(**{"2": "cat"})).details["questions"]["all"] == 1
    write(folder, {"1": row("dog", isBalanced=False)})
    with pytest.raises(DataError, match="no balanced questions"):
        gqa.read(folder.parent)


@pytest.mark.parametrize(
    ("operations", "steps"),
    [
        ([], 0),
        ([("select", "dog (12)"), ("relate", "table,on,s (3)"), ("query", "name")], 2),
        ([("select", "dog (12)"), ("query", "color")], 2),
        ([("select", "dog (12)"), ("exist", "?")], 1),
        ([("select", "dog (12)"), ("exist", "?"), ("select", "cat"), ("exist", "?"), ("or", "")], 3),
        ([("select", "dog (12)"), ("choose name", "cat|dog")], 1),
        ([("select", "dog (12)"), ("choose color", "red|blue")], 2),
        ([("select", "things that exist")], 0),  # the words are looked for anywhere
        ([("query", "names")], 0),
        ([("verify query", None)], 1),
    ],
)
def test_reasoning_steps(folder: Path, operations: list[tuple[str, str]], steps: int) -> None:
    program = [{"operation": operation, "dependencies": [], "argument": argument} for operation, argument in operations]
    write(folder, {"1": row("dog", semantic=program)})
    assert gqa.read(folder.parent).questions[0].steps == steps


def test_words_are_split_at_any_white_space(folder: Path) -> None:
    write(folder, {"1": row("dog", question=" What's  the\u00a0red thing?\n"), "2": row("dog", question="")})
    assert [question.words for question in gqa.read(folder.parent).questions] == [4, 0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "must map question ids to questions"),
        ({}, "no balanced questions"),
        ({"1": 5}, "row 1"),
        ({"1": row("dog"), "2": row(5)}, "row 2: 'answer'"),
        ({"1": row("dog", isBalanced="yes")}, "row 1: 'isBalanced'"),
        ({"1": row("dog", question=None)}, "row 1: 'question'"),
        ({"1": row("dog", types={"semantic": "rel"})}, "row 1: 'structural'"),
        ({"1": row("dog", types=[])}, "row 1: 'types'"),
        ({"1": row("dog", groups={"global": 5})}, "row 1: 'global'"),
        ({"1": row("dog", groups=None)}, "row 1: 'groups'"),
        ({"1": row("dog", semantic="select")}, "row 1: 'semantic'"),
        ({"1": row("dog", semantic=[{"operation": "select"}])}, "row 1: 'semantic' must be a list of operations"),
        ({"1": row("dog", semantic=["select"])}, "row 1: 'semantic' must be a list of operations"),
    ],
)
def test_flawed_annotations(folder: Path, content: Any, message: str) -> None:
    write(folder, content)
    with pytest.raises(DataError, match=message) as caught:
        gqa.read(folder.parent)
    assert "testdev_balanced_questions.json" in str(caught.value)


@pytest.mark.parametrize("image", ["../x.jpg", "/etc/passwd", "a/../../x.jpg", "", "."])
def test_images_must_stay_in_their_folder(folder: Path, image: str) -> None:
    good = {"question_id": "1", "image": "a/../i.jpg", "text": "t"}
    lines(folder, [good, {**good, "image": image}])
    with pytest.raises(DataError, match="row 2"):
        gqa.questions(folder.parent)


def test_flawed_questions(folder: Path) -> None:
    lines(folder, [])
    with pytest.raises(DataError, match="holds no questions"):
        gqa.questions(folder.parent)
    lines(folder, [{"question_id": 1.5, "image": "i.jpg", "text": "t"}])
    with pytest.raises(DataError, match="row 1: 'question_id'"):
        gqa.questions(folder.parent)
    (folder / "llava_gqa_testdev_balanced.jsonl").write_text('{"question_id": "1"')
    with pytest.raises(DataError, match="line 1"):
        gqa.questions(folder.parent)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"data/testdev_balanced_questions\.json\n.*gqa/testdev_balanced_questions\.json"
    ):
        gqa.read(tmp_path)
    with pytest.raises(DataError, match=r"llava_gqa_testdev_balanced\.jsonl"):
        gqa.questions(tmp_path)


def test_what_only_sub_scores_need_may_be_left_out(tmp_path: Path) -> None:
    (tmp_path / "gqa").mkdir()
    content = {
        "1": {"answer": "dog", "types": {"structural": "query"}},
        "2": {"answer": "yes", "types": {"structural": "verify"}},
    }
    (tmp_path / "gqa" / "testdev_balanced_questions.json").write_text(json.dumps(content))
    result = score(gqa.read(tmp_path), [Answer("1", "", "Dog."), Answer("2", "", "no")])
    assert result.score == 50
    assert (result.details["open"], result.details["binary"]) == (100, 0)
    assert result.details["distribution"] == 0
