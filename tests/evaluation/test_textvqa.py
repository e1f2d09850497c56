"""TextVQA: the text rule, the join by prompt, the leave-one-out score, flawed files."""

from __future__ import annotations

import hashlib
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskft.errors import DataError
from maskft.evaluation.benchmarks import textvqa
from maskft.evaluation.benchmarks.common import Answer
from maskft.evaluation.benchmarks.textvqa import Annotations, asked, score, soft_score
from maskft.evaluation.benchmarks.vqa_text import CONTRACTIONS, normalise

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=60)  # lone surrogates too
TRICKY = st.lists(
    st.sampled_from(
        [*" \n\t.,?!;/-_'\"()@:5٣aA", "'s", "the", "none", "ten", "dont", "couldnt've", "1,000", "İ", "\ud800"]
    )
).map("".join)
POST = "Answer the question using a single word or phrase."


def prompt(question: str, tokens: str = "A, B") -> str:
    return f"{question}\nReference OCR token: {tokens}\n{POST}"


def annotations(*rows: tuple[str, str, list[str]]) -> Annotations:
    return Annotations(
        keys=tuple((image, question.lower()) for image, question, _ in rows),
        answers=tuple(tuple(humans) for _, _, humans in rows),
    )


def numbered(count: int) -> tuple[Annotations, list[Answer]]:
    """`count` questions, the i-th with i of ten humans who said "yes", and the answer "yes" to each."""
    rows = [(f"img{i}", f"What {i}?", ["yes"] * i + ["no"] * (10 - i)) for i in range(count)]
    return annotations(*rows), [Answer(image, prompt(question), "yes") for image, question, _ in rows]


# --- the text rule


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("", ""),
        ("Dakota Digital", "dakota digital"),
        ("  yes\n", "yes"),
        ("a\tb\nc", "b c"),  # line feeds and tabs are spaces; "a" is an article
        ("1,000", "1000"),
        ("red, blue", "red blue"),
        ("red,blue", "redblue"),
        ("what?", "what"),
        # Marks: a space if no mark of that kind touches a space, else dropped, wherever they stand.
        ("coca-cola", "coca cola"),
        ("coca -cola-zero", "coca colazero"),
        ("coca- cola-zero", "coca colazero"),
        ("coca\u00a0-cola", "coca cola"),  # only the plain space counts
        ("(a/b)", "b"),
        ("and/or - yes", "and or yes"),  # the dash goes, the slash is judged by itself
        ("x_y", "x y"),
        ("hi!", "hi"),
        ("hi !", "hi"),
        ("a,-b", "b"),  # the comma is gone before the dash is judged
        ("1,000-2", "1000 2"),  # and so is the comma between digits
        ("12:15", "12:15"),
        ("50% & $5", "50% & $5"),
        # Full stops: kept before a digit of any script.
        ("1.99", "1.99"),
        ("u.s.a.", "usa"),
        ("no. 5", "no 5"),
        ("no.5", "no.5"),
        ("..5", ".5"),
        (".٣", ".٣"),
        (".²", "²"),
        ("x" + "." * 32, "x"),
        ("x" + "." * 35, "x..."),  # only the first 32 are dropped
        (".5" + "." * 33, ".5."),  # one that is kept does not count
        # Words.
        ("None", "0"),
        ("zero one two three four five six seven eight nine ten", "0 1 2 3 4 5 6 7 8 9 10"),
        ("eleven", "eleven"),
        ("The cat and an owl", "cat and owl"),
        ("a", ""),
        ("A.", ""),
        ("dont", "don't"),
        ("don't", "don't"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("twas", "'twas"),
        ("'ows'at", "'ow's'at"),
        ("somebody'd", "somebodyd"),
        ("thats", "that's"),
        ("that's", "that 's"),  # 's is split off first, so these two differ
        ("let's", "let 's"),
        ("Ive", "ive"),  # the entries with a capital I never match
        ("mcdonald's", "mcdonald 's"),
        ("'s", "'s"),
        ("don-t", "don t"),
        ("do,nt", "don't"),
    ],
)
def test_normalise(text: str, normal: str) -> None:
    assert normalise(text) == normal


def test_the_contractions_are_the_official_ones() -> None:
    assert len(CONTRACTIONS) == 120
    table = json.dumps(CONTRACTIONS, sort_keys=True).encode()
    assert hashlib.sha256(table).hexdigest() == "52771f672b95913f862aae058e42219f9e1e4d7af64475a5cdf394301acf67a9"


def test_contractions_differ_by_apostrophes_only() -> None:
    assert all(key.replace("'", "") == word.replace("'", "") for key, word in CONTRACTIONS.items())
    assert {key for key, word in CONTRACTIONS.items() if len(word) != len(key) + 1} == {"let's", "she's", "somebody'd"}


@given(st.one_of(ANY_TEXT, TRICKY))
def test_normalise_takes_any_text(text: str) -> None:
    normal = normalise(text)
    assert normal == normal.strip() == normal.lower()
    assert not set(normal) & set(',?;/[]"{}()=+\\_-><@`!\n\t')
    assert not {"a", "an", "the", "none", "ten"} & set(normal.split(" "))
    assert normalise(text.upper().lower()) == normalise(text.upper())


# --- the score of one question


@pytest.mark.parametrize(("agreeing", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (5, 1), (10, 1)])
def test_soft_score(agreeing: int, expected: float) -> None:
    humans = ["yes"] * agreeing + ["no"] * (10 - agreeing)
    random.Random(agreeing).shuffle(humans)
    assert soft_score("yes", humans) == pytest.approx(expected, abs=1e-12)


@given(st.lists(st.sampled_from("ab"), min_size=10, max_size=10))
def test_soft_score_is_the_mean_over_nine_others(humans: list[str]) -> None:
    without_each = [humans[:i] + humans[i + 1 :] for i in range(10)]
    assert soft_score("a", humans) == sum(min(1, nine.count("a") / 3) for nine in without_each) / 10


# --- the join


@pytest.mark.parametrize(
    ("given", "question"),
    [
        (prompt("What IS it?"), "what is it?"),
        (prompt("What?", ""), "what?"),
        (f"Reference OCR token: A, B\nWhat?\n{POST}", "what?"),
        (f"Reference OCR token:A\nReference OCR token: What?\n{POST}", "reference ocr token: what?"),
        (f"What?\n{POST}", "what?"),
        ("Reference OCR token: A\nWhat?", "reference ocr token: a"),  # two lines: always the first
        ("What?\n", "what?"),
        ("OCR tokens: A, B. Question: What? Short answer:", "what?"),
        ("OCR tokens: A\nB. Question: What\nnow? Short answer: x Short answer:", "what\nnow?"),
        ("OCR tokens: Question: Question: What? Short answer:", "question: what?"),
        ("OCR tokens: Question:  Short answer:", ""),
        ("OCR tokens: Question: Short answer:", None),
        ("OCR tokens: A\nB", None),
        ("OCR tokens: Short answer: Question: What?", None),
        ("", None),
        ("What?", None),
        (f"What?\n\n{POST}", None),  # three lines without OCR tokens
        (f"What?\nReference OCR token: A\nB\n{POST}", None),
    ],
)
def test_asked(given: str, question: str | None) -> None:
    assert asked(given) == question


def test_one_image_with_two_questions() -> None:
    annotated = annotations(("i", "Who?", ["anna"] * 10), ("i", "WHAT?", ["bag"] * 10))
    answers = [Answer("i", prompt("What?"), "Bag."), Answer("i", prompt("who?"), "bag")]
    assert score(annotated, answers).score == 50


def test_score_and_its_details() -> None:
    annotated, answers = numbered(11)
    result = score(annotated, answers)
    assert result.score == pytest.approx(100 * (0.3 + 0.6 + 0.9 + 7) / 11)
    assert result.details == {
        "accuracy": result.score,
        "questions": 11,
        "levels": {"0": 1, "0.3": 1, "0.6": 1, "0.9": 1, "1": 7},
    }


def test_humans_and_model_are_made_comparable() -> None:
    humans = ["The Coca-Cola.", "coca cola", "coca/cola", "COCA  COLA", *"uvwxyz"]
    answer = Answer("i", prompt("What?"), "coca cola!")
    assert score(annotations(("i", "what?", humans)), [answer]).details["levels"]["1"] == 1


def test_repeated_questions_take_the_last_humans_and_as_many_answers() -> None:
    annotated = annotations(("i", "Who?", ["anna"] * 10), ("i", "who?", ["ben"] * 10))
    anna, ben = Answer("i", prompt("Who?"), "anna"), Answer("i", prompt("Who?"), "ben")
    assert score(annotated, [anna, ben]).score == score(annotated, [ben, anna]).score == 50
    assert score(annotated, [ben, ben]).score == 100
    with pytest.raises(DataError, match=r"no answer \(1\):\n  - \('i', 'who\?', 2\)"):
        score(annotated, [ben])
    with pytest.raises(DataError, match=r"more than one answer \(1\):\n  - \('i', 'who\?'\)"):
        score(annotated, [ben, ben, ben])


@given(st.randoms(use_true_random=False), st.lists(st.integers(0, 10), min_size=1, max_size=30))
def test_order_of_answers_never_matters(random: random.Random, agreeing: list[int]) -> None:
    rows = [(f"img{i % 3}", f"what {i}?", ["yes"] * n + ["no"] * (10 - n)) for i, n in enumerate(agreeing)]
    answers = [Answer(image, prompt(question), "Yes.") for image, question, _ in rows]
    before = score(annotations(*rows), answers)
    random.shuffle(answers)
    assert score(annotations(*rows), answers) == before


@given(st.one_of(ANY_TEXT, TRICKY), st.lists(ANY_TEXT, min_size=10, max_size=10))
def test_any_text_gives_a_score_in_range(text: str, humans: list[str]) -> None:
    result = score(annotations(("i", "who?", humans)), [Answer("i", prompt("Who?"), text)])
    assert math.isfinite(result.score)
    assert 0 <= result.score <= 100
    assert json.loads(json.dumps(result.to_dict())) == result.to_dict()


@given(ANY_TEXT)
def test_any_prompt_is_read_or_refused(text: str) -> None:
    with pytest.raises(DataError):
        score(annotations(("i", "who?", ["x"] * 10)), [Answer("i", text, "x")])


@pytest.mark.parametrize("count", [1, 3, 15])
def test_missing_doubled_and_unknown_answers_are_named(count: int) -> None:
    annotated, answers = numbered(20)
    for given_, kind, ids in [
        (answers[count:], "no answer", range(count)),
        (answers + answers[:count], "more than one answer", range(count)),
        (
            answers + [Answer(f"u{i}", prompt("Who?"), "x") for i in range(count)],
            "not a question of this benchmark",
            (),
        ),
    ]:
        with pytest.raises(DataError) as caught:
            score(annotated, given_)
        message = str(caught.value)
        assert f"{kind} ({count})" in message
        assert message.count("  - (") == min(count, 10)
        assert all(f"('img{i}', 'what {i}?')" in message for i in list(ids)[:10])


def test_prompts_without_a_question_are_named() -> None:
    annotated, answers = numbered(20)
    with pytest.raises(DataError, match="hold no question of TextVQA") as caught:
        score(annotated, [Answer(answer.question_id, "What?", "x") for answer in answers])
    assert str(caught.value).count("  - answer ") == 10


def test_nothing_to_score() -> None:
    assert score(Annotations((), ()), []).score == 0


# --- files


def lines(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "llava_textvqa_val_v051_ocr.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small textvqa folder without pictures."""
    folder = tmp_path / "textvqa"
    folder.mkdir()
    rows = [{"image_id": f"i{n}", "question": f"Who is {n}?", "answers": ["Anna"] * 10, "set": "val"} for n in (1, 2)]
    (folder / "TextVQA_0.5.1_val.json").write_text(json.dumps({"dataset_type": "val", "data": rows}))
    lines(
        folder,
        [
            {"question_id": f"i{n}", "image": f"i{n}.jpg", "text": prompt(f"Who is {n}?"), "category": "default"}
            for n in (2, 1)
        ],
    )
    return folder


def test_read_and_questions(folder: Path) -> None:
    annotated, asked_ = textvqa.read(folder.parent), textvqa.questions(folder.parent)
    assert annotated.keys == (("i1", "who is 1?"), ("i2", "who is 2?"))
    assert annotated.answers == (("Anna",) * 10,) * 2
    assert [question.id for question in asked_] == ["i2", "i1"]
    assert asked_[0].image == folder / "train_images" / "i2.jpg"
    assert asked_[0].text == prompt("Who is 2?")
    assert score(annotated, [Answer(question.id, question.text, "anna") for question in asked_]).score == 100


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "no list 'data'"),
        ('{"data": []}', "no list 'data'"),
        ('{"data": {"a": 1}}', "no list 'data'"),
        ('{"data": [{"image_id": 5, "question": "q", "answers": []}]}', "row 1: 'image_id'"),
        ('{"data": [{"image_id": "5", "question": "q"}]}', "row 1: 'answers'"),
        ('{"data": [{"image_id": "5", "question": "q", "answers": ["a"]}]}', "row 1: 'answers' must be 10 texts"),
        (json.dumps({"data": [{"image_id": "5", "question": "q", "answers": [1] * 10}]}), "must be 10 texts"),
        ('{"data": [7]}', "row 1"),
    ],
)
def test_flawed_annotations(folder: Path, content: str, message: str) -> None:
    (folder / "TextVQA_0.5.1_val.json").write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        textvqa.read(folder.parent)
    assert "TextVQA_0.5.1_val.json" in str(caught.value)


@pytest.mark.parametrize("image", ["../x.jpg", "/etc/passwd", "a/../../x.jpg", "", "."])
def test_images_must_stay_in_their_folder(folder: Path, image: str) -> None:
    good = {"question_id": "i", "image": "a/../i.jpg", "text": "t"}
    lines(folder, [good, {**good, "image": image}])
    with pytest.raises(DataError, match="row 2"):
        textvqa.questions(folder.parent)


def test_flawed_questions(folder: Path) -> None:
    lines(folder, [])
    with pytest.raises(DataError, match="holds no questions"):
        textvqa.questions(folder.parent)
    lines(folder, [{"question_id": "i", "image": None, "text": "t"}])
    with pytest.raises(DataError, match="row 1: 'image'"):
        textvqa.questions(folder.parent)
    (folder / "llava_textvqa_val_v051_ocr.jsonl").write_text('{"question_id": "i"')
    with pytest.raises(DataError, match="line 1"):
        textvqa.questions(folder.parent)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"TextVQA_0\.5\.1_val\.json"):
        textvqa.read(tmp_path)
    with pytest.raises(DataError, match=r"llava_textvqa_val_v051_ocr\.jsonl"):
        textvqa.questions(tmp_path)
